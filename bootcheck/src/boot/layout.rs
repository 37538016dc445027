//! Where the structures of a direct boot lie in low memory, and the memory map that the guest is told.

use crate::memory::{ECAM_LEN, ECAM_START, GuestRam, HIGH_START};

/// PVH's start information, its module and its memory map.
pub(crate) const START_INFO: u64 = 0x6000;
/// Linux's boot parameters, one page.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// The command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The longest command line, with its terminator, in bytes.
pub(crate) const CMDLINE_MAX: usize = 0x1_0000;
/// Usable memory below the legacy hole ends here.
pub(crate) const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The ACPI tables.
pub(crate) const ACPI_START: u64 = 0xe_0000;
/// Memory above the legacy hole begins here.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// A range of the memory map (ACPI, section 15, "System Address Map").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// 1 memory, 2 reserved.
    pub(crate) kind: u32,
}

/// The memory map of a machine with this memory.
pub(crate) fn memory_map(ram: &GuestRam) -> Vec<Range> {
    let memory = |start, end| Range { start, len: end - start, kind: 1 };
    let reserved = |start, end| Range { start, len: end - start, kind: 2 };
    let mut map = vec![
        memory(0, LOW_MEMORY_END),
        reserved(LOW_MEMORY_END, 0xa_0000),
        reserved(ACPI_START, HIGH_MEMORY),
        memory(HIGH_MEMORY, ram.low_end()),
        reserved(ECAM_START, ECAM_START + ECAM_LEN),
    ];
    if ram.high_len() > 0 {
        map.push(memory(HIGH_START, HIGH_START + ram.high_len()));
    }
    map.retain(|range| range.len > 0);
    map
}
