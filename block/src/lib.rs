//! What a virtual disk is.
//!
//! Two traits, one for each side of a disk image format, because a format is the thing that sits
//! between two address spaces:
//!
//! ```text
//!   guest offsets    read 4096 bytes at 0x10000          BlockDevice: a fixed-size disk
//!        |                     |
//!   +---------+      +--------------------+
//!   | format  |      | qcow2, vmdk, raw.. |
//!   +---------+      +--------------------+
//!        |                     |
//!   host offsets     pread(fd, 0x50000)                   Storage: a container that can grow
//! ```
//!
//! * [`Storage`] is the host side: the bytes of a file, a block device, or memory. Reading past its
//!   end gives zeros, writing past its end extends it.
//! * [`BlockDevice`] is the guest side: a disk of fixed size. It never returns less than was asked
//!   for and never grows by being written.
//!
//! A format turns a `Storage` into a `BlockDevice`. [`Raw`](raw::Raw) is the trivial format;
//! [`DeviceStorage`](adapter::DeviceStorage) goes the other way, so that formats nest.
//! [`Overlay`](overlay::Overlay), [`Slice`](slice::Slice) and
//! [`ReadOnly`](readonly::ReadOnly) are devices made of devices.
//!
//! A device may have a backing device: what it does not store itself is read from there. Which layer
//! of a chain answers for a byte is decided in one place only, [`extent`].
//!
//! Everything is synchronous and takes `&self`: a cached 4 KiB read costs about 1.6 us of processor
//! time by `pread` and nine times that through an async runtime's blocking pool, and a blocking call
//! cannot be cancelled half-way through a metadata update. Concurrency belongs to the caller, who
//! knows how much of it is wanted: any number of threads may call any method at any time. Overlapping
//! writes that are under way at once take effect in no particular order, as on a real disk; each
//! request that has returned is complete.

pub mod adapter;
pub mod align;
pub mod codec;
pub mod device;
pub mod dirty;
pub mod error;
pub mod extent;
pub mod file;
pub mod freeze;
pub mod image;
pub mod lock;
pub mod mem;
pub mod num;
pub mod overlay;
pub mod pages;
pub mod pieces;
pub mod raw;
pub mod readonly;
pub mod size;
pub mod slice;
pub mod storage;
pub mod stripes;
mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod zero;

pub use device::{
    BlockDevice, Compressed, CompressedWriter, LayerExtent, Limits, Preallocation, Stored, ZeroMode,
};
pub use dirty::{DirtyBitmap, DirtyExtent};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use storage::{HostExtent, Storage};
