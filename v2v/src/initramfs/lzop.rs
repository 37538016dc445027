//! lzop's files, in which Linux takes archives that are packed by LZO: a header, then blocks with their lengths in front, in
//! network byte order.
//!
//! ```text
//!   89 LZO 00 0d 0a 1a 0a | version, of the library, needed | method, level | flags | mode, mtime | name | checksum
//!   unpacked, packed length | checksums of the unpacked, of the packed bytes | bytes     .. and four zeros at the end
//! ```
//!
//! Checksums are not compared, as Linux does not compare them either.

use std::io::{Error, ErrorKind, Read, Result};

use super::input::Input;

/// What every file begins with.
const MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, b'\r', b'\n', 0x1a, b'\n'];
/// The first version whose header has the version that is needed, a level and 64 bits of time.
const LONG_HEADER: u16 = 0x0940;
/// The longest block that Linux takes.
const MOST_BLOCK: usize = 256 << 10;

const ADLER_UNPACKED: u32 = 0x1;
const ADLER_PACKED: u32 = 0x2;
const EXTRA_FIELD: u32 = 0x40;
const CRC_UNPACKED: u32 = 0x100;
const CRC_PACKED: u32 = 0x200;
const FILTER: u32 = 0x800;

/// The unpacked bytes of a file.
pub(super) struct Lzop<'a, R> {
    input: &'a mut Input<R>,
    /// `None` before the header has been read.
    flags: Option<u32>,
    packed: Vec<u8>,
    block: Vec<u8>,
    start: usize,
    ended: bool,
}

impl<'a, R: Read> Lzop<'a, R> {
    pub(super) fn new(input: &'a mut Input<R>) -> Self {
        Self { input, flags: None, packed: vec![], block: vec![], start: 0, ended: false }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn skip(&mut self, len: usize) -> Result<()> {
        let mut rest = vec![0; len];
        self.input.read_exact(&mut rest)
    }

    /// Reads the header; gives the flags.
    fn header(&mut self) -> Result<u32> {
        let magic: [u8; 9] = self.bytes()?;
        if magic != MAGIC {
            return Err(damaged("the header is none of lzop's".to_owned()));
        }
        let version = u16::from_be_bytes(self.bytes()?);
        let is_long = version >= LONG_HEADER;
        // The library's version and the one that is needed; the method, the level.
        self.skip(if is_long { 2 + 2 + 2 } else { 2 + 1 })?;
        let flags = self.number()?;
        if flags & FILTER != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "lzop with a filter, which Linux does not read"));
        }
        self.skip(if is_long { 4 + 8 } else { 4 + 4 })?;
        let [name] = self.bytes()?;
        self.skip(usize::from(name) + 4)?;
        if flags & EXTRA_FIELD != 0 {
            let len = usize::try_from(self.number()?).unwrap_or(usize::MAX);
            if len > MOST_BLOCK {
                return Err(damaged(format!("an extra field of {len} bytes in lzop")));
            }
            self.skip(len + 4)?;
        }
        Ok(flags)
    }

    /// Unpacks the next block.
    fn advance(&mut self) -> Result<()> {
        let flags = match self.flags {
            Some(flags) => flags,
            None => self.header()?,
        };
        self.flags = Some(flags);
        self.start = 0;
        self.block.clear();
        let unpacked = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if unpacked == 0 {
            self.ended = true;
            return Ok(());
        }
        let packed = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if unpacked > MOST_BLOCK || packed > unpacked {
            return Err(damaged(format!("a block of {unpacked} bytes in {packed} in lzop")));
        }
        let sums = |any: u32| usize::from(flags & any != 0) * 4;
        self.skip(sums(ADLER_UNPACKED) + sums(CRC_UNPACKED))?;
        if packed < unpacked {
            self.skip(sums(ADLER_PACKED) + sums(CRC_PACKED))?;
        }
        self.packed.resize(packed, 0);
        self.input.read_exact(&mut self.packed)?;
        if packed == unpacked {
            std::mem::swap(&mut self.packed, &mut self.block);
            return Ok(());
        }
        self.block.resize(unpacked, 0);
        let done = lzokay::decompress::decompress(&self.packed, &mut self.block);
        match done.map_err(|error| damaged(format!("a block of LZO: {error:?}")))? {
            len if len == unpacked => Ok(()),
            len => Err(damaged(format!("a block of LZO with {len} bytes instead of {unpacked}"))),
        }
    }
}

fn damaged(words: String) -> Error {
    Error::new(ErrorKind::InvalidData, words)
}

impl<R: Read> Read for Lzop<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        while self.start == self.block.len() && !self.ended {
            self.advance()?;
        }
        let len = buf.len().min(self.block.len() - self.start);
        buf[..len].copy_from_slice(&self.block[self.start..self.start + len]);
        self.start += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lzop 1.04 makes of 300 times "vimg " and an end of line, given on standard input.
    const FILE: &str = "894c5a4f000d0a1a0a104020a0094001050300000d000000006b0b1fb50000000000288e02ba000005dd00000028b616 \
        236d0276696d6720200000000000a810000002696d672076696d672076696d672076696d67200a11000000000000";

    fn file() -> Vec<u8> {
        let digits: Vec<u8> = FILE.bytes().filter(u8::is_ascii_hexdigit).collect();
        let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
        digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
    }

    fn unpack(bytes: &[u8]) -> (Result<Vec<u8>>, u64) {
        let mut input = Input::new(bytes);
        let mut out = vec![];
        let done = Lzop::new(&mut input).read_to_end(&mut out);
        (done.map(|_| out), input.position())
    }

    #[test]
    fn what_lzop_has_packed() {
        let (out, end) = unpack(&[&file()[..], b"\0\0more"].concat());
        assert_eq!(out.unwrap(), ["vimg ".repeat(300), "\n".to_owned()].concat().into_bytes());
        assert_eq!(end, file().len() as u64);
    }

    #[test]
    fn a_block_that_did_not_shrink_is_as_it_is() {
        let header = file()[..38].to_vec();
        let flags = u32::from_be_bytes(header[17..21].try_into().unwrap());
        let name = usize::from(header[33]);
        let mut bytes = [&header[..34 + name], &[0; 4]].concat();
        let sums = usize::from(flags & 1 != 0) + usize::from(flags & 0x100 != 0);
        for number in [3_u32, 3] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(vec![0; sums * 4]);
        bytes.extend(b"abc\0\0\0\0");
        assert_eq!(unpack(&bytes).0.unwrap(), b"abc");
    }

    #[test]
    fn damage_is_no_panic() {
        let whole = file();
        for len in 0..whole.len() {
            assert!(unpack(&whole[..len]).0.is_err(), "{len}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            let _ = unpack(&bytes);
        }
    }
}
