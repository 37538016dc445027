//! Whether grain tables lie where nothing else does.
//!
//! A directory entry can name any sector. Where that is the header, the descriptor, a directory, or part of another table,
//! what is written to one is written to the other. Where it is a grain, the "table" is somebody's data, and making it equal
//! to its copy, or keeping it in step, would write over them.
//!
//! Tables lie in front of the first grain; only those that were made or moved later lie among the grains. An image without
//! such is looked at by its directories alone.

use std::collections::BTreeSet;

use block::{Error, Result};

use super::tables::{Copy, Tables, ZERO_GRAIN};
use crate::SECTOR;
use crate::header::flags;

/// A table that a directory names: at which sector it begins, and what it is for. Disks have millions of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Named {
    pub(super) sector: u32,
    pub(super) index: u32,
    pub(super) copy: Copy,
}

/// The tables whose places are not theirs.
#[derive(Debug, Default)]
pub(super) struct Places {
    bad: BTreeSet<(Copy, u32)>,
}

impl Places {
    /// Looks at all directory entries and, if tables lie among the grains, at all tables.
    ///
    /// # Errors
    /// The host failed.
    pub(super) fn look(tables: &Tables) -> Result<Self> {
        // Those of the redundant copy come first in the file, and so are in order already.
        let copies: &[Copy] = match tables.header.has(flags::REDUNDANT) {
            true => &[Copy::Redundant, Copy::Main],
            false => &[Copy::Main],
        };
        let mut named = vec![];
        for copy in copies {
            for index in 0..tables.header.gd_entries() {
                if let Some(sector) = tables.gde(*copy, index)?
                    && tables.is_table(sector)?
                    && let Ok(index) = u32::try_from(index)
                {
                    named.push(Named { sector, index, copy: *copy });
                }
            }
        }
        Self::of(tables, named)
    }

    /// The same of entries that have been looked at: those that name a place inside the file.
    ///
    /// # Errors
    /// The host failed.
    pub(super) fn of(tables: &Tables, mut named: Vec<Named>) -> Result<Self> {
        named.sort();
        let mut places = Self::default();
        places.compare(tables, &named);
        places.among_grains(tables, &named)?;
        Ok(places)
    }

    /// Whether a table lies in what is something else's place.
    pub(super) fn is_bad(&self, copy: Copy, index: u64) -> bool {
        u32::try_from(index).is_ok_and(|index| self.bad.contains(&(copy, index)))
    }

    /// With each other, and with what the header names. Both copies of a table may be one: that keeps them in step.
    fn compare(&mut self, tables: &Tables, named: &[Named]) {
        let len = tables.header.gt_sectors();
        for (start, room) in tables.named_by_header() {
            let end = start.saturating_add(room);
            let first = named.partition_point(|table| u64::from(table.sector) + len <= start);
            let within = named[first..].iter().take_while(|table| u64::from(table.sector) < end);
            self.bad.extend(within.map(|table| (table.copy, table.index)));
        }
        for pair in named.windows(2) {
            let [table, next] = pair else { continue };
            let is_same = table.sector == next.sector && table.index == next.index;
            if u64::from(next.sector) < u64::from(table.sector) + len && !is_same {
                self.bad.extend([(table.copy, table.index), (next.copy, next.index)]);
            }
        }
    }

    /// With the grains that any other table has.
    fn among_grains(&mut self, tables: &Tables, named: &[Named]) -> Result<()> {
        let (header, len) = (&tables.header, tables.header.gt_sectors());
        let first = named.partition_point(|table| u64::from(table.sector) + len <= header.overhead);
        let among = &named[first..];
        if among.is_empty() {
            return Ok(());
        }
        let per_table = u64::from(header.gtes_per_gt);
        for table in named {
            let Some(entries) = tables.read_table(u64::from(table.sector) * SECTOR)? else { continue };
            for (grain, entry) in (u64::from(table.index) * per_table..).zip(entries) {
                if entry <= ZERO_GRAIN || tables.entry_fault(grain, entry)?.is_some() {
                    continue;
                }
                let (start, end) = (u64::from(entry), u64::from(entry) + header.grain);
                let first = among.partition_point(|other| u64::from(other.sector) + len <= start);
                let near = among[first..].iter().take_while(|other| u64::from(other.sector) < end);
                let near = near.filter(|other| *other != table);
                self.bad.extend(near.map(|other| (other.copy, other.index)));
            }
        }
        Ok(())
    }

    /// The first table in a place that is not its own, as an error.
    ///
    /// # Errors
    /// `Corrupt`, if there is one.
    pub(super) fn refuse(&self, damaged: impl Fn(u64, Copy) -> Error) -> Result<()> {
        self.bad.first().map_or(Ok(()), |(copy, index)| Err(damaged(u64::from(*index), *copy)))
    }
}
