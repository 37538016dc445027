//! Randomness of the operating system.

use block::{Error, ErrorKind, Result};

use crate::secret::Secret;

/// Fills `bytes` with random ones.
///
/// # Errors
/// The system has no randomness to give.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes)
        .map_err(|error| Error::new(ErrorKind::Io, format!("Unable to read random bytes: {error}")))
}

/// An array of random bytes.
pub(crate) fn array<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

/// A random key.
pub(crate) fn key(len: usize) -> Result<Secret> {
    let mut key = Secret::zeroed(len);
    fill(key.bytes_mut())?;
    Ok(key)
}

/// A random UUID (RFC 9562, version 4), as text.
pub(crate) fn uuid() -> Result<String> {
    let mut bytes = array::<16>()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_of_version_4() {
        let uuid = uuid().unwrap();
        assert_eq!(uuid.len(), 36);
        let groups: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12]);
        assert_eq!(&uuid[14..15], "4");
        assert!(matches!(&uuid[19..20], "8" | "9" | "a" | "b"), "{uuid}");
    }
}
