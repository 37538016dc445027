//! The disk as it was when a snapshot was taken: the image opened with the snapshot's L1 table and size instead of its
//! own, read-only. What no layer of the snapshot stores comes from the same backing file.

use block::{Error as BlockError, ErrorKind, Result, Storage};

use super::{Selector, Snapshot};
use crate::error::Error;
use crate::header::Header;

/// The header of an image whose active disk is the snapshot. (QEMU shows a snapshot with the disk's present size,
/// and so loses the end of a larger one.)
///
/// # Errors
/// There is no such snapshot; the image is to be written; the snapshot's L1 table is too small for its disk, or cannot
/// be where the table says.
pub(crate) fn header_of(
    storage: &dyn Storage,
    header: &Header,
    snapshots: &[Snapshot],
    selector: &Selector,
    writable: bool,
) -> Result<Header> {
    if writable {
        return Err(BlockError::new(ErrorKind::ReadOnly, "a snapshot cannot be written to"));
    }
    let snapshot = selector
        .find(snapshots)
        .and_then(|index| snapshots.get(index))
        .ok_or_else(|| BlockError::new(ErrorKind::NotFound, "Can't find snapshot"))?;
    let size = snapshot.disk_size.unwrap_or(header.size);
    check_size(header, snapshot, size)?;
    snapshot.check_l1(&header.geometry(), storage.len()?)?;
    Ok(Header { size, l1_size: snapshot.l1_size, l1_table_offset: snapshot.l1_offset, ..header.clone() })
}

/// Whether the snapshot's L1 table can map a disk of `size` bytes.
pub(crate) fn check_size(header: &Header, snapshot: &Snapshot, size: u64) -> Result<()> {
    let needed = header.geometry().l1_entries_for(size);
    if i64::try_from(size).is_err() {
        return Err(Error::TooBig { size }.into());
    }
    match u64::from(snapshot.l1_size) < needed {
        true => Err(Error::L1TooSmall { entries: snapshot.l1_size, needed }.into()),
        false => Ok(()),
    }
}
