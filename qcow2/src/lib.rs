//! The qcow2 image format, versions 2 and 3.
//!
//! ```text
//!  cluster 0            any cluster of the file
//! +--------+   L1 table      L2 table        data cluster
//! | header |->+--------+   +----------+    +-------------+
//! +--------+  | L2 at  |-->| host     |--->| guest bytes |
//!     |       | L2 at  |   | offset   |    +-------------+
//!     |       +--------+   | zero     |    | deflated .. |  several clusters packed
//!     |                    | packed   |--->| deflated .. |
//!     |                    +----------+    +-------------+
//!     |   refcount table   refcount block
//!     +->+----------+     +-------------+   one counter for every cluster of the file,
//!        | block at |---->| 1 1 1 0 2 1 |   tables and header included
//!        +----------+     +-------------+
//! ```
//!
//! All integers on disk are big-endian. "Specification" in the comments means `docs/interop/qcow2.txt` as
//! published with QEMU; section names are its section names.
//!
//! The order in which things reach the disk is the heart of the crate; it is described in [`flush`].

pub mod alloc;
pub mod amend;
pub mod bitmap;
mod bulk;
pub mod cache;
pub mod check;
mod cipher;
pub mod codec;
pub mod create;
mod describe;
pub mod device;
mod empty;
pub mod error;
pub mod extension;
pub mod features;
pub mod flush;
pub mod geometry;
pub mod header;
pub mod l2;
pub mod measure;
pub mod metadata;
#[cfg(test)]
mod overtaken_tests;
pub mod refcount;
pub mod resize;
pub mod snapshot;
mod tables;
mod write;
mod zero;

pub use device::{OpenOptions, Qcow2};
pub use error::Error;
pub use geometry::Geometry;
pub use header::Header;
