//! `compare`: do two images hold the same bytes?

use std::sync::Arc;

use block::file::CacheMode;
use image::compare::{CompareOptions, Comparison, Stage, Verdict, compare};
use image::{Layer, OpenOptions, json};
use serde_json::json;

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Failure, OrExit as _, Outcome};
use crate::progress::{ProgressArgs, Reporter};
use crate::snapshot::Wanted;

/// Check if two images have the same contents
///
/// A shorter image counts as continued by zeros. Exit codes: 0 identical, 1 different, 2 an image could not be
/// opened, 3 its block status not be found out, 4 not be read.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg compare disk.raw disk.qcow2
  vimg compare -s -f raw -F qcow2 a.img b.img
  vimg compare --a-snapshot monday --b-snapshot tuesday disk.qcow2 disk.qcow2
  vimg compare --output=json a.qcow2 b.qcow2")]
pub(crate) struct Args {
    /// Format of the first image (default: found out from its contents)
    #[arg(short = 'f', long, value_name = "FMT", alias = "format")]
    a_format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,
    /// Use this internal snapshot of the first image: an id, a name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(long, value_name = "SNAPSHOT")]
    a_snapshot: Option<String>,
    /// Use this internal snapshot of the second image
    #[arg(long, value_name = "SNAPSHOT")]
    b_snapshot: Option<String>,
    /// Sizes must be equal, too, and so must what is allocated and what is known to be zero
    #[arg(short, long)]
    strict: bool,
    /// Cache mode of the images: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// How many threads read and compare [default: one for each processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: SourceArgs,
    /// The first image
    filename1: String,
    /// The second image
    filename2: String,
}

/// An image could not be opened, or cannot have been meant.
const CANNOT_OPEN: u8 = 2;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "compare", app)?;
    let Some(cache) = CacheMode::parse(&args.cache) else {
        return Err(with_exit(
            Failure::usage(format!("Invalid source cache option: {}", args.cache)),
            CANNOT_OPEN,
        ));
    };
    let open = |name: &str, format: Option<&str>, snapshot: Option<&str>| {
        args.open(name, format, snapshot, cache, app).map_err(|failure| with_exit(failure, CANNOT_OPEN))
    };
    let names = [args.filename1.as_str(), args.filename2.as_str()];
    let first = open(names[0], args.a_format.as_deref(), args.a_snapshot.as_deref())?;
    let second = open(names[1], args.b_format.as_deref(), args.b_snapshot.as_deref())?;
    let reporter = Reporter::new(&args.progress, args.quiet, app)?;
    app.confine(&[]);
    let mut options = CompareOptions { strict: args.strict, ..CompareOptions::default() };
    if let Some(threads) = args.threads {
        options.threads = threads.into();
    }
    let result = compare(&first, &second, &options, &reporter);
    let ended = match result {
        Ok(found) => show(&found, names, output, args, app),
        Err(error) => match error.stage {
            Stage::Cancelled => Err(reporter.failure(error.error)),
            Stage::BlockStatus => Err(error.into_error(names)).or_exit(3),
            Stage::Read => Err(error.into_error(names)).or_exit(4),
        },
    };
    reporter.finish();
    ended
}

fn with_exit(failure: Failure, code: u8) -> Failure {
    match failure {
        Failure::Error { error, .. } => Failure::Error { exit: Exit(code), error },
        other => other,
    }
}

impl Args {
    fn open(
        &self,
        name: &str,
        format: Option<&str>,
        snapshot: Option<&str>,
        cache: CacheMode,
        app: &App,
    ) -> Outcome<Arc<Layer>> {
        let snapshot = snapshot.map(|text| Wanted::parse(text, app)).transpose()?;
        let source = self.source.source(name, format)?;
        let options = OpenOptions {
            format: source.format,
            cache,
            force_share: self.source.force_share,
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
            snapshot: snapshot.map(|snapshot| snapshot.selector),
            ..OpenOptions::default()
        };
        Ok(app.open(&source.spec, &options)?)
    }
}

fn show(found: &Comparison, names: [&str; 2], output: OutputFormat, args: &Args, app: &App) -> Outcome {
    let exit = if found.verdict == Verdict::Identical { Exit::OK } else { Exit::ERROR };
    let said = match output {
        OutputFormat::Json => app.print(&format!("{}\n", json::pretty(&document(found, names)))),
        OutputFormat::Human if args.quiet => Ok(()),
        OutputFormat::Human => app.print(&text(found, args.strict)),
    };
    match said {
        // Whoever does not read on may still look at the exit code.
        Ok(()) | Err(Failure::BrokenPipe) => Ok(exit),
        // Not 1: that would be a verdict.
        Err(failure) => Err(with_exit(failure, 2)),
    }
}

/// qemu-img's words.
fn text(found: &Comparison, strict: bool) -> String {
    let warning = if found.warns_of_sizes() && !strict { "Warning: Image size mismatch!\n" } else { "" };
    let words = match found.verdict {
        Verdict::Identical => "Images are identical.".to_owned(),
        Verdict::Content(offset) => format!("Content mismatch at offset {offset}!"),
        Verdict::Status(offset) => format!("Strict mode: Offset {offset} block status mismatch!"),
        Verdict::Size => "Strict mode: Image size mismatch!".to_owned(),
    };
    format!("{warning}{words}\n")
}

/// For programs; qemu-img has no such document.
fn document(found: &Comparison, names: [&str; 2]) -> serde_json::Value {
    let (mismatch, offset) = match found.verdict {
        Verdict::Identical => (None, None),
        Verdict::Content(offset) => (Some("content"), Some(offset)),
        Verdict::Status(offset) => (Some("block-status"), Some(offset)),
        Verdict::Size => (Some("size"), None),
    };
    let mut document =
        json!({ "identical": mismatch.is_none(), "filenames": names, "virtual-sizes": found.sizes });
    if let Some(mismatch) = mismatch {
        document["mismatch"] = json!(mismatch);
    }
    if let Some(offset) = offset {
        document["offset"] = json!(offset);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_read_as_in_qemu_img() {
        let found = |verdict, sizes| Comparison { verdict, sizes };
        assert_eq!(text(&found(Verdict::Identical, [512, 512]), false), "Images are identical.\n");
        assert_eq!(
            text(&found(Verdict::Identical, [512, 1024]), false),
            "Warning: Image size mismatch!\nImages are identical.\n"
        );
        assert_eq!(text(&found(Verdict::Content(0), [512, 1024]), false), "Content mismatch at offset 0!\n");
        assert_eq!(
            text(&found(Verdict::Status(0), [512, 512]), true),
            "Strict mode: Offset 0 block status mismatch!\n"
        );
    }

    #[test]
    fn documents_say_where() {
        let document =
            document(&Comparison { verdict: Verdict::Content(512), sizes: [1024, 1024] }, ["a", "b"]);
        assert_eq!(document["identical"], false);
        assert_eq!((&document["mismatch"], &document["offset"]), (&json!("content"), &json!(512)));
    }
}
