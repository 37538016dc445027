//! The disks of a guest: images, open for reading only, under overlays.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind};
use bootcheck::scratch;
use image::{CreateRequest, Format, Layer, OpenOptions, Spec, prepare_create};

use super::Args;
use crate::app::App;
use crate::cli::Source;
use crate::cmd::guest::refuse_description;
use crate::exit::{Failure, Outcome};

/// Bytes that a guest may write to one disk.
const MAX_SCRATCH: u64 = 16 << 30;

/// The disks of a guest; what the guest writes does not touch the images.
pub(super) struct Opened {
    /// The image under test first.
    pub(super) disks: Vec<Arc<dyn BlockDevice>>,
    /// Everything lies in files, which are open now.
    pub(super) only_files: bool,
    /// What the guest writes is kept here.
    kept: Option<Arc<dyn BlockDevice>>,
}

impl Opened {
    /// The guest has ended: what it wrote, where that is kept, becomes a clean image.
    pub(super) fn close(&self) -> block::Result<()> {
        self.kept.as_ref().map_or(Ok(()), |device| device.close())
    }
}

/// Opens an image and the further disks of its guest.
pub(super) fn open(args: &Args, name: &str, app: &App) -> Outcome<Opened> {
    if !args.source.image_opts {
        let given = args.format.is_none().then_some(name);
        for name in given.into_iter().chain(args.disk.iter().map(String::as_str)) {
            let way_out = format!(
                "'vimg v2v -o DIR --bootcheck {name}' converts and boots that machine, 'vimg inspect {name}' looks at it; its \
                 disks boot as they are with 'vimg bootcheck DISK --disk DISK'"
            );
            refuse_description(name, &way_out)?;
        }
    }
    let mut opened = match &args.write_to {
        Some(overlay) => open_kept(args, name, overlay, app)?,
        None => open_under_scratch(args, name, args.format.as_deref(), app)?,
    };
    for further in &args.disk {
        let further = open_under_scratch(args, further, None, app)?;
        opened.disks.extend(further.disks);
        opened.only_files &= further.only_files;
    }
    Ok(opened)
}

/// Opens an image for reading only, without a trace.
pub(super) fn open_image(args: &Args, name: &str, format: Option<&str>, app: &App) -> Outcome<Arc<Layer>> {
    let source = args.source.source(name, format)?;
    Ok(app.open(&source.spec, &options(args, &source, app)?)?)
}

fn options(args: &Args, source: &Source, app: &App) -> Outcome<OpenOptions> {
    Ok(OpenOptions {
        format: source.format,
        force_share: args.source.force_share,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        keep_access_time: true,
        ..OpenOptions::default()
    })
}

fn open_under_scratch(args: &Args, name: &str, format: Option<&str>, app: &App) -> Outcome<Opened> {
    let layer = open_image(args, name, format, app)?;
    let disk = scratch::in_file(layer.device(), &std::env::temp_dir(), MAX_SCRATCH)?;
    Ok(Opened { disks: vec![disk], only_files: only_files(&layer), kept: None })
}

fn only_files(layer: &Layer) -> bool {
    layer.chain().all(|layer| layer.file.is_some() || layer.container.as_deref().is_some_and(only_files))
}

/// Makes a new image over the image under test and opens that for writing.
fn open_kept(args: &Args, name: &str, overlay: &str, app: &App) -> Outcome<Opened> {
    if Path::new(overlay).symlink_metadata().is_ok() {
        let error = Error::usage(format!("--write-to '{overlay}': there is a file of this name already"));
        return Err(error.hint("remove it, or choose another name").into());
    }
    let source = args.source.source(name, args.format.as_deref())?;
    // Opened once to know what it is, with all that is to be said about it.
    let layer = app.open(&source.spec, &options(args, &source, app)?)?;
    let request = CreateRequest {
        backing_file: Some(backing_name(&source.spec, name)?),
        backing_format: Some(layer.format.name().to_owned()),
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..CreateRequest::new(overlay, Format::Qcow2)
    };
    drop(layer);
    prepare_create(&request)?.create()?;
    let spec = Spec::from_filename(overlay)?;
    let mut policy = app.policy();
    policy.allow.extend(source.spec.path().map(Path::to_owned));
    let options = OpenOptions {
        writable: true,
        format: Some(Format::Qcow2),
        policy,
        ..options(args, &Source { spec: spec.clone(), format: None }, app)?
    };
    let layer = image::open(&spec, &options)?;
    let device = layer.device();
    Ok(Opened { disks: vec![Arc::clone(&device)], only_files: only_files(&layer), kept: Some(device) })
}

/// The name of the image as the overlay has to know it, wherever that lies.
fn backing_name(spec: &Spec, name: &str) -> Outcome<String> {
    let Some(path) = spec.path() else { return Ok(name.to_owned()) };
    let path = path.canonicalize().map_err(Error::from)?;
    path.into_os_string().into_string().map_err(|_| {
        Failure::from(Error::new(
            ErrorKind::Unsupported,
            "the path of the image is not valid UTF-8, as an overlay needs it",
        ))
    })
}
