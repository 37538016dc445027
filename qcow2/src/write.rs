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
use block::{BlockDevice, Error as BlockError, Result, Storage, ZeroMode};

use crate::alloc::{Meta, Run};
use crate::cache::Slice;
use crate::cipher::Part;
use crate::device::{Mapped, Qcow2};
use crate::error::Error;
use crate::l2::{COPIED, Entry};

/// Zeros to write from.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

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
    fn part(&self) -> Part<'_> {
        match self {
            Self::Nothing => Part::Zeros(0),
            Self::Zeros(len) => Part::Zeros(*len),
            Self::Bytes(bytes) => Part::Bytes(bytes),
        }
    }

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

/// A resize has overtaken a request.
fn past_the_end() -> BlockError {
    BlockError::new(block::ErrorKind::OutOfRange, "the request lies past the end of the disk")
}

impl Qcow2 {
    pub(crate) fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        if !self.writable {
            return Err(BlockError::read_only());
        }
        self.check_readable()
    }

    /// Once the clusters of a request, of which `last` is the last, are held: the disk may have become shorter since the
    /// request was looked at, and what is past its end must not be mapped.
    pub(crate) fn check_overtaken(&self, last: u64) -> Result<()> {
        if self.geometry.offset_of(last) < self.size() { Ok(()) } else { Err(past_the_end()) }
    }

    /// Whether the backing device has bytes in the range.
    pub(crate) fn backed(&self, guest: u64) -> bool {
        self.backing.as_ref().is_some_and(|backing| guest < backing.size())
    }

    /// Bytes from `at` to the end of the disk, which a resize may have moved since the request was checked.
    pub(crate) fn rest_of_disk(&self, at: u64) -> u64 {
        self.size().saturating_sub(at)
    }

    /// The entry of the cluster that contains a guest byte.
    pub(crate) fn entry_at(&self, guest: u64) -> Result<Entry> {
        match self.l2_table(guest)? {
            None => Ok(Entry::UNALLOCATED),
            Some(table) => {
                let (slice, index) = self.slice(table, guest)?;
                self.decode(&slice, index, guest)
            }
        }
    }

    /// The subclusters of a cluster that `within..within + len` (bytes from its start) touches, as bits.
    pub(crate) fn touched(&self, within: u64, len: u64) -> u32 {
        let size = self.geometry.subcluster_size();
        let (first, last) = (within / size, (within + len - 1) / size);
        let bits = (u64::MAX >> (63 - (last - first))) << first;
        low_u32(bits & 0xffff_ffff)
    }

    /// Writes `buf`, wherever it has to go.
    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        self.record(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let len = to_usize(self.piece_len(at, (buf.len() - done) as u64));
            self.write_piece(&buf[done..done + len], at)?;
            done += len;
        }
        Ok(())
    }

    pub(crate) fn write_piece(&self, buf: &[u8], guest: u64) -> Result<()> {
        self.write_piece_if(buf, guest, || check_range(guest, buf.len() as u64, self.size()))
    }

    /// The same, past the end of the disk, too.
    pub(crate) fn write_piece_anywhere(&self, buf: &[u8], guest: u64) -> Result<()> {
        self.write_piece_if(buf, guest, || Ok(()))
    }

    /// The same if `check` finds no fault once the clusters are held: the disk may have become shorter since the
    /// request was looked at.
    fn write_piece_if(&self, buf: &[u8], guest: u64, check: impl Fn() -> Result<()>) -> Result<()> {
        let (first, last) = self.clusters(guest, buf.len() as u64);
        if !self.splits_sectors(guest, buf.len() as u64) {
            let _held = self.stripes.shared(first, last);
            check().and_then(|()| self.settle_before_write())?;
            if let Some(runs) = self.in_place_runs(guest, buf.len() as u64)? {
                return self.write_runs(buf, guest, &runs);
            }
        }
        self.throttle()?;
        let _held = self.stripes.exclusive(first, last);
        check().and_then(|()| self.settle_before_write())?;
        self.write_allocating(buf, guest)
    }

    /// Where the bytes of a range lie, if all of it can be written in place: (host offset, length).
    pub(crate) fn in_place_runs(&self, guest: u64, len: u64) -> Result<Option<Vec<(u64, u64)>>> {
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
            self.write_data(piece, at, *host)?;
            at += len;
            rest = tail;
        }
        Ok(())
    }

    /// Guest data must not be written over metadata, nor so far past the end of the file that only a lie in a table
    /// can have led there (space that has been given out need not be in the file yet).
    pub(crate) fn check_place(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if !self.external && !self.is_inside(host + len)? && host + len > self.meta.lock().allocation_end() {
            self.check_data(guest, host, len)?;
        }
        self.check_data_overlap(guest, host, len)
            .and_then(|()| self.check_claimed(guest, host, len))
            .inspect_err(|_| self.mark_corrupt())
    }

    /// Tables that lie about who else refers to a cluster can free it while an entry still names it; if a table is
    /// put there, guest data must not follow.
    fn check_claimed(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        let (first, end) = (self.geometry.cluster_of(host), self.geometry.clusters_for(host + len));
        if self.external || !self.map()?.is_claimed(first, end) {
            return Ok(());
        }
        Err(Error::DataOnMetadata { guest, offset: host, what: "new table" }.into())
    }

    /// Writes a range whose clusters are held exclusively.
    pub(crate) fn write_allocating(&self, buf: &[u8], guest: u64) -> Result<()> {
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
        self.write_filled(&head, buf, &tail, guest - head.len(), start)
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
    pub(crate) fn allocate_data(&self, guest: u64, clusters: u64) -> Result<Run> {
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
    pub(crate) fn undo(&self, run: Run) {
        if !self.external {
            self.meta.lock().undo(&*self.storage, run);
        }
    }

    /// Makes sure that guest clusters `first..=last` have L2 tables of their own.
    pub(crate) fn ensure_tables(&self, meta: &mut Meta, first: u64, last: u64) -> Result<()> {
        let bits = self.geometry.l2_bits();
        (first >> bits..=last >> bits).try_for_each(|index| self.ensure_table(meta, index))
    }

    fn ensure_table(&self, meta: &mut Meta, index: u64) -> Result<()> {
        if index >= self.l1.read().len() as u64 {
            // The disk has become smaller since the request was looked at, and its L1 table shorter.
            return Err(past_the_end());
        }
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
        self.map()?.claim(self.geometry.cluster_of(run.offset), 1);
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
    pub(crate) fn reads_zero(&self, guest: u64, len: u64) -> Result<bool> {
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
        let there = run.fresh && !self.is_encrypted();
        let head = self.old_contents(align_down(guest, unit(first)), guest, there)?;
        // The tail is written even where the file has nothing yet: data clusters are complete in the file.
        let tail = self.old_contents(end, align_up(end, unit(last)).unwrap_or(end), false)?;
        let start = run.offset + self.geometry.in_cluster(guest) - head.len();
        self.write_filled(&head, bytes, &tail, guest - head.len(), start)
    }

    /// Writes head, bytes and tail, which follow each other from `start` on; the guest sees them from `guest` on.
    fn write_filled(&self, head: &Fill, bytes: &[u8], tail: &Fill, guest: u64, start: u64) -> Result<()> {
        if let Some(cipher) = &self.cipher {
            let parts = [head.part(), Part::Bytes(bytes), tail.part()];
            return self.write_parts(cipher, &parts, guest, start);
        }
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
    pub(crate) fn link(&self, guest: u64, count: u64, entry: impl Fn(u64, Entry) -> Entry) -> Result<()> {
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
}
