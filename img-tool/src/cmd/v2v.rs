//! `v2v`: another hypervisor's machine becomes a KVM guest that boots.
//!
//! ```text
//!   stages    description -> disks -> inspection -> plan -> changes -> copies -> descriptions -> test boot
//!   writers   who changes which file system
//!   place     the output folder: complete or not there
//!   space     whether it has room
//!   boot      `vimg bootcheck` on the result
//!   batch     many machines
//! ```
//!
//! The source is opened for reading only. Changes go to overlays and reach the output as part of the one copy.

mod batch;
mod boot;
mod describe;
mod place;
mod runner;
mod space;
mod stages;
mod writers;

use std::path::PathBuf;

use image::json;
use v2v::report::{Report, Stage};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::keys::KeyArgs;
use crate::progress::{ProgressArgs, Reporter};

/// Convert a virtual machine of another hypervisor to a KVM guest
///
/// SOURCE is what the other product wrote about the machine (a .vmx, an .ovf or its folder, an .ova, a .vbox, a Xen
/// configuration, libvirt's XML, a Hyper-V export, the description that 'vimg p2v' makes), or the disks themselves in
/// any format, all of one machine. The guest is inspected and changed so that it runs on virtio: its drivers in early
/// boot, names of devices, names of network interfaces, consoles. The source is never changed. DIR gets the disks, a
/// description for libvirt, and a report of everything that was found and changed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  converted (and booted, with --bootcheck); planned, with --plan, and nothing known is in the way
  1  not converted: nothing was written; with --plan: it would not be
  3  converted, but it does not boot
  4  converted, but whether it boots could not be checked
  5  converted with --force although it is known not to start, and no test boot has shown that it does
With --batch the worst of all machines: 1, 3, 5, 4, 0.

Examples:
  vimg v2v --plan web.vmx
  vimg v2v -o /var/lib/vms --bootcheck web.ova
  vimg v2v -o out -O raw --name db --memory 4G --network 'VM Network:default' db.vmx
  vimg v2v -o out --target libvirt,proxmox root.vhdx data.vhdx
  vimg v2v --batch plan.yaml --jobs 4")]
pub(crate) struct Args {
    /// The folder for disks, descriptions and the report
    #[arg(short, long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Format of the new disks: qcow2 or raw
    #[arg(short = 'O', long, value_name = "FMT", default_value = "qcow2", help_heading = "What is written")]
    output_format: String,
    /// Compress the new disks (qcow2)
    #[arg(short, long, help_heading = "What is written")]
    compress: bool,
    /// Reserve space for the new disks: off, metadata (qcow2), falloc or full
    #[arg(long, value_name = "MODE", default_value = "off", help_heading = "What is written")]
    preallocation: String,
    /// Descriptions of the new machine: libvirt, qemu, proxmox, kubevirt, ovf, ova (several with commas)
    #[arg(
        long,
        value_name = "KIND",
        value_delimiter = ',',
        default_value = "libvirt",
        help_heading = "What is written"
    )]
    target: Vec<String>,
    /// Replace files of the same names in DIR
    #[arg(long, help_heading = "What is written")]
    overwrite: bool,
    /// Name of the new machine
    #[arg(long, value_name = "NAME", help_heading = "The new machine")]
    name: Option<String>,
    /// Its memory, with a suffix k, M, G
    #[arg(long, value_name = "SIZE", help_heading = "The new machine")]
    memory: Option<String>,
    /// Its processors
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "The new machine")]
    cpus: Option<u32>,
    /// bios, uefi, or auto: what the description says, or else what the disks are made for
    #[arg(long, value_name = "FIRMWARE", help_heading = "The new machine")]
    firmware: Option<String>,
    /// What its disks are attached to: virtio, virtio-scsi or sata
    #[arg(long, value_name = "BUS", default_value = "virtio", help_heading = "The new machine")]
    bus: String,
    /// A network card, where the source does not say: mac=ADDRESS,network=NAME,model=MODEL (repeatable)
    #[arg(long, value_name = "NIC", help_heading = "The new machine")]
    nic: Vec<String>,
    /// Connect cards of the network IN with the network OUT, or all with OUT (repeatable)
    #[arg(long, value_name = "[IN:]OUT", help_heading = "The new machine")]
    network: Vec<String>,
    /// The same with the bridge OUT (repeatable)
    #[arg(long, value_name = "[IN:]OUT", help_heading = "The new machine")]
    bridge: Vec<String>,
    /// Connect the card of this address with a network or a bridge (repeatable)
    #[arg(long, value_name = "MAC:network|bridge:OUT", help_heading = "The new machine")]
    mac: Vec<String>,
    /// Show what would be changed, and write nothing
    #[arg(long, help_heading = "The guest's system")]
    plan: bool,
    /// Change nothing in the guest: only its disks and its description are converted
    #[arg(long, conflicts_with = "plan", help_heading = "The guest's system")]
    no_changes: bool,
    /// Leave the other hypervisor's guest tools as they are
    #[arg(long, help_heading = "The guest's system")]
    keep_tools: bool,
    /// Do not tie the names of network interfaces to their cards
    #[arg(long, help_heading = "The guest's system")]
    no_nic_names: bool,
    /// Have SELinux label all files anew at the first boot
    #[arg(long, help_heading = "The guest's system")]
    autorelabel: bool,
    /// Give the guest a console on its first serial port
    #[arg(long, help_heading = "The guest's system")]
    serial_console: bool,
    /// Windows: the drivers of the virtio-win project, unpacked or mounted; that of the disks is registered
    #[arg(long, value_name = "FOLDER", help_heading = "The guest's system")]
    virtio_win: Option<PathBuf>,
    /// Convert although something keeps the guest from starting on KVM (exit code 5)
    #[arg(long, help_heading = "The guest's system")]
    force: bool,
    /// How file systems are changed: auto, native (by vimg itself), appliance (by a small Linux in a test machine), or mount (by this host's kernel; root, trusted guests only)
    #[arg(long, value_name = "BACKEND", default_value = "auto", help_heading = "The guest's system")]
    backend: String,
    /// The appliance's kernel (default: the guest's own, or else this host's)
    #[arg(long, value_name = "FILE", requires = "appliance_modules", help_heading = "The guest's system")]
    appliance_kernel: Option<PathBuf>,
    /// The folder of its modules (/lib/modules/RELEASE)
    #[arg(long, value_name = "DIR", requires = "appliance_kernel", help_heading = "The guest's system")]
    appliance_modules: Option<PathBuf>,
    /// Which machine of an OVF with several
    #[arg(long, value_name = "ID", help_heading = "The source")]
    system: Option<String>,
    /// Format of the source's disks, where they are named themselves
    #[arg(short, long, value_name = "FMT", help_heading = "The source")]
    format: Option<String>,
    /// Do not compare the files of an OVF or OVA with their digests
    #[arg(long, help_heading = "The source")]
    no_verify: bool,
    /// Boot the result in a test machine
    #[arg(long, help_heading = "The test boot")]
    bootcheck: bool,
    /// What runs it, and the appliance: auto, kvm or qemu; or uml for the appliance alone
    #[arg(long, value_name = "ENGINE", default_value = "auto", help_heading = "The test boot")]
    engine: String,
    /// Seconds until a guest that has not come up does not boot
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "The test boot")]
    timeout: Option<u32>,
    /// Start the guest's kernel directly instead of through its firmware and boot loader
    #[arg(long, help_heading = "The test boot")]
    direct_kernel: bool,
    /// Convert the machines of this plan (YAML, docs/v2v.md)
    #[arg(long, value_name = "PLAN", conflicts_with_all = [
        "sources", "name", "memory", "cpus", "firmware", "nic", "network", "bridge", "mac", "plan", "system", "format",
        "no_changes", "keep_tools", "no_nic_names", "force", "serial_console", "autorelabel", "no_verify", "compress",
        "overwrite", "direct_kernel", "timeout", "virtio_win", "appliance_kernel",
        "keys_from_stdin",
    ], help_heading = "Many machines")]
    batch: Option<PathBuf>,
    /// How many of them at once
    #[arg(short, long, value_name = "NUMBER", requires = "batch", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Many machines")]
    jobs: Option<u16>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    keys: KeyArgs,
    /// The machine's description, or its disks
    #[arg(required_unless_present = "batch", value_name = "SOURCE")]
    sources: Vec<String>,
}

/// Converted, but it does not boot.
const NOT_BOOTED: u8 = 3;
/// Converted, but whether it boots is not known.
const NOT_CHECKED: u8 = 4;
/// Converted because that was wanted, although what keeps it from starting is known.
const STOPPED: u8 = 5;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "v2v", app)?;
    let spare = output == OutputFormat::Json || args.plan;
    let reporter = Reporter::new(&args.progress, args.quiet, app)?.sparing_stdout(spare);
    if let Some(plan) = &args.batch {
        return batch::run(plan, args.jobs, &args.passed_on(app), &reporter.signal(), app);
    }
    let date = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    let mut report = Report { source: args.sources.join(", "), date, ..Report::default() };
    let result = stages::convert(args, app, &reporter, &mut report);
    if let Err(Failure::Error { error, .. }) = &result {
        report.error = Some(error.to_string());
    }
    if output == OutputFormat::Json {
        app.print(&format!("{}\n", json::pretty(&report.document())))?;
    }
    // A plan is shown even if it would not be carried out.
    let planned = args.plan && report.stage == Stage::Planned;
    if planned && result.is_err() && output == OutputFormat::Human && !args.quiet {
        tell(&report, args, app)?;
    }
    result.map_err(|failure| match failure {
        Failure::Error { error, .. } => reporter.failure(error),
        other => other,
    })?;
    if output == OutputFormat::Human && !args.quiet {
        report.guest.notes.iter().chain(&report.warnings).for_each(|warning| app.warn(warning));
        tell(&report, args, app)?;
    }
    Ok(exit(&report))
}

fn exit(report: &Report) -> Exit {
    match report.boot.as_ref().map(|boot| boot.verdict.as_str()) {
        Some("booted") => Exit::OK,
        Some("not-booted") => Exit(NOT_BOOTED),
        _ if !report.stops.is_empty() => Exit(STOPPED),
        None => Exit::OK,
        Some(_) => Exit(NOT_CHECKED),
    }
}

/// The result, for people: the whole plan if that was asked for, else what became of it.
fn tell(report: &Report, args: &Args, app: &App) -> Outcome<()> {
    let mut text = String::new();
    if args.plan || app.global.verbose {
        text.push_str(&report.plan.to_text());
        if !report.stops.is_empty() {
            text.push_str("Keeps it from starting:\n");
        }
        for stop in &report.stops {
            text.push_str(&format!(" - {}\n", stop.sentence()));
        }
    }
    if report.stage == Stage::Converted {
        let name = &report.guest.name;
        text.push_str(&format!("{name}: {}\n", report.conclusion()));
        text.push_str(&format!("  changes   {}\n", report.plan.changes.len()));
        for file in report.disks.iter().map(|disk| &disk.output).chain(&report.files) {
            text.push_str(&format!("  written   {file}\n"));
        }
        for stop in &report.stops {
            text.push_str(&format!("  stops     {}\n", stop.sentence()));
        }
        for to_do in &report.plan.to_do {
            text.push_str(&format!("  to do     {to_do}\n"));
        }
    }
    app.print(&text)
}

impl Args {
    /// The options that hold for every machine of a plan.
    fn passed_on(&self, app: &App) -> Vec<String> {
        let mut words = vec![];
        if app.global.untrusted {
            words.push("--untrusted".to_owned());
        }
        for path in &app.global.allow {
            words.push(format!("--allow={}", path.display()));
        }
        for object in &self.source.objects.object {
            words.push(format!("--object={object}"));
        }
        words.extend(self.keys.words());
        if let Some(folder) = &self.output_dir {
            words.push(format!("--output-dir={}", folder.display()));
        }
        if self.bootcheck {
            words.push("--bootcheck".to_owned());
        }
        words
    }
}
