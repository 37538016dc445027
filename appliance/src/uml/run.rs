//! One run of a User-Mode Linux, from its start to its end.

use std::ffi::OsString;
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use block::{Error, Result, ResultExt as _};
use bootcheck::engine::{Control, Observer, Outcome, Runnable};
use bootcheck::folder::Folder;
use bootcheck::vhost_user;
use bootcheck::virtio::blk::Blk;
use nix::sys::socket;
use parking_lot::Mutex;

use super::confine;
use super::first_use::FirstUse;
use crate::program::{self, Ended, Remote};
use crate::wire::GUARD;

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// A disk is read or written for the first time.
    FirstUse,
    /// A disk cannot be served any more.
    Failed(Error),
    /// The program has ended, or could not be started.
    Ended(Result<Ended>),
}

/// A machine that is ready to be run.
pub(super) struct Machine {
    parts: Parts,
    remote: Arc<Remote>,
    /// Its end of the serial line.
    line: Option<OwnedFd>,
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    pub(super) folder: Folder,
    pub(super) listeners: Vec<UnixListener>,
    pub(super) disks: Vec<Arc<Blk>>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) sender: Sender<Event>,
    pub(super) events: Receiver<Event>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine({:?} {:?})", self.parts.program, self.parts.args)
    }
}

/// What serves a disk.
struct Server {
    listener: UnixListener,
    connection: Arc<Mutex<Option<UnixStream>>>,
    thread: JoinHandle<()>,
}

impl Machine {
    /// # Errors
    /// No more descriptors.
    pub(super) fn new(parts: Parts) -> Result<Self> {
        let (remote, line) = Remote::new()?;
        Ok(Self { parts, remote, line: Some(line) })
    }

    /// A thread that waits for the kernel's connection to a disk, and serves it.
    fn serve(&self, listener: &UnixListener, disk: &Arc<Blk>, stopping: &Arc<AtomicBool>) -> Result<Server> {
        let ending = listener.try_clone()?;
        let sender = self.parts.sender.clone();
        let device = FirstUse::new(Arc::clone(disk), sender.clone());
        let connection = Arc::new(Mutex::new(None));
        let (waiting, stopping, place) =
            (listener.try_clone()?, Arc::clone(stopping), Arc::clone(&connection));
        let thread = Builder::new().name("uml-disk".to_owned()).spawn(move || {
            let served = accept(&waiting, &place).and_then(|stream| match stream {
                Some(stream) => vhost_user::serve(&stream, &device, &stopping),
                None => Ok(()),
            });
            if let Err(error) = served {
                drop(sender.send(Event::Failed(error)));
            }
        })?;
        Ok(Server { listener: ending, connection, thread })
    }

    /// Starts everything. What has started is in `servers` and `threads`, even if something else could not.
    fn begin(
        &mut self,
        stopping: &Arc<AtomicBool>,
        servers: &mut Vec<Server>,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> Result<()> {
        threads.push(self.remote.listen(Arc::clone(&self.parts.observer))?);
        for (listener, disk) in self.parts.listeners.iter().zip(&self.parts.disks) {
            servers.push(self.serve(listener, disk, stopping)?);
        }
        threads.push(self.launch()?);
        Ok(())
    }

    /// Starts the program in a thread that is confined, for it to be, too, and waits for its end there.
    fn launch(&mut self) -> Result<JoinHandle<()>> {
        let (sender, uml) = (self.parts.sender.clone(), self.parts.program.clone());
        let (args, folder) = (self.parts.args.clone(), self.parts.folder.path().to_owned());
        let line = self.line.take().ok_or_else(|| Error::usage("a machine runs once"))?;
        let guard = program::init()?;
        Ok(Builder::new().name("uml".to_owned()).spawn(move || {
            let run = || -> Result<Ended> {
                confine::enter(&uml, &folder)?;
                // Its own group: the terminal's interrupts are for us alone.
                let mut command = Command::new(program::path(&guard));
                command
                    .arg(GUARD)
                    .arg(&uml)
                    .args(&args)
                    .env_clear()
                    .env("TMPDIR", &folder)
                    .process_group(0)
                    .stdin(line)
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped());
                let child = program::spawn(&mut command);
                program::wait(child.context(|| format!("could not run '{}'", uml.display()))?)
            };
            drop(sender.send(Event::Ended(run())));
        })?)
    }

    /// Waits for the end; the first thing that went wrong, and how the program ended.
    fn watch(&self) -> (Option<Error>, Result<Ended>) {
        let (mut failed, mut unused) = (None, self.parts.disks.len());
        loop {
            match self.parts.events.recv() {
                Ok(Event::FirstUse) => {
                    unused = unused.saturating_sub(1);
                    if unused == 0 {
                        // It has opened everything: from now on nothing is left if we are ended.
                        self.parts.folder.clear();
                    }
                }
                Ok(Event::Failed(error)) => {
                    failed.get_or_insert(error);
                    // The guard ends everything then.
                    self.remote.hang_up();
                }
                Ok(Event::Ended(ended)) => return (failed, ended),
                Err(error) => return (failed, Err(Error::unsupported(error.to_string()))),
            }
        }
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(mut self: Box<Self>) -> Result<Outcome> {
        let called = Instant::now();
        let stopping = Arc::new(AtomicBool::new(false));
        let (mut servers, mut threads) = (vec![], vec![]);
        let begun = self.begin(&stopping, &mut servers, &mut threads);
        let watched = begun.map(|()| {
            let startup = called.elapsed();
            self.parts.observer.started(Instant::now());
            (startup, self.watch())
        });
        // What has begun ends, whether all of it had or not.
        self.remote.hang_up();
        stopping.store(true, Ordering::Release);
        threads.extend(servers.into_iter().map(Server::end));
        program::leave(threads);
        let (startup, (failed, ended)) = watched?;
        let disks = self.parts.disks.iter().map(|disk| disk.activity()).collect();
        let ending = ended?.ending(failed, self.remote.is_stopped());
        Ok(Outcome { ending, cpus: vec![], disks, startup, screen: vec![], vars: None })
    }
}

impl Server {
    /// Ends its waiting, and its connection.
    fn end(self) -> JoinHandle<()> {
        // One that is not waited on any more needs no end.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        if let Some(connection) = self.connection.lock().take() {
            drop(connection.shutdown(Shutdown::Both));
        }
        self.thread
    }
}

/// Waits for a connection, and leaves a way to end it at `place`; `None` if nobody is waited for any more.
fn accept(listener: &UnixListener, place: &Mutex<Option<UnixStream>>) -> Result<Option<UnixStream>> {
    // It is shut down for an end.
    let Ok((stream, _)) = listener.accept() else { return Ok(None) };
    *place.lock() = Some(stream.try_clone()?);
    Ok(Some(stream))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};
    use bootcheck::engine::Disk;

    use super::*;

    struct Nobody;
    impl Observer for Nobody {
        fn console(&self, _: &[u8], _: Instant) {}
    }

    /// A disk that a thread still waits to serve is not let go.
    #[test]
    fn a_machine_that_cannot_be_started_lets_its_disks_go() {
        let folder = Folder::new(&std::env::temp_dir(), "uml-run").unwrap();
        let listener = UnixListener::bind(folder.file("disk0")).unwrap();
        let device = Raw::open(Arc::new(MemStorage::new()), RawOptions::default()).unwrap();
        let disk = Disk { device: Arc::new(device), read_only: false, serial: String::new() };
        let disk = Arc::new(Blk::new(disk, 1));
        let (sender, events) = std::sync::mpsc::channel();
        let parts = Parts {
            program: "/bin/true".into(),
            args: vec![],
            folder,
            listeners: vec![listener],
            disks: vec![Arc::clone(&disk)],
            observer: Arc::new(Nobody),
            sender,
            events,
        };
        let machine = Machine { line: None, ..Machine::new(parts).unwrap() };
        assert_eq!(Box::new(machine).run().unwrap_err().kind(), block::ErrorKind::Usage);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&disk) > 1 {
            assert!(Instant::now() < deadline, "a thread still has it");
            std::thread::yield_now();
        }
    }
}
