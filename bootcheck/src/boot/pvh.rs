//! The PVH boot ABI (Xen, "x86/HVM direct boot ABI"): start information for an ELF kernel.

use block::Result;

use super::layout::{CMDLINE, Range, START_INFO};
use super::linux::Loaded;
use crate::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: u64 = START_INFO + 0x40;
const MEMORY_MAP: u64 = START_INFO + 0x80;

/// Writes the start information and returns its address.
pub(super) fn write(ram: &GuestRam, loaded: &Loaded, map: &[Range]) -> Result<u64> {
    let count = |n: usize| u32::try_from(n).unwrap_or(0).to_le_bytes();
    let modules = usize::from(loaded.initrd.is_some());
    let mut info = vec![];
    info.extend(MAGIC.to_le_bytes());
    info.extend(VERSION.to_le_bytes());
    info.extend(0u32.to_le_bytes());
    info.extend(count(modules));
    info.extend(MODULES.to_le_bytes());
    info.extend(CMDLINE.to_le_bytes());
    info.extend(loaded.rsdp.to_le_bytes());
    info.extend(MEMORY_MAP.to_le_bytes());
    info.extend(count(map.len()));
    info.extend(0u32.to_le_bytes());
    ram.write(START_INFO, &info)?;
    if let Some((address, len)) = loaded.initrd {
        let module = [address, len, 0, 0].map(u64::to_le_bytes).concat();
        ram.write(MODULES, &module)?;
    }
    let mut table = vec![];
    for range in map {
        table.extend(range.start.to_le_bytes());
        table.extend(range.len.to_le_bytes());
        table.extend(range.kind.to_le_bytes());
        table.extend(0u32.to_le_bytes());
    }
    ram.write(MEMORY_MAP, &table)?;
    Ok(START_INFO)
}
