//! A running appliance: started, asked, switched off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _, Storage as _};
use bootcheck::engine::{Boot, Control, Disk, Ending, Engine, MachineSpec, Outcome, Runnable, Transport};
use guestdisk::detect::Kind;
use parking_lot::Mutex;

use crate::fs::Mounted;
use crate::kernel::Kernel;
use crate::lazy::linux_name;
use crate::line::{Line, News};
use crate::wire::{
    self, Action, Bell, CONFIG_PATH, Failure, Hello, MAILBOX_BYTES, MAILBOX_SERIAL, Message, MountRequest,
    Number, Ran, Request, VERSION, WINDOW,
};
use cpio::Archive;

/// The init; empty where it could not be built (build.rs).
pub(crate) const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));
/// The serial line.
const LINE: &str = "ttyS0";
/// How often a caller that waits is asked whether to go on.
const ASK: Duration = Duration::from_millis(100);
/// The machine has to switch itself off within this time.
const OFF_LIMIT: Duration = Duration::from_secs(30);
/// Lines of the console in messages.
const SHOWN_LINES: usize = 6;

/// How an appliance is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// It must be ready within this time.
    pub start_limit: Duration,
    /// Each answer must come within this time; programs that are run bring their own.
    pub answer_limit: Duration,
    /// Words for the kernel's command line.
    pub append: String,
    /// Set by whoever wants it to end at once.
    pub cancel: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            start_limit: Duration::from_secs(300),
            answer_limit: Duration::from_secs(300),
            append: String::new(),
            cancel: Arc::default(),
        }
    }
}

/// Where a file system lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the disk, as given to [`Appliance::start`].
    pub disk: usize,
    /// Number of a partition that the appliance's kernel finds on it; `None`: the whole of it, which is what a
    /// caller wants who gives volumes for disks.
    pub partition: Option<u32>,
}

/// What is mounted, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it lies.
    pub place: Place,
    /// Which file system it is.
    pub kind: Kind,
    /// Nothing is to be written.
    pub read_only: bool,
    /// The kernel's options, with commas between them (`subvol=@`, `norecovery`).
    pub options: String,
}

impl Mount {
    /// The file system on the whole of a disk, to be changed.
    pub fn whole(disk: usize, kind: Kind) -> Self {
        Self { place: Place { disk, partition: None }, kind, read_only: false, options: String::new() }
    }
}

/// How a program of the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<u32>,
    /// It took too long and was ended.
    pub timed_out: bool,
    /// What it printed on standard output and error: the first 64 KiB and the last.
    pub bytes: Vec<u8>,
}

/// A running appliance. Dropping it without [`shutdown`](Self::shutdown) is like pulling the plug: what was changed
/// since the last sync may be on the disks or not.
#[derive(Debug)]
pub struct Appliance {
    session: Arc<Session>,
    devices: Vec<Arc<dyn BlockDevice>>,
    hello: Hello,
}

impl Appliance {
    /// Starts an appliance with these disks: most simply the guest's volumes themselves, each as a disk of its own
    /// (so that partitions and LVM need nobody in the appliance).
    ///
    /// # Errors
    /// `Unsupported` if this program was built without the appliance's init; the engine cannot run it; it is not ready
    /// in time, or ends; `Cancelled`.
    pub fn start(
        devices: Vec<Arc<dyn BlockDevice>>,
        kernel: &Kernel,
        engine: &dyn Engine,
        options: Options,
    ) -> Result<Self> {
        let started = Session::start(&devices, kernel, engine, options);
        let (session, hello) = started.context(|| format!("the appliance ({})", engine.name()))?;
        Ok(Self { session, devices, hello })
    }

    /// The release of its kernel.
    pub fn release(&self) -> &str {
        &self.hello.release
    }

    /// What did not work when it started: modules that could not be loaded.
    pub fn notes(&self) -> &[String] {
        &self.hello.notes
    }

    /// Mounts a file system.
    ///
    /// # Errors
    /// `Unsupported` if its kernel does not know it; the kernel refuses, with its reason; the appliance has ended.
    pub fn mount(&self, mount: &Mount) -> Result<Mounted> {
        let kind = linux_name(mount.kind)?;
        let request = MountRequest {
            disk: mount.place.disk as u64,
            partition: mount.place.partition.unwrap_or(0),
            kind: kind.to_owned(),
            read_only: mount.read_only,
            options: mount.options.clone(),
        };
        let answer = self.session.ask::<Number>(&Request::Mount(request)).map_err(|error| {
            if self.hello.file_systems.iter().any(|known| known == kind) {
                return error;
            }
            let why = self.hello.notes.iter().map(|note| format!(" ({note})")).collect::<String>();
            Error::unsupported(format!("the kernel {} does not know {kind}{why}", self.hello.release))
                .hint("give it a kernel that does, with the folder of its modules")
        });
        let Number(number) = answer.context(|| format!("mount of {} by the appliance", mount.kind))?;
        Ok(Mounted::new(Arc::clone(&self.session), number, mount.kind))
    }

    /// Writes everything, lets all file systems go, and switches the appliance off. What this returns without an error
    /// is on the devices.
    ///
    /// # Errors
    /// A file system could not be written; the appliance or a device failed.
    pub fn shutdown(self) -> Result<()> {
        self.session.call(&Request::PowerOff, self.session.options.answer_limit).context(about)?;
        self.session.wait_for_end(OFF_LIMIT);
        if let Some(why) = self.session.lost.lock().take() {
            return Err(why.context(about()));
        }
        self.devices.iter().try_for_each(|device| device.flush())
    }
}

fn about() -> String {
    "the appliance".to_owned()
}

/// What an appliance and its mounted file systems share.
#[derive(Debug)]
pub(crate) struct Session {
    line: Arc<Line>,
    control: Arc<dyn Control>,
    mailbox: Arc<dyn BlockDevice>,
    options: Options,
    engine: &'static str,
    turn: Mutex<Turn>,
    /// The first file system that was dropped and could not be written.
    lost: Mutex<Option<Error>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Whose turn it is to ask.
#[derive(Debug)]
struct Turn {
    next: u32,
    /// Why nothing can be asked any more.
    broken: Option<String>,
}

impl Session {
    fn start(
        devices: &[Arc<dyn BlockDevice>],
        kernel: &Kernel,
        engine: &dyn Engine,
        options: Options,
    ) -> Result<(Arc<Self>, Hello)> {
        if INIT.is_empty() {
            return Err(Error::unsupported("this program was built without the appliance's init")
                .hint("build it on Linux with a static C library (Debian: libc6-dev)"));
        }
        let store = MemStorage::new();
        store.set_len(MAILBOX_BYTES)?;
        let mailbox: Arc<dyn BlockDevice> = Arc::new(Raw::open(Arc::new(store), RawOptions::default())?);
        let spec = machine(devices, &mailbox, kernel, engine.name(), &options)?;
        let line = Arc::new(Line::default());
        let runnable = engine.build(spec, Arc::clone(&line) as _)?;
        let control = runnable.control();
        let thread = run(runnable, Arc::clone(&line))?;
        let turn = Mutex::new(Turn { next: 1, broken: None });
        let engine = engine.name();
        let session = Arc::new(Self {
            line,
            control,
            mailbox,
            options,
            engine,
            turn,
            lost: Mutex::new(None),
            thread: Mutex::new(Some(thread)),
        });
        let hello = session.meet()?;
        Ok((session, hello))
    }

    /// Waits for the init, which rings first.
    fn meet(&self) -> Result<Hello> {
        self.wait_for_bell(0, self.options.start_limit, "start")?;
        let hello: Hello = self.ask(&Request::Hello)?;
        if hello.version != VERSION {
            let text = format!("its init speaks version {} of our language, not {VERSION}", hello.version);
            return Err(Error::unsupported(text));
        }
        Ok(hello)
    }

    /// Asks for something that is answered with an `A`.
    pub(crate) fn ask<A: Message>(&self, request: &Request) -> Result<A> {
        self.ask_within(request, self.options.answer_limit)
    }

    fn ask_within<A: Message>(&self, request: &Request, limit: Duration) -> Result<A> {
        A::decode(&self.call(request, limit)?)
            .map_err(|error| Error::invalid(format!("the appliance says {error}")))
    }

    /// Does something in a mounted file system; the payload of the answer.
    pub(crate) fn act(&self, mount: u64, path: &[u8], action: Action) -> Result<Vec<u8>> {
        let request = Request::Act { mount, path: path.to_vec(), action };
        self.call(&request, self.options.answer_limit)
    }

    /// Writes everything that belongs to a mounted file system, and lets it go.
    pub(crate) fn unmount(&self, mount: u64) -> Result<()> {
        self.call(&Request::Unmount { mount }, self.options.answer_limit).map(drop)
    }

    /// The same for one that nobody waits for: [`Appliance::shutdown`] tells what went wrong.
    pub(crate) fn let_go(&self, mount: u64) {
        if self.line.ended().is_none()
            && let Err(error) = self.unmount(mount)
        {
            self.lost.lock().get_or_insert(error);
        }
    }

    /// Runs a program.
    pub(crate) fn run(&self, mount: u64, action: Action, limit: Duration) -> Result<Ran> {
        let request = Request::Act { mount, path: vec![], action };
        self.ask_within(&request, limit.saturating_add(self.options.answer_limit))
    }

    /// Asks, and waits for the answer's payload.
    pub(crate) fn call(&self, request: &Request, limit: Duration) -> Result<Vec<u8>> {
        let mut turn = self.turn.lock();
        if let Some(why) = &turn.broken {
            return Err(Error::new(ErrorKind::Io, format!("the appliance is of no use any more: {why}")));
        }
        let answer = self.exchange(&mut turn, request, limit);
        match answer {
            Ok((0, payload)) => Ok(payload),
            Ok((_, payload)) => Err(refused(&payload)),
            Err(error) => {
                turn.broken = Some(error.message().to_owned());
                Err(error)
            }
        }
    }

    /// One request and its answer; an error means that the two do not understand each other any more.
    fn exchange(&self, turn: &mut Turn, request: &Request, limit: Duration) -> Result<(u32, Vec<u8>)> {
        let payload = request.encode();
        let len = u32::try_from(payload.len()).ok().filter(|len| *len <= WINDOW);
        let len = len.ok_or_else(|| Error::usage(format!("a request of {} bytes", payload.len())))?;
        let id = turn.next;
        turn.next = turn.next.wrapping_add(1).max(1);
        self.mailbox.write_at(&payload, 0)?;
        self.control.type_bytes(&Bell { id, status: 0, len, crc: wire::crc32(&payload) }.encode());
        let bell = self.wait_for_bell(id, limit, "answer")?;
        let mut answer = vec![0; block::num::to_usize(u64::from(bell.len))];
        self.mailbox.read_at(&mut answer, u64::from(WINDOW))?;
        if wire::crc32(&answer) != bell.crc {
            return Err(Error::new(ErrorKind::Io, "an answer was damaged on its way"));
        }
        Ok((bell.status, answer))
    }

    fn wait_for_bell(&self, id: u32, limit: Duration, verb: &str) -> Result<Bell> {
        let started = Instant::now();
        loop {
            let left = limit.saturating_sub(started.elapsed());
            match self.line.listen(left.min(ASK)) {
                News::Bell(bell) if bell.id == id => return Ok(bell),
                News::Bell(_) => {}
                News::Ended(why) => return Err(self.tell(format!("it has ended: {why}"))),
                News::Nothing if self.options.cancel.load(Ordering::Relaxed) => {
                    self.control.stop();
                    return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
                }
                News::Nothing if left.is_zero() => {
                    self.control.stop();
                    return Err(self.tell(format!("it did not {verb} within {} s", limit.as_secs())));
                }
                News::Nothing => {}
            }
        }
    }

    /// The error with the last words of the console.
    fn tell(&self, what: String) -> Error {
        let lines = self.line.last_lines(SHOWN_LINES);
        let error = Error::new(ErrorKind::Io, what);
        if lines.is_empty() {
            return error.hint(format!("its console has said nothing; does {} run Linux here?", self.engine));
        }
        error.hint(format!("its console ends with: {}", lines.join(" | ")))
    }

    fn wait_for_end(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.line.ended().is_none() && Instant::now() < deadline {
            self.line.listen(ASK);
        }
        self.control.stop();
        if let Some(thread) = self.thread.lock().take()
            && (self.line.ended().is_some() || thread.is_finished())
        {
            // It has nothing to say.
            drop(thread.join());
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.thread.get_mut().is_some() {
            self.control.stop();
            self.wait_for_end(OFF_LIMIT);
        }
    }
}

/// Runs the machine in a thread of its own.
fn run(runnable: Box<dyn Runnable>, line: Arc<Line>) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("appliance".to_owned()).spawn(move || {
        let mut end = End { line, why: "its engine has failed".to_owned() };
        end.why = match runnable.run() {
            Ok(Outcome { ending, .. }) => in_words(&ending),
            Err(error) => error.to_string(),
        };
    })?;
    Ok(thread)
}

/// Tells of the end of the machine, however that comes.
struct End {
    line: Arc<Line>,
    why: String,
}

impl Drop for End {
    fn drop(&mut self) {
        self.line.end(std::mem::take(&mut self.why));
    }
}

fn in_words(ending: &Ending) -> String {
    match ending {
        Ending::PowerOff => "switched off".to_owned(),
        Ending::Reset { .. } => "its kernel has panicked".to_owned(),
        Ending::TripleFault => "triple fault".to_owned(),
        Ending::Stuck { reason } | Ending::EngineDied { reason } => reason.clone(),
        Ending::Stopped => "stopped".to_owned(),
        other => format!("{other:?}"),
    }
}

/// The machine: the guest's disks, the mailbox, the kernel with its initramfs.
fn machine(
    devices: &[Arc<dyn BlockDevice>],
    mailbox: &Arc<dyn BlockDevice>,
    kernel: &Kernel,
    engine: &str,
    options: &Options,
) -> Result<MachineSpec> {
    let disk = |device: &Arc<dyn BlockDevice>, serial| Disk {
        device: Arc::clone(device),
        read_only: device.read_only(),
        serial,
    };
    let mut disks: Vec<_> =
        devices.iter().enumerate().map(|(index, device)| disk(device, wire::disk_serial(index))).collect();
    disks.push(disk(mailbox, MAILBOX_SERIAL.to_owned()));
    // Where instructions are translated, the kernel's test of its timer finds a broken one.
    let test = if engine.ends_with("-tcg") { " no_timer_check" } else { "" };
    let cmdline =
        format!("console={LINE} quiet panic=-1 rdinit=/init random.trust_cpu=on{test} {}", options.append);
    Ok(MachineSpec {
        cpus: 1,
        memory_bytes: options.memory_bytes,
        disks,
        transport: Transport::Pci,
        boot: Boot::Linux {
            kernel: Arc::clone(&kernel.image),
            initrd: Some(initramfs(kernel, devices.len())?.into()),
            cmdline: cmdline.trim_end().to_owned(),
        },
    })
}

fn initramfs(kernel: &Kernel, disks: usize) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["dev", "etc", "modules", "mounted", "proc", "sys"] {
        archive.directory(folder)?;
    }
    archive.device("dev/console", 0o020_600, 5, 1)?;
    archive.device("dev/null", 0o020_666, 1, 3)?;
    let mut config = format!("line {LINE}\ndisks {disks}\n");
    for (number, module) in kernel.modules.iter().enumerate() {
        let file = format!("{number:03}-{}.ko", module.name);
        config.push_str(&format!("module {file}\n"));
        archive.file(&format!("modules/{file}"), 0o600, &module.bytes)?;
    }
    archive.file(CONFIG_PATH, 0o644, config.as_bytes())?;
    archive.file("init", 0o755, INIT)?;
    Ok(archive.finish())
}

/// The failure that the init tells, for us. It may be lies: only its length and form are known to be good.
fn refused(payload: &[u8]) -> Error {
    const MOST_TEXT: usize = 1000;
    let Ok(Failure { errno, message }) = Failure::decode(payload) else {
        return Error::invalid(format!("the appliance says {}", wire::Nonsense));
    };
    let kind = match errno {
        2 | 20 => ErrorKind::NotFound,
        1 | 13 => ErrorKind::Permission,
        17 | 21 | 22 | 36 | 39 | 40 => ErrorKind::Usage,
        19 | 38 | 95 => ErrorKind::Unsupported,
        28 | 122 => ErrorKind::NoSpace,
        30 => ErrorKind::ReadOnly,
        74 | 117 => ErrorKind::Corrupt,
        _ => ErrorKind::Io,
    };
    let text: String = message.chars().filter(|c| !c.is_control()).take(MOST_TEXT).collect();
    Error::new(kind, text)
}

#[cfg(test)]
mod tests;
