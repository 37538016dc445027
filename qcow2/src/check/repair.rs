//! Making the image what it should be.
//!
//! Refcounts are set right where they are, or made anew elsewhere if their structures are damaged. Everything new
//! is written to clusters that nothing refers to. The order is such that a crash in the middle leaves nothing worse
//! than it was:
//!
//! 1. refcounts are raised (too high a refcount is a leak), or the new refcount structures take the old ones' place;
//! 2. COPIED flags that must not be there go;
//! 3. entries that do harm are changed, and the header names the new snapshot table;
//! 4. refcounts are lowered, except if something could not be followed that may refer to what looks leaked;
//! 5. missing COPIED flags are set;
//! 6. the header says that all is well, if it is.
//!
//! Each step is durable before the next. What cannot be repaired is refused before the first write.

use std::collections::BTreeSet;

use block::image::Repair;
use block::num::to_usize;
use block::{ErrorKind, Result};

use super::Check;
use super::compare::Mismatch;
use super::copied::Action;
use super::entries::Moves;
use super::rebuild::NewRefcounts;
use crate::error::Error;
use crate::features::incompatible;
use crate::header::Header;
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

/// Where new structures go, decided before the first write.
#[derive(Debug, Default)]
struct Plan {
    moves: Moves,
    /// New refcount structures; `None`: the present ones stay,
    refcounts: Option<NewRefcounts>,
    /// with these blocks (index, offset) besides.
    missing: Vec<(u64, u64)>,
}

impl Check<'_> {
    /// Repairs what the mode allows and takes it out of the counts of problems.
    pub(super) fn repair(&mut self) -> Result<()> {
        if let (Some(reason), Repair::Leaks, 1..) = (self.incomplete, self.mode, self.report.leaks) {
            self.say_kept(reason);
        }
        match self.mode {
            Repair::None => return Ok(()),
            Repair::Leaks if self.fixable_leaks > 0 => self.give_back_leaks()?,
            Repair::Leaks if self.copied_suspect => self.fix_flags()?,
            Repair::All if self.has_work() => self.repair_all()?,
            _ => self.refuse_if_blocked()?,
        }
        if !self.verify && self.report.corruptions == 0 && self.report.check_errors == 0 {
            self.declare_clean()?;
        }
        Ok(())
    }

    fn has_work(&self) -> bool {
        self.fixable_corruptions + self.fixable_leaks + self.bad_zero_places > 0
            || self.copied_suspect
            || self.rebuild.is_some()
            || self.snapshot_table.is_some()
            || self.data_on_metadata
    }

    /// Nothing is written to an image that could not be read, or that is not to be written.
    fn refuse_if_blocked(&self) -> Result<()> {
        match self.blocked {
            Some(reason) if !self.report.is_clean() => Err(Error::CannotRepair(reason).into()),
            _ => Ok(()),
        }
    }

    fn can_repair(&self) -> Result<()> {
        match self.blocked {
            Some(reason) => Err(Error::CannotRepair(reason).into()),
            None if self.storage.read_only() => Err(block::Error::read_only()),
            None => Ok(()),
        }
    }

    /// Lowers refcounts, and sets the flags that ask for it.
    fn give_back_leaks(&mut self) -> Result<()> {
        self.can_repair()?;
        if let Some(reason) = self.rebuild {
            return Err(Error::NeedsRebuild(reason).into());
        }
        self.lower()?;
        self.count_fixed();
        self.fix_flags()
    }

    /// Sets the flags right if nothing else is wrong. Flags that follow a refcount that is itself wrong stay.
    fn fix_flags(&mut self) -> Result<()> {
        if self.report.corruptions == 0 && self.report.check_errors == 0 {
            self.can_repair()?;
            self.fix_copied(Action::Clear)?;
            self.fix_copied(Action::Set)?;
        }
        self.check_copied(Action::Report)
    }

    fn repair_all(&mut self) -> Result<()> {
        self.can_repair()?;
        if let Some(reason) = self.incomplete {
            self.keep_leaks(reason)?;
        }
        self.verify |= self.incomplete.is_some()
            || self.rebuild.is_some()
            || self.bad_zero_places > 0
            || self.snapshot_table.is_some()
            || self.data_on_metadata;
        let plan = self.plan()?;
        self.counts_fit()?;
        match &plan.refcounts {
            Some(refcounts) => self.write_refcounts(refcounts)?,
            None => self.raise(&plan.missing)?,
        }
        self.fix_copied(Action::Clear)?;
        self.rewrite_entries(&plan.moves)?;
        self.write_snapshot_table()?;
        self.lower()?;
        if !self.verify {
            self.check_copied(Action::Report)?;
            self.count_fixed();
        }
        Ok(())
    }

    fn plan(&mut self) -> Result<Plan> {
        if self.rebuild.is_some() {
            self.uncount_refcounts();
        }
        let mut plan = Plan { moves: self.plan_moves()?, ..Plan::default() };
        self.place_snapshot_table()?;
        if self.rebuild.is_none() {
            match self.place_missing_blocks()? {
                Some(missing) => plan.missing = missing,
                None => self.damaged_refcounts("the refcount table is too small"),
            }
        }
        if self.rebuild.is_some() {
            self.verify = true;
            plan.refcounts = Some(self.place_refcounts()?);
        }
        Ok(plan)
    }

    /// Lowers refcounts and then sets the COPIED flags that are missing.
    fn lower(&mut self) -> Result<()> {
        self.rewrite(Direction::Lower)?;
        self.storage.sync()?;
        self.fix_copied(Action::Set)
    }

    fn fix_copied(&mut self, action: Action) -> Result<()> {
        self.stored.forget();
        self.check_copied(action)?;
        self.storage.sync()
    }

    fn count_fixed(&mut self) {
        let report = &mut self.report;
        report.corruptions_fixed += self.fixable_corruptions;
        report.leaks_fixed += self.fixable_leaks;
        report.corruptions -= self.fixable_corruptions;
        report.leaks -= self.fixable_leaks;
    }

    /// Looks at the image again, as it is after a repair: what is not found any more has been fixed.
    pub(super) fn verify(&mut self) -> Result<()> {
        let header = Header::read_for_check(self.storage)?;
        let mut after = Check::new(self.storage, &header, self.data_file_len, Repair::None)?;
        after.run()?;
        let (left, report) = (after.report, &mut self.report);
        report.corruptions_fixed += report.corruptions.saturating_sub(left.corruptions);
        report.leaks_fixed += report.leaks.saturating_sub(left.leaks);
        (report.corruptions, report.leaks) = (left.corruptions, left.leaks);
        report.check_errors = left.check_errors;
        report.image_end_offset = left.image_end_offset;
        report.allocated_clusters = left.allocated_clusters;
        report.fragmented_clusters = left.fragmented_clusters;
        report.compressed_clusters = left.compressed_clusters;
        if report.corruptions == 0 && report.check_errors == 0 {
            self.declare_clean()?;
        }
        Ok(())
    }

    /// Raises refcounts that are too low, those in blocks that are missing included.
    fn raise(&mut self, missing: &[(u64, u64)]) -> Result<()> {
        self.rewrite(Direction::Raise)?;
        self.storage.sync()?;
        if missing.is_empty() {
            return Ok(());
        }
        for (index, offset) in missing {
            self.storage.write_at(&self.encode_block(*index), *offset)?;
        }
        self.storage.sync()?;
        for (index, offset) in missing {
            self.storage.write_at(&offset.to_be_bytes(), self.header.refcount_table_offset + index * 8)?;
            self.stored.blocks.insert(*index, *offset);
        }
        self.storage.sync()
    }

    /// Finds a place for every refcount block that is needed and not there, and counts it. New blocks may need new
    /// blocks to count them. `None`: the refcount table has no room for them.
    fn place_missing_blocks(&mut self) -> Result<Option<Vec<(u64, u64)>>> {
        let bits = self.geometry.refcount_block_bits();
        let mut wanted = BTreeSet::new();
        self.for_each_group(|check, group| {
            if !check.stored.blocks.contains_key(&group.index) && group.slots.iter().any(|slot| *slot != 0) {
                wanted.insert(group.index);
            }
            Ok(())
        })?;
        let room = u64::from(self.header.refcount_table_clusters) << (self.geometry.cluster_bits - 3);
        let mut missing = vec![];
        let mut known = BTreeSet::new();
        while let Some(index) = wanted.pop_first() {
            if self.stored.blocks.contains_key(&index) || !known.insert(index) {
                continue;
            }
            if index >= room {
                for (_, offset) in missing {
                    self.unplace(self.geometry.cluster_of(offset), 1);
                }
                return Ok(None);
            }
            let place = self.place(1, 0)?;
            missing.push((index, self.geometry.offset_of(place)));
            wanted.insert(place >> bits);
            wanted.extend(self.ghosts.counted.drain(..).map(|cluster| cluster >> bits));
        }
        Ok(Some(missing))
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
