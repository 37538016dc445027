//! `nbd`: images as disks of this machine, through the kernel's nbd devices.
//!
//! ```text
//!   vimg nbd attach --fork-> keeper (with --reconnect) --fork-> server: the image, open
//!        |                                                        |  socket pairs
//!        `-- prints /dev/nbd0 when that is there               kernel: /dev/nbd0, /dev/nbd0p1
//! ```
//!
//! The server is this program, started anew with the same words ([`background`]); it writes down what it serves
//! ([`record`]), so that `list` and `detach` know. Where the image is an export of somebody else's server and nothing
//! has to be done to it, the kernel is given connections to that server instead ([`remote`]).

mod attach;
mod background;
mod detach;
mod list;
mod mount;
mod record;
mod remote;
mod serve;
mod show;

use nbd_server::kernel::Device;

pub(crate) use {
    detach::detach,
    show::{show, watch_signals},
};

use crate::app::App;
use crate::exit::Outcome;

/// Show images as disks of this machine: /dev/nbd0
///
/// The kernel's nbd devices get their bytes from a server in the background, so that any image that vimg opens can be
/// partitioned, mounted and repaired with the tools of this machine. Needs root, and the kernel's nbd module, which is
/// loaded if need be. Do not mount images of strangers this way: the kernel's file systems trust what they read.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, disable_help_subcommand = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

/// What is to be done.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show an image as a disk, and print its device
    Attach(Box<attach::Args>),
    /// Take a device away again, cleanly
    Detach(detach::Args),
    /// List the devices that are in use
    List(list::Args),
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    match &args.command {
        Command::Attach(args) => attach::run(args, app),
        Command::Detach(args) => detach::run(args, app),
        Command::List(args) => list::run(args, app),
    }
}

/// The device that a user names.
pub(crate) fn device(name: &str) -> Result<Device, String> {
    Device::parse(name).map_err(|error| error.to_string())
}
