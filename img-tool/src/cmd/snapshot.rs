//! `snapshot`: the states of a disk that are kept inside its image.

use image::info::human::snapshot_table;
use image::open::BackingMode;
use image::{Layer, OpenOptions};

use crate::app::App;
use crate::cli::SourceArgs;
use crate::cmd::info::local_time;
use crate::exit::{Exit, Outcome};

/// List, create, apply or delete internal snapshots of an image
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg snapshot -l disk.qcow2
  vimg convert -l before-upgrade -O qcow2 disk.qcow2 before.qcow2")]
pub(crate) struct Args {
    /// List the snapshots (the default)
    #[arg(short, long)]
    list: bool,
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: SourceArgs,
    /// The image
    filename: String,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    let options = OpenOptions {
        format: source.format,
        force_share: args.source.force_share,
        backing: BackingMode::Ignore,
        metadata_only: true,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    app.confine(&[]);
    list(&layer, app)
}

/// Prints the table; nothing at all if there are no snapshots.
fn list(layer: &Layer, app: &App) -> Outcome {
    let snapshots = layer.image.info()?.snapshots;
    if !snapshots.is_empty() {
        app.print(&format!("Snapshot list:\n{}", snapshot_table(&snapshots, "", &local_time)))?;
    }
    Ok(Exit::OK)
}
