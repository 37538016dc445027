//! The bzImage format (Linux kernel documentation, "The Linux/x86 Boot Protocol").

use block::num::{align_up, len_of, to_usize};
use block::{Error, Result};

use super::Entry;
use super::layout::{HIGH_MEMORY, ZERO_PAGE};
use super::linux::too_small;
use crate::memory::GuestRam;

const HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const MIN_VERSION: u16 = 0x206;
/// The kernel may be loaded elsewhere than at its preferred address (2.05), which is known from 2.10.
const VERSION_PREFERRED: u16 = 0x20a;
const VERSION_XLOADFLAGS: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: usize = 512;
const ENTRY_64: u64 = 0x200;

/// A kernel that has been understood.
#[derive(Debug, Clone)]
pub(super) struct Image<'a> {
    /// The setup header, from 0x1f1 of the file (and of the zero page).
    pub(super) setup_header: Vec<u8>,
    /// The first address that the initramfs may not reach.
    pub(super) initrd_limit: u64,
    /// The longest command line in bytes.
    pub(super) cmdline_max: usize,
    payload: &'a [u8],
    preferred: u64,
    /// What the kernel needs from its address on, to unpack itself.
    init_size: u64,
    relocatable: bool,
    alignment: u64,
    long_mode: bool,
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        self.0.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or_else(|| {
            Error::new(
                block::ErrorKind::Truncated,
                format!("the kernel ends in its header, before {:#x}", at + N),
            )
        })
    }

    fn u8(&self, at: usize) -> Result<u8> {
        self.bytes(at).map(|[b]| b)
    }

    fn u16(&self, at: usize) -> Result<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

impl<'a> Image<'a> {
    /// Understands `file`; `None` if it is not a kernel of this kind.
    ///
    /// # Errors
    /// It is, but too old, or cut off.
    pub(super) fn parse(file: &'a [u8]) -> Result<Option<Self>> {
        let f = Fields(file);
        if !matches!((f.u16(BOOT_FLAG), f.bytes(MAGIC)), (Ok(0xaa55), Ok(magic)) if magic == *b"HdrS") {
            return Ok(None);
        }
        let version = f.u16(0x206)?;
        if version < MIN_VERSION || f.u8(0x211)? & LOADED_HIGH == 0 {
            return Err(Error::unsupported(format!(
                "a kernel with boot protocol {}.{:02}",
                version >> 8,
                version & 0xff
            )));
        }
        let end = MAGIC + usize::from(f.u8(0x201)?);
        let setup_header = file.get(HEADER..end).ok_or_else(|| cut_off(file, end))?.to_vec();
        let setup_sectors = match f.u8(HEADER)? {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let payload_at = (setup_sectors + 1) * SECTOR;
        // The length of the payload is known in units of 16 bytes; a file that holds less is cut off.
        let payload_len = to_usize(u64::from(f.u32(0x1f4)?) * 16);
        let payload = file.get(payload_at..).filter(|p| !p.is_empty() && p.len() + 15 >= payload_len);
        let payload = payload.ok_or_else(|| cut_off(file, payload_at + payload_len))?;
        let known = version >= VERSION_PREFERRED;
        Ok(Some(Self {
            setup_header,
            initrd_limit: u64::from(f.u32(0x22c)?) + 1,
            cmdline_max: to_usize(u64::from(f.u32(0x238)?)),
            payload,
            preferred: if known { f.u64(0x258)? } else { HIGH_MEMORY },
            init_size: if known { u64::from(f.u32(0x260)?) } else { len_of(payload) * 4 },
            relocatable: known && f.u8(0x234)? != 0,
            alignment: u64::from(f.u32(0x230)?.max(4096)).next_power_of_two(),
            long_mode: version >= VERSION_XLOADFLAGS && f.u16(0x236)? & XLF_KERNEL_64 != 0,
        }))
    }

    /// Where the kernel goes: where it prefers to be, or as low as possible if memory is short.
    fn address(&self, ram: &GuestRam) -> Result<u64> {
        let need = self.init_size.max(len_of(self.payload));
        let fits =
            |at: u64| at >= HIGH_MEMORY && at.checked_add(need).is_some_and(|end| end <= ram.low_end());
        let lowest = align_up(HIGH_MEMORY, self.alignment).filter(|_| self.relocatable);
        [Some(self.preferred), lowest].into_iter().flatten().find(|at| fits(*at)).ok_or_else(|| {
            too_small(
                ram,
                lowest.unwrap_or(self.preferred).saturating_add(need),
                "the kernel and its unpacking",
            )
        })
    }

    /// Loads it and returns the first address after what it needs.
    pub(super) fn load(&self, ram: &GuestRam) -> Result<u64> {
        let address = self.address(ram)?;
        ram.write(address, self.payload)?;
        Ok(address + self.init_size.max(len_of(self.payload)))
    }

    /// Where it begins.
    pub(super) fn entry(&self, ram: &GuestRam) -> Result<Entry> {
        let address = self.address(ram)?;
        Ok(if self.long_mode {
            Entry::Long { rip: address + ENTRY_64, rsi: ZERO_PAGE }
        } else {
            Entry::Protected { rip: address, rbx: 0, rsi: ZERO_PAGE }
        })
    }
}

fn cut_off(file: &[u8], need: usize) -> Error {
    Error::new(
        block::ErrorKind::Truncated,
        format!("the kernel has {} bytes, its header tells of {need}", file.len()),
    )
}
