//! What makes a member that is not there count as old: the event counter of those that are.
//!
//! Whoever changes an array without one of its members must leave behind that this member is out of date, as md does, or it
//! would be taken for a good copy when it comes back. The bitmap must not bring it up to date either, since it knows
//! nothing of what was changed here: it says since when it is complete (`events_cleared`).

use std::sync::Arc;

use block::{BlockDevice, Result};

use super::superblock::{OLD_SUM_AT, SUM_AT, SUPERBLOCK, Superblock, Version, checksum, summed};
use crate::bytes::{self, le32, le64};

/// What the superblock of a bitmap begins with.
const BITMAP_MAGIC: &[u8] = b"bitm";
/// Its length.
const BITMAP_SUPERBLOCK: usize = 256;

/// What is needed to find the counters of a member.
#[derive(Debug, Clone)]
pub(super) struct Counters {
    device: Arc<dyn BlockDevice>,
    version: Version,
    place: u64,
    bitmap: Option<u64>,
}

impl Counters {
    pub(super) fn new(device: &Arc<dyn BlockDevice>, superblock: &Superblock) -> Self {
        let Superblock { version, place, bitmap, .. } = *superblock;
        Self { device: Arc::clone(device), version, place, bitmap }
    }

    /// Sets the event counter of the member.
    ///
    /// # Errors
    /// The device failed, or is read-only.
    pub(super) fn set(&self, events: u64) -> Result<()> {
        if let Some(place) = self.bitmap {
            self.set_bitmap(place, events)?;
        }
        let mut raw = bytes::read(&*self.device, self.place, SUPERBLOCK)?;
        if self.version == Version::V0_90 {
            // The checkpoint of a resync counts only if its events are these.
            let same = raw[156..164] == raw[164..172];
            raw[156..164].copy_from_slice(&events.to_le_bytes());
            if same {
                raw.copy_within(156..164, 164);
            }
            let sum = checksum(&raw, OLD_SUM_AT);
            raw[OLD_SUM_AT..OLD_SUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        } else {
            raw[200..208].copy_from_slice(&events.to_le_bytes());
            let sum = checksum(&raw[..summed(&raw)], SUM_AT);
            raw[SUM_AT..SUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        }
        self.device.write_at(&raw, self.place)
    }

    fn set_bitmap(&self, place: u64, events: u64) -> Result<()> {
        let mut raw = bytes::read_some(&*self.device, place, BITMAP_SUPERBLOCK)?;
        // Versions 3 and 4; others are not those of one machine.
        if !raw.starts_with(BITMAP_MAGIC) || raw.len() < BITMAP_SUPERBLOCK || !matches!(le32(&raw, 4), 3 | 4)
        {
            return Ok(());
        }
        let latest = le64(&raw, 24).max(events);
        raw[24..32].copy_from_slice(&latest.to_le_bytes());
        raw[32..40].copy_from_slice(&events.to_le_bytes());
        self.device.write_at(&raw, place)
    }
}
