//! An export of a server of ours becomes a disk: socket pairs between the two, a device, its partitions.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use block::{BlockDevice, Error, Result, ResultExt as _};
use nbd_server::channel::Channel;
use nbd_server::kernel::{self, Attached, Detach, Device, Setup, Wanted};
use nbd_server::server::Server;
use nbd_server::server::export::Export;

use crate::app::App;

/// Shows `export` as a disk: as `device`, or as the first that is free. From now on `server` has the kernel as its client;
/// when the device is disconnected, that leaves.
///
/// # Errors
/// As [`kernel::attach`].
pub(crate) fn show(
    server: &Server,
    export: &Arc<Export>,
    connections: u32,
    device: Option<Device>,
    setup: &Setup,
    app: &App,
) -> Result<Device> {
    let attached = kernel::attach(device, setup, connect(server, export, connections)?)?;
    let device = attached.device();
    if let Attached::Loop(running) = attached {
        // It ends with the device, of which the server hears as well.
        std::thread::spawn(move || running.wait());
    }
    let shown = partitions(&*export.device).and_then(|wanted| kernel::show_partitions(device, &wanted));
    if let Err(error) = shown {
        // The disk is there; only its partitions are not.
        app.show(&error.context("partitions cannot be shown"));
    }
    Ok(device)
}

/// Gives a device whose server has died this one.
///
/// # Errors
/// As [`kernel::reconnect`].
pub(super) fn resume(
    server: &Server,
    export: &Arc<Export>,
    connections: u32,
    device: Device,
    setup: &Setup,
) -> Result<()> {
    kernel::reconnect(device, setup, &connect(server, export, connections)?)
}

/// Socket pairs: the server has one end of each, the kernel gets the others.
fn connect(server: &Server, export: &Arc<Export>, connections: u32) -> Result<Vec<OwnedFd>> {
    (0..connections)
        .map(|_| {
            let (ours, kernels) = UnixStream::pair().context(|| "a pair of sockets".to_owned())?;
            server.serve_raw(Channel::unix(ours, "kernel"), export)?;
            Ok(kernels.into())
        })
        .collect()
}

/// The partitions of the disk as we see them, for a kernel that does not look itself.
pub(super) fn partitions(disk: &dyn BlockDevice) -> Result<Vec<Wanted>> {
    let table = guestdisk::partition::read(disk)?;
    let all = table.into_iter().flat_map(|table| table.partitions);
    let whole = |bytes: u64| bytes.is_multiple_of(512);
    let possible = all.filter(|found| found.len > 0 && whole(found.offset) && whole(found.len));
    Ok(possible.map(|found| Wanted { number: found.number, offset: found.offset, len: found.len }).collect())
}

/// Signals that are meant to end the server take the device away first, cleanly; as long as it is in use, they do not.
///
/// # Errors
/// The system gives no thread.
pub(crate) fn watch_signals(device: Device) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _ in signals.forever() {
            if let Err(error) = kernel::detach(device, Detach::default()) {
                log_failure(&error);
            }
        }
    })?;
    Ok(())
}

/// Standard error is the log by now.
fn log_failure(error: &Error) {
    crate::output::Output::new(false).say(&crate::hint::render(error, "vimg", false));
}
