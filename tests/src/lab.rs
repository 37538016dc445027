//! A Linux of our own: `tests/lab/kvm-lab` runs a script in a small guest that has `/dev/kvm`, `nbd`, `loop` and
//! every file system, wherever the tests run. A start takes seconds, so that a test bundles what it wants to see.

use std::path::{Path, PathBuf};

use crate::command::{Cmd, Ran};
use crate::skip::{Need, tool};

/// Where the lab is: `VIMG_LAB`, or the project's own.
fn path() -> PathBuf {
    std::env::var_os("VIMG_LAB")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/kvm-lab"), PathBuf::from)
}

/// The lab, with everything that it is made of.
///
/// # Errors
/// Something is missing.
pub fn lab() -> Need {
    for name in ["qemu-system-x86_64", "busybox", "cpio", "depmod", "setpriv", "apt-get", "dpkg-deb"] {
        tool(name).map_err(|reason| format!("{reason}, which the lab needs (scripts/deps.sh lab)"))?;
    }
    let prepared = Cmd::new(path()).words("--prepare").timeout(600).run();
    if prepared.code == Some(0) { Ok(()) } else { Err(format!("no lab: {}", prepared.stderr.trim())) }
}

/// What scripts may use: `is WANTED FOUND`, and `fails TEXT COMMAND...`, which wants the text in the complaint.
const WORDS: &str = r#"
is() { [ "$1" = "$2" ] || { echo "line ${BASH_LINENO[0]}: wanted '$1', found '$2'" >&2; exit 1; }; }
fails() {
    local wanted=$1 said; shift
    if said=$("$@" 2>&1); then echo "line ${BASH_LINENO[0]}: should have failed: $*: $said" >&2; exit 1; fi
    case $said in *"$wanted"*) ;; *) echo "line ${BASH_LINENO[0]}: $*: wanted '$wanted', found '$said'" >&2; exit 1 ;; esac
}
"#;

/// A script of bash to be run in the lab, in `dir`, which it can write to; everything else it writes is gone
/// afterwards. `$VIMG` is the program. The first command that fails ends it, and what the kernel had to say follows.
pub fn script(dir: &Path, script: &str) -> Cmd {
    let vimg = crate::command::vimg_path();
    let setup = format!("set -eu; trap '[ $? = 0 ] || dmesg | tail -15 >&2' EXIT; VIMG='{}'", vimg.display());
    Cmd::new(path())
        .words("--timeout 540 -- bash -c")
        .arg(format!("{setup}\n{WORDS}\n{script}"))
        .dir(dir)
        .timeout(600)
}

/// The same without `vimg`, which need not be built then.
pub fn script_without_vimg(dir: &Path, script: &str) -> Cmd {
    Cmd::new(path()).words("--timeout 540 -- bash -euc").arg(script).dir(dir).timeout(600)
}

/// Runs it and expects success.
#[track_caller]
pub fn run(dir: &Path, text: &str) -> Ran {
    script(dir, text).run().expect_code(0)
}

/// A kernel of Debian's, unpacked, for guests in the lab: `cloud` or `generic`.
#[track_caller]
pub fn kernel(flavour: &str) -> PathBuf {
    let said = Cmd::new(path()).words("--kernel").arg(flavour).timeout(600).run().expect_code(0);
    PathBuf::from(said.stdout.trim())
}

/// A file in the folder of an unpacked kernel whose name begins like this.
#[track_caller]
pub fn file_in(dir: &Path, prefix: &str) -> PathBuf {
    let mut found = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
    found.find(named).unwrap_or_else(|| panic!("no {prefix}* in {}", dir.display()))
}
