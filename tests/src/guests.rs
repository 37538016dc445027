//! Guests that boot: `scripts/guest-image.sh` makes them once, in half a minute, and keeps them in the target folder.

use std::path::{Path, PathBuf};

use crate::command::Cmd;
use crate::skip::{Need, tool};

/// The folder of the guests, if they could be made.
///
/// # Errors
/// Something is missing: root, a Debian mirror, a tool.
pub fn guests() -> Result<PathBuf, String> {
    let folder = folder();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest-image.sh");
    let made = Cmd::new("bash").arg(script).arg(&folder).timeout(900).run();
    if made.code == Some(0) { Ok(folder) } else { Err(format!("no guests: {}", made.stderr.trim())) }
}

/// The folder of the guests with boot loaders, which `scripts/loader-image.sh` makes of the others in some seconds.
///
/// # Errors
/// Something is missing: as [`guests`], and loop devices or loaders.
pub fn loaders() -> Result<PathBuf, String> {
    let (guests, folder) = (guests()?, folder().join("loaders"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/loader-image.sh");
    let made = Cmd::new("bash").arg(script).arg(&guests).arg(&folder).timeout(900).run();
    if made.code == Some(0) {
        Ok(folder)
    } else {
        Err(format!("no guests with loaders: {}", made.stderr.trim()))
    }
}

/// The firmwares of Debian's packages.
///
/// # Errors
/// One of them is not there.
pub fn firmwares() -> Need {
    for (file, package) in [
        ("/usr/share/seabios/bios-256k.bin", "seabios"),
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"),
        ("/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"),
    ] {
        if !Path::new(file).exists() {
            return Err(format!("no {file} on this machine (Debian: {package})"));
        }
    }
    Ok(())
}

/// `VIMG_GUESTS`, or beside the programs that cargo has built.
fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("VIMG_GUESTS") {
        return folder.into();
    }
    let me = std::env::current_exe().unwrap();
    me.ancestors().nth(3).expect("target/PROFILE/deps/suite-*").join("guests")
}

/// The folder of guests as other hypervisors leave them (`scripts/v2v-guests.sh`), if they could be made.
///
/// # Errors
/// As [`guests`].
pub fn foreign_guests() -> Result<PathBuf, String> {
    let folder = folder().with_file_name("v2v-guests");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/v2v-guests.sh");
    let made = Cmd::new("bash").arg(script).arg(&folder).timeout(1200).run();
    if made.code == Some(0) { Ok(folder) } else { Err(format!("no guests: {}", made.stderr.trim())) }
}

/// A qemu that can run them.
///
/// # Errors
/// There is none.
pub fn qemu_system() -> Need {
    tool("qemu-system-x86_64")
}

/// A kernel that can write NTFS and the folder of its modules, which `scripts/ntfs3-kernel.sh` fetches once.
///
/// # Errors
/// Something is missing: apt, or a source that has such a kernel.
pub fn ntfs3_kernel() -> Result<(PathBuf, PathBuf), String> {
    let folder = folder().with_file_name("ntfs3-kernel");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/ntfs3-kernel.sh");
    let made = Cmd::new("bash").arg(script).arg(&folder).timeout(600).run();
    match made.code {
        Some(0) => Ok((folder.join("vmlinuz"), folder.join("modules"))),
        _ => Err(format!("no kernel with ntfs3: {}", made.stderr.trim())),
    }
}
