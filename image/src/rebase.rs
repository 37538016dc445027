//! Giving an image another backing file.
//!
//! *Safe*: its contents stay the same. Wherever the old and the new chain behind it hold different bytes, the old
//! ones are kept in the image itself ([`differences`]); when they are durable, the header changes over to the new
//! name in one write. Whatever happens before that leaves the image as it was, with its old backing file; whatever
//! happens after it finds the new one.
//!
//! *Unsafe*: only the name changes. Right if the new backing file holds what the old one held.

pub mod differences;
mod side;

use std::path::Path;
use std::sync::Arc;

use block::file::{CacheMode, HostFile};
use block::{BlockDevice as _, Error, ErrorKind, Result, ResultExt as _};

pub use differences::{Copied, CopyOptions, copy_differences};
pub use side::Side;

use crate::convert::default_threads;
use crate::create::make::is_backing_format;
use crate::format::Format;
use crate::open::{BackingMode, Layer, OpenOptions, open_node, resolve_name};
use crate::policy::Policy;
use crate::progress::Progress;
use crate::secret::Secrets;
use crate::spec::{Node, could_not_open, unknown_driver};

/// The longest name of a backing file in bytes (specification, "Header": backing_file_size).
const MAX_NAME: usize = 1023;

/// Which backing file an image is to have, and how it gets it.
#[derive(Debug, Clone, Default)]
pub struct RebaseRequest {
    /// The new backing file's name as it is to be stored; empty: none.
    pub backing_file: String,
    /// Its format.
    pub backing_format: Option<String>,
    /// Change the name only.
    pub change_name_only: bool,
    /// Cache mode of the new backing file.
    pub backing_cache: CacheMode,
    /// Read the new backing file although somebody else writes to it.
    pub force_share: bool,
    /// What is copied is stored compressed.
    pub compress: bool,
    /// How many threads work; `None`: as many as there are processors, within limits.
    pub threads: Option<usize>,
    /// Which names inside images are followed.
    pub policy: Policy,
    /// Passphrases.
    pub secrets: Secrets,
}

impl RebaseRequest {
    /// How the image itself is to be opened for this.
    pub fn overlay_options(&self) -> OpenOptions {
        OpenOptions {
            writable: true,
            backing: if self.change_name_only { BackingMode::Ignore } else { BackingMode::Follow },
            policy: self.policy.clone(),
            secrets: self.secrets.clone(),
            ..OpenOptions::default()
        }
    }

    /// What the header is to say.
    fn names(&self) -> Option<(&str, Option<&str>)> {
        let format = self.backing_format.as_deref().filter(|format| !format.is_empty());
        (!self.backing_file.is_empty()).then_some((self.backing_file.as_str(), format))
    }

    fn could_not_change(&self) -> String {
        format!("Could not change the backing file to '{}'", self.backing_file)
    }
}

/// Gives `overlay`, opened as the request says, its new backing file. The name is stored as it is given and counts
/// from the overlay's directory.
///
/// # Errors
/// With qemu's words. The contents of the overlay are unchanged, and so is its backing file, except that an error
/// of the very last write, of the header, may leave the new one.
pub fn rebase(overlay: &Layer, request: &RebaseRequest, progress: &dyn Progress) -> Result<Copied> {
    if request.change_name_only && names_its_parent(overlay, request) {
        return adopt(overlay, request, progress);
    }
    let compressible = overlay.qcow2.is_some();
    if request.compress && !compressible {
        return Err(crate::convert::engine::compression_unsupported());
    }
    if let Some(format) = request.backing_format.as_deref().filter(|format| !is_backing_format(format)) {
        return Err(Error::usage(format!("Invalid format name: '{format}'")));
    }
    let new = match request.change_name_only {
        true => None,
        false => open_new(overlay, request)?,
    };
    refuse_loop(overlay, new.as_deref(), request, progress)?;
    let qcow2 = check_change(overlay, request).context(|| request.could_not_change())?;
    progress.starting();
    let copied = match request.change_name_only {
        true => Copied::default(),
        false => copy(qcow2, overlay, new, request, progress)?,
    };
    if progress.cancelled() {
        return Err(crate::progress::cancelled());
    }
    let names = request.names();
    let change = qcow2.change_header(|header| {
        header.backing_file = names.map(|(name, _)| name.as_bytes().to_vec());
        header.backing_format = names.and_then(|(_, format)| format).map(|name| name.as_bytes().to_vec());
        Ok(())
    });
    change.context(|| request.could_not_change())?;
    qcow2.close()?;
    Ok(copied)
}

/// Whether the image is of a format that records its parent's state, and the parent that it names already is to be its
/// backing file.
fn names_its_parent(overlay: &Layer, request: &RebaseRequest) -> bool {
    let Some(old) = overlay.full_backing_filename.as_deref().filter(|_| overlay.qcow2.is_none()) else {
        return false;
    };
    let path = overlay.path().map(|path| path.display().to_string());
    let Ok(new) = resolve_name(path.as_deref(), &request.backing_file) else { return false };
    let real = |name: &str| Path::new(name).canonicalize().ok();
    !request.backing_file.is_empty() && (new == old || real(&new).is_some_and(|new| Some(new) == real(old)))
}

/// Records the present state of the parent that the image names: the way out when the parent was changed in a way
/// that is known to do no harm, as by a commit that was interrupted before it could say so.
fn adopt(overlay: &Layer, request: &RebaseRequest, progress: &dyn Progress) -> Result<Copied> {
    let new = open_new(overlay, request)?;
    refuse_loop(overlay, new.as_deref(), request, progress)?;
    let id = new.as_deref().and_then(|parent| parent.image.content_id());
    let id = id.ok_or_else(|| Error::unsupported("Operation not supported"));
    id.and_then(|id| {
        overlay.image.adopt_parent(&id)?;
        overlay.image.close()
    })
    .context(|| request.could_not_change())?;
    Ok(Copied::default())
}

/// Copies what differs, and makes it durable.
fn copy(
    qcow2: &qcow2::Qcow2,
    overlay: &Layer,
    new: Option<Arc<Layer>>,
    request: &RebaseRequest,
    progress: &dyn Progress,
) -> Result<Copied> {
    let (above_old, above_new) = above_common(overlay.backing.as_deref(), new.as_deref());
    let old = Side::new(overlay.backing.as_ref().map(|layer| layer.device()), above_old)?;
    let new = Side::new(new.as_ref().map(|layer| layer.device()), above_new)?;
    let options =
        CopyOptions { threads: request.threads.unwrap_or_else(default_threads), compress: request.compress };
    let copied = copy_differences(qcow2, &old, &new, options, progress)?;
    qcow2.flush()?;
    Ok(copied)
}

/// Opens the new backing file and its chain; `None` if there is to be none.
fn open_new(overlay: &Layer, request: &RebaseRequest) -> Result<Option<Arc<Layer>>> {
    let Some((name, format)) = request.names() else { return Ok(None) };
    let options = OpenOptions {
        cache: request.backing_cache,
        force_share: request.force_share,
        policy: request.policy.clone(),
        secrets: request.secrets.clone(),
        ..OpenOptions::default()
    };
    let opened = new_node(overlay, name, format).and_then(|node| open_node(&node, &options));
    opened.map(Some).context(|| format!("Could not open new backing file '{name}'"))
}

/// The new backing file as something to open: named by the user, so no policy forbids it.
fn new_node(overlay: &Layer, name: &str, format: Option<&str>) -> Result<Node> {
    let path = overlay.path().map(|path| path.display().to_string());
    let full = resolve_name(path.as_deref(), name)?;
    let mut node = Node::from_filename(&full, &mut vec![]).context(|| could_not_open(&full))?;
    if let Some(name) = format {
        let format = match (Format::from_name(name), name) {
            (Some(format), _) => format,
            (None, "file" | "host_device") => Format::Raw,
            (None, name) => return Err(unknown_driver(name)),
        };
        node.driver = node.driver.or(Some(format));
    }
    Ok(node)
}

/// Refuses an image as its own backing file.
fn refuse_loop(
    overlay: &Layer,
    new: Option<&Layer>,
    request: &RebaseRequest,
    progress: &dyn Progress,
) -> Result<()> {
    let Some((name, format)) = request.names() else { return Ok(()) };
    let Some(own) = overlay.file.as_ref().map(|file| file.identity()) else { return Ok(()) };
    let is_own = |file: &HostFile| file.identity() == own;
    let endless = || Error::invalid(format!("Backing file '{name}' creates an infinite loop."));
    if let Some(new) = new {
        let member = new.chain().filter_map(|layer| layer.file.as_deref()).any(is_own);
        return if member { Err(endless()).context(|| request.could_not_change()) } else { Ok(()) };
    }
    // Only the name changes: it may be that of something that is not there, or not yet what it will be.
    let options = OpenOptions {
        force_share: true,
        metadata_only: true,
        policy: request.policy.clone(),
        secrets: request.secrets.clone(),
        ..OpenOptions::default()
    };
    let Ok(node) = new_node(overlay, name, format) else { return Ok(()) };
    let alone = OpenOptions { backing: BackingMode::Ignore, ..options.clone() };
    if let Ok(layer) = open_node(&node, &alone)
        && layer.file.as_deref().is_some_and(is_own)
    {
        return Err(endless()).context(|| request.could_not_change());
    }
    if let Ok(layer) = open_node(&node, &options)
        && layer.chain().filter_map(|layer| layer.file.as_deref()).any(is_own)
    {
        progress.warn(&format!(
            "'{name}' has '{}' itself in its backing chain: neither can be read until one of them is rebased",
            overlay.filename
        ));
    }
    Ok(())
}

/// Whether the header can be changed at all, asked before anything is copied.
fn check_change<'a>(overlay: &'a Layer, request: &RebaseRequest) -> Result<&'a qcow2::Qcow2> {
    let names = request.names();
    if let Some((_, None)) = names {
        return Err(Error::usage("backing format must be specified")
            .hint("name the format of the backing file with -F"));
    }
    let Some(qcow2) = overlay.qcow2.as_deref() else {
        return Err(Error::unsupported("Operation not supported"));
    };
    let mut header = qcow2.header();
    if names.is_some() && header.data_file_raw() {
        return Err(Error::new(ErrorKind::Unsupported, "Invalid argument")
            .hint("an image whose data file is raw cannot have a backing file"));
    }
    if names.is_some_and(|(name, _)| name.len() > MAX_NAME) {
        return Err(Error::usage("Invalid argument")
            .hint(format!("the name of a backing file has at most {MAX_NAME} bytes")));
    }
    header.backing_file = names.map(|(name, _)| name.as_bytes().to_vec());
    header.backing_format = names.and_then(|(_, format)| format).map(|name| name.as_bytes().to_vec());
    header.encode()?;
    Ok(qcow2)
}

/// How many members of either chain lie above the first that both share: the longest common end of the two.
fn above_common(old: Option<&Layer>, new: Option<&Layer>) -> (u32, u32) {
    let members =
        |chain: Option<&Layer>| chain.into_iter().flat_map(Layer::chain).map(identity).collect::<Vec<_>>();
    let (old, new) = (members(old), members(new));
    let shared = old.iter().rev().zip(new.iter().rev()).take_while(|(a, b)| a.is_some() && a == b).count();
    let above = |members: usize| u32::try_from(members - shared).unwrap_or(u32::MAX);
    (above(old.len()), above(new.len()))
}

/// What two layers have in common if they are the same image, opened twice: file, member of an archive, format, size, the place of the
/// first byte (raw images may be parts of a file), data file.
type Identity = ((u64, u64), Option<String>, Format, u64, Option<u64>, Option<(u64, u64)>);

fn identity(layer: &Layer) -> Option<Identity> {
    let size = layer.image.size();
    let first = match layer.format {
        Format::Raw if size > 0 => layer.image.layer_extent(0, 1).ok()?.host_offset,
        _ => None,
    };
    let data = layer.data_file.as_ref().map(|file| file.identity());
    Some((layer.file.as_ref()?.identity(), layer.member.clone(), layer.format, size, first, data))
}
