//! `bench`: how fast an image takes requests.

use std::time::Instant;

use block::Error;
use block::file::CacheMode;
use image::OpenOptions;
use image::bench::{BenchOptions, bench};

use crate::app::App;
use crate::cli::source;
use crate::exit::{Exit, Failure, Outcome};

/// Run simple image benchmark
///
/// Sends requests to the image and prints how long they took, DEPTH of them at a time, each in a thread of its
/// own. All values of --aio mean those threads, with the page cache or (-t none) without.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg bench disk.qcow2
  vimg bench -t none -d 16 -c 10000 disk.qcow2
  vimg bench -w --pattern 65 --flush-interval 64 -f qcow2 scratch.qcow2")]
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
    /// Number of requests
    #[arg(short, long, value_name = "COUNT", default_value = "75000", allow_hyphen_values = true)]
    count: String,
    /// Number of requests under way at once
    #[arg(short, long, value_name = "DEPTH", default_value = "64", allow_hyphen_values = true)]
    depth: String,
    /// Where the first request starts
    #[arg(short, long, value_name = "OFFSET", default_value = "0", allow_hyphen_values = true)]
    offset: String,
    /// Bytes of a request
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4096", allow_hyphen_values = true)]
    buffer_size: String,
    /// From the start of a request to that of the next [default: the size of a request]
    #[arg(short = 'S', long, value_name = "SIZE", allow_hyphen_values = true)]
    step_size: Option<String>,
    /// threads, native (only with -t none or directsync) or io_uring
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// The same as --aio=native
    #[arg(short, long)]
    native: bool,
    /// Write instead of reading: this destroys what the image holds
    #[arg(short, long)]
    write: bool,
    /// The byte that is written
    #[arg(long, value_name = "BYTE", default_value = "0", allow_hyphen_values = true)]
    pattern: String,
    /// Flush after so many requests
    #[arg(long, value_name = "INTERVAL", default_value = "0", allow_hyphen_values = true)]
    flush_interval: String,
    /// Do not wait for requests that are under way before a flush
    #[arg(long)]
    no_drain: bool,
    /// Open the image although another process is writing to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Accepted; the result is printed all the same, as by qemu-img
    #[arg(short, long)]
    quiet: bool,
    /// The image
    filename: String,
}

/// The largest number of most options.
const MAX: u64 = i32::MAX.unsigned_abs() as u64;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let options = args.options()?;
    if args.image_opts && args.format.is_some() {
        return Err(Failure::usage("--image-opts and --format are mutually exclusive"));
    }
    check(&options)?;
    let cache = CacheMode::parse(&args.cache).ok_or_else(|| Failure::usage("Invalid cache mode"))?;
    let source = source(&args.filename, args.format.as_deref(), args.image_opts)?;
    let could_not_open = || format!("Could not open '{}'", args.filename);
    if args.wants_native()? && !cache.direct() {
        let words = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
        return Err(Error::usage(words).context(could_not_open()).into());
    }
    if args.force_share && args.write {
        let words = "force-share=on can only be used with read-only images";
        return Err(Error::usage(words).context(could_not_open()).into());
    }
    let open = OpenOptions {
        format: source.format,
        writable: args.write,
        cache,
        force_share: args.force_share,
        policy: app.policy(),
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &open)?;
    app.confine(&[]);
    app.print(&announcement(&options))?;
    let device = layer.device();
    let started = Instant::now();
    bench(&device, &options)?;
    let elapsed = started.elapsed();
    app.print(&format!("Run completed in {:.3} seconds.\n", elapsed.as_secs_f64()))?;
    device.close()?;
    Ok(Exit::OK)
}

/// Options that do not go together, in qemu's words.
fn check(options: &BenchOptions) -> Outcome<()> {
    let BenchOptions { flush_interval, depth, .. } = *options;
    if options.write.is_none() && flush_interval > 0 {
        return Err(Failure::usage("--flush-interval is only available in write tests"));
    }
    if flush_interval > 0 && flush_interval < depth {
        return Err(Failure::usage("Flush interval can't be smaller than depth"));
    }
    Ok(())
}

/// What is going to be done, in qemu's words.
fn announcement(options: &BenchOptions) -> String {
    let BenchOptions { count, size, depth, offset, step, flush_interval, .. } = *options;
    let kind = if options.write.is_some() { "write" } else { "read" };
    let requests = format!(
        "Sending {count} {kind} requests, {size} bytes each, {depth} in parallel (starting at offset {offset}, step size \
         {step})\n"
    );
    match flush_interval {
        0 => requests,
        interval => format!("{requests}Sending flush every {interval} requests\n"),
    }
}

/// A number without a suffix.
fn number(noun: &str, text: &str, least: u64, most: u64) -> Outcome<u64> {
    let hexadecimal = text.contains(['x', 'X']);
    let value = block::size::parse_named(noun, text, least..=most)?;
    let plain = hexadecimal || !text.contains(|c: char| c.is_ascii_alphabetic() || c == '.');
    if plain { Ok(value) } else { Err(Failure::usage(format!("Invalid {noun} specified: '{text}'."))) }
}

/// A number of bytes.
fn bytes(noun: &str, text: &str, least: u64, most: u64) -> Outcome<u64> {
    Ok(block::size::parse_named(noun, text, least..=most)?)
}

impl Args {
    fn options(&self) -> Outcome<BenchOptions> {
        let count = number("request count", &self.count, 1, MAX)?;
        let depth = number("queue depth", &self.depth, 1, MAX)?;
        self.wants_native()?;
        let offset = bytes("offset", &self.offset, 0, i64::MAX.unsigned_abs())?;
        let size = bytes("buffer size", &self.buffer_size, 1, MAX)?;
        let step = self.step_size.as_deref().map(|text| bytes("step size", text, 0, MAX)).transpose()?;
        let pattern = number("pattern byte", &self.pattern, 0, 255)?;
        let flush_interval = number("flush interval", &self.flush_interval, 0, MAX)?;
        Ok(BenchOptions {
            count,
            depth,
            offset,
            size,
            step: step.filter(|step| *step > 0).unwrap_or(size),
            write: self.write.then(|| u8::try_from(pattern).unwrap_or_default()),
            flush_interval,
            drain: !self.no_drain,
        })
    }

    fn wants_native(&self) -> Outcome<bool> {
        match self.aio.as_deref() {
            None => Ok(self.native),
            Some("threads" | "io_uring") => Ok(self.native),
            Some("native") => Ok(true),
            Some(other) => Err(Failure::usage(format!("Invalid aio option: {other}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_no_suffixes() {
        assert_eq!(number("x", "0x10", 1, MAX).ok(), Some(16));
        for wrong in ["1k", "0.5", "x", "", "-1", "0"] {
            assert!(number("x", wrong, 1, MAX).is_err(), "{wrong}");
        }
    }
}
