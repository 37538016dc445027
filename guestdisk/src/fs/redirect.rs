//! A device some of whose blocks are read from elsewhere: from a journal that nobody has replayed.

use std::collections::HashMap;
use std::sync::Arc;

use block::device::check_range;
use block::num::to_usize;
use block::{BlockDevice, LayerExtent, Result, Stored};

/// Where a block is to be read instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patch {
    /// Offset on the same device, in bytes.
    pub(super) offset: u64,
    /// What its first bytes are instead of those that are found there.
    pub(super) head: Option<[u8; 4]>,
}

/// The device. Read-only.
#[derive(Debug)]
pub(super) struct Redirect {
    device: Arc<dyn BlockDevice>,
    block_bytes: u64,
    patches: HashMap<u64, Patch>,
}

impl Redirect {
    pub(super) fn new(device: Arc<dyn BlockDevice>, block_bytes: u64, patches: HashMap<u64, Patch>) -> Self {
        Self { device, block_bytes, patches }
    }

    /// How many of the `len` bytes at `offset` are read from one place.
    fn piece(&self, offset: u64, len: usize) -> usize {
        let first = offset / self.block_bytes;
        let last = (offset + len as u64 - 1) / self.block_bytes;
        let is_patched = |block: &u64| self.patches.contains_key(block);
        let end =
            if is_patched(&first) { first + 1 } else { (first..=last).find(is_patched).unwrap_or(last + 1) };
        to_usize(end * self.block_bytes - offset).min(len)
    }

    /// Reads what lies in one place.
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let within = offset % self.block_bytes;
        let Some(patch) = self.patches.get(&(offset / self.block_bytes)) else {
            return self.device.read_at(buf, offset);
        };
        self.device.read_at(buf, patch.offset + within)?;
        for (at, byte) in (0..).zip(patch.head.into_iter().flatten()) {
            if let Some(place) = at_place(buf, within, at) {
                *place = byte;
            }
        }
        Ok(())
    }
}

/// The byte of a block in a buffer that begins `within` it.
fn at_place(buf: &mut [u8], within: u64, at: u64) -> Option<&mut u8> {
    buf.get_mut(to_usize(at.checked_sub(within)?))
}

impl BlockDevice for Redirect {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let len = self.piece(at, buf.len() - done);
            self.read_piece(&mut buf[done..done + len], at)?;
            done += len;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        Ok(LayerExtent::new(Stored::Data, max_len.min(self.size() - offset)))
    }
}
