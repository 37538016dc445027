//! What of a guest's disks holds nothing, so that a copy can leave it out.
//!
//! ```text
//!   free blocks of file systems      only where the file system is at rest and its own books agree (see `fs`)
//!   swap space but its beginning     nothing in it outlives a boot; an image of a sleeping system is not swap
//!   free extents of LVM              those that no logical volume has, hidden ones included
//!   the same on arrays of RAID 1     on all of their members, if all are in sync
//!   space between partitions         but not in front of the first, where boot loaders are, nor at the end
//! ```
//!
//! Of a disk that has partitions and is a member of an array as a whole as well, nothing is left out: one of the two is old.
//!
//! Everything is decided by what is known to be unused, never by what is not known to be used.

use std::ops::Range;
use std::sync::Arc;

use block::{BlockDevice, ErrorKind, Result};

use crate::detect::Kind;
use crate::disks::{Disks, Location, Volume};
use crate::partition::{Role, Table};
use crate::ranges::Ranges;

/// Bytes at the beginning of swap space that are kept: the header, of one page of any architecture.
const SWAP_HEADER: u64 = 64 << 10;
/// Bytes that are kept at the end of a disk (the second GPT, metadata of RAID controllers), after and before partitions.
const MARGIN: u64 = 1 << 20;

/// What one disk need not be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unused {
    /// Bytes of the disk, in order.
    pub ranges: Vec<Range<u64>>,
    /// What was found out and what could not be, in sentences.
    pub notes: Vec<String>,
}

impl Unused {
    /// Bytes of all ranges together.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// Finds out for every disk. Volumes for which `at_rest` is false (mounted, in use) are copied whole.
///
/// # Errors
/// A device failed.
pub fn find(disks: &Disks, at_rest: &dyn Fn(&Volume) -> bool) -> Result<Vec<Unused>> {
    let mut finder = Finder { disks, found: vec![(Ranges::default(), vec![]); disks.disks().len()] };
    for (index, disk) in disks.disks().iter().enumerate() {
        // The partitions of a member of an array are the array's.
        let is_whole = |volume: &Volume| volume.location == Location::Whole { disk: index };
        if let Some(table) = disk.table.as_ref().filter(|_| !disks.volumes().iter().any(is_whole)) {
            finder.between_partitions(index, table, disk.device.size());
        }
    }
    for volume in disks.volumes().iter().filter(|volume| at_rest(volume)) {
        finder.volume(volume)?;
    }
    finder.extents(at_rest);
    let done = disks.disks().iter().zip(finder.found).map(|(disk, (ranges, mut notes))| {
        if disk.doubtful {
            notes.push(
                "there are partitions and the superblock of a software RAID: everything is copied".into(),
            );
            return Unused { ranges: vec![], notes };
        }
        Unused { ranges: ranges.sorted().into_iter().collect(), notes }
    });
    Ok(done.collect())
}

struct Finder<'a> {
    disks: &'a Disks,
    found: Vec<(Ranges, Vec<String>)>,
}

impl Finder<'_> {
    /// Gaps after the first partition. The inside of an extended partition is left alone: its tables lie in gaps.
    fn between_partitions(&mut self, disk: usize, table: &Table, size: u64) {
        let mut used = Ranges::default();
        for partition in table.partitions.iter().filter(|partition| partition.role != Role::Logical) {
            let start = partition.offset.saturating_sub(MARGIN);
            used.push(start..partition.offset.saturating_add(partition.len).saturating_add(MARGIN));
        }
        let used = used.sorted();
        let first = table.partitions.iter().map(|partition| partition.offset).min();
        let (Some(first), Some(end)) = (first, size.checked_sub(MARGIN)) else { return };
        for gap in used.gaps(first.min(end)..end) {
            self.found[disk].0.push(gap);
        }
    }

    fn volume(&mut self, volume: &Volume) -> Result<()> {
        let free = match volume.content.as_ref().map(|content| content.kind) {
            Some(Kind::Swap) => {
                let size = volume.device.size();
                Ok(Some(std::iter::once(SWAP_HEADER.min(size)..size).collect()))
            }
            Some(Kind::Ext2 | Kind::Ext3 | Kind::Ext4 | Kind::Xfs | Kind::Vfat) => {
                volume.file_system().and_then(|fs| fs.free_ranges())
            }
            _ => return Ok(()),
        };
        match free {
            Ok(Some(ranges)) => self.put(volume, ranges),
            Ok(None) => {
                self.note(
                    volume,
                    "its free space is copied, too: it was not unmounted, or its state is not certain",
                );
            }
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => self.note(volume, &format!("its free space is copied, too: {error}")),
        }
        Ok(())
    }

    /// Ranges of a volume, on the disks that they lie on.
    fn put(&mut self, volume: &Volume, ranges: Vec<Range<u64>>) {
        ranges.into_iter().for_each(|range| self.put_range(volume, range));
    }

    fn put_range(&mut self, volume: &Volume, range: Range<u64>) {
        for (disk, range) in self.disks.on_disks(volume, range) {
            self.found[disk].0.push(range);
        }
    }

    fn note(&mut self, volume: &Volume, text: &str) {
        let text = format!("{}: {text}", volume.location);
        match self.disks.place(volume) {
            Some((disk, _)) => self.found[disk].1.push(text),
            None => {
                if let Some((_, notes)) = self.found.first_mut() {
                    notes.push(text);
                }
            }
        }
    }

    /// Extents of LVM that belong to no volume, unless somebody may be about to give them to one.
    fn extents(&mut self, at_rest: &dyn Fn(&Volume) -> bool) {
        for (device, range) in self.disks.volume_groups().iter().flat_map(|group| group.unallocated()) {
            let Some(volume) = self.disks.volume_of(&device).filter(|volume| at_rest(volume)) else {
                continue;
            };
            self.put_range(volume, range);
        }
    }
}

/// A range of bytes of a device.
pub(crate) type Place = (Arc<dyn BlockDevice>, Range<u64>);
