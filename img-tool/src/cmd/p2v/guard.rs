//! A process that cleans up when we are killed: a file system that stays frozen, or a snapshot that fills up, is no way to leave
//! a machine.
//!
//! It is told what there is through its standard input, which ends when we do, whatever ends us: `t` and a path to thaw, `l` and
//! LVM's program, `r` and a snapshot to remove, `q` when nothing is left to do; each with a NUL behind it.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use block::freeze::thaw;
use block::{Error, Result, ResultExt as _};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use v2v::p2v::lvm;

use super::snapshots::Program;
use crate::exit::{Exit, Outcome};

/// How often a snapshot is tried to be removed: what we had in flight may keep it in use for a moment.
const ATTEMPTS: u32 = 40;
/// The pause in between.
const PAUSE: Duration = Duration::from_millis(500);

/// The guard, as seen from the process that it guards. It ends when this is dropped, after cleaning up.
#[derive(Debug)]
pub(super) struct Guard(Child);

impl Guard {
    /// Starts it.
    ///
    /// # Errors
    /// The system gives no process.
    pub(super) fn start() -> Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args(["p2v", "--guard"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        child.map(Self).map_err(Error::from).context(|| "could not start the guard that cleans up".to_owned())
    }

    /// Something to do in the end. To be told before there is a need.
    ///
    /// # Errors
    /// The guard is gone: nothing should be begun.
    fn tell(&mut self, what: u8, text: &OsStr) -> Result<()> {
        let line = [&[what], text.as_bytes(), &[0]].concat();
        let Some(pipe) = &mut self.0.stdin else { return Ok(()) };
        pipe.write_all(&line).map_err(Error::from).context(|| "the guard that cleans up is gone".to_owned())
    }

    /// Thaw what is mounted there.
    pub(super) fn thaw(&mut self, path: &Path) -> Result<()> {
        self.tell(b't', path.as_os_str())
    }

    /// Remove this snapshot by this program.
    pub(super) fn remove(&mut self, program: &OsStr, snapshot: &str) -> Result<()> {
        self.tell(b'l', program)?;
        self.tell(b'r', OsStr::new(snapshot))
    }

    /// Nothing is left to do.
    pub(super) fn dismiss(mut self) {
        let _ = self.tell(b'q', OsStr::new(""));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It ends when its input does.
        let _ = self.0.wait();
    }
}

/// What that process does.
pub(super) fn guard() -> Outcome {
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        // Whoever ends us by Ctrl-C ends our parent too, and then we are needed.
        signal_hook::flag::register(signal, Arc::clone(&ignored)).map_err(Error::from)?;
    }
    let mut told = vec![];
    // An error is an end, too.
    let _ = std::io::stdin().read_to_end(&mut told);
    let orders: Vec<(u8, &[u8])> = told
        .split(|byte| *byte == 0)
        .filter_map(|order| order.split_first())
        .map(|(what, rest)| (*what, rest))
        .collect();
    if orders.iter().any(|(what, _)| *what == b'q') {
        return Ok(Exit::OK);
    }
    for (_, path) in orders.iter().filter(|(what, _)| *what == b't') {
        // It is thawed already, in the good case.
        let _ = thaw(Path::new(OsStr::from_bytes(path)));
    }
    let mut program = Program::default();
    for (what, text) in orders {
        match what {
            b'l' => program = Program(OsString::from_vec(text.to_vec())),
            b'r' => remove(&program, &String::from_utf8_lossy(text)),
            _ => {}
        }
    }
    Ok(Exit::OK)
}

fn remove(program: &Program, snapshot: &str) {
    for _ in 0..ATTEMPTS {
        if lvm::remove(program, snapshot).is_ok() || !exists(program, snapshot) {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether there is such a snapshot; one that cannot be asked for may be there.
fn exists(program: &Program, snapshot: &str) -> bool {
    lvm::volumes(program)
        .map_or(true, |all| all.iter().any(|volume| format!("{}/{}", volume.group, volume.name) == snapshot))
}
