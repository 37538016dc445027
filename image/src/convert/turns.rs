//! Taking turns: work done in parallel that takes effect in order.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

/// Admits the holders of tickets 0, 1, 2.. one after the other.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    now: Mutex<u64>,
    changed: Condvar,
    aborted: AtomicBool,
}

/// The right to act. Dropping it calls the next ticket.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for the turn of `ticket`. `None`: the work has been aborted.
    ///
    /// Every ticket must be used exactly once, or everything be aborted: later ones wait for it.
    pub(crate) fn wait(&self, ticket: u64) -> Option<Turn<'_>> {
        let mut now = self.now.lock();
        while *now != ticket {
            if self.is_aborted() {
                return None;
            }
            self.changed.wait(&mut now);
        }
        (!self.is_aborted()).then(|| Turn(self))
    }

    /// Sends everybody away, now and from now on.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        // Under the lock, so that nobody who has just looked at the flag falls asleep afterwards.
        let _now = self.now.lock();
        self.changed.notify_all();
    }

    /// Whether [`abort`](Self::abort) has been called.
    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.now.lock() += 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_in_order_whatever_the_threads_do() {
        let (turns, order) = (Turns::default(), Mutex::new(vec![]));
        std::thread::scope(|scope| {
            for ticket in (0..20u64).rev() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.wait(ticket);
                    order.lock().push(ticket);
                });
            }
        });
        assert_eq!(*order.lock(), (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn aborting_wakes_those_who_wait() {
        let turns = Turns::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.wait(1).is_none());
            turns.abort();
            assert!(waiting.join().unwrap());
        });
        assert!(turns.wait(0).is_none());
    }
}
