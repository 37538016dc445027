//! Formats that migrations meet and nobody writes any more: read, described and (where there is something to check)
//! checked, never changed.
//!
//! ```text
//!   cloop      a header, offsets of deflated blocks, the blocks           Knoppix and its children
//!   parallels  a header, one table of clusters                            Parallels, Virtuozzo, ploop
//!   qed        a header, two levels of tables, a backing file             QEMU's enhanced disk of 2010
//!   bochs      a header, a catalog, extents that begin with a bitmap      Bochs' growing redologs
//!   dmg        chunks packed in several ways, a list of them, a trailer   Apple's disk images
//!   qcow       two levels of tables, a backing file                       QEMU's copy on write, version 1
//! ```
//!
//! What they have in common is in [`Foreign`]: a format only says, by its `Layout`, *where* the bytes at a
//! place of the disk are; one device reads them. Tables are read when they are needed and kept in a cache of fixed
//! size, so that opening costs the same whatever the size of the disk.
//!
//! A place that cannot be trusted is an error with its offset: bytes past the end of the file, tables that point into
//! the header. None of these are ever shown as zeros.
//!
//! [`archive`] is the other thing that a migration meets: disks inside tar files (an OVA is one), plain or gzipped.

pub mod archive;
mod bochs;
mod cloop;
mod device;
mod dmg;
mod format;
mod parallels;
mod qcow;
mod qed;
mod tables;
mod units;
mod unpack;

pub use device::Foreign;
pub use format::{Backing, Format, Opened};

#[cfg(test)]
mod tests;
