//! The folder of certificates as QEMU, nbdkit and libnbd lay it out, and what is wrong with it, if something is.
//!
//! ```text
//! ca-cert.pem        who signs the certificates of peers
//! ca-crl.pem         which of those count no more (may be missing)
//! server-cert.pem    a server's certificate, then those between it and the authority
//! server-key.pem     its key
//! client-cert.pem    the same of a client (both may be missing)
//! client-key.pem
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Error, ErrorKind, Result};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::VerifierBuilderError;
use rustls::sign::CertifiedKey;
use x509_cert::der::{Any, Decode as _, Encode as _, Tag, Tagged as _};

use super::identity;

/// More than this is not a certificate, a list of them or a key.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Where the layout is described.
const MANUAL: &str = "docs/nbd-tls.md shows how the files are made";

/// One side of the connection, in names of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Server,
    Client,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// A folder that was named by the user.
#[derive(Debug, Clone)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// The folder at `dir`.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        match std::fs::metadata(dir) {
            Ok(found) if found.is_dir() => Ok(Self(dir.to_owned())),
            Ok(_) => Err(Error::usage("it is a file; a folder of certificates is wanted")),
            Err(error) => Err(Error::from(error)),
        }
        .map_err(|error| {
            error.context(shown(dir)).hint(format!("name the folder that holds ca-cert.pem; {MANUAL}"))
        })
    }

    /// The authorities that peers' certificates are held against.
    pub(super) fn authorities(&self) -> Result<Arc<RootCertStore>> {
        authorities(&self.0.join("ca-cert.pem"))
    }

    /// Which certificates count no more; empty if there is no such list.
    pub(super) fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let path = self.0.join("ca-crl.pem");
        match optional(&path)? {
            None => Ok(vec![]),
            Some(text) => items(&path, &text, "certificate revocation list"),
        }
    }

    /// Why certificates cannot be held against what this folder has.
    pub(super) fn verifier_error(&self, error: &VerifierBuilderError) -> Error {
        let name = match error {
            VerifierBuilderError::InvalidCrl(_) => "ca-crl.pem",
            _ => "ca-cert.pem",
        };
        Error::invalid(format!("the file cannot be used: {error}")).context(shown(&self.0.join(name)))
    }

    /// The certificate of `side` and its key.
    pub(super) fn own(&self, side: Side, provider: &CryptoProvider) -> Result<CertifiedKey> {
        match self.own_if_any(side, provider)? {
            Some(own) => Ok(own),
            None => {
                let path = self.0.join(format!("{}-cert.pem", side.name()));
                let error = Error::new(ErrorKind::NotFound, "there is no such file").context(shown(&path));
                Err(error.hint(format!("a {} needs its certificate and its key; {MANUAL}", side.name())))
            }
        }
    }

    /// The certificate of `side` and its key, if there is one.
    pub(super) fn own_if_any(&self, side: Side, provider: &CryptoProvider) -> Result<Option<CertifiedKey>> {
        let cert_path = self.0.join(format!("{}-cert.pem", side.name()));
        let key_path = self.0.join(format!("{}-key.pem", side.name()));
        let Some(text) = optional(&cert_path)? else { return Ok(None) };
        let chain: Vec<CertificateDer<'static>> = items(&cert_path, &text, "certificate")?;
        if let Some(first) = chain.first() {
            identity::check_dates(first).map_err(|error| {
                error
                    .context(shown(&cert_path))
                    .hint(format!("have it signed anew, or set the clock right; {MANUAL}"))
            })?;
        }
        let key = private_key(&key_path)?;
        let own = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                Error::invalid("the key does not belong to the certificate")
                    .context(shown(&key_path))
                    .hint(format!("it must be the key that {} was made for", shown(&cert_path)))
            }
            error => Error::invalid(format!("the key cannot be used: {error}"))
                .context(shown(&key_path))
                .hint("RSA of 2048 bits and more, ECDSA on P-256 and P-384 and Ed25519 can be used"),
        })?;
        Ok(Some(own))
    }
}

/// The authorities in one file: of a folder, or those that the system trusts.
pub(super) fn authorities(path: &Path) -> Result<Arc<RootCertStore>> {
    let text = read(path)?;
    let mut store = RootCertStore::empty();
    let certificates: Vec<CertificateDer<'static>> = items(path, &text, "certificate")?;
    for certificate in certificates {
        store.add(certificate).map_err(|error| {
            Error::invalid(format!("the authority's certificate cannot be used: {error}"))
                .context(shown(path))
        })?;
    }
    Ok(Arc::new(store))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let text = zeroize::Zeroizing::new(read(path)?);
    PrivateKeyDer::from_pem_slice(&text).map(of_right_length).map_err(|error| {
        if contains(&text, b"ENCRYPTED") {
            return Error::unsupported("the key is protected by a passphrase").context(shown(path)).hint(
                "store it without (openssl pkey -in FILE -out NEWFILE) where only the owner can read it",
            );
        }
        bad_pem(path, &error, "private key")
    })
}

/// GnuTLS writes the number in a key of ECDSA like any other: with a zero in front of half of them, and without those that
/// it begins with. RFC 5915, section 3, wants as many bytes as the curve has, and ring insists.
fn of_right_length(key: PrivateKeyDer<'static>) -> PrivateKeyDer<'static> {
    let PrivateKeyDer::Sec1(sec1) = &key else { return key };
    padded(sec1.secret_sec1_der()).map_or(key, |der| PrivateKeyDer::Sec1(der.into()))
}

/// `None`: it is something else, about which ring has better words.
fn padded(sec1: &[u8]) -> Option<Vec<u8>> {
    const P256_BYTES: usize = 32;
    const P384_BYTES: usize = 48;
    let mut fields: Vec<Any> = Vec::from_der(sec1).ok()?;
    let number = fields.get_mut(1).filter(|field| field.tag() == Tag::OctetString)?;
    let first = number.value().iter().position(|&byte| byte != 0)?;
    let digits = &number.value()[first..];
    let size = if digits.len() <= P256_BYTES { P256_BYTES } else { P384_BYTES };
    let mut whole = zeroize::Zeroizing::new(vec![0; size.checked_sub(digits.len())?]);
    whole.extend_from_slice(digits);
    *number = Any::new(Tag::OctetString, whole.as_slice()).ok()?;
    fields.to_der().ok()
}

/// All items of one kind in a file of PEM; at least one.
fn items<T: PemObject>(path: &Path, text: &[u8], what: &str) -> Result<Vec<T>> {
    let found: std::result::Result<Vec<T>, pem::Error> = T::pem_slice_iter(text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(bad_pem(path, &pem::Error::NoItemsFound, what)),
        Ok(found) => Ok(found),
        Err(error) => Err(bad_pem(path, &error, what)),
    }
}

fn bad_pem(path: &Path, error: &pem::Error, what: &str) -> Error {
    let message = match error {
        pem::Error::NoItemsFound => format!("the file holds no {what}"),
        error => format!("the file is not good PEM: {error}"),
    };
    let label = match what {
        "certificate revocation list" => "X509 CRL".to_owned(),
        what => what.to_uppercase(),
    };
    Error::invalid(message).context(shown(path)).hint(format!("a {what} begins with -----BEGIN {label}-----"))
}

/// A file that may be missing.
fn optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read(path).map(Some),
    }
}

/// All of a file that the user should have put there.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).map(|found| found.len());
    if size.as_ref().is_ok_and(|&size| size > FILE_BYTES_MAX) {
        let message = format!("the file is larger than {FILE_BYTES_MAX:#x} bytes");
        return Err(Error::invalid(message).context(shown(path)));
    }
    std::fs::read(path).map_err(|error| {
        let kind = error.kind();
        let found = Error::from(error).context(shown(path));
        match kind {
            io::ErrorKind::NotFound => found.hint(MANUAL),
            io::ErrorKind::PermissionDenied => {
                found.hint("the user that vimg runs as must be able to read it")
            }
            _ => found,
        }
    })
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

pub(super) fn shown(path: &Path) -> String {
    format!("'{}'", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_keys_are_as_long_as_their_curve() {
        let key = |number: &[u8]| {
            let fields = [
                Any::new(Tag::Integer, [1_u8].as_slice()).unwrap(),
                Any::new(Tag::OctetString, number).unwrap(),
            ];
            fields.to_vec().to_der().unwrap()
        };
        let with_zero = [&[0][..], &[0x80; 32]].concat();
        assert_eq!(padded(&key(&with_zero)).unwrap(), key(&[0x80; 32]));
        let short = [&[0][..], &[0x70; 31]].concat();
        assert_eq!(padded(&key(&[0x70; 31])).unwrap(), key(&short));
        assert_eq!(padded(&key(&[0x70; 47])).unwrap(), key(&[&[0][..], &[0x70; 47]].concat()));
        assert_eq!(padded(&key(&[0x70; 49])), None);
        assert_eq!(padded(&key(&[])), None);
        assert_eq!(padded(b"nonsense"), None);
    }
}
