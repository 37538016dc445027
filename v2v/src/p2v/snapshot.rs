//! Which file systems can be copied as a snapshot shows them, and what has to be done for the others.
//!
//! ```text
//!   mounted writable, on a logical volume    a snapshot of the volume, in the free extents of its group
//!   /boot and what is mounted below, /efi    small: held still until it is copied, which is done first
//!   everything else                          refused with the reason; or held still as well, if that is asked for
//! ```
//!
//! Only questions are asked here; nothing is changed.

use std::path::{Path, PathBuf};

use block::size::human;
use block::{Error, ErrorKind, Result};
use guestdisk::Disks;

use super::Mounted;
use super::lvm::{Group, PREFIX, TAG, Volume};

/// Of a volume that is written to, so much of its size is set aside where nothing is said.
const SHARE_PERCENT: u64 = 20;
/// But no less than this, in bytes, if it is to be had.
const LEAST: u64 = 1 << 30;
/// A snapshot of less than this part of the volume is full before anything is copied.
const SMALLEST_PERCENT: u64 = 1;
/// The longest name that we make; LVM takes 127 bytes.
const MOST_NAME: usize = 100;

/// How much room snapshots get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// A fifth of each volume, at least 1 GiB; less, in proportion, where that is not free.
    Chosen,
    /// Bytes for each.
    Bytes(u64),
    /// Percent of each volume.
    Percent(u64),
}

/// A snapshot that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The volume group.
    pub group: String,
    /// The volume.
    pub origin: String,
    /// The snapshot's name.
    pub name: String,
    /// Room for what is written meanwhile, in bytes.
    pub room_bytes: u64,
    /// The volume's size in bytes.
    pub origin_bytes: u64,
    /// The file system on it is mounted here.
    pub path: PathBuf,
}

impl Snapshot {
    /// `GROUP/NAME`, as LVM's programs take it.
    pub fn place(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Snapshots to take.
    pub snapshots: Vec<Snapshot>,
    /// File systems to be held still until they are copied.
    pub held: Vec<Mounted>,
}

/// What the machine has, and what is wished.
#[derive(Debug)]
pub struct Situation<'a> {
    /// File systems that can be written to, each once.
    pub written: &'a [&'a Mounted],
    /// The disks as they are.
    pub disks: &'a Disks,
    /// Logical volumes, as LVM says.
    pub volumes: &'a [Volume],
    /// Volume groups, as LVM says.
    pub groups: &'a [Group],
    /// Room for the snapshots.
    pub room: Room,
    /// What cannot have a snapshot is held still until it is copied.
    pub hold_others: bool,
}

/// Snapshots that an earlier run has left behind: `GROUP/NAME`.
pub fn leftovers(volumes: &[Volume]) -> Vec<String> {
    let ours = |volume: &&Volume| volume.name.starts_with(PREFIX) || volume.tags.iter().any(|tag| tag == TAG);
    volumes.iter().filter(ours).map(|volume| format!("{}/{}", volume.group, volume.name)).collect()
}

/// Makes the plan.
///
/// # Errors
/// `Usage`: snapshots of an earlier run are still there; some file systems can have no snapshot, each named with the reason;
/// `NoSpace`: a group has not enough free extents.
pub fn plan(situation: &Situation<'_>) -> Result<Plan> {
    let left = leftovers(situation.volumes);
    if !left.is_empty() {
        let message = format!("there are snapshots of another run of vimg p2v: {}", left.join(", "));
        let hint = format!("If none is running, remove them: lvremove {}", left.join(" "));
        return Err(Error::usage(message).hint(hint));
    }
    let (mut plan, mut refused) = (Plan::default(), vec![]);
    for mounted in situation.written {
        match volume_of(situation, mounted) {
            Ok(volume) => plan.snapshots.push(Snapshot {
                group: volume.group.clone(),
                origin: volume.name.clone(),
                name: name_of(&volume.name),
                room_bytes: 0,
                origin_bytes: volume.size_bytes,
                path: mounted.path.clone(),
            }),
            Err(_) if situation.hold_others || is_small(&mounted.path) => plan.held.push((*mounted).clone()),
            Err(reason) => {
                refused.push(format!("{} on {} ({reason})", mounted.device, mounted.path.display()));
            }
        }
    }
    if !refused.is_empty() {
        let message = format!("no snapshot can be taken of {}", refused.join(", "));
        return Err(Error::usage(message)
            .hint("--snapshot --freeze holds these still until they are copied, which is done first.")
            .hint("--freeze alone holds everything still until the end; it needs no LVM."));
    }
    share(&mut plan.snapshots, situation)?;
    Ok(plan)
}

/// Small and hardly ever written to: what a machine is started from.
fn is_small(path: &Path) -> bool {
    path.starts_with("/boot") || path.starts_with("/efi")
}

fn name_of(origin: &str) -> String {
    let end = origin.char_indices().map(|(at, _)| at).find(|at| *at >= MOST_NAME).unwrap_or(origin.len());
    format!("{PREFIX}{}", &origin[..end])
}

/// The volume of a file system, if a snapshot of it shows the file system; otherwise why not.
fn volume_of<'a>(situation: &Situation<'a>, mounted: &Mounted) -> std::result::Result<&'a Volume, String> {
    let Some(uuid) = &mounted.logical else { return Err("not on a logical volume".to_owned()) };
    let volume = situation.volumes.iter().find(|volume| volume.uuid == *uuid);
    let Some(volume) = volume else { return Err("LVM's program does not know the volume".to_owned()) };
    let what = match volume.attributes.chars().next().unwrap_or('?') {
        '-' => None,
        'o' | 'O' => Some("has other snapshots, which would not be of the same moment"),
        's' | 'S' => Some("is a snapshot itself"),
        'V' => Some("is a thin volume"),
        'r' | 'R' => Some("is a RAID of LVM's"),
        'm' | 'M' => Some("is a mirror of LVM's"),
        'C' => Some("has a cache"),
        _ => Some("is of a kind that is not known"),
    };
    let place = format!("{}/{}", volume.group, volume.name);
    if let Some(what) = what {
        return Err(format!("{place} {what}"));
    }
    match situation.disks.logical_places(&volume.group, &volume.name) {
        Some(_) => Ok(volume),
        None => Err(format!("{place} does not lie on the disks that are copied as it is")),
    }
}

/// Gives each snapshot its room.
fn share(snapshots: &mut [Snapshot], situation: &Situation<'_>) -> Result<()> {
    for group in situation.groups {
        let mut own: Vec<&mut Snapshot> =
            snapshots.iter_mut().filter(|snapshot| snapshot.group == group.name).collect();
        let wanted: Vec<u64> =
            own.iter().map(|snapshot| wanted(snapshot.origin_bytes, situation.room, group)).collect();
        let sum = wanted.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let extents = group.free_bytes / group.extent_bytes * group.extent_bytes;
        for (snapshot, wanted) in own.iter_mut().zip(&wanted) {
            let fair = match sum {
                sum if sum <= extents => *wanted,
                _ if situation.room != Room::Chosen => 0,
                sum => {
                    let part = u128::from(*wanted) * u128::from(extents) / u128::from(sum);
                    u64::try_from(part).unwrap_or(0) / group.extent_bytes * group.extent_bytes
                }
            };
            snapshot.room_bytes = fair;
        }
        let too_small =
            |snapshot: &&mut Snapshot| snapshot.room_bytes < snapshot.origin_bytes / 100 * SMALLEST_PERCENT;
        if own.iter().any(|snapshot| snapshot.room_bytes == 0) || own.iter().any(too_small) {
            return Err(no_room(group, sum, situation.room));
        }
    }
    match snapshots.iter().find(|snapshot| snapshot.room_bytes == 0) {
        Some(orphan) => {
            Err(Error::invalid(format!("LVM's program does not know the volume group {}", orphan.group)))
        }
        None => Ok(()),
    }
}

/// What a snapshot should have, in whole extents. More than what saves every byte of the volume is of no use.
fn wanted(origin_bytes: u64, room: Room, group: &Group) -> u64 {
    let all = origin_bytes.saturating_add(origin_bytes / 100).saturating_add(8 << 20);
    let bytes = match room {
        Room::Chosen => (origin_bytes / 100).saturating_mul(SHARE_PERCENT).max(LEAST),
        Room::Bytes(bytes) => bytes,
        Room::Percent(percent) => (origin_bytes / 100).saturating_mul(percent),
    };
    bytes.min(all).max(1).div_ceil(group.extent_bytes).saturating_mul(group.extent_bytes)
}

fn no_room(group: &Group, wanted: u64, room: Room) -> Error {
    let (free, wanted) = (human(group.free_bytes), human(wanted));
    let message =
        format!("the volume group {} has {free} free, and snapshots should have {wanted}", group.name);
    let error = Error::new(ErrorKind::NoSpace, message);
    let error = match room {
        Room::Chosen => error,
        _ => error
            .hint("A smaller --snapshot-size may do: it has to hold what is written while the copy runs."),
    };
    error
        .hint("Give the group room (vgextend), for example by a disk or a loop device for the time of the copy.")
        .hint("--freeze needs no room: it holds everything still until the end.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(free: u64) -> Group {
        Group { name: "vg".to_owned(), free_bytes: free, extent_bytes: 4 << 20 }
    }

    fn snapshots(sizes: &[u64]) -> Vec<Snapshot> {
        let one = |(index, size): (usize, &u64)| Snapshot {
            group: "vg".to_owned(),
            origin: format!("lv{index}"),
            name: name_of("x"),
            room_bytes: 0,
            origin_bytes: *size,
            path: PathBuf::new(),
        };
        sizes.iter().enumerate().map(one).collect()
    }

    fn rooms(sizes: &[u64], free: u64, room: Room) -> Result<Vec<u64>> {
        let (disks, groups) = (Disks::open_all(vec![]).unwrap(), [group(free)]);
        let situation = Situation {
            written: &[],
            disks: &disks,
            volumes: &[],
            groups: &groups,
            room,
            hold_others: false,
        };
        let mut all = snapshots(sizes);
        share(&mut all, &situation)?;
        Ok(all.iter().map(|snapshot| snapshot.room_bytes).collect())
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn room_is_chosen_or_given_and_never_more_than_there_is() {
        let fifth = (100 * GIB / 100 * 20).div_ceil(4 << 20) * (4 << 20);
        assert_eq!(rooms(&[100 * GIB, 2 * GIB], 500 * GIB, Room::Chosen).unwrap(), [fifth, GIB]);
        let shared = rooms(&[100 * GIB, 100 * GIB], 10 * GIB, Room::Chosen).unwrap();
        assert_eq!(shared, [5 * GIB, 5 * GIB]);
        // Of a small volume, all of it.
        assert_eq!(rooms(&[100 << 20], 500 * GIB, Room::Chosen).unwrap(), [112 << 20]);
        assert_eq!(
            rooms(&[10 * GIB], 500 * GIB, Room::Bytes(5 << 20)).unwrap_err().kind(),
            ErrorKind::NoSpace
        );
        assert_eq!(rooms(&[10 * GIB], 500 * GIB, Room::Bytes(GIB + 1)).unwrap(), [GIB + (4 << 20)]);
        assert_eq!(rooms(&[10 * GIB], 500 * GIB, Room::Percent(200)).unwrap()[0] / (1 << 20), 10352);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_ways_out() {
        for (free, room) in [(0, Room::Chosen), (GIB, Room::Bytes(2 * GIB)), (16 << 20, Room::Chosen)] {
            let error = rooms(&[100 * GIB], free, room).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            assert!(error.hints().iter().any(|hint| hint.contains("--freeze")), "{error:?}");
        }
    }

    #[test]
    fn what_another_run_has_left_is_named() {
        let volume = |name: &str, tags: &[&str]| Volume {
            group: "vg".to_owned(),
            name: name.to_owned(),
            uuid: "u".to_owned(),
            attributes: "-".to_owned(),
            size_bytes: 1,
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        };
        let volumes = [volume("root", &[]), volume("vimg_p2v_root", &[]), volume("renamed", &["x", TAG])];
        assert_eq!(leftovers(&volumes), ["vg/vimg_p2v_root", "vg/renamed"]);
    }
}
