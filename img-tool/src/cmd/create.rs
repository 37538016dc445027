//! `create`: a new image.

use block::Error;
use image::{CreateRequest, Secrets, options};

use crate::app::App;
use crate::cli::{ObjectArgs, target_format};
use crate::exit::{Exit, Failure, Outcome};

/// Create an image
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg create -f qcow2 disk.qcow2 20G
  vimg create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  vimg create -f qcow2 -o cluster_size=2M,lazy_refcounts=on disk.qcow2 1T
  vimg create -f qcow2 -o help")]
pub(crate) struct Args {
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    pub(crate) format: String,
    /// Options of the format, separated by commas; 'help' lists them
    #[arg(short, long = "options", value_name = "OPTIONS")]
    pub(crate) options: Vec<String>,
    /// Stack the new image on this one
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    pub(crate) backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    pub(crate) backing_format: Option<String>,
    /// Do not open the backing file
    #[arg(short = 'u', long)]
    pub(crate) backing_unsafe: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) objects: ObjectArgs,
    /// The new image; an existing file is overwritten
    #[arg(required_unless_present = "options")]
    pub(crate) filename: Option<String>,
    /// Its size: a number of bytes, or with a suffix k, M, G, T, P, E. May be left out with -b
    #[arg(allow_hyphen_values = true)]
    pub(crate) size: Option<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let lists = options::parse(&args.options);
    if options::asks_for_help(&args.options) {
        let text = options::help(target_format(&args.format)?, args.filename.as_deref())?;
        return app.print(&text).map(|()| Exit::OK);
    }
    let lists = lists?;
    let Some(filename) = &args.filename else {
        return Err(app.usage("create", "Expecting image file name"));
    };
    let secrets = args.objects.secrets()?;
    let size = args.size.as_deref().map(block::size::parse).transpose()?;
    create(args, app, filename, lists, size, secrets).map_err(|failure| about(failure, filename))
}

/// The name of the file in front of the message.
fn about(failure: Failure, filename: &str) -> Failure {
    match failure {
        Failure::Error { exit, error } => Failure::Error { exit, error: error.context(filename) },
        other => other,
    }
}

fn create(
    args: &Args,
    app: &App,
    filename: &str,
    lists: Vec<(String, String)>,
    size: Option<u64>,
    secrets: Secrets,
) -> Outcome {
    if args.format == "file" || args.format == "host_device" {
        return Err(Error::usage(format!("Unknown file format '{}'", args.format)).hint("use -f raw").into());
    }
    let request = CreateRequest {
        size,
        backing_file: args.backing.clone(),
        backing_format: args.backing_format.clone(),
        backing_unsafe: args.backing_unsafe,
        options: lists,
        policy: app.policy(),
        secrets,
        ..CreateRequest::new(filename, target_format(&args.format)?)
    };
    let prepared = image::prepare_create(&request)?;
    for warning in &prepared.warnings {
        app.warn(warning);
    }
    if !args.quiet {
        app.note(&format!("{}\n", prepared.formatting_line));
    }
    prepared.create()?;
    Ok(Exit::OK)
}
