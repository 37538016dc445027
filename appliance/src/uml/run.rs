//! One run of a User-Mode Linux, from its start to its end.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use block::{Error, Result, ResultExt as _};
use bootcheck::engine::{Control, Ending, Observer, Outcome, Runnable};
use bootcheck::folder::Folder;
use bootcheck::vhost_user;
use bootcheck::virtio::blk::Blk;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket;
use parking_lot::Mutex;

use super::confine;
use super::first_use::FirstUse;
use crate::session::INIT;
use crate::wire::GUARD;

/// Bytes of its complaints that are kept.
const MAX_COMPLAINTS: u64 = 16 << 10;
/// Lines of them in messages.
const SHOWN_LINES: usize = 3;
/// Threads that serve it have to end within this time; whoever does not is left behind.
const LEAVE: Duration = Duration::from_secs(3);
const NAP: Duration = Duration::from_millis(4);

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// A disk is read or written for the first time.
    FirstUse,
    /// A disk cannot be served any more.
    Failed(Error),
    /// The program has ended, or could not be started.
    Ended(Result<Ended>),
    /// It is to be stopped.
    Stop,
}

/// How the program ended.
#[derive(Debug)]
pub(super) struct Ended {
    status: ExitStatus,
    complaints: String,
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

/// The remote control.
#[derive(Debug)]
struct Remote {
    sender: Mutex<Sender<Event>>,
    line: Mutex<UnixStream>,
}

impl Control for Remote {
    fn stop(&self) {
        drop(self.sender.lock().send(Event::Stop));
    }

    fn type_bytes(&self, bytes: &[u8]) {
        // If nobody is there any more, that is told by other means.
        drop(self.line.lock().write_all(bytes));
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
        let (ours, theirs) = UnixStream::pair()?;
        let sender = Mutex::new(parts.sender.clone());
        let remote = Arc::new(Remote { sender, line: Mutex::new(ours) });
        Ok(Self { parts, remote, line: Some(theirs.into()) })
    }

    fn listen(&self, line: UnixStream) -> Result<JoinHandle<()>> {
        let observer = Arc::clone(&self.parts.observer);
        Ok(Builder::new().name("uml-line".to_owned()).spawn(move || {
            let (mut buf, mut line) = ([0; 4096], line);
            while let Ok(count @ 1..) = line.read(&mut buf) {
                observer.console(&buf[..count], Instant::now());
            }
        })?)
    }

    /// A thread that waits for the kernel's connection to a disk, and serves it.
    fn serve(&self, listener: &UnixListener, disk: &Arc<Blk>, stopping: &Arc<AtomicBool>) -> Result<Server> {
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
        Ok(Server { listener: listener.try_clone()?, connection, thread })
    }

    /// Starts the program in a thread that is confined, for it to be, too, and waits for its end there.
    fn launch(&mut self) -> Result<JoinHandle<()>> {
        let (sender, program) = (self.parts.sender.clone(), self.parts.program.clone());
        let (args, folder) = (self.parts.args.clone(), self.parts.folder.path().to_owned());
        let line = self.line.take().ok_or_else(|| Error::usage("a machine runs once"))?;
        let guard = guard()?;
        Ok(Builder::new().name("uml".to_owned()).spawn(move || {
            let run = || -> Result<Ended> {
                confine::enter(&program, &folder)?;
                // Its own group: the terminal's interrupts are for us alone.
                let mut command = Command::new(format!("/proc/self/fd/{}", guard.as_raw_fd()));
                command
                    .arg(GUARD)
                    .arg(&program)
                    .args(&args)
                    .env_clear()
                    .env("TMPDIR", &folder)
                    .process_group(0)
                    .stdin(line)
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped());
                wait(spawn(&mut command).context(|| format!("could not run '{}'", program.display()))?)
            };
            drop(sender.send(Event::Ended(run())));
        })?)
    }

    /// Waits for the end; the first thing that went wrong, and how the program ended.
    fn watch(&self) -> (Option<Error>, bool, Result<Ended>) {
        let (mut failed, mut stopped, mut unused) = (None, false, self.parts.disks.len());
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
                    self.hang_up();
                }
                Ok(Event::Stop) => {
                    stopped = true;
                    self.hang_up();
                }
                Ok(Event::Ended(ended)) => return (failed, stopped, ended),
                Err(error) => return (failed, stopped, Err(Error::unsupported(error.to_string()))),
            }
        }
    }

    /// The guard ends everything when the line is closed.
    fn hang_up(&self) {
        drop(self.remote.line.lock().shutdown(Shutdown::Both));
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(mut self: Box<Self>) -> Result<Outcome> {
        let called = Instant::now();
        let stopping = Arc::new(AtomicBool::new(false));
        let line = self.remote.line.lock().try_clone()?;
        let console = self.listen(line)?;
        let pairs = self.parts.listeners.iter().zip(&self.parts.disks);
        let servers = pairs.map(|(listener, disk)| self.serve(listener, disk, &stopping));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let launched = self.launch()?;
        let startup = called.elapsed();
        self.parts.observer.started(Instant::now());
        let (failed, stopped, ended) = self.watch();
        self.hang_up();
        stopping.store(true, Ordering::Release);
        let threads: Vec<_> = servers.into_iter().map(Server::end).chain([console, launched]).collect();
        leave(threads);
        let disks = self.parts.disks.iter().map(|disk| disk.activity()).collect();
        let ending = match (failed, ended?) {
            (Some(error), _) => Ending::EngineDied { reason: error.to_string() },
            _ if stopped => Ending::Stopped,
            (None, Ended { status, .. }) if status.success() => Ending::PowerOff,
            (None, ended) => Ending::EngineDied { reason: ended.in_words() },
        };
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

fn leave(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + LEAVE;
    for thread in threads {
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(NAP);
        }
        if thread.is_finished() {
            drop(thread.join());
        }
    }
}

/// Our init as a file that can be run.
fn guard() -> Result<File> {
    let what = || "could not make a program in memory".to_owned();
    let file = memfd_create(c"vimg-guard", MFdFlags::MFD_CLOEXEC).map_err(Error::from).context(what)?;
    let mut file = File::from(file);
    file.write_all(INIT).context(what)?;
    // A file that is open for writing cannot be run.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).context(what)
}

/// Starts the guard. A process that another thread starts at this moment may still have it open for writing.
pub(super) fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let deadline = Instant::now() + LEAVE;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                std::thread::sleep(NAP);
            }
            result => return result,
        }
    }
}

/// Waits for the program's end.
fn wait(mut child: Child) -> Result<Ended> {
    let mut text = vec![];
    if let Some(mut stream) = child.stderr.take() {
        // What cannot be read is not shown.
        drop(stream.by_ref().take(MAX_COMPLAINTS).read_to_end(&mut text));
        drop(std::io::copy(&mut stream, &mut std::io::sink()));
    }
    let status = child.wait()?;
    Ok(Ended { status, complaints: String::from_utf8_lossy(&text).into_owned() })
}

impl Ended {
    /// Its last words, and how it ended.
    fn in_words(&self) -> String {
        let lines: Vec<_> = self.complaints.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(SHOWN_LINES)..].join(" | ");
        let status = match (self.status.code(), self.status.signal()) {
            (Some(code @ 129..), _) => format!("signal {}", code - 128),
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or(0)),
        };
        if last.is_empty() {
            format!("the program has ended ({status})")
        } else {
            format!("{last} ({status})")
        }
    }
}
