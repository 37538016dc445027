//! Keys and values, made and set.

use block::{Error, Result};

use crate::Value;
use crate::cells::{Hive, NOWHERE, corrupt, le16, le32, put, put32};
use crate::keys::{KEY, Key, VALUE};
use crate::names;

/// The most keys of one list; more make a list of lists.
const MOST_IN_LIST: usize = 500;
/// The most bytes of data of one cell.
const MOST_DATA: usize = 16_344;
/// The most bytes of a name: 255 units of a key's, 16,383 of a value's.
const MOST_KEY_NAME: usize = 255;
const MOST_VALUE_NAME: usize = 16_383;
/// The most keys of a path.
const MOST_DEPTH: usize = 512;

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Hive {
    /// The key of a path from the root, made with all those above it that are missing. New keys have the protection of the
    /// one that they are in.
    ///
    /// # Errors
    /// `Corrupt`; `Usage` if a name is too long.
    pub fn create(&mut self, path: &str) -> Result<Key> {
        let names: Vec<_> = path.split('\\').filter(|name| !name.is_empty()).collect();
        if names.len() > MOST_DEPTH {
            return Err(Error::usage("a path of too many keys"));
        }
        let mut key = self.root();
        for name in names {
            key = match self.subkey(key, name)? {
                Some(next) => next,
                None => self.add_key(key, name)?,
            };
        }
        Ok(key)
    }

    fn add_key(&mut self, parent: Key, name: &str) -> Result<Key> {
        let (stored, packed) = names::encode(name);
        let units = name.encode_utf16().count();
        if units > MOST_KEY_NAME {
            return Err(Error::usage(format!("a key's name of {units} characters")));
        }
        let mut keys = self.subkeys(parent)?;
        let security = le32(self.key(parent)?, 44);
        let mut cell = vec![0; KEY];
        put(&mut cell, 0, b"nk");
        put(&mut cell, 2, &if packed { 0x20_u16 } else { 0 }.to_le_bytes());
        put32(&mut cell, 16, parent.0);
        for nothing in [28, 32, 40, 48] {
            put32(&mut cell, nothing, NOWHERE);
        }
        put32(&mut cell, 44, security);
        put(&mut cell, 72, &u16::try_from(stored.len()).unwrap_or(0).to_le_bytes());
        cell.extend_from_slice(&stored);
        let key = Key(self.allocate(&cell)?);
        if let Ok(descriptor) = self.cell_mut(security)
            && descriptor.starts_with(b"sk")
        {
            let users = le32(descriptor, 12);
            put32(descriptor, 12, users.saturating_add(1));
        }
        let folded = names::folded(name);
        let mut at = 0;
        for known in &keys {
            if names::folded(&self.name(*known)?) > folded {
                break;
            }
            at += 1;
        }
        keys.insert(at, key);
        let (old, longest) = {
            let cell = self.key(parent)?;
            (le32(cell, 28), le16(cell, 52))
        };
        let old = self.list_cells(old);
        let list = self.write_list(&keys)?;
        old.into_iter().for_each(|cell| self.release(cell));
        let cell = self.cell_mut(parent.0)?;
        put32(cell, 20, number(keys.len()));
        put32(cell, 28, list);
        let len = u16::try_from(units * 2).unwrap_or(u16::MAX);
        put(cell, 52, &longest.max(len).to_le_bytes());
        Ok(key)
    }

    fn write_list(&mut self, keys: &[Key]) -> Result<u32> {
        if keys.len() > MOST_IN_LIST {
            let lists =
                keys.chunks(MOST_IN_LIST).map(|some| self.write_list(some)).collect::<Result<Vec<_>>>()?;
            return self.allocate(&list(
                *b"ri",
                lists.len(),
                lists.into_iter().map(|at| at.to_le_bytes().to_vec()),
            ));
        }
        let hashed = self.minor() >= 5;
        let entries = keys.iter().map(|key| {
            let name = self.name(*key)?;
            let mut entry = key.0.to_le_bytes().to_vec();
            if hashed {
                entry.extend(names::hash(&name).to_le_bytes());
            } else {
                // The first four characters, where they are of one byte.
                let mut hint = [0; 4];
                if name.is_ascii() {
                    name.bytes().zip(&mut hint).for_each(|(byte, hint)| *hint = byte);
                }
                entry.extend(hint);
            }
            Ok(entry)
        });
        let entries = entries.collect::<Result<Vec<_>>>()?;
        self.allocate(&list(if hashed { *b"lh" } else { *b"lf" }, entries.len(), entries.into_iter()))
    }

    /// Gives a value of a key these data. Nothing is changed if it has them already.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported` if the data are longer than a cell takes (16,344 bytes); `Usage` if the name is too long.
    pub fn set(&mut self, key: Key, name: &str, value: &Value) -> Result<()> {
        if value.data.len() > MOST_DATA {
            return Err(Error::unsupported(format!("a registry value of {} bytes", value.data.len())));
        }
        match self.value_of(key, name)? {
            Some(at) if self.value_at(at)? == *value => Ok(()),
            Some(at) => {
                let old = self.data_cells(at);
                let (size, place) = self.write_data(&value.data)?;
                let cell = self.cell_mut(at)?;
                put32(cell, 4, size);
                put32(cell, 8, place);
                put32(cell, 12, value.kind);
                old.into_iter().for_each(|cell| self.release(cell));
                self.note_sizes(key, 0, value.data.len())
            }
            None => self.add_value(key, name, value),
        }
    }

    fn add_value(&mut self, key: Key, name: &str, value: &Value) -> Result<()> {
        let (stored, packed) = names::encode(name);
        let units = name.encode_utf16().count();
        if units > MOST_VALUE_NAME {
            return Err(Error::usage(format!("a value's name of {units} characters")));
        }
        let mut values = self.value_cells(key)?;
        let (size, place) = self.write_data(&value.data)?;
        let mut cell = vec![0; VALUE];
        put(&mut cell, 0, b"vk");
        put(&mut cell, 2, &u16::try_from(stored.len()).unwrap_or(0).to_le_bytes());
        put32(&mut cell, 4, size);
        put32(&mut cell, 8, place);
        put32(&mut cell, 12, value.kind);
        put(&mut cell, 16, &u16::from(packed).to_le_bytes());
        cell.extend_from_slice(&stored);
        values.push(self.allocate(&cell)?);
        let old = le32(self.key(key)?, 40);
        let bytes: Vec<u8> = values.iter().flat_map(|at| at.to_le_bytes()).collect();
        let list = self.allocate(&bytes)?;
        if values.len() > 1 {
            self.release(old);
        }
        let cell = self.cell_mut(key.0)?;
        put32(cell, 36, number(values.len()));
        put32(cell, 40, list);
        self.note_sizes(key, units * 2, value.data.len())
    }

    /// The size and place of data as a value has them.
    fn write_data(&mut self, data: &[u8]) -> Result<(u32, u32)> {
        let len = number(data.len());
        if data.len() <= 4 {
            let mut own = [0; 4];
            own[..data.len()].copy_from_slice(data);
            return Ok((len | 0x8000_0000, u32::from_le_bytes(own)));
        }
        Ok((len, self.allocate(data)?))
    }

    /// A key knows how long the longest name and data of its values are.
    fn note_sizes(&mut self, key: Key, name: usize, data: usize) -> Result<()> {
        let cell = self.cell_mut(key.0)?;
        for (at, len) in [(60, name), (64, data)] {
            let longest = le32(cell, at).max(number(len));
            put32(cell, at, longest);
        }
        Ok(())
    }

    /// The key at the root of a new hive.
    pub(crate) fn make_root(&mut self) {
        // A descriptor relative to itself without owner, group and lists.
        let mut descriptor = vec![0; 20];
        put(&mut descriptor, 0, &[1, 0, 0, 0x80]);
        let mut cell = vec![0; 20];
        put(&mut cell, 0, b"sk");
        put32(&mut cell, 12, 1);
        put32(&mut cell, 16, number(descriptor.len()));
        cell.append(&mut descriptor);
        let mut root = vec![0; KEY];
        put(&mut root, 0, b"nk");
        // Its root, not to be deleted, a name of one byte per character.
        put(&mut root, 2, &0x2c_u16.to_le_bytes());
        for nothing in [16, 28, 32, 40, 48] {
            put32(&mut root, nothing, NOWHERE);
        }
        put(&mut root, 72, &4_u16.to_le_bytes());
        root.extend_from_slice(b"ROOT");
        if let Ok(security) = self.allocate(&cell) {
            if let Ok(descriptor) = self.cell_mut(security) {
                put32(descriptor, 4, security);
                put32(descriptor, 8, security);
            }
            put32(&mut root, 44, security);
        }
        if let Ok(key) = self.allocate(&root) {
            put32(&mut self.base, 36, key);
        }
        self.close();
    }

    /// Calls `visit` with every key and its path from the root.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn walk(&self, visit: &mut dyn FnMut(&str, Key)) -> Result<()> {
        let (mut todo, mut left) = (vec![(String::new(), self.root())], self.bins.len() / KEY);
        while let Some((path, key)) = todo.pop() {
            left = left.checked_sub(1).ok_or_else(|| corrupt("keys that are in each other"))?;
            visit(&path, key);
            for below in self.subkeys(key)? {
                let name = self.name(below)?;
                let whole = if path.is_empty() { name } else { format!("{path}\\{name}") };
                if whole.len() > 1 << 16 {
                    return Err(corrupt("keys that are in each other"));
                }
                todo.push((whole, below));
            }
        }
        Ok(())
    }
}

fn list(signature: [u8; 2], count: usize, entries: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    bytes.extend(u16::try_from(count).unwrap_or(0).to_le_bytes());
    bytes.extend(entries.flatten());
    bytes
}
