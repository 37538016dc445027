//! `O_DIRECT`: requests whose address, offset and length suit the device go straight through, others through
//! an aligned buffer.
//!
//! A write that covers a block of the device in part is a read, a change and a write of that block. Other
//! writes to the block must not come in between, so such a write holds the growth lock exclusively, and all
//! direct writes hold it shared. With direct I/O at tens of microseconds per request the lock is not felt;
//! who writes unaligned under `O_DIRECT` pays in any case.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::align::{AlignedBuf, is_aligned_address};
use crate::error::Result;
use crate::num::{align_down, align_up, is_aligned, len_of, to_usize};
use crate::sys;

use super::Kind;
use super::growth::Growth;

/// Bytes that pass through a buffer at once: a multiple of every alignment.
const CHUNK: u64 = 1 << 20;

/// What the file demands of direct requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Direct {
    /// Multiple of which addresses have to be, in bytes.
    pub(super) memory: usize,
    /// Multiple of which offsets and lengths have to be, in bytes.
    pub(super) offset: u32,
}

impl Direct {
    /// Asks the kernel, or tries.
    pub(super) fn of(file: &File, kind: Kind) -> Self {
        let (memory, offset) = match kind {
            Kind::Device { sector, .. } => (sector, sector),
            Kind::Regular => sys::direct_alignment(file).unwrap_or_else(|| probe(file)),
        };
        Self { memory: to_usize(u64::from(memory)), offset }
    }

    fn unit(self) -> u64 {
        u64::from(self.offset)
    }

    fn is_aligned(self, offset: u64, len: u64) -> bool {
        is_aligned(offset, self.unit()) && is_aligned(len, self.unit())
    }

    /// The aligned range around `offset..offset + len`, cut off at the next multiple of [`CHUNK`].
    fn around(self, offset: u64, len: u64) -> (u64, u64) {
        let start = align_down(offset, self.unit());
        let limit = align_down(start, CHUNK) + CHUNK;
        let end = align_up(offset + len, self.unit()).unwrap_or(limit);
        (start, end.min(limit))
    }

    /// Fills `buf`; what lies past the end of the file reads as zeros.
    pub(super) fn read(self, file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.is_aligned(offset, len_of(buf)) && is_aligned_address(buf, self.memory) {
            return self.read_aligned(file, buf, offset);
        }
        let mut bounce = self.bounce(offset, len_of(buf));
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (start, end) = self.around(offset, len_of(buf));
            let bounce = &mut bounce[..to_usize(end - start)];
            self.read_aligned(file, bounce, start)?;
            let wanted = &bounce[to_usize(offset - start)..];
            let len = wanted.len().min(buf.len());
            let (head, rest) = buf.split_at_mut(len);
            head.copy_from_slice(&wanted[..len]);
            (buf, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    /// A buffer for the largest chunk of a request.
    fn bounce(self, offset: u64, len: u64) -> AlignedBuf {
        let start = align_down(offset, self.unit());
        let span = align_up(offset + len, self.unit()).map_or(CHUNK, |end| end - start);
        AlignedBuf::new(to_usize(span.min(CHUNK)), self.memory)
    }

    fn read_aligned(self, file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => {
                    done += read;
                    // Only the end of the file cuts a read off in the middle of a block, and to ask again
                    // from there would be unaligned.
                    if !is_aligned(read as u64, self.unit()) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    /// Writes all of `buf`.
    pub(super) fn write(self, file: &File, growth: &Growth, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset + len_of(buf);
        if !self.is_aligned(offset, len_of(buf)) {
            return self.write_around(file, growth, buf, offset);
        }
        let _shared = growth.shared();
        if is_aligned_address(buf, self.memory) {
            file.write_all_at(buf, offset)?;
        } else {
            self.write_copy(file, buf, offset)?;
        }
        growth.raise(end);
        Ok(())
    }

    /// Writes an aligned range from an unaligned address.
    fn write_copy(self, file: &File, buf: &[u8], mut offset: u64) -> Result<()> {
        let mut bounce = self.bounce(0, len_of(buf));
        for chunk in buf.chunks(bounce.len().max(1)) {
            let bounce = &mut bounce[..chunk.len()];
            bounce.copy_from_slice(chunk);
            file.write_all_at(bounce, offset)?;
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Writes an unaligned range: the blocks at its ends are read first and written back whole.
    fn write_around(self, file: &File, growth: &Growth, buf: &[u8], offset: u64) -> Result<()> {
        let _exclusive = growth.exclusive();
        let end = offset + len_of(buf);
        let regular = file.metadata()?.is_file();
        let len = if regular { file.metadata()?.len() } else { u64::MAX };
        let mut bounce = self.bounce(offset, len_of(buf));
        let (mut rest, mut position) = (buf, offset);
        while !rest.is_empty() {
            let (start, stop) = self.around(position, len_of(rest));
            let bounce = &mut bounce[..to_usize(stop - start)];
            self.read_edges(file, bounce, start, position, end)?;
            let at = to_usize(position - start);
            let len = (bounce.len() - at).min(rest.len());
            bounce[at..at + len].copy_from_slice(&rest[..len]);
            file.write_all_at(bounce, start)?;
            (rest, position) = (&rest[len..], position + len as u64);
        }
        let wanted = len.max(end);
        if regular && align_up(end, self.unit()).is_none_or(|written| written > wanted) {
            file.set_len(wanted)?;
        }
        growth.raise(end);
        Ok(())
    }

    /// Reads the first and the last block of `bounce`, which stands for the bytes from `start` on, where
    /// they are not wholly inside `from..to`.
    fn read_edges(self, file: &File, bounce: &mut [u8], start: u64, from: u64, to: u64) -> Result<()> {
        let unit = to_usize(self.unit());
        let stop = start + len_of(bounce);
        if start < from {
            self.read_aligned(file, &mut bounce[..unit], start)?;
        }
        if to < stop && (stop - self.unit() > start || start >= from) {
            let last = bounce.len() - unit;
            self.read_aligned(file, &mut bounce[last..], stop - self.unit())?;
        }
        Ok(())
    }
}

/// The smallest size of block that can be read, where the kernel does not tell. 4096 suits all devices, if
/// not all file systems; a file too short to try is treated so.
fn probe(file: &File) -> (u32, u32) {
    const SAFE: u32 = 4096;
    let mut buf = AlignedBuf::new(SAFE as usize, SAFE as usize);
    let readable =
        |len: usize, buf: &mut [u8]| file.read_at(&mut buf[..len], 0).is_ok_and(|read| read == len);
    if readable(512, &mut buf) { (512, 512) } else { (SAFE, SAFE) }
}
