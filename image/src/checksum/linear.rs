//! One hash over all bytes: read by all threads, hashed in turns.

use block::align::AlignedBuf;
use block::num::to_usize;
use block::{Error, Result, ResultExt as _};
use parking_lot::{Condvar, Mutex};

use super::{BUFFER_ALIGNMENT, Hash as _, PIECE, feed_zeros};
use crate::convert::source::{Kind, Source};
use crate::convert::workers;
use crate::progress::Meter;

/// Zeros are hashed in runs of at most this many bytes, so that an interruption is noticed.
const ZERO_RUN: u64 = 64 << 20;

/// SHA-256 of the first `len` bytes of the source.
pub(super) fn digest(source: &Source, len: u64, threads: usize, meter: &Meter<'_>) -> Result<[u8; 32]> {
    let job = Job {
        source,
        len,
        meter,
        position: Mutex::new(0),
        state: Mutex::new(State { hash: sha2::Sha256::begin(), hashed: 0, failure: None }),
        moved: Condvar::new(),
    };
    // More readers than this only wait for the one that hashes.
    workers::run(threads.clamp(1, 4), || job.work())?;
    let state = job.state.into_inner();
    match state.failure {
        Some(error) => Err(error),
        None => Ok(state.hash.end()),
    }
}

struct State {
    hash: sha2::Sha256,
    /// Bytes that have been hashed.
    hashed: u64,
    failure: Option<Error>,
}

struct Job<'a> {
    source: &'a Source,
    len: u64,
    meter: &'a Meter<'a>,
    /// Where the next piece begins.
    position: Mutex<u64>,
    state: Mutex<State>,
    moved: Condvar,
}

/// A range that is hashed in one go.
struct Piece {
    offset: u64,
    len: u64,
    zero: bool,
}

impl Job<'_> {
    fn work(&self) {
        let mut buffer = AlignedBuf::new(PIECE, BUFFER_ALIGNMENT);
        loop {
            let done = match self.next() {
                Ok(Some(piece)) => self.hash(&piece, &mut buffer),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match done {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.fail(error),
            }
        }
    }

    fn next(&self) -> Result<Option<Piece>> {
        self.meter.check()?;
        let mut position = self.position.lock();
        let offset = *position;
        if offset >= self.len {
            return Ok(None);
        }
        let found = self.source.extent(offset, ZERO_RUN, u32::MAX);
        let found = found.context(|| format!("error while reading block status at offset {offset}"))?;
        let zero = found.kind == Kind::Zero;
        let most = if zero { ZERO_RUN } else { PIECE as u64 };
        let len = found.len.min(most).min(self.len - offset);
        *position += len;
        Ok(Some(Piece { offset, len, zero }))
    }

    /// Reads a piece, waits until all before it are hashed, and hashes it. `false`: somebody has failed.
    fn hash(&self, piece: &Piece, buffer: &mut AlignedBuf) -> Result<bool> {
        let Piece { offset, len, zero } = *piece;
        if !zero {
            let bytes = &mut buffer[..to_usize(len)];
            let read = self.source.read_at(bytes, offset);
            read.context(|| format!("error while reading at byte {offset}"))?;
        }
        let mut state = self.state.lock();
        while state.hashed < offset && state.failure.is_none() {
            self.moved.wait(&mut state);
        }
        if state.failure.is_some() {
            return Ok(false);
        }
        match zero {
            true => feed_zeros(&mut state.hash, len),
            false => state.hash.feed(&buffer[..to_usize(len)]),
        }
        state.hashed += len;
        drop(state);
        self.moved.notify_all();
        self.meter.add(len);
        Ok(true)
    }

    fn fail(&self, error: Error) {
        self.state.lock().failure.get_or_insert(error);
        self.moved.notify_all();
    }
}
