//! Block ciphers and how they are put to use on sectors, by the names of LUKS and qemu.

use std::fmt;

use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use block::{Error, Result};

use crate::hash::Hash;

/// Sixteen bytes.
pub(crate) type Block = Array<u8, U16>;
/// Bytes of a block of every cipher here.
pub const BLOCK: usize = 16;

/// A cipher with its key: blocks in, blocks out, the more at once the better.
pub(crate) trait BlockCipher: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
    fn decrypt(&self, blocks: &mut [Block]);
}

impl<C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync> BlockCipher
    for C
{
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        self.decrypt_blocks(blocks);
    }
}

/// A block cipher with the length of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "they are called what they are called")]
pub enum Algorithm {
    Aes128,
    Aes192,
    Aes256,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
    ];

    /// The cipher with that name on qemu's command line.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// The cipher with that name in a LUKS header and a key of `key_len` bytes.
    pub fn from_family(family: &str, key_len: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.family() == family && algorithm.key_len() == key_len)
    }

    /// qemu's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
        }
    }

    /// Its name in a LUKS header, without the length of the key.
    pub const fn family(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "aes",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "twofish",
        }
    }

    /// Bytes of a key.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// The cipher with a key.
    pub(crate) fn with_key(self, key: &[u8]) -> Result<Box<dyn BlockCipher>> {
        if key.len() != self.key_len() {
            let (is, should) = (key.len(), self.key_len());
            return Err(Error::invalid(format!("Cipher key length {is} should be {should}")));
        }
        match self {
            Self::Aes128 => with_key::<aes::Aes128>(key),
            Self::Aes192 => with_key::<aes::Aes192>(key),
            Self::Aes256 => with_key::<aes::Aes256>(key),
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => with_key::<serpent::Serpent>(key),
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => with_key::<twofish::Twofish>(key),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn with_key<C: KeyInit + BlockCipher + 'static>(key: &[u8]) -> Result<Box<dyn BlockCipher>> {
    match C::new_from_slice(key) {
        Ok(cipher) => Ok(Box::new(cipher)),
        Err(_) => Err(Error::unsupported(format!("the cipher has no keys of {} bytes", key.len()))),
    }
}

/// Decrypts bytes that are no sectors: AES-256 in CBC with an IV of one's own.
///
/// # Errors
/// `data` is not a whole number of blocks.
pub fn decrypt_aes256_cbc(key: &[u8; 32], iv: &[u8; BLOCK], data: &mut [u8]) -> Result<()> {
    let (blocks, rest) = Block::slice_as_chunks_mut(data);
    if !rest.is_empty() {
        return Err(Error::invalid(format!("encrypted data has {} bytes too many", rest.len())));
    }
    let cipher = Algorithm::Aes256.with_key(key)?;
    let mut chain = Block::from(*iv);
    for block in blocks {
        let encrypted = *block;
        cipher.decrypt(std::slice::from_mut(block));
        block.iter_mut().zip(chain).for_each(|(byte, mix)| *byte ^= mix);
        chain = encrypted;
    }
    Ok(())
}

/// How the blocks of a sector are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Every block for itself (weak: equal blocks look equal).
    Ecb,
    /// Each block is mixed with its predecessor.
    Cbc,
    /// Two keys; each block is mixed with a tweak of its place.
    Xts,
    /// The cipher makes a stream that is mixed with the bytes (weak: a sector written twice gives both away).
    Ctr,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Its name in a header and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }
}

/// How the IV of a sector is made of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IvGenerator {
    /// The low 32 bits of the number, little-endian, then zeros.
    Plain,
    /// The number in 64 bits, little-endian, then zeros.
    Plain64,
    /// The number as for `Plain64`, encrypted with this hash of the key.
    Essiv(Hash),
}

impl IvGenerator {
    /// Its name, without the hash.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

/// All that has to be known to encrypt sectors, but for the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    /// The cipher.
    pub algorithm: Algorithm,
    /// How blocks are chained.
    pub mode: Mode,
    /// How IVs are made.
    pub iv: IvGenerator,
}

impl CipherSpec {
    /// What qemu-img and cryptsetup use unless told otherwise.
    pub const DEFAULT: Self =
        Self { algorithm: Algorithm::Aes256, mode: Mode::Xts, iv: IvGenerator::Plain64 };

    /// Bytes of the volume key: XTS has two keys.
    pub const fn key_len(&self) -> usize {
        match self.mode {
            Mode::Xts => 2 * self.algorithm.key_len(),
            Mode::Ecb | Mode::Cbc | Mode::Ctr => self.algorithm.key_len(),
        }
    }

    /// The cipher that encrypts sector numbers for ESSIV: of the same family, with a key as long as the digest.
    ///
    /// # Errors
    /// There is none, in qemu's words.
    pub(crate) fn essiv_cipher(&self, hash: Hash) -> Result<Algorithm> {
        let family = self.algorithm.family();
        Algorithm::from_family(family, hash.digest_len()).ok_or_else(|| {
            let name = match family {
                "aes" => "AES",
                "serpent" => "Serpent",
                _ => "Twofish",
            };
            Error::unsupported(format!("No {name} cipher with key size {} available", hash.digest_len()))
        })
    }
}
