//! Bringing a journal to its end (kernel documentation, "Journal (jbd2)"), on the device.
//!
//! First the log is read and all of its checksums are compared; nothing is written before it is known what all of it
//! says. A transaction that has no valid commit block was never promised to anybody: the log ends before it.

use std::collections::HashMap;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, Result};

use super::map::Map;
use super::superblock::{LEN, OFFSET, field, incompat};
use super::volume::Volume;
use crate::bytes::{be16, be32, be64, corrupt, le32, part, put_be32, put_le32};
use crate::crc::{crc32_be, crc32c};

const MAGIC: u32 = 0xc03b_3998;

const COMPAT_CHECKSUM: u32 = 1;
const INCOMPAT_64BIT: u32 = 2;
const INCOMPAT_CSUM_V2: u32 = 8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// Revocations, 64 bits, asynchronous commits, checksums.
const INCOMPAT_KNOWN: u32 = 1 | INCOMPAT_64BIT | 4 | INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3;

/// The most blocks that a log may have: a gigabyte of the smallest.
const MOST_BLOCKS: u64 = 4 << 20;
/// The most blocks that are replayed, and the most that are revoked.
const MOST_TAGS: usize = 1 << 20;

const SUPERBLOCK_CHECKSUM: usize = 0xfc;
const HINT: &str = "Start the guest once and shut it down properly, or run e2fsck on the file system.";

/// The journal's superblock.
#[derive(Debug)]
struct Log {
    map: Map,
    raw: Vec<u8>,
    first: u64,
    end: u64,
    start: u64,
    sequence: u32,
    incompat: u32,
    compat: u32,
    seed: u32,
}

/// A block in the log that stands for one of the file system's.
#[derive(Debug)]
struct Tag {
    sequence: u32,
    target: u64,
    /// Number in the log.
    source: u64,
    /// It began with the magic number of the log, which was taken away.
    escaped: bool,
    /// What it has to be, and how many bits of that are known.
    checksum: Option<Checksum>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checksum {
    Short(u16),
    Full(u32),
}

/// Brings the journal to its end and says that this has been done. Returns how many blocks that took.
pub(super) fn replay(volume: &mut Volume) -> Result<u64> {
    let mut log = Log::read(volume)?;
    let mut written = 0;
    if log.start != 0 {
        let mut scan =
            Scan { volume, log: &log, tags: vec![], revoked: HashMap::new(), sequence: log.sequence };
        scan.run()?;
        let newest = scan.newest()?;
        let next = scan.sequence;
        written = newest.len() as u64;
        write(volume, &log, &newest)?;
        log.finish(volume, next)?;
    }
    finish(volume.staged.device())?;
    Ok(written)
}

/// Takes the mark from the superblock as the log has left it.
fn finish(device: &Arc<dyn BlockDevice>) -> Result<()> {
    let mut raw = vec![0; LEN];
    device.read_at(&mut raw, OFFSET)?;
    let flags = le32(&raw, field::INCOMPAT) & !incompat::RECOVER;
    put_le32(&mut raw, field::INCOMPAT, flags);
    // metadata_csum
    if le32(&raw, 0x64) & 0x400 != 0 {
        let checksum = crc32c(!0, part(&raw, 0, field::CHECKSUM));
        put_le32(&mut raw, field::CHECKSUM, checksum);
    }
    device.write_at(&raw, OFFSET)?;
    device.flush()
}

fn write(volume: &Volume, log: &Log, newest: &[&Tag]) -> Result<()> {
    for tag in newest {
        let mut block = log.block(volume, tag.source)?;
        if tag.escaped {
            put_be32(&mut block, 0, MAGIC);
        }
        volume.staged.device().write_at(&block, tag.target * volume.geometry.block)?;
    }
    volume.staged.flush()
}

/// Whether a transaction is older than another; the numbers wrap.
fn before(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() < 0
}

impl Log {
    fn read(volume: &mut Volume) -> Result<Self> {
        let number = volume.geometry.journal_inode;
        if number == 0 {
            return Err(
                Error::unsupported("the journal was not finished and lies on another device").hint(HINT)
            );
        }
        let inode = volume.inode(number)?;
        let map = volume.map(&inode)?;
        let mut log = Self {
            map,
            raw: vec![],
            first: 0,
            end: 0,
            start: 0,
            sequence: 0,
            incompat: 0,
            compat: 0,
            seed: 0,
        };
        log.raw = log.block(volume, 0)?;
        log.parse(volume.geometry.block)?;
        Ok(log)
    }

    fn parse(&mut self, block_bytes: u64) -> Result<()> {
        let raw = &self.raw;
        if be32(raw, 0) != MAGIC || !matches!(be32(raw, 4), 3 | 4) {
            return Err(corrupt("the journal has no superblock"));
        }
        if be32(raw, 4) == 4 {
            (self.compat, self.incompat) = (be32(raw, 0x24), be32(raw, 0x28));
        }
        self.first = be32(raw, 0x14).into();
        self.end = be32(raw, 0x10).into();
        self.start = be32(raw, 0x1c).into();
        self.sequence = be32(raw, 0x18);
        self.seed = crc32c(!0, part(raw, 0x30, 16));
        if self.start != 0 && self.incompat & INCOMPAT_FAST_COMMIT != 0 {
            return Err(
                Error::unsupported("the journal was not finished and may hold fast commits").hint(HINT)
            );
        }
        let unknown = self.incompat & !(INCOMPAT_KNOWN | INCOMPAT_FAST_COMMIT);
        if unknown != 0 {
            return Err(
                Error::unsupported(format!("a journal with incompatible features {unknown:#x}")).hint(HINT)
            );
        }
        let inside = |block| (self.first..self.end).contains(&block);
        if u64::from(be32(raw, 0xc)) != block_bytes
            || self.end > MOST_BLOCKS
            || self.first == 0
            || self.start != 0 && !inside(self.start)
        {
            return Err(corrupt(format!(
                "the journal's superblock has blocks of {} bytes from {:#x} to {:#x}, the log beginning at {:#x}",
                be32(raw, 0xc),
                self.first,
                self.end,
                self.start
            )));
        }
        if self.has_checksums() && self.own_checksum() != be32(raw, SUPERBLOCK_CHECKSUM) {
            return Err(corrupt("the checksum of the journal's superblock is wrong"));
        }
        if be32(raw, 0x20) != 0 {
            return Err(Error::unsupported("the journal was stopped by an error").hint(HINT));
        }
        Ok(())
    }

    fn own_checksum(&self) -> u32 {
        let mut raw = part(&self.raw, 0, 1024).to_vec();
        put_be32(&mut raw, SUPERBLOCK_CHECKSUM, 0);
        crc32c(!0, &raw)
    }

    /// A block of the journal.
    fn block(&self, volume: &Volume, number: u64) -> Result<Vec<u8>> {
        let place = self
            .map
            .block(number)
            .ok_or_else(|| corrupt(format!("block {number:#x} of the journal is a hole")))?;
        let mut bytes = vec![0; volume.block_bytes()];
        volume.staged.read_through(place, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Says that the log is empty.
    fn finish(&mut self, volume: &Volume, next: u32) -> Result<()> {
        put_be32(&mut self.raw, 0x18, next);
        put_be32(&mut self.raw, 0x1c, 0);
        if self.has_checksums() {
            let checksum = self.own_checksum();
            put_be32(&mut self.raw, SUPERBLOCK_CHECKSUM, checksum);
        }
        let place = self.map.block(0).ok_or_else(|| corrupt("the journal has no superblock"))?;
        volume.staged.device().write_at(&self.raw, place * volume.geometry.block)?;
        volume.staged.flush()
    }

    fn next(&self, block: u64) -> u64 {
        if block + 1 >= self.end { self.first } else { block + 1 }
    }

    fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    fn has_checksums(&self) -> bool {
        self.has(INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3)
    }

    /// Whether the checksum at the end of a descriptor or revocation block is right.
    fn tail_is_right(&self, block: &[u8]) -> bool {
        let end = block.len().saturating_sub(4);
        !self.has_checksums() || crc32c(crc32c(self.seed, part(block, 0, end)), &[0; 4]) == be32(block, end)
    }

    /// Whether a commit block is whole. `transaction`: the checksum of all blocks of it, in journals of the first kind.
    fn commit_is_right(&self, block: &[u8], transaction: u32) -> bool {
        const SUM: usize = 16;
        if self.has_checksums() {
            let mut copy = block.to_vec();
            put_be32(&mut copy, SUM, 0);
            return crc32c(self.seed, &copy) == be32(block, SUM);
        }
        let (kind, size) = (part(block, 12, 1), part(block, 13, 1));
        self.compat & COMPAT_CHECKSUM == 0
            || (kind, size) == (&[0], &[0]) && be32(block, SUM) == 0
            || (kind, size) == (&[1], &[4]) && be32(block, SUM) == transaction
    }

    /// The bytes of a tag without its UUID ("Descriptor Block").
    fn tag_bytes(&self) -> usize {
        if self.has(INCOMPAT_CSUM_V3) {
            return 16;
        }
        8 + 4 * usize::from(self.has(INCOMPAT_64BIT)) + 2 * usize::from(self.has(INCOMPAT_CSUM_V2))
    }
}

struct Scan<'a> {
    volume: &'a Volume,
    log: &'a Log,
    /// Of committed transactions, in the order of the log.
    tags: Vec<Tag>,
    /// Until which transaction a block's copies do not count any more.
    revoked: HashMap<u64, u32>,
    /// The transaction that comes next.
    sequence: u32,
}

impl Scan<'_> {
    /// Goes through the log until it ends: at a block that does not belong to the transaction that should come.
    fn run(&mut self) -> Result<()> {
        let (mut here, mut walked) = (self.log.start, 0);
        let (mut tags, mut revoked, mut sum) = (vec![], vec![], !0);
        while walked < self.log.end {
            let block = self.log.block(self.volume, here)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != self.sequence {
                break;
            }
            here = self.log.next(here);
            walked += 1;
            if self.tags.len() + tags.len() > MOST_TAGS || self.revoked.len() + revoked.len() > MOST_TAGS {
                return Err(Error::unsupported(format!("more than {MOST_TAGS} blocks in the log")));
            }
            match be32(&block, 4) {
                1 if self.log.tail_is_right(&block) => {
                    let from = tags.len();
                    self.descriptor(&block, here, &mut tags);
                    if self.log.compat & COMPAT_CHECKSUM != 0 && !self.log.has_checksums() {
                        sum = crc32_be(sum, &block);
                        for tag in &tags[from..] {
                            sum = crc32_be(sum, &self.log.block(self.volume, tag.source)?);
                        }
                    }
                    walked += (tags.len() - from) as u64;
                    here = tags
                        .last()
                        .filter(|_| tags.len() > from)
                        .map_or(here, |tag| self.log.next(tag.source));
                }
                2 if self.log.commit_is_right(&block, sum) => {
                    self.tags.append(&mut tags);
                    for target in revoked.drain(..) {
                        self.revoked.insert(target, self.sequence);
                    }
                    self.sequence = self.sequence.wrapping_add(1);
                    sum = !0;
                }
                5 if self.log.tail_is_right(&block) => self.revocation(&block, &mut revoked),
                _ => break,
            }
        }
        Ok(())
    }

    /// Notes what the blocks after a descriptor are copies of.
    fn descriptor(&self, block: &[u8], mut here: u64, tags: &mut Vec<Tag>) {
        let (log, size) = (self.log, self.log.tag_bytes());
        let end = block.len() - if log.has_checksums() { 4 } else { 0 };
        let wide = log.has(INCOMPAT_64BIT);
        let mut at = 12;
        while at + size <= end {
            let (flags, checksum) = if log.has(INCOMPAT_CSUM_V3) {
                (be32(block, at + 4), Some(Checksum::Full(be32(block, at + 12))))
            } else {
                let short = log.has(INCOMPAT_CSUM_V2).then(|| Checksum::Short(be16(block, at + 4)));
                (be16(block, at + 6).into(), short)
            };
            let high = if wide { be32(block, at + 8) } else { 0 };
            let target = u64::from(high) << 32 | u64::from(be32(block, at));
            let (sequence, escaped) = (self.sequence, flags & 1 != 0);
            tags.push(Tag { sequence, target, source: here, escaped, checksum });
            here = log.next(here);
            at += size + if flags & 2 == 0 { 16 } else { 0 };
            if flags & 8 != 0 {
                break;
            }
        }
    }

    fn revocation(&self, block: &[u8], revoked: &mut Vec<u64>) {
        let used = to_usize(be32(block, 12).into()).min(block.len());
        let wide = self.log.has(INCOMPAT_64BIT);
        let numbers = part(block, 16, used.saturating_sub(16));
        let targets = numbers.chunks_exact(if wide { 8 } else { 4 });
        revoked.extend(targets.map(|number| if wide { be64(number, 0) } else { be32(number, 0).into() }));
    }

    /// The newest copy of each block that is not revoked, in the order of their places, all of them checked.
    fn newest(&self) -> Result<Vec<&Tag>> {
        let mut newest = HashMap::new();
        for tag in &self.tags {
            // A block that was freed later must not get its old contents back ("Revocation Block").
            if self.revoked.get(&tag.target).is_none_or(|until| before(*until, tag.sequence)) {
                self.check(tag)?;
                newest.insert(tag.target, tag);
            }
        }
        let mut newest: Vec<_> = newest.into_values().collect();
        newest.sort_unstable_by_key(|tag| tag.target);
        Ok(newest)
    }

    fn check(&self, tag: &Tag) -> Result<()> {
        if tag.target >= self.volume.geometry.blocks {
            return Err(corrupt(format!("the journal has a copy of block {:#x}, outside", tag.target)));
        }
        let Some(wanted) = tag.checksum else { return Ok(()) };
        let block = self.log.block(self.volume, tag.source)?;
        let sum = crc32c(crc32c(self.log.seed, &tag.sequence.to_be_bytes()), &block);
        let right = match wanted {
            Checksum::Full(wanted) => wanted == sum,
            Checksum::Short(wanted) => wanted == crate::bytes::low16(sum),
        };
        if right {
            return Ok(());
        }
        Err(corrupt(format!("the journal's copy of block {:#x} has a wrong checksum", tag.target)).hint(HINT))
    }
}
