//! What a conversion has found, changed and shown: one report, as JSON for programs and as a page for people.

mod html;

use std::time::Duration;

use serde_json::{Value, json};

use crate::guest::{Bus, FirmwareKind, Guest};
use crate::inspect::Inspection;
use crate::plan::{Plan, Stop};

/// Everything about one conversion.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What was converted, as the user named it.
    pub source: String,
    /// The machine as its source describes it.
    pub guest: Guest,
    /// What is on its disks.
    pub inspection: Inspection,
    /// What was changed, or would be.
    pub plan: Plan,
    /// Files of some file systems could only be overwritten: the plan is what fits.
    pub only_overwritten: bool,
    /// What keeps the new machine from starting, if that is known beforehand.
    pub stops: Vec<Stop>,
    /// How far it came.
    pub stage: Stage,
    /// What went wrong; `None`: nothing.
    pub error: Option<String>,
    /// The firmware of the new machine.
    pub firmware: Option<FirmwareKind>,
    /// What the new machine's disks are attached to.
    pub bus: Option<Bus>,
    /// The disks.
    pub disks: Vec<ReportedDisk>,
    /// Other files that were written: descriptions, scripts.
    pub files: Vec<String>,
    /// What the test boot showed; `None`: there was none.
    pub boot: Option<BootTest>,
    /// When it was begun (UTC, ISO 8601); empty if nobody says.
    pub date: String,
    /// What each network card was connected to, and is now, in words.
    pub networks: Vec<String>,
    /// What each step took, in order.
    pub timings: Vec<(&'static str, Duration)>,
    /// What the user should know, in sentences.
    pub warnings: Vec<String>,
}

/// How far a conversion came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing is known yet.
    #[default]
    Begun,
    /// The plan is made, nothing is written.
    Planned,
    /// Disks and descriptions are complete.
    Converted,
}

impl Stage {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Planned => "planned",
            Self::Converted => "converted",
        }
    }
}

/// A disk on its way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReportedDisk {
    /// What the source calls it.
    pub id: String,
    /// Where its bytes came from, the whole chain, top first.
    pub chain: Vec<String>,
    /// Format of the source.
    pub source_format: String,
    /// Its size as the guest sees it, in bytes.
    pub size_bytes: u64,
    /// The file that was written; empty if none was.
    pub output: String,
    /// Its format.
    pub output_format: String,
    /// Bytes that were copied; the rest are zeros.
    pub copied_bytes: u64,
    /// Bytes that the file takes on its host; 0 if it has none of its own.
    pub taken_bytes: u64,
}

/// The answer of `vimg bootcheck`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BootTest {
    /// `booted`, `not-booted`, `not-checked`.
    pub verdict: String,
    /// Why not, in words; empty if it booted.
    pub message: String,
    /// What ran it.
    pub engine: String,
    /// How long it took.
    pub seconds: f64,
    /// Stations on the way: seconds, name, line.
    pub stations: Vec<(f64, String, String)>,
    /// The last lines of the console.
    pub console: Vec<String>,
    /// The whole document.
    pub document: Value,
}

impl BootTest {
    /// Reads the answer out of the JSON document of `vimg bootcheck --output json` for one image; `None` if it is none.
    pub fn of_document(document: &Value) -> Option<Self> {
        let check = document.get("checks")?.get(0)?;
        let text = |key: &str| check.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let words = [text("message"), text("detail")];
        let stations = check.get("time-line").and_then(Value::as_array);
        let station = |station: &Value| {
            let member = |key: &str| station.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let seconds = station.get("seconds").and_then(Value::as_f64).unwrap_or_default();
            (seconds, member("station"), member("line"))
        };
        let lines = check.get("console").and_then(|console| console.get("last-lines"));
        let lines = lines.and_then(Value::as_array);
        Some(Self {
            verdict: text("verdict"),
            message: words.iter().filter(|word| !word.is_empty()).cloned().collect::<Vec<_>>().join(": "),
            engine: text("engine"),
            seconds: check.get("seconds").and_then(Value::as_f64).unwrap_or_default(),
            stations: stations.map(|list| list.iter().map(station).collect()).unwrap_or_default(),
            console: lines
                .map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
                .unwrap_or_default(),
            document: check.clone(),
        })
    }
}

impl Report {
    /// In one line: what became of it.
    pub fn conclusion(&self) -> String {
        if let Some(error) = &self.error {
            return format!("failed: {error}");
        }
        match (self.stage, &self.boot) {
            (Stage::Converted, Some(boot)) => match boot.verdict.as_str() {
                "booted" => format!("converted, and it boots ({:.1} s, {})", boot.seconds, boot.engine),
                "not-booted" => format!("converted, but it does not boot: {}", boot.message),
                _ => format!("converted; whether it boots could not be checked: {}", boot.message),
            },
            (Stage::Converted, None) if !self.stops.is_empty() => {
                format!("converted all the same, but it does not start as it is: {}", self.stops[0].message)
            }
            (Stage::Converted, None) => "converted; not boot-tested".to_owned(),
            (Stage::Planned, _) => "planned; nothing was written".to_owned(),
            (Stage::Begun, _) => "not finished".to_owned(),
        }
    }

    /// The document for programs; its fields are described in docs/v2v.md.
    pub fn document(&self) -> Value {
        let mut value = json!({
            "source": self.source,
            "name": self.guest.name,
            "origin": self.guest.origin.name(),
            "stage": self.stage.name(),
            "date": self.date,
            "vimg-version": env!("CARGO_PKG_VERSION"),
            "conclusion": self.conclusion(),
            "error": self.error,
            "firmware": self.firmware.map(FirmwareKind::name),
            "bus": self.bus.map(Bus::name),
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "files": self.files,
            "networks": self.networks,
        });
        value["systems"] = self.inspection.systems.iter().map(system).collect();
        value["changes"] = self.plan.changes.iter().map(change).collect();
        value["left-alone"] = json!(self.plan.left_alone);
        value["to-do"] = json!(self.plan.to_do);
        value["stops"] =
            self.stops.iter().map(|stop| json!({ "message": stop.message, "hint": stop.hint })).collect();
        value["warnings"] = json!(self.warnings);
        value["boot"] = self.boot.as_ref().map_or(Value::Null, |boot| boot.document.clone());
        value["seconds"] =
            self.timings.iter().map(|(step, time)| ((*step).to_owned(), json!(time.as_secs_f64()))).collect();
        value
    }

    /// The page for people: one file that needs nothing else.
    pub fn html(&self) -> String {
        html::page(self)
    }
}

fn disk(disk: &ReportedDisk) -> Value {
    json!({
        "id": disk.id,
        "chain": disk.chain,
        "source-format": disk.source_format,
        "size": disk.size_bytes,
        "output": disk.output,
        "output-format": disk.output_format,
        "copied": disk.copied_bytes,
        "taken": disk.taken_bytes,
    })
}

fn system(system: &crate::inspect::System) -> Value {
    json!({
        "root": system.location.to_string(),
        "kind": system.kind.name(),
        "distribution": system.distribution,
        "version": system.version,
        "product": system.product,
        "architecture": system.architecture,
        "host-name": system.host_name,
        "kernels": system.kernels.iter().map(|kernel| json!(kernel.release)).collect::<Vec<_>>(),
        "obstacles": system.obstacles.iter().map(|obstacle| json!({
            "code": obstacle.code, "message": obstacle.message, "hint": obstacle.hint, "fatal": obstacle.fatal,
        })).collect::<Vec<_>>(),
    })
}

fn change(change: &crate::plan::Change) -> Value {
    json!({
        "file": change.guest_path.to_string_lossy(),
        "action": change.action.name(),
        "topic": change.topic,
        "reason": change.reason,
        "undo": change.undo,
        "old-sha256": change.old_digest,
        "new-sha256": change.new_digest,
        "diff": change.diff,
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::plan::{Action, Change};

    fn booted() -> Value {
        json!({"booted": 1, "checks": [{
            "verdict": "booted", "engine": "kvm", "seconds": 6.5,
            "time-line": [{"station": "kernel", "seconds": 0.4, "line": "Linux version 6.1"}],
            "console": {"last-lines": ["<b>login:</b>"]},
        }]})
    }

    fn report() -> Report {
        let change = Change {
            volume: 0,
            path: PathBuf::from("/etc/fstab"),
            guest_path: PathBuf::from("/etc/fstab"),
            action: Action::Replace { bytes: b"new".to_vec() },
            topic: "device-name",
            reason: "'/dev/sda1' & friends will not exist".to_owned(),
            undo: "edit it".to_owned(),
            needed: false,
            old_digest: "aa".to_owned(),
            new_digest: "bb".to_owned(),
            diff: vec!["-/dev/sda1 / ext4".to_owned(), "+UUID=1 / ext4".to_owned()],
        };
        Report {
            source: "web <1>.vmx".to_owned(),
            date: "2026-11-28T19:00:00Z".to_owned(),
            networks: vec!["00:50:56:00:00:0a: network 'VM <Net>' becomes bridge br0".to_owned()],
            disks: vec![ReportedDisk {
                output: "/vms/web-sda.qcow2".to_owned(),
                output_format: "qcow2".to_owned(),
                size_bytes: 8 << 30,
                copied_bytes: 2 << 30,
                taken_bytes: 1 << 30,
                ..ReportedDisk::default()
            }],
            stage: Stage::Converted,
            plan: Plan { changes: vec![change], ..Plan::default() },
            boot: BootTest::of_document(&booted()),
            ..Report::default()
        }
    }

    #[test]
    fn the_answer_of_a_boot_test_is_understood() {
        let boot = BootTest::of_document(&booted()).unwrap();
        assert_eq!((boot.verdict.as_str(), boot.engine.as_str(), boot.seconds), ("booted", "kvm", 6.5));
        assert_eq!(boot.stations, [(0.4, "kernel".to_owned(), "Linux version 6.1".to_owned())]);
        for nothing in [json!(null), json!({}), json!({"checks": []}), json!([1])] {
            assert_eq!(BootTest::of_document(&nothing), None);
        }
    }

    #[test]
    fn conclusions() {
        let mut report = report();
        assert_eq!(report.conclusion(), "converted, and it boots (6.5 s, kvm)");
        report.boot.as_mut().unwrap().verdict = "not-booted".to_owned();
        report.boot.as_mut().unwrap().message = "no init".to_owned();
        assert_eq!(report.conclusion(), "converted, but it does not boot: no init");
        report.boot = None;
        assert_eq!(report.conclusion(), "converted; not boot-tested");
        report.stops = vec![Stop { message: "no root".to_owned(), hint: String::new() }];
        assert_eq!(report.conclusion(), "converted all the same, but it does not start as it is: no root");
        report.error = Some("no space".to_owned());
        assert_eq!(report.conclusion(), "failed: no space");
    }

    #[test]
    fn a_page_escapes_what_it_shows() {
        let page = report().html();
        assert!(page.contains("web &lt;1&gt;.vmx") && !page.contains("web <1>"));
        assert!(page.contains("&lt;b&gt;login:&lt;/b&gt;") && !page.contains("<b>login"));
        assert!(page.contains("&amp; friends"));
        assert!(page.contains("2026-11-28 19:00:00 UTC") && page.contains("VM &lt;Net&gt;"));
        assert!(page.contains("qcow2 of 8 GiB, 2 GiB of it copied; the file takes 1 GiB"), "{page}");
        assert!(page.contains(&format!("Written by vimg {}", env!("CARGO_PKG_VERSION"))));
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    }

    #[test]
    fn a_document_has_every_change() {
        let document = report().document();
        assert_eq!(document["changes"][0]["file"], "/etc/fstab");
        assert_eq!(document["changes"][0]["action"], "replace");
        assert_eq!(document["boot"]["verdict"], "booted");
    }
}
