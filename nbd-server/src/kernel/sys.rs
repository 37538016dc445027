//! The ioctls of block devices and of nbd, and one socket option, which `nix` does not wrap. All `unsafe` of the crate's
//! kernel part is in this file.
#![expect(unsafe_code, reason = "ioctls and NETLINK_ADD_MEMBERSHIP have no safe wrappers in nix")]

use std::fs::File;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

mod raw {
    //! The generated wrappers, unsafe because the kernel believes the pointers and descriptors that it is given.
    use nix::{libc, request_code_none};

    // linux/nbd.h; type 0xab.
    nix::ioctl_write_int_bad!(nbd_set_sock, request_code_none!(0xab, 0));
    nix::ioctl_write_int_bad!(nbd_set_blksize, request_code_none!(0xab, 1));
    nix::ioctl_none_bad!(nbd_do_it, request_code_none!(0xab, 3));
    nix::ioctl_none_bad!(nbd_clear_sock, request_code_none!(0xab, 4));
    nix::ioctl_none_bad!(nbd_clear_que, request_code_none!(0xab, 5));
    nix::ioctl_none_bad!(nbd_disconnect, request_code_none!(0xab, 8));
    nix::ioctl_write_int_bad!(nbd_set_timeout, request_code_none!(0xab, 9));
    nix::ioctl_write_int_bad!(nbd_set_flags, request_code_none!(0xab, 10));
    // linux/fs.h and linux/blkpg.h; type 0x12.
    nix::ioctl_write_ptr_bad!(blkroset, request_code_none!(0x12, 93), libc::c_int);
    nix::ioctl_none_bad!(blkrrpart, request_code_none!(0x12, 95));
    nix::ioctl_none_bad!(blkflsbuf, request_code_none!(0x12, 97));
    nix::ioctl_write_ptr_bad!(blkpg, request_code_none!(0x12, 105), super::PartitionCall);
}

/// `NBD_SET_SIZE_BLOCKS`, whose argument is an unsigned long and not an int.
const NBD_SET_SIZE_BLOCKS: libc::c_ulong = 0xab07;

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct PartitionCall {
    op: libc::c_int,
    flags: libc::c_int,
    datalen: libc::c_int,
    data: *const PartitionData,
}

/// `struct blkpg_partition`.
#[repr(C)]
#[derive(Debug)]
struct PartitionData {
    start: libc::c_longlong,
    length: libc::c_longlong,
    pno: libc::c_int,
    devname: [u8; 64],
    volname: [u8; 64],
}

/// What [`partition`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PartitionOp {
    /// `BLKPG_ADD_PARTITION`.
    Add,
    /// `BLKPG_DEL_PARTITION`.
    Remove,
}

/// `BLKPG`: makes or removes the device of a partition, by its number and (to make it) its place in bytes.
pub(super) fn partition(
    disk: &File,
    op: PartitionOp,
    number: u32,
    start: u64,
    len: u64,
) -> Result<(), Errno> {
    let data = PartitionData {
        start: start.try_into().map_err(|_| Errno::EINVAL)?,
        length: len.try_into().map_err(|_| Errno::EINVAL)?,
        pno: number.try_into().map_err(|_| Errno::EINVAL)?,
        devname: [0; 64],
        volname: [0; 64],
    };
    let call = PartitionCall {
        op: match op {
            PartitionOp::Add => 1,
            PartitionOp::Remove => 2,
        },
        flags: 0,
        datalen: size_of::<PartitionData>().try_into().map_err(|_| Errno::EINVAL)?,
        data: &raw const data,
    };
    // SAFETY: both structures have the kernel's layout, are live and fully initialised for the whole call, `datalen` is
    // the size of the one that `data` points to, and the kernel writes to neither; the descriptor is open.
    unsafe { raw::blkpg(disk.as_raw_fd(), &raw const call) }.map(drop)
}

/// `BLKRRPART`: the kernel reads the partition table anew.
pub(super) fn reread_partitions(disk: &File) -> Result<(), Errno> {
    // SAFETY: the call has no argument; the descriptor is open.
    unsafe { raw::blkrrpart(disk.as_raw_fd()) }.map(drop)
}

/// `BLKFLSBUF`: the kernel writes back and forgets what it has cached of the device.
pub(super) fn flush_buffers(disk: &File) -> Result<(), Errno> {
    // SAFETY: the call has no argument; the descriptor is open.
    unsafe { raw::blkflsbuf(disk.as_raw_fd()) }.map(drop)
}

/// `BLKROSET`: writes are refused from now on.
pub(super) fn set_read_only(disk: &File) -> Result<(), Errno> {
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads one int through the pointer, which points to a live int; the descriptor is open.
    unsafe { raw::blkroset(disk.as_raw_fd(), &raw const yes) }.map(drop)
}

/// `NBD_SET_SOCK`: gives the device a socket, one more each time.
pub(super) fn set_socket(nbd: &File, socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument is an int, the number of a descriptor that is open for the whole call; the kernel takes a
    // reference of its own to what it stands for.
    unsafe { raw::nbd_set_sock(nbd.as_raw_fd(), socket.as_raw_fd()) }.map(drop)
}

/// `NBD_SET_BLKSIZE` and `NBD_SET_SIZE_BLOCKS`: the size is `blocks` times `block_size` bytes.
pub(super) fn set_size(nbd: &File, block_size: u32, blocks: libc::c_ulong) -> Result<(), Errno> {
    let block_size = block_size.try_into().map_err(|_| Errno::EINVAL)?;
    // SAFETY: the argument is a number; the descriptor is open.
    unsafe { raw::nbd_set_blksize(nbd.as_raw_fd(), block_size) }?;
    // SAFETY: as above; the request has no direction bits, so that its type fits whatever the C library takes.
    let failed = unsafe { libc::ioctl(nbd.as_raw_fd(), NBD_SET_SIZE_BLOCKS as _, blocks) };
    Errno::result(failed).map(drop)
}

/// `NBD_SET_TIMEOUT` in seconds.
pub(super) fn set_timeout(nbd: &File, seconds: u32) -> Result<(), Errno> {
    let seconds = seconds.try_into().map_err(|_| Errno::EINVAL)?;
    // SAFETY: the argument is a number; the descriptor is open.
    unsafe { raw::nbd_set_timeout(nbd.as_raw_fd(), seconds) }.map(drop)
}

/// `NBD_SET_FLAGS`: the transmission flags.
pub(super) fn set_flags(nbd: &File, flags: u16) -> Result<(), Errno> {
    // SAFETY: the argument is a number; the descriptor is open.
    unsafe { raw::nbd_set_flags(nbd.as_raw_fd(), flags.into()) }.map(drop)
}

/// `NBD_DO_IT`: the device works until this returns.
pub(super) fn do_it(nbd: &File) -> Result<(), Errno> {
    // SAFETY: the call has no argument; the descriptor is open.
    unsafe { raw::nbd_do_it(nbd.as_raw_fd()) }.map(drop)
}

/// `NBD_CLEAR_QUE` and `NBD_CLEAR_SOCK`: what is under way fails, and the sockets are given back.
pub(super) fn clear(nbd: &File) -> Result<(), Errno> {
    // SAFETY: the call has no argument; the descriptor is open. (It does nothing since Linux 4.12, and may fail.)
    let _ = unsafe { raw::nbd_clear_que(nbd.as_raw_fd()) };
    // SAFETY: as above.
    unsafe { raw::nbd_clear_sock(nbd.as_raw_fd()) }.map(drop)
}

/// `NBD_DISCONNECT`: the server is told, and `NBD_DO_IT` returns.
pub(super) fn disconnect(nbd: &File) -> Result<(), Errno> {
    // SAFETY: the call has no argument; the descriptor is open.
    unsafe { raw::nbd_disconnect(nbd.as_raw_fd()) }.map(drop)
}

/// `NETLINK_ADD_MEMBERSHIP`: what is said to this group is received by the socket.
pub(super) fn join_group(socket: &OwnedFd, group: u32) -> Result<(), Errno> {
    let len = libc::socklen_t::try_from(size_of_val(&group)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel reads `len` bytes through the pointer, which points to a live number of that size; the
    // descriptor is open.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            (&raw const group).cast(),
            len,
        )
    };
    Errno::result(failed).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel looks at `datalen` first: sizes as in linux/blkpg.h on 64 bits.
    #[test]
    fn the_structures_have_the_kernels_layout() {
        assert_eq!(size_of::<PartitionData>(), 152);
        assert_eq!(std::mem::offset_of!(PartitionData, devname), 20);
        assert_eq!(size_of::<PartitionCall>(), 24);
        assert_eq!(std::mem::offset_of!(PartitionCall, data), 16);
    }

    #[test]
    fn what_is_no_block_device_says_so() {
        let file = tempfile::tempfile().unwrap();
        let no = Err(Errno::ENOTTY);
        assert_eq!(reread_partitions(&file), no);
        assert_eq!(set_read_only(&file), no);
        assert_eq!(partition(&file, PartitionOp::Add, 1, 0, 512), no);
        assert_eq!(set_size(&file, 512, 1), no);
        assert_eq!(clear(&file), no);
    }
}
