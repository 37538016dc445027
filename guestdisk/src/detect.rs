//! What a device holds, by the magic numbers at its known places, and the names by which a guest finds it again.
//!
//! [`detect`] reads a few sectors and allocates nothing by the word of the device. It is what `blkid` does for the
//! formats that occur on the disks of guests; what it says of UUIDs and labels is spelt as there, so that
//! `root=UUID=...` can be looked up.

use std::fmt;

use block::{BlockDevice, Result};

use crate::bytes::{self, be16, le16, le32, le64, part, text};
use crate::fs::{ext, fat};

/// What is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
    /// FAT12, FAT16 or FAT32.
    Vfat,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// NTFS.
    Ntfs,
    /// exFAT.
    Exfat,
    /// F2FS.
    F2fs,
    /// ISO 9660.
    Iso9660,
    /// SquashFS.
    Squashfs,
    /// HFS+.
    HfsPlus,
    /// APFS.
    Apfs,
    /// Swap space of Linux.
    Swap,
    /// A physical volume of LVM2.
    Lvm2,
    /// An encrypted volume of LUKS.
    Luks,
    /// A member of a Linux software RAID.
    LinuxRaid,
    /// An encrypted volume of BitLocker.
    BitLocker,
}

impl Kind {
    /// The word that `blkid` has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Vfat => "vfat",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Ntfs => "ntfs",
            Self::Exfat => "exfat",
            Self::F2fs => "f2fs",
            Self::Iso9660 => "iso9660",
            Self::Squashfs => "squashfs",
            Self::HfsPlus => "hfsplus",
            Self::Apfs => "apfs",
            Self::Swap => "swap",
            Self::Lvm2 => "LVM2_member",
            Self::Luks => "crypto_LUKS",
            Self::LinuxRaid => "linux_raid_member",
            Self::BitLocker => "BitLocker",
        }
    }

    /// Whether [`FileSystem::open`](crate::fs::FileSystem::open) can read it.
    pub fn is_readable(self) -> bool {
        matches!(
            self,
            Self::Ext2 | Self::Ext3 | Self::Ext4 | Self::Vfat | Self::Xfs | Self::Btrfs | Self::Ntfs
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a device holds and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// What it is.
    pub kind: Kind,
    /// Its UUID in the spelling of `blkid`; empty if it has none.
    pub uuid: String,
    /// Its label; empty if it has none.
    pub label: String,
}

impl Content {
    fn new(kind: Kind, uuid: impl Into<String>, label: impl Into<String>) -> Self {
        Self { kind, uuid: uuid.into(), label: label.into() }
    }
}

/// Looks for everything that is known here. `None`: nothing that is.
///
/// # Errors
/// The device failed.
pub fn detect(device: &dyn BlockDevice) -> Result<Option<Content>> {
    // What lies on an array may look as if it lay on each member: that it is a member comes first.
    if let Some((uuid, label)) = crate::md::probe(device)?.names() {
        return Ok(Some(Content::new(Kind::LinuxRaid, uuid, label)));
    }
    // Everything but btrfs and ISO 9660 is within the first pages.
    let head = bytes::read_some(device, 0, 8192)?;
    if let Some(found) = container(&head).or_else(|| unix(&head)) {
        return Ok(Some(found));
    }
    if let Some(found) = btrfs(&bytes::read_some(device, 0x10000, 4096)?) {
        return Ok(Some(found));
    }
    if let Some(found) = boot_sector(&head, device)? {
        return Ok(Some(found));
    }
    let volume = bytes::read_some(device, 0x8000, 2048)?;
    if part(&volume, 1, 5) == b"CD001" {
        return Ok(Some(Content::new(
            Kind::Iso9660,
            iso_uuid(&volume),
            text(part(&volume, 40, 32)).trim_end(),
        )));
    }
    Ok(None)
}

/// What holds volumes rather than files.
fn container(head: &[u8]) -> Option<Content> {
    if head.starts_with(b"LUKS\xba\xbe") {
        let label = if be16(head, 6) == 2 { text(part(head, 24, 48)) } else { String::new() };
        return Some(Content::new(Kind::Luks, text(part(head, 168, 40)), label));
    }
    for sector in 0..4 {
        let label = part(head, sector * 512, 512);
        if label.starts_with(b"LABELONE") && part(label, 24, 8) == b"LVM2 001" {
            return Some(Content::new(Kind::Lvm2, crate::lvm::dashed(part(label, 32, 32)), ""));
        }
    }
    None
}

/// File systems of Unix with their superblock near the start.
fn unix(head: &[u8]) -> Option<Content> {
    let uuid = |at| {
        let uuid = bytes::guid(head, at);
        if uuid.is_nil() { String::new() } else { uuid.to_string() }
    };
    if head.starts_with(b"XFSB") {
        return Some(Content::new(Kind::Xfs, uuid(32), text(part(head, 108, 12))));
    }
    if let Some(kind) = ext::superblock::kind(part(head, 1024, 1024)) {
        return Some(Content::new(kind, uuid(1024 + 0x68), text(part(head, 1024 + 0x78, 16))));
    }
    if matches!(part(head, 4086, 10), b"SWAPSPACE2" | b"SWAP-SPACE") {
        return Some(Content::new(Kind::Swap, uuid(1024 + 12), text(part(head, 1024 + 28, 16))));
    }
    if le32(head, 1024) == 0xf2f5_2010 {
        return Some(Content::new(Kind::F2fs, uuid(1024 + 108), bytes::utf16(part(head, 1024 + 124, 1024))));
    }
    if head.starts_with(b"hsqs") && le16(head, 28) == 4 {
        return Some(Content::new(Kind::Squashfs, "", ""));
    }
    if matches!(part(head, 1024, 4), b"H+\0\x04" | b"HX\0\x05") {
        return Some(Content::new(Kind::HfsPlus, "", ""));
    }
    (part(head, 32, 4) == b"NXSB").then(|| Content::new(Kind::Apfs, uuid(72), ""))
}

fn btrfs(superblock: &[u8]) -> Option<Content> {
    let label = text(part(superblock, 0x12b, 256));
    (part(superblock, 0x40, 8) == b"_BHRfS_M")
        .then(|| Content::new(Kind::Btrfs, bytes::guid(superblock, 0x20).to_string(), label))
}

/// File systems that begin as DOS did.
fn boot_sector(head: &[u8], device: &dyn BlockDevice) -> Result<Option<Content>> {
    let found = match part(head, 3, 8) {
        b"NTFS    " => Content::new(Kind::Ntfs, format!("{:016X}", le64(head, 0x48)), ""),
        b"EXFAT   " => {
            let serial = le32(head, 100);
            Content::new(Kind::Exfat, format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff), "")
        }
        b"-FVE-FS-" => Content::new(Kind::BitLocker, "", ""),
        _ => return Ok(vfat(head, device)),
    };
    Ok(Some(found))
}

fn vfat(head: &[u8], device: &dyn BlockDevice) -> Option<Content> {
    let parameters = fat::Parameters::parse(part(head, 0, 512), device.size())?;
    let signed = le16(head, 510) == 0xaa55 || part(head, 54, 3) == b"FAT" || part(head, 82, 3) == b"FAT";
    let label = || fat::read_label(device, &parameters);
    signed.then(|| Content::new(Kind::Vfat, parameters.uuid(), label()))
}

/// The date of creation, as `blkid` makes a UUID of it.
fn iso_uuid(volume: &[u8]) -> String {
    let date = |field| {
        let digits = part(volume, field, 16);
        let valid =
            digits.len() == 16 && digits.iter().all(u8::is_ascii_digit) && digits != b"0000000000000000";
        valid.then(|| text(digits))
    };
    // Modification (830) before creation (813).
    let Some(date) = date(830).or_else(|| date(813)) else { return String::new() };
    let (year, rest) = date.split_at(4);
    let pairs: Vec<_> = (0..12).step_by(2).map(|at| &rest[at..at + 2]).collect();
    format!("{year}-{}", pairs.join("-"))
}
