//! Linux's boot parameters (kernel documentation, "Zero Page").

use block::Result;

use super::layout::{CMDLINE, Range, ZERO_PAGE};
use super::linux::Loaded;
use crate::memory::GuestRam;

const HEADER: usize = 0x1f1;
const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;

/// Writes the parameters and returns their address.
pub(super) fn write(ram: &GuestRam, setup_header: &[u8], loaded: &Loaded, map: &[Range]) -> Result<u64> {
    let mut page = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(HEADER, setup_header);
    put(0x70, &loaded.rsdp.to_le_bytes());
    // A boot loader that has no number of its own.
    put(0x210, &[0xff]);
    if let Some((address, len)) = loaded.initrd {
        put(0x218, &address.to_le_bytes()[..4]);
        put(0x21c, &len.to_le_bytes()[..4]);
    }
    put(0x228, &CMDLINE.to_le_bytes()[..4]);
    put(0x238, &loaded.cmdline_len.to_le_bytes());
    let map = &map[..map.len().min(E820_MAX)];
    put(E820_COUNT, &map.len().to_le_bytes()[..1]);
    for (i, range) in map.iter().enumerate() {
        let at = E820_TABLE + 20 * i;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &range.len.to_le_bytes());
        put(at + 16, &range.kind.to_le_bytes());
    }
    ram.write(ZERO_PAGE, &page)?;
    Ok(ZERO_PAGE)
}

/// A setup header for a kernel that has none of its own (ELF).
pub(super) fn plain_header() -> Vec<u8> {
    let mut header = vec![0; 0x268 - HEADER];
    let mut put =
        |at: usize, bytes: &[u8]| header[at - HEADER..at - HEADER + bytes.len()].copy_from_slice(bytes);
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20cu16.to_le_bytes());
    put(0x211, &[1]);
    header
}
