//! LUKS version 1: a header that keeps one volume key for up to eight passphrases.
//!
//! ```text
//!  0        592   4096                                           payload offset
//! +--------+-----+-----------------+-----------------+-- .. --+------------------+
//! | header |     | key material of | key material of |        | encrypted        |
//! |        |     | slot 0          | slot 1          |        | sectors          |
//! +--------+-----+-----------------+-----------------+-- .. --+------------------+
//! ```
//!
//! The volume key is random and never changes. Each slot holds it split into 4000 stripes (see `af`), encrypted
//! with a key that PBKDF2 makes of the slot's passphrase. Whether a passphrase is right is known when the key
//! that comes out has the header's digest.
//!
//! "Specification" means the LUKS1 on-disk format, version 1.2.3. All integers are big-endian, offsets and sizes
//! on disk are in sectors of 512 bytes; in memory everything is in bytes. Offsets count from the header's first
//! byte, which need not be the container's: in a qcow2 image it is where the header extension says.
//!
//! [`slots`] tells in which order a change of keys reaches the disk.

mod create;
mod effort;
mod header;
pub mod slots;
mod unlock;

pub use create::{CreateOptions, Created, create};
pub use effort::{Effort, Unlocker};
pub(crate) use header::cipher_spec;
pub use header::{HEADER_LEN, Header, MAGIC, SLOTS, STRIPES, Slot, area_len};
pub(crate) use unlock::find_key;
pub use unlock::{Unlocked, unlock, unlock_with};
