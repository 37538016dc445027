//! The hash functions of key derivation, of the anti-forensic splitter and of ESSIV, by LUKS's names.

use std::fmt;

use hmac::digest::block_api::EagerHash;
use hmac::{Hmac, KeyInit as _, Mac as _};
use zeroize::Zeroizing;

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "they are called what they are called")]
pub enum Hash {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// Calls a generic function for the type of a hash.
macro_rules! with_type {
    ($hash:expr, $function:ident($($argument:expr),*)) => {
        match $hash {
            Hash::Md5 => $function::<md5::Md5>($($argument),*),
            Hash::Sha1 => $function::<sha1::Sha1>($($argument),*),
            Hash::Sha224 => $function::<sha2::Sha224>($($argument),*),
            Hash::Sha256 => $function::<sha2::Sha256>($($argument),*),
            Hash::Sha384 => $function::<sha2::Sha384>($($argument),*),
            Hash::Sha512 => $function::<sha2::Sha512>($($argument),*),
            Hash::Ripemd160 => $function::<ripemd::Ripemd160>($($argument),*),
            Hash::Sm3 => $function::<sm3::Sm3>($($argument),*),
        }
    };
}

impl Hash {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// The hash of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// Its name in a header and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// Bytes of a digest.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of the parts, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_type!(self, digest(parts))
    }

    /// One block of PBKDF2's output (RFC 8018, section 5.2: the function F), block numbers counting from 1.
    pub(crate) fn pbkdf2_block(
        self,
        password: &[u8],
        salt: &[u8],
        rounds: u32,
        index: u32,
    ) -> Zeroizing<Vec<u8>> {
        with_type!(self, pbkdf2_block(password, salt, rounds, index))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn digest<D: md5::Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut hash = D::new();
    for part in parts {
        hash.update(part);
    }
    Zeroizing::new(hash.finalize().to_vec())
}

fn pbkdf2_block<D: EagerHash>(password: &[u8], salt: &[u8], rounds: u32, index: u32) -> Zeroizing<Vec<u8>>
where
    Hmac<D>: Clone,
{
    // HMAC takes a key of any length.
    let Ok(prf) = Hmac::<D>::new_from_slice(password) else { return Zeroizing::default() };
    let mut last = prf.clone().chain_update(salt).chain_update(index.to_be_bytes()).finalize().into_bytes();
    let mut sum = Zeroizing::new(last.to_vec());
    for _ in 1..rounds {
        last = prf.clone().chain_update(&last).finalize().into_bytes();
        for (sum, byte) in sum.iter_mut().zip(&last) {
            *sum ^= byte;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn digests_are_the_published_ones() {
        let abc = |hash: Hash| hex(&hash.digest(&[b"a", b"", b"bc"]));
        assert_eq!(abc(Hash::Md5), "900150983cd24fb0d6963f7d28e17f72");
        assert_eq!(abc(Hash::Sha1), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(abc(Hash::Ripemd160), "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc");
        assert_eq!(abc(Hash::Sha256), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(abc(Hash::Sm3), "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0");
        for hash in Hash::ALL {
            assert_eq!(hash.digest(&[]).len(), hash.digest_len());
            assert_eq!(Hash::from_name(hash.name()), Some(hash));
        }
    }
}
