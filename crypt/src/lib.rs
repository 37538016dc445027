//! Disk encryption: what stands between the sectors of a guest and the bytes of a file.
//!
//! ```text
//!   passphrase --PBKDF2--> key of a slot --AES--> 4000 stripes --merge--> volume key
//!                                                                             |
//!   guest sector n  <------------- cipher, mode, IV made of n ------------> file
//! ```
//!
//! The crate knows nothing of formats: it turns sectors into other sectors ([`Volume`]), and passphrases into
//! volume keys by way of a LUKS header ([`luks`]), wherever in a container that header lies. Stand-alone LUKS
//! images and encrypted qcow2 images are both built on it.
//!
//! What a guest encrypts itself, by LUKS1 or LUKS2, is opened by [`Container`].
//!
//! Ciphers and hashes are RustCrypto's, which find the processor's instructions at run time. The modes are ours,
//! because a disk is not one message: many sectors are worked on at once, each with its own IV, so that the
//! cipher always has enough blocks to be busy with.
//!
//! Keys and passphrases are overwritten when they are dropped, and no `Debug` or error text shows them.

mod af;
pub mod cipher;
pub mod container;
pub mod device;
pub mod hash;
pub mod luks;
pub mod luks2;
pub mod pbkdf2;
mod random;
pub mod secret;
mod sectors;
pub mod volume;

pub use cipher::{Algorithm, CipherSpec, IvGenerator, Mode};
pub use container::{Container, Decrypted};
pub use device::Luks;
pub use hash::Hash;
pub use secret::Secret;
pub use volume::{SECTOR, Volume};
