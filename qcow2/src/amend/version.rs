//! Version 2 to 3 and back.

use block::{BlockDevice as _, Result};

use super::{Session, zeros};
use crate::create::feature_names;
use crate::device::Qcow2;
use crate::header::{Header, V3_LENGTH};
use crate::snapshot::{REQUIRED_EXTRA, encode_table, stored_len};

impl Session<'_> {
    /// Version 3, which can do everything that version 2 can.
    pub(super) fn upgrade(&self) -> Result<()> {
        let image = self.open()?;
        image.upgrade()?;
        image.close()
    }

    /// Version 2, once nothing in the image needs more than that.
    pub(super) fn downgrade(&mut self) -> Result<Vec<String>> {
        let mut warnings = vec![];
        // The dirty bit, which version 2 does not have, must not come back.
        self.options.lazy_refcounts = Some(false);
        let image = self.open()?;
        if image.header().bitmaps.is_some() || image.header().stale_bitmaps {
            image.remove_all_bitmaps()?;
            warnings.push("version 2 images cannot hold bitmaps; they have been removed".to_owned());
        }
        zeros::expand(&image, &mut self.steps)?;
        image.change_header(|header| {
            to_version_2(header);
            Ok(())
        })?;
        image.close()?;
        Ok(warnings)
    }
}

fn to_version_2(header: &mut Header) {
    header.version = 2;
    (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
    header.header_length = 72;
    header.feature_names.clear();
    header.unknown_fields.clear();
}

fn to_version_3(header: &mut Header) {
    header.version = 3;
    header.refcount_order = 4;
    header.header_length = V3_LENGTH;
    if header.wants_feature_names() {
        header.feature_names = feature_names();
    }
    // There may be no room for the names, which nobody needs.
    if header.encode().is_err() {
        header.feature_names.clear();
    }
}

impl Qcow2 {
    fn upgrade(&self) -> Result<()> {
        let _flushing = self.flush_lock.lock();
        let snapshots = self.snapshots();
        if snapshots.iter().all(|snapshot| snapshot.extra_len >= REQUIRED_EXTRA) {
            return self.change_header_locked(|header| {
                to_version_3(header);
                Ok(())
            });
        }
        let old = self.header();
        let table = encode_table(&snapshots, old.size)?;
        let run = self.place_table(&table)?;
        let changed = self.change_header_locked(|header| {
            to_version_3(header);
            header.snapshots_offset = run.offset;
            Ok(())
        });
        if changed.is_err() {
            // The disk may name the new table: it stays counted until the header has been settled.
            let _ = self.drop_table(run.offset, table.len() as u64);
            return changed;
        }
        self.drop_table(old.snapshots_offset, stored_len(&snapshots))
    }
}
