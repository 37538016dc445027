//! Keeps what was typed in secret out of everything that is kept of a console.
//!
//! A prompt for a passphrase does not echo. Where one does all the same, stars stand in its place: bytes that may be the
//! beginning of an echo are held back until it is known, or until nothing more comes.

use std::time::Duration;

use crypt::Secret;

/// Bytes that are held back go on after so long a silence.
const STALE: Duration = Duration::from_millis(500);

/// Hides secrets in a stream of bytes.
#[derive(Debug, Default)]
pub(crate) struct Mask {
    secrets: Vec<Secret>,
    held: Vec<u8>,
    last: Duration,
}

impl Mask {
    /// Hides this, too, from now on.
    pub(crate) fn hide(&mut self, secret: &Secret) {
        if !secret.is_empty() && !self.secrets.contains(secret) {
            self.secrets.push(secret.clone());
        }
    }

    /// What may be shown of the bytes so far.
    pub(crate) fn pass(&mut self, bytes: &[u8], at: Duration) -> Vec<u8> {
        self.last = at;
        if self.secrets.is_empty() {
            return bytes.to_vec();
        }
        let mut shown = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            self.held.push(byte);
            // What cannot become a secret any more goes on, from the front.
            while !self.held.is_empty() && !self.secrets.iter().any(|secret| secret.starts_with(&self.held)) {
                shown.push(self.held.remove(0));
            }
            if self.secrets.iter().any(|secret| **secret == *self.held) {
                shown.resize(shown.len() + self.held.len(), b'*');
                self.held.clear();
            }
        }
        shown
    }

    /// What was held back, if nothing has come for long.
    pub(crate) fn stale(&mut self, now: Duration) -> Vec<u8> {
        if now.saturating_sub(self.last) < STALE { vec![] } else { std::mem::take(&mut self.held) }
    }

    /// What is still held back, at the end.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// A line of the screen.
    pub(crate) fn row(&self, row: &str) -> String {
        let mut row = row.to_owned();
        for secret in &self.secrets {
            if let Ok(text) = std::str::from_utf8(secret) {
                row = row.replace(text, &"*".repeat(text.chars().count()));
            }
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn an_echo_is_hidden_however_it_is_cut() {
        let text = b"key: aabab\r\nab aaba aabab";
        for cut in 0..text.len() {
            let mut mask = Mask::default();
            assert_eq!(mask.pass(b"aabab", at(0)), b"aabab");
            mask.hide(&Secret::from("aabab"));
            let mut shown = mask.pass(&text[..cut], at(1));
            shown.extend(mask.pass(&text[cut..], at(2)));
            assert_eq!(shown, b"key: *****\r\nab aaba *****", "{cut}");
        }
    }

    #[test]
    fn what_is_held_back_goes_on() {
        let mut mask = Mask::default();
        mask.hide(&Secret::from("login secret"));
        assert_eq!(mask.pass(b"host login", at(100)), b"host ");
        assert_eq!(mask.stale(at(300)), b"");
        assert_eq!(mask.stale(at(700)), b"login");
        assert_eq!(mask.pass(b": ", at(800)), b": ");
        assert_eq!(mask.row("x login secret"), "x ************");
    }
}
