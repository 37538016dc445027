//! The superblock of a member (md(4), "RAID superblock formats" of the Linux RAID wiki): version 1 in its three places, and 0.90.
//!
//! ```text
//!   1.1  | superblock | .. data                       1.0, 0.90   data ..          | superblock | (up to 64 or 128 KiB)
//!   1.2  |  4 KiB free | superblock | .. data
//! ```

use std::fmt;
use std::ops::Range;

use block::{BlockDevice, Result};

use crate::bytes::{self, byte, corrupt, le16, le32, le64, part, text};
use crate::guid::Guid;

/// Sectors, in which version 1 counts, have this many bytes.
pub(super) const SECTOR: u64 = 512;
/// What every superblock begins with.
const MAGIC: u32 = 0xa92b_4efc;
/// The most bytes that a superblock has.
pub(super) const SUPERBLOCK: usize = 4096;
/// Version 1 without its table of roles.
const FIXED: usize = 256;
/// Where 0.90 has its descriptors of devices, how long they are, and how many there are.
const DESCRIPTORS: usize = 512;
const DESCRIPTOR: usize = 128;
const MOST_DESCRIPTORS: usize = 27;
/// Where the descriptor of the device itself is.
const THIS_DESCRIPTOR: usize = DESCRIPTORS + DESCRIPTOR * MOST_DESCRIPTORS;
/// The most devices that an array may have: what the table of roles of version 1 has room for.
pub(super) const MOST_DISKS: u32 = 1920;
/// The most bytes of a list of bad blocks (a page, as md reads it).
const MOST_BAD_BLOCKS: u64 = 4096;

/// What a member needs its readers to know (`feature_map` of version 1).
pub(super) mod feature {
    /// There is a write-intent bitmap beside the superblock.
    pub(in super::super) const BITMAP: u32 = 1;
    /// Only part of this member is in sync.
    pub(in super::super) const RECOVERY_OFFSET: u32 = 2;
    /// The array is being reshaped.
    pub(in super::super) const RESHAPE: u32 = 4;
    /// There is a list of bad blocks.
    pub(in super::super) const BAD_BLOCKS: u32 = 8;
    /// This member replaces another one, which is still there.
    pub(in super::super) const REPLACEMENT: u32 = 16;
    /// The reshape goes backwards.
    pub(in super::super) const RESHAPE_BACKWARDS: u32 = 32;
    /// The data are being moved on the device.
    pub(in super::super) const NEW_OFFSET: u32 = 64;
    /// This member is brought up to date by the bitmap.
    pub(in super::super) const RECOVERY_BITMAP: u32 = 128;
    /// Several machines share the array.
    pub(in super::super) const CLUSTERED: u32 = 256;
    /// What is written goes to a journal first.
    pub(in super::super) const JOURNAL: u32 = 512;
    /// There is a log of partial parity.
    pub(in super::super) const PPL: u32 = 1024;
    /// There are several such logs.
    pub(in super::super) const MULTIPLE_PPLS: u32 = 2048;
    /// `layout` says how a RAID 0 of several zones is laid out.
    pub(in super::super) const RAID0_LAYOUT: u32 = 4096;
    /// All of these.
    pub(in super::super) const KNOWN: u32 = 8191;
}

/// Versions of the superblock, each of which has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// 0.90: in the last whole 64 KiB of the device but one.
    V0_90,
    /// 1.0: between 8 and 12 KiB from the end.
    V1_0,
    /// 1.1: at the start.
    V1_1,
    /// 1.2: 4 KiB from the start.
    V1_2,
}

impl Version {
    /// All of them, those at the start first.
    const ALL: [Self; 4] = [Self::V1_2, Self::V1_1, Self::V1_0, Self::V0_90];

    /// As `mdadm` writes it: `1.2`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V0_90 => "0.90",
            Self::V1_0 => "1.0",
            Self::V1_1 => "1.1",
            Self::V1_2 => "1.2",
        }
    }

    /// Where it lies on a device of `size` bytes; `None` if that is too small.
    fn place(self, size: u64) -> Option<u64> {
        match self {
            Self::V0_90 => (size & !0xffff).checked_sub(0x1_0000),
            Self::V1_0 => (size / SECTOR).checked_sub(16).map(|sector| (sector & !7) * SECTOR),
            Self::V1_1 => Some(0),
            Self::V1_2 => Some(4096),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a device is in its array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Active(u32),
    Spare,
    Faulty,
    Journal,
}

/// A superblock whose checksum and place are right. Numbers are in bytes, and where they count sectors on the disk they
/// did not overflow; whether they make sense together is the array's business.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) version: Version,
    /// Where it lies on the device.
    pub(super) place: u64,
    pub(super) features: u32,
    /// In the order in which `mdadm` shows it.
    pub(super) uuid: [u8; 16],
    /// In the order in which `blkid` shows it.
    pub(super) disk_uuid: Guid,
    /// The name as it is stored, `host:name` as a rule; empty in 0.90.
    pub(super) name: String,
    /// The number of `/dev/mdN`, which only 0.90 knows.
    pub(super) minor: Option<u32>,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) level: i32,
    pub(super) layout: u32,
    /// Bytes that the array uses of each device; 0 if it uses all that there is of each.
    pub(super) used: u64,
    pub(super) chunk: u64,
    pub(super) disks: u32,
    pub(super) data_offset: u64,
    pub(super) data_len: u64,
    /// The place of this device in the table of roles.
    pub(super) number: u32,
    pub(super) write_mostly: bool,
    /// Bytes from the start of the data on that are in sync, if not all are.
    pub(super) recovered: Option<u64>,
    pub(super) events: u64,
    /// All members are known to hold the same.
    pub(super) clean: bool,
    /// The role of each device, by its number.
    roles: Vec<Role>,
    own: Role,
    /// Where the write-intent bitmap lies.
    pub(super) bitmap: Option<u64>,
    /// Ranges of the device that hold nothing of use.
    pub(super) bad: Vec<Range<u64>>,
}

/// What lies where a superblock may lie.
#[derive(Debug)]
pub(crate) struct Probed {
    pub(super) found: Option<Superblock>,
    /// Where superblocks lie, and whether each says that this is its place.
    pub(super) seen: Vec<(u64, bool)>,
    /// Why the one that seems to be there cannot be used.
    damage: Option<String>,
    /// One that begins the device is damaged: nothing else lies there either.
    at_start: bool,
}

/// Looks at all places. Of several superblocks the one that was made last counts.
///
/// # Errors
/// The device failed.
pub(crate) fn probe(device: &dyn BlockDevice) -> Result<Probed> {
    let mut probed = Probed { found: None, seen: vec![], damage: None, at_start: false };
    for version in Version::ALL {
        let Some(place) = version.place(device.size()) else { continue };
        let raw = bytes::read_some(device, place, SUPERBLOCK)?;
        if le32(&raw, 0) != MAGIC || raw.len() < SUPERBLOCK {
            continue;
        }
        let parsed = match (version, le32(&raw, 4)) {
            (Version::V0_90, 0) => Superblock::parse_old(&raw, place),
            (Version::V1_0 | Version::V1_1 | Version::V1_2, 1) => Superblock::parse(&raw, version, place),
            _ => continue,
        };
        probed.seen.push((place, parsed.is_ok() && version != Version::V0_90));
        match parsed {
            Ok(mut found) => {
                found.read_bad_blocks(device, &raw)?;
                if probed.found.as_ref().is_none_or(|known| known.created < found.created) {
                    probed.found = Some(found);
                }
            }
            Err(error) => {
                probed.damage.get_or_insert(error.to_string());
                probed.at_start |= matches!(version, Version::V1_1 | Version::V1_2);
            }
        }
    }
    Ok(probed)
}

impl Probed {
    /// The superblock.
    ///
    /// # Errors
    /// `Corrupt`, if there is only a damaged one, or none.
    pub(super) fn into_superblock(self) -> Result<Superblock> {
        let damage = self.damage;
        self.found.ok_or_else(|| corrupt(damage.unwrap_or_else(|| "there is no superblock".to_owned())))
    }

    /// UUID in the spelling of `blkid`, and name, if the device is a member.
    pub(crate) fn names(&self) -> Option<(String, String)> {
        match &self.found {
            Some(found) => Some((found.disk_uuid.to_string(), found.name.clone())),
            None => self.at_start.then(Default::default),
        }
    }
}

/// The sum of words of 32 bits, what overflows added once more (both versions; the checksum itself counts as zero).
pub(super) fn checksum(superblock: &[u8], sum_at: usize) -> u32 {
    let words = superblock.chunks(4).zip((0..).step_by(4)).filter(|(_, at)| *at != sum_at);
    let sum: u64 = words
        .map(|(word, _)| u64::from(if word.len() == 4 { le32(word, 0) } else { le16(word, 0).into() }))
        .sum();
    let folded = (sum & 0xffff_ffff) + (sum >> 32);
    (folded & 0xffff_ffff) as u32
}

/// How many bytes the checksum of a superblock of version 1 is over.
pub(super) fn summed(raw: &[u8]) -> usize {
    FIXED + 2 * le32(raw, 220).min(MOST_DISKS) as usize
}

/// Where version 1 and 0.90 have their checksum.
pub(super) const SUM_AT: usize = 216;
pub(super) const OLD_SUM_AT: usize = 152;

/// Sectors as bytes.
fn sectors(count: u64, what: &str) -> Result<u64> {
    count
        .checked_mul(SECTOR)
        .filter(|bytes| *bytes < 1 << 62)
        .ok_or_else(|| corrupt(format!("{what} is {count} sectors")))
}

impl Superblock {
    /// Version 1.
    fn parse(raw: &[u8], version: Version, place: u64) -> Result<Self> {
        let entries = le32(raw, 220);
        if entries > MOST_DISKS {
            return Err(corrupt(format!(
                "its superblock has a table of {entries} devices, where {MOST_DISKS} fit"
            )));
        }
        let sum = checksum(part(raw, 0, summed(raw)), SUM_AT);
        if sum != le32(raw, SUM_AT) {
            return Err(corrupt(format!(
                "the checksum of its superblock is {sum:#010x}, and should be {:#010x}",
                le32(raw, SUM_AT)
            )));
        }
        let said = sectors(le64(raw, 144), "the place of the superblock")?;
        if said != place {
            return Err(corrupt(format!(
                "its superblock at {place:#x} says that it is the one at {said:#x}"
            )));
        }
        let (features, number) = (le32(raw, 8), le32(raw, 160));
        let roles: Vec<_> =
            raw[FIXED..].chunks_exact(2).take(entries as usize).map(|role| role_of(le16(role, 0))).collect();
        let recovered = match features {
            _ if features & feature::RECOVERY_BITMAP != 0 => Some(0),
            _ if features & feature::RECOVERY_OFFSET != 0 => {
                Some(sectors(le64(raw, 152), "what is in sync")?)
            }
            _ => None,
        };
        let bitmap = (features & feature::BITMAP != 0)
            .then(|| place.checked_add_signed(i64::from(le32(raw, 96).cast_signed()) * 512));
        Ok(Self {
            version,
            place,
            features,
            uuid: *bytes::guid(raw, 16).as_bytes(),
            disk_uuid: bytes::guid(raw, 16),
            name: text(part(raw, 32, 32)),
            minor: None,
            created: le64(raw, 64) & 0xff_ffff_ffff,
            level: le32(raw, 72).cast_signed(),
            layout: le32(raw, 76),
            used: sectors(le64(raw, 80), "the size of the array")?,
            chunk: u64::from(le32(raw, 88)) * SECTOR,
            disks: le32(raw, 92),
            data_offset: sectors(le64(raw, 128), "the start of the data")?,
            data_len: sectors(le64(raw, 136), "the length of the data")?,
            number,
            write_mostly: byte(raw, 184) & 1 != 0,
            recovered,
            events: le64(raw, 200),
            clean: le64(raw, 208) == u64::MAX,
            own: roles.get(number as usize).copied().unwrap_or(Role::Spare),
            roles,
            bitmap: bitmap.flatten(),
            bad: vec![],
        })
    }

    /// Version 0.90, of a machine that writes the least significant byte first.
    fn parse_old(raw: &[u8], place: u64) -> Result<Self> {
        let word = |index: usize| le32(raw, index * 4);
        let sum = checksum(raw, OLD_SUM_AT);
        if sum != word(38) {
            return Err(corrupt(format!(
                "the checksum of its superblock is {sum:#010x}, and should be {:#010x}",
                word(38)
            )));
        }
        let descriptor = |at: usize| match (le32(raw, at + 12), le32(raw, at + 16)) {
            (_, state) if state & 1 != 0 => Role::Faulty,
            (_, state) if state & 1 << 18 != 0 => Role::Journal,
            // Active and in sync; others are being rebuilt, which this version keeps no record of.
            (slot, state) if state & 4 != 0 => Role::Active(slot),
            _ => Role::Spare,
        };
        let mut uuid = [0; 16];
        for (bytes, index) in uuid.chunks_mut(4).zip([5, 13, 14, 15]) {
            bytes.copy_from_slice(&word(index).to_be_bytes());
        }
        let mut disk_uuid = uuid;
        disk_uuid.chunks_mut(4).for_each(<[u8]>::reverse);
        let level = word(7).cast_signed();
        let is_clean = word(33) & 1 != 0;
        Ok(Self {
            version: Version::V0_90,
            place,
            // Minor version 91 says that a reshape is under way.
            features: if word(2) > 90 { feature::RESHAPE } else { 0 }
                | if word(33) & 1 << 8 != 0 { feature::BITMAP } else { 0 },
            uuid,
            disk_uuid: Guid::from_bytes(disk_uuid),
            name: String::new(),
            minor: Some(word(11)),
            created: u64::from(word(6)),
            level,
            layout: word(64),
            used: if level > 0 { u64::from(word(8)) * 1024 } else { 0 },
            chunk: u64::from(word(65)),
            disks: word(10),
            data_offset: 0,
            data_len: place,
            number: word(THIS_DESCRIPTOR / 4),
            write_mostly: le32(raw, THIS_DESCRIPTOR + 16) & 1 << 9 != 0,
            recovered: None,
            events: u64::from(word(40)) << 32 | u64::from(word(39)),
            clean: is_clean,
            roles: (0..MOST_DESCRIPTORS).map(|index| descriptor(DESCRIPTORS + index * DESCRIPTOR)).collect(),
            own: descriptor(THIS_DESCRIPTOR),
            bitmap: (word(33) & 1 << 8 != 0).then(|| place + SUPERBLOCK as u64),
            bad: vec![],
        })
    }

    /// The list of bad blocks of version 1: 54 bits of place, 10 of length, in units of `1 << shift` sectors of the device.
    fn read_bad_blocks(&mut self, device: &dyn BlockDevice, raw: &[u8]) -> Result<()> {
        if self.version == Version::V0_90 || self.features & feature::BAD_BLOCKS == 0 {
            return Ok(());
        }
        let (shift, len) = (u32::from(byte(raw, 185)), u64::from(le16(raw, 186)) * SECTOR);
        let offset = i64::from(le32(raw, 188).cast_signed()) * 512;
        let Some(offset) = self.place.checked_add_signed(offset) else { return Ok(()) };
        let list = bytes::read_some(device, offset, block::num::to_usize(len.min(MOST_BAD_BLOCKS)))?;
        let entries = list.chunks_exact(8).map(|entry| le64(entry, 0)).take_while(|entry| *entry != u64::MAX);
        let bytes = |sectors: u64| sectors.checked_shl(shift)?.checked_mul(SECTOR);
        for entry in entries.filter(|entry| *entry != 0) {
            // The end is not shifted out of what can be addressed, or the entry means nothing.
            if let (Some(start), Some(len)) = (bytes(entry >> 10), bytes(entry & 0x3ff)) {
                self.bad.push(start..start.saturating_add(len));
            }
        }
        Ok(())
    }

    pub(super) fn has(&self, features: u32) -> bool {
        self.features & features != 0
    }

    /// What the device says that it is itself.
    pub(super) fn own_role(&self) -> Role {
        self.own
    }

    /// What this superblock says of the device of that number.
    pub(super) fn role(&self, number: u32) -> Role {
        self.roles.get(number as usize).copied().unwrap_or(Role::Spare)
    }
}

fn role_of(role: u16) -> Role {
    match role {
        0xffff => Role::Spare,
        0xfffe => Role::Faulty,
        0xfffd => Role::Journal,
        slot => Role::Active(u32::from(slot)),
    }
}
