//! cpio archives in the formats `newc` and `crc` (Linux documentation, "initramfs buffer format").

use std::io::{BufRead, Error, ErrorKind, Result};

use block::num::to_usize;

use super::{Limits, Member};

/// Bytes of a header: the magic number and thirteen fields of eight digits.
const HEADER: usize = 110;
/// The most bytes of a name or of a link's target.
const MOST_NAME: u64 = 4096;
/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";

/// Reads archives and remembers what is in them.
pub(super) struct Reader<'a> {
    limits: Limits,
    wanted: &'a dyn Fn(&str) -> bool,
    pub(super) members: Vec<Member>,
    /// Bytes read of all archives.
    bytes: u64,
    /// Bytes read of the present archive, for its padding.
    within: u64,
    /// Bytes that are kept.
    kept: u64,
}

/// The fields of a header that matter.
struct Header {
    mode: u32,
    len: u64,
    name_len: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(limits: Limits, wanted: &'a dyn Fn(&str) -> bool) -> Self {
        Self { limits, wanted, members: vec![], bytes: 0, within: 0, kept: 0 }
    }

    /// Bytes read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads one archive up to its trailer.
    pub(super) fn archive(&mut self, input: &mut impl BufRead) -> Result<()> {
        self.within = 0;
        while self.member(input)? {}
        Ok(())
    }

    /// Reads archives up to the end of the stream, with zeros between and after them.
    pub(super) fn archives(&mut self, input: &mut impl BufRead) -> Result<()> {
        loop {
            self.archive(input)?;
            while let [0, ..] = input.fill_buf()? {
                let zeros = input.fill_buf()?.iter().take_while(|byte| **byte == 0).count();
                self.count(zeros as u64)?;
                input.consume(zeros);
            }
            if input.fill_buf()?.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes over what an archive has that was read before: its members, and its length when it is unpacked. `false`: that
    /// is more than the limits allow.
    pub(super) fn take_over(&mut self, members: &[Member], unpacked: u64) -> bool {
        let kept: u64 = members.iter().filter(|member| member.bytes.is_some()).map(|member| member.len).sum();
        let (bytes, kept) = (self.bytes.saturating_add(unpacked), self.kept.saturating_add(kept));
        let fits = bytes <= self.limits.unpacked_bytes
            && kept <= self.limits.all_file_bytes
            && self.members.len().saturating_add(members.len()) <= self.limits.members;
        if fits {
            self.members.extend_from_slice(members);
            (self.bytes, self.kept) = (bytes, kept);
        }
        fits
    }

    /// Reads one member. `false`: it was the trailer.
    fn member(&mut self, input: &mut impl BufRead) -> Result<bool> {
        let header = self.header(input)?;
        let name = self.small(input, header.name_len)?;
        self.pad(input)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if name == TRAILER {
            return Ok(false);
        }
        let name = name.strip_prefix(b"./").unwrap_or(name);
        let path = String::from_utf8_lossy(name).trim_start_matches('/').to_owned();
        let mut member = Member { path, mode: header.mode, len: header.len, ..Member::default() };
        if member.is_link() {
            let target = self.small(input, header.len)?;
            member.target = String::from_utf8_lossy(&target).trim_end_matches('\0').to_owned();
        } else if self.is_kept(&member) {
            self.kept += header.len;
            member.bytes = Some(self.take(input, header.len)?);
        } else {
            self.skip(input, header.len)?;
        }
        self.pad(input)?;
        if self.members.len() >= self.limits.members {
            return Err(Error::other(format!("more than {} files", self.limits.members)));
        }
        self.members.push(member);
        Ok(true)
    }

    fn is_kept(&self, member: &Member) -> bool {
        member.is_file()
            && member.len <= self.limits.file_bytes
            && self.kept.saturating_add(member.len) <= self.limits.all_file_bytes
            && (self.wanted)(&member.path)
    }

    fn header(&mut self, input: &mut impl BufRead) -> Result<Header> {
        let raw = self.take(input, HEADER as u64)?;
        if !(raw.starts_with(b"070701") || raw.starts_with(b"070702")) {
            return Err(damaged("no header of a file where one is expected"));
        }
        let field = |index: usize| {
            let digits = raw.get(6 + 8 * index..14 + 8 * index).unwrap_or_default();
            let digits = std::str::from_utf8(digits).unwrap_or_default();
            u32::from_str_radix(digits, 16).map_err(|_| damaged("a field of a header is not a number"))
        };
        Ok(Header { mode: field(1)?, len: field(6)?.into(), name_len: field(11)?.into() })
    }

    /// A name, or a link's target.
    fn small(&mut self, input: &mut impl BufRead, len: u64) -> Result<Vec<u8>> {
        if len > MOST_NAME {
            return Err(damaged("a name that is longer than names can be"));
        }
        self.take(input, len)
    }

    /// The next bytes. `len` has been checked.
    fn take(&mut self, input: &mut impl BufRead, len: u64) -> Result<Vec<u8>> {
        self.count(len)?;
        let mut bytes = vec![0; to_usize(len)];
        input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, input: &mut impl BufRead, len: u64) -> Result<()> {
        self.count(len)?;
        let mut left = len;
        while left > 0 {
            let there = input.fill_buf()?.len();
            if there == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let step = there.min(to_usize(left));
            input.consume(step);
            left -= step as u64;
        }
        Ok(())
    }

    /// Everything begins at a multiple of four bytes.
    fn pad(&mut self, input: &mut impl BufRead) -> Result<()> {
        let padding = self.within.next_multiple_of(4) - self.within;
        self.skip(input, padding)
    }

    fn count(&mut self, len: u64) -> Result<()> {
        self.bytes += len;
        self.within += len;
        if self.bytes > self.limits.unpacked_bytes {
            return Err(Error::other(format!(
                "more than {} bytes when unpacked",
                self.limits.unpacked_bytes
            )));
        }
        Ok(())
    }
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}
