//! A new header, with its volume key in slot 0.

use block::{Error, Result};

use super::header::{Header, SLOTS, Slot, area_len, slot_offset};
use super::slots::seal;
use crate::cipher::{Algorithm, CipherSpec, IvGenerator, Mode};
use crate::hash::Hash;
use crate::pbkdf2;
use crate::random;
use crate::secret::Secret;
use crate::volume::Volume;

/// What a new LUKS volume is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Cipher, mode and IVs.
    pub spec: CipherSpec,
    /// The hash of the IV generator as it was asked for, be it of use or not.
    pub iv_hash: Option<Hash>,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// How long unlocking is to take on one core of this machine, in milliseconds.
    pub iter_time: u64,
}

impl CreateOptions {
    /// The time that PBKDF2 takes unless told otherwise, in milliseconds.
    pub const ITER_TIME: u64 = 2000;

    /// Options by the words of qemu-img: `given` gives the values of `cipher-alg`, `cipher-mode`, `ivgen-alg`,
    /// `ivgen-hash-alg`, `hash-alg` and `iter-time`.
    ///
    /// # Errors
    /// A value that the option does not accept, or a combination that there is not, in qemu's words.
    pub fn from_words<'a>(given: impl Fn(&str) -> Option<&'a str>) -> Result<Self> {
        let algorithm = word(&given, "cipher-alg", algorithm)?.unwrap_or(CipherSpec::DEFAULT.algorithm);
        let mode = word(&given, "cipher-mode", |name| known(Mode::from_name(name)))?
            .unwrap_or(CipherSpec::DEFAULT.mode);
        let hash_named = |name: &str| known(Hash::from_name(name));
        let iv_name = word(&given, "ivgen-alg", |name| known(IV_NAMES.iter().find(|known| **known == name)))?;
        let iv_hash = word(&given, "ivgen-hash-alg", hash_named)?;
        let hash = word(&given, "hash-alg", hash_named)?.unwrap_or(Hash::Sha256);
        let iter_time = match given("iter-time") {
            None => Self::ITER_TIME,
            Some(text) => text.parse().map_err(|_| Error::usage("Parameter 'iter-time' expects a number"))?,
        };
        let (iv, iv_hash) = match iv_name.copied() {
            Some("plain") => (IvGenerator::Plain, iv_hash),
            Some("essiv") => {
                let hash = iv_hash.unwrap_or(Hash::Sha256);
                (IvGenerator::Essiv(hash), Some(hash))
            }
            _ => (IvGenerator::Plain64, iv_hash),
        };
        let spec = CipherSpec { algorithm, mode, iv };
        if let IvGenerator::Essiv(hash) = iv {
            spec.essiv_cipher(hash)?;
        }
        Ok(Self { spec, iv_hash, hash, iter_time })
    }

    /// The mode as it stands in a header.
    fn mode_text(&self) -> String {
        let hash = self.iv_hash.map(|hash| format!(":{hash}")).unwrap_or_default();
        format!("{}-{}{hash}", self.spec.mode.name(), self.spec.iv.name())
    }
}

impl Default for CreateOptions {
    fn default() -> Self {
        let iter_time = Self::ITER_TIME;
        Self { spec: CipherSpec::DEFAULT, iv_hash: None, hash: Hash::Sha256, iter_time }
    }
}

const IV_NAMES: [&str; 3] = ["plain", "plain64", "essiv"];

/// Ciphers of qemu that are not here.
const FOREIGN_CIPHERS: [&str; 4] = ["cast5-128", "des", "3des", "sm4"];

/// Why a word is not understood.
enum Unknown {
    /// Nobody knows it.
    Word,
    /// We do not have it.
    Here(Error),
}

fn known<T>(found: Option<T>) -> std::result::Result<T, Unknown> {
    found.ok_or(Unknown::Word)
}

fn algorithm(name: &str) -> std::result::Result<Algorithm, Unknown> {
    Algorithm::from_name(name).ok_or_else(|| match FOREIGN_CIPHERS.contains(&name) {
        true => Unknown::Here(Error::unsupported(format!("Algorithm '{name}' not supported"))),
        false => Unknown::Word,
    })
}

fn word<'a, T>(
    given: &impl Fn(&str) -> Option<&'a str>,
    name: &str,
    find: impl Fn(&'a str) -> std::result::Result<T, Unknown>,
) -> Result<Option<T>> {
    let Some(value) = given(name) else { return Ok(None) };
    find(value).map(Some).map_err(|unknown| match unknown {
        Unknown::Word => Error::usage(format!("Parameter '{name}' does not accept value '{value}'")),
        Unknown::Here(error) => error,
    })
}

/// A volume that is about to be written.
#[derive(Debug)]
pub struct Created {
    /// Its header.
    pub header: Header,
    /// The bytes from the header's first to the end of slot 0's key material. What follows up to the payload
    /// must read as zeros.
    pub prefix: Vec<u8>,
    /// Its encryption.
    pub volume: Volume,
    pub(super) key: Secret,
}

/// Makes a volume key, a header that keeps it for `passphrase` in slot 0, and the encryption with it. Writes
/// nothing; takes the time that the machine's speed is measured in, and the time that was asked for.
///
/// # Errors
/// The system has no randomness, or does not tell the time.
pub fn create(options: &CreateOptions, passphrase: &[u8]) -> Result<Created> {
    let CreateOptions { spec, hash, iter_time, .. } = *options;
    let key = random::key(spec.key_len())?;
    let volume = Volume::new(spec, &key)?;
    let speed = speed(hash, iter_time)?;
    let mut header = empty_header(options)?;
    header.digest_iterations = iterations(speed, iter_time / 8, 1)?;
    header.digest = key_digest(&header, hash, &key);
    let material =
        seal(&mut header, 0, (spec, hash), &key, passphrase, slot_iterations(spec, hash, iter_time, speed)?)?;
    let mut prefix = header.encode()?;
    prefix.resize(block::num::to_usize(header.slots[0].material_offset), 0);
    prefix.extend_from_slice(&material);
    Ok(Created { header, prefix, volume, key })
}

fn empty_header(options: &CreateOptions) -> Result<Header> {
    let spec = &options.spec;
    let slot = |index| Slot {
        active: false,
        iterations: 0,
        salt: [0; 32],
        material_offset: slot_offset(index, spec.key_len() as u64),
    };
    Ok(Header {
        cipher_name: spec.algorithm.family().to_owned(),
        cipher_mode: options.mode_text(),
        hash_spec: options.hash.name().to_owned(),
        payload_offset: area_len(spec),
        key_len: block::num::low_u32(spec.key_len() as u64),
        digest: [0; 20],
        digest_salt: random::array()?,
        digest_iterations: 1,
        uuid: random::uuid()?,
        slots: std::array::from_fn::<_, SLOTS, _>(slot),
    })
}

/// The digest by which the volume key is recognised.
pub(super) fn key_digest(header: &Header, hash: Hash, key: &[u8]) -> [u8; 20] {
    let derived = pbkdf2::derive(hash, key, &header.digest_salt, header.digest_iterations, 20);
    let mut digest = [0; 20];
    digest.copy_from_slice(&derived);
    digest
}

/// Rounds per second, which need not be known for no time at all.
pub(super) fn speed(hash: Hash, iter_time: u64) -> Result<u64> {
    if iter_time == 0 { Ok(0) } else { pbkdf2::rounds_per_second(hash) }
}

/// How many rounds a slot gets, so that unlocking takes `iter_time` milliseconds of one core that does `speed`
/// rounds in a second.
pub(super) fn slot_iterations(spec: CipherSpec, hash: Hash, iter_time: u64, speed: u64) -> Result<u32> {
    iterations(speed, iter_time, spec.key_len().div_ceil(hash.digest_len()) as u64)
}

/// Rounds for so many milliseconds and blocks.
fn iterations(speed: u64, milliseconds: u64, blocks: u64) -> Result<u32> {
    let rounds = u128::from(speed) * u128::from(milliseconds) / 1000 / u128::from(blocks);
    if rounds > u128::from(u32::MAX) {
        let text = format!("PBKDF iterations {rounds} larger than {}", u32::MAX);
        return Err(Error::usage(text).hint("ask for a shorter iter-time"));
    }
    Ok(pbkdf2::in_bounds(u64::try_from(rounds).unwrap_or(u64::MAX)))
}

/// A passphrase as a slot keeps it.
pub(super) fn slot_key(header: &Header, slot: usize, hash: Hash, passphrase: &[u8]) -> Secret {
    let Slot { salt, iterations, .. } = &header.slots[slot];
    pbkdf2::derive(hash, passphrase, salt, *iterations, header.key_len as usize)
}
