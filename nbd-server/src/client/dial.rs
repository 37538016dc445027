//! Getting a connection: sockets, and how long to wait.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::time::Duration;

use block::Error;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr, sockopt};
use nix::sys::time::TimeVal;

use crate::channel::Channel;
use crate::uri::{Address, ExportName};

use super::failure::{Failure, Outcome};

/// How long one address may take to answer.
const CONNECT: Duration = Duration::from_secs(20);

/// A connection that is limited in time for now.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) channel: Channel,
    pub(super) patience: Patience,
}

/// How long a silent peer is waited for.
#[derive(Debug)]
pub(super) struct Patience(OwnedFd);

impl Patience {
    fn new(socket: &OwnedFd, each: Duration) -> io::Result<Self> {
        let patience = Self(socket.try_clone()?);
        patience.set(TimeVal::new(i64::try_from(each.as_secs()).unwrap_or(i64::MAX), 0))?;
        Ok(patience)
    }

    /// From now on it is waited for as long as it takes.
    pub(super) fn without_end(self) -> io::Result<()> {
        self.set(TimeVal::new(0, 0))
    }

    fn set(&self, time: TimeVal) -> io::Result<()> {
        socket::setsockopt(&self.0, sockopt::ReceiveTimeout, &time)?;
        socket::setsockopt(&self.0, sockopt::SendTimeout, &time)?;
        Ok(())
    }
}

/// Connects; a peer that is silent for longer than `each` is given up while the handshake lasts.
///
/// # Errors
/// In qemu's words.
pub(super) fn dial(name: &ExportName, each: Duration) -> Outcome<Dialled> {
    let failed = |error: io::Error| {
        let error = Error::from(error);
        Failure::Lost(error.kind(), format!("Failed to connect to '{}': {error}", name.place()))
    };
    let (socket, tcp) = match &name.address {
        Address::Tcp { host, port } => {
            let stream = tcp(host, *port, each.min(CONNECT)).map_err(failed)?;
            (OwnedFd::from(stream.try_clone().map_err(failed)?), Some(stream))
        }
        Address::Unix(path) => (unix(path).map_err(failed)?.into(), None),
        Address::Vsock { cid, port } => (vsock(*cid, *port).map_err(failed)?, None),
    };
    let patience = Patience::new(&socket, each).map_err(failed)?;
    let channel = match tcp {
        Some(stream) => Channel::tcp(stream),
        None => Channel::socket(socket, name.place()),
    };
    Ok(Dialled { channel, patience })
}

/// Every address of the host is tried, in the order in which the system gives them.
fn tcp(host: &str, port: u16, each: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from_raw_os_error(nix::libc::EADDRNOTAVAIL);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, each) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn unix(path: &Path) -> io::Result<UnixStream> {
    match path.as_os_str().as_bytes().strip_prefix(b"\0") {
        Some(name) => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?),
        None => UnixStream::connect(path),
    }
}

fn vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::connect(socket.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(socket)
}
