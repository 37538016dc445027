//! What a guest writes and nobody keeps: an overlay over the disk under test, in a file without a name.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::file::{CacheMode, CreateMode, FileOptions, HostFile};
use block::mem::MemStorage;
use block::overlay::Overlay;
use block::{BlockDevice, Error, ErrorKind, HostExtent, Result, ResultExt as _, Storage, ZeroMode};

/// Bytes that are copied from the disk when a guest writes a part of them.
const BLOCK_SIZE: u32 = 16 << 10;
/// Names that are tried for the file.
const TRIES: u32 = 100;

/// A disk that shows `base` and may be written: what is written lies in a file in `directory` that has no name any
/// more when this returns, at most `limit` bytes of it, and is gone when the disk is dropped.
///
/// # Errors
/// The file cannot be made.
pub fn in_file(base: Arc<dyn BlockDevice>, directory: &Path, limit: u64) -> Result<Arc<dyn BlockDevice>> {
    over(base, nameless_file(directory)?, limit)
}

/// The same in memory.
///
/// # Errors
/// None, as of now.
pub fn in_memory(base: Arc<dyn BlockDevice>, limit: u64) -> Result<Arc<dyn BlockDevice>> {
    over(base, Arc::new(MemStorage::new()), limit)
}

fn over(base: Arc<dyn BlockDevice>, store: Arc<dyn Storage>, limit: u64) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(Overlay::new(base, Arc::new(Bounded { store, limit }), BLOCK_SIZE)?))
}

/// A file that is removed as soon as it is open.
fn nameless_file(directory: &Path) -> Result<Arc<dyn Storage>> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let options =
        FileOptions { cache: CacheMode::Unsafe, follow: false, ..FileOptions::creating(CreateMode::New) };
    for _ in 0..TRIES {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".vimg-scratch-{}-{number}", std::process::id()));
        match HostFile::open(&path, &options) {
            Ok(file) => {
                std::fs::remove_file(&path).context(|| format!("could not remove '{}'", path.display()))?;
                return Ok(Arc::new(file));
            }
            Err(error) if error.message() == "File exists" => {}
            Err(error) => return Err(error.context(about(directory))),
        }
    }
    Err(Error::new(ErrorKind::Io, "no free name").context(about(directory)))
}

fn about(directory: &Path) -> String {
    format!("could not make a file for what the guest writes in '{}'", directory.display())
}

/// A storage that does not grow beyond a limit.
#[derive(Debug)]
struct Bounded {
    store: Arc<dyn Storage>,
    limit: u64,
}

impl Bounded {
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(Error::new(
                ErrorKind::NoSpace,
                format!("the guest has written more than the {} bytes that are kept for it", self.limit),
            )),
        }
    }
}

impl Storage for Bounded {
    fn len(&self) -> Result<u64> {
        self.store.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check(0, len)?;
        self.store.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.store.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.store.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check(offset, len)?;
        self.store.zero_range(offset, len, mode)
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.store.discard_range(offset, len)
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        self.store.allocate_range(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.store.sync()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        self.store.extent(offset, max_len)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn alignment(&self) -> u32 {
        self.store.alignment()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.store.as_fd()
    }

    fn name(&self) -> String {
        self.store.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::raw::{Raw, RawOptions};

    fn disk(byte: u8, len: usize) -> (Arc<MemStorage>, Arc<dyn BlockDevice>) {
        let storage = Arc::new(MemStorage::from_bytes(vec![byte; len]));
        let raw = Raw::open(Arc::clone(&storage) as _, RawOptions::default()).unwrap();
        (storage, Arc::new(raw))
    }

    #[test]
    fn the_base_stays_and_nothing_is_left_behind() {
        let directory = std::env::temp_dir().join(format!("vimg-scratch-test-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let (storage, base) = disk(1, 100_000);
        let scratch = in_file(base, &directory, 1 << 20).unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0, "no name remains");
        scratch.write_at(&[9; 1000], 50_000).unwrap();
        let mut buf = [0; 3];
        scratch.read_at(&mut buf, 49_999).unwrap();
        assert_eq!(buf, [1, 9, 9]);
        assert_eq!(storage.to_bytes(), vec![1; 100_000]);
        std::fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn a_guest_cannot_fill_the_host() {
        let scratch = in_memory(disk(0, 1 << 20).1, 4 * u64::from(BLOCK_SIZE)).unwrap();
        scratch.write_at(&[7; 4 * BLOCK_SIZE as usize], 0).unwrap();
        let error = scratch.write_at(&[7; 1], 512 << 10).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        // What is there already can be written again.
        scratch.write_at(&[8; 100], 5).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = in_file(disk(0, 512).1, Path::new("/nonexistent/folder"), 1).unwrap_err();
        assert!(error.to_string().contains("'/nonexistent/folder'"), "{error}");
    }
}
