//! Trees of extents (kernel documentation, "Extent Tree"): read as a whole, and built anew as a whole.

use std::collections::HashSet;

use block::Result;
use block::num::to_usize;

use super::inode::Inode;
use super::map::{Map, Run};
use super::volume::Volume;
use crate::bytes::{copy_to, corrupt, high32, le16, le32, low16, low32, part, put_le16, put_le32};
use crate::crc::crc32c;

const MAGIC: u16 = 0xf30a;
/// Trees are never deeper.
const MOST_DEPTH: u16 = 5;
/// Extents of more blocks than this are space set aside, which reads as zeros.
const MOST_WRITTEN: u64 = 32768;
/// Entries of the root, in the inode.
const ROOT_ENTRIES: usize = 4;
const ENTRY: usize = 12;

/// The header of a node.
pub(super) fn header(entries: u16, most: u16, depth: u16) -> [u8; ENTRY] {
    let mut raw = [0; ENTRY];
    put_le16(&mut raw, 0, MAGIC);
    put_le16(&mut raw, 2, entries);
    put_le16(&mut raw, 4, most);
    put_le16(&mut raw, 6, depth);
    raw
}

/// A leaf's entry, or a node's: they begin with the block of the file.
type Entry = [u8; ENTRY];

/// Entries of a node that is a block.
fn room(block: usize) -> usize {
    (block - ENTRY) / ENTRY
}

impl Volume {
    pub(super) fn read_extents(&mut self, inode: &Inode) -> Result<Map> {
        let mut map = Map::default();
        let mut seen = HashSet::new();
        self.read_node(inode.block_field(), MOST_DEPTH + 1, &mut map, &mut seen)?;
        map.meta = seen.into_iter().collect();
        map.meta.sort_unstable();
        Ok(map)
    }

    fn read_node(&mut self, node: &[u8], above: u16, map: &mut Map, seen: &mut HashSet<u64>) -> Result<()> {
        let (entries, depth) = (usize::from(le16(node, 2)), le16(node, 6));
        if le16(node, 0) != MAGIC || ENTRY * (1 + entries) > node.len() || depth >= above {
            return Err(corrupt(format!(
                "a node of the extent tree is damaged (depth {depth}, {entries} entries)"
            )));
        }
        for entry in part(node, ENTRY, ENTRY * entries).chunks_exact(ENTRY) {
            if depth == 0 {
                let run = leaf(entry);
                self.check_block(run.start, run.len)?;
                map.push(run, self.geometry.blocks)?;
                continue;
            }
            let child = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
            if !seen.insert(child) {
                return Err(corrupt(format!("a node of the extent tree at {child:#x} occurs twice")));
            }
            let node = self.block(child)?;
            self.read_node(&node, depth, map, seen)?;
        }
        Ok(())
    }

    /// Makes the tree of these runs. Returns how many blocks it takes besides the inode.
    pub(super) fn build_extents(&mut self, inode: &mut Inode, runs: &[Run]) -> Result<u64> {
        let mut entries: Vec<_> = runs.iter().flat_map(entries_of).collect();
        let (mut depth, mut taken) = (0, 0);
        let goal = runs.first().map_or(self.goal_of(inode), |run| run.start);
        while entries.len() > ROOT_ENTRIES {
            let mut parents = vec![];
            for group in entries.chunks(room(self.block_bytes())) {
                let block = self.take_block(goal)?;
                let node = self.node(inode, group, depth);
                self.staged.put(block, node)?;
                parents.push(index_entry(le32(&group[0], 0), block));
                taken += 1;
            }
            (entries, depth) = (parents, depth + 1);
        }
        inode.clear_map(true);
        let count = u16::try_from(entries.len()).unwrap_or(0);
        let field = inode.block_field_mut();
        copy_to(field, 0, &header(count, 4, depth));
        copy_to(field, ENTRY, &entries.concat());
        Ok(taken)
    }

    /// A node that is a block.
    fn node(&self, inode: &Inode, entries: &[Entry], depth: u16) -> Vec<u8> {
        let mut node = vec![0; self.block_bytes()];
        let most = room(node.len());
        let count = |entries: usize| u16::try_from(entries).unwrap_or(u16::MAX);
        copy_to(&mut node, 0, &header(count(entries.len()), count(most), depth));
        copy_to(&mut node, ENTRY, &entries.concat());
        if self.geometry.has_checksums() {
            let end = ENTRY * (1 + most);
            let checksum = crc32c(self.seed_of(inode), part(&node, 0, end));
            put_le32(&mut node, end, checksum);
        }
        node
    }
}

fn leaf(entry: &[u8]) -> Run {
    let (logical, len) = (u64::from(le32(entry, 0)), u64::from(le16(entry, 4)));
    let start = u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8));
    let unwritten = len > MOST_WRITTEN;
    Run { logical, start, len: if unwritten { len - MOST_WRITTEN } else { len }, unwritten }
}

/// The entries for a run: an extent has at most 32768 blocks, one less if it is unwritten.
fn entries_of(run: &Run) -> Vec<Entry> {
    let most = if run.unwritten { MOST_WRITTEN - 1 } else { MOST_WRITTEN };
    let flag = if run.unwritten { MOST_WRITTEN } else { 0 };
    let starts = (0..run.len).step_by(to_usize(most));
    starts
        .map(|at| {
            let mut entry = [0; ENTRY];
            put_le32(&mut entry, 0, low32(run.logical + at));
            put_le16(&mut entry, 4, low16(low32((run.len - at).min(most) + flag)));
            put_le16(&mut entry, 6, low16(high32(run.start + at)));
            put_le32(&mut entry, 8, low32(run.start + at));
            entry
        })
        .collect()
}

fn index_entry(logical: u32, block: u64) -> Entry {
    let mut entry = [0; ENTRY];
    put_le32(&mut entry, 0, logical);
    put_le32(&mut entry, 4, low32(block));
    put_le16(&mut entry, 8, low16(high32(block)));
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_are_cut() {
        let run = Run { logical: 5, start: 0x1_0000_0000, len: 70_000, unwritten: false };
        let read: Vec<_> = entries_of(&run).iter().map(|entry| leaf(entry)).collect();
        let lens: Vec<_> = read.iter().map(|run| (run.logical, run.start, run.len)).collect();
        let start = 0x1_0000_0000;
        assert_eq!(lens, [(5, start, 32768), (32773, start + 32768, 32768), (65541, start + 65536, 4464)]);
        let run = Run { unwritten: true, ..run };
        let read: Vec<_> = entries_of(&run).iter().map(|entry| leaf(entry)).collect();
        assert!(
            read.iter().all(|run| run.unwritten) && read.iter().map(|run| run.len).sum::<u64>() == 70_000
        );
    }
}
