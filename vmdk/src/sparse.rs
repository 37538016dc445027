//! Extents that store only what has been written: which of the kinds a file is.

use std::sync::Arc;

use block::{Error, Result, Storage};

use crate::extent::{Extent, How};
use crate::header::{self, Header};
use crate::hosted::Hosted;
use crate::layout::COWD_MAGIC;
use crate::stream::StreamExtent;
use crate::tabled::Tabled;
use crate::{cowd, sesparse};

/// The sectors of the disk that a stand-alone extent holds.
pub(crate) fn capacity(storage: &Arc<dyn Storage>) -> Result<u64> {
    if first_sector(storage)?.starts_with(COWD_MAGIC) {
        return Ok(cowd::open(storage)?.0.capacity_sectors);
    }
    Ok(Header::read(&**storage, 0)?.capacity)
}

/// Opens a sparse extent by what its file begins with.
pub(crate) fn open(storage: Arc<dyn Storage>, how: &How) -> Result<Box<dyn Extent>> {
    let first = first_sector(&storage)?;
    if first.starts_with(COWD_MAGIC) {
        let (header, tables) = cowd::open(&storage)?;
        return Ok(Box::new(Tabled::new(storage, tables, header.capacity_sectors, how)?));
    }
    if sesparse::probe(&first) {
        let (header, tables) = sesparse::open(&storage)?;
        return Ok(Box::new(Tabled::new(storage, tables, header.capacity_sectors, how)?));
    }
    let header = Header::parse(&first)?;
    if header.is_descriptor_only() {
        let text = format!("'{}' is a descriptor, and no extent of a disk", storage.name());
        return Err(Error::invalid(text));
    }
    if header.compression == 1 {
        return Ok(Box::new(StreamExtent::open(storage, header, how)?));
    }
    Ok(Box::new(Hosted::open(storage, header, how)?))
}

fn first_sector(storage: &Arc<dyn Storage>) -> Result<[u8; header::LENGTH]> {
    let mut first = [0; header::LENGTH];
    storage.read_at(&mut first, 0)?;
    Ok(first)
}
