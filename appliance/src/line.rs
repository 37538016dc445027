//! Our end of the appliance's serial line: bells are taken out, the rest is what its console says.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bootcheck::console::Lines;
use bootcheck::engine::Observer;
use parking_lot::{Condvar, Mutex};

use crate::wire::{Bell, Scanner};

/// Lines of the console that are kept.
const KEPT_LINES: usize = 40;
/// Bells that wait to be heard: there should never be more than one.
const MOST_BELLS: usize = 16;

/// What has been heard.
#[derive(Debug, Default)]
pub(crate) struct Line {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    scanner: Scanner,
    bells: VecDeque<Bell>,
    text: Lines,
    last: VecDeque<String>,
    /// Why there will be no more.
    ended: Option<String>,
}

/// What came first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    Bell(Bell),
    Ended(String),
    Nothing,
}

impl Observer for Line {
    fn console(&self, bytes: &[u8], _at: Instant) {
        let heard = &mut *self.heard.lock();
        let (bells, text, last) = (&mut heard.bells, &mut heard.text, &mut heard.last);
        let on_bell = |bell| {
            if bells.len() < MOST_BELLS {
                bells.push_back(bell);
            }
        };
        let on_noise = |noise: &[u8]| {
            text.push(noise, |line| {
                if !line.trim().is_empty() {
                    last.push_back(line.to_owned());
                }
                if last.len() > KEPT_LINES {
                    last.pop_front();
                }
            });
        };
        heard.scanner.push(bytes, on_bell, on_noise);
        self.changed.notify_all();
    }
}

impl Line {
    /// Waits for a bell for at most `wait`.
    pub(crate) fn listen(&self, wait: Duration) -> News {
        let mut heard = self.heard.lock();
        if heard.bells.is_empty() && heard.ended.is_none() {
            self.changed.wait_for(&mut heard, wait);
        }
        match (heard.bells.pop_front(), &heard.ended) {
            (Some(bell), _) => News::Bell(bell),
            (None, Some(why)) => News::Ended(why.clone()),
            (None, None) => News::Nothing,
        }
    }

    /// The machine has ended.
    pub(crate) fn end(&self, why: String) {
        self.heard.lock().ended = Some(why);
        self.changed.notify_all();
    }

    /// Why the machine has ended, if it has.
    pub(crate) fn ended(&self) -> Option<String> {
        self.heard.lock().ended.clone()
    }

    /// The last lines of the console.
    pub(crate) fn last_lines(&self, count: usize) -> Vec<String> {
        let heard = self.heard.lock();
        let partial = heard.text.partial().trim().to_owned();
        let mut lines: Vec<_> = heard.last.iter().cloned().collect();
        lines.extend((!partial.is_empty()).then_some(partial));
        lines.split_off(lines.len().saturating_sub(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bells_are_heard_among_the_kernels_words() {
        let line = Line::default();
        let bell = Bell { id: 7, status: 0, len: 12, crc: 99 };
        line.console(b"[ 0.1] hello\r\n\x01vim", Instant::now());
        assert_eq!(line.listen(Duration::ZERO), News::Nothing);
        let bytes = bell.encode();
        line.console(&bytes[..5], Instant::now());
        line.console(&bytes[5..], Instant::now());
        line.console(b"panic", Instant::now());
        assert_eq!(line.listen(Duration::ZERO), News::Bell(bell));
        assert_eq!(line.last_lines(2), ["[ 0.1] hello", "vimpanic"]);
        line.end("off".to_owned());
        assert_eq!(line.listen(Duration::ZERO), News::Ended("off".to_owned()));
    }

    #[test]
    fn nothing_grows_without_bound() {
        let line = Line::default();
        for id in 0..1000 {
            let bell = Bell { id, status: 0, len: 0, crc: 0 };
            line.console(&bell.encode(), Instant::now());
            line.console(b"a line\n", Instant::now());
        }
        let heard = line.heard.lock();
        assert_eq!((heard.bells.len(), heard.last.len()), (MOST_BELLS, KEPT_LINES));
    }
}
