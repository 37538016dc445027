//! A part of a file as a file of its own.

use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, HostExtent, Result, Storage};

use super::Gzip;

/// Some consecutive bytes of a storage, read-only.
#[derive(Debug)]
pub struct Window {
    storage: Arc<dyn Storage>,
    /// The same storage, if nobody knows where it ends before it has been inflated.
    gzip: Option<Arc<Gzip>>,
    offset: u64,
    len: u64,
    name: String,
}

impl Window {
    /// The `len` bytes of `storage` at `offset`, which have to be there, called `name` within it.
    pub fn new(storage: Arc<dyn Storage>, offset: u64, len: u64, name: &str) -> Self {
        let name = format!("{}:{name}", storage.name());
        Self { storage, gzip: None, offset, len, name }
    }

    /// The same of what a gzip stream inflates to. If that turns out to end before the window does, reading what is
    /// missing fails.
    pub fn of_gzip(gzip: Arc<Gzip>, offset: u64, len: u64, name: &str) -> Self {
        let storage: Arc<dyn Storage> = Arc::clone(&gzip) as _;
        Self { gzip: Some(gzip), ..Self::new(storage, offset, len, name) }
    }

    /// Reads bytes of the window.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(gzip) = &self.gzip else { return self.storage.read_at(buf, offset) };
        let found = gzip.read(buf, offset)?;
        if found < buf.len() {
            let message = format!(
                "'{}' goes past the end of the archive (which inflates to {:#x} bytes)",
                self.name,
                gzip.len()?
            );
            return Err(Error::new(ErrorKind::Truncated, message));
        }
        Ok(())
    }
}

impl Storage for Window {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = to_usize(self.len.saturating_sub(offset).min(buf.len() as u64));
        let (head, tail) = buf.split_at_mut(there);
        tail.fill(0);
        if head.is_empty() { Ok(()) } else { self.read(head, self.offset + offset) }
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        let there = self.len.saturating_sub(offset).min(max_len);
        if there == 0 {
            return Ok(HostExtent { data: false, len: max_len });
        }
        self.storage.extent(self.offset + offset, there)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.len))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
