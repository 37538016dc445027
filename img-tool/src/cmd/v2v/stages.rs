//! The stages of a conversion, one after the other; the report grows with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use block::{BlockDevice, Error, ErrorKind, ResultExt as _};
use bootcheck::scratch;
use guestdisk::detect::Kind;
use guestdisk::{Disks, Keys};
use image::convert::{ConvertReport, ConvertRequest, Target, convert as copy};
use image::progress::Progress as _;
use image::{CreateRequest, Format, Layer, OpenOptions, Share};
use v2v::apply;
use v2v::convert::in_place;
use v2v::guest::{Bus, DiskImage, FirmwareKind, Guest, Nic};
use v2v::inspect::{Inspection, System, SystemKind, inspect_again, inspect_with};
use v2v::names::DiskNames;
use v2v::plan::{self, Action, Plan, PlanOptions, Stop, TargetBus};
use v2v::report::{BootTest, Report, ReportedDisk, Stage};
use v2v::source::{self, SourceOptions};
use v2v::target::ova;

use super::runner::runner;
use super::writers::{Backend, Known, Writers};
use super::{Args, boot, describe, place, space};
use crate::app::App;
use crate::exit::{Failure, Outcome};
use crate::keys::explain;
use crate::progress::Reporter;
use crate::sandbox;

/// Changes to a guest are small: an initramfs or two that are packed anew.
const MOST_CHANGES: u64 = 16 << 30;
/// Memory for the test boot of a machine whose source says nothing.
const TEST_MEMORY: u64 = 1 << 30;

/// A disk of the source, and the overlay that takes the changes.
pub(super) struct Opened {
    layer: Arc<Layer>,
    overlay: Arc<dyn BlockDevice>,
}

impl Opened {
    /// Whether anything was written to it.
    fn is_changed(&self) -> block::Result<bool> {
        let (mut offset, size) = (0, self.overlay.size());
        while offset < size {
            let own = self.overlay.layer_extent(offset, size - offset)?;
            if own.stored != block::Stored::Absent {
                return Ok(true);
            }
            offset += own.len.max(1);
        }
        Ok(false)
    }

    /// As it is going to be copied.
    pub(super) fn device(&self) -> &dyn BlockDevice {
        &*self.overlay
    }

    /// As the writer of packages wants it.
    pub(super) fn for_package(&self) -> ova::Source {
        ova::Source { layer: Arc::clone(&self.layer), disk: Some(Arc::clone(&self.overlay)) }
    }
}

/// Everything that does not change while the stages go by.
pub(super) struct Context<'a> {
    pub(super) args: &'a Args,
    pub(super) app: &'a App,
    pub(super) reporter: &'a Reporter<'a>,
    format: Format,
    bus: Bus,
    backend: Backend,
    /// What opens encrypted volumes.
    keys: Keys,
}

/// Converts, or plans. What is known when it fails is in the report.
pub(super) fn convert(args: &Args, app: &App, reporter: &Reporter<'_>, report: &mut Report) -> Outcome<()> {
    let context = Context {
        args,
        app,
        reporter,
        format: output_format(args)?,
        bus: bus(&args.bus)?,
        backend: Backend::parse(args, app.global.untrusted)?,
        keys: args.keys.read(&args.source.objects.secrets()?, app)?,
    };
    check_words(args)?;
    describe::check(&args.target)?;
    context.go(report)
}

fn output_format(args: &Args) -> Outcome<Format> {
    match args.output_format.as_str() {
        "qcow2" => Ok(Format::Qcow2),
        "raw" if args.compress => Err(Failure::usage("a raw disk cannot be compressed")),
        "raw" => Ok(Format::Raw),
        other => Err(Failure::usage(format!("--output-format expects 'qcow2' or 'raw' not '{other}'"))),
    }
}

fn bus(name: &str) -> Outcome<Bus> {
    match name {
        "virtio" => Ok(Bus::Virtio),
        "virtio-scsi" => Ok(Bus::VirtioScsi),
        "sata" => Ok(Bus::Sata),
        other => {
            Err(Failure::usage(format!("--bus expects 'virtio', 'virtio-scsi' or 'sata' not '{other}'")))
        }
    }
}

/// As much as a machine can have.
fn memory(text: &str) -> block::Result<u64> {
    block::size::parse_named("memory", text, 16 << 20..=64 << 40)
}

/// What is wrong with the command line is told before anything is done.
fn check_words(args: &Args) -> Outcome<()> {
    if !matches!(args.engine.as_str(), "auto" | "kvm" | "qemu" | "uml") {
        return Err(Failure::usage(format!(
            "--engine expects 'auto', 'kvm', 'qemu' or 'uml' not '{}'",
            args.engine
        )));
    }
    if args.output_dir.is_none() && !args.plan {
        let error = Error::usage("nobody has said where to: -o DIR is missing");
        return Err(error.hint("or look first, and write nothing: --plan").into());
    }
    if args.name.as_deref().is_some_and(|name| file_name(name) != name) {
        return Err(Failure::usage("--name has to be usable as a file name"));
    }
    args.format.as_deref().map(crate::cli::target_format).transpose().map(drop)
}

/// Runs a stage and notes what it took.
fn timed<T>(
    report: &mut Report,
    name: &'static str,
    stage: impl FnOnce(&mut Report) -> Outcome<T>,
) -> Outcome<T> {
    let started = Instant::now();
    let result = stage(report);
    report.timings.push((name, started.elapsed()));
    result
}

impl Context<'_> {
    fn go(&self, report: &mut Report) -> Outcome<()> {
        report.guest = timed(report, "description", |_| self.read())?;
        report.guest.name = file_name(&report.guest.name);
        if !self.args.no_verify {
            timed(report, "digests", |report| self.verify(report))?;
        }
        // Before anything is looked at that takes long.
        let mut place = match &self.args.output_dir {
            Some(directory) if !self.args.plan => {
                Some(place::Place::new(directory, &report.guest.name, self.args.overwrite)?)
            }
            _ => None,
        };
        let opened = timed(report, "opening", |report| self.open(place.as_ref(), report))?;
        refuse_twice(&opened)?;
        if let Some(place) = &mut place {
            place.protect(self.files(&opened));
        }
        let before = times(&opened);
        self.confine(place.as_ref());
        let devices = || opened.iter().map(|disk| Arc::clone(&disk.overlay)).collect::<Vec<_>>();
        let disks = timed(report, "inspection", |report| self.inspect(devices(), report))?;
        report.firmware = Some(firmware(report));
        report.bus = Some(self.bus);
        report.plan = timed(report, "plan", |report| self.plan(&disks, report))?;
        report.stage = Stage::Planned;
        self.check_cancelled()?;
        self.refuse_stops(report)?;
        let Some(place) = &mut place else { return Ok(()) };
        report.warnings.extend(space::check(&opened, place, self.args, self.format)?);
        if !report.plan.changes.is_empty() {
            timed(report, "changes", |report| self.change(&disks, report))?;
            drop(disks);
            timed(report, "verification", |report| self.verify_changes(devices(), report))?;
        }
        if describe::wants_disks(&self.args.target) {
            timed(report, "copy", |report| self.copy(&opened, place, report))?;
        }
        timed(report, "descriptions", |report| describe::write(self, &opened, place, report))?;
        if times(&opened) != before {
            let error = Error::new(ErrorKind::Corrupt, "a file of the source was changed while it was read");
            return Err(error.hint("shut the machine down on the other side, and convert again").into());
        }
        report.stage = Stage::Converted;
        self.publish(place, report)?;
        if self.args.bootcheck {
            timed(report, "boot test", |report| self.boot(place, report))?;
            write_reports(place, report)?;
        }
        Ok(())
    }

    /// The files that are read from, the description included, by device and inode.
    fn files(&self, opened: &[Opened]) -> Vec<(u64, u64)> {
        use std::os::unix::fs::MetadataExt as _;
        let described = self.args.sources.iter().filter_map(|name| std::fs::metadata(name).ok());
        let own = opened.iter().flat_map(|disk| disk.layer.files()).map(|file| file.identity());
        own.chain(described.map(|meta| (meta.dev(), meta.ino()))).collect()
    }

    /// With `--untrusted`, gives up everything but the output folder before the disks' bytes are looked at.
    fn confine(&self, place: Option<&place::Place>) {
        if self.app.global.untrusted {
            let applied = match place {
                Some(place) => sandbox::enter_converting(place.directory()),
                None => sandbox::enter(&[]),
            };
            self.app.tell(&format!("sandbox: {applied}"));
        }
    }

    fn check_cancelled(&self) -> Outcome<()> {
        if self.reporter.cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted").into());
        }
        Ok(())
    }

    /// What the source says about the machine.
    fn read(&self) -> Outcome<Guest> {
        let args = self.args;
        let firmware = match args.firmware.as_deref() {
            None | Some("auto") => None,
            Some("bios") => Some(FirmwareKind::Bios),
            Some("uefi") => Some(FirmwareKind::Uefi),
            Some(other) => {
                return Err(Failure::usage(format!(
                    "--firmware expects 'bios', 'uefi' or 'auto' not '{other}'"
                )));
            }
        };
        let Some((first, further)) = args.sources.split_first() else {
            return Err(Failure::usage("no source"));
        };
        let options = SourceOptions {
            name: args.name.clone(),
            memory_bytes: args.memory.as_deref().map(memory).transpose()?,
            cpus: args.cpus,
            firmware,
            nics: args.nic.iter().map(|text| source::parse_nic(text)).collect::<block::Result<Vec<Nic>>>()?,
            disks: further.to_vec(),
            system: args.system.clone(),
            disks_have_format: args.format.is_some(),
            policy: self.app.policy(),
            ..SourceOptions::default()
        };
        let mut guest = source::read(first, &options)?;
        if let Some(format) = &args.format {
            for disk in &mut guest.disks {
                if let DiskImage::Name { format: own @ None, .. } = &mut disk.image {
                    *own = Some(format.clone());
                }
            }
        }
        if guest.disks.is_empty() {
            return Err(Error::invalid("the machine has no hard disk").into());
        }
        Ok(guest)
    }

    /// The files of an OVF package are what its manifest says.
    fn verify(&self, report: &mut Report) -> Outcome<()> {
        let Some(source) = self.args.sources.first() else { return Ok(()) };
        if let Some(manifest) = source::Manifest::find(source)? {
            let (total, mut done) = (manifest.total_bytes()?, 0);
            let verified = manifest.verify(&mut |bytes| {
                done += bytes;
                self.reporter.update(done, total);
                !self.reporter.cancelled()
            });
            self.reporter.finish();
            let verified = verified?;
            report.warnings.extend(verified.notes);
        }
        Ok(())
    }

    /// Opens the disks for reading, and puts overlays over them.
    fn open(&self, place: Option<&place::Place>, report: &mut Report) -> Outcome<Vec<Opened>> {
        let scratch = place.map_or_else(std::env::temp_dir, |place| place.scratch().to_path_buf());
        let options = OpenOptions {
            force_share: self.args.source.force_share,
            share: Share::NoWriters,
            policy: self.app.policy(),
            secrets: self.args.source.objects.secrets()?,
            keep_access_time: true,
            ..OpenOptions::default()
        };
        let mut opened = vec![];
        let found =
            source::open_disks(&report.guest, &options).map_err(|error| self.args.keys.unopened(error))?;
        for (disk, found) in report.guest.disks.iter().zip(found) {
            report.warnings.extend(found.notes);
            report.disks.push(ReportedDisk {
                id: disk.id.clone(),
                chain: found.chain,
                source_format: found.format.name().to_owned(),
                size_bytes: found.size,
                output_format: self.format.name().to_owned(),
                ..ReportedDisk::default()
            });
            let overlay = scratch::in_file(found.device, &scratch, MOST_CHANGES)?;
            opened.push(Opened { layer: found.layer, overlay });
        }
        Ok(opened)
    }

    /// Looks at what is on the disks.
    fn look(&self, devices: Vec<Arc<dyn BlockDevice>>) -> Outcome<Disks> {
        Ok(Disks::open_with(devices, &self.keys).map_err(explain)?)
    }

    fn inspect(&self, devices: Vec<Arc<dyn BlockDevice>>, report: &mut Report) -> Outcome<Disks> {
        let disks = self.look(devices)?;
        report.inspection = inspect_with(&disks, &names(&report.guest))?;
        // Windows knows best what its clock shows.
        if let Some(windows) = main_system(&report.inspection).and_then(|system| system.windows.as_ref()) {
            report.guest.local_time = windows.local_time;
        }
        warn_of_arrays(report);
        Ok(disks)
    }

    fn plan(&self, disks: &Disks, report: &mut Report) -> Outcome<Plan> {
        if self.args.no_changes {
            for stop in self.obstacles(report) {
                let warning = format!(
                    "Nothing was changed in the guest, and it would not start on KVM: {}",
                    stop.sentence()
                );
                report.warnings.push(warning);
            }
            return Ok(Plan::default());
        }
        if report.inspection.systems.is_empty() && !self.args.force {
            let error = Error::new(ErrorKind::NotFound, "no operating system was found on the disks");
            return Err(error.hint("convert the disks without changes: --no-changes").into());
        }
        let mut plan = plan::make(disks, &report.guest, &report.inspection, &self.plan_options())?;
        if self.only_overwrites(&plan, disks, report) {
            report.only_overwritten = true;
            plan = in_place::fit(plan, disks)?;
        }
        report.stops = self.obstacles(report);
        report.stops.extend(plan.stops.iter().cloned());
        if report.inspection.systems.is_empty() {
            report.stops.push(Stop {
                message: "no operating system was found on the disks".to_owned(),
                hint: "to copy disks that are to have none: --no-changes".to_owned(),
            });
        }
        Ok(plan)
    }

    /// Whether files of file systems that we cannot write can only be overwritten: because that is wanted, or because
    /// nothing here can run the appliance.
    fn only_overwrites(&self, plan: &Plan, disks: &Disks, report: &mut Report) -> bool {
        match self.backend {
            Backend::Native => return true,
            Backend::Appliance | Backend::Mount => return false,
            Backend::Auto => {}
        }
        let kind = |change: &plan::Change| {
            disks.volumes().get(change.volume)?.content.as_ref().map(|found| found.kind)
        };
        let needs = |change: &plan::Change| {
            matches!(kind(change), Some(Kind::Xfs | Kind::Btrfs))
                && !matches!(change.action, Action::Replace { .. })
        };
        if !plan.changes.iter().any(needs) {
            return false;
        }
        match runner(self.args, &[], self.app) {
            Ok(_) => false,
            Err(_) => {
                report.warnings.push(
                    "Nothing here can run the appliance, which new files on this guest's file systems take \
                     ('vimg doctor' says why): only what is there already was overwritten."
                        .to_owned(),
                );
                true
            }
        }
    }

    fn plan_options(&self) -> PlanOptions {
        PlanOptions {
            bus: match self.bus {
                Bus::VirtioScsi => TargetBus::VirtioScsi,
                Bus::Sata => TargetBus::Sata,
                _ => TargetBus::VirtioBlk,
            },
            keep_tools: self.args.keep_tools,
            no_nic_names: self.args.no_nic_names,
            autorelabel: self.args.autorelabel,
            serial_console: self.args.serial_console,
            virtio_win: self.args.virtio_win.clone(),
        }
    }

    /// What keeps the guest from starting whatever is changed in it.
    fn obstacles(&self, report: &Report) -> Vec<Stop> {
        // What a driver that is given, or another bus, takes out of the way.
        let solved = |system: &System, code: &str| {
            let given = system.windows.is_some() && self.args.virtio_win.is_some();
            code == "no-virtio-driver" && (self.bus == Bus::Sata || given)
        };
        let systems = report.inspection.systems.iter();
        let fatal = systems.flat_map(|system| {
            system.obstacles.iter().filter(|obstacle| obstacle.fatal && !solved(system, obstacle.code))
        });
        let mut stops = vec![];
        for obstacle in fatal {
            let stop = Stop { message: obstacle.message.clone(), hint: obstacle.hint.clone() };
            if !stops.contains(&stop) {
                stops.push(stop);
            }
        }
        stops
    }

    /// What is known to keep the new machine from starting is told before anything is written.
    fn refuse_stops(&self, report: &Report) -> Outcome<()> {
        /// As many as a person reads.
        const MOST: usize = 8;
        if self.args.force || report.stops.is_empty() {
            return Ok(());
        }
        let mut messages: Vec<_> = report.stops.iter().map(|stop| stop.message.as_str()).take(MOST).collect();
        let more = format!("and {} more", report.stops.len().saturating_sub(MOST));
        if report.stops.len() > MOST {
            messages.push(&more);
        }
        let mut error = Error::unsupported(messages.join("; ")).context("the guest would not start on KVM");
        let mut hints: Vec<&String> = vec![];
        for hint in report.stops.iter().take(MOST).map(|stop| &stop.hint) {
            if !hint.is_empty() && !hints.contains(&hint) {
                hints.push(hint);
            }
        }
        for hint in hints {
            error = error.hint(hint.clone());
        }
        Err(error.hint("or convert in spite of it: --force").into())
    }

    /// Makes the changes, on the overlays.
    fn change(&self, disks: &Disks, report: &mut Report) -> Outcome<()> {
        let names = names(&report.guest);
        let known = Known { disks, inspection: &report.inspection, names: &names, plan: &report.plan };
        let mut writers = Writers::new(known, self.backend, self.args, self.app)?;
        let applied = apply::apply(&report.plan, &mut |volume| writers.open(volume), &mut ())?;
        writers.finish()?;
        for volume in applied.volumes {
            let location = disks.volumes().get(volume.volume).map(|found| found.location.to_string());
            let location = location.unwrap_or_default();
            report.warnings.extend(volume.notes.iter().map(|note| format!("{location}: {note}")));
        }
        Ok(())
    }

    /// Looks at the changed guest with fresh eyes: nothing is left to be changed.
    fn verify_changes(&self, devices: Vec<Arc<dyn BlockDevice>>, report: &mut Report) -> Outcome<()> {
        let disks = self.look(devices)?;
        let inspection = inspect_again(&disks, &names(&report.guest), &report.inspection)?;
        let mut left = plan::make(&disks, &report.guest, &inspection, &self.plan_options())?;
        if report.only_overwritten {
            left = in_place::fit(left, &disks)?;
        }
        if let Some(change) = left.changes.first() {
            let message = format!(
                "the guest was changed, but not as planned: '{}' would have to be changed again ({})",
                change.guest_path.display(),
                change.reason
            );
            return Err(Error::new(ErrorKind::Corrupt, message).into());
        }
        Ok(())
    }

    /// The one copy.
    fn copy(&self, opened: &[Opened], place: &mut place::Place, report: &mut Report) -> Outcome<()> {
        for (index, disk) in opened.iter().enumerate() {
            let name = format!("{}-{}.{}", report.guest.name, letters(index), self.format.name());
            let (now, end) = place.file(&name)?;
            let options = self.create_options();
            let copied = self
                .copy_disk(disk, &now, self.format, options, self.args.compress)
                .context(|| format!("{} to '{}'", report.disks[index].id, end.display()))?;
            report.disks[index].output = end.display().to_string();
            report.disks[index].copied_bytes = copied.tally.copied.saturating_add(copied.tally.shared);
            report.disks[index].taken_bytes = taken(&now);
        }
        Ok(())
    }

    /// Copies one disk to a new file.
    pub(super) fn copy_disk(
        &self,
        disk: &Opened,
        path: &Path,
        format: Format,
        options: Vec<(String, String)>,
        compress: bool,
    ) -> block::Result<ConvertReport> {
        let create = CreateRequest { options, ..CreateRequest::new(path.to_string_lossy(), format) };
        // A disk that was not changed is copied as it is: all short cuts of a convert are open then.
        let changed = disk.is_changed()?;
        let request = ConvertRequest {
            disk: changed.then(|| Arc::clone(&disk.overlay)),
            compress,
            cache: block::file::CacheMode::Writeback,
            ..ConvertRequest::new(vec![Arc::clone(&disk.layer)], Target::Create(create))
        };
        let copied = copy(&request, self.reporter);
        self.reporter.finish();
        copied
    }

    fn create_options(&self) -> Vec<(String, String)> {
        match self.args.preallocation.as_str() {
            "off" => vec![],
            mode => vec![("preallocation".to_owned(), mode.to_owned())],
        }
    }

    /// Everything gets its name, with a report that says so.
    fn publish(&self, place: &mut place::Place, report: &mut Report) -> Outcome<()> {
        self.check_cancelled()?;
        let names =
            [format!("{}-report.json", report.guest.name), format!("{}-report.html", report.guest.name)];
        for name in &names {
            report.files.push(place.directory().join(name).display().to_string());
        }
        place.write(&names[0], json_of(report).as_bytes(), false)?;
        place.write(&names[1], report.html().as_bytes(), false)?;
        Ok(place.publish()?)
    }

    fn boot(&self, place: &place::Place, report: &mut Report) -> Outcome<()> {
        let console = place.directory().join(format!("{}-console.log", report.guest.name));
        let test = boot::Test {
            disks: report
                .disks
                .iter()
                .map(|disk| (PathBuf::from(&disk.output), disk.output_format.as_str()))
                .collect(),
            firmware: report.firmware.filter(|_| !self.args.direct_kernel),
            memory_bytes: report.guest.memory_bytes.unwrap_or(TEST_MEMORY),
            // A User-Mode Linux runs no guests.
            engine: if self.args.engine == "uml" { "auto" } else { &self.args.engine },
            timeout: self.args.timeout,
            console: &console,
            passphrases: self.keys.passphrases_to_type(),
        };
        let tested = match test.run(&self.reporter.signal()) {
            Err(error) if error.kind() != ErrorKind::Cancelled => BootTest {
                verdict: "not-checked".to_owned(),
                message: error.to_string(),
                ..BootTest::default()
            },
            tested => tested?,
        };
        report.files.push(console.display().to_string());
        report.boot = Some(tested);
        Ok(())
    }
}

/// The bytes that a file takes on its host (`st_blocks` counts in 512 bytes, stat(2)).
fn taken(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512))
}

fn json_of(report: &Report) -> String {
    format!("{}\n", image::json::pretty(&report.document()))
}

/// The reports as they are now, in place of those that are there.
fn write_reports(place: &place::Place, report: &Report) -> Outcome<()> {
    let file = |ending: &str| place.directory().join(format!("{}-report.{ending}", report.guest.name));
    place::replace_file(&file("json"), json_of(report).as_bytes())?;
    Ok(place::replace_file(&file("html"), report.html().as_bytes())?)
}

/// BIOS or UEFI: what the source says, or else what the disks are made for.
fn firmware(report: &mut Report) -> FirmwareKind {
    let fits = &report.inspection.firmware;
    match report.guest.firmware.kind {
        Some(kind) if fits.is_empty() || fits.contains(&kind) => kind,
        Some(kind) => {
            let warning = format!(
                "the machine is to start by {}, but its disks are not made for that: {}",
                kind.name().to_uppercase(),
                report.inspection.firmware_reasons.join("; ")
            );
            report.warnings.push(warning);
            kind
        }
        None => fits.first().copied().unwrap_or(FirmwareKind::Bios),
    }
}

/// When each file of the source was last changed; devices of the host do not tell.
fn times(opened: &[Opened]) -> Vec<Option<std::time::SystemTime>> {
    let files = opened.iter().flat_map(|disk| disk.layer.files());
    files.map(|file| file.modified()).collect()
}

/// The same disk twice is a mistake: everything on it would be there twice.
fn refuse_twice(opened: &[Opened]) -> Outcome<()> {
    let mut known = vec![];
    for disk in opened {
        let Some(file) = &disk.layer.file else { continue };
        let id = (file.identity(), disk.layer.member.clone());
        if disk.layer.container.is_none() && known.contains(&id) {
            let message = format!("'{}' is given twice", disk.layer.filename);
            return Err(Error::usage(message).into());
        }
        known.push(id);
    }
    Ok(())
}

/// What the source calls its disks.
/// Arrays of software RAID that lack members, or of which something cannot be read or changed, make nobody stop; but they
/// are told.
fn warn_of_arrays(report: &mut Report) {
    let obstacles = report.inspection.systems.iter().flat_map(|system| &system.obstacles);
    for obstacle in obstacles.filter(|obstacle| obstacle.code.starts_with("md-")) {
        let mut message = obstacle.message.clone();
        if let Some(first) = message.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        let warning = format!("{message} ({}).", obstacle.hint);
        if !report.warnings.contains(&warning) {
            report.warnings.push(warning);
        }
    }
}

fn names(guest: &Guest) -> DiskNames {
    DiskNames::of(guest)
}

/// `sda`, `sdb`, as virt-v2v names the disks of a machine.
fn letters(index: usize) -> String {
    let mut name = vec![];
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        name.insert(0, char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
        rest /= 26;
    }
    format!("sd{}", name.into_iter().collect::<String>())
}

/// A machine's name as the beginning of names of files: nothing that leads elsewhere, nothing hidden.
fn file_name(name: &str) -> String {
    let clean: String =
        name.chars().map(|letter| if letter == '/' || letter.is_control() { '_' } else { letter }).collect();
    let clean = clean.trim().trim_start_matches('.');
    let mut end = clean.len().min(200);
    while !clean.is_char_boundary(end) {
        end -= 1;
    }
    if end == 0 { "guest".to_owned() } else { clean[..end].to_owned() }
}

/// Which system of several the machine starts is known by its kind only.
pub(super) fn main_system(inspection: &Inspection) -> Option<&System> {
    let systems = &inspection.systems;
    systems.iter().find(|system| system.kind != SystemKind::Other).or_else(|| systems.first())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_disks_and_files() {
        assert_eq!(
            [letters(0), letters(25), letters(26), letters(701), letters(702)],
            ["sda", "sdz", "sdaa", "sdzz", "sdaaa"]
        );
        assert_eq!(file_name("../../etc/x\n"), "_.._etc_x_");
        assert_eq!(file_name(""), "guest");
        assert_eq!(file_name(&"ä".repeat(300)).len(), 200);
        assert_eq!(file_name("Web Server (1)"), "Web Server (1)");
    }
}
