//! The transaction logs of Windows 8.1 and later (`HvLE` entries): what has not reached the hive itself yet.

use block::{Error, ErrorKind, Result};

use crate::cells::{BLOCK, Hive, corrupt, le32, put32};

/// Where the entries begin, and what their lengths are multiples of.
const SECTOR: usize = 512;
/// Bytes of an entry before its list of pages.
const HEADER: usize = 40;
/// The seed of the hashes (Marvin32).
const SEED: (u32, u32) = (0x7a4e_55c5, 0x82ef_4d88);

/// An entry: pages of the bins as they should be.
#[derive(Debug)]
struct Entry<'a> {
    sequence: u32,
    /// Bytes of all bins.
    bins: usize,
    pages: Vec<(usize, &'a [u8])>,
}

impl Hive {
    /// Brings the changes of the logs into a hive that was not closed properly. Nothing happens if it was.
    ///
    /// # Errors
    /// `Unsupported` if the logs do not continue where the hive stands; `Corrupt` if the hive makes no sense afterwards.
    /// The hive is of no use then.
    pub fn recover(&mut self, logs: &[&[u8]]) -> Result<()> {
        if self.is_clean() {
            return Ok(());
        }
        let refuse = |what: &str| {
            Error::new(ErrorKind::Unsupported, format!("the hive was not closed properly, and {what}"))
                .hint("Start the guest once more and shut it down ('shutdown /s /t 0'), then convert it.")
        };
        if !self.has_sound_base() {
            return Err(refuse("its base block is damaged"));
        }
        let mut entries: Vec<_> = logs.iter().flat_map(|log| entries(log)).collect();
        entries.sort_by_key(|entry| entry.sequence);
        let mut next = le32(&self.base, 8);
        let mut applied = 0;
        for entry in entries.iter().filter(|entry| entry.sequence >= next).collect::<Vec<_>>() {
            if entry.sequence != next {
                break;
            }
            self.bins.resize(entry.bins, 0);
            for (at, page) in &entry.pages {
                let Some(place) = self.bins.get_mut(*at..at + page.len()) else {
                    return Err(refuse("a log leads out of it"));
                };
                place.copy_from_slice(page);
            }
            next = next.wrapping_add(1);
            applied += 1;
        }
        if applied == 0 {
            return Err(refuse("none of its logs continues where it stands"));
        }
        put32(&mut self.base, 4, next);
        put32(&mut self.base, 8, next);
        self.changed = true;
        self.close();
        self.check()
    }
}

/// The sound entries of a log, in its order, until the first that is not.
fn entries(log: &[u8]) -> Vec<Entry<'_>> {
    let (mut found, mut at) = (vec![], SECTOR);
    if !log.starts_with(b"regf") {
        return found;
    }
    while let Some(entry) = log.get(at..) {
        let len = le32(entry, 4) as usize;
        let Some(whole) = entry.get(..len).filter(|_| len >= SECTOR && len.is_multiple_of(SECTOR)) else {
            break;
        };
        match parse(whole) {
            Ok(entry) => found.push(entry),
            Err(_) => break,
        }
        at += len;
    }
    found
}

fn parse(whole: &[u8]) -> Result<Entry<'_>> {
    let wrong = || corrupt("a damaged entry of a log");
    let hash = |at| u64::from(le32(whole, at)) | u64::from(le32(whole, at + 4)) << 32;
    let sound = whole.starts_with(b"HvLE")
        && hash(24) == marvin(&whole[HEADER..])
        && hash(32) == marvin(&whole[..32]);
    let (bins, count) = (le32(whole, 16) as usize, le32(whole, 20) as usize);
    if !sound || !bins.is_multiple_of(BLOCK) || bins > 1 << 30 || count > whole.len() / 8 {
        return Err(wrong());
    }
    let (mut pages, mut data) = (vec![], HEADER + count * 8);
    for index in 0..count {
        let (at, len) =
            (le32(whole, HEADER + index * 8) as usize, le32(whole, HEADER + index * 8 + 4) as usize);
        let page = whole.get(data..).and_then(|rest| rest.get(..len)).ok_or_else(wrong)?;
        pages.push((at, page));
        data += len;
    }
    Ok(Entry { sequence: le32(whole, 12), bins, pages })
}

/// Marvin32, all 64 bits of it.
pub(crate) fn marvin(bytes: &[u8]) -> u64 {
    let (mut low, mut high) = SEED;
    let mut mix = |word: u32| {
        low = low.wrapping_add(word);
        high ^= low;
        low = low.rotate_left(20).wrapping_add(high);
        high = high.rotate_left(9) ^ low;
        low = low.rotate_left(27).wrapping_add(high);
        high = high.rotate_left(19);
    };
    let words = bytes.chunks_exact(4);
    let mut last = 0x80;
    for byte in words.remainder().iter().rev() {
        last = last << 8 | u32::from(*byte);
    }
    words.for_each(|word| mix(le32(word, 0)));
    mix(last);
    mix(0);
    u64::from(high) << 32 | u64::from(low)
}
