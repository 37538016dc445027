//! Running the tools: vimg, qemu-img, qemu-io and whatever else a test needs.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Held while this process has images open, and by whoever starts another one.
static OPEN_HERE: RwLock<()> = RwLock::new(());

/// To be held while the test itself has an image open that other programs are to open afterwards: a process that is
/// started meanwhile by another test has the image's locks until it becomes the other program, and so longer than
/// the image is open. Nothing can be started while it is held.
pub fn open_here() -> RwLockReadGuard<'static, ()> {
    OPEN_HERE.read().unwrap_or_else(PoisonError::into_inner)
}

/// A command that is about to be run.
#[derive(Debug, Clone)]
#[must_use]
pub struct Cmd {
    program: PathBuf,
    args: Vec<OsString>,
    dir: Option<PathBuf>,
    envs: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
    timeout: Duration,
    limits: Vec<String>,
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The command line, for messages.
    pub shown: String,
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
    /// Wall-clock time.
    pub elapsed: Duration,
    /// It was killed because it took longer than allowed.
    pub timed_out: bool,
}

impl Cmd {
    /// `program` (a path, or a name in the search path) without arguments.
    pub fn new(program: impl AsRef<Path>) -> Self {
        let program = program.as_ref();
        let found = if program.components().count() == 1 { find(&program.to_string_lossy()) } else { None };
        Self {
            program: found.unwrap_or_else(|| program.to_owned()),
            args: vec![],
            dir: None,
            envs: vec![("LC_ALL".into(), "C".into()), ("TZ".into(), "UTC".into())],
            stdin: vec![],
            timeout: Duration::from_secs(120),
            limits: vec![],
        }
    }

    /// Adds the words of `text`, separated by white space.
    pub fn words(mut self, text: &str) -> Self {
        self.args.extend(text.split_whitespace().map(OsString::from));
        self
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Runs in `dir`.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.into(), value.into()));
        self
    }

    /// Gives it `bytes` on standard input (nothing otherwise).
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Kills it after `seconds`.
    pub fn timeout(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// Limits its address space, in MiB.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.limits.push(format!("--as={}", mib << 20));
        self
    }

    /// Adds a limit in the words of prlimit(1).
    pub fn limit(mut self, limit: &str) -> Self {
        self.limits.push(limit.to_owned());
        self
    }

    /// Starts it and leaves it running, all three streams piped.
    pub fn spawn(&self) -> Child {
        let (program, args) = self.with_limits();
        let mut command = Command::new(&program);
        command.args(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command.env_remove("VIMG_LOG").envs(self.envs.iter().map(|(n, v)| (n, v)));
        let _nobody_has_images_open = OPEN_HERE.write().unwrap_or_else(PoisonError::into_inner);
        command.spawn().unwrap_or_else(|error| panic!("cannot run {}: {error}", program.display()))
    }

    /// Runs it to its end.
    pub fn run(&self) -> Ran {
        let started = Instant::now();
        let mut child = self.spawn();
        let mut input = child.stdin.take().unwrap();
        let bytes = self.stdin.clone();
        // The reader may not want its input: not our problem.
        let feeder = std::thread::spawn(move || {
            let _ = input.write_all(&bytes);
        });
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        let (status, timed_out) = wait(&mut child, started + self.timeout);
        feeder.join().unwrap();
        Ran {
            shown: self.to_string(),
            code: status.code(),
            signal: status.signal(),
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
            elapsed: started.elapsed(),
            timed_out,
        }
    }

    /// Runs it and expects success.
    pub fn ok(&self) -> Ran {
        self.run().expect_code(0)
    }

    /// prlimit(1) sets the limits, because between fork and exec only unsafe code could.
    fn with_limits(&self) -> (PathBuf, Vec<OsString>) {
        if self.limits.is_empty() {
            return (self.program.clone(), self.args.clone());
        }
        let mut args: Vec<OsString> = self.limits.iter().map(OsString::from).collect();
        args.push(self.program.clone().into());
        args.extend(self.args.iter().cloned());
        (find("prlimit").expect("prlimit is part of util-linux"), args)
    }
}

impl std::fmt::Display for Cmd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.program.file_name().unwrap_or_default().display())?;
        for arg in &self.args {
            let arg = arg.to_string_lossy();
            let quoted =
                arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "'\"{}*$;".contains(c));
            if quoted { write!(f, " '{arg}'")? } else { write!(f, " {arg}")? }
        }
        Ok(())
    }
}

fn drain(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = vec![];
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child, deadline: Instant) -> (std::process::ExitStatus, bool) {
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return (status, false);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return (child.wait().unwrap(), true);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

impl Ran {
    /// Everything it did, for the message of a failing test.
    pub fn story(&self) -> String {
        let mut text = format!("$ {}\n", self.shown);
        let _ = match (self.code, self.signal, self.timed_out) {
            (_, _, true) => writeln!(text, "killed after {:?}", self.elapsed),
            (Some(code), ..) => writeln!(text, "exit code {code}"),
            (_, Some(signal), _) => writeln!(text, "killed by signal {signal}"),
            _ => Ok(()),
        };
        for (name, stream) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !stream.is_empty() {
                let _ = writeln!(text, "{name}:\n{}", stream.trim_end());
            }
        }
        text
    }

    /// Expects this exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == Some(code), "expected exit code {code}\n{}", self.story());
        self
    }

    /// Expects `text` somewhere in standard error.
    #[track_caller]
    pub fn expect_stderr(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "expected on stderr: {text}\n{}", self.story());
        self
    }

    /// Expects `text` somewhere in standard output.
    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "expected on stdout: {text}\n{}", self.story());
        self
    }

    /// Expects a proper failure: an exit code other than 0, a message, no panic, no signal, no time-out.
    #[track_caller]
    pub fn expect_clean_failure(self) -> Self {
        assert!(matches!(self.code, Some(1..=4)), "expected a failure\n{}", self.story());
        assert!(!self.stderr.trim().is_empty(), "a failure has to say why\n{}", self.story());
        self.expect_no_panic()
    }

    /// Expects that it neither panicked nor was killed, whatever else it did.
    #[track_caller]
    pub fn expect_no_panic(self) -> Self {
        let panicked = self.stderr.contains("panicked at") || self.code == Some(101);
        assert!(
            !panicked && self.signal.is_none() && !self.timed_out,
            "a bug, not an answer\n{}",
            self.story()
        );
        self
    }

    /// Its standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON: {error}\n{}", self.story()))
    }
}

/// Where a program of this name lies, in the search path or the administrator's folders.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// The major version of qemu-img; 0 without one.
pub fn qemu_major() -> u32 {
    static VERSION: OnceLock<u32> = OnceLock::new();
    *VERSION.get_or_init(|| {
        if find("qemu-img").is_none() {
            return 0;
        }
        let said = Cmd::new("qemu-img").arg("--version").run().stdout;
        let number = said.split_whitespace().find_map(|word| word.split('.').next()?.parse().ok());
        number.unwrap_or(0)
    })
}

/// The vimg to test: what `VIMG` names, else the one that belongs to this build, built now if need be.
pub fn vimg_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("VIMG") {
        Some(path) => std::fs::canonicalize(&path)
            .unwrap_or_else(|error| panic!("VIMG={}: {error}", path.to_string_lossy())),
        None => build_vimg(),
    })
}

/// Tests of one package cannot ask cargo for the binary of another, so we ask it to build it. The
/// folder of this very test binary, `target/PROFILE/deps`, says where and how.
fn build_vimg() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let profile_dir = me.parent().and_then(Path::parent).expect("target/PROFILE/deps/suite-*").to_owned();
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev".to_owned(),
        Some(name) => name.to_owned(),
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "-p", "img-tool", "--profile", &profile, "--target-dir"])
        .arg(profile_dir.parent().unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo has to run to build vimg (or set VIMG)");
    assert!(status.success(), "vimg does not build");
    profile_dir.join("vimg")
}

/// vimg.
pub fn vimg() -> Cmd {
    Cmd::new(vimg_path())
}

/// vimg under the name qemu-img, as on a machine where it has taken its place: its messages then carry
/// that name, so that they can be compared with the real one's letter by letter.
pub fn vimg_as_qemu_img() -> Cmd {
    static LINK: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, link) = LINK.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("qemu-img");
        std::os::unix::fs::symlink(vimg_path(), &link).unwrap();
        (dir, link)
    });
    Cmd::new(link)
}

/// The real qemu-img.
pub fn qemu_img() -> Cmd {
    Cmd::new("qemu-img")
}

/// The real qemu-io.
pub fn qemu_io() -> Cmd {
    Cmd::new("qemu-io")
}
