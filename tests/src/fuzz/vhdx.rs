//! VHDX images that somebody has changed a little: the structures of a good one with edits, sealed again so that the
//! edits are not merely wrong checksums.

use std::sync::{Arc, LazyLock};

use block::image::{Image as _, Repair};
use block::mem::MemStorage;
use block::{BlockDevice, Storage, ZeroMode};
use vhdx::create::{CreateOptions, create};
use vhdx::{OpenOptions, Source, Vhdx};

use super::Bounded;

const MIB: u64 = 1 << 20;
const METADATA: u64 = 3 * MIB;

/// A small image with some blocks, and a log that has not been emptied.
fn base(has_parent: bool) -> Vec<u8> {
    let memory = Arc::new(MemStorage::new());
    let options = CreateOptions { block_size: Some(MIB), ..CreateOptions::new(3 * MIB + 512) };
    create(&*memory, &options).unwrap();
    if has_parent {
        add_parent(&*memory);
    }
    let storage: Arc<dyn Storage> = Arc::clone(&memory) as Arc<dyn Storage>;
    let source = Source::read(&storage).unwrap();
    let image = Vhdx::open(source, OpenOptions { writable: true, parent: None }).unwrap();
    image.write_at(&[7; 5000], 100).unwrap();
    image.flush().unwrap();
    if has_parent {
        // A block that is partly there, and its bitmap.
        let bitmap = storage.len().unwrap();
        storage.write_at(&[0x5a; 1 << 20], bitmap).unwrap();
        storage.write_at(&[9; 1 << 20], bitmap + MIB).unwrap();
        storage.write_at(&((bitmap + MIB) | 7).to_le_bytes(), 2 * MIB + 8).unwrap();
        storage.write_at(&(bitmap | 6).to_le_bytes(), 2 * MIB + 4096 * 8).unwrap();
    }
    drop(image);
    memory.to_bytes()
}

/// A parent locator with two keys.
fn add_parent(storage: &dyn Storage) {
    let mut locator = vhdx::Guid::parse("b04aefb7-d19e-4a81-b789-25b8e9445913").unwrap().0.to_vec();
    locator.extend([0, 0, 2, 0]);
    let texts = ["parent_linkage", "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}", "relative_path", ".\\p.vhdx"];
    let texts = texts.map(|text| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
    let mut at = 44u32;
    for pair in texts.chunks(2) {
        let lens = [0, 1].map(|n| u16::try_from(pair[n].len()).unwrap());
        locator.extend([at, at + u32::from(lens[0])].iter().flat_map(|n| n.to_le_bytes()));
        locator.extend(lens.iter().flat_map(|n| n.to_le_bytes()));
        at += u32::from(lens[0]) + u32::from(lens[1]);
    }
    locator.extend(texts.concat());
    let mut entry = vhdx::Guid::parse("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").unwrap().0.to_vec();
    entry.extend([0x11000, u32::try_from(locator.len()).unwrap(), 4, 0].iter().flat_map(|n| n.to_le_bytes()));
    storage.write_at(&entry, METADATA + 6 * 32).unwrap();
    storage.write_at(&[6], METADATA + 10).unwrap();
    storage.write_at(&locator, METADATA + 0x11000).unwrap();
    storage.write_at(&[2], METADATA + 0x10004).unwrap();
}

static BASES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [base(false), base(true)]);

/// Structures that are changed: first byte, and how many bytes of it.
const AREAS: [(u64, u64); 8] = [
    (64 << 10, 128),
    (128 << 10, 128),
    (192 << 10, 256),
    (256 << 10, 256),
    (MIB, 16 << 10),
    (2 * MIB, 64 << 10),
    (METADATA, 512),
    (METADATA + 0x10000, 8 << 10),
];

/// Puts the edits that `data` lists into the image: where, how many bytes, the bytes.
fn edit(bytes: &mut [u8], mut data: &[u8]) {
    while let [area, low, high, len, rest @ ..] = data {
        let (start, room) = AREAS[usize::from(*area) % AREAS.len()];
        let within = u64::from(u16::from_le_bytes([*low, *high])) % room;
        let len = (usize::from(*len) % 16 + 1).min(rest.len());
        let at = usize::try_from(start + within).unwrap();
        bytes[at..at + len].copy_from_slice(&rest[..len]);
        data = &rest[len..];
    }
}

/// Makes the checksums of headers, region tables and the first entry of the log right.
fn seal(bytes: &mut [u8]) {
    let length = u32::from_le_bytes(bytes[(1 << 20) + 8..][..4].try_into().unwrap());
    let entry = usize::try_from(length).unwrap().clamp(4096, 1 << 20);
    let structures =
        [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10), (1 << 20, entry)];
    for (at, len) in structures {
        bytes[at + 4..at + 8].fill(0);
        let sum = crc32c::crc32c(&bytes[at..at + len]);
        bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

fn open(storage: &Arc<Bounded>, writable: bool) -> block::Result<Arc<Vhdx>> {
    let source = Source::read(&(Arc::clone(storage) as Arc<dyn Storage>))?;
    Vhdx::open(source, OpenOptions { writable, parent: None })
}

/// Opens, describes, walks, reads, checks, repairs and writes an image with edits. Readers change nothing; what a
/// writer has written and closed is there afterwards.
pub fn vhdx(data: &[u8]) {
    let [flags, edits @ ..] = data else { return };
    let mut bytes = BASES[usize::from(flags & 1)].clone();
    edit(&mut bytes, edits);
    if flags & 2 == 0 {
        seal(&mut bytes);
    }
    let storage = Arc::new(Bounded::new(bytes.clone()));
    if let Ok(image) = open(&storage, false) {
        let _ = image.info();
        look(&image);
    }
    let _ = vhdx::check::check(&(Arc::clone(&storage) as Arc<dyn Storage>), Repair::None);
    assert!(storage.to_bytes() == bytes, "a reader has changed the image");
    if flags & 4 != 0 {
        let _ = vhdx::check::check(&(Arc::clone(&storage) as Arc<dyn Storage>), Repair::All);
    }
    change(&storage);
}

fn look(image: &Vhdx) {
    let mut buf = vec![0; 64 << 10];
    for extent in block::extent::extents(image, 0, u64::MAX).take(100) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.end() <= image.size(), "an extent outside the disk: {extent:?}");
        let len = usize::try_from(extent.len.min(64 << 10)).unwrap();
        let _ = image.read_at(&mut buf[..len], extent.offset);
    }
}

fn change(storage: &Arc<Bounded>) {
    let Ok(image) = open(storage, true) else { return };
    let size = image.size();
    let len = usize::try_from(size.min(3000)).unwrap();
    let places = [0, size / 2, size - len as u64].map(|at| at.min(size - len as u64));
    let written = places.map(|at| image.write_at(&vec![3; len], at).is_ok());
    let _ = image.write_zeroes_at(size / 3, (size / 3).min(4 * MIB), ZeroMode::UNMAP);
    let _ = image.discard_at(size / 4, (size / 4).min(4 * MIB));
    // The last of them lies behind what was zeroed and discarded.
    let kept = written[2] && size > 10_000;
    if image.close().is_err() || !kept {
        return;
    }
    drop(image);
    let image = open(storage, false).expect("it was opened for writing and closed");
    let mut read = vec![0; len];
    image.read_at(&mut read, places[2]).expect("it was written");
    assert!(read.iter().all(|&byte| byte == 3), "what was written is not there");
}
