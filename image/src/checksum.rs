//! Digests of what a guest sees, the same for every format and layout that holds the same bytes.
//!
//! Two constructions. A *tree* ([`Algorithm::TreeSha256`], [`Algorithm::TreeBlake3`]; `docs/checksum.md` defines
//! them) hashes chunks of 4 MiB independently, so that all cores work, and knows the digests of zeros in advance,
//! so that what is not stored costs nothing: the digest of an empty disk of 60 TiB takes 24 hashes. A *linear*
//! SHA-256 is what `sha256sum` says of the raw file, for those who have nothing else to compare with; zeros are
//! not read there either, but they have to be hashed.
//!
//! Memory: 512 KiB for each thread, and the digests that wait for an earlier one.

mod linear;
mod tree;

use std::fmt;

use block::Result;

use crate::convert::default_threads;
use crate::convert::source::Source;
use crate::open::Layer;
use crate::progress::{Meter, Progress};

/// How a disk becomes a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// The tree over SHA-256.
    #[default]
    TreeSha256,
    /// The tree over BLAKE3.
    TreeBlake3,
    /// Plain SHA-256 of the raw bytes.
    Sha256,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 3] = [Self::TreeSha256, Self::TreeBlake3, Self::Sha256];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::TreeSha256 => "tree-sha256",
            Self::TreeBlake3 => "tree-blake3",
            Self::Sha256 => "sha256",
        }
    }

    /// The algorithm of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// A digest and how it came about. Shown as `tree-sha256:HEX`; the linear one as `HEX`, as sha256sum shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The bytes.
    pub bytes: [u8; 32],
}

impl Digest {
    /// The bytes in hexadecimal digits.
    pub fn hex(&self) -> String {
        self.bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`Display`](fmt::Display) writes.
    pub fn parse(text: &str) -> Option<Self> {
        let (algorithm, hex) = match text.split_once(':') {
            Some((name, hex)) => (Algorithm::from_name(name)?, hex),
            None => (Algorithm::Sha256, text),
        };
        let mut bytes = [0; 32];
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        if !rest.is_empty() || pairs.len() != bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(pairs) {
            let digit = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self { algorithm, bytes })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.algorithm {
            Algorithm::Sha256 => f.write_str(&self.hex()),
            tree => write!(f, "{}:{}", tree.name(), self.hex()),
        }
    }
}

/// How digests are computed.
#[derive(Debug, Clone)]
pub struct ChecksumOptions {
    /// Which.
    pub algorithm: Algorithm,
    /// How many threads read and hash (at least 1).
    pub threads: usize,
}

impl Default for ChecksumOptions {
    fn default() -> Self {
        Self { algorithm: Algorithm::default(), threads: default_threads() }
    }
}

/// The digest of an image's disk.
///
/// # Errors
/// Something cannot be read, with its offset; or the caller interrupted.
pub fn checksum(layer: &Layer, options: &ChecksumOptions, progress: &dyn Progress) -> Result<Digest> {
    let device = layer.device();
    // What sha256sum sees of a raw file is its bytes; a guest sees whole sectors.
    let len = device.size();
    let source = Source::new([device])?;
    let meter = Meter::new(progress, source.size());
    let bytes = match options.algorithm {
        Algorithm::TreeSha256 => tree::digest::<sha2::Sha256>(&source, options.threads, &meter),
        Algorithm::TreeBlake3 => tree::digest::<blake3::Hasher>(&source, options.threads, &meter),
        Algorithm::Sha256 => linear::digest(&source, len, options.threads, &meter),
    }?;
    meter.finish();
    Ok(Digest { algorithm: options.algorithm, bytes })
}

/// A hash function of 32 bytes that is fed piece by piece.
trait Hash: Send {
    fn begin() -> Self;
    fn feed(&mut self, bytes: &[u8]);
    fn end(self) -> [u8; 32];

    /// The hash of several byte strings, one after the other.
    fn of(parts: &[&[u8]]) -> [u8; 32]
    where
        Self: Sized,
    {
        let mut hash = Self::begin();
        parts.iter().for_each(|part| hash.feed(part));
        hash.end()
    }
}

impl Hash for sha2::Sha256 {
    fn begin() -> Self {
        <Self as sha2::Digest>::new()
    }

    fn feed(&mut self, bytes: &[u8]) {
        sha2::Digest::update(self, bytes);
    }

    fn end(self) -> [u8; 32] {
        sha2::Digest::finalize(self).into()
    }
}

impl Hash for blake3::Hasher {
    fn begin() -> Self {
        Self::new()
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.update(bytes);
    }

    fn end(self) -> [u8; 32] {
        self.finalize().into()
    }
}

/// Bytes that are read at once: they stay in the processor's cache until they are hashed.
const PIECE: usize = 512 << 10;
const BUFFER_ALIGNMENT: usize = 4096;

/// Zeros to hash where none are stored.
static ZEROS: [u8; PIECE] = [0; PIECE];

/// Feeds `len` zeros to a hash.
fn feed_zeros<H: Hash>(hash: &mut H, mut len: u64) {
    while len > 0 {
        let piece = usize::try_from(len).unwrap_or(PIECE).min(PIECE);
        hash.feed(&ZEROS[..piece]);
        len -= piece as u64;
    }
}

#[cfg(test)]
mod tests;
