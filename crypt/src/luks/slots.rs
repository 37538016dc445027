//! Changing which passphrases open a volume, so that a crash in the middle locks nobody out.
//!
//! *Adding:* key material first, then the slot's salt and rounds, and only when these are on the disk the one
//! word that says the slot is in use. Until then the slot is free as before.
//!
//! *Erasing:* the key material first, with random bytes, and when that is on the disk the word, then the rest. A
//! crash between leaves a slot that claims to be in use and opens for nobody; erasing it again finishes the job.
//! (The other order could leave a free slot whose key material still opens the volume, and nobody would know.)
//!
//! *Replacing* (an active slot, by force): the new key is put into a free slot first and leaves it last. So there
//! is at any time a slot that opens, unless all eight are taken, in which case the other seven do.
//!
//! The word and the rest of a slot are written apart from each other because a slot may lie across two sectors,
//! and the disk keeps its promises for single sectors only.

use block::codec::Writer;
use block::num::to_usize;
use block::{Error, Result, Storage};

use super::create::{slot_iterations, slot_key, speed};
use super::effort::Effort;
use super::header::{Header, SLOT_LEN, SLOTS, SLOTS_OFFSET};
use super::unlock::{Unlocked, material_place, open_slot};
use crate::cipher::CipherSpec;
use crate::hash::Hash;
use crate::secret::Secret;
use crate::volume::Volume;
use crate::{af, random};

/// A change of the key slots, in the words of `amend`.
#[derive(Debug, Clone)]
pub enum Change {
    /// `state=active`: one more passphrase.
    Add {
        /// The passphrase.
        new: Secret,
        /// Where it goes; the first free slot unless told.
        slot: Option<i64>,
        /// As [`CreateOptions::iter_time`](super::CreateOptions::iter_time).
        iter_time: u64,
    },
    /// `state=inactive`: slots are emptied.
    Erase {
        /// Only slots with this passphrase.
        old: Option<Secret>,
        /// Only this slot.
        slot: Option<i64>,
    },
}

/// Carries out a change on the volume whose header begins at `base`. Durable on return. With `force`, slots in
/// use are replaced and the last key may go.
///
/// # Errors
/// The change is refused, in qemu's words, and nothing has changed; or the host failed, and the slots are as
/// before or as after, or one being erased or replaced opens for nobody any more.
pub fn change(
    storage: &dyn Storage,
    base: u64,
    unlocked: &mut Unlocked,
    change: &Change,
    force: bool,
) -> Result<()> {
    change_with(storage, base, &mut unlocked.header, (&unlocked.key, unlocked.effort), change, force)
}

/// [`change`] of a volume whose key is at hand, with the effort for trying other passphrases. The header is what is on the disk when this returns without error.
pub(crate) fn change_with(
    storage: &dyn Storage,
    base: u64,
    header: &mut Header,
    (key, effort): (&Secret, Effort),
    change: &Change,
    force: bool,
) -> Result<()> {
    let mut slots = Slots { storage, base, spec: header.spec()?, header, key, effort };
    match change {
        Change::Add { new, slot, iter_time } => slots.add(new, *slot, *iter_time, force),
        Change::Erase { old, slot } => slots.erase(old.as_ref(), *slot, force),
    }
}

/// Puts `key` into a slot in memory, and returns the key material to be written. The slot is active then.
pub(super) fn seal(
    header: &mut Header,
    slot: usize,
    (spec, hash): (CipherSpec, Hash),
    key: &[u8],
    passphrase: &[u8],
    iterations: u32,
) -> Result<Vec<u8>> {
    let sealed = &mut header.slots[slot];
    sealed.active = true;
    sealed.iterations = iterations;
    sealed.salt = random::array()?;
    let slot_key = slot_key(header, slot, hash, passphrase);
    let split = af::split(key, super::STRIPES as usize, hash)?;
    // Encrypted in place, so that no stripe stays behind in memory.
    let mut material = Vec::with_capacity(to_usize(header.material_len()));
    material.extend_from_slice(&split);
    material.resize(to_usize(header.material_len()), 0);
    Volume::new(spec, &slot_key)?.encrypt(0, &mut material);
    Ok(material)
}

struct Slots<'a> {
    storage: &'a dyn Storage,
    base: u64,
    spec: (CipherSpec, Hash),
    header: &'a mut Header,
    key: &'a Secret,
    /// What is left for trying passphrases.
    effort: Effort,
}

impl Slots<'_> {
    fn add(&mut self, new: &Secret, slot: Option<i64>, iter_time: u64, force: bool) -> Result<()> {
        let free = self.header.slots.iter().position(|slot| !slot.active);
        let target = match slot.map(number).transpose()? {
            Some(slot) if self.header.slots[slot].active && !force => {
                return Err(Error::usage(format!(
                    "Refusing to overwrite active keyslot {slot} - please erase it first"
                )));
            }
            Some(slot) => slot,
            None => free.ok_or_else(|| Error::usage("Can't add a keyslot - all keyslots are in use"))?,
        };
        let speed = speed(self.spec.1, iter_time)?;
        let iterations = slot_iterations(self.spec.0, self.spec.1, iter_time, speed)?;
        if !self.header.slots[target].active {
            return self.fill(target, new, iterations);
        }
        if let Some(free) = free {
            self.fill(free, new, iterations)?;
        }
        self.empty(target)?;
        self.fill(target, new, iterations)?;
        free.map_or(Ok(()), |free| self.empty(free))
    }

    fn erase(&mut self, old: Option<&Secret>, slot: Option<i64>, force: bool) -> Result<()> {
        let slots = match (slot.map(number).transpose()?, old) {
            (None, None) => return Err(nothing_given()),
            (Some(slot), old) => self.erasable(slot, old, force)?,
            (None, Some(old)) => self.with_passphrase(old, force)?,
        };
        slots.into_iter().try_for_each(|slot| self.empty(slot))
    }

    /// The slot, if it may be erased.
    fn erasable(&mut self, slot: usize, old: Option<&Secret>, force: bool) -> Result<Vec<usize>> {
        let active = self.header.slots[slot].active;
        if let Some(old) = old.filter(|_| active)
            && !self.opens(slot, old)?
        {
            return Err(Error::usage(format!(
                "Given keyslot {slot} doesn't contain the given old password for erase operation"
            )));
        }
        if !force && !active {
            // The space at the end is qemu's.
            return Err(Error::usage(format!("Given keyslot {slot} is already erased (inactive) ")));
        }
        if !force && self.header.active_slots() == 1 {
            return Err(Error::usage(format!(
                "Attempt to erase the only active keyslot {slot} which will erase all the data in the image \
                 irreversibly - refusing operation"
            )));
        }
        Ok(vec![slot])
    }

    /// The slots with a passphrase, if they may be erased.
    fn with_passphrase(&mut self, old: &Secret, force: bool) -> Result<Vec<usize>> {
        let mut found = vec![];
        for slot in 0..SLOTS {
            if self.opens(slot, old)? {
                found.push(slot);
            }
        }
        if found.is_empty() {
            return Err(Error::usage("No keyslots match given (old) password for erase operation"));
        }
        if !force && found.len() == self.header.active_slots() {
            return Err(Error::usage(
                "All the active keyslots match the (old) password that was given and erasing them will erase \
                 all the data in the image irreversibly - refusing operation",
            ));
        }
        Ok(found)
    }

    fn opens(&mut self, slot: usize, passphrase: &Secret) -> Result<bool> {
        let effort = &mut self.effort;
        let found = open_slot(self.storage, self.base, self.header, self.spec, slot, passphrase, effort)?;
        Ok(found.is_some())
    }

    /// Puts the volume key into a free slot.
    fn fill(&mut self, slot: usize, passphrase: &Secret, iterations: u32) -> Result<()> {
        let mut header = self.header.clone();
        let material = seal(&mut header, slot, self.spec, self.key, passphrase, iterations)?;
        self.storage.write_at(&material, material_place(&header, slot, self.base)?)?;
        header.slots[slot].active = false;
        self.write_slot(&header, slot)?;
        self.storage.sync()?;
        header.slots[slot].active = true;
        self.write_state(&header, slot)?;
        self.storage.sync()?;
        *self.header = header;
        Ok(())
    }

    /// Makes a slot useless and free.
    fn empty(&mut self, slot: usize) -> Result<()> {
        let mut header = self.header.clone();
        let mut noise = vec![0; to_usize(header.material_len())];
        random::fill(&mut noise)?;
        self.storage.write_at(&noise, material_place(&header, slot, self.base)?)?;
        self.storage.sync()?;
        header.slots[slot].active = false;
        self.write_state(&header, slot)?;
        self.storage.sync()?;
        header.slots[slot].iterations = 0;
        header.slots[slot].salt = [0; 32];
        self.write_slot(&header, slot)?;
        self.storage.sync()?;
        *self.header = header;
        Ok(())
    }

    /// Writes a slot, of which nothing on disk must depend on the word.
    fn write_slot(&self, header: &Header, slot: usize) -> Result<()> {
        let bytes = encoded(header, slot)?;
        self.storage.write_at(&bytes, self.place(slot)?)
    }

    /// Writes the word that says whether a slot is in use.
    fn write_state(&self, header: &Header, slot: usize) -> Result<()> {
        let bytes = encoded(header, slot)?;
        self.storage.write_at(&bytes[..4], self.place(slot)?)
    }

    fn place(&self, slot: usize) -> Result<u64> {
        let offset = SLOTS_OFFSET + slot as u64 * SLOT_LEN;
        self.base
            .checked_add(offset)
            .ok_or_else(|| Error::invalid("LUKS header lies beyond the end of any file"))
    }
}

fn encoded(header: &Header, slot: usize) -> Result<Vec<u8>> {
    let mut writer = Writer::new();
    header.slots[slot].encode(&mut writer)?;
    Ok(writer.into_bytes())
}

/// The slot of that number.
fn number(slot: i64) -> Result<usize> {
    usize::try_from(slot).ok().filter(|slot| *slot < SLOTS).ok_or_else(|| {
        let last = SLOTS - 1;
        // qemu prints what is left of a larger number in 32 bits.
        let shown = slot.cast_unsigned() & 0xffff_ffff;
        Error::usage(format!("Invalid keyslot {shown} specified, must be between 0 and {last}"))
    })
}

fn nothing_given() -> Error {
    Error::usage(
        "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be \
         given",
    )
}

#[cfg(test)]
mod tests;
