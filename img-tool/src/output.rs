//! Standard output and standard error: the only place that writes to them.

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
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => block::Error::from(error).context("could not write to standard output").into(),
        })
    }

    /// Prints a text on standard error; there is nobody left to tell if that fails.
    pub(crate) fn say(&self, text: &str) {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    /// Prints `program: message` on standard error.
    pub(crate) fn complain(&self, program: &str, message: &str) {
        self.say(&format!("{program}: {message}\n"));
    }
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
