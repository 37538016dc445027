//! Writing: in place where the cluster is ours alone, else into a new host cluster that is linked once the
//! bytes are in it.
//!
//! An allocating write goes through three steps. *Allocate*, under the metadata lock: host clusters and, if
//! need be, an L2 table. *Write*, without it: the new bytes together with what of the old contents shares
//! their (sub)clusters. *Link*, under the lock again: the L2 entries. The guest clusters are held exclusively
//! throughout, so nobody sees the steps in between; if the second fails, the first is undone.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::device::check_range;
use block::num::{align_down, align_up, low_u32, to_usize};
use block::{BlockDevice, Compressed, Error as BlockError, Preallocation, Result, Storage, ZeroMode};

use crate::alloc::{Meta, Run};
use crate::cache::Slice;
use crate::device::{Mapped, Qcow2};
use crate::l2::{COPIED, Entry, OFFSET_MASK};

/// Zeros to write from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What surrounds the bytes of a write in the clusters that it allocates.
enum Fill {
    /// Nothing to write: no bytes, or zeros that are there already.
    Nothing,
    /// So many zeros.
    Zeros(u64),
    /// Old contents.
    Bytes(Vec<u8>),
}

impl Fill {
    fn len(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Zeros(len) => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// Writes zeros piece by piece.
pub(crate) fn write_zeros(storage: &dyn Storage, mut offset: u64, mut len: u64) -> Result<()> {
    while len > 0 {
        let piece = len.min(ZEROS.len() as u64);
        storage.write_at(&ZEROS[..to_usize(piece)], offset)?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}

impl Qcow2 {
    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        if !self.writable {
            return Err(BlockError::read_only());
        }
        self.check_readable()
    }

    /// Whether the backing device has bytes in the range.
    pub(crate) fn backed(&self, guest: u64) -> bool {
        self.backing.as_ref().is_some_and(|backing| guest < backing.size())
    }

    /// Bytes from `at` to the end of the disk, which a resize may have moved since the request was checked.
    fn rest_of_disk(&self, at: u64) -> u64 {
        self.size().saturating_sub(at)
    }

    /// The entry of the cluster that contains a guest byte.
    fn entry_at(&self, guest: u64) -> Result<Entry> {
        match self.l2_table(guest)? {
            None => Ok(Entry::UNALLOCATED),
            Some(table) => {
                let (slice, index) = self.slice(table, guest)?;
                self.decode(&slice, index, guest)
            }
        }
    }

    /// The subclusters of a cluster that `within..within + len` (bytes from its start) touches, as bits.
    fn touched(&self, within: u64, len: u64) -> u32 {
        let size = self.geometry.subcluster_size();
        let (first, last) = (within / size, (within + len - 1) / size);
        let bits = (u64::MAX >> (63 - (last - first))) << first;
        low_u32(bits & 0xffff_ffff)
    }

    /// Writes `buf`, wherever it has to go.
    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let len = to_usize(self.piece_len(at, (buf.len() - done) as u64));
            self.write_piece(&buf[done..done + len], at)?;
            done += len;
        }
        Ok(())
    }

    fn write_piece(&self, buf: &[u8], guest: u64) -> Result<()> {
        let (first, last) = self.clusters(guest, buf.len() as u64);
        {
            let _held = self.stripes.shared(first, last);
            if let Some(runs) = self.in_place_runs(guest, buf.len() as u64)? {
                return self.write_runs(buf, guest, &runs);
            }
        }
        self.throttle()?;
        let _held = self.stripes.exclusive(first, last);
        self.write_allocating(buf, guest)
    }

    /// Where the bytes of a range lie, if all of it can be written in place: (host offset, length).
    fn in_place_runs(&self, guest: u64, len: u64) -> Result<Option<Vec<(u64, u64)>>> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut at = guest;
        while at < guest + len {
            let within = self.geometry.in_cluster(at);
            let piece = (self.geometry.cluster_size() - within).min(guest + len - at);
            match self.entry_at(at)? {
                Entry::Plain { host: Some(host), copied: true, allocated, .. }
                    if self.touched(within, piece) & !allocated == 0 =>
                {
                    match runs.last_mut() {
                        Some((start, total)) if *start + *total == host + within => *total += piece,
                        _ => runs.push((host + within, piece)),
                    }
                }
                _ => return Ok(None),
            }
            at += piece;
        }
        Ok(Some(runs))
    }

    fn write_runs(&self, buf: &[u8], guest: u64, runs: &[(u64, u64)]) -> Result<()> {
        let mut rest = buf;
        let mut at = guest;
        for (host, len) in runs {
            let (piece, tail) = rest.split_at(to_usize(*len));
            self.check_place(at, *host, *len)?;
            self.data.write_at(piece, *host)?;
            at += len;
            rest = tail;
        }
        Ok(())
    }

    /// Guest data must not be written over metadata, nor so far past the end of the file that only a lie in a table
    /// can have led there (space that has been given out need not be in the file yet).
    fn check_place(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if !self.external && !self.is_inside(host + len)? && host + len > self.meta.lock().allocation_end() {
            self.check_data(guest, host, len)?;
        }
        self.check_data_overlap(guest, host, len).inspect_err(|_| self.mark_corrupt())
    }

    /// Writes a range whose clusters are held exclusively.
    fn write_allocating(&self, buf: &[u8], guest: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = guest + done as u64;
            done += self.write_some(&buf[done..], at)?;
        }
        Ok(())
    }

    /// Writes the first bytes of `buf`, as many as go into one place. Returns how many.
    fn write_some(&self, buf: &[u8], guest: u64) -> Result<usize> {
        let within = self.geometry.in_cluster(guest);
        let piece = (self.geometry.cluster_size() - within).min(buf.len() as u64);
        let entry = self.entry_at(guest)?;
        match entry {
            Entry::Plain { host: Some(host), copied: true, allocated, zero } => {
                let bytes = &buf[..to_usize(piece)];
                let touched = self.touched(within, piece);
                if touched & !allocated == 0 {
                    self.write_runs(bytes, guest, &[(host + within, piece)])?;
                } else {
                    // The table may be a snapshot's even if the cluster is not (a crash of whoever deleted the snapshot).
                    let cluster = self.geometry.cluster_of(guest);
                    self.with_meta(|meta| self.ensure_tables(meta, cluster, cluster))?;
                    self.write_into_host(bytes, guest, host)?;
                    let entry = Entry::Plain {
                        host: Some(host),
                        copied: true,
                        allocated: allocated | touched,
                        zero: zero & !touched,
                    };
                    self.link(guest, 1, |_, _| entry)?;
                }
                Ok(bytes.len())
            }
            _ => self.write_new(buf, guest, entry),
        }
    }

    /// Writes into a host cluster that is set aside already, with what surrounds the bytes in subclusters that
    /// are not filled yet.
    fn write_into_host(&self, buf: &[u8], guest: u64, host: u64) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let end = guest + buf.len() as u64;
        let head = self.old_contents(align_down(guest, size), guest, false)?;
        let tail_end = align_up(end, size).unwrap_or(end);
        let tail = self.old_contents(end, tail_end, false)?;
        let start = host + self.geometry.in_cluster(guest) - head.len();
        self.check_place(guest, start, head.len() + buf.len() as u64 + tail.len())?;
        self.write_filled(&head, buf, &tail, start)
    }

    /// Allocates clusters for the first bytes of `buf` and for as many following clusters as also need new ones,
    /// and writes them.
    fn write_new(&self, buf: &[u8], guest: u64, first_entry: Entry) -> Result<usize> {
        let wanted = self.new_clusters(guest, buf.len() as u64)?;
        let run = self.allocate_data(guest, wanted)?;
        let start = self.geometry.offset_of(self.geometry.cluster_of(guest));
        let end = (start + self.geometry.offset_of(run.clusters)).min(guest + buf.len() as u64);
        let last_entry = if run.clusters == 1 {
            first_entry
        } else {
            self.entry_at(end - 1).inspect_err(|_| self.undo(run))?
        };
        let bytes = &buf[..to_usize(end - guest)];
        let written = self.write_surrounded(bytes, guest, run, first_entry, last_entry);
        written.inspect_err(|_| self.undo(run))?;
        let cluster = self.geometry.cluster_size();
        let linked = self.link(guest, run.clusters, |i, old| {
            let at = start + self.geometry.offset_of(i);
            let from = guest.max(at) - at;
            let to = end.min(at + cluster) - at;
            self.entry_for_new(old, run.offset + self.geometry.offset_of(i), self.touched(from, to - from))
        });
        linked.inspect_err(|_| self.undo(run))?;
        Ok(bytes.len())
    }

    /// The entry of a cluster that has been given a new host cluster, of which `touched` has been written.
    fn entry_for_new(&self, old: Entry, host: u64, touched: u32) -> Entry {
        let all = Entry::all_subclusters(&self.geometry);
        match old {
            Entry::Plain { host: None, zero, .. } => {
                Entry::Plain { host: Some(host), copied: true, allocated: touched, zero: zero & !touched }
            }
            // Replaced altogether: everything else has been copied along.
            _ => Entry::Plain { host: Some(host), copied: true, allocated: all, zero: 0 },
        }
    }

    /// How many clusters from `guest` on, within `len` bytes, need a new host cluster (at least one).
    fn new_clusters(&self, guest: u64, len: u64) -> Result<u64> {
        let (first, last) = self.clusters(guest, len);
        let mut count = 1;
        while first + count <= last {
            match self.entry_at(self.geometry.offset_of(first + count))? {
                Entry::Plain { host: Some(_), copied: true, .. } => break,
                _ => count += 1,
            }
        }
        Ok(count)
    }

    /// Host clusters for guest clusters from `guest` on, and the L2 tables to link them in.
    fn allocate_data(&self, guest: u64, clusters: u64) -> Result<Run> {
        let first = self.geometry.cluster_of(guest);
        let map = self.map()?;
        self.with_meta(|meta| {
            self.ensure_tables(meta, first, first + clusters - 1)?;
            if self.external {
                return Ok(Run { offset: self.geometry.offset_of(first), clusters, fresh: false });
            }
            match meta.take_reserved(first, clusters) {
                Some(run) => Ok(run),
                None => meta.allocate(&*self.storage, map, clusters),
            }
        })
    }

    /// Gives back clusters that were not linked.
    fn undo(&self, run: Run) {
        if !self.external {
            self.meta.lock().undo(&*self.storage, run);
        }
    }

    /// Makes sure that guest clusters `first..=last` have L2 tables of their own.
    fn ensure_tables(&self, meta: &mut Meta, first: u64, last: u64) -> Result<()> {
        let bits = self.geometry.l2_bits();
        (first >> bits..=last >> bits).try_for_each(|index| self.ensure_table(meta, index))
    }

    fn ensure_table(&self, meta: &mut Meta, index: u64) -> Result<()> {
        let old = self.l2_table(index << (self.geometry.l2_bits() + self.geometry.cluster_bits))?;
        if old.is_some() && self.l1_copied(index) {
            return Ok(());
        }
        let cluster = self.geometry.cluster_size();
        let run = meta.allocate(&*self.storage, self.map()?, 1)?;
        let written = match old {
            None => write_zeros(&*self.storage, run.offset, cluster),
            Some(table) => self.copy_table(table, run.offset),
        };
        if let Err(error) = written {
            meta.undo(&*self.storage, run);
            return Err(error);
        }
        // The cluster may have held another table before.
        self.slices.forget_table(run.offset, cluster);
        if let Some(entry) = self.l1.write().get_mut(to_usize(index)) {
            *entry = run.offset | COPIED;
        }
        meta.dirty_l1.insert(index);
        if let Some(table) = old {
            meta.free_later(table, cluster);
        }
        Ok(())
    }

    /// Copies an L2 table that a snapshot shares. Shared tables are never changed, so the file has all of it.
    fn copy_table(&self, from: u64, to: u64) -> Result<()> {
        let mut table = vec![0; to_usize(self.geometry.cluster_size())];
        self.storage.read_at(&mut table, from)?;
        self.storage.write_at(&table, to)
    }

    /// The old contents of `from..to` (within one cluster), for writing them elsewhere. `there` says that the
    /// new place reads as zeros already.
    fn old_contents(&self, from: u64, to: u64, there: bool) -> Result<Fill> {
        if from == to {
            return Ok(Fill::Nothing);
        }
        let on_disk = to.min(self.size()).saturating_sub(from);
        if self.reads_zero(from, on_disk)? {
            return Ok(if there { Fill::Nothing } else { Fill::Zeros(to - from) });
        }
        let mut bytes = vec![0; to_usize(to - from)];
        self.read_held(&mut bytes[..to_usize(on_disk)], from)?;
        Ok(Fill::Bytes(bytes))
    }

    /// Whether this layer's tables alone say that a range reads as zeros.
    fn reads_zero(&self, guest: u64, len: u64) -> Result<bool> {
        let mut at = guest;
        while at < guest + len {
            let mapping = self.lookup(at, guest + len - at)?;
            match mapping.mapped {
                Mapped::Zero(_) => {}
                Mapped::Absent if !self.backed(at) => {}
                _ => return Ok(false),
            }
            at += mapping.len;
        }
        Ok(true)
    }

    /// Writes `bytes` into a new run, with the old contents of the (sub)clusters that it fills only in part.
    fn write_surrounded(&self, bytes: &[u8], guest: u64, run: Run, first: Entry, last: Entry) -> Result<()> {
        let end = guest + bytes.len() as u64;
        let unit = |entry| match entry {
            Entry::Plain { host: None, .. } => self.geometry.subcluster_size(),
            _ => self.geometry.cluster_size(),
        };
        let head = self.old_contents(align_down(guest, unit(first)), guest, run.fresh)?;
        // The tail is written even where the file has nothing yet: data clusters are complete in the file.
        let tail = self.old_contents(end, align_up(end, unit(last)).unwrap_or(end), false)?;
        let start = run.offset + self.geometry.in_cluster(guest) - head.len();
        self.write_filled(&head, bytes, &tail, start)
    }

    /// Writes head, bytes and tail, which follow each other from `start` on.
    fn write_filled(&self, head: &Fill, bytes: &[u8], tail: &Fill, start: u64) -> Result<()> {
        let mut parts = Vec::with_capacity(3);
        let mut at = start;
        match head {
            Fill::Nothing => {}
            Fill::Bytes(old) => parts.push(IoSlice::new(old)),
            Fill::Zeros(len) if *len <= ZEROS.len() as u64 => {
                parts.push(IoSlice::new(&ZEROS[..to_usize(*len)]));
            }
            Fill::Zeros(len) => {
                self.data.zero_range(start, *len, ZeroMode::ALLOCATE)?;
                at += len;
            }
        }
        parts.push(IoSlice::new(bytes));
        let mut after = None;
        match tail {
            Fill::Nothing => {}
            Fill::Bytes(old) => parts.push(IoSlice::new(old)),
            Fill::Zeros(len) if *len <= ZEROS.len() as u64 => {
                parts.push(IoSlice::new(&ZEROS[..to_usize(*len)]));
            }
            Fill::Zeros(len) => after = Some((start + head.len() + bytes.len() as u64, *len)),
        }
        self.data.write_vectored_at(&parts, at)?;
        match after {
            Some((offset, len)) => self.data.zero_range(offset, len, ZeroMode::ALLOCATE),
            None => Ok(()),
        }
    }

    /// Replaces the entries of `count` clusters from the one that contains `guest` on. What an old entry
    /// referred to and the new one does not loses its reference with the next flush. The tables exist.
    fn link(&self, guest: u64, count: u64, entry: impl Fn(u64, Entry) -> Entry) -> Result<()> {
        let first = self.geometry.cluster_of(guest);
        let mut meta = self.meta.lock();
        self.mark_dirty(&mut meta)?;
        // Everything that can fail comes first: half a link must not happen.
        let mut slots: Vec<(Arc<Slice>, u64, Entry)> = Vec::with_capacity(to_usize(count));
        for i in 0..count {
            let at = self.geometry.offset_of(first + i);
            let Some(table) = self.l2_table(at)? else {
                return Err(BlockError::new(block::ErrorKind::Corrupt, format!("no L2 table for {at:#x}")));
            };
            let (slice_offset, index) = self.slice_position(table, at);
            let slice = match slots.last() {
                Some((slice, _, _)) if slice.offset == slice_offset => Arc::clone(slice),
                _ => {
                    let (slice, _) = self.slices.get_dirty(&*self.storage, slice_offset)?;
                    meta.dirty_slices.insert(slice_offset, Arc::clone(&slice));
                    slice
                }
            };
            let old = self.decode(&slice, index, at)?;
            slots.push((slice, index, old));
        }
        for ((slice, index, old), i) in slots.into_iter().zip(0..) {
            let new = entry(i, old);
            if new != old {
                slice.set_entry(index, self.geometry.extended_l2, new.encode(&self.geometry));
                self.let_go(&mut meta, old, new);
            }
        }
        Ok(())
    }

    /// Notes what an old entry held and the new one does not.
    fn let_go(&self, meta: &mut Meta, old: Entry, new: Entry) {
        match old {
            Entry::Compressed { offset, len } => {
                self.compressed_epoch.fetch_add(1, Ordering::AcqRel);
                meta.free_later(offset, len);
            }
            Entry::Plain { host: Some(host), .. } if !self.external => {
                let kept = matches!(new, Entry::Plain { host: Some(new_host), .. } if new_host == host);
                if !kept {
                    meta.free_later(host, self.geometry.cluster_size());
                }
            }
            Entry::Plain { .. } => {}
        }
    }

    // Zeros and discards.

    /// Makes a range read as zeros.
    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_write(offset, len)?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            at += self.zero_some(at, end, mode)?;
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
        if self.l2_table(at)?.is_none() && !self.backed(at) && !self.external_raw {
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
        self.zero_whole(at, len, mode)?;
        Ok(len.min(end - at))
    }

    /// As [`piece_len`](Self::piece_len), within one L1 entry, and not more than one cluster unless whole
    /// clusters.
    fn zero_piece_len(&self, at: u64, len: u64) -> u64 {
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

    /// Zeros in whole subclusters of one cluster, or in whole clusters of one L2 table.
    fn zero_whole(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.clusters(at, len);
        if self.external_raw {
            return self.zero_raw_data(at, len, mode);
        }
        if self.version < 3 && (self.backed(at) || !mode.may_unmap) {
            return self.zero_partly(at, len, mode);
        }
        let held = self.stripes.exclusive(first, last);
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
            self.zeroed(old, mask, mode, self.backed(start + self.geometry.offset_of(i)))
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
        let len = len.min(self.rest_of_disk(at));
        if len == 0 {
            return Ok(());
        }
        let (first, last) = self.clusters(at, len);
        {
            let _held = self.stripes.exclusive(first, last);
            if self.in_place_runs(at, len)?.is_some() {
                return self.data.zero_range(at, len, mode);
            }
        }
        self.zero_by_writing(at, len, mode)
    }

    /// Gives back whole clusters of a range.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        let cluster = self.geometry.cluster_size();
        let end = align_down(self.effective_end(offset + len, cluster), cluster);
        let mut at = align_up(offset, cluster).unwrap_or(end);
        while at < end {
            if self.l2_table(at)?.is_none() {
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

    // What convert and create ask for.

    /// Sets host clusters aside for the unallocated clusters of a range, in order.
    pub(crate) fn reserve_range(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 || self.external || !self.writable {
            return Ok(());
        }
        check_range(offset, len, self.size())?;
        self.throttle()?;
        let (first, last) = self.clusters(offset, len);
        let _held = self.stripes.shared(first, last);
        let map = self.map()?;
        let mut guest = first;
        while guest <= last {
            let needed = self.unreserved(guest, last)?;
            if needed == 0 {
                guest += 1;
                continue;
            }
            guest += self.with_meta(|meta| {
                self.ensure_tables(meta, guest, guest + needed - 1)?;
                let run = meta.allocate(&*self.storage, map, needed)?;
                for i in 0..run.clusters {
                    let place = (run.offset + self.geometry.offset_of(i), run.fresh);
                    // Somebody else may have reserved the same place since it was looked at.
                    if let Some((other, _)) = meta.reserved.insert(guest + i, place) {
                        meta.release(&*self.storage, other, 1)?;
                    }
                }
                Ok(run.clusters)
            })?;
        }
        Ok(())
    }

    /// How many clusters from `guest` on have no host cluster, neither linked nor reserved.
    fn unreserved(&self, guest: u64, last: u64) -> Result<u64> {
        let mut count = 0;
        while guest + count <= last {
            let cluster = guest + count;
            let free =
                matches!(self.entry_at(self.geometry.offset_of(cluster))?, Entry::Plain { host: None, .. });
            if !free || self.meta.lock().reserved.contains_key(&cluster) {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Lets new clusters share the blocks of another file.
    pub(crate) fn clone_range(
        &self,
        offset: u64,
        len: u64,
        source: &dyn Storage,
        source_offset: u64,
    ) -> Result<bool> {
        self.check_write(offset, len)?;
        let cluster = self.geometry.cluster_size();
        if len == 0 || self.geometry.in_cluster(offset) != 0 || !len.is_multiple_of(cluster) {
            return Ok(false);
        }
        let mut done = 0;
        while done < len {
            let piece = self.zero_piece_len(offset + done, len - done);
            if !self.clone_piece(offset + done, piece, source, source_offset + done)? {
                // What has been cloned holds the bytes that the caller is going to write again.
                return Ok(false);
            }
            done += piece;
        }
        Ok(true)
    }

    /// Clones whole clusters of one L2 table, if none of them has a host cluster yet.
    fn clone_piece(&self, guest: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.throttle()?;
        let (first, last) = self.clusters(guest, len);
        let _held = self.stripes.exclusive(first, last);
        if self.lookup(guest, len)?.len < len
            || !matches!(self.entry_at(guest)?, Entry::Plain { host: None, .. })
        {
            return Ok(false);
        }
        let mut cluster = first;
        while cluster <= last {
            let at = self.geometry.offset_of(cluster);
            let run = self.allocate_data(at, last - cluster + 1)?;
            let run_len = self.geometry.offset_of(run.clusters);
            match self.data.clone_range(run.offset, source, source_offset + (at - guest), run_len) {
                Ok(true) => {}
                Ok(false) => {
                    self.undo(run);
                    return Ok(false);
                }
                Err(error) => {
                    self.undo(run);
                    return Err(error);
                }
            }
            let all = Entry::all_subclusters(&self.geometry);
            self.link(at, run.clusters, |i, _| {
                let host = run.offset + self.geometry.offset_of(i);
                Entry::Plain { host: Some(host), copied: true, allocated: all, zero: 0 }
            })
            .inspect_err(|_| self.undo(run))?;
            cluster += run.clusters;
        }
        Ok(true)
    }

    /// Stores compressed clusters, packed.
    pub(crate) fn write_packed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        if clusters.is_empty() {
            return Ok(());
        }
        if self.geometry.in_cluster(offset) != 0 || self.external {
            return Err(BlockError::usage("compressed clusters cannot be stored here"));
        }
        let len = self.geometry.offset_of(clusters.len() as u64);
        self.check_write(offset, len.min(self.size().saturating_sub(offset)).max(1))?;
        if offset + len > self.size().next_multiple_of(cluster) {
            return Err(BlockError::usage("compressed clusters reach past the end of the disk"));
        }
        let packed: Vec<&[u8]> = clusters
            .iter()
            .map(|c| match c {
                Compressed::Packed(bytes) if !bytes.is_empty() => Ok(bytes.as_slice()),
                _ => Err(BlockError::usage("an incompressible cluster has to be written as it is")),
            })
            .collect::<Result<_>>()?;
        self.throttle()?;
        let (first, last) = self.clusters(offset, len);
        let _held = self.stripes.exclusive(first, last);
        let places = self.allocate_packed(first, &packed)?;
        let sizes = || places.iter().copied().zip(packed.iter().map(|bytes| bytes.len() as u64));
        let result = self.write_batches(&packed, &places).and_then(|()| {
            self.link(offset, clusters.len() as u64, |i, _| {
                let i = to_usize(i);
                Entry::Compressed { offset: places[i], len: self.span(places[i], packed[i].len() as u64) }
            })
        });
        result.inspect_err(|_| self.undo_packed(&mut self.meta.lock(), sizes()))
    }

    /// Bytes from `offset` to the end of the last sector that `len` bytes touch.
    fn span(&self, offset: u64, len: u64) -> u64 {
        (offset + len).next_multiple_of(512) - offset
    }

    fn allocate_packed(&self, first: u64, packed: &[&[u8]]) -> Result<Vec<u64>> {
        let map = self.map()?;
        self.with_meta(|meta| {
            self.ensure_tables(meta, first, first + packed.len() as u64 - 1)?;
            let mut places = Vec::with_capacity(packed.len());
            for bytes in packed {
                match meta.allocate_bytes(&*self.storage, map, bytes.len() as u64) {
                    Ok(place) => places.push(place),
                    Err(error) => {
                        let sizes = packed.iter().map(|bytes| bytes.len() as u64);
                        self.undo_packed(meta, places.into_iter().zip(sizes));
                        return Err(error);
                    }
                }
            }
            Ok(places)
        })
    }

    fn undo_packed(&self, meta: &mut Meta, places: impl Iterator<Item = (u64, u64)>) {
        for (offset, len) in places {
            let first = self.geometry.cluster_of(offset);
            let clusters = self.geometry.cluster_of(offset + len - 1) - first + 1;
            // An error leaves a leak; the caller is reporting the first one already.
            let _ = meta.release(&*self.storage, self.geometry.offset_of(first), clusters);
        }
    }

    /// Writes packed clusters, those that follow each other in one request.
    fn write_batches(&self, packed: &[&[u8]], places: &[u64]) -> Result<()> {
        let mut start = 0;
        while start < packed.len() {
            let mut end = start + 1;
            while end < packed.len() && places[end] == places[end - 1] + packed[end - 1].len() as u64 {
                end += 1;
            }
            let parts: Vec<IoSlice<'_>> =
                packed[start..end].iter().map(|bytes| IoSlice::new(bytes)).collect();
            self.storage.write_vectored_at(&parts, places[start])?;
            start = end;
        }
        Ok(())
    }

    /// Gives host clusters to every cluster of a range that has none, so that it is mapped throughout. The new
    /// clusters read as zeros (they are new in the file).
    ///
    /// # Errors
    /// Out of range, read-only, no space.
    pub fn preallocate(&self, offset: u64, len: u64, mode: Preallocation) -> Result<()> {
        if mode == Preallocation::Off || len == 0 {
            return Ok(());
        }
        self.check_write(offset, len)?;
        let end = align_up(offset + len, self.geometry.cluster_size()).unwrap_or(offset + len);
        let mut at = align_down(offset, self.geometry.cluster_size());
        while at < end {
            let piece = self.zero_piece_len(at, end - at);
            self.preallocate_piece(at, piece, mode)?;
            at += piece;
        }
        if self.external { self.extend_data_file(offset + len) } else { self.extend_over_allocation() }
    }

    /// What is preallocated in an external data file must lie inside it.
    fn extend_data_file(&self, end: u64) -> Result<()> {
        if !self.data.fixed_len() && self.data.len()? < end {
            self.data.set_len(end)?;
        }
        Ok(())
    }

    fn preallocate_piece(&self, at: u64, len: u64, mode: Preallocation) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.clusters(at, len);
        let _held = self.stripes.exclusive(first, last);
        let mut guest = first;
        while guest <= last {
            let offset = self.geometry.offset_of(guest);
            let wanted = self.unallocated_clusters(guest, last)?;
            if wanted == 0 {
                guest += 1;
                continue;
            }
            let run = self.allocate_data(offset, wanted)?;
            let prepared = self.prepare_space(run, mode).and_then(|()| {
                self.link(offset, run.clusters, |i, old| {
                    self.preallocated(old, run.offset + self.geometry.offset_of(i))
                })
            });
            prepared.inspect_err(|_| self.undo(run))?;
            guest += run.clusters;
        }
        Ok(())
    }

    fn unallocated_clusters(&self, guest: u64, last: u64) -> Result<u64> {
        let mut count = 0;
        while guest + count <= last
            && matches!(
                self.entry_at(self.geometry.offset_of(guest + count))?,
                Entry::Plain { host: None, .. }
            )
        {
            count += 1;
        }
        Ok(count)
    }

    /// The entry of a cluster that gets space in advance. With extended L2 entries its subclusters stay as they
    /// are (so a backing file shows through); without, it becomes data, or keeps its zero flag.
    fn preallocated(&self, old: Entry, host: u64) -> Entry {
        let (allocated, zero) = match old {
            Entry::Plain { zero, .. } if self.geometry.extended_l2 || zero != 0 => (0, zero),
            _ => (1, 0),
        };
        Entry::Plain { host: Some(host), copied: true, allocated, zero }
    }

    /// Takes or fills the space of new clusters.
    fn prepare_space(&self, run: Run, mode: Preallocation) -> Result<()> {
        let len = self.geometry.offset_of(run.clusters);
        match mode {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata if run.fresh || self.external => Ok(()),
            Preallocation::Metadata => self.data.zero_range(run.offset, len, ZeroMode::UNMAP),
            Preallocation::Falloc if run.fresh || self.external => self.data.allocate_range(run.offset, len),
            Preallocation::Falloc => self.data.zero_range(run.offset, len, ZeroMode::ALLOCATE),
            Preallocation::Full => write_zeros(&*self.data, run.offset, len),
        }
    }

    /// Sparse clusters at the end of the file must lie inside it.
    fn extend_over_allocation(&self) -> Result<()> {
        let _held = self.stripes.all();
        let end = self.meta.lock().allocation_end();
        if !self.storage.fixed_len() && self.storage.len()? < end {
            self.storage.set_len(end)?;
        }
        self.grown_to(end);
        Ok(())
    }

    /// Makes the first clusters of a range (of one L2 table) refer to nothing, not even zeros: they are about to
    /// leave the disk. Returns the bytes done.
    pub(crate) fn unmap_piece(&self, at: u64, len: u64) -> Result<u64> {
        let piece = self.zero_piece_len(at, len);
        self.throttle()?;
        let (first, last) = self.clusters(at, piece);
        let _held = self.stripes.exclusive(first, last);
        self.with_meta(|meta| self.ensure_tables(meta, first, last))?;
        self.link(at, last - first + 1, |_, _| Entry::UNALLOCATED)?;
        Ok(piece)
    }

    /// The L2 table that an L1 entry names.
    pub(crate) fn table_of(entry: u64) -> u64 {
        entry & OFFSET_MASK
    }
}
