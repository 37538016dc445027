use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::{CrashStorage, Fault, FaultStorage, Model, Op, Random};
use block::{BlockDevice, Preallocation};
use nix::errno::Errno;
use proptest::prelude::*;

use super::*;
use crate::create::{CreateOptions, Subformat};
use crate::disk::Parent;
use crate::{Layout, OpenOptions, Vmdk};

const SIZE: u64 = 700_000 / 512 * 512;

/// A new image.
fn created(size: u64, zero_grains: bool, parent: bool) -> Vec<u8> {
    let options = CreateOptions {
        size,
        subformat: Subformat::MonolithicSparse,
        adapter: "ide".to_owned(),
        hardware: "4".to_owned(),
        tools: "0".to_owned(),
        zero_grains,
        parent: parent.then(|| ("p.vmdk".to_owned(), 7)),
        preallocation: Preallocation::Off,
    };
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    options.make_one_file(&storage, &options.descriptor("x.vmdk").unwrap()).unwrap();
    let mut bytes = vec![0; to_usize(storage.len().unwrap())];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The same with small grains and few entries in a table, so that little disks have many of both.
fn small(size: u64, zero_grains: bool, parent: bool) -> Vec<u8> {
    let bytes = created(size, zero_grains, parent);
    let mut header = Header::parse(&bytes).unwrap();
    header.grain = 8;
    header.gtes_per_gt = 16;
    let tables = header.gd_sectors() + header.gd_entries();
    header.gd_offset = header.rgd_offset + tables;
    header.overhead = (header.gd_offset + tables).next_multiple_of(8);
    let mut image = vec![0; to_usize(header.overhead * SECTOR)];
    image[..512].copy_from_slice(&header.encode());
    image[512..21 * 512].copy_from_slice(&bytes[512..21 * 512]);
    for directory in [header.rgd_offset, header.gd_offset] {
        for index in 0..header.gd_entries() {
            let sector = u32::try_from(directory + header.gd_sectors() + index).unwrap();
            let at = to_usize(directory * SECTOR + index * 4);
            image[at..at + 4].copy_from_slice(&sector.to_le_bytes());
        }
    }
    image
}

fn parent_device() -> Arc<dyn BlockDevice> {
    let mut bytes = vec![0; to_usize(SIZE / 2 / 512 * 512)];
    Random::new(5).fill(&mut bytes);
    Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
}

fn open(storage: Arc<dyn Storage>, writable: bool, parent: bool) -> Result<Arc<Vmdk>> {
    let parent = parent.then(|| Parent { device: parent_device(), cid: Some(7), name: "p".to_owned() });
    let layout = Layout::read(&storage)?;
    Vmdk::open(storage, layout, OpenOptions { writable, parent, ..OpenOptions::default() })
}

fn model(parent: bool) -> Model {
    let mut bytes = vec![0; to_usize(SIZE)];
    if parent {
        let device = parent_device();
        device.read_at(&mut bytes[..to_usize(device.size())], 0).unwrap();
    }
    Model::from_bytes(bytes)
}

fn check(storage: &Arc<dyn Storage>, repair: Repair) -> CheckReport {
    use block::image::Image as _;
    let layout = Layout::read(storage).unwrap();
    let options = OpenOptions { writable: repair != Repair::None, for_check: true, ..OpenOptions::default() };
    Vmdk::open(Arc::clone(storage), layout, options).unwrap().check(repair).unwrap()
}

fn assert_clean(storage: &Arc<dyn Storage>) {
    let report = check(storage, Repair::None);
    assert!(report.is_clean(), "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn it_behaves_like_a_disk(
        raw in prop::collection::vec(any::<[u64; 3]>(), 1..40),
        zero_grains: bool, parent: bool, little: bool,
    ) {
        let image = if little { small(SIZE, zero_grains, parent) } else { created(SIZE, zero_grains, parent) };
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(image));
        let mut disk = open(Arc::clone(&storage), true, parent).unwrap();
        let mut model = model(parent);
        for raw in raw {
            let op = Op::from_raw(raw, SIZE);
            if op == Op::Reopen {
                disk.close().unwrap();
                drop(disk);
                assert_clean(&storage);
                disk = open(Arc::clone(&storage), true, parent).unwrap();
            }
            if raw[1] % 3 == 0 && let Op::Write { offset, len, .. } = op {
                disk.reserve(offset, len).unwrap();
            }
            op.run(&*disk).unwrap();
            model.apply(&op);
            prop_assert_eq!(model.compare(&*disk), Ok(()));
        }
        disk.close().unwrap();
        drop(disk);
        assert_clean(&storage);
        let disk = open(storage, false, parent).unwrap();
        prop_assert_eq!(model.compare(&*disk), Ok(()));
        let mut at = 0;
        while at < SIZE {
            at += disk.layer_extent(at, SIZE - at).unwrap().len;
        }
        prop_assert_eq!(at, SIZE);
    }
}

/// Every moment of a loss of power leaves an image that opens, shows what had been flushed, and can be repaired.
#[test]
fn what_was_flushed_survives_a_loss_of_power() {
    for (parent, zero_grains, seed) in
        [(false, false, 1), (true, false, 2), (true, true, 3), (false, true, 4)]
    {
        let storage = Arc::new(CrashStorage::new(small(SIZE, zero_grains, parent)));
        let disk = open(Arc::clone(&storage) as _, true, parent).unwrap();
        let mut states = vec![model(parent)];
        let ops = Op::sequence(60, SIZE, seed);
        let ops = ops.iter().filter(|op| !matches!(op, Op::Discard { .. }));
        for (op, number) in ops.zip(1..) {
            op.run(&*disk).unwrap();
            let mut state = states.last().unwrap().clone();
            state.apply(op);
            states.push(state);
            if *op == Op::Flush {
                storage.mark(number);
            }
        }
        disk.close().unwrap();
        drop(disk);
        for image in storage.images(150, seed) {
            let from = image.marks.last().map_or(0, |mark| to_usize(*mark));
            let left: Arc<dyn Storage> = Arc::clone(&image.storage) as _;
            check(&left, Repair::All);
            assert_clean(&left);
            let disk = open(left, true, parent).unwrap_or_else(|error| panic!("{image:?}: {error}"));
            let mut bytes = vec![0; to_usize(SIZE)];
            disk.read_at(&mut bytes, 0).unwrap();
            // Each byte is what it was at the last flush, or what some write after it has made of it.
            let wrong =
                (0..bytes.len()).find(|at| states[from..].iter().all(|s| s.bytes()[*at] != bytes[*at]));
            assert_eq!(wrong, None, "{}", image.description);
        }
    }
}

#[test]
fn a_failing_host_loses_nothing_that_had_been_flushed_and_the_image_stays_usable() {
    for nth in 0..40 {
        let memory: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(small(SIZE, false, false)));
        let faulty = Arc::new(FaultStorage::new(memory));
        let disk = open(Arc::clone(&faulty) as _, true, false).unwrap();
        disk.write_at(&[1; 100_000], 5000).unwrap();
        disk.flush().unwrap();
        faulty.fail(Fault::nth(nth, Errno::ENOSPC).on_changes());
        let results = [
            disk.write_at(&[2; 50_000], 200_000),
            disk.write_zeroes_at(5000, 20_000, ZeroMode::UNMAP),
            disk.flush(),
            disk.write_at(&[3; 9000], 300_000),
            disk.flush(),
        ];
        faulty.heal();
        disk.write_at(&[4; 10_000], 400_000).unwrap();
        disk.close().unwrap();
        drop(disk);
        let storage: Arc<dyn Storage> = faulty;
        assert_clean(&storage);
        let disk = open(storage, false, false).unwrap();
        let mut byte = [0];
        disk.read_at(&mut byte, 90_000).unwrap();
        assert_eq!(byte, [1], "{results:?}");
        disk.read_at(&mut byte, 409_999).unwrap();
        assert_eq!(byte, [4]);
    }
}

/// An image with some grains, and what it shows.
fn filled() -> (Vec<u8>, Model) {
    let storage = Arc::new(MemStorage::from_bytes(small(SIZE, false, false)));
    let disk = open(Arc::clone(&storage) as _, true, false).unwrap();
    let mut model = model(false);
    for (offset, seed) in [(0, 1), (100_000, 2), (300_000, 3)] {
        let op = Op::Write { offset, len: 60_000, seed };
        op.run(&*disk).unwrap();
        model.apply(&op);
    }
    disk.close().unwrap();
    drop(disk);
    (storage.to_bytes(), model)
}

fn memory(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(MemStorage::from_bytes(bytes))
}

fn put(bytes: &mut [u8], at: u64, value: u32) {
    bytes[to_usize(at)..to_usize(at) + 4].copy_from_slice(&value.to_le_bytes());
}

fn word(bytes: &[u8], at: u64) -> u32 {
    u32::from_le_bytes(bytes[to_usize(at)..to_usize(at) + 4].try_into().unwrap())
}

fn read_all(storage: Arc<dyn Storage>) -> Result<Vec<u8>> {
    let disk = open(storage, false, false)?;
    let mut bytes = vec![0; to_usize(disk.size())];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn a_damaged_directory_is_read_by_its_copy_and_restored_by_a_repair() {
    let (good, model) = filled();
    let header = Header::parse(&good).unwrap();
    type Damage<'a> = &'a dyn Fn(&mut [u8]);
    let damages: [Damage<'_>; 5] = [
        &|bytes| put(bytes, header.gd_offset * SECTOR, 0x7fff_ffff),
        &|bytes| put(bytes, header.gd_offset * SECTOR + 4, 0),
        &|bytes| bytes[to_usize(header.gd_offset * SECTOR)..][..to_usize(header.gd_entries() * 4)].fill(0),
        &|bytes| bytes[to_usize(header.gd_offset * SECTOR)..][..to_usize(header.gd_entries() * 4)].fill(0xee),
        &|bytes| put(bytes, header.rgd_offset * SECTOR, 0x7fff_ffff),
    ];
    for (number, damage) in damages.iter().enumerate() {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let storage = memory(bytes);
        assert_eq!(read_all(Arc::clone(&storage)).unwrap(), model.bytes(), "damage {number}");
        let error = open(Arc::clone(&storage), true, false).unwrap_err();
        assert!(error.hints()[0].contains("check -r"), "{error:?}");
        assert!(check(&storage, Repair::None).corruptions > 0);
        assert!(check(&storage, Repair::Leaks).corruptions > 0);
        let report = check(&storage, Repair::All);
        assert_eq!(report.corruptions, 0, "damage {number}: {report:?}");
        assert!(report.corruptions_fixed > 0);
        assert_clean(&storage);
        // The repaired copy stands alone.
        let mut bytes = vec![0; to_usize(storage.len().unwrap())];
        storage.read_at(&mut bytes, 0).unwrap();
        let other = if number == 4 { header.gd_offset } else { header.rgd_offset };
        bytes[to_usize(other * SECTOR)..][..to_usize(header.gd_entries() * 4)].fill(0xee);
        assert_eq!(read_all(memory(bytes)).unwrap(), model.bytes(), "damage {number}");
        open(storage, true, false).unwrap();
    }
}

#[test]
fn damaged_tables_are_read_by_their_copies_and_made_equal_by_a_repair() {
    let (good, model) = filled();
    let header = Header::parse(&good).unwrap();
    let table = |directory: u64| u64::from(word(&good, directory * SECTOR)) * SECTOR;
    let (main, copy) = (table(header.gd_offset), table(header.rgd_offset));
    for (at, value, shows) in [
        (main, 0x7fff_ff00, true),
        (main + 4, 3, true),
        (main + 8, 0, true),
        (main + 12, word(&good, main + 8), false),
        (copy, 0, true),
        (copy + 4, 0x7fff_ff00, true),
    ] {
        let mut bytes = good.clone();
        put(&mut bytes, at, value);
        let storage = memory(bytes);
        match read_all(Arc::clone(&storage)) {
            Ok(bytes) => assert!(shows && bytes == model.bytes(), "{at:#x}"),
            Err(error) => assert!(!shows && error.kind() == ErrorKind::Corrupt, "{error}"),
        }
        if !shows {
            continue;
        }
        assert_eq!(check(&storage, Repair::None).corruptions, 1);
        assert_eq!(check(&storage, Repair::All).corruptions_fixed, 1);
        assert_clean(&storage);
        assert_eq!(read_all(storage).unwrap(), model.bytes());
    }
}

/// Found by fuzzing: a repair made the "table" equal to its copy, which wrote over the grain that it lies in.
#[test]
fn a_table_in_the_place_of_something_else_is_no_table() {
    let (good, model) = filled();
    let header = Header::parse(&good).unwrap();
    let grain = u32::try_from(header.overhead).unwrap();
    for (directory, sector) in [
        (header.rgd_offset, grain),
        (header.rgd_offset, grain + 3),
        (header.rgd_offset, 1),
        (header.rgd_offset, word(&good, header.rgd_offset * SECTOR + 4)),
        (header.rgd_offset, u32::try_from(header.gd_offset).unwrap()),
    ] {
        let mut bytes = good.clone();
        put(&mut bytes, directory * SECTOR, sector);
        let storage = memory(bytes);
        let error = open(Arc::clone(&storage), true, false).unwrap_err();
        assert!(error.hints()[0].contains("check -r"), "{error:?}");
        assert!(check(&storage, Repair::None).corruptions > 0, "sector {sector}");
        let report = check(&storage, Repair::All);
        assert_eq!(report.corruptions, 0, "sector {sector}: {report:?}");
        assert_clean(&storage);
        assert_eq!(read_all(Arc::clone(&storage)).unwrap(), model.bytes());
        let disk = open(Arc::clone(&storage), true, false).unwrap();
        disk.write_at(&[7; 9000], 200_000).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_clean(&storage);
    }
}

/// Where the first grain table lies in the file, and its copy.
fn first_tables(bytes: &[u8]) -> [u64; 2] {
    let header = Header::parse(bytes).unwrap();
    let table = |directory: u64| u64::from(word(bytes, directory * SECTOR)) * SECTOR;
    [table(header.gd_offset), table(header.rgd_offset)]
}

/// Zeros in place of a table looked like an empty part of the disk, while the copy knew better.
#[test]
fn tables_that_were_zeroed_are_read_by_their_copies() {
    let (mut bytes, mut model) = filled();
    let [main, _] = first_tables(&bytes);
    bytes[to_usize(main)..][..512].fill(0);
    let storage = memory(bytes);
    assert_eq!(read_all(Arc::clone(&storage)).unwrap(), model.bytes());
    // Written to as it is, nothing of it is lost, and what was lost is there again.
    let disk = open(Arc::clone(&storage), true, false).unwrap();
    let op = Op::Write { offset: 59_000, len: 8000, seed: 9 };
    op.run(&*disk).unwrap();
    model.apply(&op);
    assert_eq!(model.compare(&*disk), Ok(()));
    disk.close().unwrap();
    drop(disk);
    assert_eq!(read_all(Arc::clone(&storage)).unwrap(), model.bytes());
    check(&storage, Repair::All);
    assert_clean(&storage);
    assert_eq!(read_all(storage).unwrap(), model.bytes());
}

#[test]
fn copies_that_contradict_each_other_are_an_error_unless_a_crash_explains_it() {
    let (good, model) = filled();
    let [main, copy] = first_tables(&good);
    let mut bytes = good.clone();
    put(&mut bytes, copy + 4, word(&good, main + 8));
    let storage = memory(bytes.clone());
    let error = read_all(Arc::clone(&storage)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&format!("{:#x}", main + 4)), "{error}");
    assert!(error.hints()[0].contains("vimg check -r all"), "{error:?}");
    let disk = open(Arc::clone(&storage), true, false).unwrap();
    assert_eq!(disk.write_at(&[1; 5000], 4096).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut first = [0; 4096];
    disk.read_at(&mut first, 0).unwrap();
    assert_eq!(first, model.bytes()[..4096], "what is in order can be read");
    drop(disk);
    check(&storage, Repair::All);
    assert_eq!(read_all(storage).unwrap(), model.bytes());
    // One copy had been written, the other not.
    bytes[to_usize(crate::header::UNCLEAN_AT)] = 1;
    assert_eq!(read_all(memory(bytes)).unwrap(), model.bytes());
}

#[test]
fn a_copy_that_was_never_kept_says_nothing() {
    let (good, model) = filled();
    let header = Header::parse(&good).unwrap();
    let len = to_usize(header.gd_entries() * SECTOR);
    let [_, copy] = first_tables(&good);
    for byte in [0, 0xee] {
        let mut bytes = good.clone();
        bytes[to_usize(copy)..][..len].fill(byte);
        assert_eq!(read_all(memory(bytes)).unwrap(), model.bytes());
    }
}

/// A grain of zeros (entry 1) is something that a lost entry can have been, too.
#[test]
fn a_grain_of_zeros_is_known_by_the_copy() {
    let storage = Arc::new(MemStorage::from_bytes(small(SIZE, true, true)));
    let disk = open(Arc::clone(&storage) as _, true, true).unwrap();
    disk.write_zeroes_at(0, 8192, ZeroMode::UNMAP).unwrap();
    disk.close().unwrap();
    drop(disk);
    let mut bytes = storage.to_bytes();
    let [main, _] = first_tables(&bytes);
    assert_eq!(word(&bytes, main), 1);
    put(&mut bytes, main, 0);
    let disk = open(memory(bytes), false, true).unwrap();
    assert_eq!(disk.layer_extent(0, 8192).unwrap().stored, Stored::Zero);
}

#[test]
fn what_cannot_be_right_is_never_shown() {
    let (good, _) = filled();
    let header = Header::parse(&good).unwrap();
    let table = |directory: u64| u64::from(word(&good, directory * SECTOR)) * SECTOR;
    let both = [table(header.gd_offset), table(header.rgd_offset)];
    for (entry, said) in [
        (1, "lies in the metadata"),
        (u32::try_from(header.gd_offset).unwrap(), "lies in the metadata"),
        (u32::try_from(header.overhead).unwrap() + 1, "is not aligned"),
        (0xffff_fff8, "points after EOF"),
    ] {
        let mut bytes = good.clone();
        both.iter().for_each(|at| put(&mut bytes, at + 4, entry));
        let storage = memory(bytes);
        assert_eq!(read_all(Arc::clone(&storage)).unwrap_err().kind(), ErrorKind::Corrupt);
        let report = check(&storage, Repair::None);
        assert_eq!(report.corruptions, 1);
        assert!(report.messages[0].contains("sector 8") && report.messages[0].contains(said), "{report:?}");
        let report = check(&storage, Repair::All);
        assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
    }
    // A grain of two places is found by a check.
    let mut bytes = good.clone();
    both.iter().for_each(|at| put(&mut bytes, at + 4, word(&good, both[0])));
    assert_eq!(check(&memory(bytes), Repair::None).corruptions, 1);
}

#[test]
fn a_file_that_was_cut_off_is_an_error_and_no_zeros() {
    let (good, _) = filled();
    let header = Header::parse(&good).unwrap();
    for len in [good.len() - 512, good.len() / 2, to_usize(header.overhead * SECTOR) + 100] {
        let storage = memory(good[..len].to_vec());
        let error = read_all(Arc::clone(&storage)).unwrap_err();
        assert!(error.to_string().contains("past the end of the file"), "{error}");
        assert!(check(&storage, Repair::None).corruptions > 0);
    }
    let storage = memory(good[..to_usize(header.overhead * SECTOR) - 512].to_vec());
    let error = read_all(Arc::clone(&storage)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("File truncated, expecting at least {} bytes", header.overhead * SECTOR)
    );
    check(&storage, Repair::None);
}

#[test]
fn directories_beyond_the_end_are_an_error() {
    let (good, model) = filled();
    let mut header = Header::parse(&good).unwrap();
    let with = |header: &Header| {
        let mut bytes = good.clone();
        bytes[..512].copy_from_slice(&header.encode());
        memory(bytes)
    };
    header.gd_offset = u64::MAX / 512 - 3;
    assert_eq!(read_all(with(&header)).unwrap(), model.bytes(), "the copy is used");
    header.rgd_offset = 1 << 40;
    assert_eq!(read_all(with(&header)).unwrap_err().kind(), ErrorKind::Truncated);
    assert_eq!(check(&with(&header), Repair::All).corruptions, 2);
    header.flags &= !flags::REDUNDANT;
    assert_eq!(read_all(with(&header)).unwrap_err().kind(), ErrorKind::Truncated);
}

#[test]
fn both_copies_are_kept_in_step_and_the_mark_goes_with_a_clean_close() {
    let storage = Arc::new(MemStorage::from_bytes(created(SIZE, false, false)));
    let disk = open(Arc::clone(&storage) as _, true, false).unwrap();
    disk.write_at(&[1], 0).unwrap();
    disk.flush().unwrap();
    let bytes = storage.to_bytes();
    let header = Header::parse(&bytes).unwrap();
    assert!(header.unclean);
    let entry = |directory: u64| word(&bytes, u64::from(word(&bytes, directory * SECTOR)) * SECTOR);
    assert_eq!(entry(header.gd_offset), entry(header.rgd_offset));
    assert_eq!(u64::from(entry(header.gd_offset)), header.overhead);
    assert_eq!(bytes.len() as u64, (header.overhead + header.grain) * SECTOR, "grains are whole");
    disk.close().unwrap();
    assert!(!Header::parse(&storage.to_bytes()).unwrap().unclean);
}

#[test]
fn grains_that_are_set_aside_lie_in_order_whatever_the_order_of_writes() {
    let storage = Arc::new(MemStorage::from_bytes(created(1 << 20, false, false)));
    let disk = open(Arc::clone(&storage) as _, true, false).unwrap();
    disk.reserve(0, 1 << 20).unwrap();
    for index in (0..16_u64).rev() {
        disk.write_at(&[u8::try_from(index + 1).unwrap(); 65536], index * 65536).unwrap();
    }
    let extent = disk.layer_extent(0, 1 << 20).unwrap();
    assert_eq!((extent.len, extent.host_offset), (1 << 20, Some(65536)));
}

#[test]
fn version_3_is_not_written_to() {
    let mut bytes = created(SIZE, false, false);
    bytes[4] = 3;
    let error = open(memory(bytes), true, false).unwrap_err();
    assert_eq!(error.to_string(), "VMDK version 3 must be read only");
}

#[test]
fn zeros_over_a_parent_hide_it() {
    for zero_grains in [false, true] {
        let disk = open(memory(created(SIZE, zero_grains, true)), true, true).unwrap();
        let fast = disk.write_zeroes_at(0, 65536, ZeroMode::UNMAP.fast());
        assert_eq!(fast.is_ok(), zero_grains);
        disk.write_zeroes_at(0, 65536, ZeroMode::UNMAP).unwrap();
        let mut bytes = [1; 65536];
        disk.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        let stored = if zero_grains { Stored::Zero } else { Stored::Data };
        assert_eq!(disk.layer_extent(0, 1).unwrap().stored, stored);
    }
}

#[test]
fn missing_tables_are_made() {
    let (good, model) = filled();
    let header = Header::parse(&good).unwrap();
    let mut bytes = good;
    let last = header.gd_entries() - 1;
    for directory in [header.gd_offset, header.rgd_offset] {
        put(&mut bytes, directory * SECTOR + last * 4, 0);
    }
    let storage = memory(bytes);
    assert_clean(&storage);
    let disk = open(Arc::clone(&storage), true, false).unwrap();
    disk.write_at(&[9; 3000], SIZE - 3000).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_clean(&storage);
    let shown = read_all(storage).unwrap();
    assert_eq!(shown[..to_usize(SIZE) - 3000], model.bytes()[..to_usize(SIZE) - 3000]);
    assert_eq!(shown[to_usize(SIZE) - 3000..], [9; 3000]);
}

/// Grains smaller than tables, no tables, and grains that are given back: tables go where nothing else is.
#[test]
fn tables_are_made_among_small_grains_that_come_and_go() {
    for (grain, gtes, parent) in [(1, 256, false), (1, 512, true), (4, 16, false), (2, 256, true)] {
        let mut image = created(SIZE, false, parent);
        let mut header = Header::parse(&image).unwrap();
        (header.grain, header.gtes_per_gt) = (grain, gtes);
        header.rgd_offset = 21;
        header.gd_offset = header.rgd_offset + header.gd_sectors();
        header.overhead = (header.gd_offset + header.gd_sectors()).next_multiple_of(8);
        image.resize(to_usize(header.overhead * SECTOR), 0);
        image[21 * 512..].fill(0);
        image[..512].copy_from_slice(&header.encode());
        let storage = memory(image);
        let disk = open(Arc::clone(&storage), true, parent).unwrap();
        let (mut random, mut model) = (Random::new(grain), model(parent));
        for step in 0..800 {
            // Further and further on: grains are given back before the last tables are made.
            let end = SIZE / 512 * (step + 1) / 800 + 1;
            let offset = random.below(end).min(SIZE / 512 - 1) * 512;
            let len = ((1 + random.below(9)) * 512).min(SIZE - offset);
            let op = match step % 4 {
                // Over the end of the parent, where there is no table yet.
                _ if step == 9 => Op::Zero { offset: SIZE / 4, len: SIZE / 2, mode: ZeroMode::UNMAP },
                0 | 1 => Op::Write { offset, len, seed: step },
                2 => Op::Zero { offset, len, mode: ZeroMode::UNMAP },
                _ => Op::Flush,
            };
            op.run(&*disk).unwrap();
            model.apply(&op);
        }
        assert_eq!(model.compare(&*disk), Ok(()), "grain {grain}");
        disk.close().unwrap();
        drop(disk);
        assert_clean(&storage);
        assert_eq!(model.compare(&*open(storage, false, parent).unwrap()), Ok(()), "grain {grain}");
    }
}

/// Threads that share every grain, with sectors of their own in each, a parent below, and flushes all the time.
#[test]
fn threads_do_not_get_in_each_others_way() {
    const THREADS: u64 = 4;
    for (zero_grains, parent) in [(false, true), (true, true), (true, false)] {
        let storage = memory(small(SIZE, zero_grains, parent));
        let disk = open(Arc::clone(&storage), true, parent).unwrap();
        let disk = &*disk;
        let worker = |thread: u64| {
            let mut random = Random::new(thread + 1);
            let mut own = HashMap::new();
            for step in 0..1500_u64 {
                let sector = random.below(SIZE / 512 / THREADS) * THREADS + thread;
                let byte = step.to_le_bytes()[0];
                match step % 8 {
                    0..4 => disk.write_at(&[byte; 512], sector * 512).unwrap(),
                    4 | 5 => disk.write_zeroes_at(sector * 512, 512, ZeroMode::UNMAP).unwrap(),
                    6 => disk.reserve(sector * 512, 512).unwrap(),
                    _ => disk.flush().unwrap(),
                }
                if step % 8 < 6 {
                    own.insert(sector, if step % 8 < 4 { byte } else { 0 });
                }
                let (sector, wanted) = own.iter().nth(to_usize(step / 16).min(own.len() - 1)).unwrap();
                let mut bytes = [0xee; 512];
                disk.read_at(&mut bytes, sector * 512).unwrap();
                assert_eq!(bytes, [*wanted; 512], "sector {sector}");
            }
            own
        };
        let written: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || worker(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        disk.close().unwrap();
        let mut bytes = model(parent).bytes().to_vec();
        for (sector, byte) in written {
            bytes[to_usize(sector * 512)..][..512].fill(byte);
        }
        assert_clean(&storage);
        let disk = open(Arc::clone(&storage), false, parent).unwrap();
        assert_eq!(Model::from_bytes(bytes).compare(&*disk), Ok(()));
    }
}

#[test]
fn a_disk_of_60_tib_opens_at_once_and_its_hole_is_one_step() {
    let dir = tempfile::tempdir().unwrap();
    let options = block::file::FileOptions::creating(block::file::CreateMode::New);
    let file = block::file::HostFile::open(&dir.path().join("x"), &options).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(file);
    let spec = CreateOptions {
        size: 60 << 40,
        subformat: Subformat::MonolithicSparse,
        adapter: "ide".to_owned(),
        hardware: "4".to_owned(),
        tools: "0".to_owned(),
        zero_grains: false,
        parent: None,
        preallocation: Preallocation::Off,
    };
    spec.make_one_file(&storage, &spec.descriptor("x").unwrap()).unwrap();
    let start = std::time::Instant::now();
    let disk = open(Arc::clone(&storage), true, false).unwrap();
    disk.write_at(&[1; 100], 30 << 40).unwrap();
    let first = disk.layer_extent(0, 60 << 40).unwrap();
    assert_eq!((first.stored, first.len), (Stored::Absent, 30 << 40));
    disk.close().unwrap();
    // Reading the tables would take a hundred times as long; a busy machine without optimisation needs seconds.
    assert!(start.elapsed().as_secs() < 120, "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 1..12)) {
        let (mut bytes, _) = filled();
        let metadata = 48 * 512;
        for (index, value) in changes {
            let at = index.index(metadata / 4) as u64 * 4;
            put(&mut bytes, at, value);
        }
        let storage = memory(bytes);
        if let Ok(disk) = Layout::read(&storage).and_then(|_| open(Arc::clone(&storage), false, false)) {
            let mut buf = vec![0; 65536];
            for at in (0..disk.size().min(SIZE)).step_by(65536) {
                let len = buf.len().min(to_usize(disk.size() - at));
                let _ = disk.read_at(&mut buf[..len], at);
                let _ = disk.layer_extent(at, disk.size() - at);
            }
            check(&storage, Repair::All);
        }
        if let Ok(disk) = Layout::read(&storage).and_then(|_| open(Arc::clone(&storage), true, false))
            && disk.size() > 5000
        {
            let _ = disk.write_at(&[1; 5000], 0);
            let _ = disk.close();
        }
    }
}
