//! All disks as they were at one moment, while the machine goes on.
//!
//! ```text
//!   read LVM's books          what the copy shows as LVM's metadata: without the snapshots that come now
//!   take the snapshots        one after the other, each of a moment of its own
//!   hold everything still     the moment: chunks that were written to since their snapshot was taken are read now, from
//!   catch up                  the volumes themselves; the snapshots' stores say which these are. They are few
//!   let go
//! ```
//!
//! A volume of the moment is then its snapshot with those chunks over it. LVM's program is never run while anything is held
//! still: it might wait for what we hold, and kernels before Linux 6.8 take no snapshot of what is frozen already.

use std::ops::Range;
use std::sync::Arc;

use block::mem::MemStorage;
use block::num::to_usize;
use block::raw::{Raw, RawOptions};
use block::size::human;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Disks;

use super::patched::{Patch, Patched};
use super::snapshot::Snapshot;
use super::store;

/// The most bytes of LVM's books that are kept in memory.
const MOST_BOOKS: u64 = 256 << 20;
/// The most bytes of changes of a volume that are kept in memory.
const MOST_CHANGES: u64 = 512 << 20;
/// The most pieces that a volume lies in: a volume of 64 GiB in stripes of 64 KiB has as many.
const MOST_PIECES: usize = 1 << 20;

/// Where bytes lie, in their order: indexes of disks, and bytes there.
pub type Places = Vec<(usize, Range<u64>)>;

/// What LVM had written before anything was done.
#[derive(Debug)]
pub struct Books {
    /// For each place, the bytes in memory.
    kept: Vec<(usize, Patch)>,
    volumes: Vec<Known>,
}

#[derive(Debug, PartialEq, Eq)]
struct Known {
    group: String,
    name: String,
    uuid: String,
    places: Option<Places>,
}

fn known(disks: &Disks) -> Vec<Known> {
    let of = |group: &guestdisk::lvm::Group| {
        let volume = |volume: &guestdisk::lvm::Logical| Known {
            group: group.name.clone(),
            name: volume.name.clone(),
            uuid: volume.uuid.clone(),
            places: disks.logical_places(&group.name, &volume.name),
        };
        group.volumes.iter().map(volume).collect::<Vec<_>>()
    };
    disks.volume_groups().iter().flat_map(of).collect()
}

impl Books {
    /// Reads them. `disks` has been found on `raw`.
    ///
    /// # Errors
    /// Reading failed; `Unsupported`: they are larger than any.
    pub fn read(raw: &[Arc<dyn BlockDevice>], disks: &Disks) -> Result<Self> {
        let (mut kept, mut room) = (vec![], MOST_BOOKS);
        for (disk, range) in disks.lvm_books() {
            let (Some(device), len) = (raw.get(*disk), range.end - range.start) else { continue };
            room = room.checked_sub(len).ok_or_else(|| Error::unsupported("LVM's metadata are too large"))?;
            let mut bytes = vec![0; to_usize(len)];
            device.read_at(&mut bytes, range.start)?;
            kept.push((*disk, Patch { range: range.clone(), source: memory(bytes)?, offset: 0 }));
        }
        Ok(Self { kept, volumes: known(disks) })
    }

    /// Compares with what LVM says now. Nobody but us may have changed anything: the copy shows the books as they were.
    ///
    /// # Errors
    /// `Locked`: somebody has.
    pub fn compare(&self, now: &Disks, ours: &[Snapshot]) -> Result<()> {
        let now = known(now);
        let changed = self.volumes.iter().find(|volume| !now.contains(volume));
        let is_ours = |volume: &Known| {
            let own = ours.iter().any(|own| own.group == volume.group && own.name == volume.name);
            // What LVM itself calls the bond between a volume and its snapshot.
            let number = volume.name.strip_prefix("snapshot").unwrap_or("x");
            own || (number.bytes().all(|byte| byte.is_ascii_digit()) && volume.places.is_none())
        };
        let new = now.iter().find(|volume| !self.volumes.contains(volume) && !is_ours(volume));
        let Some(volume) = changed.or(new) else { return Ok(()) };
        let message = format!("somebody has changed the volume {}/{} meanwhile", volume.group, volume.name);
        Err(Error::new(ErrorKind::Locked, message).hint("Run it again."))
    }
}

fn memory(bytes: Vec<u8>) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default())?))
}

/// A volume of which there is a snapshot.
#[derive(Debug)]
pub struct Volume {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// What the snapshot shows.
    pub shown: Arc<dyn BlockDevice>,
    /// Its store.
    pub store: Arc<dyn BlockDevice>,
    places: Places,
}

impl Volume {
    /// A volume that lies at `places`.
    ///
    /// # Errors
    /// `Invalid`: the sizes do not agree; `Unsupported`: it lies in too many pieces.
    pub fn new(
        snapshot: Snapshot,
        shown: Arc<dyn BlockDevice>,
        store: Arc<dyn BlockDevice>,
        places: Places,
    ) -> Result<Self> {
        let len = places.iter().fold(0_u64, |sum, (_, range)| sum.saturating_add(range.end - range.start));
        if len != shown.size() {
            let message = format!("{} has {} bytes, its volume {len}", snapshot.place(), shown.size());
            return Err(Error::invalid(message));
        }
        if places.len() > MOST_PIECES {
            let message = format!("{}/{} lies in {} pieces", snapshot.group, snapshot.origin, places.len());
            return Err(Error::unsupported(message).hint("--freeze copies it without a snapshot."));
        }
        Ok(Self { snapshot, shown, store, places })
    }

    /// The volume of this moment. To be called while nobody writes to it; `raw` are the disks.
    ///
    /// # Errors
    /// `NoSpace`: the snapshot is full, or more has changed than can be kept; reading failed; `Cancelled`: `late` says so.
    pub fn catch_up(
        &self,
        raw: &[Arc<dyn BlockDevice>],
        late: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn BlockDevice>> {
        let place = || format!("the snapshot {}", self.snapshot.place());
        let changed = store::changed(&*self.store).context(place)?;
        let ranges = ranges(&changed, self.shown.size());
        let total = ranges.iter().fold(0_u64, |sum, range| sum.saturating_add(range.end - range.start));
        if total > MOST_CHANGES {
            let message = format!("{} were written while snapshots were taken", human(total));
            return Err(Error::new(ErrorKind::NoSpace, message)
                .context(place())
                .hint("Run it when less is written."));
        }
        let mut bytes = vec![0; to_usize(total)];
        let (mut patches, mut at) = (vec![], 0);
        for range in ranges {
            if late() {
                return Err(Error::new(
                    ErrorKind::Cancelled,
                    "reading what has changed meanwhile takes too long",
                ));
            }
            let len = range.end - range.start;
            self.read(raw, &mut bytes[to_usize(at)..to_usize(at + len)], range.start)?;
            patches.push((range, at));
            at += len;
        }
        let kept = memory(bytes)?;
        let patch = |(range, offset)| Patch { range, source: Arc::clone(&kept), offset };
        Ok(Arc::new(Patched::new(Arc::clone(&self.shown), patches.into_iter().map(patch).collect())?))
    }

    /// Reads the volume itself.
    fn read(&self, raw: &[Arc<dyn BlockDevice>], buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut start, end) = (0, offset + buf.len() as u64);
        for (disk, range) in &self.places {
            let len = range.end - range.start;
            let (from, to) = (offset.max(start), end.min(start + len));
            if from < to {
                let device = raw.get(*disk).ok_or_else(|| Error::invalid("a disk that is none"))?;
                let part = &mut buf[to_usize(from - offset)..to_usize(to - offset)];
                device.read_at(part, range.start + (from - start))?;
            }
            start += len;
            if start >= end {
                break;
            }
        }
        Ok(())
    }
}

/// The changed chunks as ranges of the volume, those that meet as one.
fn ranges(changed: &store::Changed, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = vec![];
    for chunk in &changed.chunks {
        let start = chunk.saturating_mul(changed.chunk_bytes).min(size);
        let end = start.saturating_add(changed.chunk_bytes).min(size);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// The disks of the moment: with the books as they were, and each volume read from `shown`.
///
/// # Errors
/// `Invalid`: the volumes overlap.
pub fn disks(
    raw: &[Arc<dyn BlockDevice>],
    books: &Books,
    volumes: &[(&Volume, Arc<dyn BlockDevice>)],
) -> Result<Vec<Arc<dyn BlockDevice>>> {
    let mut patches: Vec<Vec<Patch>> = vec![vec![]; raw.len()];
    let mut put = |disk: usize, patch| {
        if let Some(own) = patches.get_mut(disk) {
            own.push(patch);
        }
    };
    for (disk, patch) in &books.kept {
        put(*disk, patch.clone());
    }
    for (volume, shown) in volumes {
        let mut offset = 0;
        for (disk, range) in &volume.places {
            put(*disk, Patch { range: range.clone(), source: Arc::clone(shown), offset });
            offset += range.end - range.start;
        }
    }
    let disk = |(base, patches): (&Arc<dyn BlockDevice>, Vec<Patch>)| -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(Patched::new(Arc::clone(base), patches)?))
    };
    raw.iter().zip(patches).map(disk).collect()
}

#[cfg(test)]
mod tests {
    use super::super::store::tests::{device, store};
    use super::*;
    use std::path::PathBuf;

    fn snapshot() -> Snapshot {
        Snapshot {
            group: "vg".to_owned(),
            origin: "root".to_owned(),
            name: "vimg_p2v_root".to_owned(),
            room_bytes: 4096,
            origin_bytes: 16384,
            path: PathBuf::from("/"),
        }
    }

    fn read(device: &dyn BlockDevice, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(range.end - range.start)];
        device.read_at(&mut bytes, range.start).unwrap();
        bytes
    }

    /// A volume of four chunks in two pieces on two disks: the snapshot is full of 1, the volume itself of 2. Chunks 1 and 2
    /// were written to before the moment, and so the copy has them from the volume.
    #[test]
    fn a_volume_of_the_moment_is_the_snapshot_and_what_came_in_between() {
        let raw = [device(vec![2; 20000]), device(vec![2; 20000])];
        let places = vec![(0, 4096..4096 + 6144), (1, 512..512 + 10240)];
        let (shown, full) = (device(vec![1; 16384]), device(store(false, 8, &[])));
        let volume =
            Volume::new(snapshot(), Arc::clone(&shown), device(store(true, 8, &[2, 1])), places.clone())
                .unwrap();
        let then = volume.catch_up(&raw, &|| false).unwrap();
        // What is written afterwards is not seen.
        let book = Patch { range: 0..512, source: memory(vec![9; 512]).unwrap(), offset: 0 };
        let books = Books { kept: vec![(0, book)], volumes: vec![] };
        let disks = disks(&raw, &books, &[(&volume, then)]).unwrap();
        let expected = [vec![1; 4096], vec![2; 8192], vec![1; 4096]].concat();
        assert_eq!(read(&*disks[0], 4096..4096 + 6144), expected[..6144]);
        assert_eq!(read(&*disks[1], 512..512 + 10240), expected[6144..]);
        assert_eq!(read(&*disks[0], 500..514), [vec![9; 12], vec![2; 2]].concat());
        assert_eq!(read(&*disks[0], 10240..10242), [2, 2], "the rest of the disk is itself");
        let error = volume.catch_up(&raw, &|| true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        let lost = Volume::new(snapshot(), Arc::clone(&shown), full, places).unwrap();
        assert_eq!(lost.catch_up(&raw, &|| false).unwrap_err().kind(), ErrorKind::NoSpace);
        Volume::new(snapshot(), shown, device(vec![0; 512]), vec![(0, 0..16383)]).unwrap_err();
    }

    #[test]
    fn somebody_elses_changes_are_noticed() {
        let known = |name: &str, places: Option<Places>| Known {
            group: "vg".to_owned(),
            name: name.to_owned(),
            uuid: "u".to_owned(),
            places,
        };
        let books = Books { kept: vec![], volumes: vec![known("root", Some(vec![(0, 0..4096)]))] };
        let none = Disks::open_all(vec![]).unwrap();
        let error = books.compare(&none, &[snapshot()]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("vg/root"), "{error}");
        Books { kept: vec![], volumes: vec![] }.compare(&none, &[]).unwrap();
    }
}
