//! Changing the size of the disk.
//!
//! Growing needs room in the L1 table: if the present one is too short, a longer copy is written elsewhere and
//! the header changes over to it with one write, the size staying as it is. Then the new part of the disk is made
//! zero wherever something would show there, and only when that is durable the size changes: a crash leaves the old
//! disk, or the new one complete. Shrinking first refuses writes past the new end, then lets go of everything there,
//! then changes the header. A request that was let through before looks again once it holds its clusters
//! (`check_overtaken`).

use block::codec::Writer;
use block::num::{low_u32, to_usize};
use block::{BlockDevice as _, Error as BlockError, ErrorKind, Preallocation, Result};
use std::sync::atomic::Ordering;

use crate::device::Qcow2;
use crate::error::Error;
use crate::geometry::MAX_L1_BYTES;
use crate::l2::Entry;

impl Qcow2 {
    /// Changes the virtual size.
    pub(crate) fn resize_to(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if !self.writable {
            return Err(BlockError::read_only());
        }
        // Without the data file or the key what becomes a part of the disk could not be made zero.
        self.check_readable()?;
        if !size.is_multiple_of(512) {
            return Err(BlockError::usage("The new size must be a multiple of 512"));
        }
        if self.version < 3 && !self.snapshots.read().is_empty() {
            return Err(BlockError::unsupported("Can't resize a v2 image which has snapshots"));
        }
        let _reshaping = self.reshaping.lock();
        let old = self.size();
        if size < old && preallocation != Preallocation::Off {
            return Err(BlockError::usage("Preallocation can't be used for shrinking an image"));
        }
        self.check_l1_limit(size)?;
        self.prepare_bitmaps_for(size)?;
        let resized = self.resize_disk(size, preallocation);
        let fitted = self.fit_bitmaps();
        resized.and(fitted)
    }

    /// The same without the bitmaps.
    fn resize_disk(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let old = self.size();
        if size < old {
            return self.shrink(size);
        }
        // What a snapshot with machine state has left behind the disk must not become a part of it.
        let behind = self.geometry.l1_entries_for(old) * self.geometry.l2_coverage();
        self.drop_clusters(behind, self.mapped_end())?;
        self.resize_data_file(size)?;
        self.make_room(size)?;
        // What lies past the old end must not show: neither the rest of the last cluster (zeros already if the writer
        // was careful) nor what a longer backing file has there. It is made zero while nobody can see it yet.
        let boundary = old.next_multiple_of(self.geometry.cluster_size()).min(size);
        let backed = self.backing.as_ref().map_or(0, |backing| backing.size()).min(size);
        self.zero_past_end(old, boundary.max(backed))?;
        self.grow(size)?;
        let preallocation = match preallocation {
            Preallocation::Off if self.external_raw => Preallocation::Metadata,
            other => other,
        };
        self.preallocate(old, size - old, preallocation)?;
        self.flush_all()
    }

    /// An external data file is as long as the disk.
    fn resize_data_file(&self, size: u64) -> Result<()> {
        if self.external && !self.data.fixed_len() {
            self.data.set_len(size)?;
            self.forget_lengths();
        }
        Ok(())
    }

    /// Nothing is changed for a size that no L1 table can map.
    pub(crate) fn check_l1_limit(&self, size: u64) -> Result<()> {
        if self.geometry.l1_entries_for(size) * 8 <= MAX_L1_BYTES {
            return Ok(());
        }
        let error = BlockError::new(ErrorKind::NoSpace, "Failed to grow the L1 table: File too large");
        Err(error
            .hint("A larger cluster size allows larger disks: convert the image with -o cluster_size=2M."))
    }

    /// Makes the L1 table long enough for `size`; the size stays as it is.
    fn make_room(&self, size: u64) -> Result<()> {
        let entries = self.geometry.l1_entries_for(size);
        let _held = self.stripes.all();
        let _flushing = self.flush_lock.lock();
        self.write_tables_locked(true)?;
        if entries <= self.l1.read().len() as u64 {
            return Ok(());
        }
        let (offset, (old_offset, old_clusters)) = self.move_l1(entries)?;
        let old_len = self.geometry.offset_of(old_clusters);
        if let Err(error) = self.change_size(self.size(), Some(offset)) {
            // The disk may still name the old table: it goes once a flush has settled that.
            self.meta.lock().free_later(old_offset, old_len);
            return Err(error);
        }
        self.drop_table(old_offset, old_len)
    }

    /// Moves the end of the disk, everything up to there being mapped.
    fn grow(&self, size: u64) -> Result<()> {
        let _held = self.stripes.all();
        let _flushing = self.flush_lock.lock();
        self.write_tables_locked(true)?;
        self.change_size(size, None)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes what is mapped from `from` to `to` read as zeros where it does not, although it lies past the end of the
    /// disk (as it is now).
    fn zero_past_end(&self, from: u64, to: u64) -> Result<()> {
        if self.external_raw {
            return Ok(()); // The file ended there.
        }
        let unit = self.geometry.subcluster_size();
        let mut at = from;
        while at < to {
            let whole = self.version >= 3 && at.is_multiple_of(unit);
            let piece = match whole {
                true => self.zero_piece_len(at, to.next_multiple_of(unit) - at),
                false => (at / unit + 1).saturating_mul(unit).min(to) - at,
            };
            self.zero_piece_past_end(at, piece, whole)?;
            at += piece;
        }
        Ok(())
    }

    fn zero_piece_past_end(&self, at: u64, len: u64, whole: bool) -> Result<()> {
        let (zero, whole) = {
            let (first, last) = self.clusters(at, len);
            let _held = self.stripes.shared(first, last);
            // A part of a compressed cluster can only be written.
            let packed =
                len < self.geometry.cluster_size() && matches!(self.entry_at(at)?, Entry::Compressed { .. });
            (self.reads_zero(at, len)?, whole && !packed)
        };
        match (zero, whole) {
            (true, _) => Ok(()),
            (false, true) => self.zero_whole_beyond(at, len),
            (false, false) => {
                let zeros = vec![0; to_usize(len)];
                self.write_piece_anywhere(&zeros, at)
            }
        }
    }

    /// Writes a longer L1 table elsewhere. Returns its offset and what the old one took (offset, clusters).
    fn move_l1(&self, entries: u64) -> Result<(u64, (u64, u64))> {
        let mut table = self.l1.read().clone();
        table.resize(to_usize(entries), 0);
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let run = self.place_table(&bytes)?;
        let old = {
            let header = self.header.lock();
            let bytes = u64::from(header.l1_size) * 8;
            (header.l1_table_offset, self.geometry.clusters_for(bytes))
        };
        *self.l1.write() = table;
        Ok((run.offset, old))
    }

    /// Specification, "Header": size (24), crypt_method (32), l1_size (36), l1_table_offset (40): one write
    /// inside one sector.
    fn change_size(&self, size: u64, l1_offset: Option<u64>) -> Result<()> {
        let mut header = self.header.lock();
        if let Some(offset) = l1_offset {
            header.l1_size = low_u32(self.l1.read().len() as u64);
            header.l1_table_offset = offset;
        }
        let mut fields = Writer::new();
        fields.be_u64(size).be_u32(header.crypt_method).be_u32(header.l1_size).be_u64(header.l1_table_offset);
        let written = self.storage.write_at(&fields.into_bytes(), 24).and_then(|()| self.storage.sync());
        if written.is_ok() {
            header.size = size;
        }
        drop(header);
        // A moved L1 table is the one in use now, whatever the disk says; the next flush makes it say so.
        self.meta.lock().header_unsure |= written.is_err();
        written
    }

    fn shrink(&self, size: u64) -> Result<()> {
        let old = self.size();
        {
            // Writes past the new end that are under way come to an end first; later ones find it.
            let _held = self.stripes.all();
            self.size.store(size, Ordering::Release);
        }
        let shrunk = self.shrink_from(old, size);
        if shrunk.is_err() {
            self.size.store(self.header.lock().size, Ordering::Release);
        }
        shrunk
    }

    fn shrink_from(&self, old: u64, size: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let boundary = size.next_multiple_of(cluster);
        // The rest of the last cluster must read as zeros should the disk grow again.
        self.zero_past_end(size, boundary.min(old))?;
        self.drop_clusters(boundary, old.max(self.mapped_end()))?;
        self.flush_all()?;
        let _held = self.stripes.all();
        let _flushing = self.flush_lock.lock();
        self.drop_tables(size)?;
        self.write_tables_locked(true)?;
        self.change_size(size, None)?;
        self.resize_data_file(size)?;
        self.cut_file()
    }

    /// The end of what L2 tables map: behind the disk lies the machine state of an applied snapshot, if any.
    fn mapped_end(&self) -> u64 {
        let l1 = self.l1.read();
        let tables = l1.iter().rposition(|entry| *entry != 0).map_or(0, |last| last as u64 + 1);
        tables.saturating_mul(self.geometry.l2_coverage())
    }

    /// Unmaps whole clusters so that they refer to nothing.
    fn drop_clusters(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            if !self.has_table(at) {
                let coverage = self.geometry.l2_coverage();
                at += coverage - (at & (coverage - 1));
                continue;
            }
            let end = to.next_multiple_of(self.geometry.cluster_size());
            at += self.unmap_piece(at, end - at)?;
        }
        Ok(())
    }

    /// L2 tables wholly past the new end are let go.
    fn drop_tables(&self, size: u64) -> Result<()> {
        let keep = to_usize(self.geometry.l1_entries_for(size));
        let mut meta = self.meta.lock();
        let mut l1 = self.l1.write();
        for (index, entry) in l1.iter_mut().enumerate().skip(keep).filter(|(_, entry)| **entry != 0) {
            let table = Self::table_of(*entry);
            *entry = 0;
            meta.dirty_l1.insert(index as u64);
            meta.free_later(table, self.geometry.cluster_size());
            meta.dirty_slices
                .retain(|offset, _| !(table..table + self.geometry.cluster_size()).contains(offset));
            self.slices.forget_table(table, self.geometry.cluster_size());
        }
        Ok(())
    }

    /// Gives the free clusters at the end of the file back to the host.
    pub(crate) fn cut_file(&self) -> Result<()> {
        if self.storage.fixed_len() {
            return Ok(());
        }
        let mut meta = self.meta.lock();
        let len = self.storage.len()?;
        let end = meta.refcounts.used_end(&*self.storage, self.geometry.clusters_for(len))?;
        let new_len = self.geometry.offset_of(end);
        if new_len < len {
            self.storage.set_len(new_len)?;
            meta.cut_at(end);
            self.forget_lengths();
        }
        if end == 0 {
            return Err(Error::NoRefcountTable.into());
        }
        Ok(())
    }
}
