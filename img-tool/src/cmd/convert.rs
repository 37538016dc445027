//! `convert`: the bytes of one or more disks into another image.

use std::fs::File;
use std::io::{BufReader, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::CacheMode;
use image::convert::{
    Bitmaps, ConvertReport, ConvertRequest, ExistingTarget, Losses, PipeTarget, Target, can_be_sent, convert,
};
use image::open::{Share, open_pipe};
use image::{CreateRequest, Format, Layer, OpenOptions, Spec, options};

use crate::app::{App, directory_of};
use crate::cli::{SourceArgs, target_format};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};
use crate::snapshot::Wanted;

/// Copy one or more images to another, in another format if wanted
///
/// Unallocated and zero parts cost nothing. The target appears under its name when it is complete; a file or
/// device that exists already is overwritten in place.
#[derive(Debug, clap::Args)]
#[command(mut_arg("image_opts", |arg| arg.visible_alias("source-image-opts")))]
#[command(after_help = "\
Examples:
  vimg convert -p -O qcow2 disk.raw disk.qcow2
  vimg convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2
  vimg convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2
  vimg convert -n -O raw disk.qcow2 /dev/sdX
  vimg convert --progress=json -O raw disk.qcow2 disk.raw
  vimg convert -l before-upgrade -O qcow2 disk.qcow2 before.qcow2
  vimg convert --salvage damaged.qcow2 rescued.raw
  vimg convert -O vmdk -o subformat=streamOptimized disk.qcow2 - | ssh host 'cat > disk.vmdk'

Signals: SIGUSR1 prints the progress; SIGINT, SIGTERM and SIGHUP end the convert, and a new target disappears.")]
pub(crate) struct Args {
    /// Format of the sources (default: found out from their contents)
    #[arg(short, long = "format", value_name = "FMT", visible_alias = "source-format")]
    format: Option<String>,
    /// Cache mode of the sources: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 'T', long, value_name = "CACHE", default_value = "writeback")]
    source_cache: String,
    /// Use this internal snapshot of the source
    #[arg(short = 'l', long, value_name = "SNAPSHOT", visible_alias = "source-snapshot")]
    snapshot: Option<String>,
    /// Format of the target [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", visible_alias = "target-format")]
    output_format: Option<String>,
    /// Options of the target, separated by commas; 'help' lists them
    #[arg(short, long = "options", value_name = "OPTIONS", visible_alias = "target-options")]
    options: Vec<String>,
    /// The target is a complete image specification, not a file name (needs -n)
    #[arg(long)]
    target_image_opts: bool,
    /// Cache mode of the target: none, writeback, unsafe, directsync, writethrough
    #[arg(short = 't', long, value_name = "CACHE", default_value = "unsafe", visible_alias = "target-cache")]
    cache: String,
    /// Compress the target
    #[arg(short, long)]
    compress: bool,
    /// How hard to compress: 1 to 12 for zlib, 1 to 22 for zstd
    #[arg(long, value_name = "LEVEL", allow_hyphen_values = true)]
    compression_level: Option<String>,
    /// Compress with the 4 KiB window of qemu's own writer, for readers that know no other
    #[arg(long)]
    compression_small_window: bool,
    /// Stack the target on this image, and leave out what that holds
    #[arg(short = 'B', long, value_name = "BACKING_FILENAME", visible_short_alias = 'b')]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Do not create the target: it exists
    #[arg(short = 'n', long)]
    no_create: bool,
    /// The existing target reads as zeros (needs -n)
    #[arg(long)]
    target_is_zero: bool,
    /// Leave out zeros of at least this many bytes [default: 4k]; 0: leave out none, take space for everything
    #[arg(short = 'S', long, value_name = "SIZE", allow_hyphen_values = true)]
    sparse_size: Option<String>,
    /// How many threads work, 1 to 16 [default: one for each processor]
    #[arg(short = 'm', long, value_name = "NUMBER", allow_hyphen_values = true)]
    parallel: Option<String>,
    /// The same without qemu's limit
    #[arg(long, value_name = "NUMBER", conflicts_with = "parallel")]
    threads: Option<String>,
    /// Give out space in the target in any order
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// Let the kernel copy where it can (which is done anyway, unless -S is given)
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// At most this many bytes per second
    #[arg(short, long, value_name = "RATE", allow_hyphen_values = true)]
    rate: Option<String>,
    /// Go on where the source cannot be read: put zeros there and report it
    #[arg(long)]
    salvage: bool,
    /// Copy the persistent bitmaps of the source, too
    #[arg(long)]
    bitmaps: bool,
    /// Leave out bitmaps that are not consistent
    #[arg(long)]
    skip_broken_bitmaps: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: SourceArgs,
    /// The sources, one after the other, and last the target
    #[arg(value_name = "SOURCE... TARGET")]
    filenames: Vec<String>,
}

/// The smallest and the largest `-S`, and what it has to be a multiple of.
const SECTOR: u64 = 512;
const MAX_SPARSE: u64 = 16 << 20;
/// The file name that stands for standard input or output, where an image can be read or written like that.
const PIPE: &str = "-";
/// Bytes that are read from standard input at once.
const INPUT_BUFFER: usize = 1 << 20;
/// Lost ranges that are listed one by one.
const MAX_LISTED: usize = 100;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let numbers = Numbers::parse(args)?;
    let snapshot = args.snapshot.as_deref().map(|text| Wanted::parse(text, app)).transpose()?;
    let lists = options::parse(&args.options);
    if options::asks_for_help(&args.options) {
        let text = options::help(args.target_format()?, args.filenames.last().map(String::as_str))?;
        return app.print(&text).map(|()| Exit::OK);
    }
    let lists = lists?;
    args.check_usage()?;
    let Some((target, sources)) = args.filenames.split_last().filter(|(_, sources)| !sources.is_empty())
    else {
        return Err(Failure::usage("Must specify image file name"));
    };
    let cache = cache(&args.cache, "Invalid cache option")?;
    let sources = args.open_sources(sources, snapshot.as_ref(), app)?;
    let level = args.level(&lists)?;
    let target = args.target(target, lists, app)?;
    let reporter = Reporter::new(&args.progress, args.quiet, app)?
        .confining_to(directories(&target))
        .sparing_stdout(matches!(target, Target::Pipe(_)));
    let request = ConvertRequest {
        cache,
        compress: args.compress,
        compression: level,
        sparse: numbers.sparse,
        threads: numbers.threads,
        out_of_order: args.oob_writes,
        salvage: args.salvage,
        rate: numbers.rate,
        bitmaps: args.bitmaps(),
        ..ConvertRequest::new(sources, target)
    };
    let result = convert(&request, &reporter);
    reporter.finish();
    let report = result.map_err(|error| reporter.failure(error))?;
    tell(&report, app);
    Ok(Exit::OK)
}

/// The options that are numbers.
struct Numbers {
    sparse: Option<u64>,
    threads: Option<usize>,
    rate: Option<u64>,
}

impl Numbers {
    fn parse(args: &Args) -> Outcome<Self> {
        let threads = match (&args.parallel, &args.threads) {
            (Some(text), _) => Some(count(text, 16)?),
            (None, Some(text)) => Some(count(text, 1024)?),
            (None, None) => None,
        };
        let sparse = args.sparse_size.as_deref().map(sparse_size).transpose()?;
        let rate = args.rate.as_deref().map(|text| size(text, "rate limit")).transpose()?;
        Ok(Self { sparse, threads, rate: rate.filter(|rate| *rate > 0) })
    }
}

/// A number of threads, in qemu's words.
fn count(text: &str, max: usize) -> Outcome<usize> {
    let number = text.parse::<i64>();
    let number =
        number.map_err(|_| Failure::usage(format!("Invalid number of coroutines specified: '{text}'.")))?;
    usize::try_from(number).ok().filter(|number| (1..=max).contains(number)).ok_or_else(|| {
        Failure::usage(format!("Invalid number of coroutines specified. Must be between 1 and {max}."))
    })
}

/// A number of bytes; `noun` is what qemu calls it.
fn size(text: &str, noun: &str) -> Outcome<u64> {
    const MAX: u64 = i64::MAX.unsigned_abs();
    Ok(block::size::parse_named(noun, text, 0..=MAX)?)
}

fn sparse_size(text: &str) -> Outcome<u64> {
    let noun = "buffer size for sparse output";
    let bytes = size(text, noun)?;
    if bytes.is_multiple_of(SECTOR) && bytes <= MAX_SPARSE {
        return Ok(bytes);
    }
    Err(Failure::usage(format!(
        "Invalid {noun} specified. Valid sizes are multiples of {SECTOR} up to {MAX_SPARSE}. Select 0 to disable \
         sparse detection (fully allocates output)."
    )))
}

fn cache(name: &str, complaint: &str) -> Outcome<CacheMode> {
    CacheMode::parse(name).ok_or_else(|| Failure::usage(format!("{complaint}: {name}")))
}

/// Where files are made or looked for while the convert runs.
fn directories(target: &Target) -> Vec<PathBuf> {
    let Target::Create(request) = target else { return vec![] };
    let data_file =
        request.options.iter().filter(|(name, _)| name == "data_file").map(|(_, value)| value.as_str());
    std::iter::once(request.filename.as_str())
        .chain(data_file)
        .map(|name| directory_of(Path::new(name)))
        .collect()
}

impl Args {
    fn target_format(&self) -> Outcome<Format> {
        target_format(self.output_format.as_deref().unwrap_or("raw"))
    }

    /// Options that do not go together, in qemu's words.
    fn check_usage(&self) -> Outcome<()> {
        let wrong = [
            (
                self.target_image_opts && self.output_format.is_some(),
                "--image-opts and --format are mutually exclusive",
            ),
            (self.skip_broken_bitmaps && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.copy_range_offloading && self.compress, "Cannot enable copy offloading when -c is used"),
            (
                self.copy_range_offloading && self.sparse_size.is_some(),
                "Cannot enable copy offloading when -S is used",
            ),
            (self.copy_range_offloading && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (self.target_image_opts && !self.no_create, "--target-image-opts requires use of -n flag"),
            (self.target_is_zero && !self.no_create, "--target-is-zero requires use of -n flag"),
            (self.no_create && !self.options.is_empty(), "-o has no effect when skipping image creation"),
            (
                self.backing.is_some() && self.backing_format.is_none(),
                "Use of backing file requires explicit backing format",
            ),
            (self.bitmaps && self.filenames.len() > 2, "Copying bitmaps only possible with single source"),
        ];
        wrong.iter().find(|(is_wrong, _)| *is_wrong).map_or(Ok(()), |(_, words)| Err(Failure::usage(*words)))
    }

    fn bitmaps(&self) -> Bitmaps {
        match (self.bitmaps, self.skip_broken_bitmaps) {
            (false, _) => Bitmaps::Leave,
            (true, false) => Bitmaps::Copy,
            (true, true) => Bitmaps::CopySound,
        }
    }

    fn open_sources(
        &self,
        filenames: &[String],
        snapshot: Option<&Wanted>,
        app: &App,
    ) -> Outcome<Vec<Arc<Layer>>> {
        let cache = cache(&self.source_cache, "Invalid source cache option")?;
        // What -B names is named on the command line, even where it is an image that names it first.
        let mut policy = app.policy();
        policy.allow.extend(self.backing.as_ref().map(Into::into));
        if snapshot.is_some_and(|snapshot| !snapshot.by_option) && filenames.len() > 1 {
            return Err(Failure::usage("No support for concatenating multiple snapshot"));
        }
        let open = |(index, filename): (usize, &String)| {
            if self.comes_through_pipe(filename) {
                return from_stdin();
            }
            let source = self.source.source(filename, self.format.as_deref())?;
            let options = OpenOptions {
                format: source.format,
                cache,
                force_share: self.source.force_share,
                share: Share::NoWriters,
                policy: policy.clone(),
                secrets: self.source.objects.secrets()?,
                snapshot: snapshot.filter(|_| index == 0).map(|snapshot| snapshot.selector.clone()),
                ..OpenOptions::default()
            };
            Ok(app.open(&source.spec, &options)?)
        };
        filenames.iter().enumerate().map(open).collect()
    }

    /// Whether a source is what standard input brings, and not a file of that name.
    fn comes_through_pipe(&self, filename: &str) -> bool {
        let format = self.format.as_deref().is_none_or(|format| format == "vmdk");
        filename == PIPE && format && !self.source.image_opts && !Path::new(PIPE).exists()
    }

    /// `--compression-level`, within the limits of the codec.
    fn level(&self, options: &[(String, String)]) -> Outcome<qcow2::codec::Level> {
        let small_window = self.compression_small_window;
        let Some(text) = &self.compression_level else {
            return Ok(qcow2::codec::Level { level: None, small_window });
        };
        let zstd = options
            .iter()
            .rev()
            .find(|(name, _)| name == "compression_type")
            .is_some_and(|(_, kind)| kind == "zstd");
        let max = if zstd { 22 } else { 12 };
        match text.parse::<i32>() {
            Ok(level) if (1..=max).contains(&level) => {
                Ok(qcow2::codec::Level { level: Some(level), small_window })
            }
            _ => Err(Failure::usage(format!(
                "Invalid compression level specified. Must be between 1 and {max}."
            ))),
        }
    }

    fn target(&self, filename: &str, options: Vec<(String, String)>, app: &App) -> Outcome<Target> {
        if self.target_image_opts {
            return self.existing(Spec::from_image_opts(filename)?, None, app);
        }
        let format = self.target_format()?;
        if self.no_create {
            return self.existing(Spec::from_filename(filename)?, Some(format), app);
        }
        let create = CreateRequest {
            backing_file: self.backing.clone(),
            backing_format: self.backing_format.clone(),
            options,
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
            ..CreateRequest::new(filename, format)
        };
        if filename != PIPE {
            return Ok(Target::Create(create));
        }
        if can_be_sent(&create) {
            return into_stdout(create);
        }
        app.warn(
            "'-' is taken for the name of a file: only -O vmdk -o subformat=streamOptimized goes to standard output",
        );
        Ok(Target::Create(create))
    }

    fn existing(&self, spec: Spec, format: Option<Format>, app: &App) -> Outcome<Target> {
        app.warn_about(&spec);
        Ok(Target::Existing(Box::new(ExistingTarget {
            spec,
            format,
            is_zero: self.target_is_zero,
            keep_backing: self.backing.is_some(),
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
        })))
    }
}

/// The image is written to standard output.
fn into_stdout(create: CreateRequest) -> Outcome<Target> {
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        return Err(Failure::usage("standard output is a terminal: an image is not written to it"));
    }
    let output = stdout.as_fd().try_clone_to_owned().map_err(block::Error::from)?;
    Ok(Target::Pipe(Box::new(PipeTarget::new(create, Box::new(File::from(output))))))
}

/// The image that comes through standard input.
fn from_stdin() -> Outcome<Arc<Layer>> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().map_err(block::Error::from)?;
    Ok(open_pipe(Box::new(BufReader::with_capacity(INPUT_BUFFER, File::from(input))))?)
}

/// With `-v`, what was done; in any case, what was lost.
fn tell(report: &ConvertReport, app: &App) {
    let human = block::size::human;
    let tally = &report.tally;
    app.tell(&format!(
        "{} converted: {} copied, {} shared, {} of zeros left out",
        human(report.size),
        human(tally.copied),
        human(tally.shared),
        human(report.size.saturating_sub(tally.copied).saturating_sub(tally.shared))
    ));
    if !tally.losses.is_empty() {
        tell_losses(&tally.losses, app);
    }
}

fn tell_losses(losses: &Losses, app: &App) {
    for lost in losses.ranges.iter().take(MAX_LISTED) {
        app.warn(&lost.to_string());
    }
    let more = losses.ranges.len().saturating_sub(MAX_LISTED);
    if more > 0 {
        let least = if losses.truncated { "at least " } else { "" };
        app.warn(&format!("{least}{more} more ranges could not be read"));
    }
    app.warn(&format!(
        "{} bytes of the source could not be read; the target holds zeros there",
        losses.bytes
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_sizes_have_limits() {
        assert_eq!(sparse_size("4k").ok(), Some(4096));
        assert_eq!(sparse_size("0").ok(), Some(0));
        assert_eq!(sparse_size("16M").ok(), Some(16 << 20));
        for wrong in ["100", "17M", "foo", "-1", ""] {
            assert!(sparse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_of_threads_have_limits() {
        assert_eq!(count("16", 16).ok(), Some(16));
        for wrong in ["0", "17", "x", "-1", "99999999999999999999"] {
            assert!(count(wrong, 16).is_err(), "{wrong}");
        }
    }
}
