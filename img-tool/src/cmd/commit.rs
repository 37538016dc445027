//! `commit`: the changes of an image go into its backing file.

use image::OpenOptions;
use image::commit::{CommitRequest, commit, find_base, open_for_commit};

use crate::app::App;
use crate::cmd::chain::ChainArgs;
use crate::exit::{Exit, Outcome};

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
    #[command(flatten)]
    chain: ChainArgs,
    /// The member of the backing chain to commit to [default: the immediate backing file]; implies -d
    #[arg(short, long, value_name = "BASE")]
    base: Option<String>,
    /// Do not empty the image afterwards
    #[arg(short, long)]
    drop: bool,
    /// At most this many bytes per second
    #[arg(short, long, value_name = "RATE", allow_hyphen_values = true)]
    rate: Option<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let secrets = args.chain.secrets()?;
    let rate = args.rate.as_deref().map(rate).transpose()?.filter(|rate| *rate > 0);
    let source = args.chain.source()?;
    let options = OpenOptions { writable: true, policy: app.policy(), secrets, ..OpenOptions::default() };
    let options = args.chain.opening(&source, options)?;
    // First as always, to know which image is the base, then with that one for writing.
    let base = {
        let layer = app.open(&source.spec, &options)?;
        find_base(&layer, args.base.as_deref())?
    };
    let top = open_for_commit(&source.spec, base, &options)?;
    let request =
        CommitRequest { keep: args.drop || args.base.is_some(), rate, threads: args.chain.threads() };
    let tally = args.chain.with_progress(app, |progress| commit(&top, base, &request, progress))?;
    app.tell(&format!(
        "{} bytes copied, {} found to be zeros, {} shared by the kernel",
        tally.copied, tally.found_zero, tally.shared
    ));
    if !args.chain.quiet {
        app.note("Image committed.\n");
    }
    Ok(Exit::OK)
}

fn rate(text: &str) -> Outcome<u64> {
    const MAX: u64 = i64::MAX.unsigned_abs();
    Ok(block::size::parse_named("rate limit", text, 0..=MAX)?)
}
