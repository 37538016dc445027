//! Creating images: what `create` and the target of `convert` share.
//!
//! In two steps, because qemu-img prints a line between them: [`prepare_create`] understands the request
//! (options, backing file, size) and touches nothing; [`PreparedCreate::create`] makes the files, and removes
//! them again if it fails.

pub(crate) mod make;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::CacheMode;
use block::{BlockDevice, Error, Result, ResultExt as _, Storage};

use crate::format::Format;
use crate::formats::{self, Place};
use crate::open::{BackingMode, Layer, OpenOptions, resolve_name};
use crate::options::Options;
use crate::policy::{Policy, Role};
use crate::secret::Secrets;
use crate::spec::{Node, Source, unknown_driver};
use crate::target::Placement;

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
    /// What the backing file and those behind it lie in, as far as they have been looked at.
    backing_files: HashSet<(u64, u64)>,
    path: PathBuf,
    /// What the file will be called in the end.
    named: PathBuf,
    /// Further files get temporary names, too.
    others_partial: bool,
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

    /// No file of the backing chain is overwritten, and no extent that belongs to an image which is not overwritten.
    fn refuse_to_overwrite(&self, others: &[PathBuf]) -> Result<()> {
        for path in others.iter().chain([&self.named]) {
            if Placement::existing_at(path).is_some_and(|file| self.backing_files.contains(&file)) {
                let message =
                    format!("'{}' would be overwritten: the backing file lies in it", path.display());
                return Err(Error::usage(message).hint("give the new image another name"));
            }
        }
        let taken = |path: &&PathBuf| std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0);
        let extents = formats::driver(self.format).map_or(&[][..], |_| others);
        match extents.iter().find(taken) {
            Some(path) if !self.named.exists() => {
                let message = format!(
                    "'{}' would be overwritten, although there is no '{}' that it could belong to",
                    path.display(),
                    self.named.display()
                );
                Err(Error::usage(message).hint("remove that file, or give the new image another name"))
            }
            _ => Ok(()),
        }
    }

    /// Further files of the image itself (not a data file, which has a name of its own) are written under
    /// [`partial_path`](crate::target::partial_path) of their names.
    pub(crate) fn with_partial_others(self) -> Self {
        Self { others_partial: true, ..self }
    }

    /// Creates the image. On failure the files that were created are removed again.
    ///
    /// # Errors
    /// The host failed, the image is in use, or the format refuses the combination of options.
    pub fn create(self) -> Result<Created> {
        let plan = make::Plan::new(self.format, self.size, &self.options, &self.secrets)?;
        self.refuse_to_overwrite(&plan.others(&self.named))?;
        let files = plan.carry_out(Place {
            path: &self.path,
            named: &self.named,
            cache: self.cache,
            others_partial: self.others_partial,
        })?;
        Ok(Created { formatting_line: self.formatting_line, size: self.size, warnings: self.warnings, files })
    }
}

/// Understands the options, looks at the backing file, and finds the size.
///
/// # Errors
/// In qemu's words, without the program name in front.
pub fn prepare_create(request: &CreateRequest) -> Result<PreparedCreate> {
    if !request.format.can_create() {
        return Err(formats::cannot_create(request.format));
    }
    let path = target_path(&request.filename)?;
    let definitions = crate::options::of_target(request.format, &request.filename);
    let mut options = Options::new(definitions, &request.options)?;
    take_backing_arguments(request, &mut options)?;
    let given_size = given_size(request, &options)?;
    refuse_self_backing(&request.filename, &options)?;
    let mut warnings = vec![];
    let backing = look_at_backing(request, &options, &mut warnings)?;
    let backing_size = backing.as_ref().and_then(|layer| layer.image.size().checked_next_multiple_of(512));
    let size =
        given_size.or(backing_size).ok_or_else(|| Error::usage("Image creation needs a size parameter"))?;
    options.set("size", &size.to_string())?;
    Ok(PreparedCreate {
        backing_files: backing_files(request, &options, backing.as_deref()),
        formatting_line: options.formatting_line(&request.filename, request.format),
        size,
        warnings,
        format: request.format,
        options,
        secrets: request.secrets.clone(),
        path: request.physical_path.clone().unwrap_or_else(|| path.clone()),
        named: path,
        others_partial: false,
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
            "images are not created on the '{}' protocol: the export is there already",
            request.driver
        ))
        .hint("copy a disk to it with: vimg convert -n SOURCE TARGET, or vimg copy SOURCE TARGET")),
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
    warnings: &mut Vec<String>,
) -> Result<Option<Arc<Layer>>> {
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
    warnings.extend(outside_the_folder(request, &backing));
    Ok(Some(backing))
}

/// The files that a new image must not be written to, because its backing file lies in them.
fn backing_files(request: &CreateRequest, options: &Options, backing: Option<&Layer>) -> HashSet<(u64, u64)> {
    if let Some(backing) = backing {
        return backing.files().map(|file| file.identity()).collect();
    }
    let Some(name) = options.given("backing_file") else { return HashSet::new() };
    let target = Node::from_filename(&request.filename, &mut vec![]).ok();
    let full = resolve_name(target.as_ref().and_then(Node::plain_path), name).ok();
    full.and_then(|full| Placement::existing_at(Path::new(&full))).into_iter().collect()
}

/// What the user should know of a parent that the new image will not be allowed to lead to.
fn outside_the_folder(request: &CreateRequest, backing: &Layer) -> Option<String> {
    formats::driver(request.format)?;
    let folder = crate::open::folder_of(&request.filename);
    let path = backing.path()?;
    Policy::trusting().check_confined(Role::BackingFile, folder, &path).err()?;
    Some(format!(
        "the backing file lies outside the image's folder; to read the image, add --allow {} then",
        path.display()
    ))
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
fn could_not_create<T>(path: &Path, result: Result<T>) -> Result<T> {
    result.context(|| format!("Could not create '{}'", path.display()))
}

#[cfg(test)]
mod tests;
