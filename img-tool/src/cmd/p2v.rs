//! `p2v`: the disks of a physical machine into images, here or elsewhere, and a description of the machine with them.

mod freeze;
mod list;
mod run;
mod target;

use std::path::PathBuf;

use crate::app::App;
use crate::cli::{ObjectArgs, OutputFormat};
use crate::exit::{Exit, Failure, Outcome};
use crate::progress::ProgressArgs;

/// Copy the disks of this machine into images, with a description of the machine
///
/// To be run on the machine itself, best in a rescue system, where nothing writes to its disks. What holds nothing is left
/// out: free space of file systems that are not mounted, swap, space that no partition or logical volume has. An interrupted
/// copy goes on when it is started again with the same words. What comes out is a source for 'vimg v2v'.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg p2v --list                                      # what this machine is; needs no rights
  vimg p2v -p -o /mnt/usb/web1                         # all disks, as qcow2 images
  vimg p2v -p sda --to nbds://store.example.org/web1   # one disk, to a 'vimg serve' elsewhere
  vimg p2v -p --to 'nbd://store/{disk}'                # each disk to an export of its name
  vimg p2v -p --freeze -o /mnt/usb/web1                # from the running system, which stands still meanwhile
  vimg v2v /mnt/usb/web1 -o /var/lib/libvirt/images    # afterwards, on the KVM host

The receiving end of --to has images of the size of the disks, for example:
  vimg create -f qcow2 sda.qcow2 SIZE && truncate -s 64K machine.json
  vimg serve --listen :10809 --tls-dir /etc/pki/nbd sda=sda.qcow2 machine.json=machine.json
The description goes to the export machine.json, if there is one.")]
pub(crate) struct Args {
    /// Put images and machine.json into this folder
    #[arg(short, long, value_name = "DIR", conflicts_with = "to")]
    output: Option<PathBuf>,
    /// Copy to exports of an NBD server; {disk} stands for each disk's name
    #[arg(long, value_name = "URI")]
    to: Option<String>,
    /// Format of the images in DIR: qcow2 or raw
    #[arg(short = 'O', long, value_name = "FMT", default_value = "qcow2")]
    format: String,
    /// Only show what this machine is
    #[arg(long, conflicts_with_all = ["output", "to"])]
    list: bool,
    /// With --list: human or json
    #[arg(long = "output-format", value_name = "OFMT", requires = "list")]
    shown: Option<String>,
    /// Copy although file systems can be written to meanwhile: the copy is like a machine that lost power
    #[arg(long)]
    live: bool,
    /// Let everybody who writes to mounted file systems wait until the copy is done
    #[arg(long)]
    freeze: bool,
    /// Copy free space and swap, too
    #[arg(long)]
    whole: bool,
    /// Read the copy once more and compare it
    #[arg(long)]
    verify: bool,
    /// Forget what an earlier run has copied
    #[arg(long)]
    restart: bool,
    /// Where to remember how far the copy is [default: in DIR; with --to, vimg-p2v-state.json here]
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// At most this many bytes per second
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    /// How many threads read and write
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Look at the machine through this folder instead of /
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
    /// Used by vimg itself: thaw the file systems that are mounted there when standard input ends
    #[arg(long, hide = true, exclusive = true, num_args = 1.., value_name = "PATH")]
    thaw_at_end_of_input: Vec<PathBuf>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    objects: ObjectArgs,
    /// The disks: sda, /dev/nvme0n1, disk/by-id/...  [default: all]
    #[arg(value_name = "DISK")]
    disks: Vec<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    if !args.thaw_at_end_of_input.is_empty() {
        return freeze::guard(&args.thaw_at_end_of_input);
    }
    let found = v2v::p2v::describe(&args.root);
    if args.list {
        let form = OutputFormat::parse(args.shown.as_deref(), "p2v", app)?;
        list::show(&found, form, app)?;
        return Ok(Exit::OK);
    }
    if args.output.is_none() && args.to.is_none() {
        let error = block::Error::usage("where to? -o DIR or --to URI is needed");
        return Err(error.hint("'vimg p2v --list' shows what would be copied.").into());
    }
    if !matches!(args.format.as_str(), "qcow2" | "raw") {
        return Err(Failure::usage(format!("--format expects 'qcow2' or 'raw' not '{}'", args.format)));
    }
    run::copy_all(args, &found, app)
}
