//! What a format lies in: files, devices, protocols, other images; and the locks that qemu takes on them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::adapter::DeviceStorage;
use block::file::{FileOptions, HostFile};
use block::lock::Permissions;
use block::{Error, ErrorKind, Result, Storage};

use super::{BackingMode, Layer, OpenOptions, Share};
use crate::format::Format;
use crate::spec::{Locking, Node, Opening, ProtocolRequest, Source, could_not_open, open_protocol};

/// An opened container.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) file: Option<Arc<HostFile>>,
    pub(crate) nested: Option<Arc<Layer>>,
    /// The name of the member of an archive; `file` is the archive then.
    pub(crate) member: Option<String>,
    pub(crate) protocol: String,
    locking: Locking,
}

/// What the container is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The image that was asked for.
    Top,
    /// A backing file.
    Backing,
    /// A backing file that will be written to.
    Base,
}

impl Container {
    /// Opens what a node lies in. `format`: that of the image, if it has been named.
    ///
    /// # Errors
    /// The host's, with the path; or the protocol's.
    pub(crate) fn open(
        node: &Node,
        writable: bool,
        format: Option<Format>,
        options: &OpenOptions,
    ) -> Result<Self> {
        match &node.source {
            Source::File { path, device, locking, direct } => {
                let file = open_file(Path::new(path), writable, *direct, options)?;
                if *device && !file.fixed_len() {
                    return Err(Error::usage(format!(
                        "'host_device' driver requires '{path}' to be either a character or block device"
                    )));
                }
                Ok(Self::of_file(file, *locking))
            }
            Source::Protocol(request) => {
                if let Some(null) = request.null() {
                    return Ok(Self {
                        storage: Arc::new(null?),
                        file: None,
                        nested: None,
                        member: None,
                        protocol: request.driver.clone(),
                        locking: Locking::Off,
                    });
                }
                let how = Opening { secrets: &options.secrets, no_flush: options.cache.no_flush() };
                let device = open_protocol(&ProtocolRequest { writable, ..request.clone() }, &how)?;
                Ok(Self {
                    storage: Arc::new(DeviceStorage::resizable(device)),
                    file: None,
                    nested: None,
                    member: None,
                    protocol: request.driver.clone(),
                    locking: Locking::Off,
                })
            }
            Source::Nested(inner) => Self::of_image(inner, writable, options),
            Source::Member { archive, member } => {
                if writable {
                    let message = format!("'{archive}' is an archive, whose members are not written");
                    return Err(Error::new(ErrorKind::ReadOnly, message));
                }
                let file = open_file(Path::new(archive), false, false, options)?;
                Self::of_member(file, member, format)
            }
        }
    }

    /// A member of an archive. One that was called raw may begin like a compressed one and is left as it is.
    fn of_member(file: Arc<HostFile>, member: &str, format: Option<Format>) -> Result<Self> {
        let archive = Arc::clone(&file) as Arc<dyn Storage>;
        let found = foreign::archive::open(archive, member, format != Some(Format::Raw))?;
        Ok(Self { storage: found.storage, member: Some(found.name), ..Self::of_file(file, Locking::Auto) })
    }

    fn of_file(file: Arc<HostFile>, locking: Locking) -> Self {
        let protocol = if file.fixed_len() { "host_device" } else { "file" };
        Self {
            storage: Arc::clone(&file) as Arc<dyn Storage>,
            file: Some(file),
            nested: None,
            member: None,
            protocol: protocol.to_owned(),
            locking,
        }
    }

    /// The disk of another image as a container. The option tree is finite and comes from the command line,
    /// so that this recursion is bounded by what was typed.
    fn of_image(inner: &Node, writable: bool, options: &OpenOptions) -> Result<Self> {
        let options = OpenOptions {
            writable,
            format: None,
            backing: BackingMode::Follow,
            metadata_only: false,
            snapshot: None,
            ..options.clone()
        };
        let layer = super::chain::open_chain(inner, &options)?;
        Ok(Self {
            storage: Arc::new(DeviceStorage::new(layer.device())),
            file: None,
            protocol: layer.format.name().to_owned(),
            nested: Some(layer),
            member: None,
            locking: Locking::Off,
        })
    }

    /// The format that the contents announce.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn probe(&self) -> Result<Option<Format>> {
        let mut first = [0; Format::PROBE_LEN];
        self.storage.read_at(&mut first, 0)?;
        match (crate::formats::probe(&first, &*self.storage)?, crate::format::foreign(&first)) {
            (None, Some(name)) => Err(crate::format::not_readable(name)),
            (recognised, _) => Ok(recognised),
        }
    }

    /// Locks the container as qemu does for an image of `format`.
    ///
    /// # Errors
    /// `Locked`, in qemu's words.
    pub(crate) fn lock(&self, format: Format, writable: bool, options: &OpenOptions) -> Result<()> {
        match &self.file {
            Some(file) if self.locking != Locking::Off => {
                let (wanted, shared) = image_permissions(format, writable, options);
                file.lock(wanted, shared)
            }
            _ => Ok(()),
        }
    }

    /// What distinguishes the container from every other: device and inode of its file.
    pub(crate) fn identity(&self) -> Option<(u64, u64)> {
        self.file.as_ref().map(|file| file.identity())
    }
}

/// What is taken, and what others may still take, on the file of an image.
fn image_permissions(format: Format, writable: bool, options: &OpenOptions) -> (Permissions, Permissions) {
    let mut wanted = Permissions::CONSISTENT_READ;
    if options.force_share {
        return (wanted, Permissions::ALL);
    }
    let mut shared = Permissions::ALL;
    if writable {
        wanted = wanted | Permissions::WRITE;
        if options.resizable || format != Format::Raw {
            wanted = wanted | Permissions::RESIZE;
        }
    }
    if format != Format::Raw || options.share == Share::NoWriters {
        shared = shared.without(Permissions::WRITE | Permissions::RESIZE);
    }
    (wanted, shared)
}

/// The same for an external data file.
fn data_file_permissions(writable: bool, options: &OpenOptions) -> (Permissions, Permissions) {
    let reading = Permissions::CONSISTENT_READ;
    if options.force_share {
        return (reading, Permissions::ALL);
    }
    let wanted = if writable { reading | Permissions::WRITE | Permissions::RESIZE } else { reading };
    let shared = match options.share {
        Share::Format => Permissions::ALL.without(Permissions::RESIZE),
        Share::NoWriters => Permissions::ALL.without(Permissions::WRITE | Permissions::RESIZE),
    };
    (wanted, shared)
}

/// Opens a file that must exist.
fn open_file(path: &Path, writable: bool, direct: bool, options: &OpenOptions) -> Result<Arc<HostFile>> {
    let cache = if direct { block::file::CacheMode::None } else { options.cache };
    let keep_access_time = options.keep_access_time;
    let options = FileOptions { writable, cache, keep_access_time, ..FileOptions::default() };
    let opened = HostFile::open(path, &options).map_err(|error| match error.message() {
        // qemu names the file once only where the sentence already does.
        message if message.starts_with("'file' driver requires") => error,
        _ => error.context(could_not_open(&path.display().to_string())),
    });
    opened.map(Arc::new)
}

/// Opens and locks further files that an image's contents lie in, each once: the same file under two names is the same
/// object.
///
/// # Errors
/// The host's, with the path; `Locked`; or a file is the image itself.
pub(crate) fn open_extents(
    paths: &[(PathBuf, bool)],
    image: &Container,
    format: Format,
    options: &OpenOptions,
) -> Result<Vec<Arc<HostFile>>> {
    let mut files: Vec<Arc<HostFile>> = vec![];
    let mut by_path: HashMap<(&Path, bool), Arc<HostFile>> = HashMap::new();
    let mut by_identity: HashMap<(u64, u64), Arc<HostFile>> = HashMap::new();
    for (path, writable) in paths {
        if let Some(file) = by_path.get(&(path.as_path(), *writable)) {
            files.push(Arc::clone(file));
            continue;
        }
        let file = open_file(path, *writable, false, options)?;
        if image.identity() == Some(file.identity()) {
            let message =
                format!("the image names itself ('{}') as a file that holds its data", path.display());
            return Err(Error::invalid(message));
        }
        let file = match by_identity.get(&file.identity()) {
            Some(known) if !known.read_only() || !*writable => Arc::clone(known),
            _ => {
                if image.locking != Locking::Off {
                    let (wanted, shared) = image_permissions(format, *writable, options);
                    file.lock(wanted, shared)?;
                }
                by_identity.insert(file.identity(), Arc::clone(&file));
                file
            }
        };
        by_path.insert((path, *writable), Arc::clone(&file));
        files.push(file);
    }
    Ok(files)
}

/// Opens and locks an external data file.
///
/// # Errors
/// The host's, with the path; `Locked`; or the file is the image itself.
pub(crate) fn open_data_file(
    source: &Source,
    image: &Container,
    writable: bool,
    options: &OpenOptions,
) -> Result<Arc<HostFile>> {
    let Source::File { path, locking, direct, .. } = source else {
        return Err(Error::unsupported("an external data file must be a plain file"));
    };
    let file = open_file(Path::new(path), writable, *direct, options)?;
    if image.identity() == Some(file.identity()) {
        return Err(Error::invalid(format!("the data file '{path}' is the image itself")));
    }
    if *locking != Locking::Off {
        let (wanted, shared) = data_file_permissions(writable, options);
        file.lock(wanted, shared)?;
    }
    Ok(file)
}
