//! TLS for both ends of a connection: X.509 certificates through rustls, shared keys (PSK) through OpenSSL, which
//! rustls cannot do.
//!
//! ```text
//!  folder of certificates --> server::Config, client::Config --+
//!                                                              +--> ServerTls, ClientTls --> Session --> Channel
//!  file of keys           --> psk::Server, psk::Client       --+
//! ```
//!
//! Everything is read and checked before the first connection; a [`Session`] then does no I/O at all. TLS 1.2 and 1.3,
//! nothing older: the document asks for no less ("TLS versions" in `doc/proto.md`).

use std::io;
use std::sync::Arc;

use block::Result;
use rustls::SupportedProtocolVersion;
use rustls::crypto::CryptoProvider;

use crate::channel::Session;

pub mod authz;
pub mod client;
mod explain;
mod folder;
mod identity;
pub mod psk;
pub mod server;
mod session;
#[cfg(test)]
mod tests;

pub use authz::Authz;

/// Whether a server wants TLS ("FORCEDTLS", "SELECTIVETLS" and "NOTLS" in `doc/proto.md`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// There is none: `STARTTLS` is refused.
    #[default]
    Off,
    /// Clients may have it.
    Optional,
    /// Clients without it learn nothing.
    Required,
}

/// How a server proves who it is, and who may be its client.
#[derive(Debug, Clone)]
pub enum ServerTls {
    /// By certificates.
    X509(server::Config),
    /// By keys that both sides know.
    Psk(psk::Server),
}

impl ServerTls {
    /// One connection's side of TLS.
    ///
    /// # Errors
    /// The library cannot start a session (no memory, no random numbers).
    pub fn session(&self) -> io::Result<Box<dyn Session>> {
        match self {
            Self::X509(config) => config.session(),
            Self::Psk(config) => config.session(),
        }
    }

    /// Reads the files again, for connections that come from now on. If that fails, what was read before stays.
    ///
    /// # Errors
    /// As when they were read first.
    pub fn reload(&self) -> Result<()> {
        match self {
            Self::X509(config) => config.reload(),
            Self::Psk(config) => config.reload(),
        }
    }
}

/// How a client proves who it is, and what it asks of its server.
#[derive(Debug, Clone)]
pub enum ClientTls {
    /// By certificates.
    X509(client::Config),
    /// By a key that both sides know.
    Psk(psk::Client),
}

impl ClientTls {
    /// One connection's side of TLS with the server that the user calls `hostname` (a name or an address without port;
    /// empty for a Unix socket). A name given in the configuration (`tls-hostname`) counts more.
    ///
    /// # Errors
    /// The certificate of a server without a name cannot be checked: `InvalidInput`.
    pub fn session(&self, hostname: &str) -> io::Result<Box<dyn Session>> {
        match self {
            Self::X509(config) => config.session(hostname),
            Self::Psk(config) => config.session(hostname),
        }
    }
}

/// Where rustls gets its ciphers from.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// "TLS versions" in `doc/proto.md`: 1.2 at least.
static VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
