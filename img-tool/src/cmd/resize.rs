//! `resize`: a larger or smaller disk.

use block::{Error, Preallocation};
use image::OpenOptions;

use crate::app::App;
use crate::cli::{ObjectArgs, source};
use crate::exit::{Exit, Failure, Outcome};

/// Change the size of an image
///
/// Growing adds zeros at the end; the guest's partitions and file systems are not changed. Shrinking throws away
/// what lies behind the new end, and has to be asked for with --shrink.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg resize disk.qcow2 +10G
  vimg resize -f raw disk.img 20G
  vimg resize --shrink disk.qcow2 -5G")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// FILENAME is a complete image specification (key=value,...), not a file name
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// How much of what is added gets space at once: off, metadata, falloc, full
    #[arg(long, value_name = "PREALLOC")]
    pub(crate) preallocation: Option<String>,
    /// Allow the new size to be smaller
    #[arg(long)]
    pub(crate) shrink: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) objects: ObjectArgs,
    /// The image
    pub(crate) filename: String,
    /// The new size, or with a sign the difference to the old one
    #[arg(allow_hyphen_values = true)]
    pub(crate) size: String,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let preallocation = preallocation(args.preallocation.as_deref())?;
    let change = Change::parse(&args.size)?;
    let source = source(&args.filename, args.format.as_deref(), args.image_opts)?;
    let options = OpenOptions {
        writable: true,
        resizable: true,
        format: source.format,
        policy: app.policy(),
        secrets: args.objects.secrets()?,
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    app.confine(&[]);
    // qemu counts in whole sectors; where a raw file ends inside one, so do we.
    let present = layer.image.size().next_multiple_of(512);
    let size = change.apply(present).ok_or_else(|| Failure::usage("New image size must be positive"))?;
    if size <= present && preallocation != Preallocation::Off {
        return Err(Failure::usage("Preallocation can only be used for growing images"));
    }
    if size < present && !args.shrink {
        return Err(refuse_to_shrink(app));
    }
    layer.image.resize(size, preallocation)?;
    layer.image.close()?;
    if !args.quiet {
        app.note("Image resized.\n");
    }
    Ok(Exit::OK)
}

fn refuse_to_shrink(app: &App) -> Failure {
    app.complain("Use the --shrink option to perform a shrink operation.");
    app.warn(
        "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
         operation, make sure there is no important data there.",
    );
    Failure::Silent(Exit::ERROR)
}

fn preallocation(name: Option<&str>) -> Outcome<Preallocation> {
    match name {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => Err(Failure::usage(format!("Invalid preallocation mode '{other}'"))),
    }
}

/// What is to become of the size, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    To(u64),
    By(u64),
    Less(u64),
}

impl Change {
    fn parse(text: &str) -> Result<Self, Error> {
        let size = |text| image::options::parse_size("size", text);
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => size(more).map(Self::By),
            (_, Some(less)) => size(less).map(Self::Less),
            _ => size(text).map(Self::To),
        }
    }

    /// The new size; `None` if there is no such size.
    fn apply(self, present: u64) -> Option<u64> {
        let size = match self {
            Self::To(size) => Some(size),
            Self::By(more) => present.checked_add(more),
            Self::Less(less) => present.checked_sub(less),
        };
        size.filter(|size| (1..=block::size::MAX).contains(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_be_differences() {
        let apply = |text: &str| Change::parse(text).unwrap().apply(4 << 20);
        assert_eq!(apply("1M"), Some(1 << 20));
        assert_eq!(apply("+1M"), Some(5 << 20));
        assert_eq!(apply("-1M"), Some(3 << 20));
    }

    #[test]
    fn a_disk_never_becomes_empty_or_impossible() {
        for text in ["-4M", "-5M", "9E", "+9223372036854775807", "0"] {
            assert_eq!(Change::parse(text).unwrap().apply(4 << 20), None, "{text}");
        }
        for text in ["", "+", "-", "x", "1e6"] {
            Change::parse(text).unwrap_err();
        }
    }
}
