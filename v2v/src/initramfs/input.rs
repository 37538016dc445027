//! Bytes one can look at before they are taken, and whose position is known.

use std::io::{BufRead, Read, Result};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// A stream with a place.
#[derive(Debug)]
pub(super) struct Input<R> {
    source: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes taken so far.
    taken: u64,
    /// Of what is taken, if anybody wants to know.
    digest: Option<blake3::Hasher>,
}

impl<R: Read> Input<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, buffer: vec![0; BUFFER], start: 0, end: 0, taken: 0, digest: None }
    }

    /// Bytes that have been taken so far.
    pub(super) fn position(&self) -> u64 {
        self.taken
    }

    /// From here on, what is taken goes into a digest.
    pub(super) fn start_digest(&mut self) {
        self.digest = Some(blake3::Hasher::new());
    }

    /// The digest of what has been taken since; `None` if it is not known.
    pub(super) fn end_digest(&mut self) -> Option<[u8; 32]> {
        self.digest.take().map(|digest| digest.finalize().into())
    }

    /// The next `len` bytes without taking them; fewer at the end. As many are kept in memory.
    pub(super) fn peek(&mut self, len: usize) -> Result<&[u8]> {
        if self.end - self.start < len {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.buffer.len() < len {
                self.buffer.resize(len, 0);
            }
            while self.end < len {
                let read = self.source.read(&mut self.buffer[self.end..])?;
                if read == 0 {
                    break;
                }
                self.end += read;
            }
        }
        Ok(&self.buffer[self.start..self.end.min(self.start + len)])
    }

    /// Puts a few bytes back that were taken last.
    pub(super) fn give_back(&mut self, bytes: &[u8]) {
        let rest = self.buffer[self.start..self.end].to_vec();
        let mut buffer = [bytes, &rest].concat();
        (self.start, self.end) = (0, buffer.len());
        buffer.resize(buffer.len().max(BUFFER), 0);
        self.buffer = buffer;
        self.taken = self.taken.saturating_sub(bytes.len() as u64);
        self.digest = None;
    }

    /// Takes all zeros that come next.
    pub(super) fn skip_zeros(&mut self) -> Result<()> {
        loop {
            let next = self.fill_buf()?;
            let zeros = next.iter().take_while(|byte| **byte == 0).count();
            let all = zeros == next.len();
            self.consume(zeros);
            if !all || zeros == 0 {
                return Ok(());
            }
        }
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        let next = self.fill_buf()?;
        let len = next.len().min(buf.len());
        buf[..len].copy_from_slice(&next[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl<R: Read> BufRead for Input<R> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        if self.start == self.end {
            self.start = 0;
            self.end = self.source.read(&mut self.buffer)?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, len: usize) {
        let len = len.min(self.end - self.start);
        if let Some(digest) = &mut self.digest {
            digest.update(&self.buffer[self.start..self.start + len]);
        }
        self.start += len;
        self.taken += len as u64;
    }
}
