//! Direct boot of a Linux kernel: a bzImage by its 64-bit or 32-bit entry, an ELF file by PVH or its 64-bit entry.

use block::num::{align_down, len_of};
use block::{Error, Result};

use super::layout::{CMDLINE, CMDLINE_MAX, memory_map};
use super::{Entry, bzimage, elf, pvh, zeropage};
use crate::memory::GuestRam;

/// What was loaded besides the kernel, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Address and length of the initramfs.
    pub(crate) initrd: Option<(u64, u64)>,
    /// Length of the command line without its terminator.
    pub(crate) cmdline_len: u32,
    /// Where the ACPI tables begin.
    pub(crate) rsdp: u64,
}

/// Puts kernel, initramfs and command line into memory and says where the guest begins.
///
/// # Errors
/// The kernel is none that can be started, or they do not fit.
pub(crate) fn load(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry> {
    if let Some(image) = bzimage::Image::parse(kernel)? {
        let end = image.load(ram)?;
        let loaded = load_rest(ram, initrd, cmdline, rsdp, end, image.initrd_limit, image.cmdline_max)?;
        zeropage::write(ram, &image.setup_header, &loaded, &memory_map(ram))?;
        return image.entry(ram);
    }
    if let Some(image) = elf::Image::parse(kernel)? {
        let end = image.load(ram)?;
        let loaded = load_rest(ram, initrd, cmdline, rsdp, end, u64::MAX, CMDLINE_MAX - 1)?;
        return match image.pvh_entry {
            Some(rip) => {
                let rbx = pvh::write(ram, &loaded, &memory_map(ram))?;
                Ok(Entry::Protected { rip: u64::from(rip), rbx, rsi: 0 })
            }
            None => {
                let rsi = zeropage::write(ram, &zeropage::plain_header(), &loaded, &memory_map(ram))?;
                Ok(Entry::Long { rip: image.entry, rsi })
            }
        };
    }
    Err(Error::invalid("the kernel is neither a bzImage nor an ELF file").hint(
        "kernels of other architectures, and EFI programs without a Linux header, cannot be started directly",
    ))
}

/// Puts the command line into low memory and the initramfs as high as the kernel can reach.
fn load_rest(
    ram: &GuestRam,
    initrd: Option<&[u8]>,
    cmdline: &str,
    rsdp: u64,
    kernel_end: u64,
    initrd_limit: u64,
    cmdline_max: usize,
) -> Result<Loaded> {
    let limit = cmdline_max.min(CMDLINE_MAX - 1);
    let cmdline_len = u32::try_from(cmdline.len()).ok().filter(|_| cmdline.len() <= limit);
    let cmdline_len = cmdline_len.ok_or_else(|| {
        Error::invalid(format!("the command line has {} bytes, the kernel takes {limit}", cmdline.len()))
    })?;
    ram.write(CMDLINE, cmdline.as_bytes())?;
    ram.write(CMDLINE + u64::from(cmdline_len), &[0])?;
    let place = |bytes: &[u8]| -> Result<(u64, u64)> {
        let top = ram.low_end().min(initrd_limit);
        let start =
            top.checked_sub(len_of(bytes)).map(|at| align_down(at, 4096)).filter(|at| *at >= kernel_end);
        let start = start.ok_or_else(|| {
            too_small(ram, kernel_end.saturating_add(len_of(bytes)), "kernel and initramfs")
        })?;
        ram.write(start, bytes)?;
        Ok((start, len_of(bytes)))
    };
    let initrd = initrd.filter(|bytes| !bytes.is_empty()).map(place).transpose()?;
    Ok(Loaded { initrd, cmdline_len, rsdp })
}

/// Something needs memory up to `end`.
pub(super) fn too_small(ram: &GuestRam, end: u64, what: &str) -> Error {
    let (need, have) = (end.div_ceil(1 << 20), ram.low_end() >> 20);
    Error::usage(format!("{what} need {need} MiB of memory, the guest has {have}"))
        .hint("give the guest more memory")
}

#[cfg(test)]
mod tests;
