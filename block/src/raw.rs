//! The raw format: the bytes of a container, or of a part of it, are the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::{BlockDevice, LayerExtent, Limits, Preallocation, Stored, ZeroMode, check_range};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::image::{Image, ImageInfo};
use crate::num::{align_up, to_usize};
use crate::storage::Storage;

/// The sector, in which qemu counts sizes.
const SECTOR: u64 = 512;

/// Which part of the container is the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawOptions {
    /// Where the disk begins, in bytes.
    pub offset: u64,
    /// Its size in bytes, a multiple of 512. `None`: all that follows.
    pub size: Option<u64>,
}

/// A raw disk. Its size is the exact length of the container, which need not be a multiple of 512 (qemu rounds
/// up, and shows zeros there).
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    offset: u64,
    size: AtomicU64,
    fixed: bool,
}

impl Raw {
    /// A disk over `storage`.
    ///
    /// # Errors
    /// The part does not lie inside the container, or the host failed.
    pub fn open(storage: Arc<dyn Storage>, options: RawOptions) -> Result<Self> {
        let available = storage.len()?;
        let size = part(available, options)?;
        Ok(Self {
            storage,
            offset: options.offset,
            size: AtomicU64::new(size),
            fixed: options.size.is_some(),
        })
    }

    /// Where a range of the disk lies in the container.
    fn locate(&self, offset: u64, len: u64) -> Result<u64> {
        check_range(offset, len, self.size())?;
        // Cannot overflow: the end of the disk lies inside the container or next to it.
        Ok(self.offset + offset)
    }

    /// Makes the disk `size` bytes long, from `from` bytes, which are fewer.
    fn grow(&self, from: u64, size: u64, preallocation: Preallocation) -> Result<()> {
        let end = self.offset.checked_add(size).ok_or_else(too_large)?;
        self.storage.set_len(end).context(|| "Could not resize file".to_owned())?;
        fill(&*self.storage, self.offset + from, end, preallocation).inspect_err(|_| {
            // Back to what it was; the first error is the one to tell.
            let _ = self.storage.set_len(self.offset + from);
        })
    }
}

/// The size of the part of a container of `available` bytes that is the disk.
fn part(available: u64, options: RawOptions) -> Result<u64> {
    let RawOptions { offset, size } = options;
    let rounded = align_up(available, SECTOR).unwrap_or(available);
    let Some(size) = size else {
        return available.checked_sub(offset).or((offset <= rounded).then_some(0)).ok_or_else(|| {
            let message = "cannot be greater than size of the containing file";
            Error::usage(format!("Offset ({offset}) {message} ({rounded})"))
        });
    };
    if offset.checked_add(size).is_none_or(|end| end > rounded) {
        // The two spaces are qemu's.
        return Err(Error::usage(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size \
             of the containing file ({rounded})"
        )));
    }
    if size % SECTOR != 0 {
        return Err(Error::usage("Specified size is not multiple of 512"));
    }
    Ok(size)
}

impl BlockDevice for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn limits(&self) -> Limits {
        Limits { alignment: self.storage.alignment(), ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, self.locate(offset, buf.len() as u64)?)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.storage.write_at(buf, self.locate(offset, buf.len() as u64)?)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.storage.zero_range(self.locate(offset, len)?, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.storage.discard_range(self.locate(offset, len)?, len)
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if self.fixed {
            return Err(Error::unsupported("Cannot resize fixed-size raw disks"));
        }
        check_preallocation(preallocation)?;
        let from = self.size();
        if size != from && preallocation == Preallocation::Off && self.storage.fixed_len() {
            let end = self.offset.checked_add(size).ok_or_else(too_large)?;
            if self.storage.resize_fixed(end)? {
                self.size.store(size, Ordering::Release);
                return Ok(());
            }
        }
        if size > from {
            self.grow(from, size, preallocation)?;
        } else if preallocation != Preallocation::Off {
            return Err(Error::usage("Preallocation can only be used for growing images"));
        } else if size < from && self.storage.fixed_len() {
            return Err(Error::unsupported("Cannot resize device files"));
        } else {
            self.storage.set_len(self.offset + size).context(|| "Could not resize file".to_owned())?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let len = max_len.min(self.size().saturating_sub(offset));
        let at = self.locate(offset, len.max(1))?;
        let found = self.storage.extent(at, len)?;
        let stored = if found.data { Stored::Data } else { Stored::Zero };
        Ok(LayerExtent::new(stored, found.len.min(len)).at(at))
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.storage.clone_range(self.locate(offset, len)?, source, source_offset, len)
    }
}

impl Image for Raw {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo::default())
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}

/// Gives a new, empty raw file its size.
///
/// # Errors
/// In qemu's words: the mode is not one for raw files, the file system has not the space or cannot hold so
/// large a file.
pub fn preallocate(storage: &dyn Storage, size: u64, mode: Preallocation) -> Result<()> {
    check_preallocation(mode)?;
    storage.set_len(size).map_err(|error| match error.kind() {
        ErrorKind::NoSpace if is_too_big(&error) => too_large(),
        _ => error.context("Could not resize file"),
    })?;
    fill(storage, 0, size, mode)
}

fn too_large() -> Error {
    Error::new(ErrorKind::NoSpace, "The image size is too large for file format 'raw'")
}

/// Whether the file system has no files of that size (as opposed to no space).
fn is_too_big(error: &Error) -> bool {
    use std::error::Error as _;
    let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::FileTooLarge)
}

fn check_preallocation(mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        _ => Ok(()),
    }
}

/// Gives space to the bytes from `start` to `end`, which read as zeros.
fn fill(storage: &dyn Storage, start: u64, end: u64, mode: Preallocation) -> Result<()> {
    match mode {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            storage.allocate_range(start, end - start).context(|| "Could not preallocate new data".to_owned())
        }
        Preallocation::Full => {
            write_zeros(storage, start, end).context(|| "Could not write zeros for preallocation".to_owned())
        }
    }
}

/// Writes real zeros.
fn write_zeros(storage: &dyn Storage, mut start: u64, end: u64) -> Result<()> {
    const CHUNK: u64 = 1 << 20;
    let zeros = vec![0; to_usize(CHUNK.min(end - start))];
    while start < end {
        let len = CHUNK.min(end - start);
        storage.write_at(&zeros[..to_usize(len)], start)?;
        start += len;
    }
    storage.sync()
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::file::{CreateMode, FileOptions, HostFile};
    use crate::mem::MemStorage;
    use crate::testing::{Fault, FaultStorage, Model, Op, Operation};

    fn memory(len: usize) -> Arc<MemStorage> {
        Arc::new(MemStorage::from_bytes(vec![1; len]))
    }

    fn open(len: usize, offset: u64, size: Option<u64>) -> Result<Raw> {
        Raw::open(memory(len), RawOptions { offset, size })
    }

    fn host_file() -> (tempfile::TempDir, Arc<HostFile>) {
        let folder = tempfile::tempdir().unwrap();
        let file = HostFile::open(&folder.path().join("x"), &FileOptions::creating(CreateMode::New)).unwrap();
        (folder, Arc::new(file))
    }

    /// What qemu-img 10.0.2 says of a file of 1000 bytes.
    #[test]
    fn a_part_that_is_not_there_is_refused_in_qemus_words() {
        let said = |offset, size| open(1000, offset, size).unwrap_err().to_string();
        assert_eq!(
            said(2000, None),
            "Offset (2000) cannot be greater than size of the containing file (1024)"
        );
        let sum = |offset, size| {
            format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of \
                 the containing file (1024)"
            )
        };
        assert_eq!(said(100, Some(1000)), sum(100, 1000));
        assert_eq!(said(1024, Some(512)), sum(1024, 512));
        assert_eq!(said(u64::MAX, Some(512)), sum(u64::MAX, 512));
        assert_eq!(said(0, Some(100)), "Specified size is not multiple of 512");
        let size = |offset, size| open(1000, offset, size).unwrap().size();
        assert_eq!((size(0, None), size(100, None), size(1000, None), size(1024, None)), (1000, 900, 0, 0));
        assert_eq!((size(0, Some(1024)), size(0, Some(0)), size(488, Some(512))), (1024, 0, 512));
    }

    #[test]
    fn a_part_is_read_and_written_and_nothing_beside_it() {
        let storage = memory(4096);
        let raw =
            Raw::open(Arc::clone(&storage) as _, RawOptions { offset: 1000, size: Some(1024) }).unwrap();
        let mut model = Model::from_bytes(vec![1; 1024]);
        for op in Op::sequence(100, 1024, 1) {
            op.run(&raw).unwrap();
            model.apply(&op);
            model.compare(&raw).unwrap();
        }
        let bytes = storage.to_bytes();
        assert_eq!(bytes.len(), 4096);
        assert!(bytes[..1000].iter().chain(&bytes[2024..]).all(|&byte| byte == 1));
        assert_eq!(raw.read_at(&mut [0; 2], 1023).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(raw.write_at(&[0; 2], 1023).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(raw.layer_extent(10, 5000).unwrap(), LayerExtent::new(Stored::Data, 1014).at(1010));
        assert_eq!(raw.layer_extent(1024, 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        let error = raw.resize(2048, Preallocation::Off).unwrap_err();
        assert_eq!(error.message(), "Cannot resize fixed-size raw disks");
    }

    #[test]
    fn holes_have_a_place() {
        let (_folder, file) = host_file();
        preallocate(&*file, 1 << 20, Preallocation::Off).unwrap();
        file.write_at(&[1; 65536], 1 << 19).unwrap();
        let raw = Raw::open(file, RawOptions { offset: 4096, size: None }).unwrap();
        let hole = raw.layer_extent(0, u64::MAX).unwrap();
        assert_eq!(hole, LayerExtent::new(Stored::Zero, (1 << 19) - 4096).at(4096));
        let data = raw.layer_extent((1 << 19) - 4096, u64::MAX).unwrap();
        assert_eq!(data, LayerExtent::new(Stored::Data, 65536).at(1 << 19));
    }

    #[test]
    fn the_size_is_exact_and_follows_a_resize() {
        let (_folder, file) = host_file();
        preallocate(&*file, 1001, Preallocation::Off).unwrap();
        let raw = Raw::open(Arc::clone(&file) as _, RawOptions { offset: 1, size: None }).unwrap();
        assert_eq!(raw.size(), 1000);
        for (size, mode) in [(1 << 20, Preallocation::Falloc), (2 << 20, Preallocation::Full)] {
            raw.resize(size, mode).unwrap();
            assert_eq!((raw.size(), file.len().unwrap()), (size, size + 1));
            assert!(file.allocated().unwrap().unwrap() >= size - 4096);
        }
        raw.resize(700, Preallocation::Off).unwrap();
        assert_eq!((raw.size(), file.len().unwrap()), (700, 701));
        let error = raw.resize(600, Preallocation::Full).unwrap_err();
        assert_eq!(error.message(), "Preallocation can only be used for growing images");
        let error = raw.resize(4096, Preallocation::Metadata).unwrap_err();
        assert_eq!(error.message(), "Unsupported preallocation mode: metadata");
        assert_eq!(raw.size(), 700);
    }

    #[test]
    fn growing_that_fails_leaves_the_size_as_it_was() {
        let memory = memory(1000);
        let storage = Arc::new(FaultStorage::new(Arc::clone(&memory) as _));
        let raw = Raw::open(Arc::clone(&storage) as _, RawOptions::default()).unwrap();
        storage.fail(Fault::always(Errno::ENOSPC).on(&[Operation::Allocate]));
        let error = raw.resize(1 << 20, Preallocation::Falloc).unwrap_err();
        assert_eq!(error.to_string(), "Could not preallocate new data: No space left on device");
        assert_eq!((raw.size(), memory.len().unwrap()), (1000, 1000));
        storage.fail(Fault::from_nth(1, Errno::ENOSPC).on(&[Operation::Write]));
        let error = raw.resize(4 << 20, Preallocation::Full).unwrap_err();
        assert_eq!(error.to_string(), "Could not write zeros for preallocation: No space left on device");
        assert_eq!((raw.size(), memory.len().unwrap()), (1000, 1000));
    }

    #[test]
    fn a_size_that_no_file_can_have_is_named_so() {
        let (_folder, file) = host_file();
        // ext4 ends at 16 TiB, most others above; the kernel refuses what no file offset can express.
        let error = preallocate(&*file, u64::MAX - 511, Preallocation::Off).unwrap_err();
        assert!(error.to_string().starts_with("Could not resize file: "), "{error}");
        let error = preallocate(&*file, 1 << 20, Preallocation::Metadata).unwrap_err();
        assert_eq!(error.message(), "Unsupported preallocation mode: metadata");
        if let Err(error) = preallocate(&*file, 1 << 60, Preallocation::Off) {
            assert_eq!(error.to_string(), "The image size is too large for file format 'raw'");
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
    }

    #[test]
    fn it_has_nothing_to_check() {
        let raw = open(512, 0, None).unwrap();
        let error = raw.check(crate::image::Repair::None).unwrap_err();
        assert_eq!(
            (error.kind(), error.message()),
            (ErrorKind::Unsupported, "This image format does not support checks")
        );
        assert_eq!((raw.format_name(), raw.info().unwrap()), ("raw", ImageInfo::default()));
    }
}
