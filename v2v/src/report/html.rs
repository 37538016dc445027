//! The page: one file without anything from elsewhere, readable on paper and in the dark.

use std::fmt::Write as _;

use super::{BootTest, Report, ReportedDisk, Stage};
use crate::inspect::{DriverPlace, Kernel, System};
use crate::plan::{Change, Stop};

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#c62828;--soft:#8882}\
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}\
.verdict{font-size:1.1rem;padding:.7rem 1rem;border-left:.4rem solid var(--line);background:var(--soft)}\
.good{border-color:var(--good)}.bad{border-color:var(--bad)}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;\
border-bottom:1px solid var(--line)}th{font-weight:600;white-space:nowrap}\
code,pre{font:.86rem/1.4 ui-monospace,monospace}pre{background:var(--soft);padding:.7rem;overflow:auto;max-height:30rem}\
.minus{color:var(--bad)}.plus{color:var(--good)}details{margin:.6rem 0}summary{cursor:pointer}\
.quiet{opacity:.75;font-size:.9rem}";

pub(super) fn page(report: &Report) -> String {
    let name = if report.guest.name.is_empty() { &report.source } else { &report.guest.name };
    let title = format!("{}: from {} to KVM", escape(name), report.guest.origin.name());
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    verdict(&mut out, report);
    found(&mut out, report);
    changed(&mut out, report);
    written(&mut out, report);
    if let Some(boot) = &report.boot {
        boot_test(&mut out, boot);
    }
    times(&mut out, report);
    out.push_str("</body></html>\n");
    out
}

fn verdict(out: &mut String, report: &Report) {
    let good = report.error.is_none()
        && report.stage == Stage::Converted
        && (report.stops.is_empty() || report.boot.is_some())
        && report.boot.as_ref().is_none_or(|boot| boot.verdict == "booted");
    let bad = report.error.is_some()
        || report.boot.as_ref().is_some_and(|boot| boot.verdict == "not-booted")
        || !report.stops.is_empty() && report.boot.is_none();
    let class = if bad {
        "bad"
    } else if good {
        "good"
    } else {
        ""
    };
    add(out, format_args!("<p class=\"verdict {class}\">{}</p>\n", escape(&sentence(&report.conclusion()))));
    let stops: Vec<_> = report.stops.iter().map(Stop::sentence).collect();
    list(out, "What keeps it from starting", &stops);
    list(out, "What a person has to do", &report.plan.to_do);
    list(out, "Warnings", &report.warnings);
}

fn found(out: &mut String, report: &Report) {
    out.push_str("<h2>What was found</h2>\n<table>\n");
    row(out, "Source", &report.source);
    if !report.date.is_empty() {
        row(out, "Begun", &report.date.replace('T', " ").replace('Z', " UTC"));
    }
    let guest = &report.guest;
    if let Some(memory) = guest.memory_bytes {
        row(out, "Memory", &block::size::human(memory));
    }
    if let Some(cpus) = guest.cpus.count {
        row(out, "Processors", &cpus.to_string());
    }
    if let Some(firmware) = report.firmware {
        row(out, "Firmware", &firmware.name().to_uppercase());
        for why in &report.inspection.firmware_reasons {
            row(out, "", why);
        }
    }
    for nic in &guest.nics {
        let text = [nic.mac.as_deref(), nic.model.as_deref(), nic.network_name.as_deref()];
        row(out, "Network card", &text.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
    for disk in &report.disks {
        let size = block::size::human(disk.size_bytes);
        row(
            out,
            "Disk",
            &format!("{}: {size}, {}, {}", disk.id, disk.source_format, disk.chain.join(" on ")),
        );
    }
    out.push_str("</table>\n");
    for system in &report.inspection.systems {
        self::system(out, system);
    }
    list(out, "Remarks on the disks", &report.inspection.problems);
    list(out, "Remarks on the description", &guest.notes);
}

fn system(out: &mut String, system: &System) {
    let product = if system.product.is_empty() { system.kind.name() } else { &system.product };
    add(
        out,
        format_args!("<h3>{} on {}</h3>\n<table>\n", escape(product), escape(&system.location.to_string())),
    );
    if !system.host_name.is_empty() {
        row(out, "Host name", &system.host_name);
    }
    for kernel in &system.kernels {
        row(out, if kernel.default { "Kernel (default)" } else { "Kernel" }, &self::kernel(kernel));
    }
    for tools in &system.tools {
        row(out, "Guest tools", &tools.name);
    }
    for interface in &system.interfaces {
        let fixed = if interface.is_static { ", static address" } else { "" };
        row(out, "Interface", &format!("{}{fixed}", interface.name));
    }
    for obstacle in &system.obstacles {
        row(
            out,
            if obstacle.fatal { "In the way" } else { "Note" },
            &format!("{}. {}", obstacle.message, obstacle.hint),
        );
    }
    out.push_str("</table>\n");
}

fn kernel(kernel: &Kernel) -> String {
    let initramfs = kernel.initramfs.as_ref().map_or_else(
        || "no initramfs".to_owned(),
        |found| format!("initramfs by {}, {}", found.generator, found.compression),
    );
    let drivers: Vec<_> = kernel
        .drivers
        .iter()
        .filter(|driver| driver.name.starts_with("virtio") && driver.place != DriverPlace::Missing)
        .map(|driver| format!("{}: {}", driver.name, driver.place.name()))
        .collect();
    format!("{}; {initramfs}; {}", kernel.release, drivers.join(", "))
}

fn changed(out: &mut String, report: &Report) {
    let tense = if report.stage == Stage::Converted { "What was changed" } else { "What would be changed" };
    add(out, format_args!("<h2>{tense}</h2>\n"));
    if report.plan.changes.is_empty() {
        out.push_str("<p>Nothing in the guest.</p>\n");
    }
    for change in &report.plan.changes {
        self::change(out, change);
    }
    list(out, "Left alone", &report.plan.left_alone);
}

fn change(out: &mut String, change: &Change) {
    let path = change.guest_path.to_string_lossy();
    add(
        out,
        format_args!(
            "<details><summary><code>{}</code> &middot; {} &middot; {}</summary>\n",
            escape(&path),
            change.action.name(),
            escape(&change.reason)
        ),
    );
    if !change.diff.is_empty() {
        out.push_str("<pre>");
        for line in &change.diff {
            let class = match line.as_bytes().first() {
                Some(b'-') => "minus",
                Some(b'+') => "plus",
                _ => "",
            };
            add(out, format_args!("<span class=\"{class}\">{}</span>\n", escape(line)));
        }
        out.push_str("</pre>\n");
    }
    add(
        out,
        format_args!(
            "<p class=\"quiet\">To undo: {}<br>SHA-256 <code>{}</code> &rarr; <code>{}</code></p></details>\n",
            escape(&change.undo),
            short(&change.old_digest),
            short(&change.new_digest)
        ),
    );
}

/// The first digits of a digest are enough for people.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(if digest.is_empty() { "none" } else { digest })
}

fn written(out: &mut String, report: &Report) {
    let any = |disk: &ReportedDisk| !disk.output.is_empty();
    if !report.disks.iter().any(any) && report.files.is_empty() {
        return;
    }
    out.push_str("<h2>What was written</h2>\n<table>\n");
    for disk in report.disks.iter().filter(|disk| any(disk)) {
        let copied = block::size::human(disk.copied_bytes);
        let size = block::size::human(disk.size_bytes);
        let taken = match disk.taken_bytes {
            0 => String::new(),
            bytes => format!("; the file takes {}", block::size::human(bytes)),
        };
        row(out, &disk.output, &format!("{} of {size}, {copied} of it copied{taken}", disk.output_format));
    }
    for file in &report.files {
        row(out, file, "");
    }
    for network in &report.networks {
        row(out, "Network card", network);
    }
    out.push_str("</table>\n");
}

fn boot_test(out: &mut String, boot: &BootTest) {
    out.push_str("<h2>The test boot</h2>\n<table>\n");
    row(out, "Answer", &boot.verdict.replace('-', " "));
    if !boot.message.is_empty() {
        row(out, "Why", &boot.message);
    }
    row(out, "Run by", &format!("{}, {:.1} s", boot.engine, boot.seconds));
    for (seconds, station, line) in &boot.stations {
        let separator = if line.is_empty() { "" } else { ": " };
        row(out, &format!("{seconds:.2} s"), &format!("{station}{separator}{line}"));
    }
    out.push_str("</table>\n<pre>");
    for line in &boot.console {
        add(out, format_args!("{}\n", escape(line)));
    }
    out.push_str("</pre>\n");
}

fn times(out: &mut String, report: &Report) {
    out.push_str("<h2>How long it took</h2>\n<table>\n");
    for (step, time) in &report.timings {
        row(out, step, &format!("{:.2} s", time.as_secs_f64()));
    }
    out.push_str("</table>\n");
    add(out, format_args!("<p class=\"quiet\">Written by vimg {}.</p>\n", env!("CARGO_PKG_VERSION")));
}

fn row(out: &mut String, head: &str, text: &str) {
    add(out, format_args!("<tr><th>{}</th><td>{}</td></tr>\n", escape(head), escape(text)));
}

fn list(out: &mut String, title: &str, items: &[String]) {
    if items.is_empty() {
        return;
    }
    add(out, format_args!("<p><strong>{title}</strong></p><ul>\n"));
    for item in items {
        add(out, format_args!("<li>{}</li>\n", escape(item)));
    }
    out.push_str("</ul>\n");
}

/// Writing to a string cannot fail.
fn add(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().collect::<String>()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

/// What came from outside is text, never markup.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            letter if letter.is_control() && letter != '\t' => out.push('\u{fffd}'),
            letter => out.push(letter),
        }
    }
    out
}
