//! Changes of metadata that have been made but not written.
//!
//! ```text
//!   current   what the operation under way has changed     abandon: gone    accept: joins `staged`
//!   staged    what finished operations have changed        write: goes to the device
//!   clean     what the device holds
//! ```
//!
//! So an operation that fails half-way has changed nothing, and nobody sees a file system on the device that is being
//! changed: until it is synced, it is what it was.

use std::collections::HashMap;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Result};

use crate::bytes::corrupt;

/// Bytes of unchanged units that are kept.
const MOST_CLEAN: u64 = 16 << 20;
/// The most bytes that are written at once.
const MOST_WRITE: usize = 1 << 20;

type Units = HashMap<u64, Arc<Vec<u8>>>;

/// A device in units (blocks or sectors), with changes in memory.
#[derive(Debug)]
pub(crate) struct Staged {
    device: Arc<dyn BlockDevice>,
    unit: u64,
    count: u64,
    clean: Units,
    staged: Units,
    current: Units,
}

impl Staged {
    /// `unit` is in bytes, and not zero.
    pub(crate) fn new(device: Arc<dyn BlockDevice>, unit: u64) -> Self {
        let count = device.size() / unit;
        Self { device, unit, count, clean: Units::new(), staged: Units::new(), current: Units::new() }
    }

    /// The device under it.
    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    fn offset(&self, number: u64, count: u64) -> Result<u64> {
        let end = number.checked_add(count).filter(|end| *end <= self.count);
        end.and_then(|_| number.checked_mul(self.unit)).ok_or_else(|| {
            corrupt(format!(
                "the file system refers to block {number:#x}, but its device has {:#x} of {} bytes",
                self.count, self.unit
            ))
        })
    }

    /// A unit as it is now.
    pub(crate) fn get(&mut self, number: u64) -> Result<Arc<Vec<u8>>> {
        let known = self.current.get(&number).or_else(|| self.staged.get(&number));
        if let Some(known) = known.or_else(|| self.clean.get(&number)) {
            return Ok(Arc::clone(known));
        }
        let mut bytes = vec![0; to_usize(self.unit)];
        self.device.read_at(&mut bytes, self.offset(number, 1)?)?;
        let bytes = Arc::new(bytes);
        if self.clean.len() as u64 * self.unit >= MOST_CLEAN {
            self.clean.clear();
        }
        self.clean.insert(number, Arc::clone(&bytes));
        Ok(bytes)
    }

    /// A unit, to be changed by the operation under way.
    pub(crate) fn edit(&mut self, number: u64) -> Result<&mut Vec<u8>> {
        let now = self.get(number)?;
        Ok(Arc::make_mut(self.current.entry(number).or_insert(now)))
    }

    /// Gives a unit these contents, whatever it held.
    pub(crate) fn put(&mut self, number: u64, bytes: Vec<u8>) -> Result<()> {
        self.offset(number, 1)?;
        self.current.insert(number, Arc::new(bytes));
        Ok(())
    }

    /// Writes contents of files straight to the device: to units that nobody else looks at.
    pub(crate) fn write_through(&mut self, number: u64, bytes: &[u8]) -> Result<()> {
        let count = (bytes.len() as u64).div_ceil(self.unit);
        let offset = self.offset(number, count)?;
        if !self.clean.is_empty() {
            (number..number + count).for_each(|unit| drop(self.clean.remove(&unit)));
        }
        self.device.write_at(bytes, offset)
    }

    /// Reads contents of files straight from the device.
    pub(crate) fn read_through(&self, number: u64, within: u64, buf: &mut [u8]) -> Result<()> {
        let count = (within + buf.len() as u64).div_ceil(self.unit);
        self.device.read_at(buf, self.offset(number, count)? + within)
    }

    /// The operation is done.
    pub(crate) fn accept(&mut self) {
        for (number, bytes) in self.current.drain() {
            self.clean.remove(&number);
            self.staged.insert(number, bytes);
        }
    }

    /// The operation failed: what it changed is forgotten.
    pub(crate) fn abandon(&mut self) {
        self.current.clear();
    }

    /// Bytes of changes that wait for being written.
    pub(crate) fn waiting(&self) -> u64 {
        self.staged.len() as u64 * self.unit
    }

    /// Writes the changed units that are picked, in order of their place, neighbours together.
    pub(crate) fn write(&mut self, pick: impl Fn(u64) -> bool) -> Result<()> {
        let mut numbers: Vec<_> = self.staged.keys().copied().filter(|number| pick(*number)).collect();
        numbers.sort_unstable();
        let most = (MOST_WRITE / to_usize(self.unit)).max(1);
        let mut rest = &numbers[..];
        while let Some(first) = rest.first() {
            let run = (*first..).zip(rest).take_while(|(wanted, number)| wanted == *number).count().min(most);
            let (now, later) = rest.split_at(run);
            let bytes: Vec<u8> = now
                .iter()
                .filter_map(|number| self.staged.get(number))
                .flat_map(|unit| unit.iter().copied())
                .collect();
            self.device.write_at(&bytes, self.offset(*first, run as u64)?)?;
            rest = later;
        }
        for number in numbers {
            if let Some(bytes) = self.staged.remove(&number) {
                self.clean.insert(number, bytes);
            }
        }
        Ok(())
    }

    /// Makes what has been written durable.
    pub(crate) fn flush(&self) -> Result<()> {
        self.device.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    fn staged() -> Staged {
        let storage = Arc::new(MemStorage::from_bytes((0..64).collect()));
        Staged::new(Arc::new(Raw::open(storage, RawOptions::default()).unwrap()), 8)
    }

    fn on_device(staged: &Staged, unit: u64) -> u8 {
        let mut byte = [0];
        staged.device.read_at(&mut byte, unit * 8).unwrap();
        byte[0]
    }

    #[test]
    fn an_abandoned_operation_leaves_the_ones_before() {
        let mut staged = staged();
        staged.edit(1).unwrap()[0] = 100;
        staged.accept();
        staged.edit(1).unwrap()[0] = 200;
        staged.put(2, vec![7; 8]).unwrap();
        staged.abandon();
        assert_eq!(
            (staged.get(1).unwrap()[0], staged.get(2).unwrap()[0], on_device(&staged, 1)),
            (100, 16, 8)
        );
    }

    #[test]
    fn writing_picks() {
        let mut staged = staged();
        for unit in [1, 2, 3, 5] {
            staged.edit(unit).unwrap()[0] = 99;
        }
        staged.accept();
        staged.write(|unit| unit != 2).unwrap();
        assert_eq!([1, 2, 3, 5].map(|unit| on_device(&staged, unit)), [99, 16, 99, 99]);
        assert_eq!(staged.waiting(), 8);
        assert!(staged.get(8).is_err() && staged.put(8, vec![]).is_err());
    }
}
