//! A disk of which some ranges are read from elsewhere: the moment of a snapshot in the place of what goes on being written.

use std::ops::Range;
use std::sync::Arc;

use block::device::check_range;
use block::num::to_usize;
use block::{BlockDevice, Error, LayerExtent, Limits, Result, Stored};

/// A range that is read from elsewhere.
#[derive(Debug, Clone)]
pub struct Patch {
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// Where they are read from.
    pub source: Arc<dyn BlockDevice>,
    /// Where they begin there.
    pub offset: u64,
}

/// The disk, which cannot be written.
#[derive(Debug)]
pub struct Patched {
    base: Arc<dyn BlockDevice>,
    /// In order, none over another.
    patches: Vec<Patch>,
}

impl Patched {
    /// `base` with patches, in any order.
    ///
    /// # Errors
    /// `Invalid`: two of them are for the same byte; `OutOfRange`: one lies outside the disk or its source.
    pub fn new(base: Arc<dyn BlockDevice>, mut patches: Vec<Patch>) -> Result<Self> {
        patches.retain(|patch| !patch.range.is_empty());
        patches.sort_by_key(|patch| patch.range.start);
        let size = base.size();
        for patch in &patches {
            let len = patch.range.end - patch.range.start;
            check_range(patch.range.start, len, size)?;
            check_range(patch.offset, len, patch.source.size())?;
        }
        if let Some(pair) = patches.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            let at = pair[1].range.start;
            return Err(Error::invalid(format!("two volumes have the byte {at:#x} of the disk")));
        }
        Ok(Self { base, patches })
    }

    /// Where a byte is read from, the offset there, and up to where that holds.
    fn place(&self, at: u64, end: u64) -> (&Arc<dyn BlockDevice>, u64, u64) {
        let index = self.patches.partition_point(|patch| patch.range.end <= at);
        match self.patches.get(index) {
            Some(patch) if patch.range.start <= at => {
                (&patch.source, patch.offset + (at - patch.range.start), end.min(patch.range.end))
            }
            Some(patch) => (&self.base, at, end.min(patch.range.start)),
            None => (&self.base, at, end),
        }
    }
}

impl BlockDevice for Patched {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        self.base.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (source, place, until) = self.place(at, end);
            source.read_at(&mut buf[to_usize(at - offset)..to_usize(until - offset)], place)?;
            at = until;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        Ok(LayerExtent::new(Stored::Data, max_len.min(self.size() - offset)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
        Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
    }

    fn patch(range: Range<u64>, source: &Arc<dyn BlockDevice>, offset: u64) -> Patch {
        Patch { range, source: Arc::clone(source), offset }
    }

    #[test]
    fn every_range_reads_like_its_model() {
        let (base, one) = (disk(vec![1; 1000]), disk((0..200).collect()));
        let mut model = vec![1; 1000];
        let patches = vec![patch(500..600, &one, 100), patch(10..20, &one, 0), patch(20..30, &one, 50)];
        for patch in &patches {
            for at in patch.range.clone() {
                model[to_usize(at)] = u8::try_from(patch.offset + at - patch.range.start).unwrap();
            }
        }
        let patched = Patched::new(base, patches).unwrap();
        for (start, end) in [(0, 1000), (0, 10), (15, 25), (29, 31), (599, 600), (600, 1000), (5, 5)] {
            let mut bytes = vec![0; end - start];
            patched.read_at(&mut bytes, start as u64).unwrap();
            assert_eq!(bytes, model[start..end], "{start}..{end}");
        }
        patched.read_at(&mut [0; 2], 999).unwrap_err();
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (base, one) = (disk(vec![1; 1000]), disk(vec![2; 100]));
        let new = |patches| Patched::new(Arc::clone(&base), patches);
        new(vec![patch(0..10, &one, 0), patch(9..20, &one, 0)]).unwrap_err();
        new(vec![patch(995..1001, &one, 0)]).unwrap_err();
        new(vec![patch(0..10, &one, 91)]).unwrap_err();
        new(vec![patch(0..10, &one, 0), patch(10..20, &one, 0)]).unwrap();
    }
}
