//! The report for people.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Report, ending_name, hex};
use crate::check::{Origin, Source};
use crate::engine::{DiskActivity, Outcome};
use crate::verdict::Verdict;
use crate::watch::Watched;

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
    report.engine.map(|engine| format!(" ({engine})")).unwrap_or_default()
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
    show_time_line(text, &report.watched);
    show_signs(text, &report.watched);
    if let Some(outcome) = &report.outcome {
        show_outcome(text, outcome);
    }
    if report.verdict != Verdict::Booted {
        show_console(text, &report.watched);
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

fn show_time_line(text: &mut String, watched: &Watched) {
    for station in &watched.stations {
        let about =
            if station.line.is_empty() { String::new() } else { format!(": {}", station.line.trim()) };
        line(text, &seconds(station.at), &format!("{}{about}", station.milestone.words()));
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

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}
