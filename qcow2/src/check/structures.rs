//! Counting what is neither a mapping nor guest data: bitmaps' own structures, the LUKS header, and the refcount
//! structures themselves.

use std::collections::HashSet;

use block::Result;
use block::num::{is_aligned, to_usize};

use super::Check;
use super::counts::{EXCLUSIVE, overlaps};
use crate::bitmap;
use crate::l2::{MAX_HOST_OFFSET, OFFSET_MASK};

/// No LUKS header is larger: 8 slots of 4000 stripes of 64 bytes are 2 MiB.
const MAX_LUKS_HEADER: u64 = 64 << 20;
/// Reserved bits of a refcount table entry.
const TABLE_RESERVED: u64 = 0x1ff;

impl Check<'_> {
    /// Counts the LUKS header.
    pub(super) fn walk_luks_header(&mut self) {
        let Some((offset, len)) = self.header.luks else { return };
        if len > MAX_LUKS_HEADER {
            self.corrupt(1, || {
                format!("ERROR: the LUKS header at {offset:#x} has an impossible size {len:#x}")
            });
            self.not_followed("the size of the LUKS header is wrong");
            return;
        }
        self.metadata(offset, len, 1, EXCLUSIVE);
    }

    /// Counts the bitmap directory, the bitmaps' tables and their data.
    pub(super) fn walk_bitmaps(&mut self) -> Result<()> {
        let Some(extension) = &self.header.bitmaps else { return Ok(()) };
        let bitmaps = match bitmap::read_directory(self.storage, self.header) {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                self.failed(|| format!("ERROR: {error}"));
                return Ok(());
            }
        };
        self.metadata(extension.directory_offset, extension.directory_size, 1, EXCLUSIVE);
        let mut tables = vec![];
        for bitmap in &bitmaps {
            let (offset, len) = (bitmap.table_offset, bitmap.table_bytes());
            if self.countable(offset, len) {
                tables.push((offset, len));
            } else {
                self.reference(offset, len, 1, EXCLUSIVE);
                self.not_followed("the table of a bitmap lies outside the file");
            }
        }
        self.shared_metadata(&tables);
        for (start, end, depth) in overlaps(tables.iter().copied()) {
            self.for_each_word(start, end - start, |check, _, entry| check.bitmap_data(entry, depth))?;
        }
        Ok(())
    }

    /// Counts a cluster of a bitmap's data. Specification, "Bitmap table": bits 9 to 55 are its offset; bit 0
    /// may be set if there is none.
    fn bitmap_data(&mut self, entry: u64, count: u64) {
        let offset = entry & OFFSET_MASK;
        let flags = entry & !OFFSET_MASK;
        if flags & !1 != 0 || (offset != 0 && flags != 0) || !is_aligned(offset, self.geometry.cluster_size())
        {
            self.failed(|| format!("ERROR bitmap table entry {entry:#x} is invalid"));
        } else if offset != 0 {
            self.reference(offset, self.geometry.cluster_size(), count, EXCLUSIVE);
        }
    }

    /// Reads the refcount table, and counts it and the refcount blocks.
    pub(super) fn walk_refcount_structures(&mut self) -> Result<()> {
        let offset = self.header.refcount_table_offset;
        let len = self.geometry.offset_of(self.header.refcount_table_clusters.into());
        if len == 0 || offset == 0 {
            self.damaged_refcounts("there is no refcount table");
        }
        if self.metadata(offset, len, 1, EXCLUSIVE) {
            if offset + len > self.file_len {
                self.damaged_refcounts("the refcount table is cut off");
            }
            let first = self.geometry.cluster_of(offset);
            self.stored.counted.extend(first..first + u64::from(self.header.refcount_table_clusters));
        } else {
            self.damaged_refcounts("the refcount table lies outside the file");
        }
        let mut table = vec![0; to_usize(len.min(self.file_len.saturating_sub(offset)) / 8)];
        self.for_each_word(offset, len, |_, index, entry| table[to_usize(index)] = entry)?;
        let mut seen = HashSet::new();
        for (index, entry) in (0..).zip(table).filter(|(_, entry)| *entry != 0) {
            self.refcount_block(index, entry, &mut seen);
        }
        self.refcount_table_alone();
        Ok(())
    }

    /// A refcount table that shares its clusters with something else is moved away.
    fn refcount_table_alone(&mut self) {
        let shared = self.stored.counted.iter().any(|cluster| self.counts.get(*cluster).references > 1);
        if shared {
            self.damaged_refcounts("the refcount structures overlap others");
        }
    }

    fn refcount_block(&mut self, index: u64, entry: u64, seen: &mut HashSet<u64>) {
        let offset = entry & !TABLE_RESERVED;
        self.stored.named.insert(self.geometry.cluster_of(offset));
        let fault = if entry & TABLE_RESERVED != 0 {
            format!("ERROR refcount table entry {index} has reserved bits set")
        } else if !is_aligned(offset, self.geometry.cluster_size()) {
            self.stored.unreadable.insert(index);
            format!("ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
        } else if offset >= self.file_len {
            format!("ERROR refcount block {index} is outside image")
        } else {
            let known = offset < MAX_HOST_OFFSET && self.metadata(offset, self.geometry.cluster_size(), 1, 0);
            if offset + self.geometry.cluster_size() > self.file_len {
                self.damaged_refcounts("a refcount block is cut off");
            }
            if known {
                self.stored.counted.push(self.geometry.cluster_of(offset));
            }
            match self.counts.get(self.geometry.cluster_of(offset)).references {
                1 if known => {
                    seen.insert(offset);
                    self.stored.blocks.insert(index, offset);
                    return;
                }
                references => format!("ERROR refcount block {index} refcount={references}"),
            }
        };
        // QEMU goes on with what it can make of the entry, and so the counts of problems agree. A block that
        // serves twice is read once.
        let usable =
            is_aligned(offset, self.geometry.cluster_size()) && offset != 0 && offset < self.file_len;
        if usable && seen.insert(offset) {
            self.stored.blocks.insert(index, offset);
        }
        self.corrupt(1, || fault);
        self.damaged_refcounts("the refcount structures are damaged");
    }
}
