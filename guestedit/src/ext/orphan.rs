//! Files that were removed while they were open, or were to be cut off: the guest stopped before that was done (kernel
//! documentation, "Orphan List").

use std::collections::HashSet;

use block::Result;
use block::num::to_usize;

use super::inode::Inode;
use super::map::Run;
use super::superblock::field;
use super::volume::Volume;
use crate::bytes::{corrupt, put_le32};

/// The most files of the list.
const MOST: usize = 1 << 16;

impl Volume {
    /// Finishes what the list says. Returns how many files were on it.
    pub(super) fn finish_orphans(&mut self) -> Result<usize> {
        let (mut number, mut seen) = (self.geometry.last_orphan, HashSet::new());
        if number == 0 {
            return Ok(0);
        }
        while number != 0 {
            if !seen.insert(number) || seen.len() > MOST {
                return Err(corrupt(format!("the list of orphans comes to inode {number} twice")));
            }
            let mut inode = self.inode(number)?;
            number = inode.dtime().into();
            if inode.links() == 0 {
                self.drop_inode(&inode)?;
            } else {
                inode.set_dtime(0);
                self.cut_off(&mut inode)?;
                self.store(&mut inode)?;
            }
        }
        self.edit_superblock(|raw| put_le32(raw, field::LAST_ORPHAN, 0))?;
        Ok(seen.len())
    }

    /// Gives back everything that belongs to an inode, and itself.
    pub(super) fn drop_inode(&mut self, inode: &Inode) -> Result<()> {
        self.drop_attributes(inode)?;
        for (first, count) in self.map(inode)?.all() {
            self.give_back(first, count)?;
        }
        self.freed.inodes.push(inode.number);
        Ok(())
    }

    /// Gives back the blocks behind the end of a file.
    fn cut_off(&mut self, inode: &mut Inode) -> Result<()> {
        if !inode.has_map() {
            return Ok(());
        }
        let map = self.map(inode)?;
        let wanted = inode.size().div_ceil(self.geometry.block);
        let mut runs = vec![];
        for run in &map.runs {
            let kept = wanted.saturating_sub(run.logical).min(run.len);
            if kept > 0 {
                runs.push(Run { len: kept, ..*run });
            }
            if kept < run.len {
                self.give_back(run.start + kept, run.len - kept)?;
            }
        }
        let within = to_usize(inode.size() % self.geometry.block);
        if let Some(last) = map.block(wanted.saturating_sub(1)).filter(|_| within > 0) {
            let mut block = vec![0; self.block_bytes()];
            self.staged.read_through(last, 0, &mut block)?;
            block[within..].fill(0);
            self.staged.write_through(last, &block)?;
        }
        self.build_map(inode, &runs)?;
        for block in map.meta {
            self.give_back(block, 1)?;
        }
        Ok(())
    }
}
