//! The appliance's init as a program of the host, and our end of its line: what engines that are no machines share.

use std::fs::File;
use std::io::{ErrorKind, Read, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use block::{Error, Result, ResultExt as _};
use bootcheck::engine::{Control, Ending, Observer};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;

use crate::session::INIT;

/// Bytes of its complaints that are kept.
const MAX_COMPLAINTS: u64 = 16 << 10;
/// Lines of them in messages.
const SHOWN_LINES: usize = 3;
/// What is waited for has to come within this time.
const LIMIT: Duration = Duration::from_secs(3);
const NAP: Duration = Duration::from_millis(4);

/// The init as a file that can be run.
pub(crate) fn init() -> Result<File> {
    if INIT.is_empty() {
        return Err(Error::unsupported("this program was built without the appliance's init"));
    }
    let what = || "could not make a program in memory".to_owned();
    let file = memfd_create(c"vimg-init", MFdFlags::MFD_CLOEXEC).map_err(Error::from).context(what)?;
    let mut file = File::from(file);
    file.write_all(INIT).context(what)?;
    // A file that is open for writing cannot be run.
    File::open(path(&file)).context(what)
}

/// By which a file that is open here can be run.
pub(crate) fn path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Starts a program. A process that another thread starts at this moment may still have its file open for writing.
pub(crate) fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                std::thread::sleep(NAP);
            }
            result => return result,
        }
    }
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    status: ExitStatus,
    complaints: String,
}

/// Waits for a program's end.
pub(crate) fn wait(mut child: Child) -> Result<Ended> {
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
    /// What that means for the machine; `failed` is what went wrong on our side.
    pub(crate) fn ending(&self, failed: Option<Error>, stopped: bool) -> Ending {
        match failed {
            Some(error) => Ending::EngineDied { reason: error.to_string() },
            None if stopped => Ending::Stopped,
            None if self.status.success() => Ending::PowerOff,
            None => Ending::EngineDied { reason: self.in_words() },
        }
    }

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

/// The remote control: our end of the line. Whoever is at the other end ends when it is hung up.
#[derive(Debug)]
pub(crate) struct Remote {
    line: Mutex<UnixStream>,
    stopped: AtomicBool,
}

impl Control for Remote {
    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.hang_up();
    }

    fn type_bytes(&self, bytes: &[u8]) {
        // If nobody is there any more, that is told by other means.
        drop(self.line.lock().write_all(bytes));
    }
}

impl Remote {
    /// One, and the other end of its line.
    pub(crate) fn new() -> Result<(Arc<Self>, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Arc::new(Self { line: Mutex::new(ours), stopped: AtomicBool::new(false) }), theirs.into()))
    }

    /// Whether it was stopped by us.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn hang_up(&self) {
        drop(self.line.lock().shutdown(Shutdown::Both));
    }

    /// A thread that tells what comes on the line.
    pub(crate) fn listen(&self, observer: Arc<dyn Observer>) -> Result<JoinHandle<()>> {
        let mut line = self.line.lock().try_clone()?;
        Ok(Builder::new().name("line".to_owned()).spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(count @ 1..) = line.read(&mut buf) {
                observer.console(&buf[..count], Instant::now());
            }
        })?)
    }
}

/// Waits for threads that are about to end; one that does not is left behind.
pub(crate) fn leave(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + LIMIT;
    for thread in threads {
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(NAP);
        }
        if thread.is_finished() {
            drop(thread.join());
        }
    }
}
