//! Where the blocks of a file lie; reading and writing its bytes.

use std::collections::HashSet;

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::alloc::Blocks;
use super::inode::{FLAG_EXTENTS, FLAG_INLINE_DATA, Inode};
use super::volume::Volume;
use crate::bytes::{corrupt, le32, low32, part, put_le32};

/// The most runs of one file that are kept.
const MOST_RUNS: usize = 1 << 22;

/// Blocks of a file that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one's number in the file.
    pub(super) logical: u64,
    /// And on the device.
    pub(super) start: u64,
    /// How many, at least one.
    pub(super) len: u64,
    /// Space set aside, which reads as zeros.
    pub(super) unwritten: bool,
}

/// Where a file lies.
#[derive(Debug, Default)]
pub(super) struct Map {
    /// Its blocks, by their numbers in the file.
    pub(super) runs: Vec<Run>,
    /// The blocks that hold the map.
    pub(super) meta: Vec<u64>,
    blocks: u64,
}

impl Map {
    /// Adds a run behind the others. A file cannot have more blocks than the file system.
    pub(super) fn push(&mut self, run: Run, most: u64) -> Result<()> {
        self.blocks = self.blocks.saturating_add(run.len);
        let end = self.runs.last().map_or(0, |last| last.logical + last.len);
        if run.len == 0 || run.logical < end || self.blocks > most || self.runs.len() >= MOST_RUNS {
            return Err(corrupt(format!(
                "an extent of {} blocks at {:#x} of the file",
                run.len, run.logical
            )));
        }
        match self.runs.last_mut() {
            Some(last)
                if end == run.logical
                    && last.start + last.len == run.start
                    && last.unwritten == run.unwritten =>
            {
                last.len += run.len;
            }
            _ => self.runs.push(run),
        }
        Ok(())
    }

    /// The block on the device of a block of the file, if it has been written.
    pub(super) fn block(&self, logical: u64) -> Option<u64> {
        let after = self.runs.partition_point(|run| run.logical <= logical);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (logical - run.logical < run.len && !run.unwritten).then(|| run.start + logical - run.logical)
    }

    /// All blocks, of the file and of the map.
    pub(super) fn all(&self) -> impl Iterator<Item = Blocks> {
        self.runs.iter().map(|run| (run.start, run.len)).chain(self.meta.iter().map(|block| (*block, 1)))
    }
}

/// Numbers runs as the blocks of a file, from its start.
pub(super) fn in_order(blocks: &[Blocks]) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    let mut logical = 0;
    for (start, len) in blocks {
        match runs.last_mut() {
            Some(last) if last.start + last.len == *start => last.len += len,
            _ => runs.push(Run { logical, start: *start, len: *len, unwritten: false }),
        }
        logical += len;
    }
    runs
}

impl Volume {
    /// Where a file's blocks lie. Of a file that has none: nowhere.
    pub(super) fn map(&mut self, inode: &Inode) -> Result<Map> {
        if !inode.has_map() {
            return Ok(Map::default());
        }
        if inode.has(FLAG_EXTENTS) { self.read_extents(inode) } else { self.read_pointers(inode) }
    }

    /// Makes the map of a file anew and notes how many blocks it has.
    pub(super) fn build_map(&mut self, inode: &mut Inode, runs: &[Run]) -> Result<()> {
        let beyond = runs.last().is_some_and(|run| run.logical + run.len > u64::from(u32::MAX));
        if beyond {
            return Err(Error::unsupported("a file of more than 2^32 blocks"));
        }
        let extents = inode.has(FLAG_EXTENTS) || inode.has(FLAG_INLINE_DATA) && self.geometry.has_extents();
        let meta = if extents { self.build_extents(inode, runs)? } else { self.build_pointers(inode, runs)? };
        let attributes = u64::from(inode.attribute_block() != 0);
        let blocks = runs.iter().map(|run| run.len).sum::<u64>() + meta + attributes;
        inode.set_blocks(blocks, self.geometry.block, self.geometry.has_huge_files())
    }

    /// Fills `buf` from `offset` of a file that has a map, zeros where it has holes.
    pub(super) fn read_mapped(&mut self, map: &Map, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let (size, end) = (self.geometry.block, offset + buf.len() as u64);
        for run in map.runs.iter().filter(|run| !run.unwritten) {
            let (first, last) = (run.logical * size, (run.logical + run.len) * size);
            let (from, to) = (first.max(offset), last.min(end));
            if from < to {
                let target = &mut buf[to_usize(from - offset)..to_usize(to - offset)];
                self.staged.read_through(run.start, from - first, target)?;
            }
        }
        Ok(())
    }

    /// Gives a file new contents, in new blocks, and itself a new map. It is not stored.
    pub(super) fn write_contents(&mut self, inode: &mut Inode, bytes: &[u8]) -> Result<()> {
        self.check_size(bytes.len() as u64)?;
        let old = self.map(inode)?;
        let goal = old.runs.first().map_or(self.goal_of(inode), |run| run.start);
        let count = (bytes.len() as u64).div_ceil(self.geometry.block);
        let blocks = self.take_blocks(goal, count)?;
        let runs = in_order(&blocks);
        self.write_runs(&runs, bytes)?;
        self.build_map(inode, &runs)?;
        inode.set_size(bytes.len() as u64);
        for (first, count) in old.all() {
            self.give_back(first, count)?;
        }
        Ok(())
    }

    /// The same where there is not enough room for both the old and the new contents: into the blocks that the file has,
    /// and others only as far as it needs more.
    pub(super) fn write_contents_in_place(&mut self, inode: &mut Inode, bytes: &[u8]) -> Result<()> {
        self.check_size(bytes.len() as u64)?;
        let old = self.map(inode)?;
        let mut wanted = (bytes.len() as u64).div_ceil(self.geometry.block);
        let (mut blocks, mut surplus) = (vec![], vec![]);
        for run in &old.runs {
            // Nobody else may have them.
            if self.is_system(run.start, run.len) {
                return Err(corrupt(format!("block {:#x} belongs to the file system itself", run.start)));
            }
            let kept = run.len.min(wanted);
            wanted -= kept;
            blocks.extend((kept > 0).then_some((run.start, kept)));
            surplus.extend((kept < run.len).then_some((run.start + kept, run.len - kept)));
        }
        let goal = blocks.last().map_or(self.goal_of(inode), |run: &Blocks| run.0 + run.1);
        blocks.extend(self.take_blocks(goal, wanted)?);
        let runs = in_order(&blocks);
        self.build_map(inode, &runs)?;
        inode.set_size(bytes.len() as u64);
        for (first, count) in surplus.into_iter().chain(old.meta.iter().map(|block| (*block, 1))) {
            self.give_back(first, count)?;
        }
        self.write_runs(&runs, bytes)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if size > 0x7fff_ffff && !self.geometry.has_large_files() {
            return Err(Error::unsupported(format!(
                "a file of {size} bytes where none is larger than 2 GiB"
            )));
        }
        Ok(())
    }

    /// Writes bytes to the blocks of a file, and zeros behind them.
    fn write_runs(&mut self, runs: &[Run], bytes: &[u8]) -> Result<()> {
        let size = self.block_bytes();
        for run in runs {
            let (from, len) = (to_usize(run.logical) * size, to_usize(run.len) * size);
            let piece = part(bytes, from, len);
            let whole = piece.len() / size * size;
            if whole > 0 {
                self.staged.write_through(run.start, &piece[..whole])?;
            }
            if whole < piece.len() {
                let mut last = piece[whole..].to_vec();
                last.resize(size, 0);
                self.staged.write_through(run.start + (whole / size) as u64, &last)?;
            }
        }
        Ok(())
    }

    // Pointers of ext2 ("Direct/Indirect Block Addressing").

    fn read_pointers(&mut self, inode: &Inode) -> Result<Map> {
        let (mut map, mut seen) = (Map::default(), HashSet::new());
        let field = inode.block_field().to_vec();
        let per_block = self.geometry.block / 4;
        let mut logical = 0;
        for index in 0..12 {
            self.pointer(&mut map, logical, le32(&field, 4 * index))?;
            logical += 1;
        }
        let mut span = per_block;
        for (level, index) in (0..3).zip(12..) {
            self.read_indirect(&mut map, &mut seen, logical, le32(&field, 4 * index), level)?;
            logical += span;
            span = span.saturating_mul(per_block);
        }
        map.meta = seen.into_iter().collect();
        map.meta.sort_unstable();
        Ok(map)
    }

    fn pointer(&self, map: &mut Map, logical: u64, block: u32) -> Result<()> {
        if block == 0 {
            return Ok(());
        }
        self.check_block(block.into(), 1)?;
        map.push(Run { logical, start: block.into(), len: 1, unwritten: false }, self.geometry.blocks)
    }

    /// Follows a block of pointers, `level` levels of which lie below it.
    fn read_indirect(
        &mut self,
        map: &mut Map,
        seen: &mut HashSet<u64>,
        logical: u64,
        block: u32,
        level: u32,
    ) -> Result<()> {
        if block == 0 {
            return Ok(());
        }
        if !seen.insert(block.into()) {
            return Err(corrupt(format!("a block of pointers at {block:#x} occurs twice")));
        }
        let pointers = self.block(block.into())?;
        let span = (self.geometry.block / 4).saturating_pow(level);
        for (index, pointer) in (0..).zip(pointers.chunks_exact(4)) {
            let logical = logical.saturating_add(span.saturating_mul(index));
            match level {
                0 => self.pointer(map, logical, le32(pointer, 0))?,
                _ => self.read_indirect(map, seen, logical, le32(pointer, 0), level - 1)?,
            }
        }
        Ok(())
    }

    /// Makes the pointers to these runs. Returns how many blocks they take besides the inode.
    fn build_pointers(&mut self, inode: &mut Inode, runs: &[Run]) -> Result<u64> {
        if runs.iter().any(|run| run.unwritten || run.start + run.len > u64::from(u32::MAX)) {
            return Err(Error::new(ErrorKind::Unsupported, "blocks that pointers of 32 bits cannot name"));
        }
        let goal = runs.first().map_or(self.goal_of(inode), |run| run.start);
        let map = Map { runs: runs.to_vec(), ..Map::default() };
        let end = runs.last().map_or(0, |run| run.logical + run.len);
        let mut field = [0; 60];
        for (index, logical) in (0..12_usize).zip(0..) {
            put_le32(&mut field, 4 * index, low32(map.block(logical).unwrap_or(0)));
        }
        let per_block = self.geometry.block / 4;
        let (mut logical, mut span, mut taken) = (12, per_block, 0);
        for level in 0..3 {
            if logical < end {
                let block = self.build_indirect(&map, logical, level, goal, &mut taken)?;
                put_le32(&mut field, 48 + 4 * level as usize, block);
            }
            logical += span;
            span = span.saturating_mul(per_block);
        }
        if logical < end {
            return Err(Error::unsupported(format!("a file of {end} blocks by pointers")));
        }
        inode.clear_map(false);
        inode.block_field_mut().copy_from_slice(&field);
        Ok(taken)
    }

    /// The block of pointers for what begins at `logical`; 0 if there is nothing.
    fn build_indirect(
        &mut self,
        map: &Map,
        logical: u64,
        level: u32,
        goal: u64,
        taken: &mut u64,
    ) -> Result<u32> {
        let per_block = self.geometry.block / 4;
        let span = per_block.saturating_pow(level);
        let end = logical + span.saturating_mul(per_block);
        let after = map.runs.partition_point(|run| run.logical + run.len <= logical);
        if map.runs.get(after).is_none_or(|run| run.logical >= end) {
            return Ok(0);
        }
        let block = self.take_block(goal)?;
        *taken += 1;
        let mut bytes = vec![0; self.block_bytes()];
        for index in 0..per_block {
            let logical = logical + index * span;
            let pointer = match level {
                0 => low32(map.block(logical).unwrap_or(0)),
                _ => self.build_indirect(map, logical, level - 1, goal, taken)?,
            };
            put_le32(&mut bytes, 4 * to_usize(index), pointer);
        }
        self.staged.put(block, bytes)?;
        Ok(low32(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_are_one() {
        assert_eq!(
            in_order(&[(10, 2), (12, 3), (40, 1)]),
            [
                Run { logical: 0, start: 10, len: 5, unwritten: false },
                Run { logical: 5, start: 40, len: 1, unwritten: false }
            ]
        );
    }

    #[test]
    fn extents_have_to_rise() {
        let mut map = Map::default();
        map.push(Run { logical: 2, start: 10, len: 2, unwritten: false }, 100).unwrap();
        map.push(Run { logical: 4, start: 12, len: 2, unwritten: false }, 100).unwrap();
        assert_eq!((map.runs.len(), map.block(5), map.block(6), map.block(1)), (1, Some(13), None, None));
        for run in [(3, 20, 1), (9, 20, 0), (9, 20, 99)] {
            assert!(
                map.push(Run { logical: run.0, start: run.1, len: run.2, unwritten: false }, 100).is_err()
            );
        }
    }
}
