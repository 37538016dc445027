//! VHD, the disk image format of Virtual PC, Virtual Server, Hyper-V, Azure and XenServer. qemu calls it vpc.
//!
//! From Microsoft's "Virtual Hard Disk Image Format Specification" (version 1.0, 2006) and the behaviour of the
//! programs that use it. All numbers are big-endian; offsets count from the start of the file, in bytes or in sectors
//! of 512 bytes.
//!
//! ```text
//!   fixed                 dynamic and differencing
//!
//!   +-----------------+   +-----------------------+
//!   | the disk as     |   | copy of the footer    |   footer
//!   | it is           |   | dynamic disk header   |   header: where the table is, block size, parent
//!   |                 |   | block allocation table|   table: one entry for each block of the disk
//!   |                 |   | names of the parent   |   parent
//!   |                 |   | block: bitmap + data  |   disk: a bit for each sector, then the sectors
//!   +-----------------+   | block ..              |
//!   | footer          |   | footer                |
//!   +-----------------+   +-----------------------+
//! ```
//!
//! * [`Container`] reads what must be known before the parent can be opened: [`Footer`], [`DynamicHeader`], names.
//! * [`Vhd`] is the disk. What a block's bitmap says is not there comes from the parent, or is zeros.
//! * [`create`](create::create) makes new images, [`check`](check::check) examines old ones.
//!
//! # The end of the file
//!
//! A block that is added goes where the footer was. The footer is written behind the place of the new block before
//! anything else, so that a process that is killed leaves a file with two good footers. Entries of the table reach the
//! disk in [`flush`](block::BlockDevice::flush) only, after what they refer to.

mod alloc;
pub mod check;
mod container;
pub mod create;
mod disk;
mod error;
mod flush;
mod footer;
mod geometry;
mod header;
mod parent;
mod table;
mod vhd;
mod write;

pub use container::Container;
pub use error::Error;
pub use footer::{DiskType, FOOTER_BYTES, Footer, MAX_SIZE, SizeRule, UniqueId};
pub use geometry::Geometry;
pub use header::{DynamicHeader, HEADER_BYTES, Locator};
pub use vhd::{OpenOptions, Vhd};
