//! Changing what kind of image an image is: its version, the width of its refcounts, its features.
//!
//! Every step is complete in itself and leaves an image that holds the same disk, so a step that fails or is
//! interrupted leaves the image as the steps before it made it. What can be refused is refused before the first
//! one. The steps work on the container of an image that is closed; each opens it for itself as far as it needs
//! to.
//!
//! ```text
//!   version 2 -> 3      snapshot table with the fields that version 3 asks for, then the header
//!   refcount width      a second set of refcounts behind everything else, then the header (`width`)
//!   features, names     the header
//!   size                as `resize`
//!   version 3 -> 2      bitmaps go; zero clusters become clusters of zeros (`zeros`); then the header
//! ```

mod version;
mod width;
mod zeros;

use std::sync::Arc;

use block::image::SnapshotInfo;
use block::{BlockDevice as _, Error as BlockError, Preallocation, Result, Storage};

use crate::device::{OpenOptions, Qcow2};
use crate::features::{autoclear, compatible, incompatible};
use crate::header::Header;

/// What is to become of an image. `None`: as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amendment {
    /// 2 or 3.
    pub version: Option<u32>,
    /// log2 of the refcount width in bits.
    pub refcount_order: Option<u32>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file, as it is to be stored; empty: no name is stored.
    pub data_file: Option<Vec<u8>>,
    /// Whether the external data file is to stay a raw copy of the disk.
    pub data_file_raw: Option<bool>,
    /// Virtual size in bytes. A smaller one throws away what lies behind it.
    pub size: Option<u64>,
}

/// Told how far an operation is (done, total); may end it with an error.
pub type Report<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// An image on its way.
struct Session<'a> {
    storage: Arc<dyn Storage>,
    options: OpenOptions,
    steps: Steps<'a>,
}

/// Long steps, told to the user as one operation.
struct Steps<'a> {
    report: Report<'a>,
    done: u64,
    total: u64,
}

impl Steps<'_> {
    /// What a step is divided into for the user.
    const UNITS: u64 = 10_000;

    /// The present step is so far.
    fn update(&mut self, done: u64, total: u64) -> Result<()> {
        let share = u128::from(Self::UNITS) * u128::from(done) / u128::from(total.max(1));
        let share = u64::try_from(share).unwrap_or(Self::UNITS).min(Self::UNITS);
        (self.report)(self.done * Self::UNITS + share, self.total * Self::UNITS)
    }

    fn next(&mut self) {
        self.done += 1;
    }
}

impl Amendment {
    /// Whether this can be done to an image with this header.
    ///
    /// # Errors
    /// `Usage` or `Unsupported`, in QEMU's words.
    pub fn check(&self, header: &Header, snapshots: &[SnapshotInfo]) -> Result<()> {
        self.check_data_file(header)?;
        let version = self.version.unwrap_or(header.version);
        let order = self.refcount_order.unwrap_or(header.refcount_order);
        if order != header.refcount_order && version < 3 && order != 4 {
            return usage(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or \
                 greater)",
            );
        }
        if self.lazy_refcounts == Some(true) && version < 3 {
            return usage(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            );
        }
        self.check_size(version, snapshots)?;
        if version < header.version { self.check_downgrade(header, order, snapshots) } else { Ok(()) }
    }

    fn check_data_file(&self, header: &Header) -> Result<()> {
        if self.data_file.is_some() && !header.has_data_file() {
            return usage("data-file can only be set for images that use an external data file");
        }
        if self.data_file_raw == Some(true) && !header.data_file_raw() {
            return usage("data-file-raw cannot be set on existing images");
        }
        Ok(())
    }

    fn check_size(&self, version: u32, snapshots: &[SnapshotInfo]) -> Result<()> {
        let Some(size) = self.size else { return Ok(()) };
        if i64::try_from(size).is_err() {
            return usage("Image size cannot be negative");
        }
        if !size.is_multiple_of(512) {
            return usage("The new size must be a multiple of 512");
        }
        if version < 3 && !snapshots.is_empty() && self.version != Some(2) {
            return Err(BlockError::unsupported("Can't resize a v2 image which has snapshots"));
        }
        Ok(())
    }

    /// What version 2 cannot hold.
    fn check_downgrade(&self, header: &Header, order: u32, snapshots: &[SnapshotInfo]) -> Result<()> {
        if header.has_data_file() {
            return usage("Cannot downgrade an image with a data file");
        }
        if order != 4 {
            return usage("compat=0.10 requires refcount_bits=16");
        }
        let size = self.size.unwrap_or(header.size);
        let too_much = |s: &SnapshotInfo| s.disk_size != size || s.vm_state_size > u64::from(u32::MAX);
        if snapshots.iter().any(too_much) {
            return usage("Internal snapshots prevent downgrade of image");
        }
        // qemu-img forgets about the compression type, and what is compressed cannot be read any more.
        let features = header.incompatible & !incompatible::DIRTY;
        if features != 0 {
            return usage(&format!("Cannot downgrade an image with incompatible features {features:#x} set"));
        }
        Ok(())
    }
}

fn usage<T>(text: &str) -> Result<T> {
    Err(BlockError::usage(text))
}

/// Changes an image, which must not be open for writing anywhere; `options` says how to open it. Returns what the
/// user should be told.
///
/// # Errors
/// As [`Amendment::check`]; refcounts that do not fit the new width; whatever `report` returns; the host failed.
/// The image then holds the same disk as before, or, where the size was to change too, one of the two sizes.
pub fn amend(
    storage: &Arc<dyn Storage>,
    options: OpenOptions,
    amendment: &Amendment,
    report: Report<'_>,
) -> Result<Vec<String>> {
    let header = Header::read(&**storage)?;
    let snapshots = crate::snapshot::read_table(&**storage, &header)?;
    let snapshots: Vec<_> = snapshots.iter().map(|s| s.info(header.size)).collect();
    amendment.check(&header, &snapshots)?;
    let (other_width, downgrade) = (
        amendment.refcount_order.is_some_and(|order| order != header.refcount_order),
        amendment.version.is_some_and(|version| version < header.version),
    );
    let steps = Steps { report, done: 0, total: u64::from(other_width) + u64::from(downgrade) };
    let mut session = Session { storage: Arc::clone(storage), options, steps };
    if amendment.version.is_some_and(|version| version > header.version) {
        session.upgrade()?;
    }
    if let Some(order) = amendment.refcount_order.filter(|_| other_width) {
        session.change_width(order)?;
    }
    session.change_features(amendment)?;
    if let Some(size) = amendment.size {
        session.resize(size)?;
    }
    if downgrade { session.downgrade() } else { Ok(vec![]) }
}

impl Session<'_> {
    fn header(&self) -> Result<Header> {
        Header::read(&*self.storage)
    }

    /// Opens the image for a step.
    fn open(&self) -> Result<Arc<Qcow2>> {
        Qcow2::open(Arc::clone(&self.storage), self.header()?, self.options.clone())
    }

    fn change_width(&mut self, order: u32) -> Result<()> {
        // Opening repairs an image that was not closed cleanly.
        self.open()?.close()?;
        width::change(&*self.storage, &self.header()?, order, &mut self.steps)?;
        self.steps.next();
        Ok(())
    }

    /// What is only said in the header.
    fn change_features(&self, amendment: &Amendment) -> Result<()> {
        if (&amendment.lazy_refcounts, &amendment.data_file, &amendment.data_file_raw)
            == (&None, &None, &None)
        {
            return Ok(());
        }
        let image = self.open()?;
        image.change_header(|header| {
            if let Some(lazy) = amendment.lazy_refcounts.filter(|_| header.version >= 3) {
                set(&mut header.compatible, compatible::LAZY_REFCOUNTS, lazy);
            }
            if let Some(name) = &amendment.data_file {
                header.data_file = Some(name.clone()).filter(|name| !name.is_empty());
            }
            if let Some(raw) = amendment.data_file_raw {
                set(&mut header.autoclear, autoclear::DATA_FILE_RAW, raw);
            }
            Ok(())
        })?;
        image.close()
    }

    fn resize(&self, size: u64) -> Result<()> {
        let image = self.open()?;
        if image.size() != size {
            image.resize(size, Preallocation::Off)?;
        }
        image.close()
    }
}

fn set(bits: &mut u64, bit: u64, on: bool) {
    *bits = if on { *bits | bit } else { *bits & !bit };
}
