//! Making the refcounts what they should be, in place.
//!
//! Only where the refcount structures themselves are sound and everything that refers to clusters could be
//! followed; anything else is refused before the first write. The order is such that a crash in the middle
//! leaves nothing worse than it was: refcounts are raised first (too high a refcount is a leak), then COPIED
//! flags that must not be there go, then refcounts are lowered, then missing COPIED flags are set, and last the
//! header says that all is well; each step is durable before the next.

use std::collections::BTreeSet;

use block::image::Repair;
use block::num::to_usize;
use block::{ErrorKind, Result};

use super::Check;
use super::compare::Mismatch;
use super::copied::Action;
use crate::error::Error;
use crate::features::incompatible;
use crate::refcount::write_counter;

/// Tables are written in these units.
const SECTOR: usize = 512;
/// Where the incompatible feature bits are in the header (specification, "Header").
const INCOMPATIBLE_AT: u64 = 72;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Raise,
    Lower,
}

impl Check<'_> {
    /// Repairs what the mode allows and takes it out of the counts of problems.
    pub(super) fn repair(&mut self) -> Result<()> {
        if self.mode == Repair::None {
            return Ok(());
        }
        if self.fixable_corruptions + self.fixable_leaks > 0 || self.copied_suspect {
            self.can_repair()?;
            self.repair_refcounts()?;
            self.count_fixed();
        } else if let (Some(reason), false) = (self.blocked, self.report.is_clean()) {
            return Err(Error::CannotRepair(reason).into());
        }
        if self.report.corruptions == 0 && self.report.check_errors == 0 {
            self.declare_clean()?;
        }
        Ok(())
    }

    fn repair_refcounts(&mut self) -> Result<()> {
        if self.mode == Repair::All {
            self.raise()?;
            self.fix_copied(Action::Clear)?;
        }
        self.rewrite(Direction::Lower)?;
        self.storage.sync()?;
        self.fix_copied(Action::Set)?;
        self.check_copied(Action::Report)
    }

    fn fix_copied(&mut self, action: Action) -> Result<()> {
        self.stored.forget();
        self.check_copied(action)?;
        self.storage.sync()
    }

    fn can_repair(&self) -> Result<()> {
        match self.blocked {
            Some(reason) => Err(Error::CannotRepair(reason).into()),
            None if self.storage.read_only() => Err(block::Error::read_only()),
            None => Ok(()),
        }
    }

    fn count_fixed(&mut self) {
        let report = &mut self.report;
        report.corruptions_fixed += self.fixable_corruptions;
        report.leaks_fixed += self.fixable_leaks;
        report.corruptions -= self.fixable_corruptions;
        report.leaks -= self.fixable_leaks;
    }

    /// Raises refcounts that are too low, those in blocks that are missing included.
    fn raise(&mut self) -> Result<()> {
        let missing = self.place_missing_blocks()?;
        self.rewrite(Direction::Raise)?;
        self.storage.sync()?;
        if missing.is_empty() {
            return Ok(());
        }
        for (index, offset) in &missing {
            self.write_new_block(*index, *offset)?;
        }
        self.storage.sync()?;
        for (index, offset) in missing {
            self.storage.write_at(&offset.to_be_bytes(), self.header.refcount_table_offset + index * 8)?;
            self.stored.blocks.insert(index, offset);
        }
        self.storage.sync()
    }

    /// Finds a place at the end of the file for every refcount block that is needed and not there, and counts
    /// it. New blocks may need new blocks to count them.
    fn place_missing_blocks(&mut self) -> Result<Vec<(u64, u64)>> {
        let bits = self.geometry.refcount_block_bits();
        let mut missing = BTreeSet::new();
        self.for_each_group(|check, group| {
            if !check.stored.blocks.contains_key(&group.index) && group.slots.iter().any(|slot| *slot != 0) {
                missing.insert(group.index);
            }
            Ok(())
        })?;
        let first = self.counts.end().max(self.geometry.clusters_for(self.file_len));
        let mut placed = 0;
        while placed < missing.len() as u64 {
            let index = (first + placed) >> bits;
            if !self.stored.blocks.contains_key(&index) {
                missing.insert(index);
            }
            placed += 1;
        }
        let room = u64::from(self.header.refcount_table_clusters) << (self.geometry.cluster_bits - 3);
        if missing.last().is_some_and(|index| *index >= room) {
            return Err(Error::CannotRepair("the refcount table is too small").into());
        }
        self.counts.grow(first + placed + 1);
        for cluster in first..first + placed {
            self.counts.add(cluster, 1, 0);
        }
        Ok(missing.into_iter().zip(first..).map(|(index, at)| (index, self.geometry.offset_of(at))).collect())
    }

    fn write_new_block(&self, index: u64, offset: u64) -> Result<()> {
        let mut block = vec![0; to_usize(self.geometry.cluster_size())];
        let first = index << self.geometry.refcount_block_bits();
        for within in 0..self.geometry.refcount_block_entries() {
            let count = self.counts.get(first + within);
            if self.fixes(&Mismatch { cluster: first + within, stored: 0, count }) {
                write_counter(&mut block, within, self.geometry.refcount_order, count.references);
            }
        }
        self.storage.write_at(&block, offset)
    }

    /// Sets the refcounts that are too low or too high.
    fn rewrite(&mut self, direction: Direction) -> Result<()> {
        let order = self.geometry.refcount_order;
        self.for_each_group(|check, group| {
            let Some(stored) = group.stored else { return Ok(()) };
            let mut changes = vec![];
            for (within, (stored, slot)) in (0..).zip(stored.iter().zip(group.slots)) {
                let count = check.counts.decode(group.first + within, *slot);
                let found = Mismatch { cluster: group.first + within, stored: *stored, count };
                let wanted = match direction {
                    Direction::Raise => *stored < count.references,
                    Direction::Lower => *stored > count.references,
                };
                if wanted && check.fixes(&found) {
                    changes.push((within, count.references));
                }
            }
            let Some(offset) = check.stored.blocks.get(&group.index).copied() else { return Ok(()) };
            check.rewrite_table(offset, &changes, |block, (within, value)| {
                write_counter(block, *within, order, *value);
                to_usize((*within << order) / 8)
            })
        })
    }

    /// Applies `changes` to a table of one cluster and writes the sectors that they touch. `apply` returns the
    /// position that it has changed; positions ascend.
    pub(super) fn rewrite_table<C>(
        &self,
        offset: u64,
        changes: &[C],
        mut apply: impl FnMut(&mut [u8], &C) -> usize,
    ) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut table = vec![0; to_usize(self.geometry.cluster_size())];
        self.storage.read_at(&mut table, offset)?;
        let touched: Vec<usize> = changes.iter().map(|change| apply(&mut table, change)).collect();
        let (Some(first), Some(last)) = (touched.first(), touched.last()) else { return Ok(()) };
        let start = first / SECTOR * SECTOR;
        let end = (last / SECTOR + 1) * SECTOR;
        self.storage.write_at(&table[start..end], offset + start as u64)
    }

    /// Clears the dirty and corrupt bits.
    fn declare_clean(&self) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if self.header.version < 3 || !self.header.has(marks) {
            return Ok(());
        }
        if self.storage.read_only() {
            return Err(block::Error::new(ErrorKind::ReadOnly, "the image is open read-only"));
        }
        self.storage.sync()?;
        self.storage.write_at(&(self.header.incompatible & !marks).to_be_bytes(), INCOMPATIBLE_AT)?;
        self.storage.sync()
    }
}
