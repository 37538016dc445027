//! One of the two chains of a rebase: what its own members store, and what it shares with the other.

use std::sync::Arc;

use block::{BlockDevice, Result};

use crate::convert::source::{Kind, Look, Source};

/// A chain of backing files as the overlay sees it: continued by zeros past its end.
#[derive(Debug)]
pub struct Side {
    /// `None`: no backing file at all.
    source: Option<Source>,
    /// Members above the first one that is in both chains.
    own: u32,
    /// Where the topmost member ends.
    end: u64,
}

/// What a chain holds at some place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    /// Something.
    Bytes,
    /// Zeros, known without reading.
    Zeros,
    /// What the members that both chains share hold.
    Common,
}

impl Side {
    /// The chain of `device`, of which the topmost `own` members are not in the other chain.
    ///
    /// # Errors
    /// The disk is larger than one can be.
    pub fn new(device: Option<Arc<dyn BlockDevice>>, own: u32) -> Result<Self> {
        let end = device.as_ref().map_or(0, |device| device.size());
        let source = device.map(|device| Source::new([device])).transpose()?;
        Ok(Self { source, own, end })
    }

    /// Fills `buf` from `offset`.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let covered = self.source.as_ref().map_or(0, |source| source.size().saturating_sub(offset));
        let split = block::num::to_usize(covered.min(buf.len() as u64));
        let (held, past) = buf.split_at_mut(split);
        past.fill(0);
        match &self.source {
            Some(source) if !held.is_empty() => source.read_at(held, offset),
            _ => Ok(()),
        }
    }

    /// A look through it from front to back.
    pub(super) fn look(&self) -> SideLook<'_> {
        let own = self.own.checked_sub(1);
        SideLook {
            side: self,
            own: self.source.as_ref().zip(own).map(|(source, depth)| source.look(depth)),
            whole: self.source.as_ref().map(|source| source.look(u32::MAX)),
        }
    }
}

/// Where a look through a chain has arrived.
pub(super) struct SideLook<'a> {
    side: &'a Side,
    /// At the members that are not shared, if there are any.
    own: Option<Look<'a>>,
    whole: Option<Look<'a>>,
}

impl SideLook<'_> {
    /// What the chain holds at `offset`, for at most `max_len` bytes, and for how many.
    pub(super) fn holds(&mut self, offset: u64, max_len: u64) -> Result<(Holds, u64)> {
        match &mut self.own {
            None if offset >= self.side.end => Ok((Holds::Zeros, max_len)),
            None => Ok((Holds::Common, max_len.min(self.side.end - offset))),
            Some(look) => found(look, self.side, offset, max_len),
        }
    }

    /// The same, looking at the shared members, too: never [`Holds::Common`].
    pub(super) fn holds_at_all(&mut self, offset: u64, max_len: u64) -> Result<(Holds, u64)> {
        match &mut self.whole {
            None => Ok((Holds::Zeros, max_len)),
            Some(look) => found(look, self.side, offset, max_len),
        }
    }
}

fn found(look: &mut Look<'_>, side: &Side, offset: u64, max_len: u64) -> Result<(Holds, u64)> {
    let size = side.source.as_ref().map_or(0, Source::size);
    if offset >= size {
        return Ok((Holds::Zeros, max_len));
    }
    let extent = look.extent(offset, max_len.min(size - offset))?;
    let holds = match extent.kind {
        Kind::Data => Holds::Bytes,
        Kind::Zero => Holds::Zeros,
        Kind::Below => Holds::Common,
    };
    Ok((holds, extent.len))
}
