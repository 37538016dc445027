//! A window of a disk as a disk of its own: a partition, a flat extent.

use std::sync::Arc;

use crate::device::{BlockDevice, LayerExtent, Limits, ZeroMode, check_range};
use crate::error::Result;
use crate::extent::extent;
use crate::storage::Storage;

/// Some consecutive bytes of a device.
///
/// It is one layer: what the chain of the device underneath answers is what the slice stores. Places in host
/// storage are told only where the device's own layer answers, whose storage is the slice's too.
#[derive(Debug)]
pub struct Slice {
    device: Arc<dyn BlockDevice>,
    offset: u64,
    len: u64,
}

impl Slice {
    /// The `len` bytes of `device` at `offset`.
    ///
    /// # Errors
    /// `OutOfRange` if they do not lie on the device.
    pub fn new(device: Arc<dyn BlockDevice>, offset: u64, len: u64) -> Result<Self> {
        check_range(offset, len, device.size())?;
        Ok(Self { device, offset, len })
    }

    fn locate(&self, offset: u64, len: u64) -> Result<u64> {
        check_range(offset, len, self.len)?;
        Ok(self.offset + offset)
    }
}

impl BlockDevice for Slice {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn limits(&self) -> Limits {
        self.device.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, self.locate(offset, buf.len() as u64)?)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.device.write_at(buf, self.locate(offset, buf.len() as u64)?)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.device.write_zeroes_at(self.locate(offset, len)?, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.device.discard_at(self.locate(offset, len)?, len)
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn close(&self) -> Result<()> {
        self.device.close()
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let len = max_len.min(self.len.saturating_sub(offset));
        let found = extent(&*self.device, self.locate(offset, len.max(1))?, len)?;
        Ok(LayerExtent {
            stored: found.stored,
            len: found.len,
            host_offset: found.host_offset.filter(|_| found.depth == 0),
            reads_zero: found.zero,
        })
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.device.host_storage()
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.device.reserve(self.locate(offset, len)?, len)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.device.clone_in(self.locate(offset, len)?, len, source, source_offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::mem::MemStorage;
    use crate::overlay::Overlay;
    use crate::raw::{Raw, RawOptions};

    fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
        let storage = Arc::new(MemStorage::from_bytes(bytes));
        Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
    }

    #[test]
    fn a_window_shows_and_changes_its_part_only() {
        let whole = disk((0..200).collect());
        let part = Slice::new(Arc::clone(&whole), 50, 100).unwrap();
        let mut buf = [0; 3];
        part.read_at(&mut buf, 97).unwrap();
        assert_eq!(buf, [147, 148, 149]);
        part.write_at(&[1, 2], 0).unwrap();
        part.write_zeroes_at(98, 2, ZeroMode::UNMAP).unwrap();
        let mut all = [0; 200];
        whole.read_at(&mut all, 0).unwrap();
        assert_eq!((all[49], all[50], all[51], all[52]), (49, 1, 2, 52));
        assert_eq!((all[147], all[148], all[149], all[150]), (147, 0, 0, 150));
    }

    #[test]
    fn nothing_outside_the_window_can_be_reached() {
        let whole = disk(vec![0; 200]);
        let part = Slice::new(Arc::clone(&whole), 50, 100).unwrap();
        for (offset, len) in [(100, 1), (99, 2), (u64::MAX, 1), (u64::MAX - 10, 11)] {
            let mut buf = vec![0; usize::try_from(len).unwrap()];
            assert_eq!(part.read_at(&mut buf, offset).unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(part.write_at(&buf, offset).unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(part.discard_at(offset, len).unwrap_err().kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(part.layer_extent(100, 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        Slice::new(Arc::clone(&whole), 150, 51).unwrap_err();
        Slice::new(whole, u64::MAX, 2).unwrap_err();
    }

    #[test]
    fn places_are_told_only_in_the_layer_that_the_slice_names() {
        let base = disk(vec![1; 4096]);
        let top = Arc::new(Overlay::new(base, Arc::new(MemStorage::new()), 512).unwrap());
        top.write_at(&[2; 512], 512).unwrap();
        let part = Slice::new(top, 512, 1024).unwrap();
        let own = part.layer_extent(0, 1024).unwrap();
        assert_eq!((own.len, own.host_offset), (512, Some(0)));
        let below = part.layer_extent(512, 512).unwrap();
        assert_eq!((below.stored, below.len, below.host_offset), (crate::Stored::Data, 512, None));
    }
}
