//! `bootcheck`: does an image boot? A small virtual machine is built around it, and watched.
//!
//! ```text
//!   disk      the image, read-only, under an overlay that vanishes (or that --write-to keeps)
//!   source    kernel, initramfs and command line: named, or found on the disk
//!   choose    the engine: our own KVM machine, or an installed qemu
//!   listen    whoever follows: progress, console, keyboard, signals
//! ```
//!
//! Everything that has a name is opened first; then the program gives up what it does not need any more, and only
//! then are the bytes of the disk looked at.

pub(super) mod choose;
mod disk;
pub(super) mod firmware;
mod listen;
mod source;
mod through;
mod wanted;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::getppid;

use block::{BlockDevice, Error, ErrorKind, ResultExt as _};
use bootcheck::check::{self, Check, Listener};
use bootcheck::engine::{Boot, Disk, MachineSpec};
use bootcheck::loader::FirmwareUse;
use bootcheck::report::{Report, document, exit_code, junit};
use bootcheck::verdict::Verdict;
use guestdisk::Keys;
use guestdisk::boot::firmware::Firmware;
use image::json;

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::keys::KeyArgs;
use crate::progress::{ProgressArgs, Reporter};

use choose::Chosen;
use firmware::Firmwares;
use listen::Following;
use wanted::Wanted;

/// Check whether an image boots
///
/// A virtual machine is built around the image, with its kernel, initramfs and command line as its boot loader would
/// use them ('console=ttyS0' and 'panic=-1' are added), and its serial console is watched. The image is not changed:
/// what the guest writes goes to a temporary file and vanishes. Patterns, reasons and the JSON document are described
/// in docs/bootcheck.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  every image boots
  1  at least one does not
  2  at least one could not be checked

Examples:
  vimg bootcheck disk.qcow2
  vimg bootcheck --list-entries disk.qcow2
  vimg bootcheck --entry 2 --timeout 600 disk.vmdk
  vimg bootcheck --kernel vmlinuz --initrd initrd.img --cmdline 'root=/dev/vda1 ro' disk.raw
  vimg bootcheck --expect 'Started nginx' --expect 'login:' disk.qcow2
  vimg bootcheck --jobs 4 --output=json --junit report.xml *.qcow2
  vimg bootcheck --write-to after-boot.qcow2 disk.qcow2
  vimg bootcheck --interactive disk.qcow2
  vimg bootcheck --firmware auto disk.qcow2
  vimg bootcheck --key all:file:passphrase.txt encrypted.qcow2
  vimg bootcheck --firmware uefi --firmware-vars guest_VARS.fd disk.qcow2")]
pub(crate) struct Args {
    /// Format of the images (default: found out from their contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Boot this kernel (bzImage or ELF) instead of the disk's
    #[arg(long, value_name = "FILE", help_heading = "What is booted")]
    kernel: Option<PathBuf>,
    /// Its initramfs (repeatable: one after the other), instead of the disk's
    #[arg(long, value_name = "FILE", help_heading = "What is booted")]
    initrd: Vec<PathBuf>,
    /// Its command line, instead of the disk's
    #[arg(long, value_name = "WORDS", help_heading = "What is booted")]
    cmdline: Option<String>,
    /// Add this to the command line (repeatable)
    #[arg(long, value_name = "WORDS", help_heading = "What is booted")]
    append: Vec<String>,
    /// Boot this entry of the disk's boot loader: its number, id or title (default: the boot loader's own)
    #[arg(long, value_name = "ENTRY", help_heading = "What is booted")]
    entry: Option<String>,
    /// List the entries of the disk's boot loader, and boot nothing
    #[arg(long, help_heading = "What is booted")]
    list_entries: bool,
    /// Boot the disk's own boot loader through a firmware: bios, uefi, auto (what the disk is for), or both
    #[arg(long, value_name = "FIRMWARE", help_heading = "The firmware")]
    firmware: Option<String>,
    /// The firmware's file (default: the one that is installed)
    #[arg(long, value_name = "FILE", help_heading = "The firmware")]
    firmware_code: Option<PathBuf>,
    /// UEFI's variable store, say of the source machine; the guest gets a copy (default: an empty one)
    #[arg(long, value_name = "FILE", help_heading = "The firmware")]
    firmware_vars: Option<PathBuf>,
    /// Write the variable store to this file as the guest has left it
    #[arg(long, value_name = "FILE", help_heading = "The firmware")]
    vars_out: Option<PathBuf>,
    /// Make the boot loader's kernels speak on the serial port: 'console=ttyS0' is added to its configuration, in the
    /// overlay only
    #[arg(long, help_heading = "The firmware")]
    add_console: bool,
    /// The guest works when the console shows this (repeatable, in this order; default: a login prompt or a target)
    #[arg(long, value_name = "REGEX", help_heading = "What is looked for")]
    expect: Vec<String>,
    /// The guest does not work when the console shows this (repeatable)
    #[arg(long, value_name = "REGEX", help_heading = "What is looked for")]
    fail: Vec<String>,
    /// Do not take the built-in signs of failure for failures
    #[arg(long, help_heading = "What is looked for")]
    ignore_failures: bool,
    /// Seconds until a guest that shows neither does not boot [default: 300, where qemu translates 900]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "What is looked for")]
    timeout: Option<u32>,
    /// Memory of the guest, with a suffix k, M, G
    #[arg(long, value_name = "SIZE", default_value = "1G", help_heading = "The machine")]
    memory: String,
    /// Processors of the guest
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64), help_heading = "The machine")]
    cpus: u8,
    /// Another disk of the guest, behind the image (repeatable)
    #[arg(long, value_name = "FILENAME", help_heading = "The machine")]
    disk: Vec<String>,
    /// auto, kvm (our own machine) or qemu (an installed qemu-system-x86_64)
    #[arg(long, value_name = "ENGINE", default_value = "auto", help_heading = "The machine")]
    engine: String,
    /// How disks are attached: pci or mmio
    #[arg(long, value_name = "TRANSPORT", default_value = "pci", help_heading = "The machine")]
    transport: String,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    /// Also write a report for build servers
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the whole console to this file (with several images: files in this directory)
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Keep what the guest writes in this new qcow2 image, whose backing file is the image
    #[arg(long, value_name = "OVERLAY")]
    write_to: Option<String>,
    /// How many images are checked at once
    #[arg(short, long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
    /// Type on the guest's console, until it ends or Ctrl-] is typed
    #[arg(short, long)]
    interactive: bool,
    /// Say nothing: the exit code is the answer
    #[arg(short, long)]
    quiet: bool,
    /// End when this process, which has started us, ends
    #[arg(long, value_name = "PID", hide = true)]
    ends_with: Option<i32>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    keys: KeyArgs,
    /// The images, each a guest of its own
    #[arg(required = true, value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// The check could not be made; in any case no verdict.
const NOT_CHECKED: u8 = 2;
/// A firmware or boot loader of which nothing is seen for this part of the time limit has stopped.
const STALLS: u32 = 5;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    checked(args, app).map_err(|failure| match failure {
        Failure::Error { error, exit: Exit::ERROR } => Failure::Error { exit: Exit(NOT_CHECKED), error },
        Failure::Silent(Exit::ERROR) => Failure::Silent(Exit(NOT_CHECKED)),
        other => other,
    })
}

fn checked(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "bootcheck", app)?;
    let wanted = args.wanted()?;
    let keys = args.keys.read(&args.source.objects.secrets()?, app)?;
    if args.list_entries {
        return source::list(args, &keys, output, app);
    }
    let reporter = Reporter::new(&ProgressArgs::default(), true, app)?;
    args.ends_with.map(end_with).transpose()?;
    let chosen = choose::choose(&args.engine, app)?;
    let given = source::Given::read(args)?;
    let firmwares = wanted.firmware.as_ref().map(|firmware| Firmwares::read(firmware, args)).transpose()?;
    let vars_out = args.vars_out.as_deref().map(new_file).transpose()?;
    let junit = args.junit.as_deref().map(new_file).transpose()?;
    let bars = listen::Bars::new(args.shows_progress(app));
    let subjects = args.subjects(&wanted.runs(), &reporter, &bars, app)?;
    chosen.confine(subjects.iter().all(Subject::only_files), app);
    let run = Run { args, keys, wanted, given, firmwares, chosen, bars, output, app };
    let reports = run.check_all(&subjects);
    if let Some(file) = junit {
        write_junit(file, &reports)?;
    }
    if let Some(file) = vars_out {
        write_vars(file, &reports)?;
    }
    run.conclude(&reports, &reporter)
}

/// A signal ends this process in an orderly way as soon as its parent `pid` is gone.
fn end_with(pid: i32) -> Outcome<()> {
    prctl::set_pdeathsig(Signal::SIGTERM).map_err(Error::from)?;
    // Gone already: nothing will be sent.
    if getppid().as_raw() != pid {
        return Err(Error::new(ErrorKind::Cancelled, "who has asked for the check is gone").into());
    }
    Ok(())
}

/// What the machine starts, what is known of it, and the firmware, if there is one.
type WhatBoots = (Boot, Option<check::Source>, Option<FirmwareUse>);

/// An image that is to be checked.
struct Subject {
    name: String,
    /// The firmware through which it is to be booted, if that is settled.
    firmware: Option<Firmware>,
    /// Or why it cannot be.
    opened: block::Result<disk::Opened>,
    following: Arc<Following>,
}

impl Subject {
    fn only_files(&self) -> bool {
        self.opened.as_ref().map_or(true, |opened| opened.only_files)
    }
}

impl Args {
    /// Opens everything that has a name.
    fn subjects(
        &self,
        runs: &[Option<Firmware>],
        reporter: &Reporter<'_>,
        bars: &listen::Bars,
        app: &App,
    ) -> Outcome<Vec<Subject>> {
        let several = self.filenames.len() * runs.len() > 1;
        let subject = |(index, name, firmware): (usize, &String, Option<Firmware>)| {
            let opened = match disk::open(self, name, app) {
                Ok(opened) => Ok(opened),
                Err(Failure::Error { error, .. }) => Err(error),
                Err(failure) => return Err(failure),
            };
            let console = self.console.as_deref().map(|path| {
                if several { new_file(&path.join(console_name(index, name))) } else { new_file(path) }
            });
            let following = Following::new(listen::Options {
                name: several.then(|| name.clone()),
                console: console.transpose()?,
                verbose: app.global.verbose && !self.interactive,
                interactive: self.interactive,
                signal: reporter.signal(),
                bar: bars.add(name),
            });
            Ok(Subject { name: name.clone(), firmware, opened, following: Arc::new(following) })
        };
        let all = self.filenames.iter().flat_map(|name| runs.iter().map(move |firmware| (name, *firmware)));
        (0..).zip(all).map(|(index, (name, firmware))| (index, name, firmware)).map(subject).collect()
    }

    fn shows_progress(&self, app: &App) -> bool {
        use std::io::IsTerminal as _;
        !(self.quiet || self.interactive || app.global.verbose) && std::io::stderr().is_terminal()
    }
}

/// A console's file among those of other images.
fn console_name(index: usize, name: &str) -> String {
    let base = Path::new(name).file_name().unwrap_or_default().to_string_lossy().replace('/', "_");
    format!("{}-{base}.log", index + 1)
}

fn new_file(path: &Path) -> Outcome<File> {
    Ok(File::create(path).context(|| format!("could not create '{}'", path.display()))?)
}

fn write_junit(mut file: File, reports: &[Report]) -> Outcome<()> {
    Ok(file.write_all(junit(reports).as_bytes()).context(|| "could not write the JUnit report".to_owned())?)
}

/// The variable store as the guest has left it.
fn write_vars(mut file: File, reports: &[Report]) -> Outcome<()> {
    let left = |report: &Report| report.outcome.as_ref().and_then(|outcome| outcome.vars.clone());
    match reports.iter().find_map(left) {
        Some(vars) => {
            Ok(file.write_all(&vars).context(|| "could not write the variable store".to_owned())?)
        }
        None => Err(Error::unsupported("--vars-out: no guest has left a variable store").into()),
    }
}

/// All checks of one command.
struct Run<'a> {
    args: &'a Args,
    keys: Keys,
    wanted: Wanted,
    given: source::Given,
    firmwares: Option<Firmwares>,
    chosen: Chosen,
    bars: listen::Bars,
    output: OutputFormat,
    app: &'a App,
}

impl Run<'_> {
    /// Checks the images, as many at once as are wanted; the reports come back in the order of the images.
    fn check_all(&self, subjects: &[Subject]) -> Vec<Report> {
        let next = AtomicUsize::new(0);
        let reports: Mutex<Vec<Option<Report>>> = Mutex::new(subjects.iter().map(|_| None).collect());
        let work = || {
            while let Some((index, subject)) = {
                let index = next.fetch_add(1, Ordering::Relaxed);
                subjects.get(index).map(|subject| (index, subject))
            } {
                let report = self.check(subject);
                let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                self.show(&report, subjects.len() > 1);
                reports[index] = Some(report);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..usize::from(self.args.jobs).min(subjects.len()) {
                scope.spawn(work);
            }
            work();
        });
        reports.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
    }

    fn check(&self, subject: &Subject) -> Report {
        let mut report = self.check_opened(subject);
        if report.outcome.is_some() {
            report.remarks.extend(self.chosen.remark.clone());
        }
        report.remarks.extend(subject.following.finish());
        if let Ok(opened) = &subject.opened
            && let Err(error) = opened.close()
        {
            report.remarks.push(format!("what the guest wrote could not be kept: {error}"));
        }
        report
    }

    fn check_opened(&self, subject: &Subject) -> Report {
        let opened = match &subject.opened {
            Ok(opened) => opened,
            Err(error) => return Report::not_checked(&subject.name, error),
        };
        if subject.following.cancelled() {
            return Report::not_checked(&subject.name, &Error::new(ErrorKind::Cancelled, "cancelled"));
        }
        let (boot, source, firmware) = match self.what_boots(subject, opened) {
            Ok(found) => found,
            Err(verdict) => return Report { verdict, ..Report::new(&subject.name) },
        };
        let check = Check {
            image: subject.name.clone(),
            machine: self.machine(opened, boot),
            source,
            firmware,
            expectations: self.wanted.expectations.clone(),
            passphrases: self.keys.passphrases_to_type(),
            time_limit: self.time_limit(),
            until_end: self.args.interactive,
        };
        let listener: Arc<dyn Listener> = Arc::clone(&subject.following) as _;
        check::run(check, &*self.chosen.engine, &listener)
    }

    fn what_boots(&self, subject: &Subject, opened: &disk::Opened) -> Result<WhatBoots, Verdict> {
        if let Some(firmwares) = &self.firmwares {
            let stall_limit = self.time_limit().unwrap_or(self.chosen.time_limit) / STALLS;
            let through = through::find(
                firmwares,
                subject.firmware,
                self.args,
                (&opened.disks, &self.keys),
                stall_limit,
            );
            let through = through.map_err(|error| Verdict::not_checked(&error))?;
            return Ok((through.boot, None, Some(through.used)));
        }
        let found = source::find(&self.given, self.args, self.chosen.append, (&opened.disks, &self.keys))?;
        Ok((found.boot, Some(found.source), None))
    }

    fn machine(&self, opened: &disk::Opened, boot: Boot) -> MachineSpec {
        let disk = |(index, device): (usize, &Arc<dyn BlockDevice>)| Disk {
            device: Arc::clone(device),
            read_only: false,
            serial: format!("vimg-{index}"),
        };
        MachineSpec {
            cpus: self.args.cpus,
            memory_bytes: self.wanted.memory_bytes,
            disks: opened.disks.iter().enumerate().map(disk).collect(),
            transport: self.wanted.transport,
            boot,
        }
    }

    /// A person at the console has all the time in the world.
    fn time_limit(&self) -> Option<Duration> {
        match self.args.timeout {
            Some(seconds) => Some(Duration::from_secs(seconds.into())),
            None if self.args.interactive => None,
            None => Some(self.chosen.time_limit),
        }
    }

    /// Shows a report as soon as it is there: of several images only the answer, unless one does not boot.
    fn show(&self, report: &Report, several: bool) {
        if self.args.quiet || self.output == OutputFormat::Json {
            return;
        }
        let evidence = !several || report.verdict.exit_code() != 0;
        self.bars.suspend(|| self.app.note(&report.to_text(evidence)));
    }

    fn conclude(&self, reports: &[Report], reporter: &Reporter<'_>) -> Outcome {
        if self.output == OutputFormat::Json && !self.args.quiet {
            self.app.print(&format!("{}\n", json::pretty(&document(reports))))?;
        } else if !self.args.quiet && reports.len() > 1 {
            let count = |code| reports.iter().filter(|report| report.verdict.exit_code() == code).count();
            let (good, bad, unknown) = (count(0), count(1), count(2));
            self.app.note(&format!("{good} booted, {bad} did not boot, {unknown} could not be checked\n"));
        }
        let cancelled =
            |report: &Report| matches!(report.verdict, Verdict::NotChecked { cancelled: true, .. });
        if reports.iter().any(cancelled)
            && let Failure::Error { exit: exit @ Exit(128..), .. } =
                reporter.failure(Error::new(ErrorKind::Cancelled, "cancelled"))
        {
            return Ok(exit);
        }
        Ok(Exit(exit_code(reports)))
    }
}
