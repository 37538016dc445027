//! Opening an image and the chain of images behind it.
//!
//! Downwards first: each image's container is opened, locked and recognised, and its header says what lies
//! behind it, until an image stands on its own. Then upwards: each image is built on the one behind it. Both
//! ways are loops, so that a long chain costs no stack, and every file that is opened is remembered, so that
//! a chain that returns to itself is noticed at once.

mod chain;
mod names;
mod pipe;
mod source;

use std::path::PathBuf;
use std::sync::Arc;

use block::file::{CacheMode, HostFile};
use block::image::Image;
use block::{BlockDevice, Result, Storage};
use crypt::Luks;
use qcow2::Qcow2;

use crate::format::Format;
use crate::policy::Policy;
use crate::secret::Secrets;
use crate::spec::{Spec, could_not_open};

pub(crate) use chain::{Opened, open_luks, open_own};
pub(crate) use names::{backing_node, folder_of, resolve_name};
pub use pipe::open_pipe;
pub(crate) use source::Purpose;

/// The most images that a chain may have.
pub const MAX_CHAIN: usize = 1000;

/// Whether the chain behind an image is opened too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackingMode {
    /// With the whole chain.
    #[default]
    Follow,
    /// Only the image itself; reading what it does not store gives zeros.
    Ignore,
}

/// What other processes may do with the image while it is open here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Share {
    /// Whatever the format can bear (raw: anything; qcow2: no writers).
    #[default]
    Format,
    /// No writers (the sources of a convert).
    NoWriters,
}

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// For writing. Backing files are always opened read-only.
    pub writable: bool,
    /// The member of the chain so many hops below the first one (at least 1) is opened for writing, too: what is
    /// on top of it will be committed to it.
    pub writable_base: Option<usize>,
    /// The size will be changed.
    pub resizable: bool,
    /// How the host's cache is used.
    pub cache: CacheMode,
    /// Read although somebody else writes (`-U`).
    pub force_share: bool,
    /// The format; `None`: what the spec says, or else found out from the contents.
    pub format: Option<Format>,
    /// Whether to open backing files.
    pub backing: BackingMode,
    /// Which names inside images are followed.
    pub policy: Policy,
    /// Passphrases of encrypted images, by the names that options like `key-secret` refer to.
    pub secrets: Secrets,
    /// What others may do meanwhile.
    pub share: Share,
    /// Only the description is wanted: the data file is not opened, and an encrypted image needs no key.
    /// Reading guest data fails.
    pub metadata_only: bool,
    /// The image is being made by a convert: its extents still have their temporary names.
    pub extents_partial: bool,
    /// The structures will be examined, not relied upon: what only a check can bear is let pass.
    pub for_check: bool,
    /// How hard clusters that are written compressed are compressed.
    pub compression: qcow2::codec::Level,
    /// Reading leaves the times of access of all files as they are, where the host allows it.
    pub keep_access_time: bool,
    /// Show the image (not those behind it) as it was when this internal snapshot was taken. Read-only.
    pub snapshot: Option<qcow2::snapshot::Selector>,
}

/// An opened image and, behind it, its backing file.
#[derive(Debug)]
pub struct Layer {
    /// Its name as qemu shows it.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// Nobody said that it is raw; nothing else was recognised.
    pub probed: bool,
    /// It comes through a pipe: it can be read once, from its start to its end.
    pub sequential: bool,
    /// Named as a protocol where a format could have been (`driver=file`): shown under this name.
    pub protocol_only: Option<&'static str>,
    /// qemu's name of what lies below the format: `file`, `host_device`, `nbd`...
    pub protocol: String,
    /// The image.
    pub image: Arc<dyn Image>,
    /// The same object, if it is a qcow2 image.
    pub qcow2: Option<Arc<Qcow2>>,
    /// The same object, if it is a LUKS container.
    pub luks: Option<Arc<Luks>>,
    /// The bytes that the format lies in.
    pub storage: Arc<dyn Storage>,
    /// The same, if it is a file or block device.
    pub file: Option<Arc<HostFile>>,
    /// The name of the member, if the image lies in a member of an archive; the file is the archive then.
    pub member: Option<String>,
    /// The same, if it is the disk of another image.
    pub container: Option<Arc<Self>>,
    /// The external data file.
    pub data_file: Option<Arc<HostFile>>,
    /// Further files that hold parts of the image, in its order; one that is named twice is here twice.
    pub extents: Vec<Arc<HostFile>>,
    /// The image that answers for what this one does not store.
    pub backing: Option<Arc<Self>>,
    /// The name of what it lies in, if that is neither a file nor another image.
    pub source_name: String,
    /// The backing file's name, resolved from the directory of this image, as qemu shows it.
    pub full_backing_filename: Option<String>,
    /// The folder that the backing file must lie in, where the format has such a rule.
    pub(crate) confined_to: Option<PathBuf>,
    /// The secret that the image was unlocked with.
    pub key_secret: Option<String>,
    /// How much work trying a passphrase may be.
    pub(crate) effort: crypt::luks::Effort,
    /// What the user should be told about the image itself; without prefix.
    pub warnings: Vec<String>,
}

impl Layer {
    /// The disk.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.image).into_device()
    }

    /// This layer and those behind it, top first.
    pub fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |layer| layer.backing.as_deref())
    }

    /// The file or device that holds the image, if there is one.
    pub fn path(&self) -> Option<PathBuf> {
        self.file.as_ref().map(|file| file.path().to_path_buf())
    }

    /// The files of this layer: its container, its data file, its extents.
    pub fn own_files(&self) -> impl Iterator<Item = &Arc<HostFile>> {
        self.file.iter().chain(&self.data_file).chain(&self.extents)
    }

    /// Every file of the chain: containers, data files, extents.
    pub fn files(&self) -> impl Iterator<Item = &Arc<HostFile>> {
        self.chain().flat_map(Self::own_files)
    }

    /// The words with which qemu warns before it writes to an image whose format it had to guess.
    pub fn probed_raw_warning(&self) -> Option<String> {
        self.probed.then(|| probed_raw_warning(&self.filename))
    }
}

/// qemu's warning about an image that is only believed to be raw.
pub(crate) fn probed_raw_warning(filename: &str) -> String {
    format!(
        "WARNING: Image format was not specified for '{filename}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
         restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions."
    )
}

/// Opens an image and its chain.
///
/// # Errors
/// With qemu's words around them: missing files, locks, images that break their format's rules, endless
/// chains, names that the policy forbids.
pub fn open(spec: &Spec, options: &OpenOptions) -> Result<Arc<Layer>> {
    chain::open_chain(spec.node(), options).map_err(|error| match error.to_string() {
        // The image could be opened; qemu does not name it then.
        message if message.starts_with(chain::NO_SNAPSHOT) => error,
        _ => error.context(could_not_open(spec.display_name())),
    })
}

/// Opens a node without saying who asked.
pub(crate) fn open_node(node: &crate::spec::Node, options: &OpenOptions) -> Result<Arc<Layer>> {
    chain::open_chain(node, options)
}

#[cfg(test)]
mod tests;
