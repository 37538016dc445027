//! A disk that counts what is done to it, for engines that do not see the guest's requests themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use block::{BlockDevice, LayerExtent, Limits, Preallocation, Result, Storage, ZeroMode};

use crate::engine::{DiskActivity, ReadWatch};

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Counts requests on their way to a device.
#[derive(Debug)]
pub struct Counted {
    device: Arc<dyn BlockDevice>,
    activity: Mutex<DiskActivity>,
    reads: Option<ReadWatch>,
    /// Reads are told.
    telling: AtomicBool,
}

impl Counted {
    /// Counts from 0.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, activity: Mutex::default(), reads: None, telling: AtomicBool::new(true) }
    }

    /// The same, with somebody who is told of every read.
    #[must_use]
    pub fn watched_by(self, reads: ReadWatch) -> Self {
        Self { reads: Some(reads), ..self }
    }

    /// Nothing is told before the first [`reset`](Self::reset).
    #[must_use]
    pub fn from_reset(self) -> Self {
        Self { telling: AtomicBool::new(false), ..self }
    }

    /// What has been counted.
    pub fn activity(&self) -> DiskActivity {
        self.activity.lock().clone()
    }

    /// Begins anew.
    pub fn reset(&self) {
        *self.activity.lock() = DiskActivity::default();
        self.telling.store(true, Ordering::Relaxed);
    }

    fn count(&self, what: &str, result: &Result<()>, add: impl FnOnce(&mut DiskActivity)) {
        let mut activity = self.activity.lock();
        add(&mut activity);
        if let Err(error) = result {
            activity.errors += 1;
            if activity.first_error.is_none() {
                activity.first_error = Some(format!("{what}: {error}"));
            }
        }
    }

    fn count_write(&self, what: &str, result: &Result<()>, offset: u64, len: u64) {
        self.count(what, result, |activity| {
            activity.writes += 1;
            activity.written_bytes = activity.written_bytes.saturating_add(len);
            extend(&mut activity.sectors_written, offset, len);
        });
    }
}

/// Widens a range of sectors so that it holds these bytes.
fn extend(range: &mut Option<(u64, u64)>, offset: u64, len: u64) {
    let (first, last) = (offset / SECTOR, offset.saturating_add(len.max(1) - 1) / SECTOR);
    *range = Some(range.map_or((first, last), |(low, high)| (low.min(first), high.max(last))));
}

impl BlockDevice for Counted {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn limits(&self) -> Limits {
        self.device.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        if let Some(reads) = self.reads.as_ref().filter(|_| self.telling.load(Ordering::Relaxed)) {
            reads.tell(offset / SECTOR, len.div_ceil(SECTOR));
        }
        let result = self.device.read_at(buf, offset);
        self.count("read", &result, |activity| {
            activity.reads += 1;
            activity.read_bytes = activity.read_bytes.saturating_add(len);
            extend(&mut activity.sectors_read, offset, len);
        });
        result
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let result = self.device.write_at(buf, offset);
        self.count_write("write", &result, offset, buf.len() as u64);
        result
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let result = self.device.write_zeroes_at(offset, len, mode);
        self.count_write("write of zeros", &result, offset, len);
        result
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        let result = self.device.discard_at(offset, len);
        self.count("discard", &result, |activity| activity.discards += 1);
        result
    }

    fn flush(&self) -> Result<()> {
        let result = self.device.flush();
        self.count("flush", &result, |activity| activity.flushes += 1);
        result
    }

    fn close(&self) -> Result<()> {
        self.device.close()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.device.resize(size, preallocation)
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.device.layer_extent(offset, max_len)
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.device.backing()
    }

    /// None: what is read around this device would not be counted.
    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    #[test]
    fn everything_is_counted() {
        let storage = Arc::new(MemStorage::from_bytes(vec![0; 64 << 10]));
        let disk = Counted::new(Arc::new(Raw::open(storage, RawOptions::default()).unwrap()));
        let mut buf = [0; 1024];
        disk.read_at(&mut buf, 512).unwrap();
        disk.read_at(&mut buf, 8192).unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        disk.write_zeroes_at(4096, 4096, ZeroMode::UNMAP).unwrap();
        disk.flush().unwrap();
        disk.discard_at(0, 512).unwrap();
        disk.read_at(&mut buf, 1 << 20).unwrap_err();
        let seen = disk.activity();
        assert_eq!((seen.reads, seen.read_bytes, seen.sectors_read), (3, 3072, Some((1, 2049))));
        assert_eq!((seen.writes, seen.written_bytes, seen.sectors_written), (2, 4608, Some((0, 15))));
        assert_eq!((seen.flushes, seen.discards, seen.errors), (1, 1, 1));
        assert!(seen.first_error.unwrap().starts_with("read: request for 1024 bytes"));
        disk.reset();
        assert_eq!(disk.activity(), DiskActivity::default());
    }

    #[test]
    fn reads_are_told_to_the_observer() {
        #[derive(Default)]
        struct Reads(Mutex<Vec<(usize, u64, u64)>>);
        impl crate::engine::Observer for Reads {
            fn console(&self, _bytes: &[u8], _at: std::time::Instant) {}
            fn disk_read(&self, disk: usize, sector: u64, sectors: u64, _at: std::time::Instant) {
                self.0.lock().push((disk, sector, sectors));
            }
        }
        let storage = Arc::new(MemStorage::from_bytes(vec![0; 8192]));
        let seen = Arc::new(Reads::default());
        let disk = Counted::new(Arc::new(Raw::open(storage, RawOptions::default()).unwrap()))
            .watched_by(ReadWatch::new(Arc::clone(&seen) as _, 3));
        disk.read_at(&mut [0; 1024], 512).unwrap();
        disk.read_at(&mut [0; 100], 4096).unwrap();
        assert_eq!(*seen.0.lock(), [(3, 1, 2), (3, 8, 1)]);
        let disk = disk.from_reset();
        disk.read_at(&mut [0; 512], 0).unwrap();
        disk.reset();
        disk.read_at(&mut [0; 512], 512).unwrap();
        assert_eq!(seen.0.lock()[2..], [(3, 1, 1)]);
    }
}
