//! What can be known of an image without its parent: the footers, the header, and by which names the parent goes.

use std::sync::Arc;

use block::num::to_usize;
use block::{Result, Storage};

use crate::error::Error;
use crate::footer::{DiskType, FOOTER_BYTES, Footer, OLD_FOOTER_BYTES, SizeRule};
use crate::header::{DynamicHeader, HEADER_BYTES};
use crate::parent;

/// An image whose own structures have been read and make sense.
#[derive(Debug, Clone)]
pub struct Container {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) footer: Footer,
    /// The footer as it is on disk, reserved bytes included.
    pub(crate) footer_bytes: Vec<u8>,
    /// Of all but fixed disks.
    pub(crate) header: Option<DynamicHeader>,
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) file_len: u64,
    pub(crate) ends: Ends,
    parent_names: Vec<String>,
}

/// Which of the two footers are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    /// The copy at the start is (fixed disks have none).
    pub(crate) start: bool,
    /// Where the one at the end is, if it is good.
    pub(crate) end: Option<u64>,
    /// They are both good, and differ.
    pub(crate) differ: bool,
}

/// A footer and its bytes.
type Found = (Footer, Vec<u8>);

impl Container {
    /// Reads the structures of an image.
    ///
    /// # Errors
    /// Neither footer is good, a structure does not lie in the file or breaks a rule, or the host failed.
    pub fn read(storage: &Arc<dyn Storage>, rule: SizeRule) -> Result<Self> {
        let file_len = storage.len()?;
        let ((footer, footer_bytes), ends) = footers(&**storage, file_len)?;
        let size = footer.size(rule)?;
        let mut container = Self {
            storage: Arc::clone(storage),
            header: None,
            footer,
            footer_bytes,
            size,
            file_len,
            ends,
            parent_names: vec![],
        };
        if container.footer.disk_type == DiskType::Fixed {
            container.check_fixed()?;
        } else {
            let header = container.read_header()?;
            container.check_table(&header)?;
            if container.footer.disk_type == DiskType::Differencing {
                container.parent_names = parent::names(&**storage, &header, file_len)?;
            }
            container.header = Some(header);
        }
        Ok(container)
    }

    /// Whether a file is such an image: it begins as one, or ends with a good footer that fits the file. `first` are
    /// the first bytes of it.
    ///
    /// # Errors
    /// The host failed.
    pub fn probe(first: &[u8], storage: &dyn Storage) -> Result<bool> {
        if Footer::announces(first) {
            return Ok(true);
        }
        let file_len = storage.len()?;
        Ok(match end_footer(storage, file_len)? {
            Some(Ok(((footer, _), at))) => match footer.disk_type {
                // A disk whose last sector only looks like a footer is not taken for another disk.
                DiskType::Fixed => footer.current_size == at,
                DiskType::Dynamic | DiskType::Differencing => {
                    let mut magic = [0; 8];
                    storage.read_at(&mut magic, footer.data_offset)?;
                    footer.data_offset.checked_add(HEADER_BYTES).is_some_and(|end| end <= at)
                        && magic == *b"cxsparse"
                }
            },
            _ => false,
        })
    }

    /// Refuses what [`probe`](Self::probe) did not recognise and no other format claims, but what ends with a footer: a VHD
    /// that has been damaged or cut.
    ///
    /// # Errors
    /// What is wrong with the footer, or the host failed.
    pub fn refuse_damaged(storage: &dyn Storage) -> Result<()> {
        match end_footer(storage, storage.len()?)? {
            None | Some(Err(Error::NotVhd)) => Ok(()),
            Some(Err(error)) => Err(Error::EndDamaged(Box::new(error)).into()),
            Some(Ok(((footer, _), at))) => Err(footer.unfitting(at).into()),
        }
    }

    /// The footer that counts.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The dynamic disk header; fixed disks have none.
    pub fn header(&self) -> Option<&DynamicHeader> {
        self.header.as_ref()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it needs a parent.
    pub fn is_differencing(&self) -> bool {
        self.footer.disk_type == DiskType::Differencing
    }

    /// The names of the parent, best first, relative to the image's folder (or absolute).
    pub fn parent_names(&self) -> &[String] {
        &self.parent_names
    }

    /// What the user should know.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        let grows = self.footer.disk_type != DiskType::Fixed;
        if grows && !self.ends.start {
            warnings.push(
                "the copy of the footer at the start of the VHD is damaged; the footer at its end is used",
            );
        }
        if grows && self.ends.end.is_none() {
            warnings.push(
                "the footer at the end of the VHD is damaged or missing; its copy at the start is used",
            );
        }
        if self.ends.differ {
            warnings.push("the two footers of the VHD differ; the one at the start is used");
        }
        if self.header.as_ref().is_some_and(|header| !header.sum_good) {
            warnings.push(
                "the checksum of the VHD's dynamic disk header is wrong; its numbers are used all the same",
            );
        }
        if self.footer.saved_state {
            warnings.push(
                "the VHD belongs to a machine that is suspended; changing it will confuse that machine",
            );
        }
        warnings.into_iter().map(str::to_owned).collect()
    }

    /// One past the last byte that blocks and fixed data may have.
    pub(crate) fn data_end(&self) -> u64 {
        self.ends.end.unwrap_or(self.file_len)
    }

    /// The places of the structures.
    pub(crate) fn metadata(&self, header: &DynamicHeader) -> Vec<(u64, u64, &'static str)> {
        let table = header.table_offset;
        let mut places = vec![
            (0, FOOTER_BYTES, "copy of the footer"),
            (self.footer.data_offset, self.footer.data_offset + HEADER_BYTES, "dynamic disk header"),
            (table, table + 4 * self.blocks(header), "block allocation table"),
        ];
        for locator in &header.locators {
            if let (Some((start, _)), Some(end)) = (locator.range(), locator.end())
                && end <= self.file_len
            {
                places.push((start, end, "parent locator"));
            }
        }
        places
    }

    /// Blocks of the disk.
    pub(crate) fn blocks(&self, header: &DynamicHeader) -> u64 {
        self.size.div_ceil(u64::from(header.block_size))
    }

    fn check_fixed(&self) -> Result<()> {
        let available = self.data_end();
        if self.size > available {
            return Err(Error::FixedTruncated { size: self.size, available }.into());
        }
        if self.footer.current_size < available {
            return Err(self.footer.unfitting(available).into());
        }
        Ok(())
    }

    fn read_header(&self) -> Result<DynamicHeader> {
        let offset = self.footer.data_offset;
        if offset.checked_add(HEADER_BYTES).is_none_or(|end| end > self.file_len) {
            return Err(Error::NoHeader(offset).into());
        }
        let mut bytes = vec![0; to_usize(HEADER_BYTES)];
        self.storage.read_at(&mut bytes, offset)?;
        let header = DynamicHeader::parse(&bytes)?;
        if offset < FOOTER_BYTES {
            return Err(self
                .misplaced("dynamic disk header", offset, HEADER_BYTES, "overlaps the footer")
                .into());
        }
        Ok(header)
    }

    fn check_table(&self, header: &DynamicHeader) -> Result<()> {
        let needed = self.blocks(header);
        if u64::from(header.entries) < needed {
            return Err(Error::TableTooSmall { entries: header.entries, needed }.into());
        }
        let what = "block allocation table";
        let (offset, len) = (header.table_offset, 4 * needed);
        let end = offset.checked_add(len).filter(|end| *end <= self.data_end());
        let Some(end) = end else {
            return Err(self.misplaced(what, offset, len, "lies past the end of the file").into());
        };
        let start = self.footer.data_offset;
        let on_header = offset < start + HEADER_BYTES && start < end;
        if len > 0 && (offset < FOOTER_BYTES || on_header) {
            return Err(self.misplaced(what, offset, len, "overlaps another structure").into());
        }
        Ok(())
    }

    fn misplaced(&self, what: &'static str, offset: u64, len: u64, why: &'static str) -> Error {
        Error::Place { what, offset, len, why, file_len: self.file_len }
    }
}

/// Reads one footer.
fn footer_at(
    storage: &dyn Storage,
    offset: u64,
    len: u64,
) -> Result<(crate::error::Result<Footer>, Vec<u8>)> {
    let mut bytes = vec![0; to_usize(FOOTER_BYTES)];
    let part = &mut bytes[..to_usize(len)];
    storage.read_at(part, offset)?;
    let parsed = Footer::parse(part);
    Ok((parsed, bytes))
}

/// The footer in the last 512 bytes, or the last 511, and where it is. `None`: there are not so many.
fn end_footer(storage: &dyn Storage, file_len: u64) -> Result<Option<crate::error::Result<(Found, u64)>>> {
    let mut first_error = None;
    for len in [FOOTER_BYTES, OLD_FOOTER_BYTES] {
        let Some(at) = file_len.checked_sub(len) else { continue };
        match footer_at(storage, at, len)? {
            (Ok(footer), bytes) => return Ok(Some(Ok(((footer, bytes), at)))),
            (Err(Error::NotVhd), _) => {}
            (Err(error), _) => first_error = first_error.or(Some(error)),
        }
    }
    Ok(Some(Err(first_error.unwrap_or(Error::NotVhd))))
}

/// The footer that counts, and which are good.
///
/// The first sector of a fixed disk is the guest's, which may have put a footer there; the last sectors of a dynamic
/// disk whose writer was stopped may be the guest's, too. So both count, and where one says "fixed" and the other does
/// not, neither is believed.
fn footers(storage: &dyn Storage, file_len: u64) -> Result<(Found, Ends)> {
    let (start, start_bytes) = footer_at(storage, 0, FOOTER_BYTES)?;
    let end = end_footer(storage, file_len)?.unwrap_or(Err(Error::NotVhd));
    // A fixed disk has no copy.
    let copy =
        start.clone().ok().filter(|footer| footer.disk_type != DiskType::Fixed && file_len >= FOOTER_BYTES);
    match (copy, end) {
        (Some(copy), Ok(((end, _), _))) if end.disk_type == DiskType::Fixed && !copy.same_disk(&end) => {
            Err(Error::FootersDiffer.into())
        }
        (Some(copy), Ok(((end, _), at))) => {
            let differ = !copy.same_disk(&end);
            // The same bytes are not two footers.
            let end = (at >= FOOTER_BYTES).then_some(at);
            Ok(((copy, start_bytes), Ends { start: true, end, differ }))
        }
        (Some(copy), Err(_)) => Ok(((copy, start_bytes), Ends { start: true, end: None, differ: false })),
        (None, Ok((end, at))) => Ok((end, Ends { start: false, end: Some(at), differ: false })),
        (None, Err(at_end)) => Err(match start {
            Err(at_start) if at_start != Error::NotVhd => at_start,
            _ => at_end,
        }
        .into()),
    }
}
