//! Directories (chapter "Directories").

use block::num::to_usize;
use block::{ErrorKind, Result};

use super::super::node::{Entry, FileKind, GoOn, Node};
use super::Xfs;
use super::inode::{Format, Inode};
use crate::bytes::{be16, be32, be64, byte, corrupt, part};

/// Names are in the data blocks below this offset; hashes and free space above ("Leaf Directories").
const LEAF_OFFSET: u64 = 32 << 30;
/// The most bytes of a directory that are looked through.
const MOST_BYTES: u64 = 256 << 20;

type Visit<'a> = &'a mut dyn FnMut(Entry) -> Result<GoOn>;

impl Xfs {
    pub(super) fn directory(&self, inode: &Inode, visit: Visit<'_>) -> Result<()> {
        if inode.format == Format::Local {
            return self.short(inode.fork(), visit);
        }
        let size = self.superblock.directory_block_bytes;
        let per_block = size / self.superblock.block_bytes;
        let blocks = inode.size().min(LEAF_OFFSET).min(MOST_BYTES).div_ceil(size);
        let mut number = 0;
        while number < blocks {
            let run = self.run(inode, number * per_block)?;
            if run.start.is_none() {
                number += (run.blocks / per_block).max(1);
                continue;
            }
            let mut block = vec![0; to_usize(size)];
            self.read_data(inode, &mut block, number * size)?;
            if !self.block_entries(&block, visit)? {
                return Ok(());
            }
            number += 1;
        }
        Ok(())
    }

    fn kind(&self, byte: u8) -> FileKind {
        if self.superblock.has_file_types { FileKind::of_entry(byte) } else { FileKind::Unknown }
    }

    /// "Shortform Directories": names in the inode.
    fn short(&self, fork: &[u8], visit: Visit<'_>) -> Result<()> {
        let (count, wide) = (byte(fork, 0), byte(fork, 1) > 0);
        let number_len = if wide { 8 } else { 4 };
        let typed = usize::from(self.superblock.has_file_types);
        let mut at = 2 + number_len;
        for _ in 0..count {
            let len = usize::from(byte(fork, at));
            let end = at + 3 + len + typed;
            if len == 0 || end + number_len > fork.len() {
                return Err(corrupt(format!("a name of {len} bytes in a directory within its inode")));
            }
            let number = if wide { be64(fork, end) } else { be32(fork, end).into() };
            let kind = self.kind(byte(fork, at + 3 + len));
            let name = part(fork, at + 3, len).to_vec();
            if !visit(Entry { name, node: Node::new(number), kind })? {
                break;
            }
            at = end + number_len;
        }
        Ok(())
    }

    /// "Block Directories", and the data blocks of larger ones.
    fn block_entries(&self, block: &[u8], visit: Visit<'_>) -> Result<GoOn> {
        let (header, has_tail) = match part(block, 0, 4) {
            b"XD2B" => (16, true),
            b"XD2D" => (16, false),
            b"XDB3" => (64, true),
            b"XDD3" => (64, false),
            other => {
                return Err(block::Error::new(
                    ErrorKind::Corrupt,
                    format!("a directory block begins with {:#x}", be32(other, 0)),
                ));
            }
        };
        let tail = match has_tail {
            true => 8 + 8 * be32(block, block.len() - 8) as usize,
            false => 0,
        };
        let end = block.len().checked_sub(tail).filter(|end| *end >= header);
        let end = end.ok_or_else(|| corrupt("a directory block with too many hashes"))?;
        let typed = usize::from(self.superblock.has_file_types);
        let mut at = header;
        while at + 8 <= end {
            let len = if be16(block, at) == 0xffff {
                usize::from(be16(block, at + 2))
            } else {
                (11 + usize::from(byte(block, at + 8)) + typed).next_multiple_of(8)
            };
            if len == 0 || len % 8 != 0 || at + len > end {
                return Err(corrupt(format!("a directory record of {len} bytes at {at:#x} of its block")));
            }
            if be16(block, at) != 0xffff {
                let name = part(block, at + 9, byte(block, at + 8).into());
                let kind = self.kind(byte(block, at + 9 + name.len()));
                let entry = Entry { name: name.to_vec(), node: Node::new(be64(block, at)), kind };
                if name != b"." && name != b".." && !visit(entry)? {
                    return Ok(false);
                }
            }
            at += len;
        }
        Ok(true)
    }
}
