//! The one race of positional I/O: extending a file with `ftruncate` while another thread extends it by
//! writing further out would cut the other's bytes off.
//!
//! `floor` is a length that the file is known to have. Requests that end below it cannot meet the race and
//! take no lock. Writes past it hold the lock shared, `ftruncate` holds it exclusively.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Result;

#[derive(Debug)]
pub(super) struct Growth {
    floor: AtomicU64,
    lock: RwLock<()>,
}

impl Growth {
    /// For a file that has `len` bytes; `u64::MAX` if it cannot grow.
    pub(super) fn new(len: u64) -> Self {
        Self { floor: AtomicU64::new(len), lock: RwLock::new(()) }
    }

    /// Runs a write that ends at `end` and says whether it took place.
    pub(super) fn writing(&self, end: u64, write: impl FnOnce() -> Result<bool>) -> Result<bool> {
        if end <= self.floor.load(Ordering::Acquire) {
            return write();
        }
        let _shared = self.lock.read();
        let written = write()?;
        if written {
            self.raise(end);
        }
        Ok(written)
    }

    /// Keeps others from changing the length, and from reading, changing and writing back.
    pub(super) fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.lock.read()
    }

    /// Keeps others from everything that takes the lock.
    pub(super) fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.lock.write()
    }

    /// Notes that the file is at least `len` bytes long. Only under the lock.
    pub(super) fn raise(&self, len: u64) {
        self.floor.fetch_max(len, Ordering::AcqRel);
    }

    /// Makes the file at least `len` bytes long.
    pub(super) fn extend(&self, file: &File, len: u64) -> Result<()> {
        let _exclusive = self.lock.write();
        if file.metadata()?.len() < len {
            file.set_len(len)?;
        }
        self.raise(len);
        Ok(())
    }

    /// Makes the file exactly `len` bytes long. One that is so already is left alone: ext4 takes an empty file
    /// that is truncated for one being replaced, and writes all of its data to disk when it is closed.
    pub(super) fn set_len(&self, file: &File, len: u64) -> Result<()> {
        let _exclusive = self.lock.write();
        if file.metadata()?.len() == len {
            return Ok(());
        }
        self.floor.fetch_min(len, Ordering::AcqRel);
        file.set_len(len)?;
        self.raise(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_file_is_not_extended_while_someone_writes_past_its_end() {
        let file = tempfile::tempfile().unwrap();
        let growth = Growth::new(0);
        let (inside, go_on) = (AtomicBool::new(false), AtomicBool::new(false));
        let wait_for = |flag: &AtomicBool| {
            while !flag.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            let writing = scope.spawn(|| {
                growth.writing(100, || {
                    inside.store(true, Ordering::SeqCst);
                    wait_for(&go_on);
                    file.write_all_at(&[1; 100], 0)?;
                    Ok(true)
                })
            });
            wait_for(&inside);
            let extending = scope.spawn(|| growth.extend(&file, 50));
            thread::sleep(Duration::from_millis(50));
            let too_early = extending.is_finished();
            go_on.store(true, Ordering::SeqCst);
            assert!(writing.join().unwrap().unwrap());
            extending.join().unwrap().unwrap();
            assert!(!too_early);
        });
        assert_eq!(file.metadata().unwrap().len(), 100);
    }

    #[test]
    fn below_the_known_length_no_lock_is_taken() {
        let file = tempfile::tempfile().unwrap();
        let growth = Growth::new(0);
        growth.set_len(&file, 1000).unwrap();
        let _exclusive = growth.exclusive();
        assert!(growth.writing(1000, || Ok(true)).unwrap());
        growth.raise(2000);
        assert!(!growth.writing(2000, || Ok(false)).unwrap());
    }
}
