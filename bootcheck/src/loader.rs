//! A boot through a firmware and the disk's own boot loader: what is known of it before, and what is concluded after.
//!
//! A kernel that is started directly says what is wrong with it. A firmware or a boot loader often just stops, so that the
//! answer has to be put together: how far the boot has come and by what that is known, what lies on the disk, and the
//! last words.

mod console;
mod look;

use std::time::Duration;

use guestdisk::boot::firmware::{Facts, Firmware};
use guestdisk::boot::nvram::NvramEntry;

use crate::engine::{CpuState, Outcome};
use crate::pattern::Milestone;
use crate::trace::{Landmark, Part, Trace};
use crate::verdict::{Reason, Stopped, Verdict};
use crate::watch::{Evidence, Failure, Station, Through, Watched};

pub use console::add_console;
pub use look::{Looked, look};

/// So much written to the root file system is written by nobody but a kernel that has mounted it.
const ROOT_WRITES: u64 = 64 << 10;

/// Where kernels of 64 bits are.
const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;
/// Those of 32 bits are here, where there is no memory in front of paging, up to where firmware lies.
const KERNEL_QUARTER: std::ops::Range<u64> = 0xc000_0000..0xff00_0000;

/// Errors of GRUB that follow from others, or from which nothing follows.
const CONSEQUENCES: [&str; 3] = ["you need to load", "no suitable video mode", "no suitable mode"];

/// What Linux says when its test of the timer fails; on KVM it makes none.
const LATE_TIMER: &str = "IO-APIC + timer doesn't work";

/// The firmware of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareUse {
    /// Which kind.
    pub firmware: Firmware,
    /// The file of its code.
    pub code: String,
    /// The file of its variable store, of which the guest gets a copy.
    pub vars: Option<String>,
    /// Why this kind was chosen.
    pub reason: String,
    /// The disk looks as if the other kind would start it, too.
    pub both: bool,
    /// What the disk has for firmwares.
    pub facts: Facts,
    /// The boot entries in the variable store, in their order.
    pub nvram: Vec<NvramEntry>,
    /// Places of the disks that tell something when they are read.
    pub landmarks: Vec<Landmark>,
    /// A firmware or boot loader of which nothing is seen for so long has stopped.
    pub stall_limit: Duration,
    /// What was changed in the guest's overlay before it was started, in sentences; empty: nothing.
    pub changes: Vec<String>,
}

impl FirmwareUse {
    /// What a watcher has to know.
    pub(crate) fn through(&self) -> Through {
        Through { trace: Trace::new(self.landmarks.clone()), starts_nothing: self.starts_nothing() }
    }

    fn starts_nothing(&self) -> bool {
        self.firmware == Firmware::Bios && self.facts.starts_nothing()
    }

    /// The verdict as the level at which the boot stopped explains it. Adds the station that is concluded from what the
    /// guest has written.
    pub(crate) fn conclude(
        &self,
        verdict: Verdict,
        stopped: Stopped,
        watched: &mut Watched,
        outcome: Option<&Outcome>,
    ) -> Verdict {
        if let Some(outcome) = outcome {
            add_processor(watched, outcome);
            self.add_writes(watched, outcome);
        }
        let Verdict::NotBooted { reason, detail } = verdict else { return verdict };
        if let Some(failure) = watched.failures.iter().find(|failure| failure.seen.line.contains(LATE_TIMER))
        {
            return late_timer(&failure.seen.line);
        }
        let (reason, told) = match reason {
            Reason::NoBootLoader => self.nothing_to_boot(watched),
            Reason::BootLoader if !matches!(stopped, Stopped::Stalled(_)) => {
                (reason, loader_gave_up(watched))
            }
            Reason::BootLoader
            | Reason::Timeout
            | Reason::NoOutput
            | Reason::Reset
            | Reason::PowerOff
            | Reason::TripleFault
            | Reason::Stuck => self.stopped_silently(reason, stopped, watched),
            other => (other, None),
        };
        let parts: Vec<_> = [told, detail].into_iter().flatten().collect();
        Verdict::NotBooted { reason, detail: (!parts.is_empty()).then(|| parts.join("; ")) }
    }

    /// Who has written much where the root file system lies has mounted it.
    fn add_writes(&self, watched: &mut Watched, outcome: &Outcome) {
        let trace = Trace::new(self.landmarks.clone());
        let written = outcome.disks.iter().enumerate().any(|(index, disk)| {
            let (first, last) = disk.sectors_written.unwrap_or((0, 0));
            disk.written_bytes >= ROOT_WRITES
                && (trace.root_holds(index, first) || trace.root_holds(index, last))
        });
        let known = watched.stations.iter().any(|station| station.milestone == Milestone::RootMounted);
        if written && !known && !watched.has_reached(Milestone::Init) {
            watched.stations.push(Station {
                milestone: Milestone::RootMounted,
                at: outcome_time(watched),
                line: "the guest has written to the root file system".to_owned(),
                by: Evidence::DiskWrites,
            });
        }
    }

    /// The firmware has given up. What it started before counts: a loader that gave control back is the loader's failure.
    fn nothing_to_boot(&self, watched: &Watched) -> (Reason, Option<String>) {
        if self.firmware == Firmware::Uefi && watched.has_reached(Milestone::BootLoader) {
            let last = watched.notes.iter().rfind(|note| note.pattern != "UEFI");
            let said = last.map(|note| format!(": {}", note.line.trim())).unwrap_or_default();
            let text = format!("a loader was started and gave control back to the firmware{said}");
            return (Reason::BootLoader, Some(text));
        }
        (Reason::NoBootLoader, self.why_nothing(watched))
    }

    /// What there is on the disk, and what was tried.
    fn why_nothing(&self, watched: &Watched) -> Option<String> {
        let mut parts: Vec<_> = self.facts.why_nothing(self.firmware).into_iter().collect();
        if self.firmware == Firmware::Uefi {
            parts.push(match &*self.nvram {
                [] => "no boot entries in NVRAM".to_owned(),
                entries => {
                    let entries: Vec<_> = entries.iter().map(ToString::to_string).collect();
                    format!("in NVRAM: {}", entries.join(", "))
                }
            });
            let tried = watched.notes.iter().filter(|note| note.line.starts_with("BdsDxe: failed"));
            parts.extend(tried.map(|note| note.line.trim().trim_start_matches("BdsDxe: ").to_owned()));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// The guest has stopped, or the time was over, without a word about it.
    fn stopped_silently(
        &self,
        reason: Reason,
        stopped: Stopped,
        watched: &Watched,
    ) -> (Reason, Option<String>) {
        let spoken = |station: &&Station| station.by.is_spoken() && station.milestone >= Milestone::Kernel;
        if watched.stations.iter().any(|station| spoken(&station)) {
            return (reason, None);
        }
        let level = watched.furthest().map(level);
        let at = level.map(|level| format!("the last level was: {level}"));
        if watched.has_reached(Milestone::Kernel) || kernel_was_loaded(watched) {
            let told = silent(self, watched, at);
            let ended = !matches!(reason, Reason::Timeout | Reason::NoOutput | Reason::BootLoader);
            return (if ended { reason } else { Reason::Silent }, Some(told));
        }
        if self.starts_nothing() && watched.has_reached(Milestone::DiskSeen)
            || !watched.has_reached(Milestone::BootLoader)
        {
            // Who was stopped by the time limit on its way there may just have been slow.
            if matches!(stopped, Stopped::TimeLimit(_)) && !self.starts_nothing() {
                return (reason, at);
            }
            let why = self.why_nothing(watched);
            let text = [at, why].into_iter().flatten().collect::<Vec<_>>().join("; ");
            return (Reason::NoBootLoader, Some(text));
        }
        let reason = if reason == Reason::TripleFault || reason == Reason::Stuck {
            reason
        } else {
            Reason::BootLoader
        };
        let last = watched.notes.last().map(|note| format!("; it said: {}", note.line.trim()));
        (reason, at.map(|at| at + &last.unwrap_or_default()))
    }
}

/// Kernels run in the upper part of the address space, in which neither firmwares nor boot loaders are.
fn add_processor(watched: &mut Watched, outcome: &Outcome) {
    let in_kernel = |cpu: &&CpuState| {
        cpu.rip >= KERNEL_HALF && cpu.mode.starts_with("long mode")
            || KERNEL_QUARTER.contains(&cpu.rip) && cpu.mode.starts_with("protected mode")
    };
    if let Some(cpu) = outcome.cpus.iter().find(in_kernel)
        && !watched.has_reached(Milestone::Kernel)
    {
        watched.stations.push(Station {
            milestone: Milestone::Kernel,
            at: outcome_time(watched),
            line: format!("number {} ran at {:#x}, where only kernels are", cpu.index, cpu.rip),
            by: Evidence::Processor,
        });
    }
}

/// When what is known only in the end was the case at the latest: nothing has been seen later.
fn outcome_time(watched: &Watched) -> Duration {
    let read = watched.readings.iter().map(|reading| reading.first).max();
    watched.last_output.max(read).unwrap_or_default()
}

/// The host was too busy: says nothing about the image.
fn late_timer(line: &str) -> Verdict {
    Verdict::NotChecked {
        error: format!(
            "the timer that was emulated came too late, which Linux takes for broken: {}",
            line.trim()
        ),
        hints: vec![
            "try again when the host has less to do, or on a host with KVM".to_owned(),
            "the guest does not test its timer if its kernel is told no_timer_check".to_owned(),
        ],
        cancelled: false,
    }
}

/// `boot loader, at 3.20 s (console: GRUB loading.)`
pub(crate) fn level(station: &Station) -> String {
    let line = station.line.trim();
    let said = if line.is_empty() { String::new() } else { format!(": {line}") };
    format!(
        "{}, at {:.2} s ({}{said})",
        station.milestone.words(),
        station.at.as_secs_f64(),
        station.by.words()
    )
}

fn kernel_was_loaded(watched: &Watched) -> bool {
    watched.readings.iter().any(|reading| reading.part == Part::Kernel && reading.is_whole())
}

/// A kernel was loaded, and neither it nor the system has said a word.
fn silent(firmware: &FirmwareUse, watched: &Watched, level: Option<String>) -> String {
    let mut parts: Vec<_> = level.into_iter().collect();
    let loaded = |part| watched.readings.iter().find(move |reading| reading.part == part);
    parts.extend(
        [Part::Kernel, Part::Initrd]
            .into_iter()
            .filter_map(loaded)
            .map(|reading| format!("{} was read at {:.2} s", reading.words(), reading.first.as_secs_f64())),
    );
    if firmware.changes.is_empty() {
        parts.push("--add-console makes a kernel speak on the serial port".to_owned());
    }
    parts.join("; ")
}

/// The boot loader has said that it cannot go on: at what, and the error in front of it.
fn loader_gave_up(watched: &Watched) -> Option<String> {
    // A prompt is what a failure ends in; that may have been read only afterwards, on the screen.
    let said = |failure: &&Failure| {
        failure.reason == Reason::BootLoader && !failure.seen.pattern.ends_with("prompt")
    };
    let failure = &watched.failures.iter().find(said).or(watched.failures.first())?.seen;
    let explains = |line: &str| !CONSEQUENCES.iter().any(|text| line.contains(text));
    let before = watched
        .notes
        .iter()
        .rfind(|note| note.pattern == "GRUB" && note.at <= failure.at && explains(&note.line));
    let line = before.map_or(&*failure.line, |note| &*note.line).trim();
    let line = line.trim_end_matches('.');
    Some(format!("{}: {line}", failure.pattern))
}

#[cfg(test)]
mod tests;
