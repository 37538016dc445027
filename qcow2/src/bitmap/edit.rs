//! What can be done to the bitmaps of an image: the steps of `qemu-img bitmap`, in its words.
//!
//! Every step changes the bitmaps in memory; they are stored together when the image is closed, so that a command of
//! several steps takes effect as a whole.

use std::sync::Arc;

use block::num::low_u32;
use block::{DirtyBitmap, Error as BlockError, Result};

use super::contents::{load, table_entries};
use super::record::{State, Tracked};
use super::{AUTO, Bitmap, GRANULARITY_BITS, MAX_DATA, MAX_NAME, MAX_TABLE_ENTRIES};
use crate::device::Qcow2;
use crate::extension::{MAX_BITMAP_DIRECTORY, MAX_BITMAPS};

/// Granularity that QEMU gives to bitmaps by default: the cluster size between these, as log2.
const DEFAULT_GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 12..=16;

fn not_found(name: &[u8]) -> BlockError {
    BlockError::usage(format!("Dirty bitmap '{}' not found", String::from_utf8_lossy(name)))
}

fn inconsistent(bitmap: &Bitmap) -> BlockError {
    BlockError::usage(format!("Bitmap '{}' is inconsistent and cannot be used", bitmap.display_name()))
        .hint("Try block-dirty-bitmap-remove to delete this bitmap from disk")
}

/// The bitmap of this name, whether it can be used or not.
fn find<'a>(state: &'a mut State, name: &[u8]) -> Result<&'a mut Tracked> {
    state.bitmaps.iter_mut().find(|bitmap| bitmap.entry.name == name).ok_or_else(|| not_found(name))
}

/// The bitmap of this name, if it can be used.
fn usable<'a>(state: &'a mut State, name: &[u8]) -> Result<&'a mut Tracked> {
    let bitmap = find(state, name)?;
    if bitmap.entry.in_use() { Err(inconsistent(&bitmap.entry)) } else { Ok(bitmap) }
}

/// The log2 of a granularity in bytes.
fn granularity_bits(granularity: u64) -> Result<u8> {
    let bits = granularity.checked_ilog2().and_then(|bits| u8::try_from(bits).ok());
    bits.filter(|bits| granularity.is_power_of_two() && GRANULARITY_BITS.contains(bits))
        .ok_or_else(|| BlockError::usage("Granularity must be power of 2 and at least 512"))
}

/// Whether a bitmap can have this name and granularity (in bytes), whatever the image is.
///
/// # Errors
/// It cannot.
pub fn check_new(name: &[u8], granularity: Option<u64>) -> Result<()> {
    if name.is_empty() {
        return Err(BlockError::usage("Bitmap name cannot be empty"));
    }
    granularity.map_or(Ok(()), |granularity| granularity_bits(granularity).map(drop))
}

impl Qcow2 {
    /// Adds a bitmap that records (`enabled`) or not, with no bit set. `granularity` is in bytes.
    ///
    /// # Errors
    /// The name or the granularity cannot be, there is such a bitmap, the image cannot store it; read-only.
    pub fn add_bitmap(&self, name: &[u8], granularity: Option<u64>, enabled: bool) -> Result<()> {
        check_new(name, granularity)?;
        let bits = match granularity {
            Some(granularity) => granularity_bits(granularity)?,
            None => self.default_granularity_bits(),
        };
        self.change_bitmaps(|state| {
            let size = self.size_now().max(state.resizing.unwrap_or(0));
            if state.bitmaps.iter().any(|bitmap| bitmap.entry.name == name) {
                let name = String::from_utf8_lossy(name);
                return Err(BlockError::usage(format!("Bitmap already exists: {name}")));
            }
            let table_size = self.check_room(state, name, bits, size).map_err(|error| {
                let name = String::from_utf8_lossy(name);
                error.context(format!("Can't make bitmap '{name}' persistent in '{}'", self.storage.name()))
            })?;
            let entry = Bitmap {
                table_offset: 0,
                table_size,
                flags: if enabled { AUTO } else { 0 },
                granularity_bits: bits,
                name: name.to_vec(),
            };
            let bits = Some(Arc::new(DirtyBitmap::new(size, bits)));
            state.bitmaps.push(Tracked { entry, bits });
            state.edited = true;
            Ok(())
        })
    }

    /// log2 of the granularity of bitmaps for which none is wanted.
    pub fn default_granularity_bits(&self) -> u8 {
        let (least, most) = (*DEFAULT_GRANULARITY_BITS.start(), *DEFAULT_GRANULARITY_BITS.end());
        u8::try_from(self.geometry.cluster_bits.clamp(least, most)).unwrap_or(16)
    }

    /// Whether one more bitmap can be stored: entries of its table.
    fn check_room(&self, state: &State, name: &[u8], granularity_bits: u8, size: u64) -> Result<u32> {
        if self.version < 3 {
            return Err(BlockError::unsupported("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        if name.len() > usize::from(MAX_NAME) {
            let text = format!("Name length exceeds maximum ({MAX_NAME} characters)");
            return Err(BlockError::usage(text));
        }
        let entries = table_entries(&self.geometry, size, granularity_bits);
        if entries > u64::from(MAX_TABLE_ENTRIES) || self.geometry.offset_of(entries) > MAX_DATA {
            let text = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(BlockError::usage(text));
        }
        if entries == 0 {
            return Err(BlockError::unsupported("a disk of no bytes has nothing to track"));
        }
        if state.bitmaps.len() as u64 >= u64::from(MAX_BITMAPS) {
            let text = "Maximum number of persistent bitmaps is already reached";
            return Err(BlockError::unsupported(text));
        }
        let directory: u64 = state.bitmaps.iter().map(|bitmap| bitmap.entry.entry_bytes()).sum();
        if directory + name.len() as u64 + 32 > MAX_BITMAP_DIRECTORY {
            return Err(BlockError::unsupported("Not enough space in the bitmap directory"));
        }
        Ok(low_u32(entries))
    }

    /// Removes a bitmap.
    ///
    /// # Errors
    /// There is none of this name; read-only.
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bitmaps(|state| {
            find(state, name)?;
            state.bitmaps.retain(|bitmap| bitmap.entry.name != name);
            state.edited = true;
            Ok(())
        })
    }

    /// Removes all bitmaps, on disk too when this returns: first the header lets go of them, then their clusters.
    pub(crate) fn remove_all_bitmaps(&self) -> Result<()> {
        self.change_bitmaps(|state| {
            state.edited |= !state.bitmaps.is_empty();
            state.bitmaps.clear();
            Ok(())
        })?;
        self.store_bitmaps()
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// There is none of this name, it is inconsistent, or its bits cannot be read; read-only.
    pub fn clear_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bits(name, |bits| {
            bits.clear_all();
            Ok(())
        })
    }

    /// Lets a bitmap record writes, or stops it.
    ///
    /// # Errors
    /// There is none of this name, or it is inconsistent; read-only.
    pub fn enable_bitmap(&self, name: &[u8], enabled: bool) -> Result<()> {
        self.change_bitmaps(|state| {
            let bitmap = usable(state, name)?;
            if bitmap.entry.auto() != enabled {
                bitmap.entry.flags ^= AUTO;
                state.edited = true;
            }
            Ok(())
        })
    }

    /// Adds the bits of another bitmap, of this image or another, to those of a bitmap. Granularities may differ.
    ///
    /// # Errors
    /// There is none of this name, it is inconsistent or of another size, or its bits cannot be read; read-only.
    pub fn merge_bitmap(&self, name: &[u8], source: &DirtyBitmap) -> Result<()> {
        self.change_bits(name, |bits| {
            if bits.len() != source.len() {
                return Err(BlockError::usage(format!(
                    "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
                    bits.len(),
                    source.len()
                )));
            }
            bits.merge(source);
            Ok(())
        })
    }

    fn change_bits(&self, name: &[u8], change: impl FnOnce(&mut DirtyBitmap) -> Result<()>) -> Result<()> {
        self.change_bitmaps(|state| {
            let bitmap = usable(state, name)?;
            self.load_bits(bitmap)?;
            if let Some(bits) = &mut bitmap.bits {
                // Whoever looks at the bits keeps those that it has asked for.
                change(Arc::make_mut(bits))?;
            }
            state.edited = true;
            Ok(())
        })
    }

    /// Whether there is a bitmap of this name that can be used.
    ///
    /// # Errors
    /// There is none, or it is inconsistent.
    pub fn check_bitmap(&self, name: &[u8]) -> Result<()> {
        let bitmaps = self.bitmaps.read();
        let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == name).ok_or_else(|| not_found(name))?;
        if bitmap.in_use() { Err(inconsistent(bitmap)) } else { Ok(()) }
    }

    /// The bits of a bitmap. Of one that records they follow the writes to this image, until something else is done
    /// to it. What is dirty is found by [`DirtyBitmap::extents`].
    ///
    /// # Errors
    /// There is none of this name, it is inconsistent, or its bits cannot be read.
    pub fn dirty_bitmap(&self, name: &[u8]) -> Result<Arc<DirtyBitmap>> {
        self.check_bitmap(name)?;
        if self.writable {
            return self.change_bitmaps(|state| {
                let bitmap = usable(state, name)?;
                self.load_bits(bitmap)?;
                bitmap.bits.clone().ok_or_else(|| not_found(name))
            });
        }
        let state = self.recorder.read();
        let bitmap = state.bitmaps.iter().find(|bitmap| bitmap.entry.name == name);
        let entry = &bitmap.ok_or_else(|| not_found(name))?.entry;
        load(&*self.storage, &self.geometry, entry, self.size_now()).map(Arc::new)
    }

    /// Before the size of the disk changes: bitmaps must be usable, and until they have been stored with the new size
    /// they are marked as being in use. Bitmaps of a disk that grows are made larger, so that they miss no write.
    pub(crate) fn prepare_bitmaps_for(&self, size: u64) -> Result<()> {
        self.change_bitmaps(|state| {
            if let Some(bitmap) = state.bitmaps.iter().find(|bitmap| bitmap.entry.in_use()) {
                return Err(inconsistent(&bitmap.entry));
            }
            for bitmap in &state.bitmaps {
                self.check_table_for(bitmap, size)?;
            }
            if !state.bitmaps.is_empty() {
                self.mark_in_use(state, |_| true)?;
            }
            resize_all(state, size.max(self.size_now()));
            state.resizing = Some(size);
            Ok(())
        })
    }

    fn check_table_for(&self, bitmap: &Tracked, size: u64) -> Result<()> {
        let entries = table_entries(&self.geometry, size, bitmap.entry.granularity_bits);
        if (1..=u64::from(MAX_TABLE_ENTRIES)).contains(&entries)
            && self.geometry.offset_of(entries) <= MAX_DATA
        {
            return Ok(());
        }
        let name = bitmap.entry.display_name();
        Err(BlockError::unsupported(format!("bitmap '{name}' cannot be stored for a disk of {size} bytes")))
    }

    /// After the size of the disk has changed, or has not: bitmaps get the size that the disk has.
    pub(crate) fn fit_bitmaps(&self) -> Result<()> {
        self.change_bitmaps(|state| {
            state.resizing = None;
            resize_all(state, self.size_now());
            state.edited |= !state.bitmaps.is_empty();
            Ok(())
        })?;
        self.store_bitmaps()
    }
}

fn resize_all(state: &mut State, size: u64) {
    for bits in state.bitmaps.iter_mut().filter_map(|bitmap| bitmap.bits.as_mut()) {
        if bits.len() != size {
            Arc::make_mut(bits).resize(size);
        }
    }
}
