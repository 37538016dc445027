//! LUKS version 2: the same idea with its metadata in JSON, twice, and a key derivation that takes memory, too.
//!
//! ```text
//!  0           4096        header size                             data segment
//! +-----------+-----------+-----------+-----------+---------------+------------------+
//! | binary 1  | JSON 1    | binary 2  | JSON 2    | key material  | encrypted        |
//! |           |           |           |           | of all slots  | sectors          |
//! +-----------+-----------+-----------+-----------+---------------+------------------+
//! ```
//!
//! A binary header says how long it and its JSON are, has their checksum and a sequence number; of two valid copies the
//! newer counts. The JSON names key slots (how a passphrase becomes the key of the slot, and where its key material
//! lies), segments (what is encrypted how), and digests (how the volume key of a segment is recognised).
//!
//! Only what is at rest is opened: one segment, encrypted by dm-crypt alone. What is being re-encrypted, has integrity
//! tags or is encrypted by the drive is refused by name. Tokens are ignored. Nothing is written to a header.
//!
//! "Specification" means the LUKS2 On-Disk Format Specification, version 1.1. Integers are big-endian.

mod binary;
mod json;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod unlock;

pub use json::{Digest, Kdf, Keyslot, Metadata, Segment};
