//! What the machine is, for people and programs.

use std::fmt::Write as _;

use block::size::human;
use v2v::p2v::{Found, PhysicalDisk};

use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::Outcome;

pub(super) fn show(found: &Found, form: OutputFormat, app: &App) -> Outcome<()> {
    match form {
        OutputFormat::Json => app.print(&format!("{:#}\n", found.document())),
        OutputFormat::Human => app.print(&human_text(found)),
    }
}

fn human_text(found: &Found) -> String {
    let guest = &found.guest;
    let mut text = format!("machine: {} ({})\n", guest.name, guest.origin.name());
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(text, "{name}: {value}");
        }
    };
    line("model", guest.description.clone().unwrap_or_default());
    line("uuid", guest.uuid.clone().unwrap_or_default());
    line("processors", processors(&guest.cpus));
    line("memory", guest.memory_bytes.map(human).unwrap_or_default());
    let secure = if guest.firmware.secure_boot { ", Secure Boot" } else { "" };
    line("firmware", guest.firmware.kind.map_or_else(String::new, |kind| format!("{}{secure}", kind.name())));
    for nic in &guest.nics {
        let place = nic.network_name.as_ref().map_or_else(String::new, |name| format!(" on {name}"));
        let mac = nic.mac.as_deref().unwrap_or("no address");
        let model = nic.model.as_deref().map_or_else(String::new, |model| format!(" ({model})"));
        line("network card", format!("{mac}{model}{place}"));
    }
    text.push_str("disks:\n");
    for disk in &found.disks {
        text.push_str(&disk_text(disk));
    }
    if !found.left_out.is_empty() {
        text.push_str("not copied:\n");
    }
    for (reason, names) in by_reason(&found.left_out) {
        let _ = writeln!(text, "  {}: {reason}", names.join(", "));
    }
    for note in &guest.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn processors(cpus: &v2v::guest::Cpus) -> String {
    let Some(count) = cpus.count else { return String::new() };
    let model = cpus.model.as_deref().map_or_else(String::new, |model| format!(", {model}"));
    match cpus.topology {
        Some((sockets, cores, threads)) => {
            format!("{count} ({sockets} sockets of {cores} cores with {threads} threads){model}")
        }
        None => format!("{count}{model}"),
    }
}

fn disk_text(disk: &PhysicalDisk) -> String {
    let mut text = format!("  {}: {}", disk.name, human(disk.size_bytes));
    let bus = disk.bus.map(|bus| bus.name().to_owned());
    let serial = disk.serial.as_ref().map(|serial| format!("serial number {serial}"));
    let model = Some(disk.model.clone()).filter(|model| !model.is_empty());
    for part in [bus, model, serial].into_iter().flatten() {
        let _ = write!(text, ", {part}");
    }
    text.push('\n');
    for mounted in &disk.mounts {
        let how = if mounted.writable { "mounted, can be written to" } else { "mounted read-only" };
        let _ =
            writeln!(text, "    {} on {} ({}): {how}", mounted.device, mounted.path.display(), mounted.kind);
    }
    text
}

/// The names that were left out for the same reason.
fn by_reason(left_out: &[(String, String)]) -> Vec<(&str, Vec<&str>)> {
    let mut reasons: Vec<(&str, Vec<&str>)> = vec![];
    for (name, reason) in left_out {
        match reasons.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, names)) => names.push(name),
            None => reasons.push((reason, vec![name])),
        }
    }
    reasons
}
