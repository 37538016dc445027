//! The disks behind the exports: images opened, and shown as was asked for.

use std::sync::Arc;

use block::file::{CacheMode, FileOptions, HostFile};
use block::overlay::Overlay;
use block::slice::Slice;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use image::{Format, Layer, OpenOptions, Share};
use nbd_server::server::export::{Export, ExportOptions};

use super::plan::{Image, Plan, Window};
use crate::app::App;
use crate::exit::{Failure, Outcome};

/// Blocks of the copy-on-write of `--overlay`, in bytes.
const OVERLAY_BLOCK_BYTES: u32 = 64 << 10;

/// Opens every image.
pub(super) fn exports(plan: &Plan, app: &App) -> Outcome<Vec<Arc<Export>>> {
    plan.images.iter().map(|image| Ok(Arc::new(export(plan, image, app)?))).collect()
}

fn export(plan: &Plan, image: &Image, app: &App) -> Outcome<Export> {
    let served = &plan.served;
    let writable = !served.read_only && !served.overlay;
    let source = crate::cli::source(&image.filename, plan.format.as_deref(), plan.image_opts);
    let source = source.map_err(|failure| match failure {
        Failure::Error { exit, error } => Failure::Error { exit, error: in_words_of(app, image, error) },
        other => other,
    })?;
    let options = OpenOptions {
        writable,
        resizable: served.resizable && writable,
        cache: plan.io.cache,
        force_share: plan.force_share,
        format: source.format,
        policy: app.policy(),
        secrets: plan.secrets.clone(),
        snapshot: served.snapshot.clone(),
        // Two servers that write to one raw image would not know of each other.
        share: if writable { Share::NoWriters } else { Share::Format },
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options).map_err(|error| in_words_of(app, image, error))?;
    if writable && layer.image.read_only() {
        let error = Error::new(ErrorKind::ReadOnly, format!("'{}' cannot be written", image.filename));
        return Err(error.hint("serve it with --read-only, or with --overlay").into());
    }
    let device = shown(plan, &layer);
    let device = if app.as_qemu_nbd() { device } else { device.context(|| format!("'{}'", image.filename)) }?;
    let mut export = Export::new(&image.export, device, export_options(plan, &layer));
    export.description.clone_from(&plan.description);
    for name in &served.bitmaps {
        export.bitmaps.push((name.clone(), bitmap(&layer, name, plan)?));
    }
    Ok(export)
}

/// qemu-nbd names the place in itself where opening failed.
fn in_words_of(app: &App, image: &Image, error: Error) -> Error {
    if !app.as_qemu_nbd() {
        return error;
    }
    let text = error.to_string();
    let why = text.strip_prefix(&format!("Could not open '{}': ", image.filename)).unwrap_or(&text);
    let words = match why.starts_with("Failed to load snapshot: ") {
        true => why.to_owned(),
        false => format!("Failed to blk_new_open '{}': {why}", image.filename),
    };
    error.hints().iter().fold(Error::new(error.kind(), words), |error, hint| error.hint(hint.clone()))
}

fn export_options(plan: &Plan, layer: &Layer) -> ExportOptions {
    let served = &plan.served;
    ExportOptions {
        read_only: served.read_only,
        discard: plan.io.discard,
        detect_zeroes: plan.io.detect_zeroes,
        write_through: matches!(plan.io.cache, CacheMode::WriteThrough | CacheMode::DirectSync),
        resizable: served.resizable,
        multi_conn: served.multi_conn,
        in_place: layer.format == Format::Raw && !served.overlay,
        allocation_depth: served.allocation_depth,
    }
}

/// The disk of an image, under an overlay if one is wanted, or a part of that.
fn shown(plan: &Plan, layer: &Layer) -> Result<Arc<dyn BlockDevice>> {
    let mut device = layer.device();
    if plan.served.overlay {
        device = Arc::new(Overlay::new(device, Arc::new(temporary()?), OVERLAY_BLOCK_BYTES)?);
    }
    match plan.window {
        Window::Whole => Ok(device),
        Window::Part { offset, len } => {
            let size = device.size();
            let rest = size.checked_sub(offset).ok_or_else(|| {
                let file = "size of the containing file";
                Error::usage(format!("Offset ({offset}) cannot be greater than {file} ({size})"))
            })?;
            Ok(Arc::new(Slice::new(device, offset, len.unwrap_or(rest))?))
        }
        Window::Partition(number) => Ok(Arc::new(guestdisk::partition::slice(device, number)?)),
    }
}

/// The bitmap of this name, of the first image of the chain that has one.
fn bitmap(layer: &Layer, name: &str, plan: &Plan) -> Result<Arc<block::DirtyBitmap>> {
    let missing = || {
        let error = Error::new(ErrorKind::NotFound, format!("Bitmap '{name}' is not found"));
        error.hint("vimg info lists the bitmaps of an image")
    };
    let holder = layer
        .chain()
        .filter_map(|layer| layer.qcow2.as_ref())
        .find(|image| image.bitmaps().iter().any(|bitmap| bitmap.display_name() == name))
        .ok_or_else(missing)?;
    if plan.window != Window::Whole {
        return Err(Error::unsupported("bitmaps are those of a whole disk, not of a part of it"));
    }
    holder.dirty_bitmap(name.as_bytes())
}

/// A file without a name (any more), for what is written to an overlay. (`O_TMPFILE` is nothing that every file system
/// has: overlayfs before Linux 6.3 has not.)
pub(crate) fn temporary() -> Result<HostFile> {
    let template = std::env::temp_dir().join("vimg-overlay-XXXXXX");
    let (file, path) =
        nix::unistd::mkstemp(&template).context(|| format!("a temporary file '{}'", template.display()))?;
    let opened = HostFile::open(&path, &FileOptions::read_write());
    drop(file);
    // Should its name stay, it is a file too many.
    let _ = std::fs::remove_file(&path);
    opened
}
