//! What has been seen of a guest.

use std::time::Duration;

use crate::pattern::Milestone;
use crate::trace::Reading;
use crate::verdict::Reason;

/// A line that has been recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The name of the pattern, or the user's regular expression.
    pub pattern: String,
    /// The line.
    pub line: String,
    /// When, from the start of the run.
    pub at: Duration,
}

/// A sign of failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What it means.
    pub reason: Reason,
    /// The line.
    pub seen: Match,
}

/// By what a station is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Evidence {
    /// A line of the serial console.
    #[default]
    Console,
    /// A line of the screen.
    Screen,
    /// A line of the firmware's log.
    FirmwareLog,
    /// What was read of a disk.
    DiskReads,
    /// What was written to a disk.
    DiskWrites,
    /// Where the processor stood in the end.
    Processor,
}

impl Evidence {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Screen => "screen",
            Self::FirmwareLog => "firmware-log",
            Self::DiskReads => "disk-reads",
            Self::DiskWrites => "disk-writes",
            Self::Processor => "processor",
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Screen => "screen",
            Self::FirmwareLog => "firmware log",
            Self::DiskReads => "disk reads",
            Self::DiskWrites => "disk writes",
            Self::Processor => "processor",
        }
    }

    /// Whether the guest itself has said so, in words.
    pub const fn is_spoken(self) -> bool {
        matches!(self, Self::Console | Self::Screen)
    }
}

/// A station that has been passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Station {
    /// Which.
    pub milestone: Milestone,
    /// When, from the start of the run.
    pub at: Duration,
    /// The line that told, or what was seen, in words.
    pub line: String,
    /// By what it is known.
    pub by: Evidence,
}

/// Everything that a guest has told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    /// Bytes that were printed.
    pub bytes: u64,
    /// When the last of them came.
    pub last_output: Option<Duration>,
    /// The sign of success: the last one that was expected.
    pub success: Option<Match>,
    /// The signs of failure before that, in the order in which they were seen, each once.
    pub failures: Vec<Failure>,
    /// What may explain a failure.
    pub notes: Vec<Match>,
    /// The stations, in the order in which they were seen, each once.
    pub stations: Vec<Station>,
    /// How many patterns the user expects.
    pub expected: usize,
    /// How many of them have been seen.
    pub expected_seen: usize,
    /// The next of them.
    pub waiting_for: Option<String>,
    /// The last lines, oldest first.
    pub tail: Vec<String>,
    /// The last lines of the firmware's log, oldest first.
    pub firmware_log: Vec<String>,
    /// Read requests since the kernel said its first words, behind a firmware; `None`: it has not, or there is none.
    pub kernel_reads: Option<u64>,
    /// How often a passphrase was to be typed.
    pub passphrases_typed: usize,
    /// What has been read of the disks' landmarks, in the order of time.
    pub readings: Vec<Reading>,
}

impl Watched {
    /// The furthest station.
    pub fn furthest(&self) -> Option<&Station> {
        self.stations.iter().max_by_key(|station| station.milestone)
    }

    /// Whether a station at least as far has been passed.
    pub fn has_reached(&self, milestone: Milestone) -> bool {
        self.stations.iter().any(|station| station.milestone >= milestone)
    }
}
