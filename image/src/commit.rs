//! Committing: what the layers on top of an image store becomes part of that image.
//!
//! ```text
//!   top   ..##..z.          what top and mid store, top first, is written to base, in parallel
//!   mid   #.#.....    ->    base is made durable
//!   base  aabbccdd          top is emptied: base shows through everywhere
//! ```
//!
//! The contents of the chain stay the same after every single write: what is copied to the base is hidden there by
//! the layers it comes from, until the last step takes it out of the top, when the base is durable. A commit that was
//! interrupted can be repeated.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice as _, Error, ErrorKind, Preallocation, Result, ResultExt as _, ZeroMode};

use crate::convert::{EngineOptions, Fresh, Source, Tally, convert_devices, default_threads};
use crate::format::Format;
use crate::open::{Layer, OpenOptions, open_node, resolve_name};
use crate::progress::Progress;
use crate::spec::Spec;

/// Zeros of at least this many bytes are looked for in what is copied. Smaller ones are not worth a hole.
const SPARSE: u64 = 64 << 10;

/// What is to be committed, and how.
#[derive(Debug, Clone, Default)]
pub struct CommitRequest {
    /// Leave the top image as it is. Always so where the base is not its immediate backing file: the layers in
    /// between are still needed then.
    pub keep: bool,
    /// At most this many bytes per second.
    pub rate: Option<u64>,
    /// How many threads work; `None`: as many as there are processors, within limits.
    pub threads: Option<usize>,
}

/// The member of `top`'s chain that is meant by `base` (`None`: the immediate backing file), as hops from the top.
/// A relative name counts from the directory of the image that has it as its backing file.
///
/// # Errors
/// In qemu's words: there is no such member.
pub fn find_base(top: &Layer, base: Option<&str>) -> Result<usize> {
    let no_backing = || Error::usage("Image does not have a backing file");
    let Some(name) = base else {
        return top.backing.as_ref().map(|_| 1).ok_or_else(no_backing);
    };
    let upper = top.chain();
    let found = upper.zip(top.chain().skip(1)).position(|(upper, lower)| is_meant(upper, lower, name));
    found.map(|position| position + 1).ok_or_else(|| {
        Error::usage(format!("Did not find '{name}' in the backing chain of '{}'", top.filename))
    })
}

/// Whether the backing file `lower` of `upper` is called `name`.
fn is_meant(upper: &Layer, lower: &Layer, name: &str) -> bool {
    if name.is_empty() {
        return false;
    }
    let stored = upper.image.info().ok().and_then(|info| info.backing_file);
    if stored.as_deref() == Some(name) || lower.filename == name {
        return true;
    }
    let directory = upper.path().map(|path| path.display().to_string());
    let Ok(full) = resolve_name(directory.as_deref(), name) else { return false };
    let real = |path: &Path| path.canonicalize().ok();
    match (real(Path::new(&full)), lower.path().and_then(|path| real(&path))) {
        (Some(wanted), Some(path)) => wanted == path,
        _ => false,
    }
}

/// Opens a chain for a commit: the first image and the one `base` hops below it for writing, the others for reading.
/// Nobody may have the chain open, the caller included.
///
/// # Errors
/// As [`open`](crate::open()); what is wrong with the base is said without naming the top.
pub fn open_for_commit(spec: &Spec, base: usize, options: &OpenOptions) -> Result<Arc<Layer>> {
    let options =
        OpenOptions { writable: true, writable_base: Some(base), resizable: true, ..options.clone() };
    open_node(spec.node(), &options)
}

/// Writes what the layers above the member `base` hops below `top` store to that member, growing it to the size of
/// `top` if it is smaller, and empties `top`. The chain is one of [`open_for_commit`].
///
/// # Errors
/// With qemu's words; `Cancelled`. The contents of the chain are the same then as before, and the commit can be
/// repeated.
pub fn commit(top: &Layer, base: usize, request: &CommitRequest, progress: &dyn Progress) -> Result<Tally> {
    let target = top.chain().nth(base).filter(|_| base > 0);
    let target = target.ok_or_else(|| Error::usage("Image does not have a backing file"))?;
    if base > 1 && target.image.content_id().is_some() {
        let message = format!(
            "'{}' is {base} levels down, and what lies above a {} image records its state",
            target.filename, target.format
        );
        return Err(Error::unsupported(message).hint("commit one level at a time, the uppermost first"));
    }
    progress.starting();
    let (source, device) = (Source::new([top.device()])?, target.device());
    if device.size() < source.size() {
        let old_size = device.size();
        device.resize(source.size(), Preallocation::Off)?;
        if !target.format.starts_as_zeros() {
            let added = device.size().saturating_sub(old_size);
            device.write_zeroes_at(old_size, added, ZeroMode::UNMAP)?;
        }
    }
    let options = EngineOptions {
        threads: request.threads.unwrap_or_else(default_threads),
        sparse: SPARSE,
        fresh: Fresh::Base { layers_above: u32::try_from(base).unwrap_or(u32::MAX) },
        ordered: target.format != Format::Raw,
        rate: request.rate,
        ..EngineOptions::default()
    };
    let written = convert_devices(&source, &*device, &options, progress).and_then(|tally| {
        device.close().context(|| "error while flushing the base image".to_owned())?;
        Ok(tally)
    });
    // Also of a commit that failed: its base is another one now, and still fits what lies above it.
    let adopted = match target.image.content_id() {
        Some(id) => top.image.adopt_parent(&id).and_then(|()| top.image.close()),
        None => Ok(()),
    };
    let tally = written.map_err(|error| match error.kind() {
        ErrorKind::Cancelled => error,
        _ => error.hint(format!(
            "The base image is '{}'. '{}' still holds everything: the commit can be repeated{}.",
            target.filename,
            top.filename,
            after_adopting(top, target)
        )),
    })?;
    adopted.context(|| format!("Could not record the changed base image in '{}'", top.filename))?;
    if progress.cancelled() {
        return Err(crate::progress::cancelled());
    }
    if !request.keep && base == 1 {
        empty(top)?;
    }
    Ok(tally)
}

/// What has to come before a commit is repeated whose base is known to its child by its state.
fn after_adopting(top: &Layer, target: &Layer) -> String {
    match target.image.content_id() {
        Some(_) => {
            format!(", after rebase -u -b '{}' -F {} '{}'", target.filename, target.format, top.filename)
        }
        None => String::new(),
    }
}

/// Takes everything out of the top image, if its format can do that; otherwise it keeps, as with qemu-img, what the
/// base holds now as well.
fn empty(top: &Layer) -> Result<()> {
    let Some(qcow2) = &top.qcow2 else { return Ok(()) };
    qcow2.make_empty().and_then(|()| qcow2.close()).context(|| format!("Could not empty {}", top.filename))
}
