//! The superblock (kernel documentation, "Super Block"): the shape of the file system, and whether it may be changed.

use block::{Error, Result};

use crate::bytes::{byte, corrupt, le16, le32, part};
use crate::crc::crc32c;

/// Where it lies, in bytes.
pub(super) const OFFSET: u64 = 1024;
/// Its length in bytes.
pub(super) const LEN: usize = 1024;

/// Fields that are changed.
pub(super) mod field {
    pub(in crate::ext) const FREE_BLOCKS: usize = 0xc;
    pub(in crate::ext) const FREE_INODES: usize = 0x10;
    pub(in crate::ext) const WRITE_TIME: usize = 0x30;
    pub(in crate::ext) const COMPAT: usize = 0x5c;
    pub(in crate::ext) const INCOMPAT: usize = 0x60;
    pub(in crate::ext) const LAST_ORPHAN: usize = 0xe8;
    pub(in crate::ext) const FREE_BLOCKS_HIGH: usize = 0x158;
    pub(in crate::ext) const CHECKSUM: usize = 0x3fc;
}

/// Compatible features.
mod compat {
    pub(super) const HAS_JOURNAL: u32 = 0x4;
    pub(super) const SPARSE_SUPER2: u32 = 0x200;
}

/// Incompatible features.
pub(super) mod incompat {
    pub(in crate::ext) const RECOVER: u32 = 0x4;
    pub(super) const FILETYPE: u32 = 0x2;
    pub(super) const META_BG: u32 = 0x10;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const WIDE: u32 = 0x80;
    pub(super) const MMP: u32 = 0x100;
    pub(super) const CSUM_SEED: u32 = 0x2000;
    pub(super) const LARGE_DIR: u32 = 0x4000;
    /// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, large_dir, inline_data, encrypt,
    /// casefold.
    pub(super) const KNOWN: u32 = 0x2
        | RECOVER
        | META_BG
        | EXTENTS
        | WIDE
        | MMP
        | 0x200
        | 0x400
        | CSUM_SEED
        | LARGE_DIR
        | 0x8000
        | 0x1_0000
        | 0x2_0000;
}

/// Features that are incompatible with writers that do not know them.
mod ro_compat {
    pub(super) const SPARSE_SUPER: u32 = 0x1;
    pub(super) const LARGE_FILE: u32 = 0x2;
    pub(super) const HUGE_FILE: u32 = 0x8;
    pub(super) const GDT_CSUM: u32 = 0x10;
    pub(super) const DIR_NLINK: u32 = 0x20;
    pub(super) const QUOTA: u32 = 0x100;
    pub(super) const BIGALLOC: u32 = 0x200;
    pub(super) const METADATA_CSUM: u32 = 0x400;
    pub(super) const READONLY: u32 = 0x1000;
    pub(super) const PROJECT: u32 = 0x2000;
    pub(super) const ORPHAN_PRESENT: u32 = 0x1_0000;
    /// sparse_super, large_file, btree_dir, huge_file, gdt_csum, dir_nlink, extra_isize, quota, metadata_csum, project,
    /// verity.
    pub(super) const KNOWN: u32 = SPARSE_SUPER
        | LARGE_FILE
        | 0x4
        | HUGE_FILE
        | GDT_CSUM
        | DIR_NLINK
        | 0x40
        | QUOTA
        | METADATA_CSUM
        | PROJECT
        | 0x8000;
}

/// The most groups: a file system of 32 TiB in blocks of 4 KiB.
const MOST_GROUPS: u64 = 1 << 18;

const HINT: &str = "Use the appliance backend for this file system.";
const HINT_QUOTA: &str = "Turn the feature off in the guest (tune2fs -O ^quota on the unmounted file system; quotas are counted anew when it \
    is turned on again), or use the appliance backend, whose Linux keeps the count.";
const HINT_FSCK: &str = "Run e2fsck on it first, or start the guest once and shut it down properly.";

/// What is needed of the superblock, checked.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    /// Bytes of a block.
    pub(super) block: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u64,
    pub(super) first_data_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) inodes_per_group: u64,
    /// Bytes of an inode.
    pub(super) inode_bytes: u64,
    /// Bytes of a group descriptor.
    pub(super) descriptor_bytes: u64,
    pub(super) groups: u64,
    pub(super) first_inode: u64,
    pub(super) journal_inode: u64,
    pub(super) last_orphan: u64,
    pub(super) reserved_descriptor_blocks: u64,
    pub(super) mmp_block: u64,
    pub(super) uuid: [u8; 16],
    /// What all checksums begin with.
    pub(super) seed: u32,
    pub(super) hash_seed: [u32; 4],
    /// Characters count as unsigned in hashes of names.
    pub(super) hash_unsigned: bool,
    first_meta_group: u64,
    backup_groups: [u64; 2],
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    state: u16,
    dynamic: bool,
    quota: bool,
}

impl Geometry {
    pub(super) fn parse(raw: &[u8], device_bytes: u64) -> Result<Self> {
        if le16(raw, 0x38) != 0xef53 {
            return Err(corrupt("the superblock at 0x400 has no magic number"));
        }
        let dynamic = le32(raw, 0x4c) >= 1;
        let flags = |at| if dynamic { le32(raw, at) } else { 0 };
        let (incompat, log) = (flags(0x60), le32(raw, 0x18));
        if log > 6 {
            return Err(corrupt(format!("the superblock has blocks of 1024 << {log} bytes")));
        }
        let wide = incompat & incompat::WIDE != 0;
        let high = if wide { le32(raw, 0x150) } else { 0 };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(part(raw, 0x68, 16));
        let seed = if incompat & incompat::CSUM_SEED != 0 { le32(raw, 0x270) } else { crc32c(!0, &uuid) };
        let geometry = Self {
            block: 1024 << log,
            blocks: u64::from(high) << 32 | u64::from(le32(raw, 4)),
            inodes: le32(raw, 0).into(),
            first_data_block: le32(raw, 0x14).into(),
            blocks_per_group: le32(raw, 0x20).into(),
            inodes_per_group: le32(raw, 0x28).into(),
            inode_bytes: if dynamic { le16(raw, 0x58).into() } else { 128 },
            descriptor_bytes: if wide { le16(raw, 0xfe).into() } else { 32 },
            groups: 0,
            first_inode: if dynamic { le32(raw, 0x54).into() } else { 11 },
            journal_inode: flags(0xe0).into(),
            last_orphan: flags(field::LAST_ORPHAN).into(),
            reserved_descriptor_blocks: if flags(0x5c) & 0x10 != 0 { le16(raw, 0xce).into() } else { 0 },
            mmp_block: u64::from(le32(raw, 0x168)) | u64::from(le32(raw, 0x16c)) << 32,
            uuid,
            seed,
            hash_seed: [0, 4, 8, 12].map(|at| le32(raw, 0xec + at)),
            hash_unsigned: le32(raw, 0x160) & 2 != 0,
            first_meta_group: flags(0x104).into(),
            backup_groups: [flags(0x24c).into(), flags(0x250).into()],
            compat: flags(0x5c),
            incompat,
            ro_compat: flags(0x64),
            state: le16(raw, 0x3a),
            dynamic,
            quota: [0x240, 0x244, 0x26c].into_iter().any(|at| flags(at) != 0),
        };
        geometry.check_features(byte(raw, 0x175))?;
        geometry.check(device_bytes)
    }

    /// Refuses what is not known well enough to be changed.
    fn check_features(&self, checksum_type: u8) -> Result<()> {
        let refuse = |reason: String| Err(Error::unsupported(reason).hint(HINT));
        let unknown = self.incompat & !incompat::KNOWN;
        if unknown != 0 {
            return refuse(format!("ext with incompatible features {unknown:#x}"));
        }
        if self.ro_compat & ro_compat::BIGALLOC != 0 {
            return refuse("ext4 with clusters of blocks (bigalloc)".to_owned());
        }
        if self.ro_compat & ro_compat::READONLY != 0 {
            return refuse("the file system is marked as read-only".to_owned());
        }
        if self.ro_compat & ro_compat::ORPHAN_PRESENT != 0 {
            return Err(Error::unsupported("files in the orphan file wait for their removal").hint(HINT_FSCK));
        }
        let unknown = self.ro_compat & !ro_compat::KNOWN;
        if unknown != 0 {
            return refuse(format!("ext with features {unknown:#x} that a writer has to know"));
        }
        if self.ro_compat & ro_compat::QUOTA != 0 && self.quota {
            let reason = "ext4 that keeps the quotas of users within itself (feature quota)";
            return Err(Error::unsupported(reason).hint(HINT_QUOTA));
        }
        if self.has_checksums() && checksum_type != 1 {
            return refuse(format!("checksums of the type {checksum_type}"));
        }
        Ok(())
    }

    fn check(mut self, device_bytes: u64) -> Result<Self> {
        let size = |bytes: u64, least| bytes.is_power_of_two() && (least..=self.block).contains(&bytes);
        let bits = 8 * self.block;
        let fits = |count: u64| (8..=bits).contains(&count) && count.is_multiple_of(8);
        let fault = if !size(self.inode_bytes, 128) {
            format!("inodes of {} bytes", self.inode_bytes)
        } else if !size(self.descriptor_bytes, 32) || self.descriptor_bytes > 1024 {
            format!("group descriptors of {} bytes", self.descriptor_bytes)
        } else if !fits(self.blocks_per_group) || !fits(self.inodes_per_group) {
            format!("groups of {} blocks and {} inodes", self.blocks_per_group, self.inodes_per_group)
        } else if self.first_data_block != u64::from(self.block == 1024)
            || self.blocks <= self.first_data_block
        {
            format!("{} blocks of which the first is {}", self.blocks, self.first_data_block)
        } else if self.blocks.checked_mul(self.block).is_none_or(|bytes| bytes > device_bytes) {
            format!("{:#x} blocks of {} bytes on a device of {device_bytes:#x}", self.blocks, self.block)
        } else {
            String::new()
        };
        if !fault.is_empty() {
            return Err(corrupt(format!("the superblock has {fault}")));
        }
        self.groups = (self.blocks - self.first_data_block).div_ceil(self.blocks_per_group);
        if self.groups > MOST_GROUPS || self.inodes != self.groups * self.inodes_per_group {
            return Err(corrupt(format!(
                "the superblock has {} inodes in {} groups",
                self.inodes, self.groups
            )));
        }
        if self.first_inode < 11 || self.first_inode > self.inodes {
            return Err(corrupt(format!("the superblock has {} as its first inode", self.first_inode)));
        }
        Ok(self)
    }

    /// Refuses a file system that was not left as it should be. After the journal has been replayed.
    pub(super) fn check_state(&self) -> Result<()> {
        if self.state & 2 != 0 {
            return Err(Error::unsupported("the file system is marked as damaged").hint(HINT_FSCK));
        }
        if self.state & 1 == 0 {
            return Err(Error::unsupported("the file system was not unmounted").hint(HINT_FSCK));
        }
        Ok(())
    }

    /// Not of the first revision, which has no features.
    pub(super) fn has_features(&self) -> bool {
        self.dynamic
    }

    pub(super) fn has_journal(&self) -> bool {
        self.compat & compat::HAS_JOURNAL != 0
    }

    pub(super) fn needs_recovery(&self) -> bool {
        self.incompat & incompat::RECOVER != 0
    }

    /// metadata_csum.
    pub(super) fn has_checksums(&self) -> bool {
        self.ro_compat & ro_compat::METADATA_CSUM != 0
    }

    /// Group descriptors have a checksum, and flags for what is not initialized.
    pub(super) fn has_group_checksums(&self) -> bool {
        self.ro_compat & (ro_compat::METADATA_CSUM | ro_compat::GDT_CSUM) != 0
    }

    pub(super) fn has_file_types(&self) -> bool {
        self.incompat & incompat::FILETYPE != 0
    }

    pub(super) fn has_extents(&self) -> bool {
        self.incompat & incompat::EXTENTS != 0
    }

    pub(super) fn has_mmp(&self) -> bool {
        self.incompat & incompat::MMP != 0
    }

    pub(super) fn has_huge_files(&self) -> bool {
        self.ro_compat & ro_compat::HUGE_FILE != 0
    }

    pub(super) fn has_large_files(&self) -> bool {
        self.ro_compat & ro_compat::LARGE_FILE != 0
    }

    pub(super) fn has_dir_nlink(&self) -> bool {
        self.ro_compat & ro_compat::DIR_NLINK != 0
    }

    pub(super) fn has_project(&self) -> bool {
        self.ro_compat & ro_compat::PROJECT != 0
    }

    pub(super) fn is_wide(&self) -> bool {
        self.incompat & incompat::WIDE != 0
    }

    /// Levels of index nodes below the root that a hashed directory may have.
    pub(super) fn most_index_levels(&self) -> u8 {
        if self.incompat & incompat::LARGE_DIR != 0 { 2 } else { 1 }
    }

    /// Blocks of this group: fewer in the last one.
    pub(super) fn group_len(&self, group: u64) -> u64 {
        self.blocks_per_group.min(self.blocks.saturating_sub(self.group_start(group)))
    }

    /// The first block of a group.
    pub(super) fn group_start(&self, group: u64) -> u64 {
        self.first_data_block + group * self.blocks_per_group
    }

    /// The block that the superblock lies in, and where in it.
    pub(super) fn superblock_place(&self) -> (u64, usize) {
        (OFFSET / self.block, block::num::to_usize(OFFSET % self.block))
    }

    /// The block that holds a group's descriptor, and where in it ("Meta Block Groups").
    pub(super) fn descriptor_place(&self, group: u64) -> (u64, usize) {
        let per_block = self.block / self.descriptor_bytes;
        let within = block::num::to_usize(group % per_block * self.descriptor_bytes);
        (self.descriptor_block(group / per_block), within)
    }

    fn descriptor_block(&self, index: u64) -> u64 {
        let first = OFFSET / self.block;
        if self.incompat & incompat::META_BG == 0 || index < self.first_meta_group {
            return first + 1 + index;
        }
        let group = index * (self.block / self.descriptor_bytes);
        self.group_start(group) + u64::from(self.has_superblock(group))
    }

    /// How many blocks at the start of a group hold copies of the superblock and of descriptors, or are reserved for more
    /// of them.
    pub(super) fn head_blocks(&self, group: u64) -> u64 {
        let per_block = self.block / self.descriptor_bytes;
        let copies = u64::from(self.has_superblock(group));
        let is_meta = self.incompat & incompat::META_BG != 0;
        if is_meta && group / per_block >= self.first_meta_group {
            let holds = matches!(group % per_block, 0 | 1) || group % per_block == per_block - 1;
            return copies + u64::from(holds);
        }
        let all = self.groups.div_ceil(per_block);
        let old = if is_meta { self.first_meta_group.min(all) } else { all };
        if copies == 0 { 0 } else { 1 + old + self.reserved_descriptor_blocks }
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        if self.compat & compat::SPARSE_SUPER2 != 0 {
            return group == 0 || self.backup_groups.contains(&group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        self.ro_compat & ro_compat::SPARSE_SUPER == 0 || group <= 1 || [3, 5, 7].into_iter().any(power_of)
    }
}
