//! Writing one header over another so that a loss of power leaves the one or the other.
//!
//! Only a sector is written whole or not at all, but a header with names and extensions takes more than the first
//! one. Its fixed fields lie in the first sector and say where the rest is, so the rest is written while nobody
//! looks at it: before the first sector if the old header is all in there, after it if the new one is. If neither
//! is, the feature names (which nothing needs) make way for the time in between.

use block::codec::Reader;
use block::num::to_usize;
use block::{Result, Storage};

use super::Header;

/// What is written whole or not at all.
const SECTOR: usize = 512;

impl Header {
    /// Writes this header where `old` is. Durable when this returns; after a crash the one or the other is there,
    /// unless both take more than a sector for their names alone.
    ///
    /// # Errors
    /// It does not fit its cluster (nothing has been written), or the host failed.
    pub(crate) fn replace(&self, storage: &dyn Storage, old: &Self) -> Result<()> {
        let new = self.encode()?;
        let old_len = old.len_on_disk(storage)?;
        let short = Self { feature_names: vec![], ..self.clone() }.encode()?;
        if old_len > SECTOR && new.len() > SECTOR && short.len() <= SECTOR && differ(storage, &new)? {
            switch(storage, old_len, &short)?;
            return switch(storage, short.len(), &new);
        }
        switch(storage, old_len, &new)
    }

    /// Bytes of this header as it is on disk, where the backing file's name need not be where
    /// [`encode`](Self::encode) would put it.
    fn len_on_disk(&self, storage: &dyn Storage) -> Result<usize> {
        let cluster = to_usize(self.geometry().cluster_size());
        let mut fixed = [0; 20];
        storage.read_at(&mut fixed, 0)?;
        let mut reader = Reader::new(&fixed);
        reader.skip(8);
        let name = reader.be_u64().zip(reader.be_u32()).unwrap_or_default();
        let name_end = to_usize(name.0.saturating_add(name.1.into())).min(cluster);
        Ok(self.encode().map_or(cluster, |bytes| bytes.len()).max(name_end))
    }
}

/// Whether a header differs from the one on disk both in the first sector and behind it.
fn differ(storage: &dyn Storage, new: &[u8]) -> Result<bool> {
    let mut present = vec![0; new.len()];
    storage.read_at(&mut present, 0)?;
    Ok(present[..SECTOR] != new[..SECTOR] && present[SECTOR..] != new[SECTOR..])
}

/// Writes `new` over a header of `old_len` bytes.
fn switch(storage: &dyn Storage, old_len: usize, new: &[u8]) -> Result<()> {
    let mut bytes = new.to_vec();
    // What was there behind the new header's end must not be taken for a part of it.
    bytes.resize(new.len().max(old_len).next_multiple_of(SECTOR), 0);
    let (first, rest) = bytes.split_at(SECTOR);
    let mut present = vec![0; rest.len()];
    storage.read_at(&mut present, SECTOR as u64)?;
    let rest_first = old_len <= SECTOR;
    let write_rest = || match present == rest {
        true => Ok(()),
        false => storage.write_at(rest, SECTOR as u64).and_then(|()| storage.sync()),
    };
    if rest_first {
        write_rest()?;
    }
    storage.write_at(first, 0)?;
    storage.sync()?;
    if rest_first { Ok(()) } else { write_rest() }
}

/// Patches fields of the first sector in one write. Durable when this returns.
pub(crate) fn patch_first_sector(storage: &dyn Storage, fields: &[(u64, &[u8])]) -> Result<()> {
    let mut sector = [0; SECTOR];
    storage.read_at(&mut sector, 0)?;
    for (at, bytes) in fields {
        sector[to_usize(*at)..][..bytes.len()].copy_from_slice(bytes);
    }
    storage.write_at(&sector, 0)?;
    storage.sync()
}
