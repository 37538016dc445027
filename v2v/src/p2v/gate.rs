//! A disk that can be taken away from whoever uses it: when a copy begins anew, what is left of the one before must not write
//! any more.

use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Result, ZeroMode};
use parking_lot::{RwLock, RwLockReadGuard};

/// The disk, until it is taken away.
#[derive(Debug)]
pub struct Gate {
    size: u64,
    limits: Limits,
    device: RwLock<Option<Arc<dyn BlockDevice>>>,
}

impl Gate {
    /// Shows `device`.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { size: device.size(), limits: device.limits(), device: RwLock::new(Some(device)) }
    }

    /// Takes it away, once all requests that have begun are done. `None`: it is gone already.
    pub fn shut(&self) -> Option<Arc<dyn BlockDevice>> {
        self.device.write().take()
    }

    fn with<T>(&self, act: impl FnOnce(&Arc<dyn BlockDevice>) -> Result<T>) -> Result<T> {
        let device: RwLockReadGuard<'_, _> = self.device.read();
        match &*device {
            Some(device) => act(device),
            None => Err(Error::new(ErrorKind::Permission, "this copy is over, or has begun anew")),
        }
    }
}

impl BlockDevice for Gate {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.with(|device| device.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.with(|device| device.write_at(buf, offset))
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.with(|device| device.write_zeroes_at(offset, len, mode))
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.with(|device| device.discard_at(offset, len))
    }

    fn flush(&self) -> Result<()> {
        self.with(|device| device.flush())
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.with(|device| device.reserve(offset, len))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        // Without the place: it would be used past this gate.
        self.with(|device| device.layer_extent(offset, max_len))
            .map(|extent| LayerExtent { host_offset: None, ..extent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::p2v::store::tests::device;

    #[test]
    fn nobody_gets_through_a_gate_that_is_shut() {
        let gate = Gate::new(device(vec![0; 4096]));
        gate.write_at(b"x", 7).unwrap();
        let inside = gate.shut().unwrap();
        assert_eq!(gate.write_at(b"y", 7).unwrap_err().kind(), ErrorKind::Permission);
        gate.flush().unwrap_err();
        let mut byte = [0];
        gate.read_at(&mut byte, 7).unwrap_err();
        inside.read_at(&mut byte, 7).unwrap();
        assert_eq!((&byte, gate.size()), (b"x", 4096));
        assert!(gate.shut().is_none());
    }
}
