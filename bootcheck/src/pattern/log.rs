//! The table of patterns for what a firmware writes into its log: SeaBIOS to the debug port, OVMF too where it was built
//! to do so (the ones of distributions say nothing).

use super::table::{failure, station};
use super::{Milestone, Pattern};
use crate::verdict::Reason;

/// All of them.
pub const LOG_PATTERNS: &[Pattern] = &[
    station(
        "firmware",
        Milestone::Firmware,
        r"^SeaBIOS \(version|^SecCoreStartup|^Running on QEMU|^DXE IPL Entry",
    ),
    // Drives of a BIOS with their geometry; UEFI's own words for a disk.
    station(
        "disk",
        Milestone::DiskSeen,
        r"^drive 0x[0-9a-fA-F]+: |^Booting from Hard Disk|^InstallProtocolInterface: 964E5B21",
    ),
    station("boot sector", Milestone::BootLoader, r"^Booting from [0-9a-fA-F]{4}:7c00"),
    failure("no bootable device (BIOS)", Reason::NoBootLoader, r"^No bootable device"),
];
