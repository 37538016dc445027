//! How much is done to try a passphrase, and when nothing need be done at all.
//!
//! PBKDF2 is slow on purpose, and a header says how slow: up to eight slots of 2^32 rounds, which is hours. Nothing real
//! needs that much: tools choose the rounds by the time that they take, two seconds unless told. So there is a limit,
//! which the caller can lift.

use block::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use super::create::Created;
use super::header::Header;
use crate::hash::Hash;
use crate::secret::Secret;

/// Work that is still allowed, in rounds of PBKDF2 for one block of a key (a core does some millions a second).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort(Option<u64>);

impl Effort {
    /// As much as a minute of the fastest core, or some minutes of an ordinary one.
    pub const DEFAULT: Self = Self(Some(1 << 30));
    /// Whatever the header asks for.
    pub const UNBOUNDED: Self = Self(None);

    /// At most this much.
    pub const fn at_most(rounds: u64) -> Self {
        Self(Some(rounds))
    }

    /// Before a passphrase is tried on a slot.
    ///
    /// # Errors
    /// `Denied`: that is more than is left.
    pub(super) fn spend(&mut self, header: &Header, slot: usize, hash: Hash) -> Result<()> {
        let rounds = header.slots[slot].iterations;
        let blocks = u64::from(header.key_len).div_ceil(hash.digest_len() as u64).max(1);
        let digest = header.digest_iterations;
        self.spend_rounds((u64::from(rounds) * blocks).saturating_add(digest.into()), || {
            format!("Keyslot {slot} asks for {rounds} rounds of PBKDF2 (and {digest} for the digest)")
        })
    }

    /// The same for work that has been counted; `what` says what asks for it.
    ///
    /// # Errors
    /// `Denied`: that is more than is left.
    pub(crate) fn spend_rounds(&mut self, work: u64, what: impl FnOnce() -> String) -> Result<()> {
        let Some(left) = &mut self.0 else { return Ok(()) };
        let rest = left.checked_sub(work);
        *left = rest.ok_or_else(|| {
            Error::new(ErrorKind::Denied, format!("{}, more than are tried unasked", what()))
        })?;
        Ok(())
    }

    /// The most memory that a key derivation is given, in KiB: what cryptsetup takes unless told otherwise; unbounded, what it
    /// takes at most.
    pub(crate) fn memory_kib(self) -> u64 {
        if self.0.is_some() { 1 << 20 } else { 4 << 20 }
    }
}

impl Default for Effort {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The volume key of a header that was made in this process.
#[derive(Debug)]
struct Known {
    header: Header,
    key: Secret,
    passphrase: Secret,
}

/// What those who unlock volumes have in common.
#[derive(Debug, Default)]
pub struct Unlocker {
    known: Mutex<Vec<Known>>,
}

impl Unlocker {
    /// Remembers the key of a volume that has just been made, so that opening it need not derive it once more. Once.
    pub fn remember(&self, created: &Created, passphrase: &Secret) {
        let (header, key) = (created.header.clone(), created.key.clone());
        self.known.lock().push(Known { header, key, passphrase: passphrase.clone() });
    }

    /// The key behind a header, if it is remembered and this is its passphrase.
    pub(super) fn take(&self, header: &Header, passphrase: &[u8]) -> Option<Secret> {
        let mut known = self.known.lock();
        let index = known.iter().position(|k| k.header == *header && *k.passphrase == *passphrase)?;
        Some(known.swap_remove(index).key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use block::Storage as _;
    use block::mem::MemStorage;

    use super::*;
    use crate::luks::{CreateOptions, create, unlock, unlock_with};

    fn container(options: &CreateOptions) -> (MemStorage, Created) {
        let created = create(options, b"pw").unwrap();
        let storage = MemStorage::from_bytes(created.prefix.clone());
        storage.set_len(created.header.payload_offset).unwrap();
        (storage, created)
    }

    fn quick() -> CreateOptions {
        CreateOptions { iter_time: 0, ..CreateOptions::default() }
    }

    /// Hours of work for whoever opened such a file.
    #[test]
    fn hostile_rounds_are_refused_at_once() {
        let (storage, created) = container(&quick());
        for (at, what) in [(208 + 4, "slot"), (164, "digest")] {
            storage.write_at(&created.prefix[..1024], 0).unwrap();
            storage.write_at(&u32::MAX.to_be_bytes(), at).unwrap();
            let start = Instant::now();
            let error = unlock(&storage, 0, b"pw").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{what}: {error}");
            assert!(error.to_string().contains("4294967295"), "{error}");
            assert!(start.elapsed() < Duration::from_secs(5), "{what}");
        }
    }

    /// Eight slots of a passphrase that is not theirs add up; what real tools make stays far below the limit.
    #[test]
    fn the_limit_counts_all_slots_that_are_tried_and_can_be_lifted() {
        let (storage, created) = container(&quick());
        let each = 2 * 1000 + 1000;
        let blocks = created.header.key_len.div_ceil(32);
        assert_eq!(
            (blocks, created.header.slots[0].iterations, created.header.digest_iterations),
            (2, 1000, 1000)
        );
        let with = |effort, passphrase: &[u8]| {
            unlock_with(&storage, 0, passphrase, effort, &Unlocker::default()).map(|unlocked| unlocked.slot)
        };
        assert_eq!(with(Effort::at_most(each), b"pw").unwrap(), 0);
        assert_eq!(with(Effort::at_most(each - 1), b"pw").unwrap_err().kind(), ErrorKind::Denied);
        assert_eq!(with(Effort::UNBOUNDED, b"pw").unwrap(), 0);
        assert_eq!(with(Effort::at_most(each), b"no").unwrap_err().kind(), ErrorKind::Permission);
        // A minute of iter-time on a core that does 15 million rounds a second.
        assert!(Effort::DEFAULT.0 >= Some(60 * 15_000_000));
    }

    #[test]
    fn a_key_that_was_just_made_is_not_derived_again() {
        let (storage, created) = container(&quick());
        let unlocker = Unlocker::default();
        unlocker.remember(&created, &Secret::from("pw"));
        let none = Effort::at_most(0);
        unlock_with(&storage, 0, b"other", none, &unlocker).unwrap_err();
        let unlocked = unlock_with(&storage, 0, b"pw", none, &unlocker).unwrap();
        let (mut ours, mut theirs) = ([7; 512], [7; 512]);
        unlocked.volume.encrypt(3, &mut ours);
        created.volume.encrypt(3, &mut theirs);
        assert_eq!(ours, theirs);
        // Once, and only for that header.
        unlock_with(&storage, 0, b"pw", none, &unlocker).unwrap_err();
        unlocker.remember(&created, &Secret::from("pw"));
        storage.write_at(&1001u32.to_be_bytes(), 164).unwrap();
        unlock_with(&storage, 0, b"pw", none, &unlocker).unwrap_err();
    }
}
