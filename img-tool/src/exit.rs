//! How the program ends: its exit codes, and failures on their way to the user.

use std::process::ExitCode;

/// A documented exit code.
///
/// | command | codes |
/// | --- | --- |
/// | all | 0 success, 1 any error |
/// | bootcheck | 0 all boot, 1 one does not, 2 one could not be checked |
/// | v2v | 0 converted (and booted), 1 not converted, 3 does not boot, 4 not known whether it boots, 5 known not to start |
/// | doctor | 0 guests can be booted, 1 they cannot |
/// | check | 0 clean, 1 could not be completed, 2 corruptions left, 3 only leaks left, 63 nothing to check |
/// | compare | 0 identical, 1 different or wrong usage, 2 could not open, 3 block status, 4 reading |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) u8);

impl Exit {
    /// Success.
    pub(crate) const OK: Self = Self(0);
    /// Any error.
    pub(crate) const ERROR: Self = Self(1);
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// To be shown as `vimg: message` with its hints, then exit with the code.
    Error {
        /// The exit code.
        exit: Exit,
        /// What went wrong.
        error: block::Error,
    },
    /// Everything has been said already.
    Silent(Exit),
    /// The reader of our output went away: a quiet success.
    BrokenPipe,
}

/// The result of a command.
pub(crate) type Outcome<T = Exit> = Result<T, Failure>;

impl From<block::Error> for Failure {
    fn from(error: block::Error) -> Self {
        Self::Error { exit: Exit::ERROR, error }
    }
}

impl Failure {
    /// Wrong usage, in words.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        block::Error::usage(message).into()
    }
}

/// Gives an error an exit code other than 1.
pub(crate) trait OrExit<T> {
    /// The error ends the program with `code`.
    fn or_exit(self, code: u8) -> Outcome<T>;
}

impl<T> OrExit<T> for block::Result<T> {
    fn or_exit(self, code: u8) -> Outcome<T> {
        self.map_err(|error| Failure::Error { exit: Exit(code), error })
    }
}
