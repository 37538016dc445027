//! What convert and create ask for beyond plain writes: space set aside in order, blocks shared with another file,
//! compressed clusters, and space for every cluster in advance.

use std::io::IoSlice;

use block::device::check_range;
use block::num::{align_down, align_up, to_usize};
use block::{BlockDevice, Compressed, Error as BlockError, Preallocation, Result, Storage, ZeroMode};

use crate::alloc::{Meta, Run};
use crate::device::Qcow2;
use crate::l2::{Entry, OFFSET_MASK};
use crate::write::write_zeros;

impl Qcow2 {
    /// Sets host clusters aside for the unallocated clusters of a range, in order.
    pub(crate) fn reserve_range(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 || self.external || !self.writable {
            return Ok(());
        }
        check_range(offset, len, self.size())?;
        self.throttle()?;
        let (first, last) = self.clusters(offset, len);
        let _held = self.stripes.shared(first, last);
        self.check_overtaken(last)?;
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
        let whole = self.geometry.in_cluster(offset) == 0 && len.is_multiple_of(cluster);
        if len == 0 || !whole || self.is_encrypted() {
            return Ok(false);
        }
        self.record(offset, len)?;
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
        self.check_overtaken(last)?;
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
        if self.geometry.in_cluster(offset) != 0 || self.external || self.is_encrypted() {
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
        self.record(offset, len)?;
        self.throttle()?;
        let (first, last) = self.clusters(offset, len);
        let _held = self.stripes.exclusive(first, last);
        self.check_overtaken(last)?;
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
    /// clusters read as zeros (they are new in the file), except for what lies before the range in its first cluster:
    /// that stays what it was.
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
        self.keep_head(at, offset - at)?;
        while at < end {
            let piece = self.zero_piece_len(at, end - at);
            self.preallocate_piece(at, piece, mode)?;
            at += piece;
        }
        if self.external { self.extend_data_file(offset + len) } else { self.extend_over_allocation() }
    }

    /// What a cluster shows of the backing file in its first `len` bytes, which space of its own would hide, becomes
    /// its own. (With extended L2 entries space hides nothing.)
    fn keep_head(&self, start: u64, len: u64) -> Result<()> {
        if len == 0 || self.geometry.extended_l2 || !self.backed(start) {
            return Ok(());
        }
        self.throttle()?;
        let (first, last) = self.clusters(start, len);
        let _held = self.stripes.exclusive(first, last);
        self.check_overtaken(last)?;
        if !matches!(self.entry_at(start)?, Entry::Plain { host: None, zero: 0, .. }) {
            return Ok(());
        }
        let mut bytes = vec![0; to_usize(len)];
        self.read_held(&mut bytes, start)?;
        self.write_allocating(&bytes, start)
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
        self.check_overtaken(last)?;
        let mut guest = first;
        while guest <= last {
            let offset = self.geometry.offset_of(guest);
            let wanted = self.unallocated_clusters(guest, last)?;
            if wanted == 0 {
                guest += 1;
                continue;
            }
            let run = self.allocate_data(offset, wanted)?;
            let prepared = self.prepare_space(run, offset, mode).and_then(|()| {
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
            // Zeros in the file would be noise to the guest.
            _ if self.is_encrypted() && self.version >= 3 => (0, 1),
            _ => (1, 0),
        };
        Entry::Plain { host: Some(host), copied: true, allocated, zero }
    }

    /// Takes or fills the space of new clusters.
    fn prepare_space(&self, run: Run, guest: u64, mode: Preallocation) -> Result<()> {
        let len = self.geometry.offset_of(run.clusters);
        if self.is_encrypted() && self.version < 3 {
            return self.write_guest_zeros(guest, run.offset, len);
        }
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
