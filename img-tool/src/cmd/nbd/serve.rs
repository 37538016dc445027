//! The server of an attached device: opens the image, serves it to the kernel, and closes it in the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::overlay::Overlay;
use block::{BlockDevice, Error, ErrorKind, Result};
use image::{Format, Layer, OpenOptions, Share};
use nbd_server::kernel::{self, Detach, Device, Setup};
use nbd_server::proto::{HeaderStyle, transmission};
use nbd_server::server::event::{Event, Log};
use nbd_server::server::export::{Export, ExportOptions};
use nbd_server::server::{Config, Limits, Server};
use nbd_server::tls::Policy;

use super::attach::Args;
use super::background::{SUCCESSOR_WANTED, ready};
use super::record::{Own, Record};
use super::show::{self, show};
use crate::app::App;
use crate::cmd::serve::temporary;
use crate::exit::{Exit, Outcome};
use crate::snapshot::Wanted as Snapshot;

/// Blocks of the copy-on-write of `--overlay`.
const OVERLAY_BLOCK_BYTES: u32 = 64 << 10;
/// How long the kernel may need to forget a device that it has just disconnected.
const FAREWELL: Duration = Duration::from_secs(3);

/// Serves until the device is disconnected. With `waiting`, that device gets this server in place of one that died.
pub(super) fn run(args: &Args, waiting: Option<Device>, app: &App) -> Outcome {
    let served = serve(args, waiting, app)?;
    // The image is closed and unlocked by now, for which whoever detaches the device waits.
    match served.ended {
        Ok(()) if args.reconnect.is_some() && !is_gone(served.device) => Ok(SUCCESSOR_WANTED),
        Ok(()) => {
            served.own.remove();
            Ok(Exit::OK)
        }
        Err(error) => {
            served.own.fail(&served.record, &error);
            Err(error.into())
        }
    }
}

/// A device that has been served.
struct Served {
    device: Device,
    own: Own,
    record: Record,
    ended: Result<()>,
}

fn serve(args: &Args, waiting: Option<Device>, app: &App) -> Outcome<Served> {
    let layer = open(args, app)?;
    let disk = disk(args, &layer)?;
    let rest = disk.size() % 512;
    if rest > 0 {
        app.warn(&format!("the kernel shows whole sectors only: the last {rest} bytes are out of reach"));
    }
    let export = Arc::new(Export::new("", Arc::clone(&disk), export_options(args, &layer)));
    let setup = setup(args, &export);
    let server = Server::new(config(&export))?;
    let device = match waiting {
        Some(device) => show::resume(&server, &export, args.connections, device, &setup).map(|()| device),
        None => show(&server, &export, args.connections, args.device, &setup, app),
    }?;
    let record = record(args, &layer);
    let own = Own::write(device, &record).and_then(|own| show::watch_signals(device).map(|()| own));
    let own = own.inspect_err(|_| {
        // Nobody would ever serve it; the first error is the one that matters.
        let _ = kernel::detach(device, Detach { force: true, ..Detach::default() });
    })?;
    ready(device, app)?;
    let ended = server.run().map(drop);
    Ok(Served { device, own, record, ended })
}

fn open(args: &Args, app: &App) -> Outcome<Arc<Layer>> {
    let source = args.source.source(&args.filename, args.format.as_deref())?;
    let snapshot = args.snapshot.as_deref().map(|name| Snapshot::parse(name, app)).transpose()?;
    let options = OpenOptions {
        writable: args.writable(),
        format: source.format,
        // Two who write to one raw image would not know of each other.
        share: if args.writable() { Share::NoWriters } else { Share::Format },
        force_share: args.source.force_share,
        policy: app.policy(),
        secrets: args.source.objects.secrets()?,
        snapshot: snapshot.map(|wanted| wanted.selector),
        ..OpenOptions::default()
    };
    let layer = app.open(&source.spec, &options)?;
    if args.writable() && layer.image.read_only() {
        let error = Error::new(ErrorKind::ReadOnly, format!("'{}' cannot be written", args.filename));
        return Err(error.hint("attach it with --read-only, or with --overlay").into());
    }
    Ok(layer)
}

/// The disk that is shown: the image, under an overlay, or a partition of that.
fn disk(args: &Args, layer: &Layer) -> Result<Arc<dyn BlockDevice>> {
    let mut disk = layer.device();
    if args.overlay {
        disk = Arc::new(Overlay::new(disk, Arc::new(temporary()?), OVERLAY_BLOCK_BYTES)?);
    }
    match args.partition {
        Some(number) => Ok(Arc::new(guestdisk::partition::slice(disk, number)?)),
        None => Ok(disk),
    }
}

/// With `--reconnect` the process may die without the kernel noticing more than a pause, so that it must hold nothing
/// back that it has answered. A raw file is in the host's cache then; other formats keep tables in memory until a flush.
fn export_options(args: &Args, layer: &Layer) -> ExportOptions {
    ExportOptions {
        read_only: !args.writable() && !args.overlay,
        write_through: args.reconnect.is_some() && layer.format != Format::Raw,
        ..ExportOptions::default()
    }
}

fn setup(args: &Args, export: &Export) -> Setup {
    let mut flags = export.flags(HeaderStyle::Simple);
    if args.connections > 1 {
        flags |= transmission::CAN_MULTI_CONN;
    }
    Setup {
        timeout: args.timeout(),
        reconnect: args.reconnect(),
        backend: Some(format!("vimg:{}", args.filename)),
        ioctl: args.ioctl,
        ..Setup::new(export.device.size(), flags)
    }
}

/// The server complains by its exit and in its log; clients that come and go are not news here.
#[derive(Debug)]
struct Quiet;

impl Log for Quiet {
    fn event(&self, _: &Event<'_>) {}
}

fn config(export: &Arc<Export>) -> Config {
    Config {
        exports: vec![Arc::clone(export)],
        tls: None,
        tls_policy: Policy::Off,
        limits: Limits::default(),
        once: false,
        log: Arc::new(Quiet),
    }
}

fn record(args: &Args, layer: &Layer) -> Record {
    let path = layer.path().and_then(|path| path.canonicalize().ok());
    Record {
        pid: Some(std::process::id()),
        image: path.map_or_else(|| args.filename.clone(), |path| path.display().to_string()),
        format: layer.format.name().to_owned(),
        partition: args.partition,
        snapshot: args.snapshot.clone(),
        overlay: args.overlay,
        connections: args.connections,
        ..Record::default()
    }
}

/// The end of the connections is the end of the device, or its server has to be replaced.
fn is_gone(device: Device) -> bool {
    let deadline = Instant::now() + FAREWELL;
    while kernel::status(device).is_some_and(|status| status.connected()) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
