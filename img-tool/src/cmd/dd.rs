//! `dd`: blocks of one disk into a new image, named as dd(1) names them.

use std::path::Path;
use std::sync::Arc;

use block::ErrorKind;
use block::file::CacheMode;
use image::convert::{ConvertRequest, Target, Words, convert};
use image::{CreateRequest, Format, Layer, OpenOptions};

use crate::app::{App, directory_of};
use crate::cli::{SourceArgs, target_format};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// Copy input to output with optional format conversion
///
/// The whole disk, or blocks of it: `skip` blocks are left out, and the copy ends after block number `count`
/// of the input, which is not the same as after so many blocks if there is a `skip` (as in qemu-img). The
/// target is made with holes where there are zeros, and appears under its name when it is complete.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Operands:
  if=INPUT        the image that is read (or its specification, with --image-opts)
  of=OUTPUT       the image that is made; an existing file is overwritten
  bs=BLOCK_SIZE   bytes in a block, with an optional suffix k, M, G [default: 512]
  count=BLOCKS    the copy ends at this block of the input [default: its end]
  skip=BLOCKS     the copy starts at this block of the input [default: 0]

Examples:
  vimg dd if=disk.qcow2 of=disk.raw
  vimg dd -O qcow2 bs=1M skip=1 if=disk.raw of=partition.qcow2
  vimg dd bs=512 count=1 if=disk.qcow2 of=boot-sector.raw")]
pub(crate) struct Args {
    /// Format of the input (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Format of the output
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: String,
    #[command(flatten)]
    source: SourceArgs,
    /// if=, of=, bs=, count=, skip=
    #[arg(value_name = "OPERAND=VALUE")]
    operands: Vec<String>,
}

/// The operands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block_size: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
}

/// The largest block.
const MAX_BLOCK: u64 = i32::MAX.unsigned_abs() as u64;
/// The largest offset in bytes.
const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();
/// Disks end at a multiple of this.
const SECTOR: u64 = 512;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let operands = Operands::parse(&args.operands)?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(Failure::usage("Must specify both input and output files"));
    };
    let source = args.open(input, app)?;
    let format = output_format(&args.output_format)?;
    let window = operands.window(source.image.size());
    if window.is_none() {
        app.complain(&format!("{input}: cannot skip to specified offset"));
    }
    let create = CreateRequest {
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        ..CreateRequest::new(output, format)
    };
    let reporter = Reporter::new(&ProgressArgs::default(), true, app)?
        .confining_to(vec![directory_of(Path::new(output))]);
    let request = ConvertRequest {
        window: Some(window.unwrap_or_default()),
        words: Words::Dd,
        cache: CacheMode::Writeback,
        ..ConvertRequest::new(vec![source], Target::Create(create))
    };
    convert(&request, &reporter).map_err(|error| reporter.failure(error))?;
    Ok(Exit::OK)
}

/// The format that is written, in dd's words.
fn output_format(name: &str) -> Outcome<Format> {
    target_format(name).map_err(|failure| match failure {
        Failure::Error { exit, error } => {
            let plain = block::Error::new(ErrorKind::Usage, "Unknown file format");
            let error = error.hints().iter().fold(plain, |error, hint| error.hint(hint.clone()));
            Failure::Error { exit, error }
        }
        other => other,
    })
}

impl Operands {
    fn parse(words: &[String]) -> Outcome<Self> {
        let mut operands = Self::default();
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                _ if !word.contains('=') => return Err(unrecognized(word)),
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                "bs" => {
                    operands.block_size = Some(block::size::parse_named("bs", value, 1..=MAX_BLOCK)?);
                }
                "count" => operands.count = Some(number("count", value)?),
                "skip" => operands.skip = Some(number("skip", value)?),
                _ => return Err(unrecognized(name)),
            }
        }
        Ok(operands)
    }

    /// Where the copy begins and how long it is, in bytes of a disk of `size` bytes. `None`: it would begin
    /// past the end.
    fn window(&self, size: u64) -> Option<(u64, u64)> {
        let block = self.block_size.unwrap_or(SECTOR);
        let size = size.next_multiple_of(SECTOR);
        let blocks = |count: Option<u64>| count.map(|count| count.saturating_mul(block));
        let end = blocks(self.count).unwrap_or(u64::MAX).min(size);
        let start = blocks(self.skip).unwrap_or(0);
        end.checked_sub(start).map(|len| (start, len))
    }
}

fn unrecognized(word: &str) -> Failure {
    Failure::usage(format!("unrecognized operand {word}"))
}

/// A number of blocks: no suffixes, unlike sizes.
fn number(name: &str, text: &str) -> Outcome<u64> {
    let last_is_letter = text.ends_with(|last: char| last.is_ascii_alphabetic()) && !text.contains("0x");
    let value = block::size::parse_named(name, text, 0..=MAX_OFFSET)?;
    if last_is_letter || text.contains('.') {
        return Err(Failure::usage(format!("Invalid {name} specified: '{text}'.")));
    }
    Ok(value)
}

impl Args {
    fn open(&self, input: &str, app: &App) -> Outcome<Arc<Layer>> {
        let source = self.source.source(input, self.format.as_deref())?;
        let options = OpenOptions {
            format: source.format,
            force_share: self.source.force_share,
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
            ..OpenOptions::default()
        };
        Ok(app.open(&source.spec, &options)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Outcome<Operands> {
        Operands::parse(&words.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn operands_are_those_of_dd() {
        let operands = parsed("if=a of=b=c bs=4k count=0x10 skip=+3").unwrap();
        assert_eq!((operands.input.as_deref(), operands.output.as_deref()), (Some("a"), Some("b=c")));
        assert_eq!((operands.block_size, operands.count, operands.skip), (Some(4096), Some(16), Some(3)));
        for wrong in ["foo", "foo=1", "bs=0", "bs=2G", "count=1k", "count=0.5", "skip=-1", "bs="] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn windows_end_where_the_count_of_the_input_ends() {
        let window = |words: &str, size| parsed(words).unwrap().window(size);
        assert_eq!(window("bs=1k", 10_000), Some((0, 10_240)));
        assert_eq!(window("bs=1k skip=2 count=5", 10_240), Some((2048, 3072)));
        assert_eq!(window("bs=1k skip=5 count=5", 10_240), Some((5120, 0)));
        assert_eq!(window("bs=1k skip=6 count=5", 10_240), None);
        assert_eq!(window("bs=1k skip=9223372036854775807", 10_240), None);
        assert_eq!(window("bs=1k count=9223372036854775807", 10_240), Some((0, 10_240)));
    }
}
