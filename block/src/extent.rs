//! How the layers of a backing chain combine: the one place that knows.
//!
//! A layer answers for what it stores. What is [`Stored::Absent`] there falls through to its backing
//! device; past the end of a shorter backing device, and at the bottom, it reads as zeros.

use crate::device::{BlockDevice, LayerExtent, Stored, check_range};
use crate::error::Result;
use crate::num::to_usize;

/// A range of a disk that one layer of its chain answers for in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub offset: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// How the answering layer stores it. `Absent`: no layer does, it reads as zeros.
    pub stored: Stored,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Hops from the top of the chain to the layer that answers. For `Absent`: the deepest layer that
    /// still covers the offset.
    pub depth: u32,
    /// Where it lies in the answering layer's host storage.
    pub host_offset: Option<u64>,
}

impl Extent {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether `next` continues this extent without a seam: the same in every way and, where there is
    /// a place, contiguous there.
    pub fn continued_by(&self, next: &Self) -> bool {
        self.end() == next.offset
            && self.stored == next.stored
            && self.zero == next.zero
            && self.depth == next.depth
            && match (self.host_offset, next.host_offset) {
                (Some(a), Some(b)) => a.checked_add(self.len) == Some(b),
                (None, None) => true,
                _ => false,
            }
    }
}

/// What the chain below (and including) `device` stores at `offset`, for at most `max_len` bytes. Looks at
/// most `max_depth` layers down from the first (`u32::MAX`: all of them); what lies deeper is `Absent`.
///
/// # Errors
/// As [`BlockDevice::layer_extent`].
pub fn extent_to_depth(
    device: &dyn BlockDevice,
    offset: u64,
    max_len: u64,
    max_depth: u32,
) -> Result<Extent> {
    let mut layer = device;
    let size = device.size();
    check_range(offset, 1, size)?;
    let mut len = max_len.min(size - offset);
    let mut depth = 0;
    loop {
        let found = layer.layer_extent(offset, len)?;
        len = found.len;
        if found.stored != Stored::Absent {
            return Ok(Extent {
                offset,
                len,
                stored: found.stored,
                zero: found.reads_zero,
                depth,
                host_offset: found.host_offset,
            });
        }
        let absent =
            |len| Extent { offset, len, stored: Stored::Absent, zero: true, depth, host_offset: None };
        if depth == max_depth {
            return Ok(absent(len));
        }
        match layer.backing() {
            Some(backing) if offset < backing.size() => {
                len = len.min(backing.size() - offset);
                layer = &**backing;
                depth += 1;
            }
            _ => return Ok(absent(len)),
        }
    }
}

/// What the chain of `device` stores at `offset` (below its size), for at most `max_len` bytes.
///
/// # Errors
/// As [`BlockDevice::layer_extent`]. The disk may have become smaller since somebody looked.
pub fn extent(device: &dyn BlockDevice, offset: u64, max_len: u64) -> Result<Extent> {
    extent_to_depth(device, offset, max_len, u32::MAX)
}

/// Looks through a chain from front to back, remembering what every layer has said, so that no table entry is
/// looked at twice however many layers there are and however finely their extents alternate.
///
/// Offsets may be asked in any order; it pays if they ascend. The walker keeps what it has seen: whoever changes
/// a layer needs a new one for what lies ahead of the change.
#[derive(Debug)]
pub struct Walker<'a> {
    layers: Vec<Seen<'a>>,
}

/// A layer, and the last thing it has said.
#[derive(Debug)]
struct Seen<'a> {
    device: &'a dyn BlockDevice,
    size: u64,
    from: u64,
    found: Option<LayerExtent>,
}

impl Seen<'_> {
    /// What the layer stores at `offset`, for at most `max_len` bytes.
    fn at(&mut self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        match &self.found {
            Some(found) if offset >= self.from && offset - self.from < found.len => {
                let skip = offset - self.from;
                let host_offset = found.host_offset.map(|host| host + skip);
                Ok(LayerExtent { len: (found.len - skip).min(max_len), host_offset, ..*found })
            }
            _ => {
                let found = self.device.layer_extent(offset, max_len)?;
                (self.from, self.found) = (offset, Some(found));
                Ok(found)
            }
        }
    }
}

impl<'a> Walker<'a> {
    /// Looks at `device` and at most `max_depth` layers below it (`u32::MAX`: all of them).
    pub fn new(device: &'a dyn BlockDevice, max_depth: u32) -> Self {
        let mut layers = vec![];
        let mut next = Some(device);
        while let Some(device) = next {
            layers.push(Seen { device, size: device.size(), from: 0, found: None });
            let more = u32::try_from(layers.len()).is_ok_and(|count| count <= max_depth);
            next = device.backing().filter(|_| more).map(|backing| &**backing);
        }
        Self { layers }
    }

    /// What the layers store at `offset` (below the size), for at most `max_len` bytes. What lies deeper than the
    /// walker looks is `Absent`.
    ///
    /// # Errors
    /// As [`BlockDevice::layer_extent`].
    pub fn extent(&mut self, offset: u64, max_len: u64) -> Result<Extent> {
        let (mut len, mut depth) = (max_len, 0);
        let absent =
            |len, depth| Extent { offset, len, stored: Stored::Absent, zero: true, depth, host_offset: None };
        for (index, layer) in (0..).zip(&mut self.layers) {
            if index > 0 && offset >= layer.size {
                break; // A shorter layer: zeros from here on.
            }
            check_range(offset, 1, layer.size)?;
            len = len.min(layer.size - offset);
            depth = index;
            let found = layer.at(offset, len)?;
            len = found.len;
            if found.stored != Stored::Absent {
                return Ok(Extent {
                    offset,
                    len,
                    stored: found.stored,
                    zero: found.reads_zero,
                    depth,
                    host_offset: found.host_offset,
                });
            }
        }
        Ok(absent(len, depth))
    }
}

/// The extents of a range of a device, in order, neighbours that continue each other merged.
#[derive(Debug)]
pub struct Extents<'a> {
    walker: Walker<'a>,
    offset: u64,
    end: u64,
    pending: Option<Extent>,
}

/// Iterates over the extents of `offset..offset + len`, cut off at the end of the disk.
pub fn extents(device: &dyn BlockDevice, offset: u64, len: u64) -> Extents<'_> {
    let end = offset.saturating_add(len).min(device.size());
    Extents { walker: Walker::new(device, u32::MAX), offset, end, pending: None }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.offset < self.end {
            let found = match self.walker.extent(self.offset, self.end - self.offset) {
                Ok(found) => found,
                Err(error) => {
                    self.offset = self.end;
                    return Some(Err(error));
                }
            };
            self.offset = found.end();
            match &mut self.pending {
                Some(pending) if pending.continued_by(&found) => pending.len += found.len,
                pending => {
                    if let Some(done) = pending.replace(found) {
                        return Some(Ok(done));
                    }
                }
            }
        }
        self.pending.take().map(Ok)
    }
}

/// Reads from `backing` (if there is one) at `offset`; what lies past its end reads as zeros.
///
/// # Errors
/// As [`BlockDevice::read_at`].
pub fn read_backing(backing: Option<&dyn BlockDevice>, buf: &mut [u8], offset: u64) -> Result<()> {
    let covered = backing.map_or(0, |device| device.size().saturating_sub(offset));
    let split = to_usize(covered.min(buf.len() as u64));
    let (head, tail) = buf.split_at_mut(split);
    tail.fill(0);
    match backing {
        Some(device) if !head.is_empty() => device.read_at(head, offset),
        _ => Ok(()),
    }
}

/// The extent of a device that stores everything it has (no holes known).
pub fn all_data(offset: u64, max_len: u64, size: u64) -> LayerExtent {
    LayerExtent::new(Stored::Data, max_len.min(size - offset))
}
