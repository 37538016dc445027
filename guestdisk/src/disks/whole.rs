//! A disk by itself, before it is known what else there is: its partition table, and whether that is what counts.

use std::sync::Arc;

use block::{BlockDevice, ErrorKind, Result};

use super::{Disks, Location};
use crate::md;
use crate::partition::{self, Role, Table};

/// What a disk looks like.
pub(super) struct Look {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) table: Option<Table>,
    /// It is one volume: there are no partitions, or they are not the disk's.
    pub(super) is_whole: bool,
    /// It has partitions, and a superblock of an array that is the disk's as a whole.
    pub(super) doubtful: bool,
}

impl Look {
    /// The table, if it has partitions.
    fn divided(&self) -> Option<&Table> {
        self.table.as_ref().filter(|table| !table.partitions.is_empty())
    }
}

impl Disks {
    /// Looks at all disks.
    pub(super) fn look(&mut self, devices: Vec<Arc<dyn BlockDevice>>) -> Result<Vec<Look>> {
        let mut looks = vec![];
        for (disk, device) in devices.into_iter().enumerate() {
            let table = match partition::read(&*device) {
                Ok(table) => table,
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    self.problems.push(format!("disk {}: {error}", disk + 1));
                    None
                }
                Err(error) => return Err(error),
            };
            let mut look = Look { device, table, is_whole: true, doubtful: false };
            // A boot sector without entries: what lies on the disk lies there as a whole.
            if let Some(table) = look.divided() {
                let (probed, size) = (md::probe(&*look.device)?, look.device.size());
                (look.is_whole, look.doubtful) = (probed.may_claim(table, size), probed.doubts(table, size));
            }
            looks.push(look);
        }
        self.judge(&mut looks)?;
        Ok(looks)
    }

    /// Disks that may be members of arrays as a whole in spite of their tables are so if the arrays bear it out.
    fn judge(&mut self, looks: &mut [Look]) -> Result<()> {
        if !looks.iter().any(|look| look.is_whole && look.divided().is_some()) {
            return Ok(());
        }
        let mut members: Vec<(Location, Arc<dyn BlockDevice>)> = vec![];
        for (disk, look) in looks.iter().enumerate() {
            let own = look.divided().filter(|_| !look.is_whole);
            let Some(table) = own else {
                members.push((Location::Whole { disk }, Arc::clone(&look.device)));
                continue;
            };
            for found in table.partitions.iter().filter(|found| found.role != Role::Extended) {
                let slice = found.slice(Arc::clone(&look.device))?;
                members.push((Location::Partition { disk, number: found.number }, Arc::new(slice)));
            }
        }
        let arrays = md::scan(&members, &[])?.arrays;
        for (disk, look) in looks.iter_mut().enumerate() {
            let location = Location::Whole { disk };
            let Some(table) = look.divided().filter(|_| look.is_whole) else { continue };
            let is_member = |array: &&md::Array| array.members.iter().any(|own| own.location == location);
            let reason = match arrays.iter().find(is_member) {
                Some(array) => array.disowns(table, &location)?,
                None => Some("it belongs to no array".to_owned()),
            };
            if let Some(reason) = reason {
                self.problems.push(format!(
                    "disk {}: there are partitions and the superblock of a software RAID of whole disks; {reason}: the partitions are used",
                    disk + 1
                ));
                look.is_whole = false;
            }
        }
        Ok(())
    }
}
