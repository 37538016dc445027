//! The test boot: `vimg bootcheck` as a process of its own, which gives up its privileges before it looks at a disk.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::{Error, ErrorKind, Result, ResultExt as _};
use crypt::Secret;
use v2v::guest::FirmwareKind;
use v2v::report::BootTest;

/// What is to be booted, and how.
#[derive(Debug)]
pub(super) struct Test<'a> {
    /// The disks with their formats, the boot disk first.
    pub(super) disks: Vec<(PathBuf, &'a str)>,
    /// Through a firmware and the disk's own boot loader; `None`: its kernel directly.
    pub(super) firmware: Option<FirmwareKind>,
    /// Memory in bytes.
    pub(super) memory_bytes: u64,
    /// `auto`, `kvm`, `qemu`.
    pub(super) engine: &'a str,
    /// Seconds; `None`: bootcheck's own limit.
    pub(super) timeout: Option<u32>,
    /// The whole console goes here.
    pub(super) console: &'a Path,
    /// What is typed where the guest asks for a passphrase.
    pub(super) passphrases: Vec<Secret>,
}

/// How often the child is asked whether it has ended.
const ASK: Duration = Duration::from_millis(50);
/// The verdict of a check that could not be made.
const NOT_CHECKED: &str = "not-checked";
/// More memory than this is not needed to see a guest boot, less is not enough.
const MEMORY: std::ops::RangeInclusive<u64> = 512 << 20..=2 << 30;

impl Test<'_> {
    fn command(&self) -> Result<Command> {
        let me = std::env::current_exe().context(|| "could not find this program itself".to_owned())?;
        let memory = self.memory_bytes.clamp(*MEMORY.start(), *MEMORY.end()) >> 20;
        let mut command = Command::new(me);
        command.args(["bootcheck", "--output", "json", "--engine", self.engine]);
        command.arg("--ends-with").arg(std::process::id().to_string());
        command.arg("--memory").arg(format!("{memory}M")).arg("--console").arg(self.console);
        if let Some(firmware) = self.firmware {
            command.args(["--firmware", firmware.name()]);
        }
        if let Some(seconds) = self.timeout {
            command.arg("--timeout").arg(seconds.to_string());
        }
        for (index, (path, format)) in self.disks.iter().enumerate() {
            if index == 0 {
                command.arg("--format").arg(format);
            } else {
                command.arg("--disk");
            }
            command.arg(path);
        }
        // Through a pipe, where nobody sees it.
        let stdin = if self.passphrases.is_empty() { Stdio::null() } else { Stdio::piped() };
        if !self.passphrases.is_empty() {
            command.arg("--keys-from-stdin");
        }
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Boots. A signal to this process ends the child, too.
    ///
    /// # Errors
    /// `Cancelled`; the program could not be started or did not answer in its form.
    pub(super) fn run(&self, signal: &AtomicUsize) -> Result<BootTest> {
        let mut child = self.command()?.spawn().context(|| "could not start the boot test".to_owned())?;
        if let Some(mut stdin) = child.stdin.take() {
            for passphrase in &self.passphrases {
                // Who does not read them says why.
                let _ = stdin.write_all(passphrase).and_then(|()| stdin.write_all(b"\n"));
            }
        }
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let answer = std::thread::spawn(move || read_all(stdout));
        let complaints = std::thread::spawn(move || read_all(stderr));
        loop {
            if child.try_wait()?.is_some() {
                break;
            }
            if signal.load(Ordering::Relaxed) != 0 {
                terminate(&child);
                child.wait()?;
                return Err(interrupted());
            }
            std::thread::sleep(ASK);
        }
        let answer = answer.join().unwrap_or_default();
        let complaints = complaints.join().unwrap_or_default();
        conclude(&answer, &complaints, signal.load(Ordering::Relaxed) != 0)
    }
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Cancelled, "the boot test was interrupted")
}

/// What the child has found out. The terminal's signals reach it, too: it may have ended for them before we did.
fn conclude(answer: &[u8], complaints: &[u8], signalled: bool) -> Result<BootTest> {
    let document = serde_json::from_slice(answer).ok();
    match document.as_ref().and_then(BootTest::of_document) {
        Some(tested) if !(signalled && tested.verdict == NOT_CHECKED) => Ok(tested),
        _ if signalled => Err(interrupted()),
        _ => {
            let words = String::from_utf8_lossy(complaints);
            Err(Error::new(ErrorKind::Io, format!("the boot test gave no answer: {}", words.trim())))
        }
    }
}

/// Asks a child to end in an orderly way.
pub(super) fn terminate(child: &std::process::Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
    }
}

/// Everything that comes through a pipe.
pub(super) fn read_all(pipe: Option<impl std::io::Read>) -> Vec<u8> {
    let mut bytes = vec![];
    if let Some(mut pipe) = pipe {
        // What came until it broke counts.
        drop(pipe.read_to_end(&mut bytes));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_child_is_an_interrupted_test() {
        let answer = |verdict: &str| format!("{{\"checks\": [{{\"verdict\": \"{verdict}\"}}]}}").into_bytes();
        let kind = |answer: &[u8], signalled| conclude(answer, b"", signalled).map_err(|error| error.kind());
        assert_eq!(kind(&answer(NOT_CHECKED), true).unwrap_err(), ErrorKind::Cancelled);
        assert_eq!(kind(b"", true).unwrap_err(), ErrorKind::Cancelled);
        assert_eq!(kind(b"", false).unwrap_err(), ErrorKind::Io);
        assert_eq!(kind(&answer(NOT_CHECKED), false).unwrap().verdict, NOT_CHECKED);
        // What it found out before the signal came counts.
        assert_eq!(kind(&answer("boots"), true).unwrap().verdict, "boots");
    }

    #[test]
    fn the_command_line_of_the_test() {
        let test = Test {
            disks: vec![("/a.qcow2".into(), "qcow2"), ("/b.raw".into(), "raw")],
            firmware: Some(FirmwareKind::Uefi),
            memory_bytes: 64 << 30,
            engine: "auto",
            timeout: Some(60),
            console: Path::new("/c.log"),
            passphrases: vec![],
        };
        let command = test.command().unwrap();
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(
            words.join(" "),
            format!(
                "bootcheck --output json --engine auto --ends-with {} --memory 2048M --console /c.log --firmware uefi \
                 --timeout 60 --format qcow2 /a.qcow2 --disk /b.raw",
                std::process::id()
            )
        );
    }
}
