//! Numbers for new blocks.
//!
//! New blocks go behind all others, and into holes that freed blocks have left only when there is nothing behind: every
//! number is less than the count of the disk's blocks (VirtualBox and qemu-img take others for damage). How many there are is in the header, but a crash or another program may have left it
//! wrong: before the first write to an image its map is read, and refused if two blocks of the disk have one place.

use std::collections::HashMap;

use block::num::to_usize;
use block::{Error as BlockError, ErrorKind, Result, Storage};

use crate::error::Error;
use crate::header::{Header, MAX_BLOCKS, Uuid};
use crate::map::{Entry, Map};

/// The end of what is in use.
#[derive(Debug)]
pub(crate) struct Alloc {
    /// The number of the next block.
    pub(crate) next: u32,
    /// Numbers are less than this.
    blocks: u64,
    /// One bit for each number that the file has room for: those in use or given out.
    used: Vec<u64>,
    /// Bytes before this one may be anything; those behind it are zeros as long as nobody has written to them.
    pub(crate) junk_end: u64,
    /// Numbers that were set aside for blocks of the disk.
    pub(crate) reserved: HashMap<u64, u32>,
    /// The count and the UUID of the state that the header on disk has, if that is known.
    pub(crate) on_disk: Option<(u32, Uuid)>,
}

impl Alloc {
    /// Looks at all blocks of an image that is to be written.
    pub(crate) fn new(storage: &dyn Storage, header: &Header, map: &Map, file_len: u64) -> Result<Self> {
        let in_file = file_len.saturating_sub(u64::from(header.data_offset)).div_ceil(map.block_size);
        let in_file = in_file.min(MAX_BLOCKS);
        let mut used = vec![0u64; to_usize(in_file.div_ceil(64))];
        let mut end = 0;
        map.walk(storage, 0, |index, entry| {
            let Entry::Data(number) = entry else { return Ok(true) };
            let offset = map.check_place(index, number, file_len)?;
            let (word, bit) = (to_usize(u64::from(number) / 64), 1 << (number % 64));
            let bits = used.get_mut(word).ok_or(Error::BlockOutsideFile { index, offset, file_len })?;
            if std::mem::replace(bits, *bits | bit) & bit != 0 {
                return Err(Error::SharedBlock { index, offset }.into());
            }
            end = end.max(number + 1);
            Ok(true)
        })?;
        // More than the file holds cannot be in use.
        let counted = u64::from(header.allocated).min(in_file);
        let counted = counted.min(map.blocks);
        let next = end.max(u32::try_from(counted).unwrap_or(u32::MAX));
        let junk_end = if storage.fixed_len() { u64::MAX } else { file_len };
        Ok(Self {
            next,
            blocks: map.blocks,
            used,
            junk_end,
            reserved: HashMap::new(),
            on_disk: Some((header.allocated, header.modified)),
        })
    }

    /// The number for a block of the disk that is not there yet.
    pub(crate) fn reserve(&mut self, storage: &dyn Storage, map: &Map, index: u64) -> Result<u32> {
        if let Some(number) = self.reserved.get(&index) {
            return Ok(*number);
        }
        let full_device = storage.fixed_len() && map.offset_of(self.next) + map.block_size > storage.len()?;
        let number = if u64::from(self.next) < self.blocks && !full_device {
            self.next += 1;
            self.next - 1
        } else {
            self.hole().ok_or_else(|| no_number(full_device))?
        };
        self.mark(number);
        self.reserved.insert(index, number);
        Ok(number)
    }

    /// A number that no block has, before [`next`](Self::next). A disk that lacks a block has one.
    fn hole(&self) -> Option<u32> {
        let (at, bits) = self.used.iter().enumerate().find(|(_, bits)| **bits != u64::MAX)?;
        let number = u32::try_from(at).ok()?.checked_mul(64)?.checked_add(bits.trailing_ones())?;
        (number < self.next && u64::from(number) < self.blocks).then_some(number)
    }

    /// Notes that a number has been given out, where it could be taken for a hole.
    fn mark(&mut self, number: u32) {
        if let Some(bits) = self.used.get_mut(to_usize(u64::from(number) / 64)) {
            *bits |= 1 << (number % 64);
        }
    }

    /// Gives back the numbers at the end that were not used.
    pub(crate) fn release(&mut self) {
        let mut numbers: Vec<u32> = self.reserved.drain().map(|(_, number)| number).collect();
        numbers.sort_unstable();
        while let Some(number) = numbers.pop() {
            if number + 1 != self.next {
                break;
            }
            self.next = number;
        }
    }
}

/// Why there is no number for a block.
fn no_number(full_device: bool) -> BlockError {
    match full_device {
        true => BlockError::new(ErrorKind::NoSpace, "the device has no room for another block"),
        false => Error::Full.into(),
    }
}
