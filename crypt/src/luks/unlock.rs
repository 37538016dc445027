//! From a passphrase to the volume.

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use super::create::{key_digest, slot_key};
use super::effort::{Effort, Unlocker};
use super::header::Header;
use crate::af;
use crate::cipher::CipherSpec;
use crate::hash::Hash;

use crate::secret::Secret;
use crate::volume::Volume;

/// A volume whose key is known.
#[derive(Debug)]
pub struct Unlocked {
    /// Its header.
    pub header: Header,
    /// Its encryption.
    pub volume: Volume,
    /// The slot that the passphrase opened.
    pub slot: usize,
    pub(crate) key: Secret,
    pub(crate) effort: Effort,
}

/// Reads the header at `base` and tries the passphrase on every slot in use.
///
/// # Errors
/// The header is not one or needs what we do not have; no slot has that passphrase; trying it is more work than
/// [`Effort::DEFAULT`]; or the host failed.
pub fn unlock(storage: &dyn Storage, base: u64, passphrase: &[u8]) -> Result<Unlocked> {
    unlock_with(storage, base, passphrase, Effort::DEFAULT, &Unlocker::default())
}

/// The same with another limit of the work, and with what is known already.
///
/// # Errors
/// As [`unlock`]; `Denied` if it is more work than `effort`.
pub fn unlock_with(
    storage: &dyn Storage,
    base: u64,
    passphrase: &[u8],
    effort: Effort,
    unlocker: &Unlocker,
) -> Result<Unlocked> {
    let header = Header::read(storage, base)?;
    let (spec, _) = header.spec()?;
    if let Some(key) = unlocker.take(&header, passphrase) {
        return Ok(Unlocked { volume: Volume::new(spec, &key)?, header, slot: 0, key, effort });
    }
    let mut left = effort;
    let (slot, key) = find_key(storage, base, &header, passphrase, &mut left)?;
    Ok(Unlocked { volume: Volume::new(spec, &key)?, header, slot, key, effort })
}

/// The first slot that the passphrase opens, and the volume key in it.
///
/// # Errors
/// As [`unlock_with`].
pub(crate) fn find_key(
    storage: &dyn Storage,
    base: u64,
    header: &Header,
    passphrase: &[u8],
    left: &mut Effort,
) -> Result<(usize, Secret)> {
    let kinds = header.spec()?;
    for slot in 0..header.slots.len() {
        if let Some(key) = open_slot(storage, base, header, kinds, slot, passphrase, left)? {
            return Ok((slot, key));
        }
    }
    Err(Error::new(ErrorKind::Permission, "Invalid password, cannot unlock any keyslot"))
}

/// The volume key, if the slot is in use and has that passphrase.
pub(super) fn open_slot(
    storage: &dyn Storage,
    base: u64,
    header: &Header,
    (spec, hash): (CipherSpec, Hash),
    slot: usize,
    passphrase: &[u8],
    effort: &mut Effort,
) -> Result<Option<Secret>> {
    if !header.slots[slot].active {
        return Ok(None);
    }
    effort.spend(header, slot, hash)?;
    // The key's length has been found to be that of a cipher: the material is 256 KiB at most.
    let key_len = header.key_len as usize;
    let mut material = Secret::zeroed(to_usize(header.material_len()));
    storage.read_at(material.bytes_mut(), material_place(header, slot, base)?)?;
    let slot_key = slot_key(header, slot, hash, passphrase);
    Volume::new(spec, &slot_key)?.decrypt(0, material.bytes_mut());
    let split = &material[..key_len * super::STRIPES as usize];
    let key = af::merge(split, key_len, hash);
    Ok((key_digest(header, hash, &key) == header.digest).then_some(key))
}

/// Where a slot's key material lies in the container.
pub(super) fn material_place(header: &Header, slot: usize, base: u64) -> Result<u64> {
    base.checked_add(header.slots[slot].material_offset)
        .filter(|at| at.checked_add(header.material_len()).is_some())
        .ok_or_else(|| Error::invalid(format!("Keyslot {slot} lies beyond the end of any file")))
}
