//! An export of somebody else's server as a disk, without us in between: the kernel gets connections to that server.
//!
//! With `--reconnect` a process stays, which calls the server again when the kernel says that a connection has died.

use std::os::fd::OwnedFd;
use std::time::Duration;

use block::{Error, ErrorKind, Result};
use nbd_server::client::{ExportInfo, connect_raw};
use nbd_server::kernel::{self, Attached, DeadLinks, Detach, Device, Setup};
use nbd_server::proto::transmission;
use nbd_server::uri::{Address, ExportName};

use super::attach::Args;
use super::background::ready;
use super::record::{Own, Record};
use super::show;
use crate::app::App;
use crate::exit::{Exit, Outcome};

/// How long a server elsewhere may take for a request, where nothing is said: a machine that has lost its power says
/// nothing at all.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked whether the device is still there.
const LOOK: Duration = Duration::from_secs(1);
/// The longest pause between two calls of a server that does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// The export, if the kernel can use it as it is: no TLS, nothing to be done to the bytes.
pub(super) fn wanted(args: &Args) -> Option<ExportName> {
    let plain = matches!(args.format.as_deref(), None | Some("raw"));
    let as_it_is = args.snapshot.is_none() && args.partition.is_none() && !args.overlay;
    let ours = args.ioctl || args.source.image_opts || !args.filename.starts_with("nbd");
    if !plain || !as_it_is || ours {
        return None;
    }
    let export = ExportName::parse(&args.filename).ok()?;
    let in_the_clear = export.tls.is_none() && export.tls_creds.is_none();
    (in_the_clear && !matches!(export.address, Address::Vsock { .. })).then_some(export)
}

/// Shows the export as a disk, and writes down whether a process of ours (this one) will stay with it.
pub(super) fn attach(
    args: &Args,
    export: &ExportName,
    stays: bool,
    app: &App,
) -> Outcome<(Attached, Setup, Own)> {
    let (sockets, info) = connect(args, export, app)?;
    let setup = setup(args, &info);
    let attached = kernel::attach(args.device, &setup, sockets)?;
    let device = attached.device();
    let own = Own::write(device, &record(args, stays)).inspect_err(|_| {
        // The first error is the one that matters.
        let _ = kernel::detach(device, Detach { force: true, ..Detach::default() });
    })?;
    if let Err(error) = kernel::show_partitions(device, &[]) {
        app.show(&error.context("partitions cannot be shown"));
    }
    Ok((attached, setup, own))
}

/// Shows the export as a disk, and stays until that is disconnected.
pub(super) fn serve(args: &Args, export: &ExportName, app: &App) -> Outcome {
    // Before the first connection that can die.
    let links = DeadLinks::listen()?;
    let (attached, setup, own) = attach(args, export, true, app)?;
    let device = attached.device();
    show::watch_signals(device)?;
    ready(device, app)?;
    watch(device, args.reconnect.map(|_| export), &setup, &links, app)?;
    own.remove();
    Ok(Exit::OK)
}

/// As many connections as are wanted and allowed.
fn connect(args: &Args, export: &ExportName, app: &App) -> Result<(Vec<OwnedFd>, ExportInfo)> {
    let (first, info) = connect_raw(export)?;
    let mut sockets = vec![first];
    if args.connections > 1 && !info.can(transmission::CAN_MULTI_CONN) {
        app.warn("the server does not promise that several connections see the same disk: there will be one");
        return Ok((sockets, info));
    }
    for _ in 1..args.connections {
        sockets.push(connect_raw(export)?.0);
    }
    Ok((sockets, info))
}

fn setup(args: &Args, info: &ExportInfo) -> Setup {
    let read_only = if args.read_only { transmission::READ_ONLY } else { 0 };
    let tcp_timeout = args.timeout.map_or(Some(TIMEOUT), |_| args.timeout());
    Setup {
        block_size: info.min_block.max(512),
        timeout: tcp_timeout,
        reconnect: args.reconnect(),
        backend: Some(args.filename.clone()),
        ..Setup::new(info.size, info.flags | read_only)
    }
}

fn record(args: &Args, watched: bool) -> Record {
    Record {
        pid: watched.then(std::process::id),
        image: args.filename.clone(),
        format: "raw".to_owned(),
        remote: true,
        connections: args.connections,
        ..Record::default()
    }
}

/// Replaces connections to `export` that have died, if that is wanted, until the device is disconnected.
fn watch(
    device: Device,
    export: Option<&ExportName>,
    setup: &Setup,
    links: &DeadLinks,
    app: &App,
) -> Result<()> {
    loop {
        let dead = links.next(LOOK)?;
        if !is_connected(device) {
            return Ok(());
        }
        if let Some(export) = export.filter(|_| dead == Some(device)) {
            app.complain(&format!("{device} has lost a connection to {}", export.place()));
            revive(device, export, setup, app)?;
        }
    }
}

/// Calls the server until it answers or the device is gone.
fn revive(device: Device, export: &ExportName, setup: &Setup, app: &App) -> Result<()> {
    let mut pause = Duration::from_millis(50);
    while is_connected(device) {
        match connect_raw(export).and_then(|connected| replace(device, setup, connected)) {
            Ok(()) => {
                app.complain(&format!("{device} is connected to {} again", export.place()));
                return Ok(());
            }
            // Another disk under the same name: nothing that waiting could change.
            Err(error) if error.kind() == ErrorKind::Invalid => return Err(error),
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(PAUSE);
    }
    Ok(())
}

fn replace(device: Device, setup: &Setup, (socket, info): (OwnedFd, ExportInfo)) -> Result<()> {
    if info.size != setup.size {
        let (was, is) = (setup.size, info.size);
        return Err(Error::invalid(format!("the export of {device} had {was} bytes and has {is} now")));
    }
    kernel::reconnect(device, setup, &[socket])
}

fn is_connected(device: Device) -> bool {
    kernel::status(device).is_some_and(|status| status.connected())
}
