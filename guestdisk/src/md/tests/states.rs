//! Members that are old, faulty, being rebuilt or damaged, and arrays that are something out of the ordinary.

use super::*;

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
    // Nor complete: the sum of a row that was being written is wrong, and so is what it gives for the missing member.
    for name in ["raid4-1.2", "raid5-left-symmetric", "raid6-left-symmetric"] {
        let bytes = edited(name, &[], |raw| set64(raw, 208, 0));
        let disks = Disks::open(disk(without(&bytes, &[1]))).unwrap();
        let error = only(&disks).device().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}");
        assert!(
            disks.problems()[0].contains("not shut down cleanly and lacks a member"),
            "{name}: {:?}",
            disks.problems()
        );
    }
    // Copies are copies.
    let bytes = edited("raid1-1.2", &[], |raw| set64(raw, 208, 0));
    only(&Disks::open(disk(without(&bytes, &[1]))).unwrap()).device().unwrap();
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

/// What is free on an array is free on all of its members; if one of them is not in sync, that is not known.
#[test]
fn places_on_disks() {
    let bytes = load("raid1-1.2");
    let disks = Disks::open(disk(bytes.clone())).unwrap();
    let volume = disks.find("/dev/md/raid1-1.2").unwrap();
    let data = |start: usize| (0, start as u64 + (1 << 20) + 4096..start as u64 + (1 << 20) + 8192);
    let members: Vec<_> = partitions(&bytes).into_iter().map(|range| data(range.start)).collect();
    assert_eq!(disks.on_disks(volume, 4096..8192), members);
    let old = edited("raid1-1.2", &[1], |raw| set64(raw, 200, crate::bytes::le64(raw, 200) - 1));
    let newer = |raw: &mut [u8]| set64(raw, 200, 9);
    for (bytes, count) in [(old, 3), (edited("raid1-1.2", &[1], newer), 0), (load("raid0-1.2"), 0)] {
        let disks = Disks::open(disk(bytes)).unwrap();
        let volume = disks.volumes().last().unwrap();
        assert_eq!(disks.on_disks(volume, 0..4096).len(), count, "{:?}", disks.problems());
    }
}

/// A firmware knows nothing of arrays: it reads a member as if it were the array, and so does who looks for loaders.
#[test]
fn an_efi_system_partition_on_an_array() {
    const ESP: [u8; 16] =
        [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
    let mut bytes = load("raid1-1.0");
    // Both entries of the GPT; their checksums are those of the entries and of the header.
    for entry in [1024, 1024 + 128] {
        bytes[entry..entry + 16].copy_from_slice(&ESP);
    }
    let sum = crate::crc::crc32(&bytes[1024..1024 + 128 * 128]);
    set32(&mut bytes, 512 + 88, sum);
    set32(&mut bytes, 512 + 16, 0);
    let sum = crate::crc::crc32(&bytes[512..512 + 92]);
    set32(&mut bytes, 512 + 16, sum);
    let newer = partitions(&bytes)[0].end - 8192;
    let disks = Disks::open(disk(bytes.clone())).unwrap();
    let facts = crate::boot::firmware::facts(&disks).unwrap();
    let array = disks.volumes().iter().position(|volume| volume.location.disk().is_none());
    let seen: Vec<_> = facts.efi.iter().map(|found| (found.location.to_string(), found.volume)).collect();
    let expected =
        ["disk 1 partition 1", "disk 1 partition 2"].map(|place| (place.to_owned(), array.unwrap()));
    assert_eq!(seen, expected);
    // What an old member holds is not what the array holds.
    let raw = &mut bytes[newer..newer + 4096];
    set64(raw, 200, crate::bytes::le64(raw, 200) + 2);
    let sum = superblock::checksum(&raw[..superblock::summed(raw)], superblock::SUM_AT);
    set32(raw, superblock::SUM_AT, sum);
    let disks = Disks::open(disk(bytes)).unwrap();
    assert_eq!(only(&disks).members[1].state, MemberState::Stale);
    let facts = crate::boot::firmware::facts(&disks).unwrap();
    let seen: Vec<_> = facts.efi.iter().map(|found| found.volume).collect();
    assert_eq!(seen, [array.unwrap(), 1]);
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
