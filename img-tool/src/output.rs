//! Standard output and standard error: the only place that writes to them.

use std::borrow::Cow;
use std::io::{ErrorKind, IsTerminal as _, Write as _};

use crate::exit::{Failure, Outcome};

/// Where the program speaks.
#[derive(Debug)]
pub(crate) struct Output {
    /// Standard error may have colours.
    pub(crate) colour: bool,
}

impl Output {
    /// Colours are wanted if `may_colour`, standard error is a terminal, and nobody objects.
    pub(crate) fn new(may_colour: bool) -> Self {
        Self { colour: may_colour && std::io::stderr().is_terminal() && wants_colour() }
    }

    /// Prints a text on standard output at once.
    pub(crate) fn print(&self, text: &str) -> Outcome<()> {
        let mut stdout = std::io::stdout().lock();
        let text = if stdout.is_terminal() { for_terminal(text, true) } else { Cow::Borrowed(text) };
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => block::Error::from(error).context("could not write to standard output").into(),
        })
    }

    /// Writes bytes on standard output as they are.
    pub(crate) fn write(&self, bytes: &[u8]) -> Outcome<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => block::Error::from(error).context("could not write to standard output").into(),
        })
    }

    /// Prints a text on standard error, harmless even if that is a file, which somebody will look at; there is nobody
    /// left to tell if that fails.
    pub(crate) fn say(&self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let text = for_terminal(text, self.colour);
        let _ = stderr.write_all(text.as_bytes());
    }

    /// Prints `program: message` on standard error.
    pub(crate) fn complain(&self, program: &str, message: &str) {
        self.say(&format!("{program}: {message}\n"));
    }
}

/// Our own escape sequences: the colour of hints, and its end.
const OWN: [&str; 2] = ["\x1b[36m", "\x1b[0m"];

/// The text without characters that a terminal would obey: names inside images are a stranger's. Line ends and tabs
/// stay, and our own colours if there may be any.
fn for_terminal(text: &str, colour: bool) -> Cow<'_, str> {
    let harmless = |c: char| match c {
        '\n' | '\r' | '\t' => true,
        // Embeddings, overrides and isolates: they show text in another order (Unicode Standard Annex #9, section 2).
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => false,
        c => !c.is_control(),
    };
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let own = OWN.into_iter().find(|sequence| colour && rest.starts_with(sequence));
        let (piece, tail) = rest.split_at(own.map_or(c.len_utf8(), str::len));
        match own {
            None if !harmless(c) => safe.extend(c.escape_unicode()),
            _ => safe.push_str(piece),
        }
        rest = tail;
    }
    Cow::Owned(safe)
}

/// See <https://no-color.org>; a dumb terminal has none either.
fn wants_colour() -> bool {
    let objected = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !objected && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Gathers many small pieces of standard output into few writes.
#[derive(Debug)]
pub(crate) struct Gathered<'a> {
    output: &'a Output,
    pending: String,
}

impl<'a> Gathered<'a> {
    /// Bytes that are gathered before they are written.
    const ENOUGH: usize = 64 << 10;

    pub(crate) fn new(output: &'a Output) -> Self {
        Self { output, pending: String::new() }
    }

    /// Adds a piece.
    pub(crate) fn print(&mut self, text: &str) -> Outcome<()> {
        self.pending.push_str(text);
        if self.pending.len() < Self::ENOUGH { Ok(()) } else { self.flush() }
    }

    /// Writes what is pending.
    pub(crate) fn flush(&mut self) -> Outcome<()> {
        let result = self.output.print(&self.pending);
        self.pending.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_nothing_to_obey_but_our_own_colours() {
        assert_eq!(for_terminal("plain\ttext\r\n", true), "plain\ttext\r\n");
        assert_eq!(for_terminal("a\x1b]0;title\x07b\u{9b}c", true), "a\\u{1b}]0;title\\u{7}b\\u{9b}c");
        assert_eq!(for_terminal("\x1b[36mhint:\x1b[0m \x1b[2J", true), "\x1b[36mhint:\x1b[0m \\u{1b}[2J");
        assert_eq!(for_terminal("\x1b[36ma\x7f", false), "\\u{1b}[36ma\\u{7f}");
        assert_eq!(for_terminal("a\u{202e}b\u{2066}", true), "a\\u{202e}b\\u{2066}");
    }
}
