//! The header: read from a stranger's bytes, checked in full, described, and written.

use block::codec::{Reader, Writer};
use block::image::Value;
use block::{Error, Result, Storage};

use crate::cipher::{Algorithm, CipherSpec, IvGenerator, Mode};
use crate::hash::Hash;

/// What a LUKS container of version 1 begins with: the magic, and the version.
pub const MAGIC: &[u8] = b"LUKS\xba\xbe\0\x01";
/// Bytes of the header without the key material.
pub const HEADER_LEN: usize = 592;
/// Key slots of a header.
pub const SLOTS: usize = 8;
/// Pieces that a key is split into.
pub const STRIPES: u32 = 4000;

const VERSION: u16 = 1;
const SECTOR: u64 = 512;
/// Nothing else may lie in the first sectors (qemu's rule; the specification's own header takes two).
const HEADER_SECTORS: u32 = 8;
/// The alignment of key material and payload in what we write, as qemu and cryptsetup do.
const ALIGNMENT: u64 = 4096;
/// Marks a slot that is in use.
const ACTIVE: u32 = 0x00ac_71f3;
/// Marks a slot that is not.
const INACTIVE: u32 = 0x0000_dead;

/// Where the slots begin, and what one takes.
pub(super) const SLOTS_OFFSET: u64 = 208;
pub(super) const SLOT_LEN: u64 = 48;

/// One of the eight places for a passphrase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Whether it holds the volume key.
    pub active: bool,
    /// Rounds of PBKDF2; not 0 if active.
    pub iterations: u32,
    /// The salt of PBKDF2.
    pub salt: [u8; 32],
    /// Where its key material begins, in bytes from the header.
    pub material_offset: u64,
}

/// A header whose fields have been checked against each other: slots do not overlap, and lie between header and
/// payload. Whether its ciphers and hashes are known is another matter, see [`spec`](Self::spec).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The cipher's name, without the length of the key.
    pub cipher_name: String,
    /// Mode, IV generator and its hash: `xts-plain64`, `cbc-essiv:sha256`.
    pub cipher_mode: String,
    /// The hash of PBKDF2 and of the splitter.
    pub hash_spec: String,
    /// Where the encrypted sectors begin, in bytes from the header; 0 if they are in another file.
    pub payload_offset: u64,
    /// Bytes of the volume key.
    pub key_len: u32,
    /// PBKDF2 of the volume key.
    pub digest: [u8; 20],
    /// The salt of that.
    pub digest_salt: [u8; 32],
    /// The rounds of that.
    pub digest_iterations: u32,
    /// The name of the volume.
    pub uuid: String,
    /// The slots.
    pub slots: [Slot; SLOTS],
}

/// Bytes from the header to the payload for volume keys of that kind: header and all key material.
pub fn area_len(spec: &CipherSpec) -> u64 {
    ALIGNMENT + SLOTS as u64 * slot_stride(spec.key_len() as u64)
}

/// Bytes of the key material of a slot, whole sectors.
pub(super) fn material_len(key_len: u64) -> u64 {
    (key_len * u64::from(STRIPES)).next_multiple_of(SECTOR)
}

/// Bytes from slot to slot in what we write.
fn slot_stride(key_len: u64) -> u64 {
    material_len(key_len).next_multiple_of(ALIGNMENT)
}

/// Where the key material of a slot lies in what we write.
pub(super) fn slot_offset(slot: usize, key_len: u64) -> u64 {
    ALIGNMENT + slot as u64 * slot_stride(key_len)
}

impl Header {
    /// Reads the header that begins at `base`.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or the host failed.
    pub fn read(storage: &dyn Storage, base: u64) -> Result<Self> {
        let mut bytes = [0; HEADER_LEN];
        storage.read_at(&mut bytes, base)?;
        Self::parse(&bytes, false)
    }

    /// Understands and checks a header; `bytes` past the end of the file are zeros. With `detached` the payload
    /// lies elsewhere and may begin at 0.
    ///
    /// # Errors
    /// What is wrong with it, in qemu's words and in the order in which qemu looks.
    pub fn parse(bytes: &[u8], detached: bool) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let header = Fields::read(&mut reader).ok_or_else(|| Error::invalid("LUKS header is cut off"))??;
        header.check(detached)
    }

    /// The header as it is stored: [`HEADER_LEN`] bytes.
    ///
    /// # Errors
    /// A name or an offset does not fit, which those of a header that was parsed do.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.bytes(MAGIC);
        put_text(&mut writer, &self.cipher_name, 32)?;
        put_text(&mut writer, &self.cipher_mode, 32)?;
        put_text(&mut writer, &self.hash_spec, 32)?;
        writer.be_u32(sectors(self.payload_offset)?).be_u32(self.key_len);
        writer.bytes(&self.digest).bytes(&self.digest_salt).be_u32(self.digest_iterations);
        put_text(&mut writer, &self.uuid, 40)?;
        for slot in &self.slots {
            slot.encode(&mut writer)?;
        }
        Ok(writer.into_bytes())
    }

    /// The ciphers that the names stand for, and the hash of the key derivation.
    ///
    /// # Errors
    /// We (or anybody) do not have them, in qemu's words.
    pub fn spec(&self) -> Result<(CipherSpec, Hash)> {
        let spec = cipher_spec(&self.cipher_name, &self.cipher_mode, self.key_len as usize)?;
        let hash = Hash::from_name(&self.hash_spec);
        Ok((spec, hash.ok_or_else(|| unsupported("Hash algorithm", &self.hash_spec))?))
    }

    /// Bytes of the key material of each slot.
    pub fn material_len(&self) -> u64 {
        material_len(self.key_len.into())
    }

    /// How many slots hold the key.
    pub fn active_slots(&self) -> usize {
        self.slots.iter().filter(|slot| slot.active).count()
    }

    /// What `info` shows, in the order of qemu-img's documents. `in_qcow2` adds the key that names the format.
    pub fn info(&self, in_qcow2: bool) -> Vec<(&'static str, Value)> {
        let text = |text: &str| Value::Text(text.to_owned());
        let int = |value: u64| Value::Int(i64::try_from(value).unwrap_or(i64::MAX));
        let (mode, iv) = self.cipher_mode.split_once('-').unwrap_or((self.cipher_mode.as_str(), ""));
        let (iv, iv_hash) = split_iv(iv);
        let key_bits = u64::from(self.key_len) * 8 / if mode == "xts" { 2 } else { 1 };
        let mut info = vec![
            ("ivgen-alg", text(iv)),
            ("detached-header", Value::Bool(false)),
            ("hash-alg", text(&self.hash_spec)),
            ("cipher-alg", Value::Text(format!("{}-{key_bits}", self.cipher_name))),
            ("uuid", text(&self.uuid)),
        ];
        // qemu remembers the hash only where it is used.
        info.extend(iv_hash.filter(|_| iv == "essiv").map(|hash| ("ivgen-hash-alg", text(hash))));
        info.extend(in_qcow2.then(|| ("format", text("luks"))));
        info.extend([
            ("cipher-mode", text(mode)),
            ("slots", Value::List(self.slots.iter().map(Slot::info).collect())),
            ("payload-offset", int(self.payload_offset)),
            ("master-key-iters", int(self.digest_iterations.into())),
        ]);
        info
    }
}

impl Slot {
    fn info(&self) -> Value {
        let mut info = vec![("active", Value::Bool(self.active))];
        if self.active {
            info.push(("iters", Value::Int(self.iterations.into())));
        }
        info.push(("key-offset", Value::Int(i64::try_from(self.material_offset).unwrap_or(i64::MAX))));
        if self.active {
            info.push(("stripes", Value::Int(STRIPES.into())));
        }
        Value::Map(info)
    }

    pub(super) fn encode(&self, writer: &mut Writer) -> Result<()> {
        writer.be_u32(if self.active { ACTIVE } else { INACTIVE }).be_u32(self.iterations);
        writer.bytes(&self.salt).be_u32(sectors(self.material_offset)?).be_u32(STRIPES);
        Ok(())
    }
}

fn unsupported(what: &str, name: &str) -> Error {
    Error::unsupported(format!("{what} '{name}' not supported"))
}

/// The cipher that `aes`, `xts-plain64` and a volume key of `key_len` bytes stand for.
///
/// # Errors
/// We (or anybody) do not have it, in qemu's words.
pub(crate) fn cipher_spec(name: &str, mode: &str, key_len: usize) -> Result<CipherSpec> {
    let (mode_name, iv) = mode
        .split_once('-')
        .ok_or_else(|| Error::invalid(format!("Unexpected cipher mode string format '{mode}'")))?;
    let mode = Mode::from_name(mode_name).ok_or_else(|| unsupported("Cipher mode", mode_name))?;
    let algorithm = algorithm(name, mode, key_len)?;
    let (iv, iv_hash) = split_iv(iv);
    let find_hash = |name| Hash::from_name(name).ok_or_else(|| unsupported("Hash algorithm", name));
    let iv_hash = iv_hash.map(find_hash).transpose()?;
    let iv = match (iv, iv_hash) {
        ("plain", _) => IvGenerator::Plain,
        ("plain64", _) => IvGenerator::Plain64,
        ("essiv", Some(hash)) => IvGenerator::Essiv(hash),
        ("essiv", None) => return Err(Error::invalid("Missing IV generator hash specification")),
        (other, _) => return Err(unsupported("IV generator", other)),
    };
    let spec = CipherSpec { algorithm, mode, iv };
    if let IvGenerator::Essiv(hash) = iv {
        spec.essiv_cipher(hash)?;
    }
    Ok(spec)
}

fn algorithm(name: &str, mode: Mode, key_len: usize) -> Result<Algorithm> {
    let each = match mode {
        // Both keys have the length; of an odd number qemu sees the smaller half.
        Mode::Xts => key_len / 2,
        Mode::Ecb | Mode::Cbc | Mode::Ctr => key_len,
    };
    let whole = mode != Mode::Xts || key_len.is_multiple_of(2);
    Algorithm::from_family(name, each).filter(|_| whole).ok_or_else(|| {
        let text = format!("Algorithm '{name}' with key size {each} bytes not supported");
        Error::unsupported(text)
    })
}

/// `plain64`, or `essiv:sha256` in its two parts.
fn split_iv(iv: &str) -> (&str, Option<&str>) {
    match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash)),
        None => (iv, None),
    }
}

fn sectors(bytes: u64) -> Result<u32> {
    u32::try_from(bytes / SECTOR)
        .map_err(|_| Error::unsupported(format!("offset {bytes:#x} does not fit in a LUKS header")))
}

fn put_text(writer: &mut Writer, text: &str, len: usize) -> Result<()> {
    if text.len() >= len {
        return Err(Error::unsupported(format!("'{text}' is too long for LUKS header")));
    }
    let end = writer.len() + len;
    writer.bytes(text.as_bytes());
    writer.bytes(&vec![0; end - writer.len()]);
    Ok(())
}

/// A text that ends with a zero byte; what is not UTF-8 is shown as such.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(bytes.get(..end)?).into_owned())
}

/// A header as it stands in the file, nothing compared yet.
struct Fields {
    cipher_name: String,
    cipher_mode: String,
    hash_spec: String,
    payload_sector: u32,
    key_len: u32,
    digest: [u8; 20],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    uuid: String,
    slots: [SlotFields; SLOTS],
}

struct SlotFields {
    state: u32,
    iterations: u32,
    salt: [u8; 32],
    sector: u32,
    stripes: u32,
}

impl Fields {
    /// `None`: cut off.
    fn read(reader: &mut Reader<'_>) -> Option<Result<Self>> {
        let (magic, version) = (reader.take(6)?, reader.be_u16()?);
        if !MAGIC.starts_with(magic) {
            return Some(Err(Error::invalid("Volume is not in LUKS format")));
        }
        if version != VERSION {
            return Some(Err(Error::unsupported(format!("LUKS version {version} is not supported"))));
        }
        let (cipher_name, cipher_mode, hash_spec) = (reader.take(32)?, reader.take(32)?, reader.take(32)?);
        let fields = Self {
            payload_sector: reader.be_u32()?,
            key_len: reader.be_u32()?,
            digest: reader.take(20)?.try_into().ok()?,
            digest_salt: reader.take(32)?.try_into().ok()?,
            digest_iterations: reader.be_u32()?,
            uuid: uuid(reader.take(40)?),
            slots: SlotFields::read_all(reader)?,
            // Only whether these end is still to be said.
            cipher_name: text(cipher_name).unwrap_or_default(),
            cipher_mode: text(cipher_mode).unwrap_or_default(),
            hash_spec: text(hash_spec).unwrap_or_default(),
        };
        let named = [("cipher name", cipher_name), ("cipher mode", cipher_mode), ("hash spec", hash_spec)];
        for (what, bytes) in named {
            if !bytes.contains(&0) {
                return Some(Err(Error::invalid(format!("LUKS header {what} is not NUL terminated"))));
            }
        }
        Some(Ok(fields))
    }

    fn check(self, detached: bool) -> Result<Header> {
        if !detached && self.payload_sector < HEADER_SECTORS {
            return Err(Error::invalid("LUKS payload is overlapping with the header"));
        }
        if self.digest_iterations == 0 {
            return Err(Error::invalid("LUKS key iteration count is zero"));
        }
        let payload = (self.payload_sector != 0).then_some(self.payload_sector);
        for index in 0..SLOTS {
            self.check_slot(index, payload)?;
        }
        Ok(Header {
            cipher_name: self.cipher_name,
            cipher_mode: self.cipher_mode,
            hash_spec: self.hash_spec,
            payload_offset: u64::from(self.payload_sector) * SECTOR,
            key_len: self.key_len,
            digest: self.digest,
            digest_salt: self.digest_salt,
            digest_iterations: self.digest_iterations,
            uuid: self.uuid,
            slots: self.slots.map(SlotFields::into_slot),
        })
    }

    /// Checks a slot for itself, against header and payload, and against the slots after it.
    fn check_slot(&self, index: usize, payload: Option<u32>) -> Result<()> {
        let slot = &self.slots[index];
        let invalid = |text: String| Err(Error::invalid(text));
        if slot.stripes != STRIPES {
            let stripes = slot.stripes.cast_signed();
            return invalid(format!("Keyslot {index} is corrupted (stripes {stripes} != {STRIPES})"));
        }
        if !matches!(slot.state, ACTIVE | INACTIVE) {
            return invalid(format!("Keyslot {index} state (active/disable) is corrupted"));
        }
        if slot.state == ACTIVE && slot.iterations == 0 {
            return invalid(format!("Keyslot {index} iteration count is zero"));
        }
        if slot.sector < HEADER_SECTORS {
            return invalid(format!("Keyslot {index} is overlapping with the LUKS header"));
        }
        let range = self.range(index);
        if payload.is_some_and(|payload| range.end > payload.into()) {
            return invalid(format!("Keyslot {index} is overlapping with the encrypted payload"));
        }
        let overlaps = |other: &usize| {
            let other = self.range(*other);
            range.start < other.end && other.start < range.end
        };
        match (index + 1..SLOTS).find(overlaps) {
            Some(other) => invalid(format!("Keyslots {index} and {other} are overlapping in the header")),
            None => Ok(()),
        }
    }

    /// The sectors of a slot, which are a multiple of [`HEADER_SECTORS`] whatever its key material takes.
    fn range(&self, index: usize) -> std::ops::Range<u64> {
        let start = u64::from(self.slots[index].sector);
        start..start + slot_stride(self.key_len.into()) / SECTOR
    }
}

/// A text that need not end.
fn uuid(bytes: &[u8]) -> String {
    text(bytes).unwrap_or_else(|| String::from_utf8_lossy(bytes).into_owned())
}

impl SlotFields {
    fn read_all(reader: &mut Reader<'_>) -> Option<[Self; SLOTS]> {
        let mut slots = vec![];
        for _ in 0..SLOTS {
            slots.push(Self {
                state: reader.be_u32()?,
                iterations: reader.be_u32()?,
                salt: reader.take(32)?.try_into().ok()?,
                sector: reader.be_u32()?,
                stripes: reader.be_u32()?,
            });
        }
        slots.try_into().ok()
    }

    fn into_slot(self) -> Slot {
        Slot {
            active: self.state == ACTIVE,
            iterations: self.iterations,
            salt: self.salt,
            material_offset: u64::from(self.sector) * SECTOR,
        }
    }
}

#[cfg(test)]
mod tests;
