//! The source of a convert: one disk, or several one after the other.

use std::sync::Arc;

use block::extent::{Extent, Walker};
use block::num::{len_of, to_usize};
use block::{BlockDevice, Error, Result, Storage, Stored};

/// Disks are counted in sectors of this many bytes: one that is not a multiple of it is padded with zeros.
pub(super) const SECTOR: u64 = 512;

/// One disk of the source.
#[derive(Debug)]
struct Part {
    device: Arc<dyn BlockDevice>,
    /// The first byte of the device that is used.
    first: u64,
    /// Where it starts in the whole.
    start: u64,
    /// Its size in bytes, without padding.
    len: u64,
}

impl Part {
    /// Where its bytes, without padding, end in the whole.
    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// What answers for an extent that none of the layers down to `depth` stores.
    fn absent<'a>(&self, found: &Extent, depth: u32) -> SourceExtent<'a> {
        let lowest = layer(&self.device, found.depth);
        let below = lowest.and_then(|device| device.backing());
        let covered = below.map_or(0, |below| below.size().saturating_sub(found.offset));
        match (covered, below) {
            (1.., _) if found.depth == depth => {
                SourceExtent::without_place(found.len.min(covered), Kind::Below, Stored::Absent)
            }
            (_, Some(_)) => SourceExtent::without_place(found.len, Kind::Zero, Stored::Zero),
            _ => SourceExtent::without_place(found.len, Kind::Zero, Stored::Absent),
        }
    }
}

/// A read-only view of the disks that are to be converted, each padded to whole sectors.
#[derive(Debug)]
pub struct Source {
    parts: Vec<Part>,
    size: u64,
}

/// How a range of the source is stored.
#[derive(Debug)]
pub struct SourceExtent<'a> {
    /// Length in bytes.
    pub len: u64,
    /// What is known of it.
    pub kind: Kind,
    /// How the layer that answers stores it. Past the end of a backing disk that is shorter than the one on top
    /// of it there are zeros, as if that one stored them.
    pub stored: Stored,
    /// Whether a place in a file belongs to it, used or not.
    pub has_place: bool,
    /// Where the bytes lie as they are.
    pub place: Option<Place<'a>>,
}

/// What is known of a range of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It has to be read.
    Data,
    /// It reads as zeros.
    Zero,
    /// None of the layers that were asked stores it: what lies below them answers.
    Below,
}

/// Bytes in a container.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The container.
    pub storage: &'a Arc<dyn Storage>,
    /// Where in it.
    pub offset: u64,
}

impl SourceExtent<'_> {
    fn without_place(len: u64, kind: Kind, stored: Stored) -> Self {
        Self { len, kind, stored, has_place: false, place: None }
    }
}

impl Source {
    /// The disks, one after the other.
    ///
    /// # Errors
    /// They are larger together than a disk can be.
    pub fn new(devices: impl IntoIterator<Item = Arc<dyn BlockDevice>>) -> Result<Self> {
        let mut source = Self { parts: vec![], size: 0 };
        for device in devices {
            source.push(device).ok_or_else(|| Error::usage("the sources are too large together"))?;
        }
        Ok(source)
    }

    /// `len` bytes of one disk from `offset` on. What lies past the disk's end reads as zeros.
    ///
    /// # Errors
    /// They are more than a disk can have.
    pub fn window(device: Arc<dyn BlockDevice>, offset: u64, len: u64) -> Result<Self> {
        let size = len.checked_next_multiple_of(SECTOR).filter(|size| i64::try_from(*size).is_ok());
        let size = size.ok_or_else(|| Error::usage("the window is too large"))?;
        let held = device.size().saturating_sub(offset).min(len);
        Ok(Self { parts: vec![Part { device, first: offset, start: 0, len: held }], size })
    }

    fn push(&mut self, device: Arc<dyn BlockDevice>) -> Option<()> {
        let (start, len) = (self.size, device.size());
        let end = start.checked_add(len)?.checked_next_multiple_of(SECTOR)?;
        self.size = (i64::try_from(end).is_ok()).then_some(end)?;
        self.parts.push(Part { device, first: 0, start, len });
        Some(())
    }

    /// The size of the whole in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that a source reads well in one go when something is wrong with it.
    pub fn preferred(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| u64::from(part.device.limits().preferred))
            .max()
            .unwrap_or(SECTOR)
            .max(SECTOR)
    }

    /// The part that holds `offset` (below the size), padding included.
    fn part_at(&self, offset: u64) -> Option<&Part> {
        let after = self.parts.partition_point(|part| part.start <= offset);
        // Empty disks start where the next one does: the last that starts at or before `offset` is meant.
        self.parts.get(after.checked_sub(1)?)
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the disks.
    pub fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let Some(part) = self.part_at(offset) else { break };
            let held = part.end().saturating_sub(offset);
            let take = if held > 0 { held } else { padding(offset) }.min(len_of(buf));
            let (head, rest) = buf.split_at_mut(to_usize(take));
            if held > 0 {
                part.device.read_at(head, part.first + (offset - part.start))?;
            } else {
                head.fill(0);
            }
            (buf, offset) = (rest, offset + take);
        }
        Ok(())
    }

    /// How the source stores what lies at `offset` (below the size), for at most `max_len` bytes. Looks at the
    /// first `depth` layers below the top of every part only (`u32::MAX`: at all). Whoever asks more than once
    /// uses [`look`](Self::look).
    ///
    /// # Errors
    /// Those of the disks.
    pub fn extent(&self, offset: u64, max_len: u64, depth: u32) -> Result<SourceExtent<'_>> {
        self.look(depth).extent(offset, max_len)
    }

    /// A look through the source from front to back, at the first `depth` layers below the top of every part
    /// (`u32::MAX`: at all).
    pub fn look(&self, depth: u32) -> Look<'_> {
        Look { source: self, depth, walker: None }
    }

    fn extent_with<'a>(&'a self, look: &mut Look<'a>, offset: u64, max_len: u64) -> Result<SourceExtent<'a>> {
        let zero = |len| SourceExtent::without_place(len, Kind::Zero, Stored::Zero);
        let Some(part) = self.part_at(offset) else { return Ok(zero(max_len)) };
        if offset >= part.end() {
            return Ok(zero(padding(offset).min(max_len)));
        }
        let (inside, max_len, depth) =
            (part.first + (offset - part.start), max_len.min(part.end() - offset), look.depth);
        let walker = match &mut look.walker {
            Some((start, walker)) if *start == part.start => walker,
            other => &mut other.insert((part.start, Walker::new(&*part.device, depth))).1,
        };
        let found = walker.extent(inside, max_len)?;
        if found.stored == Stored::Absent {
            return Ok(part.absent(&found, depth));
        }
        let kind = if found.zero { Kind::Zero } else { Kind::Data };
        let host_offset = found.host_offset.filter(|_| found.stored == Stored::Data);
        let storage = layer(&part.device, found.depth).and_then(|device| device.host_storage());
        let place = storage.zip(host_offset).map(|(storage, offset)| Place { storage, offset });
        Ok(SourceExtent {
            len: found.len,
            kind,
            stored: found.stored,
            has_place: found.host_offset.is_some(),
            place,
        })
    }

    /// The storages that hold bytes of the source as they are, every layer of every part.
    pub fn storages(&self) -> Vec<Arc<dyn Storage>> {
        let chain = |part: &'_ Part| {
            let mut found = vec![];
            let mut next = Some(&part.device);
            while let Some(device) = next {
                found.extend(device.host_storage().cloned());
                next = device.backing();
            }
            found
        };
        self.parts.iter().flat_map(chain).collect()
    }
}

/// A look through a source: see [`Source::look`].
#[derive(Debug)]
pub struct Look<'a> {
    source: &'a Source,
    depth: u32,
    /// The part that was looked at last, by its start, and where the look through it has arrived.
    walker: Option<(u64, Walker<'a>)>,
}

impl<'a> Look<'a> {
    /// As [`Source::extent`].
    ///
    /// # Errors
    /// Those of the disks.
    pub fn extent(&mut self, offset: u64, max_len: u64) -> Result<SourceExtent<'a>> {
        self.source.extent_with(self, offset, max_len)
    }
}

/// The layer `depth` hops below `device`.
fn layer(device: &Arc<dyn BlockDevice>, depth: u32) -> Option<&Arc<dyn BlockDevice>> {
    let mut found = device;
    for _ in 0..depth {
        found = found.backing()?;
    }
    Some(found)
}

/// Padding bytes from `offset`, which lies behind the end of a disk, to the next whole sector.
fn padding(offset: u64) -> u64 {
    SECTOR - offset % SECTOR
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::testing::{Fake, layered};

    #[test]
    fn disks_follow_each_other_padded_to_sectors() {
        let first = Fake::with(vec![1; 1000]);
        let second = Fake::with(vec![2; 512]);
        let empty = Fake::with(vec![]);
        let source = Source::new([first, empty, second].map(|f| f as Arc<dyn BlockDevice>)).unwrap();
        assert_eq!(source.size(), 1536);
        let mut all = vec![9; 1536];
        source.read_at(&mut all, 0).unwrap();
        assert_eq!(
            (&all[..1000], &all[1000..1024], &all[1024..]),
            (&[1; 1000][..], &[0; 24][..], &[2; 512][..])
        );
        let kinds: Vec<_> = [0, 1000, 1024]
            .map(|at| source.extent(at, 1536, u32::MAX).unwrap())
            .map(|e| (e.len, e.kind))
            .into();
        assert_eq!(kinds, [(1000, Kind::Data), (24, Kind::Zero), (512, Kind::Data)]);
    }

    #[test]
    fn a_window_shows_its_part_and_zeros_past_the_end() {
        let disk = Fake::with((0..=255).cycle().take(1000).collect());
        let source = Source::window(Arc::clone(&disk) as _, 500, 1100).unwrap();
        assert_eq!(source.size(), 1536);
        let mut all = vec![9; 1536];
        source.read_at(&mut all, 0).unwrap();
        assert_eq!((all[0], all[499], &all[500..]), (244, 231, &[0; 1036][..]));
        assert_eq!((source.extent(0, 1536, u32::MAX).unwrap().len), 500);
        let mut at = 500;
        while at < 1536 {
            let found = source.extent(at, 1536 - at, u32::MAX).unwrap();
            assert_eq!(found.kind, Kind::Zero);
            at += found.len;
        }
        let beyond = Source::window(disk, 5000, 512).unwrap();
        let mut all = vec![9; 512];
        beyond.read_at(&mut all, 0).unwrap();
        assert_eq!(all, [0; 512]);
    }

    #[test]
    fn the_walk_stops_above_a_given_layer() {
        // Bottom: 8 sectors of data; top: 16 sectors, storing only its second.
        let top = layered(&[None, Some(3)], 16, Some(Fake::with(vec![7; 8 * 512])));
        let source = Source::new([top as Arc<dyn BlockDevice>]).unwrap();
        let at = |sector: u64, depth| {
            let found = source.extent(sector * 512, 16 * 512, depth).unwrap();
            (found.len / 512, found.kind)
        };
        assert_eq!(at(0, 0), (1, Kind::Below));
        assert_eq!(at(1, 0), (1, Kind::Data));
        assert_eq!(at(2, 0), (6, Kind::Below));
        assert_eq!(at(8, 0), (8, Kind::Zero), "past the end of the lower disk there is nothing");
        assert_eq!(at(2, 1), (6, Kind::Data));
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let huge = || Arc::new(Fake::sized(1 << 62)) as Arc<dyn BlockDevice>;
        Source::new([huge(), huge()]).unwrap_err();
    }
}
