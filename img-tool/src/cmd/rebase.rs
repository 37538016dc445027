//! `rebase`: another backing file for an image.

use image::rebase::{RebaseRequest, rebase};

use crate::app::App;
use crate::cmd::chain::{ChainArgs, cache_mode};
use crate::exit::{Exit, Outcome};

/// Change the backing file of an image
///
/// The contents stay the same: where the new backing file holds other bytes than the old one, the old bytes are
/// copied into the image first. With -u only the name changes, which is right if both files hold the same. An
/// interruption leaves the image complete, with its old backing file.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg rebase -b new-base.qcow2 -F qcow2 disk.qcow2
  vimg rebase -p -b '' disk.qcow2
  vimg rebase -u -b moved/base.qcow2 -F qcow2 disk.qcow2
  vimg rebase -c -b older.qcow2 -F qcow2 disk.qcow2

A relative BACKING_FILE counts from the directory of FILENAME.")]
pub(crate) struct Args {
    #[command(flatten)]
    chain: ChainArgs,
    /// The new backing file; "" for none
    #[arg(short, long, value_name = "BACKING_FILE")]
    backing: Option<String>,
    /// Format of the new backing file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Cache mode of the new backing file
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback")]
    backing_cache: String,
    /// Change the name only: the contents of the new backing file are not looked at, it need not even be there
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Store what is copied compressed
    #[arg(short, long)]
    compress: bool,
    /// Read the new backing file although another process is writing to it
    #[arg(short = 'U', long)]
    force_share: bool,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let secrets = args.chain.secrets()?;
    let backing_file = match &args.backing {
        None if !args.backing_unsafe => {
            return Err(app.usage("rebase", "Must specify backing file (-b) or use unsafe mode (-u)"));
        }
        name => name.clone().unwrap_or_default(),
    };
    let source = args.chain.source()?;
    let request = RebaseRequest {
        backing_file,
        backing_format: args.backing_format.clone(),
        change_name_only: args.backing_unsafe,
        backing_cache: cache_mode(&args.backing_cache, "Invalid source cache option")?,
        force_share: args.force_share,
        compress: args.compress,
        threads: args.chain.threads(),
        policy: app.policy(),
        secrets,
    };
    let options = args.chain.opening(&source, request.overlay_options())?;
    let overlay = app.open(&source.spec, &options)?;
    let copied = args.chain.with_progress(app, |progress| rebase(&overlay, &request, progress))?;
    app.tell(&format!(
        "{} bytes compared, {} written to the image, {} of them as zeros",
        copied.compared, copied.written, copied.zeroed
    ));
    Ok(Exit::OK)
}
