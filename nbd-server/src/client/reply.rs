//! One reply as it comes together from its chunks, each of them held against the rules (sections "Structured reply
//! chunk message" and "Structured reply types").

use std::collections::BTreeMap;

use block::codec::Reader;
use block::num::to_usize;

use crate::channel::Channel;
use crate::proto::{Errno, HeaderStyle, MAX_STRING, ReplyHeader, chunk, command};

use super::failure::{Failure, Outcome, printable};
use super::inbox::Inbox;

/// Pieces that lie apart in the answer to one read; a server that scatters more is up to no good.
const MAX_PIECES: usize = 1 << 16;
/// Errors in one reply.
const MAX_ERRORS: u32 = 64;
/// The longest payload of an error chunk of an unknown kind.
const MAX_ERROR: u64 = 64 << 10;
/// Extents of a status that are kept; more are asked for again when they are wanted.
const MAX_EXTENTS: usize = 1 << 16;
/// Extents in one chunk (the document's advice to servers is not to send more).
const MAX_SENT_EXTENTS: u64 = 1 << 20;

/// What a request asked for, as far as its reply depends on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) command: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// An extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status {
    /// In bytes, at least 1.
    pub(super) len: u64,
    pub(super) flags: u64,
}

/// What a request brought, besides the data of a read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// For each context that answered: its id and its extents.
    pub(super) statuses: Vec<(u32, Vec<Status>)>,
}

/// A reply under construction.
#[derive(Debug)]
pub(super) struct Reply {
    asked: Asked,
    style: HeaderStyle,
    pieces: Pieces,
    error: Option<Failure>,
    errors: u32,
    answer: Answer,
}

impl Reply {
    pub(super) fn new(asked: Asked, style: HeaderStyle) -> Self {
        Self { asked, style, pieces: Pieces::default(), error: None, errors: 0, answer: Answer::default() }
    }

    /// Takes in what follows `header`, data into `buf` (of the length that was asked for; empty for other requests).
    /// Whether the reply is complete.
    ///
    /// # Errors
    /// The connection, or the server's nonsense; in either case the connection is of no use any more.
    pub(super) fn accept(
        &mut self,
        header: &ReplyHeader,
        inbox: &mut Inbox,
        channel: &Channel,
        buf: &mut [u8],
    ) -> Outcome<bool> {
        match *header {
            ReplyHeader::Simple { error, .. } => self.simple(error, inbox, channel, buf).map(|()| true),
            ReplyHeader::Chunk { flags, kind, offset, length, .. } => {
                if self.style == HeaderStyle::Extended && offset != self.asked.offset {
                    return Err(self.wrong(&format!("a chunk for the offset {offset:#x}")));
                }
                if flags & !chunk::FLAG_DONE != 0 {
                    return Err(self.wrong(&format!("a chunk with the unknown flags {flags:#x}")));
                }
                let done = flags & chunk::FLAG_DONE != 0;
                self.chunk(kind, length, done, inbox, channel, buf)?;
                if done {
                    self.check_complete()?;
                }
                Ok(done)
            }
        }
    }

    /// What the complete reply says.
    pub(super) fn finish(self) -> Outcome<Answer> {
        self.error.map_or(Ok(self.answer), Err)
    }

    fn simple(&mut self, error: Errno, inbox: &mut Inbox, channel: &Channel, buf: &mut [u8]) -> Outcome<()> {
        let structured = self.style != HeaderStyle::Simple;
        if structured && matches!(self.asked.command, command::READ | command::BLOCK_STATUS) {
            return Err(self.wrong("a simple reply where a structured one was agreed on"));
        }
        if error != Errno::OK {
            self.fail(error, String::new(), None);
        } else if self.asked.command == command::READ {
            inbox.exact(channel, buf)?;
        }
        Ok(())
    }

    fn chunk(
        &mut self,
        kind: u16,
        length: u64,
        done: bool,
        inbox: &mut Inbox,
        channel: &Channel,
        buf: &mut [u8],
    ) -> Outcome<()> {
        match kind {
            chunk::NONE if done && length == 0 => Ok(()),
            chunk::OFFSET_DATA => self.data(length, inbox, channel, buf),
            chunk::OFFSET_HOLE => self.hole(length, inbox, channel, buf),
            chunk::BLOCK_STATUS if self.style == HeaderStyle::Structured => {
                self.status(length, false, inbox, channel)
            }
            chunk::BLOCK_STATUS_EXT if self.style == HeaderStyle::Extended => {
                self.status(length, true, inbox, channel)
            }
            kind if kind & chunk::ERROR_BIT != 0 => self.error_chunk(kind, length, inbox, channel),
            _ => Err(self.wrong(&format!("a chunk of type {kind:#x} with {length} bytes"))),
        }
    }

    /// `NBD_REPLY_TYPE_OFFSET_DATA`.
    fn data(&mut self, length: u64, inbox: &mut Inbox, channel: &Channel, buf: &mut [u8]) -> Outcome<()> {
        let bytes = length.checked_sub(8).filter(|bytes| *bytes > 0);
        let Some(bytes) = bytes else { return Err(self.wrong(&format!("a data chunk of {length} bytes"))) };
        let mut offset = [0; 8];
        inbox.exact(channel, &mut offset)?;
        let range = self.piece(u64::from_be_bytes(offset), bytes)?;
        match buf.get_mut(range) {
            Some(place) => Ok(inbox.exact(channel, place)?),
            None => Err(self.wrong("data that nobody has asked for")),
        }
    }

    /// `NBD_REPLY_TYPE_OFFSET_HOLE`.
    fn hole(&mut self, length: u64, inbox: &mut Inbox, channel: &Channel, buf: &mut [u8]) -> Outcome<()> {
        if length != 12 {
            return Err(self.wrong(&format!("a hole chunk of {length} bytes")));
        }
        let mut record = [0; 12];
        inbox.exact(channel, &mut record)?;
        let mut reader = Reader::new(&record);
        let (offset, len) = (reader.be_u64().unwrap_or(0), reader.be_u32().unwrap_or(0));
        let range = self.piece(offset, len.into())?;
        match buf.get_mut(range) {
            Some(place) => {
                place.fill(0);
                Ok(())
            }
            None => Err(self.wrong("a hole that nobody has asked for")),
        }
    }

    /// Where in the buffer a piece of the answer to a read belongs.
    fn piece(&mut self, offset: u64, len: u64) -> Outcome<std::ops::Range<usize>> {
        let what = |asked: &Asked| format!("{len} bytes at {offset:#x} in the answer to {}", describe(asked));
        if self.asked.command != command::READ {
            return Err(Failure::nonsense(what(&self.asked)));
        }
        let start = offset.checked_sub(self.asked.offset);
        let inside = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= self.asked.length));
        let start = inside.filter(|_| len > 0).ok_or_else(|| Failure::nonsense(what(&self.asked)))?;
        if !self.pieces.add(start, start + len) {
            return Err(Failure::nonsense(format!("{}, which overlap what came before", what(&self.asked))));
        }
        Ok(to_usize(start)..to_usize(start + len))
    }

    /// `NBD_REPLY_TYPE_ERROR`, `NBD_REPLY_TYPE_ERROR_OFFSET`, and kinds of errors that are yet to be invented.
    fn error_chunk(&mut self, kind: u16, length: u64, inbox: &mut Inbox, channel: &Channel) -> Outcome<()> {
        self.errors += 1;
        if !(6..=MAX_ERROR).contains(&length) || self.errors > MAX_ERRORS {
            return Err(self.wrong(&format!("an error chunk of {length} bytes")));
        }
        let mut payload = vec![0; to_usize(length)];
        inbox.exact(channel, &mut payload)?;
        let mut reader = Reader::new(&payload);
        let errno = Errno(reader.be_u32().unwrap_or(0));
        let message = reader.be_u16().and_then(|len| reader.take(len.into()));
        let Some(message) = message.filter(|message| message.len() <= MAX_STRING && errno != Errno::OK)
        else {
            return Err(self.wrong("a malformed error chunk"));
        };
        let at = match kind {
            chunk::ERROR if reader.remaining() == 0 => None,
            chunk::ERROR_OFFSET if reader.remaining() == 8 => reader.be_u64(),
            chunk::ERROR | chunk::ERROR_OFFSET => return Err(self.wrong("a malformed error chunk")),
            _ => None,
        };
        self.fail(errno, printable(message), at);
        Ok(())
    }

    /// `NBD_REPLY_TYPE_BLOCK_STATUS` and `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
    fn status(&mut self, length: u64, extended: bool, inbox: &mut Inbox, channel: &Channel) -> Outcome<()> {
        if self.asked.command != command::BLOCK_STATUS {
            return Err(self.wrong("a status that nobody has asked for"));
        }
        let (head, record) = if extended { (8, 16) } else { (4, 8) };
        let count = length.checked_sub(head).map(|rest| (rest / record, rest % record));
        let Some((count @ 1..=MAX_SENT_EXTENTS, 0)) = count else {
            return Err(self.wrong(&format!("a status chunk of {length} bytes")));
        };
        let mut head = [0; 8];
        let head = if extended { &mut head[..] } else { &mut head[..4] };
        inbox.exact(channel, head)?;
        let mut reader = Reader::new(head);
        let id = reader.be_u32().unwrap_or(0);
        if extended && reader.be_u32().map(u64::from) != Some(count) {
            return Err(self.wrong("a status chunk whose count does not fit its length"));
        }
        if self.answer.statuses.iter().any(|(known, _)| *known == id)
            || self.answer.statuses.len() == MAX_CONTEXTS
        {
            return Err(self.wrong("a status chunk for a context that has answered already"));
        }
        let extents = self.extents(count, extended, inbox, channel)?;
        self.answer.statuses.push((id, extents));
        Ok(())
    }

    /// The records of a status chunk, equal neighbours merged. What lies past the range, and is allowed in the last
    /// record only, is kept: it is true as well.
    fn extents(
        &mut self,
        count: u64,
        extended: bool,
        inbox: &mut Inbox,
        channel: &Channel,
    ) -> Outcome<Vec<Status>> {
        let (mut extents, mut sum, mut full): (Vec<Status>, u64, bool) = (vec![], 0, false);
        let mut bytes = [0; 16];
        let bytes = if extended { &mut bytes[..] } else { &mut bytes[..8] };
        for _ in 0..count {
            inbox.exact(channel, bytes)?;
            let mut reader = Reader::new(bytes);
            let (len, flags) = if extended {
                (reader.be_u64().unwrap_or(0), reader.be_u64().unwrap_or(0))
            } else {
                (reader.be_u32().unwrap_or(0).into(), reader.be_u32().unwrap_or(0).into())
            };
            if len == 0 || sum >= self.asked.length {
                return Err(
                    self.wrong("a status with an extent of no length, or past the end of what was asked for")
                );
            }
            sum = sum.saturating_add(len);
            let kept = extents.len();
            match extents.last_mut() {
                // Kept are the first ones, without a gap.
                _ if full => {}
                Some(last) if last.flags == flags => last.len = last.len.saturating_add(len),
                _ if kept < MAX_EXTENTS => extents.push(Status { len, flags }),
                _ => full = true,
            }
        }
        Ok(extents)
    }

    /// What must have come when a chunk says that it was the last.
    fn check_complete(&self) -> Outcome<()> {
        if self.error.is_some() {
            return Ok(());
        }
        match self.asked.command {
            command::READ if !self.pieces.cover(self.asked.length) => {
                Err(self.wrong("the end of the answer, although bytes are missing"))
            }
            command::BLOCK_STATUS if self.answer.statuses.is_empty() => {
                Err(self.wrong("the end of the answer, although no status has come"))
            }
            _ => Ok(()),
        }
    }

    /// Remembers the first error.
    fn fail(&mut self, errno: Errno, message: String, at: Option<u64>) {
        self.error.get_or_insert(Failure::Refused { errno, message, at });
    }

    fn wrong(&self, what: &str) -> Failure {
        Failure::nonsense(format!("{what} in the answer to {}", describe(&self.asked)))
    }
}

/// The most contexts that are ever asked for.
const MAX_CONTEXTS: usize = 4;

fn describe(asked: &Asked) -> String {
    let name = command::name(asked.command);
    match asked.command {
        command::FLUSH => name,
        _ => format!("{name} of {} bytes at {:#x}", asked.length, asked.offset),
    }
}

/// Which bytes of a read have come, as ranges that do not touch.
#[derive(Debug, Default)]
struct Pieces {
    /// The range that starts at 0, which is all there is if pieces come in order.
    first: u64,
    /// Others: start to end.
    others: BTreeMap<u64, u64>,
}

impl Pieces {
    /// Adds a range; false if part of it was there already, or there are too many.
    fn add(&mut self, start: u64, end: u64) -> bool {
        if start < self.first || self.others.len() >= MAX_PIECES {
            return false;
        }
        let before = self.others.range(..=start).next_back().map(|(_, end)| *end);
        let after = self.others.range(start..).next().map(|(start, _)| *start);
        if before.is_some_and(|before| before > start) || after.is_some_and(|after| after < end) {
            return false;
        }
        if start == self.first {
            self.first = end;
            while let Some(end) = self.others.remove(&self.first) {
                self.first = end;
            }
        } else {
            self.others.insert(start, end);
        }
        true
    }

    fn cover(&self, len: u64) -> bool {
        self.first == len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_come_in_any_order_but_only_once() {
        let mut pieces = Pieces::default();
        assert!(pieces.add(8, 12) && pieces.add(4, 8));
        assert!(!pieces.add(6, 7) && !pieces.add(11, 13) && !pieces.add(3, 5) && !pieces.add(8, 9));
        assert!(!pieces.cover(12));
        assert!(pieces.add(0, 4));
        assert!(pieces.cover(12));
        assert!(!pieces.add(0, 1));
    }

    proptest! {
        #[test]
        fn pieces_are_what_a_map_of_bytes_says(ranges in prop::collection::vec((0u64..32, 1u64..8), 0..20)) {
            let (mut pieces, mut bytes) = (Pieces::default(), [false; 40]);
            for (start, len) in ranges {
                let place = &mut bytes[to_usize(start)..to_usize(start + len)];
                let free = place.iter().all(|taken| !taken);
                prop_assert_eq!(pieces.add(start, start + len), free);
                if free {
                    place.fill(true);
                }
            }
            let prefix = bytes.iter().take_while(|taken| **taken).count() as u64;
            prop_assert!(pieces.cover(prefix));
        }
    }
}
