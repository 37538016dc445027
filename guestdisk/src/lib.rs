//! Reads what lies on a guest's disk: partitions, volumes, file systems, boot loader configuration.
//!
//! Nothing here writes, and nothing trusts a byte: every table is checked before it is followed, every loop and every
//! allocation has a limit, and what cannot be understood is an error with its reason.
#![forbid(unsafe_code)]

#[expect(dead_code, reason = "the readers of file systems come next")]
mod bytes;
mod crc;
pub mod guid;
pub mod partition;

pub use guid::Guid;
