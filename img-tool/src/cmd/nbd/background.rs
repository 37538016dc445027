//! Processes in the background: this program, started again with the same words and a role.
//!
//! (A fork without an exec, in a program with threads, is nothing that safe code can do.) What a process in the
//! background has to say before it is ready goes where the user sees it; its first line of output says that it is. From
//! then on it is on its own: a session without a terminal, and a log.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, ResultExt as _};
use nbd_server::kernel::{self, Device};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::record;
use crate::app::App;
use crate::exit::{Exit, Failure, Outcome};

/// What tells a process its role.
const VARIABLE: &str = "VIMG_NBD_ROLE";
/// How a server ends when its connections have died and the device waits for new ones.
pub(super) const SUCCESSOR_WANTED: Exit = Exit(75);
/// Servers that die at once are not started for ever.
const SHORT_LIFE: Duration = Duration::from_secs(2);
/// How many of them are too many.
const SHORT_LIVES: u32 = 5;

/// Which process this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The one that the user has started.
    User,
    /// The one that starts servers as long as one is wanted.
    Keeper,
    /// The one that has the image open.
    Server,
    /// The same, for a device that has lost its server.
    Successor(Device),
}

impl Role {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some(("successor", device)) => Device::parse(device).map_or(Self::User, Self::Successor),
            None if text == "keeper" => Self::Keeper,
            None if text == "server" => Self::Server,
            _ => Self::User,
        }
    }

    fn name(self) -> String {
        match self {
            Self::User => String::new(),
            Self::Keeper => "keeper".to_owned(),
            Self::Server => "server".to_owned(),
            Self::Successor(device) => format!("successor:{device}"),
        }
    }
}

/// Calls the process by the program's name: started by way of `/proc/self/exe`, it would be shown as `exe`.
pub(super) fn be_called_so(app: &App) {
    if let Ok(name) = std::ffi::CString::new(app.program) {
        // A matter of looks.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

/// The role of this process.
pub(super) fn role() -> Role {
    std::env::var(VARIABLE).map_or(Role::User, |text| Role::parse(&text))
}

/// A process that has been started.
#[derive(Debug)]
pub(super) struct Started(Child);

/// Starts this program again with the words of this process.
pub(super) fn start(role: Role) -> Outcome<Started> {
    let mut words = std::env::args_os();
    // This very file, even if another one has its name by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0(words.next().unwrap_or_default()).args(words).env(VARIABLE, role.name());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.spawn().context(|| "cannot start a process in the background".to_owned())?;
    Ok(Started(child))
}

impl Started {
    /// The device that it serves, once it is there. If it ends before, it has said why.
    pub(super) fn wait_until_ready(&mut self) -> Outcome<Device> {
        let mut line = String::new();
        if let Some(output) = self.0.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(Error::from)?;
        }
        if let Ok(device) = Device::parse(line.trim_end()) {
            return Ok(device);
        }
        match self.wait()? {
            Exit::OK => Err(Error::new(ErrorKind::Io, "the server has ended without a word").into()),
            exit => Err(Failure::Silent(exit)),
        }
    }

    /// Its exit status, once it has ended; as shells have it if a signal has killed it.
    fn wait(&mut self) -> Outcome<Exit> {
        let status = self.0.wait().context(|| "waiting for the server".to_owned())?;
        let code = status.code().or_else(|| Some(128 + status.signal()?));
        Ok(code.and_then(|code| code.try_into().ok()).map_or(Exit::ERROR, Exit))
    }

    fn pid(&self) -> Option<Pid> {
        self.0.id().try_into().ok().map(Pid::from_raw)
    }
}

/// Says that this process is ready, and lets go of everything that belongs to whoever has started it.
pub(super) fn ready(device: Device, app: &App) -> Outcome<()> {
    if role() == Role::User {
        return app.print(&format!("{device}\n"));
    }
    let null = OpenOptions::new().write(true).open("/dev/null").map_err(Error::from)?;
    let log = OpenOptions::new().create(true).append(true).open(record::log_path(device));
    nix::unistd::dup2_stderr(log.as_ref().unwrap_or(&null)).map_err(Error::from)?;
    // It may be a group leader already, when somebody has started it by hand.
    let _ = nix::unistd::setsid();
    // Nobody may be left to read it.
    app.note(&format!("{device}\n"));
    nix::unistd::dup2_stdout(&null).map_err(Error::from)?;
    // Whatever directory this was started in can be unmounted again, unless successors need it for relative names.
    if role() == Role::Server {
        std::env::set_current_dir("/").map_err(Error::from)?;
    }
    Ok(())
}

/// Starts a server, and another one whenever it has died without the device having been disconnected.
pub(super) fn keep(app: &App) -> Outcome {
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signal_hook::flag::register(signal as i32, Arc::clone(&stopped)).map_err(Error::from)?;
    }
    let mut server = start(Role::Server)?;
    let device = server.wait_until_ready()?;
    ready(device, app)?;
    let mut short_lives = 0;
    loop {
        let begun = Instant::now();
        let exit = forward_until_ended(&mut server, &stopped)?;
        if exit == Exit::OK || !is_connected(device) {
            return Ok(exit);
        }
        short_lives = if begun.elapsed() < SHORT_LIFE { short_lives + 1 } else { 0 };
        if short_lives > SHORT_LIVES {
            app.complain(&format!("the server of {device} keeps dying; giving up"));
            return Ok(exit);
        }
        app.complain(&format!(
            "the server of {device} has ended with status {}; starting another one",
            exit.0
        ));
        if short_lives > 0 {
            std::thread::sleep(SHORT_LIFE / 2);
        }
        server = start(Role::Successor(device))?;
        if server.wait_until_ready().is_err() {
            // It is seen to have ended at once, and counts.
            app.complain(&format!("{device} has no server"));
        }
    }
}

fn is_connected(device: Device) -> bool {
    kernel::status(device).is_some_and(|status| status.connected())
}

/// Waits for the end of the server; signals that are meant to end it are passed on.
fn forward_until_ended(server: &mut Started, stopped: &AtomicBool) -> Outcome<Exit> {
    loop {
        if stopped.swap(false, Ordering::Relaxed)
            && let Some(pid) = server.pid()
        {
            // If it is gone, that will be seen next.
            let _ = kill(pid, Signal::SIGTERM);
        }
        match server.0.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(50)),
            _ => return server.wait(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_survive_the_way_through_the_environment() {
        for role in [Role::Keeper, Role::Server, Role::Successor(Device::new(7).unwrap())] {
            assert_eq!(Role::parse(&role.name()), role);
        }
        for text in ["", "x", "server:nbd0", "successor", "successor:sda"] {
            assert_eq!(Role::parse(text), Role::User);
        }
    }
}
