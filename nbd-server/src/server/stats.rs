//! What clients have done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::proto::command;

/// Numbers of one connection or of one export. Any thread may add at any time.
#[derive(Debug, Default)]
pub struct Counters {
    operations: [AtomicU64; Self::KINDS],
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
}

/// The same at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests by command (`READ`, `WRITE`, `DISC`, `FLUSH`, `TRIM`, `CACHE`, `WRITE_ZEROES`, `BLOCK_STATUS`, `RESIZE`).
    pub operations: [u64; Counters::KINDS],
    /// Bytes read and sent.
    pub read_bytes: u64,
    /// Bytes received and written; zeros that were not sent do not count.
    pub written_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
}

impl Counters {
    /// Commands that are counted apart.
    pub const KINDS: usize = 9;

    /// Counts a request that has been answered; `bytes` are those of its payload or data.
    pub fn add(&self, kind: u16, bytes: u64, failed: bool) {
        if let Some(count) = self.operations.get(usize::from(kind)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        match kind {
            command::READ => self.read_bytes.fetch_add(bytes, Ordering::Relaxed),
            command::WRITE => self.written_bytes.fetch_add(bytes, Ordering::Relaxed),
            _ => 0,
        };
        if failed {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Requests that were answered with an error.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// The numbers now.
    pub fn counts(&self) -> Counts {
        Counts {
            operations: std::array::from_fn(|kind| self.operations[kind].load(Ordering::Relaxed)),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}

impl Counts {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            operations: std::array::from_fn(|kind| self.operations[kind] + other.operations[kind]),
            read_bytes: self.read_bytes + other.read_bytes,
            written_bytes: self.written_bytes + other.written_bytes,
            errors: self.errors + other.errors,
        }
    }

    /// All requests.
    pub fn total(&self) -> u64 {
        self.operations.iter().sum()
    }

    /// The commands that occurred: their names in small letters and how often.
    pub fn by_name(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        const NAMES: [&str; Counters::KINDS] =
            ["read", "write", "disc", "flush", "trim", "cache", "write_zeroes", "block_status", "resize"];
        NAMES.into_iter().zip(self.operations)
    }
}
