//! What a convert has to do, piece by piece: the source's extents turned into work.
//!
//! Everything that costs nothing is left out here, before any worker sees it: a hole of a tebibyte is one
//! step. What is left comes in pieces that begin and end at multiples of the target's cluster, so that no
//! two workers ever write to one cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{BlockDevice, Result, ResultExt as _, Storage, Stored};
use parking_lot::Mutex;

use super::crew::{Piece, Pieces};
use super::source::{Kind, Look, Place, Source};

/// What the target reads as where nothing has been written yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fresh {
    /// Zeros.
    Zeros,
    /// Anything: it was there before.
    Unknown,
    /// What its backing device holds.
    Backing {
        /// How many layers of the source lie above the one that is also the target's backing device (at
        /// least 1). `None`: the backing device is another one, which may or may not hold the same bytes.
        layers_above: Option<u32>,
    },
    /// Its old contents, and the source is a chain on top of it: a commit.
    Base {
        /// How many layers of the source lie above the target (at least 1).
        layers_above: u32,
    },
}

/// Largest piece that is zeroed or shared in one call, so that an interruption is noticed.
const LARGE_PIECE: u64 = 1 << 30;
/// How far ahead extents are asked for at first; grows while the answers fill it.
const FIRST_WINDOW: u64 = 1 << 30;
/// File systems share blocks of at least this many bytes.
const SHARE_ALIGNMENT: u64 = 4096;

/// Everything that decides what is to be done where.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) source: &'a Source,
    pub(super) target: &'a dyn BlockDevice,
    pub(super) fresh: Fresh,
    /// Pieces begin and end at multiples of this (bytes).
    pub(super) cluster: u64,
    /// Largest piece that is copied at once (bytes, a multiple of the cluster).
    pub(super) chunk: u64,
    /// Zeros are stored like any other bytes: the target takes space for everything.
    pub(super) keep_zeros: bool,
    /// Zeros that are to take space have to be written like data.
    pub(super) copy_zeros: bool,
    /// Places that cannot be looked up are tried as data.
    pub(super) salvage: bool,
    /// Whether the kernel may be asked to share blocks.
    pub(super) sharing: Sharing,
}

/// Which containers of the source the kernel can share blocks from, as far as has been found out.
#[derive(Debug)]
pub(super) struct Sharing {
    wanted: bool,
    proven: AtomicBool,
    refused: Mutex<Vec<Arc<dyn Storage>>>,
}

/// A piece of work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    /// Its number: 0, 1, 2.. in the order of offsets.
    pub(super) ticket: u64,
    /// First byte.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// What to do.
    pub(super) action: Action<'a>,
}

impl Piece for Item<'_> {
    fn ticket(&self) -> u64 {
        self.ticket
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn len(&self) -> u64 {
        self.len
    }
}

/// What to do with a piece.
#[derive(Debug, Clone, Copy)]
pub(super) enum Action<'a> {
    /// Read and write.
    Copy,
    /// Read, compare with the target's backing device, write what differs.
    Difference,
    /// Make it zero.
    Zero,
    /// Let the kernel share the blocks at this place.
    Share(Place<'a>),
}

/// What is to be done with a range of one extent.
#[derive(Debug, Clone, Copy)]
enum Class<'a> {
    Skip,
    Do(Action<'a>),
}

/// A range that is treated in one way.
#[derive(Debug, Clone, Copy)]
struct Span<'a> {
    start: u64,
    end: u64,
    class: Class<'a>,
}

impl Sharing {
    /// Nothing has been tried yet; nothing will be unless `wanted`.
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, proven: AtomicBool::new(false), refused: Mutex::default() }
    }

    /// The kernel has shared blocks.
    pub(super) fn worked(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    /// The kernel will not share blocks of `storage`.
    pub(super) fn failed(&self, storage: &Arc<dyn Storage>) {
        self.refused.lock().push(Arc::clone(storage));
    }

    fn may_try(&self, place: &Place<'_>) -> bool {
        self.wanted
            && place.offset.is_multiple_of(SHARE_ALIGNMENT)
            && !self.refused.lock().iter().any(|refused| Arc::ptr_eq(refused, place.storage))
    }

    /// How much to share in one piece: until it has worked once, no more than is copied when it fails.
    fn piece(&self, chunk: u64) -> u64 {
        if self.proven.load(Ordering::Relaxed) { LARGE_PIECE.max(chunk) / chunk * chunk } else { chunk }
    }
}

impl<'a> Plan<'a> {
    /// How many layers below the source's first one are looked at; what lies deeper is [`Kind::Below`].
    fn depth(&self) -> u32 {
        match self.fresh {
            Fresh::Backing { layers_above } => layers_above.unwrap_or(1).saturating_sub(1),
            Fresh::Base { layers_above } => layers_above.saturating_sub(1),
            _ => u32::MAX,
        }
    }

    /// What has to be done at `offset`, for at most `max_len` bytes.
    fn classify(&self, looks: &mut Looks<'a>, offset: u64, max_len: u64) -> Result<Span<'a>> {
        let found = looks.above.extent(offset, max_len);
        let found = found.context(|| format!("error while reading block status at offset {offset}"))?;
        let span = |len: u64, class| Span { start: offset, end: offset + len, class };
        match found.kind {
            Kind::Data => {
                let share = found.place.filter(|place| self.sharing.may_try(place));
                Ok(span(found.len, Class::Do(share.map_or(Action::Copy, Action::Share))))
            }
            Kind::Below
                if matches!(self.fresh, Fresh::Backing { layers_above: Some(_) } | Fresh::Base { .. }) =>
            {
                Ok(span(found.len, Class::Skip))
            }
            Kind::Below => self.classify_below(looks, offset, found.len),
            Kind::Zero => self.classify_zero(offset, found.len),
        }
    }

    fn classify_zero(&self, offset: u64, len: u64) -> Result<Span<'a>> {
        let zero = Class::Do(if self.copy_zeros && self.keep_zeros { Action::Copy } else { Action::Zero });
        let (len, class) = match self.fresh {
            _ if self.keep_zeros => (len, zero),
            Fresh::Zeros => (len, Class::Skip),
            Fresh::Unknown | Fresh::Base { .. } => self.zero_unless_present(offset, len, zero)?,
            Fresh::Backing { .. } => match self.covered_by_backing(offset) {
                0 => (len, Class::Skip),
                covered => (len.min(covered), zero),
            },
        };
        Ok(Span { start: offset, end: offset + len, class })
    }

    /// A range that the source's top layer does not store, over a target whose backing device is not known to
    /// be what lies below.
    fn classify_below(&self, looks: &mut Looks<'a>, offset: u64, len: u64) -> Result<Span<'a>> {
        let source = looks.whole.extent(offset, len);
        let source = source.context(|| format!("error while reading block status at offset {offset}"))?;
        let (len, class) = match (source.kind, self.target.backing()) {
            (Kind::Zero, Some(backing)) if offset < backing.size() => {
                let found = block::extent::extent(&**backing, offset, source.len)?;
                (found.len, if found.zero { Class::Skip } else { Class::Do(Action::Zero) })
            }
            (Kind::Zero, _) => (source.len, Class::Skip),
            _ => (source.len, Class::Do(Action::Difference)),
        };
        Ok(Span { start: offset, end: offset + len, class })
    }

    /// Bytes of the target's backing device from `offset` to its end; what lies behind reads as zeros.
    fn covered_by_backing(&self, offset: u64) -> u64 {
        self.target.backing().map_or(0, |backing| backing.size().saturating_sub(offset))
    }

    /// Zeros need not be written where the target itself is known to hold zeros.
    fn zero_unless_present(&self, offset: u64, len: u64, zero: Class<'a>) -> Result<(u64, Class<'a>)> {
        let found = self.target.layer_extent(offset, len.min(self.target.size() - offset))?;
        let nothing = found.stored == Stored::Absent && self.target.backing().is_none();
        Ok((found.len, if nothing || found.reads_zero { Class::Skip } else { zero }))
    }
}

/// Where the looks through the source have arrived.
#[derive(Debug)]
struct Looks<'a> {
    /// At the layers that the plan tells apart.
    above: Look<'a>,
    /// At all layers.
    whole: Look<'a>,
}

/// Walks the source and hands out pieces in order.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    plan: &'a Plan<'a>,
    looks: Looks<'a>,
    position: u64,
    ticket: u64,
    window: u64,
    span: Option<Span<'a>>,
    skipped: u64,
}

impl<'a> Pieces for Cursor<'a> {
    type Piece = Item<'a>;

    fn next(&mut self) -> Result<Option<Item<'a>>> {
        while self.position < self.plan.source.size() {
            let span = self.span_at(self.position)?;
            let end = self.whole_clusters(span.end);
            if end <= self.position {
                let end = self.extend_copy(self.next_cluster(self.position))?;
                return Ok(Some(self.item(end, Action::Copy)));
            }
            match span.class {
                Class::Skip => self.skip(end),
                Class::Do(Action::Zero) => {
                    return Ok(Some(self.item(self.limit(end, LARGE_PIECE), Action::Zero)));
                }
                Class::Do(Action::Difference) => {
                    return Ok(Some(self.item(self.limit(end, self.plan.chunk), Action::Difference)));
                }
                Class::Do(Action::Share(place)) => return Ok(Some(self.share(place, end))),
                Class::Do(Action::Copy) => {
                    let end = self.extend_copy(self.limit(end, self.plan.chunk))?;
                    return Ok(Some(self.item(end, Action::Copy)));
                }
            }
        }
        Ok(None)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }
}

impl<'a> Cursor<'a> {
    /// At the start of the source.
    pub(super) fn new(plan: &'a Plan<'a>) -> Self {
        let looks = Looks { above: plan.source.look(plan.depth()), whole: plan.source.look(u32::MAX) };
        Self { plan, looks, position: 0, ticket: 0, window: FIRST_WINDOW, span: None, skipped: 0 }
    }

    fn skip(&mut self, end: u64) {
        self.skipped += end - self.position;
        self.position = end;
    }

    fn item(&mut self, end: u64, action: Action<'a>) -> Item<'a> {
        let item = Item { ticket: self.ticket, offset: self.position, len: end - self.position, action };
        self.ticket += 1;
        self.position = end;
        item
    }

    /// A piece to be shared, or copied if it does not hold whole blocks (the end of a disk).
    fn share(&mut self, place: Place<'a>, end: u64) -> Item<'a> {
        let end = self.limit(end, self.plan.sharing.piece(self.plan.chunk));
        let unit = self.plan.cluster.max(SHARE_ALIGNMENT);
        let whole = (end - self.position) / unit * unit;
        if whole == 0 || !self.position.is_multiple_of(SHARE_ALIGNMENT) {
            let end = self.limit(end, self.plan.chunk);
            return self.item(end, Action::Copy);
        }
        self.item(self.position + whole, Action::Share(place))
    }

    /// The range of equal treatment that `offset` lies in, cut off in front of it.
    fn span_at(&mut self, offset: u64) -> Result<Span<'a>> {
        let span = match self.span {
            Some(span) if (span.start..span.end).contains(&offset) => span,
            _ => self.look_up(offset)?,
        };
        let class = match span.class {
            Class::Do(Action::Share(place)) => self.still_shared(place, offset - span.start),
            class => class,
        };
        let span = Span { start: offset, class, ..span };
        self.span = Some(span);
        Ok(span)
    }

    /// The class of a shared span, `ahead` bytes on: the kernel may have refused meanwhile.
    fn still_shared(&self, place: Place<'a>, ahead: u64) -> Class<'a> {
        let place = Place { offset: place.offset + ahead, ..place };
        Class::Do(if self.plan.sharing.may_try(&place) { Action::Share(place) } else { Action::Copy })
    }

    fn look_up(&mut self, offset: u64) -> Result<Span<'a>> {
        let left = self.plan.source.size() - offset;
        match self.plan.classify(&mut self.looks, offset, left.min(self.window)) {
            Ok(span) => {
                let filled = span.end - span.start == self.window;
                self.window = if filled { self.window.saturating_mul(2) } else { FIRST_WINDOW };
                Ok(span)
            }
            Err(_) if self.plan.salvage => {
                let end = self.next_cluster(offset);
                Ok(Span { start: offset, end, class: Class::Do(Action::Copy) })
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a copy that reaches to `end` longer while data follows, up to the next multiple of the chunk.
    fn extend_copy(&mut self, mut end: u64) -> Result<u64> {
        let limit = self.limit(u64::MAX, self.plan.chunk);
        while end < limit {
            let span = self.span_at(end)?;
            let whole = self.whole_clusters(span.end);
            end = match span.class {
                _ if whole <= end => self.next_cluster(end),
                Class::Do(Action::Copy) => whole.min(limit),
                _ => break,
            };
        }
        Ok(end.min(limit))
    }

    /// The next multiple of `piece` after the position, or `end` if that comes first.
    fn limit(&self, end: u64, piece: u64) -> u64 {
        let next = (self.position / piece + 1).saturating_mul(piece);
        end.min(next).min(self.plan.source.size())
    }

    /// `offset`, rounded down to whole clusters; the end of the disk counts as the end of a cluster.
    fn whole_clusters(&self, offset: u64) -> u64 {
        if offset >= self.plan.source.size() {
            offset
        } else {
            offset / self.plan.cluster * self.plan.cluster
        }
    }

    /// The end of the cluster that `offset` lies in.
    fn next_cluster(&self, offset: u64) -> u64 {
        let end = (offset / self.plan.cluster + 1).saturating_mul(self.plan.cluster);
        end.min(self.plan.source.size())
    }
}
