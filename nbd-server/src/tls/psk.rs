//! Keys that both sides know (TLS-PSK), which spare small installations all certificates.
//!
//! QEMU, nbdkit and libnbd have them by GnuTLS; rustls has not. So OpenSSL does it here, if the feature `psk` is on;
//! without it everything that would need it says so.
//!
//! ```text
//!  keys.psk:   user:00112233445566778899aabbccddeeff      one line for each user, the key in hexadecimal
//! ```
//!
//! TLS 1.2 and 1.3, and in both only with an exchange of fresh keys: whoever learns a key later cannot read what was
//! said before.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::Result;
use parking_lot::RwLock;

use crate::channel::Session;

#[cfg(not(feature = "psk"))]
mod absent;
mod keys;
#[cfg(feature = "psk")]
mod openssl;

#[cfg(not(feature = "psk"))]
use absent as backend;
use keys::Keys;
#[cfg(feature = "psk")]
use openssl as backend;

/// The user that QEMU takes a client for that names none.
pub const QEMU_USERNAME: &str = "qemu";
/// The file of keys in QEMU's folder.
const QEMU_FILE: &str = "keys.psk";

/// The keys of a server's clients. Clones share what [`reload`](Self::reload) reads.
#[derive(Debug, Clone)]
pub struct Server {
    path: PathBuf,
    keys: Arc<RwLock<Keys>>,
    context: backend::Context,
}

impl Server {
    /// Reads a file as `psktool` writes it: `user:key`, the key in hexadecimal.
    ///
    /// # Errors
    /// The file cannot be read, or a line is not like that; `Unsupported` without the feature `psk`.
    pub fn from_file(path: &Path) -> Result<Self> {
        let keys = Arc::new(RwLock::new(Keys::read(path)?));
        let context = backend::Context::server(Arc::clone(&keys))?;
        Ok(Self { path: path.to_owned(), keys, context })
    }

    /// Reads `keys.psk` of a folder, as QEMU has it.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::from_file(&dir.join(QEMU_FILE))
    }

    /// Reads the file again, for connections that come from now on. If that fails, what was read before stays.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn reload(&self) -> Result<()> {
        let keys = Keys::read(&self.path)?;
        *self.keys.write() = keys;
        Ok(())
    }

    /// One connection's session.
    ///
    /// # Errors
    /// OpenSSL has no memory or no random numbers.
    pub fn session(&self) -> io::Result<Box<dyn Session>> {
        self.context.session()
    }
}

/// A client's key.
#[derive(Debug, Clone)]
pub struct Client {
    context: backend::Context,
}

impl Client {
    /// The key of `username` in a file as `psktool` writes it; without a name, the only one there is.
    ///
    /// # Errors
    /// The file cannot be read, a line is not as it should be, or it is not clear which key is meant; `Unsupported`
    /// without the feature `psk`.
    pub fn from_file(path: &Path, username: Option<&str>) -> Result<Self> {
        let keys = Keys::read(path)?;
        let (username, key) = keys.choose(path, username)?;
        Ok(Self { context: backend::Context::client(username, key)? })
    }

    /// The key of `username` ([`QEMU_USERNAME`] if there is none) in `keys.psk` of a folder, as QEMU has it.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_dir(dir: &Path, username: Option<&str>) -> Result<Self> {
        Self::from_file(&dir.join(QEMU_FILE), Some(username.unwrap_or(QEMU_USERNAME)))
    }

    /// One connection's session. The name of the host does not matter: who has the key is the right one.
    ///
    /// # Errors
    /// OpenSSL has no memory or no random numbers.
    pub fn session(&self, _hostname: &str) -> io::Result<Box<dyn Session>> {
        self.context.session()
    }
}

#[cfg(all(test, not(feature = "psk")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(QEMU_FILE), "qemu:00\n").unwrap();
        for error in
            [Server::from_dir(dir.path()).unwrap_err(), Client::from_dir(dir.path(), None).unwrap_err()]
        {
            assert_eq!(error.kind(), block::ErrorKind::Unsupported);
            assert!(error.hints()[0].contains("libssl-dev"), "{error:?}");
        }
    }
}
