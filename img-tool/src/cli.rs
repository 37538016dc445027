//! The command line: what can be typed, and what is said when it is typed wrong.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use image::{Format, Secrets, Spec};

use crate::cmd;
use crate::exit::{Failure, Outcome};

/// Create, inspect, convert, check and compare virtual disk images
///
/// A drop-in for qemu-img: the same commands, option letters, JSON documents and exit codes. Called under the
/// name qemu-img, it calls itself so.
#[derive(Debug, Parser)]
#[command(
    name = "vimg",
    version,
    infer_long_args = true,
    args_override_self = true,
    subcommand_required = true,
    disable_help_subcommand = true,
    max_term_width = 100,
    after_help = "Supported image formats:\n\n  luks qcow2 raw\n"
)]
pub(crate) struct Cli {
    /// Accepted for qemu-img's sake; vimg has no trace points
    #[arg(short = 'T', long, value_name = "TRACE", hide = true)]
    pub(crate) trace: Vec<String>,
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct GlobalArgs {
    /// The images come from strangers: open nothing that the command line does not name
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) untrusted: bool,
    /// Open this file, or files in this directory, although only an image names it that is untrusted, or whose format
    /// confines such names to the image's own folder (repeatable)
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    pub(crate) allow: Vec<PathBuf>,
    /// Try passphrases even on an image that makes that take very long
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) slow_keys: bool,
    /// Say what is done: the chain of images as it is opened, for one
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) verbose: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Change format-specific options of an image
    Amend(cmd::amend::Args),
    /// Run a simple benchmark
    Bench(cmd::bench::Args),
    /// Add, remove and change the dirty bitmaps of an image
    Bitmap(Box<cmd::bitmap::Args>),
    /// Check whether an image boots
    Bootcheck(Box<cmd::bootcheck::Args>),
    /// Print files of a guest
    Cat(cmd::cat::Args),
    /// Check the structures of an image, and repair them
    Check(cmd::check::Args),
    /// Print digests of the contents of disks, or check them
    Checksum(cmd::checksum::Args),
    /// Commit the changes of an image to its backing file
    Commit(cmd::commit::Args),
    /// Check if two images have the same contents
    Compare(cmd::compare::Args),
    /// Copy one or more images to another, in another format if wanted
    Convert(Box<cmd::convert::Args>),
    /// Copy between files, images and network block devices
    Copy(Box<cmd::copy::Args>),
    /// Copy files and folders out of a guest
    CpOut(cmd::cp_out::Args),
    /// Create an image
    Create(cmd::create::Args),
    /// Copy blocks of an image to another, in another format if wanted
    Dd(cmd::dd::Args),
    /// Say what this host can do: boot guests, lock and share files, be a sandbox
    Doctor(cmd::doctor::Args),
    /// Display information about an image
    Info(cmd::info::Args),
    /// Say what is inside a guest: systems, kernels and their drivers, boot loaders, what stands in the way of KVM
    Inspect(cmd::inspect::Args),
    /// List files of a guest
    Ls(cmd::ls::Args),
    /// Show where the bytes of an image come from
    Map(cmd::map::Args),
    /// Calculate the file size required for a new image
    Measure(cmd::measure::Args),
    /// Show images as disks of this machine: /dev/nbd0
    Nbd(cmd::nbd::Args),
    /// Copy the disks of this machine into images, with a description of the machine
    P2v(Box<cmd::p2v::Args>),
    /// Change the backing file of an image
    Rebase(cmd::rebase::Args),
    /// Change the size of an image
    Resize(cmd::resize::Args),
    /// Serve images to clients of network block devices
    Serve(Box<cmd::serve::Args>),
    /// List, create, apply or delete internal snapshots of an image
    Snapshot(cmd::snapshot::Args),
    /// Convert a virtual machine of another hypervisor to a KVM guest
    V2v(Box<cmd::v2v::Args>),
    /// Print a script that completes commands and options in a shell
    Completions(cmd::completions::Args),
    /// Write the manual pages into a directory
    Man(cmd::man::Args),
}

/// How a source image is named and opened; flattened into the commands that read one.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct SourceArgs {
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// Open the image although another process is writing to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) objects: ObjectArgs,
}

/// `--object`.
#[derive(Clone, Default, clap::Args)]
pub(crate) struct ObjectArgs {
    /// Definition of a user-creatable object, such as a secret
    #[arg(long, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    #[arg(skip)]
    parsed: OnceLock<Secrets>,
}

/// Passphrases are not for showing.
impl std::fmt::Debug for ObjectArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectArgs({})", self.object.len())
    }
}

impl ObjectArgs {
    /// These definitions.
    pub(crate) fn of(object: Vec<String>) -> Self {
        Self { object, ..Self::default() }
    }

    /// What the objects are for: the passphrases of encrypted images. To be called before images are opened, and
    /// by every command, for mistakes in objects that are not used are told, too.
    pub(crate) fn secrets(&self) -> Outcome<Secrets> {
        // Once, for their files may be pipes.
        if let Some(parsed) = self.parsed.get() {
            return Ok(parsed.clone());
        }
        let secrets = Secrets::parse(&self.object)?;
        Ok(self.parsed.get_or_init(|| secrets).clone())
    }
}

/// A source as the user named it.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) spec: Spec,
    /// The format of `-f`, if it was given.
    pub(crate) format: Option<Format>,
}

impl SourceArgs {
    /// Understands a file name (or specification) and `-f`.
    pub(crate) fn source(&self, filename: &str, format: Option<&str>) -> Outcome<Source> {
        self.objects.secrets()?;
        source(filename, format, self.image_opts)
    }
}

/// Understands a file name (or, with `image_opts`, a specification) and `-f`.
pub(crate) fn source(filename: &str, format: Option<&str>, image_opts: bool) -> Outcome<Source> {
    if !image_opts {
        let spec = Spec::from_filename(filename)?;
        if matches!(format, Some("file" | "host_device")) {
            return Ok(Source { spec: spec.as_protocol(), format: None });
        }
        return Ok(Source { spec, format: named_format(filename, format)? });
    }
    if format.is_some() {
        return Err(Failure::usage("--image-opts and --format are mutually exclusive"));
    }
    Ok(Source { spec: Spec::from_image_opts(filename)?, format: None })
}

/// The format of `-f`, for opening `filename`.
fn named_format(filename: &str, format: Option<&str>) -> Outcome<Option<Format>> {
    let Some(name) = format else { return Ok(None) };
    match Format::from_name(name) {
        Some(format) => Ok(Some(format)),
        None => {
            let error = block::Error::usage(format!("Could not open '{filename}': Unknown driver '{name}'"));
            Err(known_formats(error, name).into())
        }
    }
}

/// The formats in words.
pub(crate) fn format_names() -> String {
    Format::ALL.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
}

/// A format to write, by name.
pub(crate) fn target_format(name: &str) -> Outcome<Format> {
    Format::from_name(name).ok_or_else(|| {
        let error = block::Error::usage(format!("Unknown file format '{name}'"));
        known_formats(error, name).into()
    })
}

/// Formats of qemu-img that are not here (yet): whoever names one means it.
pub(crate) const FOREIGN_FORMATS: [&str; 11] =
    ["qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "bochs", "cloop", "dmg", "nbd"];

/// What people call formats, and their names here.
const OTHER_NAMES: [(&str, &str); 4] = [
    ("vhd", "vpc"),
    ("img", "raw"),
    ("ova", "vmdk (an OVA is an archive: name a disk in it as FILE.ova:DISK)"),
    ("hdd", "parallels"),
];

/// Which formats there are, and which one was probably meant.
fn known_formats(error: block::Error, name: &str) -> block::Error {
    let error = error.hint(format!("this version of vimg knows {}", format_names()));
    if let Some((_, called)) = OTHER_NAMES.iter().find(|(other, _)| *other == name) {
        return error.hint(format!("{name} is called {called} here, as by qemu-img"));
    }
    if FOREIGN_FORMATS.contains(&name) {
        return error;
    }
    image::suggest::did_you_mean(error, name, Format::ALL.iter().map(|format| format.name()))
}

/// The output of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum OutputFormat {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

impl OutputFormat {
    /// The value of `--output`.
    pub(crate) fn parse(name: Option<&str>, command: &str, app: &crate::app::App) -> Outcome<Self> {
        match name {
            None | Some("human") => Ok(Self::Human),
            Some("json") => Ok(Self::Json),
            Some(other) => {
                Err(app.usage(command, &format!("--output expects 'human' or 'json' not '{other}'")))
            }
        }
    }
}

/// Parses the command line. What the user only wants to read (help, version) comes back as a text.
pub(crate) fn parse(args: Vec<OsString>, program: &'static str) -> Result<Cli, Refused> {
    let command = command(program);
    let words: Vec<String> = args.iter().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    command
        .try_get_matches_from(args)
        .and_then(|mut matches| Cli::from_arg_matches_mut(&mut matches))
        .map_err(|error| Refused::new(&error, &words, program))
}

/// The definition of the command line, under the name of the program.
pub(crate) fn command(program: &'static str) -> clap::Command {
    let command = Cli::command().bin_name(program).display_name(program);
    if program == "vimg" {
        // qemu-img lists what it writes; there is more that is only read.
        let formats: Vec<_> = Format::ALL.iter().map(|format| format.name()).collect();
        command.after_help(format!("Supported image formats:\n\n  {}\n", formats.join(" ")))
    } else {
        command.version("")
    }
}

/// Why a command line was not carried out.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Nothing is wrong: the user asked for this text.
    Text(String),
    /// The user asked for the version.
    Version,
    /// Something is wrong.
    Wrong {
        /// What, in getopt's words where it has some.
        message: String,
        /// Whether getopt would complain, which names the command, too.
        getopt: bool,
        /// What else could have been meant.
        hint: Option<String>,
        /// The command whose help would help.
        command: Option<String>,
    },
}

impl Refused {
    fn new(error: &clap::Error, words: &[String], program: &str) -> Self {
        match error.kind() {
            ErrorKind::DisplayHelp => Self::Text(error.render().to_string()),
            ErrorKind::DisplayVersion => Self::Version,
            kind => {
                let command = words.iter().find(|word| is_command(word)).cloned();
                let message = message(error, kind, command.as_deref(), words);
                let getopt = ["unrecognized option", "invalid option", "option requires"]
                    .iter()
                    .any(|start| message.starts_with(start));
                Self::Wrong { message, getopt, hint: suggestion(error, program), command }
            }
        }
    }
}

fn is_command(word: &str) -> bool {
    Cli::command().get_subcommands().any(|command| command.get_name() == word)
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        ContextValue::Strings(texts) => texts.first().cloned(),
        _ => None,
    }
}

fn message(error: &clap::Error, kind: ErrorKind, command: Option<&str>, words: &[String]) -> String {
    let argument = text(error, ContextKind::InvalidArg).unwrap_or_default();
    match kind {
        ErrorKind::InvalidSubcommand => {
            let name = text(error, ContextKind::InvalidSubcommand).unwrap_or_default();
            format!("Command not found: {name}")
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "Not enough arguments".to_owned()
        }
        ErrorKind::MissingRequiredArgument => what_is_missing(command),
        ErrorKind::UnknownArgument if argument.starts_with("--") => {
            format!("unrecognized option '{argument}'")
        }
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            format!("invalid option -- '{}'", argument.trim_start_matches('-'))
        }
        ErrorKind::UnknownArgument => too_much(command, &argument),
        ErrorKind::InvalidValue
            if text(error, ContextKind::InvalidValue).is_none_or(|value| value.is_empty()) =>
        {
            format!("option requires an argument -- '{}'", option_letter(&argument, words))
        }
        _ => first_line(error),
    }
}

/// clap's own words, without its `error: `.
fn first_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

/// The option as the user typed it: clap names it by its long form.
fn option_letter(argument: &str, words: &[String]) -> String {
    match words.last() {
        Some(last) if last.starts_with('-') => last.trim_start_matches('-').to_owned(),
        _ => argument.split([' ', '<']).next().unwrap_or_default().trim_start_matches('-').to_owned(),
    }
}

fn what_is_missing(command: Option<&str>) -> String {
    match command {
        Some("create") => "Expecting image file name",
        Some("bench" | "check" | "commit" | "info" | "map" | "rebase" | "snapshot") => {
            "Expecting one image file name"
        }
        Some("resize") => "Expecting image file name and size",
        Some("compare") => "Expecting two image file names",
        Some("convert") => "Must specify image file name",
        _ => "Not enough arguments",
    }
    .to_owned()
}

fn too_much(command: Option<&str>, argument: &str) -> String {
    match command {
        Some("bench" | "check" | "commit" | "info" | "map" | "rebase" | "snapshot") => {
            "Expecting one image file name".to_owned()
        }
        Some("resize") => "Expecting image file name and size".to_owned(),
        Some("compare") => "Expecting two image file names".to_owned(),
        Some("measure") => "At most one filename argument is allowed.".to_owned(),
        _ => format!("Unexpected argument: {argument}"),
    }
}

fn suggestion(error: &clap::Error, program: &str) -> Option<String> {
    let wrong = text(error, ContextKind::InvalidSubcommand);
    let commands = Cli::command();
    let names = commands.get_subcommands().map(clap::Command::get_name);
    let command =
        wrong.and_then(|name| image::suggest::nearest(&name, names).map(|near| format!("{program} {near}")));
    let meant = command.or_else(|| text(error, ContextKind::SuggestedArg))?;
    Some(format!("did you mean '{meant}'?"))
}

#[cfg(test)]
mod tests;
