//! The anti-forensic splitter of LUKS (LUKS1 on-disk format, section 2.4): a key blown up to many stripes, all of
//! which are needed to get it back. Overwriting any of them destroys the key.

use block::Result;

use crate::hash::Hash;
use crate::random;
use crate::secret::Secret;

/// Splits `key` into `stripes` pieces of its length.
///
/// # Errors
/// The system has no randomness to give.
pub(crate) fn split(key: &[u8], stripes: usize, hash: Hash) -> Result<Secret> {
    let mut material = random::key(key.len() * stripes)?;
    let random_len = key.len() * stripes.saturating_sub(1);
    let (random, last) = material.bytes_mut().split_at_mut(random_len);
    last.copy_from_slice(&folded(random, key.len(), hash));
    xor(last, key);
    Ok(material)
}

/// The key of `key_len` bytes that was split into `material`.
pub(crate) fn merge(material: &[u8], key_len: usize, hash: Hash) -> Secret {
    let (random, last) = material.split_at(material.len().saturating_sub(key_len));
    let mut key = folded(random, key_len, hash);
    xor(key.bytes_mut(), last);
    key
}

/// All stripes run through the diffusion one after the other.
fn folded(stripes: &[u8], key_len: usize, hash: Hash) -> Secret {
    let mut sum = Secret::zeroed(key_len);
    for stripe in stripes.chunks_exact(key_len) {
        xor(sum.bytes_mut(), stripe);
        diffuse(sum.bytes_mut(), hash);
    }
    sum
}

/// Each piece of a digest's length becomes its digest, with its number before it.
fn diffuse(bytes: &mut [u8], hash: Hash) {
    for (index, piece) in (0u32..).zip(bytes.chunks_mut(hash.digest_len())) {
        let digest = hash.digest(&[&index.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

fn xor(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to ^= from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_is_merged_and_every_bit_counts() {
        for hash in Hash::ALL {
            for len in [16, 24, 32, 48, 64] {
                let key = random::key(len).unwrap();
                let mut material = split(&key, 17, hash).unwrap();
                assert_eq!(material.len(), 17 * len);
                assert_eq!(merge(&material, len, hash), key);
                material.bytes_mut()[len] ^= 1;
                assert_ne!(merge(&material, len, hash), key);
            }
        }
    }
}
