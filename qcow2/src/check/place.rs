//! Room for what a repair writes: clusters that nothing refers to, and that the refcount structures to be replaced
//! do not lie in either, so that the state before stays complete until the new one takes its place.

use std::collections::{HashMap, HashSet};

use block::num::to_usize;
use block::{ErrorKind, Result};

use super::Check;
use super::counts::{DATA, EXCLUSIVE};
use crate::error::Error;
use crate::l2::MAX_HOST_OFFSET;

/// References that lead past the end of the file, as far as a repair could extend it to there. No new structure may
/// be put where they lead. If the file grows past such a place all the same, the reference counts: the guest reads
/// zeros there then, as it does in QEMU all the time.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    /// How many refer to (offset, length).
    regions: HashMap<(u64, u64), u64>,
    clusters: HashSet<u64>,
    /// Clusters of the file as a repair makes it, if it grows.
    end: u64,
    /// Clusters that have come to count.
    pub(super) counted: Vec<u64>,
    /// There are more than can be remembered: the file must not grow.
    too_many: bool,
}

impl Ghosts {
    /// How far behind the end of the file, in clusters, and how many.
    const WINDOW: u64 = 1 << 16;
}

impl Check<'_> {
    /// Remembers a reference that leads nowhere.
    pub(super) fn note_ghost(&mut self, offset: u64, len: u64, count: u64) {
        if len == 0 {
            return; // It leads to no cluster.
        }
        let end = self.geometry.clusters_for(self.file_len);
        let clusters = self.geometry.cluster_of(offset)
            ..=self.geometry.cluster_of(offset.saturating_add(len).saturating_sub(1));
        if *clusters.start() > end + Ghosts::WINDOW || clusters.end() - clusters.start() > Ghosts::WINDOW {
            return;
        }
        if self.ghosts.regions.len() as u64 > 2 * Ghosts::WINDOW {
            self.ghosts.too_many = true;
            return;
        }
        let total = self.ghosts.regions.entry((offset, len)).or_default();
        *total = total.saturating_add(count);
        self.ghosts.clusters.extend(clusters.filter(|cluster| *cluster >= end));
    }

    /// The file will have `end` clusters: references to what is new count now.
    fn grow_file(&mut self, end: u64) -> Result<()> {
        if end <= self.ghosts.end.max(self.geometry.clusters_for(self.file_len)) {
            return Ok(());
        }
        if self.ghosts.too_many {
            return Err(Error::CannotRepair("too many references lead past the end of the file").into());
        }
        self.ghosts.end = end;
        let limit = self.geometry.offset_of(end + 1);
        let real: Vec<_> = self.ghosts.regions.extract_if(|(offset, len), _| offset + len < limit).collect();
        for ((offset, len), count) in real {
            for cluster in self.geometry.cluster_of(offset)..=self.geometry.cluster_of(offset + len - 1) {
                self.counts.grow(cluster + 1);
                self.counts.add(cluster, count, DATA);
                self.ghosts.counted.push(cluster);
            }
        }
        Ok(())
    }

    /// Finds `clusters` clusters that follow each other and counts one reference to each. Returns the first.
    pub(super) fn place(&mut self, clusters: u64, flags: u16) -> Result<u64> {
        let mut first = self.place_from();
        let mut end = first;
        while end < first + clusters {
            if self.is_free(end) {
                end += 1;
            } else {
                first = end + 1;
                end = first;
            }
        }
        if end > MAX_HOST_OFFSET >> self.geometry.cluster_bits {
            return Err(block::Error::new(ErrorKind::NoSpace, "there is no room for a repair"));
        }
        if clusters == 1 {
            self.next_place = end;
        }
        self.counts.grow(end);
        self.grow_file(end)?;
        (first..end).for_each(|cluster| self.counts.add(cluster, 1, flags));
        Ok(first)
    }

    /// Takes back what [`place`](Self::place) has counted.
    pub(super) fn unplace(&mut self, first: u64, clusters: u64) {
        (first..first + clusters).for_each(|cluster| self.counts.sub(cluster, 1));
        self.next_place = self.next_place.min(first);
    }

    /// Where to begin looking: behind the file while clusters that seem free may hold something that could not be
    /// followed.
    fn place_from(&self) -> u64 {
        let from = match self.incomplete {
            Some(_) => self.geometry.clusters_for(self.file_len),
            None => 1,
        };
        self.next_place.max(from)
    }

    fn is_free(&self, cluster: u64) -> bool {
        let table = self.geometry.cluster_of(self.header.refcount_table_offset);
        let table = table..table + u64::from(self.header.refcount_table_clusters);
        self.counts.get(cluster).references == 0
            && !table.contains(&cluster)
            && !self.stored.named.contains(&cluster)
            && !self.ghosts.clusters.contains(&cluster)
    }

    /// Counts what seems to be leaked as used: what refers to it may not have been found.
    pub(super) fn keep_leaks(&mut self, reason: &str) -> Result<()> {
        let mut kept = false;
        let mut uses: HashMap<u64, u64> = HashMap::new();
        for cluster in &self.stored.counted {
            *uses.entry(*cluster).or_default() += 1;
        }
        self.for_each_group(|check, group| {
            // A block that is something else, too, says nothing.
            let block =
                check.stored.blocks.get(&group.index).map(|offset| check.geometry.cluster_of(*offset));
            let sound = |cluster: &u64| uses.get(cluster) == Some(&check.counts.get(*cluster).references);
            let (Some(stored), true) = (group.stored, block.as_ref().is_some_and(sound)) else {
                return Ok(());
            };
            for ((cluster, stored), slot) in (group.first..).zip(stored).zip(group.slots) {
                let references = check.counts.decode(cluster, *slot).references;
                if *stored > references {
                    check.counts.add(cluster, stored - references, 0);
                    kept = true;
                }
            }
            Ok(())
        })?;
        if kept {
            self.say_kept(reason);
        }
        Ok(())
    }

    /// Tells why leaks are left as they are.
    pub(super) fn say_kept(&mut self, reason: &str) {
        self.say(|| format!("Leaked clusters are kept, they may be in use: {reason}"));
    }

    /// Everything that has been counted can be said by refcounts of this width.
    pub(super) fn counts_fit(&self) -> Result<()> {
        match self.counts.exceed(self.geometry.max_refcount()) {
            None => Ok(()),
            Some(cluster) => Err(Error::RefcountWidth { offset: self.geometry.offset_of(cluster) }.into()),
        }
    }

    /// Finds a place for the new snapshot table.
    pub(super) fn place_snapshot_table(&mut self) -> Result<()> {
        let Some(len) = self.snapshot_table.as_ref().map(|table| table.bytes.len() as u64) else {
            return Ok(());
        };
        let place = match self.geometry.clusters_for(len) {
            0 => 0,
            clusters => {
                let first = self.place(clusters, EXCLUSIVE)?;
                self.geometry.offset_of(first)
            }
        };
        if let Some(table) = &mut self.snapshot_table {
            table.place = place;
        }
        Ok(())
    }

    /// A copy of a cluster, with a reference for each of `count` entries.
    pub(super) fn place_copy(&mut self, cluster: u64, count: u64) -> Result<u64> {
        let place = self.place(1, DATA)?;
        self.counts.add(place, count - 1, DATA);
        self.counts.sub(cluster, count);
        Ok(place)
    }

    /// Writes the copy.
    pub(super) fn copy_cluster(&self, from: u64, to: u64) -> Result<()> {
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        self.storage.read_at(&mut bytes, self.geometry.offset_of(from))?;
        self.storage.write_at(&bytes, self.geometry.offset_of(to))
    }
}
