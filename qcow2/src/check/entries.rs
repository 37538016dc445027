//! Mappings that a repair changes.
//!
//! * A zero cluster whose preallocated place cannot be one loses the place: it reads as before.
//! * Guest data that lies on the image's own structures moves: the clusters are copied as they are and the entries
//!   name the copies. A write to the guest then does not destroy the image, and a change of the image does not show
//!   in the guest. Not with LUKS, where a sector means something at one place in the file only.

use std::collections::BTreeMap;

use block::Result;
use block::num::{is_aligned, to_usize};

use super::Check;
use super::copied::word_at;
use super::counts::{DATA, EXCLUSIVE};
use crate::header::CRYPT_LUKS;
use crate::l2;

/// Where clusters with guest data on metadata go, by cluster.
pub(super) type Moves = BTreeMap<u64, u64>;

impl Check<'_> {
    /// All L2 tables that can be rewritten, ascending: those that are no other structure too.
    fn own_tables(&self) -> Vec<u64> {
        let own = |offset: &u64| self.counts.get(self.geometry.cluster_of(*offset)).flags & EXCLUSIVE == 0;
        let mut tables: Vec<u64> = self.tables.uses.keys().copied().filter(own).collect();
        tables.sort_unstable();
        tables
    }

    /// Calls `visit` with every plain entry of an L2 table: position, word, bitmap (0 if there is none).
    fn for_each_plain(&self, bytes: &[u8], mut visit: impl FnMut(usize, u64, u64)) {
        let size = to_usize(self.geometry.l2_entry_size());
        for position in (0..bytes.len()).step_by(size) {
            let word = word_at(bytes, position);
            if word != 0 && word & l2::COMPRESSED == 0 {
                let bitmap = if self.geometry.extended_l2 { word_at(bytes, position + 8) } else { 0 };
                visit(position, word, bitmap);
            }
        }
    }

    /// Finds places for the guest data that lies on metadata.
    pub(super) fn plan_moves(&mut self) -> Result<Moves> {
        let mut moves = Moves::new();
        if !self.data_on_metadata || self.external {
            return Ok(moves);
        }
        if self.header.crypt_method == CRYPT_LUKS {
            self.say(|| "Encrypted data stays where it is: elsewhere it could not be decrypted".to_owned());
            return Ok(moves);
        }
        let mut found: BTreeMap<u64, u64> = BTreeMap::new();
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        for table in self.own_tables() {
            let count = self.tables.uses.get(&table).map_or(0, |uses| uses.active + uses.snapshots);
            self.storage.read_at(&mut bytes, table)?;
            self.for_each_plain(&bytes, |_, word, _| {
                let cluster = self.data_cluster(word);
                if let Some(cluster) = cluster.filter(|cluster| self.is_on_metadata(*cluster)) {
                    *found.entry(cluster).or_default() += count;
                }
            });
        }
        for (cluster, count) in found {
            if self.counts.get(cluster).references > count {
                moves.insert(cluster, self.place_copy(cluster, count)?);
            }
        }
        self.copied_suspect |= !moves.is_empty();
        Ok(moves)
    }

    fn is_on_metadata(&self, cluster: u64) -> bool {
        let count = self.counts.get(cluster);
        count.overlap() && count.flags & DATA != 0
    }

    /// The host cluster of a plain entry, if it has one that can be.
    fn data_cluster(&self, word: u64) -> Option<u64> {
        let offset = word & l2::OFFSET_MASK;
        let size = self.geometry.cluster_size();
        let good = offset != 0 && is_aligned(offset, size) && self.countable(offset, size);
        good.then(|| self.geometry.cluster_of(offset))
    }

    /// Copies what moves and rewrites the entries.
    pub(super) fn rewrite_entries(&mut self, moves: &Moves) -> Result<()> {
        if moves.is_empty() && self.bad_zero_places == 0 {
            return Ok(());
        }
        for (from, to) in moves {
            self.copy_cluster(*from, *to)?;
        }
        self.storage.sync()?;
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        for table in self.own_tables() {
            self.storage.read_at(&mut bytes, table)?;
            let mut changes: Vec<(usize, u64)> = vec![];
            self.for_each_plain(&bytes, |position, word, bitmap| {
                changes.extend(self.better_entry(word, bitmap, moves).map(|word| (position, word)));
            });
            self.rewrite_table(table, &changes, |bytes, (position, word)| {
                bytes[*position..*position + 8].copy_from_slice(&word.to_be_bytes());
                *position
            })?;
        }
        self.storage.sync()
    }

    fn better_entry(&self, word: u64, bitmap: u64, moves: &Moves) -> Option<u64> {
        if self.is_bad_zero_place(word, bitmap) {
            return Some(if self.geometry.extended_l2 { 0 } else { l2::ZERO });
        }
        let to = self.data_cluster(word).and_then(|cluster| moves.get(&cluster))?;
        Some((word & !(l2::OFFSET_MASK | l2::COPIED)) | self.geometry.offset_of(*to))
    }

    /// A cluster that holds no data, preallocated where no cluster can be.
    pub(super) fn is_bad_zero_place(&self, word: u64, bitmap: u64) -> bool {
        let has_data = match self.geometry.extended_l2 {
            true => bitmap & 0xffff_ffff != 0,
            false => word & l2::ZERO == 0 || self.header.version < 3,
        };
        !has_data && !is_aligned(word & l2::OFFSET_MASK, self.geometry.cluster_size())
    }
}
