//! How a guest is started.

mod bzimage;
mod elf;
pub(crate) mod layout;
pub(crate) mod linux;
mod pvh;
mod zeropage;

/// The state in which the boot processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// As a real processor does, at the reset vector.
    Reset,
    /// Long mode, the first 4 GiB mapped to themselves, `rsi` pointing to the boot parameters.
    Long { rip: u64, rsi: u64 },
    /// Protected mode without paging; `ebx` (PVH) or `esi` (Linux) points to the boot parameters.
    Protected { rip: u64, rbx: u64, rsi: u64 },
}
