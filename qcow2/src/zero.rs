//! Zeros and discards: changing what a guest cluster reads as without writing it.
//!
//! Version 3 has a flag for it; version 2 can only let go of a cluster, and only where no backing file would
//! show. What is not a whole (sub)cluster has to be written.

use block::num::{align_down, align_up, to_usize};
use block::{BlockDevice, Error as BlockError, Result, ZeroMode};

use crate::device::Qcow2;
use crate::l2::Entry;
use crate::write::ZEROS;

/// What is to become zeros as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    /// A part of the disk.
    Disk,
    /// The same, and the tables say so even where nothing lies behind.
    Own,
    /// What lies past the end of the disk and is about to become a part of it, or has been one.
    Beyond,
}

impl Qcow2 {
    /// Makes a range read as zeros.
    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_write(offset, len)?;
        self.record(offset, len)?;
        self.zero_unrecorded(offset, len, mode)
    }

    /// The same without a note in the bitmaps: for what is not a write of the guest's.
    pub(crate) fn zero_unrecorded(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_write(offset, len)?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            at += self.zero_some(at, end, mode)?;
        }
        Ok(())
    }

    /// Makes a range read as zeros whatever backing file the image has now or will have: every (sub)cluster of it
    /// says so itself, also where nothing lies behind it at present. The range should consist of whole
    /// (sub)clusters (the end of the disk counts as the end of one); what does not is written.
    ///
    /// # Errors
    /// As [`write_zeroes_at`](BlockDevice::write_zeroes_at).
    pub fn write_own_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        self.record(offset, len)?;
        let (mut at, end) = (offset, offset + len);
        let unit = self.geometry.subcluster_size();
        let whole_end = align_down(self.effective_end(end, unit), unit);
        while at < end {
            let whole = block::num::is_aligned(at, unit) && at < whole_end && self.version >= 3;
            let piece = match whole {
                true => self.zero_piece_len(at, whole_end - at),
                false => (align_down(at, unit) + unit).min(end) - at,
            };
            if whole && !self.external_raw {
                self.zero_whole(at, piece, ZeroMode::UNMAP, Whole::Own)?;
            } else {
                self.zero_by_writing(at, piece.min(end - at), ZeroMode::ALLOCATE)?;
            }
            at += piece.min(end - at);
        }
        Ok(())
    }

    /// Where a range that reaches the end of the disk ends for the purpose of whole (sub)clusters.
    fn effective_end(&self, end: u64, unit: u64) -> u64 {
        if end == self.size() { align_up(end, unit).unwrap_or(end) } else { end }
    }

    /// Zeroes the first bytes of `at..end`. Returns how many.
    fn zero_some(&self, at: u64, end: u64, mode: ZeroMode) -> Result<u64> {
        let unit = self.geometry.subcluster_size();
        let whole_end = align_down(self.effective_end(end, unit), unit);
        if !self.has_table(at) && !self.backed(at) && !self.external_raw {
            // Nothing is stored in the whole range of this L1 entry.
            let coverage = self.geometry.l2_coverage();
            return Ok((coverage - (at & (coverage - 1))).min(end - at));
        }
        if !block::num::is_aligned(at, unit) || at >= whole_end {
            let piece = (align_down(at, unit) + unit).min(end) - at;
            self.zero_partly(at, piece, mode)?;
            return Ok(piece);
        }
        let len = self.zero_piece_len(at, whole_end - at);
        self.zero_whole(at, len, mode, Whole::Disk)?;
        Ok(len.min(end - at))
    }

    /// As [`piece_len`](Self::piece_len), within one L1 entry, and not more than one cluster unless whole
    /// clusters.
    pub(crate) fn zero_piece_len(&self, at: u64, len: u64) -> u64 {
        let cluster = self.geometry.cluster_size();
        let within = self.geometry.in_cluster(at);
        if within != 0 || len < cluster {
            return len.min(cluster - within);
        }
        let coverage = self.geometry.l2_coverage();
        let table_rest = coverage - (at & (coverage - 1));
        align_down(self.piece_len(at, len.min(table_rest)), cluster)
    }

    /// Zeros in a part of a subcluster: only by writing, unless it reads as zeros anyway.
    fn zero_partly(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let (first, last) = self.clusters(at, len);
        {
            let _held = self.stripes.shared(first, last);
            if !self.external_raw && self.reads_zero(at, len)? {
                return Ok(());
            }
        }
        self.zero_by_writing(at, len, mode)
    }

    fn zero_by_writing(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        if mode.no_fallback {
            return Err(BlockError::unsupported("zeros can only be written byte by byte here"));
        }
        let len = len.min(self.rest_of_disk(at));
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZEROS.len() as u64);
            self.write_piece(&ZEROS[..to_usize(piece)], at + done)?;
            done += piece;
        }
        Ok(())
    }

    /// The same past the end of the disk.
    pub(crate) fn zero_whole_beyond(&self, at: u64, len: u64) -> Result<()> {
        self.zero_whole(at, len, ZeroMode::UNMAP, Whole::Beyond)
    }

    /// Zeros in whole subclusters of one cluster, or in whole clusters of one L2 table.
    fn zero_whole(&self, at: u64, len: u64, mode: ZeroMode, whole: Whole) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.clusters(at, len);
        if self.external_raw {
            return self.zero_raw_data(at, len, mode);
        }
        if self.version < 3 && (self.backed(at) || !mode.may_unmap) {
            return self.zero_partly(at, len, mode);
        }
        let held = self.stripes.exclusive(first, last);
        if whole != Whole::Beyond {
            self.check_overtaken(last)?;
        }
        let mask = self.touched(self.geometry.in_cluster(at), len.min(self.geometry.cluster_size()));
        if mask != Entry::all_subclusters(&self.geometry)
            && matches!(self.entry_at(at)?, Entry::Compressed { .. })
        {
            drop(held);
            return self.zero_by_writing(at, len, mode);
        }
        self.with_meta(|meta| self.ensure_tables(meta, first, last))?;
        let start = self.geometry.offset_of(first);
        self.link(at, last - first + 1, |i, old| {
            self.zeroed(
                old,
                mask,
                mode,
                whole == Whole::Own || self.backed(start + self.geometry.offset_of(i)),
            )
        })
    }

    /// The entry of a cluster of which the subclusters in `mask` become zeros.
    fn zeroed(&self, old: Entry, mask: u32, mode: ZeroMode, backed: bool) -> Entry {
        let all = Entry::all_subclusters(&self.geometry);
        if self.version < 3 {
            return Entry::UNALLOCATED;
        }
        match old {
            Entry::Compressed { .. } => Entry::Plain { host: None, copied: false, allocated: 0, zero: all },
            Entry::Plain { host: None, allocated: 0, zero: 0, .. } if !backed => old,
            Entry::Plain { host, copied, allocated, zero } => {
                let (allocated, zero) = (allocated & !mask, zero | mask);
                let keep = self.external || (copied && !mode.may_unmap);
                let host = host.filter(|_| allocated != 0 || zero != all || keep);
                Entry::Plain { host, copied: copied && host.is_some(), allocated, zero }
            }
        }
    }

    /// With `data_file_raw` zeros are zeros in the data file.
    fn zero_raw_data(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let (first, last) = self.clusters(at, len);
        {
            let _held = self.stripes.exclusive(first, last);
            self.check_overtaken(last)?;
            let len = len.min(self.rest_of_disk(at));
            if !self.is_encrypted() && self.in_place_runs(at, len)?.is_some() {
                return self.data.zero_range(at, len, mode);
            }
        }
        self.zero_by_writing(at, len, mode)
    }

    /// Gives back whole clusters of a range.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        self.record(offset, len)?;
        let cluster = self.geometry.cluster_size();
        let end = align_down(self.effective_end(offset + len, cluster), cluster);
        let mut at = align_up(offset, cluster).unwrap_or(end);
        while at < end {
            if !self.has_table(at) {
                let coverage = self.geometry.l2_coverage();
                at += coverage - (at & (coverage - 1));
                continue;
            }
            let piece = self.zero_piece_len(at, end - at);
            self.discard_clusters(at, piece)?;
            at += piece;
        }
        Ok(())
    }

    /// Discards whole clusters of one L2 table. They read as zeros afterwards; where a version 2 image would
    /// show its backing file instead, nothing is done.
    fn discard_clusters(&self, at: u64, len: u64) -> Result<()> {
        if self.external_raw {
            return self.zero_raw_data(at, len, ZeroMode::UNMAP);
        }
        let backed = self.backing.is_some();
        if self.version < 3 && backed {
            return Ok(());
        }
        self.throttle()?;
        let (first, last) = self.clusters(at, len);
        let _held = self.stripes.exclusive(first, last);
        self.check_overtaken(last)?;
        if self.external {
            self.data.discard_range(at, len.min(self.rest_of_disk(at)))?;
        }
        self.with_meta(|meta| self.ensure_tables(meta, first, last))?;
        let gone = match backed || self.external {
            true => Entry::Plain {
                host: None,
                copied: false,
                allocated: 0,
                zero: Entry::all_subclusters(&self.geometry),
            },
            false => Entry::UNALLOCATED,
        };
        self.link(at, last - first + 1, |_, old| match old {
            Entry::Plain { host: None, .. } => old,
            _ => gone,
        })
    }
}
