//! Keys that both sides know (TLS-PSK).

use std::io;

use block::{Error, Result};

use crate::channel::Session;

/// The keys of a server's clients.
#[derive(Debug, Clone)]
pub struct Server(());

/// A client's key.
#[derive(Debug, Clone)]
pub struct Client(());

impl Server {
    /// One connection's session.
    ///
    /// # Errors
    /// Always, so far.
    pub fn session(&self) -> io::Result<Box<dyn Session>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// Always, so far.
    pub fn reload(&self) -> Result<()> {
        Err(Error::unsupported("TLS-PSK"))
    }
}

impl Client {
    /// One connection's session.
    ///
    /// # Errors
    /// Always, so far.
    pub fn session(&self, _hostname: &str) -> io::Result<Box<dyn Session>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
