//! Threads that all do the same thing until nothing is left to do.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use block::{Error, ErrorKind, Result};

/// Runs `work` on `count` threads, the caller's included, until all have returned. If the host does not give
/// that many threads, fewer have to do.
///
/// # Errors
/// One of them panicked: a defect, but no reason to hide what else there is to say.
pub(crate) fn run(count: usize, work: impl Fn() + Sync) -> Result<()> {
    let work = &work;
    let orderly = thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..count).map_while(spawn).collect();
        let here = catch_unwind(AssertUnwindSafe(work));
        // All of them have to be waited for, also after one has failed.
        let failed = others.into_iter().map(|other| other.join()).filter(thread::Result::is_err).count();
        here.is_ok() && failed == 0
    });
    match orderly {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Io, "internal error: a worker thread ended unexpectedly")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn everybody_works_and_nobody_is_left_behind() {
        let (seen, all_here) = (Mutex::new(HashSet::new()), std::sync::Barrier::new(4));
        run(4, || {
            all_here.wait();
            seen.lock().insert(thread::current().id());
        })
        .unwrap();
        assert_eq!(seen.lock().len(), 4);
        assert!(seen.lock().contains(&thread::current().id()));
    }
}
