//! Creating images: what `create` and the target of `convert` share.
//!
//! In two steps, because qemu-img prints a line between them: [`prepare_create`] understands the request
//! (options, backing file, size) and touches nothing; [`PreparedCreate::create`] makes the files, and removes
//! them again if it fails.

pub(crate) mod make;

use std::path::PathBuf;
use std::sync::Arc;

use block::file::CacheMode;
use block::{BlockDevice, Error, Result, ResultExt as _, Storage};

use crate::format::Format;
use crate::formats::Place;
use crate::open::{BackingMode, Layer, OpenOptions, resolve_name};
use crate::options::Options;
use crate::policy::Policy;
use crate::secret::Secrets;
use crate::spec::{Node, Source, unknown_driver};

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// The file, as named by the user.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// Virtual size in bytes. `None`: from the `size` option or the backing file.
    pub size: Option<u64>,
    /// Name of the backing file as it will be stored.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Do not open the backing file.
    pub backing_unsafe: bool,
    /// Options of `-o`, in order.
    pub options: Vec<(String, String)>,
    /// Which names inside the backing file are followed.
    pub policy: Policy,
    /// Passphrases, by the names that options refer to.
    pub secrets: Secrets,
    /// Cache mode of the new file.
    pub cache: CacheMode,
    /// Create this file instead of the one that `filename` names (a temporary name beside it). Relative names
    /// inside the image still count from the directory of `filename`.
    pub physical_path: Option<PathBuf>,
}

impl CreateRequest {
    /// A request without options.
    pub fn new(filename: impl Into<String>, format: Format) -> Self {
        Self {
            filename: filename.into(),
            format,
            size: None,
            backing_file: None,
            backing_format: None,
            backing_unsafe: false,
            options: vec![],
            policy: Policy::default(),
            secrets: Secrets::default(),
            cache: CacheMode::default(),
            physical_path: None,
        }
    }
}

/// A request whose options have been understood; nothing has been created yet.
#[derive(Debug)]
pub struct PreparedCreate {
    /// The line that qemu-img prints before it creates.
    pub formatting_line: String,
    /// The virtual size in bytes.
    pub size: u64,
    /// What the user should be told.
    pub warnings: Vec<String>,
    format: Format,
    options: Options,
    secrets: Secrets,
    path: PathBuf,
    /// What the file will be called in the end.
    named: PathBuf,
    cache: CacheMode,
}

/// What has been created.
#[derive(Debug)]
pub struct Created {
    /// The line that qemu-img prints before it creates.
    pub formatting_line: String,
    /// The virtual size in bytes.
    pub size: u64,
    /// What the user should be told.
    pub warnings: Vec<String>,
    /// Every file that was made: the image and, if there is one, its data file.
    pub files: Vec<PathBuf>,
}

impl PreparedCreate {
    /// Checks that the options go together, which [`create`](Self::create) does before it touches anything.
    ///
    /// # Errors
    /// In qemu's words.
    pub fn validate(&self) -> Result<()> {
        make::Plan::new(self.format, self.size, &self.options, &self.secrets).map(drop)
    }

    /// The files that will be made beside the image itself: a data file, extents.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn others(&self) -> Result<Vec<PathBuf>> {
        let plan = make::Plan::new(self.format, self.size, &self.options, &self.secrets)?;
        Ok(plan.others(&self.named))
    }

    /// Begins the image in something that can only be appended to; closing the disk that is returned completes it.
    ///
    /// # Errors
    /// Images of this kind cannot be made like that, options that do not go together, or the host failed.
    pub(crate) fn stream(
        &self,
        output: &Arc<dyn Storage>,
        level: qcow2::codec::Level,
    ) -> Result<Arc<dyn BlockDevice>> {
        let plan = make::Plan::new(self.format, self.size, &self.options, &self.secrets)?;
        plan.stream(output, level)?.ok_or_else(|| {
            Error::usage(format!("images of format '{}' cannot be written to a pipe", self.format))
                .hint("only VMDK can: -O vmdk -o subformat=streamOptimized")
        })
    }

    /// Creates the image. On failure the files that were created are removed again.
    ///
    /// # Errors
    /// The host failed, the image is in use, or the format refuses the combination of options.
    pub fn create(self) -> Result<Created> {
        let plan = make::Plan::new(self.format, self.size, &self.options, &self.secrets)?;
        let files = plan.carry_out(Place { path: &self.path, named: &self.named, cache: self.cache })?;
        Ok(Created { formatting_line: self.formatting_line, size: self.size, warnings: self.warnings, files })
    }
}

/// Understands the options, looks at the backing file, and finds the size.
///
/// # Errors
/// In qemu's words, without the program name in front.
pub fn prepare_create(request: &CreateRequest) -> Result<PreparedCreate> {
    if !request.format.can_create() {
        return Err(crate::formats::cannot_create(request.format));
    }
    let path = target_path(&request.filename)?;
    let definitions = crate::options::of_target(request.format, &request.filename);
    let mut options = Options::new(definitions, &request.options)?;
    take_backing_arguments(request, &mut options)?;
    let given_size = given_size(request, &options)?;
    refuse_self_backing(&request.filename, &options)?;
    let mut warnings = vec![];
    let backing_size = look_at_backing(request, &options, given_size, &mut warnings)?;
    let size =
        given_size.or(backing_size).ok_or_else(|| Error::usage("Image creation needs a size parameter"))?;
    options.set("size", &size.to_string())?;
    Ok(PreparedCreate {
        formatting_line: options.formatting_line(&request.filename, request.format),
        size,
        warnings,
        format: request.format,
        options,
        secrets: request.secrets.clone(),
        path: request.physical_path.clone().unwrap_or_else(|| path.clone()),
        named: path,
        cache: request.cache,
    })
}

/// [`prepare_create`] and [`PreparedCreate::create`] in one step.
///
/// # Errors
/// As those.
pub fn create(request: &CreateRequest) -> Result<Created> {
    prepare_create(request)?.create()
}

/// The file that a target name stands for.
fn target_path(filename: &str) -> Result<PathBuf> {
    if filename.starts_with("json:") {
        return Err(Error::usage("Unknown protocol 'json'"));
    }
    match Node::from_filename(filename, &mut vec![])?.source {
        Source::File { path, .. } => Ok(PathBuf::from(path)),
        Source::Protocol(request) => Err(Error::unsupported(format!(
            "the '{}' protocol does not create images in this version of vimg",
            request.driver
        ))),
        Source::Nested(_) => Err(Error::usage("an image is created in a file")),
        Source::Member { archive, .. } => {
            Err(Error::usage(format!("'{archive}' is an archive, in which no image can be created")))
        }
    }
}

/// `-b` and `-F` win over the options of the same meaning.
fn take_backing_arguments(request: &CreateRequest, options: &mut Options) -> Result<()> {
    let pairs = [
        ("backing_file", &request.backing_file, "Backing file"),
        ("backing_fmt", &request.backing_format, "Backing file format"),
    ];
    for (name, value, noun) in pairs {
        let Some(value) = value else { continue };
        if !options.knows(name) {
            return Err(Error::usage(format!("{noun} not supported for file format '{}'", request.format)));
        }
        options.set(name, value)?;
    }
    Ok(())
}

fn given_size(request: &CreateRequest, options: &Options) -> Result<Option<u64>> {
    match (request.size, options.number("size")) {
        (Some(_), Some(_)) => Err(Error::usage("The image size must be specified only once")),
        (size, option) => Ok(size.or(option)),
    }
}

fn refuse_self_backing(filename: &str, options: &Options) -> Result<()> {
    match options.given("backing_file") {
        Some("") => Err(Error::usage("Expected backing file name, got empty string")),
        Some(name) if name == filename => {
            Err(Error::usage("Error: Trying to create an image with the same filename as the backing file"))
        }
        _ => Ok(()),
    }
}

/// Opens the backing file, to know that it can be and how large it is.
fn look_at_backing(
    request: &CreateRequest,
    options: &Options,
    size: Option<u64>,
    warnings: &mut Vec<String>,
) -> Result<Option<u64>> {
    let Some(name) = options.given("backing_file") else { return Ok(None) };
    let format = options.given("backing_fmt").filter(|name| !name.is_empty());
    let without_format = "Backing file specified without backing format";
    if request.backing_unsafe {
        return match format {
            Some(_) => Ok(None),
            None => Err(Error::usage(without_format).hint("name the format of the backing file with -F")),
        };
    }
    let backing =
        open_backing(request, name, format).map_err(|error| after(error, "Could not open backing image."))?;
    if format.is_none() {
        let detected = format!("{without_format}\nDetected format of {}.", backing.format);
        return Err(Error::usage(detected).hint(format!("if that is right, add -F {}", backing.format)));
    }
    warnings.extend(backing.warnings.iter().cloned());
    Ok(size.or(backing.image.size().checked_next_multiple_of(512)))
}

fn open_backing(request: &CreateRequest, name: &str, format: Option<&str>) -> Result<Arc<Layer>> {
    let target = Node::from_filename(&request.filename, &mut vec![])?;
    let full = resolve_name(target.plain_path(), name)?;
    let format = match format {
        Some(name) => Some(Format::from_name(name).ok_or_else(|| unknown_driver(name))?),
        None => None,
    };
    let options = OpenOptions {
        format,
        force_share: true,
        backing: BackingMode::Follow,
        metadata_only: true,
        policy: request.policy.clone(),
        secrets: request.secrets.clone(),
        ..OpenOptions::default()
    };
    crate::open::open_node(&Node::from_filename(&full, &mut vec![])?, &options)
}

/// A second line behind the message, as qemu adds them.
fn after(error: Error, line: &str) -> Error {
    let hints = error.hints().to_vec();
    let kind = error.kind();
    hints.into_iter().fold(Error::new(kind, format!("{error}\n{line}")), Error::hint)
}

/// A value in qemu's enumeration `parameter`.
pub(crate) fn does_not_accept(parameter: &str, value: &str) -> Error {
    Error::usage(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

/// What `create` could not do with a file.
fn could_not_create<T>(path: &std::path::Path, result: Result<T>) -> Result<T> {
    result.context(|| format!("Could not create '{}'", path.display()))
}

#[cfg(test)]
mod tests;
