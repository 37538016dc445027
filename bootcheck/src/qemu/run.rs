//! One run of qemu, from its start to its end.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;

use block::{Error, Result, ResultExt as _};

use super::qmp::{self, Event, Qmp};
use super::screen::Screen;
use super::{QemuEngine, args, registers, screen};
use crate::counted::Counted;
use crate::engine::{Control, CpuState, Ending, Observer, Outcome, Runnable};
use crate::folder::Folder;

/// qemu has to be ready within this time.
const READY: Duration = Duration::from_secs(60);
/// It has to answer within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// And to leave.
const LEAVE: Duration = Duration::from_secs(3);
/// Bytes of its complaints that are kept.
const MAX_COMPLAINTS: u64 = 16 << 10;
/// While something is waited for that tells nobody when it happens.
const NAP: Duration = Duration::from_millis(4);

/// A machine that is ready to be run.
pub(super) struct Machine {
    engine: QemuEngine,
    args: Vec<OsString>,
    // Dropped in this order: the server's socket lies in the folder.
    server: Option<Box<dyn Send>>,
    folder: Folder,
    disks: Vec<Arc<Counted>>,
    observer: Arc<dyn Observer>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    remote: Arc<Remote>,
    screen: Option<Screen>,
    has_firmware: bool,
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) engine: QemuEngine,
    pub(super) args: Vec<OsString>,
    pub(super) folder: Folder,
    pub(super) server: Box<dyn Send>,
    pub(super) disks: Vec<Arc<Counted>>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) sender: Sender<Event>,
    pub(super) events: Receiver<Event>,
    /// The guest has a screen.
    pub(super) screen: Option<Screen>,
    /// A firmware starts the guest, which keeps a log.
    pub(super) has_firmware: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine({:?} {:?})", self.engine.program, self.args)
    }
}

/// The remote control.
#[derive(Debug)]
struct Remote {
    sender: Sender<Event>,
    keyboard: Mutex<Keyboard>,
}

/// The guest's serial line, our end of it.
#[derive(Debug)]
enum Keyboard {
    /// qemu has not been started: what is typed waits.
    Early(Vec<u8>),
    Open(ChildStdin),
    Closed,
}

impl Control for Remote {
    fn stop(&self) {
        drop(self.sender.send(Event::Stop));
    }

    fn type_bytes(&self, bytes: &[u8]) {
        let mut keyboard = self.keyboard.lock();
        match &mut *keyboard {
            Keyboard::Early(typed) => typed.extend(bytes),
            Keyboard::Open(pipe) => {
                if pipe.write_all(bytes).and_then(|()| pipe.flush()).is_err() {
                    *keyboard = Keyboard::Closed;
                }
            }
            Keyboard::Closed => {}
        }
    }
}

impl Remote {
    fn connect(&self, mut pipe: ChildStdin) {
        let mut keyboard = self.keyboard.lock();
        if let Keyboard::Early(typed) = &*keyboard {
            // A guest that is gone already does not listen.
            drop(pipe.write_all(typed));
        }
        *keyboard = Keyboard::Open(pipe);
    }
}

impl Machine {
    pub(super) fn new(parts: Parts) -> Self {
        let keyboard = Mutex::new(Keyboard::Early(vec![]));
        let remote = Arc::new(Remote { sender: parts.sender.clone(), keyboard });
        let Parts { engine, args, folder, server, disks, observer, sender, events, screen, has_firmware } =
            parts;
        let server = Some(server);
        Self { engine, args, server, folder, disks, observer, sender, events, remote, screen, has_firmware }
    }

    fn start(&self) -> Result<Process> {
        let mut words = self.engine.wrapper.clone();
        words.push(self.engine.program.clone().into());
        words.extend(self.args.iter().cloned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own group: the terminal's interrupts are for us alone, and we end it.
        command.process_group(0);
        let what = || format!("could not run '{}'", self.engine.program.display());
        let mut child = command.spawn().context(what)?;
        let complaints = child.stderr.take().map(|mut stream| {
            std::thread::spawn(move || {
                let mut text = vec![];
                // What cannot be read is not shown.
                drop(stream.by_ref().take(MAX_COMPLAINTS).read_to_end(&mut text));
                drop(std::io::copy(&mut stream, &mut std::io::sink()));
                String::from_utf8_lossy(&text).trim().to_owned()
            })
        });
        if let Some(pipe) = child.stdin.take() {
            self.remote.connect(pipe);
        }
        let console = child.stdout.take().map(|mut stream| {
            let observer = Arc::clone(&self.observer);
            std::thread::spawn(move || {
                let mut buf = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buf) {
                    observer.console(&buf[..count], Instant::now());
                }
            })
        });
        Ok(Process { child, complaints, console })
    }

    fn activity(&self) -> Vec<crate::engine::DiskActivity> {
        self.disks.iter().map(|disk| disk.activity()).collect()
    }

    /// What qemu calls the end of the guest.
    fn ending(&self, reason: &str) -> Ending {
        match reason {
            "guest-shutdown" => Ending::PowerOff,
            "guest-reset" if self.saw_triple_fault() => Ending::TripleFault,
            "guest-reset" => Ending::Reset { how: "a means that qemu does not tell" },
            "guest-panic" => Ending::Stuck { reason: "the guest has told qemu of its panic".to_owned() },
            "host-error" => Ending::Stuck { reason: "qemu reports an error of the host".to_owned() },
            other => Ending::EngineDied { reason: format!("qemu was shut down: {other}") },
        }
    }

    /// With KVM the log knows nothing of it.
    fn saw_triple_fault(&self) -> bool {
        let log = std::fs::read(self.folder.file(args::LOG)).unwrap_or_default();
        log.windows(12).any(|window| window == b"Triple fault")
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.remote) as _
    }

    fn run(mut self: Box<Self>) -> Result<Outcome> {
        let called = Instant::now();
        let listener =
            UnixListener::bind(self.folder.file(args::QMP)).context(|| "the socket for qemu".to_owned())?;
        let log = self.has_firmware.then(|| UnixListener::bind(self.folder.file(args::FIRMWARE_LOG)));
        let log = log.transpose().context(|| "the socket for the firmware's log".to_owned())?;
        let mut process = self.start()?;
        let stream = match process.accept(&listener) {
            Ok(stream) => stream,
            Err(error) => return Err(process.explain(error)),
        };
        // qemu has connected to it before it connected to its monitor's socket.
        let log = log.map(|listener| follow_log(&listener, Arc::clone(&self.observer)));
        let (reading, sender) = (stream.try_clone()?, self.sender.clone());
        let reader = std::thread::spawn(move || qmp::read(reading, &sender));
        let mut qmp = Qmp::new(stream, &self.events);
        let mut begin = || -> Result<Duration> {
            qmp.run("qmp_capabilities", json!({}), READY)?;
            // qemu itself has had a look at the disks (their geometry); only the guest counts.
            self.disks.iter().for_each(|disk| disk.reset());
            let startup = called.elapsed();
            self.observer.started(Instant::now());
            qmp.run("cont", json!({}), READY)?;
            Ok(startup)
        };
        let startup = match begin() {
            Ok(startup) => startup,
            Err(error) => return Err(process.explain(error)),
        };
        let event = match &mut self.screen {
            Some(screen) => watch_screen(screen, &mut qmp, &*self.observer),
            None => qmp.next(),
        };
        let ending = match event {
            Event::Shutdown(reason) => self.ending(&reason),
            Event::Stop => Ending::Stopped,
            Event::Gone | Event::Reply(_) => Ending::EngineDied { reason: String::new() },
        };
        let disks = self.activity();
        if let Some(screen) = &mut self.screen
            && let Some(rows) = screen.look(&mut qmp)
        {
            self.observer.screen(rows, Instant::now());
        }
        let cpus = if matches!(ending, Ending::EngineDied { .. }) { vec![] } else { inspect(&mut qmp) };
        // Gone already, perhaps.
        drop(qmp.run("quit", json!({}), ANSWER));
        let ended = process.end();
        drop(reader.join());
        if let Some(log) = log.flatten() {
            drop(log.join());
        }
        drop(self.server.take());
        let ending = match ending {
            Ending::EngineDied { reason } if reason.is_empty() => Ending::EngineDied { reason: ended },
            ending => ending,
        };
        let screen = self.screen.as_ref().map(Screen::last).unwrap_or_default();
        let vars = std::fs::read(self.folder.file(args::VARS)).ok();
        Ok(Outcome { ending, cpus, disks, startup, screen, vars })
    }
}

/// Tells of what a firmware logs, until qemu is gone.
fn follow_log(listener: &UnixListener, observer: Arc<dyn Observer>) -> Option<JoinHandle<()>> {
    listener.set_nonblocking(true).ok()?;
    let (mut stream, _) = listener.accept().ok()?;
    stream.set_nonblocking(false).ok()?;
    Some(std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buf) {
            observer.firmware_log(&buf[..count], Instant::now());
        }
    }))
}

/// Looks at the screen until something happens.
fn watch_screen(screen: &mut Screen, qmp: &mut Qmp<'_>, observer: &dyn Observer) -> Event {
    loop {
        if let Some(event) = qmp.next_within(screen::INTERVAL) {
            return event;
        }
        if let Some(rows) = screen.look(qmp) {
            observer.screen(rows, Instant::now());
        }
    }
}

/// Where the processors stand; nothing if qemu does not tell.
fn inspect(qmp: &mut Qmp<'_>) -> Vec<CpuState> {
    if qmp.run("stop", json!({}), ANSWER).is_err() {
        return vec![];
    }
    let Ok(text) = qmp.monitor("info registers -a", ANSWER) else { return vec![] };
    let mut cpus = registers::parse(&text);
    // The monitor looks through the first processor's page tables.
    if let Some(first) = cpus.first_mut()
        && let Ok(text) = qmp.monitor(&format!("x /16xb {:#x}", first.rip), ANSWER)
    {
        first.code = registers::bytes(&text);
    }
    cpus
}

/// The running program; it does not outlive this.
struct Process {
    child: Child,
    complaints: Option<JoinHandle<String>>,
    console: Option<JoinHandle<()>>,
}

impl Process {
    /// Waits until qemu has connected to its monitor's socket.
    fn accept(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + READY;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if self.child.try_wait()?.is_some() {
                return Err(Error::unsupported("qemu did not start"));
            }
            if Instant::now() > deadline {
                return Err(Error::unsupported(format!("qemu was not ready after {} s", READY.as_secs())));
            }
            std::thread::sleep(NAP);
        }
    }

    /// Lets it leave, or makes it; what it complained about, or how it ended.
    fn end(&mut self) -> String {
        let deadline = Instant::now() + LEAVE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                drop(self.child.kill());
                break;
            }
            std::thread::sleep(NAP);
        }
        let status = self.child.wait();
        if let Some(console) = self.console.take() {
            drop(console.join());
        }
        let complaints = self.complaints.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        match (complaints.is_empty(), status) {
            (false, _) => complaints,
            (true, Ok(status)) => status.to_string(),
            (true, Err(error)) => error.to_string(),
        }
    }

    /// The error with qemu's own words.
    fn explain(&mut self, error: Error) -> Error {
        drop(self.child.kill());
        let complaints = self.end();
        Error::unsupported(format!("{error}: {complaints}"))
            .hint("see whether this qemu works: qemu-system-x86_64 --version")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
