//! Following the L1 and L2 tables.
//!
//! Snapshots share L2 tables with each other and with the active L1 table, and a hostile image shares one
//! among millions of entries. So the uses of every L2 table are added up first, and each table is then read
//! once and counted as often as it is used: the work is bounded by the file.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use block::image::Repair;
use block::num::{is_aligned, to_usize};
use block::{Result, Storage};

use super::Check;
use super::counts::{COPIED, DATA, EXCLUSIVE, L2_TABLE, NOT_COPIED, overlaps};
use crate::l2;

/// L1 and bitmap tables are read in pieces of this many bytes.
const CHUNK: u64 = 1 << 20;

/// Who uses an L2 table.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Uses {
    /// Entries of the active L1 table.
    pub(super) active: u64,
    /// Entries of the snapshots' L1 tables.
    pub(super) snapshots: u64,
    /// The first active entry.
    pub(super) l1_index: u64,
}

impl Uses {
    fn total(&self) -> u64 {
        self.active + self.snapshots
    }
}

/// All L2 tables by their host offset, and the active ones in the order of the disk.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) uses: HashMap<u64, Uses>,
    pub(super) active: Vec<u64>,
}

/// The L2 entry at hand.
#[derive(Debug, Clone, Copy)]
struct Place {
    uses: Uses,
    /// Index in its table.
    index: u64,
}

/// Reads L2 tables for [`Check::walk_l2_tables`] in batches, several at a time where the host has to be waited for.
#[derive(Debug, Clone, Copy)]
struct Ahead<'a> {
    storage: &'a dyn Storage,
    table_bytes: usize,
}

impl Ahead<'_> {
    /// Bytes of tables in a batch, of which two are held at a time.
    const BATCH: usize = 1 << 20;
    /// Reading a batch takes longer than this if it is not in the host's cache.
    const CACHED: Duration = Duration::from_millis(4);
    /// Tables in a batch at most.
    const MAX_TABLES: usize = 64;
    /// Tables that are read at the same time.
    const READERS: usize = 4;

    /// Tables in a batch.
    fn batch(&self) -> usize {
        (Self::BATCH / self.table_bytes).clamp(1, Self::MAX_TABLES)
    }

    /// Reads a batch.
    fn read(&self, tables: &[u64], in_parallel: bool) -> Vec<Result<Vec<u8>>> {
        let per_reader = match in_parallel {
            true => tables.len().div_ceil(Self::READERS),
            false => tables.len(),
        };
        let mut parts = tables.chunks(per_reader.max(1));
        let Some(own) = parts.next() else { return vec![] };
        std::thread::scope(|scope| {
            let readers: Vec<_> = parts.map(|part| (part, scope.spawn(|| self.read_part(part)))).collect();
            let mut read = self.read_part(own);
            for (part, reader) in readers {
                read.extend(reader.join().unwrap_or_else(|_| self.read_part(part)));
            }
            read
        })
    }

    fn read_part(&self, tables: &[u64]) -> Vec<Result<Vec<u8>>> {
        let read = |offset: &u64| {
            let mut bytes = vec![0; self.table_bytes];
            self.storage.read_at(&mut bytes, *offset).map(|()| bytes)
        };
        tables.iter().map(read).collect()
    }
}

impl Check<'_> {
    /// Counts the active L1 table and notes the L2 tables that it uses.
    pub(super) fn walk_active_l1(&mut self) -> Result<()> {
        let (offset, len) = (self.header.l1_table_offset, u64::from(self.header.l1_size) * 8);
        if !self.metadata(offset, len, 1, EXCLUSIVE) {
            self.not_followed("the active L1 table lies outside the file");
        }
        self.for_each_word(offset, len, |check, index, entry| check.l1_entry(entry, 1, Some(index)))
    }

    /// Counts the snapshots' L1 tables and notes the L2 tables that they use.
    pub(super) fn walk_snapshot_l1(&mut self, tables: &[(u64, u64)]) -> Result<()> {
        self.shared_metadata(tables);
        for (start, end, depth) in overlaps(tables.iter().copied()) {
            self.for_each_word(start, end - start, |check, _, entry| check.l1_entry(entry, depth, None))?;
        }
        Ok(())
    }

    /// Counts tables that may be one and the same.
    pub(super) fn shared_metadata(&mut self, tables: &[(u64, u64)]) {
        let cluster_size = self.geometry.cluster_size();
        let rounded = tables.iter().map(|(offset, len)| (*offset, len.next_multiple_of(cluster_size)));
        for (start, end, depth) in overlaps(rounded) {
            let clusters = self.geometry.cluster_of(start)..self.geometry.cluster_of(end);
            self.exclusive.push((clusters.start, clusters.end));
            for cluster in clusters {
                self.counts.add(cluster, depth, EXCLUSIVE);
            }
        }
    }

    /// Calls `visit` with index and value of every word but 0 of a table, as far as the file has it.
    pub(super) fn for_each_word(
        &mut self,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(&mut Self, u64, u64),
    ) -> Result<()> {
        let len = len.min(self.file_len.saturating_sub(offset)) & !7;
        let mut position = 0;
        while position < len {
            let mut bytes = vec![0; to_usize(CHUNK.min(len - position))];
            if self.read(&mut bytes, offset + position) {
                for (index, word) in (position / 8..).zip(bytes.as_chunks::<8>().0) {
                    if *word != [0; 8] {
                        visit(self, index, u64::from_be_bytes(*word));
                    }
                }
            }
            position += CHUNK;
        }
        Ok(())
    }

    /// Looks at an L1 entry that is used `count` times; `index` if it is an active one.
    fn l1_entry(&mut self, entry: u64, count: u64, index: Option<u64>) {
        let offset = entry & l2::OFFSET_MASK;
        if entry & l2::L1_RESERVED != 0 {
            self.corrupt(count, || format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
        }
        if offset == 0 {
            if entry & l2::COPIED != 0 {
                self.corrupt(count, || {
                    format!("ERROR L1 entry with the COPIED flag, but no L2 table: {entry:x}")
                });
            }
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        if !is_aligned(offset, cluster_size) || !self.countable(offset, cluster_size) {
            self.bad_l1_entry(offset, count, index.is_some());
            return;
        }
        let uses = self.tables.uses.entry(offset).or_default();
        match index {
            None => uses.snapshots += count,
            Some(index) => {
                if uses.active == 0 {
                    uses.l1_index = index;
                    self.tables.active.push(offset);
                }
                uses.active += count;
                let flag = if entry & l2::COPIED != 0 { COPIED } else { NOT_COPIED };
                self.counts.mark(self.geometry.cluster_of(offset), flag);
            }
        }
    }

    /// Such a table is not followed: what it would lead to is garbage.
    fn bad_l1_entry(&mut self, offset: u64, count: u64, active: bool) {
        self.reference(offset, self.geometry.cluster_size(), count, DATA);
        if !is_aligned(offset, self.geometry.cluster_size()) {
            self.corrupt(count, || {
                format!("ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            });
        }
        self.copied_suspect |= active;
        self.not_followed("an L1 entry does not point to an L2 table");
    }

    /// Reads every L2 table once: the active ones in the order of the disk, then those of snapshots alone.
    pub(super) fn walk_l2_tables(&mut self) -> Result<()> {
        let active = self.tables.active.clone();
        let mut others: Vec<u64> =
            self.tables.uses.iter().filter(|(_, uses)| uses.active == 0).map(|(offset, _)| *offset).collect();
        others.sort_unstable();
        let tables = [active, others].concat();
        let ahead = Ahead { storage: self.storage, table_bytes: to_usize(self.geometry.cluster_size()) };
        let mut batches = tables.chunks(ahead.batch());
        let Some(mut batch) = batches.next() else { return Ok(()) };
        let started = Instant::now();
        let mut read = ahead.read(batch, false);
        // Threads pay where the host has to be waited for, and cost more than they bring on its cache.
        let waits = started.elapsed() > Ahead::CACHED;
        for next in batches {
            if !waits {
                self.count_l2_tables(batch, read);
                (batch, read) = (next, ahead.read(next, false));
                continue;
            }
            // While one batch is being counted, the next one is being read.
            let next_read = std::thread::scope(|scope| {
                let reader = scope.spawn(|| ahead.read(next, true));
                self.count_l2_tables(batch, read);
                reader.join()
            });
            read = next_read.unwrap_or_else(|_| ahead.read(next, false));
            batch = next;
        }
        self.count_l2_tables(batch, read);
        Ok(())
    }

    fn count_l2_tables(&mut self, tables: &[u64], read: Vec<Result<Vec<u8>>>) {
        for (offset, bytes) in tables.iter().zip(read) {
            let uses = self.tables.uses.get(offset).copied().unwrap_or_default();
            self.metadata(*offset, self.geometry.cluster_size(), uses.total(), L2_TABLE);
            match bytes {
                Ok(bytes) => self.walk_l2_table(&bytes, uses),
                Err(error) => self.unreadable(self.geometry.cluster_size(), *offset, &error),
            }
        }
    }

    fn walk_l2_table(&mut self, bytes: &[u8], uses: Uses) {
        self.next_contiguous = 0;
        if self.geometry.extended_l2 {
            for (index, entry) in (0..).zip(bytes.as_chunks::<16>().0) {
                let both = u128::from_be_bytes(*entry);
                if both != 0 {
                    let bitmap = u64::try_from(both & u128::from(u64::MAX)).unwrap_or(0);
                    let word = u64::try_from(both >> 64).unwrap_or(0);
                    self.l2_entry(word, bitmap, Place { uses, index });
                }
            }
        } else {
            for (index, word) in (0..).zip(bytes.as_chunks::<8>().0) {
                if *word != [0; 8] {
                    self.l2_entry(u64::from_be_bytes(*word), 0, Place { uses, index });
                }
            }
        }
    }

    fn l2_entry(&mut self, word: u64, bitmap: u64, place: Place) {
        match word & l2::COMPRESSED {
            0 => self.plain_entry(word, bitmap, place),
            _ => self.compressed_entry(word, bitmap, place),
        }
    }

    fn compressed_entry(&mut self, word: u64, bitmap: u64, place: Place) {
        let count = place.uses.total();
        let bits = self.geometry.compressed_offset_bits();
        let offset = word & ((1 << bits) - 1);
        let sectors = ((word & (l2::COMPRESSED - 1)) >> bits) + 1;
        if word & l2::COPIED != 0 {
            self.corrupt(count, || {
                format!("ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters")
            });
        }
        let index = place.index;
        if self.external {
            self.corrupt(count, || {
                format!("ERROR compressed cluster {index} with data file, entry={word:#x}")
            });
            return;
        }
        if bitmap != 0 {
            self.corrupt(count, || {
                format!("ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={word:#x}")
            });
            self.not_followed("a compressed cluster has a subcluster bitmap");
            return;
        }
        self.reference(offset, sectors * 512 - offset % 512, count, DATA);
        self.report.allocated_clusters += place.uses.active;
        self.report.compressed_clusters += place.uses.active;
        self.report.fragmented_clusters += place.uses.active;
    }

    fn plain_entry(&mut self, word: u64, bitmap: u64, place: Place) {
        let count = place.uses.total();
        let offset = word & l2::OFFSET_MASK;
        let copied = word & l2::COPIED != 0;
        let host = offset != 0 || (self.external && copied);
        self.check_reserved(word, count);
        let has_data = match self.geometry.extended_l2 {
            true => self.check_bitmap(host, offset, bitmap, count),
            false => word & l2::ZERO == 0,
        };
        if !host {
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        if !is_aligned(offset, cluster_size) {
            let drops = self.mode == Repair::All && self.is_bad_zero_place(word, bitmap);
            let verb = if drops { "Repairing" } else { "ERROR" };
            let kind = if has_data { "Data" } else { "Preallocated" };
            self.corrupt(count, || {
                format!(
                    "{verb} offset={offset:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
                )
            });
            if drops {
                self.bad_zero_places += 1;
                return;
            }
        }
        self.count_allocated(offset, place.uses.active);
        if self.external {
            self.external_data(offset, copied, has_data, place);
            return;
        }
        let flag = match (place.uses.active, copied) {
            (0, _) => 0,
            (_, true) => COPIED,
            (_, false) => NOT_COPIED,
        };
        if !self.reference(offset, cluster_size, count, DATA | flag) {
            self.copied_suspect |= flag != 0;
        }
    }

    fn check_reserved(&mut self, word: u64, count: u64) {
        // QEMU masks bit 0 where it means nothing and calls such images clean, yet refuses to read version 2
        // clusters that have it. What our own reader refuses is not clean.
        let no_zero_flag = self.geometry.extended_l2 || self.header.version < 3;
        let reserved = l2::L2_RESERVED | if no_zero_flag { l2::ZERO } else { 0 };
        if word & reserved != 0 {
            self.corrupt(count, || format!("ERROR found l2 entry with reserved bits set: {word:x}"));
        }
    }

    /// Checks a subcluster bitmap; returns whether the cluster holds data.
    fn check_bitmap(&mut self, host: bool, offset: u64, bitmap: u64, count: u64) -> bool {
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        if !host && allocated != 0 {
            self.corrupt(count, || {
                "ERROR: Unallocated cluster has non-zero subcluster allocation map".into()
            });
        } else if allocated & zero != 0 {
            self.corrupt(count, || {
                format!(
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                )
            });
        }
        allocated != 0
    }

    /// Statistics: a cluster that does not follow the one before it in the same table is fragmented.
    fn count_allocated(&mut self, offset: u64, active: u64) {
        self.report.allocated_clusters += active;
        if self.next_contiguous != 0 && self.next_contiguous != offset {
            self.report.fragmented_clusters += active;
        }
        self.next_contiguous = offset + self.geometry.cluster_size();
    }

    /// Specification, "Header", external data file bit: "the offset [..] must match the guest offset".
    fn external_data(&mut self, offset: u64, copied: bool, has_data: bool, place: Place) {
        self.copied_suspect |= !copied;
        if place.uses.active != 1 {
            return;
        }
        let cluster = place.uses.l1_index * self.geometry.l2_entries() + place.index;
        let guest = self.geometry.offset_of(cluster);
        let len = self.data_file_len;
        if offset != guest && is_aligned(offset, self.geometry.cluster_size()) {
            self.corrupt(1, || {
                format!("ERROR data of guest offset {guest:#x} is at {offset:#x} of the data file")
            });
        } else if has_data && len.is_some_and(|len| offset >= len) {
            self.corrupt(1, || {
                format!("ERROR data of guest offset {guest:#x} lies past the end of the data file")
            });
        }
    }
}
