//! A simple benchmark: many requests of one size, so many of them under way at once.
//!
//! qemu-img keeps `depth` requests in flight from one thread; here each of them has a thread, which is what the
//! engines of vimg do. The order of requests is the same: each starts `step` bytes after the one before, and
//! begins again at the front of the disk past its end.
//!
//! Memory: one buffer for each thread, 1 GiB together at most (but at least one).

use std::sync::Arc;

use block::align::AlignedBuf;
use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result};
use parking_lot::{Condvar, Mutex};

use crate::convert::workers;

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// Number of requests.
    pub count: u64,
    /// How many of them are under way at once.
    pub depth: u64,
    /// Where the first starts, in bytes.
    pub offset: u64,
    /// Bytes of each.
    pub size: u64,
    /// Bytes from the start of one to the start of the next.
    pub step: u64,
    /// They write this byte; `None`: they read.
    pub write: Option<u8>,
    /// A flush comes after so many requests; 0: none does.
    pub flush_interval: u64,
    /// A flush waits until the requests before it are done, and those after it wait for the flush.
    pub drain: bool,
}

/// No more threads than this, whatever the depth.
const MAX_THREADS: u64 = 1024;
/// Bytes that all buffers take together, where there is more than one.
const MAX_MEMORY: u64 = 1 << 30;
const BUFFER_ALIGNMENT: usize = 4096;

/// Sends the requests to a disk.
///
/// # Errors
/// `Failed request: ...` for the first request that failed, one that reaches past the end of the disk included;
/// or a flush failed.
pub fn bench(device: &Arc<dyn BlockDevice>, options: &BenchOptions) -> Result<()> {
    let job = Job {
        device,
        options,
        state: Mutex::new(State { sent: 0, flushed: 0, in_flight: 0, flushing: false, failure: None }),
        changed: Condvar::new(),
    };
    let affordable = (MAX_MEMORY / options.size.max(1)).clamp(1, MAX_THREADS);
    let threads = options.depth.min(options.count).clamp(1, affordable);
    workers::run(usize::try_from(threads).unwrap_or(1), || job.work())?;
    match job.state.into_inner().failure {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[derive(Debug)]
struct State {
    /// Requests that have been given out.
    sent: u64,
    /// How many of them the flushes so far came after.
    flushed: u64,
    in_flight: u64,
    /// A flush that nobody may pass is under way.
    flushing: bool,
    failure: Option<Error>,
}

/// What a thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Request(u64),
    Flush,
    End,
}

struct Job<'a> {
    device: &'a Arc<dyn BlockDevice>,
    options: &'a BenchOptions,
    state: Mutex<State>,
    changed: Condvar,
}

impl Job<'_> {
    fn work(&self) {
        let mut buffer = None;
        loop {
            let done = match self.next() {
                Step::End => return,
                Step::Flush => self.device.flush().map_err(|error| error.context("Failed request")),
                Step::Request(offset) => self.request(offset, &mut buffer),
            };
            self.done(done);
        }
    }

    /// What comes next; waits for what it has to wait for.
    fn next(&self) -> Step {
        let mut state = self.state.lock();
        loop {
            let interval = self.options.flush_interval;
            let due = interval > 0 && state.sent > state.flushed && state.sent.is_multiple_of(interval);
            if state.failure.is_some() || (state.sent == self.options.count && !due) {
                return Step::End;
            }
            if !due && !state.flushing {
                let offset = self.offset(state.sent);
                state.sent += 1;
                state.in_flight += 1;
                return Step::Request(offset);
            }
            if due && (!self.options.drain || state.in_flight == 0) {
                state.flushed = state.sent;
                state.flushing = self.options.drain;
                state.in_flight += 1;
                return Step::Flush;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Where request number `index` starts.
    fn offset(&self, index: u64) -> u64 {
        let BenchOptions { offset, step, .. } = *self.options;
        match (index, self.device.size()) {
            (0, _) | (_, 0) => offset,
            (index, size) => {
                let far = u128::from(offset) + u128::from(index) * u128::from(step);
                u64::try_from(far % u128::from(size)).unwrap_or_default()
            }
        }
    }

    fn request(&self, offset: u64, buffer: &mut Option<AlignedBuf>) -> Result<()> {
        let BenchOptions { size, write, .. } = *self.options;
        let failed = |error: Error| Error::new(error.kind(), format!("Failed request: {error}"));
        if offset.checked_add(size).is_none_or(|end| end > self.device.size()) {
            return Err(failed(Error::new(ErrorKind::OutOfRange, "Input/output error")));
        }
        let buffer = buffer.get_or_insert_with(|| {
            let mut buffer = AlignedBuf::new(to_usize(size), BUFFER_ALIGNMENT);
            buffer.fill(write.unwrap_or_default());
            buffer
        });
        match write {
            Some(_) => self.device.write_at(buffer, offset),
            None => self.device.read_at(buffer, offset),
        }
        .map_err(failed)
    }

    fn done(&self, result: Result<()>) {
        let mut state = self.state.lock();
        state.in_flight -= 1;
        // Only a flush has it set, and while it has nothing else is in flight.
        state.flushing = false;
        if let Err(error) = result {
            state.failure.get_or_insert(error);
        }
        if self.options.flush_interval > 0 || state.failure.is_some() {
            drop(state);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::testing::Fake;

    fn options() -> BenchOptions {
        BenchOptions {
            count: 100,
            depth: 4,
            offset: 0,
            size: 4096,
            step: 4096,
            write: Some(7),
            flush_interval: 0,
            drain: true,
        }
    }

    #[test]
    fn requests_start_again_at_the_front() {
        let device: Arc<dyn BlockDevice> = Fake::with(vec![0; 64 << 10]);
        let options = BenchOptions { count: 5, offset: 60 << 10, step: 8 << 10, ..options() };
        bench(&device, &options).unwrap();
        let mut bytes = vec![0; 64 << 10];
        device.read_at(&mut bytes, 0).unwrap();
        let written: Vec<usize> = (0..16).filter(|page| bytes[page * 4096] == 7).collect();
        assert_eq!(written, [1, 3, 5, 7, 15]);
    }

    #[test]
    fn every_interval_is_flushed_once_whatever_the_threads_do() {
        for (drain, count) in [(true, 100), (false, 100), (true, 103), (true, 8)] {
            let device: Arc<dyn BlockDevice> = Fake::with(vec![0; 1 << 20]);
            bench(&device, &BenchOptions { flush_interval: 8, drain, count, ..options() }).unwrap();
        }
    }

    #[test]
    fn past_the_end_there_is_nothing() {
        let device: Arc<dyn BlockDevice> = Fake::with(vec![0; 64 << 10]);
        for (offset, size) in [(64 << 10, 1), (0, 128 << 10), (u64::MAX, 4096)] {
            let error = bench(&device, &BenchOptions { offset, size, ..options() }).unwrap_err();
            assert_eq!(error.to_string(), "Failed request: Input/output error");
        }
    }
}
