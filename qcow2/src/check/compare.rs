//! The computed counts against the refcounts in the file.

use std::collections::{BTreeMap, HashMap, HashSet};

use block::Result;
use block::image::Repair;
use block::num::to_usize;

use super::Check;
use super::counts::{Count, DATA};
use crate::refcount::read_counter;

/// Refcount blocks that are kept while COPIED flags are looked at.
const CACHED_BLOCKS: usize = 64;

/// Where the refcounts in the file are.
#[derive(Debug, Default)]
pub(super) struct StoredRefcounts {
    /// Host offsets of the usable refcount blocks by their index in the refcount table.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// Clusters that have been counted as used by the refcount table and its blocks.
    pub(super) counted: Vec<u64>,
    /// Clusters that entries of the refcount table name, used for that or not.
    pub(super) named: HashSet<u64>,
    /// Blocks that cannot be read although the table has them.
    pub(super) unreadable: HashSet<u64>,
    cache: HashMap<u64, Vec<u8>>,
}

impl StoredRefcounts {
    /// Forgets blocks that have been read, because they have been written.
    pub(super) fn forget(&mut self) {
        self.cache.clear();
    }
}

/// A refcount that may not be the computed one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mismatch {
    pub(super) cluster: u64,
    pub(super) stored: u64,
    pub(super) count: Count,
}

/// All refcounts of a block.
pub(super) fn decode_block(block: &[u8], order: u32, out: &mut Vec<u64>) {
    out.clear();
    match order {
        3 => out.extend(block.iter().map(|byte| u64::from(*byte))),
        4 => out.extend(block.as_chunks::<2>().0.iter().map(|c| u64::from(u16::from_be_bytes(*c)))),
        5 => out.extend(block.as_chunks::<4>().0.iter().map(|c| u64::from(u32::from_be_bytes(*c)))),
        6 => out.extend(block.as_chunks::<8>().0.iter().map(|c| u64::from_be_bytes(*c))),
        _ => out.extend((0..(block.len() as u64 * 8) >> order).map(|i| read_counter(block, i, order))),
    }
}

impl Check<'_> {
    /// One past the last cluster that is compared.
    fn end(&self) -> u64 {
        self.counts.end().max(self.geometry.clusters_for(self.file_len))
    }

    /// Compares all refcounts, as far as the file has clusters.
    pub(super) fn compare(&mut self) -> Result<()> {
        let mut last_used = None;
        self.for_each_group(|check, group| {
            let Some(stored) = group.stored else {
                check.failed(|| format!("Can't get refcounts of refcount block {}", group.index));
                return Ok(());
            };
            for ((cluster, stored), slot) in (group.first..).zip(stored).zip(group.slots) {
                if *stored == 0 && *slot == 0 {
                    continue;
                }
                let count = check.counts.decode(cluster, *slot);
                if *stored > 0 || count.references > 0 {
                    last_used = Some(cluster);
                }
                check.compare_cluster(&Mismatch { cluster, stored: *stored, count });
            }
            Ok(())
        })?;
        self.report.image_end_offset = last_used.map_or(0, |cluster| self.geometry.offset_of(cluster + 1));
        Ok(())
    }

    /// Calls `visit` for the clusters of every refcount block that exists or that something refers to.
    pub(super) fn for_each_group(
        &mut self,
        mut visit: impl FnMut(&mut Self, Group<'_>) -> Result<()>,
    ) -> Result<()> {
        let bits = self.geometry.refcount_block_bits();
        let end = self.end();
        let others: Vec<u64> = self.stored.blocks.keys().chain(&self.stored.unreadable).copied().collect();
        let (mut stored, mut slots) = (vec![], vec![]);
        for index in self.counts.groups(bits, others.into_iter()) {
            let first = index << bits;
            if first >= end {
                break;
            }
            let len = to_usize((end - first).min(1 << bits));
            slots.resize(len, 0);
            self.counts.slots(first, &mut slots);
            let readable = self.load_block(index, &mut stored);
            stored.truncate(len);
            let stored = readable.then_some(stored.as_slice());
            visit(self, Group { index, first, stored, slots: &slots })?;
        }
        Ok(())
    }

    /// Reads all refcounts of a block: zeros if there is none. False: they cannot be known.
    fn load_block(&mut self, index: u64, out: &mut Vec<u64>) -> bool {
        if self.stored.unreadable.contains(&index) {
            return false;
        }
        let Some(offset) = self.stored.blocks.get(&index).copied() else {
            out.clear();
            out.resize(to_usize(self.geometry.refcount_block_entries()), 0);
            return true;
        };
        let mut block = vec![0; to_usize(self.geometry.cluster_size())];
        let read = self.read(&mut block, offset);
        decode_block(&block, self.geometry.refcount_order, out);
        read
    }

    fn compare_cluster(&mut self, found: &Mismatch) {
        let Mismatch { cluster, stored, count } = *found;
        self.copied_suspect |= count.wrong_copied(stored);
        let references = count.references;
        self.too_many |= references > self.geometry.max_refcount();
        self.verify |= count.overlap() && self.mode == Repair::All;
        self.data_on_metadata |= count.overlap() && count.flags & DATA != 0;
        if stored == references {
            if count.overlap() {
                self.corrupt(1, || {
                    format!(
                        "ERROR cluster {cluster} refcount={stored} reference={references}: metadata shares it"
                    )
                });
            }
            return;
        }
        let fixed = self.fixes(found);
        let verb = match (fixed, stored > references) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        self.say(|| format!("{verb} cluster {cluster} refcount={stored} reference={references}"));
        if stored > references {
            self.report.leaks += 1;
            self.fixable_leaks += u64::from(fixed);
        } else {
            self.report.corruptions += 1;
            self.fixable_corruptions += u64::from(fixed);
        }
    }

    /// Whether the repair at hand makes the refcount what was computed.
    pub(super) fn fixes(&self, found: &Mismatch) -> bool {
        match self.mode {
            Repair::None => false,
            _ if self.blocked.is_some() => false,
            // Where structures overlap, only a repair of everything can say what the refcount should be.
            Repair::Leaks => {
                found.stored > found.count.references && !found.count.overlap() && self.incomplete.is_none()
            }
            Repair::All => found.stored < found.count.references || self.incomplete.is_none(),
        }
    }

    /// The refcount of a cluster in the file.
    pub(super) fn stored_refcount(&mut self, cluster: u64) -> u64 {
        let index = cluster >> self.geometry.refcount_block_bits();
        let Some(offset) = self.stored.blocks.get(&index).copied() else { return 0 };
        if !self.stored.cache.contains_key(&index) {
            if self.stored.cache.len() >= CACHED_BLOCKS {
                self.stored.cache.clear();
            }
            let mut block = vec![0; to_usize(self.geometry.cluster_size())];
            self.read(&mut block, offset);
            self.stored.cache.insert(index, block);
        }
        let within = cluster & (self.geometry.refcount_block_entries() - 1);
        self.stored
            .cache
            .get(&index)
            .map_or(0, |block| read_counter(block, within, self.geometry.refcount_order))
    }
}

/// The clusters that one refcount block counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a> {
    /// Index in the refcount table.
    pub(super) index: u64,
    /// The first cluster.
    pub(super) first: u64,
    /// Refcounts in the file; `None` if they cannot be known.
    pub(super) stored: Option<&'a [u64]>,
    /// Computed counts ([`Counts::decode`](super::counts::Counts::decode)).
    pub(super) slots: &'a [u16],
}
