//! Inodes (kernel documentation, "Index Nodes").

use block::num::to_usize;
use block::{Error, Result};
use guestdisk::fs::FileKind;

use crate::bytes::{copy_to, corrupt, high16, high32, le16, le32, low16, low32, part, put_le16, put_le32};
use crate::crc::crc32c;
use crate::types::{Attributes, Stat};

const FLAG_COMPRESSED: u32 = 0x4;
const FLAG_ENCRYPT: u32 = 0x800;
pub(super) const FLAG_INDEX: u32 = 0x1000;
const FLAG_HUGE_FILE: u32 = 0x4_0000;
pub(super) const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_VERITY: u32 = 0x10_0000;
pub(super) const FLAG_INLINE_DATA: u32 = 0x1000_0000;
const FLAG_CASEFOLD: u32 = 0x4000_0000;
/// Flags that what is made in a directory inherits: secrm, unrm, compr, sync, nodump, noatime, notail, dirsync,
/// project. (immutable, append and the like are not inherited.)
const FLAGS_INHERITED: u32 = 0x1 | 0x2 | 0x8 | 0x40 | 0x80 | 0x8000 | 0x1_0000 | 0x2000_0000;
const FLAG_PROJECT: u32 = 0x2000_0000;

const CHECKSUM_LOW: usize = 0x7c;
const CHECKSUM_HIGH: usize = 0x82;
const EXTRA: usize = 0x80;
/// The 60 bytes that say where the data lies, or are the data.
const BLOCK_FIELD: std::ops::Range<usize> = 0x28..0x64;
pub(super) const BLOCK_FIELD_BYTES: usize = 60;
/// Bytes of the fields behind the first 128 that are known here.
const KNOWN_EXTRA: u16 = 32;

/// An inode, of at least 128 bytes.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) number: u64,
    raw: Vec<u8>,
}

impl Inode {
    pub(super) fn new(number: u64, raw: Vec<u8>) -> Self {
        Self { number, raw }
    }

    /// A new one in the place of what was there. `mode` has its kind in the upper bits.
    pub(super) fn create(number: u64, len: u64, mode: u16, like: &Attributes, now: i64) -> Self {
        let mut inode = Self::new(number, vec![0; to_usize(len)]);
        let raw = &mut inode.raw;
        put_le16(raw, 0, mode);
        put_le16(raw, 2, low16(like.uid));
        put_le16(raw, 0x78, high16(like.uid));
        put_le16(raw, 0x18, low16(like.gid));
        put_le16(raw, 0x7a, high16(like.gid));
        put_le16(raw, 0x1a, 1);
        // Only NFS looks at generations: they are to differ when a number is used again.
        put_le32(raw, 0x64, low32(now.cast_unsigned().wrapping_mul(0x9e37_79b9) ^ number));
        if raw.len() > 128 {
            put_le16(raw, EXTRA, KNOWN_EXTRA);
        }
        let mtime = like.mtime.unwrap_or(now);
        inode.set_time(0x8, 0x8c, mtime);
        inode.set_time(0xc, 0x84, now);
        inode.set_time(0x10, 0x88, mtime);
        if inode.has_extra(0x98) {
            inode.set_time(0x90, 0x94, now);
        }
        inode
    }

    pub(super) fn raw(&self) -> &[u8] {
        &self.raw
    }

    pub(super) fn raw_mut(&mut self) -> &mut [u8] {
        &mut self.raw
    }

    /// Whether the fields behind the first 128 bytes reach to this place.
    fn has_extra(&self, end: usize) -> bool {
        self.raw.len() > 128 && 128 + usize::from(le16(&self.raw, EXTRA)) >= end
    }

    pub(super) fn mode(&self) -> u16 {
        le16(&self.raw, 0)
    }

    pub(super) fn kind(&self) -> FileKind {
        match self.mode() >> 12 {
            1 => FileKind::Fifo,
            2 => FileKind::CharDevice,
            4 => FileKind::Directory,
            6 => FileKind::BlockDevice,
            8 => FileKind::File,
            10 => FileKind::Symlink,
            12 => FileKind::Socket,
            _ => FileKind::Unknown,
        }
    }

    pub(super) fn size(&self) -> u64 {
        u64::from(le32(&self.raw, 0x6c)) << 32 | u64::from(le32(&self.raw, 4))
    }

    pub(super) fn set_size(&mut self, size: u64) {
        put_le32(&mut self.raw, 4, low32(size));
        put_le32(&mut self.raw, 0x6c, high32(size));
    }

    pub(super) fn links(&self) -> u16 {
        le16(&self.raw, 0x1a)
    }

    pub(super) fn set_links(&mut self, links: u16) {
        put_le16(&mut self.raw, 0x1a, links);
    }

    pub(super) fn flags(&self) -> u32 {
        le32(&self.raw, 0x20)
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags() & flag != 0
    }

    pub(super) fn set_flag(&mut self, flag: u32, on: bool) {
        let flags = if on { self.flags() | flag } else { self.flags() & !flag };
        put_le32(&mut self.raw, 0x20, flags);
    }

    pub(super) fn inherit(&mut self, parent: &Self, project: bool) {
        let mask = match self.kind() {
            FileKind::Directory => FLAGS_INHERITED,
            FileKind::File => FLAGS_INHERITED & !0x1_0000,
            _ => FLAGS_INHERITED & 0xc0,
        };
        self.set_flag(parent.flags() & mask, true);
        if project && parent.has(FLAG_PROJECT) && parent.has_extra(0xa0) && self.has_extra(0xa0) {
            put_le32(&mut self.raw, 0x9c, le32(&parent.raw, 0x9c));
        }
    }

    pub(super) fn block_field(&self) -> &[u8] {
        &self.raw[BLOCK_FIELD]
    }

    pub(super) fn block_field_mut(&mut self) -> &mut [u8] {
        &mut self.raw[BLOCK_FIELD]
    }

    /// The next inode of the orphan list, or the time of removal.
    pub(super) fn dtime(&self) -> u32 {
        le32(&self.raw, 0x14)
    }

    pub(super) fn set_dtime(&mut self, value: u32) {
        put_le32(&mut self.raw, 0x14, value);
    }

    /// The block of extended attributes; 0: none.
    pub(super) fn attribute_block(&self) -> u64 {
        u64::from(le16(&self.raw, 0x76)) << 32 | u64::from(le32(&self.raw, 0x68))
    }

    pub(super) fn set_attribute_block(&mut self, block: u64) {
        put_le32(&mut self.raw, 0x68, low32(block));
        put_le16(&mut self.raw, 0x76, low16(high32(block)));
    }

    /// Notes how many blocks it has, those of its map and its attributes included.
    pub(super) fn set_blocks(&mut self, blocks: u64, block_bytes: u64, huge: bool) -> Result<()> {
        let sectors = blocks.saturating_mul(block_bytes / 512);
        if sectors >> (if huge { 48 } else { 32 }) != 0 {
            return Err(Error::unsupported(format!("a file of {blocks} blocks")));
        }
        put_le32(&mut self.raw, 0x1c, low32(sectors));
        put_le16(&mut self.raw, 0x74, low16(high32(sectors)));
        self.set_flag(FLAG_HUGE_FILE, false);
        Ok(())
    }

    pub(super) fn mtime(&self) -> i64 {
        let seconds = i64::from(le32(&self.raw, 0x10).cast_signed());
        seconds + if self.has_extra(0x8c) { i64::from(le32(&self.raw, 0x88) & 3) << 32 } else { 0 }
    }

    /// "Inode Timestamps": two more bits for the seconds in the extra field, above them the nanoseconds.
    fn set_time(&mut self, at: usize, extra: usize, time: i64) {
        let low = low32(time.cast_unsigned());
        put_le32(&mut self.raw, at, low);
        if self.has_extra(extra + 4) {
            let epoch = time.wrapping_sub(i64::from(low.cast_signed())) >> 32 & 3;
            put_le32(&mut self.raw, extra, low32(epoch.cast_unsigned()));
        }
    }

    /// The contents have been changed.
    pub(super) fn touch(&mut self, now: i64) {
        self.set_time(0x10, 0x88, now);
        self.changed(now);
    }

    /// The inode has been changed.
    pub(super) fn changed(&mut self, now: i64) {
        self.set_time(0xc, 0x84, now);
    }

    pub(super) fn stat(&self) -> Stat {
        let raw = &self.raw;
        let wide = |low, high| u32::from(le16(raw, high)) << 16 | u32::from(le16(raw, low));
        Stat {
            kind: self.kind(),
            mode: u32::from(self.mode()) & 0o7777,
            uid: wide(2, 0x78),
            gid: wide(0x18, 0x7a),
            size: self.size(),
            mtime: self.mtime(),
            links: self.links().into(),
            node: self.number,
        }
    }

    /// Whether a symbolic link's target stands where others keep their blocks.
    pub(super) fn is_fast_link(&self) -> bool {
        self.kind() == FileKind::Symlink
            && self.size() < BLOCK_FIELD_BYTES as u64
            && !self.has(FLAG_INLINE_DATA | FLAG_EXTENTS | FLAG_ENCRYPT)
    }

    /// Whether it has blocks: devices, pipes and sockets have not, and short links.
    pub(super) fn has_map(&self) -> bool {
        let may = matches!(self.kind(), FileKind::File | FileKind::Directory | FileKind::Symlink);
        may && !self.has(FLAG_INLINE_DATA) && !self.is_fast_link()
    }

    /// Refuses contents that cannot be understood.
    pub(super) fn check_readable(&self) -> Result<()> {
        if self.has(FLAG_ENCRYPT) {
            return Err(Error::unsupported("it is encrypted").hint("Change it within the running guest."));
        }
        if self.has(FLAG_COMPRESSED) {
            return Err(Error::unsupported("it is compressed by a patch of ext2"));
        }
        Ok(())
    }

    /// Refuses contents that cannot be changed.
    pub(super) fn check_writable(&self) -> Result<()> {
        self.check_readable()?;
        if self.has(FLAG_VERITY) {
            return Err(Error::unsupported("it is sealed by fs-verity: its contents cannot be changed"));
        }
        Ok(())
    }

    /// Refuses directories in which names cannot be added or removed.
    pub(super) fn check_directory(&self) -> Result<()> {
        self.check_readable()?;
        if self.has(FLAG_CASEFOLD) {
            return Err(Error::unsupported("a directory without regard to upper and lower case")
                .hint("Use the appliance backend for this file system."));
        }
        Ok(())
    }

    /// What the checksums of its blocks begin with.
    pub(super) fn seed(&self, seed: u32) -> u32 {
        let seed = crc32c(seed, &low32(self.number).to_le_bytes());
        crc32c(seed, part(&self.raw, 0x64, 4))
    }

    pub(super) fn update_checksum(&mut self, seed: u32) {
        let has_high = self.has_extra(CHECKSUM_HIGH + 2);
        put_le16(&mut self.raw, CHECKSUM_LOW, 0);
        if has_high {
            put_le16(&mut self.raw, CHECKSUM_HIGH, 0);
        }
        let checksum = crc32c(self.seed(seed), &self.raw);
        put_le16(&mut self.raw, CHECKSUM_LOW, low16(checksum));
        if has_high {
            put_le16(&mut self.raw, CHECKSUM_HIGH, high16(checksum));
        }
    }

    /// Where attributes within the inode may stand.
    pub(super) fn attribute_area(&self) -> Result<std::ops::Range<usize>> {
        if self.raw.len() <= 128 {
            return Ok(0..0);
        }
        let start = 128 + usize::from(le16(&self.raw, EXTRA));
        if start > self.raw.len() || start % 4 != 0 {
            return Err(corrupt(format!("inode {} has fields of {start} bytes", self.number)));
        }
        Ok(start..self.raw.len())
    }

    /// Empties the field that says where the data lies, for these many levels of nothing.
    pub(super) fn clear_map(&mut self, extents: bool) {
        self.block_field_mut().fill(0);
        self.set_flag(FLAG_EXTENTS, extents);
        self.set_flag(FLAG_INLINE_DATA, false);
        if extents {
            copy_to(self.block_field_mut(), 0, &super::extents::header(0, 4, 0));
        }
    }
}
