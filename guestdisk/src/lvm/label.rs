//! The label of a physical volume and its metadata areas.

use std::ops::Range;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, Result};

use super::text::{self, Section};
use crate::bytes::{self, corrupt, le32, le64, part};
use crate::crc;

/// The value that LVM's checksums begin with.
const CRC_START: u32 = 0xf597_a6cf;
/// The most bytes of a description that are read.
const MOST_TEXT: u64 = 4 << 20;
/// The most areas that are looked at.
const MOST_AREAS: usize = 4;
/// Bytes in which the label may be.
const LABEL_SECTORS: u64 = 4 * 512;
/// The header of a metadata area takes this; the ring of texts comes after it.
const AREA_HEADER: u64 = 512;

/// A physical volume.
#[derive(Debug)]
pub(super) struct Physical {
    pub(super) uuid: String,
    pub(super) device: Arc<dyn BlockDevice>,
    /// Bytes of the device that LVM's own books are in: the sectors in which the label may be, and the metadata areas.
    pub(super) own: Vec<Range<u64>>,
    /// What its metadata areas say: the name of the group and the rest.
    pub(super) descriptions: Vec<(String, Section)>,
    pub(super) problems: Vec<String>,
}

/// A UUID with its hyphens: groups of 6, 4, 4, 4, 4, 4 and 6 characters.
pub(crate) fn dashed(raw: &[u8]) -> String {
    let mut dashed = String::new();
    for (index, byte) in raw.iter().enumerate() {
        if matches!(index, 6 | 10 | 14 | 18 | 22 | 26) {
            dashed.push('-');
        }
        dashed.push(char::from(*byte));
    }
    dashed
}

impl Physical {
    /// Reads the label, which lies in one of the first four sectors.
    /// `room` is how many bytes of text may be read still.
    pub(super) fn read(device: &Arc<dyn BlockDevice>, room: &mut u64) -> Result<Self> {
        let head = bytes::read_some(&**device, 0, to_usize(LABEL_SECTORS))?;
        let label = head.chunks(512).find(|sector| sector.starts_with(b"LABELONE"));
        let label = label.ok_or_else(|| corrupt("there is no label"))?;
        if le32(label, 16) != crc::update(CRC_START, part(label, 20, 492)) {
            return Err(corrupt("the checksum of the label is wrong"));
        }
        let header = part(label, le32(label, 20) as usize, 512);
        let mut volume = Self {
            uuid: dashed(part(header, 0, 32)),
            device: Arc::clone(device),
            own: vec![],
            descriptions: vec![],
            problems: vec![],
        };
        let areas = metadata_areas(header);
        let own = areas.iter().map(|(offset, len)| *offset..offset.saturating_add(*len));
        volume.own =
            std::iter::once(0..LABEL_SECTORS).chain(own).filter(|own| own.end <= device.size()).collect();
        for (offset, len) in areas {
            match volume.area(offset, len, room) {
                Ok(found) => volume.descriptions.extend(found),
                Err(error) => volume.problems.push(format!("metadata area at {offset:#x}: {error}")),
            }
        }
        Ok(volume)
    }

    /// The description that is in force in an area; `None` if the area is not in use.
    fn area(&self, offset: u64, len: u64, room: &mut u64) -> Result<Option<(String, Section)>> {
        let header = bytes::read(&*self.device, offset, 512)?;
        if part(&header, 4, 16) != b" LVM2 x[5A%r0N*>" {
            return Err(corrupt("its header has no magic number"));
        }
        if le32(&header, 0) != crc::update(CRC_START, part(&header, 4, 508)) {
            return Err(corrupt("the checksum of its header is wrong"));
        }
        let (text_offset, text_len) = (le64(&header, 40), le64(&header, 48));
        let ignored = le32(&header, 60) & 1 != 0;
        if text_offset == 0 || ignored {
            return Ok(None);
        }
        *room = room
            .checked_sub(text_len)
            .ok_or_else(|| Error::unsupported(format!("a text of {text_len} bytes after many others")))?;
        let text = self.ring(offset, len, text_offset, text_len)?;
        if le32(&header, 56) != crc::update(CRC_START, &text) {
            return Err(corrupt("the checksum of its text is wrong"));
        }
        let document = text::parse(&text)?;
        // The group is the one section among values such as `creation_time`.
        let group = document.children().find(|(_, section)| section.number("extent_size").is_some());
        let (name, section) = group.ok_or_else(|| Error::invalid("its text describes no group"))?;
        Ok(Some((name.to_owned(), section.clone())))
    }

    /// Reads a text out of the ring, which ends with the area and goes on after the area's header.
    fn ring(&self, area: u64, area_len: u64, offset: u64, len: u64) -> Result<Vec<u8>> {
        let ring_len = area_len.saturating_sub(AREA_HEADER);
        if !(AREA_HEADER..area_len).contains(&offset) || len > ring_len.min(MOST_TEXT) {
            return Err(corrupt(format!("a text of {len} bytes at {offset:#x} of {area_len:#x}")));
        }
        let first = len.min(area_len - offset);
        let place = |within: u64| area.checked_add(within).ok_or_else(|| corrupt("it lies nowhere"));
        let mut text = bytes::read(&*self.device, place(offset)?, to_usize(first))?;
        text.extend(bytes::read(&*self.device, place(AREA_HEADER)?, to_usize(len - first))?);
        Ok(text)
    }
}

/// Offset and length of each metadata area: the second of two lists, each of which ends with zeros.
fn metadata_areas(header: &[u8]) -> Vec<(u64, u64)> {
    let mut pairs = part(header, 40, 512).chunks_exact(16).map(|pair| (le64(pair, 0), le64(pair, 8)));
    pairs.by_ref().find(|pair| pair.0 == 0);
    pairs.take_while(|pair| pair.0 != 0).take(MOST_AREAS).collect()
}
