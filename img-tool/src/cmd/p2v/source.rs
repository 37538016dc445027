//! The disks that are copied, and what of them holds nothing.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::CacheMode;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::{Disks, Location, partition, unused};
use image::{Format, OpenOptions, Share, Spec};
use v2v::p2v::state::Identity;
use v2v::p2v::{PhysicalDisk, is_at_rest};

use crate::app::App;

/// Opens a device for reading, around the page cache, in which another name of the same bytes may have left what is no longer
/// true. The second value: that is how it is read, or nothing else has a name for its bytes.
pub(super) fn open(path: &Path, app: &App) -> Result<(Arc<dyn BlockDevice>, bool)> {
    let spec = Spec::from_filename(&path.to_string_lossy())?;
    let options = |cache| OpenOptions {
        format: Format::from_name("raw"),
        cache,
        force_share: true,
        share: Share::default(),
        policy: app.policy(),
        ..OpenOptions::default()
    };
    let (opened, direct) = match image::open(&spec, &options(CacheMode::None)) {
        Err(error) if !matches!(error.kind(), ErrorKind::Permission | ErrorKind::NotFound) => {
            (image::open(&spec, &options(CacheMode::Writeback)), false)
        }
        opened => (opened, true),
    };
    let device = opened.hint(|| "Only root can read the disks of a machine.".to_owned())?.device();
    let is_file = !std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    Ok((device, direct || is_file))
}

/// Opens a disk of the machine.
pub(super) fn open_disk(disk: &PhysicalDisk, app: &App) -> Result<(Arc<dyn BlockDevice>, bool)> {
    let (device, direct) = open(&disk.device, app)?;
    if device.size() != disk.size_bytes {
        let message =
            format!("{} has {} bytes, and is said to have {}", disk.name, device.size(), disk.size_bytes);
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok((device, direct))
}

/// By what a disk is known again.
pub(super) fn identity(disk: &PhysicalDisk, device: &dyn BlockDevice) -> Result<Identity> {
    let table = match partition::read(device) {
        Ok(table) => table.map(|table| table.uuid).unwrap_or_default(),
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(_) => String::new(),
    };
    Ok(Identity { size_bytes: disk.size_bytes, serial: disk.serial.clone().unwrap_or_default(), table })
}

/// What of each disk holds nothing, file systems that are mounted at `still` being at rest.
pub(super) fn left_out(
    disks: &Disks,
    wanted: &[&PhysicalDisk],
    still: &[PathBuf],
    app: &App,
) -> Result<Vec<Vec<Range<u64>>>> {
    let found = unused::find(disks, &|volume| is_at_rest(volume, wanted, still))?;
    for note in found.iter().flat_map(|unused| &unused.notes) {
        app.tell(note);
    }
    Ok(found.into_iter().map(|unused| unused.ranges).collect())
}

/// The most bytes that each disk holds, as far as can be told before anything is held still. `settles`: what is mounted
/// will be at rest when it is copied.
pub(super) fn estimate(disks: &Disks, wanted: &[&PhysicalDisk], settles: bool) -> Result<Vec<u64>> {
    let unused = unused::find(disks, &|volume| is_at_rest(volume, wanted, &[]))?;
    let of = |(disk, unused): (&&PhysicalDisk, &unused::Unused)| {
        let free: u64 = if settles { mounted_free(disk, wanted) } else { 0 };
        disk.size_bytes.saturating_sub(unused.bytes()).saturating_sub(free)
    };
    Ok(wanted.iter().zip(&unused).map(of).collect())
}

/// Bytes that are free in file systems that are mounted writable, on this disk alone, and whose free space is left out.
fn mounted_free(disk: &PhysicalDisk, wanted: &[&PhysicalDisk]) -> u64 {
    let mut devices: Vec<&str> = vec![];
    let mut sum = 0_u64;
    for mounted in disk.written() {
        let known = matches!(mounted.kind.as_str(), "ext2" | "ext3" | "ext4" | "xfs");
        let elsewhere = wanted.iter().any(|other| other.name != disk.name && other.mounts.contains(mounted));
        if !known || elsewhere || devices.contains(&mounted.device.as_str()) {
            continue;
        }
        devices.push(&mounted.device);
        if let Ok(stat) = nix::sys::statvfs::statvfs(&mounted.path) {
            sum = sum.saturating_add(stat.fragment_size().saturating_mul(stat.blocks_free()));
        }
    }
    sum
}

/// Where on each disk the file systems are that are mounted at `paths`: whole partitions, or the disk.
pub(super) fn places(disks: &Disks, wanted: &[&PhysicalDisk], paths: &[PathBuf]) -> Vec<Vec<Range<u64>>> {
    let of = |(index, disk): (usize, &&PhysicalDisk)| {
        let held = disk.mounts.iter().filter(|mounted| paths.contains(&mounted.path));
        let mut ranges = vec![];
        for mounted in held {
            if mounted.partitions.is_empty() {
                ranges.push(0..disk.size_bytes);
            }
            for number in &mounted.partitions {
                let location = Location::Partition { disk: index, number: *number };
                let volume = disks.volumes().iter().find(|volume| volume.location == location);
                let partition = volume.and_then(|volume| volume.partition.as_ref());
                // One that the kernel knows and the table does not: anywhere.
                ranges.push(
                    partition
                        .map_or(0..disk.size_bytes, |own| own.offset..own.offset.saturating_add(own.len)),
                );
            }
        }
        ranges
    };
    wanted.iter().enumerate().map(of).collect()
}
