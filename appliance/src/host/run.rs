//! One run on the host's kernel.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use block::{Error, Result, ResultExt as _};
use bootcheck::engine::{Control, Disk, Observer, Outcome, Runnable};
use fuser::{Config, MountOption, Session};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::disks::Disks;
use crate::program::{self, Ended, Remote};
use crate::wire::HOST;

/// Where the private namespace has its own things: a folder that every machine has, and that is covered in there.
const PLACES: [&str; 4] = ["/mnt", "/media", "/srv", "/tmp"];
/// The disks' files are below this.
const FILES: &str = "disks";
/// File systems are mounted below this.
const MOUNTED: &str = "mounted";

/// A machine that is ready to be run.
#[derive(Debug)]
pub(super) struct Machine {
    disks: Vec<Disk>,
    remote: Arc<Remote>,
    line: OwnedFd,
    observer: NotShown,
}

/// An observer has no words.
struct NotShown(Arc<dyn Observer>);

impl std::fmt::Debug for NotShown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observer")
    }
}

impl Machine {
    /// # Errors
    /// No more descriptors.
    pub(super) fn new(disks: Vec<Disk>, observer: Arc<dyn Observer>) -> Result<Self> {
        let (remote, line) = Remote::new()?;
        Ok(Self { disks, remote, line, observer: NotShown(observer) })
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(self: Box<Self>) -> Result<Outcome> {
        let Self { disks, remote, line, observer: NotShown(observer) } = *self;
        let called = Instant::now();
        let console = remote.listen(Arc::clone(&observer))?;
        let (sender, ended) = mpsc::channel();
        let launched = launch(disks, line, sender)?;
        let startup = called.elapsed();
        observer.started(Instant::now());
        let ended = ended.recv().map_err(|error| Error::unsupported(error.to_string()))?;
        let ending = ended.map(|ended| ended.ending(None, remote.is_stopped()));
        remote.hang_up();
        program::leave(vec![console, launched]);
        Ok(Outcome { ending: ending?, cpus: vec![], disks: vec![], startup, screen: vec![], vars: None })
    }
}

/// A thread that begins a mount namespace of its own, has the disks as files there, and the init run in it.
fn launch(disks: Vec<Disk>, line: OwnedFd, sender: Sender<Result<Ended>>) -> Result<JoinHandle<()>> {
    let init = program::init()?;
    Ok(Builder::new().name("mounts".to_owned()).spawn(move || {
        let run = || -> Result<Ended> {
            let count = disks.len();
            let place = private().context(|| "a mount namespace".to_owned())?;
            let files = place.join(FILES);
            let server = serve(disks, &files)?;
            let mut command = Command::new(program::path(&init));
            command
                .args([HOST, &count.to_string()])
                .args([&files, &place.join(MOUNTED)])
                .env_clear()
                // Its own group: the terminal's interrupts are for us alone.
                .process_group(0)
                .current_dir("/")
                .stdin(line)
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            let ended = program::spawn(&mut command)
                .context(|| "could not run the init".to_owned())
                .and_then(program::wait);
            // Loop devices are detached by now, or with the namespace.
            let gone = umount2(&files, MntFlags::MNT_DETACH);
            if gone.is_ok() {
                program::leave(vec![server]);
            }
            ended
        };
        // Whoever waits for it is the one to be told.
        drop(sender.send(run()));
    })?)
}

/// A mount namespace for this thread, with an empty folder of its own.
fn private() -> Result<PathBuf> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    let place = PLACES.iter().map(Path::new).find(|path| path.is_dir());
    let place = place.ok_or_else(|| Error::unsupported("there is no folder to mount anything on"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("vimg"), place, Some("tmpfs"), flags, Some("size=1m,mode=0700"))?;
    std::fs::create_dir(place.join(FILES))?;
    std::fs::create_dir(place.join(MOUNTED))?;
    Ok(place.to_owned())
}

/// Serves the disks as files of a folder, until that is unmounted.
fn serve(disks: Vec<Disk>, folder: &Path) -> Result<JoinHandle<()>> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("vimg".to_owned()),
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
    ];
    let session = Session::new(Disks(disks), folder, &config).map_err(|error| {
        Error::unsupported(format!("the disks cannot be files of this host, by FUSE: {error}"))
            .hint("load the kernel's module fuse, or give the container the device (--device /dev/fuse)")
    })?;
    Ok(Builder::new().name("files".to_owned()).spawn(move || {
        // It ends with the mount.
        drop(session.run());
    })?)
}
