//! How a machine ends: the first reason counts, and whoever waits for it is woken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::engine::Ending;

/// The machine's power switch, shared by everything that can end it.
#[derive(Debug, Default)]
pub struct Power {
    ending: Mutex<Option<Ending>>,
    changed: Condvar,
    off: AtomicBool,
    /// Something has been transmitted that nobody has flushed yet.
    attention: AtomicBool,
}

/// What waiting came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waited {
    /// The machine has ended.
    Ended(Ending),
    /// Somebody has called.
    Attention,
    /// Nothing has happened.
    Idle,
}

impl Power {
    /// Ends the machine. Only the first call counts.
    pub fn end(&self, ending: Ending) {
        let mut slot = self.ending.lock();
        if slot.is_none() {
            *slot = Some(ending);
            self.off.store(true, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Whether it has ended.
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Acquire)
    }

    /// Wakes whoever waits in [`wait_or_attention`](Self::wait_or_attention).
    pub fn call_attention(&self) {
        let _slot = self.ending.lock();
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until the machine ends, until somebody calls for attention, or for `limit`.
    pub fn wait_or_attention(&self, limit: Duration) -> Waited {
        let deadline = Instant::now() + limit;
        let mut slot = self.ending.lock();
        loop {
            if let Some(ending) = &*slot {
                return Waited::Ended(ending.clone());
            }
            if self.attention.swap(false, Ordering::AcqRel) {
                return Waited::Attention;
            }
            if self.changed.wait_until(&mut slot, deadline).timed_out() && slot.is_none() {
                return Waited::Idle;
            }
        }
    }

    /// Waits until it ends, at most for `limit`.
    pub fn wait_for(&self, limit: Duration) -> Option<Ending> {
        let deadline = Instant::now() + limit;
        let mut slot = self.ending.lock();
        while slot.is_none() && !self.changed.wait_until(&mut slot, deadline).timed_out() {}
        slot.clone()
    }
}

#[cfg(test)]
impl Power {
    /// How it has ended, if it has.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ending.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn the_first_reason_counts() {
        let power = Power::default();
        assert_eq!(power.wait_for(SOON), None);
        power.end(Ending::PowerOff);
        power.end(Ending::TripleFault);
        assert!(power.is_off());
        assert_eq!(power.wait_or_attention(SOON), Waited::Ended(Ending::PowerOff));
    }

    #[test]
    fn attention_wakes_once() {
        let power = Power::default();
        power.call_attention();
        assert_eq!(power.wait_or_attention(SOON), Waited::Attention);
        assert_eq!(power.wait_or_attention(SOON), Waited::Idle);
        power.call_attention();
        power.end(Ending::PowerOff);
        assert_eq!(power.wait_or_attention(SOON), Waited::Ended(Ending::PowerOff));
    }
}
