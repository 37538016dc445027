//! Reading grains of a compressed extent, wherever their tables are.
//!
//! A request is looked up first, then read in as few pieces as its grains lie in, then inflated; all of it by the
//! caller's thread and without a lock, so that as many requests as there are processors make progress at once.

use std::cell::Cell;
use std::sync::Arc;

use block::num::to_usize;
use block::pieces::{Piece, pieces};
use block::{Error, ErrorKind, Result, Storage};
use parking_lot::Mutex;

use super::codec;
use super::marker::{GRAIN_MARKER, Marker, SECTOR};
use crate::header::{Header, flags};
use crate::lookup::{Entries, Grain, Lookup};

/// Bytes of the largest grain: it is inflated as a whole.
const MAX_GRAIN: u64 = 16 << 20;
/// Bytes that are read at once.
const MAX_FETCH: u64 = 4 << 20;
/// Inflated grains that are kept for requests that ask for less than a grain.
const KEPT: usize = 8;

/// How the grains of an extent are stored.
#[derive(Debug)]
pub(crate) struct Grains {
    storage: Arc<dyn Storage>,
    /// Bytes of a grain.
    grain: u64,
    /// Bytes of the disk that the extent holds.
    size: u64,
    /// Grains have markers in front of them.
    markers: bool,
    kept: [Mutex<Kept>; KEPT],
}

/// An inflated grain and where it lies in the file.
type Kept = Option<(u64, Arc<[u8]>)>;

/// A part of a request and the place of its grain.
#[derive(Debug)]
struct Wanted {
    piece: Piece,
    place: u64,
}

thread_local! {
    /// The memory of the last fetch: clearing fresh memory for each would cost as much as reading.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Bytes of the file, from `offset`.
#[derive(Debug, Default)]
struct Fetched {
    offset: u64,
    len: usize,
    /// The bytes, and others.
    memory: Vec<u8>,
}

impl Fetched {
    /// Room for `len` bytes.
    fn with_room(offset: u64, len: usize) -> Self {
        let mut memory = SPARE.take();
        if memory.len() < len {
            memory.resize(len, 0);
        }
        Self { offset, len, memory }
    }

    /// The bytes from `place`, at least `len`.
    fn from(&self, place: u64, len: u64) -> Option<&[u8]> {
        let skip = place.checked_sub(self.offset)?;
        let rest = self.memory.get(..self.len)?.get(usize::try_from(skip).ok()?..)?;
        (rest.len() as u64 >= len).then_some(rest)
    }
}

impl Drop for Fetched {
    fn drop(&mut self) {
        if self.memory.len() as u64 <= MAX_FETCH {
            SPARE.set(std::mem::take(&mut self.memory));
        }
    }
}

impl Grains {
    /// The grains of the extent that `header` describes.
    ///
    /// # Errors
    /// They are larger than anybody makes them.
    pub(crate) fn new(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        if header.grain_bytes() > MAX_GRAIN {
            let message = format!("compressed grains of {} bytes", header.grain_bytes());
            return Err(Error::unsupported(message));
        }
        Ok(Self {
            storage,
            grain: header.grain_bytes(),
            size: header.capacity * SECTOR,
            markers: header.has(flags::MARKERS),
            kept: std::array::from_fn(|_| Mutex::new(None)),
        })
    }

    /// Fills `buf` from byte `offset` of the extent. `absent` fills what is not stored here, given where that is.
    ///
    /// # Errors
    /// A table or a grain is damaged, or the host failed.
    pub(crate) fn read<E: Entries>(
        &self,
        lookup: &Lookup<E>,
        buf: &mut [u8],
        offset: u64,
        absent: &dyn Fn(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let mut batch: Vec<Wanted> = vec![];
        for piece in pieces(offset, buf.len() as u64, self.grain) {
            let at = piece.index * self.grain + piece.within;
            match lookup.grain(at)? {
                Grain::Absent => absent(&mut buf[piece.range], at)?,
                Grain::Zero => buf[piece.range].fill(0),
                Grain::At(place) => {
                    let together = batch.first().is_none_or(|first| {
                        place > first.place
                            && place - first.place <= MAX_FETCH - 2 * self.grain.min(MAX_FETCH / 4)
                    });
                    if !together {
                        self.read_batch(&mut batch, buf)?;
                    }
                    batch.push(Wanted { piece, place });
                }
            }
        }
        self.read_batch(&mut batch, buf)
    }

    fn read_batch(&self, batch: &mut Vec<Wanted>, buf: &mut [u8]) -> Result<()> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
        let mut fetched = Fetched::default();
        let whole = batch.len() > 1 || first.piece.is_whole(self.grain);
        if whole {
            // A compressed grain is seldom larger than a plain one.
            fetched = self.fetch(first.place, last.place - first.place + self.grain + SECTOR)?;
        }
        for wanted in batch.drain(..) {
            self.fill(&fetched, &wanted, &mut buf[wanted.piece.range.clone()])?;
        }
        Ok(())
    }

    /// Reads bytes of the file, as many as there are.
    fn fetch(&self, offset: u64, len: u64) -> Result<Fetched> {
        let end = self.storage.len()?;
        let len = end.saturating_sub(offset).min(len);
        let mut fetched = Fetched::with_room(offset, to_usize(len));
        let wanted = fetched.len;
        self.storage.read_at(&mut fetched.memory[..wanted], offset)?;
        Ok(fetched)
    }

    /// Fills a part of one grain.
    fn fill(&self, fetched: &Fetched, wanted: &Wanted, out: &mut [u8]) -> Result<()> {
        let needed = self.grain.min(self.size - wanted.piece.index * self.grain);
        if wanted.piece.within == 0 && out.len() as u64 == self.grain {
            return self.inflate(fetched, wanted, out, needed);
        }
        let kept = &self.kept[to_usize(wanted.piece.index % KEPT as u64)];
        let found =
            kept.lock().as_ref().filter(|(at, _)| *at == wanted.place).map(|(_, grain)| Arc::clone(grain));
        let grain = match found {
            Some(grain) => grain,
            None => {
                let mut grain = vec![0; to_usize(self.grain)];
                self.inflate(fetched, wanted, &mut grain, needed)?;
                let grain: Arc<[u8]> = grain.into();
                *kept.lock() = Some((wanted.place, Arc::clone(&grain)));
                grain
            }
        };
        let within = to_usize(wanted.piece.within);
        out.copy_from_slice(&grain[within..within + out.len()]);
        Ok(())
    }

    /// Inflates a whole grain, of which `needed` bytes have to be there.
    fn inflate(&self, fetched: &Fetched, wanted: &Wanted, out: &mut [u8], needed: u64) -> Result<()> {
        let (index, place) = (wanted.piece.index, wanted.place);
        let wrong = |what: String| {
            Error::new(ErrorKind::Corrupt, format!("the compressed grain at {place:#x}: {what}"))
        };
        let more;
        let packed = match self.packed(fetched, index, place).map_err(&wrong)? {
            Some(packed) => packed,
            None => {
                more = self.fetch(place, 2 * self.grain + SECTOR)?;
                self.packed(&more, index, place).map_err(&wrong)?.ok_or_else(|| {
                    let message =
                        format!("the compressed grain at {place:#x} ends beyond the end of the file");
                    Error::new(ErrorKind::Truncated, message)
                })?
            }
        };
        let len = codec::decompress(packed, out).map_err(&wrong)?;
        if (len as u64) < needed {
            return Err(wrong(format!("holds {len} bytes of {needed}")));
        }
        out[len..].fill(0);
        Ok(())
    }

    /// The compressed bytes of the grain with this number, which begins at `place`. `None`: they have not been
    /// fetched.
    fn packed<'a>(
        &self,
        fetched: &'a Fetched,
        index: u64,
        place: u64,
    ) -> std::result::Result<Option<&'a [u8]>, String> {
        if !self.markers {
            // Nothing says how long it is: the stream knows its own end.
            return Ok(fetched
                .from(place, 1)
                .filter(|bytes| bytes.len() as u64 >= 2 * self.grain || self.reaches_end(fetched)));
        }
        let Some(bytes) = fetched.from(place, 16) else { return Ok(None) };
        match Marker::parse(bytes) {
            Some(Marker::Grain { sector, size }) if sector == index * (self.grain / SECTOR) => {
                if u64::from(size) > 2 * self.grain {
                    return Err(format!("{size} bytes, more than two grains"));
                }
                Ok(bytes.get(GRAIN_MARKER..GRAIN_MARKER + to_usize(size.into())))
            }
            Some(Marker::Grain { sector, .. }) => {
                Err(format!("its marker is that of sector {sector}, not {}", index * (self.grain / SECTOR)))
            }
            _ => Err("there is no marker of a grain".to_owned()),
        }
    }

    /// Whether there is nothing in the file behind what has been fetched.
    fn reaches_end(&self, fetched: &Fetched) -> bool {
        self.storage.len().is_ok_and(|end| fetched.offset + fetched.len as u64 >= end)
    }
}
