//! Sectors in, sectors out: a cipher with its key, its mode and its way of making IVs.
//!
//! A request of many sectors is cut into batches that fit the processor's nearest cache. Within a batch the IVs
//! of all sectors are made first, then all blocks go through the cipher at once, which is what keeps a pipelined
//! AES unit busy. Only CBC encryption is serial by nature; there the batch runs across sectors instead: the
//! first blocks of all of them, then the second blocks, and so on.

use std::fmt;

use block::{Error, Result};
use zeroize::Zeroize as _;

use crate::cipher::{Algorithm, BLOCK, Block, BlockCipher, CipherSpec, IvGenerator, Mode};

/// Bytes that are encrypted as one, with one IV, unless a volume says otherwise; and what sectors are numbered by in any case.
pub const SECTOR: usize = 512;
/// The largest sectors that there are (dm-crypt, `sector_size`).
const LARGEST_SECTOR: usize = 4096;
/// Sectors that are worked on at once, if they are of the least size: 8 KiB of data and 8 KiB of tweaks.
const BATCH: usize = 16;
/// Blocks of a batch.
const BATCH_BLOCKS: usize = BATCH * SECTOR / BLOCK;

/// An unlocked encryption. Any number of threads may use it at once.
pub struct Volume {
    cipher: Box<dyn BlockCipher>,
    mode: ModeWithKey,
    iv: IvWithKey,
    spec: CipherSpec,
    /// Blocks of a sector.
    sector_blocks: usize,
}

/// A mode with the second key, where it has one.
enum ModeWithKey {
    Ecb,
    Cbc,
    Xts(Box<dyn BlockCipher>),
    Ctr,
}

/// An IV generator with its key, where it has one.
enum IvWithKey {
    Plain,
    Plain64,
    Essiv(Box<dyn BlockCipher>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl Volume {
    /// The encryption described by `spec` with a volume key.
    ///
    /// # Errors
    /// The key has not the length that the cipher needs, or there is no ESSIV cipher for a hash of that length.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        let algorithm = spec.algorithm;
        let (cipher, mode) = match spec.mode {
            Mode::Ecb => (algorithm.with_key(key)?, ModeWithKey::Ecb),
            Mode::Cbc => (algorithm.with_key(key)?, ModeWithKey::Cbc),
            Mode::Ctr => (algorithm.with_key(key)?, ModeWithKey::Ctr),
            Mode::Xts => {
                let (first, second) = key.split_at(key.len() / 2);
                (algorithm.with_key(first)?, ModeWithKey::Xts(algorithm.with_key(second)?))
            }
        };
        let iv = match spec.iv {
            IvGenerator::Plain => IvWithKey::Plain,
            IvGenerator::Plain64 => IvWithKey::Plain64,
            IvGenerator::Essiv(hash) => {
                IvWithKey::Essiv(spec.essiv_cipher(hash)?.with_key(&hash.digest(&[key]))?)
            }
        };
        Ok(Self { cipher, mode, iv, spec, sector_blocks: SECTOR / BLOCK })
    }

    /// The same encryption of larger sectors: one IV for each, made of the number that its first 512 bytes have.
    ///
    /// # Errors
    /// `bytes` is not 512, 1024, 2048 or 4096.
    pub fn with_sector_size(self, bytes: usize) -> Result<Self> {
        if !bytes.is_power_of_two() || !(SECTOR..=LARGEST_SECTOR).contains(&bytes) {
            return Err(Error::unsupported(format!("encrypted sectors of {bytes} bytes are not supported")));
        }
        Ok(Self { sector_blocks: bytes / BLOCK, ..self })
    }

    /// Bytes that are encrypted as one, with one IV.
    pub fn sector_size(&self) -> usize {
        self.sector_blocks * BLOCK
    }

    /// qcow2's old encryption: AES-128 in CBC, the key being the first 16 bytes of the passphrase, with zeros
    /// after a shorter one.
    ///
    /// # Errors
    /// None that can happen; the key has the right length.
    pub fn qcow2_aes(passphrase: &[u8]) -> Result<Self> {
        let mut key = [0; 16];
        let len = passphrase.len().min(key.len());
        key[..len].copy_from_slice(&passphrase[..len]);
        let spec = CipherSpec { algorithm: Algorithm::Aes128, mode: Mode::Cbc, iv: IvGenerator::Plain64 };
        let volume = Self::new(spec, &key);
        key.zeroize();
        volume
    }

    /// What it is, but for the key.
    pub fn spec(&self) -> CipherSpec {
        self.spec
    }

    /// Encrypts consecutive sectors in place, the first of which has the number `sector`, counted in units of 512 bytes.
    ///
    /// # Panics
    /// `data` is not a whole number of sectors: a mistake of the caller, never of an image.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, Direction::Encrypt);
    }

    /// Decrypts consecutive sectors in place, the first of which has the number `sector`, counted in units of 512 bytes.
    ///
    /// # Panics
    /// As [`encrypt`](Self::encrypt).
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, Direction::Decrypt);
    }

    fn run(&self, mut sector: u64, data: &mut [u8], direction: Direction) {
        assert!(data.len().is_multiple_of(self.sector_size()), "encryption works on whole sectors");
        for batch in data.chunks_mut(BATCH * SECTOR) {
            let (blocks, _) = Block::slice_as_chunks_mut(batch);
            self.run_batch(sector, blocks, direction);
            sector = sector.wrapping_add(BATCH as u64);
        }
    }

    /// At most [`BATCH_BLOCKS`] blocks, whole sectors.
    fn run_batch(&self, sector: u64, blocks: &mut [Block], direction: Direction) {
        let mut ivs = [Block::default(); BATCH];
        let each = self.sector_blocks;
        let ivs = &mut ivs[..blocks.len() / each];
        let cipher = &*self.cipher;
        match (&self.mode, direction) {
            (ModeWithKey::Ecb, Direction::Encrypt) => return cipher.encrypt(blocks),
            (ModeWithKey::Ecb, Direction::Decrypt) => return cipher.decrypt(blocks),
            _ => self.iv.fill(sector, each, ivs),
        }
        match (&self.mode, direction) {
            (ModeWithKey::Xts(tweak), _) => xts(cipher, &**tweak, ivs, (blocks, each), direction),
            (ModeWithKey::Cbc, Direction::Encrypt) => cbc_encrypt(cipher, ivs, (blocks, each)),
            (ModeWithKey::Cbc, Direction::Decrypt) => cbc_decrypt(cipher, ivs, (blocks, each)),
            (ModeWithKey::Ctr | ModeWithKey::Ecb, _) => ctr(cipher, ivs, (blocks, each)),
        }
    }
}

impl IvWithKey {
    /// The IVs of the sectors from `sector`, of `each` blocks.
    fn fill(&self, sector: u64, each: usize, ivs: &mut [Block]) {
        let step = (each * BLOCK / SECTOR) as u64;
        for (index, iv) in (0u64..).zip(ivs.iter_mut()) {
            let number = sector.wrapping_add(index * step).to_le_bytes();
            let len = if matches!(self, Self::Plain) { 4 } else { 8 };
            iv[..len].copy_from_slice(&number[..len]);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt(ivs);
        }
    }
}

/// IEEE 1619: each block is mixed with its tweak before and after the cipher. The tweak of a sector's first block
/// is its encrypted IV, that of each next block the double of the one before.
fn xts(
    cipher: &dyn BlockCipher,
    tweak: &dyn BlockCipher,
    ivs: &mut [Block],
    (blocks, each): (&mut [Block], usize),
    direction: Direction,
) {
    tweak.encrypt(ivs);
    let mut tweaks = [Block::default(); BATCH_BLOCKS];
    let tweaks = &mut tweaks[..blocks.len()];
    for (iv, tweaks) in ivs.iter().zip(tweaks.chunks_exact_mut(each)) {
        let mut value = u128::from_le_bytes(iv.0);
        for tweak in tweaks {
            tweak.0 = value.to_le_bytes();
            value = double(value);
        }
    }
    xor(blocks, tweaks);
    match direction {
        Direction::Encrypt => cipher.encrypt(blocks),
        Direction::Decrypt => cipher.decrypt(blocks),
    }
    xor(blocks, tweaks);
}

/// Multiplies by x in the field of 2^128 elements that XTS uses.
#[inline]
fn double(value: u128) -> u128 {
    let carry = (value >> 127) * 0x87;
    (value << 1) ^ carry
}

fn cbc_encrypt(cipher: &dyn BlockCipher, ivs: &mut [Block], (blocks, each): (&mut [Block], usize)) {
    let chain = ivs;
    for at in 0..each {
        let column = || (at..).step_by(each);
        for (chain, index) in chain.iter_mut().zip(column()) {
            xor_block(chain, &blocks[index]);
        }
        cipher.encrypt(chain);
        for (chain, index) in chain.iter().zip(column()) {
            blocks[index] = *chain;
        }
    }
}

fn cbc_decrypt(cipher: &dyn BlockCipher, ivs: &[Block], (blocks, each): (&mut [Block], usize)) {
    let mut encrypted = [Block::default(); BATCH_BLOCKS];
    let encrypted = &mut encrypted[..blocks.len()];
    encrypted.copy_from_slice(blocks);
    cipher.decrypt(blocks);
    let sectors = blocks.chunks_exact_mut(each).zip(encrypted.chunks_exact(each));
    for (iv, (blocks, encrypted)) in ivs.iter().zip(sectors) {
        xor_block(&mut blocks[0], iv);
        xor(&mut blocks[1..], encrypted);
    }
}

/// The IV is the first value of a big-endian counter.
fn ctr(cipher: &dyn BlockCipher, ivs: &[Block], (blocks, each): (&mut [Block], usize)) {
    let mut stream = [Block::default(); BATCH_BLOCKS];
    let stream = &mut stream[..blocks.len()];
    for (iv, stream) in ivs.iter().zip(stream.chunks_exact_mut(each)) {
        let start = u128::from_be_bytes(iv.0);
        for (index, block) in (0..).zip(stream) {
            block.0 = start.wrapping_add(index).to_be_bytes();
        }
    }
    cipher.encrypt(stream);
    xor(blocks, stream);
}

fn xor(to: &mut [Block], from: &[Block]) {
    for (to, from) in to.iter_mut().zip(from) {
        xor_block(to, from);
    }
}

#[inline]
fn xor_block(to: &mut Block, from: &Block) {
    let value = u128::from_le_bytes(to.0) ^ u128::from_le_bytes(from.0);
    to.0 = value.to_le_bytes();
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("spec", &self.spec).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
