//! The compressions that Linux knows, each as a stream that ends where the compressed data end.

use std::io::{BufRead as _, Error, ErrorKind, Read, Result};

use super::Compression;
use super::input::Input;
use super::lzop::Lzop;

/// Memory for the window of a decoder, in KiB: what `xz -9` needs, with room.
const MOST_WINDOW_KIB: u32 = 160 << 10;
/// The same as a power of two, for zstd.
const MOST_WINDOW_LOG: u32 = 27;

/// What begins with these six bytes (or fewer, at the end of a file). `None`: nothing that is known.
pub(super) fn recognise(magic: &[u8]) -> Option<Compression> {
    let known: [(&[u8], Compression); 10] = [
        (b"070701", Compression::None),
        (b"070702", Compression::None),
        (b"\x1f\x8b", Compression::Gzip),
        (b"\x1f\x9e", Compression::Gzip),
        (b"\xfd7zXZ\0", Compression::Xz),
        (b"\x5d\0\0", Compression::Lzma),
        (b"BZh", Compression::Bzip2),
        (&LZ4_LEGACY, Compression::Lz4),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x89LZO\0\r", Compression::Lzo),
    ];
    known.into_iter().find(|(start, _)| magic.starts_with(start)).map(|(_, compression)| compression)
}

/// The unpacked bytes of what comes next.
pub(super) fn decoder<'a, R: Read>(
    compression: Compression,
    input: &'a mut Input<R>,
) -> Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(input)),
        Compression::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?.single_frame();
            decoder.window_log_max(MOST_WINDOW_LOG)?;
            Box::new(decoder)
        }
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(input, false, MOST_WINDOW_KIB)),
        Compression::Lzma => Box::new(Lzma {
            input,
            stream: lzma_rust2::LzmaStream::new_mem_limit(MOST_WINDOW_KIB, None),
            ended: false,
        }),
        Compression::Lz4 => Box::new(Lz4::new(input)),
        Compression::Lzo => Box::new(Lzop::new(input)),
    })
}

/// The older format. Its end is found by unpacking, so that what was taken too much is given back.
struct Lzma<'a, R> {
    input: &'a mut Input<R>,
    stream: lzma_rust2::LzmaStream,
    ended: bool,
}

impl<R: Read> Read for Lzma<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        while !self.ended && !buf.is_empty() {
            let next = self.input.fill_buf()?;
            let is_last = next.is_empty();
            let action = if is_last { lzma_rust2::Action::Finish } else { lzma_rust2::Action::Run };
            let done = self.stream.process(next, buf, action)?;
            self.input.consume(done.bytes_consumed);
            if done.status == lzma_rust2::Status::StreamEnd {
                self.ended = true;
                self.input.give_back(self.stream.unused_input());
            }
            if done.bytes_produced > 0 {
                return Ok(done.bytes_produced);
            }
            if is_last && !self.ended {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}

/// The magic number 0x184c2102.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// A block when it is unpacked, but for the last one, which is shorter.
const LZ4_BLOCK: usize = 8 << 20;
/// A block that did not shrink.
const LZ4_MOST: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;

/// LZ4's "legacy" frames: the magic number, then blocks with their lengths in front.
struct Lz4<'a, R> {
    input: &'a mut Input<R>,
    packed: Vec<u8>,
    block: Vec<u8>,
    start: usize,
    end: usize,
    ended: bool,
}

impl<'a, R: Read> Lz4<'a, R> {
    fn new(input: &'a mut Input<R>) -> Self {
        Self { input, packed: vec![], block: vec![], start: 0, end: 0, ended: false }
    }

    /// Unpacks the next block.
    fn advance(&mut self) -> Result<()> {
        let mut len = [0; 4];
        loop {
            if self.input.peek(4)?.is_empty() {
                self.ended = true;
                return Ok(());
            }
            self.input.read_exact(&mut len)?;
            // Files that are put one behind the other.
            if len != LZ4_LEGACY {
                break;
            }
        }
        let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
        if len == 0 {
            // Since Linux 5.13, padding ends it.
            self.ended = true;
            return Ok(());
        }
        if len > LZ4_MOST {
            return Err(Error::new(ErrorKind::InvalidData, format!("a block of {len} bytes in LZ4")));
        }
        self.packed.resize(len, 0);
        self.input.read_exact(&mut self.packed)?;
        self.block.resize(LZ4_BLOCK, 0);
        let unpacked = lz4_flex::block::decompress_into(&self.packed, &mut self.block);
        self.end = unpacked.map_err(|error| Error::new(ErrorKind::InvalidData, error.to_string()))?;
        self.start = 0;
        Ok(())
    }
}

impl<R: Read> Read for Lz4<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        while self.start == self.end && !self.ended {
            self.advance()?;
        }
        let len = buf.len().min(self.end - self.start);
        buf[..len].copy_from_slice(&self.block[self.start..self.start + len]);
        self.start += len;
        Ok(len)
    }
}
