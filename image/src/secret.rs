//! `--object`: the passphrases and keys that the command line provides, by name.
//!
//! ```text
//! --object secret,id=NAME,data=TEXT                       as it is
//! --object secret,id=NAME,file=PATH                       the contents of a file, all of it
//! --object secret,...,format=base64                       encoded
//! --object secret,...,format=base64,keyid=OTHER,iv=B64    encrypted (AES-256-CBC) with another secret
//! --object '{"qom-type": "secret", "id": ...}'            the same in JSON
//! ```
//!
//! ```text
//! --object tls-creds-x509,id=NAME,dir=FOLDER[,verify-peer=off]   how TLS is spoken
//! --object tls-creds-psk,id=NAME,dir=FOLDER[,username=NAME]
//! ```
//!
//! Secrets are read once, in the order in which they are given, before any image is opened: a file may be a pipe.

mod tls;

use std::collections::BTreeMap;
use std::sync::Arc;

use block::{Error, ErrorKind, Result};
use crypt::Secret;
use crypt::luks::Unlocker;
use serde_json::{Map, Value};

pub use tls::{TlsCreds, TlsKind};

use crate::spec::{parse_json_object, split_commas, text_of};

/// Secrets by name. Cheap to clone; `Debug` shows no more than the names.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    by_name: Arc<BTreeMap<String, Secret>>,
    /// What TLS needs.
    tls: Arc<BTreeMap<String, TlsCreds>>,
    /// Keys of volumes that were made with these passphrases.
    unlocker: Arc<Unlocker>,
}

/// Kinds of objects that qemu-img knows and that serve nothing here (yet).
const OTHER_KINDS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "secret_keyring",
    "tls-creds-anon",
    "tls-cipher-suites",
];

/// Kinds that qemu knows, but not its qemu-img.
const NOT_FOR_IMAGES: &[&str] = &[
    "iothread",
    "main-loop",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "memory-backend-shm",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "can-bus",
    "colo-compare",
    "cryptodev-backend",
    "cryptodev-backend-builtin",
    "dbus-vmstate",
    "filter-buffer",
    "filter-dump",
    "filter-mirror",
    "input-linux",
    "qtest",
];

/// Keys of a secret besides `qom-type` and `id`.
const KEYS: &[&str] = &["data", "file", "format", "keyid", "iv"];

impl Secrets {
    /// Understands the arguments of `--object`, in order, and reads the files that they name.
    ///
    /// # Errors
    /// In qemu's words.
    pub fn parse(definitions: &[String]) -> Result<Self> {
        let (mut secrets, mut tls) = (BTreeMap::new(), BTreeMap::new());
        for definition in definitions {
            let known = |id: &str| secrets.contains_key(id) || tls.contains_key(id);
            match define(definition, &secrets)? {
                Some((id, _)) if known(&id) => {
                    return Err(Error::usage(format!(
                        "attempt to add duplicate property '{id}' to object (type 'container')"
                    )));
                }
                Some((id, Object::Secret(secret))) => drop(secrets.insert(id, secret)),
                Some((id, Object::Tls(creds))) => drop(tls.insert(id, creds)),
                None => {}
            }
        }
        Ok(Self { by_name: Arc::new(secrets), tls: Arc::new(tls), ..Self::default() })
    }

    /// The same secrets and one more, of a caller that has no command line.
    #[must_use]
    pub fn with(&self, id: &str, secret: Secret) -> Self {
        let mut secrets = (*self.by_name).clone();
        secrets.insert(id.to_owned(), secret);
        Self { by_name: Arc::new(secrets), ..self.clone() }
    }

    /// What is known of volumes that were made with these passphrases.
    pub(crate) fn unlocker(&self) -> &Arc<Unlocker> {
        &self.unlocker
    }

    /// The bytes of a secret.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, id: &str) -> Result<&Secret> {
        find(&self.by_name, id)
    }

    /// What the object of this name says about TLS.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn tls(&self, id: &str) -> Result<&TlsCreds> {
        self.tls.get(id).ok_or_else(|| Error::usage(format!("No TLS credentials with id '{id}'")))
    }

    /// A secret that serves as a passphrase, which qemu wants to be text.
    ///
    /// # Errors
    /// There is none of that name, or it is not text.
    pub fn passphrase(&self, id: &str) -> Result<&Secret> {
        let secret = self.get(id)?;
        match std::str::from_utf8(secret) {
            Ok(text) if !text.contains('\0') => Ok(secret),
            _ => Err(Error::usage(format!("Data from secret {id} is not valid UTF-8"))),
        }
    }

    /// The passphrase that the option `key` (`key-secret`, `encrypt.key-secret`) names.
    ///
    /// # Errors
    /// The option is not given; otherwise as [`passphrase`](Self::passphrase).
    pub fn required(&self, key: &str, id: Option<&str>) -> Result<&Secret> {
        let Some(id) = id else {
            let error = Error::usage(format!("Parameter '{key}' is required for cipher"));
            return Err(error.hint(format!(
                "name the image as --image-opts driver=FORMAT,file.filename=FILE,{key}=ID, and the passphrase by \
                 --object secret,id=ID,file=PATH (a new image takes the option as -o {key}=ID)"
            )));
        };
        self.passphrase(id)
    }
}

fn find<'a>(secrets: &'a BTreeMap<String, Secret>, id: &str) -> Result<&'a Secret> {
    secrets.get(id).ok_or_else(|| Error::usage(format!("No secret with id '{id}'")))
}

/// What an object is for.
enum Object {
    Secret(Secret),
    Tls(TlsCreds),
}

/// One argument of `--object`. `None`: a throttle group, which limits nothing until the `throttle` driver uses it, and
/// that one is refused.
fn define(definition: &str, known: &BTreeMap<String, Secret>) -> Result<Option<(String, Object)>> {
    let options = Properties(options(definition)?);
    let kind = options.required("qom-type")?;
    let group = kind == "throttle-group";
    let tls = TlsKind::of_object(&kind);
    if kind != "secret" && !group && tls.is_none() {
        return Err(not_a_secret(&kind));
    }
    let id = options.required("id")?;
    if !is_identifier(&id) {
        return Err(Error::usage(
            "Parameter 'id' expects an identifier\n\
             Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ));
    }
    if group {
        return options.refuse_unlimited().map(|()| None);
    }
    if let Some(kind) = tls {
        return Ok(Some((id, Object::Tls(TlsCreds::from_properties(kind, &options)?))));
    }
    let base64 = match options.text("format")?.as_deref() {
        None | Some("raw") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Error::usage(format!("Parameter 'format' does not accept value '{other}'")));
        }
    };
    options.refuse_unknown()?;
    let bytes = options.load()?;
    let secret = match options.text("keyid")? {
        Some(key) => decrypted(&options, &bytes, base64, find(known, &key)?)?,
        None if base64 => decode_base64(&bytes)?,
        None => bytes,
    };
    Ok(Some((id, Object::Secret(secret))))
}

fn not_a_secret(kind: &str) -> Error {
    if OTHER_KINDS.contains(&kind) {
        return Error::unsupported(format!("objects of type '{kind}' are not in this version of vimg"));
    }
    if NOT_FOR_IMAGES.contains(&kind) {
        return Error::usage(format!("invalid object type: {kind}"));
    }
    let error = Error::usage(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    crate::suggest::did_you_mean(error, kind, ["secret", "throttle-group"])
}

/// The keys and values, of either notation.
fn options(definition: &str) -> Result<Map<String, Value>> {
    if definition.starts_with('{') {
        return parse_json_object(definition);
    }
    let mut options = Map::new();
    if definition.is_empty() {
        return Ok(options);
    }
    for (index, part) in split_commas(definition).into_iter().enumerate() {
        match part.split_once('=') {
            Some((key, value)) => {
                options.insert(key.to_owned(), Value::String(value.to_owned()));
            }
            None if index == 0 => {
                options.insert("qom-type".to_owned(), Value::String(part));
            }
            None => return Err(Error::usage(format!("Expected '=' after parameter '{part}'"))),
        }
    }
    Ok(options)
}

fn is_identifier(id: &str) -> bool {
    let tail = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(tail)
}

/// The keys and values of an object.
struct Properties(Map<String, Value>);

impl Properties {
    fn text(&self, key: &str) -> Result<Option<String>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match value {
            Value::String(_) => Ok(text_of(value)),
            _ => Err(Error::usage(format!("Invalid parameter type for '{key}', expected: string"))),
        }
    }

    fn required(&self, key: &str) -> Result<String> {
        self.text(key)?.ok_or_else(|| Error::usage(format!("Parameter '{key}' is missing")))
    }

    fn refuse_unknown(&self) -> Result<()> {
        let known = |key: &str| key == "qom-type" || key == "id" || KEYS.contains(&key);
        match self.0.keys().find(|key| !known(key)) {
            Some(key) => Err(Error::usage(format!("Parameter '{key}' is unexpected"))),
            None => Ok(()),
        }
    }

    /// A throttle group has limits and nothing else.
    fn refuse_unlimited(&self) -> Result<()> {
        let known = |key: &str| {
            key == "qom-type"
                || key == "id"
                || key == "limits"
                || key.starts_with("limits.")
                || key.starts_with("x-")
        };
        match self.0.keys().find(|key| !known(key)) {
            Some(key) => Err(Error::usage(format!("Parameter '{key}' is unexpected"))),
            None => Ok(()),
        }
    }

    /// The bytes of the secret as they were given.
    fn load(&self) -> Result<Secret> {
        match (self.text("data")?, self.text("file")?) {
            (Some(data), None) => Ok(Secret::new(data.into_bytes())),
            (None, Some(path)) => read(&path),
            (Some(_), Some(_)) => Err(Error::usage("'file' and 'data' are mutually exclusive")),
            (None, None) => Err(Error::usage("Either 'file' or 'data' must be provided")),
        }
    }
}

/// A file of a secret, which is not longer than this.
const MOST: u64 = 64 << 20;

fn read(path: &str) -> Result<Secret> {
    use std::io::Read as _;
    let unable = |what: &str, error: std::io::Error| {
        // GLib's words and quotation marks.
        let reason = Error::from(error);
        let text = format!("Unable to read {path}: Failed to {what} file “{path}”: {reason}");
        Error::new(reason.kind(), text)
    };
    let file = std::fs::File::open(path).map_err(|error| unable("open", error))?;
    let mut bytes = Secret::default();
    let read = file.take(MOST + 1).read_to_end(bytes.vec_mut()).map_err(|error| unable("read", error))?;
    if read as u64 > MOST {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("Unable to read {path}: it is no secret of {read} bytes"),
        ));
    }
    Ok(bytes)
}

/// What `keyid` and `iv` are for: AES-256 in CBC, filled up to whole blocks in the way of PKCS#7.
fn decrypted(options: &Properties, bytes: &Secret, base64: bool, key: &Secret) -> Result<Secret> {
    let key: &[u8; 32] = (**key).try_into().map_err(|_| Error::usage("Key should be 32 bytes in length"))?;
    let iv = options.text("iv")?.ok_or_else(|| Error::usage("IV is required to decrypt secret"))?;
    let iv = decode_base64(iv.as_bytes())?;
    let iv: &[u8; 16] = (*iv)
        .try_into()
        .map_err(|_| Error::usage(format!("IV should be 16 bytes in length not {}", iv.len())))?;
    let mut bytes = if base64 { decode_base64(bytes)? } else { bytes.clone() };
    let len = bytes.len();
    if !len.is_multiple_of(16) {
        return Err(Error::usage(format!("Length {len} must be a multiple of block size 16")));
    }
    crypt::cipher::decrypt_aes256_cbc(key, iv, bytes.bytes_mut())?;
    let padding = usize::from(bytes.last().copied().unwrap_or(0));
    if padding > 16 || padding > len {
        return Err(Error::usage(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        )));
    }
    bytes.vec_mut().truncate(len - padding);
    Ok(bytes)
}

/// Base64 as GLib decodes it: line ends do not count, nor does a last group that is not whole.
fn decode_base64(text: &[u8]) -> Result<Secret> {
    let mut decoded = Secret::new(Vec::with_capacity(text.len() / 4 * 3));
    let mut group = Secret::default();
    for &byte in text {
        match byte {
            b'\n' => continue,
            0 => return Err(Error::usage("Base64 data contains embedded NUL characters")),
            _ => group.vec_mut().push(byte),
        }
        let value = |byte| sextet(byte).ok_or_else(invalid_base64);
        value(byte)?;
        if let [a, b, c, d] = *group {
            let bits = value(a)? << 18 | value(b)? << 12 | value(c)? << 6 | value(d)?;
            let [_, first, second, third] = bits.to_be_bytes();
            let len = 3 - usize::from(c == b'=') - usize::from(d == b'=');
            decoded.vec_mut().extend_from_slice(&[first, second, third][..len]);
            group = Secret::default();
        }
    }
    Ok(decoded)
}

fn invalid_base64() -> Error {
    Error::usage("Base64 data contains invalid characters")
}

fn sextet(byte: u8) -> Option<u32> {
    Some(match byte {
        b'A'..=b'Z' => u32::from(byte - b'A'),
        b'a'..=b'z' => u32::from(byte - b'a') + 26,
        b'0'..=b'9' => u32::from(byte - b'0') + 52,
        b'+' => 62,
        b'/' => 63,
        b'=' => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
