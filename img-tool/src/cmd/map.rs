//! `map`: where the bytes of an image come from.

use image::OpenOptions;
use image::map::{Window, write_json, write_text};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::output::Gathered;

/// Show where the bytes of an image come from
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg map overlay.qcow2
  vimg map --output=json --start-offset=1G --max-length=64M disk.qcow2")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// First byte
    #[arg(short, long, value_name = "OFFSET")]
    pub(crate) start_offset: Option<String>,
    /// At most so many bytes
    #[arg(short = 'l', long, value_name = "LENGTH")]
    pub(crate) max_length: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    #[command(flatten)]
    pub(crate) source: SourceArgs,
    /// The image
    pub(crate) filename: String,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "map", app)?;
    let window = window(args)?;
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    let options = OpenOptions {
        format: source.format,
        force_share: args.source.force_share,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    app.confine(&[]);
    let mut out = Gathered::new(&app.output);
    let mut print = |text: &str| out.print(text);
    let result = match output {
        OutputFormat::Json => write_json::<Failure>(&layer, window, &mut print),
        OutputFormat::Human => write_text::<Failure>(&layer, window, &mut print),
    };
    out.flush()?;
    result?;
    Ok(Exit::OK)
}

fn window(args: &Args) -> Outcome<Window> {
    let parse = |name, text: &String| block::size::parse_named(name, text, 0..=block::size::MAX);
    Ok(Window {
        start: args.start_offset.as_ref().map(|text| parse("start offset", text)).transpose()?.unwrap_or(0),
        max_len: args.max_length.as_ref().map(|text| parse("max length", text)).transpose()?,
    })
}
