//! An uncompressed kernel: a 64-bit ELF file for x86 (System V ABI), perhaps with PVH's note.

use block::num::{len_of, to_usize};
use block::{Error, Result};

use super::layout::HIGH_MEMORY;
use super::linux::too_small;
use crate::memory::GuestRam;

const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_LEN: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A segment to be loaded.
#[derive(Debug, Clone, Copy)]
struct Segment<'a> {
    address: u64,
    bytes: &'a [u8],
    end: u64,
}

/// A kernel that has been understood.
#[derive(Debug, Clone)]
pub(super) struct Image<'a> {
    segments: Vec<Segment<'a>>,
    /// The entry of the file, in long mode.
    pub(super) entry: u64,
    /// PVH's entry, in protected mode.
    pub(super) pvh_entry: Option<u32>,
}

/// `len` bytes of the file from `offset`.
fn slice(file: &[u8], offset: u64, len: u64) -> Result<&[u8]> {
    let end = offset.checked_add(len).filter(|end| *end <= len_of(file));
    end.and_then(|end| file.get(to_usize(offset)..to_usize(end))).ok_or_else(|| {
        Error::new(
            block::ErrorKind::Truncated,
            format!("the kernel has {} bytes, it tells of {len} at {offset:#x}", file.len()),
        )
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl<'a> Image<'a> {
    /// Understands `file`; `None` if it is no ELF file.
    ///
    /// # Errors
    /// It is, but not for this machine, or its parts are not there.
    pub(super) fn parse(file: &'a [u8]) -> Result<Option<Self>> {
        if !file.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let header = slice(file, 0, 64)?;
        // 64-bit, little-endian.
        if header[4..6] != [2, 1] || u16_at(header, 18) != MACHINE_X86_64 {
            return Err(Error::unsupported("the kernel is an ELF file, but not for 64-bit x86"));
        }
        let (table, count) = (u64_at(header, 32), u64::from(u16_at(header, 56)));
        if u64::from(u16_at(header, 54)) != PROGRAM_HEADER_LEN {
            return Err(Error::invalid("the kernel's program headers have an odd length"));
        }
        let mut image = Self { segments: vec![], entry: u64_at(header, 24), pvh_entry: None };
        for header in slice(file, table, count * PROGRAM_HEADER_LEN)?.as_chunks::<56>().0 {
            image.add(file, header)?;
        }
        if image.segments.is_empty() {
            return Err(Error::invalid("the kernel has nothing to be loaded"));
        }
        Ok(Some(image))
    }

    fn add(&mut self, file: &'a [u8], header: &[u8; 56]) -> Result<()> {
        let (offset, address, len) = (u64_at(header, 8), u64_at(header, 24), u64_at(header, 32));
        match u32_at(header, 0) {
            PT_LOAD => {
                let bytes = slice(file, offset, len)?;
                let end = address.checked_add(u64_at(header, 40).max(len));
                let end = end.ok_or_else(|| {
                    Error::invalid(format!("a segment of the kernel at {address:#x} has no end"))
                })?;
                self.segments.push(Segment { address, bytes, end });
            }
            PT_NOTE => self.pvh_entry = self.pvh_entry.or(pvh_note(slice(file, offset, len)?)),
            _ => {}
        }
        Ok(())
    }

    /// Loads it and returns the first address after it.
    pub(super) fn load(&self, ram: &GuestRam) -> Result<u64> {
        let mut last = HIGH_MEMORY;
        for segment in &self.segments {
            if segment.address < HIGH_MEMORY {
                return Err(Error::unsupported(format!(
                    "a segment of the kernel at {:#x}, below 1 MiB",
                    segment.address
                )));
            }
            if segment.end > ram.low_end() {
                return Err(too_small(ram, segment.end, "the kernel's segments"));
            }
            ram.write(segment.address, segment.bytes)?;
            last = last.max(segment.end);
        }
        Ok(last)
    }
}

/// Looks for PVH's entry in a note segment: name and contents are padded to 4 bytes each.
fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (name_len, len) = (to_usize(u64::from(u32_at(notes, 0))), to_usize(u64::from(u32_at(notes, 4))));
        let contents_at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let next = contents_at.checked_add(len.checked_next_multiple_of(4)?)?;
        let contents = notes.get(contents_at..contents_at.checked_add(len)?)?;
        if u32_at(notes, 8) == NOTE_PHYS32_ENTRY && notes.get(12..16)? == b"Xen\0" && len >= 4 {
            return Some(u32_at(contents, 0));
        }
        notes = notes.get(next..).filter(|rest| rest.len() >= 12)?;
    }
}
