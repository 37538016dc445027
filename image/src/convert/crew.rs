//! What every operation has in common that takes a disk apart, has threads work on the pieces, and lets some of what
//! they do take effect in order: the loop, the first error, and the end.

use block::{Error, Result};
use parking_lot::Mutex;

use super::turns::Turns;
use super::workers;
use crate::progress::Meter;

/// A part of a disk.
pub(crate) trait Piece: Send {
    /// Its number: 0, 1, 2.. in the order of offsets.
    fn ticket(&self) -> u64;
    /// Its first byte.
    fn offset(&self) -> u64;
    /// Its length in bytes.
    fn len(&self) -> u64;
}

/// The pieces of a disk, one after the other.
pub(crate) trait Pieces: Send {
    /// One of them.
    type Piece: Piece;

    /// The next one; `None` at the end.
    ///
    /// # Errors
    /// It cannot be found out what is next.
    fn next(&mut self) -> Result<Option<Self::Piece>>;

    /// Where the next one begins, or what stands in its way.
    fn position(&self) -> u64;

    /// Bytes that have been passed over since this was last asked.
    fn take_skipped(&mut self) -> u64;
}

/// Threads that take pieces until there are none, or one of them fails.
pub(crate) struct Crew<'a, P> {
    pieces: Mutex<P>,
    turns: Turns,
    meter: Meter<'a>,
    /// What is passed over counts as done.
    count_skipped: bool,
    failure: Mutex<Option<(u64, Error)>>,
}

/// Ends the work when a thread panics, so that the others do not wait for its turn for ever.
struct AbortOnPanic<'a>(&'a Turns);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort();
        }
    }
}

impl<'a, P: Pieces> Crew<'a, P> {
    /// Of which nobody has begun yet.
    pub(crate) fn new(pieces: P, meter: Meter<'a>, count_skipped: bool) -> Self {
        let (turns, failure) = (Turns::default(), Mutex::default());
        Self { pieces: Mutex::new(pieces), turns, meter, count_skipped, failure }
    }

    /// Works with `threads` threads, this one included. Each makes itself a `scratch` when it has something to do.
    ///
    /// # Errors
    /// The first in the order of offsets of those that were met; `Cancelled`.
    pub(crate) fn run<S>(
        &self,
        threads: usize,
        scratch: impl Fn() -> S + Sync,
        perform: impl Fn(&P::Piece, &mut S) -> Result<()> + Sync,
    ) -> Result<()> {
        let ended = workers::run(threads, || {
            let _guard = AbortOnPanic(&self.turns);
            let mut own = None;
            while let Some(piece) = self.next() {
                match perform(&piece, own.get_or_insert_with(&scratch)) {
                    Ok(()) => self.meter.add(piece.len()),
                    Err(error) => self.fail(piece.offset(), error),
                }
            }
        });
        if let Some((_, error)) = self.failure.lock().take() {
            return Err(error);
        }
        ended?;
        self.meter.finish();
        Ok(())
    }

    fn next(&self) -> Option<P::Piece> {
        if self.turns.is_aborted() {
            return None;
        }
        let mut pieces = self.pieces.lock();
        let next = self.meter.check().and_then(|()| pieces.next());
        let (skipped, position) = (pieces.take_skipped(), pieces.position());
        drop(pieces);
        if self.count_skipped && skipped > 0 {
            self.meter.add(skipped);
        }
        next.unwrap_or_else(|error| {
            self.fail(position, error);
            None
        })
    }

    /// Remembers the error that stands nearest to the start of the disk and stops everybody.
    fn fail(&self, offset: u64, error: Error) {
        let mut failure = self.failure.lock();
        if failure.as_ref().is_none_or(|(before, _)| offset < *before) {
            *failure = Some((offset, error));
        }
        drop(failure);
        self.turns.abort();
    }

    /// Does `act` when it is the piece's turn; nothing if the work has been aborted.
    ///
    /// # Errors
    /// What `act` says.
    pub(crate) fn in_turn(&self, piece: &P::Piece, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(turn) = self.turns.wait(piece.ticket()) else { return Ok(()) };
        let result = act();
        if result.is_err() {
            // Before the next in line gets its turn.
            self.turns.abort();
        }
        drop(turn);
        result
    }

    /// Whether something has failed.
    pub(crate) fn is_aborted(&self) -> bool {
        self.turns.is_aborted()
    }

    /// Fails if the caller wants to stop.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(crate) fn check(&self) -> Result<()> {
        self.meter.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Quiet;

    #[derive(Debug, Clone, Copy)]
    struct Number(u64);

    impl Piece for Number {
        fn ticket(&self) -> u64 {
            self.0
        }

        fn offset(&self) -> u64 {
            self.0 * 10
        }

        fn len(&self) -> u64 {
            10
        }
    }

    struct Numbers(std::ops::Range<u64>);

    impl Pieces for Numbers {
        type Piece = Number;

        fn next(&mut self) -> Result<Option<Number>> {
            Ok(self.0.next().map(Number))
        }

        fn position(&self) -> u64 {
            self.0.start * 10
        }

        fn take_skipped(&mut self) -> u64 {
            0
        }
    }

    #[test]
    fn pieces_take_effect_in_order() {
        let crew = Crew::new(Numbers(0..200), Meter::new(&Quiet, 2000), false);
        let seen = Mutex::new(vec![]);
        let perform = |piece: &Number, _: &mut ()| {
            crew.in_turn(piece, || {
                seen.lock().push(piece.0);
                Ok(())
            })
        };
        crew.run(4, || (), perform).unwrap();
        assert_eq!(*seen.lock(), (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_in_the_order_of_offsets_ends_it() {
        let crew = Crew::new(Numbers(0..u64::MAX / 10), Meter::new(&Quiet, 10), false);
        let perform = |piece: &Number, _: &mut ()| {
            crew.in_turn(piece, || match piece.0 {
                0..50 => Ok(()),
                number => Err(Error::usage(format!("{number}"))),
            })
        };
        assert_eq!(crew.run(4, || (), perform).unwrap_err().to_string(), "50");
        assert!(crew.is_aborted());
    }
}
