//! The JSON document. Its fields are described in docs/bootcheck.md.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Report, ending_name, hex};
use crate::check::Origin;
use crate::engine::{DiskActivity, Outcome};
use crate::verdict::Verdict;
use crate::watch::{Failure, Match, Watched};

/// The document of some checks.
pub fn document(reports: &[Report]) -> Value {
    let count = |code| reports.iter().filter(|report| report.verdict.exit_code() == code).count();
    json!({
        "booted": count(0),
        "not-booted": count(1),
        "not-checked": count(2),
        "checks": reports.iter().map(check).collect::<Vec<_>>(),
    })
}

fn check(report: &Report) -> Value {
    let mut value = json!({ "image": report.image, "verdict": report.verdict.name() });
    match &report.verdict {
        Verdict::Booted => {}
        Verdict::NotBooted { reason, detail } => {
            value["reason"] = json!(reason.name());
            value["message"] = json!(reason.words());
            set(&mut value, "detail", detail.as_deref());
        }
        Verdict::NotChecked { error, hints, cancelled } => {
            value["message"] = json!(error);
            value["hints"] = json!(hints);
            value["cancelled"] = json!(cancelled);
        }
    }
    set(&mut value, "engine", report.engine);
    set(&mut value, "boot", boot(report));
    value["seconds"] = seconds(report.elapsed);
    set(&mut value, "startup-seconds", report.outcome.as_ref().map(|outcome| seconds(outcome.startup)));
    watched(&mut value, &report.watched);
    if let Some(outcome) = &report.outcome {
        ended(&mut value, outcome);
    }
    if !report.remarks.is_empty() {
        value["remarks"] = json!(report.remarks);
    }
    value
}

fn set(value: &mut Value, key: &str, member: Option<impl Into<Value>>) {
    if let Some(member) = member {
        value[key] = member.into();
    }
}

fn boot(report: &Report) -> Option<Value> {
    let source = report.source.as_ref()?;
    let mut value = json!({
        "from": match source.origin {
            Origin::Given => "command-line",
            Origin::Disk => "disk",
        },
    });
    if let Some((id, title)) = &source.entry {
        value["entry"] = json!({ "id": id, "title": title });
    }
    value["kernel"] = json!(source.kernel);
    value["initrd"] = json!(source.initrd);
    value["cmdline"] = json!(source.cmdline);
    Some(value)
}

fn watched(value: &mut Value, watched: &Watched) {
    value["time-line"] = watched
        .stations
        .iter()
        .map(|station| {
            json!({ "station": station.milestone.name(), "seconds": seconds(station.at), "line": station.line })
        })
        .collect();
    set(value, "success", watched.success.as_ref().map(matched));
    value["failures"] = watched.failures.iter().map(failure).collect();
    value["notes"] = watched.notes.iter().map(matched).collect();
    if watched.expected > 0 {
        value["expected"] = json!({
            "patterns": watched.expected, "seen": watched.expected_seen, "waiting-for": watched.waiting_for,
        });
    }
    value["console"] = json!({
        "bytes": watched.bytes,
        "last-output-seconds": watched.last_output.map(seconds),
        "last-lines": watched.tail,
    });
}

fn matched(found: &Match) -> Value {
    json!({ "pattern": found.pattern, "line": found.line, "seconds": seconds(found.at) })
}

fn failure(failure: &Failure) -> Value {
    let mut value = json!({ "reason": failure.reason.name() });
    for (key, member) in [
        ("pattern", json!(failure.seen.pattern)),
        ("line", json!(failure.seen.line)),
        ("seconds", seconds(failure.seen.at)),
    ] {
        value[key] = member;
    }
    value
}

fn ended(value: &mut Value, outcome: &Outcome) {
    let (kind, detail) = ending_name(&outcome.ending);
    value["ending"] = json!({ "kind": kind, "detail": detail });
    value["cpus"] = outcome
        .cpus
        .iter()
        .map(|cpu| {
            json!({
                "index": cpu.index, "rip": format!("{:#x}", cpu.rip), "mode": cpu.mode, "code": hex(&cpu.code, ""),
            })
        })
        .collect();
    value["disks"] = outcome.disks.iter().map(disk).collect();
}

fn disk(disk: &DiskActivity) -> Value {
    let range = |sectors: Option<(u64, u64)>| sectors.map(|(first, last)| json!([first, last]));
    json!({
        "reads": disk.reads,
        "read-bytes": disk.read_bytes,
        "writes": disk.writes,
        "written-bytes": disk.written_bytes,
        "flushes": disk.flushes,
        "discards": disk.discards,
        "sectors-read": range(disk.sectors_read),
        "sectors-written": range(disk.sectors_written),
        "errors": disk.errors,
        "first-error": disk.first_error,
    })
}

/// Seconds with three digits.
fn seconds(duration: Duration) -> Value {
    let millis = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    json!(f64::from(millis) / 1000.0)
}
