//! A disk as a container, so that formats nest: an image inside a partition, an image behind a network.

use std::sync::Arc;

use nix::errno::Errno;

use crate::device::{BlockDevice, Preallocation, ZeroMode};
use crate::error::{Error, Result};
use crate::extent::{extent, read_backing};
use crate::storage::{HostExtent, Storage};

/// A device seen as a container of fixed length: like a block device of the host, it is full when written
/// past its end.
#[derive(Debug)]
pub struct DeviceStorage {
    device: Arc<dyn BlockDevice>,
    resizable: bool,
}

impl DeviceStorage {
    /// The bytes of `device` as a container.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, resizable: false }
    }

    /// The same, but [`resize_fixed`](Storage::resize_fixed) resizes the device.
    pub fn resizable(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, resizable: true }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// What a host device says to requests past its end.
    fn check_end(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.device.size() => Ok(()),
            _ => Err(Errno::ENOSPC.into()),
        }
    }
}

impl Storage for DeviceStorage {
    fn len(&self) -> Result<u64> {
        Ok(self.device.size())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device.read_only() {
            return Err(Error::read_only());
        }
        self.check_end(0, len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_backing(Some(&*self.device), buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_end(offset, buf.len() as u64)?;
        self.device.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_end(offset, len)?;
        self.device.write_zeroes_at(offset, len, mode)
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        let len = len.min(self.device.size().saturating_sub(offset));
        if len == 0 { Ok(()) } else { self.device.discard_at(offset, len) }
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check_end(offset, len)?;
        self.device.reserve(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.device.flush()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        if offset >= self.device.size() {
            return Ok(HostExtent { data: false, len: max_len });
        }
        let found = extent(&*self.device, offset, max_len)?;
        Ok(HostExtent { data: !found.zero, len: found.len })
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn fixed_len(&self) -> bool {
        true
    }

    fn resize_fixed(&self, len: u64) -> Result<bool> {
        if self.resizable {
            self.device.resize(len, Preallocation::Off)?;
        }
        Ok(self.resizable)
    }

    fn alignment(&self) -> u32 {
        self.device.limits().alignment
    }

    fn clone_range(&self, offset: u64, source: &dyn Storage, source_offset: u64, len: u64) -> Result<bool> {
        self.check_end(offset, len)?;
        self.device.clone_in(offset, len, source, source_offset)
    }

    fn name(&self) -> String {
        self.device.host_storage().map_or_else(|| "disk".to_owned(), |storage| storage.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::mem::MemStorage;
    use crate::raw::{Raw, RawOptions};
    use crate::slice::Slice;

    #[test]
    fn formats_nest_and_the_end_is_the_end() {
        let memory = Arc::new(MemStorage::from_bytes((0..100).collect()));
        let whole = Arc::new(Raw::open(Arc::clone(&memory) as _, RawOptions::default()).unwrap());
        let part = Arc::new(Slice::new(whole, 10, 50).unwrap());
        let storage = DeviceStorage::new(part);
        assert_eq!(storage.len().unwrap(), 50);
        let mut buf = [9; 4];
        storage.read_at(&mut buf, 48).unwrap();
        assert_eq!(buf, [58, 59, 0, 0]);
        storage.read_at(&mut buf, u64::MAX).unwrap();
        assert_eq!(buf, [0; 4]);
        for result in [
            storage.write_at(&[1; 2], 49),
            storage.zero_range(49, 2, ZeroMode::UNMAP),
            storage.set_len(51),
            storage.allocate_range(0, 51),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace);
        }
        storage.set_len(10).unwrap();
        storage.discard_range(60, 10).unwrap();
        storage.write_at(&[1, 2], 48).unwrap();
        assert_eq!(memory.to_bytes()[57..62], [57, 1, 2, 60, 61]);
        assert_eq!(storage.extent(50, 7).unwrap(), HostExtent { data: false, len: 7 });
    }
}
