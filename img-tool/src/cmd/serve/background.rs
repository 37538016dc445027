//! `--fork`: the server in the background, as a process of its own that is started with the same words.
//!
//! (A fork without an exec, in a program with threads, is nothing that safe code can do.) Until it is ready, what the
//! server has to say goes where the user sees it; its first line of output says that it is ready.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use block::{Error, ErrorKind, ResultExt as _};

use crate::app::App;
use crate::exit::{Exit, Failure, Outcome};

/// Tells a process that it is the one in the background.
const VARIABLE: &str = "VIMG_SERVE_BACKGROUND";
/// The last line of what a server says when it is ready.
const READY: &str = "ready";

/// Whether this is the process in the background.
pub(super) fn is_background() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Starts the server and waits until it is ready. What it says goes on to the user.
pub(super) fn start(app: &App) -> Outcome {
    let what = || "cannot start the server in the background".to_owned();
    let arguments: Vec<_> = std::env::args_os().collect();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.first() {
        use std::os::unix::process::CommandExt as _;
        command.arg0(name);
    }
    command.args(arguments.iter().skip(1)).env(VARIABLE, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    // Sockets that systemd has passed to this process are for that one.
    if std::env::var("LISTEN_PID").is_ok_and(|pid| pid.parse() == Ok(std::process::id())) {
        command.env_remove("LISTEN_PID");
    }
    let mut child = command.spawn().map_err(Error::from).context(what)?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.map_err(Error::from).context(what)?;
            if line == READY {
                return Ok(Exit::OK);
            }
            app.print(&format!("{line}\n"))?;
        }
    }
    let status = child.wait().map_err(Error::from).context(what)?;
    match status.code().or_else(|| Some(128 + status.signal()?)).and_then(|code| code.try_into().ok()) {
        Some(0) | None => Err(Error::new(ErrorKind::Io, "the server has ended without a word").into()),
        Some(code) => Err(Failure::Silent(Exit(code))),
    }
}

/// Says that the server is ready, and lets go of everything that belongs to whoever has started it.
pub(super) fn detach(app: &App) -> Outcome<()> {
    app.print(&format!("{READY}\n"))?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(Error::from)?;
    nix::unistd::dup2_stdout(&null).map_err(Error::from)?;
    nix::unistd::dup2_stderr(&null).map_err(Error::from)?;
    // It may be the leader of a group already.
    let _ = nix::unistd::setsid();
    // Whatever directory this was started in can be unmounted again.
    std::env::set_current_dir("/").map_err(Error::from)?;
    Ok(())
}
