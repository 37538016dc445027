//! One mounted file system, and the thread for which it is the whole world.

use std::fs;
use std::io::{Error, Result};
use std::os::unix::fs::chroot;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::files::Files;
use crate::serve::Answer;
use crate::wire::{Action, MountRequest};
use crate::{during, sys};

/// A file system that is held for longer stays mounted.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
const NAP: Duration = Duration::from_millis(10);

/// A mounted file system.
#[derive(Debug)]
pub(crate) struct Mounted {
    point: PathBuf,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

struct Job {
    path: Vec<u8>,
    action: Action,
    answer: Sender<Answer>,
}

impl Mounted {
    /// Mounts what is on `device` at `point`.
    pub(crate) fn mount(device: &Path, point: PathBuf, request: &MountRequest) -> Result<Self> {
        fs::create_dir_all(&point)?;
        let mut flags = sys::MS_NOSUID | sys::MS_NODEV | sys::MS_NOEXEC;
        if request.read_only {
            flags |= sys::MS_RDONLY;
        }
        sys::mount_at(&device.to_string_lossy(), &point, &request.kind, flags, &request.options)?;
        let (jobs, queue) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let root = point.clone();
        let files = Files::new(&request.kind);
        let thread = std::thread::Builder::new().spawn(move || {
            let entered = enter(&root);
            let is_in = entered.is_ok();
            // The other end waits for this.
            drop(ready.send(entered));
            if is_in {
                work(files, &queue);
            }
        })?;
        let mounted = Self { point, jobs, thread };
        match started.recv().unwrap_or_else(|_| Err(gone())) {
            Ok(()) => Ok(mounted),
            Err(error) => {
                // The first failure is the one to be told.
                drop(mounted.unmount());
                Err(error)
            }
        }
    }

    /// Does something in it.
    pub(crate) fn act(&self, path: Vec<u8>, action: Action) -> Answer {
        let (answer, answered) = mpsc::channel();
        self.jobs.send(Job { path, action, answer }).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
    }

    /// Writes everything and lets it go.
    pub(crate) fn unmount(self) -> Result<()> {
        drop(self.jobs);
        drop(self.thread.join());
        let synced = fs::File::open(&self.point).and_then(|root| sys::sync_file_system(&root));
        let unmounted = let_go(&self.point);
        synced.map_err(during("sync")).and(unmounted.map_err(during("unmount")))
    }
}

/// Unmounts. Programs that have just been ended may hold it for a moment.
fn let_go(point: &Path) -> Result<()> {
    let deadline = Instant::now() + BUSY_LIMIT;
    loop {
        match sys::unmount(point, 0) {
            Err(error) if error.raw_os_error() == Some(sys::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(NAP);
            }
            result => return result,
        }
    }
}

fn gone() -> Error {
    Error::other("the thread of this file system has ended")
}

/// Makes `root` this thread's root: symbolic links and `..` end there.
fn enter(root: &Path) -> Result<()> {
    sys::own_root()?;
    chroot(root)?;
    std::env::set_current_dir("/")
}

fn work(mut files: Files, queue: &Receiver<Job>) {
    for job in queue {
        let answer = files.act(&job.path, job.action);
        // The one who asked waits.
        drop(job.answer.send(answer));
    }
}
