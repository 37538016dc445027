//! VMware's virtual disks: a text that describes the disk, and the extents that hold it.
//!
//! ```text
//!  descriptor (a file, or inside a sparse one)        extents, one after the other
//! +------------------------------------------+       +--------------------+
//! | CID=fb183c20         parentCID=ffffffff   |   +-->| flat: bytes        |
//! | RW 4192256 FLAT "x-f001.vmdk" 0           |---+   +--------------------+
//! | RW 4192256 SPARSE "x-s002.vmdk"           |------>| header             |
//! | RW 2048 ZERO                              |       | grain directory -> | grain tables -> grains
//! | ddb.adapterType = "lsilogic"              |       +--------------------+
//! +------------------------------------------+       what an extent does not store is read from the parent
//! ```
//!
//! * A descriptor names its parts ([`descriptor`]); what they are is found out in [`layout`], without opening
//!   any file but the first: the caller decides which names may be followed.
//! * Every kind of extent implements one trait ([`extent`]): flat bytes, zeros, or one of the sparse kinds.
//! * [`disk::Vmdk`] puts the extents one after the other, with the parent behind all of them.
//!
//! All integers on disk are little-endian, and all places are in sectors of 512 bytes. "Specification" in the
//! comments means VMware's "Virtual Disk Format 5.0" (and 1.1 where that says more); section names are its
//! section names.

mod cowd;
pub mod create;
pub mod descriptor;
pub mod disk;
pub mod extent;
mod flat;
pub mod header;
mod hosted;
mod identity;
pub mod layout;
mod lookup;
mod pages;
mod sesparse;
mod sparse;
pub mod stream;
mod tabled;

pub use descriptor::Descriptor;
pub use disk::{OpenOptions, Vmdk};
pub use header::Header;
pub use layout::Layout;

/// Bytes of a sector, in which the format counts.
pub const SECTOR: u64 = 512;
