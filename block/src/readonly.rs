//! A disk that cannot be written, whatever is underneath.

use std::sync::Arc;

use crate::device::{BlockDevice, LayerExtent, Limits};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// A device whose writes are refused.
#[derive(Debug)]
pub struct ReadOnly {
    device: Arc<dyn BlockDevice>,
}

impl ReadOnly {
    /// Shows `device` for reading only.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device }
    }
}

impl BlockDevice for ReadOnly {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        self.device.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.device.layer_extent(offset, max_len)
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.device.backing()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.device.host_storage()
    }

    fn reserve(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only())
    }

    fn clone_in(&self, _: u64, _: u64, _: &dyn Storage, _: u64) -> Result<bool> {
        Err(Error::read_only())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemStorage;
    use crate::raw::{Raw, RawOptions};
    use crate::{ErrorKind, Preallocation, ZeroMode};

    #[test]
    fn it_reads_and_refuses_every_change() {
        let storage = Arc::new(MemStorage::from_bytes(vec![7; 1024]));
        let raw = Raw::open(Arc::clone(&storage) as _, RawOptions::default()).unwrap();
        let device = ReadOnly::new(Arc::new(raw));
        let mut buf = [0; 2];
        device.read_at(&mut buf, 1022).unwrap();
        assert_eq!(buf, [7, 7]);
        let source = MemStorage::from_bytes(vec![1; 1024]);
        let refused = [
            device.write_at(&[1], 0),
            device.write_zeroes_at(0, 1, ZeroMode::UNMAP),
            device.discard_at(0, 1),
            device.reserve(0, 1),
            device.clone_in(0, 512, &source, 0).map(drop),
        ];
        for result in refused {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        device.resize(0, Preallocation::Off).unwrap_err();
        device.flush().unwrap();
        device.close().unwrap();
        assert_eq!(storage.to_bytes(), vec![7; 1024]);
    }
}
