//! Copying all disks that are wanted.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use block::file::CacheMode;
use block::size::human;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::{Disks, partition, unused};
use image::{Format, OpenOptions, Share, Spec};
use v2v::guest::document;
use v2v::p2v::copy::{self, Job, SEGMENT, Tally};
use v2v::p2v::state::{Digest, Identity, State};
use v2v::p2v::{Found, Mounted, PhysicalDisk, is_at_rest};

use super::Args;
use super::freeze::Still;
use super::target::{MACHINE, Place, send_description};
use crate::app::App;
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::Reporter;

/// The state's file in the folder of the images, and beside nothing.
const STATE_IN_FOLDER: &str = ".vimg-p2v-state.json";
const STATE_HERE: &str = "vimg-p2v-state.json";

pub(super) fn copy_all(args: &Args, found: &Found, app: &App) -> Outcome {
    let wanted = found.select(&args.disks)?;
    if wanted.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "no disk was found on this machine").into());
    }
    let rate = args
        .rate
        .as_deref()
        .map(|text| block::size::parse_named("rate limit", text, 0..=u64::MAX))
        .transpose()?;
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder)
            .map_err(Error::from)
            .context(|| format!("Could not make '{}'", folder.display()))?;
    }
    let places = places(args, &wanted)?;
    let state_path = state_path(args);
    let reporter = Reporter::new(&args.progress, args.quiet, app)?;
    let still = hold_still(args, &wanted, &state_path, app)?;
    let sources = wanted.iter().map(|disk| open_disk(disk, app)).collect::<Result<Vec<_>>>()?;
    let left_out = left_out(args, &wanted, &sources, &still.paths(), app)?;
    if args.restart {
        let _ = std::fs::remove_file(&state_path);
    }
    let state = Mutex::new(State::load(&state_path)?.unwrap_or_default());
    let run = Run { args, app, reporter: &reporter, state: &state, state_path: &state_path, rate };
    for (index, disk) in wanted.iter().enumerate() {
        let part = One { disk, source: &sources[index], place: &places[index], unused: &left_out[index] };
        run.disk(&part).map_err(|error| run.ended(error.context(disk.name.clone())))?;
    }
    drop(still);
    reporter.finish();
    describe(args, found, &wanted, &places, app)?;
    let _ = std::fs::remove_file(&state_path);
    Ok(Exit::OK)
}

fn places(args: &Args, wanted: &[&PhysicalDisk]) -> Outcome<Vec<Place>> {
    let format = Format::from_name(&args.format).ok_or_else(|| Error::usage("unknown format"))?;
    let place = |disk: &&PhysicalDisk| match (&args.output, &args.to) {
        (Some(folder), _) => Place::in_folder(folder, disk, format),
        (None, template) => {
            Place::on_server(template.as_deref().unwrap_or_default(), disk, wanted.len() == 1)
        }
    };
    Ok(wanted.iter().map(place).collect())
}

fn state_path(args: &Args) -> PathBuf {
    match (&args.state, &args.output) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => folder.join(STATE_IN_FOLDER),
        (None, None) => PathBuf::from(STATE_HERE),
    }
}

/// Freezes what is to be frozen, and refuses to copy what others write to unless that is asked for.
fn hold_still(args: &Args, wanted: &[&PhysicalDisk], state: &Path, app: &App) -> Outcome<Still> {
    let mut written: Vec<&Mounted> = wanted.iter().flat_map(|disk| disk.written()).collect();
    written.sort_by(|one, other| other.path.cmp(&one.path));
    // A file system that is mounted twice is one.
    written.dedup_by(|one, other| one.path == other.path || one.device == other.device);
    if args.freeze {
        let ours = [args.output.clone(), Some(crate::app::directory_of(state))];
        let ours: Vec<PathBuf> = ours.into_iter().flatten().collect();
        let paths: Vec<PathBuf> = written.iter().map(|mounted| mounted.path.clone()).collect();
        return Ok(Still::hold(&paths, &ours)?);
    }
    let shown = |mounted: &&Mounted| format!("{} on {}", mounted.device, mounted.path.display());
    let names = written.iter().map(shown).collect::<Vec<_>>().join(", ");
    if !written.is_empty() && !args.live {
        let error =
            Error::usage(format!("these file systems can be written to while they are copied: {names}"));
        let error = error.hint("Best: start a rescue system and copy from there.");
        let error = error.hint("--freeze lets everybody who writes wait until the copy is done.");
        let error = error.hint("--live copies all the same; the copy is like a machine that lost power.");
        return Err(error.into());
    }
    if !written.is_empty() {
        app.warn(&format!(
            "file systems that may change meanwhile; the copy is like a machine that lost power: {names}"
        ));
    }
    Ok(Still::hold(&[], &[])?)
}

/// Opens a disk for reading, around the page cache, in which another name of the disk may have left what is no longer true.
fn open_disk(disk: &PhysicalDisk, app: &App) -> Result<Arc<dyn BlockDevice>> {
    let spec = Spec::from_filename(&disk.device.to_string_lossy())?;
    let options = |cache| OpenOptions {
        format: Format::from_name("raw"),
        cache,
        force_share: true,
        share: Share::default(),
        policy: app.policy(),
        ..OpenOptions::default()
    };
    let opened = image::open(&spec, &options(CacheMode::None)).or_else(|error| match error.kind() {
        ErrorKind::Permission | ErrorKind::NotFound => Err(error),
        _ => image::open(&spec, &options(CacheMode::Writeback)),
    });
    let device = opened.hint(|| "Only root can read the disks of a machine.".to_owned())?.device();
    if device.size() != disk.size_bytes {
        let message =
            format!("{} has {} bytes, and is said to have {}", disk.name, device.size(), disk.size_bytes);
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(device)
}

/// What of each disk holds nothing.
fn left_out(
    args: &Args,
    wanted: &[&PhysicalDisk],
    sources: &[Arc<dyn BlockDevice>],
    frozen: &[PathBuf],
    app: &App,
) -> Outcome<Vec<Vec<std::ops::Range<u64>>>> {
    if args.whole {
        return Ok(vec![vec![]; wanted.len()]);
    }
    let disks = Disks::open_all(sources.to_vec())?;
    let found = unused::find(&disks, &|volume| is_at_rest(volume, wanted, frozen))?;
    for note in found.iter().flat_map(|unused| &unused.notes) {
        app.tell(note);
    }
    Ok(found.into_iter().map(|unused| unused.ranges).collect())
}

struct Run<'a> {
    args: &'a Args,
    app: &'a App,
    reporter: &'a Reporter<'a>,
    state: &'a Mutex<State>,
    state_path: &'a Path,
    rate: Option<u64>,
}

/// One disk on its way.
struct One<'a> {
    disk: &'a PhysicalDisk,
    source: &'a Arc<dyn BlockDevice>,
    place: &'a Place,
    unused: &'a [std::ops::Range<u64>],
}

impl Run<'_> {
    fn disk(&self, one: &One<'_>) -> Result<()> {
        let name = one.place.name();
        let identity = identity(one.disk, &**one.source)?;
        let known =
            self.with_state(|state| state.disk(&one.disk.name, &identity, &name, SEGMENT).cloned())?;
        if known.complete && one.place.exists() {
            self.app.tell(&format!("{}: complete already", one.disk.name));
            return Ok(());
        }
        if one.place.exists() {
            let message = format!("'{name}' is there already");
            return Err(Error::new(ErrorKind::Usage, message).hint("Remove it, or choose another folder."));
        }
        let secrets = self.args.objects.secrets().map_err(plain)?;
        let (target, fresh) =
            one.place.open(one.disk.size_bytes, !known.done.is_empty(), &secrets, self.app)?;
        if target.size() > one.disk.size_bytes {
            self.app.warn(&format!(
                "{name} is larger than {}: what is behind the disk's end stays",
                one.disk.name
            ));
        }
        let nothing = std::collections::BTreeMap::new();
        let job = Job {
            source: Arc::clone(one.source),
            unused: one.unused,
            target: Arc::clone(&target),
            fresh,
            done: if fresh { &nothing } else { &known.done },
            segment_bytes: known.segment_bytes,
            threads: self.args.threads.into(),
            rate: self.rate,
        };
        if fresh {
            self.remember(&name, true, &[])?;
        }
        let tally = copy::copy(&job, self.reporter, &|segments| self.remember(&name, false, segments))?;
        if self.args.verify {
            let digests =
                self.with_state(|state| state.disk(&one.disk.name, &identity, &name, SEGMENT).cloned())?.done;
            copy::verify(&job, &digests, self.reporter)?;
        }
        target.close()?;
        drop((job, target));
        one.place.complete()?;
        self.with_state(|state| {
            state.disk(&one.disk.name, &identity, &name, SEGMENT)?.complete = true;
            state.save(self.state_path)
        })?;
        self.say(one, tally);
        Ok(())
    }

    fn with_state<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes down what is safe. `anew`: nothing else is.
    fn remember(&self, target: &str, anew: bool, segments: &[(u64, Digest)]) -> Result<()> {
        self.with_state(|state| {
            if let Some(disk) = state.disks.iter_mut().find(|disk| disk.target == target) {
                if anew {
                    disk.done.clear();
                    disk.complete = false;
                }
                disk.done.extend(segments.iter().copied());
            }
            state.save(self.state_path)
        })
    }

    fn say(&self, one: &One<'_>, tally: Tally) {
        if self.args.quiet {
            return;
        }
        let mut text = format!(
            "{}: {} read, {} written, {} left out",
            one.disk.name,
            human(tally.read),
            human(tally.written),
            human(tally.left_out)
        );
        if tally.unchanged > 0 {
            text.push_str(&format!(", {} were there already", human(tally.unchanged)));
        }
        self.app.note(&format!("{text}\n"));
    }

    /// How the copy of a disk has failed.
    fn ended(&self, error: Error) -> Failure {
        let error = match error.kind() {
            ErrorKind::Usage | ErrorKind::Permission | ErrorKind::NotFound => error,
            _ => error.hint("What has been copied is kept: the same command goes on from there."),
        };
        self.reporter.failure(error)
    }
}

/// The error of a failure that has one.
fn plain(failure: Failure) -> Error {
    match failure {
        Failure::Error { error, .. } => error,
        _ => Error::usage("wrong usage"),
    }
}

/// By what a disk is known again.
fn identity(disk: &PhysicalDisk, device: &dyn BlockDevice) -> Result<Identity> {
    let table = match partition::read(device) {
        Ok(table) => table.map(|table| table.uuid).unwrap_or_default(),
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(_) => String::new(),
    };
    Ok(Identity { size_bytes: disk.size_bytes, serial: disk.serial.clone().unwrap_or_default(), table })
}

/// Leaves the description at the receiving end.
fn describe(
    args: &Args,
    found: &Found,
    wanted: &[&PhysicalDisk],
    places: &[Place],
    app: &App,
) -> Outcome<()> {
    let disks: Vec<(&PhysicalDisk, String, &str)> = wanted
        .iter()
        .zip(places)
        .map(|(disk, place)| {
            let (name, format) = place.in_description(disk);
            (*disk, name, format)
        })
        .collect();
    let text = format!("{:#}\n", document(&found.machine(&disks)));
    let path = match (&args.output, &args.to) {
        (Some(folder), _) => folder.join(MACHINE),
        (None, template) => {
            let template = template.as_deref().unwrap_or_default();
            if send_description(template, &text, &args.objects.secrets()?, app)? {
                return Ok(());
            }
            app.warn(&format!("the server has no export '{MACHINE}': the description is here, in {MACHINE}; put it beside the images"));
            PathBuf::from(MACHINE)
        }
    };
    let written = std::fs::write(&path, text);
    written.map_err(Error::from).context(|| format!("Could not write '{}'", path.display()))?;
    Ok(())
}
