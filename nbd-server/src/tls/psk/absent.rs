//! What stands in for OpenSSL where there is none.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use block::{Error, Result};
use parking_lot::RwLock;

use super::keys::{Key, Keys};
use crate::channel::Session;

/// There is none of these.
#[derive(Debug, Clone)]
pub(super) struct Context(Infallible);

impl Context {
    pub(super) fn server(_keys: Arc<RwLock<Keys>>) -> Result<Self> {
        Err(unsupported())
    }

    pub(super) fn client(_username: &str, _key: &Key) -> Result<Self> {
        Err(unsupported())
    }

    pub(super) fn session(&self) -> io::Result<Box<dyn Session>> {
        match self.0 {}
    }
}

fn unsupported() -> Error {
    Error::unsupported("TLS with shared keys (PSK) is not part of this build of vimg")
        .hint("use certificates, or build it where OpenSSL's headers are (Debian: libssl-dev and pkg-config)")
}
