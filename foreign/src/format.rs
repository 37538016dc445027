//! The formats of this crate under one name each: recognising, reading, opening.

use std::sync::Arc;

use block::image::CheckReport;
use block::{BlockDevice, Result, Storage};

use crate::device::{Foreign, Layout};
use crate::{bochs, cloop, dmg, parallels, qcow, qed};

/// A format of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Compressed loop images, version 2.
    Cloop,
    /// Parallels' expandable images.
    Parallels,
    /// QEMU's enhanced disks.
    Qed,
    /// Growing images of Bochs.
    Bochs,
    /// Apple's disk images (UDIF).
    Dmg,
    /// QEMU's copy on write, version 1.
    Qcow,
}

/// The backing file that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name: bytes, as the image has it.
    pub name: Vec<u8>,
    /// The format, if the image says.
    pub format: Option<&'static str>,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Self] =
        &[Self::Cloop, Self::Parallels, Self::Qed, Self::Bochs, Self::Dmg, Self::Qcow];

    /// qemu's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cloop => "cloop",
            Self::Parallels => "parallels",
            Self::Qed => "qed",
            Self::Bochs => "bochs",
            Self::Dmg => "dmg",
            Self::Qcow => "qcow",
        }
    }

    /// Whether a file holds an image of this format. `first`: its first bytes, 512 or more; `storage` for the one that
    /// is known by its end.
    ///
    /// # Errors
    /// The host failed.
    pub fn probe(self, first: &[u8], storage: &dyn Storage) -> Result<bool> {
        Ok(match self {
            Self::Cloop => cloop::probe(first),
            Self::Parallels => parallels::probe(first),
            Self::Qed => qed::probe(first),
            Self::Bochs => bochs::probe(first),
            Self::Dmg => dmg::probe(storage)?,
            Self::Qcow => qcow::probe(first),
        })
    }

    /// Reads and validates what describes the image.
    ///
    /// # Errors
    /// `Invalid`, `Unsupported`, `Truncated` or `Corrupt`, in qemu's words where it has some; the host's.
    pub fn read(self, storage: Arc<dyn Storage>) -> Result<Opened> {
        match self {
            Self::Cloop => cloop::read(storage),
            Self::Parallels => parallels::read(storage),
            Self::Qed => qed::read(storage),
            Self::Bochs => bochs::read(storage),
            Self::Dmg => dmg::read(storage),
            Self::Qcow => qcow::read(storage),
        }
    }
}

/// An image whose own description has been read; nothing else has been opened.
#[derive(Debug)]
pub struct Opened {
    layout: Arc<dyn Layout>,
    storage: Arc<dyn Storage>,
    backing: Option<Backing>,
}

impl Opened {
    pub(crate) fn new(layout: impl Layout + 'static, storage: Arc<dyn Storage>) -> Self {
        Self { layout: Arc::new(layout), storage, backing: None }
    }

    pub(crate) fn with_backing(self, backing: Option<Backing>) -> Self {
        Self { backing, ..self }
    }

    /// The backing file that the image names.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Whether reading takes a key.
    pub fn is_encrypted(&self) -> bool {
        self.layout.info().encrypted
    }

    /// Examines the structures.
    ///
    /// # Errors
    /// `Unsupported` for formats with nothing to check; what prevents the check as a whole.
    pub fn check(&self) -> Result<CheckReport> {
        self.layout.check()
    }

    /// The disk. `backing` answers for what the image does not store; `key` unlocks an encrypted one (without it,
    /// reading fails).
    ///
    /// # Errors
    /// The host failed; there is a key and nothing to unlock.
    pub fn open(
        &self,
        backing: Option<Arc<dyn BlockDevice>>,
        key: Option<crypt::Volume>,
    ) -> Result<Arc<Foreign>> {
        let layout = match key {
            Some(key) => self.layout.unlocked(key)?,
            None => Arc::clone(&self.layout),
        };
        Foreign::new(layout, Arc::clone(&self.storage), backing).map(Arc::new)
    }
}
