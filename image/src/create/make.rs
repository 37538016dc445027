//! The second half of creating: from understood options to files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{CacheMode, CreateMode, FileOptions, HostFile};
use block::lock::Permissions;
use block::{BlockDevice, Error, ErrorKind, Preallocation, Result, Storage, ZeroMode};
use qcow2::create::CreateOptions;
use qcow2::header::{COMPRESSION_ZLIB, COMPRESSION_ZSTD};
use qcow2::{Header, Qcow2};

mod encryption;
mod luks;

pub(crate) use encryption::Encryption;
pub(crate) use luks::measured as measured_luks;

use super::{could_not_create, does_not_accept};
use crate::format::Format;
use crate::formats::{self, Make, Place};
use crate::options::Options;
use crate::secret::Secrets;

/// Everything that is needed to make the files, checked.
#[derive(Debug)]
pub(super) enum Plan {
    /// A raw file.
    Raw {
        /// Its length in bytes.
        size: u64,
        /// How much of it gets space.
        preallocation: Preallocation,
    },
    /// A LUKS container.
    Luks(luks::Plan),
    /// A qcow2 image.
    Qcow2 {
        /// What it is to be like.
        options: Box<CreateOptions>,
        /// Its data file.
        data_file: Option<PathBuf>,
        /// How it is encrypted.
        encryption: Option<Encryption>,
    },
    /// An image of a format with a driver.
    Other(Box<dyn Make>),
}

impl Plan {
    /// Checks the values of the options and whether they go together.
    pub(super) fn new(format: Format, size: u64, options: &Options, secrets: &Secrets) -> Result<Self> {
        if let Some(driver) = formats::driver(format) {
            return match driver.abilities().create {
                true => Ok(Self::Other(driver.plan(size, options)?)),
                false => Err(formats::cannot_create(format)),
            };
        }
        match format {
            Format::Raw => {
                let size = size.checked_next_multiple_of(512).unwrap_or(size);
                Ok(Self::Raw { size, preallocation: protocol_preallocation(options)? })
            }
            Format::Luks => Ok(Self::Luks(luks::Plan::new(size, options, secrets)?)),
            _ => {
                let encryption = Encryption::new(options, secrets)?;
                let create = qcow2_options(size, options)?;
                create.validate()?;
                let data_file = options.given("data_file").map(PathBuf::from);
                Ok(Self::Qcow2 { options: Box::new(create), data_file, encryption })
            }
        }
    }

    /// The files that will be made beside an image that is to be called `named`.
    pub(super) fn others(&self, named: &Path) -> Vec<PathBuf> {
        match self {
            Self::Qcow2 { data_file, .. } => data_file.iter().cloned().collect(),
            Self::Other(make) => make.others(named),
            Self::Raw { .. } | Self::Luks(_) => vec![],
        }
    }

    /// Begins the image in a pipe, where its format can be written like that.
    pub(super) fn stream(
        &self,
        output: &Arc<dyn Storage>,
        level: qcow2::codec::Level,
    ) -> Result<Option<Arc<dyn BlockDevice>>> {
        match self {
            Self::Other(make) => make.stream(output, level),
            _ => Ok(None),
        }
    }

    /// Makes the files; removes them again on failure.
    pub(super) fn carry_out(&self, place: Place<'_>) -> Result<Vec<PathBuf>> {
        let mut made = Made::default();
        if let Self::Other(make) = self {
            make.carry_out(&mut made, &place)?;
            return Ok(made.keep());
        }
        let Place { path, cache, .. } = place;
        // What takes long, and may fail, comes before an old file is given up.
        let keys = match self {
            Self::Qcow2 { encryption: Some(encryption), .. } => Some(encryption.make()?),
            _ => None,
        };
        let volume = match self {
            Self::Luks(plan) => Some(plan.make_volume()?),
            _ => None,
        };
        let file = made.file(path, cache)?;
        match self {
            Self::Luks(plan) => plan.carry_out(&file, volume)?,
            Self::Raw { size, preallocation } => make_raw(&file, *size, *preallocation)?,
            Self::Other(_) => {}
            Self::Qcow2 { options, data_file, .. } => {
                let data_file = match data_file {
                    Some(path) => Some(make_data_file(&mut made, path, cache, &file, options)?),
                    None => None,
                };
                make_qcow2(&file, data_file, options, keys.as_ref())?;
            }
        }
        Ok(made.keep())
    }
}

/// Files that are removed unless they are kept.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Creates or empties a file, and locks it.
    ///
    /// # Errors
    /// The host's, or somebody else is writing to it.
    pub(crate) fn file(&mut self, path: &Path, cache: CacheMode) -> Result<Arc<HostFile>> {
        let file = match existing(path, cache)? {
            Some(file) => file,
            None => {
                let options =
                    FileOptions { cache: buffered(cache), ..FileOptions::creating(CreateMode::New) };
                let file = could_not_create(path, HostFile::open(path, &options))?;
                lock_for_making(&file)?;
                file
            }
        };
        if !file.fixed_len() {
            self.paths.push(path.to_owned());
            file.set_len(0)?;
        }
        Ok(Arc::new(file))
    }

    /// Makes sure that each of the files that is there already can be emptied, before the first of them is: none of an
    /// image in several files is lost because another of them is in use.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub(crate) fn check_all(paths: &[PathBuf], cache: CacheMode) -> Result<()> {
        paths.iter().try_for_each(|path| existing(path, cache).map(drop))
    }

    /// Leaves the files where they are.
    fn keep(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.paths)
    }
}

/// A new file that is only flushed once need not go around the page cache to be created.
fn buffered(cache: CacheMode) -> CacheMode {
    if cache.direct() { CacheMode::Writeback } else { cache }
}

/// The file that is there already, locked; nothing of it is lost yet.
fn existing(path: &Path, cache: CacheMode) -> Result<Option<HostFile>> {
    let options = FileOptions { cache: buffered(cache), ..FileOptions::read_write() };
    let file = match HostFile::open(path, &options) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => could_not_create(path, opened)?,
    };
    lock_for_making(&file)?;
    Ok(Some(file))
}

/// Before anything is lost: nobody else may be writing. (qemu-img empties a raw disk that a guest is using, and removes
/// it when it then fails to lock it for qcow2.)
fn lock_for_making(file: &HostFile) -> Result<()> {
    let shared = Permissions::ALL.without(Permissions::WRITE | Permissions::RESIZE);
    file.lock(Permissions::WRITE | Permissions::RESIZE, shared)
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            // The first failure is the one to report.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn make_raw(file: &HostFile, size: u64, preallocation: Preallocation) -> Result<()> {
    if !file.fixed_len() {
        return block::raw::preallocate(file, size, preallocation);
    }
    if preallocation != Preallocation::Off {
        return Err(Error::unsupported(format!(
            "Unsupported preallocation mode '{}'",
            name_of(preallocation)
        )));
    }
    if size > file.len()? {
        return Err(Error::usage("Cannot grow device files"));
    }
    // As qemu: what was on the device before must not be recognised as an image.
    file.zero_range(0, size.min(512), ZeroMode::ALLOCATE)
}

fn make_data_file(
    made: &mut Made,
    path: &Path,
    cache: CacheMode,
    image: &HostFile,
    options: &CreateOptions,
) -> Result<Arc<HostFile>> {
    if std::fs::metadata(path).is_ok() && same_file(path, image) {
        return Err(Error::usage(format!("the data file '{}' is the image itself", path.display())));
    }
    let file = made.file(path, cache)?;
    let size = options.size.next_multiple_of(512);
    if !file.fixed_len() {
        file.set_len(size)?;
    } else if file.len()? < size {
        return Err(Error::usage("Could not resize image: Cannot grow device files"));
    }
    Ok(file)
}

fn same_file(path: &Path, file: &HostFile) -> bool {
    let other = HostFile::open(path, &FileOptions::read_only());
    other.is_ok_and(|other| other.identity() == file.identity())
}

fn make_qcow2(
    file: &Arc<HostFile>,
    data_file: Option<Arc<HostFile>>,
    options: &CreateOptions,
    keys: Option<&encryption::Made>,
) -> Result<()> {
    qcow2::create::create(&**file, options)?;
    let preallocation = match options.preallocation {
        // A raw copy of the disk is one only if every cluster has its place there.
        Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
        Preallocation::Off if keys.is_none() => return Ok(()),
        mode => mode,
    };
    let storage = Arc::clone(file) as Arc<dyn Storage>;
    let mut open = qcow2::OpenOptions {
        writable: true,
        data_file: data_file.map(|file| file as Arc<dyn Storage>),
        ..qcow2::OpenOptions::default()
    };
    if let Some(keys) = keys {
        let image = Qcow2::open(Arc::clone(&storage), Header::read(&*storage)?, open.clone())?;
        open.encryption = Some(keys.apply(&image)?);
        image.close()?;
    }
    let header = Header::read(&*storage)?;
    let image = Qcow2::open(storage, header, open)?;
    image.preallocate(0, image.size(), preallocation)?;
    image.close()
}

fn qcow2_options(size: u64, options: &Options) -> Result<CreateOptions> {
    let bytes = |name| options.given(name).map(|text: &str| text.as_bytes().to_vec());
    Ok(CreateOptions {
        version: version(options)?,
        cluster_bits: qcow2::create::cluster_bits(options.number("cluster_size").unwrap_or(65536))?,
        refcount_order: qcow2::create::refcount_order(options.number("refcount_bits").unwrap_or(16))?,
        backing_file: bytes("backing_file"),
        backing_format: backing_format(options)?,
        lazy_refcounts: options.is_on("lazy_refcounts"),
        extended_l2: options.is_on("extended_l2"),
        compression_type: compression_type(options)?,
        data_file: bytes("data_file"),
        data_file_raw: options.is_on("data_file_raw"),
        preallocation: preallocation(options)?,
        ..CreateOptions::new(size)
    })
}

/// What `measure` has to know of the options. As qemu, it does not ask whether all of them go together.
pub(crate) fn measured_options(size: u64, options: &Options) -> Result<CreateOptions> {
    let create = qcow2_options(size, options)?;
    if create.extended_l2 && create.cluster_bits < 14 {
        create.validate()?;
    }
    Ok(create)
}

fn version(options: &Options) -> Result<u32> {
    match options.given("compat") {
        None | Some("1.1" | "v3") => Ok(3),
        Some("0.10" | "v2") => Ok(2),
        Some(other) => Err(does_not_accept("version", other)),
    }
}

fn compression_type(options: &Options) -> Result<u8> {
    match options.get("compression_type") {
        None | Some("zlib") => Ok(COMPRESSION_ZLIB),
        Some("zstd") => Ok(COMPRESSION_ZSTD),
        Some(other) => Err(does_not_accept("compression-type", other)),
    }
}

/// Drivers of qemu that make sense as the format of a backing file, whether or not vimg reads them.
const BACKING_FORMATS: &[&str] = &[
    "bochs",
    "cloop",
    "dmg",
    "file",
    "host_device",
    "luks",
    "nbd",
    "parallels",
    "qcow",
    "qcow2",
    "qed",
    "raw",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

fn backing_format(options: &Options) -> Result<Option<Vec<u8>>> {
    match options.given("backing_fmt") {
        None | Some("") => Ok(None),
        Some(name) if BACKING_FORMATS.contains(&name) => Ok(Some(name.as_bytes().to_vec())),
        Some(other) => Err(does_not_accept("backing-fmt", other)),
    }
}

/// Whether images may name this as the format of their backing file.
pub(crate) fn is_backing_format(name: &str) -> bool {
    BACKING_FORMATS.contains(&name)
}

/// A mode of preallocation, for formats that leave it to the file.
pub(crate) fn protocol_preallocation(options: &Options) -> Result<Preallocation> {
    preallocation(options).map_err(|_| {
        let name = options.given("preallocation").unwrap_or_default();
        Error::usage(format!("invalid parameter value: {name}"))
    })
}

fn preallocation(options: &Options) -> Result<Preallocation> {
    match options.given("preallocation") {
        None => Ok(Preallocation::Off),
        Some(name) => parse_preallocation(name).ok_or_else(|| does_not_accept("preallocation", name)),
    }
}

/// A preallocation mode by qemu's name.
pub(crate) fn parse_preallocation(name: &str) -> Option<Preallocation> {
    [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
        .into_iter()
        .find(|mode| name_of(*mode) == name)
}

const fn name_of(mode: Preallocation) -> &'static str {
    match mode {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    }
}
