//! What partitions are said to be for.

use std::fmt;

use crate::guid::Guid;

/// The type that the table gives a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PartitionType {
    /// The type byte of an MBR entry.
    Mbr(u8),
    /// The type GUID of a GPT entry, in the order of its text.
    Gpt(Guid),
}

const fn hex(text: &str) -> Guid {
    let (text, mut bytes, mut at, mut digits) = (text.as_bytes(), [0; 16], 0, 0);
    while at < text.len() {
        let digit = match text[at] {
            digit @ b'0'..=b'9' => digit - b'0',
            digit @ b'a'..=b'f' => digit - b'a' + 10,
            _ => {
                at += 1;
                continue;
            }
        };
        bytes[digits / 2] = bytes[digits / 2] << 4 | digit;
        digits += 1;
        at += 1;
    }
    Guid::from_bytes(bytes)
}

/// The EFI System Partition (UEFI 2.10, 5.3.3).
pub(super) const EFI_SYSTEM: Guid = hex("c12a7328-f81f-11d2-ba4b-00a0c93ec93b");

/// Type GUIDs that people meet, the ones of the Discoverable Partitions Specification among them.
const GUIDS: &[(Guid, &str)] = &[
    (EFI_SYSTEM, "EFI System"),
    (hex("21686148-6449-6e6f-744e-656564454649"), "BIOS boot"),
    (hex("0fc63daf-8483-4772-8e79-3d69d8477de4"), "Linux filesystem"),
    (hex("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"), "Linux root (x86-64)"),
    (hex("44479540-f297-41b2-9af7-d131d5f0458a"), "Linux root (x86)"),
    (hex("b921b045-1df0-41c3-af44-4c6f280d3fae"), "Linux root (ARM-64)"),
    (hex("bc13c2ff-59e6-4262-a352-b275fd6f7172"), "Linux extended boot"),
    (hex("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"), "Linux swap"),
    (hex("933ac7e1-2eb4-4f13-b844-0e14e2aef915"), "Linux home"),
    (hex("4d21b016-b534-45c2-a9fb-5c16e091fd2d"), "Linux variable data"),
    (hex("3b8f8425-20e0-4f3b-907f-1a25a76f98e8"), "Linux server data"),
    (hex("e6d6d379-f507-44c2-a23c-238f2a3df928"), "Linux LVM"),
    (hex("a19d880f-05fc-4d3b-a006-743f0f84911e"), "Linux RAID"),
    (hex("ca7d7ccb-63ed-4c53-861c-1742536059cc"), "Linux LUKS"),
    (hex("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"), "Microsoft basic data"),
    (hex("e3c9e316-0b5c-4db8-817d-f92df00215ae"), "Microsoft reserved"),
    (hex("de94bba4-06d1-4d40-a16a-bfd50179d6ac"), "Windows recovery"),
    (hex("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3"), "Microsoft LDM metadata"),
    (hex("af9b60a0-1431-4f62-bc68-3311714a69ad"), "Microsoft LDM data"),
    (hex("9e1a2d38-c612-4316-aa26-8b49521e5a8b"), "PowerPC PReP boot"),
    (hex("516e7cb6-6ecf-11d6-8ff8-00022d09712b"), "FreeBSD UFS"),
    (hex("48465300-0000-11aa-aa11-00306543ecac"), "Apple HFS+"),
];

/// Type bytes that people meet.
const BYTES: &[(u8, &str)] = &[
    (0x01, "FAT12"),
    (0x04, "FAT16 <32M"),
    (0x05, "Extended"),
    (0x06, "FAT16"),
    (0x07, "HPFS/NTFS/exFAT"),
    (0x0b, "W95 FAT32"),
    (0x0c, "W95 FAT32 (LBA)"),
    (0x0e, "W95 FAT16 (LBA)"),
    (0x0f, "W95 extended (LBA)"),
    (0x27, "Windows recovery"),
    (0x41, "PPC PReP boot"),
    (0x42, "Windows dynamic disk"),
    (0x82, "Linux swap"),
    (0x83, "Linux"),
    (0x85, "Linux extended"),
    (0x8e, "Linux LVM"),
    (0xa5, "FreeBSD"),
    (0xa6, "OpenBSD"),
    (0xa9, "NetBSD"),
    (0xea, "Linux extended boot"),
    (0xee, "GPT"),
    (0xef, "EFI System"),
    (0xfd, "Linux RAID autodetect"),
];

impl PartitionType {
    /// What it is for, in words; `None` for types that are not in our list.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Mbr(byte) => BYTES.iter().find(|(known, _)| *known == byte).map(|(_, name)| *name),
            Self::Gpt(guid) => GUIDS.iter().find(|(known, _)| *known == guid).map(|(_, name)| *name),
        }
    }
}

/// The number or GUID, as `lsblk` shows it.
impl fmt::Display for PartitionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mbr(byte) => write!(f, "{byte:#x}"),
            Self::Gpt(guid) => write!(f, "{guid}"),
        }
    }
}
