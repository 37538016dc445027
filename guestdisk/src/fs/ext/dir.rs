//! Directories (kernel documentation, "Directory Entries"), read from one end to the other.

use block::num::to_usize;
use block::{ErrorKind, Result};

use super::super::node::{Entry, FileKind, GoOn, Node};
use super::inode::{Inode, Layout};
use super::{Ext, about, entry_kind, record_len};
use crate::bytes::{byte, corrupt, le32, part};

/// The most bytes of a directory that are looked through.
const MOST_BYTES: u64 = 256 << 20;

impl Ext {
    /// Visits the entries of a directory.
    pub(super) fn directory(
        &self,
        inode: &Inode,
        visit: &mut dyn FnMut(Entry) -> Result<GoOn>,
    ) -> Result<()> {
        if inode.kind() != FileKind::Directory {
            return Err(block::Error::new(
                ErrorKind::NotFound,
                format!("inode {}: not a directory", inode.number),
            ));
        }
        about(self.records(inode, visit), inode)
    }

    fn records(&self, inode: &Inode, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()> {
        if inode.layout()? == Layout::Inline {
            let (head, tail) = inode.inline();
            // The first four bytes are the parent's number, in place of the entries `.` and `..`.
            let go_on = self.block_records(part(head, 4, head.len()), visit)?;
            if go_on {
                self.block_records(tail, visit)?;
            }
            return Ok(());
        }
        let size = self.block_bytes();
        let blocks = inode.size().min(MOST_BYTES).div_ceil(size);
        let mut number = 0;
        while number < blocks {
            let run = self.run(inode, number, blocks - number)?;
            for index in 0..run.start.map_or(0, |_| run.blocks) {
                let block = self.block(run.start.unwrap_or(0) + index)?;
                if !self.block_records(&block, visit)? {
                    return Ok(());
                }
            }
            number += run.blocks;
        }
        Ok(())
    }

    /// Visits the records of one block.
    fn block_records(&self, block: &[u8], visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<GoOn> {
        let mut at = 0;
        while at + 8 <= block.len() {
            let len = record_len(block, at + 4, self.block_bytes());
            let name_len = usize::from(byte(block, at + 6));
            let number = le32(block, at);
            if len < 8 || at + len > block.len() || number != 0 && 8 + name_len > len {
                return Err(corrupt(format!("a directory record of {len} bytes at {at:#x} of its block")));
            }
            let name = part(block, at + 8, name_len);
            if number != 0 && name != b"." && name != b".." {
                let entry = Entry {
                    name: name.to_vec(),
                    node: Node::new(number.into()),
                    kind: entry_kind(&self.superblock, byte(block, at + 7)),
                };
                if !visit(entry)? {
                    return Ok(false);
                }
            }
            at += len;
        }
        Ok(true)
    }

    /// A file's block on the device, of which there has to be one: for the journal.
    pub(super) fn physical(&self, inode: &Inode, block: u64) -> Result<u64> {
        let run = self.run(inode, block, 1)?;
        let start = run.start.ok_or_else(|| corrupt(format!("block {} is a hole", to_usize(block))))?;
        self.offset_of(start)?;
        Ok(start)
    }
}
