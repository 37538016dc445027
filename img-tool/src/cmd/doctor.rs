//! `doctor`: what this host can do, and what to do about what it cannot.
//!
//! Every line is tried rather than looked up where trying is harmless: a guest of a few instructions for KVM, two files
//! in the current folder for locks and reflinks. Nothing is left behind.

mod files;
mod host;

use bootcheck::kvm::{KvmState, probe};
use image::json;
use serde_json::json;

use super::bootcheck::choose::{QEMU, QEMU_REMEDY, remedy, why_not};
use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::{Exit, Outcome};
use crate::programs::find;

/// Say what this host can do: boot guests, lock and share files, be a sandbox
///
/// Each line says 'ok', or 'gap' with what to do about it. A gap matters only to those who need what is missing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  guests can be booted, by KVM or qemu
  1  they cannot

Examples:
  vimg doctor
  vimg doctor --output=json")]
pub(crate) struct Args {
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
}

/// What has been found out about one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// What it is about.
    name: &'static str,
    /// In words.
    found: String,
    /// What to do; `None`: nothing, it is as it should be.
    remedy: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, found: found.into(), remedy: None }
    }

    fn gap(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "doctor", app)?;
    let kvm = probe();
    let qemu = find(QEMU).is_some();
    let engine = match (&kvm, qemu) {
        (KvmState::Real, _) => Some("kvm"),
        (_, true) => Some("qemu-tcg"),
        (_, false) => None,
    };
    let mut findings = vec![about_kvm(&kvm)];
    findings.extend(host::findings());
    findings.extend(files::findings());
    let text = match output {
        OutputFormat::Human => text(&findings, engine),
        OutputFormat::Json => json::pretty(&document(&findings, engine)) + "\n",
    };
    app.print(&text)?;
    Ok(if engine.is_some() { Exit::OK } else { Exit::ERROR })
}

fn about_kvm(state: &KvmState) -> Finding {
    match state {
        KvmState::Real => Finding::ok("KVM", "runs guests on the processor"),
        other => Finding::gap("KVM", why_not(other), format!("{}; {QEMU_REMEDY}", remedy(other))),
    }
}

fn text(findings: &[Finding], engine: Option<&str>) -> String {
    let mut text = String::new();
    for Finding { name, found, remedy } in findings {
        let mark = if remedy.is_none() { "ok " } else { "gap" };
        text.push_str(&format!("{mark}  {name:<14} {found}\n"));
        if let Some(remedy) = remedy {
            text.push_str(&format!("{:<20}remedy: {remedy}\n", ""));
        }
    }
    text.push_str(&match engine {
        Some(engine) => format!("\nbootcheck uses the engine {engine} here.\n"),
        None => "\nbootcheck cannot boot guests here.\n".to_owned(),
    });
    text
}

fn document(findings: &[Finding], engine: Option<&str>) -> serde_json::Value {
    let finding = |finding: &Finding| {
        json!({
            "name": finding.name,
            "ok": finding.remedy.is_none(),
            "found": finding.found,
            "remedy": finding.remedy,
        })
    };
    json!({
        "can-boot": engine.is_some(),
        "engine": engine,
        "findings": findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_come_with_a_remedy() {
        let findings = [Finding::ok("seccomp", "there"), about_kvm(&KvmState::Missing)];
        let text = text(&findings, None);
        assert!(
            text.starts_with("ok   seccomp        there\ngap  KVM            there is no /dev/kvm\n"),
            "{text}"
        );
        assert!(text.contains("remedy: load the module kvm_intel or kvm_amd"), "{text}");
        assert!(text.ends_with("cannot boot guests here.\n"), "{text}");
        let document = document(&findings, Some("kvm"));
        assert_eq!((&document["can-boot"], &document["engine"]), (&json!(true), &json!("kvm")));
        assert_eq!(document["findings"][1]["ok"], json!(false));
    }
}
