//! Tables made by hand. The suite compares with what sfdisk and sgdisk make and Linux sees.

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::*;
use crate::crc::crc32;

fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let storage = Arc::new(MemStorage::from_bytes(bytes));
    Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
}

fn entry(bytes: &mut [u8], sector: usize, index: usize, (status, kind): (u8, u8), (start, len): (u32, u32)) {
    let at = sector * 512 + 446 + index * 16;
    bytes[at] = status;
    bytes[at + 4] = kind;
    bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
    bytes[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

/// Number, offset and length of each partition, in sectors.
fn sectors(table: &Table) -> Vec<(u32, u64, u64)> {
    table.partitions.iter().map(|found| (found.number, found.offset / 512, found.len / 512)).collect()
}

fn with_logical() -> Vec<u8> {
    let mut bytes = vec![0; 1000 * 512];
    bytes[440..444].copy_from_slice(&[0x78, 0x56, 0x34, 0x12]);
    entry(&mut bytes, 0, 0, (0x80, 0x83), (10, 90));
    entry(&mut bytes, 0, 2, (0, 5), (200, 600));
    entry(&mut bytes, 200, 0, (0, 0x83), (2, 98));
    entry(&mut bytes, 200, 1, (0, 5), (100, 100));
    entry(&mut bytes, 300, 0, (0, 0x8e), (2, 50));
    bytes
}

#[test]
fn primary_and_logical_partitions_have_the_numbers_of_linux() {
    let table = read(&*disk(with_logical())).unwrap().unwrap();
    assert_eq!(sectors(&table), [(1, 10, 90), (3, 200, 600), (5, 202, 98), (6, 302, 50)]);
    let roles: Vec<_> = table.partitions.iter().map(|found| found.role).collect();
    assert_eq!(roles, [Role::Primary, Role::Extended, Role::Logical, Role::Logical]);
    assert!(table.partitions[0].bootable() && !table.partitions[2].bootable());
    assert_eq!((table.uuid.as_str(), table.partitions[3].uuid.as_str()), ("12345678", "12345678-06"));
    assert_eq!(table.partitions[3].kind.name(), Some("Linux LVM"));
    assert!(table.problems.is_empty(), "{:?}", table.problems);
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let mut bytes = with_logical();
    entry(&mut bytes, 300, 1, (0, 5), (100, 100));
    let table = read(&*disk(bytes)).unwrap().unwrap();
    assert_eq!(table.partitions.len(), 4);
    assert!(table.problems[0].contains("circle"), "{:?}", table.problems);
}

#[test]
fn what_the_disk_does_not_hold_is_cut_off_and_told() {
    let mut bytes = vec![0; 100 * 512];
    entry(&mut bytes, 0, 0, (0, 0x83), (50, 51));
    entry(&mut bytes, 0, 1, (0, 0x83), (100, 1));
    entry(&mut bytes, 0, 2, (0, 0x83), (u32::MAX, u32::MAX));
    let table = read(&*disk(bytes)).unwrap().unwrap();
    assert_eq!(sectors(&table), [(1, 50, 50)]);
    assert_eq!(table.problems.len(), 3, "{:?}", table.problems);
}

#[test]
fn a_boot_sector_of_a_file_system_is_no_table() {
    let mut bytes = vec![0; 100 * 512];
    bytes[..14].copy_from_slice(b"\xeb\x3c\x90mkfs.fat\0\x02\x04");
    bytes[21] = 0xf8;
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(read(&*disk(bytes.clone())).unwrap(), None);
    bytes[446..510].fill(0x20);
    assert_eq!(read(&*disk(bytes)).unwrap(), None);
    assert_eq!(read(&*disk(vec![0; 100])).unwrap(), None);
    assert_eq!(read(&*disk(vec![])).unwrap(), None);
    let error = slice(disk(vec![0; 4096]), 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// A GPT with two partitions, entries 1 and 3.
fn gpt(sector: usize, sectors: usize) -> Vec<u8> {
    let mut bytes = vec![0; sector * sectors];
    entry(&mut bytes, 0, 0, (0, 0xee), (1, u32::MAX));
    let mut entries = vec![0; 128 * 128];
    for (index, first, last, name) in [(0, 40u64, 49u64, "EFI"), (2, 50, 59, "r\u{f6}\u{f6}t")] {
        let one: &mut [u8] = &mut entries[index * 128..][..128];
        one[..16].copy_from_slice(types::EFI_SYSTEM.mixed_endian().as_bytes());
        one[16..32].fill(u8::try_from(index).unwrap() + 1);
        one[32..40].copy_from_slice(&first.to_le_bytes());
        one[40..48].copy_from_slice(&last.to_le_bytes());
        one[48] = 4;
        for (at, unit) in name.encode_utf16().enumerate() {
            one[56 + 2 * at..58 + 2 * at].copy_from_slice(&unit.to_le_bytes());
        }
    }
    let entry_sectors = entries.len() / sector;
    for (lba, other, at) in [(1, sectors - 1, 2), (sectors - 1, 1, sectors - 1 - entry_sectors)] {
        let mut header = vec![0; 92];
        header[..16].copy_from_slice(b"EFI PART\0\0\x01\0\x5c\0\0\0");
        for (field, value) in [(24, lba), (32, other), (40, 34), (48, sectors - 34), (72, at)] {
            header[field..field + 8].copy_from_slice(&(value as u64).to_le_bytes());
        }
        header[56..72].fill(0xab);
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        bytes[lba * sector..][..92].copy_from_slice(&header);
        bytes[at * sector..][..entries.len()].copy_from_slice(&entries);
    }
    bytes
}

#[test]
fn gpt_with_both_sector_sizes() {
    for sector in [512, 4096] {
        let table = read(&*disk(gpt(sector, 200))).unwrap().unwrap();
        assert_eq!((table.scheme, table.sector_bytes as usize), (Scheme::Gpt, sector));
        let found: Vec<_> =
            table.partitions.iter().map(|found| (found.number, found.offset, found.len)).collect();
        let sector = sector as u64;
        assert_eq!(found, [(1, 40 * sector, 10 * sector), (3, 50 * sector, 10 * sector)]);
        assert_eq!(table.partitions[1].name, "r\u{f6}\u{f6}t");
        assert_eq!(table.partitions[1].uuid, "03030303-0303-0303-0303-030303030303");
        assert!(table.partitions[0].is_efi_system() && table.partitions[0].bootable());
        assert!(table.problems.is_empty(), "{:?}", table.problems);
    }
}

#[test]
fn a_damaged_primary_is_replaced_by_the_backup() {
    for at in [512, 512 + 17, 512 + 60, 1024 + 60] {
        let mut bytes = gpt(512, 200);
        bytes[at] ^= 1;
        let table = read(&*disk(bytes.clone())).unwrap().unwrap();
        assert_eq!(sectors(&table), [(1, 40, 10), (3, 50, 10)], "{at}");
        assert!(table.problems[0].contains("backup"), "{:?}", table.problems);
        // Entries are damaged but the header tells where the backup is, though the disk has grown since.
        if at > 1024 {
            bytes.extend([0; 51_200]);
            assert_eq!(read(&*disk(bytes)).unwrap().unwrap().partitions.len(), 2);
        } else {
            bytes[199 * 512] ^= 1;
            assert_eq!(read(&*disk(bytes)).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}

#[test]
fn a_hybrid_mbr_counts_as_gpt() {
    let mut bytes = gpt(512, 200);
    entry(&mut bytes, 0, 1, (0x80, 0x83), (50, 10));
    assert_eq!(read(&*disk(bytes)).unwrap().unwrap().scheme, Scheme::Gpt);
}

#[test]
fn a_partition_is_a_disk_of_its_own() {
    let mut bytes = gpt(512, 200);
    bytes[50 * 512] = 77;
    let whole = disk(bytes);
    let part = slice(Arc::clone(&whole), 3).unwrap();
    let mut first = [0];
    part.read_at(&mut first, 0).unwrap();
    assert_eq!((part.size(), first), (5120, [77]));
    let error = slice(whole, 2).unwrap_err();
    assert_eq!(
        (error.kind(), error.hints()),
        (ErrorKind::NotFound, &["Partitions of this disk: 1, 3.".to_owned()][..])
    );
}

/// Every byte of the structures is changed in turn: nothing may panic, and what is not an error is a table.
#[test]
fn no_byte_of_a_table_can_hurt() {
    for seed in [with_logical(), gpt(512, 200)] {
        for at in (0..512).chain(512..1200).chain(200 * 512..200 * 512 + 512) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = seed.clone();
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
                let device = disk(bytes);
                if let Ok(Some(table)) = read(&*device) {
                    let inside = |found: &Partition| found.offset + found.len <= device.size();
                    assert!(table.partitions.iter().all(inside));
                }
            }
        }
    }
}
