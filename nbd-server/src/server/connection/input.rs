//! What comes in on a connection: requests and payloads out of one buffer.

use std::io;

use crate::channel::Channel;
use crate::proto::{HeaderStyle, Request};

/// Bytes of the buffer: room for a small write, or for a queue of requests.
const BUFFER_BYTES: usize = 128 << 10;
/// From this length on a payload is received where it belongs instead of into the buffer, and so is the next one, as
/// far as that can be foreseen.
const LARGE: usize = 64 << 10;

/// The buffer and what is in it.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    style: HeaderStyle,
    /// The last payload was large: the next request probably has such a payload, too, so only its header is received.
    large: bool,
}

/// What was received.
#[derive(Debug)]
pub(super) enum Received {
    Request(Request),
    /// The peer has ended the connection between two requests.
    End,
    /// The peer has ended the connection inside a request.
    Cut,
    /// Something that is no request.
    Magic(u32),
}

impl Input {
    pub(super) fn new(style: HeaderStyle) -> Self {
        Self { bytes: vec![0; BUFFER_BYTES], start: 0, end: 0, style, large: false }
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether a whole header is in the buffer.
    pub(super) fn has_request(&self) -> bool {
        self.len() >= self.style.request_len()
    }

    /// Whether so many bytes of payload are in the buffer: nobody has to wait for them.
    pub(super) fn holds(&self, payload: u64) -> bool {
        self.len() as u64 >= payload
    }

    /// The next request. Waits for it.
    pub(super) fn request(&mut self, channel: &Channel) -> io::Result<Received> {
        let len = self.style.request_len();
        while self.len() < len {
            if self.receive(channel, len)? == 0 {
                return Ok(if self.len() == 0 { Received::End } else { Received::Cut });
            }
        }
        let header = &self.bytes[self.start..self.start + len];
        let Some(request) = Request::parse(header, self.style) else {
            let magic = header.first_chunk().map_or(0, |magic| u32::from_be_bytes(*magic));
            return Ok(Received::Magic(magic));
        };
        self.start += len;
        Ok(Received::Request(request))
    }

    /// Receives into the buffer; at least up to `wanted` bytes will fit.
    fn receive(&mut self, channel: &Channel, wanted: usize) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start + wanted > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
        }
        let room = if self.large { self.start + wanted } else { self.bytes.len() };
        let received = channel.receive(&mut self.bytes[self.end..room])?;
        self.end += received;
        Ok(received)
    }

    /// The next `len` bytes (at most [`LARGE`]), in the buffer.
    pub(super) fn buffered(&mut self, channel: &Channel, len: usize) -> io::Result<&[u8]> {
        self.large = false;
        while self.len() < len {
            if self.receive(channel, len)? == 0 {
                return Err(cut());
            }
        }
        let start = self.start;
        self.start += len;
        Ok(&self.bytes[start..start + len])
    }

    /// Fills `buf`, past the buffer where that is empty.
    pub(super) fn read_exact(&mut self, channel: &Channel, buf: &mut [u8]) -> io::Result<()> {
        self.large = buf.len() > LARGE;
        let now = self.len().min(buf.len());
        let (front, rest) = buf.split_at_mut(now);
        front.copy_from_slice(&self.bytes[self.start..self.start + now]);
        self.start += now;
        channel.receive_exact(rest).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => cut(),
            _ => error,
        })
    }

    /// Leaves out `len` bytes.
    pub(super) fn skip(&mut self, channel: &Channel, len: u64) -> io::Result<()> {
        self.large = false;
        let mut left = len;
        while left > 0 {
            if self.len() == 0 && self.receive(channel, 1)? == 0 {
                return Err(cut());
            }
            let now = left.min(self.len() as u64);
            self.start += block::num::to_usize(now);
            left -= now;
        }
        Ok(())
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended inside a request")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_left_out_is_not_received_byte_by_byte() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (Channel::unix(ours, "client"), Channel::unix(theirs, "server"));
        let mut input = Input::new(HeaderStyle::Simple);
        let mut large = vec![0; LARGE + 1];
        ours.send(&[&large]).unwrap();
        input.read_exact(&theirs, &mut large).unwrap();
        ours.send(&[&[7; 100]]).unwrap();
        input.skip(&theirs, 10).unwrap();
        assert_eq!(input.len(), 90);
    }
}
