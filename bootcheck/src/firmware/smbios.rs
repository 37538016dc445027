//! The SMBIOS tables (DMTF DSP0134, version 2.8): what the machine says it is. Firmware puts them into memory, adds what
//! it knows about itself (type 0), and writes addresses and sums.

use block::num::low_u32;

use crate::memory::{GuestRam, HIGH_START};

/// The file with the entry point.
pub(super) const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// The file with the structures.
pub(super) const TABLES_FILE: &str = "etc/smbios/smbios-tables";

const VERSION: [u8; 2] = [2, 8];
const MANUFACTURER: &str = "vimg";
const PRODUCT: &str = "bootcheck";
/// The same for every machine, of version 8 (RFC 9562), in the mixed byte order of section 7.2.1.
const UUID: [u8; 16] =
    [0x67, 0x6d, 0x69, 0x76, 0x6f, 0x62, 0x74, 0x8f, 0x80, 0x63, 0x68, 0x65, 0x63, 0x6b, 0x00, 0x01];
const ARRAY: u16 = 0x1000;
const MEMORY: u16 = 0x1100;

/// The entry point, addresses in it yet to come, and the structures.
#[derive(Debug)]
pub(super) struct Smbios {
    pub(super) anchor: Vec<u8>,
    pub(super) tables: Vec<u8>,
}

/// Structures, one behind the other.
#[derive(Debug, Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    longest: usize,
}

impl Structures {
    /// Appends a structure: its fields behind the handle, and its strings (section 6.1).
    fn add(&mut self, kind: u8, handle: u16, fields: &[&[u8]], strings: &[&str]) {
        let start = self.bytes.len();
        let fields = fields.concat();
        self.bytes.extend([kind, u8::try_from(4 + fields.len()).unwrap_or(0)]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(fields);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        self.bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
        self.longest = self.longest.max(self.bytes.len() - start);
        self.count += 1;
    }
}

/// The tables of a machine.
pub(super) fn build(ram: &GuestRam, cpus: u8) -> Smbios {
    let mut all = Structures::default();
    // System: manufacturer, product; started by the power switch.
    all.add(1, 0x100, &[&[1, 2, 0, 0], &UUID, &[6, 0, 0]], &[MANUFACTURER, PRODUCT]);
    // Enclosure: other; states safe, no security; no heights, cords, contained elements.
    all.add(3, 0x300, &[&[1, 1, 0, 0, 0, 3, 3, 3, 2], &[0; 9]], &[MANUFACTURER]);
    processor(&mut all, cpus);
    memory(&mut all, ram);
    // Boot status: no errors.
    all.add(32, 0x2000, &[&[0; 7]], &[]);
    all.add(127, 0x7f00, &[], &[]);
    Smbios { anchor: anchor(&all), tables: all.bytes }
}

/// Processor (section 7.5): in a socket of an unknown kind; caches unknown; cores and threads.
fn processor(all: &mut Structures, cpus: u8) {
    /// Central, of family "other".
    const KIND: [u8; 2] = [3, 1];
    /// Populated, enabled; socket "other".
    const STATUS: [u8; 2] = [0x41, 1];
    /// 64 bits, several cores.
    const ABILITIES: u16 = 4 | 8;
    let fields: &[&[u8]] = &[
        &[1],
        &KIND,
        &[2],
        &[0; 8],
        &[0, 0],
        &[0; 6],
        &STATUS,
        &[0xff; 6],
        &[0, 0, 0],
        &[cpus, cpus, cpus],
        &ABILITIES.to_le_bytes(),
        &[1, 0],
    ];
    all.add(4, 0x400, fields, &["CPU 0", MANUFACTURER]);
}

/// Physical memory array, device and mapped addresses (sections 7.17, 7.18, 7.20), with extended sizes.
fn memory(all: &mut Structures, ram: &GuestRam) {
    const NONE: u16 = 0xfffe;
    let bytes = ram.low_end() + ram.high_len();
    let array: &[&[u8]] = &[
        &[1, 3, 3],
        &0x8000_0000_u32.to_le_bytes(),
        &NONE.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &bytes.to_le_bytes(),
    ];
    all.add(16, ARRAY, array, &[]);
    let mebibytes = bytes >> 20;
    let (size, extended) = match u16::try_from(mebibytes) {
        Ok(size @ ..0x7fff) => (size, 0),
        _ => (0x7fff, low_u32(mebibytes)),
    };
    let device: &[&[u8]] = &[
        &ARRAY.to_le_bytes(),
        &NONE.to_le_bytes(),
        &[0xff; 4],
        &size.to_le_bytes(),
        // A DIMM, of RAM.
        &[9, 0, 1, 0, 7],
        &[2, 0],
        &[0, 0],
        &[2, 0, 0, 0],
        &[0],
        &extended.to_le_bytes(),
        &[0; 8],
    ];
    all.add(17, MEMORY, device, &["DIMM 0", MANUFACTURER]);
    let mut mapped = |handle: u16, start: u64, len: u64| {
        let extended = [start, start + len.saturating_sub(1)].map(u64::to_le_bytes).concat();
        let fields: &[&[u8]] = &[&[0xff; 8], &ARRAY.to_le_bytes(), &[1], &extended];
        all.add(19, handle, fields, &[]);
    };
    mapped(0x1300, 0, ram.low_end());
    if ram.high_len() > 0 {
        mapped(0x1301, HIGH_START, ram.high_len());
    }
}

/// The entry point (section 5.2.1).
fn anchor(all: &Structures) -> Vec<u8> {
    let len = |len: usize| u16::try_from(len).unwrap_or(0).to_le_bytes();
    let mut anchor = b"_SM_\0\x1f".to_vec();
    anchor.extend(VERSION);
    anchor.extend(len(all.longest));
    anchor.extend([0; 6]);
    anchor.extend(b"_DMI_\0");
    anchor.extend(len(all.bytes.len()));
    anchor.extend([0; 4]);
    anchor.extend(all.count.to_le_bytes());
    anchor.push(VERSION[0] << 4 | VERSION[1]);
    let sum = |bytes: &[u8]| bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte));
    anchor[0x15] = sum(&anchor[0x10..]).wrapping_neg();
    anchor[4] = sum(&anchor).wrapping_neg();
    anchor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Type, formatted part and strings of every structure, as the specification says to walk them.
    fn walk(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = vec![];
        while !bytes.is_empty() {
            let (fields, rest) = bytes.split_at(usize::from(bytes[1]));
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = rest[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            let strings = strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect();
            found.push((bytes[0], fields.to_vec(), strings));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn every_structure_has_the_length_of_its_version() {
        let built = build(&GuestRam::new(4 << 30).unwrap(), 3);
        let found = walk(&built.tables);
        let lengths: Vec<_> = found.iter().map(|(kind, fields, _)| (*kind, fields.len())).collect();
        // DSP0134 2.8, the tables of section 7.
        let expected =
            [(1, 27), (3, 22), (4, 42), (16, 23), (17, 40), (19, 31), (19, 31), (32, 11), (127, 4)];
        assert_eq!(lengths, expected);
        let (_, system, strings) = &found[0];
        assert_eq!(
            (&system[4..6], &strings[..]),
            (&[1, 2][..], &["vimg".to_owned(), "bootcheck".to_owned()][..])
        );
        let (_, cpu, _) = &found[2];
        assert_eq!(cpu[0x23..0x26], [3, 3, 3]);
        let (_, device, _) = &found[4];
        assert_eq!(device[12..14], 4096u16.to_le_bytes());
        let (_, high, _) = &found[6];
        assert_eq!(high[0x0f..0x17], HIGH_START.to_le_bytes());
        assert_eq!(high[0x17..0x1f], (HIGH_START + (1 << 30) - 1).to_le_bytes());
    }

    #[test]
    fn the_entry_point_adds_up_and_counts() {
        let built = build(&GuestRam::new(64 << 20).unwrap(), 1);
        let anchor = &built.anchor;
        assert_eq!((anchor.len(), sum(anchor), sum(&anchor[0x10..])), (0x1f, 0, 0));
        assert_eq!((&anchor[..4], &anchor[0x10..0x15]), (&b"_SM_"[..], &b"_DMI_"[..]));
        assert_eq!(usize::from(u16::from_le_bytes([anchor[0x16], anchor[0x17]])), built.tables.len());
        assert_eq!(usize::from(anchor[0x1c]), walk(&built.tables).len());
    }
}
