//! A server's certificates.

use std::io;
use std::path::Path;
use std::sync::Arc;

use block::{Error, Result};
use parking_lot::RwLock;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection,
    SignatureScheme,
};

use super::authz::Authz;
use super::folder::{Folder, Side};
use super::session::RustlsSession;
use super::{VERSIONS, explain, identity, provider};
use crate::channel::Session;

/// What a server shows, and whom it lets in. Clones share what [`reload`](Self::reload) reads.
#[derive(Debug, Clone)]
pub struct Config {
    folder: Folder,
    verify_peer: bool,
    authz: Option<Arc<Authz>>,
    current: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Config {
    /// Reads `server-cert.pem` and `server-key.pem` of `dir`; with `verify_peer`, clients need a certificate that
    /// `ca-cert.pem` has signed and `ca-crl.pem`, if there is one, has not revoked.
    ///
    /// # Errors
    /// A file is missing, cannot be read or understood, does not belong to the others, or is out of date.
    pub fn from_dir(dir: &Path, verify_peer: bool) -> Result<Self> {
        Self::new(dir, verify_peer, None)
    }

    /// Like [`from_dir`](Self::from_dir) with `verify_peer`, but of the clients that have a good certificate only those
    /// may come in that `authz` allows.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn with_authz(dir: &Path, authz: Authz) -> Result<Self> {
        Self::new(dir, true, Some(Arc::new(authz)))
    }

    fn new(dir: &Path, verify_peer: bool, authz: Option<Arc<Authz>>) -> Result<Self> {
        let folder = Folder::new(dir)?;
        let current = load(&folder, verify_peer, authz.as_ref())?;
        Ok(Self { folder, verify_peer, authz, current: Arc::new(RwLock::new(current)) })
    }

    /// Reads the folder again, for connections that come from now on. If that fails, what was read before stays.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn reload(&self) -> Result<()> {
        let fresh = load(&self.folder, self.verify_peer, self.authz.as_ref())?;
        *self.current.write() = fresh;
        Ok(())
    }

    /// One connection's session.
    ///
    /// # Errors
    /// There are no random numbers to be had.
    pub fn session(&self) -> io::Result<Box<dyn Session>> {
        let config = Arc::clone(&self.current.read());
        let connection = ServerConnection::new(config).map_err(|error| explain::explain(&error))?;
        Ok(Box::new(RustlsSession::new(connection)))
    }
}

fn load(folder: &Folder, verify_peer: bool, authz: Option<&Arc<Authz>>) -> Result<Arc<ServerConfig>> {
    let provider = provider();
    let own = folder.own(Side::Server, &provider)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder =
        builder.with_protocol_versions(&VERSIONS).map_err(|error| Error::invalid(error.to_string()))?;
    let builder = match verify_peer {
        false => builder.with_no_client_auth(),
        true => builder.with_client_cert_verifier(verifier(folder, &provider, authz)?),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
    // Nobody resumes an NBD connection: tickets and the memory of sessions would serve nothing.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

fn verifier(
    folder: &Folder,
    provider: &Arc<CryptoProvider>,
    authz: Option<&Arc<Authz>>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let builder = WebPkiClientVerifier::builder_with_provider(folder.authorities()?, Arc::clone(provider))
        .with_crls(folder.revoked()?)
        // A list says something of one authority's certificates only.
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration();
    let verifier = builder.build().map_err(|error| folder.verifier_error(&error))?;
    Ok(match authz {
        None => verifier,
        Some(authz) => Arc::new(Authorised { verifier, authz: Arc::clone(authz) }),
    })
}

/// Good certificates are not enough.
#[derive(Debug)]
struct Authorised {
    verifier: Arc<dyn ClientCertVerifier>,
    authz: Arc<Authz>,
}

impl ClientCertVerifier for Authorised {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        match identity::distinguished_name(end_entity) {
            Some(name) if self.authz.allows(&name) => Ok(verified),
            _ => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
