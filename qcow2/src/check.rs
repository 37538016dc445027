//! Checking an image: how often is every host cluster referred to, what do the refcounts say, and do the
//! tables keep the rules?
//!
//! ```text
//!   walk        header, L1 and L2 tables, snapshots, bitmaps, LUKS header, refcount table and blocks
//!     |
//!   counts      references to every host cluster, and of which kind
//!     |
//!   compare     with the refcounts in the file: leaks and corruptions; with the COPIED flags
//!     |
//!   repair      writes the counts that were computed; elsewhere, if the refcount structures are damaged
//! ```
//!
//! Problems, counts of problems and statistics are those of `qemu-img check`, differential tests say so.
//! This check is stricter in a few points, all of them damage that would make guest data wrong while
//! `qemu-img check` calls the image clean:
//!
//! * a table, or data, that begins in the last cluster of the file but past its end;
//! * a table whose end is cut off by the end of the file;
//! * metadata that shares its cluster with anything else, even if the refcount says so;
//! * entries that the reader refuses: bit 0 of an L2 entry in version 2 or with extended L2 entries;
//! * data at the wrong place of an external data file, or past its end.
//!
//! It does not follow an L1 entry that is not aligned or points past the end of the file, so that it reports
//! one error there where QEMU reports what it makes of the garbage.
//!
//! Time and memory are bounded by the file, not by what its header says: see `walk` and `counts`.

mod compare;
mod copied;
mod counts;
mod entries;
mod place;
mod rebuild;
mod repair;
#[cfg(test)]
mod repair_tests;
mod snapshots;
mod structures;
#[cfg(test)]
mod tests;
mod walk;

use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::{Result, Storage};

use self::compare::StoredRefcounts;
use self::copied::Action;
use self::counts::{Counts, EXCLUSIVE};
use self::place::Ghosts;
use self::walk::Tables;
use crate::geometry::Geometry;
use crate::header::Header;

/// Checks an image, and repairs what `repair` allows. The image must not be open for writing, or have been
/// flushed. `data_file` is its external data file, if that can be looked at.
///
/// With a repair, the report counts what is left, and apart from that what has been fixed.
///
/// # Errors
/// The host failed to write or to tell the file's length (what cannot be read is part of the report);
/// `Unsupported` if there is damage that cannot be repaired, with nothing changed.
pub fn check(
    storage: &Arc<dyn Storage>,
    header: &Header,
    data_file: Option<&Arc<dyn Storage>>,
    repair: Repair,
) -> Result<CheckReport> {
    let data_file_len = data_file.map(|file| file.len()).transpose()?;
    let mut check = Check::new(&**storage, header, data_file_len, repair)?;
    check.run()?;
    check.repair()?;
    if check.verify {
        check.verify()?;
    }
    Ok(check.report)
}

/// Repairs an image that was not closed cleanly, so that it can be written. The header in the file loses its
/// dirty bit if nothing is wrong any more.
///
/// # Errors
/// As [`check`].
pub fn repair_dirty(storage: &Arc<dyn Storage>, header: &Header) -> Result<CheckReport> {
    check(storage, header, None, Repair::All)
}

/// A check under way.
#[derive(Debug)]
struct Check<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
    file_len: u64,
    /// Guest data is in another file and not counted.
    external: bool,
    data_file_len: Option<u64>,
    mode: Repair,
    counts: Counts,
    tables: Tables,
    stored: StoredRefcounts,
    report: CheckReport,
    /// Where the next data cluster would have to be so as not to count as fragmented; 0: anywhere.
    next_contiguous: u64,
    /// Some COPIED flag is wrong.
    copied_suspect: bool,
    /// Why nothing can be repaired.
    blocked: Option<&'static str>,
    /// Why clusters that seem to be leaked may be in use all the same: something that refers to clusters could not
    /// be followed. They are kept.
    incomplete: Option<&'static str>,
    /// Why the refcounts cannot be repaired where they are.
    rebuild: Option<&'static str>,
    /// The repair changes more than refcounts and flags: only another look at the image tells what is left.
    verify: bool,
    /// Some cluster has more references than a refcount of this width can say.
    too_many: bool,
    /// A structure shares a cluster with guest data.
    data_on_metadata: bool,
    /// Zero clusters with an impossible place, which a repair takes away.
    bad_zero_places: u64,
    /// The snapshot table as it should be.
    snapshot_table: Option<snapshots::NewTable>,
    /// Clusters (first, one past the last) of structures that must not share theirs.
    exclusive: Vec<(u64, u64)>,
    /// References that lead past the end of the file.
    ghosts: Ghosts,
    /// No cluster below this one is free for what a repair writes.
    next_place: u64,
    /// Of the report, what a repair fixes.
    fixable_corruptions: u64,
    fixable_leaks: u64,
}

impl<'a> Check<'a> {
    fn new(
        storage: &'a dyn Storage,
        header: &'a Header,
        data_file_len: Option<u64>,
        mode: Repair,
    ) -> Result<Self> {
        let geometry = header.geometry();
        let file_len = storage.len()?;
        // A reference may end in the cluster behind the last one.
        let countable = geometry.clusters_for(file_len) + 1;
        let report =
            CheckReport { total_clusters: geometry.clusters_for(header.size), ..CheckReport::default() };
        Ok(Self {
            storage,
            header,
            geometry,
            file_len,
            external: header.has_data_file(),
            data_file_len,
            mode,
            counts: Counts::new(countable),
            tables: Tables::default(),
            stored: StoredRefcounts::default(),
            report,
            next_contiguous: 0,
            copied_suspect: false,
            blocked: None,
            incomplete: None,
            rebuild: None,
            verify: false,
            too_many: false,
            data_on_metadata: false,
            bad_zero_places: 0,
            snapshot_table: None,
            exclusive: vec![],
            ghosts: Ghosts::default(),
            next_place: 0,
            fixable_corruptions: 0,
            fixable_leaks: 0,
        })
    }

    fn run(&mut self) -> Result<()> {
        self.metadata(0, self.geometry.cluster_size(), 1, EXCLUSIVE);
        self.walk_active_l1()?;
        self.walk_snapshots()?;
        self.walk_l2_tables()?;
        self.walk_luks_header();
        self.walk_bitmaps()?;
        self.walk_refcount_structures()?;
        self.compare()?;
        if self.copied_suspect && self.mode == Repair::None {
            self.check_copied(Action::Report)?;
        }
        Ok(())
    }

    /// Reports `count` corruptions of one kind.
    fn corrupt(&mut self, count: u64, message: impl FnOnce() -> String) {
        self.report.corruptions = self.report.corruptions.saturating_add(count);
        self.say(message);
    }

    /// Reports something that could not be examined.
    fn failed(&mut self, message: impl FnOnce() -> String) {
        self.report.check_errors += 1;
        self.say(message);
        self.not_followed("a part of it could not be examined");
    }

    /// Adds a line, made only if there is room for it.
    fn say(&mut self, message: impl FnOnce() -> String) {
        if self.report.messages.len() < CheckReport::MAX_MESSAGES {
            self.report.messages.push(message());
        } else {
            self.report.messages_dropped += 1;
        }
    }

    /// Notes why nothing can be repaired.
    fn block(&mut self, reason: &'static str) {
        self.blocked.get_or_insert(reason);
    }

    /// Notes why not everything that is in use has been counted.
    fn not_followed(&mut self, reason: &'static str) {
        self.incomplete.get_or_insert(reason);
    }

    /// Notes why refcounts cannot be repaired where they are.
    fn damaged_refcounts(&mut self, reason: &'static str) {
        self.rebuild.get_or_insert(reason);
    }

    /// Reads from the image; a failure becomes part of the report.
    fn read(&mut self, buf: &mut [u8], offset: u64) -> bool {
        match self.storage.read_at(buf, offset) {
            Ok(()) => true,
            Err(error) => {
                self.unreadable(buf.len() as u64, offset, &error);
                false
            }
        }
    }

    /// A failed read: nothing is repaired while the host cannot say what is there.
    fn unreadable(&mut self, len: u64, offset: u64, error: &block::Error) {
        self.failed(|| format!("ERROR: could not read {len:#x} bytes at {offset:#x}: {error}"));
        self.block("it could not be read");
    }

    /// Whether a reference ends in a cluster that can be counted: the last cluster of a file need not be
    /// there in full, so QEMU tolerates less than a cluster.
    fn countable(&self, offset: u64, len: u64) -> bool {
        let limit = self.file_len.saturating_add(self.geometry.cluster_size());
        offset.checked_add(len).is_some_and(|end| end < limit)
    }

    /// Counts `count` references to `len` bytes of kind `flags`. False: they lie outside the file.
    fn reference(&mut self, offset: u64, len: u64, count: u64, flags: u16) -> bool {
        if len == 0 {
            return true;
        }
        if !self.countable(offset, len) {
            self.note_ghost(offset, len, count);
            self.corrupt(count, || {
                format!(
                    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                     offset {offset:#x} size {len:#x}"
                )
            });
            return false;
        }
        if offset >= self.file_len {
            self.corrupt(count, || past_the_end(offset, len));
        }
        for cluster in self.geometry.cluster_of(offset)..=self.geometry.cluster_of(offset + len - 1) {
            self.counts.add(cluster, count, flags);
        }
        true
    }

    /// Counts a structure, which has to be in the file completely. False: it is not in the file at all.
    fn metadata(&mut self, offset: u64, len: u64, count: u64, flags: u16) -> bool {
        if !self.reference(offset, len, count, flags) {
            return false;
        }
        if flags & EXCLUSIVE != 0 {
            let end = self.geometry.clusters_for(offset + len);
            self.exclusive.push((self.geometry.cluster_of(offset), end));
        }
        if offset < self.file_len && offset + len > self.file_len {
            self.corrupt(count, || past_the_end(offset, len));
        }
        true
    }
}

fn past_the_end(offset: u64, len: u64) -> String {
    format!("ERROR: region at offset {offset:#x} size {len:#x} lies past the end of the file")
}
