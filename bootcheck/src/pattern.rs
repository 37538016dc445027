//! What lines on a console mean: the signs of success and failure, and the stations of a boot.
//!
//! The tables are the whole knowledge. They were written from what guests print (recorded consoles are in
//! `testdata`), and are searched in order: of two signs on one line the first one counts.

mod log;
mod table;

use regex::bytes::{RegexSet, RegexSetBuilder};

use block::{Error, Result};

use crate::verdict::Reason;

pub use log::LOG_PATTERNS;
pub use table::PATTERNS;

/// A station of a boot, in the order in which they are usually passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Milestone {
    /// The guest has printed something.
    FirstByte,
    /// The firmware is at work.
    Firmware,
    /// The firmware has seen a disk.
    DiskSeen,
    /// A boot loader has been started.
    BootLoader,
    /// The kernel speaks.
    Kernel,
    /// The initramfs is at work.
    Initramfs,
    /// The root file system is mounted.
    RootMounted,
    /// The init of the root file system is at work.
    Init,
    /// A target or runlevel has been reached that stands for a running system.
    Target,
    /// Somebody may log in.
    Login,
}

impl Milestone {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FirstByte => "first-byte",
            Self::Firmware => "firmware",
            Self::DiskSeen => "disk-seen",
            Self::BootLoader => "boot-loader",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::RootMounted => "root-mounted",
            Self::Init => "init",
            Self::Target => "target",
            Self::Login => "login",
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::FirstByte => "first byte of output",
            Self::Firmware => "firmware",
            Self::DiskSeen => "disk seen",
            Self::BootLoader => "boot loader",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::RootMounted => "root file system mounted",
            Self::Init => "init of the root file system",
            Self::Target => "target reached",
            Self::Login => "login prompt",
        }
    }
}

/// What a line is a sign of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// The guest works (unless the user has said what to expect instead); and a station.
    Success(Milestone),
    /// It does not, for this reason.
    Failure(Reason),
    /// It asks for the passphrase of an encrypted disk.
    Passphrase,
    /// Neither, but worth showing if it does not.
    Note,
    /// A station.
    Station(Milestone),
}

/// A line to look for.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// Its name in reports.
    pub name: &'static str,
    /// What it means.
    pub sign: Sign,
    /// The regular expression, over bytes, without Unicode classes.
    regex: &'static str,
}

/// A table of patterns, compiled.
#[derive(Debug, Clone)]
pub struct Patterns {
    table: &'static [Pattern],
    set: RegexSet,
}

impl Patterns {
    /// Compiles those of consoles and screens.
    ///
    /// # Errors
    /// Never, as the tests show; nothing here may panic all the same.
    pub fn new() -> Result<Self> {
        Self::of(PATTERNS)
    }

    /// Compiles those of the logs of firmwares.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_log() -> Result<Self> {
        Self::of(LOG_PATTERNS)
    }

    fn of(table: &'static [Pattern]) -> Result<Self> {
        let regexes = table.iter().map(|pattern| pattern.regex);
        let set = RegexSetBuilder::new(regexes).unicode(false).build();
        set.map(|set| Self { table, set })
            .map_err(|error| Error::unsupported(format!("pattern of the console: {error}")))
    }

    /// The patterns that a line matches, in the order of the table.
    pub fn on<'a>(&'a self, line: &str) -> impl Iterator<Item = &'static Pattern> + use<'a> {
        let matches = self.set.matches(line.as_bytes());
        self.table
            .iter()
            .enumerate()
            .filter(move |(index, _)| matches.matched(*index))
            .map(|(_, pattern)| pattern)
    }
}

#[cfg(test)]
mod tests;
