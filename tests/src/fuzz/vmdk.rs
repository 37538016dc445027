//! VMDK images: bytes as they are, and good ones that somebody has changed a little.

use std::sync::{Arc, LazyLock};

use block::image::{CheckReport, Image as _, Repair};
use block::mem::MemStorage;
use block::{BlockDevice as _, Preallocation, Result, Storage, ZeroMode};
use vmdk::create::{CreateOptions, Subformat};
use vmdk::{Descriptor, Layout, OpenOptions, Vmdk};

use super::Bounded;

const SIZE: u64 = (40 << 20) + 512;
/// Where the edits of [`vmdk_edited`] count: the metadata of the sample.
const METADATA: usize = 64 << 10;

/// A disk over `main`; whatever files its descriptor names have the same bytes.
fn open(main: &Arc<Bounded>, writable: bool, for_check: bool) -> Result<Arc<Vmdk>> {
    let storage = Arc::clone(main) as Arc<dyn Storage>;
    let layout = Layout::read(&storage)?;
    let bytes = main.to_bytes();
    let copy = |_| Arc::new(Bounded::new(bytes.clone())) as Arc<dyn Storage>;
    let files = layout.files().iter().take(20).map(copy).collect();
    Vmdk::open(storage, layout, OpenOptions { writable, for_check, files, ..OpenOptions::default() })
}

/// Opens the bytes as a disk (a descriptor, or an extent of any kind), describes it, walks it and reads.
pub fn vmdk(bytes: &[u8]) {
    if let Ok(parsed) = Descriptor::parse(bytes) {
        let text = bytes.split(|byte| *byte == 0).next().unwrap();
        assert_eq!(parsed.encode(), text, "a descriptor that is not changed stays what it is");
        let mut changed = parsed;
        changed.set_cid(0x0123_4567);
        let again = Descriptor::parse(&changed.encode()).expect("a descriptor with another content ID");
        assert_eq!(again, changed);
    }
    let storage = Arc::new(Bounded::new(bytes.to_vec()));
    if let Ok(disk) = open(&storage, false, false) {
        let _ = disk.info();
        look(&disk);
    }
    check(&storage, Repair::None);
    assert!(storage.to_bytes() == bytes, "reading has changed the image");
}

/// Reads here and there; what could be read.
fn look(disk: &Vmdk) -> Vec<Option<Vec<u8>>> {
    let mut buf = vec![0; 64 << 10];
    for extent in block::extent::extents(disk, 0, u64::MAX).take(300) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.end() <= disk.size(), "an extent outside the disk: {extent:?}");
    }
    let size = disk.size();
    let places = (0..8).map(|step| size / 8 * step).chain((0..24).map(|index| index * 65536));
    let read = |offset: u64| {
        let len = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        disk.read_at(&mut buf[..len], offset.min(size)).ok().map(|()| buf[..len].to_vec())
    };
    places.map(read).collect()
}

fn check(storage: &Arc<Bounded>, repair: Repair) -> Option<CheckReport> {
    open(storage, repair != Repair::None, true).ok()?.check(repair).ok()
}

/// A sparse disk with some grains.
fn sample() -> Vec<u8> {
    let options = CreateOptions {
        size: SIZE,
        subformat: Subformat::MonolithicSparse,
        adapter: "ide".to_owned(),
        hardware: "4".to_owned(),
        tools: "0".to_owned(),
        zero_grains: true,
        parent: None,
        preallocation: Preallocation::Off,
    };
    let memory = Arc::new(MemStorage::new());
    let storage = Arc::clone(&memory) as Arc<dyn Storage>;
    options.make_one_file(&storage, &options.descriptor("x").unwrap()).unwrap();
    let layout = Layout::read(&storage).unwrap();
    let disk = Vmdk::open(storage, layout, OpenOptions { writable: true, ..OpenOptions::default() }).unwrap();
    disk.write_at(&[7; 200_000], 100).unwrap();
    disk.write_at(&[8; 70_000], SIZE - 70_000).unwrap();
    disk.write_zeroes_at(65536, 65536, ZeroMode::UNMAP).unwrap();
    disk.close().unwrap();
    memory.to_bytes()
}

/// A good image with edits: six bytes each, a place in the metadata (in words; those with the top bit set count from
/// the tables) and a value. It is read, repaired and written to. What could be read stays what it was through a repair
/// that calls the image clean, and what is written to a clean image can be read back.
pub fn vmdk_edited(bytes: &[u8]) {
    static SAMPLE: LazyLock<Vec<u8>> = LazyLock::new(sample);
    let mut image = SAMPLE.clone();
    for edit in bytes.as_chunks::<6>().0.iter().take(16) {
        let [a, b, value @ ..] = *edit;
        let word = usize::from(u16::from_le_bytes([a, b]));
        let at = match word & 0x8000 {
            0 => word * 4 % METADATA,
            _ => 21 * 512 + (word & 0x7fff) * 4 % 8192,
        };
        image[at..at + 4].copy_from_slice(&value);
    }
    vmdk(&image);
    let storage = Arc::new(Bounded::new(image));
    let before = open(&storage, false, false).map(|disk| look(&disk));
    let Some(report) = check(&storage, Repair::All) else { return };
    let again = check(&storage, Repair::None).expect("a check after a repair");
    assert_eq!(report.is_clean(), again.is_clean(), "{report:?} {again:?}");
    if !again.is_clean() {
        return;
    }
    let Ok(disk) = open(&storage, true, false) else { return };
    if let Ok(before) = before
        && report.corruptions_fixed == 0
    {
        assert!(before == look(&disk), "a repair with nothing to do has changed the disk");
    }
    let size = disk.size();
    let pattern = [0x5a; 3000];
    for offset in [0, 300_000, size / 2, size.saturating_sub(3000)] {
        if offset + 3000 <= size && disk.write_at(&pattern, offset).is_ok() {
            let mut back = [0; 3000];
            disk.read_at(&mut back, offset).expect("what has been written can be read");
            assert!(back == pattern);
        }
    }
    if disk.close().is_ok() {
        drop(disk);
        let after = check(&storage, Repair::None).expect("a check after a write");
        assert!(after.is_clean(), "{after:?}");
    }
}
