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

    /// Waits until the machine ends, or until somebody calls for attention (`None`).
    pub fn wait_or_attention(&self) -> Option<Ending> {
        let mut slot = self.ending.lock();
        while slot.is_none() && !self.attention.swap(false, Ordering::AcqRel) {
            self.changed.wait(&mut slot);
        }
        slot.clone()
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
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let power = Power::default();
        assert_eq!(power.wait_for(Duration::from_millis(1)), None);
        power.end(Ending::PowerOff);
        power.end(Ending::TripleFault);
        assert!(power.is_off());
        assert_eq!(power.wait_or_attention(), Some(Ending::PowerOff));
    }

    #[test]
    fn attention_wakes_once() {
        let power = Power::default();
        power.call_attention();
        assert_eq!(power.wait_or_attention(), None);
        power.end(Ending::PowerOff);
        assert_eq!(power.wait_or_attention(), Some(Ending::PowerOff));
    }
}
