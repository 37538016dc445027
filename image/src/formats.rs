//! Formats behind a common interface: one driver each, one place to add another.
//!
//! raw, qcow2 and luks have paths of their own through this crate, because other commands know their insides. Every
//! other format is a [`Driver`]: it recognises images, reads what must be known before other files are opened
//! ([`Found`]), and makes new images ([`Make`]). Which files named inside an image may be opened, how they are locked,
//! and in which order a chain is built is decided by the caller, not by the drivers.

mod foreign;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{CacheMode, HostFile};
use block::image::{CheckReport, Image, Repair};
use block::{BlockDevice, Error, Result, Storage};

pub(crate) use crate::create::make::Made;
use crate::format::Format;
use crate::open::Layer;
use crate::options::{Definition, Options};
use crate::secret::Secrets;
use crate::spec::Node;

/// The driver of a format, if it has one.
pub(crate) fn driver(format: Format) -> Option<&'static dyn Driver> {
    match format {
        Format::Raw | Format::Qcow2 | Format::Luks => None,
        Format::Vpc => Some(&vpc::Vpc),
        Format::Vdi => Some(&vdi::Vdi),
        Format::Cloop | Format::Parallels | Format::Qed | Format::Bochs | Format::Dmg | Format::Qcow => {
            foreign::driver(format)
        }
        Format::Vmdk => Some(&vmdk::Vmdk),
        Format::Vhdx => Some(&vhdx::Format),
    }
}

/// The format that a container announces. `first`: its first [`Format::PROBE_LEN`] bytes, zeros behind its end.
///
/// # Errors
/// The container is a damaged image of a format that is known by its end, or the host failed.
pub(crate) fn probe(first: &[u8], storage: &dyn Storage) -> Result<Option<Format>> {
    if let Some(format) = Format::probe(first) {
        return Ok(Some(format));
    }
    for &format in Format::ALL {
        if let Some(driver) = driver(format)
            && driver.probe(first, storage)?
        {
            return Ok(Some(format));
        }
    }
    Format::ALL
        .iter()
        .filter_map(|format| driver(*format))
        .try_for_each(|driver| driver.refuse_damaged(storage))?;
    Ok(None)
}

/// What can be done with images of a format, for decisions that are made before there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Abilities {
    /// New images can be made.
    pub(crate) create: bool,
    /// Compressed clusters can be stored.
    pub(crate) compress: bool,
    /// An image can name a backing file.
    pub(crate) backing: bool,
    /// Every byte of the disk has its place in the file from the start, whatever the order of writes.
    pub(crate) fixed_places: bool,
}

/// A format as the image layer sees it.
pub(crate) trait Driver: Sync {
    /// What can be done with its images.
    fn abilities(&self) -> Abilities;

    /// Whether a container holds such an image. `first` are its first [`Format::PROBE_LEN`] bytes (zeros behind its
    /// end); `storage` is for formats that are known by their end.
    ///
    /// # Errors
    /// The host failed. What is merely damaged is recognised or not, as the magic says.
    fn probe(&self, first: &[u8], storage: &dyn Storage) -> Result<bool>;

    /// Refuses a container that no format recognises and that would be taken for a raw disk, but that is an image of this
    /// format which has been damaged.
    ///
    /// # Errors
    /// What is damaged, or the host failed.
    fn refuse_damaged(&self, _storage: &dyn Storage) -> Result<()> {
        Ok(())
    }

    /// Reads what must be known before any other file is opened.
    ///
    /// # Errors
    /// The image breaks the rules of its format.
    fn read(&self, storage: &Arc<dyn Storage>, how: &How) -> Result<Box<dyn Found>>;

    /// Options of a node (`--image-opts`) that the format takes.
    fn node_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// Creation options, in the order in which `create` shows them.
    fn create_options(&self) -> &'static [Definition] {
        &[]
    }

    /// Understands a request to create an image of `size` bytes. Touches nothing.
    ///
    /// # Errors
    /// Options that do not go together, in qemu's words.
    fn plan(&self, size: u64, options: &Options) -> Result<Box<dyn Make>>;
}

/// That images of a format cannot be created.
pub(crate) fn cannot_create(format: Format) -> Error {
    let error = Error::usage(format!("Format driver '{format}' does not support image creation"));
    match format {
        Format::Qcow => error.hint("qcow is version 1, which is only read; the format of today is qcow2"),
        _ => error.hint(format!("{format} images are only read; qcow2 has all that they can do")),
    }
}

/// How an image is about to be opened.
#[derive(Debug, Clone, Default)]
pub(crate) struct How {
    /// For writing.
    pub(crate) writable: bool,
    /// The structures will be examined, not relied upon: what only a check can bear is let pass.
    pub(crate) for_check: bool,
    /// Only the description is wanted.
    pub(crate) metadata_only: bool,
}

/// An image whose own container has been read. No other file has been opened.
pub(crate) trait Found: Debug + Send + Sync {
    /// What the image names as its backing file.
    fn backing(&self) -> Option<BackingName> {
        None
    }

    /// Further files that hold parts of the image, in the order in which [`Parts::extents`] will have them.
    fn extents(&self) -> Vec<ExtentFile> {
        vec![]
    }

    /// What the user should be told.
    fn warnings(&self) -> Vec<String> {
        vec![]
    }

    /// Puts the image together.
    ///
    /// # Errors
    /// The parts do not fit, or break the rules of the format.
    fn open(&self, parts: Parts<'_>) -> Result<Arc<dyn Image>>;

    /// Checks the structures, and repairs as far as asked.
    ///
    /// # Errors
    /// `Unsupported` if there is nothing to check; otherwise what prevents the check as a whole.
    fn check(&self, parts: Parts<'_>, repair: Repair) -> Result<CheckReport> {
        let _ = (parts, repair);
        Err(Error::unsupported("This image format does not support checks"))
    }
}

/// The name of a backing file, as an image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackingName {
    /// The ways in which the image names it (at least one), best first. The first that leads to a file is taken; where
    /// none does, the first is the one to complain about. Relative names count from the image's directory.
    pub(crate) names: Vec<String>,
    /// Its format, if the image or the rules of the image's format say.
    pub(crate) format: Option<String>,
    /// It must lie in the image's directory, or below, unless the command line allows more.
    pub(crate) confined: bool,
}

/// A further file of an image. It must lie in the image's directory, or below, unless the command line allows more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExtentFile {
    /// Its name; relative names count from the image's directory.
    pub(crate) name: String,
    /// It is opened for writing if the image is.
    pub(crate) writable: bool,
}

/// What an image is put together from.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    /// Its container.
    pub(crate) storage: Arc<dyn Storage>,
    /// The files that [`Found::extents`] asked for. A file that is named twice is open once.
    pub(crate) extents: Vec<Arc<HostFile>>,
    /// The image that answers for what this one does not store.
    pub(crate) backing: Option<Arc<Layer>>,
    /// For writing.
    pub(crate) writable: bool,
    /// Only the description is wanted.
    pub(crate) metadata_only: bool,
    /// How hard clusters that are written compressed are compressed.
    pub(crate) level: qcow2::codec::Level,
    /// The node, for its options.
    pub(crate) node: &'a Node,
    /// Passphrases, by the names that options refer to.
    pub(crate) secrets: &'a Secrets,
}

impl Parts<'_> {
    /// The value of a node option.
    pub(crate) fn option(&self, key: &str) -> Option<String> {
        let found = self.node.options.iter().find(|(name, _)| name == key);
        found.and_then(|(_, value)| crate::spec::text_of(value))
    }
}

/// A request to create an image that has been understood.
pub(crate) trait Make: Debug {
    /// Files that will be made beside the image when it is called `named`.
    fn others(&self, named: &Path) -> Vec<PathBuf> {
        let _ = named;
        vec![]
    }

    /// Makes the files; [`Made`] removes them again on failure.
    ///
    /// # Errors
    /// The host failed.
    fn carry_out(&self, made: &mut Made, place: &Place<'_>) -> Result<()>;

    /// Begins the image on something that can only be appended to (a pipe), to be filled in the order of the disk
    /// and completed by closing it. `None`, with nothing written: images of this kind cannot be made like that.
    ///
    /// # Errors
    /// The host failed.
    fn stream(
        &self,
        output: &Arc<dyn Storage>,
        level: qcow2::codec::Level,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        let _ = (output, level);
        Ok(None)
    }
}

/// Where a new image goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The main file.
    pub(crate) path: &'a Path,
    /// What the main file will be called in the end, from which the names of others are made.
    pub(crate) named: &'a Path,
    /// Cache mode of the files.
    pub(crate) cache: CacheMode,
    /// Further files, too, get temporary names until the image is complete.
    pub(crate) others_partial: bool,
}

impl Place<'_> {
    /// Where to write a further file that will be called `named` in the end.
    pub(crate) fn other(&self, named: &Path) -> PathBuf {
        if self.others_partial { crate::target::partial_path(named) } else { named.to_owned() }
    }
}
