//! Carrying requests out.

use std::io;
use std::time::Instant;

use block::extent::Walker;
use block::{Error, ErrorKind, Preallocation, ResultExt as _, Stored, ZeroMode};

use super::super::export::DetectZeroes;
use super::super::pool::{BUFFER_BYTES, Buffer};
use super::super::reply::Replies;
use super::super::request::{Action, Range, Refusal, status_payload};
use super::super::status;
use super::{BATCH_BYTES, Batch, Connection, SMALL, splice};
use crate::proto::{Errno, HeaderStyle, Request, command};

/// From this length on a read looks where the disk has holes and does not send them.
const SPARSE: u64 = 32 << 10;

/// How a read ended, and where it failed if that is known.
type Read = Result<(), (Refusal, Option<u64>)>;

/// A request that has been received with all that belongs to it.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) request: Request,
    pub(super) action: Result<Action, Refusal>,
    pub(super) payload: Payload<'a>,
}

#[derive(Debug)]
pub(super) enum Payload<'a> {
    None,
    Bytes(Vec<u8>),
    Buffers(Vec<Buffer<'a>>),
    /// It has been written already.
    Written(Result<(), Refusal>),
}

/// How much work a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    /// None at all.
    Nothing,
    /// As fast as the disk's cache.
    Small,
    /// The same, but so many bytes that another thread is worth waking for what follows.
    Large,
    /// It waits for the disk.
    Slow,
}

impl Job<'_> {
    pub(super) fn weight(&self) -> Weight {
        match (&self.action, &self.payload) {
            (Err(_), _) | (_, Payload::Written(_)) => Weight::Nothing,
            (Ok(Action::Read { range, .. } | Action::Write { range, fua: false }), _) => {
                if range.len <= SMALL { Weight::Small } else { Weight::Large }
            }
            (Ok(Action::Status { .. } | Action::StatusOf { .. }), _) => Weight::Large,
            _ => Weight::Slow,
        }
    }
}

impl Connection<'_> {
    /// Carries out a job. Replies are added to `batch` or, if they are large, sent; an error is the connection's.
    pub(super) fn run(&self, job: Job<'_>, batch: &mut Batch) -> io::Result<()> {
        let Job { request, action, payload } = job;
        let action = match action {
            Ok(action) => action,
            Err(refusal) => {
                self.finish(&request, Err(refusal), 0, batch);
                return Ok(());
            }
        };
        match action {
            Action::Read { range, .. } if range.len <= SMALL => self.read_small(&request, range, batch),
            Action::Read { range, one_chunk } => {
                // Threads that only send are not worth a batch.
                self.send_batch(batch)?;
                return self.read_large(&request, range, one_chunk);
            }
            Action::Status { range, one } => self.status(&request, range, one, None, batch),
            Action::StatusOf { offset, one } => {
                let Payload::Bytes(payload) = payload else { return Ok(()) };
                let known = |id| self.contexts.iter().any(|(known, _)| *known == id);
                match status_payload(&payload, offset, &self.facts(), known) {
                    Ok((range, ids)) => self.status(&request, range, one, Some(&ids), batch),
                    Err(refusal) => self.finish(&request, Err(refusal), 0, batch),
                }
            }
            action => {
                let done = self.change(action, payload);
                let bytes = if request.command == command::WRITE { request.length } else { 0 };
                self.finish(&request, done, bytes, batch);
            }
        }
        Ok(())
    }

    /// Whatever has no data to answer with.
    fn change(&self, action: Action, payload: Payload<'_>) -> Result<(), Refusal> {
        let device = &*self.export.device;
        match action {
            Action::Write { range, fua } => {
                match payload {
                    Payload::Written(written) => return written,
                    Payload::Buffers(buffers) => {
                        let begun = Instant::now();
                        let whole = block::num::to_usize(range.len);
                        let pieces = buffers.iter().enumerate().map(|(index, buffer)| {
                            &buffer[..(whole - index * BUFFER_BYTES).min(BUFFER_BYTES)]
                        });
                        self.write_pieces(range.offset, pieces)?;
                        self.took(begun, range.len);
                    }
                    Payload::None | Payload::Bytes(_) => {}
                }
                self.durable(fua)
            }
            Action::Flush => device.flush().map_err(|error| refusal(&error)),
            Action::Trim { range, fua } => {
                if self.export.options.discard && range.len > 0 {
                    device.discard_at(range.offset, range.len).map_err(|error| refusal(&error))?;
                }
                self.durable(fua)
            }
            Action::Cache { range } => self.cache(range),
            Action::Zero { range, mode, fua } => {
                if range.len > 0 {
                    self.zero(range, mode)?;
                }
                self.durable(fua)
            }
            Action::Resize { size } => device
                .resize(size, Preallocation::Off)
                .context(|| "cannot resize".to_owned())
                .map_err(|error| refusal(&error)),
            Action::Read { .. } | Action::Status { .. } | Action::StatusOf { .. } | Action::Disconnect => {
                Ok(())
            }
        }
    }

    /// Writes pieces one behind the other.
    pub(super) fn write_pieces<'p>(
        &self,
        mut offset: u64,
        pieces: impl Iterator<Item = &'p [u8]>,
    ) -> Result<(), Refusal> {
        for piece in pieces.filter(|piece| !piece.is_empty()) {
            self.write_piece(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn write_piece(&self, offset: u64, piece: &[u8]) -> Result<(), Refusal> {
        let device = &*self.export.device;
        let detect = self.export.options.detect_zeroes;
        let written = if detect != DetectZeroes::Off && block::zero::is_zero(piece) {
            let may_unmap = detect == DetectZeroes::Unmap;
            device.write_zeroes_at(offset, piece.len() as u64, ZeroMode { may_unmap, no_fallback: false })
        } else {
            device.write_at(piece, offset)
        };
        written.map_err(|error| refusal_of_write(&error))
    }

    /// Makes what was written durable if the client, or the export, wants every write so.
    pub(super) fn durable(&self, fua: bool) -> Result<(), Refusal> {
        if fua || self.export.options.write_through {
            self.export.device.flush().map_err(|error| refusal(&error))?;
        }
        Ok(())
    }

    /// Zeros. Space may be given back where the client allows it; a disk that cannot do it fast fails where the client
    /// would rather write them itself.
    fn zero(&self, range: Range, mode: ZeroMode) -> Result<(), Refusal> {
        let done = self.export.device.write_zeroes_at(range.offset, range.len, mode);
        done.map_err(|error| refusal_of_write(&error))
    }

    /// Reads and forgets, so that what lies below has it in its cache. It is a hint: of a long range only the start is
    /// read, and nothing once the client has left, so that nobody can leave work behind that takes for ever.
    fn cache(&self, range: Range) -> Result<(), Refusal> {
        let len = range.len.min(u64::from(self.shared.max_payload()));
        let mut own = vec![0; 64 << 10];
        let mut pooled = self.part.take();
        let piece = pooled.as_deref_mut().unwrap_or(&mut own);
        let mut at = 0;
        while at < len && !self.crew.lock().ended {
            let now = block::num::to_usize((len - at).min(piece.len() as u64));
            let read = self.export.device.read_at(&mut piece[..now], range.offset + at);
            read.map_err(|error| refusal(&error))?;
            at += now as u64;
        }
        Ok(())
    }

    /// A read whose data go into the batch, without a copy on the way.
    fn read_small(&self, request: &Request, range: Range, batch: &mut Batch) {
        let replies = Replies::to(request, self.style);
        if range.len == 0 {
            return self.finish(request, Ok(()), 0, batch);
        }
        let begun = Instant::now();
        let (len, start) = (block::num::to_usize(range.len), batch.bytes.len());
        if range.len >= SPARSE && self.style != HeaderStyle::Simple && self.is_hole(range) {
            replies.hole(range.offset, u32::try_from(range.len).unwrap_or(0), true, &mut batch.bytes);
            batch.replies += 1;
            self.count(request, range.len, None);
            return;
        }
        replies.data(range.offset, len, true, &mut batch.bytes);
        let data = batch.bytes.len();
        batch.bytes.resize(data + len, 0);
        let read = self.export.device.read_at(&mut batch.bytes[data..], range.offset);
        self.took(begun, range.len);
        match read {
            Ok(()) => {
                batch.replies += 1;
                self.count(request, range.len, None);
            }
            Err(error) => {
                batch.bytes.truncate(start);
                self.finish(request, Err(refusal(&error)), 0, batch);
            }
        }
    }

    /// Whether the whole range is known to be zeros. (What it costs to ask wrongly is a read of zeros.)
    fn is_hole(&self, range: Range) -> bool {
        let extent = block::extent::extent(&*self.export.device, range.offset, range.len);
        extent.is_ok_and(|extent| extent.zero && extent.len >= range.len)
    }

    /// A read that is sent in pieces.
    fn read_large(&self, request: &Request, range: Range, one_chunk: bool) -> io::Result<()> {
        if self.read_in_place(request, range)? {
            self.count(request, range.len, None);
            return Ok(());
        }
        let mut own = vec![];
        let mut pooled = self.part.take();
        let piece = match pooled.as_deref_mut() {
            Some(piece) => piece,
            None => {
                own.resize(block::num::to_usize(SMALL), 0);
                &mut own
            }
        };
        let sent = if one_chunk {
            self.read_in_one_chunk(request, range, piece)
        } else {
            self.read_in_chunks(request, range, piece)
        };
        match sent? {
            Ok(()) => self.count(request, range.len, None),
            Err((refusal, place)) => {
                self.count(request, 0, Some(&refusal));
                let mut out = vec![];
                Replies::to(request, self.style).error(&refusal, place, &mut out);
                self.send(&[&out])?;
            }
        }
        Ok(())
    }

    /// A read of bytes that lie in one piece in a file; `false` if they do not.
    fn read_in_place(&self, request: &Request, range: Range) -> io::Result<bool> {
        if range.len > splice::MOST || self.channel.is_tls() {
            return Ok(false);
        }
        match block::extent::extent(&*self.export.device, range.offset, range.len) {
            Ok(extent) if extent.len >= range.len => {
                let replies = Replies::to(request, self.style);
                self.send_in_place(&replies, &extent, (range.offset, range.len), true)
            }
            _ => Ok(false),
        }
    }

    fn send(&self, parts: &[&[u8]]) -> io::Result<()> {
        let _turn = self.output.lock();
        self.channel.send(parts)
    }

    /// A chunk for each piece of data, none for the bytes of holes. A failure in the middle is told by a last chunk; what
    /// was sent before stands.
    fn read_in_chunks(&self, request: &Request, range: Range, piece: &mut [u8]) -> io::Result<Read> {
        let replies = Replies::to(request, self.style);
        let device = &*self.export.device;
        let mut walker = Walker::new(device, u32::MAX);
        let (mut offset, end) = (range.offset, range.offset + range.len);
        let mut header = Vec::with_capacity(64);
        while offset < end {
            let left = end - offset;
            let extent = match walker.extent(offset, left) {
                Ok(extent) => extent,
                Err(error) => return Ok(Err((refusal(&error), Some(offset)))),
            };
            header.clear();
            if extent.zero || extent.stored == Stored::Absent {
                let len = extent.len.min(1 << 30);
                let hole = u32::try_from(len).unwrap_or(0);
                replies.hole(offset, hole, len == left, &mut header);
                self.send(&[&header])?;
                offset += len;
                continue;
            }
            let in_place = extent.len.min(splice::MOST);
            if self.send_in_place(&replies, &extent, (offset, in_place), in_place == left)? {
                offset += in_place;
                continue;
            }
            // Small holes are not worth a chunk: a piece goes over them, up to a hole that is.
            let len = self.data_run(&mut walker, offset, left.min(piece.len() as u64), extent.len);
            let now = block::num::to_usize(len);
            if let Err(error) = self.timed_read(&mut piece[..now], offset) {
                return Ok(Err((refusal(&error), Some(offset))));
            }
            replies.data(offset, now, len == left, &mut header);
            self.send(&[&header, &piece[..now]])?;
            offset += len;
        }
        Ok(Ok(()))
    }

    /// How many of at most `max` bytes from `offset` on go into one chunk of data, of which the first `known` are data.
    fn data_run(&self, walker: &mut Walker<'_>, offset: u64, max: u64, known: u64) -> u64 {
        let mut len = known.min(max);
        while len < max {
            match walker.extent(offset + len, max - len) {
                Ok(extent) if !extent.zero || extent.len < SPARSE.min(max - len) => len += extent.len,
                // The hole (or the damage) is for the next turn.
                _ => break,
            }
        }
        len.min(max)
    }

    /// One header for all the data: nothing may fail once it has been sent. What does not fit into memory is therefore
    /// read once to see that it can be, and again to be sent.
    fn read_in_one_chunk(&self, request: &Request, range: Range, piece: &mut [u8]) -> io::Result<Read> {
        let replies = Replies::to(request, self.style);
        let mut header = vec![];
        let len = block::num::to_usize(range.len);
        replies.data(range.offset, len, true, &mut header);
        if let Some(mut buffers) = self.part.take_for(len) {
            let mut at = 0;
            for buffer in &mut buffers {
                let now = (len - at).min(BUFFER_BYTES);
                if let Err(error) = self.timed_read(&mut buffer[..now], range.offset + at as u64) {
                    return Ok(Err((refusal(&error), None)));
                }
                at += now;
            }
            let mut parts: Vec<&[u8]> = vec![&header];
            parts.extend(
                buffers
                    .iter()
                    .enumerate()
                    .map(|(index, buffer)| &buffer[..(len - index * BUFFER_BYTES).min(BUFFER_BYTES)]),
            );
            self.send(&parts)?;
            return Ok(Ok(()));
        }
        let first = self.each_piece(range, piece, &mut |_| Ok(()))?;
        if first.is_err() {
            return Ok(first);
        }
        let _turn = self.output.lock();
        self.channel.send_more(&[&header])?;
        match self.each_piece(range, piece, &mut |data| self.channel.send(&[data]))? {
            Ok(()) => Ok(Ok(())),
            Err((refusal, _)) => Err(io::Error::other(format!("a read failed half-way: {}", refusal.text))),
        }
    }

    /// Reads, and remembers how long that took: the disk's time, not the time that the client takes to receive.
    fn timed_read(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        let begun = Instant::now();
        let read = self.export.device.read_at(buf, offset);
        self.took(begun, buf.len() as u64);
        read
    }

    /// Reads a range piece by piece.
    fn each_piece(
        &self,
        range: Range,
        piece: &mut [u8],
        each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Read> {
        let mut at = 0;
        while at < range.len {
            let now = block::num::to_usize((range.len - at).min(piece.len() as u64));
            if let Err(error) = self.timed_read(&mut piece[..now], range.offset + at) {
                return Ok(Err((refusal(&error), None)));
            }
            each(&piece[..now])?;
            at += now as u64;
        }
        Ok(Ok(()))
    }

    /// Answers `BLOCK_STATUS` for all chosen contexts, or for these.
    fn status(&self, request: &Request, range: Range, one: bool, ids: Option<&[u32]>, batch: &mut Batch) {
        // Compact replies have 32-bit lengths; cut below that where every block size goes.
        let max_run = if self.style == HeaderStyle::Extended { u64::MAX } else { 0xffff_0000 };
        let chosen = self.contexts.iter().filter(|(id, _)| ids.is_none_or(|ids| ids.contains(id)));
        let mut answers = vec![];
        for &(id, context) in chosen {
            match status::runs(&self.export, context, range, one, max_run) {
                Ok(runs) => answers.push((id, runs)),
                Err(error) => return self.finish(request, Err(refusal(&error)), 0, batch),
            }
        }
        let replies = Replies::to(request, self.style);
        self.count(request, 0, None);
        let last = answers.len().saturating_sub(1);
        for (index, (id, runs)) in answers.iter().enumerate() {
            replies.status(*id, runs, index == last, &mut batch.bytes);
        }
        debug_assert!(batch.bytes.len() < BATCH_BYTES * 64, "answers are bounded");
    }
}

/// The error of a disk on the wire.
fn refusal(error: &Error) -> Refusal {
    Refusal::new(Errno::from_kind(error.kind()), error.to_string())
}

/// The same for a write: past the end there is no space (a shrink may have come in between).
fn refusal_of_write(error: &Error) -> Refusal {
    let errno = match error.kind() {
        ErrorKind::OutOfRange => Errno::ENOSPC,
        kind => Errno::from_kind(kind),
    };
    Refusal::new(errno, error.to_string())
}
