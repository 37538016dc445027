//! Encryption of new qcow2 images: the options `encryption` and `encrypt.*`.

use std::sync::Arc;

use block::{Error, Result};
use crypt::luks::{self, CreateOptions, Unlocker};
use crypt::{Secret, Volume};
use qcow2::Qcow2;

use super::super::does_not_accept;
use crate::options::Options;
use crate::secret::Secrets;

/// Options that only LUKS has.
const LUKS_ONLY: &[&str] =
    &["cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"];

/// How a new image is to be encrypted.
#[derive(Debug)]
pub(crate) enum Encryption {
    /// In the old way.
    Aes(Secret),
    /// With LUKS.
    Luks(Box<CreateOptions>, Secret, Arc<Unlocker>),
}

/// The same, with its keys.
#[derive(Debug)]
pub(super) enum Made {
    Aes(Arc<Volume>),
    Luks { prefix: Vec<u8>, len: u64, volume: Arc<Volume> },
}

impl Encryption {
    /// What the options ask for, if anything.
    pub(crate) fn new(options: &Options, secrets: &Secrets) -> Result<Option<Self>> {
        let Some(format) = format(options)? else { return Ok(None) };
        let given = |name: &str| options.given(&format!("encrypt.{name}"));
        if format == "aes"
            && let Some(name) = LUKS_ONLY.iter().find(|name| given(name).is_some())
        {
            return Err(Error::usage(format!("Parameter 'encrypt.{name}' is unexpected")));
        }
        let luks = (format == "luks").then(|| CreateOptions::from_words(given)).transpose()?;
        let secret = secrets.required("encrypt.key-secret", given("key-secret"))?.clone();
        Ok(Some(match luks {
            None => Self::Aes(secret),
            Some(options) => Self::Luks(Box::new(options), secret, Arc::clone(secrets.unlocker())),
        }))
    }

    /// Bytes that the LUKS header takes.
    pub(crate) fn header_len(&self) -> u64 {
        match self {
            Self::Aes(_) => 0,
            Self::Luks(options, ..) => luks::area_len(&options.spec),
        }
    }

    /// Makes the keys, which takes as long as unlocking is to take.
    pub(super) fn make(&self) -> Result<Made> {
        match self {
            Self::Aes(secret) => Ok(Made::Aes(Arc::new(Volume::qcow2_aes(secret)?))),
            Self::Luks(options, secret, unlocker) => {
                let created = luks::create(options, secret)?;
                unlocker.remember(&created, secret);
                Ok(Made::Luks {
                    prefix: created.prefix,
                    len: self.header_len(),
                    volume: Arc::new(created.volume),
                })
            }
        }
    }
}

impl Made {
    /// Encrypts an image that has just been made. It has to be opened again, with what is returned.
    pub(super) fn apply(&self, image: &Qcow2) -> Result<Arc<Volume>> {
        match self {
            Self::Aes(volume) => image.use_old_aes().map(|()| Arc::clone(volume)),
            Self::Luks { prefix, len, volume } => {
                image.add_luks_header(prefix, *len).map(|()| Arc::clone(volume))
            }
        }
    }
}

/// The format of the encryption, if there is to be one.
fn format(options: &Options) -> Result<Option<&str>> {
    let old = options.is_on("encryption");
    let other = LUKS_ONLY
        .iter()
        .chain(&["key-secret"])
        .any(|name| options.given(&format!("encrypt.{name}")).is_some());
    match options.given("encrypt.format") {
        Some(_) if old => {
            Err(Error::usage("'encrypt.format' and its alias 'encryption' can't be used at the same time"))
        }
        Some(format @ ("aes" | "luks")) => Ok(Some(format)),
        Some(other) => Err(does_not_accept("format", other)),
        None if old => Ok(Some("aes")),
        None if other => Err(Error::usage("Parameter 'encrypt.format' is missing")),
        None => Ok(None),
    }
}
