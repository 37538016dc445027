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

/// Changes the superblocks of version 1.2 of all members, and makes their checksums right.
fn edited(name: &str, members: &[usize], edit: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut bytes = load(name);
    for (index, range) in partitions(&bytes).into_iter().enumerate() {
        if members.is_empty() || members.contains(&index) {
            let raw = &mut bytes[range.start + 4096..range.start + 8192];
            edit(raw);
            let sum = superblock::checksum(&raw[..superblock::summed(raw)], superblock::SUM_AT);
            raw[superblock::SUM_AT..superblock::SUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        }
    }
    bytes
}

fn set32(raw: &mut [u8], at: usize, value: u32) {
    raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn set64(raw: &mut [u8], at: usize, value: u64) {
    raw[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn members_that_fall_behind_are_left_out() {
    // One behind is as good as the others, two are not.
    for (behind, state) in [(1, MemberState::InSync), (2, MemberState::Stale)] {
        let events = |raw: &mut [u8]| set64(raw, 200, crate::bytes::le64(raw, 200) - behind);
        let mut bytes = edited("raid1-1.2", &[1], events);
        let member = partitions(&bytes)[1].clone();
        bytes[member.start + (1 << 20)..member.end].fill(0xee);
        let disks = Disks::open(disk(bytes)).unwrap();
        let array = only(&disks);
        assert_eq!(array.members[1].state, state);
        assert!(content(&*array.device().unwrap()) == expected(array.size));
        let told =
            disks.problems().iter().any(|problem| problem.contains("disk 1 partition 2 is out of date"));
        assert_eq!(told, behind == 2, "{:?}", disks.problems());
    }
}

#[test]
fn what_the_freshest_member_calls_faulty_is_left_out() {
    // Numbers of devices and of slots are the same here.
    let bytes =
        edited("raid5-left-symmetric", &[0, 1, 3], |raw| raw[256 + 2 * 2..256 + 2 * 2 + 2].fill(0xfe));
    let bytes = {
        let mut bytes = bytes;
        let member = partitions(&bytes)[2].clone();
        bytes[member.start + 8192..member.end].fill(0xee);
        bytes
    };
    // 0xfefe is a slot that does not exist: none of them says that number 2 is where it says.
    let disks = Disks::open(disk(bytes)).unwrap();
    let array = only(&disks);
    assert_eq!((array.members[2].state, &*array.missing), (MemberState::Stale, &[2][..]));
    assert!(content(&*array.device().unwrap()) == expected(array.size));
}

/// A member that is being rebuilt is read as far as it has come, and written everywhere.
#[test]
fn a_member_that_is_being_rebuilt() {
    let rebuilt = |raw: &mut [u8]| {
        set32(raw, 8, crate::bytes::le32(raw, 8) | feature::RECOVERY_OFFSET);
        set64(raw, 152, 256);
    };
    let mut bytes = edited("raid1-1.2", &[0], rebuilt);
    let member = partitions(&bytes)[0].clone();
    let data = member.start + (1 << 20);
    bytes[data + 256 * 512..member.end].fill(0xee);
    let device = disk(bytes);
    let disks = Disks::open(Arc::clone(&device)).unwrap();
    let array = only(&disks);
    assert_eq!((array.members[0].state, &*array.missing), (MemberState::Rebuilding, &[0][..]));
    let open = array.device().unwrap();
    assert!(content(&*open) == expected(array.size));
    open.write_at(&[7; 8], 100).unwrap();
    open.write_at(&[8; 8], 1 << 20).unwrap();
    let mut bytes = [0; 8];
    device.read_at(&mut bytes, data as u64 + 100).unwrap();
    assert_eq!(bytes, [7; 8]);
    device.read_at(&mut bytes, (data + (1 << 20)) as u64).unwrap();
    assert_eq!(bytes, [8; 8]);
    // Sums over data that are not there yet cannot be kept.
    let disks = Disks::open(disk(edited("raid5-left-symmetric", &[0], rebuilt))).unwrap();
    let array = only(&disks);
    let open = array.device().unwrap();
    assert!(content(&*open) == expected(array.size));
    assert_eq!(open.write_at(&[0], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert!(open.read_only() && array.locked.as_deref() == Some("it is being rebuilt"));
}

#[test]
fn bad_blocks_are_read_elsewhere() {
    // The list lies 16 sectors behind the superblock: sectors 2048 + 8 and on of the device, 8 of them.
    let listed = |raw: &mut [u8]| {
        set32(raw, 8, crate::bytes::le32(raw, 8) | feature::BAD_BLOCKS);
        raw[185] = 0;
        raw[186..188].copy_from_slice(&8_u16.to_le_bytes());
        set32(raw, 188, 16);
    };
    let mut bytes = edited("raid1-1.2", &[0], listed);
    let first = partitions(&bytes)[0].clone();
    let list = first.start + 4096 + 16 * 512;
    bytes[list..list + 4096].fill(0xff);
    set64(&mut bytes, list, (2048 + 8) << 10 | 8);
    let data = first.start + (1 << 20);
    bytes[data + 4096..data + 8192].fill(0xee);
    let disks = Disks::open(disk(bytes.clone())).unwrap();
    assert!(content(&*only(&disks).device().unwrap()) == expected(only(&disks).size));
    // Nobody else has them.
    let disks = Disks::open(disk(without(&bytes, &[1, 2]))).unwrap();
    let open = only(&disks).device().unwrap();
    open.read_at(&mut [0; 4096], 0).unwrap();
    assert_eq!(open.read_at(&mut [0; 4097], 0).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn what_is_not_understood_is_refused() {
    let set = |features: u32| move |raw: &mut [u8]| set32(raw, 8, crate::bytes::le32(raw, 8) | features);
    for (features, words) in [
        (feature::RESHAPE, "being reshaped"),
        (feature::JOURNAL, "journal"),
        (1 << 20, "features that are not known (0x100000)"),
    ] {
        let disks = Disks::open(disk(edited("raid5-left-symmetric", &[], set(features)))).unwrap();
        let error = only(&disks).device().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(words), "{error}");
        assert!(disks.problems()[0].contains(words), "{:?}", disks.problems());
    }
    for (name, features, words) in [
        ("raid1-1.2", feature::CLUSTERED, "several machines share it"),
        ("raid5-left-symmetric", feature::PPL, "it has a log of partial parity"),
    ] {
        let disks = Disks::open(disk(edited(name, &[], set(features)))).unwrap();
        let open = only(&disks).device().unwrap();
        assert!(content(&*open) == expected(open.size()));
        let error = open.write_at(&[0], 0).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    // Not cleanly shut down.
    let disks = Disks::open(disk(edited("raid5-left-symmetric", &[], |raw| set64(raw, 208, 0)))).unwrap();
    assert!(only(&disks).dirty && only(&disks).device().unwrap().read_only());
    // Two zones, and nothing that says which of two layouts they have.
    let clear = |raw: &mut [u8]| set32(raw, 8, 0);
    let disks = Disks::open(disk(edited("raid0-zones", &[], clear))).unwrap();
    assert_eq!(only(&disks).device().err().unwrap().kind(), ErrorKind::Unsupported);
    let disks = Disks::open(disk(edited("raid0-1.2", &[], clear))).unwrap();
    only(&disks).device().unwrap();
}

/// Fields that make no sense: a superblock with a right checksum is still a stranger's.
#[test]
fn numbers_that_make_no_sense() {
    let names = ["raid1-1.2", "raid0-zones", "raid5-left-symmetric", "raid10-f2-4", "linear-1.2"];
    let fields = [72, 76, 80, 84, 88, 92, 96, 128, 132, 136, 140, 152, 160, 185, 200, 220];
    for (name, at) in names.into_iter().flat_map(|name| fields.map(|at| (name, at))) {
        for value in [0, 3, 0x7fff_ffff, 0xffff_ffff] {
            let disks = Disks::open(disk(edited(name, &[], |raw| set32(raw, at, value)))).unwrap();
            for volume in disks.volumes() {
                let size = volume.device.size();
                let mut buf = vec![0; block::num::to_usize(size.min(5000))];
                let last = size - buf.len() as u64;
                let _ = volume.device.read_at(&mut buf, 0);
                let _ = volume.device.read_at(&mut buf, last);
                if size > 0 {
                    let _ = volume.device.layer_extent(size / 2, size);
                }
            }
        }
    }
}

#[test]
fn a_wrong_checksum_is_told() {
    for name in ["raid1-1.2", "raid1-1.1", "raid1-1.0", "raid1-0.90"] {
        let mut bytes = load(name);
        let range = partitions(&bytes)[1].clone();
        let at = match name {
            "raid1-1.2" => range.start + 4096,
            "raid1-1.1" => range.start,
            "raid1-1.0" => range.end - 8192,
            _ => range.end - 65536,
        };
        assert_eq!(&bytes[at..at + 4], 0xa92b_4efc_u32.to_le_bytes());
        bytes[at + 60] ^= 1;
        let disks = Disks::open(disk(bytes)).unwrap();
        assert_eq!(only(&disks).missing, [1], "{name}");
        // At the end of a member a damaged superblock may be an old one: what lies there counts.
        let is_start = matches!(name, "raid1-1.2" | "raid1-1.1");
        let told = disks.problems().iter().any(|problem| problem.contains("checksum"));
        assert_eq!(told, is_start, "{name}: {:?}", disks.problems());
    }
}

/// A file system on a member whose superblock is at the end looks as if it lay there by itself.
#[test]
fn a_member_is_not_what_lies_on_the_array() {
    for name in ["raid1-1.0", "raid1-0.90"] {
        let device = disk(load(name));
        let disks = Disks::open(Arc::clone(&device)).unwrap();
        let open = only(&disks).device().unwrap();
        let mut head = [0; 4096];
        head[4086..].copy_from_slice(b"SWAPSPACE2");
        open.write_at(&head, 0).unwrap();
        let disks = Disks::open(device).unwrap();
        let kinds: Vec<_> =
            disks.volumes().iter().map(|volume| volume.content.as_ref().map(|found| found.kind)).collect();
        assert_eq!(kinds, [Some(Kind::LinuxRaid), Some(Kind::LinuxRaid), Some(Kind::Swap)], "{name}");
    }
}

/// Whole disks with superblocks at their ends: the partitions that can be seen on each are the array's.
#[test]
fn partitions_of_an_array_of_whole_disks() {
    for name in ["raid1-1.0", "raid1-0.90"] {
        let bytes = load(name);
        let members: Vec<_> =
            partitions(&bytes).into_iter().map(|range| disk(bytes[range].to_vec())).collect();
        let disks = Disks::open_all(members.clone()).unwrap();
        let mut boot = [0; 512];
        boot[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 64, 0, 0, 0, 0, 4, 0, 0]);
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        only(&disks).device().unwrap().write_at(&boot, 0).unwrap();
        let disks = Disks::open_all(members).unwrap();
        let places: Vec<_> = disks.volumes().iter().map(|volume| volume.location.to_string()).collect();
        let name = &only(&disks).name;
        let part = if name.ends_with(|c: char| c.is_ascii_digit()) {
            format!("/dev/{name}p1")
        } else {
            format!("/dev/{name}1")
        };
        assert_eq!(places, ["disk 1", "disk 2", part.as_str()]);
        let found = disks.find(&part).unwrap();
        assert_eq!((found.device.size(), found.partition.as_ref().unwrap().offset), (0x400 * 512, 64 * 512));
        let id = format!("/dev/disk/by-id/md-uuid-{}-part1", only(&disks).uuid);
        assert_eq!(disks.find(&id).unwrap().location, found.location);
        disks.find(&format!("/dev/md{}p1", only(&disks).number)).unwrap();
        disks.find(&format!("/dev/md{}p2", only(&disks).number)).unwrap_err();
    }
}

/// An array of arrays.
#[test]
fn raid_on_raid() {
    let inner = load("raid5-left-symmetric");
    let outer = load("raid1-1.2");
    let device = disk(outer);
    let disks = Disks::open(Arc::clone(&device)).unwrap();
    let open = only(&disks).device().unwrap();
    // A member alone, of an array that lacks the others.
    let member = partitions(&inner)[0].clone();
    open.write_at(&inner[member][..(1 << 20)], 0).unwrap();
    let disks = Disks::open(device).unwrap();
    assert_eq!(disks.arrays().len(), 2);
    assert_eq!(disks.arrays()[1].members[0].location.to_string(), "/dev/md/raid1-1.2");
    assert_eq!(disks.arrays()[1].device().err().unwrap().kind(), ErrorKind::NotFound);
}
