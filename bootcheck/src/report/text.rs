//! The report for people.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Report, ending_name, hex};
use crate::check::{Origin, Source};
use crate::engine::{DiskActivity, Outcome};
use crate::loader::{FirmwareUse, level};
use crate::verdict::Verdict;
use crate::watch::{Evidence, Watched};

/// Lines of the console that are shown.
const SHOWN: usize = 15;

pub(super) fn headline(report: &Report) -> String {
    match &report.verdict {
        Verdict::Booted => format!("booted in {}{}", seconds(report.elapsed), by(report)),
        Verdict::NotBooted { reason, detail } => {
            let detail = detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
            format!("did not boot: {}{detail} [{}]", reason.words(), reason.name())
        }
        Verdict::NotChecked { error, .. } => format!("could not be checked: {error}"),
    }
}

fn by(report: &Report) -> String {
    let firmware = report.firmware.as_ref().map(|firmware| firmware.firmware.to_string());
    let parts: Vec<_> = report.engine.map(str::to_owned).into_iter().chain(firmware).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

pub(super) fn text(report: &Report, evidence: bool) -> String {
    let mut text = format!("{}: {}\n", report.image, headline(report));
    if let Verdict::NotChecked { hints, .. } = &report.verdict {
        for hint in hints {
            line(&mut text, "hint", hint);
        }
    }
    if evidence {
        show(&mut text, report);
    }
    for remark in &report.remarks {
        line(&mut text, "remark", remark);
    }
    text
}

/// A line of the report: what it is about, and what there is to say.
fn line(text: &mut String, about: &str, what: &str) {
    let _ = writeln!(text, "  {about:<9} {what}");
}

fn show(text: &mut String, report: &Report) {
    if let Some(source) = &report.source {
        show_source(text, source);
    }
    if let Some(firmware) = &report.firmware {
        show_firmware(text, firmware);
    }
    show_time_line(text, &report.watched);
    if report.firmware.is_some() {
        show_level(text, &report.watched);
    }
    show_signs(text, &report.watched);
    if let Some(outcome) = &report.outcome {
        show_outcome(text, outcome);
    }
    if report.verdict != Verdict::Booted {
        show_console(text, &report.watched);
        if let Some(outcome) = &report.outcome {
            show_screen(text, outcome, &report.watched);
        }
    }
}

fn show_source(text: &mut String, source: &Source) {
    if let Some((id, title)) = &source.entry {
        line(text, "entry", &format!("{title} [{id}]"));
    }
    let from = match source.origin {
        Origin::Given => "",
        Origin::Disk => " (from the disk)",
    };
    line(text, "kernel", &format!("{}{from}", source.kernel));
    for initrd in &source.initrd {
        line(text, "initrd", initrd);
    }
    line(text, "cmdline", &source.cmdline);
}

fn show_firmware(text: &mut String, used: &FirmwareUse) {
    let vars = used.vars.as_ref().map(|vars| format!(", variables {vars}")).unwrap_or_default();
    line(text, "firmware", &format!("{} ({}{vars})", used.firmware, used.code));
    line(text, "because", &used.reason);
    if used.both {
        let other = used.firmware.other();
        line(text, "or", &format!("{other} would start this disk, too (--firmware both checks both)"));
    }
    for entry in &used.nvram {
        line(text, "nvram", &entry.to_string());
    }
    for change in &used.changes {
        line(text, "changed", change);
    }
}

/// The furthest level, and what was read on the way to it.
fn show_level(text: &mut String, watched: &Watched) {
    for reading in &watched.readings {
        let kib = reading.bytes.div_ceil(1024);
        line(text, &seconds(reading.first), &format!("read: {}, {kib} KiB in all", reading.words()));
    }
    if let Some(station) = watched.furthest() {
        line(text, "level", &level(station));
    }
}

fn show_time_line(text: &mut String, watched: &Watched) {
    for station in &watched.stations {
        let about =
            if station.line.is_empty() { String::new() } else { format!(": {}", station.line.trim()) };
        let by = if station.by == Evidence::Console {
            String::new()
        } else {
            format!(" ({})", station.by.words())
        };
        line(text, &seconds(station.at), &format!("{}{by}{about}", station.milestone.words()));
    }
}

fn show_signs(text: &mut String, watched: &Watched) {
    if let Some(success) = &watched.success {
        line(text, "success", &format!("{} at {}: {}", success.pattern, seconds(success.at), success.line));
    }
    for failure in &watched.failures {
        let seen = &failure.seen;
        line(text, "failure", &format!("{} at {}: {}", seen.pattern, seconds(seen.at), seen.line));
    }
    for note in &watched.notes {
        line(text, "note", &format!("{} at {}: {}", note.pattern, seconds(note.at), note.line));
    }
}

fn show_outcome(text: &mut String, outcome: &Outcome) {
    let (kind, detail) = ending_name(&outcome.ending);
    let detail = detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
    line(text, "ending", &format!("{kind}{detail}"));
    for cpu in &outcome.cpus {
        let code =
            if cpu.code.is_empty() { String::new() } else { format!(", code {}", hex(&cpu.code, " ")) };
        line(text, &format!("cpu {}", cpu.index), &format!("at {:#x}, {}{code}", cpu.rip, cpu.mode));
    }
    for (index, disk) in outcome.disks.iter().enumerate() {
        line(text, &format!("disk {index}"), &activity(disk));
    }
}

fn activity(disk: &DiskActivity) -> String {
    let range = |sectors: Option<(u64, u64)>| {
        sectors.map(|(first, last)| format!(", sectors {first} to {last}")).unwrap_or_default()
    };
    let mut text = format!(
        "{} reads ({} KiB{}), {} writes ({} KiB{}), {} flushes",
        disk.reads,
        disk.read_bytes.div_ceil(1024),
        range(disk.sectors_read),
        disk.writes,
        disk.written_bytes.div_ceil(1024),
        range(disk.sectors_written),
        disk.flushes,
    );
    if disk.errors > 0 {
        let first = disk.first_error.as_deref().unwrap_or("unknown");
        let _ = write!(text, ", {} errors, the first: {first}", disk.errors);
    }
    text
}

fn show_console(text: &mut String, watched: &Watched) {
    if watched.tail.is_empty() {
        return;
    }
    line(text, "console", &format!("{} bytes; the last lines:", watched.bytes));
    let skipped = watched.tail.len().saturating_sub(SHOWN);
    for shown in &watched.tail[skipped..] {
        let _ = writeln!(text, "    | {shown}");
    }
}

/// The screen, where it says something else than the console.
fn show_screen(text: &mut String, outcome: &Outcome, watched: &Watched) {
    let is_new =
        |row: &&String| !row.is_empty() && !watched.tail.iter().any(|shown| shown.trim() == row.trim());
    if !outcome.screen.iter().any(|row| is_new(&row)) {
        return;
    }
    line(text, "screen", "at the end:");
    for row in outcome.screen.iter().filter(|row| !row.is_empty()) {
        let _ = writeln!(text, "    | {row}");
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}
