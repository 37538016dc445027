//! The guest's physical address space: where everything lies, and the memory in it.
//!
//! ```text
//! 0x0000_0000   memory: boot structures, kernel, initramfs
//! 0x000a_0000   (legacy hole: ACPI tables and firmware shadows in what is memory to KVM)
//! 0x0010_0000   memory, up to 3 GiB
//! 0xb000_0000   (with UEFI firmware memory ends here: it may put the PCI configuration space there)
//! 0xc000_0000   PCI devices
//! 0xe000_0000   PCI configuration space (ECAM)
//! 0xf000_0000   more PCI devices, as firmware places them
//! 0xfec0_0000   IOAPIC
//! 0xfec1_0000   virtio-mmio devices
//! 0xfee0_0000   local APICs
//! 0xfeff_c000   KVM's own pages (identity map, TSS)
//! 0xff00_0000   firmware, up to the end of 4 GiB; below it UEFI's variables
//! 0x1_0000_0000 the rest of the memory
//! ```
//!
//! The guest changes its memory while we look at it, so it is never borrowed as a slice: everything is copied in
//! or out, once, and only the copy is trusted.

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::sys::LargePages;
use block::num::to_usize;
use block::{Error, Result};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Memory below 4 GiB ends here at the latest.
pub(crate) const HOLE_START: u64 = 0xC000_0000;
/// Memory that did not fit below the hole begins here.
pub(crate) const HIGH_START: u64 = 0x1_0000_0000;
/// PCI devices get their addresses from here.
pub(crate) const PCI_START: u64 = 0xC000_0000;
/// The end (exclusive) of the addresses for PCI devices.
pub(crate) const PCI_END: u64 = 0xE000_0000;
/// PCI configuration space, memory mapped (ECAM).
pub(crate) const ECAM_START: u64 = 0xE000_0000;
/// One bus of configuration space.
pub(crate) const ECAM_LEN: u64 = 0x10_0000;
/// Another range for PCI devices, where firmware likes to put them.
pub(crate) const PCI_HIGH_START: u64 = 0xF000_0000;
/// Its end (exclusive).
pub(crate) const PCI_HIGH_END: u64 = 0xFEC0_0000;
/// The virtio-mmio devices, 4 KiB each.
pub(crate) const MMIO_START: u64 = 0xFEC1_0000;
/// Distance of two virtio-mmio devices.
pub(crate) const MMIO_STEP: u64 = 0x1000;
/// The IOAPIC.
pub(crate) const IOAPIC_ADDRESS: u64 = 0xFEC0_0000;
/// The local APICs.
pub(crate) const LAPIC_ADDRESS: u64 = 0xFEE0_0000;
/// A page for KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`), the three pages of its TSS after it.
pub(crate) const IDENTITY_MAP: u64 = 0xFEFF_C000;
/// `KVM_SET_TSS_ADDR`.
pub(crate) const TSS_ADDRESS: u64 = IDENTITY_MAP + 0x1000;
/// Least memory of a machine, in bytes.
pub(crate) const MIN_MEMORY: u64 = 1 << 20;
/// Most memory of a machine, in bytes.
pub(crate) const MAX_MEMORY: u64 = 1 << 40;

/// An access to an address where the guest has no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideMemory {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

impl fmt::Display for OutsideMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x} are not all in the guest's memory", self.len, self.address)
    }
}

impl std::error::Error for OutsideMemory {}

impl From<OutsideMemory> for Error {
    fn from(outside: OutsideMemory) -> Self {
        Self::from_source(block::ErrorKind::OutOfRange, outside)
    }
}

/// The guest's memory, shared by everything that reads or writes it.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: Memory,
}

/// Whose memory it is.
#[derive(Debug, Clone)]
enum Memory {
    /// Ours, which a machine of this process is given.
    Own(Arc<LargePages>),
    /// Another process's, in files that it shares with us.
    Shared(Arc<GuestMemoryMmap<()>>),
}

/// A piece of another process's guest memory.
#[derive(Debug)]
pub struct SharedRegion {
    /// Where the guest has it.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The file that it lies in.
    pub file: File,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
}

impl SharedRegion {
    /// The file's pages that exist are mapped. Whoever can make the file shorter afterwards can end this process by
    /// that (`SIGBUS`).
    fn map(self) -> Result<GuestRegionMmap<()>> {
        let Self { address, len, file, offset } = self;
        let what = || format!("memory of {len:#x} bytes at {address:#x}");
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(Error::invalid("it does not lie in a file").context(what()));
        }
        // What is mapped behind the end of a file cannot be touched.
        if offset.checked_add(len).is_none_or(|end| end > found.len()) {
            let text = format!("it ends behind its file (offset {offset:#x}, length {:#x})", found.len());
            return Err(Error::invalid(text).context(what()));
        }
        let mapped = MmapRegion::from_file(FileOffset::new(file, offset), to_usize(len));
        let mapped = mapped.map_err(|e| Error::invalid(e.to_string()).context(what()))?;
        GuestRegionMmap::new(mapped, GuestAddress(address))
            .ok_or_else(|| Error::invalid("it lies at the end of the address space").context(what()))
    }
}

impl GuestRam {
    /// Memory of `bytes` (a multiple of 1 MiB), zeroed, taken from the host page by page (large ones, where it has
    /// them) as the guest touches it.
    ///
    /// # Errors
    /// A size that no machine has; the host does not give that much address space.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::below(bytes, HOLE_START)
    }

    /// The same with what does not fit below `hole` from 4 GiB.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub(crate) fn below(bytes: u64, hole: u64) -> Result<Self> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
            return Err(Error::usage(format!(
                "guest memory of {bytes} bytes is not a multiple of 1 MiB up to 1 TiB"
            )));
        }
        let low = bytes.min(hole);
        let mut ranges = vec![(0, to_usize(low))];
        if bytes > low {
            ranges.push((HIGH_START, to_usize(bytes - low)));
        }
        let memory = LargePages::new(&ranges)
            .map_err(|e| Error::new(block::ErrorKind::NoSpace, format!("no memory for the guest: {e}")))?;
        Ok(Self { memory: Memory::Own(Arc::new(memory)) })
    }

    /// Another process's memory.
    ///
    /// # Errors
    /// No regions, or some that overlap; one is empty, does not lie in a regular file, or not within it.
    pub fn shared(mut regions: Vec<SharedRegion>) -> Result<Self> {
        regions.sort_by_key(|region| region.address);
        let regions = regions.into_iter().map(SharedRegion::map).collect::<Result<Vec<_>>>()?;
        let map = GuestMemoryMmap::from_regions(regions).map_err(|e| Error::invalid(e.to_string()))?;
        Ok(Self { memory: Memory::Shared(Arc::new(map)) })
    }

    /// Start and length of each contiguous piece.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.map().iter().map(|r| (r.start_addr().0, r.len())).collect()
    }

    /// Where the memory below the hole ends.
    pub fn low_end(&self) -> u64 {
        self.map().iter().next().map_or(0, |r| r.len())
    }

    /// The length of the memory above 4 GiB.
    pub fn high_len(&self) -> u64 {
        self.map().iter().nth(1).map_or(0, |r| r.len())
    }

    /// Whether all of the range is memory.
    pub fn contains(&self, address: u64, len: u64) -> bool {
        self.map().check_range(GuestAddress(address), to_usize(len))
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// Not all of them are memory.
    pub fn read(&self, address: u64, buf: &mut [u8]) -> std::result::Result<(), OutsideMemory> {
        let len = buf.len() as u64;
        self.map().read_slice(buf, GuestAddress(address)).map_err(|_| OutsideMemory { address, len })
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// Not all of them are memory; some may have been written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> std::result::Result<(), OutsideMemory> {
        let len = bytes.len() as u64;
        self.map().write_slice(bytes, GuestAddress(address)).map_err(|_| OutsideMemory { address, len })
    }

    /// Reads an aligned little-endian number that the guest publishes with what it wrote before (acquire).
    ///
    /// # Errors
    /// It does not lie in memory, or not aligned.
    pub fn load_u16(&self, address: u64) -> std::result::Result<u16, OutsideMemory> {
        let value: u16 = self
            .map()
            .load(GuestAddress(address), Ordering::Acquire)
            .map_err(|_| OutsideMemory { address, len: 2 })?;
        Ok(u16::from_le(value))
    }

    /// Writes an aligned little-endian number that publishes what was written before (release).
    ///
    /// # Errors
    /// It does not lie in memory, or not aligned.
    pub fn store_u16(&self, address: u64, value: u16) -> std::result::Result<(), OutsideMemory> {
        self.map()
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|_| OutsideMemory { address, len: 2 })
    }

    /// The mapping itself, for KVM.
    pub(crate) fn map(&self) -> &GuestMemoryMmap<()> {
        match &self.memory {
            Memory::Own(pages) => &pages.map,
            Memory::Shared(map) => map,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_open() {
        let ram = GuestRam::new(4 << 30).unwrap();
        assert_eq!(ram.ranges(), [(0, HOLE_START), (HIGH_START, 1 << 30)]);
        assert!(ram.contains(HOLE_START - 16, 16));
        assert!(!ram.contains(HOLE_START - 16, 17));
        assert!(!ram.contains(u64::MAX - 3, 8));
        ram.write(HIGH_START + (1 << 30) - 2, &[1, 2]).unwrap();
        assert!(ram.write(HIGH_START + (1 << 30) - 2, &[1, 2, 3]).is_err());
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for bytes in [0, 4096, (1 << 20) + 1, u64::MAX] {
            assert!(GuestRam::new(bytes).is_err(), "{bytes}");
        }
    }

    #[test]
    fn memory_begins_with_large_pages_of_the_host() {
        let ram = GuestRam::below(5 << 20, 3 << 20).unwrap();
        for region in ram.map().iter() {
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap();
            assert_eq!(host.align_offset(2 << 20), 0);
        }
        assert_eq!(ram.ranges(), [(0, 3 << 20), (HIGH_START, 2 << 20)]);
        ram.write((3 << 20) - 2, &[1, 2]).unwrap();
        ram.write(HIGH_START + (2 << 20) - 2, &[3, 4]).unwrap();
        let mut buf = [0; 2];
        ram.read((3 << 20) - 2, &mut buf).unwrap();
        assert_eq!(buf, [1, 2]);
    }

    #[test]
    fn what_lies_outside_is_an_error() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let mut buf = [0; 4];
        assert_eq!(ram.read(0x10_0000 - 2, &mut buf), Err(OutsideMemory { address: 0xf_fffe, len: 4 }));
        assert!(ram.load_u16(1).is_err(), "unaligned");
        assert!(ram.store_u16(0x10_0000, 1).is_err());
    }
}
