//! `p2v`: the disks of a physical machine into images, here or elsewhere, and a description of the machine with them.

mod desk;
mod freeze;
mod guard;
mod hold;
mod list;
mod receive;
mod run;
mod snapshots;
mod source;
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
  vimg p2v -p --snapshot -o /mnt/usb/web1              # from the running system, as LVM's snapshots show it
  vimg p2v -p --freeze -o /mnt/usb/web1                # from the running system, which stands still meanwhile

To another machine, over the network:
  vimg p2v --receive /srv/machines --listen :10809 --tls-dir /etc/pki/nbd     # there: the receiver
  vimg p2v -p --to nbds://kvm.example.org/web1         # here: all disks, into /srv/machines/web1
  vimg v2v /srv/machines/web1 -o /var/lib/libvirt/images    # afterwards, on the KVM host

--to takes exports of any other NBD server as well: 'nbd://store/{disk}' is an export of each disk's name.")]
pub(crate) struct Args {
    /// Put images and machine.json into this folder
    #[arg(short, long, value_name = "DIR", conflicts_with = "to")]
    output: Option<PathBuf>,
    /// Copy to a 'vimg p2v --receive', or to exports of an NBD server; {disk} stands for each disk's name
    #[arg(long, value_name = "URI")]
    to: Option<String>,
    /// Be the other end of --to: machines come into this folder, or folders in it by the name in the URI
    #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "to", "list", "disks"])]
    receive: Option<PathBuf>,
    /// With --receive: listen on this address, as 'vimg serve' does (repeatable) [default: localhost:10809]
    #[arg(long, value_name = "ADDR:PORT", requires = "receive")]
    listen: Vec<String>,
    /// With --receive: listen on this Unix socket
    #[arg(short = 'k', long, value_name = "PATH", requires = "receive", conflicts_with = "listen")]
    socket: Option<PathBuf>,
    /// With --receive: folder with ca-cert.pem, server-cert.pem and server-key.pem; senders need a certificate of the same
    /// authority
    #[arg(long, value_name = "DIR", requires = "receive", conflicts_with = "tls_psk")]
    tls_dir: Option<PathBuf>,
    /// With --receive: file with the keys of senders, NAME:HEXADECIMAL a line
    #[arg(long, value_name = "FILE", requires = "receive")]
    tls_psk: Option<PathBuf>,
    /// With --receive: end when a machine is complete
    #[arg(long, requires = "receive")]
    once: bool,
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
    /// Let everybody who writes to mounted file systems wait until the copy is done; with --snapshot, only those who write to
    /// what can have no snapshot, until that is copied
    #[arg(long, conflicts_with = "live")]
    freeze: bool,
    /// Copy mounted logical volumes as snapshots of LVM show them, all of one moment; they are removed in the end
    #[arg(long, conflicts_with = "live")]
    snapshot: bool,
    /// Room for what is written to each volume meanwhile: a size, or percent of the volume [default: a fifth, at least 1 GiB,
    /// as far as that is free]
    #[arg(long, value_name = "SIZE|N%", requires = "snapshot")]
    snapshot_size: Option<String>,
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
    /// LVM's program
    #[arg(long, value_name = "PROGRAM", hide = true)]
    lvm: Option<PathBuf>,
    /// Used by vimg itself: clean up when standard input ends
    #[arg(long, hide = true, exclusive = true)]
    guard: bool,
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
    if args.guard {
        return guard::guard();
    }
    if !matches!(args.format.as_str(), "qcow2" | "raw") {
        return Err(Failure::usage(format!("--format expects 'qcow2' or 'raw' not '{}'", args.format)));
    }
    if let Some(root) = &args.receive {
        return receive::run(args, root, app);
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
    run::copy_all(args, &found, app)
}
