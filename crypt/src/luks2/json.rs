//! The metadata in JSON (specification, section 3): understood and checked before anything is done.

use base64ct::{Base64, Encoding as _};
use block::num::to_usize;
use block::{Error, Result, Storage};
use serde_json::{Map, Value};

use super::binary;
use crate::hash::Hash;
use crate::luks::STRIPES;

/// The most slots that there can be.
const MOST_SLOTS: usize = 32;
/// The longest volume key of any cipher here.
const LONGEST_KEY: u64 = 64;
const SECTOR: u64 = 512;

/// A header that was checked in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The name of the volume.
    pub uuid: String,
    /// What its owner calls it; mostly empty.
    pub label: String,
    /// Grows by one with each change of the header.
    pub sequence: u64,
    /// The slots that can hold the key of the segment, in the order in which they are tried.
    pub keyslots: Vec<Keyslot>,
    /// Slots that are left out, and why.
    pub refused: Vec<String>,
    /// What is encrypted.
    pub segment: Segment,
    /// How the volume key is recognised.
    pub digest: Digest,
}

/// A place for a passphrase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyslot {
    /// Its number.
    pub number: u32,
    /// Bytes of the volume key in it.
    pub key_len: usize,
    /// The hash of the splitter.
    pub hash: Hash,
    /// How the passphrase becomes the key of the slot.
    pub kdf: Kdf,
    /// Where its key material begins, in bytes.
    pub offset: u64,
    /// How the key material is encrypted: cipher, mode and IV generator (`aes-xts-plain64`).
    pub encryption: String,
    /// Bytes of the key of that.
    pub area_key_len: usize,
    priority: u64,
}

impl Keyslot {
    /// Bytes of its key material, whole sectors.
    pub(super) fn material_len(&self) -> usize {
        (self.key_len * STRIPES as usize).next_multiple_of(to_usize(SECTOR))
    }
}

/// A way from a passphrase to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2 (RFC 8018).
    Pbkdf2 {
        /// Its hash.
        hash: Hash,
        /// Its rounds, at least 1.
        iterations: u32,
        /// Its salt.
        salt: Vec<u8>,
    },
    /// Argon2 (RFC 9106).
    Argon2 {
        /// Argon2id; else Argon2i.
        id: bool,
        /// Passes over the memory, at least 1.
        time: u32,
        /// Memory in KiB.
        memory: u32,
        /// Lanes, at least 1.
        lanes: u32,
        /// Its salt.
        salt: Vec<u8>,
    },
}

/// The sectors that are encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where they begin, in bytes.
    pub offset: u64,
    /// Their bytes; `None`: all that there are.
    pub size: Option<u64>,
    /// Number of the first sector, in units of 512 bytes.
    pub iv_tweak: u64,
    /// Cipher, mode and IV generator (`aes-xts-plain64`).
    pub encryption: String,
    /// Bytes that are encrypted as one.
    pub sector_size: usize,
}

/// PBKDF2 of the volume key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// Its hash.
    pub hash: Hash,
    /// Its rounds.
    pub iterations: u32,
    /// Its salt.
    pub salt: Vec<u8>,
    /// What comes out for the right key.
    pub digest: Vec<u8>,
}

type Object = Map<String, Value>;

impl Metadata {
    /// Reads the header at the start of a container.
    ///
    /// # Errors
    /// `Invalid`, `Corrupt`: there is none, or both copies are damaged; `Unsupported`: it needs what is not here, by name; or
    /// the host failed.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let copy = binary::read(storage)?;
        let json: Value = serde_json::from_slice(&copy.json)
            .map_err(|error| Error::invalid(format!("LUKS2 metadata is no JSON: {error}")))?;
        let root = json.as_object().ok_or_else(|| Error::invalid("LUKS2 metadata is no JSON object"))?;
        refuse_requirements(root)?;
        let (id, segment) = the_segment(root)?;
        let (digest, of_digest) = the_digest(root, &id)?;
        let (mut keyslots, mut refused) = (vec![], vec![]);
        for (name, slot) in objects(root, "keyslots")?.into_iter().take(MOST_SLOTS) {
            if !of_digest.contains(&name) {
                continue;
            }
            match keyslot(name, slot, copy.size) {
                Ok(slot) if slot.priority == 0 => refused.push(format!("keyslot {name} is not to be tried")),
                Ok(slot) => keyslots.push(slot),
                Err(error) => refused.push(format!("keyslot {name}: {error}")),
            }
        }
        // Preferred ones first (section 3.2), otherwise by their numbers.
        keyslots.sort_by_key(|slot| (std::cmp::Reverse(slot.priority), slot.number));
        let (uuid, label, sequence) = (copy.uuid, copy.label, copy.sequence);
        Ok(Self { uuid, label, sequence, keyslots, refused, segment, digest })
    }
}

/// What a reader must know to open it (section 3.6).
fn refuse_requirements(root: &Object) -> Result<()> {
    let mandatory = root
        .get("config")
        .and_then(|config| config.get("requirements"))
        .and_then(|requirements| requirements.get("mandatory"))
        .and_then(Value::as_array);
    match mandatory.and_then(|words| words.first()).map(|word| word.as_str().unwrap_or("?")) {
        None => Ok(()),
        Some(word) if word.contains("reencrypt") => Err(being_reencrypted()),
        Some(word) => Err(Error::unsupported(format!("LUKS2 requirement '{word}' not supported"))),
    }
}

fn being_reencrypted() -> Error {
    Error::unsupported("the LUKS2 volume is being re-encrypted")
        .hint("let 'cryptsetup reencrypt' finish within the guest")
}

/// The one segment, with its name.
fn the_segment(root: &Object) -> Result<(String, Segment)> {
    let mut found = None;
    for (name, segment) in objects(root, "segments")? {
        let flags = segment.get("flags").and_then(Value::as_array);
        if flags.is_some_and(|flags| !flags.is_empty()) {
            return Err(being_reencrypted());
        }
        match text(segment, "type")? {
            "crypt" => {}
            "linear" => return Err(being_reencrypted()),
            other if other.starts_with("hw-opal") => {
                return Err(Error::unsupported("the LUKS2 volume is encrypted by the drive (OPAL)"));
            }
            other => {
                return Err(Error::unsupported(format!("LUKS2 segment of type '{other}' not supported")));
            }
        }
        if segment.contains_key("integrity") {
            let text = "the LUKS2 volume is authenticated (dm-integrity), which is not supported";
            return Err(Error::unsupported(text));
        }
        if found.is_some() {
            return Err(Error::unsupported("LUKS2 volumes of several segments are not supported"));
        }
        let sector_size = number(segment, "sector_size")?;
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
            return Err(Error::invalid(format!("LUKS2 segment {name} has sectors of {sector_size} bytes")));
        }
        let size = match text(segment, "size")? {
            "dynamic" => None,
            _ => Some(number(segment, "size")?),
        };
        let segment = Segment {
            offset: number(segment, "offset")?,
            size,
            iv_tweak: number(segment, "iv_tweak")?,
            encryption: text(segment, "encryption")?.to_owned(),
            sector_size: to_usize(sector_size),
        };
        if [segment.offset, segment.size.unwrap_or(0)].iter().any(|bytes| !bytes.is_multiple_of(SECTOR)) {
            return Err(Error::invalid(format!("LUKS2 segment {name} does not consist of sectors")));
        }
        found = Some((name.to_owned(), segment));
    }
    found.ok_or_else(|| Error::invalid("LUKS2 metadata has no segment"))
}

/// The digest of a segment, and the slots whose key it knows.
fn the_digest<'a>(root: &'a Object, segment: &str) -> Result<(Digest, Vec<&'a str>)> {
    let names = |digest: &'a Object, key: &str| -> Vec<&'a str> {
        let list = digest.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).collect()
    };
    for (_, digest) in objects(root, "digests")? {
        if !names(digest, "segments").contains(&segment) {
            continue;
        }
        match text(digest, "type")? {
            "pbkdf2" => {}
            other => return Err(Error::unsupported(format!("LUKS2 digest of type '{other}' not supported"))),
        }
        let parsed = Digest {
            hash: hash(digest, "hash")?,
            iterations: small(digest, "iterations")?,
            salt: base64(digest, "salt")?,
            digest: base64(digest, "digest")?,
        };
        // Less than that could be found by chance.
        if parsed.digest.len() < 16 || parsed.digest.len() > 64 {
            return Err(Error::invalid("LUKS2 digest has an impossible length"));
        }
        return Ok((parsed, names(digest, "keyslots")));
    }
    Err(Error::invalid(format!("LUKS2 metadata has no digest for segment {segment}")))
}

fn keyslot(name: &str, slot: &Object, header_size: u64) -> Result<Keyslot> {
    let kind = text(slot, "type")?;
    if kind != "luks2" {
        return Err(Error::unsupported(format!("type '{kind}' not supported")));
    }
    let (af, area, kdf) = (object(slot, "af")?, object(slot, "area")?, object(slot, "kdf")?);
    if (text(af, "type")?, number(af, "stripes")?) != ("luks1", STRIPES.into()) {
        return Err(Error::unsupported("its way of splitting the key is not supported"));
    }
    if text(area, "type")? != "raw" {
        return Err(Error::unsupported("its kind of key material is not supported"));
    }
    let key = |object, name| match number(object, name)? {
        len @ 1..=LONGEST_KEY => Ok(to_usize(len)),
        len => Err(Error::unsupported(format!("keys of {len} bytes are not supported"))),
    };
    let found = Keyslot {
        number: name.parse().map_err(|_| Error::invalid("it has no number"))?,
        key_len: key(slot, "key_size")?,
        hash: hash(af, "hash")?,
        kdf: parse_kdf(kdf)?,
        offset: number(area, "offset")?,
        encryption: text(area, "encryption")?.to_owned(),
        area_key_len: key(area, "key_size")?,
        priority: if slot.contains_key("priority") { number(slot, "priority")? } else { 1 },
    };
    let len = number(area, "size")?;
    if (found.material_len() as u64) > len
        || found.offset < 2 * header_size
        || found.offset.checked_add(len).is_none()
    {
        let (at, needed) = (found.offset, found.material_len());
        let text = format!("its key material of {needed} bytes has no place at {at:#x} ({len} bytes)");
        return Err(Error::invalid(text));
    }
    Ok(found)
}

fn parse_kdf(kdf: &Object) -> Result<Kdf> {
    let salt = base64(kdf, "salt")?;
    match text(kdf, "type")? {
        "pbkdf2" => Ok(Kdf::Pbkdf2 { hash: hash(kdf, "hash")?, iterations: small(kdf, "iterations")?, salt }),
        kind @ ("argon2i" | "argon2id") => Ok(Kdf::Argon2 {
            id: kind == "argon2id",
            time: small(kdf, "time")?,
            memory: small(kdf, "memory")?,
            lanes: small(kdf, "cpus")?,
            salt,
        }),
        other => Err(Error::unsupported(format!("key derivation '{other}' not supported"))),
    }
}

fn lacks(name: &str) -> Error {
    Error::invalid(format!("LUKS2 metadata: '{name}' is missing or not what it should be"))
}

fn object<'a>(parent: &'a Object, name: &str) -> Result<&'a Object> {
    parent.get(name).and_then(Value::as_object).ok_or_else(|| lacks(name))
}

/// The objects of an object, with their names.
fn objects<'a>(parent: &'a Object, name: &str) -> Result<Vec<(&'a str, &'a Object)>> {
    let one = |(own, value): (&'a String, &'a Value)| Some((own.as_str(), value.as_object()?));
    object(parent, name)?.iter().map(one).collect::<Option<_>>().ok_or_else(|| lacks(name))
}

fn text<'a>(parent: &'a Object, name: &str) -> Result<&'a str> {
    parent.get(name).and_then(Value::as_str).ok_or_else(|| lacks(name))
}

/// A number, or one in quotes, as 64-bit integers are stored (section 3.1).
fn number(parent: &Object, name: &str) -> Result<u64> {
    let value = parent.get(name);
    let quoted = || value.and_then(Value::as_str)?.parse().ok();
    value.and_then(Value::as_u64).or_else(quoted).ok_or_else(|| lacks(name))
}

/// A number of 32 bits that is not 0.
fn small(parent: &Object, name: &str) -> Result<u32> {
    u32::try_from(number(parent, name)?).ok().filter(|number| *number != 0).ok_or_else(|| lacks(name))
}

fn hash(parent: &Object, name: &str) -> Result<Hash> {
    let word = text(parent, name)?;
    Hash::from_name(word).ok_or_else(|| Error::unsupported(format!("Hash algorithm '{word}' not supported")))
}

fn base64(parent: &Object, name: &str) -> Result<Vec<u8>> {
    Base64::decode_vec(text(parent, name)?).map_err(|_| lacks(name))
}
