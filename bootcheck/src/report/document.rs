//! The JSON document. Its fields are described in docs/bootcheck.md.

use std::time::Duration;

use guestdisk::boot::firmware::EfiPartition;
use guestdisk::boot::nvram::NvramEntry;
use guestdisk::partition::Scheme;
use serde_json::{Value, json};

use super::{Report, ending_name, hex};
use crate::check::Origin;
use crate::engine::{DiskActivity, Outcome};
use crate::loader::FirmwareUse;
use crate::trace::Reading;
use crate::verdict::Verdict;
use crate::watch::{Failure, Match, Station, Watched};

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
    let Some(source) = &report.source else {
        return report.firmware.as_ref().map(firmware);
    };
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

/// A boot through a firmware.
fn firmware(used: &FirmwareUse) -> Value {
    let efi = |partition: &EfiPartition| {
        json!({
            "partition": partition.location.to_string(),
            "fallback": partition.fallback,
            "loaders": partition.loaders,
            "unreadable": partition.unreadable,
        })
    };
    let nvram = |entry: &NvramEntry| {
        json!({
            "number": entry.number, "description": entry.description, "active": entry.active, "path": entry.path,
        })
    };
    json!({
        "from": "firmware",
        "firmware": used.firmware.name(),
        "code": used.code,
        "variables": used.vars,
        "reason": used.reason,
        "both": used.both,
        "disk": {
            "partition-table": used.facts.scheme.map(Scheme::name),
            "boot-sector": used.facts.boot_code.to_string(),
            "bios-boot-partition": used.facts.bios_boot,
            "active-partition": used.facts.active.map(|(number, _)| number),
            "efi": used.facts.efi.iter().map(efi).collect::<Vec<_>>(),
        },
        "nvram": used.nvram.iter().map(nvram).collect::<Vec<_>>(),
        "changes": used.changes,
    })
}

fn watched(value: &mut Value, watched: &Watched) {
    set(value, "level", watched.furthest().map(station));
    if !watched.readings.is_empty() {
        value["readings"] = watched.readings.iter().map(reading).collect();
    }
    if !watched.firmware_log.is_empty() {
        value["firmware-log"] = json!(watched.firmware_log);
    }
    value["time-line"] = watched.stations.iter().map(station).collect();
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

fn station(station: &Station) -> Value {
    json!({
        "station": station.milestone.name(),
        "seconds": seconds(station.at),
        "line": station.line,
        "evidence": station.by.name(),
    })
}

fn reading(reading: &Reading) -> Value {
    json!({
        "part": reading.part.name(), "name": reading.name, "seconds": seconds(reading.first), "bytes": reading.bytes,
    })
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
    if !outcome.screen.is_empty() {
        value["screen"] = json!(outcome.screen);
    }
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
