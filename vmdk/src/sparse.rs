//! Extents that store only what has been written: which of the kinds a file is.

use std::sync::Arc;

use block::{Error, Result, Storage};

use crate::descriptor::Kind;
use crate::extent::{Extent, How};
use crate::header::{self, Header};
use crate::layout::COWD_MAGIC;

/// The sectors of the disk that a stand-alone extent holds.
pub(crate) fn capacity(storage: &dyn Storage) -> Result<u64> {
    Ok(Header::read(storage, 0)?.capacity)
}

/// Opens a sparse extent by what its file begins with.
pub(crate) fn open(storage: Arc<dyn Storage>, kind: Kind, how: &How) -> Result<Box<dyn Extent>> {
    let mut first = [0; header::LENGTH];
    storage.read_at(&mut first, 0)?;
    let _ = (how, COWD_MAGIC);
    Err(Error::unsupported(format!("extents of kind '{}' are not supported", kind.word())))
}
