//! The superblock (kernel documentation, "Super Block") and where group descriptors lie.

use block::{BlockDevice, Error, Result};

use crate::bytes::{self, byte, corrupt, le16, le32};

/// Where it lies, in bytes.
const OFFSET: u64 = 1024;

const INCOMPAT_FILETYPE: u32 = 0x2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
/// Features that change nothing for a reader, or that are known here: filetype, recover, meta_bg, extents, 64bit, mmp,
/// flex_bg, ea_inode, dirdata, csum_seed, largedir, inline_data, encrypt, casefold.
const INCOMPAT_KNOWN: u32 = 0x2
    | 0x4
    | 0x10
    | 0x40
    | 0x80
    | 0x100
    | 0x200
    | 0x400
    | 0x1000
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
/// Descriptors have flags and a checksum: `gdt_csum` or `metadata_csum`.
const RO_COMPAT_GROUP_CHECKSUMS: u32 = 0x10 | 0x400;
/// Features that do not change what a bit of a bitmap means: sparse_super, large_file, btree_dir, huge_file, gdt_csum,
/// dir_nlink, extra_isize, quota, metadata_csum, readonly, project, verity, orphan_present. Not among them: clusters
/// (bigalloc), whose bits are several blocks each, and snapshots.
const RO_COMPAT_PLAIN_BITMAPS: u32 =
    0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x1000 | 0x2000 | 0x8000 | 0x1_0000;
/// The state of a file system that was unmounted and has no errors.
const STATE_CLEAN: u16 = 1;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

/// The fields that are needed, checked.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u64,
    pub(super) inodes_per_group: u64,
    pub(super) inode_bytes: u64,
    pub(super) descriptor_bytes: u64,
    pub(super) journal_inode: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    reserved_descriptor_blocks: u64,
    state: u16,
    first_meta_group: u64,
    backup_groups: [u64; 2],
    compat: u32,
    incompat: u32,
    ro_compat: u32,
}

impl Superblock {
    pub(super) fn read(device: &dyn BlockDevice) -> Result<Self> {
        Self::parse(&bytes::read(device, OFFSET, 1024)?)
    }

    fn parse(raw: &[u8]) -> Result<Self> {
        if le16(raw, 0x38) != 0xef53 {
            return Err(corrupt("the superblock at 0x400 has no magic number"));
        }
        let dynamic = le32(raw, 0x4c) >= 1;
        let flags = |at| if dynamic { le32(raw, at) } else { 0 };
        let incompat = flags(0x60);
        let unknown = incompat & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::unsupported(format!(
                "an ext file system with incompatible features {unknown:#x}"
            )));
        }
        let is_64bit = incompat & INCOMPAT_64BIT != 0;
        let high = if is_64bit { le32(raw, 0x150) } else { 0 };
        let log = le32(raw, 0x18);
        if log > 6 {
            return Err(corrupt(format!("the superblock has blocks of 1024 << {log} bytes")));
        }
        let superblock = Self {
            block_bytes: 1024 << log,
            blocks: u64::from(high) << 32 | u64::from(le32(raw, 4)),
            inodes: le32(raw, 0).into(),
            inodes_per_group: le32(raw, 0x28).into(),
            inode_bytes: if dynamic { le16(raw, 0x58).into() } else { 128 },
            descriptor_bytes: if is_64bit { le16(raw, 0xfe).into() } else { 32 },
            journal_inode: flags(0xe0).into(),
            first_data_block: le32(raw, 0x14).into(),
            blocks_per_group: le32(raw, 0x20).into(),
            reserved_descriptor_blocks: if dynamic { le16(raw, 0xce).into() } else { 0 },
            state: le16(raw, 0x3a),
            first_meta_group: flags(0x104).into(),
            backup_groups: [flags(0x24c).into(), flags(0x250).into()],
            compat: flags(0x5c),
            incompat,
            ro_compat: flags(0x64),
        };
        superblock.check()
    }

    fn check(self) -> Result<Self> {
        let size = |bytes: u64, least| bytes.is_power_of_two() && (least..=self.block_bytes).contains(&bytes);
        let fault = if !size(self.inode_bytes, 128) {
            format!("inodes of {} bytes", self.inode_bytes)
        } else if !size(self.descriptor_bytes, 32) {
            format!("group descriptors of {} bytes", self.descriptor_bytes)
        } else if self.inodes_per_group == 0 || self.blocks_per_group == 0 {
            "groups without inodes or blocks".to_owned()
        } else {
            return Ok(self);
        };
        Err(corrupt(format!("the superblock has {fault}")))
    }

    /// Whether the bits of the block bitmaps tell which blocks are in use: nothing is outstanding, nothing is damaged.
    pub(super) fn bitmaps_can_be_trusted(&self) -> bool {
        !self.needs_recovery()
            && self.state == STATE_CLEAN
            && self.ro_compat & !RO_COMPAT_PLAIN_BITMAPS == 0
            && self.blocks > self.first_data_block
            && self.blocks_per_group <= self.block_bytes * 8
    }

    /// Whether group descriptors have flags.
    pub(super) fn has_group_checksums(&self) -> bool {
        self.ro_compat & RO_COMPAT_GROUP_CHECKSUMS != 0
    }

    /// Number of groups.
    pub(super) fn groups(&self) -> u64 {
        self.blocks.saturating_sub(self.first_data_block).div_ceil(self.blocks_per_group)
    }

    /// The first block of a group, and one past its last.
    pub(super) fn group_blocks(&self, group: u64) -> (u64, u64) {
        let first = self.first_data_block.saturating_add(group.saturating_mul(self.blocks_per_group));
        (first.min(self.blocks), first.saturating_add(self.blocks_per_group).min(self.blocks))
    }

    /// Blocks of a group's inode table.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        (self.inodes_per_group * self.inode_bytes).div_ceil(self.block_bytes)
    }

    /// At most so many blocks at the beginning of a group are copies of the superblock and of descriptors, or kept for more
    /// of those.
    pub(super) fn blocks_in_front(&self, group: u64) -> u64 {
        let per_block = self.block_bytes / self.descriptor_bytes;
        let meta = self.incompat & INCOMPAT_META_BG != 0;
        let old = if meta { self.first_meta_group } else { self.groups().div_ceil(per_block) };
        let copies = if self.has_superblock(group) { 1 + old + self.reserved_descriptor_blocks } else { 0 };
        // A meta group has its descriptors in its first, second and last group.
        copies + u64::from(meta) * 2
    }

    /// Whether there is a journal that has not been brought to its end.
    pub(super) fn needs_recovery(&self) -> bool {
        self.incompat & INCOMPAT_RECOVER != 0
    }

    /// Whether entries of directories tell what they are the names of.
    pub(super) fn has_file_types(&self) -> bool {
        self.incompat & INCOMPAT_FILETYPE != 0
    }

    /// The block that holds the `index`-th block's worth of group descriptors ("Meta Block Groups").
    pub(super) fn descriptor_block(&self, index: u64) -> u64 {
        // The superblock's own: with clusters (bigalloc), blocks of 1 KiB count from 0, and it lies in block 1 still.
        let first = OFFSET / self.block_bytes;
        if self.incompat & INCOMPAT_META_BG == 0 || index < self.first_meta_group {
            return first + 1 + index;
        }
        let group = index * (self.block_bytes / self.descriptor_bytes);
        let start = if group == 0 { first } else { self.first_data_block + group * self.blocks_per_group };
        start + u64::from(self.has_superblock(group))
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            return group == 0 || self.backup_groups.contains(&group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        self.ro_compat & RO_COMPAT_SPARSE_SUPER == 0 || group <= 1 || [3, 5, 7].into_iter().any(power_of)
    }
}

/// What [`detect`](crate::detect) tells of a superblock: which of the three it is.
pub(crate) fn kind(raw: &[u8]) -> Option<crate::detect::Kind> {
    use crate::detect::Kind;
    if le16(raw, 0x38) != 0xef53 {
        return None;
    }
    let (compat, incompat, ro_compat) = (le32(raw, 0x5c), le32(raw, 0x60), le32(raw, 0x64));
    // A journal on a device of its own is not a file system.
    if incompat & 8 != 0 || byte(raw, 0x18) > 6 {
        return None;
    }
    // What ext3 knew: filetype, recover, journal_dev, meta_bg; sparse_super, large_file, btree_dir.
    if incompat & !0x1e != 0 || ro_compat & !7 != 0 {
        return Some(Kind::Ext4);
    }
    Some(if compat & 4 != 0 { Kind::Ext3 } else { Kind::Ext2 })
}
