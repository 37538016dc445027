//! `inspect`: what is inside a guest.

use image::json;
use v2v::inspect::{document, inspect_with, to_text};

use crate::app::App;
use crate::cli::{OutputFormat, SourceArgs};
use crate::exit::{Exit, Outcome};
use crate::keys::KeyArgs;

/// Say what is inside a guest: systems, kernels and their drivers, boot loaders, what stands in the way of KVM
///
/// Reads partition tables, LVM, file systems, boot loader configurations and initramfs images without mounting
/// anything; the images are not changed. The JSON document is described in docs/inspect.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  the disks were looked at, whatever was found
  1  an image could not be opened or read

Examples:
  vimg inspect disk.vmdk
  vimg inspect --output=json system.qcow2 data.qcow2
  vimg inspect guest.vmx
  vimg inspect --key all:file:passphrase.txt disk.qcow2
  vimg inspect 'guest.ova:disk1.vmdk'")]
pub(crate) struct Args {
    /// Format of the images: one for all, or one for each in their order, -f repeated (default: found out from their contents)
    #[arg(short, long, value_name = "FMT")]
    format: Vec<String>,
    /// human or json
    #[arg(long, value_name = "FORMAT")]
    output: Option<String>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    keys: KeyArgs,
    /// The disks of one guest, in its order; or its description (VMX, OVF, OVA, libvirt XML, xl.cfg, .vbox)
    #[arg(required = true, value_name = "FILENAME")]
    filenames: Vec<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let output = OutputFormat::parse(args.output.as_deref(), "inspect", app)?;
    let mut opened = super::guest::open(&args.filenames, &args.format, &args.source, app)
        .map_err(|failure| args.keys.unopened_failure(failure))?;
    opened.keys = args.keys.read(&args.source.objects.secrets()?, app)?;
    app.confine(&[]);
    let disks = opened.look()?;
    let found = inspect_with(&disks, &opened.names)?;
    let text = match output {
        OutputFormat::Json => json::pretty(&document(&disks, &found)) + "\n",
        OutputFormat::Human => to_text(&disks, &found),
    };
    app.print(&text)?;
    Ok(Exit::OK)
}
