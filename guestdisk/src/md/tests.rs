//! Arrays that mdadm and Linux have made (testdata/md/make.sh), whole and with members missing, read and written; and superblocks that
//! lie.

use std::path::PathBuf;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::Random;

use super::*;
use crate::detect::Kind;
use crate::disks::Disks;
use crate::partition;

const BLOCK: usize = 4096;

fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let storage = Arc::new(MemStorage::from_bytes(bytes));
    Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
}

/// The names of all arrays.
fn made() -> Vec<String> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/md");
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter_map(|name| Some(name.strip_suffix(".zst")?.to_owned())).collect();
    names.sort();
    assert!(names.len() > 40, "{names:?}");
    names
}

/// The disk whose partitions are the members of an array.
fn load(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/md").join(format!("{name}.zst"));
    zstd::decode_all(&*std::fs::read(path).unwrap()).unwrap()
}

/// What was written into each array.
fn expected(size: u64) -> Vec<u8> {
    let mut bytes = vec![0; block::num::to_usize(size)];
    let count = bytes.len() / BLOCK;
    for (index, block) in (1_u64..).zip(bytes.chunks_mut(BLOCK)) {
        if index <= 160 || index > (count as u64).saturating_sub(24) {
            block.chunks_mut(8).for_each(|word| word.copy_from_slice(&index.to_le_bytes()[..word.len()]));
        }
    }
    bytes
}

fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; block::num::to_usize(device.size())];
    for (offset, piece) in (0..).step_by(40_000).zip(bytes.chunks_mut(40_000)) {
        device.read_at(piece, offset).unwrap();
    }
    bytes
}

/// Whether the beginning and the end are these bytes.
fn holds(device: &dyn BlockDevice, model: &[u8]) -> bool {
    let (head, tail) = (700_000, 110_000);
    let same = |at: usize, len: usize| {
        let mut bytes = vec![0; len];
        device.read_at(&mut bytes, at as u64).unwrap();
        bytes == model[at..at + len]
    };
    device.size() == model.len() as u64 && same(0, head) && same(model.len() - tail, tail)
}

fn only(disks: &Disks) -> &Array {
    let [array] = disks.arrays() else { panic!("{:?}", disks.problems()) };
    array
}

/// Where the members lie on the disk of an array.
fn partitions(bytes: &[u8]) -> Vec<Range<usize>> {
    let table = partition::read(&*disk(bytes.to_vec())).unwrap().unwrap();
    let range = |found: &partition::Partition| {
        block::num::to_usize(found.offset)..block::num::to_usize(found.offset + found.len)
    };
    table.partitions.iter().map(range).collect()
}

/// How many members an array can do without, whichever they are.
fn spare_members(array: &Array) -> usize {
    match array.level.as_str() {
        "raid1" => array.disks as usize - 1,
        "raid4" | "raid5" | "raid10" => 1,
        "raid6" => 2,
        _ => 0,
    }
}

/// All choices of up to `most` numbers below `count`.
fn choices(count: usize, most: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = vec![];
    for bits in 0_u32..1 << count {
        let chosen: Vec<usize> = (0..count).filter(|index| bits >> index & 1 == 1).collect();
        if !chosen.is_empty() && chosen.len() <= most {
            all.push(chosen);
        }
    }
    all
}

fn without(bytes: &[u8], members: &[usize]) -> Vec<u8> {
    let (mut bytes, partitions) = (bytes.to_vec(), partitions(bytes));
    members.iter().for_each(|member| bytes[partitions[*member].clone()].fill(0));
    bytes
}

#[test]
fn arrays_of_linux_are_read() {
    for name in made() {
        let disks = Disks::open(disk(load(&name))).unwrap();
        let array = only(&disks);
        assert_eq!(disks.problems(), Vec::<String>::new(), "{name}");
        assert!(array.missing.is_empty() && !array.dirty && array.locked.is_none(), "{name}: {array:?}");
        assert!(name.starts_with(&array.level), "{name} {}", array.level);
        if array.version == Version::V0_90 {
            assert_eq!((array.name.as_str(), array.full_name.as_str()), ("md7", ""), "{name}");
        } else {
            assert_eq!(
                (array.name.clone(), array.full_name.clone()),
                (format!("md/{name}"), format!("lab:{name}"))
            );
        }
        assert!(array.size > 1_000_000, "{name}: {}", array.size);
        assert!(content(&*array.device().unwrap()) == expected(array.size), "{name}: other content");
        let volume = disks.find(&format!("/dev/{}", array.name)).unwrap();
        assert_eq!(volume.device.size(), array.size);
    }
}

#[test]
fn arrays_with_members_missing() {
    for name in made() {
        let bytes = load(&name);
        let (count, spare) = {
            let disks = Disks::open(disk(bytes.clone())).unwrap();
            (only(&disks).disks as usize, spare_members(only(&disks)))
        };
        for missing in choices(count, (spare + 1).min(count - 1)) {
            let disks = Disks::open(disk(without(&bytes, &missing))).unwrap();
            let array = only(&disks);
            let numbers: Vec<u32> = array.missing.clone();
            assert_eq!(numbers.len(), missing.len(), "{name} without {missing:?}");
            match array.device() {
                Ok(device) => {
                    assert!(holds(&*device, &expected(array.size)), "{name} without {missing:?}");
                }
                Err(error) => {
                    assert!(missing.len() > spare, "{name} without {missing:?}: {error}");
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{name}");
                    assert!(error.to_string().contains("missing") && !error.hints().is_empty(), "{error}");
                }
            }
            assert!(!disks.problems().is_empty(), "{name}");
        }
    }
}

/// Writes at random places, and a model. Afterwards every member that can be done without is: copies and sums are right.
#[test]
fn what_is_written_reaches_all_members() {
    for name in made() {
        let bytes = load(&name);
        let device = disk(bytes.clone());
        let disks = Disks::open(Arc::clone(&device)).unwrap();
        let (mut model, array) = (expected(only(&disks).size), only(&disks).device().unwrap());
        let mut random = Random::new(name.len() as u64);
        for round in 0..60_usize {
            let at =
                if round % 2 == 0 { random.below(600_000) } else { array.size() - 1 - random.below(100_000) };
            let most = if round % 3 == 0 { 70_000 } else { 3000 };
            let len = 1 + block::num::to_usize(random.below(most).min(array.size() - 1 - at));
            let range = block::num::to_usize(at)..block::num::to_usize(at) + len;
            if round % 7 == 0 {
                array.write_zeroes_at(at, len as u64, block::ZeroMode::UNMAP).unwrap();
                model[range].fill(0);
            } else {
                random.fill(&mut model[range.clone()]);
                array.write_at(&model[range], at).unwrap();
            }
        }
        array.flush().unwrap();
        assert!(content(&*array) == model, "{name}");
        let mut after = vec![0; bytes.len()];
        device.read_at(&mut after, 0).unwrap();
        let (count, spare) = (only(&disks).disks as usize, spare_members(only(&disks)));
        for missing in choices(count, spare) {
            let disks = Disks::open(disk(without(&after, &missing))).unwrap();
            assert!(holds(&*only(&disks).device().unwrap(), &model), "{name} without {missing:?}");
        }
        array.write_at(&[0; 2], array.size() - 1).unwrap_err();
        array.read_at(&mut [0; 2], array.size() - 1).unwrap_err();
    }
}

/// Writes to an array that lacks a member: sums stand for what cannot be written, and the member is out of date afterwards.
#[test]
fn what_is_written_without_a_member_makes_it_old() {
    for name in [
        "raid1-1.2",
        "raid1-1.0",
        "raid1-0.90",
        "raid10-n2-4",
        "raid5-left-symmetric",
        "raid6-right-asymmetric",
        "raid5-0.90",
    ] {
        let bytes = load(name);
        let device = disk(without(&bytes, &[1]));
        let disks = Disks::open(Arc::clone(&device)).unwrap();
        let array = only(&disks).device().unwrap();
        let mut model = expected(array.size());
        model[30_000..130_000].fill(0xa5);
        array.write_at(&model[30_000..130_000], 30_000).unwrap();
        assert!(content(&*array) == model, "{name}");
        // The member comes back.
        let mut after = vec![0; bytes.len()];
        device.read_at(&mut after, 0).unwrap();
        let member = partitions(&bytes)[1].clone();
        after[member.clone()].copy_from_slice(&bytes[member]);
        let disks = Disks::open(disk(after)).unwrap();
        let array = only(&disks);
        assert_eq!(array.members[1].state, MemberState::Stale, "{name}");
        assert_eq!((array.missing.len(), disks.problems().len()), (1, 2), "{name}: {:?}", disks.problems());
        assert!(content(&*array.device().unwrap()) == model, "{name}");
    }
}

/// A bitmap that knows nothing of a write must not bring the member up to date that missed it.
#[test]
fn the_bitmap_forgets_the_missing_member() {
    let bytes = load("raid1-1.2");
    let first = partitions(&bytes)[0].start;
    let bitmap = first + 8192;
    assert_eq!(&bytes[bitmap..bitmap + 4], b"bitm");
    for (missing, forgets) in [(vec![], false), (vec![2], true)] {
        let device = disk(without(&bytes, &missing));
        let disks = Disks::open(Arc::clone(&device)).unwrap();
        only(&disks).device().unwrap().write_at(&[1], 7).unwrap();
        let mut after = vec![0; bytes.len()];
        device.read_at(&mut after, 0).unwrap();
        let counter = |bytes: &[u8], at: usize| crate::bytes::le64(bytes, at);
        let old = counter(&bytes, first + 4096 + 200);
        let events = if forgets { old + 2 } else { old };
        assert_eq!(counter(&after, first + 4096 + 200), events);
        assert_eq!(counter(&after, bitmap + 24), events);
        let cleared = if forgets { events } else { counter(&bytes, bitmap + 32) };
        assert_eq!(counter(&after, bitmap + 32), cleared);
    }
}

mod states;
mod whole;
