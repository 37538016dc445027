//! Examining an image: every entry of the map, and the count of blocks in the header.
//!
//! The first three kinds of problem are found and worded as by qemu-img; a block past the end of the file, which qemu-img
//! reads as zeros, is one more. The count can be repaired. (qemu-img repairs nothing here.)
//!
//! The count is what other programs take for the number of the next block. Where blocks have been freed it must therefore
//! be that of the highest number in use, and not that of the blocks: qemu-img calls such an image damaged, and the next
//! block that it writes to one with the smaller count replaces another.

use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::num::to_usize;
use block::{Result, Storage};

use crate::header::Header;
use crate::map::{Entry, Map};

/// Checks an image; with [`Repair::All`] the count of blocks is set right, if nothing else is wrong.
///
/// # Errors
/// The host failed.
pub fn check(storage: &Arc<dyn Storage>, header: &Header, repair: Repair) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let map = Map::new(header);
    let file_len = storage.len()?;
    // One bit for each block that the file can hold: others are wrong already.
    let in_file = file_len.saturating_sub(u64::from(header.data_offset)).div_ceil(map.block_size);
    let mut seen = vec![0u64; to_usize(in_file.min(u64::from(header.blocks)).div_ceil(64))];
    let (mut count, mut end) = (0u64, 0u64);
    map.walk(&**storage, 0, |index, entry| {
        let Entry::Data(number) = entry else { return Ok(true) };
        if number >= header.blocks {
            report.corruptions += 1;
            report.say(format!("ERROR: block index {index} too large, is {number}"));
            return Ok(true);
        }
        count += 1;
        end = end.max(u64::from(number) + 1);
        if let Err(error) = map.check_place(index, number, file_len) {
            report.corruptions += 1;
            report.say(format!("ERROR: {error}"));
        }
        let (word, bit) = (to_usize(u64::from(number) / 64), 1 << (number % 64));
        let Some(bits) = seen.get_mut(word) else { return Ok(true) };
        if std::mem::replace(bits, *bits | bit) & bit != 0 {
            report.corruptions += 1;
            report.say(format!("ERROR: block index {number} also used by {number}"));
        }
        Ok(true)
    })?;
    // A hole, which a freed block has left, is no damage.
    let holes = report.corruptions == 0 && count < end;
    let counted = if holes { end } else { count };
    if counted != u64::from(header.allocated) {
        // The count is that of the next block to give out, so that it must not be less than any in use.
        let right = u32::try_from(end).unwrap_or(u32::MAX);
        if repair == Repair::All && report.corruptions == 0 {
            header.write_state(&**storage, right, header.modified)?;
            storage.sync()?;
            report.corruptions_fixed += 1;
            report.say(format!(
                "Repairing: allocated blocks mismatch, is {counted}, should be {}",
                header.allocated
            ));
        } else {
            report.corruptions += 1;
            report.say(format!(
                "ERROR: allocated blocks mismatch, is {counted}, should be {}",
                header.allocated
            ));
        }
    }
    Ok(report)
}
