//! What has been received and not been understood yet.
//!
//! Headers are a few bytes; asking the system for each of them alone would double the number of calls. So a little is
//! read ahead, and what is large goes past the buffer straight to where it belongs.

use std::io;

use crate::channel::Channel;
use crate::proto::{HeaderStyle, ReplyHeader};

use super::failure::{Failure, Outcome};

/// Bytes that are read ahead at most: a small reply with its data.
const AHEAD: usize = 8 << 10;

/// The receiving side of a connection. Held by one thread at a time.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; AHEAD].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// The connection; `UnexpectedEof` if it ends before.
    pub(super) fn exact(&mut self, channel: &Channel, buf: &mut [u8]) -> io::Result<()> {
        let ready = (self.end - self.start).min(buf.len());
        let (first, rest) = buf.split_at_mut(ready);
        first.copy_from_slice(&self.bytes[self.start..self.start + ready]);
        self.start += ready;
        if rest.len() >= AHEAD {
            return channel.receive_exact(rest);
        }
        if rest.is_empty() {
            return Ok(());
        }
        self.gather(channel, rest.len())?;
        rest.copy_from_slice(&self.bytes[self.start..self.start + rest.len()]);
        self.start += rest.len();
        Ok(())
    }

    /// Makes sure that `wanted` bytes (at most `AHEAD`) are in the buffer.
    fn gather(&mut self, channel: &Channel, wanted: usize) -> io::Result<()> {
        if self.start > 0 && self.start + wanted > self.bytes.len() || self.start == self.end {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < wanted {
            match channel.receive(&mut self.bytes[self.end..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        Ok(())
    }

    /// The next header of a reply, of a kind that this style has.
    ///
    /// # Errors
    /// The connection ended, or something else than a header arrived.
    pub(super) fn header(&mut self, channel: &Channel, style: HeaderStyle) -> Outcome<ReplyHeader> {
        let mut bytes = [0; ReplyHeader::EXTENDED_LEN];
        let (magic, rest) = bytes.split_at_mut(4);
        self.exact(channel, magic)?;
        let magic = u32::from_be_bytes([magic[0], magic[1], magic[2], magic[3]]);
        let unexpected = || Failure::nonsense(format!("invalid magic {magic:#x} where a reply begins"));
        let len = ReplyHeader::len_of(magic).ok_or_else(unexpected)?;
        self.exact(channel, &mut rest[..len - 4])?;
        let header = ReplyHeader::parse(&bytes[..len]).ok_or_else(unexpected)?;
        let fits = match style {
            HeaderStyle::Simple => len == ReplyHeader::SIMPLE_LEN,
            HeaderStyle::Structured => len != ReplyHeader::EXTENDED_LEN,
            HeaderStyle::Extended => len == ReplyHeader::EXTENDED_LEN,
        };
        if fits {
            Ok(header)
        } else {
            Err(Failure::nonsense(format!("a reply with the magic {magic:#x}, which has not been agreed on")))
        }
    }
}
