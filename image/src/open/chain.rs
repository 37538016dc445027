//! Down the chain and up again.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use block::file::HostFile;
use block::image::Image;
use block::raw::{Raw, RawOptions};
use block::{Error, ErrorKind, Result, ResultExt as _};
use crypt::luks::unlock_with;
use crypt::{Luks, Volume};
use qcow2::header::CRYPT_LUKS;
use qcow2::snapshot::Selector;
use qcow2::{Header, Qcow2};
use serde_json::Value;

use super::names::{backing_node, data_file_path, extent_path, folder_of, resolve_name, text};
use super::source::{Container, Purpose, open_data_file, open_extents};
use super::{BackingMode, Layer, MAX_CHAIN, OpenOptions};
use crate::format::Format;
use crate::formats::{self, Found, How, Parts};
use crate::policy::Policy;
use crate::spec::{Backing, Node, Source, text_of};

/// An image whose container is open and recognised, but which does not stand on its backing file yet.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) node: Node,
    pub(crate) container: Container,
    pub(crate) format: Format,
    pub(crate) probed: bool,
    /// For qcow2.
    pub(crate) header: Option<Header>,
    /// For formats with a driver.
    pub(crate) found: Option<Box<dyn Found>>,
    writable: bool,
}

/// Opens the chain that starts with `node`.
pub(crate) fn open_chain(node: &Node, options: &OpenOptions) -> Result<Arc<Layer>> {
    ascend(descend(node, options)?, options)
}

/// Opens the containers of the chain, top first.
fn descend(node: &Node, options: &OpenOptions) -> Result<Vec<Opened>> {
    let mut chain = vec![];
    let mut seen = HashSet::new();
    let mut next = Some(node.clone());
    while let Some(node) = next.take() {
        let depth = chain.len();
        let purpose = match depth {
            0 => Purpose::Top,
            _ if options.writable_base == Some(depth) => Purpose::Base,
            _ => Purpose::Backing,
        };
        let name = node.shown_name(Format::Raw);
        // Whoever opens a base has opened the same chain before, and wants to know what is wrong with the base.
        let hops = if purpose == Purpose::Base { 0 } else { depth };
        let opened = open_own(node, purpose, options)
            .map_err(|error| with_limit(who_names(error, &name, &chain), chain.len()))
            .map_err(|error| below(error, hops))?;
        if opened.container.identity().is_some_and(|file| !seen.insert((file, opened.window()))) {
            let error = Error::invalid(format!("Backing file '{name}' creates an infinite loop."));
            return Err(who_names(error, &name, &chain));
        }
        if options.backing == BackingMode::Follow {
            next = opened.backing(options).map_err(|error| below(error, depth + 1))?;
        }
        chain.push(opened);
        if next.is_some() && chain.len() == MAX_CHAIN {
            return Err(Error::unsupported(format!(
                "the chain of backing files has more than {MAX_CHAIN} members"
            )));
        }
    }
    Ok(chain)
}

/// Says in which image, and how far down the chain, the name was found that led to a failure.
fn who_names(error: Error, name: &str, above: &[Opened]) -> Error {
    let [top, ..] = above else { return error };
    let upper = above.last().unwrap_or(top).node.shown_name(Format::Raw);
    let hint = match above.len() {
        1 => format!("'{upper}' names '{name}' as its backing file"),
        hops => format!(
            "'{upper}' names '{name}' as its backing file, {hops} levels below '{}'",
            top.node.shown_name(Format::Raw)
        ),
    };
    error.hint(hint)
}

/// Names the limit where the chain has more files than the process may have open.
fn with_limit(error: Error, open: usize) -> Error {
    if !error.message().contains("Too many open files") {
        return error;
    }
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let limit = limit.map_or_else(|_| "unknown".to_owned(), |(soft, _)| soft.to_string());
    error.hint(format!(
        "{open} images of the chain are open; the limit on open files is {limit} (see ulimit -n)"
    ))
}

/// Puts qemu's words for a failure `depth` hops down the chain in front of it.
fn below(error: Error, depth: usize) -> Error {
    const MOST: usize = 8;
    (0..depth.min(MOST)).fold(error, |error, _| error.context("Could not open backing file"))
}

/// Opens, recognises and locks one image, without what lies behind it.
pub(crate) fn open_own(mut node: Node, purpose: Purpose, options: &OpenOptions) -> Result<Opened> {
    if node.backing == Backing::None && options.backing == BackingMode::Ignore {
        node.backing = Backing::FromImage;
    }
    let writable = match purpose {
        Purpose::Top => options.writable,
        Purpose::Backing => false,
        Purpose::Base => true,
    };
    if writable && node.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
    }
    let shared;
    let options = if node.force_share && !options.force_share {
        shared = OpenOptions { force_share: true, ..options.clone() };
        &shared
    } else {
        options
    };
    let named = if purpose == Purpose::Top { options.format.or(node.driver) } else { node.driver };
    let container = Container::open(&node, writable, named, options)?;
    let recognised = match named {
        Some(_) => named,
        None => container.probe()?,
    };
    let format = recognised.unwrap_or(Format::Raw);
    check_option_names(&node, format, options.backing)?;
    container.lock(format, writable, options)?;
    let header = match format {
        Format::Qcow2 if options.for_check => Some(Header::read_for_check(&*container.storage)?),
        Format::Qcow2 => Some(Header::read(&*container.storage)?),
        _ => None,
    };
    let found = match formats::driver(format) {
        Some(driver) => {
            let how = How { writable, for_check: options.for_check, metadata_only: options.metadata_only };
            Some(driver.read(&container.storage, &how)?)
        }
        None => None,
    };
    Ok(Opened { node, container, format, probed: recognised.is_none(), header, found, writable })
}

/// The path of a node that is a plain file.
fn path_of(node: &Node) -> Option<&str> {
    match &node.source {
        Source::File { path, .. } => Some(path),
        _ => None,
    }
}

impl Opened {
    /// The part of the file that is used, as far as options say: two windows of one file are two images.
    fn window(&self) -> Option<(String, String)> {
        let value = |key| option(&self.node, key).and_then(text_of).unwrap_or_default();
        if let Source::Member { member, .. } = &self.node.source {
            return Some(("member".to_owned(), member.clone()));
        }
        let window = (value("offset"), value("size"));
        (!window.0.is_empty() || !window.1.is_empty()).then_some(window)
    }

    /// The name of the file, if it is a plain one, which relative names inside the image count from.
    fn path(&self) -> Option<&str> {
        path_of(&self.node)
    }

    /// The backing file's name as stored, and as resolved.
    pub(crate) fn backing_names(&self) -> Option<(String, Result<String>)> {
        if let Some(found) = &self.found {
            return found.backing().and_then(|backing| self.choose(backing.names));
        }
        let stored = text(self.header.as_ref()?.backing_file.as_deref()?);
        let full = resolve_name(self.path(), &stored);
        (!stored.is_empty()).then_some((stored, full))
    }

    /// The first of the names that leads to a file; the first of all if none does.
    fn choose(&self, names: Vec<String>) -> Option<(String, Result<String>)> {
        let resolve = |name: &String| (name.clone(), resolve_name(self.path(), name));
        let leads = |full: &Result<String>| full.as_ref().is_ok_and(|full| Path::new(full).exists());
        let found = names.iter().map(resolve).find(|(_, full)| leads(full));
        found.or_else(|| names.first().map(resolve))
    }

    /// The folder that the backing file must lie in, where there is such a rule.
    fn confined_to(&self) -> Option<&Path> {
        let confined = self.found.as_ref()?.backing()?.confined;
        confined.then(|| self.path().map_or(Path::new("."), folder_of))
    }

    /// The further files of the image, opened.
    pub(crate) fn open_extents(&self, options: &OpenOptions) -> Result<Vec<Arc<HostFile>>> {
        let Some(found) = &self.found else { return Ok(vec![]) };
        let path_of = |extent: &formats::ExtentFile| {
            let path = extent_path(self.path(), &extent.name, &options.policy)?;
            let path = if options.extents_partial { crate::target::partial_path(&path) } else { path };
            Ok((path, extent.writable && self.writable))
        };
        let paths = found.extents().iter().map(path_of).collect::<Result<Vec<_>>>()?;
        open_extents(&paths, &self.container, self.format, options)
    }

    /// What the image is put together from.
    pub(crate) fn parts<'a>(
        &'a self,
        extents: Vec<Arc<HostFile>>,
        backing: Option<Arc<Layer>>,
        options: &'a OpenOptions,
    ) -> Parts<'a> {
        Parts {
            storage: Arc::clone(&self.container.storage),
            extents,
            backing,
            writable: self.writable,
            metadata_only: options.metadata_only,
            level: options.compression,
            node: &self.node,
            secrets: &options.secrets,
        }
    }

    /// What the user should know about the image.
    pub(crate) fn warnings(&self) -> Vec<String> {
        match &self.found {
            Some(found) => found.warnings(),
            None if self.probed => self.archive_warning().into_iter().chain(self.name_warning()).collect(),
            None => self.header.as_ref().map(warnings_of).unwrap_or_default(),
        }
    }

    /// That what is taken for a raw disk is an archive, whose members may be what was meant.
    fn archive_warning(&self) -> Vec<String> {
        let mut first = [0; foreign::archive::PROBE_LEN];
        let read = self.container.storage.read_at(&mut first, 0);
        if read.is_err() || !foreign::archive::is_tar(&first) {
            return vec![];
        }
        let name = self.node.shown_name(self.format);
        vec![format!(
            "'{name}' is a tar archive and is taken for a raw disk; a disk in it is called {name}:MEMBER"
        )]
    }

    /// That what is taken for a raw disk has the name of a VHD, which may have lost its footer.
    fn name_warning(&self) -> Option<String> {
        let name = self.node.shown_name(self.format);
        let extension = Path::new(&name).extension()?;
        extension.eq_ignore_ascii_case("vhd").then(|| {
            format!(
                "'{name}' is named like a VHD and is taken for a raw disk, as it has no footer; if it should have one, \
                 it has been cut off"
            )
        })
    }

    /// What lies behind the image, if anything does.
    fn backing(&self, options: &OpenOptions) -> Result<Option<Node>> {
        match &self.node.backing {
            Backing::None => Ok(None),
            Backing::Node(node) => Ok(Some((**node).clone())),
            Backing::FromImage => {
                let Some((_, full)) = self.backing_names() else { return Ok(None) };
                let format = match &self.found {
                    Some(found) => found.backing().and_then(|backing| backing.format),
                    None => self.header.as_ref().and_then(|h| h.backing_format.as_deref()).map(text),
                };
                backing_node(&full?, format.as_deref(), self.confined_to(), &options.policy).map(Some)
            }
        }
    }

    /// Makes sure that everything behind the image could be opened.
    pub(crate) fn check_backing(&self, options: &OpenOptions) -> Result<()> {
        let Some(node) = self.backing(options).map_err(|error| below(error, 1))? else { return Ok(()) };
        let options = OpenOptions { writable: false, format: None, metadata_only: true, ..options.clone() };
        let chain = descend(&node, &options).map_err(|error| below(error, 1))?;
        match self.container.identity() {
            Some(own) if chain.iter().any(|opened| opened.container.identity() == Some(own)) => {
                Err(Error::invalid(format!(
                    "Backing file '{}' creates an infinite loop.",
                    node.shown_name(Format::Raw)
                )))
            }
            _ => Ok(()),
        }
    }

    /// The external data file, opened; `None` if the image has none.
    pub(crate) fn open_data_file(&self, options: &OpenOptions) -> Result<Option<Arc<HostFile>>> {
        let Some(header) = self.header.as_ref().filter(|header| header.has_data_file()) else {
            return match &self.node.data_file {
                Some(_) => {
                    Err(Error::usage("'data-file' can only be set for images with an external data file"))
                }
                None => Ok(None),
            };
        };
        let source = match (&self.node.data_file, &header.data_file) {
            (Some(source), _) => source.clone(),
            (None, Some(name)) => {
                let path = data_file_path(self.path(), &text(name), &options.policy)?;
                Source::file(path.display().to_string())
            }
            (None, None) => return Err(Error::usage("'data-file' is required for this image")),
        };
        open_data_file(&source, &self.container, self.writable, options).map(Some)
    }
}

/// Builds each image on the one behind it, bottom first.
fn ascend(chain: Vec<Opened>, options: &OpenOptions) -> Result<Arc<Layer>> {
    let mut behind: Option<Arc<Layer>> = None;
    let members = chain.len();
    for (depth, opened) in chain.into_iter().enumerate().rev() {
        let snapshot = options.snapshot.as_ref().filter(|_| depth == 0);
        let tables = table_cache(depth, members);
        let built = build(opened, behind, tables, options, snapshot);
        behind = Some(built.map_err(|error| below(error, depth))?);
    }
    behind.ok_or_else(|| Error::usage("no image was named"))
}

/// How errors begin that concern a snapshot and not the image.
pub(super) const NO_SNAPSHOT: &str = "Failed to load snapshot";

/// Bytes for the L2 tables of all images behind the first one together.
const BACKING_TABLES: u64 = 64 << 20;

/// Bytes for the L2 tables of one member of a chain, where nothing else is said: few images have what they want, many
/// share what there is. `None`: what it wants.
fn table_cache(depth: usize, members: usize) -> Option<u64> {
    let behind = u64::try_from(members).unwrap_or(u64::MAX).saturating_sub(1);
    (depth > 0 && behind > 2).then(|| (BACKING_TABLES / behind).max(64 << 10))
}

fn build(
    opened: Opened,
    backing: Option<Arc<Layer>>,
    tables: Option<u64>,
    options: &OpenOptions,
    snapshot: Option<&Selector>,
) -> Result<Arc<Layer>> {
    let data_file = if options.metadata_only { None } else { opened.open_data_file(options)? };
    let full_backing_filename = opened.backing_names().map(|(stored, full)| full.unwrap_or(stored));
    let filename = opened.node.shown_name(opened.format);
    let source_name = opened.node.source.shown_name();
    let (mut luks, mut extents) = (None, vec![]);
    let warnings = opened.warnings();
    let confined_to = opened.confined_to().map(Path::to_owned);
    let (image, qcow2): (Arc<dyn Image>, _) = match &opened.header {
        None if snapshot.is_some() => {
            return Err(Error::unsupported(format!(
                "Block format '{}' used by device '' does not support temporarily loading internal snapshots",
                opened.format
            ))
            .context(NO_SNAPSHOT));
        }
        None if opened.format == Format::Luks => {
            let opened = open_luks(&opened, options)?;
            luks = Some(Arc::clone(&opened));
            (opened, None)
        }
        None => match &opened.found {
            Some(found) => {
                extents = opened.open_extents(options)?;
                (found.open(opened.parts(extents.clone(), backing.clone(), options))?, None)
            }
            None => {
                let raw = Raw::open(Arc::clone(&opened.container.storage), raw_options(&opened.node)?)?;
                (Arc::new(raw), None)
            }
        },
        Some(header) => {
            let encryption = encryption(&opened, header, options)?;
            let own = qcow2_options(&opened.node)?;
            let qcow2_options = qcow2::OpenOptions {
                l2_cache_bytes: own.l2_cache_bytes.or(tables),
                writable: opened.writable,
                backing: backing.as_ref().map(|layer| layer.device()),
                data_file: data_file.clone().map(|file| file as Arc<dyn block::Storage>),
                compression: options.compression,
                metadata_only: options.metadata_only,
                snapshot: snapshot.cloned(),
                encryption,
                ..own
            };
            let image = Qcow2::open(Arc::clone(&opened.container.storage), header.clone(), qcow2_options);
            let image = match snapshot {
                Some(_) => image.context(|| NO_SNAPSHOT.to_owned())?,
                None => image?,
            };
            (Arc::clone(&image) as Arc<dyn Image>, Some(image))
        }
    };
    Ok(Arc::new(Layer {
        filename,
        format: opened.format,
        probed: opened.probed,
        sequential: false,
        protocol_only: opened.node.protocol_only,
        protocol: opened.container.protocol,
        image,
        qcow2,
        luks,
        storage: opened.container.storage,
        file: opened.container.file,
        member: opened.container.member,
        container: opened.container.nested,
        data_file,
        extents,
        backing,
        source_name,
        full_backing_filename,
        confined_to,
        key_secret: option(&opened.node, KEY_SECRET).and_then(text_of),
        effort: options.policy.effort(),
        warnings,
    }))
}

/// Opens a LUKS container with the passphrase that its `key-secret` names.
pub(crate) fn open_luks(opened: &Opened, options: &OpenOptions) -> Result<Arc<Luks>> {
    let storage = Arc::clone(&opened.container.storage);
    if options.metadata_only {
        return Luks::open_locked(storage).map(Arc::new);
    }
    let id = option(&opened.node, "key-secret").and_then(text_of);
    let passphrase = options.secrets.required("key-secret", id.as_deref())?;
    let opened = Luks::open_with(storage, passphrase, options.policy.effort(), options.secrets.unlocker());
    opened.map(Arc::new).map_err(Policy::about_effort)
}

/// The option that names the passphrase of a qcow2 image.
const KEY_SECRET: &str = "encrypt.key-secret";
/// The option that says how the image is encrypted.
const KEY_FORMAT: &str = "encrypt.format";

/// Unlocks the encryption of a qcow2 image, if it has one that is wanted.
fn encryption(opened: &Opened, header: &Header, options: &OpenOptions) -> Result<Option<Arc<Volume>>> {
    let found = match header.crypt_method {
        0 => None,
        CRYPT_LUKS => Some("luks"),
        _ => Some("aes"),
    };
    let named = option(&opened.node, KEY_FORMAT).and_then(text_of);
    let Some(found) = found else {
        return match named {
            None => Ok(None),
            Some(format) => Err(Error::usage(format!(
                "No encryption in image header, but options specified format '{format}'"
            ))),
        };
    };
    if let Some(format) = named.filter(|format| format != found) {
        return Err(Error::usage(format!(
            "Header reported '{found}' encryption format but options specify '{format}'"
        )));
    }
    if options.metadata_only {
        return Ok(None);
    }
    let id = option(&opened.node, KEY_SECRET).and_then(text_of);
    let passphrase = options.secrets.required(KEY_SECRET, id.as_deref())?;
    let volume = match header.luks {
        Some((offset, _)) => {
            let (storage, effort) = (&*opened.container.storage, options.policy.effort());
            let unlocked = unlock_with(storage, offset, passphrase, effort, options.secrets.unlocker());
            unlocked.map_err(Policy::about_effort)?.volume
        }
        None => Volume::qcow2_aes(passphrase)?,
    };
    Ok(Some(Arc::new(volume)))
}

/// What the user should know about an image, by its header.
fn warnings_of(header: &Header) -> Vec<String> {
    let stale = "a program lacking bitmap support modified this file, so all bitmaps are now considered \
                 inconsistent\nSome clusters may be leaked, run 'qemu-img check -r' on the image file to fix.";
    if header.stale_bitmaps { vec![stale.to_owned()] } else { vec![] }
}

fn option<'a>(node: &'a Node, key: &str) -> Option<&'a Value> {
    node.options.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

fn size_option(node: &Node, key: &str) -> Result<Option<u64>> {
    match option(node, key).and_then(text_of) {
        Some(text) => crate::options::parse_size(key, &text).map(Some),
        None => Ok(None),
    }
}

fn raw_options(node: &Node) -> Result<RawOptions> {
    Ok(RawOptions { offset: size_option(node, "offset")?.unwrap_or(0), size: size_option(node, "size")? })
}

/// Options that a raw image takes.
const RAW_OPTIONS: &[&str] = &["offset", "size"];

/// Options that a LUKS container takes.
const LUKS_OPTIONS: &[&str] = &["key-secret"];

/// Options that a qcow2 image takes and that make no difference here.
const QCOW2_IGNORED: &[&str] = &[
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-clean-interval",
    "l2-cache-entry-size",
];

/// Options that a qcow2 image takes.
const QCOW2_OPTIONS: &[&str] =
    &["lazy-refcounts", "cache-size", "l2-cache-size", "refcount-cache-size", KEY_FORMAT, KEY_SECRET];

/// Complains about options that the format does not have.
fn check_option_names(node: &Node, format: Format, backing: BackingMode) -> Result<()> {
    let of_driver = formats::driver(format).map(formats::Driver::node_options);
    let known = |key: &str| match (of_driver, format) {
        (Some(options), _) => options.contains(&key),
        (None, Format::Luks) => LUKS_OPTIONS.contains(&key),
        (None, Format::Qcow2) => {
            QCOW2_OPTIONS.contains(&key) || QCOW2_IGNORED.contains(&key) || key.starts_with("overlap-check.")
        }
        (None, _) => RAW_OPTIONS.contains(&key),
    };
    let mut unknown: Vec<&str> =
        node.options.iter().map(|(key, _)| key.as_str()).filter(|key| !known(key)).collect();
    if matches!(node.backing, Backing::Node(_)) && (backing == BackingMode::Ignore || !format.has_backing()) {
        unknown.extend(node.backing_keys.iter().map(String::as_str));
    }
    if node.data_file.is_some() && format != Format::Qcow2 {
        unknown.push("data-file");
    }
    match unknown.into_iter().min_by_key(|key| crate::spec::bucket(key)) {
        Some(key) => {
            Err(Error::usage(format!("Block format '{format}' does not support the option '{key}'")))
        }
        None => Ok(()),
    }
}

fn qcow2_options(node: &Node) -> Result<qcow2::OpenOptions> {
    let total = size_option(node, "cache-size")?;
    let l2 = size_option(node, "l2-cache-size")?;
    let refcount = size_option(node, "refcount-cache-size")?;
    let lazy_refcounts = match option(node, "lazy-refcounts").and_then(text_of) {
        Some(text) => Some(crate::spec::parse_bool("lazy-refcounts", &text)?),
        None => None,
    };
    let (l2_cache_bytes, refcount_cache_bytes) = split_cache(total, l2, refcount)?;
    Ok(qcow2::OpenOptions {
        l2_cache_bytes,
        refcount_cache_bytes,
        lazy_refcounts,
        ..qcow2::OpenOptions::default()
    })
}

/// Divides the memory for tables; qemu's rules for which of the three sizes may be given together.
fn split_cache(
    total: Option<u64>,
    l2: Option<u64>,
    refcount: Option<u64>,
) -> Result<(Option<u64>, Option<u64>)> {
    match (total, l2, refcount) {
        (Some(_), Some(_), Some(_)) => Err(Error::usage(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        )),
        (Some(total), Some(l2), _) if l2 > total => {
            Err(Error::usage("l2-cache-size may not exceed cache-size"))
        }
        (Some(total), _, Some(refcount)) if refcount > total => {
            Err(Error::usage("refcount-cache-size may not exceed cache-size"))
        }
        (Some(total), Some(l2), None) => Ok((Some(l2), Some(total - l2))),
        (Some(total), None, Some(refcount)) => Ok((Some(total - refcount), Some(refcount))),
        (Some(total), None, None) => Ok((Some(total), None)),
        (None, l2, refcount) => Ok((l2, refcount)),
    }
}
