//! The bodies of the fuzz targets: plain functions of bytes that may not panic, whatever the bytes are.

pub use crate::pci::fuzz::fuzz_pci;
pub use crate::virtio::fuzz::{fuzz_virtio_queue, fuzz_virtio_registers};

use crate::boot::linux;
use crate::memory::GuestRam;

/// A kernel file of any kind, with and without an initramfs.
pub fn fuzz_kernel(data: &[u8]) {
    let Ok(ram) = GuestRam::new(32 << 20) else { return };
    let rsdp = crate::boot::layout::ACPI_START;
    let _ = linux::load(&ram, data, None, "console=ttyS0", rsdp);
    let _ = linux::load(&ram, data, Some(data), "", rsdp);
}
