//! `rebase`: another backing file for an image.

use block::file::CacheMode;
use image::OpenOptions;
use image::rebase::{RebaseRequest, rebase};

use crate::app::App;
use crate::cli::{ObjectArgs, source};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

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
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the image: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
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
    /// How many threads work [default: one for each processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    objects: ObjectArgs,
    /// The image
    filename: String,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let secrets = args.objects.secrets()?;
    let backing_file = match &args.backing {
        None if !args.backing_unsafe => {
            return Err(app.usage("rebase", "Must specify backing file (-b) or use unsafe mode (-u)"));
        }
        name => name.clone().unwrap_or_default(),
    };
    let source = source(&args.filename, args.format.as_deref(), args.image_opts)?;
    let cache = cache(&args.cache, "Invalid cache option")?;
    let request = RebaseRequest {
        backing_file,
        backing_format: args.backing_format.clone(),
        change_name_only: args.backing_unsafe,
        backing_cache: self::cache(&args.backing_cache, "Invalid source cache option")?,
        force_share: args.force_share,
        compress: args.compress,
        threads: args.threads.map(usize::from),
        policy: app.policy(),
        secrets,
    };
    let options = OpenOptions { cache, format: source.format, ..request.overlay_options() };
    let overlay = app.open(&source.spec, &options)?;
    let reporter = Reporter::new(&args.progress, args.quiet, app)?.confining_to(vec![]);
    let result = rebase(&overlay, &request, &reporter);
    if result.is_ok() {
        reporter.finish()?;
    }
    let copied = result.map_err(|error| reporter.failure(error))?;
    app.tell(&format!(
        "{} bytes compared, {} written to the image, {} of them as zeros",
        copied.compared, copied.written, copied.zeroed
    ));
    Ok(Exit::OK)
}

fn cache(name: &str, complaint: &str) -> Outcome<CacheMode> {
    CacheMode::parse(name).ok_or_else(|| Failure::usage(format!("{complaint}: {name}")))
}
