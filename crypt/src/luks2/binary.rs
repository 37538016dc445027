//! The binary header (specification, section 2.1), and which of its two copies counts.

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::hash::Hash;

const MAGIC: [&[u8]; 2] = [b"LUKS\xba\xbe", b"SKUL\xba\xbe"];
const BINARY_LEN: usize = 4096;
/// Header sizes that there are (section 2.1, table 1).
const SMALLEST: u64 = 16 << 10;
const LARGEST: u64 = 4 << 20;
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// A copy whose checksum is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) sequence: u64,
    /// Bytes of the binary header and the JSON after it.
    pub(super) size: u64,
    pub(super) label: String,
    pub(super) uuid: String,
    pub(super) json: Vec<u8>,
}

/// The newer of the copies that are whole.
///
/// # Errors
/// There is none; or the host failed.
pub(super) fn read(storage: &dyn Storage) -> Result<Copy> {
    let first = read_copy(storage, 0, 0);
    let second = match &first {
        Ok(first) => read_copy(storage, first.size, 1),
        Err(error) if error.kind() == ErrorKind::Io => return first,
        // Its place depends on what the first one says; all places that there are, then.
        Err(_) => std::iter::successors(Some(SMALLEST), |size| Some(size * 2))
            .take_while(|size| *size <= LARGEST)
            .map(|place| read_copy(storage, place, 1))
            .find(Result::is_ok)
            .unwrap_or_else(|| Err(Error::invalid("there is no second copy"))),
    };
    match (first, second) {
        (Ok(first), Ok(second)) if second.sequence > first.sequence => Ok(second),
        (Err(_), Ok(second)) => Ok(second),
        (first, _) => first,
    }
}

fn read_copy(storage: &dyn Storage, place: u64, which: usize) -> Result<Copy> {
    let mut bytes = vec![0; BINARY_LEN];
    storage.read_at(&mut bytes, place)?;
    if !bytes.starts_with(MAGIC[which]) || bytes[6..8] != [0, 2] {
        return Err(Error::invalid("Volume is not in LUKS format"));
    }
    let number = |at: usize| bytes[at..at + 8].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let (size, sequence, own_place) = (number(8), number(16), number(256));
    if !size.is_power_of_two() || !(SMALLEST..=LARGEST).contains(&size) {
        return Err(Error::invalid(format!("LUKS2 header has an impossible size ({size:#x})")));
    }
    if own_place != place
        || place.checked_add(size).is_none_or(|end| storage.len().is_ok_and(|len| end > len))
    {
        return Err(Error::invalid(format!(
            "LUKS2 header at {place:#x} says that it lies at {own_place:#x}"
        )));
    }
    let algorithm = text(&bytes[72..104]);
    let hash = Hash::from_name(&algorithm)
        .ok_or_else(|| Error::unsupported(format!("LUKS2 checksum '{algorithm}' not supported")))?;
    let mut json = vec![0; to_usize(size) - BINARY_LEN];
    storage.read_at(&mut json, place + BINARY_LEN as u64)?;
    let (label, uuid) = (text(&bytes[24..72]), text(&bytes[168..208]));
    let checksum = bytes[CHECKSUM].to_vec();
    bytes[CHECKSUM].fill(0);
    if *hash.digest(&[&bytes, &json]) != checksum[..hash.digest_len()] {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("LUKS2 header at {place:#x} has a wrong checksum"),
        ));
    }
    // What follows the text are zeros.
    let end = json.iter().position(|byte| *byte == 0).unwrap_or(json.len());
    json.truncate(end);
    Ok(Copy { sequence, size, label, uuid, json })
}

/// A text that ends with a zero byte, or not.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
