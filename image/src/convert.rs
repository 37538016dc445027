//! Copying disks into new images, whatever the formats.
//!
//! ```text
//!   sources -> Source -> Plan: extents become pieces      nothing is done for what costs nothing
//!                          |  next piece (a short lock)
//!              +-----------+-----------+
//!           worker      worker      worker                read, find zeros, compress: in parallel
//!              '-----------+-----------'
//!                        Turns                            space is given out in the order of the disk
//!                          |
//!                       target                            bytes are written in parallel again
//! ```
//!
//! [`convert_devices`] is the engine and knows only disks. [`convert`] puts files around it: it creates the
//! target under a temporary name, refuses what cannot go well, and leaves nothing behind that looks complete
//! and is not.
//!
//! Memory: `threads` times 512 KiB (or the target's cluster, or `-S`, where that is more), twice that where
//! a backing file is compared and when compressing, besides the metadata caches of the images: under 128 MiB
//! plus 4 MiB per thread.

mod bitmaps;
pub(crate) mod crew;
pub mod engine;
#[cfg(test)]
mod file_tests;
mod pipe;
mod plan;
mod salvage;
pub(crate) mod source;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub(crate) mod turns;
pub(crate) mod workers;

use std::path::Path;
use std::sync::Arc;

use block::file::CacheMode;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _, Storage as _, Stored};

pub use bitmaps::Bitmaps;
pub use engine::{EngineOptions, Tally, convert_devices, default_threads};
pub use pipe::{PipeTarget, can_be_sent};
pub use plan::Fresh;
pub use salvage::{Losses, Lost};
pub use source::Source;

use crate::create::{CreateRequest, prepare_create};
use crate::format::Format;
use crate::open::{Layer, OpenOptions, open};
use crate::progress::Progress;
use crate::secret::Secrets;
use crate::spec::Spec;
use crate::target::{Placement, check_space};

/// What to convert into what, and how.
#[derive(Debug)]
pub struct ConvertRequest {
    /// The opened sources, one after the other on the new disk.
    pub sources: Vec<Arc<Layer>>,
    /// What is read instead of what `sources` show: an overlay over the (single) source, in which something was changed.
    pub disk: Option<Arc<dyn BlockDevice>>,
    /// The part of the (single) source that is wanted, as offset and length in bytes; `None`: all of it.
    pub window: Option<(u64, u64)>,
    /// How messages call what failed.
    pub words: Words,
    /// The image to be written.
    pub target: Target,
    /// Cache mode of the target.
    pub cache: CacheMode,
    /// Clusters are stored compressed.
    pub compress: bool,
    /// How hard.
    pub compression: qcow2::codec::Level,
    /// Zeros of at least this many bytes are left out; 0: none are, the target takes space for everything.
    /// `None`: 4096, and where the kernel can share blocks zeros are not looked for.
    pub sparse: Option<u64>,
    /// Bytes that are read and written at once; `None`: what has proved itself.
    pub chunk: Option<u64>,
    /// How many threads work; `None`: as many as there are processors, within limits.
    pub threads: Option<usize>,
    /// Space in the target need not be given out in the order of the disk.
    pub out_of_order: bool,
    /// What cannot be read is replaced by zeros and reported.
    pub salvage: bool,
    /// At most this many bytes per second.
    pub rate: Option<u64>,
    /// What becomes of the dirty bitmaps of the (single) source.
    pub bitmaps: Bitmaps,
}

/// Threads for a copy over a network, at least.
const REMOTE_THREADS: usize = 8;

/// Whose words messages use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Words {
    /// `convert`'s.
    #[default]
    Convert,
    /// `dd`'s.
    Dd,
}

/// The image that is written.
#[derive(Debug)]
pub enum Target {
    /// It is created. Its size is that of the sources.
    Create(CreateRequest),
    /// It is there already (`-n`).
    Existing(Box<ExistingTarget>),
    /// It is created in a pipe.
    Pipe(Box<PipeTarget>),
}

/// An image that is written to as it is.
#[derive(Debug)]
pub struct ExistingTarget {
    /// Which it is.
    pub spec: Spec,
    /// Its format; `None`: what the spec says.
    pub format: Option<Format>,
    /// The user promises that it reads as zeros.
    pub is_zero: bool,
    /// What its backing file holds need not be copied (`-B`), if nothing has been written to the image itself
    /// yet.
    pub keep_backing: bool,
    /// Which names inside it are followed.
    pub policy: crate::policy::Policy,
    /// Passphrases.
    pub secrets: Secrets,
}

/// What a convert has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConvertReport {
    /// Size of the sources together in bytes.
    pub size: u64,
    /// What happened to these bytes.
    pub tally: Tally,
}

impl ConvertRequest {
    /// A convert with qemu-img's defaults.
    pub fn new(sources: Vec<Arc<Layer>>, target: Target) -> Self {
        Self {
            sources,
            disk: None,
            window: None,
            words: Words::Convert,
            target,
            cache: CacheMode::Unsafe,
            compress: false,
            compression: qcow2::codec::Level::default(),
            sparse: None,
            chunk: None,
            threads: None,
            out_of_order: false,
            salvage: false,
            rate: None,
            bitmaps: Bitmaps::Leave,
        }
    }

    /// How many threads work, where nobody says: what goes over a network is waited for rather than worked on.
    fn default_threads(&self, target: Option<&Layer>) -> usize {
        let remote = |layer: &Layer| layer.chain().any(|layer| layer.protocol == "nbd");
        let any = self.sources.iter().any(|source| remote(source)) || target.is_some_and(remote);
        if any { default_threads().max(REMOTE_THREADS) } else { default_threads() }
    }

    fn engine_options(&self, fresh: Fresh, format: Format, target: Option<&Layer>) -> EngineOptions {
        EngineOptions {
            threads: self.threads.unwrap_or_else(|| self.default_threads(target)),
            chunk: self.chunk,
            sparse: self.sparse.unwrap_or(4096),
            allocates_zeros: format == Format::Raw,
            fresh,
            // In a raw image every byte has its place.
            ordered: !self.out_of_order && !format.has_fixed_places(),
            compress: self.compress,
            share: self.sparse.is_none(),
            salvage: self.salvage,
            rate: self.rate,
        }
    }

    fn target_options(
        &self,
        format: Option<Format>,
        policy: crate::policy::Policy,
        secrets: &Secrets,
    ) -> OpenOptions {
        OpenOptions {
            writable: true,
            cache: self.cache,
            format,
            policy,
            secrets: secrets.clone(),
            compression: self.compression,
            ..OpenOptions::default()
        }
    }

    /// The disk that is copied.
    fn source(&self) -> Result<Source> {
        if let Some(disk) = &self.disk {
            return Source::new([Arc::clone(disk)]);
        }
        match (self.window, &self.sources[..]) {
            (Some((offset, len)), [source]) => Source::window(source.device(), offset, len),
            _ => Source::new(self.sources.iter().map(|source| source.device())),
        }
    }

    /// What stands in front of everything that goes wrong while the target is made.
    fn making(&self, create: &CreateRequest) -> String {
        match self.words {
            Words::Convert => format!("{}: error while converting {}", create.filename, create.format),
            Words::Dd => format!("{}: error while creating output image", create.filename),
        }
    }

    /// The length of every file that is read from, in bytes.
    fn source_lengths(&self) -> Vec<Option<u64>> {
        self.sources.iter().flat_map(|source| source.files()).map(|file| file.len().ok()).collect()
    }

    /// Refuses to call a copy complete whose source has lost its end meanwhile: what is past the end of a file
    /// reads as zeros.
    fn check_lengths(&self, before: &[Option<u64>]) -> Result<()> {
        let files = self.sources.iter().flat_map(|source| source.files());
        let mut shrunk = files.zip(before).filter(|(file, before)| file.len().ok() < **before);
        match shrunk.next() {
            Some((file, _)) => Err(Error::new(
                ErrorKind::Truncated,
                format!("'{}' became shorter while it was read", file.path().display()),
            )),
            None => Ok(()),
        }
    }

    /// Refuses to write to a file that is read from.
    fn refuse_own_source(&self, target: (u64, u64), name: &str) -> Result<()> {
        let files = self.sources.iter().flat_map(|source| source.files());
        match files.into_iter().find(|file| file.identity() == target) {
            Some(file) => Err(Error::usage(format!(
                "the target '{name}' is the same file as the source '{}'",
                file.path().display()
            ))),
            None => Ok(()),
        }
    }
}

/// Converts.
///
/// # Errors
/// In qemu's words; `Cancelled` if `progress` asked for it. A target that was created is gone then, except that
/// a file that had been there before is empty.
pub fn convert(request: &ConvertRequest, progress: &dyn Progress) -> Result<ConvertReport> {
    bitmaps::check(request)?;
    let once;
    let progress: &dyn Progress = if request.sources.iter().any(|source| source.sequential) {
        once = pipe::refuse_second_look(request, progress)?;
        &once
    } else {
        progress
    };
    let source = request.source()?;
    match &request.target {
        Target::Create(target) => match export(target)? {
            Some(existing) => convert_to_existing(request, &existing, &source, progress),
            None => convert_to_new(request, target, &source, progress),
        },
        Target::Existing(target) => convert_to_existing(request, target, &source, progress),
        Target::Pipe(target) => pipe::convert_to_pipe(request, target, &source, progress),
    }
}

/// The target as one that is there already, if that is what its name says: an export cannot be created.
fn export(target: &CreateRequest) -> Result<Option<ExistingTarget>> {
    let Ok(spec) = Spec::from_filename(&target.filename) else { return Ok(None) };
    if !spec.is_export() {
        return Ok(None);
    }
    if target.format != Format::Raw || !target.options.is_empty() || target.backing_file.is_some() {
        return Err(Error::unsupported(format!("an export takes the bytes of a disk, not a new {} image", target.format))
            .hint("make the image in a file and copy the file: vimg convert -n -f raw -O raw FILE nbd://HOST/EXPORT"));
    }
    Ok(Some(ExistingTarget {
        spec,
        format: Some(Format::Raw),
        is_zero: false,
        keep_backing: false,
        policy: target.policy.clone(),
        secrets: target.secrets.clone(),
    }))
}

fn convert_to_existing(
    request: &ConvertRequest,
    wanted: &ExistingTarget,
    source: &Source,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let target =
        open(&wanted.spec, &request.target_options(wanted.format, wanted.policy.clone(), &wanted.secrets))?;
    tell(&target, progress);
    for file in target.own_files() {
        request.refuse_own_source(file.identity(), &target.filename)?;
    }
    let fresh = fresh_of_existing(&request.sources, &target, wanted)?;
    run(request, source, &target, fresh, progress)
}

fn tell(layer: &Layer, progress: &dyn Progress) {
    layer.warnings.iter().for_each(|warning| progress.warn(warning));
}

fn fresh_of_existing(sources: &[Arc<Layer>], target: &Layer, wanted: &ExistingTarget) -> Result<Fresh> {
    match &target.backing {
        backing if wanted.is_zero && (backing.is_some() || wanted.keep_backing) => {
            Err(Error::usage("Cannot use --target-is-zero when the destination image has a backing file"))
        }
        Some(backing) if wanted.keep_backing && is_untouched(target)? => {
            Ok(Fresh::Backing { layers_above: shared_from(sources, backing) })
        }
        _ if wanted.is_zero => Ok(Fresh::Zeros),
        _ => Ok(Fresh::Unknown),
    }
}

/// Whether an image stores nothing itself.
fn is_untouched(layer: &Layer) -> Result<bool> {
    let (image, mut offset) = (&layer.image, 0);
    while offset < image.size() {
        let found = image.layer_extent(offset, image.size() - offset)?;
        if found.stored != Stored::Absent {
            return Ok(false);
        }
        offset += found.len;
    }
    Ok(true)
}

/// Copies into the opened target and closes it.
fn run(
    request: &ConvertRequest,
    source: &Source,
    target: &Layer,
    fresh: Fresh,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let device = target.device();
    progress.starting();
    let lengths = request.source_lengths();
    let options = options_for(request, target, &*device, fresh)?;
    let tally = convert_devices(source, &*device, &options, progress)?;
    request.check_lengths(&lengths)?;
    bitmaps::copy(request, target, progress)?;
    device.close().context(|| "error while flushing the target".to_owned())?;
    Ok(ConvertReport { size: source.size(), tally })
}

/// How the engine works for this target. As in qemu-img, an image that stores nothing but compressed clusters gets
/// them without having been asked for; and one that cannot store them, although others of its format can, gets
/// plain ones.
fn options_for(
    request: &ConvertRequest,
    target: &Layer,
    device: &dyn BlockDevice,
    fresh: Fresh,
) -> Result<EngineOptions> {
    let options = request.engine_options(fresh, target.format, Some(target));
    let able = device.compressed_writer().is_some();
    if able && target.image.info()?.compressed {
        return Ok(EngineOptions { compress: true, ordered: true, ..options });
    }
    let driven = crate::formats::driver(target.format).is_some();
    Ok(EngineOptions {
        compress: options.compress && (able || !driven || !target.format.can_compress()),
        ..options
    })
}

fn convert_to_new(
    request: &ConvertRequest,
    wanted: &CreateRequest,
    source: &Source,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let mut create = sized(wanted, source.size());
    refuse_impossible(request, &create)?;
    let (name, making) = (create.filename.clone(), request.making(&create));
    let converting = || making.clone();
    if name.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "Could not create '': No such file or directory"))
            .context(converting);
    }
    // Wrong options leave no trace.
    prepare_create(&create)?.validate().context(converting)?;
    let mut placement = place(&create.filename).context(converting)?;
    if let Some(existing) = placement.existing() {
        request.refuse_own_source(existing, &name).context(converting)?;
    }
    if fully_allocated(request, &create) {
        check_space(&placement, source.size()).context(converting)?;
    }
    create.physical_path = placement.partial().map(Path::to_owned);
    let target = match make(request, &create, &mut placement, progress) {
        Ok(target) => target,
        Err(error) => return Err(placement.translate(error)),
    };
    let fresh = fresh_of_new(request, &target, &create);
    let report = run(request, source, &target, fresh, progress);
    drop(target);
    match report {
        Ok(report) => placement.complete(!request.cache.no_flush()).map(|()| report),
        Err(error) => Err(incomplete(placement.translate(error), &placement, &name)),
    }
}

/// The request with the size of the sources, whatever `-o size=` says (as qemu-img does).
fn sized(wanted: &CreateRequest, size: u64) -> CreateRequest {
    let mut create = CreateRequest { size: Some(size), backing_unsafe: true, ..wanted.clone() };
    create.options.retain(|(name, _)| name != "size");
    create
}

/// The last value given for a creation option.
fn option<'a>(create: &'a CreateRequest, name: &str) -> Option<&'a str> {
    create.options.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// Combinations that are refused before anything is touched.
fn refuse_impossible(request: &ConvertRequest, create: &CreateRequest) -> Result<()> {
    let backing = create.backing_file.as_deref().or(option(create, "backing_file"));
    let backing_format = create.backing_format.as_deref().or(option(create, "backing_fmt"));
    // Of some formats that have backing files no image can be made with one.
    let nameable = crate::options::of_format(create.format).iter().any(|known| known.name == "backing_file");
    if backing.is_some() && !nameable {
        return Err(Error::usage(format!("Backing file not supported for file format '{}'", create.format)));
    }
    if backing.is_some() && backing_format.is_none() {
        return Err(Error::usage("Use of backing file requires explicit backing format"));
    }
    if !request.compress {
        return Ok(());
    }
    if !create.format.can_compress() {
        return Err(engine::compression_unsupported());
    }
    let encrypted = option(create, "encryption") == Some("on") || option(create, "encrypt.format").is_some();
    let preallocated = option(create, "preallocation").is_some_and(|mode| mode != "off");
    let conflict = if encrypted { "encryption" } else { "preallocation" };
    match encrypted || preallocated {
        true => Err(Error::usage(format!("Compression and {conflict} not supported at the same time"))),
        false => Ok(()),
    }
}

/// Chooses where the target is written.
fn place(filename: &str) -> Result<Placement> {
    let spec = Spec::from_filename(filename)?;
    Placement::new(spec.path().unwrap_or(Path::new(filename)))
}

/// Whether every byte of the disk will take a byte of the host's.
fn fully_allocated(request: &ConvertRequest, create: &CreateRequest) -> bool {
    let preallocation = option(create, "preallocation").unwrap_or("off");
    let elsewhere = option(create, "data_file").is_some();
    !elsewhere
        && (create.format == Format::Luks
            || matches!(preallocation, "falloc" | "full")
            || (request.sparse == Some(0) && !request.compress && !can_be_sent(create)))
}

/// Creates the target and opens it.
fn make(
    request: &ConvertRequest,
    create: &CreateRequest,
    placement: &mut Placement,
    progress: &dyn Progress,
) -> Result<Arc<Layer>> {
    let converting = || request.making(create);
    let prepared = prepare_create(create)?;
    let others = prepared.others().context(converting)?;
    for existing in others.iter().filter_map(|path| Placement::existing_at(path)) {
        request.refuse_own_source(existing, &create.filename)?;
    }
    // Extents get their names with the image; a data file is called what the command line says.
    let extents = crate::formats::driver(create.format).is_some();
    placement.overwrites_others(others.iter().filter(|path| extents && path.is_file()));
    let partial = create.physical_path.is_some() && extents;
    let prepared = if partial { prepared.with_partial_others() } else { prepared };
    let mut new = vec![];
    for path in others {
        match partial {
            true => placement.make_partial(path).context(converting)?,
            false if !path.exists() => new.push(path),
            false => {}
        }
    }
    let created = prepared.create().context(converting)?;
    created.warnings.iter().for_each(|warning| progress.warn(warning));
    new.into_iter().for_each(|path| placement.made(path));
    let name = create
        .physical_path
        .as_ref()
        .map_or_else(|| create.filename.clone(), |path| path.display().to_string());
    let options = OpenOptions {
        extents_partial: partial,
        ..request.target_options(Some(create.format), own_policy(create), &create.secrets)
    };
    let target = open(&target_spec(&name, create)?, &options)?;
    tell(&target, progress);
    Ok(target)
}

/// The new target as something to open: with the passphrase that it was created with.
fn target_spec(name: &str, create: &CreateRequest) -> Result<Spec> {
    let mut spec = Spec::from_filename(name)?;
    let key = if create.format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
    if let Some(id) = option(create, key) {
        spec.set_option(key, id);
    }
    Ok(spec)
}

/// The files that the command line names for the target may be followed although the target names them, too.
fn own_policy(create: &CreateRequest) -> crate::policy::Policy {
    let mut policy = create.policy.clone();
    let named = [create.backing_file.as_deref(), option(create, "backing_file"), option(create, "data_file")];
    let directory = Path::new(&create.filename).parent().unwrap_or(Path::new(""));
    policy.allow.extend(named.into_iter().flatten().map(|name| directory.join(name)));
    policy.allow.extend(option(create, "data_file").map(Into::into));
    policy
}

/// What a target that has just been created reads as.
fn fresh_of_new(request: &ConvertRequest, target: &Layer, create: &CreateRequest) -> Fresh {
    if let Some(backing) = &target.backing {
        return Fresh::Backing { layers_above: shared_from(&request.sources, backing) };
    }
    if !target.format.starts_as_zeros() {
        return Fresh::Unknown;
    }
    let device = target.own_files().any(|file| file.fixed_len());
    let laid_out = target.format.has_fixed_places()
        || option(create, "preallocation").is_some_and(|mode| mode != "off")
        || option(create, "data_file_raw") == Some("on");
    if device && laid_out { Fresh::Unknown } else { Fresh::Zeros }
}

/// How many layers of the source lie above the image `backing`, if it is part of the source's chain.
fn shared_from(sources: &[Arc<Layer>], backing: &Layer) -> Option<u32> {
    let [source] = sources else { return None };
    let same = |layer: &Layer| {
        let identity = |layer: &Layer| {
            let file = layer.file.as_ref()?.identity();
            Some((file, layer.member.clone(), layer.format, layer.image.size()))
        };
        identity(layer).is_some_and(|found| Some(found) == identity(backing))
    };
    let position = source.chain().skip(1).position(same)?;
    u32::try_from(position + 1).ok()
}

/// Empties a target that was overwritten in part, and says what is left of it.
fn incomplete(error: Error, placement: &Placement, name: &str) -> Error {
    match placement.overwrites() {
        true if error.kind() != ErrorKind::Usage => {
            let rest = if placement.void() { "is empty now" } else { "is incomplete" };
            error.hint(format!("'{name}' was overwritten and {rest}"))
        }
        _ => error,
    }
}
