//! `nbd detach`: the disk goes, and the image is left as it should be.

use std::path::Path;
use std::time::Duration;

use block::{Error, ErrorKind};
use nbd_server::kernel::{self, Detach, Device};

use super::{mount, record};
use crate::app::App;
use crate::exit::{Exit, Failure, Outcome};

/// How long a server may need to close its image.
const PATIENCE: Duration = Duration::from_secs(120);

/// Take a device away again, cleanly
///
/// What is cached is written, the kernel lets the device go, the server closes the image and ends; then this command
/// ends, too. A device that is in use stays, and whoever uses it is named.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg nbd detach /dev/nbd0
  vimg nbd detach /mnt                  # unmounts it first
  vimg nbd detach --all")]
pub(crate) struct Args {
    /// Every device that vimg has attached
    #[arg(short, long, conflicts_with = "device", required_unless_present = "device")]
    all: bool,
    /// Take it away although it is in use: what has not been written back is lost
    #[arg(short, long)]
    force: bool,
    /// The device, or the directory that it (or a partition of it) is mounted on
    #[arg(value_name = "DEVICE")]
    device: Option<String>,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    if let Some(name) = &args.device {
        let device = match Device::parse(name) {
            Err(_) if Path::new(name).is_dir() => mount::unmount(Path::new(name))?,
            parsed => parsed?,
        };
        detach(device, args.force, app)?;
        return Ok(Exit::OK);
    }
    let ours = kernel::list()
        .into_iter()
        .map(|status| status.device)
        .filter(|device| record::read(*device).is_some());
    let mut exit = Exit::OK;
    for device in ours {
        if let Err(error) = detach(device, args.force, app) {
            app.show(&error);
            exit = Exit::ERROR;
        }
    }
    if exit == Exit::OK { Ok(exit) } else { Err(Failure::Silent(exit)) }
}

/// Takes a device away, and waits until its server, if that is ours, has closed the image.
///
/// # Errors
/// It is in use, or not connected; the image could not be left as it should be.
pub(crate) fn detach(device: Device, force: bool, app: &App) -> block::Result<()> {
    let record = record::read(device);
    let server_gone = record.as_ref().is_some_and(|record| !record.remote) && !record::is_alive(device);
    if server_gone {
        app.warn(&format!("the server of {device} is dead; what it had not written is lost"));
    }
    match kernel::detach(device, Detach { force, server_gone }) {
        // Somebody else has disconnected it; its server may be left.
        Err(error) if error.kind() == ErrorKind::NotFound && record.is_some() => {}
        result => result?,
    }
    if !record::wait_until_dead(device, PATIENCE) {
        let pid = record.and_then(|record| record.pid).unwrap_or_default();
        let error = format!("{device} is free, but its server (process {pid}) has not closed the image yet");
        return Err(Error::new(ErrorKind::Io, error));
    }
    let failed = record::read(device).and_then(|record| record.error);
    record::forget(device);
    match failed {
        Some(error) => Err(Error::new(ErrorKind::Io, error).context(format!("the server of {device}"))),
        None => Ok(()),
    }
}
