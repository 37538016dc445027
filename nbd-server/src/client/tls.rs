//! From what a name says of TLS to sessions.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Error, Result};

use crate::channel::Session;
use crate::tls::{ClientTls, client, psk};
use crate::uri::TlsParameters;

use super::handshake::StartTls;

/// Where systems keep the authorities that everybody trusts.
const BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

impl StartTls for ClientTls {
    fn session(&self, hostname: &str) -> io::Result<Box<dyn Session>> {
        Self::session(self, hostname)
    }
}

/// Reads what is needed to speak TLS as `parameters` say.
///
/// # Errors
/// A file is missing or does not serve.
pub fn load(parameters: &TlsParameters) -> Result<Arc<dyn StartTls>> {
    if parameters.is_psk() {
        return psk(parameters);
    }
    let options =
        client::Options { verify_peer: parameters.verify_peer, hostname: parameters.hostname.clone() };
    let config = match &parameters.certificates {
        Some(folder) => client::Config::from_dir(folder, options)?,
        None => client::Config::from_bundle(&bundle()?, options)?,
    };
    Ok(Arc::new(ClientTls::X509(config)))
}

fn psk(parameters: &TlsParameters) -> Result<Arc<dyn StartTls>> {
    let Some(file) = &parameters.psk_file else {
        return Err(Error::usage("TLS with a shared key needs the file that the key is in")
            .hint("name it: nbds://HOST/EXPORT?tls-psk-file=FILE"));
    };
    let client = psk::Client::from_file(file, parameters.username.as_deref())?;
    Ok(Arc::new(ClientTls::Psk(client)))
}

fn bundle() -> Result<PathBuf> {
    let found = BUNDLES.iter().map(Path::new).find(|path| path.exists());
    found.map(Path::to_owned).ok_or_else(|| {
        Error::usage("this system has no list of authorities for TLS")
            .hint("name a folder with ca-cert.pem: nbds://HOST/EXPORT?tls-certificates=FOLDER")
    })
}
