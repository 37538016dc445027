//! The devices of partitions: `/dev/nbd0p1`.
//!
//! With `max_part` above 0 the kernel reads the partition table itself; nbd is loaded without (0) on many systems. Then
//! what the caller has found in the table is told to the kernel, partition by partition.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::errno::Errno;

use super::sys::{self, PartitionOp};
use super::{Device, PATIENCE, PartitionDevice, status};

/// A partition that should have a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its number, from 1.
    pub number: u32,
    /// Its first byte, a multiple of 512.
    pub offset: u64,
    /// Its size in bytes, a multiple of 512.
    pub len: u64,
}

/// Lets the kernel look for partitions on `device`, adds those of `wanted` that it has not found, and waits for their
/// nodes. Gives all that there are now.
///
/// # Errors
/// The kernel refuses one (it lies outside the disk, or overlaps another), or a node does not appear.
pub fn show_partitions(device: Device, wanted: &[Wanted]) -> Result<Vec<PartitionDevice>> {
    let disk = File::open(device.path()).context(|| device.to_string())?;
    reread(&disk).context(|| format!("looking for partitions on {device}"))?;
    let found = partitions(device);
    for partition in wanted.iter().filter(|wanted| !found.iter().any(|found| found.number == wanted.number)) {
        let Wanted { number, offset, len } = *partition;
        let added = sys::partition(&disk, PartitionOp::Add, number, offset, len);
        added.context(|| format!("adding partition {number} ({len} bytes at {offset:#x}) to {device}"))?;
    }
    drop(disk);
    let all = partitions(device);
    for partition in &all {
        wait_for_node(&Path::new("/dev").join(&partition.name))?;
    }
    Ok(all)
}

fn partitions(device: Device) -> Vec<PartitionDevice> {
    status(device).map(|status| status.partitions).unwrap_or_default()
}

/// The kernel cannot while somebody (udev, say) has a partition open.
fn reread(disk: &File) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match sys::reread_partitions(disk) {
            Err(Errno::EBUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            // A kernel (or a module) that knows no partitions of this disk itself.
            Ok(()) | Err(Errno::EINVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_for_node(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if Instant::now() > deadline {
            let what = format!("{} does not appear", path.display());
            return Err(Error::new(ErrorKind::NotFound, what)
                .hint("/dev must be a devtmpfs, or udev must run; in a container, neither may be the case"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Takes the devices of partitions away, which the kernel does not do when it disconnects.
pub(super) fn remove(disk: &File, device: Device, partitions: &[PartitionDevice]) -> Result<()> {
    // Logical partitions before the one that they lie in.
    for partition in partitions.iter().rev() {
        match sys::partition(disk, PartitionOp::Remove, partition.number, 0, 0) {
            Ok(()) | Err(Errno::ENXIO) => {}
            Err(error) => {
                let what = || format!("removing partition {} of {device}", partition.number);
                return Err(error).context(what);
            }
        }
    }
    Ok(())
}
