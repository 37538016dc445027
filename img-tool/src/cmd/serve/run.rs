//! Carrying a plan out.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Error, ErrorKind, Result, ResultExt as _};
use nbd_server::channel::Channel;
use nbd_server::kernel::{Device, Setup};
use nbd_server::proto::{DEFAULT_PORT, HeaderStyle};
use nbd_server::server::export::Export;
use nbd_server::server::listen::Listener;
use nbd_server::server::{Config, Handle, Limits, Server};
use nbd_server::tls::{Policy, ServerTls, psk, server};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::plan::{Authentication, Plan, Where};
use super::{background, disk, log, metrics};
use crate::app::{App, directory_of};
use crate::exit::{Exit, Failure, Outcome};

/// Serves until told to stop.
pub(crate) fn run(plan: &Plan, app: &App) -> Outcome {
    if plan.fork && !background::is_background() {
        return background::start(app);
    }
    let exports = disk::exports(plan, app)?;
    let tls = tls(&plan.authentication)?;
    let log = Arc::new(log::Writer::open(&plan.logging, app)?);
    let tls_policy = match (&tls, plan.tls_optional) {
        (None, _) => Policy::Off,
        (Some(_), true) => Policy::Optional,
        (Some(_), false) => Policy::Required,
    };
    let reloads = tls.is_some();
    let limits = Limits {
        max_clients: plan.max_clients,
        handshake_timeout: plan.handshake_timeout,
        threads_per_connection: plan.threads,
        ..Limits::default()
    };
    let mut server =
        Server::new(Config { exports: exports.clone(), tls, tls_policy, limits, once: plan.once, log })?;
    let announce = plan.announce && !is_activated(plan);
    let listeners = listeners(&plan.place)?;
    let uris = uris(&listeners, &exports.iter().map(|export| export.name.as_str()).collect::<Vec<_>>());
    for listener in listeners {
        server.listen(listener);
    }
    let _metrics = plan.metrics.as_ref().map(|path| metrics::serve(path, server.handle())).transpose()?;
    let device = match plan.place {
        Where::Kernel(device) => Some(connect(&server, &exports, device, app)?),
        _ => None,
    };
    match device {
        Some(device) => crate::cmd::nbd::watch_signals(device)?,
        None => watch_signals(server.handle(), reloads, app)?,
    }
    let _pid = plan.pid_file.as_deref().map(PidFile::write).transpose()?;
    // The folders in which files have to be removed in the end.
    let folders = own_folders(plan)?;
    if announce && !matches!(plan.place, Where::Stdio) {
        app.note(&device.map_or(uris, |device| format!("{device}\n")));
    }
    if plan.fork {
        background::detach(app)?;
    }
    // Whoever has a device to take away in the end has to speak to the kernel.
    if device.is_none() {
        app.confine_to_serving(&folders);
    }
    if let Where::Stdio = plan.place {
        server.serve(stdio()?)?;
    }
    server.run()?;
    Ok(Exit::OK)
}

/// Whoever passes a socket knows where clients find it, and may be printing something of its own. To be asked before
/// the sockets are taken, for then nothing tells of them any more.
fn is_activated(plan: &Plan) -> bool {
    matches!(plan.place, Where::Default) && std::env::var_os("LISTEN_FDS").is_some()
}

/// Shows the only image as a disk of this machine.
fn connect(server: &Server, exports: &[Arc<Export>], device: Device, app: &App) -> Outcome<Device> {
    let [export] = exports else {
        return Err(Failure::usage("one image becomes one disk: several need several servers"));
    };
    let size = export.device.size();
    if size % 512 > 0 {
        let rest = size % 512;
        app.warn(&format!("the kernel shows whole sectors only: the last {rest} bytes are out of reach"));
    }
    let setup = Setup::new(size, export.flags(HeaderStyle::Simple));
    Ok(crate::cmd::nbd::show(server, export, 1, Some(device), &setup, app)?)
}

fn own_folders(plan: &Plan) -> Result<Vec<PathBuf>> {
    let socket = match &plan.place {
        Where::Unix { path, .. } => Some(path),
        _ => None,
    };
    let files = socket.into_iter().chain(&plan.metrics).chain(&plan.pid_file);
    files.map(|path| Ok(directory_of(&std::path::absolute(path)?))).collect()
}

pub(crate) fn tls(authentication: &Authentication) -> Result<Option<ServerTls>> {
    match authentication {
        Authentication::None => Ok(None),
        Authentication::X509 { dir, verify_peer } => {
            Ok(Some(ServerTls::X509(server::Config::from_dir(dir, *verify_peer)?)))
        }
        Authentication::Psk { file } => Ok(Some(ServerTls::Psk(psk::Server::from_file(file)?))),
    }
}

pub(crate) fn listeners(place: &Where) -> Result<Vec<Listener>> {
    match place {
        Where::Stdio | Where::Kernel(_) => Ok(vec![]),
        Where::Unix { path, mode } => Ok(vec![Listener::unix(path, *mode)?]),
        Where::Tcp(addresses) => {
            let listeners: Result<Vec<_>> =
                addresses.iter().map(|(host, port)| Listener::tcp(host, *port)).collect();
            Ok(listeners?.into_iter().flatten().collect())
        }
        Where::Default => {
            let passed = passed()?;
            if passed.is_empty() { Listener::tcp("localhost", DEFAULT_PORT) } else { Ok(passed) }
        }
    }
}

/// The sockets that systemd has opened for this process (`LISTEN_FDS`, sd_listen_fds(3)).
pub(super) fn passed() -> Result<Vec<Listener>> {
    let mut fds = listenfd::ListenFd::from_env();
    let mut listeners = vec![];
    let what = || "socket activation".to_owned();
    for index in 0..fds.len() {
        let tcp = fds.take_tcp_listener(index);
        let socket = match tcp {
            Ok(Some(listener)) => Some(listener.into()),
            Ok(None) => None,
            Err(_) => fds.take_unix_listener(index).context(what)?.map(Into::into),
        };
        listeners.extend(socket.map(Listener::adopt).transpose()?);
    }
    Ok(listeners)
}

fn stdio() -> Result<Channel> {
    let clone = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let input = clone(std::io::stdin().as_fd()).context(|| "standard input".to_owned())?;
    let output = clone(std::io::stdout().as_fd()).context(|| "standard output".to_owned())?;
    Ok(Channel::pair(input, output, "stdio"))
}

/// A URI for each export at each place, a line each.
fn uris(listeners: &[Listener], names: &[&str]) -> String {
    let mut lines = String::new();
    for listener in listeners {
        for name in names {
            lines += &nbd_server::server::listen::uri_of(&listener.uri(), name);
            lines.push('\n');
        }
    }
    lines
}

/// SIGTERM and SIGINT stop the server, a second one at once; SIGHUP reads certificates again, or stops it where there
/// are none, as it does qemu-nbd.
pub(crate) fn watch_signals(handle: Handle, reloads: bool, app: &App) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])
        .context(|| "cannot watch for signals".to_owned())?;
    let program = app.program;
    let watching = move || {
        for signal in signals.forever() {
            if signal == SIGHUP && reloads {
                if let Err(error) = handle.reload_tls() {
                    crate::output::Output::new(false).complain(program, &format!("{error}"));
                }
            } else {
                handle.stop();
            }
        }
    };
    let spawned = std::thread::Builder::new().name("signals".to_owned()).spawn(watching);
    spawned.context(|| "cannot watch for signals".to_owned()).map(drop)
}

/// The file with the number of this process, removed in the end.
#[derive(Debug)]
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> Result<Self> {
        let what = || format!("cannot write the pid file '{}'", path.display());
        if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
            return Err(Error::new(ErrorKind::Permission, "it is a folder")).context(what);
        }
        std::fs::write(path, format!("{}\n", std::process::id())).context(what)?;
        Ok(Self(std::path::absolute(path).unwrap_or_else(|_| path.to_owned())))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
