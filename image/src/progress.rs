//! How long operations tell their caller where they are, and how the caller stops them.
//!
//! The library counts, the tool draws: nothing here knows of a terminal. Calls come from whichever worker
//! thread has just finished a piece, so they must be quick and may come from several threads at once.

use std::sync::atomic::{AtomicU64, Ordering};

use block::{Error, ErrorKind, Result};

/// Listens to an operation, and may end it.
pub trait Progress: Sync {
    /// `done` of `total` bytes have been dealt with. `done` never exceeds `total`; late calls of one thread may
    /// report less than earlier ones of another.
    fn update(&self, done: u64, total: u64);

    /// Whether the operation should stop: it then ends with [`ErrorKind::Cancelled`] soon.
    fn cancelled(&self) -> bool {
        false
    }

    /// Whether `update` will be shown while the operation runs. Where it is, the operation first finds out how
    /// much there is to move, so that a mostly empty disk does not leap from nothing to done.
    fn wants_estimate(&self) -> bool {
        false
    }

    /// Every file is open that will be; the threads are about to be started.
    fn starting(&self) {}

    /// Something that the user should know now, without ending the operation.
    fn warn(&self, message: &str) {
        let _ = message;
    }
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn update(&self, _done: u64, _total: u64) {}
}

/// The error of an operation that was stopped by [`Progress::cancelled`].
pub(crate) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "interrupted")
}

/// Counts for several threads and passes the sum on.
pub(crate) struct Meter<'a> {
    progress: &'a dyn Progress,
    done: AtomicU64,
    total: u64,
}

impl<'a> Meter<'a> {
    /// Counts up to `total` bytes.
    pub(crate) fn new(progress: &'a dyn Progress, total: u64) -> Self {
        progress.update(0, total);
        Self { progress, done: AtomicU64::new(0), total }
    }

    /// `bytes` more are done.
    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        self.progress.update(done.min(self.total), self.total);
    }

    /// Everything is done.
    pub(crate) fn finish(&self) {
        self.progress.update(self.total, self.total);
    }

    /// Fails if the caller wants to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if self.progress.cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Who listens.
    pub(crate) fn listener(&self) -> &'a dyn Progress {
        self.progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    struct Recorder(Mutex<Vec<(u64, u64)>>);

    impl Progress for Recorder {
        fn update(&self, done: u64, total: u64) {
            self.0.lock().push((done, total));
        }
    }

    #[test]
    fn a_meter_never_exceeds_its_total() {
        let recorder = Recorder(Mutex::new(vec![]));
        let meter = Meter::new(&recorder, 10);
        meter.add(4);
        meter.add(60);
        meter.finish();
        assert_eq!(*recorder.0.lock(), [(0, 10), (4, 10), (10, 10), (10, 10)]);
    }
}
