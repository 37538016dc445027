//! VDI, the disk image format of VirtualBox.
//!
//! From the published descriptions of its header (the VirtualBox forum's "VDI disk image file format" tutorial) and the
//! behaviour of the programs that use it. All numbers are little-endian.
//!
//! ```text
//!   +----------------------+
//!   | header (one sector)  |   sizes, where map and data begin, four UUIDs
//!   +----------------------+
//!   | block map            |   one entry for each block of the disk: the number of a block of data,
//!   |                      |   "not here" (the parent's, or zeros), or "zeros"
//!   +----------------------+
//!   | block 0 of the data  |   blocks of one size, without gaps, in the order in which they were needed
//!   | block 1 ..           |
//!   +----------------------+
//! ```
//!
//! * [`Header`] is what the first sector says, once it makes sense.
//! * [`Vdi`] is the disk. A differencing image does not name its parent, it knows its UUID; whoever opens it has to know
//!   where the parent is.
//! * [`create`](create::create) makes new images, [`check`](check::check) examines old ones.

mod alloc;
pub mod check;
pub mod create;
mod error;
mod flush;
mod header;
mod map;
mod vdi;
mod write;

pub use error::Error;
pub use header::{Header, ImageType, Uuid};
pub use vdi::{OpenOptions, Vdi};
