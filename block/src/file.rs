//! Files and block devices of the host.
//!
//! Everything is positional I/O on one descriptor, so any number of threads use it at once without a lock;
//! the exceptions (writes past the end, unaligned `O_DIRECT` writes) are argued in `growth.rs`. What a file
//! system cannot do (punch holes, say where they are, share blocks) is found out by trying, once.

mod direct;
mod growth;
mod holes;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::uio::pwritev;
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;

use crate::align::AlignedBuf;
use crate::device::ZeroMode;
use crate::error::{Error, Result};
use crate::lock::{Held, Permissions, find_holder};
use crate::num::{align_down, align_up, to_usize};
use crate::storage::{HostExtent, Storage};
use crate::sys;

use direct::Direct;
use growth::Growth;
use holes::Holes;

/// Bytes that are written at once where zeros have to be written.
const ZERO_CHUNK: u64 = 1 << 20;

/// The kernel's offsets are signed, and aligned requests must not reach past the last of them: a little
/// before that, every file has ended.
const BEYOND_ANY_FILE: u64 = (1 << 63) - (1 << 20);

/// How the host's page cache is used, in qemu's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum CacheMode {
    /// Around the page cache (`O_DIRECT`); a flush makes durable.
    None,
    /// Through the page cache; a flush makes durable.
    #[default]
    Writeback,
    /// Through the page cache; flushes do nothing.
    Unsafe,
    /// Around the page cache, every write durable when it returns.
    DirectSync,
    /// Through the page cache, every write durable when it returns.
    WriteThrough,
}

impl CacheMode {
    /// All modes.
    pub const ALL: [Self; 5] =
        [Self::None, Self::Writeback, Self::Unsafe, Self::DirectSync, Self::WriteThrough];

    /// The mode with this name (`off` is another name of `none`).
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::None),
            _ => Self::ALL.into_iter().find(|mode| mode.name() == name),
        }
    }

    /// The name of the mode.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Unsafe => "unsafe",
            Self::DirectSync => "directsync",
            Self::WriteThrough => "writethrough",
        }
    }

    /// Whether the page cache is avoided.
    pub const fn direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Whether flushes do nothing.
    pub const fn no_flush(self) -> bool {
        matches!(self, Self::Unsafe)
    }

    /// Whether writes are durable when they return.
    pub const fn write_through(self) -> bool {
        matches!(self, Self::DirectSync | Self::WriteThrough)
    }

    /// The flags of `open` that make it so.
    fn open_flags(self) -> OFlag {
        let mut flags = OFlag::empty();
        flags.set(OFlag::O_DIRECT, self.direct());
        flags.set(OFlag::O_DSYNC, self.write_through());
        flags
    }
}

/// What to do if the file is not there, or is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CreateMode {
    /// Create it; fail if there is one.
    New,
    /// Create it, or empty the regular file that is there; a block device is opened as it is.
    Truncate,
}

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileOptions {
    /// Whether it will be written.
    pub writable: bool,
    /// Use of the page cache.
    pub cache: CacheMode,
    /// `None`: the file must exist. Otherwise it has to be opened writable.
    pub create: Option<CreateMode>,
    /// Whether a symbolic link as the last part of the path is followed.
    pub follow: bool,
    /// Reading leaves the file's time of access as it is (`O_NOATIME`), where the file is ours or we are root;
    /// elsewhere the host decides.
    pub keep_access_time: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            writable: false,
            cache: CacheMode::default(),
            create: None,
            follow: true,
            keep_access_time: false,
        }
    }
}

impl FileOptions {
    /// For reading an existing file.
    pub fn read_only() -> Self {
        Self::default()
    }

    /// For reading and writing an existing file.
    pub fn read_write() -> Self {
        Self { writable: true, ..Self::default() }
    }

    /// For reading and writing a file that is created.
    pub fn creating(mode: CreateMode) -> Self {
        Self { create: Some(mode), ..Self::read_write() }
    }

    fn open(&self, path: &Path) -> Result<File> {
        // Without O_NONBLOCK, naming a FIFO would wait for a writer that may never come.
        let mut flags = self.cache.open_flags() | OFlag::O_NONBLOCK;
        flags.set(OFlag::O_NOFOLLOW, !self.follow);
        let mut options = OpenOptions::new();
        options.read(true).write(self.writable).custom_flags(flags.bits()).mode(0o644);
        match self.create {
            Some(CreateMode::New) => options.create_new(true),
            // Not O_TRUNC: someone else's locks are to be looked at before anything is lost.
            Some(CreateMode::Truncate) => options.create(true),
            None => &mut options,
        };
        let file =
            self.open_keeping_time(&mut options, flags, path).map_err(|error| self.explain_open(error))?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))?;
        Ok(file)
    }

    /// `O_NOATIME` is refused to those who do not own the file.
    fn open_keeping_time(&self, options: &mut OpenOptions, flags: OFlag, path: &Path) -> io::Result<File> {
        if self.keep_access_time {
            match options.custom_flags((flags | OFlag::O_NOATIME).bits()).open(path) {
                Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {}
                opened => return opened,
            }
        }
        options.custom_flags(flags.bits()).open(path)
    }

    fn explain_open(&self, error: io::Error) -> Error {
        if self.cache.direct() && error.raw_os_error() == Some(Errno::EINVAL as i32) {
            return Error::unsupported("filesystem does not support O_DIRECT")
                .hint("Use cache mode 'writeback' for files on this file system.");
        }
        error.into()
    }
}

/// What the descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Regular,
    Device {
        /// Logical sector size in bytes.
        sector: u32,
        block: bool,
    },
}

impl Kind {
    fn of(file: &File, path: &Path) -> Result<Self> {
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Self::Regular);
        }
        if kind.is_block_device() || kind.is_char_device() {
            let sector = sys::logical_sector_size(file).ok().filter(|size| size.is_power_of_two());
            return Ok(Self::Device { sector: sector.unwrap_or(512), block: kind.is_block_device() });
        }
        let message = format!("'file' driver requires '{}' to be a regular file", path.display());
        Err(Error::unsupported(message))
    }
}

/// A way to change the allocation of a range that a file system may lack.
#[derive(Debug)]
struct Ability {
    flags: FallocateFlags,
    lacking: AtomicBool,
}

impl Ability {
    fn new(flags: FallocateFlags) -> Self {
        Self { flags, lacking: AtomicBool::new(false) }
    }

    /// Tries it. `Ok(false)`: it cannot be done, nothing has changed.
    fn apply(&self, file: &File, offset: u64, len: u64) -> Result<bool> {
        if self.lacking.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match fallocate_range(file, self.flags, offset, len) {
            Ok(()) => Ok(true),
            Err(errno) if is_permanent_refusal(errno) => {
                self.lacking.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(errno) if is_refusal(errno) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The operation is not known here at all.
fn is_permanent_refusal(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY | Errno::ENODEV)
}

/// The operation is not possible for this file or range: not a failure, but another way has to be found.
fn is_refusal(errno: Errno) -> bool {
    let for_this_range = [Errno::EINVAL, Errno::EXDEV, Errno::EPERM, Errno::ETXTBSY, Errno::EBUSY];
    is_permanent_refusal(errno) || for_this_range.contains(&errno)
}

fn fallocate_range(
    file: &File,
    flags: FallocateFlags,
    offset: u64,
    len: u64,
) -> std::result::Result<(), Errno> {
    let (offset, len) = (signed(offset)?, signed(len)?);
    loop {
        match fallocate(file, flags, offset, len) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// An offset as the kernel wants it.
fn signed(offset: u64) -> std::result::Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::EFBIG)
}

/// The end of a range, if the kernel can address it.
fn end_of(offset: u64, len: u64) -> Result<u64> {
    let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
    signed(end)?;
    Ok(end)
}

/// A file or block device of the host.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
    writable: bool,
    cache: CacheMode,
    kind: Kind,
    identity: (u64, u64),
    direct: Option<Direct>,
    growth: Growth,
    holes: Holes,
    punch: Ability,
    zero: Ability,
    allocate: Ability,
    clone_lacking: AtomicBool,
    sync_failed: AtomicBool,
    locks: Mutex<Held>,
}

impl HostFile {
    /// Opens (or creates) the file. No locks are held afterwards; see [`lock`](Self::lock).
    ///
    /// # Errors
    /// What the host says, without the path. `Locked` if a file to be emptied is in use elsewhere.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        let file = options.open(path)?;
        let kind = Kind::of(&file, path)?;
        let opened = Self {
            identity: identity(&file, kind)?,
            direct: options.cache.direct().then(|| Direct::of(&file, kind)),
            growth: Growth::new(match kind {
                Kind::Regular => file.metadata()?.len(),
                Kind::Device { .. } => u64::MAX,
            }),
            holes: Holes::new(kind == Kind::Regular),
            punch: Ability::new(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE),
            zero: Ability::new(FallocateFlags::FALLOC_FL_ZERO_RANGE),
            allocate: Ability::new(FallocateFlags::empty()),
            clone_lacking: AtomicBool::new(kind != Kind::Regular),
            sync_failed: AtomicBool::new(false),
            locks: Mutex::default(),
            path: path.to_owned(),
            writable: options.writable,
            cache: options.cache,
            file,
            kind,
        };
        if options.create == Some(CreateMode::Truncate) && kind == Kind::Regular {
            opened.make_empty()?;
        }
        Ok(opened)
    }

    /// Empties the file unless another process minds.
    fn make_empty(&self) -> Result<()> {
        let shared = Permissions::ALL.without(Permissions::RESIZE);
        self.lock(Permissions::WRITE | Permissions::RESIZE, shared)?;
        let emptied = if self.len()? > 0 { self.set_len(0) } else { Ok(()) };
        self.unlock();
        emptied
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        matches!(self.kind, Kind::Device { block: true, .. })
    }

    /// What is the same for two names of one file: device and inode number. For a device node the number of
    /// the device it stands for, and 0.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// When its contents were last changed, as far as the host tells.
    pub fn modified(&self) -> Option<std::time::SystemTime> {
        self.file.metadata().ok().filter(std::fs::Metadata::is_file)?.modified().ok()
    }

    /// How the page cache is used.
    pub fn cache_mode(&self) -> CacheMode {
        self.cache
    }

    /// Takes permissions and denies to others those that are not in `shared`, in a way that qemu's tools see
    /// and obey. Locks add up: what was taken or denied before stays so.
    ///
    /// # Errors
    /// `Locked`, in qemu's words, if another open file excludes it; what was held before is still held.
    pub fn lock(&self, wanted: Permissions, shared: Permissions) -> Result<()> {
        let locked = self.locks.lock().lock(&self.file, wanted, shared);
        locked.map_err(|error| self.explain_lock(error))
    }

    /// Gives up all locks.
    pub fn unlock(&self) {
        self.locks.lock().unlock(&self.file);
    }

    fn explain_lock(&self, error: Error) -> Error {
        let error = error.hint(format!("Is another process using the image [{}]?", self.path.display()));
        match find_holder(&self.file) {
            Some(holder) => error.hint(format!("Process {} ({}) has it open.", holder.pid, holder.name)),
            None => error,
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(Error::read_only()) }
    }

    /// Runs something that changes what the file contains up to `end`, unless it says that it did not.
    fn changing(&self, end: u64, change: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let result = self.growth.writing(end, change);
        self.holes.forget();
        result
    }

    /// Makes bytes that exist read as zeros, without passing them through memory. `Ok(false)`: that cannot be
    /// done here.
    fn zero_quickly(&self, offset: u64, len: u64, may_unmap: bool) -> Result<bool> {
        let regular = self.kind == Kind::Regular;
        if may_unmap && self.punch.apply(&self.file, offset, len)? {
            return Ok(true);
        }
        if self.zero.apply(&self.file, offset, len)? {
            return Ok(true);
        }
        // The way of file systems that can punch but not zero: free the space and take it again.
        let freed = !may_unmap && regular && self.punch.apply(&self.file, offset, len)?;
        Ok(freed && self.allocate.apply(&self.file, offset, len)?)
    }

    /// Zeros the part of a range that lies inside the file.
    fn zero_existing(&self, offset: u64, end: u64, mode: ZeroMode) -> Result<()> {
        let unit = match self.kind {
            Kind::Regular => 1,
            Kind::Device { sector, .. } => u64::from(sector),
        };
        let (start, stop) = (align_up(offset, unit).unwrap_or(end), align_down(end, unit));
        if start >= stop {
            return self.write_zeros(offset, end);
        }
        if !self.zero_quickly(start, stop - start, mode.may_unmap)? {
            if mode.no_fallback {
                return Err(Error::unsupported("this file has no fast way to write zeros"));
            }
            return self.write_zeros(offset, end);
        }
        self.write_zeros(offset, start)?;
        self.write_zeros(stop, end)
    }

    /// Adds zeros from the present end of the file on.
    fn zero_beyond(&self, offset: u64, end: u64, mode: ZeroMode) -> Result<()> {
        if self.kind == Kind::Regular {
            if mode.may_unmap {
                return self.growth.extend(&self.file, end);
            }
            if self.changing(end, || self.allocate.apply(&self.file, offset, end - offset))? {
                return Ok(());
            }
            if mode.no_fallback {
                return Err(Error::unsupported("this file has no fast way to write zeros"));
            }
        }
        self.write_zeros(offset, end)
    }

    /// Zeros byte by byte.
    fn write_zeros(&self, mut offset: u64, end: u64) -> Result<()> {
        if offset >= end {
            return Ok(());
        }
        let align = self.direct.map_or(1, |direct| direct.memory);
        let zeros = AlignedBuf::new(to_usize((end - offset).min(ZERO_CHUNK)), align);
        while offset < end {
            // Chunks end at multiples of their size, so that only the first can be unaligned for O_DIRECT.
            let len = (ZERO_CHUNK - offset % ZERO_CHUNK).min(end - offset).min(zeros.len() as u64);
            self.write_at(&zeros[..to_usize(len)], offset)?;
            offset += len;
        }
        Ok(())
    }

    /// Allocates where the file system has no call for it, by writing zeros over holes and past the end.
    fn allocate_by_writing(&self, mut offset: u64, end: u64) -> Result<()> {
        let existing = self.len()?.clamp(offset, end);
        while offset < existing {
            let extent = self.extent(offset, existing - offset)?;
            if !extent.data {
                self.write_zeros(offset, offset + extent.len)?;
            }
            offset += extent.len;
        }
        self.write_zeros(existing, end)
    }

    fn read_buffered(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    fn write_vectored_buffered(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> Result<()> {
        // The kernel takes no more than this many at once.
        const MAX_BUFFERS: usize = 1024;
        let mut bufs = bufs.to_vec();
        let mut rest = &mut bufs[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            match pwritev(&self.file, &rest[..count], signed(offset)?) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut rest, written);
                    offset += written as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Discards a range inside the file, as far as possible.
    fn discard_existing(&self, offset: u64, end: u64) -> Result<()> {
        let Kind::Device { sector, .. } = self.kind else {
            return self.punch.apply(&self.file, offset, end - offset).map(drop);
        };
        let start = align_up(offset, u64::from(sector)).unwrap_or(end);
        let stop = align_down(end, u64::from(sector));
        if start >= stop {
            return Ok(());
        }
        match sys::discard(&self.file, start, stop - start) {
            Err(errno) if !is_refusal(errno) => Err(errno.into()),
            _ => Ok(()),
        }
    }
}

/// See [`HostFile::identity`].
fn identity(file: &File, kind: Kind) -> Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok(match kind {
        Kind::Regular => (metadata.dev(), metadata.ino()),
        Kind::Device { .. } => (metadata.rdev(), 0),
    })
}

impl Storage for HostFile {
    fn len(&self) -> Result<u64> {
        match self.kind {
            Kind::Regular => Ok(self.file.metadata()?.len()),
            Kind::Device { .. } => {
                let end = lseek(&self.file, 0, Whence::SeekEnd)?;
                Ok(u64::try_from(end).unwrap_or(0))
            }
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_writable()?;
        if self.fixed_len() {
            return match self.len()? {
                size if len <= size => Ok(()),
                _ => Err(Error::unsupported("Cannot grow device files")),
            };
        }
        let result = self.growth.set_len(&self.file, len);
        self.holes.forget();
        result
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let readable = BEYOND_ANY_FILE.saturating_sub(offset).min(buf.len() as u64);
        let (buf, beyond) = buf.split_at_mut(to_usize(readable));
        beyond.fill(0);
        match &self.direct {
            Some(direct) => direct.read(&self.file, buf, offset),
            None => self.read_buffered(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        let end = end_of(offset, buf.len() as u64)?;
        match &self.direct {
            Some(direct) => {
                let result = direct.write(&self.file, &self.growth, buf, offset);
                self.holes.forget();
                result
            }
            None => self.changing(end, || Ok(self.file.write_all_at(buf, offset).map(|()| true)?)).map(drop),
        }
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.check_writable()?;
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        let end = end_of(offset, len as u64)?;
        let Some(direct) = &self.direct else {
            return self
                .changing(end, || self.write_vectored_buffered(bufs, offset).map(|()| true))
                .map(drop);
        };
        let mut gathered = AlignedBuf::new(len, direct.memory);
        let mut rest = &mut gathered[..];
        for buf in bufs {
            let (head, tail) = rest.split_at_mut(buf.len());
            head.copy_from_slice(buf);
            rest = tail;
        }
        self.write_at(&gathered, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        let end = end_of(offset, len)?;
        let existing = self.len()?.clamp(offset, end);
        if offset < existing {
            let result = self.zero_existing(offset, existing, mode);
            self.holes.forget();
            result?;
        }
        if existing < end {
            let result = self.zero_beyond(existing, end, mode);
            self.holes.forget();
            result?;
        }
        Ok(())
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let end = offset.saturating_add(len).min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        let result = self.discard_existing(offset, end);
        self.holes.forget();
        result
    }

    /// Where the host has no call for it, zeros are written over holes; nobody may write to the range
    /// meanwhile.
    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let end = end_of(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if self.fixed_len() {
            return match self.len()? {
                size if end <= size => Ok(()),
                _ => Err(Errno::ENOSPC.into()),
            };
        }
        if self.changing(end, || self.allocate.apply(&self.file, offset, len))? {
            return Ok(());
        }
        self.allocate_by_writing(offset, end)
    }

    fn sync(&self) -> Result<()> {
        if self.cache.no_flush() || !self.writable {
            return Ok(());
        }
        // After a failed fdatasync the kernel forgets which pages it could not write: later calls would
        // succeed although data is lost. So the first failure is final.
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(Errno::EIO.into());
        }
        self.file.sync_data().map_err(|error| {
            self.sync_failed.store(true, Ordering::Release);
            error.into()
        })
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        self.holes.extent(&self.file, offset, max_len)
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn fixed_len(&self) -> bool {
        self.kind != Kind::Regular
    }

    fn alignment(&self) -> u32 {
        self.direct.map_or(1, |direct| direct.offset)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.file.metadata()?.blocks() * 512))
    }

    fn clone_range(&self, offset: u64, source: &dyn Storage, source_offset: u64, len: u64) -> Result<bool> {
        self.check_writable()?;
        let (Some(source), false) = (source.as_fd(), self.clone_lacking.load(Ordering::Relaxed)) else {
            return Ok(false);
        };
        if len == 0 {
            return Ok(true); // To the kernel, 0 means everything.
        }
        let end = end_of(offset, len)?;
        self.changing(end, || match sys::clone_range(&self.file, offset, source, source_offset, len) {
            Ok(()) => Ok(true),
            Err(errno) if is_refusal(errno) => {
                self.clone_lacking.fetch_or(is_permanent_refusal(errno), Ordering::Relaxed);
                Ok(false)
            }
            Err(errno) => Err(errno.into()),
        })
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
