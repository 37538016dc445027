//! What is read of a VHDX file before anything else is opened: headers, log, regions, metadata.

use std::sync::Arc;

use block::{Error, ErrorKind, Result, Storage};

use crate::geometry::Geometry;
use crate::header::Headers;
use crate::log::replay::Replay;
use crate::metadata::Metadata;
use crate::region::{Region, Regions};
use crate::{Guid, SIGNATURE};

/// A VHDX file whose own structures have been read and found in order. Nothing has been written.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file as it is.
    pub(crate) file: Arc<dyn Storage>,
    /// The file as its log would make it: the same, if the log is empty.
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) headers: Headers,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
    pub(crate) geometry: Geometry,
    /// The log has changes that are not in the file yet.
    pub(crate) pending: Option<Replay>,
}

impl Source {
    /// Reads the structures of a VHDX file. A log that was left behind is looked at as if it had been replayed.
    ///
    /// # Errors
    /// The file breaks the rules of the format, needs what we do not have, or is shorter than its structures; the host
    /// failed.
    pub fn read(file: &Arc<dyn Storage>) -> Result<Self> {
        let mut first = [0; SIGNATURE.len()];
        file.read_at(&mut first, 0)?;
        if first != *SIGNATURE {
            return Err(Error::invalid("Image not in VHDX format"));
        }
        let headers = Headers::read(&**file)?;
        let pending = read_log(file, &headers)?;
        let storage = match &pending {
            Some(replay) => replay.clone().view(Arc::clone(file)),
            None => Arc::clone(file),
        };
        let regions = Regions::read(&*storage)?;
        check_places(&*storage, &headers, &regions)?;
        let metadata = Metadata::read(&*storage, regions.metadata)?;
        let geometry = Geometry::new(&metadata);
        geometry.check_bat(regions.bat.length.into())?;
        Ok(Self { file: Arc::clone(file), storage, headers, regions, metadata, geometry, pending })
    }

    /// What the items of the metadata region say.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Whether the log has changes that are not in the file yet.
    pub fn has_pending_log(&self) -> bool {
        self.pending.is_some()
    }

    /// The GUID that a differencing disk knows this one by.
    pub fn data_write_guid(&self) -> Guid {
        self.headers.current.data_write_guid
    }

    /// Brings what the log has into the file and empties the log. Durable on return; an interruption at any moment
    /// leaves a file that can be replayed again.
    ///
    /// # Errors
    /// The host failed.
    pub fn replay(mut self) -> Result<Self> {
        // "Before any modification" (section 2.2.2), of which the replay is the first.
        let guid = Guid::random()?;
        self.headers.replace(&*self.file, |header| header.file_write_guid = guid)?;
        if let Some(pending) = &self.pending {
            pending.carry_out(&*self.file)?;
        }
        self.headers.replace(&*self.file, |header| header.log_guid = Guid::ZERO)?;
        Self::read(&self.file)
    }

    /// The log as a region.
    pub(crate) fn log(&self) -> Region {
        log_region(&self.headers)
    }

    /// The structures that blocks must not overlap, with their names.
    pub(crate) fn structures(&self) -> [(&'static str, Region); 3] {
        [("log", self.log()), ("BAT", self.regions.bat), ("metadata region", self.regions.metadata)]
    }
}

fn log_region(headers: &Headers) -> Region {
    Region { offset: headers.current.log_offset, length: headers.current.log_length }
}

fn read_log(file: &Arc<dyn Storage>, headers: &Headers) -> Result<Option<Replay>> {
    let header = &headers.current;
    if header.log_guid.is_zero() || header.log_length == 0 {
        return Ok(None);
    }
    Replay::read(file, (header.log_offset, header.log_length.into()), header.log_guid)
}

/// The regions and the log lie inside the file and apart from each other.
fn check_places(storage: &dyn Storage, headers: &Headers, regions: &Regions) -> Result<()> {
    let len = storage.len()?;
    let log = log_region(headers);
    for (name, region) in [("BAT", regions.bat), ("metadata region", regions.metadata)] {
        if region.end() > len {
            return Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "the VHDX {name} at {:#x} with {:#x} bytes lies outside the file (length {len:#x})",
                    region.offset, region.length
                ),
            ));
        }
        if log.overlaps(region.offset, region.length.into()) {
            return Err(Error::invalid(format!(
                "the VHDX log at {:#x} overlaps the {name} at {:#x}",
                log.offset, region.offset
            )));
        }
    }
    Ok(())
}
