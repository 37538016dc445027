//! The script by which firmware puts the ACPI tables into memory: allocate, patch addresses, sum up. Commands of 128
//! bytes each, numbers little-endian.

use crate::acpi::Relocatable;

/// The file with the root pointer.
pub(super) const RSDP_FILE: &str = "etc/acpi/rsdp";
/// The file with the tables.
pub(super) const TABLES_FILE: &str = "etc/acpi/tables";

const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const ZONE_HIGH: u8 = 1;
const ZONE_SEGMENT_F: u8 = 2;
const COMMAND_LEN: usize = 128;

fn name(name: &str) -> [u8; 56] {
    let mut field = [0; 56];
    for (slot, byte) in field.iter_mut().zip(name.bytes().take(55)) {
        *slot = byte;
    }
    field
}

fn command(kind: u32, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    parts.iter().for_each(|part| bytes.extend(*part));
    bytes.resize(COMMAND_LEN, 0);
    bytes
}

fn allocate(file: &str, align: u32, zone: u8) -> Vec<u8> {
    command(ALLOCATE, &[&name(file), &align.to_le_bytes(), &[zone]])
}

/// The number of `len` bytes at `offset` of `file` is an offset in the tables: make it an address.
fn pointer(file: &str, offset: u32, len: u8) -> Vec<u8> {
    command(ADD_POINTER, &[&name(file), &name(TABLES_FILE), &offset.to_le_bytes(), &[len]])
}

fn checksum(file: &str, at: u32, start: u32, len: u32) -> Vec<u8> {
    command(ADD_CHECKSUM, &[&name(file), &at.to_le_bytes(), &start.to_le_bytes(), &len.to_le_bytes()])
}

/// The script for these tables.
pub(super) fn script(tables: &Relocatable) -> Vec<u8> {
    let mut script = [allocate(TABLES_FILE, 64, ZONE_HIGH), allocate(RSDP_FILE, 16, ZONE_SEGMENT_F)].concat();
    for (offset, len) in &tables.pointers {
        script.extend(pointer(TABLES_FILE, *offset, *len));
    }
    for (start, len) in &tables.tables {
        script.extend(checksum(TABLES_FILE, start + 9, *start, *len));
    }
    // Of the root pointer: the address of the XSDT, and two sums (ACPI 6.5, section 5.2.5.3).
    script.extend(pointer(RSDP_FILE, 24, 8));
    script.extend(checksum(RSDP_FILE, 8, 0, 20));
    script.extend(checksum(RSDP_FILE, 32, 0, 36));
    script
}
