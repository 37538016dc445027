//! Taking the dirty bitmaps of the source along (`--bitmaps`).

use block::{BlockDevice as _, Error, Result, ResultExt as _};
use qcow2::Qcow2;

use super::{ConvertRequest, Target};
use crate::create::make;
use crate::format::Format;
use crate::open::Layer;
use crate::options::Options;
use crate::progress::Progress;

/// What becomes of the bitmaps of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bitmaps {
    /// They stay behind.
    #[default]
    Leave,
    /// They are copied; one that is inconsistent prevents the convert.
    Copy,
    /// Those that are consistent are copied.
    CopySound,
}

/// Refuses what cannot go well, before anything is made.
///
/// # Errors
/// The source or the target cannot have bitmaps, or a bitmap is inconsistent and not to be left out.
pub(super) fn check(request: &ConvertRequest) -> Result<()> {
    let (Some(source), true) = (request.sources.first(), request.bitmaps != Bitmaps::Leave) else {
        return Ok(());
    };
    let source = able(source).ok_or_else(|| Error::usage("Source lacks bitmap support"))?;
    let broken = source.bitmaps().into_iter().find(|bitmap| bitmap.in_use());
    if let Some(broken) = broken.filter(|_| request.bitmaps == Bitmaps::Copy) {
        return Err(Error::usage(format!("Cannot copy inconsistent bitmap '{}'", broken.display_name()))
            .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"));
    }
    let Target::Create(create) = &request.target else { return Ok(()) };
    let options = Options::new(crate::options::of_target(create.format, ""), &create.options);
    let version =
        options.and_then(|options| make::measured_options(0, &options)).map(|target| target.version);
    match (create.format, version) {
        // Wrong options are complained about where they are used.
        (Format::Qcow2, Err(_) | Ok(3..)) => Ok(()),
        (format, _) => Err(unable(format)),
    }
}

/// The image, if it can have bitmaps.
fn able(layer: &Layer) -> Option<&Qcow2> {
    layer.qcow2.as_deref().filter(|image| image.header().version >= 3)
}

fn unable(format: Format) -> Error {
    Error::unsupported(format!("Format driver '{format}' does not support bitmaps"))
}

/// Copies the bitmaps of the source: order, granularity, what they have recorded, and whether they go on recording.
/// They are stored when the target is closed.
///
/// # Errors
/// The target cannot have bitmaps or has one of such a name, or they cannot be read.
pub(super) fn copy(request: &ConvertRequest, target: &Layer, progress: &dyn Progress) -> Result<()> {
    let (Some(source), true) = (request.sources.first(), request.bitmaps != Bitmaps::Leave) else {
        return Ok(());
    };
    let source = able(source).ok_or_else(|| Error::usage("Source lacks bitmap support"))?;
    let to = able(target).ok_or_else(|| unable(target.format))?;
    let bitmaps = source.bitmaps();
    let there = to.bitmaps();
    // qemu-img begins with the last.
    if let Some(twice) = bitmaps.iter().rev().find(|bitmap| there.iter().any(|t| t.name == bitmap.name)) {
        let name = twice.display_name();
        return Err(Error::usage(format!("Failed to create bitmap {name}: Bitmap already exists: {name}")));
    }
    if let Some(bitmap) = bitmaps.last().filter(|_| source.size() != to.size()) {
        return Err(Error::usage(format!(
            "Failed to populate bitmap {}: Bitmaps are of different sizes (destination size is {}, source size is \
             {}) and can't be merged",
            bitmap.display_name(),
            to.size(),
            source.size()
        )));
    }
    for bitmap in &bitmaps {
        if bitmap.in_use() {
            progress.warn(&format!("Skipping inconsistent bitmap '{}'", bitmap.display_name()));
            continue;
        }
        let failed = |what: &str| format!("Failed to {what} bitmap {}", bitmap.display_name());
        to.add_bitmap(&bitmap.name, Some(bitmap.granularity()), bitmap.auto())
            .context(|| failed("create"))?;
        let bits = source.dirty_bitmap(&bitmap.name).context(|| failed("populate"))?;
        to.merge_bitmap(&bitmap.name, &bits).context(|| failed("populate")).inspect_err(|_| {
            // What has been copied so far is not worth keeping.
            bitmaps.iter().for_each(|bitmap| drop(to.remove_bitmap(&bitmap.name)));
        })?;
    }
    Ok(())
}
