//! vimg's own description of a machine (`machine.json`), as `vimg p2v` leaves it beside the disks.

use block::{Error, Result, ResultExt as _};
use serde_json::Value;

use super::place::Place;
use crate::guest::{DiskImage, Guest, from_document};

/// What stands in every such file, for whoever wants to know what it is.
pub(super) const FORMAT: &str = "\"vimg-machine\"";

/// Reads the description. Names of disks lead to files beside it.
///
/// # Errors
/// `Invalid`: it is not JSON, or not a description; names that the policy forbids.
pub(super) fn guest(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| Error::invalid(format!("not JSON: {error}")))?;
    let mut guest = from_document(&value)?;
    let mut notes = vec![];
    for disk in &mut guest.disks {
        if let DiskImage::Name { name, .. } = &mut disk.image {
            *name = place.file(name, &mut notes).context(|| format!("disk '{}'", disk.id))?;
        }
    }
    guest.notes.extend(notes);
    Ok(guest)
}
