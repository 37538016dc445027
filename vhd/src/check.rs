//! Examining an image: the two footers against each other, and every block's place.
//!
//! qemu-img does not check this format. What is found here are the things that make other programs refuse an image, or
//! lose data: a footer that is gone, blocks outside the file, over the image's own structures, or over each other.
//! Repairing restores the footers; where a block's data is cannot be found out again.

use block::image::{CheckReport, Repair};
use block::{Result, Storage};

use crate::container::Container;
use crate::error::Error;
use crate::footer::{DiskType, FOOTER_BYTES};
use crate::header::DynamicHeader;
use crate::table::Table;

/// The most blocks that are examined; each takes 12 bytes of memory meanwhile.
const MAX_BLOCKS: u64 = 1 << 24;

/// Checks an image, and repairs its footers if all that can be is to be repaired.
///
/// # Errors
/// The host failed.
pub fn check(container: &Container, repair: Repair) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    if let Some(header) = container.header() {
        check_blocks(container, header, &mut report)?;
    } else {
        report.image_end_offset = container.data_end() + FOOTER_BYTES;
    }
    check_footers(container, &mut report, repair)?;
    Ok(report)
}

fn check_blocks(container: &Container, header: &DynamicHeader, report: &mut CheckReport) -> Result<()> {
    let table = Table::new(container, header);
    let storage = &*container.storage;
    report.total_clusters = table.blocks;
    if !header.sum_good {
        corrupt(report, &Error::HeaderChecksum);
    }
    if table.blocks > MAX_BLOCKS {
        report.check_errors += 1;
        report.say(format!("ERROR: {}", Error::TooManyBlocks(header.entries)));
        return Ok(());
    }
    let limit = container.data_end();
    let mut used: Vec<(u64, u32)> = vec![];
    let mut previous_end = None;
    for index in 0..table.blocks {
        let Some(sector) = table.entry(storage, index)? else { continue };
        match table.check_place(index, sector, limit) {
            Ok(offset) => {
                report.allocated_clusters += 1;
                let gap = previous_end.map(|end| offset.checked_sub(end));
                // Blocks may be aligned, which leaves less than a page between them.
                report.fragmented_clusters += u64::from(!matches!(gap, None | Some(Some(0..4096))));
                previous_end = Some(offset + table.bitmap_bytes + table.block_size);
                used.push((offset, block::num::low_u32(index)));
            }
            Err(error) => corrupt(report, &error),
        }
    }
    used.sort_unstable();
    for pair in used.windows(2) {
        let [(offset, index), (next, other)] = pair else { continue };
        if offset + table.used_len(u64::from(*index)) > *next {
            let (index, other) = (u64::from(*other), u64::from(*index));
            corrupt(report, &Error::BlocksOverlap { index, offset: *next, other });
        }
    }
    let blocks_end = used.last().map_or(0, |(offset, index)| offset + table.used_len(u64::from(*index)));
    report.image_end_offset = blocks_end.max(table.metadata_end());
    Ok(())
}

fn corrupt(report: &mut CheckReport, error: &Error) {
    report.corruptions += 1;
    report.say(format!("ERROR: {error}"));
}

/// Counts a damaged footer, and writes it anew from the good one.
fn check_footers(container: &Container, report: &mut CheckReport, repair: Repair) -> Result<()> {
    if container.footer().disk_type == DiskType::Fixed {
        return Ok(());
    }
    let storage = &*container.storage;
    let mut damaged = vec![];
    if !container.ends.start {
        damaged.push((0, "the copy of the footer at the start of the file is damaged"));
    }
    if container.ends.end.is_none() {
        damaged.push((end_of_file(storage)?, "the footer at the end of the file is damaged or missing"));
    }
    if let (true, Some(at)) = (container.ends.differ, container.ends.end) {
        damaged.push((at, "the two footers differ"));
    }
    // While blocks are in doubt, nothing is put anywhere.
    let repairs = repair == Repair::All && report.corruptions == 0;
    for (at, what) in damaged {
        if repairs {
            storage.write_at(&container.footer_bytes, at)?;
            storage.sync()?;
            report.corruptions_fixed += 1;
            report.say(format!("Repairing: {what}"));
        } else {
            report.corruptions += 1;
            report.say(format!("ERROR: {what}"));
        }
    }
    Ok(())
}

/// Where a missing footer goes: behind everything, on a sector.
fn end_of_file(storage: &dyn Storage) -> Result<u64> {
    let len = storage.len()?;
    Ok(if storage.fixed_len() {
        len.saturating_sub(FOOTER_BYTES)
    } else {
        len.next_multiple_of(FOOTER_BYTES)
    })
}
