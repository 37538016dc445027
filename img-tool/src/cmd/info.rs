//! `info`: what an image is.

use image::info::{describe, document};
use image::{OpenOptions, json};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Outcome};

/// Display information about an image
///
/// Opens the image itself only: neither its backing file nor its data file.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg info disk.qcow2
  vimg info --output=json --backing-chain overlay.qcow2
  vimg info --exports nbd://host
  vimg info -U disk-of-a-running-guest.qcow2")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Also describe each image behind it
    #[arg(short, long)]
    pub(crate) backing_chain: bool,
    /// Of an NBD server, list everything that it exports, as `qemu-nbd --list` does
    #[arg(long, conflicts_with_all = ["backing_chain", "output"])]
    pub(crate) exports: bool,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// The image
    pub(crate) filename: String,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    if args.exports {
        let text = crate::nbd::list(&args.filename, &args.source.objects.secrets()?)?;
        app.print(&text)?;
        return Ok(Exit::OK);
    }
    let output = OutputFormat::parse(args.output.as_deref(), "info", app)?;
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    let options = OpenOptions {
        format: source.format,
        force_share: args.source.force_share,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..OpenOptions::default()
    };
    app.warn_about(&source.spec);
    if let Some(path) = source.spec.path() {
        app.confine_to_reading([path.to_owned()]);
    }
    let described = describe(&source.spec, &options, args.backing_chain)?;
    for (_, layer) in &described {
        app.announce(layer, false);
    }
    let descriptions: Vec<_> = described.into_iter().map(|(description, _)| description).collect();
    let text = match output {
        OutputFormat::Json => json::pretty(&document(&descriptions, args.backing_chain)) + "\n",
        OutputFormat::Human => {
            let texts: Vec<_> = descriptions.iter().map(|d| d.to_text(&local_time)).collect();
            texts.join("\n")
        }
    };
    app.print(&text)?;
    Ok(Exit::OK)
}

/// Seconds since the epoch as local time.
pub(crate) fn local_time(seconds: u32) -> String {
    use chrono::TimeZone as _;
    match chrono::Local.timestamp_opt(i64::from(seconds), 0) {
        chrono::LocalResult::Single(time) | chrono::LocalResult::Ambiguous(time, _) => {
            time.format("%Y-%m-%d %H:%M:%S").to_string()
        }
        chrono::LocalResult::None => seconds.to_string(),
    }
}
