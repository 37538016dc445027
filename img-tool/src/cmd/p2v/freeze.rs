//! Holding the machine's file systems still, and letting go of them whatever happens to us.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use block::freeze::{Frozen, thaw};
use block::{Error, Result, ResultExt as _};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::exit::{Exit, Outcome};

/// Frozen file systems. They are thawed when this is dropped; if this process is killed, by its guard.
#[derive(Debug)]
pub(super) struct Still {
    // Dropped before the guard is let go.
    frozen: Vec<Frozen>,
    guard: Option<Child>,
}

impl Still {
    /// Freezes what is mounted at these places. `ours` are folders that we write to.
    ///
    /// # Errors
    /// One of them cannot be frozen, or holds one of `ours`, which would have us wait for ourselves.
    pub(super) fn hold(paths: &[PathBuf], ours: &[PathBuf]) -> Result<Self> {
        for path in paths {
            let number = device(path)?;
            if let Some(folder) = ours.iter().find(|folder| device(folder).is_ok_and(|own| own == number)) {
                let message =
                    format!("'{}' cannot be frozen: '{}' is on it", path.display(), folder.display());
                return Err(Error::usage(message)
                    .hint("Write to another file system, or over the network (--to, --state)."));
            }
        }
        let mut still = Self { frozen: vec![], guard: None };
        if paths.is_empty() {
            return Ok(still);
        }
        // Before anything is frozen: what is not in memory yet may lie there.
        still.guard = Some(start_guard(paths)?);
        for path in paths {
            still.frozen.push(Frozen::new(path)?);
        }
        Ok(still)
    }

    /// Where they are mounted.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.frozen.iter().map(|frozen| frozen.path().to_owned()).collect()
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.frozen.clear();
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            // It ends when its input does.
            let _ = guard.wait();
        }
    }
}

fn device(path: &Path) -> Result<u64> {
    let metadata =
        std::fs::metadata(path).map_err(Error::from).context(|| format!("'{}'", path.display()))?;
    Ok(metadata.dev())
}

/// Starts a process that thaws them when we are gone.
fn start_guard(paths: &[PathBuf]) -> Result<Child> {
    let program = std::env::current_exe()?;
    let child = Command::new(program)
        .args(["p2v", "--thaw-at-end-of-input"])
        .args(paths)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    child.map_err(Error::from).context(|| "could not start the guard that thaws".to_owned())
}

/// What that process does.
pub(super) fn guard(paths: &[PathBuf]) -> Outcome {
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        // Whoever ends us by Ctrl-C ends our parent too, and then we are needed.
        signal_hook::flag::register(signal, Arc::clone(&ignored)).map_err(Error::from)?;
    }
    let mut rest = vec![];
    // An error is an end, too.
    let _ = std::io::stdin().read_to_end(&mut rest);
    for path in paths {
        // It is thawed already, in the good case.
        let _ = thaw(path);
    }
    Ok(Exit::OK)
}
