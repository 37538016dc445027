//! Copying all disks that are wanted.
//!
//! ```text
//!   questions     which disks, what is written to, what can be done about it, where to, has it been begun
//!   hold          freeze, take snapshots: from here on everything is cleaned up whatever happens
//!   first         what is held still only until it is copied, of all disks
//!   rest          everything else
//!   end           let go; are the snapshots still good? give the images their names; describe the machine
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use block::size::human;
use block::slice::Slice;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Disks;
use image::Format;
use image::progress::Progress;
use v2v::guest::document;
use v2v::p2v::copy::{self, Job, Part, SEGMENT, Tally};
use v2v::p2v::offer::{Acceptance, Accepted, Offer, OfferedDisk};
use v2v::p2v::state::{Digest, DiskState, Identity, State};
use v2v::p2v::{Found, PhysicalDisk};

use super::Args;
use super::desk::Desk;
use super::hold::{Hold, Wish};
use super::snapshots::watched;
use super::source;
use super::target::{MACHINE, Opened, Place, send_description};
use crate::app::{App, directory_of};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::Reporter;

/// The state's file in the folder of the images, and beside nothing.
const STATE_IN_FOLDER: &str = ".vimg-p2v-state.json";
const STATE_HERE: &str = "vimg-p2v-state.json";

/// Segments and their digests.
type Done = BTreeMap<u64, Digest>;

pub(super) fn copy_all(args: &Args, found: &Found, app: &App) -> Outcome {
    let wanted = found.select(&args.disks)?;
    if wanted.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "no disk was found on this machine").into());
    }
    let rate = args.rate.as_deref().map(|text| block::size::parse_named("rate limit", text, 0..=u64::MAX));
    let rate = rate.transpose()?;
    let state_path = state_path(args);
    let ours = [args.output.clone(), Some(directory_of(&state_path))];
    let ours: Vec<PathBuf> = ours.into_iter().flatten().collect();
    let opened = wanted.iter().map(|disk| source::open_disk(disk, app)).collect::<Result<Vec<_>>>()?;
    let wish = Wish::find(args, &wanted, &opened, &ours, app)?;
    let raw: Vec<Arc<dyn BlockDevice>> = opened.into_iter().map(|(device, _)| device).collect();
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder)
            .map_err(Error::from)
            .context(|| format!("Could not make '{}'", folder.display()))?;
    }
    if args.restart {
        let _ = std::fs::remove_file(&state_path);
    }
    let state = Mutex::new(State::load(&state_path)?.unwrap_or_default());
    let identities: Vec<Identity> = wanted
        .iter()
        .zip(&raw)
        .map(|(disk, device)| source::identity(disk, &**device))
        .collect::<Result<_>>()?;
    let disks = Disks::open_all(raw.clone())?;
    let estimate = || source::estimate(&disks, &wanted, wish.settles() && !args.whole);
    let (places, desk) = places(args, found, &wanted, &identities, &estimate, app)?;
    let reporter = Reporter::new(&args.progress, args.quiet, app)?;
    let moves = wish.moves();
    let run = Run { args, app, reporter: &reporter, state: &state, state_path: &state_path, rate, moves };
    let mut copies = vec![];
    for (index, disk) in wanted.iter().enumerate() {
        let opened = run.open(disk, &places[index], &identities[index]);
        copies.push(opened.map_err(|error| run.ended(error.context(disk.name.clone())))?);
    }
    let hold = wish.carry_out(raw, &disks, app)?;
    drop(disks);
    if moves {
        run.all_of_one_moment(&wanted, copies, hold)?;
    } else {
        run.one_by_one(&wanted, copies, hold)?;
    }
    reporter.finish();
    describe(args, found, &wanted, &places, desk.as_ref(), app)?;
    let _ = std::fs::remove_file(&state_path);
    Ok(Exit::OK)
}

/// Where the disks go, and the receiver, if that is where.
fn places(
    args: &Args,
    found: &Found,
    wanted: &[&PhysicalDisk],
    identities: &[Identity],
    estimate: &dyn Fn() -> Result<Vec<u64>>,
    app: &App,
) -> Outcome<(Vec<Place>, Option<Desk>)> {
    let format = Format::from_name(&args.format).ok_or_else(|| Error::usage("unknown format"))?;
    let template = match (&args.output, &args.to) {
        (Some(folder), _) => {
            let places = wanted.iter().map(|disk| Place::in_folder(folder, disk, format));
            return Ok((places.collect(), None));
        }
        (None, template) => template.as_deref().unwrap_or_default(),
    };
    let Some(desk) = Desk::find(template, &args.objects.secrets()?, app)? else {
        let place = |disk: &&PhysicalDisk| Place::on_server(template, disk, wanted.len() == 1);
        return Ok((wanted.iter().map(place).collect(), None));
    };
    let named = wanted.iter().map(|disk| (*disk, disk.plain_name(), "raw")).collect::<Vec<_>>();
    let disk = |((disk, identity), data_bytes): ((&&PhysicalDisk, &Identity), u64)| OfferedDisk {
        name: disk.plain_name(),
        identity: identity.clone(),
        data_bytes,
    };
    let disks = wanted.iter().zip(identities).zip(estimate()?).map(disk).collect();
    let machine = document(&found.machine(&named));
    let offer = Offer { folder: desk.folder.clone(), restart: args.restart, machine, disks };
    let Acceptance { id, follows, disks } = desk.offer(offer)?;
    let place = |accepted: Accepted| Place::Received {
        uri: desk.uri(&accepted.export),
        accepted,
        id: id.clone(),
        follows: follows.clone(),
    };
    Ok((disks.into_iter().map(place).collect(), Some(desk)))
}

fn state_path(args: &Args) -> PathBuf {
    match (&args.state, &args.output) {
        (Some(path), _) => path.clone(),
        (None, Some(folder)) => folder.join(STATE_IN_FOLDER),
        (None, None) => PathBuf::from(STATE_HERE),
    }
}

struct Run<'a> {
    args: &'a Args,
    app: &'a App,
    reporter: &'a Reporter<'a>,
    state: &'a Mutex<State>,
    state_path: &'a Path,
    rate: Option<u64>,
    /// The disks change from one run to the next.
    moves: bool,
}

/// The copy of a disk on its way.
struct Copying<'a> {
    disk: &'a PhysicalDisk,
    place: &'a Place,
    identity: &'a Identity,
    target: Arc<dyn BlockDevice>,
    fresh: bool,
    /// What is known of it is true of this target: nobody else has written to it since.
    trusted: bool,
    /// The target's identifier.
    id: Option<String>,
    known: DiskState,
}

/// What it is copied from.
struct Origin<'a> {
    source: &'a Arc<dyn BlockDevice>,
    unused: &'a [Range<u64>],
}

impl<'a> Run<'a> {
    /// Opens the target of a disk; `None` if its copy is complete.
    fn open(
        &self,
        disk: &'a PhysicalDisk,
        place: &'a Place,
        identity: &'a Identity,
    ) -> Result<Option<Copying<'a>>> {
        let name = place.name();
        let known = self.with_state(|state| state.disk(&disk.name, identity, &name, SEGMENT).cloned())?;
        if known.complete && place.exists() {
            if !self.moves {
                self.app.tell(&format!("{}: complete already", disk.name));
                return Ok(None);
            }
            // The others will be of another moment.
            place.reopen()?;
        }
        if place.exists() {
            let message = format!("'{name}' is there already");
            return Err(Error::new(ErrorKind::Usage, message).hint("Remove it, or choose another folder."));
        }
        let secrets = self.args.objects.secrets().map_err(plain)?;
        let opened = place.open(disk.size_bytes, !known.done.is_empty(), &secrets, self.app)?;
        let Opened { device: target, fresh, id, follows } = opened;
        let trusted = follows.is_some() && known.target_id == follows;
        if target.size() > disk.size_bytes {
            let message = format!("{name} is larger than {}: what is behind the disk's end stays", disk.name);
            self.app.warn(&message);
        }
        if !fresh && !trusted && !known.done.is_empty() {
            self.app.tell(&format!("{name} may be another one than before: what is there is compared"));
        }
        // What has not been compared yet in the end is not what the new identifier stands for.
        let anew = fresh || !trusted && id.is_some();
        self.with_state(|state| {
            state.disk(&disk.name, identity, &name, SEGMENT).map(|disk| disk.target_id.clone_from(&id))
        })?;
        self.remember(&name, anew, &[])?;
        Ok(Some(Copying { disk, place, identity, target, fresh, trusted, id, known }))
    }

    /// Disks that nobody writes to: each is complete when it has been copied.
    fn one_by_one(
        &self,
        wanted: &[&PhysicalDisk],
        copies: Vec<Option<Copying<'_>>>,
        hold: Hold,
    ) -> Outcome<()> {
        let unused = self.unused(&hold.sources, wanted, &hold)?;
        for (index, copy) in copies.into_iter().enumerate() {
            let Some(copy) = copy else { continue };
            let name = copy.disk.name.clone();
            let origin = Origin { source: &hold.sources[index], unused: &unused[index] };
            let copied = self.part(&copy, &origin, Part::All, self.reporter);
            let done = copied.and_then(|tally| self.complete(copy, &unused[index], tally));
            done.map_err(|error| self.ended(error.context(name)))?;
        }
        Ok(hold.end(self.app)?)
    }

    /// Disks that change: none is complete before all are.
    fn all_of_one_moment(
        &self,
        wanted: &[&PhysicalDisk],
        copies: Vec<Option<Copying<'_>>>,
        mut hold: Hold,
    ) -> Outcome<()> {
        let unused = self.unused(&hold.sources, wanted, &hold)?;
        let first = source::places(&Disks::open_all(hold.sources.clone())?, wanted, &hold.first());
        let mut tallies = vec![Tally::default(); wanted.len()];
        let mut pass = |hold: &Hold, is_first: bool| -> Result<()> {
            for (index, copy) in copies.iter().enumerate() {
                let Some(copy) = copy else { continue };
                let ranges: &[Range<u64>] = &first[index];
                let part = if is_first { Part::Touching(ranges) } else { Part::Rest(ranges) };
                let origin = Origin { source: &hold.sources[index], unused: &unused[index] };
                let (taken, still) = (hold.taken(), hold.is_still());
                let copied =
                    watched(taken, still, self.reporter, |progress| self.part(copy, &origin, part, progress));
                tallies[index] = tallies[index].plus(copied.context(|| copy.disk.name.clone())?);
            }
            Ok(())
        };
        let copied = pass(&hold, true).and_then(|()| hold.let_go_first()).and_then(|()| pass(&hold, false));
        copied.and_then(|()| hold.end(self.app)).map_err(|error| self.ended(error))?;
        for (index, copy) in copies.into_iter().enumerate() {
            let Some(copy) = copy else { continue };
            let name = copy.disk.name.clone();
            let done = self.complete(copy, &unused[index], tallies[index]);
            done.map_err(|error| self.ended(error.context(name)))?;
        }
        Ok(())
    }

    /// What of each disk holds nothing.
    fn unused(
        &self,
        sources: &[Arc<dyn BlockDevice>],
        wanted: &[&PhysicalDisk],
        hold: &Hold,
    ) -> Result<Vec<Vec<Range<u64>>>> {
        if self.args.whole {
            return Ok(vec![vec![]; wanted.len()]);
        }
        source::left_out(&Disks::open_all(sources.to_vec())?, wanted, &hold.at_rest, self.app)
    }

    fn job<'j>(
        &self,
        copy: &'j Copying<'_>,
        origin: &'j Origin<'_>,
        done: &'j Done,
        part: Part<'j>,
    ) -> Job<'j> {
        Job {
            source: Arc::clone(origin.source),
            unused: origin.unused,
            target: Arc::clone(&copy.target),
            part,
            fresh: copy.fresh,
            done,
            trusted: copy.trusted,
            segment_bytes: copy.known.segment_bytes,
            threads: self.args.threads.into(),
            rate: self.rate,
        }
    }

    fn part(
        &self,
        copy: &Copying<'_>,
        origin: &Origin<'_>,
        part: Part<'_>,
        progress: &dyn Progress,
    ) -> Result<Tally> {
        let nothing = Done::new();
        let done = if copy.fresh { &nothing } else { &copy.known.done };
        let name = copy.place.name();
        let job = self.job(copy, origin, done, part);
        copy::copy(&job, progress, &|segments| self.remember(&name, false, segments))
    }

    /// All of a disk has been copied.
    fn complete(&self, copy: Copying<'_>, unused: &[Range<u64>], tally: Tally) -> Result<()> {
        let name = copy.place.name();
        let entry = |state: &mut State| state.disk(&copy.disk.name, copy.identity, &name, SEGMENT).cloned();
        if self.args.verify {
            let digests = self.with_state(entry)?.done;
            let nothing = Done::new();
            // The disk itself is not looked at any more, and may have been let go: only its size counts.
            let size = copy.disk.size_bytes;
            let source: Arc<dyn BlockDevice> = Arc::new(Slice::new(Arc::clone(&copy.target), 0, size)?);
            let origin = Origin { source: &source, unused };
            copy::verify(&self.job(&copy, &origin, &nothing, Part::All), &digests, self.reporter)?;
        }
        let Copying { disk, place, identity, target, id, .. } = copy;
        target.close()?;
        drop(target);
        place.complete(id.as_deref())?;
        self.with_state(|state| {
            state.disk(&disk.name, identity, &name, SEGMENT)?.complete = true;
            state.save(self.state_path)
        })?;
        self.say(disk, tally);
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

    fn say(&self, disk: &PhysicalDisk, tally: Tally) {
        if self.args.quiet {
            return;
        }
        let mut text = format!(
            "{}: {} read, {} written, {} left out",
            disk.name,
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

/// Leaves the description at the receiving end.
fn describe(
    args: &Args,
    found: &Found,
    wanted: &[&PhysicalDisk],
    places: &[Place],
    desk: Option<&Desk>,
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
    let machine = document(&found.machine(&disks));
    if let Some(desk) = desk {
        let id = places.iter().find_map(Place::acceptance).unwrap_or_default();
        let folder = desk.complete(id, machine)?;
        if !args.quiet {
            app.note(&format!("complete at the receiver: {folder}\n"));
        }
        return Ok(());
    }
    let text = format!("{machine:#}\n");
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
