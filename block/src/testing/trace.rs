//! A disk that records what it is asked.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::device::{BlockDevice, CompressedWriter, LayerExtent, Limits, Preallocation, ZeroMode};
use crate::error::Result;
use crate::storage::Storage;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the methods and their parameters")]
pub enum Trace {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, may_unmap: bool, no_fallback: bool },
    Discard { offset: u64, len: u64 },
    Flush,
    Close,
    Resize { size: u64 },
    Extent { offset: u64, max_len: u64 },
    Reserve { offset: u64, len: u64 },
    Clone { offset: u64, len: u64, source_offset: u64 },
}

/// Passes everything on to another device and records it.
#[derive(Debug)]
pub struct TraceDevice {
    device: Arc<dyn BlockDevice>,
    log: Mutex<Vec<Trace>>,
}

impl TraceDevice {
    /// With an empty record, over `device`.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, log: Mutex::default() }
    }

    /// What was asked since the last call, in the order of arrival.
    pub fn take(&self) -> Vec<Trace> {
        std::mem::take(&mut self.log.lock())
    }

    fn note(&self, trace: Trace) {
        self.log.lock().push(trace);
    }
}

impl BlockDevice for TraceDevice {
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
        self.note(Trace::Read { offset, len: buf.len() as u64 });
        self.device.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.note(Trace::Write { offset, len: buf.len() as u64 });
        self.device.write_at(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let ZeroMode { may_unmap, no_fallback } = mode;
        self.note(Trace::Zero { offset, len, may_unmap, no_fallback });
        self.device.write_zeroes_at(offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.note(Trace::Discard { offset, len });
        self.device.discard_at(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.note(Trace::Flush);
        self.device.flush()
    }

    fn close(&self) -> Result<()> {
        self.note(Trace::Close);
        self.device.close()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.note(Trace::Resize { size });
        self.device.resize(size, preallocation)
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.note(Trace::Extent { offset, max_len });
        self.device.layer_extent(offset, max_len)
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.device.backing()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.device.host_storage()
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.note(Trace::Reserve { offset, len });
        self.device.reserve(offset, len)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.note(Trace::Clone { offset, len, source_offset });
        (*self.device).clone_in(offset, len, source, source_offset)
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        self.device.compressed_writer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemStorage;
    use crate::raw::{Raw, RawOptions};

    #[test]
    fn requests_are_recorded_in_order_and_once() {
        let storage = Arc::new(MemStorage::from_bytes(vec![0; 64]));
        let raw = Raw::open(storage, RawOptions::default()).unwrap();
        let device = TraceDevice::new(Arc::new(raw));
        device.write_at(&[1; 3], 5).unwrap();
        device.read_at(&mut [0; 2], 60).unwrap();
        device.flush().unwrap();
        let expected = [Trace::Write { offset: 5, len: 3 }, Trace::Read { offset: 60, len: 2 }, Trace::Flush];
        assert_eq!(device.take(), expected);
        assert_eq!(device.take(), []);
    }
}
