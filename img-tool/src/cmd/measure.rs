//! `measure`: how large a file will be.

use image::measure::{Subject, measure, target_options};
use image::{Format, OpenOptions, json, options};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs, format_names};
use crate::exit::{Exit, Failure, Outcome};
use crate::snapshot::Wanted;

/// Calculate the file size required for a new image
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg measure -O qcow2 disk.raw
  vimg measure -O qcow2 -o cluster_size=2M --size 100G")]
pub(crate) struct Args {
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", alias = "output-format")]
    pub(crate) target_format: String,
    /// Options of the new image, as for create
    #[arg(short, long = "options", value_name = "OPTIONS")]
    pub(crate) options: Vec<String>,
    /// Measure an empty disk of this size
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: Option<String>,
    /// Format of FILENAME (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Use this internal snapshot of FILENAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// Measure what converting this image takes
    pub(crate) filename: Option<String>,
}

/// Formats of qemu that cannot be measured.
const NOT_MEASURABLE: &[&str] =
    &["bochs", "cloop", "dmg", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "measure", app)?;
    let snapshot = args.snapshot.as_deref().map(|text| Wanted::parse(text, app)).transpose()?;
    let options = options::parse(&args.options)?;
    let size = args.size.as_deref().map(block::size::parse).transpose()?;
    check_usage(args)?;
    let target = target(&args.target_format)?;
    let options = match target_options(target, &options) {
        Ok(options) => options,
        Err(error) => {
            app.complain(&error.to_string());
            return Err(Failure::usage(format!("Invalid options for file format '{target}'")));
        }
    };
    let measured = match (&args.filename, size) {
        (Some(filename), _) => {
            let source = args.source.source(filename, args.format.as_deref())?;
            let open = OpenOptions {
                format: source.format,
                force_share: args.source.force_share,
                policy: app.policy(),
                secrets: args.source.objects.secrets()?,
                snapshot: snapshot.map(|snapshot| snapshot.selector),
                ..OpenOptions::default()
            };
            let layer = app.open(&source.spec, &open)?;
            app.confine(&[]);
            measure(Subject::Image(&layer), target, &options, &args.source.objects.secrets()?)?
        }
        (None, size) => {
            args.source.objects.secrets()?;
            measure(Subject::Size(size.unwrap_or(0)), target, &options, &args.source.objects.secrets()?)?
        }
    };
    match output {
        OutputFormat::Json => app.print(&format!("{}\n", json::pretty(&measured.to_json())))?,
        OutputFormat::Human => app.print(&measured.to_text())?,
    }
    Ok(Exit::OK)
}

fn check_usage(args: &Args) -> Outcome<()> {
    let about_the_source = args.source.image_opts || args.format.is_some() || args.snapshot.is_some();
    match (&args.filename, &args.size) {
        (None, _) if about_the_source => {
            Err(Failure::usage("--image-opts, -f, and -l require a filename argument."))
        }
        (None, None) => Err(Failure::usage("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => Err(Failure::usage("--size N cannot be used together with a filename.")),
        _ => Ok(()),
    }
}

fn target(name: &str) -> Outcome<Format> {
    Format::from_name(name).ok_or_else(|| {
        let message = if NOT_MEASURABLE.contains(&name) {
            format!("Block driver '{name}' does not support size measurement")
        } else {
            format!("Unknown file format '{name}'")
        };
        block::Error::usage(message).hint(format!("this version of vimg measures {}", format_names())).into()
    })
}
