//! A client's certificates, and how it finds out whether the server is the right one.

use std::io;
use std::path::Path;
use std::sync::Arc;

use block::{Error, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use super::folder::{self, Folder, Side};
use super::session::RustlsSession;
use super::{VERSIONS, explain, identity, provider};
use crate::channel::Session;

/// What may differ from one client to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whether the server must be who it should be. Without this, whoever sits in between can read and change
    /// everything.
    pub verify_peer: bool,
    /// The name that the server's certificate must have, where it is another than that of the host (`tls-hostname`).
    pub hostname: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { verify_peer: true, hostname: None }
    }
}

/// What a client shows, and what it asks of its server.
#[derive(Debug, Clone)]
pub struct Config {
    options: Options,
    config: Arc<ClientConfig>,
}

impl Config {
    /// Reads `ca-cert.pem` of `dir`, which must have signed the server's certificate, `ca-crl.pem`, if there is one,
    /// and `client-cert.pem` and `client-key.pem`, if they are there.
    ///
    /// # Errors
    /// A file is missing, cannot be read or understood, does not belong to the others, or is out of date.
    pub fn from_dir(dir: &Path, options: Options) -> Result<Self> {
        let folder = Folder::new(dir)?;
        let provider = provider();
        let verifier: Arc<dyn ServerCertVerifier> = match options.verify_peer {
            false => Arc::new(Anyone(Arc::clone(&provider))),
            true => Arc::new(Verifier::new(folder.authorities()?, Some(&folder), &provider)?),
        };
        let own = folder.own_if_any(Side::Client, &provider)?;
        let builder = ClientConfig::builder_with_provider(provider);
        let builder =
            builder.with_protocol_versions(&VERSIONS).map_err(|error| Error::invalid(error.to_string()))?;
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some(own) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
        };
        Ok(Self::new(options, config))
    }

    /// Trusts the authorities in the file `bundle`, those of the system for instance, and shows no certificate.
    ///
    /// # Errors
    /// The file is missing, or cannot be read or understood.
    pub fn from_bundle(bundle: &Path, options: Options) -> Result<Self> {
        let provider = provider();
        let verifier: Arc<dyn ServerCertVerifier> = match options.verify_peer {
            false => Arc::new(Anyone(Arc::clone(&provider))),
            true => Arc::new(Verifier::new(folder::authorities(bundle)?, None, &provider)?),
        };
        let builder = ClientConfig::builder_with_provider(provider);
        let builder =
            builder.with_protocol_versions(&VERSIONS).map_err(|error| Error::invalid(error.to_string()))?;
        let config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        Ok(Self::new(options, config))
    }

    fn new(options: Options, mut config: ClientConfig) -> Self {
        // Nobody resumes an NBD connection.
        config.resumption = Resumption::disabled();
        Self { options, config: Arc::new(config) }
    }

    /// One connection's session with the server that the user calls `hostname`; see
    /// [`ClientTls::session`](super::ClientTls::session).
    ///
    /// # Errors
    /// The name is none, and the server's certificate is to be checked: `InvalidInput`.
    pub fn session(&self, hostname: &str) -> io::Result<Box<dyn Session>> {
        let name = self.server_name(hostname)?;
        let connection = ClientConnection::new(Arc::clone(&self.config), name)
            .map_err(|error| explain::explain(&error))?;
        Ok(Box::new(RustlsSession::new(connection)))
    }

    fn server_name(&self, hostname: &str) -> io::Result<ServerName<'static>> {
        let wanted = self.options.hostname.as_deref().unwrap_or(hostname);
        // An address in a URI is in brackets if it is one of IPv6.
        let bare = wanted.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(wanted);
        let message = match ServerName::try_from(bare.to_owned()) {
            Ok(name) => return Ok(name),
            Err(_) if !self.options.verify_peer => {
                return ServerName::try_from("localhost").map_err(io::Error::other);
            }
            Err(_) if wanted.is_empty() => {
                "TLS: the server has no name that its certificate could be held against; say it with tls-hostname=NAME"
                    .to_owned()
            }
            Err(_) => format!("TLS: '{wanted}' is not the name of a host; say the right one with tls-hostname=NAME"),
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }
}

/// As rustls would verify, but a certificate that has nothing else may name its server by the common name.
#[derive(Debug)]
struct Verifier {
    verifier: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(
        roots: Arc<RootCertStore>,
        folder: Option<&Folder>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self> {
        let mut builder =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider));
        if let Some(folder) = folder {
            // A list says something of one authority's certificates only.
            builder = builder.with_crls(folder.revoked()?).allow_unknown_revocation_status();
            builder = builder.enforce_revocation_expiration();
        }
        let verifier = builder.build().map_err(|error| match folder {
            Some(folder) => folder.verifier_error(&error),
            None => Error::invalid(error.to_string()),
        })?;
        Ok(Self { verifier, roots, provider: Arc::clone(provider) })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        // The name comes last in there: whoever fails by it has passed everything else.
        let result =
            self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let other_name = matches!(
            result,
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            ))
        );
        if !other_name || !identity::common_name_is(end_entity, server_name) {
            return result;
        }
        // Should that order ever change, the chain at least is not left out.
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// `verify-peer=off`: whoever holds the key of the certificate that is shown.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
