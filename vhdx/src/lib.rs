//! The VHDX format of Hyper-V ([MS-VHDX]): fixed, dynamic and differencing disks.
//!
//! ```text
//!   0        64K      128K     192K          256K          1M
//!   +--------+--------+--------+-------------+-------------+------+----------+-----+--------+--------
//!   | file   | header | header | region      | region      |      | log      | BAT | meta-  | payload
//!   | type   | 1      | 2      | table 1     | table 2     |      |          |     | data   | blocks..
//!   +--------+--------+--------+-------------+-------------+------+----------+-----+--------+--------
//!                  names the log   name the BAT and the metadata      any order, multiples of 1 MiB
//! ```
//!
//! The guest disk is cut into *blocks* (1 MiB to 256 MiB). The BAT says for each block whether it is in the file and
//! where, and has, after every chunk of them, an entry for a *sector bitmap* that says which sectors of a
//! differencing disk's partly present blocks are its own. Everything but the headers and guest data changes through
//! the *log*: a ring of checksummed entries which a reader replays when the header names it.
//!
//! What is done here:
//! * reading and writing of fixed and dynamic disks, and of differencing ones over a parent that the caller opens;
//! * a log that was left behind is replayed in memory for readers and on disk for writers ([`log`]);
//! * every change of the BAT goes through the log ([`journal`]), so that a crash at any write leaves an image that any
//!   reader of VHDX opens, with everything that was flushed;
//! * creating ([`create`]), checking and repairing ([`check`]).
//!
//! What is not: growing and shrinking, creating differencing disks, shared VHD sets (`.vhds`).
//!
//! [MS-VHDX]: https://learn.microsoft.com/openspecs/windows_protocols/ms-vhdx/

pub mod bat;
mod bitmap;
pub mod check;
pub mod create;
mod device;
mod extents;
pub mod geometry;
pub mod guid;
pub mod header;
pub mod journal;
pub mod locator;
pub mod log;
pub mod metadata;
pub mod region;
mod source;
mod table;
mod write;

pub use device::{OpenOptions, Vhdx};
pub use guid::Guid;
pub use source::Source;

/// What everything in a VHDX file is aligned to, in bytes.
pub const MIB: u64 = 1 << 20;

/// The first bytes of every VHDX file (section 2.2.1).
pub const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// Whether these are the first bytes of a VHDX file.
pub fn probe(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(SIGNATURE)
}

/// CRC-32C (Castagnoli) of `bytes` with the four bytes of the checksum field at `at` taken for zeros (section 2.2.2).
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[at + 4..])
}
