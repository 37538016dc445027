//! A stream that cannot be sought in (a pipe), read as it comes.
//!
//! The disk must be asked for from its start to its end, and each byte once: as `convert` does. Grains are taken
//! from the input when somebody asks what lies where, and wait, compressed, for the thread that reads them; as the
//! caller asks no further ahead than it reads, few of them wait at any time. Whoever looks back gets an error, never
//! wrong bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::sync::Arc;

use block::device::check_range;
use block::image::{Image, ImageInfo, Value};
use block::num::{len_of, low_u32, to_usize};
use block::pieces::{Piece, pieces};
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Result, Stored};
use parking_lot::Mutex;

use super::codec;
use super::marker::{GRAIN_MARKER, Marker, SECTOR};
use crate::descriptor::Descriptor;
use crate::header::{self, GD_AT_END, Header, flags};

/// Bytes in front of the first grain, at most.
const MAX_HEAD: u64 = 16 << 20;
/// Bytes of the largest grain.
const MAX_GRAIN: u64 = 16 << 20;
/// Compressed bytes that may wait.
const MAX_WAITING: u64 = 256 << 20;
/// Grains that are remembered as read.
const MAX_REMEMBERED: usize = 64 << 10;

/// A disk that comes in through a pipe.
pub struct Sequential {
    header: Header,
    /// The text in front of the grains.
    descriptor: Vec<u8>,
    size: u64,
    state: Mutex<State>,
}

struct State {
    input: Box<dyn Read + Send>,
    /// What lies below this grain is known.
    known: u64,
    /// A grain that has come in, further on than anybody has asked.
    ahead: Option<(u64, Waiting)>,
    waiting: BTreeMap<u64, Waiting>,
    /// Bytes of `waiting`.
    waiting_bytes: u64,
    read: BTreeSet<u64>,
    /// Below this grain it has been forgotten what has been read.
    forgotten: u64,
    /// The footer has gone by: what comes next is the end.
    footer: bool,
    ended: bool,
}

/// A grain that has not been read to its end.
#[derive(Debug)]
struct Waiting {
    packed: Arc<[u8]>,
    /// Bytes that nobody has read yet.
    left: u64,
}

impl fmt::Debug for Sequential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequential").field("header", &self.header).finish_non_exhaustive()
    }
}

impl Sequential {
    /// Reads the header and what else lies in front of the first grain.
    ///
    /// # Errors
    /// The input is not a stream with its directory at the end, has a parent, ends too early, or cannot be read.
    pub fn open(mut input: Box<dyn Read + Send>) -> Result<Self> {
        let mut first = [0; header::LENGTH];
        take(&mut *input, &mut first)?;
        if !header::probe(&first) {
            return Err(Error::unsupported("only a streamOptimized VMDK can be read from a pipe")
                .hint("save the image in a file first"));
        }
        let header = Header::parse(&first)?;
        if header.compression != 1 || !header.has(flags::MARKERS) || header.gd_offset != GD_AT_END {
            return Err(Error::unsupported(
                "this VMDK cannot be read from a pipe: its tables are not behind its grains",
            )
            .hint("save the image in a file first"));
        }
        let grain = header.grain_bytes();
        if grain > MAX_GRAIN || header.overhead == 0 || header.overhead > MAX_HEAD / SECTOR {
            return Err(Error::invalid(format!(
                "a stream with grains of {grain} bytes from sector {} on",
                header.overhead
            )));
        }
        let mut head = vec![0; to_usize((header.overhead - 1) * SECTOR)];
        take(&mut *input, &mut head)?;
        let descriptor = text(&head, &header).to_vec();
        check_descriptor(&descriptor, &header)?;
        let state = State {
            input,
            known: 0,
            ahead: None,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            read: BTreeSet::new(),
            forgotten: 0,
            footer: false,
            ended: false,
        };
        Ok(Self { size: header.capacity * SECTOR, header, descriptor, state: Mutex::new(state) })
    }

    /// The text of the descriptor that lies in front of the grains.
    pub fn descriptor(&self) -> &[u8] {
        &self.descriptor
    }

    fn grain(&self) -> u64 {
        self.header.grain_bytes()
    }

    fn grains(&self) -> u64 {
        self.size.div_ceil(self.grain())
    }

    /// Fills a part of a grain.
    fn read_piece(&self, piece: &Piece, out: &mut [u8]) -> Result<()> {
        let packed = {
            let mut state = self.state.lock();
            while state.known <= piece.index {
                state.advance(&self.header)?;
            }
            state.take_part(piece)?
        };
        let Some(packed) = packed else {
            out.fill(0);
            return Ok(());
        };
        let sector = piece.index * self.header.grain;
        let wrong =
            |what| Error::new(ErrorKind::Corrupt, format!("the compressed grain of sector {sector}: {what}"));
        let needed = self.grain().min(self.size - piece.index * self.grain());
        let check = |len: usize| match (len as u64) < needed {
            true => Err(wrong(format!("holds {len} bytes of {needed}"))),
            false => Ok(()),
        };
        if piece.is_whole(self.grain()) {
            return codec::decompress(&packed, out).map_err(&wrong).and_then(check);
        }
        let mut whole = vec![0; to_usize(self.grain())];
        codec::decompress(&packed, &mut whole).map_err(&wrong).and_then(check)?;
        let within = to_usize(piece.within);
        out.copy_from_slice(&whole[within..within + out.len()]);
        Ok(())
    }
}

impl State {
    /// Learns more about the disk: of the gap in front of the next grain that is stored, or of that grain, or that
    /// nothing follows.
    fn advance(&mut self, header: &Header) -> Result<()> {
        if self.ahead.is_none() {
            self.ahead = self.next_grain(header)?;
        }
        let Some((index, waiting)) = self.ahead.take() else {
            self.known = u64::MAX;
            return Ok(());
        };
        if index > self.known {
            self.known = index;
            self.ahead = Some((index, waiting));
            return Ok(());
        }
        self.waiting_bytes += len_of(&waiting.packed);
        if self.waiting_bytes > MAX_WAITING {
            return Err(Error::unsupported("a stream has to be read in the order in which it comes"));
        }
        self.waiting.insert(index, waiting);
        self.known = index + 1;
        if self.known * header.grain >= header.capacity {
            // Nobody asks for what lies behind the last grain, but a stream without an end is cut off.
            self.ahead = self.next_grain(header)?;
        }
        Ok(())
    }

    /// The next grain of the input; `None` at its end.
    fn next_grain(&mut self, header: &Header) -> Result<Option<(u64, Waiting)>> {
        let mut sector = [0; 512];
        while !self.ended {
            take(&mut *self.input, &mut sector)?;
            match Marker::parse(&sector) {
                Some(Marker::Grain { sector: at, size }) => {
                    return self.grain(header, at, size, &sector).map(Some);
                }
                // Zeros where grains have been lost look like the end, but nothing announces that.
                Some(Marker::EndOfStream) | None if !self.footer => return Err(no_footer()),
                Some(Marker::EndOfStream) | None => self.ended = true,
                Some(Marker::Footer { sectors }) => {
                    self.skip(sectors)?;
                    self.footer = true;
                }
                Some(
                    Marker::GrainTable { sectors }
                    | Marker::GrainDirectory { sectors }
                    | Marker::Other { sectors, .. },
                ) => self.skip(sectors)?,
            }
        }
        Ok(None)
    }

    /// Takes in the grain of sector `at`, whose file begins with `first`.
    fn grain(&mut self, header: &Header, at: u64, size: u32, first: &[u8; 512]) -> Result<(u64, Waiting)> {
        let wrong = |what: &str| Error::new(ErrorKind::Corrupt, format!("the grain of sector {at}: {what}"));
        if !at.is_multiple_of(header.grain) || at >= header.capacity {
            return Err(wrong("the disk has no such grain"));
        }
        let index = at / header.grain;
        if index < self.known {
            return Err(wrong("comes too late: the stream is not in the order of the disk"));
        }
        let size = u64::from(size);
        if size > 2 * header.grain_bytes() {
            return Err(wrong("is larger compressed than two grains"));
        }
        let whole = (GRAIN_MARKER as u64 + size).next_multiple_of(SECTOR);
        let mut bytes = vec![0; to_usize(whole)];
        bytes[..512].copy_from_slice(first);
        take(&mut *self.input, &mut bytes[512..])?;
        let packed: Arc<[u8]> = bytes[GRAIN_MARKER..GRAIN_MARKER + to_usize(size)].into();
        let left = header.grain_bytes().min((header.capacity - at) * SECTOR);
        Ok((index, Waiting { packed, left }))
    }

    /// Passes over metadata: without seeking, tables are of no use.
    fn skip(&mut self, sectors: u64) -> Result<()> {
        let mut scratch = [0; 4096];
        let mut left = sectors.saturating_mul(SECTOR);
        while left > 0 {
            let len = to_usize(left.min(4096));
            take(&mut *self.input, &mut scratch[..len])?;
            left -= len as u64;
        }
        Ok(())
    }

    /// The compressed bytes of a grain, of which a part is read now. `None`: there is no such grain.
    fn take_part(&mut self, piece: &Piece) -> Result<Option<Arc<[u8]>>> {
        let index = piece.index;
        if let Some(waiting) = self.waiting.get_mut(&index) {
            waiting.left = waiting.left.saturating_sub(piece.len());
            let packed = Arc::clone(&waiting.packed);
            if waiting.left == 0 {
                self.waiting.remove(&index);
                self.waiting_bytes -= len_of(&packed);
                self.remember(index);
            }
            return Ok(Some(packed));
        }
        match index < self.forgotten || self.read.contains(&index) {
            true => Err(gone()),
            false => Ok(None),
        }
    }

    fn remember(&mut self, index: u64) {
        self.read.insert(index);
        if self.read.len() > MAX_REMEMBERED
            && let Some(oldest) = self.read.pop_first()
        {
            self.forgotten = oldest + 1;
        }
    }
}

fn no_footer() -> Error {
    Error::new(ErrorKind::Truncated, "Invalid footer").hint(
        "the stream has an end without a footer: a part of it is missing, or has been overwritten with zeros",
    )
}

fn gone() -> Error {
    Error::unsupported("what comes through a pipe can be read once only")
}

/// Refuses what would have to be read together with its parent, or contradicts the header. A stream need not have a
/// descriptor.
fn check_descriptor(text: &[u8], header: &Header) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let descriptor = Descriptor::parse(text)?;
    header.check_descriptor(&descriptor)?;
    if descriptor.has_parent() {
        return Err(Error::unsupported("a VMDK that has a parent cannot be read from a pipe")
            .hint("save the image in a file beside its parent first"));
    }
    Ok(())
}

/// The descriptor's bytes in what lies behind the header.
fn text<'a>(head: &'a [u8], header: &Header) -> &'a [u8] {
    let Some(skip) = header.descriptor_offset.checked_sub(1) else { return &[] };
    let start = to_usize(skip.saturating_mul(SECTOR).min(len_of(head)));
    let len = to_usize(header.descriptor_len.saturating_mul(SECTOR).min(len_of(&head[start..])));
    let text = &head[start..start + len];
    &text[..text.iter().position(|byte| *byte == 0).unwrap_or(text.len())]
}

/// Fills `buf` from the input.
fn take(input: &mut dyn Read, buf: &mut [u8]) -> Result<()> {
    input.read_exact(buf).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Error::new(ErrorKind::Truncated, "the stream ends before its end-of-stream marker")
                .hint("it was not written or transferred to its end")
        }
        _ => Error::from(error),
    })
}

impl BlockDevice for Sequential {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        let grain = low_u32(self.grain());
        Limits { alignment: 1, preferred: grain, discard_granularity: grain }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, len_of(buf), self.size)?;
        pieces(offset, len_of(buf), self.grain())
            .try_for_each(|piece| self.read_piece(&piece, &mut buf[piece.range.clone()]))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        let index = offset / self.grain();
        let mut state = self.state.lock();
        while state.known <= index {
            state.advance(&self.header)?;
        }
        if index < state.forgotten {
            return Err(gone());
        }
        let here = |grains: u64| (grains * self.grain() - offset).min(max_len).min(self.size - offset);
        if state.waiting.contains_key(&index) || state.read.contains(&index) {
            return Ok(LayerExtent::new(Stored::Compressed, here(index + 1)));
        }
        // Up to the next grain that is stored, as far as is known.
        let next = [
            state.waiting.range(index..).next().map(|(at, _)| *at),
            state.read.range(index..).next().copied(),
        ];
        let end = next.into_iter().flatten().min().unwrap_or(u64::MAX).min(state.known).min(self.grains());
        Ok(LayerExtent::new(Stored::Absent, here(end)))
    }
}

impl Image for Sequential {
    fn format_name(&self) -> &'static str {
        "vmdk"
    }

    fn info(&self) -> Result<ImageInfo> {
        let create_type = ("create-type", Value::Text("streamOptimized".to_owned()));
        Ok(ImageInfo {
            cluster_size: Some(low_u32(self.grain())),
            compressed: true,
            specific: vec![create_type],
            ..ImageInfo::default()
        })
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}
