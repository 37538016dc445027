//! `commit`: the changes of an image go into its backing file.

use block::file::CacheMode;
use image::OpenOptions;
use image::commit::{CommitRequest, commit, find_base, open_for_commit};

use crate::app::App;
use crate::cli::{ObjectArgs, source};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// Commit the changes of an image to its backing file
///
/// What the image stores is written to its backing file, which grows if it is smaller; then the image is emptied.
/// With -b everything above BASE goes there, and nothing is emptied: images between the two, and others on top of
/// BASE, are of no use afterwards. An interruption leaves the image complete: the commit can be repeated.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg commit overlay.qcow2
  vimg commit -p -d overlay.qcow2
  vimg commit -b base.qcow2 newest.qcow2
  vimg commit -r 50M overlay.qcow2

A relative BASE counts from the directory of the image that has it as its backing file.")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the images: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// The member of the backing chain to commit to [default: the immediate backing file]; implies -d
    #[arg(short, long, value_name = "BASE")]
    base: Option<String>,
    /// Do not empty the image afterwards
    #[arg(short, long)]
    drop: bool,
    /// At most this many bytes per second
    #[arg(short, long, value_name = "RATE", allow_hyphen_values = true)]
    rate: Option<String>,
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
    let rate = args.rate.as_deref().map(rate).transpose()?.filter(|rate| *rate > 0);
    let source = source(&args.filename, args.format.as_deref(), args.image_opts)?;
    let cache = CacheMode::parse(&args.cache)
        .ok_or_else(|| Failure::usage(format!("Invalid cache option: {}", args.cache)))?;
    let options = OpenOptions {
        writable: true,
        cache,
        format: source.format,
        policy: app.policy(),
        secrets,
        ..OpenOptions::default()
    };
    // First as always, to know which image is the base, then with that one for writing.
    let base = {
        let layer = app.open(&source.spec, &options)?;
        find_base(&layer, args.base.as_deref())?
    };
    let top = open_for_commit(&source.spec, base, &options)?;
    let request = CommitRequest {
        keep: args.drop || args.base.is_some(),
        rate,
        threads: args.threads.map(usize::from),
    };
    let reporter = Reporter::new(&args.progress, args.quiet, app)?.confining_to(vec![]);
    let result = commit(&top, base, &request, &reporter);
    if result.is_ok() {
        reporter.finish()?;
    }
    let tally = result.map_err(|error| reporter.failure(error))?;
    app.tell(&format!(
        "{} bytes copied, {} found to be zeros, {} shared by the kernel",
        tally.copied, tally.found_zero, tally.shared
    ));
    if !args.quiet {
        app.print("Image committed.\n")?;
    }
    Ok(Exit::OK)
}

fn rate(text: &str) -> Outcome<u64> {
    const MAX: u64 = i64::MAX.unsigned_abs();
    Ok(block::size::parse_named("rate limit", text, 0..=MAX)?)
}
