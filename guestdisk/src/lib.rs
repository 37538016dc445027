//! Reads what lies on a guest's disk: partitions, volumes, file systems, boot loader configuration.
//!
//! ```text
//!   Disks            all disks of a guest                                   Disks::open(device)
//!     |-- partition  MBR, GPT                                               partition::slice(device, 2)
//!     |-- md         arrays of Linux software RAID over any number of them
//!     |-- lvm        volume groups over any number of them
//!     |-- keys       what opens encrypted volumes (LUKS), to the disks within
//!     '-- Volume     a disk, partition or logical volume, and by which      disks.find("UUID=...")
//!           |        names a guest finds it again (detect)
//!           '-- fs   ext2/3/4, FAT, XFS, btrfs                              volume.file_system()?.read("/etc/fstab", max)
//!   boot             what the guest's boot loader would start               boot::entries(&disks)
//! ```
//!
//! Nothing here writes, and nothing trusts a byte: every table is checked before it is followed, every loop and every
//! allocation has a limit, and what cannot be understood is an error with its reason.
#![forbid(unsafe_code)]

pub mod boot;
mod bytes;
mod crc;
pub mod detect;
mod disks;
pub mod fs;
pub mod guid;
pub mod keys;
pub mod lvm;
pub mod md;
pub mod partition;
mod ranges;
pub mod unused;

pub use disks::{Disk, Disks, Location, Volume};
pub use guid::Guid;
pub use keys::Keys;
