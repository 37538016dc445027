//! Process 1 of the small Linux that changes a guest's file systems.
//!
//! ```text
//!   start     /dev, /proc, /sys; modules; disks; the serial line         what the configuration in the initramfs says
//!   serve     a bell on the line, a request in the mailbox, an answer     ../../src/wire.rs is the language
//!   mounted   a thread for each mounted file system, with that as its root: nothing a hostile link says leads out
//!   files     what is done in there
//!   run       a program of the guest, if the host asks for it
//!   guard     on the host: runs a User-Mode Linux, and ends it with its owner
//!   host      on the host: serves with its kernel, for those who want that
//! ```
//!
//! It knows nothing of guests and decides nothing. Whatever goes wrong is an answer; if it cannot even answer, it
//! says so on the console and switches the machine off.

mod files;
mod guard;
mod host;
mod mailbox;
mod mounted;
mod run;
mod serve;
mod start;
mod sys;
#[path = "../../src/wire.rs"]
#[allow(dead_code, unreachable_pub, reason = "written for the host; its half is not used here")]
mod wire;

use std::fmt;
use std::io::{Error, Write as _};

fn main() {
    let words: Vec<_> = std::env::args().skip(1).collect();
    if std::process::id() != 1 {
        std::process::exit(on_host(&words));
    }
    match start::start().and_then(serve::serve) {
        Ok(machine) => sys::drain(&machine.line),
        Err(error) => say(&format!("vimg's appliance gives up: {error}")),
    }
    say(&format!("vimg's appliance cannot even be switched off: {}", sys::power_off()));
}

/// What this program does where it is not process 1; its exit code.
fn on_host(words: &[String]) -> i32 {
    let done = match words {
        [word, rest @ ..] if word == wire::GUARD => guard::guard(rest),
        [word, rest @ ..] if word == wire::HOST => host::start(rest).and_then(serve::serve).map(|_| 0),
        _ => Err(Error::other("this is the init of vimg's appliance; it does nothing anywhere else")),
    };
    done.unwrap_or_else(|error| {
        // Nobody else could be told.
        drop(writeln!(std::io::stderr(), "{error}"));
        1
    })
}

/// Prints a line on the console.
fn say(line: &str) {
    // Nobody else could be told.
    drop(writeln!(std::io::stdout(), "{line}"));
}

/// What was being done when `error` happened; the kernel's number is kept.
fn during(what: impl fmt::Display) -> impl FnOnce(Error) -> Error {
    move |error| Error::new(error.kind(), Told { errno: errno(&error), text: format!("{what}: {error}") })
}

/// The kernel's number of an error.
fn errno(error: &Error) -> Option<i32> {
    let told = || error.get_ref()?.downcast_ref::<Told>()?.errno;
    error.raw_os_error().or_else(told)
}

/// An error with its context.
#[derive(Debug)]
struct Told {
    errno: Option<i32>,
    text: String,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Told {}
