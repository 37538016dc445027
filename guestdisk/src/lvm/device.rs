//! A logical volume as a disk.

use std::ops::Range;
use std::sync::Arc;

use block::device::check_range;
use block::extent::extent;
use block::num::to_usize;
use block::{BlockDevice, LayerExtent, Result, ZeroMode};

use crate::unused::Place;

/// Extents of a physical volume, from this offset on.
#[derive(Debug, Clone)]
pub(super) struct Stripe {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) offset: u64,
}

/// Part of a logical volume: bytes go to the stripes in turn. One stripe is a linear segment.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) stripe_bytes: u64,
    pub(super) stripes: Arc<[Stripe]>,
}

impl Segment {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Where a byte of the volume lies, and how many follow it there.
    fn locate(&self, offset: u64) -> (&Stripe, u64, u64) {
        let (chunk, within) =
            ((offset - self.start) / self.stripe_bytes, (offset - self.start) % self.stripe_bytes);
        let count = self.stripes.len() as u64;
        let stripe = &self.stripes[to_usize(chunk % count)];
        (stripe, stripe.offset + chunk / count * self.stripe_bytes + within, self.stripe_bytes - within)
    }
}

/// The volume.
#[derive(Debug)]
pub(super) struct Mapped {
    /// In order, without gaps.
    segments: Vec<Segment>,
    size: u64,
}

impl Mapped {
    pub(super) fn new(segments: Vec<Segment>, size: u64) -> Self {
        Self { segments, size }
    }

    /// Calls `act` for each piece of a range that lies in one place: device, offset there, offset in the range, length.
    fn pieces(
        &self,
        offset: u64,
        len: u64,
        mut act: impl FnMut(&Stripe, u64, u64, u64) -> Result<()>,
    ) -> Result<()> {
        check_range(offset, len, self.size)?;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let index = self.segments.partition_point(|segment| segment.end() <= at);
            let (stripe, place, left) = self.segments[index].locate(at);
            let piece = left.min(len - done);
            act(stripe, place, done, piece)?;
            done += piece;
        }
        Ok(())
    }

    /// Where a range lies; nothing if it is not one of the volume's.
    pub(super) fn places(&self, range: Range<u64>) -> Vec<Place> {
        let mut places: Vec<Place> = vec![];
        let collected =
            self.pieces(range.start, range.end.saturating_sub(range.start), |stripe, place, _, len| {
                match places.last_mut() {
                    Some((device, last)) if last.end == place && Arc::ptr_eq(device, &stripe.device) => {
                        last.end += len;
                    }
                    _ => places.push((Arc::clone(&stripe.device), place..place + len)),
                }
                Ok(())
            });
        if collected.is_ok() { places } else { vec![] }
    }

    /// All devices that it lies on.
    fn devices(&self) -> impl Iterator<Item = &Arc<dyn BlockDevice>> {
        self.segments.iter().flat_map(|segment| segment.stripes.iter().map(|stripe| &stripe.device))
    }
}

impl BlockDevice for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.devices().any(|device| device.read_only())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.pieces(offset, buf.len() as u64, |stripe, place, from, len| {
            stripe.device.read_at(&mut buf[to_usize(from)..to_usize(from + len)], place)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.pieces(offset, buf.len() as u64, |stripe, place, from, len| {
            stripe.device.write_at(&buf[to_usize(from)..to_usize(from + len)], place)
        })
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.pieces(offset, len, |stripe, place, _, len| stripe.device.write_zeroes_at(place, len, mode))
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.pieces(offset, len, |stripe, place, _, len| stripe.device.discard_at(place, len))
    }

    fn flush(&self) -> Result<()> {
        self.devices().try_for_each(|device| device.flush())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        let index = self.segments.partition_point(|segment| segment.end() <= offset);
        let (stripe, place, left) = self.segments[index].locate(offset);
        let found = extent(&*stripe.device, place, left.min(max_len))?;
        Ok(LayerExtent { stored: found.stored, len: found.len, host_offset: None, reads_zero: found.zero })
    }
}
