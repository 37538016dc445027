//! A container whose operations fail when and where a test wants.

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::device::ZeroMode;
use crate::error::Result;
use crate::storage::{HostExtent, Storage};

/// What is done to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Writing zeros.
    Zero,
    /// Discarding.
    Discard,
    /// Taking space.
    Allocate,
    /// Changing the length.
    SetLen,
    /// Syncing.
    Sync,
    /// Asking for holes.
    Extent,
}

impl Operation {
    /// Whether it changes the container.
    pub const fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Extent)
    }
}

/// A rule for failing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Only these operations count and fail; empty: all.
    pub operations: Vec<Operation>,
    /// Only if they touch these bytes.
    pub range: Range<u64>,
    /// How many such operations succeed before.
    pub skip: u64,
    /// How many fail then.
    pub times: u64,
    /// What the host says.
    pub errno: Errno,
    /// Whether a write that fails has written its first half.
    pub torn: bool,
}

impl Fault {
    /// Every operation fails with `errno` from now on.
    pub fn always(errno: Errno) -> Self {
        Self { operations: vec![], range: 0..u64::MAX, skip: 0, times: u64::MAX, errno, torn: false }
    }

    /// Only the `n`-th operation from now (counted from 0) fails.
    pub fn nth(n: u64, errno: Errno) -> Self {
        Self { skip: n, times: 1, ..Self::always(errno) }
    }

    /// All operations from the `n`-th on fail.
    pub fn from_nth(n: u64, errno: Errno) -> Self {
        Self { skip: n, ..Self::always(errno) }
    }

    /// The same for these operations only.
    #[must_use]
    pub fn on(self, operations: &[Operation]) -> Self {
        Self { operations: operations.to_vec(), ..self }
    }

    /// The same for operations that change the container.
    #[must_use]
    pub fn on_changes(self) -> Self {
        use Operation::{Allocate, Discard, SetLen, Sync, Write, Zero};
        self.on(&[Write, Zero, Discard, Allocate, SetLen, Sync])
    }

    /// The same for operations that touch these bytes only (a sync touches all, a change of
    /// length the last byte that will be).
    #[must_use]
    pub fn at(self, range: Range<u64>) -> Self {
        Self { range, ..self }
    }

    /// The same, leaving half of a write behind.
    #[must_use]
    pub fn torn(self) -> Self {
        Self { torn: true, ..self }
    }

    /// Whether the operation is one to count, and if so whether it fails.
    fn strikes(&mut self, operation: Operation, touched: &Range<u64>) -> bool {
        let listed = self.operations.is_empty() || self.operations.contains(&operation);
        let inside = touched.start < self.range.end && self.range.start < touched.end;
        if !listed || !inside {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let strikes = self.times > 0;
        self.times = self.times.saturating_sub(1);
        strikes
    }
}

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    counts: Vec<(Operation, u64)>,
    /// Bytes that the host has room for.
    room: Option<u64>,
}

/// A container that passes everything on to another and fails by rules. Has no descriptor, so that nothing
/// goes around it.
#[derive(Debug)]
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    plan: Mutex<Plan>,
}

impl FaultStorage {
    /// Without rules, over `inner`.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, plan: Mutex::default() }
    }

    /// Adds a rule.
    pub fn fail(&self, fault: Fault) {
        self.plan.lock().faults.push(fault);
    }

    /// Lets everything that would reach past `len` bytes fail with `ENOSPC`.
    pub fn limit_room(&self, len: u64) {
        self.plan.lock().room = Some(len);
    }

    /// Ends all failing.
    pub fn heal(&self) {
        let mut plan = self.plan.lock();
        plan.faults.clear();
        plan.room = None;
    }

    /// How often an operation was asked for, failed ones included.
    pub fn count(&self, operation: Operation) -> u64 {
        self.plan
            .lock()
            .counts
            .iter()
            .find(|(counted, _)| *counted == operation)
            .map_or(0, |&(_, count)| count)
    }

    /// How many operations were asked for, failed ones included.
    pub fn total(&self) -> u64 {
        self.plan.lock().counts.iter().map(|(_, count)| count).sum()
    }

    /// Counts an operation; fails with the host's error and whether half of it happens.
    fn enter(&self, operation: Operation, touched: Range<u64>) -> std::result::Result<(), (Errno, bool)> {
        let mut plan = self.plan.lock();
        match plan.counts.iter_mut().find(|(counted, _)| *counted == operation) {
            Some((_, count)) => *count += 1,
            None => plan.counts.push((operation, 1)),
        }
        // Every rule counts, even if an earlier one strikes.
        let mut struck = None;
        for fault in &mut plan.faults {
            if fault.strikes(operation, &touched) && struck.is_none() {
                struck = Some((fault.errno, fault.torn));
            }
        }
        let grows =
            matches!(operation, Operation::Write | Operation::Zero | Operation::Allocate | Operation::SetLen);
        let full = grows && plan.room.is_some_and(|room| touched.end > room);
        match struck {
            Some(failure) => Err(failure),
            None if full => Err((Errno::ENOSPC, false)),
            None => Ok(()),
        }
    }

    fn check(&self, operation: Operation, touched: Range<u64>) -> Result<()> {
        Ok(self.enter(operation, touched).map_err(|(errno, _)| errno)?)
    }
}

/// The bytes of a request; at least one, so that empty requests have a place too.
fn touched(offset: u64, len: u64) -> Range<u64> {
    offset..offset.saturating_add(len.max(1))
}

impl Storage for FaultStorage {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check(Operation::SetLen, len.saturating_sub(1)..len.max(1))?;
        self.inner.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Operation::Read, touched(offset, buf.len() as u64))?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if let Err((errno, torn)) = self.enter(Operation::Write, touched(offset, buf.len() as u64)) {
            if torn {
                self.inner.write_at(&buf[..buf.len() / 2], offset)?;
            }
            return Err(errno.into());
        }
        self.inner.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check(Operation::Zero, touched(offset, len))?;
        self.inner.zero_range(offset, len, mode)
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::Discard, touched(offset, len))?;
        self.inner.discard_range(offset, len)
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::Allocate, touched(offset, len))?;
        self.inner.allocate_range(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.check(Operation::Sync, 0..u64::MAX)?;
        self.inner.sync()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        self.check(Operation::Extent, touched(offset, max_len))?;
        self.inner.extent(offset, max_len)
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn fixed_len(&self) -> bool {
        self.inner.fixed_len()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn name(&self) -> String {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::mem::MemStorage;

    fn storage() -> (Arc<MemStorage>, FaultStorage) {
        let memory = Arc::new(MemStorage::from_bytes(vec![1; 1024]));
        (Arc::clone(&memory), FaultStorage::new(memory))
    }

    #[test]
    fn only_the_nth_fails() {
        let (_, storage) = storage();
        storage.fail(Fault::nth(1, Errno::EIO).on(&[Operation::Write]));
        storage.write_at(&[2], 0).unwrap();
        storage.read_at(&mut [0], 0).unwrap();
        assert_eq!(storage.write_at(&[2], 0).unwrap_err().message(), "Input/output error");
        storage.write_at(&[2], 0).unwrap();
        assert_eq!((storage.count(Operation::Write), storage.total()), (3, 4));
    }

    #[test]
    fn places_room_and_torn_writes() {
        let (memory, storage) = storage();
        storage.fail(Fault::always(Errno::EIO).at(100..200).torn());
        storage.write_at(&[2; 100], 0).unwrap();
        storage.write_at(&[2; 10], 96).unwrap_err();
        assert_eq!(memory.to_bytes()[95..102], [2, 2, 2, 2, 2, 2, 1]);
        storage.read_at(&mut [0; 10], 199).unwrap_err();
        storage.read_at(&mut [0; 10], 200).unwrap();
        storage.limit_room(1024);
        storage.write_at(&[3; 24], 1000).unwrap();
        assert_eq!(storage.write_at(&[3; 25], 1000).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(storage.set_len(1025).unwrap_err().kind(), ErrorKind::NoSpace);
        storage.heal();
        storage.set_len(1025).unwrap();
        storage.read_at(&mut [0; 10], 100).unwrap();
    }
}
