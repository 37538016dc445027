//! The COPIED flags of the active L1 and L2 tables: set where the refcount is exactly one (specification,
//! "Standard Cluster Descriptor"), which is what allows writing in place.
//!
//! A flag that is set wrongly makes a later write change what a snapshot shows. One that is missing only costs
//! a copy.

use block::Result;
use block::image::Repair;
use block::num::to_usize;

use super::Check;
use super::compare::Mismatch;
use super::counts::EXCLUSIVE;
use crate::l2;

/// What is done about wrong flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// They become part of the report.
    Report,
    /// Flags that must not be there are cleared.
    Clear,
    /// Flags that are missing are set.
    Set,
}

impl Action {
    fn applies(self, entry: u64, refcount: u64) -> bool {
        let copied = entry & l2::COPIED != 0;
        let wrong = copied != (refcount == 1);
        match self {
            Self::Report => wrong,
            Self::Clear => wrong && copied,
            Self::Set => wrong && !copied,
        }
    }
}

impl Check<'_> {
    /// Looks at every COPIED flag of the active tables.
    pub(super) fn check_copied(&mut self, action: Action) -> Result<()> {
        let (offset, len) = (self.header.l1_table_offset, u64::from(self.header.l1_size) * 8);
        let mut l1_changes = vec![];
        let mut tables = vec![];
        self.for_each_word(offset, len, |check, index, entry| {
            if entry & l2::OFFSET_MASK != 0 && check.l1_copied(action, index, entry) {
                l1_changes.push(index);
            }
            tables.extend(check.first_use(index, entry));
        })?;
        if self.l1_is_alone() {
            for index in l1_changes {
                self.flip(offset + index * 8)?;
            }
        }
        for (table, count) in tables {
            self.l2_copied(action, table, count)?;
        }
        Ok(())
    }

    /// Whether no other structure is in the clusters of the active L1 table: a flag would be changed there, too.
    fn l1_is_alone(&self) -> bool {
        let (offset, len) = (self.header.l1_table_offset, u64::from(self.header.l1_size) * 8);
        let first = self.geometry.cluster_of(offset);
        let end = self.geometry.clusters_for(offset.saturating_add(len));
        let others = self.exclusive.iter().filter(|(start, past)| *start < end && first < *past).count();
        others <= 1
    }

    /// Acts on the flag of an L1 entry; true if it is to be flipped.
    fn l1_copied(&mut self, action: Action, index: u64, entry: u64) -> bool {
        let refcount = self.refcount(action, self.geometry.cluster_of(entry & l2::OFFSET_MASK));
        if !action.applies(entry, refcount) {
            return false;
        }
        self.note(action, 1, |verb| {
            format!("{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
        });
        action != Action::Report
    }

    /// The L2 table of the L1 entry and how many such entries there are, unless an earlier one has it too.
    fn first_use(&self, index: u64, entry: u64) -> Option<(u64, u64)> {
        let table = entry & l2::OFFSET_MASK;
        let uses = self.tables.uses.get(&table)?;
        (uses.active > 0 && uses.l1_index == index).then_some((table, uses.active))
    }

    fn l2_copied(&mut self, action: Action, table: u64, count: u64) -> Result<()> {
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        if !self.read(&mut bytes, table) {
            return Ok(());
        }
        let mut changes = vec![];
        for position in self.plain_hosts(&bytes) {
            let word = word_at(&bytes, position);
            let refcount = match self.external {
                true => 1,
                false => self.refcount(action, self.geometry.cluster_of(word & l2::OFFSET_MASK)),
            };
            if action.applies(word, refcount) {
                // An entry is reported for everyone who uses its table, and put right once.
                let count = if action == Action::Report { count } else { 1 };
                self.note(action, count, |verb| {
                    format!("{verb} OFLAG_COPIED data cluster: l2_entry={word:x} refcount={refcount}")
                });
                changes.push(position);
            }
        }
        let shared = self.counts.get(self.geometry.cluster_of(table)).flags & EXCLUSIVE != 0;
        if action == Action::Report || shared {
            return Ok(());
        }
        self.rewrite_table(table, &changes, |bytes, position| {
            let flipped = word_at(bytes, *position) ^ l2::COPIED;
            bytes[*position..*position + 8].copy_from_slice(&flipped.to_be_bytes());
            *position
        })
    }

    fn note(&mut self, action: Action, count: u64, message: impl FnOnce(&str) -> String) {
        if action == Action::Report {
            self.corrupt(count, || message("ERROR"));
        } else {
            self.report.corruptions_fixed += count;
            self.say(|| message("Repairing"));
        }
    }

    /// The refcount that counts: the one in the file, or the one that it will have when the repair at hand is
    /// done.
    fn refcount(&mut self, action: Action, cluster: u64) -> u64 {
        let stored = self.stored_refcount(cluster);
        let count = self.counts.get(cluster);
        let fixed = action != Action::Report && self.mode != Repair::None;
        match fixed && stored != count.references && self.fixes(&Mismatch { cluster, stored, count }) {
            true => count.references,
            false => stored,
        }
    }

    fn flip(&self, position: u64) -> Result<()> {
        let mut word = [0; 8];
        self.storage.read_at(&mut word, position)?;
        let flipped = u64::from_be_bytes(word) ^ l2::COPIED;
        self.storage.write_at(&flipped.to_be_bytes(), position)
    }

    /// Positions of the entries of an L2 table that have a host cluster.
    fn plain_hosts(&self, table: &[u8]) -> Vec<usize> {
        let has_host = |word: u64| {
            let offset = word & l2::OFFSET_MASK;
            word & l2::COMPRESSED == 0 && (offset != 0 || (self.external && word & l2::COPIED != 0))
        };
        // Places that a repair takes away need no flags.
        let goes = |position: usize| {
            let bitmap = if self.geometry.extended_l2 { word_at(table, position + 8) } else { 0 };
            self.bad_zero_places > 0 && self.is_bad_zero_place(word_at(table, position), bitmap)
        };
        let size = to_usize(self.geometry.l2_entry_size());
        (0..table.len())
            .step_by(size)
            .filter(|position| has_host(word_at(table, *position)) && !goes(*position))
            .collect()
    }
}

/// The word at a position of a table.
pub(super) fn word_at(table: &[u8], position: usize) -> u64 {
    table[position..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
