//! The snapshot table: counting it and what its entries name, and making it anew where it breaks the rules.
//!
//! Entries are kept as long as the file has them: QEMU's limits for their number and for the whole table cut the
//! list at its end, too much extra data is cut off, and what version 3 asks for is filled in. An entry whose L1 table
//! cannot be where it says names nothing that could be read, and keeps the image from being opened for writing: it is
//! taken out. What the snapshot had to itself stays, as leaked clusters, for whoever wants to look for it.

use std::collections::BTreeSet;

use block::codec::Writer;
use block::image::Repair;
use block::num::is_aligned;
use block::{ErrorKind, Result};

use super::Check;
use super::counts::EXCLUSIVE;
use crate::geometry::MAX_L1_BYTES;
use crate::header::MAX_SNAPSHOTS;
use crate::snapshot::{Entries, MAX_EXTRA, REQUIRED_EXTRA, Snapshot, encode_table};

/// Where the snapshot table's fields are in the header: count (60) and offset (64).
const TABLE_FIELDS_AT: u64 = 60;

/// A snapshot table that is to take the place of the present one.
#[derive(Debug)]
pub(super) struct NewTable {
    pub(super) bytes: Vec<u8>,
    count: u32,
    /// Where it goes; 0 if it is empty.
    pub(super) place: u64,
    /// The bytes of the present one that have been counted.
    old_len: u64,
}

/// What the walk over the table has found.
#[derive(Debug, Default)]
struct Walk {
    l1_tables: Vec<(u64, u64)>,
    /// Length of the table in bytes.
    end: u64,
    /// Entries that can be kept.
    count: u32,
    /// The table has to be written anew,
    broken: bool,
    /// without the entries with these indices.
    lost: BTreeSet<usize>,
}

impl Check<'_> {
    /// Counts the snapshot table and the snapshots' L1 tables.
    pub(super) fn walk_snapshots(&mut self) -> Result<()> {
        if self.header.nb_snapshots == 0 {
            return Ok(());
        }
        let mut walk = Walk::default();
        self.too_many_snapshots(&mut walk);
        for entry in Entries::tolerant(self.storage, self.header, self.file_len) {
            match entry {
                Ok(entry) => {
                    walk.end = entry.end;
                    walk.count += 1;
                    self.check_snapshot(entry.index, &entry.snapshot, &mut walk);
                    match self.snapshot_l1(&entry.snapshot) {
                        Some(l1) => walk.l1_tables.push(l1),
                        None => {
                            walk.lost.insert(entry.index);
                            walk.broken = true;
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::Truncated => self.cut_off(&mut walk),
                Err(error) => {
                    self.failed(|| format!("ERROR failed to read the snapshot table: {error}"));
                    self.block("its snapshot table could not be read");
                }
            }
        }
        self.walk_snapshot_l1(&walk.l1_tables)?;
        self.metadata(self.header.snapshots_offset, walk.end, 1, EXCLUSIVE);
        if walk.broken && self.mode == Repair::All && self.blocked.is_none() {
            self.snapshot_table = Some(self.encode_snapshots(&walk)?);
        }
        Ok(())
    }

    fn too_many_snapshots(&mut self, walk: &mut Walk) {
        let excess = self.header.nb_snapshots.saturating_sub(MAX_SNAPSHOTS);
        if excess == 0 {
            return;
        }
        walk.broken = true;
        self.not_followed("the snapshot table is too long");
        match self.mode {
            Repair::All => {
                self.corrupt(excess.into(), || format!("Discarding {excess} overhanging snapshots"));
            }
            _ => self.failed(|| {
                format!(
                    "ERROR snapshot table too large\n\
                     You can force-remove all {excess} overhanging snapshots with vimg check -r all"
                )
            }),
        }
    }

    /// The file ends before the table does.
    fn cut_off(&mut self, walk: &mut Walk) {
        walk.broken = true;
        self.not_followed("the snapshot table is cut off");
        let lost = self.header.nb_snapshots.min(MAX_SNAPSHOTS) - walk.count;
        let first = walk.count;
        let verb = if self.mode == Repair::All { "Discarding" } else { "ERROR" };
        self.corrupt(lost.into(), || {
            format!(
                "{verb} {lost} snapshots, from entry {first} on: the file ends before the snapshot table does"
            )
        });
    }

    fn check_snapshot(&mut self, index: usize, snapshot: &Snapshot, walk: &mut Walk) {
        let extra = snapshot.extra_len;
        if extra > MAX_EXTRA {
            walk.broken = true;
            if self.mode == Repair::All {
                self.corrupt(1, || {
                    format!(
                        "Discarding too much extra metadata in snapshot table entry {index} ({extra} > {MAX_EXTRA})"
                    )
                });
            } else {
                let error = crate::Error::SnapshotExtraData(index);
                self.failed(|| format!("ERROR failed to read the snapshot table: {error}"));
            }
        }
        if self.header.version >= 3 && extra < REQUIRED_EXTRA {
            walk.broken = true;
            let verb = if self.mode == Repair::All { "Repairing" } else { "ERROR" };
            self.corrupt(1, || format!("{verb} snapshot table entry {index} is incomplete"));
        }
    }

    /// Where a snapshot's L1 table is, if it can be there.
    fn snapshot_l1(&mut self, snapshot: &Snapshot) -> Option<(u64, u64)> {
        let (offset, entries) = (snapshot.l1_offset, snapshot.l1_size);
        let len = u64::from(entries) * 8;
        let fault = if !is_aligned(offset, self.geometry.cluster_size()) {
            format!("l1_offset={offset:#x}: L1 table is not cluster aligned")
        } else if len > MAX_L1_BYTES {
            format!("l1_size={entries:#x}: L1 table is too large")
        } else if self.mode == Repair::All && !self.can_hold_l1(offset, len) {
            // Until the new table takes the old one's place the entry is there, and nothing may be put where it leads.
            self.note_ghost(offset, len, 1);
            format!("l1_offset={offset:#x}: L1 table lies outside the file, or on the header")
        } else if !self.countable(offset, len) {
            self.reference(offset, len, 1, EXCLUSIVE);
            self.not_followed("the L1 table of a snapshot lies outside the file");
            return None;
        } else {
            return Some((offset, len));
        };
        let id = String::from_utf8_lossy(&snapshot.id);
        let name = String::from_utf8_lossy(&snapshot.name);
        let verb = if self.mode == Repair::All { "Discarding" } else { "ERROR" };
        self.corrupt(1, || format!("{verb} snapshot {id} ({name}) {fault}; snapshot table entry corrupted"));
        self.not_followed("an entry of the snapshot table is damaged");
        None
    }

    /// Whether a repair leaves an L1 table at an aligned place.
    fn can_hold_l1(&self, offset: u64, len: u64) -> bool {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.file_len);
        inside && (offset != 0 || len == 0)
    }

    /// The table as it should be. What it holds is bounded by the format's limit for a table.
    fn encode_snapshots(&mut self, walk: &Walk) -> Result<NewTable> {
        let mut snapshots = vec![];
        for entry in Entries::tolerant(self.storage, self.header, self.file_len).map_while(Result::ok) {
            if !walk.lost.contains(&entry.index) {
                snapshots.push(entry.snapshot);
            }
        }
        let mut encoded = encode_table(&snapshots, self.header.size);
        while encoded.is_err() && !snapshots.is_empty() {
            // QEMU's limit of 64 MiB, which only names and extra data of the greatest length reach.
            snapshots.truncate(snapshots.len() - snapshots.len().div_ceil(16));
            self.not_followed("the snapshot table is too large");
            encoded = encode_table(&snapshots, self.header.size);
        }
        let count = u32::try_from(snapshots.len()).unwrap_or(MAX_SNAPSHOTS);
        Ok(NewTable { bytes: encoded?, count, place: 0, old_len: walk.end })
    }

    /// Writes the new table and lets the header name it. The old one's clusters lose their reference.
    pub(super) fn write_snapshot_table(&mut self) -> Result<()> {
        let Some(table) = self.snapshot_table.take() else { return Ok(()) };
        self.storage.write_at(&table.bytes, table.place)?;
        self.storage.sync()?;
        let mut fields = Writer::new();
        fields.be_u32(table.count).be_u64(table.place);
        self.storage.write_at(&fields.into_bytes(), TABLE_FIELDS_AT)?;
        self.storage.sync()?;
        let (offset, len) = (self.header.snapshots_offset, table.old_len);
        if len > 0 && self.countable(offset, len) {
            let first = self.geometry.cluster_of(offset);
            for cluster in first..=self.geometry.cluster_of(offset + len - 1) {
                self.counts.sub(cluster, 1);
            }
        }
        Ok(())
    }
}
