//! What a check has found, for people and for programs.

mod document;
mod junit;
mod text;

use std::time::Duration;

use crate::check::Source;
use crate::engine::{Ending, Outcome};
use crate::loader::FirmwareUse;
use crate::verdict::Verdict;
use crate::watch::Watched;

pub use document::document;
pub use junit::junit;

/// The report of one check.
#[derive(Debug, Clone)]
pub struct Report {
    /// The name of the image.
    pub image: String,
    /// The answer.
    pub verdict: Verdict,
    /// The engine that ran the guest.
    pub engine: Option<&'static str>,
    /// What was booted, unless a firmware chose it.
    pub source: Option<Source>,
    /// The firmware that started the guest.
    pub firmware: Option<FirmwareUse>,
    /// What the console told.
    pub watched: Watched,
    /// How the machine ended, as far as its engine came back.
    pub outcome: Option<Outcome>,
    /// From the start to the decision.
    pub elapsed: Duration,
    /// Remarks about the check itself.
    pub remarks: Vec<String>,
}

impl Report {
    /// A report about an image that nothing is known about.
    pub fn new(image: &str) -> Self {
        Self {
            image: image.to_owned(),
            verdict: Verdict::NotChecked { error: "not checked".to_owned(), hints: vec![], cancelled: false },
            engine: None,
            source: None,
            firmware: None,
            watched: Watched::default(),
            outcome: None,
            elapsed: Duration::ZERO,
            remarks: vec![],
        }
    }

    /// A report about a check that could not be made.
    pub fn not_checked(image: &str, error: &block::Error) -> Self {
        Self { verdict: Verdict::not_checked(error), ..Self::new(image) }
    }

    /// For people: the verdict in a line and, unless it `booted` and only that is wanted, the evidence.
    pub fn to_text(&self, evidence: bool) -> String {
        text::text(self, evidence)
    }

    /// The verdict in a line, without the name of the image.
    pub fn headline(&self) -> String {
        text::headline(self)
    }
}

/// The exit code of several checks: the worst of theirs, "not checked" being the worst.
pub fn exit_code(reports: &[Report]) -> u8 {
    reports.iter().map(|report| report.verdict.exit_code()).max().unwrap_or(2)
}

/// The name of an ending in documents, and its details.
fn ending_name(ending: &Ending) -> (&'static str, Option<&str>) {
    match ending {
        Ending::PowerOff => ("power-off", None),
        Ending::Reset { how } => ("reset", Some(how)),
        Ending::TripleFault => ("triple-fault", None),
        Ending::Stuck { reason } => ("stuck", Some(reason)),
        Ending::Stopped => ("stopped", None),
        Ending::EngineDied { reason } => ("engine-died", Some(reason)),
    }
}

/// Bytes in hexadecimal, separated by `between`.
fn hex(bytes: &[u8], between: &str) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests;
