//! A limit on bytes per second, shared by all workers.

use std::time::{Duration, Instant};

use block::Result;
use parking_lot::Mutex;

/// Longest single sleep, so that a cancelled operation ends soon.
const SLICE: Duration = Duration::from_millis(50);

/// Lets bytes through at a given rate: every request reserves the next free time span and waits for its start.
#[derive(Debug)]
pub(crate) struct RateLimit {
    bytes_per_second: u64,
    free_from: Mutex<Instant>,
}

impl RateLimit {
    /// At most `bytes_per_second` (0 counts as 1).
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_from: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may pass. `check` is asked between short sleeps.
    ///
    /// # Errors
    /// What `check` returned.
    pub(crate) fn pass(&self, bytes: u64, check: impl Fn() -> Result<()>) -> Result<()> {
        let start = self.reserve(bytes);
        loop {
            let left = start.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            check()?;
            std::thread::sleep(left.min(SLICE));
        }
    }

    /// When `bytes` may pass.
    fn reserve(&self, bytes: u64) -> Instant {
        let span = self.span(bytes);
        let mut free_from = self.free_from.lock();
        let start = (*free_from).max(Instant::now());
        // A span beyond what the clock can express would be centuries: stay where we are.
        *free_from = start.checked_add(span).unwrap_or(start);
        start
    }

    /// How long `bytes` take.
    fn span(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time() {
        let limit = RateLimit::new(1000);
        let start = Instant::now();
        for _ in 0..5 {
            limit.pass(30, || Ok(())).unwrap();
        }
        // Four spans of 30 ms have passed before the fifth request starts.
        assert!(start.elapsed() >= Duration::from_millis(119), "{:?}", start.elapsed());
    }

    #[test]
    fn waiting_can_be_interrupted() {
        let limit = RateLimit::new(1);
        limit.pass(1 << 40, || Ok(())).unwrap();
        assert!(limit.pass(1, || Err(crate::progress::cancelled())).is_err());
    }

    #[test]
    fn absurd_rates_do_not_overflow() {
        let limit = RateLimit::new(0);
        limit.pass(u64::MAX, || Ok(())).unwrap();
        RateLimit::new(u64::MAX).pass(u64::MAX, || Ok(())).unwrap();
    }
}
