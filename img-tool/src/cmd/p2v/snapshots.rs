//! Taking snapshots, watching them, and removing them whatever happens.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::size::human;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Disks;
use guestdisk::lvm::mapper_name;
use image::progress::Progress;
use v2v::p2v::Mounted;
use v2v::p2v::lvm::{self, Fill, Lvm};
use v2v::p2v::moment::{self, Books, Volume};
use v2v::p2v::snapshot::{Plan, Snapshot};
use v2v::p2v::store;

use super::freeze::Still;
use super::guard::Guard;
use super::source;
use crate::app::App;

/// The longest that everything is held still.
const LONGEST: Duration = Duration::from_secs(20);
/// How often it is looked how full snapshots are.
const LOOK: Duration = Duration::from_secs(5);
/// From so many percent on that is said.
const FULL: u8 = 75;

/// LVM's program.
#[derive(Debug, Clone)]
pub(super) struct Program(pub(super) OsString);

impl Default for Program {
    fn default() -> Self {
        Self("lvm".into())
    }
}

impl Program {
    /// Where it is: in the search path, or where systems keep what only root needs.
    pub(super) fn find(given: Option<&Path>) -> Self {
        let places = ["/usr/sbin/lvm", "/sbin/lvm"];
        let found = places.into_iter().find(|path| Path::new(path).exists());
        Self(given.map_or_else(|| found.unwrap_or("lvm").into(), |path| path.as_os_str().to_owned()))
    }
}

impl Lvm for Program {
    fn run(&self, words: &[&str]) -> Result<String> {
        let about = || format!("{} {}", self.0.display(), words.join(" "));
        let ran = Command::new(&self.0)
            .args(words)
            .env("LC_ALL", "C")
            // It complains about descriptors that it inherits.
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .stdin(Stdio::null())
            .output();
        let ran = match ran {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let error = Error::new(ErrorKind::NotFound, "LVM's program 'lvm' is not on this machine");
                return Err(error.hint("--freeze needs no LVM."));
            }
            ran => ran.map_err(Error::from).context(about)?,
        };
        if ran.status.success() {
            return Ok(String::from_utf8_lossy(&ran.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&ran.stderr);
        let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        Err(Error::new(ErrorKind::Io, said.join("; ")).context(about()))
    }
}

/// Snapshots that have been taken. They are removed when this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    program: Program,
    /// Those that are still there.
    there: Vec<Snapshot>,
    volumes: Vec<Volume>,
}

/// The machine at one moment.
#[derive(Debug)]
pub(super) struct Moment {
    /// The disks.
    pub(super) sources: Vec<Arc<dyn BlockDevice>>,
    /// What is held still until it is copied.
    pub(super) still: Still,
    /// The snapshots.
    pub(super) taken: Taken,
}

/// What is needed to take the moment.
#[derive(Debug)]
pub(super) struct Before<'a> {
    pub(super) plan: &'a Plan,
    /// Everything that is mounted writable, in the order in which it is to be held.
    pub(super) written: &'a [&'a Mounted],
    pub(super) raw: &'a [Arc<dyn BlockDevice>],
    pub(super) disks: &'a Disks,
    pub(super) root: &'a Path,
    pub(super) program: &'a Program,
}

/// Takes the moment.
///
/// # Errors
/// A snapshot cannot be taken, or something cannot be held still. Everything is as before then.
pub(super) fn take(before: &Before<'_>, guard: &mut Guard, app: &App) -> Result<Moment> {
    let Before { plan, written, raw, disks, root, program } = before;
    let books = Books::read(raw, disks)?;
    let mut taken = Taken { program: (*program).clone(), there: vec![], volumes: vec![] };
    // So that little is left to be written between the snapshots and the moment.
    for mounted in *written {
        if let Ok(folder) = std::fs::File::open(&mounted.path) {
            let _ = nix::unistd::syncfs(&folder);
        }
    }
    for snapshot in &plan.snapshots {
        let origin = format!("/dev/{}/{}", snapshot.group, snapshot.origin);
        app.tell(&format!("{origin}: a snapshot with room for {}", human(snapshot.room_bytes)));
        guard.remove(&program.0, &snapshot.place())?;
        // It may be there although the program failed.
        taken.there.push(snapshot.clone());
        lvm::take(*program, &snapshot.group, &snapshot.origin, &snapshot.name, snapshot.room_bytes)
            .context(|| format!("Could not take a snapshot of {origin}"))?;
    }
    books.compare(&Disks::open_all(raw.to_vec())?, &plan.snapshots)?;
    for snapshot in &plan.snapshots {
        taken.volumes.push(volume(snapshot, disks, root, app)?);
    }
    let mut still = Still::hold(written, root, guard)?;
    let since = Instant::now();
    let late = || since.elapsed() > LONGEST;
    let shown = taken.volumes.iter().map(|volume| Ok((volume, volume.catch_up(raw, &late)?)));
    let shown: Vec<(&Volume, Arc<dyn BlockDevice>)> = shown.collect::<Result<_>>()?;
    let sources = moment::disks(raw, &books, &shown)?;
    drop(shown);
    let paths: Vec<&Path> = plan.snapshots.iter().map(|snapshot| snapshot.path.as_path()).collect();
    still.let_go(&paths, root)?;
    app.tell(&format!("everything stood still for {} ms", since.elapsed().as_millis()));
    Ok(Moment { sources, still, taken })
}

fn volume(snapshot: &Snapshot, disks: &Disks, root: &Path, app: &App) -> Result<Volume> {
    let mapper = root.join("dev/mapper").join(mapper_name(&snapshot.group, &snapshot.name));
    let mut store = mapper.clone().into_os_string();
    store.push("-cow");
    let places = disks.logical_places(&snapshot.group, &snapshot.origin);
    let places = places.ok_or_else(|| Error::invalid(format!("{} lies nowhere", snapshot.origin)))?;
    let open = |path: &Path| source::open(path, app).map(|(device, _)| device);
    Volume::new(snapshot.clone(), open(&mapper)?, open(Path::new(&store))?, places)
}

impl Taken {
    /// Whether all snapshots are still good: what has been read of them is true.
    ///
    /// # Errors
    /// `NoSpace`: one of them overflowed.
    pub(super) fn check(&self) -> Result<()> {
        self.volumes.iter().try_for_each(|volume| match store::overflowed(&*volume.store)? {
            true => Err(overflow(&volume.snapshot)),
            false => Ok(()),
        })
    }

    /// How full they are; says so if that is much. `still`: something is held still, for which LVM's program might wait, and we
    /// for it: it is only looked whether they are good.
    fn look(&self, still: bool, progress: &dyn Progress, told: &mut Vec<(String, u8)>) -> Result<()> {
        for snapshot in self.there.iter().filter(|_| !still) {
            match lvm::fill(&self.program, &snapshot.group, &snapshot.name)? {
                Fill::Overflowed => return Err(overflow(snapshot)),
                Fill::Percent(percent) if percent >= FULL => {
                    let known = told.iter().filter(|(place, _)| *place == snapshot.place());
                    if known.map(|(_, percent)| *percent).max().is_none_or(|known| percent >= known + 5) {
                        progress.warn(&format!("the snapshot {} is {percent}% full", snapshot.place()));
                        told.push((snapshot.place(), percent));
                    }
                }
                Fill::Percent(_) => {}
            }
        }
        self.check()
    }

    /// Removes them.
    ///
    /// # Errors
    /// One of them cannot be removed, and is named.
    pub(super) fn remove(mut self) -> Result<()> {
        self.remove_all()
    }

    fn remove_all(&mut self) -> Result<()> {
        self.volumes.clear();
        let mut failed = Ok(());
        let program = self.program.clone();
        self.there.retain(|snapshot| {
            let removed = retried(|| lvm::remove(&program, &snapshot.place()));
            let failure = removed.context(|| format!("Could not remove the snapshot {}", snapshot.place()));
            let fails = failure.is_err();
            if fails && failed.is_ok() {
                failed = failure.hint(|| format!("Remove it: lvremove {}", snapshot.place()));
            }
            fails
        });
        failed
    }
}

/// What watches new devices (udev) may have one open for a moment.
fn retried(act: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 0..10 {
        if act().is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    act()
}

impl Drop for Taken {
    fn drop(&mut self) {
        // The guard tries again what fails here.
        let _ = self.remove_all();
    }
}

fn overflow(snapshot: &Snapshot) -> Error {
    let message = format!(
        "the snapshot {} overflowed: more than {} were written to /dev/{}/{} meanwhile",
        snapshot.place(),
        human(snapshot.room_bytes),
        snapshot.group,
        snapshot.origin
    );
    Error::new(ErrorKind::NoSpace, message)
        .hint("Give it more room (--snapshot-size), or copy when less is written.")
}

/// Does something that reads snapshots, and ends it when one of them overflows. `still`: file systems are held still meanwhile.
///
/// # Errors
/// As `act`; `NoSpace`: a snapshot overflowed, whatever came of `act`.
pub(super) fn watched<T>(
    taken: Option<&Taken>,
    still: bool,
    progress: &dyn Progress,
    act: impl FnOnce(&dyn Progress) -> Result<T>,
) -> Result<T> {
    let Some(taken) = taken else { return act(progress) };
    let (lost, over, bell) = (AtomicBool::new(false), Mutex::new(false), Condvar::new());
    let watch = Watch { progress, lost: &lost };
    let (done, seen) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut told = vec![];
            loop {
                let over = over.lock().unwrap_or_else(PoisonError::into_inner);
                let (over, _) = bell.wait_timeout(over, LOOK).unwrap_or_else(PoisonError::into_inner);
                if *over {
                    return Ok(());
                }
                drop(over);
                match taken.look(still, progress, &mut told) {
                    Err(error) if error.kind() == ErrorKind::NoSpace => {
                        lost.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                    // It cannot be asked just now; in the end it is.
                    _ => {}
                }
            }
        });
        let done = act(&watch);
        *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        bell.notify_all();
        (done, watcher.join().unwrap_or(Ok(())))
    });
    // What a read of a lost snapshot fails with says nothing.
    match (seen.and_then(|()| taken.check()), done) {
        (Err(error), _) => Err(error),
        (Ok(()), done) => done,
    }
}

/// Somebody's progress, ended also when a snapshot is lost.
struct Watch<'a> {
    progress: &'a dyn Progress,
    lost: &'a AtomicBool,
}

impl Progress for Watch<'_> {
    fn update(&self, done: u64, total: u64) {
        self.progress.update(done, total);
    }

    fn cancelled(&self) -> bool {
        self.lost.load(Ordering::Relaxed) || self.progress.cancelled()
    }

    fn wants_estimate(&self) -> bool {
        self.progress.wants_estimate()
    }

    fn warn(&self, message: &str) {
        self.progress.warn(message);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use image::progress::Quiet;

    use super::*;

    /// LVM's program may write to what is frozen, and never come back.
    #[test]
    fn lvms_program_does_not_run_while_anything_is_held_still() {
        let dir = tempfile::tempdir().unwrap();
        let (program, ran) = (dir.path().join("lvm"), dir.path().join("ran"));
        std::fs::write(&program, format!("#!/bin/sh\necho \"$1\" >> '{}'\n", ran.display())).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let snapshot = Snapshot {
            group: "vg".to_owned(),
            origin: "root".to_owned(),
            name: "vimg_p2v_root".to_owned(),
            path: "/".into(),
            room_bytes: 1,
            origin_bytes: 1,
        };
        let taken = Taken { program: Program(program.into()), there: vec![snapshot], volumes: vec![] };
        taken.look(true, &Quiet, &mut vec![]).unwrap();
        assert!(!ran.exists());
        let _ = taken.look(false, &Quiet, &mut vec![]);
        assert!(std::fs::read_to_string(&ran).unwrap().starts_with("lvs"));
    }
}
