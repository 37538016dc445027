//! Whose code a boot sector holds, by the messages in it.

use std::fmt;

use crate::bytes::le16;

/// Where the partition entries begin, and the signature of a boot record lies.
const ENTRIES_AT: usize = 440;
const SIGNATURE_AT: usize = 510;
/// Where a FAT file system's own fields end at the latest; what is in front of them is a jump.
const PARAMETERS_END: usize = 90;

/// Whose code a boot sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BootCode {
    /// The sector has no signature (0xaa55): a BIOS goes on to the next disk.
    #[default]
    Missing,
    /// The sector has a signature and no code: most BIOSes start it, and nothing comes of it.
    Empty,
    /// GRUB's (both generations).
    Grub,
    /// Syslinux's or extlinux's.
    Syslinux,
    /// Microsoft's.
    Windows,
    /// LILO's.
    Lilo,
    /// FreeBSD's.
    FreeBsd,
    /// That of an empty FAT file system, which only says that it is none to boot from.
    Placeholder,
    /// Somebody else's.
    Unknown,
}

impl BootCode {
    /// Looks at a sector.
    pub(super) fn of(sector: &[u8]) -> Self {
        if sector.len() < SIGNATURE_AT + 2 || le16(sector, SIGNATURE_AT) != 0xaa55 {
            return Self::Missing;
        }
        let code = &sector[..ENTRIES_AT];
        let holds = |text: &str| sector.windows(text.len()).any(|window| window == text.as_bytes());
        let any = |texts: &[&str]| texts.iter().any(|text| holds(text));
        let is_file_system = matches!(code[0], 0xeb | 0xe9) && any(&["FAT12", "FAT16", "FAT32"]);
        if code.iter().all(|byte| *byte == 0)
            || is_file_system && code[PARAMETERS_END..].iter().all(|byte| *byte == 0)
        {
            return Self::Empty;
        }
        // GRUB's sector names the parts of a disk that it cannot read.
        if holds("GRUB") && holds("Geom") {
            Self::Grub
        } else if any(&["SYSLINUX", "EXTLINUX", "Operating system load error", "Missing OS", "isolinux.bin"])
        {
            Self::Syslinux
        } else if any(&["LILO"]) {
            Self::Lilo
        } else if any(&["BOOTMGR", "NTLDR"])
            || holds("Invalid partition table") && holds("Missing operating system")
        {
            Self::Windows
        } else if any(&["not a bootable disk", "Non-System disk", "Non-system disk"]) {
            Self::Placeholder
        } else if any(&["Boot error", "BTX", "FreeBSD"]) {
            Self::FreeBsd
        } else {
            Self::Unknown
        }
    }

    /// Whether a BIOS that starts the sector starts anything.
    pub fn is_code(self) -> bool {
        !matches!(self, Self::Missing | Self::Empty | Self::Placeholder)
    }

    /// Whether, in sector 0 of a disk with partitions, it goes on with the active one.
    pub(super) fn starts_active(self) -> bool {
        matches!(self, Self::Syslinux | Self::Windows)
    }
}

/// `GRUB's boot code`, `no boot code`.
impl fmt::Display for BootCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "no boot sector",
            Self::Empty => "no boot code",
            Self::Grub => "GRUB's boot code",
            Self::Syslinux => "syslinux's boot code",
            Self::Windows => "Windows's boot code",
            Self::Lilo => "LILO's boot code",
            Self::FreeBsd => "FreeBSD's boot code",
            Self::Placeholder => "no boot code but that of an empty FAT file system",
            Self::Unknown => "unknown boot code",
        })
    }
}
