//! The tree: chunks hashed by all threads, their digests combined in the order of the disk.
//!
//! The tree is that of RFC 6962 (Merkle hash tree, section 2.1) over chunks of [`CHUNK`] bytes; the size of the disk
//! goes into the last hash. Full subtrees of zeros have digests that depend on their height only; a run of zero
//! chunks is added as the few full subtrees that it consists of.

use std::collections::BTreeMap;

use block::align::AlignedBuf;
use block::num::to_usize;
use block::zero::is_zero;
use block::{Error, Result, ResultExt as _};
use parking_lot::Mutex;

use super::{BUFFER_ALIGNMENT, Hash, PIECE, feed_zeros};
use crate::convert::source::{Kind, Source};
use crate::convert::workers;
use crate::progress::Meter;

/// Bytes in a chunk; the last one of a disk may be shorter.
pub(super) const CHUNK: u64 = 4 << 20;
/// What goes in front of a chunk, of two digests, and of the size.
const LEAF: &[u8] = &[0];
const NODE: &[u8] = &[1];
const ROOT: &[u8] = &[2];
/// How far ahead extents are asked for at first; grows while the answers fill it.
const FIRST_WINDOW: u64 = 1 << 30;
/// More levels than a disk of 2^63 bytes has.
const LEVELS: usize = 64;

/// The digest of the whole source.
pub(super) fn digest<H: Hash>(source: &Source, threads: usize, meter: &Meter<'_>) -> Result<[u8; 32]> {
    let job = Job::<H> {
        source,
        meter,
        walk: Mutex::new(Walk { source, position: 0, ticket: 0, window: FIRST_WINDOW, known: None }),
        tree: Mutex::new(Ordered { next: 0, waiting: BTreeMap::new(), tree: Tree::new() }),
        failure: Mutex::new(None),
    };
    let count = usize::try_from(source.size().div_ceil(CHUNK)).unwrap_or(usize::MAX);
    workers::run(count.clamp(1, threads.max(1)), || job.work())?;
    match job.failure.into_inner() {
        Some((_, error)) => Err(error),
        None => {
            let top = job.tree.into_inner().tree.top();
            Ok(H::of(&[ROOT, &source.size().to_be_bytes(), &top]))
        }
    }
}

/// Something to add to the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    /// A chunk that has to be read: where, and its length in bytes.
    Chunk(u64, u64),
    /// So many whole chunks of zeros.
    Zeros(u64),
}

/// A digest computed under way.
struct Job<'a, H> {
    source: &'a Source,
    meter: &'a Meter<'a>,
    walk: Mutex<Walk<'a>>,
    tree: Mutex<Ordered<H>>,
    /// The failure nearest to the start of the disk, of those met so far.
    failure: Mutex<Option<(u64, Error)>>,
}

impl<H: Hash> Job<'_, H> {
    fn work(&self) {
        let mut buffer = None;
        loop {
            let (ticket, item) = match self.next() {
                Ok(Some(next)) => next,
                Ok(None) => return,
                Err((offset, error)) => return self.fail(offset, error),
            };
            let (added, bytes) = match item {
                Item::Zeros(count) => (Ok(Added::Zeros(count)), count.saturating_mul(CHUNK)),
                Item::Chunk(offset, len) => {
                    let buffer = buffer.get_or_insert_with(|| AlignedBuf::new(PIECE, BUFFER_ALIGNMENT));
                    (self.hash(offset, len, buffer), len)
                }
            };
            match added {
                Ok(added) => self.tree.lock().add(ticket, added),
                Err((offset, error)) => return self.fail(offset, error),
            }
            self.meter.add(bytes);
        }
    }

    fn next(&self) -> std::result::Result<Option<(u64, Item)>, (u64, Error)> {
        self.meter.check().map_err(|error| (0, error))?;
        if self.failure.lock().is_some() {
            return Ok(None);
        }
        self.walk.lock().next()
    }

    fn fail(&self, offset: u64, error: Error) {
        let mut failure = self.failure.lock();
        if failure.as_ref().is_none_or(|(before, _)| offset < *before) {
            *failure = Some((offset, error));
        }
    }

    /// Hashes a chunk. As long as it holds nothing but zeros, nothing is hashed: their digest is known.
    fn hash(
        &self,
        start: u64,
        len: u64,
        buffer: &mut AlignedBuf,
    ) -> std::result::Result<Added, (u64, Error)> {
        let mut hash = None;
        let mut done = 0;
        while done < len {
            let (offset, piece) = (start + done, (len - done).min(PIECE as u64));
            let bytes = &mut buffer[..to_usize(piece)];
            let read = self.source.read_at(bytes, offset);
            read.context(|| format!("error while reading at byte {offset}"))
                .map_err(|error| (offset, error))?;
            if hash.is_none() && !is_zero(bytes) {
                let hash = hash.insert(leaf::<H>());
                feed_zeros(hash, done);
            }
            if let Some(hash) = &mut hash {
                hash.feed(bytes);
            }
            done += piece;
        }
        Ok(match hash {
            Some(hash) => Added::Digest(hash.end()),
            None if len == CHUNK => Added::Zeros(1),
            None => Added::Digest(zero_leaf::<H>(len)),
        })
    }
}

/// A hash into which a chunk goes.
fn leaf<H: Hash>() -> H {
    let mut hash = H::begin();
    hash.feed(LEAF);
    hash
}

fn zero_leaf<H: Hash>(len: u64) -> [u8; 32] {
    let mut hash = leaf::<H>();
    feed_zeros(&mut hash, len);
    hash.end()
}

/// The way along the disk: what is known to be zero is not given out to be read.
struct Walk<'a> {
    source: &'a Source,
    position: u64,
    ticket: u64,
    window: u64,
    /// Up to where what lies at the position has been found to be zero or not.
    known: Option<(u64, bool)>,
}

impl Walk<'_> {
    fn next(&mut self) -> std::result::Result<Option<(u64, Item)>, (u64, Error)> {
        let (start, size) = (self.position, self.source.size());
        if start >= size {
            return Ok(None);
        }
        let zeros = self.zeros_from(start)?;
        let whole = if zeros >= size { size } else { zeros / CHUNK * CHUNK };
        let chunks = (whole.saturating_sub(start)) / CHUNK;
        let item = match chunks {
            0 => Item::Chunk(start, CHUNK.min(size - start)),
            chunks => Item::Zeros(chunks),
        };
        self.position = match item {
            Item::Chunk(_, len) => start + len,
            Item::Zeros(chunks) => start + chunks * CHUNK,
        };
        let ticket = self.ticket;
        self.ticket += 1;
        Ok(Some((ticket, item)))
    }

    /// Where the zeros that begin at `offset` end.
    fn zeros_from(&mut self, offset: u64) -> std::result::Result<u64, (u64, Error)> {
        let (mut at, size) = (offset, self.source.size());
        while at < size {
            let (end, zero) = self.at(at)?;
            if !zero {
                break;
            }
            at = end;
        }
        Ok(at)
    }

    /// The end of the extent that holds `offset`, and whether it reads as zeros.
    fn at(&mut self, offset: u64) -> std::result::Result<(u64, bool), (u64, Error)> {
        if let Some(known) = self.known.filter(|(end, _)| offset < *end) {
            return Ok(known);
        }
        let wanted = (self.source.size() - offset).min(self.window);
        let found = self.source.extent(offset, wanted, u32::MAX);
        let found = found
            .context(|| format!("error while reading block status at offset {offset}"))
            .map_err(|error| (offset, error))?;
        self.window = if found.len >= wanted { self.window.saturating_mul(2) } else { FIRST_WINDOW };
        let known = (offset + found.len, found.kind == Kind::Zero);
        self.known = Some(known);
        Ok(known)
    }
}

/// What is added for an item.
#[derive(Debug)]
enum Added {
    Digest([u8; 32]),
    Zeros(u64),
}

/// Puts what the threads find back into the order of the disk.
struct Ordered<H> {
    next: u64,
    waiting: BTreeMap<u64, Added>,
    tree: Tree<H>,
}

impl<H: Hash> Ordered<H> {
    fn add(&mut self, ticket: u64, added: Added) {
        self.waiting.insert(ticket, added);
        while let Some(added) = self.waiting.remove(&self.next) {
            match added {
                Added::Digest(digest) => self.tree.push(digest, 0),
                Added::Zeros(count) => self.tree.push_zeros(count),
            }
            self.next += 1;
        }
    }
}

/// The full subtrees of what has been added so far: of falling heights, as the ones in a binary number.
pub(super) struct Tree<H> {
    full: Vec<([u8; 32], u32)>,
    leaves: u64,
    /// The digests of full subtrees of zeros, by height; computed when first needed.
    zeros: Vec<[u8; 32]>,
    hash: std::marker::PhantomData<H>,
}

impl<H: Hash> Tree<H> {
    pub(super) fn new() -> Self {
        Self { full: vec![], leaves: 0, zeros: vec![], hash: std::marker::PhantomData }
    }

    /// Adds a full subtree of `1 << height` leaves; the number of leaves so far is a multiple of that.
    pub(super) fn push(&mut self, mut digest: [u8; 32], mut height: u32) {
        self.leaves += 1 << height;
        while let Some((left, _)) = self.full.pop_if(|(_, other)| *other == height) {
            digest = H::of(&[NODE, &left, &digest]);
            height += 1;
        }
        self.full.push((digest, height));
    }

    /// Adds leaves of zeros.
    pub(super) fn push_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let height = self.leaves.trailing_zeros().min(count.ilog2());
            let digest = self.zero(height);
            self.push(digest, height);
            count -= 1 << height;
        }
    }

    fn zero(&mut self, height: u32) -> [u8; 32] {
        let height = usize::try_from(height).unwrap_or(LEVELS).min(LEVELS);
        while self.zeros.len() <= height {
            let next = match self.zeros.last() {
                None => zero_leaf::<H>(CHUNK),
                Some(below) => H::of(&[NODE, below, below]),
            };
            self.zeros.push(next);
        }
        self.zeros[height]
    }

    /// The digest of all that was added.
    pub(super) fn top(mut self) -> [u8; 32] {
        let Some((mut digest, _)) = self.full.pop() else { return H::of(&[]) };
        while let Some((left, _)) = self.full.pop() {
            digest = H::of(&[NODE, &left, &digest]);
        }
        digest
    }
}
