//! Mounting what has been attached, by mount(8), which knows file systems and their helpers.

use std::path::Path;
use std::process::{Command, Stdio};

use block::{Error, ErrorKind, Result, ResultExt as _};
use nbd_server::kernel::{self, Device};

/// Mounts the disk on a directory.
///
/// # Errors
/// What mount says; which partitions there are, if that may be the reason.
pub(super) fn mount(device: Device, directory: &Path, read_only: bool) -> Result<()> {
    let mut command = Command::new("mount");
    command.args(read_only.then_some("--read-only")).arg(device.path()).arg(directory);
    let partitions = kernel::status(device).map(|status| status.partitions).unwrap_or_default();
    run(&mut command).map_err(|error| {
        let numbers: Vec<_> = partitions.iter().map(|found| found.number.to_string()).collect();
        match numbers.len() {
            0 => error,
            _ => error.hint(format!("the disk has partitions: --partition {}", numbers.join(" or "))),
        }
    })
}

/// Unmounts a directory, on which a device is mounted; the device.
///
/// # Errors
/// Nothing of ours is mounted there; what umount says.
pub(super) fn unmount(directory: &Path) -> Result<Device> {
    let path = directory.canonicalize().context(|| format!("'{}'", directory.display()))?;
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo").context(|| "/proc/self/mountinfo".to_owned())?;
    let place = path.to_string_lossy();
    // What was mounted last lies on top.
    let device = mounts.lines().rev().find_map(|line| mounted_on(line, &place)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("no nbd device is mounted on '{}'", directory.display()))
    })?;
    run(Command::new("umount").arg(&path))?;
    Ok(device)
}

/// The device, if this line of `/proc/self/mountinfo` says that one (or its partition) is mounted on `place`.
fn mounted_on(line: &str, place: &str) -> Option<Device> {
    // proc(5): blanks are written in octal.
    let point = line.split(' ').nth(4)?.replace("\\040", " ").replace("\\011", "\t");
    let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
    let disk = source.strip_prefix("/dev/nbd")?.split('p').next()?;
    Device::parse(&format!("nbd{disk}")).ok().filter(|_| point == place)
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let ran = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output();
    let ran = ran.context(|| program.clone())?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let said = said.lines().next().unwrap_or_default();
    let said = said.strip_prefix(&format!("{program}: ")).unwrap_or(said);
    Err(Error::new(ErrorKind::Io, said).context(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_where_is_found() {
        let line = "36 35 43:33 / /mnt/a\\040b rw - ext4 /dev/nbd1p2 rw";
        assert_eq!(mounted_on(line, "/mnt/a b"), Device::new(1));
        assert_eq!(mounted_on(line, "/mnt/a"), None);
        assert_eq!(mounted_on("36 35 8:1 / /mnt rw - ext4 /dev/sda1 rw", "/mnt"), None);
        assert_eq!(mounted_on("36 35 43:0 / /mnt rw - ext4", "/mnt"), None);
    }
}
