//! Where a file has data and where it has holes (`SEEK_DATA`, `SEEK_HOLE`).
//!
//! Formats ask cluster by cluster, so the last few answers of the kernel are kept. Every change of the file
//! makes all of them void by raising a generation number *after* the change: an answer is stored with the
//! number that was read before the kernel was asked, so an answer that a finished write could have made
//! wrong never has the present number.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;

use crate::error::Result;
use crate::storage::HostExtent;

/// Answers that are kept: about one for each thread that walks through the file.
const KEPT: usize = 8;

/// A stretch of the file as the kernel described it.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    start: u64,
    end: u64,
    data: bool,
    generation: u64,
}

impl Known {
    fn answer(&self, offset: u64, max_len: u64) -> HostExtent {
        HostExtent { data: self.data, len: max_len.min(self.end - offset) }
    }
}

#[derive(Debug)]
pub(super) struct Holes {
    /// Starts at 1, so that the initial entries are void.
    generation: AtomicU64,
    kept: Mutex<(usize, [Known; KEPT])>,
    /// The kernel cannot tell: 1.
    unknown: AtomicU64,
}

impl Holes {
    /// `possible`: whether the kernel is worth asking.
    pub(super) fn new(possible: bool) -> Self {
        Self {
            generation: AtomicU64::new(1),
            kept: Mutex::default(),
            unknown: AtomicU64::new(u64::from(!possible)),
        }
    }

    /// To be called after every change of the file.
    pub(super) fn forget(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// See [`Storage::extent`](crate::Storage::extent). The end of the file is the start of a hole.
    pub(super) fn extent(&self, file: &File, offset: u64, max_len: u64) -> Result<HostExtent> {
        if self.unknown.load(Ordering::Relaxed) != 0 {
            return Ok(HostExtent { data: true, len: max_len });
        }
        let generation = self.generation.load(Ordering::Acquire);
        if let Some(found) = self.recall(generation, offset) {
            return Ok(found.answer(offset, max_len));
        }
        match ask(file, offset) {
            Ok((end, data)) => {
                let found = Known { start: offset, end, data, generation };
                self.keep(found);
                Ok(found.answer(offset, max_len))
            }
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS | Errno::ESPIPE) => {
                self.unknown.store(1, Ordering::Relaxed);
                Ok(HostExtent { data: true, len: max_len })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn recall(&self, generation: u64, offset: u64) -> Option<Known> {
        let kept = self.kept.lock();
        let fits =
            |known: &&Known| known.generation == generation && (known.start..known.end).contains(&offset);
        kept.1.iter().find(fits).copied()
    }

    fn keep(&self, found: Known) {
        let mut kept = self.kept.lock();
        let next = kept.0;
        kept.1[next] = found;
        kept.0 = (next + 1) % KEPT;
    }
}

/// The end of the data or hole at `offset`, and whether it is data.
fn ask(file: &File, offset: u64) -> std::result::Result<(u64, bool), Errno> {
    let Ok(start) = i64::try_from(offset) else {
        return Ok((u64::MAX, false));
    };
    let data = match lseek(file, start, Whence::SeekData) {
        // No data from here to the end of the file.
        Err(Errno::ENXIO) => return Ok((u64::MAX, false)),
        Ok(data) => u64::try_from(data).map_err(|_| Errno::EIO)?,
        Err(errno) => return Err(errno),
    };
    if data > offset {
        return Ok((data, false));
    }
    let hole = match lseek(file, start, Whence::SeekHole) {
        Ok(hole) => u64::try_from(hole).map_err(|_| Errno::EIO)?,
        // The file was cut off in between.
        Err(Errno::ENXIO) => return Ok((u64::MAX, false)),
        Err(errno) => return Err(errno),
    };
    // A hole that opened here in between: call one byte data, which is never wrong.
    Ok((hole.max(offset + 1), true))
}
