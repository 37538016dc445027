//! Refcounts of another width.
//!
//! A second set of blocks and a table for them are written behind everything that the image uses, where nothing
//! refers to them; then one write of one sector makes the header name them. The new refcounts count themselves and
//! do not count the old ones, whose clusters are free from that write on. So there is nothing to clean up,
//! whichever side of it a crash falls on: until then the file is only longer than it need be.
//!
//! Two passes over the old refcounts, a block at a time: the first finds out whether every count fits and which of
//! the new blocks will be needed, the second writes them. Memory is bounded by the refcount table (8 MiB by the
//! format) and a few blocks.

use std::ops::Range;

use block::num::{low_u32, to_usize};
use block::{Error as BlockError, ErrorKind, Result, Storage};

use super::Steps;
use crate::flush::push_run;
use crate::geometry::{Geometry, MAX_REFCOUNT_TABLE_BYTES};
use crate::header::{Header, patch_first_sector};
use crate::l2::MAX_HOST_OFFSET;
use crate::refcount::{Refcounts, read_counter, write_counter};

/// Bytes for cached refcount blocks: each is looked at once per pass.
const CACHE: u64 = 1 << 20;
/// Specification, "Header": refcount_table_offset and refcount_table_clusters.
const TABLE_AT: u64 = 48;
/// Specification, "Header": refcount_order.
const ORDER_AT: u64 = 96;

/// Gives the image refcounts of `1 << order` bits. The image is closed, and of version 3 or to have 16 bits.
///
/// # Errors
/// A refcount that does not fit, in QEMU's words; no space; what `steps` returns; the host failed. Nothing has
/// changed then.
pub(super) fn change(
    storage: &dyn Storage,
    header: &Header,
    order: u32,
    steps: &mut Steps<'_>,
) -> Result<()> {
    let len = storage.len()?;
    let mut change = Change::new(storage, header, order)?;
    let written = change.survey(steps).and_then(|()| {
        let plan = change.plan(len)?;
        change.write(&plan, steps)?;
        Ok(plan)
    });
    let plan = written.inspect_err(|_| give_back(storage, len))?;
    let unused = change.unused().inspect_err(|_| give_back(storage, len))?;
    change.switch(&plan)?;
    for (offset, len) in unused {
        // The space that the host will not take back is no worse than any other free cluster.
        let _ = storage.discard_range(offset, len);
    }
    Ok(())
}

/// The file as long as it was: nothing refers to what has been added.
fn give_back(storage: &dyn Storage, len: u64) {
    if !storage.fixed_len() {
        // The error that led here is the one to report.
        let _ = storage.set_len(len);
    }
}

struct Change<'a> {
    storage: &'a dyn Storage,
    old: Geometry,
    new: Geometry,
    table_len: u64,
    counts: Refcounts,
    /// Clusters of the old table and blocks, ascending.
    own: Vec<Range<u64>>,
    /// One past the last cluster that is counted.
    end: u64,
    /// Which of the new blocks have something to count, a bit each.
    used: Vec<u64>,
}

/// Where the new refcounts go.
struct Plan {
    /// First cluster: of the table, which the blocks follow.
    base: u64,
    table_clusters: u64,
    /// Indices of the blocks, ascending: the used ones up to here...
    used: Vec<u64>,
    clusters: u64,
}

impl<'a> Change<'a> {
    fn new(storage: &'a dyn Storage, header: &Header, order: u32) -> Result<Self> {
        let old = header.geometry();
        let (offset, clusters) = (header.refcount_table_offset, header.refcount_table_clusters);
        let table = Refcounts::read_table(storage, &old, offset, clusters)?;
        let table_len = table.len() as u64;
        let counts = Refcounts::new(old, table, offset, clusters, CACHE);
        let mut own: Vec<_> = counts.block_offsets().map(|at| old.cluster_of(at)).map(|c| c..c + 1).collect();
        own.push(old.cluster_of(offset)..old.cluster_of(offset) + u64::from(clusters));
        own.sort_unstable_by_key(|range| range.start);
        let new = Geometry { refcount_order: order, ..old };
        Ok(Self { storage, old, new, table_len, counts, own, end: 0, used: vec![] })
    }

    /// Finds out what there is to count, and whether it can be.
    fn survey(&mut self, steps: &mut Steps<'_>) -> Result<()> {
        self.end = self.own.iter().map(|range| range.end).max().unwrap_or(0);
        for index in 0..self.table_len {
            if self.counts.block_offset(index).is_some() {
                steps.update(index, 2 * self.table_len)?;
                self.survey_block(index)?;
            }
        }
        Ok(())
    }

    fn survey_block(&mut self, index: u64) -> Result<()> {
        let (order, max) = (self.old.refcount_order, self.new.max_refcount());
        let first = index << self.old.refcount_block_bits();
        let Some(block) = self.counts.block(self.storage, index)? else { return Ok(()) };
        let (mut last, mut too_large) = (None, None);
        let mut used = vec![];
        for i in 0..self.old.refcount_block_entries() {
            let count = read_counter(block, i, order);
            if count == 0 {
                continue;
            }
            last = Some(first + i);
            let new_index = (first + i) >> self.new.refcount_block_bits();
            if used.last() != Some(&new_index) {
                used.push(new_index);
            }
            if count > max {
                too_large = Some((first + i, count));
                break;
            }
        }
        if let Some((cluster, count)) = too_large {
            return Err(BlockError::usage(format!(
                "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {count}",
                1u32 << self.new.refcount_order,
                self.old.offset_of(cluster),
            )));
        }
        self.end = self.end.max(last.map_or(0, |last| last + 1));
        used.into_iter().for_each(|index| self.mark(index));
        Ok(())
    }

    fn mark(&mut self, index: u64) {
        let word = to_usize(index / 64);
        if self.used.len() <= word {
            self.used.resize(word + 1, 0);
        }
        self.used[word] |= 1 << (index % 64);
    }

    /// Places the new refcounts behind everything else.
    fn plan(&mut self, len: u64) -> Result<Plan> {
        let in_file = if self.storage.fixed_len() { 0 } else { self.old.clusters_for(len) };
        let base = self.end.max(in_file);
        let bits = self.new.refcount_block_bits();
        let (mut blocks, mut table) = (0, 0);
        let used = self.used_blocks();
        let wanted = loop {
            let last = (base + table + blocks).saturating_sub(1).max(base) >> bits;
            let mut wanted = used.clone();
            wanted.extend((base >> bits..=last).filter(|index| used.last().is_none_or(|used| used < index)));
            let clusters = self.new.clusters_for((last + 1) * 8);
            if (wanted.len() as u64, clusters) == (blocks, table) {
                break wanted;
            }
            (blocks, table) = (wanted.len() as u64, clusters);
            self.check_size(base, table, blocks)?;
        };
        Ok(Plan { base, table_clusters: table, used: wanted, clusters: table + blocks })
    }

    fn check_size(&self, base: u64, table: u64, blocks: u64) -> Result<()> {
        let end = self.new.offset_of(base + table + blocks);
        if self.new.offset_of(table) > MAX_REFCOUNT_TABLE_BYTES || end > MAX_HOST_OFFSET {
            let text = "the refcount table would exceed its largest size";
            return Err(BlockError::new(ErrorKind::NoSpace, text));
        }
        if self.storage.fixed_len() && end > self.storage.len()? {
            return Err(BlockError::new(ErrorKind::NoSpace, "No space left on device"));
        }
        Ok(())
    }

    /// Indices of the new blocks that are needed for what there is, ascending.
    fn used_blocks(&self) -> Vec<u64> {
        let words = self.used.iter().zip(0u64..);
        let bits =
            words.flat_map(|(word, i)| (0..64).filter(move |b| word >> b & 1 != 0).map(move |b| 64 * i + b));
        bits.collect()
    }

    /// Writes the new blocks and their table. Durable when this returns.
    fn write(&mut self, plan: &Plan, steps: &mut Steps<'_>) -> Result<()> {
        let mut table = vec![0; to_usize(self.new.offset_of(plan.table_clusters))];
        let total = plan.used.len() as u64;
        for (index, done) in plan.used.iter().zip(0u64..) {
            steps.update(total + done, 2 * total)?;
            let offset = self.new.offset_of(plan.base + plan.table_clusters + done);
            let block = self.new_block(*index, plan)?;
            self.storage.write_at(&block, offset)?;
            table[to_usize(index * 8)..][..8].copy_from_slice(&offset.to_be_bytes());
        }
        self.storage.write_at(&table, self.new.offset_of(plan.base))?;
        self.storage.sync()?;
        steps.update(total, total)
    }

    /// The contents of a new block.
    fn new_block(&mut self, index: u64, plan: &Plan) -> Result<Vec<u8>> {
        let mut block = vec![0; to_usize(self.new.cluster_size())];
        let range = index << self.new.refcount_block_bits()..(index + 1) << self.new.refcount_block_bits();
        let old_bits = self.old.refcount_block_bits();
        for old_index in range.start >> old_bits..=(range.end - 1) >> old_bits {
            self.copy_counts(old_index, &range, &mut block)?;
        }
        let order = self.new.refcount_order;
        for cluster in within(&self.own, &range) {
            let at = cluster - range.start;
            let count = read_counter(&block, at, order);
            write_counter(&mut block, at, order, count.saturating_sub(1));
        }
        let new = plan.base..plan.base + plan.clusters;
        for cluster in within(std::slice::from_ref(&new), &range) {
            write_counter(&mut block, cluster - range.start, order, 1);
        }
        Ok(block)
    }

    /// Copies the counts of an old block that fall into `range`, for which `out` is.
    fn copy_counts(&mut self, old_index: u64, range: &Range<u64>, out: &mut [u8]) -> Result<()> {
        let (old_order, new_order) = (self.old.refcount_order, self.new.refcount_order);
        let start = old_index << self.old.refcount_block_bits();
        let end = start + self.old.refcount_block_entries();
        let Some(block) = self.counts.block(self.storage, old_index)? else { return Ok(()) };
        for cluster in start.max(range.start)..end.min(range.end) {
            let count = read_counter(block, cluster - start, old_order);
            write_counter(out, cluster - range.start, new_order, count);
        }
        Ok(())
    }

    /// Makes the header name the new refcounts: one write of one sector.
    fn switch(&self, plan: &Plan) -> Result<()> {
        let mut old = [0; 512];
        self.storage.read_at(&mut old, 0)?;
        let offset = self.new.offset_of(plan.base).to_be_bytes();
        let clusters = low_u32(plan.table_clusters).to_be_bytes();
        let order = self.new.refcount_order.to_be_bytes();
        let fields = [(TABLE_AT, &offset[..]), (TABLE_AT + 8, &clusters[..]), (ORDER_AT, &order[..])];
        patch_first_sector(self.storage, &fields).inspect_err(|_| {
            // Either set is complete, whichever the disk names now; better the one that it named before.
            let _ = self.storage.write_at(&old, 0).and_then(|()| self.storage.sync());
        })
    }

    /// What the old refcounts take and nobody else: (offset, length).
    fn unused(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut runs = vec![];
        for cluster in self.own.iter().flat_map(Clone::clone) {
            if self.counts.get(self.storage, cluster)? == 1 {
                push_run(&mut runs, self.old.offset_of(cluster), self.old.cluster_size());
            }
        }
        Ok(runs)
    }
}

/// The clusters of `ranges` (ascending) that lie in `window`.
fn within(ranges: &[Range<u64>], window: &Range<u64>) -> impl Iterator<Item = u64> {
    let (start, end) = (window.start, window.end);
    let first = ranges.partition_point(|range| range.end <= start);
    let inside = ranges[first..].iter().take_while(move |range| range.start < end);
    inside.flat_map(move |range| range.start.max(start)..range.end.min(end))
}
