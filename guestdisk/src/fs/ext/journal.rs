//! The journal (kernel documentation, "Journal (jbd2)"): what was promised but not yet put into its place.
//!
//! Nothing is written. Of each block that the log holds in its committed transactions we remember where in the journal
//! the newest copy lies; the device that is read from then on looks there first.

use std::collections::HashMap;
use std::sync::Arc;

use block::{BlockDevice, Result};

use super::super::redirect::{Patch, Redirect};
use super::Ext;
use super::inode::Inode;
use crate::bytes::{be16, be32, be64, corrupt, part};

const MAGIC: u32 = 0xc03b_3998;

const INCOMPAT_REVOKE: u32 = 1;
const INCOMPAT_64BIT: u32 = 2;
const INCOMPAT_CSUM_V2: u32 = 8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const INCOMPAT_KNOWN: u32 =
    INCOMPAT_REVOKE | INCOMPAT_64BIT | 4 | INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3 | INCOMPAT_FAST_COMMIT;

/// The most blocks that a log may have: a gigabyte of the smallest, which is as much as mke2fs makes without being told.
const MOST_BLOCKS: u64 = 4 << 20;
/// The most blocks that are replayed, and the most that are revoked.
const MOST_TAGS: usize = 1 << 20;

/// The superblock of the journal.
#[derive(Debug)]
struct Log {
    first: u64,
    end: u64,
    start: u64,
    sequence: u32,
    incompat: u32,
    /// The log is of the first version: there are no features.
    block_bytes: u64,
    fast_commit: bool,
}

/// A block in the log that stands for one of the file system's.
#[derive(Debug)]
struct Tag {
    sequence: u32,
    target: u64,
    patch: Patch,
}

/// The device as the journal will leave it; `None` if there is nothing to do or it cannot be done, which the notes
/// say.
pub(super) fn replay(ext: &Ext, notes: &mut Vec<String>) -> Result<Option<Arc<dyn BlockDevice>>> {
    if ext.superblock.journal_inode == 0 {
        notes.push(
            "the journal was not finished and lies on another device: files may show an older state".into(),
        );
        return Ok(None);
    }
    match read(ext) {
        Ok((patches, fast)) => {
            if fast {
                notes.push(
                    "fast commits in the journal are not replayed: the newest changes may be missing".into(),
                );
            }
            if patches.is_empty() {
                return Ok(None);
            }
            notes.push(format!("the journal was not finished: {} blocks are read from it", patches.len()));
            let device = Arc::clone(ext.source.device());
            Ok(Some(Arc::new(Redirect::new(device, ext.block_bytes(), patches))))
        }
        Err(error) => {
            notes.push(format!("the journal was not finished and cannot be replayed ({error})"));
            Ok(None)
        }
    }
}

fn read(ext: &Ext) -> Result<(HashMap<u64, Patch>, bool)> {
    let inode = ext.inode(ext.superblock.journal_inode)?;
    let log = Log::parse(&ext.block(ext.physical(&inode, 0)?)?, ext.block_bytes())?;
    if log.start == 0 {
        return Ok((HashMap::new(), log.fast_commit));
    }
    let mut scan = Scan { ext, inode: &inode, log: &log, tags: vec![], revoked: HashMap::new() };
    scan.run()?;
    let Scan { tags, revoked, .. } = scan;
    let mut patches = HashMap::new();
    for tag in tags {
        // A block that was freed later must not get its old contents back ("Revocation Block").
        if revoked.get(&tag.target).is_none_or(|until| before(*until, tag.sequence)) {
            patches.insert(tag.target, tag.patch);
        }
    }
    Ok((patches, log.fast_commit))
}

/// Whether a transaction is older than another; the numbers wrap.
fn before(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() < 0
}

impl Log {
    fn parse(raw: &[u8], block_bytes: u64) -> Result<Self> {
        if be32(raw, 0) != MAGIC || !matches!(be32(raw, 4), 3 | 4) {
            return Err(corrupt("it has no superblock"));
        }
        let incompat = if be32(raw, 4) == 4 { be32(raw, 0x28) } else { 0 };
        let unknown = incompat & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(block::Error::unsupported(format!("incompatible features {unknown:#x}")));
        }
        let fast_commit = incompat & INCOMPAT_FAST_COMMIT != 0;
        // Fast commits have the last blocks to themselves, 256 if nothing else is said.
        let fast_blocks = match (fast_commit, u64::from(be32(raw, 0x54))) {
            (false, _) => 0,
            (true, 0) => 256,
            (true, blocks) => blocks,
        };
        let log = Self {
            first: be32(raw, 0x14).into(),
            end: u64::from(be32(raw, 0x10)).saturating_sub(fast_blocks),
            start: be32(raw, 0x1c).into(),
            sequence: be32(raw, 0x18),
            incompat,
            block_bytes: be32(raw, 0xc).into(),
            fast_commit,
        };
        let inside = |block| (log.first..log.end).contains(&block);
        if log.block_bytes != block_bytes || log.end > MOST_BLOCKS || log.start != 0 && !inside(log.start) {
            return Err(corrupt(format!(
                "its superblock has blocks of {} bytes from {:#x} to {:#x}, the log beginning at {:#x}",
                log.block_bytes, log.first, log.end, log.start
            )));
        }
        Ok(log)
    }

    fn next(&self, block: u64) -> u64 {
        if block + 1 >= self.end { self.first } else { block + 1 }
    }

    fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    fn has_checksums(&self) -> bool {
        self.has(INCOMPAT_CSUM_V2) || self.has(INCOMPAT_CSUM_V3)
    }

    /// The bytes of a tag without its UUID ("Descriptor Block").
    fn tag_bytes(&self) -> usize {
        match (self.has(INCOMPAT_CSUM_V3), self.has(INCOMPAT_64BIT)) {
            (true, _) => 16,
            (false, wide) => 8 + 4 * usize::from(wide) + 2 * usize::from(self.has(INCOMPAT_CSUM_V2)),
        }
    }
}

struct Scan<'a> {
    ext: &'a Ext,
    inode: &'a Inode,
    log: &'a Log,
    /// Of committed transactions, in the order of the log.
    tags: Vec<Tag>,
    /// Until which transaction a block's copies do not count any more.
    revoked: HashMap<u64, u32>,
}

impl Scan<'_> {
    /// Goes through the log until it ends: at a block that does not belong to the transaction that should come.
    fn run(&mut self) -> Result<()> {
        let (mut here, mut sequence, mut walked) = (self.log.start, self.log.sequence, 0);
        let (mut tags, mut revoked) = (vec![], vec![]);
        while walked < self.log.end {
            let block = self.ext.block(self.ext.physical(self.inode, here)?)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            here = self.log.next(here);
            walked += 1;
            if self.tags.len() + tags.len() > MOST_TAGS || self.revoked.len() + revoked.len() > MOST_TAGS {
                return Err(block::Error::unsupported(format!("more than {MOST_TAGS} blocks in the log")));
            }
            match be32(&block, 4) {
                1 => {
                    let before = tags.len();
                    here = self.descriptor(&block, sequence, here, &mut tags)?;
                    walked += (tags.len() - before) as u64;
                }
                2 => {
                    self.tags.append(&mut tags);
                    self.revoked.extend(revoked.drain(..).map(|target| (target, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                5 => self.revocation(&block, &mut revoked),
                _ => break,
            }
        }
        Ok(())
    }

    /// Notes what the blocks after a descriptor are copies of. Returns the block after those.
    fn descriptor(&self, block: &[u8], sequence: u32, mut here: u64, tags: &mut Vec<Tag>) -> Result<u64> {
        let (log, size) = (self.log, self.log.tag_bytes());
        let end = block.len() - if log.has_checksums() { 4 } else { 0 };
        let mut at = 12;
        while at + size <= end {
            let (flags, high) = if log.has(INCOMPAT_CSUM_V3) {
                (be32(block, at + 4), be32(block, at + 8))
            } else {
                (be16(block, at + 6).into(), if log.has(INCOMPAT_64BIT) { be32(block, at + 8) } else { 0 })
            };
            let high = if log.has(INCOMPAT_64BIT) { high } else { 0 };
            let target = u64::from(high) << 32 | u64::from(be32(block, at));
            let source = self.ext.offset_of(self.ext.physical(self.inode, here)?)?;
            // A copy that began with the magic number of the log had it taken away.
            let head = (flags & 1 != 0).then(|| MAGIC.to_be_bytes());
            tags.push(Tag { sequence, target, patch: Patch { offset: source, head } });
            here = log.next(here);
            at += size + if flags & 2 == 0 { 16 } else { 0 };
            if flags & 8 != 0 {
                break;
            }
        }
        Ok(here)
    }

    fn revocation(&self, block: &[u8], revoked: &mut Vec<u64>) {
        let used = (be32(block, 12) as usize).min(block.len());
        let wide = self.log.has(INCOMPAT_64BIT);
        let numbers = part(block, 16, used.saturating_sub(16));
        let targets = numbers.chunks_exact(if wide { 8 } else { 4 });
        revoked.extend(targets.map(|number| if wide { be64(number, 0) } else { be32(number, 0).into() }));
    }
}
