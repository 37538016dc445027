//! Skipping loudly. A test that silently does nothing on a machine without qemu would be worse than none.

use std::fs::OpenOptions;
use std::io::Write as _;

use crate::command;

/// What a test needs from the machine: `Err` says what is missing.
pub type Need = Result<(), String>;

/// Returns from the test, with a note, unless every need is met.
#[macro_export]
macro_rules! requires {
    ($($need:expr),+ $(,)?) => {
        $(if let Err(reason) = $need {
            $crate::skip::note(&reason);
            return;
        })+
    };
}

/// What a test cannot do without, of a `Result<T, String>`; ends the test with a note if it is not there.
#[macro_export]
macro_rules! or_skip {
    ($need:expr) => {
        match $need {
            Ok(found) => found,
            Err(reason) => {
                $crate::skip::note(&reason);
                return;
            }
        }
    };
}

/// Notes that (a part of) the current test is skipped: on stderr, which cargo shows for failing tests
/// only, and in the file that `VIMG_SKIP_LOG` names, which `make test` prints.
#[expect(clippy::print_stderr, reason = "the note is for whoever runs the tests")]
pub fn note(reason: &str) {
    let test = test_name();
    eprintln!("SKIPPED {test}: {reason}");
    let Some(path) = std::env::var_os("VIMG_SKIP_LOG") else { return };
    if let Ok(mut log) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = log.write_all(format!("{test}\t{reason}\n").as_bytes());
    }
}

fn test_name() -> String {
    std::env::var("NEXTEST_TEST_NAME")
        .ok()
        .or_else(|| std::thread::current().name().map(str::to_owned))
        .unwrap_or_else(|| "a test".to_owned())
}

/// A program in the search path.
///
/// # Errors
/// It is not there.
pub fn tool(name: &str) -> Need {
    command::find(name).map(|_| ()).ok_or_else(|| format!("no {name} on this machine"))
}

/// The qemu tools, of any version.
///
/// # Errors
/// One of them is not there.
pub fn qemu() -> Need {
    tool("qemu-img")?;
    tool("qemu-io")
}

/// The qemu tools of the version whose words vimg speaks: 10 or newer.
///
/// # Errors
/// They are missing or older.
pub fn qemu10() -> Need {
    qemu()?;
    match command::qemu_major() {
        10.. => Ok(()),
        old => Err(format!("qemu-img {old} words things differently; this test compares with version 10")),
    }
}

/// The superuser.
///
/// # Errors
/// Somebody else runs the tests.
pub fn root() -> Need {
    if nix::unistd::Uid::effective().is_root() { Ok(()) } else { Err("needs root".to_owned()) }
}

/// Somebody else than the superuser, to whom permissions apply.
///
/// # Errors
/// The superuser runs the tests.
pub fn not_root() -> Need {
    if nix::unistd::Uid::effective().is_root() {
        Err("permissions do not apply to root".to_owned())
    } else {
        Ok(())
    }
}
