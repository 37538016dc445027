//! From a passphrase to the volume key.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use block::{Error, ErrorKind, Result, Storage};
use zeroize::Zeroizing;

use super::json::{Kdf, Keyslot, Metadata};
use crate::af;
use crate::luks::{Effort, STRIPES, cipher_spec};
use crate::pbkdf2;
use crate::secret::Secret;
use crate::volume::Volume;

/// What filling a KiB of memory costs, in rounds of PBKDF2.
const ROUNDS_PER_KIB: u64 = 4;

impl Metadata {
    /// Tries a passphrase on all slots, and returns the number of the one that it opens, and the volume key.
    ///
    /// # Errors
    /// `Permission`: it opens none; `Denied`: trying it takes more work or memory than `effort` allows; `Unsupported`: what
    /// the slots need is not here; or the host failed.
    pub(crate) fn unlock(
        &self,
        storage: &dyn Storage,
        passphrase: &[u8],
        effort: &mut Effort,
    ) -> Result<(u32, Secret)> {
        let mut failure = None;
        for slot in &self.keyslots {
            match self.open_slot(storage, slot, passphrase, effort) {
                Ok(Some(key)) => return Ok((slot.number, key)),
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::Io => return Err(error),
                // Another slot may be cheaper, or be of a kind that is known.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| {
            let error = Error::new(ErrorKind::Permission, "Invalid password, cannot unlock any keyslot");
            self.refused.iter().fold(error, |error, refused| error.hint(refused.clone()))
        }))
    }

    fn open_slot(
        &self,
        storage: &dyn Storage,
        slot: &Keyslot,
        passphrase: &[u8],
        effort: &mut Effort,
    ) -> Result<Option<Secret>> {
        let number = slot.number;
        let (cipher, mode) = split(&slot.encryption)?;
        let spec = cipher_spec(cipher, mode, slot.area_key_len)?;
        let digest = u64::from(self.digest.iterations)
            .saturating_mul(self.digest.digest.len().div_ceil(self.digest.hash.digest_len()) as u64);
        effort.spend_rounds(digest, || {
            format!("the digest asks for {} rounds of PBKDF2", self.digest.iterations)
        })?;
        let slot_key = derive(&slot.kdf, number, passphrase, slot.area_key_len, effort)?;
        let mut material = Secret::zeroed(slot.material_len());
        storage.read_at(material.bytes_mut(), slot.offset)?;
        Volume::new(spec, &slot_key)?.decrypt(0, material.bytes_mut());
        let key = af::merge(&material[..slot.key_len * STRIPES as usize], slot.key_len, slot.hash);
        Ok(self.accepts(&key).then_some(key))
    }

    /// Whether it is the volume key.
    fn accepts(&self, key: &[u8]) -> bool {
        let known = &self.digest;
        let digest = pbkdf2::derive(known.hash, key, &known.salt, known.iterations, known.digest.len());
        *digest == *known.digest
    }

    /// The encryption of the segment with the volume key.
    ///
    /// # Errors
    /// `Unsupported`: the cipher is not here.
    pub(crate) fn volume(&self, key: &[u8]) -> Result<Volume> {
        let (cipher, mode) = split(&self.segment.encryption)?;
        Volume::new(cipher_spec(cipher, mode, key.len())?, key)?.with_sector_size(self.segment.sector_size)
    }
}

/// `aes-xts-plain64` as cipher and mode.
fn split(encryption: &str) -> Result<(&str, &str)> {
    encryption
        .split_once('-')
        .ok_or_else(|| Error::unsupported(format!("Cipher '{encryption}' not supported")))
}

/// The key of a slot.
pub(super) fn derive(
    kdf: &Kdf,
    slot: u32,
    passphrase: &[u8],
    len: usize,
    effort: &mut Effort,
) -> Result<Secret> {
    match kdf {
        Kdf::Pbkdf2 { hash, iterations, salt } => {
            let blocks = len.div_ceil(hash.digest_len()) as u64;
            effort.spend_rounds(blocks.saturating_mul((*iterations).into()), || {
                format!("keyslot {slot} asks for {iterations} rounds of PBKDF2")
            })?;
            Ok(pbkdf2::derive(*hash, passphrase, salt, *iterations, len))
        }
        Kdf::Argon2 { id, time, memory, lanes, salt } => {
            let most = effort.memory_kib();
            if u64::from(*memory) > most {
                let text = format!(
                    "keyslot {slot} asks for {memory} KiB of memory for Argon2, more than is given unasked ({most} KiB)"
                );
                return Err(Error::new(ErrorKind::Denied, text));
            }
            let work = u64::from(*memory).saturating_mul((*time).into()).saturating_mul(ROUNDS_PER_KIB);
            effort.spend_rounds(work, || {
                format!("keyslot {slot} asks for {time} passes over {memory} KiB of memory by Argon2")
            })?;
            let failed = |error: argon2::Error| Error::invalid(format!("keyslot {slot}: Argon2: {error}"));
            let params = Params::new(*memory, *time, *lanes, Some(len)).map_err(failed)?;
            let mut blocks = Zeroizing::new(vec![]);
            let count = params.block_count();
            blocks.try_reserve_exact(count).map_err(|_| {
                Error::new(
                    ErrorKind::NoSpace,
                    format!("keyslot {slot} needs {memory} KiB of memory for Argon2"),
                )
            })?;
            blocks.resize(count, Block::default());
            let algorithm = if *id { Algorithm::Argon2id } else { Algorithm::Argon2i };
            let argon = Argon2::new(algorithm, Version::V0x13, params);
            let mut key = Secret::zeroed(len);
            argon
                .hash_password_into_with_memory(passphrase, salt, key.bytes_mut(), &mut **blocks)
                .map_err(failed)?;
            Ok(key)
        }
    }
}
