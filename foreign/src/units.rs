//! Unpacked chunks, kept for the next request.
//!
//! Unpacking happens outside the lock, each chunk by one thread at a time: whoever wants the same chunk waits for it,
//! everybody else goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use block::Result;
use parking_lot::Mutex;

/// Bytes of unpacked chunks that are kept (one chunk is kept whatever its size).
const MOST_BYTES: usize = 32 << 20;

/// The chunks unpacked last.
#[derive(Debug, Default)]
pub(crate) struct Units {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    units: HashMap<u64, Arc<Unit>>,
    /// Those that are unpacked, oldest first, with their lengths.
    order: VecDeque<(u64, usize)>,
    bytes: usize,
}

/// A chunk that is being unpacked or has been.
#[derive(Debug, Default)]
struct Unit {
    bytes: Mutex<Option<Arc<[u8]>>>,
}

impl Units {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The chunk `unit`, which `unpack` makes if it is not there.
    ///
    /// # Errors
    /// What `unpack` says; the next one who asks tries again.
    pub(crate) fn get(&self, unit: u64, unpack: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<[u8]>> {
        let slot = Arc::clone(self.kept.lock().units.entry(unit).or_default());
        let mut bytes = slot.bytes.lock();
        if let Some(bytes) = &*bytes {
            return Ok(Arc::clone(bytes));
        }
        match unpack() {
            Ok(unpacked) => {
                let unpacked: Arc<[u8]> = unpacked.into();
                *bytes = Some(Arc::clone(&unpacked));
                self.kept.lock().count(unit, unpacked.len());
                Ok(unpacked)
            }
            Err(error) => {
                self.kept.lock().units.remove(&unit);
                Err(error)
            }
        }
    }
}

impl Kept {
    /// Counts a chunk that is there now, and lets the oldest go.
    fn count(&mut self, unit: u64, len: usize) {
        self.order.push_back((unit, len));
        self.bytes += len;
        while self.bytes > MOST_BYTES && self.order.len() > 1 {
            if let Some((oldest, len)) = self.order.pop_front() {
                self.units.remove(&oldest);
                self.bytes -= len;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Error;

    #[test]
    fn chunks_are_unpacked_once_and_forgotten_in_time() {
        let units = Units::new();
        let mut calls = 0;
        for _ in 0..3 {
            units
                .get(7, || {
                    calls += 1;
                    Ok(vec![7; 1 << 20])
                })
                .unwrap();
        }
        assert_eq!(calls, 1);
        units.get(8, || Err(Error::invalid("broken"))).unwrap_err();
        for unit in 10..60 {
            units.get(unit, || Ok(vec![1; 1 << 20])).unwrap();
        }
        let kept = units.kept.lock();
        assert!(kept.bytes <= MOST_BYTES && kept.units.len() == kept.order.len());
        assert!(!kept.units.contains_key(&7) && kept.units.contains_key(&59));
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let units = Units::new();
        units.get(1, || Err(Error::invalid("broken"))).unwrap_err();
        assert_eq!(*units.get(1, || Ok(vec![3])).unwrap(), [3]);
    }
}
