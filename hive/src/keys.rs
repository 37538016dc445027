//! Keys and values, read.

use block::Result;

use crate::Value;
use crate::cells::{Hive, NOWHERE, corrupt, le16, le32};
use crate::names;

/// Bytes of a key besides its name; of a value likewise.
pub(crate) const KEY: usize = 76;
pub(crate) const VALUE: usize = 20;
/// Bytes of a segment of data that are too long for one cell.
const SEGMENT: usize = 16_344;
/// A name of one byte per character, in a key.
const PACKED_KEY: u16 = 0x20;

/// A key of a [`Hive`], which it has to be used with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(crate) u32);

impl Hive {
    /// The key that paths begin at.
    pub fn root(&self) -> Key {
        Key(le32(&self.base, 36))
    }

    /// What a key's cell holds.
    pub(crate) fn key(&self, key: Key) -> Result<&[u8]> {
        let cell = self.cell(key.0)?;
        if cell.len() < KEY || !cell.starts_with(b"nk") {
            return Err(corrupt(format!("there is no key at {:#x}", key.0)));
        }
        Ok(cell)
    }

    /// A key's name.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn name(&self, key: Key) -> Result<String> {
        let cell = self.key(key)?;
        let name = cell.get(KEY..KEY + usize::from(le16(cell, 72)));
        let name = name.ok_or_else(|| corrupt(format!("the name of the key at {:#x} is cut off", key.0)))?;
        Ok(names::decode(name, le16(cell, 2) & PACKED_KEY != 0))
    }

    /// The keys in a key, in its order.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn subkeys(&self, key: Key) -> Result<Vec<Key>> {
        let cell = self.key(key)?;
        let (count, list) = (le32(cell, 20) as usize, le32(cell, 28));
        if count == 0 {
            return Ok(vec![]);
        }
        // No key takes less room than this.
        if count > self.bins.len() / KEY {
            return Err(corrupt(format!("a key of {count} keys")));
        }
        let mut keys = vec![];
        self.listed(list, true, count, &mut keys)?;
        if keys.len() != count {
            return Err(corrupt(format!("a key of {count} keys lists {}", keys.len())));
        }
        Ok(keys)
    }

    /// The keys of a list, which may be one of lists.
    fn listed(&self, list: u32, of_lists: bool, most: usize, keys: &mut Vec<Key>) -> Result<()> {
        let cell = self.cell(list)?;
        let count = usize::from(le16(cell, 2));
        let step = match cell.get(..2) {
            Some(b"lf" | b"lh") => 8,
            Some(b"li") => 4,
            Some(b"ri") if of_lists => {
                for index in 0..count {
                    self.listed(le32(cell, 4 + index * 4), false, most, keys)?;
                }
                return Ok(());
            }
            _ => return Err(corrupt(format!("there is no list of keys at {list:#x}"))),
        };
        if keys.len() + count > most || 4 + count * step > cell.len() {
            return Err(corrupt(format!("a list of {count} keys at {list:#x}")));
        }
        keys.extend((0..count).map(|index| Key(le32(cell, 4 + index * step))));
        Ok(())
    }

    /// The cells of a key's list of keys.
    pub(crate) fn list_cells(&self, list: u32) -> Vec<u32> {
        let Ok(cell) = self.cell(list) else { return vec![] };
        let mut cells = vec![list];
        if cell.starts_with(b"ri") {
            let count = usize::from(le16(cell, 2));
            cells.extend(
                (0..count).map(|index| le32(cell, 4 + index * 4)).filter(|at| self.cell(*at).is_ok()),
            );
        }
        cells
    }

    /// The key of a name in a key.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn subkey(&self, key: Key, name: &str) -> Result<Option<Key>> {
        let wanted = names::folded(name);
        for key in self.subkeys(key)? {
            if names::folded(&self.name(key)?) == wanted {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// The key of a path from the root: names with backslashes between them.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn find(&self, path: &str) -> Result<Option<Key>> {
        let mut key = self.root();
        self.key(key)?;
        for name in path.split('\\').filter(|name| !name.is_empty()) {
            match self.subkey(key, name)? {
                Some(next) => key = next,
                None => return Ok(None),
            }
        }
        Ok(Some(key))
    }

    /// The cells of a key's values.
    pub(crate) fn value_cells(&self, key: Key) -> Result<Vec<u32>> {
        let cell = self.key(key)?;
        let (count, list) = (le32(cell, 36) as usize, le32(cell, 40));
        if count == 0 {
            return Ok(vec![]);
        }
        let list = self.cell(list)?;
        if count > list.len() / 4 {
            return Err(corrupt(format!("a key of {count} values whose list has {} bytes", list.len())));
        }
        Ok((0..count).map(|index| le32(list, index * 4)).collect())
    }

    /// What a value's cell holds.
    pub(crate) fn value_cell(&self, at: u32) -> Result<&[u8]> {
        let cell = self.cell(at)?;
        if cell.len() < VALUE || !cell.starts_with(b"vk") {
            return Err(corrupt(format!("there is no value at {at:#x}")));
        }
        Ok(cell)
    }

    pub(crate) fn value_name(&self, at: u32) -> Result<String> {
        let cell = self.value_cell(at)?;
        let name = cell.get(VALUE..VALUE + usize::from(le16(cell, 2)));
        let name = name.ok_or_else(|| corrupt(format!("the name of the value at {at:#x} is cut off")))?;
        Ok(names::decode(name, le16(cell, 16) & 1 != 0))
    }

    pub(crate) fn value_at(&self, at: u32) -> Result<Value> {
        let cell = self.value_cell(at)?;
        let (size, place, kind) = (le32(cell, 4), le32(cell, 8), le32(cell, 12));
        let len = (size & 0x7fff_ffff) as usize;
        let cut = || corrupt(format!("the data of the value at {at:#x} are cut off"));
        if size & 0x8000_0000 != 0 {
            let data = place.to_le_bytes().get(..len).ok_or_else(cut)?.to_vec();
            return Ok(Value { kind, data });
        }
        if len == 0 || place == NOWHERE {
            return Ok(Value { kind, data: vec![] });
        }
        let data = self.cell(place)?;
        if len > SEGMENT && self.minor() > 3 && data.starts_with(b"db") {
            return Ok(Value { kind, data: self.segments(data, len).ok_or_else(cut)? });
        }
        Ok(Value { kind, data: data.get(..len).ok_or_else(cut)?.to_vec() })
    }

    /// Data that are too long for a cell.
    fn segments(&self, head: &[u8], len: usize) -> Option<Vec<u8>> {
        if len > self.bins.len() {
            return None;
        }
        let (count, list) = (usize::from(le16(head, 2)), self.cell(le32(head, 4)).ok()?);
        let mut data = vec![];
        for index in 0..count.min(list.len() / 4) {
            let segment = self.cell(le32(list, index * 4)).ok()?;
            let want = (len - data.len()).min(SEGMENT);
            data.extend_from_slice(segment.get(..want)?);
        }
        (data.len() == len).then_some(data)
    }

    /// The cells of a value's data.
    pub(crate) fn data_cells(&self, at: u32) -> Vec<u32> {
        let Ok(cell) = self.value_cell(at) else { return vec![] };
        let (size, place) = (le32(cell, 4), le32(cell, 8));
        if size & 0x8000_0000 != 0 || size == 0 || place == NOWHERE {
            return vec![];
        }
        let mut cells = vec![place];
        if let Ok(head) = self.cell(place)
            && size as usize > SEGMENT
            && self.minor() > 3
            && head.starts_with(b"db")
        {
            let (count, list) = (usize::from(le16(head, 2)), le32(head, 4));
            let segments = self.cell(list).unwrap_or_default();
            cells.push(list);
            cells.extend((0..count.min(segments.len() / 4)).map(|index| le32(segments, index * 4)));
        }
        cells
    }

    /// The values of a key by their names, in its order; that without a name is its default.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn values(&self, key: Key) -> Result<Vec<(String, Value)>> {
        let cells = self.value_cells(key)?.into_iter();
        cells.map(|at| Ok((self.value_name(at)?, self.value_at(at)?))).collect()
    }

    /// A value of a key.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn value(&self, key: Key, name: &str) -> Result<Option<Value>> {
        self.value_of(key, name)?.map(|at| self.value_at(at)).transpose()
    }

    pub(crate) fn value_of(&self, key: Key, name: &str) -> Result<Option<u32>> {
        let wanted = names::folded(name);
        for at in self.value_cells(key)? {
            if names::folded(&self.value_name(at)?) == wanted {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }
}
