//! `vimg serve` (and qemu-nbd) as a process of a test: started, waited for, stopped, and never left behind.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{self, Cmd, Ran};
use crate::dir::Dir;
use crate::skip::Need;

/// How long a server may take to be there, or to be gone: machines that test are busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server in the background; killed when it goes out of scope.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// What it has printed when it was ready: the URIs of its exports.
    pub uris: Vec<String>,
    /// Its Unix socket.
    pub socket: PathBuf,
    stderr: Option<JoinHandle<String>>,
}

/// How a server has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` if a signal has killed it.
    pub code: Option<i32>,
    /// What it has said on standard error.
    pub stderr: String,
}

impl Server {
    /// Starts `vimg serve` with these words on a Unix socket of its own, and waits until it is ready.
    #[track_caller]
    pub fn start(dir: &Dir, words: &str) -> Self {
        let socket = fresh_socket(dir);
        let cmd = dir.vimg_cmd("serve --socket").arg(&socket).words(words);
        Self::run(&cmd, socket)
    }

    /// Starts this command, which serves on `socket` and prints a line for each export when it is ready.
    #[track_caller]
    pub fn run(cmd: &Cmd, socket: PathBuf) -> Self {
        let mut child = cmd.spawn();
        drop(child.stdin.take());
        let stderr = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = BufReader::new(stderr).read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut server = Self { child, uris: vec![], socket, stderr: Some(stderr) };
        let mut line = String::new();
        if stdout.read_line(&mut line).unwrap() == 0 {
            let ended = server.wait();
            panic!("no server came out of: {cmd}\n{ended:?}");
        }
        server.uris.push(line.trim_end().to_owned());
        // The others have been printed together with the first.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut stdout, &mut std::io::sink());
        });
        server
    }

    /// Starts a server that prints nothing, such as qemu-nbd, and waits until it listens on `socket`.
    #[track_caller]
    pub fn run_silent(cmd: &Cmd, socket: PathBuf) -> Self {
        let mut child = cmd.spawn();
        drop((child.stdin.take(), child.stdout.take()));
        let mut stderr = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let mut server = Self { child, uris: vec![], socket, stderr: Some(stderr) };
        let deadline = Instant::now() + PATIENCE;
        while !server.socket.exists() {
            let gone = server.child.try_wait().unwrap().is_some();
            assert!(!gone && Instant::now() < deadline, "no server came out of: {cmd}\n{:?}", server.wait());
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// The URI of the export without a name.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// The URI of an export (whose name needs no escapes).
    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// A connection to it.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory that it has in use, in KiB, and the most it ever had.
    pub fn memory_kib(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (of("VmRSS:"), of("VmHWM:"))
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Stops it with SIGTERM and expects that it ends well.
    #[track_caller]
    pub fn stop(mut self) -> Ended {
        self.signal(Signal::SIGTERM);
        let ended = self.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        ended
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(3));
        };
        let stderr = self.stderr.take().map(|thread| thread.join().unwrap());
        Ended { code: status.code(), stderr: stderr.unwrap_or_default() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path for a socket that no other server of this process has; short, as sockets need it.
pub fn fresh_socket(dir: &Dir) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    dir.file(&format!("{}.sock", NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// The Python that Debian's packages install modules for.
const PYTHON: &str = "/usr/bin/python3";

/// Python's libnbd.
///
/// # Errors
/// It is not there.
pub fn libnbd() -> Need {
    let there =
        Path::new(PYTHON).exists() && Cmd::new(PYTHON).arg("-c").arg("import nbd").run().code == Some(0);
    if there { Ok(()) } else { Err("no libnbd for Python on this machine".to_owned()) }
}

/// Runs a Python script, with arguments; an assertion that fails there fails the test.
#[track_caller]
pub fn python(dir: &Dir, script: &str, arguments: &[&str]) -> Ran {
    let mut cmd = Cmd::new(PYTHON).arg("-c").arg(script).dir(dir.path());
    for argument in arguments {
        cmd = cmd.arg(*argument);
    }
    let ran = cmd.run();
    assert!(ran.code == Some(0), "the script failed: {}\n{}", ran.stderr, ran.stdout);
    ran
}

/// vimg under the name qemu-nbd.
pub fn vimg_as_qemu_nbd(dir: &Dir) -> Cmd {
    let link = dir.file("qemu-nbd");
    if !link.exists() {
        std::os::unix::fs::symlink(command::vimg_path(), &link).unwrap();
    }
    Cmd::new(link).dir(dir.path())
}
