//! Free clusters: those whose entry in the FAT is zero (specification, "FAT Data Structure").

use std::ops::Range;

use block::Result;

use super::Fat;
use crate::bytes::{byte, le16, le32};
use crate::ranges::Ranges;

/// Bytes of the FAT that are read at once: a multiple of every entry's length.
const PIECE: u64 = 1 << 20;
/// The entry of cluster 1 says that the file system was unmounted.
const CLEAN: [u32; 2] = [0x8000, 0x0800_0000];

impl Fat {
    /// Bytes of the device that hold nothing; `None` if it was not unmounted, or is so small (FAT12) that it does not
    /// matter.
    pub(super) fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        let parameters = &self.parameters;
        let (entry_bytes, clean, state_at) = match parameters.bits {
            12 => return Ok(None),
            16 => (2, CLEAN[0], 0x25),
            _ => (4, CLEAN[1], 0x41),
        };
        let value = |raw: &[u8]| match entry_bytes {
            2 => u32::from(le16(raw, 0)),
            _ => le32(raw, 0) & 0x0fff_ffff,
        };
        // Linux' own mark, in a byte that is reserved for systems.
        let boot = self.source.bytes(0, 512)?;
        let first = self.source.bytes(parameters.fat_offset, 8)?;
        if byte(&boot, state_at) & 1 != 0 || value(first.get(entry_bytes..).unwrap_or_default()) & clean == 0
        {
            return Ok(None);
        }
        let mut free = Ranges::default();
        let len = ((parameters.clusters + 2) * entry_bytes as u64).min(parameters.fat_bytes);
        let mut done = 0;
        while done < len {
            let piece = self.source.bytes(parameters.fat_offset + done, PIECE.min(len - done))?;
            for (index, raw) in (done / entry_bytes as u64..).zip(piece.chunks_exact(entry_bytes)) {
                if index >= 2 && value(raw) == 0 {
                    let start = parameters.data_offset + (index - 2) * parameters.cluster_bytes;
                    free.push(start..start + parameters.cluster_bytes);
                }
            }
            done += piece.len() as u64;
        }
        Ok(Some(free.into_iter().collect()))
    }
}
