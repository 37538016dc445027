//! Disks that have a partition table and the superblock of an array as a whole: which of the two counts.
//!
//! ```text
//!   | MBR | superblock 1.2 | old partition ..   data of the array ..         |   the table is older: `mdadm --create` leaves it
//!   | MBR | partition of the array ..                      | superblock 1.0   |   the table is the array's
//!   | GPT | partition ..    | old superblock 1.0 |      .. | backup of GPT    |   the table is the disk's, the superblock is older
//! ```
//!
//! What is certain is decided by the size that the table was made for; the rest by what the members of the array say of
//! each other. Whichever it is, nothing of such a disk is taken for free (see [`unused`](crate::unused)).

use block::Result;

use super::superblock::{Probed, Version};
use super::{Array, MemberState};
use crate::bytes::{self, le16};
use crate::disks::Location;
use crate::partition::{Role, Scheme, Table};

/// Whether a partition of a table has this byte. One that is cut off at the end of the disk was not made for it.
fn covers(table: &Table, size: u64, place: u64) -> bool {
    let inside = |offset: u64, len: u64| (offset..offset.saturating_add(len)).contains(&place);
    let parts = || table.partitions.iter().filter(|found| found.role != Role::Extended);
    table.extent <= size && parts().any(|found| inside(found.offset, found.len))
}

impl Version {
    /// Whether it lies at the start of a member, in front of the data.
    const fn is_at_start(self) -> bool {
        matches!(self, Self::V1_1 | Self::V1_2)
    }
}

impl Probed {
    /// Whether it is uncertain what a disk of `size` bytes with this table holds. A superblock of version 1 knows where it lies:
    /// one that is whole is the disk's even within a partition.
    pub(crate) fn doubts(&self, table: &Table, size: u64) -> bool {
        self.seen.iter().any(|(place, knows)| *knows || !covers(table, size, *place))
    }

    /// Whether a disk of `size` bytes with this table may be a member as a whole; [`Array::disowns`] has the last word.
    pub(crate) fn may_claim(&self, table: &Table, size: u64) -> bool {
        let Some(found) = &self.found else { return false };
        if covers(table, size, found.place) {
            return false;
        }
        let is_larger = table.extent > size;
        found.version.is_at_start() || found.data_offset == 0 && (is_larger || table.extent <= found.place)
    }
}

impl Array {
    /// Why the table that is seen on a member is the disk's own, and not that of the array or left over; `None`: it is not.
    ///
    /// # Errors
    /// A device failed.
    pub(crate) fn disowns(&self, table: &Table, disk: &Location) -> Result<Option<String>> {
        let member = self.members.iter().find(|member| member.location == *disk);
        let (Ok(_), Some(member)) = (&self.device, member) else {
            let reason = self.device.as_ref().err().map(ToString::to_string).unwrap_or_default();
            return Ok(Some(format!("the array cannot be put together ({reason})")));
        };
        if self.version.is_at_start() {
            return Ok(None);
        }
        let size = member.device.size();
        if table.extent > self.size {
            return Ok(Some("the table is for more than the array has".to_owned()));
        }
        let (is_larger, is_mirror) = (table.extent > size, self.size <= size);
        let is_theirs = match table.scheme {
            _ if is_larger => true,
            Scheme::Gpt => is_mirror,
            Scheme::Mbr if is_mirror => !self.lost && self.heads_agree(disk, true)?,
            Scheme::Mbr => self.missing.is_empty() && self.heads_agree(disk, false)?,
        };
        Ok((!is_theirs)
            .then(|| "the table fits this disk, and the other members do not bear the array out".to_owned()))
    }

    /// Whether all members that are in sync begin as one of them does; if they need not be the same (`!strictly`), those
    /// without the signature of a boot record may differ.
    fn heads_agree(&self, disk: &Location, strictly: bool) -> Result<bool> {
        let (mut own, mut others) = (vec![], vec![]);
        for member in self.members.iter().filter(|member| member.data_offset == 0) {
            let head = bytes::read_some(&*member.device, 0, 512)?;
            if member.location == *disk {
                own = head;
            } else if member.state == MemberState::InSync {
                others.push(head);
            }
        }
        Ok(others.iter().all(|head| *head == own || !strictly && le16(head, 510) != 0xaa55))
    }
}
