//! `nbd attach`: an image becomes a disk of this machine.

use std::path::PathBuf;
use std::time::Duration;

use nbd_server::kernel::{Attached, Device};

use super::background::{self, Role};
use super::detach::detach;
use super::{device, mount, remote, serve};
use crate::app::App;
use crate::cli::SourceArgs;
use crate::exit::{Exit, Failure, Outcome};

/// Show an image as a disk, and print its device
///
/// The image stays open and locked, served by a process in the background, until 'vimg nbd detach'. Its partitions
/// have devices of their own: /dev/nbd0p1.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg nbd attach disk.qcow2                        # prints /dev/nbd0, the first that is free
  mount /dev/nbd0p1 /mnt && umount /mnt
  vimg nbd detach /dev/nbd0
  vimg nbd attach --partition 1 disk.vmdk           # the partition is the disk: mount /dev/nbd0 /mnt
  vimg nbd attach --partition 1 --mount /mnt disk.vmdk && vimg nbd detach /mnt
  vimg nbd attach --read-only --snapshot before-upgrade disk.qcow2
  vimg nbd attach --overlay disk.qcow2 /dev/nbd5    # what is written vanishes
  vimg nbd attach --connections 4 --timeout 30 --reconnect 300 nbd://server/export

With --reconnect, a server that has died is started again, and programs only wait. Because of that the image is written
through: what has been answered must not be lost with the process that has answered it.")]
pub(crate) struct Args {
    /// Format of the image (default: found out from its contents)
    #[arg(short, long, value_name = "FMT")]
    pub(super) format: Option<String>,
    /// The disk cannot be written to
    #[arg(short, long)]
    pub(super) read_only: bool,
    /// Show this internal snapshot of the image, read-only (an id or a name)
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub(super) snapshot: Option<String>,
    /// Show only this partition of the image, as a disk
    #[arg(short = 'P', long, value_name = "N")]
    pub(super) partition: Option<u32>,
    /// Keep what is written apart, and forget it in the end: the image stays as it is
    #[arg(short, long)]
    pub(super) overlay: bool,
    /// Connections between the kernel and the server
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) connections: u32,
    /// Seconds that the server may take for a request before the connection counts as dead; 0: any time [default: any time for
    /// a server of ours, 60 for one elsewhere]
    #[arg(short, long, value_name = "S")]
    pub(super) timeout: Option<u32>,
    /// Keep requests waiting for so many seconds when the server has died, and start or call it again meanwhile
    #[arg(long, visible_alias = "persist", value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) reconnect: Option<u32>,
    /// Mount the disk (with --partition, the partition) on this directory
    #[arg(short, long, value_name = "DIR", conflicts_with = "foreground")]
    pub(super) mount: Option<PathBuf>,
    /// Stay in the foreground, for a service manager
    #[arg(long)]
    pub(super) foreground: bool,
    /// Use ioctls although the kernel has netlink
    #[arg(long, hide = true)]
    pub(super) ioctl: bool,
    #[command(flatten)]
    pub(super) source: SourceArgs,
    /// The image, or the URI of an export
    pub(super) filename: String,
    /// The device (default: the first that is free)
    #[arg(value_parser = device)]
    pub(super) device: Option<Device>,
}

impl Args {
    /// Whether the image is opened for writing.
    pub(super) fn writable(&self) -> bool {
        !(self.read_only || self.overlay || self.snapshot.is_some())
    }

    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()))
    }

    pub(super) fn reconnect(&self) -> Option<Duration> {
        self.reconnect.map(|seconds| Duration::from_secs(seconds.into()))
    }

    fn check(&self) -> Outcome<()> {
        let wrong = |what: &str| Err(Failure::usage(what));
        if self.reconnect.is_some() && self.overlay {
            return wrong(
                "--reconnect makes no sense with --overlay: what has been written dies with its server",
            );
        }
        if self.reconnect.is_some() && self.ioctl {
            return wrong("--reconnect needs netlink");
        }
        Ok(())
    }
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    args.check()?;
    background::be_called_so(app);
    if background::role() == Role::User && !args.foreground {
        return at_the_terminal(args, app);
    }
    if let Some(export) = remote::wanted(args) {
        return remote::serve(args, &export, app);
    }
    match (background::role(), args.reconnect) {
        (Role::Keeper, _) | (Role::User, Some(_)) => background::keep(app),
        (Role::Server | Role::User, _) => serve::run(args, None, app),
        (Role::Successor(device), _) => serve::run(args, Some(device), app),
    }
}

/// What the user waits for: the device, and what is mounted of it.
fn at_the_terminal(args: &Args, app: &App) -> Outcome {
    let attached = match remote::wanted(args) {
        Some(export) if args.reconnect.is_none() => remote::attach(args, &export, false, app)?.0,
        Some(_) => Attached::Kernel(background::start(Role::Server)?.wait_until_ready()?),
        None => {
            let first = if args.reconnect.is_some() { Role::Keeper } else { Role::Server };
            Attached::Kernel(background::start(first)?.wait_until_ready()?)
        }
    };
    let device = attached.device();
    if let Some(directory) = &args.mount
        && let Err(error) = mount::mount(device, directory, !args.writable() && !args.overlay)
    {
        // Nobody asked for a disk that is not mounted; the first error is the one that matters.
        let _ = detach(device, false, app);
        return Err(error.into());
    }
    app.print(&format!("{device}\n"))?;
    if let Attached::Loop(running) = attached {
        running.wait()?;
    }
    Ok(Exit::OK)
}
