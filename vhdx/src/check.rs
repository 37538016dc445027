//! Checking an image: its structures twice where there are two, and every entry of the BAT against the file and
//! all others.
//!
//! qemu-img's check of a VHDX only opens it. What is looked at beyond that here counts as a corruption only where
//! the specification leaves no doubt. Space that no block uses is not counted as leaked: writers align generously,
//! and a block that is given up may keep its place.

use std::collections::HashMap;
use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::{ErrorKind, Result, Storage};

use crate::bat::{Entry, State};
use crate::geometry::BITMAP_BLOCK;
use crate::region;
use crate::source::Source;
use crate::table::Table;
use crate::{Guid, MIB};

/// Checks an image, and repairs what there are two of: a log that was left behind is replayed (`Leaks` and `All`), a
/// damaged header or region table is written again from the other (`All`).
///
/// # Errors
/// What prevents opening the image, too; a failure of the host.
pub fn check(file: &Arc<dyn Storage>, repair: Repair) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut source = Source::read(file)?;
    if source.has_pending_log() {
        report.say("The log has changes that are not in the file yet".to_owned());
        if repair != Repair::None {
            source = source.replay()?;
            report.corruptions_fixed += 1;
        }
    }
    copies(&mut report, &mut source, repair)?;
    Blocks::new(&source)?.check(&mut report)?;
    Ok(report)
}

/// Looks at what the file has twice.
fn copies(report: &mut CheckReport, source: &mut Source, repair: Repair) -> Result<()> {
    let fix = repair == Repair::All;
    let mut found = |damaged: bool, what: &str| {
        if damaged {
            report.say(format!(
                "{}: one of the two {what} is damaged",
                if fix { "Repairing" } else { "ERROR" }
            ));
            if fix { report.corruptions_fixed += 1 } else { report.corruptions += 1 }
        }
        damaged && fix
    };
    if found(source.headers.other_damaged, "headers") {
        let guid = Guid::random()?;
        source.headers.replace(&*source.file, |header| header.file_write_guid = guid)?;
    }
    let copy = source.regions.damaged_copy;
    let fixable = found(copy.is_some(), "region tables");
    if let Some(copy) = copy.filter(|_| fixable) {
        let mut bytes = vec![0; region::LEN];
        source.file.read_at(&mut bytes, region::OFFSETS[1 - copy])?;
        source.file.write_at(&bytes, region::OFFSETS[copy])?;
        source.file.sync()?;
    }
    Ok(())
}

/// The BAT against the file.
struct Blocks<'a> {
    source: &'a Source,
    table: Table,
    file_len: u64,
    used: Used,
}

impl<'a> Blocks<'a> {
    fn new(source: &'a Source) -> Result<Self> {
        let table = Table::new(Arc::clone(&source.storage), source.regions.bat);
        Ok(Self { source, table, file_len: source.storage.len()?, used: Used::default() })
    }

    fn check(mut self, report: &mut CheckReport) -> Result<()> {
        let entries = self.source.geometry.entries();
        let mut next = 0;
        while next < entries {
            // Entries that say nothing at all make most of a large disk.
            next += self.nothing_said(next, entries).unwrap_or(0);
            let index = next;
            if index == entries {
                break;
            }
            next += 1;
            let entry = match self.table.get(index) {
                Err(error) if error.kind() == ErrorKind::Io => {
                    report.check_errors += 1;
                    report.say(format!("ERROR: BAT entry {index:#x} cannot be read: {error}"));
                    continue;
                }
                entry => entry?,
            };
            if let Some(wrong) = self.wrong(index, entry)? {
                report.corruptions += 1;
                report.say(format!("ERROR: BAT entry {index:#x} ({:#018x}): {wrong}", entry.0));
            }
        }
        if self.used.full {
            report.check_errors += 1;
            report
                .say("ERROR: the blocks are too far apart to look for overlaps among all of them".to_owned());
        }
        Ok(())
    }

    /// How many entries from `index` on need not be looked at: they are all zeros, or blocks of zeros without a place.
    fn nothing_said(&self, index: u64, entries: u64) -> Result<u64> {
        let empty = self.table.count(index, entries - index, |entry| entry == Entry::default())?;
        let Some(block) = self.source.geometry.block_of(index).filter(|_| empty == 0) else {
            return Ok(empty);
        };
        self.table.count(index, self.source.geometry.blocks_in_a_row(block), |entry| entry == Entry::ZERO)
    }

    /// What is wrong with an entry.
    fn wrong(&mut self, index: u64, entry: Entry) -> Result<Option<String>> {
        if entry.has_reserved_bits() {
            return Ok(Some("reserved bits are set".to_owned()));
        }
        let geometry = &self.source.geometry;
        let Some(block) = geometry.block_of(index) else {
            return Ok(match entry.bitmap_present() {
                None => Some("a sector bitmap has no such state".to_owned()),
                Some(true) if self.source.metadata.parent.is_none() => {
                    Some("a sector bitmap of a disk without parent".to_owned())
                }
                Some(true) => self.misplaced(entry.offset(), BITMAP_BLOCK, BITMAP_BLOCK),
                Some(false) => None,
            });
        };
        let (len, room) = (geometry.len_of(block), geometry.block_size);
        match entry.state() {
            State::Reserved => Ok(Some("a block has no such state".to_owned())),
            State::FullyPresent => Ok(self.misplaced(entry.offset(), len, room)),
            State::PartiallyPresent => {
                let bitmap = self.table.get(geometry.bitmap_entry_of(block));
                if self.source.metadata.parent.is_none() {
                    return Ok(Some("a block that is partly present on a disk without parent".to_owned()));
                }
                match bitmap?.bitmap_present() {
                    Some(true) => Ok(self.misplaced(entry.offset(), len, room)),
                    _ => Ok(Some("a block that is partly present without a sector bitmap".to_owned())),
                }
            }
            State::NotPresent | State::Undefined | State::Zero | State::Unmapped => Ok(None),
        }
    }

    /// What is wrong with the place of `len` bytes that take `room` bytes of the file.
    fn misplaced(&mut self, offset: u64, len: u64, room: u64) -> Option<String> {
        if offset < MIB {
            return Some("overlaps the header".to_owned());
        }
        if offset.checked_add(len).is_none_or(|end| end > self.file_len) {
            return Some(format!("lies outside the file (length {:#x})", self.file_len));
        }
        let structures = self.source.structures();
        if let Some((name, _)) = structures.iter().find(|(_, region)| region.overlaps(offset, room)) {
            return Some(format!("overlaps the {name}"));
        }
        if self.source.regions.unknown.iter().any(|region| region.overlaps(offset, room)) {
            return Some("overlaps a region".to_owned());
        }
        (!self.used.add(offset, room)).then(|| "overlaps another block".to_owned())
    }
}

/// MiBs of a part of the file: 64 GiB.
const PART: u64 = 1 << 16;
/// The most parts that are remembered: 32 MiB of memory for 256 TiB of file.
const MAX_PARTS: usize = 4096;

/// The MiBs of the file that blocks take.
#[derive(Debug, Default)]
struct Used {
    parts: HashMap<u64, Vec<u64>>,
    /// There was no room for all of them.
    full: bool,
}

impl Used {
    /// Takes the MiBs of a range. False if one of them was taken.
    fn add(&mut self, offset: u64, len: u64) -> bool {
        let mut free = true;
        for mib in offset / MIB..offset.saturating_add(len).div_ceil(MIB) {
            if self.parts.len() >= MAX_PARTS && !self.parts.contains_key(&(mib / PART)) {
                self.full = true;
                return free;
            }
            let part =
                self.parts.entry(mib / PART).or_insert_with(|| vec![0; block::num::to_usize(PART / 64)]);
            let word = &mut part[block::num::to_usize(mib % PART / 64)];
            free &= *word >> (mib % 64) & 1 == 0;
            *word |= 1 << (mib % 64);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_twice_is_noticed() {
        let mut used = Used::default();
        assert!(used.add(63 << 20, 2 << 20));
        assert!(!used.add(64 << 20, 1 << 20));
        assert!(used.add(65 << 20, 1 << 20));
        assert!(used.add((PART - 1) << 20, 2 << 20));
        assert!(!used.add(PART << 20, 1 << 20));
        assert!((0..5000).all(|n| used.add(((n + 2) * PART) << 20, 1)));
        assert!(used.full && used.parts.len() == MAX_PARTS);
    }
}
