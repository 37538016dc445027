//! What is done about file systems that can be written to: held still, shown by snapshots, or nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, Result};
use guestdisk::Disks;
use v2v::p2v::lvm::{groups, volumes};
use v2v::p2v::snapshot::{Plan, Room, Situation, plan};
use v2v::p2v::{Mounted, PhysicalDisk};

use super::Args;
use super::freeze::{Still, refuse_ours};
use super::guard::Guard;
use super::snapshots::{self, Before, Program, Taken};
use crate::app::App;
use crate::exit::{Failure, Outcome};

/// What will be done.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    /// File systems that can be written to, each once; those that lie deeper in the tree first.
    written: Vec<&'a Mounted>,
    how: How,
    root: &'a Path,
}

#[derive(Debug)]
enum How {
    /// Nothing is written to, or it is copied all the same.
    AsItIs,
    /// Everything is held still until the end.
    Frozen,
    /// Snapshots.
    Snapshots { plan: Plan, program: Program },
}

/// What is being done. Everything is as before when this is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    /// The disks, as they are to be copied.
    pub(super) sources: Vec<Arc<dyn BlockDevice>>,
    still: Option<Still>,
    taken: Option<Taken>,
    // Let go of last.
    guard: Option<Guard>,
    /// Where file systems are mounted of which no byte changes.
    pub(super) at_rest: Vec<PathBuf>,
    root: PathBuf,
}

/// How much room snapshots get: `10G`, `15%`.
fn room(text: Option<&str>) -> Outcome<Room> {
    let Some(text) = text else { return Ok(Room::Chosen) };
    if let Some(percent) = text.strip_suffix('%') {
        let percent = percent.parse().ok().filter(|percent| (1..=100).contains(percent));
        let wrong = || Failure::usage(format!("--snapshot-size expects a size or 1% to 100% not '{text}'"));
        return percent.map(Room::Percent).ok_or_else(wrong);
    }
    Ok(Room::Bytes(block::size::parse_named("snapshot size", text, 1..=u64::MAX)?))
}

impl<'a> Wish<'a> {
    /// Finds out what is to be done, and refuses to copy what others write to unless that is asked for. `ours` are folders
    /// that we write to; `raw` are the disks.
    pub(super) fn find(
        args: &'a Args,
        wanted: &[&'a PhysicalDisk],
        raw: &[(Arc<dyn BlockDevice>, bool)],
        ours: &[PathBuf],
        app: &App,
    ) -> Outcome<Self> {
        let mut written: Vec<&Mounted> = wanted.iter().flat_map(|disk| disk.written()).collect();
        written.sort_by(|one, other| other.path.cmp(&one.path));
        // A file system that is mounted twice is one.
        let mut each: Vec<&Mounted> = vec![];
        for mounted in written {
            if !each.iter().any(|known| known.path == mounted.path || known.device == mounted.device) {
                each.push(mounted);
            }
        }
        let written = each;
        let room = room(args.snapshot_size.as_deref())?;
        let how = match () {
            () if written.is_empty() => How::AsItIs,
            () if args.snapshot => {
                refuse_ours(&written, ours)?;
                snapshots(args, &written, raw, room)?
            }
            () if args.freeze => {
                refuse_ours(&written, ours)?;
                How::Frozen
            }
            () => {
                as_it_is(args, &written, app)?;
                How::AsItIs
            }
        };
        Ok(Self { written, how, root: &args.root })
    }

    /// Whether what is mounted writable will be at rest.
    pub(super) fn settles(&self) -> bool {
        !matches!(self.how, How::AsItIs)
    }

    /// Whether all disks have to be of the same run, because they change in between.
    pub(super) fn moves(&self) -> bool {
        !self.written.is_empty()
    }

    /// Does it. `disks` are the disks `raw` as they are.
    ///
    /// # Errors
    /// Something cannot be frozen, or a snapshot cannot be taken.
    pub(super) fn carry_out(self, raw: Vec<Arc<dyn BlockDevice>>, disks: &Disks, app: &App) -> Result<Hold> {
        let root = self.root.to_owned();
        let paths = || self.written.iter().map(|mounted| mounted.path.clone()).collect();
        match self.how {
            How::AsItIs => {
                Ok(Hold { sources: raw, still: None, taken: None, guard: None, at_rest: vec![], root })
            }
            How::Frozen => {
                let mut guard = Guard::start()?;
                let still = Still::hold(&self.written, self.root, &mut guard)?;
                let at_rest = paths();
                Ok(Hold { sources: raw, still: Some(still), taken: None, guard: Some(guard), at_rest, root })
            }
            How::Snapshots { ref plan, ref program } => {
                let mut guard = Guard::start()?;
                let before =
                    Before { plan, written: &self.written, raw: &raw, disks, root: self.root, program };
                let moment = snapshots::take(&before, &mut guard, app)?;
                let (still, taken) = (Some(moment.still), Some(moment.taken));
                let at_rest = paths();
                Ok(Hold { sources: moment.sources, still, taken, guard: Some(guard), at_rest, root })
            }
        }
    }
}

fn snapshots(
    args: &Args,
    written: &[&Mounted],
    raw: &[(Arc<dyn BlockDevice>, bool)],
    room: Room,
) -> Result<How> {
    if raw.iter().any(|(_, direct)| !direct) {
        let message =
            "a disk cannot be read around the page cache, which does not know what snapshots change";
        return Err(Error::unsupported(message).hint("--freeze copies it without snapshots."));
    }
    let program = Program::find(args.lvm.as_deref());
    let disks = Disks::open_all(raw.iter().map(|(device, _)| Arc::clone(device)).collect())?;
    let (volumes, groups) = (volumes(&program)?, groups(&program)?);
    let situation = Situation {
        written,
        disks: &disks,
        volumes: &volumes,
        groups: &groups,
        room,
        hold_others: args.freeze,
    };
    Ok(How::Snapshots { plan: plan(&situation)?, program })
}

/// Whether it may be copied although it is written to.
fn as_it_is(args: &Args, written: &[&Mounted], app: &App) -> Result<()> {
    let shown = |mounted: &&Mounted| format!("{} on {}", mounted.device, mounted.path.display());
    let names = written.iter().map(shown).collect::<Vec<_>>().join(", ");
    if args.live {
        app.warn(&format!(
            "file systems that may change meanwhile; the copy is like a machine that lost power: {names}"
        ));
        return Ok(());
    }
    Err(Error::usage(format!("these file systems can be written to while they are copied: {names}"))
        .hint("Best: start a rescue system and copy from there.")
        .hint("--snapshot copies a moment of them, as snapshots of LVM show it; the machine goes on.")
        .hint("--freeze lets everybody who writes wait until the copy is done.")
        .hint("--live copies all the same; the copy is like a machine that lost power."))
}

impl Hold {
    /// The snapshots.
    pub(super) fn taken(&self) -> Option<&Taken> {
        self.taken.as_ref()
    }

    /// Whether file systems are held still just now.
    pub(super) fn is_still(&self) -> bool {
        self.still.is_some()
    }

    /// Where file systems are mounted that should be copied first, because they are held still until they are.
    pub(super) fn first(&self) -> Vec<PathBuf> {
        let waiting = self.still.as_ref().filter(|_| self.taken.is_some());
        waiting.map(Still::paths).unwrap_or_default()
    }

    /// Lets go of what is held still only until it is copied, if that is so.
    ///
    /// # Errors
    /// As [`let_go`](Self::let_go).
    pub(super) fn let_go_first(&mut self) -> Result<()> {
        if self.taken.is_some() { self.let_go() } else { Ok(()) }
    }

    /// Lets go of what is held still.
    ///
    /// # Errors
    /// `Locked`: what cannot be frozen was written to.
    fn let_go(&mut self) -> Result<()> {
        self.still.take().map_or(Ok(()), |still| still.release(&self.root))
    }

    /// Everything has been copied: lets go of everything.
    ///
    /// # Errors
    /// As [`let_go`](Self::let_go); `NoSpace`: a snapshot overflowed, and the copy is worth nothing. What cannot be removed is
    /// only told, for the copy is good.
    pub(super) fn end(mut self, app: &App) -> Result<()> {
        self.let_go()?;
        if let Some(taken) = self.taken.take() {
            taken.check()?;
            self.sources.clear();
            if let Err(error) = taken.remove() {
                app.show(&error);
                // The guard tries it for longer.
                return Ok(());
            }
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        Ok(())
    }
}
