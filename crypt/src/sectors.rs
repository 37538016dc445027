//! Encrypted sectors in a container, read and written at any offset.
//!
//! Sectors are encrypted one by one, so a request that does not begin and end with a sector has to read, change
//! and write the sectors at its edges. Such a request keeps all others out for its time; everybody else goes
//! side by side. (A disk is written in whole sectors nearly always; a lock for every sector would cost more than
//! it gives.)

use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::RwLock;

use crate::volume::{SECTOR, Volume};

/// Bytes that are encrypted at once on their way to the container: what stays in the processor's cache.
const CHUNK: usize = 128 << 10;

/// An encryption with what keeps requests apart. The container, and where in it the first sector lies (`base`), are the
/// caller's, who has compared ranges with the size.
#[derive(Debug)]
pub(crate) struct Sectors {
    volume: Volume,
    /// The number of the first sector, in units of 512 bytes.
    first: u64,
    /// Held exclusively by requests that change a part of a sector.
    whole: RwLock<()>,
}

impl Sectors {
    pub(crate) fn new(volume: Volume, first: u64) -> Self {
        Self { volume, first, whole: RwLock::new(()) }
    }

    /// Bytes of a sector.
    fn size(&self) -> usize {
        self.volume.sector_size()
    }

    fn within(&self, offset: u64) -> usize {
        to_usize(offset % self.size() as u64)
    }

    fn number(&self, offset: u64) -> u64 {
        self.first.wrapping_add(offset / SECTOR as u64)
    }

    fn is_aligned(&self, offset: u64, len: usize) -> bool {
        self.within(offset) == 0 && len.is_multiple_of(self.size())
    }

    pub(crate) fn read(&self, under: &dyn Storage, base: u64, buf: &mut [u8], offset: u64) -> Result<()> {
        let _shared = self.whole.read();
        if self.is_aligned(offset, buf.len()) {
            self.read_whole(under, base, buf, offset)
        } else {
            self.read_unaligned(under, base, buf, offset)
        }
    }

    pub(crate) fn write(&self, under: &dyn Storage, base: u64, buf: &[u8], offset: u64) -> Result<()> {
        if self.is_aligned(offset, buf.len()) {
            let _shared = self.whole.read();
            self.write_whole(under, base, buf, offset)
        } else {
            let _alone = self.whole.write();
            self.write_unaligned(under, base, buf, offset)
        }
    }

    /// Writes zeros as everything else is written.
    pub(crate) fn write_zeros(&self, under: &dyn Storage, base: u64, offset: u64, len: u64) -> Result<()> {
        let zeros = vec![0; to_usize(len.min(CHUNK as u64))];
        let (mut offset, end) = (offset, offset + len);
        while offset < end {
            // Each piece but the first begins with a sector, and so does what follows it.
            let room = CHUNK - self.within(offset);
            let len = (room as u64).min(end - offset);
            self.write(under, base, &zeros[..to_usize(len)], offset)?;
            offset += len;
        }
        Ok(())
    }

    /// Reads and decrypts whole sectors.
    fn read_whole(&self, under: &dyn Storage, base: u64, buf: &mut [u8], mut offset: u64) -> Result<()> {
        for chunk in buf.chunks_mut(CHUNK) {
            under.read_at(chunk, base + offset)?;
            self.volume.decrypt(self.number(offset), chunk);
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Encrypts and writes whole sectors.
    fn write_whole(&self, under: &dyn Storage, base: u64, buf: &[u8], mut offset: u64) -> Result<()> {
        let mut scratch = vec![0; buf.len().min(CHUNK)];
        for chunk in buf.chunks(CHUNK) {
            let encrypted = &mut scratch[..chunk.len()];
            encrypted.copy_from_slice(chunk);
            self.volume.encrypt(self.number(offset), encrypted);
            under.write_at(encrypted, base + offset)?;
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Calls `change` with the sector in which `offset` lies, and writes it back.
    fn change(
        &self,
        under: &dyn Storage,
        base: u64,
        offset: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let start = offset - self.within(offset) as u64;
        let mut sector = vec![0; self.size()];
        self.read_whole(under, base, &mut sector, start)?;
        change(&mut sector);
        self.write_whole(under, base, &sector, start)
    }

    /// A write with parts of sectors at its ends. The caller holds the lock exclusively.
    fn write_unaligned(&self, under: &dyn Storage, base: u64, mut buf: &[u8], mut offset: u64) -> Result<()> {
        let within = self.within(offset);
        if within != 0 {
            let (head, rest) = buf.split_at(buf.len().min(self.size() - within));
            self.change(under, base, offset, |sector| {
                sector[within..][..head.len()].copy_from_slice(head);
            })?;
            offset += head.len() as u64;
            buf = rest;
        }
        let (middle, tail) = buf.split_at(buf.len() / self.size() * self.size());
        self.write_whole(under, base, middle, offset)?;
        if tail.is_empty() {
            return Ok(());
        }
        let end = offset + middle.len() as u64;
        self.change(under, base, end, |sector| sector[..tail.len()].copy_from_slice(tail))
    }

    /// A read with parts of sectors at its ends.
    fn read_unaligned(&self, under: &dyn Storage, base: u64, buf: &mut [u8], mut offset: u64) -> Result<()> {
        let mut scratch = vec![0; CHUNK.min((buf.len() + 2 * self.size()) / self.size() * self.size())];
        let mut rest = buf;
        while !rest.is_empty() {
            let within = self.within(offset);
            let len = rest.len().min(scratch.len() - within);
            let (part, after) = rest.split_at_mut(len);
            let sectors = &mut scratch[..(within + len).next_multiple_of(self.size())];
            self.read_whole(under, base, sectors, offset - within as u64)?;
            part.copy_from_slice(&sectors[within..within + len]);
            offset += len as u64;
            rest = after;
        }
        Ok(())
    }
}
