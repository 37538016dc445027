//! A device as file systems read it: metadata through a small cache, data straight.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::adapter::DeviceStorage;
use block::num::to_usize;
use block::pages::Pages;
use block::{BlockDevice, Result};

use crate::bytes::corrupt;

/// Bytes that are read and kept together.
const PAGE: u64 = 8 << 10;
/// Bytes of metadata that are kept.
const CACHE: u64 = 8 << 20;
/// Reads of at least this many bytes are data, and not kept.
const DIRECT: usize = 64 << 10;
/// The most bytes that are read into memory at once.
const MOST: u64 = 16 << 20;

/// A device and the cache in front of it.
#[derive(Debug)]
pub(crate) struct Source {
    storage: DeviceStorage,
    pages: Pages,
    /// Pages that have been asked for, from the cache or not.
    work: AtomicU64,
}

impl Source {
    pub(crate) fn new(device: Arc<dyn BlockDevice>) -> Self {
        let pages = Pages::new(0, device.size(), PAGE, CACHE);
        Self { storage: DeviceStorage::new(device), pages, work: AtomicU64::new(0) }
    }

    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        self.storage.device()
    }

    /// Bytes of the device.
    pub(crate) fn size(&self) -> u64 {
        self.pages.end()
    }

    /// How much has been read, in pages: a measure of time that does not depend on the machine.
    pub(crate) fn work(&self) -> u64 {
        self.work.load(Ordering::Relaxed)
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size()) {
            let (len, size) = (buf.len(), self.size());
            return Err(corrupt(format!(
                "the file system refers to {len} bytes at {offset:#x}, but its device ends at {size:#x}"
            )));
        }
        self.work.fetch_add(1 + buf.len() as u64 / PAGE, Ordering::Relaxed);
        if buf.len() >= DIRECT {
            return self.device().read_at(buf, offset);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let len = to_usize(PAGE - at % PAGE).min(buf.len() - done);
            self.pages.read(&self.storage, &mut buf[done..done + len], at)?;
            done += len;
        }
        Ok(())
    }

    /// `len` bytes at `offset`.
    pub(crate) fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        if len > MOST || len > self.size() {
            return Err(corrupt(format!("the file system has a structure of {len} bytes at {offset:#x}")));
        }
        let mut bytes = vec![0; to_usize(len)];
        self.read(&mut bytes, offset)?;
        Ok(bytes)
    }
}
