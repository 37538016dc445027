//! Chunks: where logical addresses lie on the device.

use block::{Error, Result};

use super::Btrfs;
use super::tree::Key;
use crate::bytes::{corrupt, le16, le64, part};

const CHUNK_ITEM: u8 = 228;
/// The object that all chunks belong to.
const CHUNKS: u64 = 256;
/// RAID0, RAID10, RAID5 and RAID6: bytes are spread over stripes.
const STRIPED: u64 = 0x8 | 0x40 | 0x80 | 0x100;
/// The most chunks: a gigabyte each, this is half a petabyte.
const MOST_CHUNKS: usize = 1 << 19;

/// Logical addresses that follow one another on the device.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    logical: u64,
    len: u64,
    /// `None`: they are not on this device, or not in one piece.
    place: Option<u64>,
    /// Where they are on it a second time.
    mirror: Option<u64>,
}

/// All chunks, by address.
#[derive(Debug, Default)]
pub(super) struct Chunks(Vec<Chunk>);

impl Chunks {
    /// Those that the superblock holds, which are needed to read the chunk tree.
    pub(super) fn of_system(array: &[u8], device: u64) -> Result<Self> {
        let (mut chunks, mut at) = (Self::default(), 0);
        while at + 17 + 48 <= array.len() {
            let key = Key::parse(part(array, at, 17));
            let item = part(array, at + 17, array.len());
            let len = 48 + 32 * usize::from(le16(item, 44));
            chunks.add(key, part(item, 0, len), device)?;
            at += 17 + len;
        }
        chunks.sorted()
    }

    fn add(&mut self, key: Key, item: &[u8], device: u64) -> Result<()> {
        let (len, kind, stripes) = (le64(item, 0), le64(item, 24), usize::from(le16(item, 44)));
        if key.kind != CHUNK_ITEM || stripes == 0 || item.len() < 48 + 32 * stripes {
            return Err(corrupt(format!("a chunk at {:#x} with {stripes} stripes", key.offset)));
        }
        if self.0.len() >= MOST_CHUNKS || key.offset.checked_add(len).is_none() {
            return Err(corrupt(format!("a chunk of {len} bytes at {:#x}", key.offset)));
        }
        let stripes_of = part(item, 48, 32 * stripes).chunks_exact(32);
        let mut ours = stripes_of.filter(|stripe| le64(stripe, 0) == device).map(|stripe| le64(stripe, 8));
        let whole = stripes == 1 || kind & STRIPED == 0;
        let place = ours.next().filter(|_| whole);
        let mirror = ours.next().filter(|_| whole);
        self.0.push(Chunk { logical: key.offset, len, place, mirror });
        Ok(())
    }

    fn sorted(mut self) -> Result<Self> {
        self.0.sort_by_key(|chunk| chunk.logical);
        let overlap = self.0.windows(2).find(|pair| pair[0].logical + pair[0].len > pair[1].logical);
        match overlap {
            Some(pair) => Err(corrupt(format!("chunks overlap at {:#x}", pair[1].logical))),
            None => Ok(self),
        }
    }

    /// Where an address lies on the device, and how many bytes follow it there.
    fn locate(&self, logical: u64) -> Result<(u64, u64)> {
        let (chunk, within) = self.chunk_of(logical)?;
        let place = chunk.place.ok_or_else(|| {
            Error::unsupported(format!("the chunk at {:#x} is spread over several devices", chunk.logical))
        })?;
        let place = place.checked_add(within).ok_or_else(|| corrupt(format!("a chunk at {place:#x}")))?;
        Ok((place, chunk.len - within))
    }

    /// All places of `len` bytes, which have to lie together.
    pub(super) fn copies(&self, logical: u64, len: u64) -> Result<Vec<u64>> {
        let (place, left) = self.locate(logical)?;
        if left < len {
            return Err(corrupt(format!("{len} bytes at {logical:#x} leave their chunk")));
        }
        let (chunk, within) = self.chunk_of(logical)?;
        let mirror = chunk.mirror.and_then(|mirror| mirror.checked_add(within));
        Ok(std::iter::once(place).chain(mirror).collect())
    }

    /// The chunk of an address, and how far in it that is.
    fn chunk_of(&self, logical: u64) -> Result<(Chunk, u64)> {
        let after = self.0.partition_point(|chunk| chunk.logical <= logical);
        let chunk = after.checked_sub(1).and_then(|index| self.0.get(index));
        let chunk = chunk.filter(|chunk| logical - chunk.logical < chunk.len);
        let chunk = chunk.ok_or_else(|| corrupt(format!("no chunk holds the address {logical:#x}")))?;
        Ok((*chunk, logical - chunk.logical))
    }
}

impl Btrfs {
    /// All chunks there are.
    pub(super) fn all_chunks(&self) -> Result<Chunks> {
        let (from, to) = Key::all(CHUNKS, CHUNK_ITEM);
        let mut chunks = Chunks::default();
        self.walk(self.superblock.chunk_root, from, to, &mut |key, item| {
            chunks.add(key, item, self.superblock.device)?;
            Ok(true)
        })?;
        chunks.sorted()
    }

    /// Fills `buf` from a logical address.
    pub(super) fn read_logical(&self, buf: &mut [u8], logical: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = logical.checked_add(done as u64).ok_or_else(|| corrupt("an address without end"))?;
            let (place, left) = self.chunks.locate(at)?;
            let len = block::num::to_usize(left).min(buf.len() - done);
            self.source.read(&mut buf[done..done + len], place)?;
            done += len;
        }
        Ok(())
    }
}
