//! `copy`: the bytes of a disk from anywhere to anywhere, as nbdcopy copies them.

use std::path::Path;
use std::sync::Arc;

use block::file::CacheMode;
use image::convert::{ConvertRequest, ExistingTarget, Target, convert};
use image::{CreateRequest, Format, Layer, OpenOptions, Share, Spec};

use crate::app::{App, directory_of};
use crate::cli::{SourceArgs, target_format};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::{ProgressArgs, Reporter};

/// Copy between files, images and network block devices
///
/// Source and destination are each a file, a device, or the name of an export (nbd://, nbds://, nbd+unix://). The
/// disk is copied: of an image in a file its contents, of an export its bytes as they are, unless -f says otherwise.
/// What the source knows to be zeros is not read, and becomes holes where the destination can have them. A file is
/// made anew and appears when it is complete; an export or a device is there already, and must be large enough.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg copy nbd://host/disk disk.raw
  vimg copy -O qcow2 nbd://host/disk disk.qcow2
  vimg copy disk.vmdk 'nbd+unix:///?socket=/run/nbd.sock'
  vimg copy --destination-is-zero --flush nbd://old/disk nbd://new/disk

It ends with 0 when all has been copied, and with 1 otherwise.")]
pub(crate) struct Args {
    /// Format of the source (default: of a file found out from its contents, of an export raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Format of the destination
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// At most this many connections to each server [default: up to 4, where the server allows several]
    #[arg(short = 'C', long, value_name = "NUMBER")]
    connections: Option<usize>,
    /// How many requests are under way at once [default: 8 where a server is involved]
    #[arg(short = 'R', long, value_name = "NUMBER")]
    requests: Option<usize>,
    /// Bytes that are read and written at once [default: 512k]
    #[arg(long, value_name = "SIZE")]
    request_size: Option<String>,
    /// One request at a time, over one connection
    #[arg(long, conflicts_with_all = ["connections", "requests"])]
    synchronous: bool,
    /// The destination reads as zeros already
    #[arg(short = 'z', long, visible_alias = "target-is-zero")]
    destination_is_zero: bool,
    /// Take space in the destination for everything, zeros too
    #[arg(long)]
    allocated: bool,
    /// Leave out zeros of at least this many bytes [default: 4k]
    #[arg(short = 'S', long, value_name = "SIZE", conflicts_with = "allocated")]
    sparse_size: Option<String>,
    /// Do not end before the destination is safely on its disk
    #[arg(long)]
    flush: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// What is copied
    #[arg(value_name = "SOURCE")]
    from: String,
    /// Where to
    #[arg(value_name = "DESTINATION")]
    to: String,
}

/// The most requests and connections.
const MOST: usize = 1024;
/// The smallest and the largest request in bytes.
const REQUEST: std::ops::RangeInclusive<u64> = 4096..=32 << 20;

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let (chunk, sparse) = (args.chunk()?, args.sparse()?);
    let (requests, connections) = args.parallelism()?;
    let source = args.open(connections, app)?;
    let target = args.target(connections, app)?;
    let directories = match &target {
        Target::Create(request) => vec![directory_of(Path::new(&request.filename))],
        _ => vec![],
    };
    let reporter = Reporter::new(&args.progress, false, app)?.confining_to(directories);
    let request = ConvertRequest {
        cache: if args.flush { CacheMode::Writeback } else { CacheMode::Unsafe },
        sparse,
        chunk,
        threads: requests,
        ..ConvertRequest::new(vec![source], target)
    };
    let result = convert(&request, &reporter);
    reporter.finish();
    let report = result.map_err(|error| reporter.failure(error))?;
    let human = block::size::human;
    app.tell(&format!("{} copied, {} of them read", human(report.size), human(report.tally.copied)));
    Ok(Exit::OK)
}

impl Args {
    /// How many requests and connections.
    fn parallelism(&self) -> Outcome<(Option<usize>, Option<usize>)> {
        if self.synchronous {
            return Ok((Some(1), Some(1)));
        }
        for (name, number) in [("requests", self.requests), ("connections", self.connections)] {
            if number.is_some_and(|number| !(1..=MOST).contains(&number)) {
                let message = format!("Invalid number of {name} specified. Must be between 1 and {MOST}.");
                return Err(Failure::usage(message));
            }
        }
        Ok((self.requests, self.connections))
    }

    fn chunk(&self) -> Outcome<Option<u64>> {
        let Some(text) = &self.request_size else { return Ok(None) };
        let size = block::size::parse_named("request size", text, REQUEST)?;
        if size.is_power_of_two() {
            return Ok(Some(size));
        }
        Err(Failure::usage("Invalid request size specified. It is a power of two."))
    }

    fn sparse(&self) -> Outcome<Option<u64>> {
        if self.allocated {
            return Ok(Some(0));
        }
        let Some(text) = &self.sparse_size else { return Ok(None) };
        let size = block::size::parse_named("sparse size", text, 0..=16 << 20)?;
        if size.is_multiple_of(512) {
            return Ok(Some(size));
        }
        Err(Failure::usage("Invalid sparse size specified. It is a multiple of 512."))
    }

    fn open(&self, connections: Option<usize>, app: &App) -> Outcome<Arc<Layer>> {
        let name = if self.source.image_opts { self.from.clone() } else { limited(&self.from, connections) };
        let source = self.source.source(&name, self.format.as_deref())?;
        let raw = !self.source.image_opts && source.spec.is_export();
        let options = OpenOptions {
            format: source.format.or(raw.then_some(Format::Raw)),
            force_share: self.source.force_share,
            share: Share::NoWriters,
            policy: app.policy(),
            secrets: self.source.objects.secrets()?,
            ..OpenOptions::default()
        };
        Ok(app.open(&source.spec, &options)?)
    }

    fn target(&self, connections: Option<usize>, app: &App) -> Outcome<Target> {
        let format = target_format(&self.output_format)?;
        let secrets = self.source.objects.secrets()?;
        let name = limited(&self.to, connections);
        let spec = Spec::from_filename(&name)?;
        if !spec.is_export() && !self.destination_is_zero {
            let create = CreateRequest { policy: app.policy(), secrets, ..CreateRequest::new(name, format) };
            return Ok(Target::Create(create));
        }
        Ok(Target::Existing(Box::new(ExistingTarget {
            spec,
            format: Some(format),
            is_zero: self.destination_is_zero,
            keep_backing: false,
            policy: app.policy(),
            secrets,
        })))
    }
}

/// The name of an export with a limit on connections; any other name as it is.
fn limited(name: &str, connections: Option<usize>) -> String {
    let uri = name.starts_with("nbd") && name.contains("://") && !name.contains("connections=");
    match connections {
        Some(number) if uri => {
            let sign = if name.contains('?') { '&' } else { '?' };
            format!("{name}{sign}connections={number}")
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uris_are_limited() {
        assert_eq!(limited("nbd://h/x", Some(2)), "nbd://h/x?connections=2");
        assert_eq!(limited("nbd+unix:///?socket=/s", Some(2)), "nbd+unix:///?socket=/s&connections=2");
        for name in ["nbd:h:1", "disk.raw", "nbd://h?connections=7"] {
            assert_eq!(limited(name, Some(2)), name);
        }
        assert_eq!(limited("nbd://h", None), "nbd://h");
    }
}
