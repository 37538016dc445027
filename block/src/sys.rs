//! The few system calls that no dependency wraps safely. All `unsafe` of the crate is in this file.
#![expect(unsafe_code, reason = "ioctl and statx have no safe wrappers in nix")]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;

mod raw {
    //! The generated wrappers, unsafe because the kernel follows the pointer they are given.
    use nix::libc;

    nix::ioctl_write_ptr!(ficlonerange, 0x94, 13, libc::file_clone_range);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
}

/// `FICLONERANGE`: lets `len` bytes (above 0) at `offset` of `target` share the blocks of `source`.
pub(crate) fn clone_range(
    target: &File,
    offset: u64,
    source: BorrowedFd<'_>,
    source_offset: u64,
    len: u64,
) -> Result<(), Errno> {
    let request = libc::file_clone_range {
        src_fd: i64::from(source.as_raw_fd()),
        src_offset: source_offset,
        src_length: len,
        dest_offset: offset,
    };
    // SAFETY: the request is a live, fully initialised structure of the type that this ioctl reads, and the
    // kernel writes nothing through it; both descriptors are borrowed, hence open, for the whole call.
    unsafe { raw::ficlonerange(target.as_raw_fd(), &raw const request) }.map(drop)
}

/// `BLKSSZGET`: the logical sector size of a block device in bytes.
pub(crate) fn logical_sector_size(device: &File) -> Result<u32, Errno> {
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes one int through the pointer, which points to a live int.
    unsafe { raw::blksszget(device.as_raw_fd(), &raw mut size) }?;
    u32::try_from(size).map_err(|_| Errno::EINVAL)
}

/// `BLKDISCARD`: tells a block device that it may forget a range (a multiple of sectors).
pub(crate) fn discard(device: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let range = [offset, len];
    // SAFETY: the kernel reads two u64 through the pointer, which points to a live array of two.
    unsafe { raw::blkdiscard(device.as_raw_fd(), &raw const range) }.map(drop)
}

/// `FIFREEZE`: the file system of `folder` writes everything out and lets every writer wait.
pub(crate) fn freeze(folder: &File) -> Result<(), Errno> {
    let mut unused: libc::c_int = 0;
    // SAFETY: the kernel takes the pointer for the sake of the call's form only; it points to a live int.
    unsafe { raw::fifreeze(folder.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// `FITHAW`: lets the writers go on.
pub(crate) fn thaw(folder: &File) -> Result<(), Errno> {
    let mut unused: libc::c_int = 0;
    // SAFETY: as in `freeze`.
    unsafe { raw::fithaw(folder.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// What `O_DIRECT` demands of requests to this file, as far as the kernel tells (Linux 6.1 and newer): the
/// alignment of addresses and of offsets, in bytes.
pub(crate) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: statx is a structure of integers, for which all zeros is a valid value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a NUL-terminated literal (empty: the descriptor itself is meant), the descriptor is
    // open, and the kernel writes one statx through the pointer to a live one.
    let failed = unsafe {
        let flags = libc::AT_EMPTY_PATH;
        libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_DIOALIGN, &raw mut stat)
    };
    let known = failed == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    (known && memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}
