//! A file system of the host in which every disk is a file: FUSE, the kernel's protocol for file systems in processes.

use std::ffi::OsStr;
use std::time::{Duration, UNIX_EPOCH};

use block::num::to_usize;
use block::{Result, ZeroMode};
use bootcheck::engine::Disk;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use nix::libc;

/// Nothing changes that the kernel remembers.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);
/// Number of the first disk's file.
const FIRST: u64 = 2;
/// fallocate(2): `FALLOC_FL_KEEP_SIZE`, with `FALLOC_FL_PUNCH_HOLE` or with `FALLOC_FL_ZERO_RANGE`.
const PUNCH_HOLE: i32 = 0x3;
const ZERO_RANGE: i32 = 0x11;

/// The files `disk0`, `disk1`, ..
#[derive(Debug)]
pub(super) struct Disks(pub(super) Vec<Disk>);

/// The name of a disk's file; the init knows it, too.
fn name(index: usize) -> String {
    format!("disk{index}")
}

impl Disks {
    fn disk(&self, ino: INodeNo) -> Option<&Disk> {
        self.0.get(to_usize(u64::from(ino).checked_sub(FIRST)?))
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match self.disk(ino) {
            Some(disk) => (FileType::RegularFile, 0o600, disk.device.size()),
            None if ino == INodeNo::ROOT => (FileType::Directory, 0o700, 0),
            None => return None,
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn change(&self, ino: INodeNo, act: impl FnOnce(&Disk) -> Result<()>) -> std::result::Result<(), Errno> {
        let disk = self.disk(ino).ok_or(Errno::ENOENT)?;
        if disk.read_only || disk.device.read_only() {
            return Err(Errno::EROFS);
        }
        act(disk).map_err(|_| Errno::EIO)
    }
}

fn done(result: std::result::Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Disks {
    fn lookup(&self, _: &Request, parent: INodeNo, wanted: &OsStr, reply: ReplyEntry) {
        let found = (0..self.0.len()).find(|index| wanted == OsStr::new(&name(*index)));
        let found = found.filter(|_| parent == INodeNo::ROOT);
        match found.and_then(|index| self.attributes(INodeNo(FIRST + index as u64))) {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Past the page cache: what is above, a loop device or the mailbox's reader, does not want a second one.
    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let for_reading = flags.0 & libc::O_ACCMODE == libc::O_RDONLY;
        match self.disk(ino) {
            Some(disk) if !for_reading && (disk.read_only || disk.device.read_only()) => {
                reply.error(Errno::EROFS);
            }
            Some(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(disk) = self.disk(ino) else { return reply.error(Errno::ENOENT) };
        let len = u64::from(size).min(disk.device.size().saturating_sub(offset));
        let mut bytes = vec![0; to_usize(len)];
        match disk.device.read_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.change(ino, |disk| disk.device.write_at(data, offset)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Closing a file makes nothing durable.
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.change(ino, |disk| disk.device.flush()) {
            // There is nothing to write.
            Err(errno) if errno.code() == Errno::EROFS.code() => reply.ok(),
            result => done(result, reply),
        }
    }

    /// Both ways leave zeros.
    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let zeros = match mode {
            PUNCH_HOLE => ZeroMode::UNMAP,
            ZERO_RANGE => ZeroMode::ALLOCATE,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        done(self.change(ino, |disk| disk.device.write_zeroes_at(offset, length, zeros)), reply);
    }
}
