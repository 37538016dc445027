//! Random access into a gzip stream (RFC 1952) in bounded memory.
//!
//! Inflating can begin anywhere where the state of the decoder is known: its 32 KiB of history and what it has read
//! of the present block. While the stream is inflated for the first time, copies of that state are kept every so many
//! bytes; a later request starts from the last copy before it. When there are too many of them, every other one goes
//! and the distance doubles, so that memory stays below about 90 MiB whatever the length of the stream.
//!
//! ```text
//!   inflated   |-----------|-----------|-----------|------- front    what nobody has seen yet
//!              0           1 MiB       2 MiB       3 MiB
//!              ^ copy      ^ copy      ^ copy      ^ copy
//!                             ....replay -> 1.7 MiB                  a reader who came back
//! ```
//!
//! One stream is one sequence of bits: those who want what nobody has inflated yet have to take turns. What has been
//! inflated lately is found in a cache without waiting for them. The front passes every byte once, and verifies the
//! checksum and length of each member there; several members may follow each other.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, HostExtent, Result, Storage};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress_with_limit};
use parking_lot::Mutex;

/// Inflated bytes that are kept together.
const BLOCK: u64 = 128 << 10;
/// Blocks that are kept: 64 MiB. More than those who read side by side (16 of them, 2 MiB each) want at a time: whoever
/// falls behind the front by more has to inflate again from the last copy of the state, which may be far.
const MOST_BLOCKS: usize = 512;
/// How far apart copies of the state are at first, in inflated bytes.
const FIRST_SPACING: u64 = 1 << 20;
/// The most copies of the state, each of some 45 KiB.
const MOST_COPIES: usize = 512;
/// Readers that came back to what has been inflated before and may go on from there.
const MOST_REPLAYS: usize = 16;
/// History that a copy may reach back to, as deflate defines it.
const WINDOW: usize = 32 << 10;
/// Compressed bytes that are read at once.
const INPUT: u64 = 64 << 10;
/// The longest header of a member: names and comments have no limit of their own.
const MOST_HEADER: u64 = 1 << 16;

/// Whether these are the first bytes of a gzip stream: magic, deflate, and no flags that are not defined.
pub(super) fn is_header(first: &[u8]) -> bool {
    matches!(first, [0x1f, 0x8b, 8, flags, ..] if flags & 0xe0 == 0)
}

/// What a gzip stream inflates to, as a storage. Read-only.
#[derive(Debug)]
pub struct Gzip {
    name: String,
    /// Compressed bytes.
    packed_len: u64,
    decode: Mutex<Decode>,
    blocks: Mutex<Blocks>,
}

/// Inflated bytes of the last requests.
#[derive(Debug, Default)]
struct Blocks {
    kept: HashMap<u64, Arc<[u8]>>,
    order: VecDeque<u64>,
}

/// Everything that only one thread can do at a time.
#[derive(Debug)]
struct Decode {
    input: Input,
    front: Decoder,
    /// Checksum and length of the present member, as far as the front is.
    crc: flate2::Crc,
    replays: VecDeque<Decoder>,
    /// In the order of their places.
    copies: Vec<Decoder>,
    spacing: u64,
    /// Why the front cannot go on, and where the block begins that it could not inflate: nobody else may, either.
    failed: Option<(u64, ErrorKind, String)>,
    /// Of all that is inflated, once the front has reached the end.
    len: Option<u64>,
}

/// The compressed bytes, some of them at hand.
#[derive(Debug)]
struct Input {
    storage: Arc<dyn Storage>,
    len: u64,
    from: u64,
    bytes: Vec<u8>,
}

/// A place in the stream from which inflating can go on.
#[derive(Clone)]
struct Decoder {
    inflater: Box<DecompressorOxide>,
    /// The last bytes that were inflated, as a ring.
    window: Box<[u8]>,
    window_at: usize,
    /// Offset of the next compressed byte.
    input_at: u64,
    /// Number of bytes inflated so far.
    output_at: u64,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Header,
    Body,
    Trailer,
    End,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("input_at", &self.input_at)
            .field("output_at", &self.output_at)
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}

impl Gzip {
    /// Shows what `storage`, a gzip stream, inflates to. Reads nothing yet.
    ///
    /// # Errors
    /// The host's.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let (len, name) = (storage.len()?, storage.name());
        let input = Input { storage, len, from: 0, bytes: vec![] };
        let start = Decoder::new();
        let decode = Decode {
            input,
            front: start.clone(),
            crc: flate2::Crc::new(),
            replays: VecDeque::new(),
            copies: vec![start],
            spacing: FIRST_SPACING,
            failed: None,
            len: None,
        };
        Ok(Self { name, packed_len: len, decode: Mutex::new(decode), blocks: Mutex::default() })
    }

    /// How many copies of the decoder's state there are.
    #[cfg(test)]
    pub(super) fn copies(&self) -> usize {
        self.decode.lock().copies.len()
    }

    /// Fills `buf` from `offset`, with zeros behind the end of the stream. Returns how many bytes were there.
    ///
    /// # Errors
    /// The stream is broken, or the host's.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut found = 0;
        for piece in block::pieces::pieces(offset, buf.len() as u64, BLOCK) {
            let within = to_usize(piece.within);
            let part = &mut buf[piece.range];
            let block = self.block(piece.index)?;
            let there = block.get(within..).unwrap_or_default();
            let (head, tail) = part.split_at_mut(there.len().min(part.len()));
            head.copy_from_slice(&there[..head.len()]);
            tail.fill(0);
            found += head.len();
        }
        Ok(found)
    }

    /// How many readers had to inflate again what the front had passed.
    #[cfg(test)]
    pub(super) fn replays(&self) -> usize {
        self.decode.lock().replays.len()
    }

    /// A block of inflated bytes; shorter at the end of the stream, empty past it.
    fn block(&self, index: u64) -> Result<Arc<[u8]>> {
        if let Some(block) = self.blocks.lock().kept.get(&index) {
            return Ok(Arc::clone(block));
        }
        let mut decode = self.decode.lock();
        // Whoever had the lock before may have passed here.
        if let Some(block) = self.blocks.lock().kept.get(&index) {
            return Ok(Arc::clone(block));
        }
        decode.block(index, |index, block| self.blocks.lock().keep(index, block))
    }
}

impl Blocks {
    fn keep(&mut self, index: u64, block: Arc<[u8]>) {
        if self.kept.insert(index, block).is_none() {
            self.order.push_back(index);
        }
        while self.order.len() > MOST_BLOCKS {
            if let Some(oldest) = self.order.pop_front() {
                self.kept.remove(&oldest);
            }
        }
    }
}

impl Decode {
    /// Inflates block `index`, and hands it and those just before it to `keep`.
    fn block(&mut self, index: u64, keep: impl Fn(u64, Arc<[u8]>)) -> Result<Arc<[u8]>> {
        let start = index * BLOCK;
        if self.len.is_some_and(|len| start >= len) {
            return Ok(Arc::new([]));
        }
        // A replay verifies no checksum: what the front has refused stays refused.
        if start < self.front.output_at && self.failed.as_ref().is_none_or(|(from, ..)| start < *from) {
            return self.replay(index, keep);
        }
        // The front stands at the border of a block, always.
        loop {
            let at = self.front.output_at / BLOCK;
            let block = self.advance()?;
            if at + MOST_BLOCKS as u64 > index && !block.is_empty() {
                keep(at, Arc::clone(&block));
            }
            if at == index {
                return Ok(block);
            }
            if self.len.is_some() {
                return Ok(Arc::new([]));
            }
        }
    }

    /// Lets the front inflate one more block. Where it has failed once, it stays.
    fn advance(&mut self) -> Result<Arc<[u8]>> {
        if let Some((_, kind, message)) = &self.failed {
            return Err(Error::new(*kind, message.clone()));
        }
        self.copy_if_due();
        let start = self.front.output_at;
        let mut block = vec![0; to_usize(BLOCK)];
        let mut crc = Some(&mut self.crc);
        let filled = self.front.fill(&mut self.input, &mut block, &mut crc);
        let len = filled.inspect_err(|error| self.failed = Some((start, error.kind(), error.to_string())))?;
        if self.front.stage == Stage::End {
            self.len = Some(self.front.output_at);
        }
        block.truncate(len);
        Ok(block.into())
    }

    /// Keeps a copy of the front's state if the last one is far enough behind.
    fn copy_if_due(&mut self) {
        let last = self.copies.last().map_or(0, |copy| copy.output_at);
        if self.front.output_at < last + self.spacing {
            return;
        }
        self.copies.push(self.front.clone());
        if self.copies.len() > MOST_COPIES {
            self.spacing *= 2;
            let mut index = 0;
            self.copies.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
    }

    /// Inflates a block that the front has passed, from the nearest state before it.
    fn replay(&mut self, index: u64, keep: impl Fn(u64, Arc<[u8]>)) -> Result<Arc<[u8]>> {
        let start = index * BLOCK;
        let mut decoder = self.nearest(start);
        loop {
            let at = decoder.output_at / BLOCK;
            let mut block = vec![0; to_usize(BLOCK)];
            let len = decoder.fill(&mut self.input, &mut block, &mut None)?;
            block.truncate(len);
            let block: Arc<[u8]> = block.into();
            if at + MOST_BLOCKS as u64 > index && !block.is_empty() {
                keep(at, Arc::clone(&block));
            }
            if at == index || decoder.stage == Stage::End {
                if decoder.output_at < self.front.output_at {
                    self.replays.push_back(decoder);
                    if self.replays.len() > MOST_REPLAYS {
                        self.replays.pop_front();
                    }
                }
                return Ok(if at == index { block } else { Arc::new([]) });
            }
        }
    }

    /// The state nearest to `start` and not behind it.
    fn nearest(&mut self, start: u64) -> Decoder {
        let copies = self.copies.partition_point(|copy| copy.output_at <= start);
        let copy = copies.checked_sub(1).and_then(|last| self.copies.get(last));
        let reached = copy.map_or(0, |copy| copy.output_at);
        let replays = self.replays.iter().enumerate();
        let fitting = replays.filter(|(_, replay)| (reached..=start).contains(&replay.output_at));
        let best = fitting.max_by_key(|(_, replay)| replay.output_at).map(|(index, _)| index);
        match best.and_then(|index| self.replays.remove(index)) {
            Some(replay) => replay,
            None => copy.cloned().unwrap_or_else(Decoder::new),
        }
    }

    /// The length of all that is inflated: goes to the end of the stream.
    fn len(&mut self) -> Result<u64> {
        loop {
            if let Some(len) = self.len {
                return Ok(len);
            }
            self.advance()?;
        }
    }
}

impl Decoder {
    fn new() -> Self {
        Self {
            inflater: Box::default(),
            window: vec![0; WINDOW].into(),
            window_at: 0,
            input_at: 0,
            output_at: 0,
            stage: Stage::Header,
        }
    }

    /// Fills `out`, or as much of it as there is before the end of the stream. Returns how much. With `crc`, members
    /// are verified.
    fn fill(
        &mut self,
        input: &mut Input,
        out: &mut [u8],
        crc: &mut Option<&mut flate2::Crc>,
    ) -> Result<usize> {
        let mut done = 0;
        while done < out.len() && self.stage != Stage::End {
            match self.stage {
                Stage::Header => self.header(input, crc)?,
                Stage::Trailer => self.trailer(input, crc)?,
                _ => {
                    let part = self.inflate(input, &mut out[done..])?;
                    if let Some(crc) = crc {
                        crc.update(&out[done..done + part]);
                    }
                    done += part;
                }
            }
        }
        // The end may be here already: whoever asks for the length wants to know.
        while done == out.len() && self.stage == Stage::Trailer {
            self.trailer(input, crc)?;
        }
        Ok(done)
    }

    /// Inflates into `out`, at most to where the window wraps around.
    fn inflate(&mut self, input: &mut Input, out: &mut [u8]) -> Result<usize> {
        let input_len = input.len;
        let packed = input.at(self.input_at)?;
        let more = self.input_at.saturating_add(packed.len() as u64) < input_len;
        let flags = TINFL_FLAG_IGNORE_ADLER32 | if more { TINFL_FLAG_HAS_MORE_INPUT } else { 0 };
        let end = self.window_at + out.len().min(WINDOW - self.window_at);
        // The ring has to be shown as a whole: what is behind `end` is older history. The decoder writes up to the
        // end of what it is shown, so a limit holds it back.
        let limit = end - self.window_at;
        let (status, read, written) =
            decompress_with_limit(&mut self.inflater, packed, &mut self.window, self.window_at, limit, flags);
        let (read, written) = (read.min(packed.len()), written.min(limit));
        out[..written].copy_from_slice(&self.window[self.window_at..self.window_at + written]);
        self.window_at = (self.window_at + written) % WINDOW;
        self.input_at += read as u64;
        self.output_at += written as u64;
        match status {
            TINFLStatus::Done => self.stage = Stage::Trailer,
            TINFLStatus::HasMoreOutput => {}
            TINFLStatus::NeedsMoreInput if read > 0 || written > 0 => {}
            TINFLStatus::NeedsMoreInput | TINFLStatus::FailedCannotMakeProgress => {
                return Err(ends_early(self.input_at));
            }
            _ => return Err(corrupt("is broken", self.input_at)),
        }
        Ok(written)
    }

    /// Reads the header of a member; at the end of the file, and before what is not a member, the stream ends.
    fn header(&mut self, input: &mut Input, crc: &mut Option<&mut flate2::Crc>) -> Result<()> {
        let first = self.input_at == 0;
        let start = input.array::<10>(self.input_at);
        let Some(start) = start?.filter(|bytes| is_header(bytes)) else {
            if first {
                return Err(Error::invalid("the file is not a gzip stream"));
            }
            // gzip(1) ignores what follows the last member, too: tapes are padded.
            self.stage = Stage::End;
            return Ok(());
        };
        let flags = start[3];
        let mut at = self.input_at + 10;
        if flags & 4 != 0 {
            let len = input.array::<2>(at)?.ok_or_else(|| ends_early(at))?;
            at += 2 + u64::from(u16::from_le_bytes(len));
        }
        for present in [flags & 8, flags & 16] {
            if present != 0 {
                at = input.behind_nul(at)?;
            }
        }
        if flags & 2 != 0 {
            at += 2;
        }
        self.input_at = at;
        *self.inflater = DecompressorOxide::default();
        self.stage = Stage::Body;
        if let Some(crc) = crc {
            crc.reset();
        }
        Ok(())
    }

    /// Compares checksum and length of a member with what they should be.
    fn trailer(&mut self, input: &mut Input, crc: &mut Option<&mut flate2::Crc>) -> Result<()> {
        let trailer = input.array::<8>(self.input_at)?.ok_or_else(|| ends_early(self.input_at))?;
        let word = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
        let [a, b, c, d, e, f, g, h] = trailer;
        if let Some(crc) = crc
            && (crc.sum(), crc.amount()) != (word([a, b, c, d]), word([e, f, g, h]))
        {
            return Err(corrupt("does not have the checksum that it should have", self.input_at));
        }
        self.input_at += 8;
        self.stage = Stage::Header;
        // Whether anything follows decides whether this is the end.
        if input.array::<10>(self.input_at)?.is_none_or(|bytes| !is_header(&bytes)) {
            self.stage = Stage::End;
        }
        Ok(())
    }
}

impl Input {
    /// Compressed bytes from `at`; empty at the end of the file.
    fn at(&mut self, at: u64) -> Result<&[u8]> {
        let end = self.from + self.bytes.len() as u64;
        if !(self.from..end).contains(&at) {
            let len = INPUT.min(self.len.saturating_sub(at));
            self.bytes.resize(to_usize(len), 0);
            self.from = at;
            if let Err(error) = self.storage.read_at(&mut self.bytes, at) {
                self.bytes.clear();
                return Err(error);
            }
        }
        Ok(self.bytes.get(to_usize(at - self.from)..).unwrap_or_default())
    }

    /// `N` bytes from `at`, if there are so many.
    fn array<const N: usize>(&self, at: u64) -> Result<Option<[u8; N]>> {
        if at.checked_add(N as u64).is_none_or(|end| end > self.len) {
            return Ok(None);
        }
        let mut bytes = [0; N];
        self.storage.read_at(&mut bytes, at)?;
        Ok(Some(bytes))
    }

    /// The place behind the next NUL.
    fn behind_nul(&mut self, at: u64) -> Result<u64> {
        let (mut from, end) = (at, at.saturating_add(MOST_HEADER));
        while from < end {
            let bytes = self.at(from)?;
            let bytes = bytes.get(..to_usize(end - from)).unwrap_or(bytes);
            match bytes.iter().position(|byte| *byte == 0) {
                Some(nul) => return Ok(from + nul as u64 + 1),
                None if bytes.is_empty() => break,
                None => from += bytes.len() as u64,
            }
        }
        Err(corrupt("has a header without end", at))
    }
}

fn ends_early(at: u64) -> Error {
    Error::new(
        ErrorKind::Truncated,
        format!("the gzip stream ends in the middle, at {at:#x} of the compressed bytes"),
    )
}

fn corrupt(what: &str, at: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the gzip stream {what}, before {at:#x} of the compressed bytes"))
}

impl Storage for Gzip {
    /// The first time, this inflates everything.
    fn len(&self) -> Result<u64> {
        self.decode.lock().len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(buf, offset).map(drop)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<HostExtent> {
        Ok(HostExtent { data: true, len: max_len })
    }

    fn read_only(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.packed_len))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
