//! Whole disks with partition tables and superblocks of arrays: which of the two counts, and that nothing is left out of a copy.

use super::*;
use crate::partition::Scheme;
use crate::unused;

const MIB: usize = 1 << 20;

/// The members of an array as whole disks, each with so many more bytes at its end.
fn members(name: &str, more: usize) -> Vec<Vec<u8>> {
    let bytes = load(name);
    let grown = |range: Range<usize>| [&bytes[range], &vec![0; more][..]].concat();
    partitions(&bytes).into_iter().map(grown).collect()
}

/// An MBR with one partition of Linux.
fn mbr(start: u32, sectors: u32) -> [u8; 512] {
    let mut boot = [0; 512];
    boot[446..454].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0]);
    boot[454..458].copy_from_slice(&start.to_le_bytes());
    boot[458..462].copy_from_slice(&sectors.to_le_bytes());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    boot
}

/// MBR, header and entries of a GPT with one partition, for a disk with so many sectors.
fn gpt(sectors: u64, first: u64, last: u64) -> Vec<u8> {
    let mut bytes = load("raid1-1.0")[..34 * 512].to_vec();
    let mut entry = bytes[1024..1024 + 128].to_vec();
    entry[32..40].copy_from_slice(&first.to_le_bytes());
    entry[40..48].copy_from_slice(&last.to_le_bytes());
    bytes[1024..].fill(0);
    bytes[1024..1024 + 128].copy_from_slice(&entry);
    let sum = crate::crc::crc32(&bytes[1024..1024 + 128 * 128]);
    bytes[512 + 88..512 + 92].copy_from_slice(&sum.to_le_bytes());
    bytes[512 + 32..512 + 40].copy_from_slice(&(sectors - 1).to_le_bytes());
    bytes[512 + 16..512 + 20].fill(0);
    let sum = crate::crc::crc32(&bytes[512..512 + 92]);
    bytes[512 + 16..512 + 20].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn open(disks: &[Vec<u8>]) -> Disks {
    Disks::open_all(disks.iter().map(|bytes| disk(bytes.clone())).collect()).unwrap()
}

fn places(disks: &Disks) -> Vec<String> {
    disks.volumes().iter().map(|volume| volume.location.to_string()).collect()
}

/// What a copy leaves out of each disk.
fn left_out(disks: &Disks) -> Vec<u64> {
    unused::find(disks, &|_| true).unwrap().iter().map(unused::Unused::bytes).collect()
}

/// `mdadm --create /dev/sda /dev/sdb` leaves an old MBR of sda in place: what it calls free belongs to the array.
#[test]
fn a_left_over_mbr_on_a_member_of_version_1_2() {
    let mut disks = members("raid1-1.2", 8 * MIB);
    disks[0][..512].copy_from_slice(&mbr(64, 1024));
    disks[0][64 * 512 + 4086..64 * 512 + 4096].copy_from_slice(b"SWAPSPACE2");
    let found = open(&disks);
    assert_eq!(places(&found), ["disk 1", "disk 2", "disk 3", "/dev/md/raid1-1.2"]);
    assert!(only(&found).missing.is_empty() && found.disks()[0].doubtful);
    assert_eq!(left_out(&found), [0, 0, 0]);
    // The same table without a superblock behind it.
    disks[0][4096..8192].fill(0);
    let found = open(&disks);
    assert!(left_out(&found)[0] > 4 * MIB as u64, "{found:?}");
    // A partition that has the place of the superblock has overwritten whatever was there.
    let mut covered = members("raid1-1.2", 8 * MIB).swap_remove(0);
    covered[..512].copy_from_slice(&mbr(1, 1024));
    assert_eq!(places(&open(&[covered])), ["disk 1 partition 1"]);
}

/// An array that cannot be put together has no volumes: the partitions are used, and are not trusted.
#[test]
fn a_left_over_mbr_on_a_member_without_the_others() {
    let mut one = members("raid5-left-symmetric", 8 * MIB).swap_remove(1);
    one[..512].copy_from_slice(&mbr(64, 1024));
    one[64 * 512 + 4086..64 * 512 + 4096].copy_from_slice(b"SWAPSPACE2");
    let found = open(&[one]);
    assert_eq!(places(&found), ["disk 1 partition 1"]);
    assert!(found.problems()[0].contains("cannot be put together"), "{:?}", found.problems());
    assert_eq!(left_out(&found), [0]);
    assert!(!unused::find(&found, &|_| true).unwrap()[0].notes.is_empty());
}

/// A GPT that was made for the disk is the disk's, whatever lies at its end; one that was made for the array is the array's.
#[test]
fn a_gpt_is_of_what_it_was_made_for() {
    for name in ["linear-0.90", "raid1-0.90", "raid1-1.0", "raid5-0.90"] {
        let mut disks = members(name, 0);
        let array_sectors = only(&open(&disks)).size / 512;
        let sectors = disks[0].len() as u64 / 512;
        let table = gpt(sectors, 64, 1023);
        disks[0][..table.len()].copy_from_slice(&table);
        let found = open(&disks);
        assert_eq!(places(&found)[0], "disk 1 partition 1", "{name}: {:?}", found.problems());
        assert!(found.disks()[0].doubtful && found.find("/dev/sda1").is_ok());
        assert_eq!(found.disks()[0].table.as_ref().unwrap().scheme, Scheme::Gpt);
        assert_eq!(left_out(&found)[0], 0);

        let devices: Vec<_> = members(name, 0).into_iter().map(disk).collect();
        let found = Disks::open_all(devices.clone()).unwrap();
        only(&found).device().unwrap().write_at(&gpt(array_sectors, 64, 1023), 0).unwrap();
        let found = Disks::open_all(devices).unwrap();
        assert!(places(&found)[0] == "disk 1" && found.find("/dev/sda1").is_err(), "{name}: {found:?}");
        let part = places(&found).pop().unwrap();
        assert!(part.starts_with("/dev/md") && part.ends_with('1'), "{name}: {part}");
    }
}

/// An MBR has no such size: it is the array's if the other members are there and agree, or if it is for more than the disk.
#[test]
fn an_mbr_and_a_superblock_at_the_end() {
    for name in ["raid1-0.90", "raid1-1.0", "linear-0.90", "raid5-0.90"] {
        // Old: the other disk has gone its own way, or is not here.
        let mut disks = members(name, 0);
        disks[0][..512].copy_from_slice(&mbr(64, 1024));
        let alone = open(&disks[..1]);
        assert_eq!(places(&alone), ["disk 1 partition 1"], "{name}: {:?}", alone.problems());
        assert_eq!((alone.problems().len(), left_out(&alone)), (1, vec![0]));
        disks[1][..512].copy_from_slice(&mbr(128, 1024));
        let apart = open(&disks);
        assert_eq!(places(&apart)[..2], ["disk 1 partition 1", "disk 2 partition 1"], "{name}");
        // All of the array, which is larger than a member, but for mirrors.
        let devices: Vec<_> = members(name, 0).into_iter().map(disk).collect();
        let found = Disks::open_all(devices.clone()).unwrap();
        let size = u32::try_from(only(&found).size / 512).unwrap();
        only(&found).device().unwrap().write_at(&mbr(64, size - 64), 0).unwrap();
        let found = Disks::open_all(devices).unwrap();
        assert_eq!(places(&found)[0], "disk 1", "{name}: {:?}", found.problems());
        let part = found.volumes().last().unwrap();
        assert_eq!(part.device.size(), u64::from(size - 64) * 512, "{name}: {found:?}");
    }
}

/// An array whose member is known to be gone works without it, and its table is its own.
#[test]
fn an_mbr_on_a_mirror_that_has_lost_a_disk() {
    let devices: Vec<_> = members("raid1-1.0", 0).into_iter().map(disk).collect();
    let found = Disks::open_all(devices.clone()).unwrap();
    only(&found).device().unwrap().write_at(&mbr(64, 1024), 0).unwrap();
    let mut first = vec![0; block::num::to_usize(devices[0].size())];
    devices[0].read_at(&mut first, 0).unwrap();
    let at = (first.len() / 512 - 16) / 8 * 8 * 512;
    let raw = &mut first[at..at + 4096];
    raw[256 + 2..256 + 4].copy_from_slice(&0xfffe_u16.to_le_bytes());
    let sum = superblock::checksum(&raw[..superblock::summed(raw)], superblock::SUM_AT);
    raw[superblock::SUM_AT..superblock::SUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
    let found = open(&[first]);
    assert_eq!(places(&found), ["disk 1", "/dev/md/raid1-1.0p1"], "{:?}", found.problems());
}
