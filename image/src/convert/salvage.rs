//! Reading what can still be read of a damaged source, and keeping the account of what cannot.

use std::fmt;

use block::num::to_usize;
use block::{Error, ErrorKind};
use parking_lot::Mutex;

use super::source::{SECTOR, Source};
use crate::progress::Progress;

/// How many lost ranges are remembered one by one.
const MAX_RANGES: usize = 10_000;
/// How many losses are reported while the convert runs.
const MAX_WARNINGS: u64 = 20;

/// A range of the source that could not be read; the target holds zeros there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Why (for the first part of it, where several neighbours were lost in the same way).
    pub reason: String,
    /// The kind of error.
    pub kind: ErrorKind,
}

/// Everything that could not be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// The ranges in order, neighbours lost in the same way merged.
    pub ranges: Vec<Lost>,
    /// Bytes lost in all, those of ranges that were too many to be listed included.
    pub bytes: u64,
    /// Whether there were more ranges than are listed.
    pub truncated: bool,
}

impl Losses {
    /// Whether nothing was lost.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn add(&mut self, lost: Lost) {
        self.bytes += lost.len;
        let room = self.ranges.len() < MAX_RANGES;
        match self.ranges.last_mut() {
            Some(last) if last.offset + last.len == lost.offset && last.kind == lost.kind => {
                last.len += lost.len;
            }
            _ if room => self.ranges.push(lost),
            _ => self.truncated = true,
        }
    }

    /// Sorts and merges what several threads have added.
    fn settle(&mut self) {
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.sort_by_key(|lost| lost.offset);
        let bytes = std::mem::take(&mut self.bytes);
        for lost in ranges {
            self.add(lost);
        }
        self.bytes = bytes;
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {} could not be read: {}", self.len, self.offset, self.reason)
    }
}

/// Reads for workers, putting zeros where nothing can be read.
pub(super) struct Salvage<'a> {
    progress: &'a dyn Progress,
    /// Sizes of the pieces that are tried one after the other: what the source reads well in one go, a page,
    /// a sector.
    steps: Vec<u64>,
    losses: Mutex<(Losses, u64)>,
}

impl<'a> Salvage<'a> {
    pub(super) fn new(source: &Source, progress: &'a dyn Progress) -> Self {
        let cluster = source.preferred();
        let steps = [cluster, 4096, SECTOR].into_iter().filter(|&step| step <= cluster).collect();
        Self { progress, steps, losses: Mutex::default() }
    }

    /// What has been lost.
    pub(super) fn into_losses(self) -> Losses {
        let (mut losses, _) = self.losses.into_inner();
        losses.settle();
        losses
    }

    /// Fills `buf` from `offset` as far as possible, in ever smaller pieces.
    pub(super) fn read(&self, source: &Source, buf: &mut [u8], offset: u64) {
        self.read_pieces(source, buf, offset, &self.steps);
    }

    fn read_pieces(&self, source: &Source, mut buf: &mut [u8], mut offset: u64, steps: &[u64]) {
        let Err(error) = source.read_at(buf, offset) else { return };
        let Some((&step, finer)) =
            steps.split_first().filter(|_| self.worth_retrying(source, &error, offset, steps))
        else {
            buf.fill(0);
            return self.lost(offset, buf.len() as u64, &error);
        };
        while !buf.is_empty() {
            let len = (step - offset % step).min(buf.len() as u64);
            let (piece, rest) = buf.split_at_mut(to_usize(len));
            self.read_pieces(source, piece, offset, finer);
            (buf, offset) = (rest, offset + len);
        }
    }

    fn lost(&self, offset: u64, len: u64, error: &Error) {
        let mut losses = self.losses.lock();
        losses.1 += 1;
        match losses.1 {
            ..=MAX_WARNINGS => self.progress.warn(&format!("error while reading offset {offset}: {error}")),
            n if n == MAX_WARNINGS + 1 => {
                self.progress.warn("more of the source cannot be read; see the summary at the end");
            }
            _ => {}
        }
        losses.0.add(Lost { offset, len, reason: error.to_string(), kind: error.kind() });
    }

    /// Whether smaller pieces may succeed where a larger one failed. A fault of the host may concern a single
    /// sector. Where the file ends early, the first sector tells whether anything is left. An image that
    /// contradicts itself does so for a whole cluster, and looking closer is of no use.
    fn worth_retrying(&self, source: &Source, error: &Error, offset: u64, steps_left: &[u64]) -> bool {
        let first_try = steps_left.len() == self.steps.len();
        match error.kind() {
            _ if first_try => true,
            ErrorKind::Io => true,
            ErrorKind::Truncated => source.read_at(&mut [0; 512], offset).is_ok(),
            _ => false,
        }
    }
}
