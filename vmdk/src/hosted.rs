//! The hosted sparse extent: what Workstation, Player, Fusion and VirtualBox write (specification, "Hosted Sparse
//! Extents"), with grains as they are. Compressed grains are in [`stream`](crate::stream).
//!
//! ```text
//!  header  descriptor  redundant GD and GTs   GD      GTs                  grains, in the order of the writes
//! +-------+-----------+----------------------+-------+--------------------+------+------+------+---
//! | KDMV  | text      | a second copy        | GT at | grain at, 0, 1, .. | 64 K | 64 K | 64 K |
//! +-------+-----------+----------------------+-------+--------------------+------+------+------+---
//! ```
//!
//! A grain is written before any table refers to it: changed entries stay in memory ([`pages`]) until a flush
//! brings them to the disk ([`flush`]), both copies alike. What a write does to the mapping is in [`write`](mod@write).

mod check;
mod flush;
mod pages;
mod places;
mod tables;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::num::to_usize;
use block::stripes::Stripes;
use block::{Error, ErrorKind, LayerExtent, Result, Storage, Stored, ZeroMode};
use parking_lot::Mutex;

use crate::SECTOR;
use crate::extent::{Below, Description, Extent, How};
use crate::header::{Header, flags};
use pages::Page;
use places::{Named, Places};
use tables::{Copy, Mapped, Tables};

/// Bytes of a request that are handled at a time, unless a grain is larger.
const MAX_HELD: u64 = 4 << 20;

/// An open hosted sparse extent.
#[derive(Debug)]
pub(crate) struct Hosted {
    tables: Tables,
    len: u64,
    below: Below,
    writable: bool,
    stripes: Stripes,
    meta: Mutex<Meta>,
    /// Held by whoever writes tables to the disk.
    flush_lock: Mutex<()>,
}

/// What changes with allocations. Places are in bytes of the file.
#[derive(Debug, Default)]
struct Meta {
    /// Where the file is to grow.
    next: u64,
    /// Grains that nothing refers to, neither in memory nor on the disk.
    free: Vec<u64>,
    /// Grains that are set aside, by number of the grain of the disk.
    reserved: HashMap<u64, u64>,
    /// Grains that tables on the disk may still refer to.
    pending_free: Vec<u64>,
    /// Changed pages, by their places.
    dirty: BTreeMap<u64, Arc<Page>>,
    /// The header says that the file was not closed, because we have said so.
    marked: bool,
}

impl Hosted {
    /// Opens an extent whose header has been read.
    ///
    /// # Errors
    /// The file is too short for its metadata; it is to be written, and its metadata is damaged; or the host failed.
    pub(crate) fn open(storage: Arc<dyn Storage>, header: Header, how: &How) -> Result<Self> {
        let grains = |bytes: u64| bytes.div_ceil(header.grain_bytes());
        if grains(how.len) != grains(header.capacity * SECTOR) {
            let text = format!(
                "the descriptor says that '{}' holds {} sectors of the disk, and its header says {}",
                storage.name(),
                how.len / SECTOR,
                header.capacity
            );
            return Err(Error::invalid(text));
        }
        let lenient = how.metadata_only || how.for_check;
        let tables = match lenient {
            true => Tables::new(Arc::clone(&storage), header, storage.len()?),
            false => Tables::open(storage, header)?,
        };
        let mut meta = Meta::default();
        if how.writable && !lenient {
            check_writable(&tables)?;
            meta.next = flush::end_of_grains(&tables)?;
        }
        Ok(Self {
            tables,
            len: how.len,
            below: how.below.clone(),
            writable: how.writable && !lenient,
            stripes: Stripes::new(),
            meta: Mutex::new(meta),
            flush_lock: Mutex::new(()),
        })
    }

    fn storage_ref(&self) -> &dyn Storage {
        &*self.tables.storage
    }

    /// First and last grain of a range of at least one byte.
    fn grains(&self, offset: u64, len: u64) -> (u64, u64) {
        (self.tables.grain_of(offset).0, self.tables.grain_of(offset + len - 1).0)
    }

    /// Cuts a request so that it holds few grains at a time.
    fn each_piece(&self, offset: u64, len: u64, mut visit: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let most = MAX_HELD.max(self.tables.header.grain_bytes());
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let piece = (most - at % most).min(len - done);
            visit(at, piece)?;
            done += piece;
        }
        Ok(())
    }

    /// Reads a range whose grains are held.
    fn read_held(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let run = self.tables.lookup(at, (buf.len() - done) as u64)?;
            let piece = &mut buf[done..done + to_usize(run.len)];
            match run.mapped {
                Mapped::Absent => self.below.read(piece, at)?,
                Mapped::Zero => piece.fill(0),
                Mapped::Data(place) => self.storage_ref().read_at(piece, place)?,
            }
            done += to_usize(run.len);
        }
        Ok(())
    }
}

/// What must be in order before anything is written.
fn check_writable(tables: &Tables) -> Result<()> {
    let header = &tables.header;
    if header.version == 3 {
        return Err(Error::new(ErrorKind::ReadOnly, "VMDK version 3 must be read only"));
    }
    let copies: &[Copy] = match header.has(flags::REDUNDANT) {
        true => &[Copy::Main, Copy::Redundant],
        false => &[Copy::Main],
    };
    let mut named = [vec![], vec![]];
    for index in 0..header.gd_entries() {
        let mut entries = [0; 2];
        for ((copy, entry), named) in copies.iter().zip(&mut entries).zip(&mut named) {
            let found = tables.gde(*copy, index)?;
            match found {
                Some(0) => {}
                Some(sector) if tables.is_table(sector)? => {
                    // There are at most `MAX_GDES` of them.
                    named.push(Named {
                        sector,
                        index: u32::try_from(index).unwrap_or(u32::MAX),
                        copy: *copy,
                    });
                }
                _ => return Err(damaged(index, *copy)),
            }
            *entry = found.unwrap_or(0);
        }
        if copies.len() == 2 && (entries[0] == 0) != (entries[1] == 0) {
            return Err(damaged(index, Copy::Main));
        }
    }
    // Those of the redundant copy come first in the file.
    let [main, mut named] = named;
    named.extend(main);
    Places::of(tables, named)?.refuse(damaged)
}

fn damaged(index: u64, copy: Copy) -> Error {
    let which = if copy == Copy::Main { "grain directory" } else { "redundant grain directory" };
    let text = format!("entry {index} of the {which} is damaged: the image must not be written to");
    Error::new(ErrorKind::Corrupt, text).hint("Run 'vimg check -r all' to restore it from the other copy.")
}

impl Extent for Hosted {
    fn describe(&self) -> Description {
        Description {
            size: self.len,
            filename: self.tables.storage.name(),
            grain: Some(self.tables.header.grain_bytes()),
            compressed: false,
        }
    }

    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.tables.storage)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.each_piece(offset, buf.len() as u64, |at, len| {
            let (first, last) = self.grains(at, len);
            let _held = self.stripes.shared(first, last);
            let start = to_usize(at - offset);
            self.read_held(&mut buf[start..start + to_usize(len)], at)
        })
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let run = self.tables.lookup(offset, max_len)?;
        Ok(match run.mapped {
            Mapped::Absent => LayerExtent::new(Stored::Absent, run.len),
            Mapped::Zero => LayerExtent::new(Stored::Zero, run.len),
            Mapped::Data(place) => LayerExtent::new(Stored::Data, run.len).at(place),
        })
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.write_zeroes(offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn close(&self) -> Result<()> {
        self.close_cleanly()
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.each_piece(offset, len, |at, len| self.reserve_piece(at, len))
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.clone_range(offset, len, source, source_offset)
    }

    fn check(&self, report: &mut CheckReport, repair: Repair) -> Result<()> {
        check::check(&self.tables, report, repair)
    }
}

#[cfg(test)]
mod tests;
