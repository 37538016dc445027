//! Extents that are only read and whose grains lie in the file as they are: COWD and SESparse.

use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::{Error, ErrorKind, LayerExtent, Result, Storage, Stored};

use crate::SECTOR;
use crate::extent::{Below, Description, Extent, How};
use crate::lookup::{Entries, Grain, Lookup};

/// Such an extent.
#[derive(Debug)]
pub(crate) struct Tabled<E> {
    storage: Arc<dyn Storage>,
    lookup: Lookup<E>,
    len: u64,
    below: Below,
}

impl<E: Entries> Tabled<E> {
    /// The extent in `storage`, with these tables, which hold `capacity` sectors.
    ///
    /// # Errors
    /// More is expected of it than it holds.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        lookup: Lookup<E>,
        capacity_sectors: u64,
        how: &How,
    ) -> Result<Self> {
        check_len(&*storage, capacity_sectors, how)?;
        Ok(Self { storage, lookup, len: how.len, below: how.below.clone() })
    }
}

/// Refuses an extent that is shorter than its descriptor says.
pub(crate) fn check_len(storage: &dyn Storage, capacity_sectors: u64, how: &How) -> Result<()> {
    let wanted = how.len / SECTOR;
    if wanted <= capacity_sectors {
        return Ok(());
    }
    let message = format!(
        "the extent '{}' holds {capacity_sectors} sectors, the descriptor expects {wanted}",
        storage.name()
    );
    Err(Error::new(ErrorKind::Corrupt, message))
}

impl<E: Entries> Extent for Tabled<E> {
    fn describe(&self) -> Description {
        Description {
            size: self.len,
            filename: self.storage.name(),
            grain: Some(self.lookup.shape().grain),
            compressed: false,
        }
    }

    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.lookup.read(buf, offset, &|part, at| self.below.read(part, at))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let run = self.lookup.run(offset, max_len, true)?;
        Ok(match run.grain {
            Grain::Absent => LayerExtent::new(Stored::Absent, run.len),
            Grain::Zero => LayerExtent::new(Stored::Zero, run.len),
            Grain::At(place) => LayerExtent::new(Stored::Data, run.len).at(place),
        })
    }

    fn check(&self, report: &mut CheckReport, repair: Repair) -> Result<()> {
        let _ = repair;
        let end = self.storage.len()?;
        let grain = self.lookup.shape().grain;
        check_grains(&self.lookup, self.len, report, |_, place| match place.checked_add(grain) {
            Some(last) if last <= end => Ok(()),
            _ => Err(crate::extent::truncated(&*self.storage, &format!("the grain at {place:#x}"), end)),
        })
    }
}

/// Looks at every entry of every table; `examine` looks at what is stored, given by number and place.
pub(crate) fn check_grains<E: Entries>(
    lookup: &Lookup<E>,
    len: u64,
    report: &mut CheckReport,
    mut examine: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let shape = lookup.shape();
    let mut offset = 0;
    while offset < len {
        let run = match lookup.run(offset, 1, false) {
            Ok(run) => run,
            Err(error) if is_fault_of_image(&error) => {
                found(report, offset, &error);
                // A bad entry of the directory would be met again for each grain of the table.
                offset = lookup.skip_bad(offset);
                continue;
            }
            Err(error) => return Err(error),
        };
        match run.grain {
            Grain::Absent => offset += lookup.run(offset, len - offset, false)?.len,
            Grain::Zero => offset += shape.grain - offset % shape.grain,
            Grain::At(place) => {
                match examine(offset / shape.grain, place) {
                    Err(error) if is_fault_of_image(&error) => found(report, offset, &error),
                    result => result?,
                }
                offset += shape.grain - offset % shape.grain;
            }
        }
    }
    Ok(())
}

fn found(report: &mut CheckReport, offset: u64, error: &Error) {
    report.corruptions += 1;
    report.say(format!("ERROR: sector {}: {error}", offset / SECTOR));
}

fn is_fault_of_image(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Truncated | ErrorKind::Invalid)
}
