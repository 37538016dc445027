//! The bytes of files: extents, plain or compressed, and small files within the tree ("EXTENT_DATA").

use std::io::Read as _;

use block::num::to_usize;
use block::{Error, Result};

use super::super::node::Node;
use super::tree::Key;
use super::{Btrfs, EXTENT_DATA};
use crate::bytes::{byte, corrupt, le32, le64, part};

/// The most bytes of a compressed extent, packed or not: btrfs makes 128 KiB.
const MOST_COMPRESSED: u64 = 1 << 20;
/// The largest window of zstd, in bits: btrfs has 17.
const ZSTD_WINDOW_BITS: u32 = 20;

const INLINE: u8 = 0;
const REGULAR: u8 = 1;

impl Btrfs {
    /// Fills `buf` from `offset` of a file, zeros where it has holes.
    pub(super) fn read_data(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let Some(last) = (buf.len() as u64).checked_sub(1).and_then(|len| offset.checked_add(len)) else {
            return Ok(());
        };
        let root = self.root_of(node)?;
        let key = |offset| Key { object: node.number, kind: EXTENT_DATA, offset };
        // The extent that begins before the range may reach into it.
        let before = self.floor(root, key(offset))?;
        let from = before.filter(|before| (before.object, before.kind) == (node.number, EXTENT_DATA));
        self.walk(root, from.unwrap_or(key(offset)), key(last), &mut |key, item| {
            self.extent(item, key.offset, buf, offset)?;
            Ok(true)
        })
    }

    /// Copies the part of an extent that begins at `start` of the file into a buffer that begins at `offset` of it.
    fn extent(&self, item: &[u8], start: u64, buf: &mut [u8], offset: u64) -> Result<()> {
        if item.len() < 21 || byte(item, 17) != 0 || byte(item, 18) != 0 {
            return Err(Error::unsupported("an extent that is encrypted or encoded"));
        }
        let (kind, compression) = (byte(item, 20), byte(item, 16));
        let len = match kind {
            INLINE => le64(item, 8),
            _ => le64(item, 45),
        };
        let end = start.checked_add(len).ok_or_else(|| corrupt(format!("an extent of {len} bytes")))?;
        let range = start.max(offset)..end.min(offset + buf.len() as u64);
        if range.is_empty() {
            return Ok(());
        }
        let target = &mut buf[to_usize(range.start - offset)..to_usize(range.end - offset)];
        let within = range.start - start;
        match kind {
            INLINE => {
                let raw = part(item, 21, item.len());
                let unpacked = self.unpack(compression, raw, len)?;
                copy(&unpacked, within, target);
                Ok(())
            }
            REGULAR => self.regular(item, compression, within, target),
            // Space set aside, which reads as zeros.
            _ => Ok(()),
        }
    }

    fn regular(&self, item: &[u8], compression: u8, within: u64, target: &mut [u8]) -> Result<()> {
        let (address, packed_len, skipped) = (le64(item, 21), le64(item, 29), le64(item, 37));
        let overflow = || corrupt(format!("an extent that begins {skipped:#x} within another"));
        let from = skipped.checked_add(within).ok_or_else(overflow)?;
        if address == 0 {
            return Ok(());
        }
        if compression == 0 {
            return self.read_logical(target, address.checked_add(from).ok_or_else(overflow)?);
        }
        let unpacked_len = le64(item, 8);
        if packed_len > MOST_COMPRESSED || unpacked_len > MOST_COMPRESSED {
            return Err(corrupt(format!("a compressed extent of {packed_len} bytes for {unpacked_len}")));
        }
        let mut packed = vec![0; to_usize(packed_len)];
        self.read_logical(&mut packed, address)?;
        let unpacked = self.unpack(compression, &packed, unpacked_len)?;
        copy(&unpacked, from, target);
        Ok(())
    }

    /// Undoes a compression. There may be less than `len` bytes, never more.
    fn unpack(&self, compression: u8, packed: &[u8], len: u64) -> Result<Vec<u8>> {
        let len = to_usize(len.min(MOST_COMPRESSED));
        let mut unpacked = vec![];
        match compression {
            0 => unpacked.extend_from_slice(part(packed, 0, len)),
            1 => drop(flate2::read::ZlibDecoder::new(packed).take(len as u64).read_to_end(&mut unpacked)?),
            2 => unpacked = self.unpack_lzo(packed, len)?,
            3 => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_BITS)?;
                decoder.take(len as u64).read_to_end(&mut unpacked)?;
            }
            other => return Err(Error::unsupported(format!("an extent compressed in the way {other}"))),
        }
        Ok(unpacked)
    }

    /// LZO in segments of a sector each. A segment's length does not cross the end of a sector of packed bytes.
    fn unpack_lzo(&self, packed: &[u8], len: usize) -> Result<Vec<u8>> {
        let sector = to_usize(self.superblock.sector_bytes);
        let total = (le32(packed, 0) as usize).min(packed.len());
        let (mut unpacked, mut at) = (vec![], 4);
        let mut segment = vec![0; sector];
        while at + 4 <= total && unpacked.len() < len {
            let left = sector - at % sector;
            if left < 4 {
                at += left;
            }
            let size = le32(packed, at) as usize;
            let source = part(packed, at + 4, size);
            if source.len() < size || size == 0 {
                return Err(corrupt(format!("a segment of {size} bytes in an extent of {total}")));
            }
            let done = lzokay::decompress::decompress(source, &mut segment)
                .map_err(|error| corrupt(format!("a segment of LZO: {error:?}")))?;
            unpacked.extend_from_slice(part(&segment, 0, done));
            at += 4 + size;
        }
        unpacked.truncate(len);
        Ok(unpacked)
    }
}

/// Copies from a place on, as far as there are bytes.
fn copy(source: &[u8], from: u64, target: &mut [u8]) {
    let found = part(source, to_usize(from), target.len());
    target[..found.len()].copy_from_slice(found);
}
