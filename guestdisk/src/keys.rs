//! Passphrases for the encrypted volumes of a guest, and which volumes they are for.
//!
//! A passphrase is expensive to try, by design. So a volume key that was found once is remembered, and whoever looks at the
//! same disks again (before a change, after it, for a boot) with the same [`Keys`] does so at once.

use crypt::luks::Effort;
use crypt::{Container, Decrypted, Secret};
use parking_lot::Mutex;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result};

/// What a passphrase is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// Every encrypted volume.
    All,
    /// The volume that the guest finds by this name (as [`Disks::find`](crate::Disks::find) has it), or that has this UUID.
    Name(String),
}

impl Selector {
    /// `all`, or a name or UUID.
    pub fn parse(text: &str) -> Self {
        if text == "all" { Self::All } else { Self::Name(text.to_owned()) }
    }
}

/// A key as it was given: one or more passphrases for what it selects.
#[derive(Debug, Clone)]
pub struct Key {
    /// What it is for.
    pub selector: Selector,
    /// The passphrases, in the order in which they are tried.
    pub passphrases: Vec<Secret>,
}

/// All keys of a guest.
#[derive(Debug, Default)]
pub struct Keys {
    keys: Vec<Key>,
    effort: Effort,
    /// Fingerprints of volumes with their keys, and the passphrase that opened them.
    known: Mutex<Vec<Known>>,
}

#[derive(Debug)]
struct Known {
    fingerprint: Vec<u8>,
    key: Secret,
    passphrase: Secret,
}

impl Keys {
    /// Keys that may be tried with so much work each time that the disks of a guest are looked at.
    pub fn new(keys: Vec<Key>, effort: Effort) -> Self {
        Self { keys, effort, known: Mutex::default() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The keys, as they were given.
    pub fn all(&self) -> &[Key] {
        &self.keys
    }

    /// What a console that asks for passphrases is to be told: those that have opened a volume, in the order in which that
    /// happened; all, if no volume has been looked at. Each once.
    pub fn passphrases_to_type(&self) -> Vec<Secret> {
        let mut found: Vec<Secret> = vec![];
        let mut add = |passphrase: &Secret| {
            if !found.contains(passphrase) {
                found.push(passphrase.clone());
            }
        };
        let known = self.known.lock();
        known.iter().for_each(|known| add(&known.passphrase));
        if known.is_empty() {
            self.keys.iter().flat_map(|key| &key.passphrases).for_each(add);
        }
        found
    }

    /// The work that is allowed for all volumes of a guest.
    pub(crate) fn effort(&self) -> Effort {
        self.effort
    }

    /// Whether one of the keys is for a volume by its name, so that not opening it is an error.
    pub(crate) fn names(&self, selects: &dyn Fn(&Selector) -> bool) -> bool {
        let is_named = |key: &Key| key.selector != Selector::All && selects(&key.selector);
        self.keys.iter().any(is_named)
    }

    /// Opens a volume with those of the keys for which `selects` is true. `Ok(None)`: there are none.
    ///
    /// # Errors
    /// `Permission`: none of them is right; `Denied`: none of those that could be tried; what [`Container::read`], [`Container::unlock`] and [`Container::open`] say.
    pub(crate) fn open(
        &self,
        device: &Arc<dyn BlockDevice>,
        selects: &dyn Fn(&Selector) -> bool,
        effort: &mut Effort,
    ) -> Result<Option<Decrypted>> {
        let passphrases: Vec<&Secret> =
            self.keys.iter().filter(|key| selects(&key.selector)).flat_map(|key| &key.passphrases).collect();
        if passphrases.is_empty() {
            return Ok(None);
        }
        let container = Container::read(device)?;
        let fingerprint = container.fingerprint();
        let known = self
            .known
            .lock()
            .iter()
            .find(|known| known.fingerprint == fingerprint)
            .map(|known| known.key.clone());
        if let Some(key) = known {
            return container.open(device, &key).map(Some);
        }
        let mut denied = None;
        for passphrase in passphrases {
            match container.unlock(device, passphrase, effort) {
                Ok(key) => {
                    let opened = container.open(device, &key)?;
                    self.known.lock().push(Known { fingerprint, key, passphrase: passphrase.clone() });
                    return Ok(Some(opened));
                }
                Err(error) if error.kind() == ErrorKind::Permission => {}
                // The next may be that of a slot which is tried sooner, and costs less.
                Err(error) if error.kind() == ErrorKind::Denied => denied = denied.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        let wrong = || Error::new(ErrorKind::Permission, "none of the keys that were given opens it");
        Err(denied.unwrap_or_else(wrong))
    }
}
