//! Replies as bytes.

use super::request::Refusal;
use super::status::Run;
use crate::proto::{Errno, HeaderStyle, MAX_STRING, ReplyHeader, Request, chunk, command};

/// Writes the replies to one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replies {
    pub(super) style: HeaderStyle,
    cookie: u64,
    offset: u64,
    command: u16,
}

impl Replies {
    pub(super) fn to(request: &Request, style: HeaderStyle) -> Self {
        Self { style, cookie: request.cookie, offset: request.offset, command: request.command }
    }

    fn extended(&self) -> bool {
        self.style == HeaderStyle::Extended
    }

    fn chunk(&self, kind: u16, length: usize, done: bool, out: &mut Vec<u8>) {
        let flags = if done { chunk::FLAG_DONE } else { 0 };
        let (cookie, offset) = (self.cookie, self.offset);
        let length = length as u64;
        ReplyHeader::Chunk { flags, kind, cookie, offset, length }.encode(self.extended(), out);
    }

    /// It is done.
    pub(super) fn success(&self, out: &mut Vec<u8>) {
        match self.style {
            // A read of nothing has no content chunk (section "Structured reply chunk message").
            HeaderStyle::Structured if self.command == command::READ => self.chunk(chunk::NONE, 0, true, out),
            HeaderStyle::Extended => self.chunk(chunk::NONE, 0, true, out),
            _ => ReplyHeader::Simple { error: Errno::OK, cookie: self.cookie }.encode(false, out),
        }
    }

    /// What stands in front of `len` bytes at `offset`, the last of the reply if `done`.
    pub(super) fn data(&self, offset: u64, len: usize, done: bool, out: &mut Vec<u8>) {
        match self.style {
            HeaderStyle::Simple => {
                ReplyHeader::Simple { error: Errno::OK, cookie: self.cookie }.encode(false, out);
            }
            _ => {
                self.chunk(chunk::OFFSET_DATA, 8 + len, done, out);
                out.extend_from_slice(&offset.to_be_bytes());
            }
        }
    }

    /// `len` zeros at `offset`. Only in structured and extended replies.
    pub(super) fn hole(&self, offset: u64, len: u32, done: bool, out: &mut Vec<u8>) {
        self.chunk(chunk::OFFSET_HOLE, 12, done, out);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    }

    /// It failed, at `place` if that is known more closely. With simple replies only the number arrives.
    pub(super) fn error(&self, refusal: &Refusal, place: Option<u64>, out: &mut Vec<u8>) {
        if self.style == HeaderStyle::Simple {
            let cookie = self.cookie;
            return ReplyHeader::Simple { error: refusal.errno, cookie }.encode(false, out);
        }
        let text = cut(&refusal.text, MAX_STRING).as_bytes();
        let kind = if place.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        self.chunk(kind, 6 + text.len() + place.map_or(0, |_| 8), true, out);
        out.extend_from_slice(&refusal.errno.0.to_be_bytes());
        out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(text);
        if let Some(place) = place {
            out.extend_from_slice(&place.to_be_bytes());
        }
    }

    /// The extents of a context.
    pub(super) fn status(&self, context: u32, runs: &[Run], done: bool, out: &mut Vec<u8>) {
        if self.extended() {
            self.chunk(chunk::BLOCK_STATUS_EXT, 8 + runs.len() * 16, done, out);
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&u32::try_from(runs.len()).unwrap_or(u32::MAX).to_be_bytes());
            for run in runs {
                out.extend_from_slice(&run.len.to_be_bytes());
                out.extend_from_slice(&run.state.to_be_bytes());
            }
            return;
        }
        self.chunk(chunk::BLOCK_STATUS, 4 + runs.len() * 8, done, out);
        out.extend_from_slice(&context.to_be_bytes());
        for run in runs {
            // Runs are no longer than that here; a state of more than 32 bits there is none.
            out.extend_from_slice(&u32::try_from(run.len).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(&u32::try_from(run.state).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
}

/// The start of a text, at most `max` bytes, whole characters.
pub(super) fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies(style: HeaderStyle) -> Replies {
        let request = Request { flags: 0, command: command::READ, cookie: 9, offset: 512, length: 1024 };
        Replies::to(&request, style)
    }

    #[test]
    fn errors_carry_text_and_place_where_they_can() {
        let refusal = Refusal::new(Errno::EIO, "broken");
        let mut out = vec![];
        replies(HeaderStyle::Simple).error(&refusal, Some(600), &mut out);
        assert_eq!(out.len(), ReplyHeader::SIMPLE_LEN);
        out.clear();
        replies(HeaderStyle::Structured).error(&refusal, Some(600), &mut out);
        let header = ReplyHeader::parse(&out).unwrap();
        let length = (out.len() - ReplyHeader::STRUCTURED_LEN) as u64;
        let (flags, kind) = (chunk::FLAG_DONE, chunk::ERROR_OFFSET);
        assert_eq!(header, ReplyHeader::Chunk { flags, kind, cookie: 9, offset: 0, length });
        assert!(out.ends_with(&600_u64.to_be_bytes()));
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }

    #[test]
    fn an_extended_reply_repeats_the_offset() {
        let mut out = vec![];
        replies(HeaderStyle::Extended).success(&mut out);
        let wanted = ReplyHeader::Chunk { flags: 1, kind: chunk::NONE, cookie: 9, offset: 512, length: 0 };
        assert_eq!(ReplyHeader::parse(&out), Some(wanted));
    }
}
