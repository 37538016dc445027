//! Where connections come from.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname, getsockopt, sockopt};

use super::registry::Waker;
use crate::channel::Channel;

/// A socket that accepts connections.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// The file of a Unix socket that was made here, to be removed in the end, and its identity.
    file: Option<(PathBuf, (u64, u64))>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on every address that `host` and `port` stand for; an empty host is every address of the machine, IPv6 and
    /// IPv4. Port 0 is any that is free.
    ///
    /// # Errors
    /// The name is not known, or an address is taken or not ours.
    pub fn tcp(host: &str, port: u16) -> Result<Vec<Self>> {
        let what = || format!("cannot listen on {}", address(host, port));
        if host.is_empty() || host == "*" {
            return Self::everywhere(port).context(what);
        }
        let addresses: Vec<_> = (host, port).to_socket_addrs().context(what)?.collect();
        Self::on(&addresses).context(what)
    }

    /// Listens on these addresses, on the first one only if its port is any. One of several may not be there: the IPv6
    /// address of a name on a machine that has only IPv4.
    fn on(addresses: &[SocketAddr]) -> Result<Vec<Self>> {
        let mut listeners = vec![];
        let mut missing = None;
        for address in addresses {
            match TcpListener::bind(address) {
                Ok(listener) => listeners.push(Self::of(Socket::Tcp(listener))?),
                Err(error) if is_missing(&error) => missing = Some(error),
                Err(error) => return Err(error.into()),
            }
            if address.port() == 0 && !listeners.is_empty() {
                break;
            }
        }
        match missing {
            Some(error) if listeners.is_empty() => Err(error.into()),
            _ => Ok(listeners),
        }
    }

    /// An IPv6 socket takes IPv4 connections as well, unless the machine has no IPv6.
    fn everywhere(port: u16) -> Result<Vec<Self>> {
        let listener = match TcpListener::bind(("::", port)) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => return Err(error.into()),
            Err(_) => TcpListener::bind(("0.0.0.0", port))?,
            Ok(listener) => listener,
        };
        Ok(vec![Self::of(Socket::Tcp(listener))?])
    }

    /// Listens on a Unix socket. What an ended server has left under the name is replaced; a server that still listens
    /// there is not. `mode` is that of the file, if it is not what the umask says.
    ///
    /// # Errors
    /// The name is taken, too long, or in a folder that cannot be written.
    pub fn unix(path: &Path, mode: Option<u32>) -> Result<Self> {
        let what = || format!("cannot listen on '{}'", path.display());
        let listener = bind(path)?;
        if let Some(mode) = mode {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).context(what)?;
        }
        let mut made = Self::of(Socket::Unix(listener)).context(what)?;
        // The process may go to another directory.
        let absolute = std::path::absolute(path).context(what)?;
        made.file = identity(path).map(|identity| (absolute, identity));
        Ok(made)
    }

    /// Takes a listening stream socket that somebody else has opened (systemd's socket activation).
    ///
    /// # Errors
    /// It is no stream socket, or does not listen.
    pub fn adopt(socket: OwnedFd) -> Result<Self> {
        let what = || "the socket that was passed to this process".to_owned();
        let listens = getsockopt(&socket, sockopt::AcceptConn).context(what)?;
        if !listens {
            return Err(Error::usage("the socket that was passed to this process does not listen"));
        }
        use std::os::fd::AsRawFd as _;
        let name: SockaddrStorage = getsockname(socket.as_raw_fd()).context(what)?;
        match name.family() {
            Some(AddressFamily::Unix) => Self::of(Socket::Unix(socket.into())),
            Some(AddressFamily::Inet | AddressFamily::Inet6) => Self::of(Socket::Tcp(socket.into())),
            _ => Err(Error::usage("the socket that was passed to this process is neither TCP nor Unix")),
        }
    }

    fn of(socket: Socket) -> Result<Self> {
        match &socket {
            Socket::Tcp(listener) => listener.set_nonblocking(true)?,
            Socket::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(Self { socket, file: None })
    }

    /// Where it listens, as a URI that clients can use (without the export's name).
    pub fn uri(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) if address.ip().is_unspecified() => format!("nbd://localhost:{}", address.port()),
                Ok(address) => format!("nbd://{address}"),
                Err(_) => "nbd://".to_owned(),
            },
            Socket::Unix(listener) => {
                let path = listener.local_addr().ok().and_then(|name| name.as_pathname().map(Path::to_owned));
                format!("nbd+unix:///?socket={}", path.unwrap_or_default().display())
            }
        }
    }

    /// The port, if it is a TCP socket.
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Socket::Unix(_) => None,
        }
    }

    /// A connection, if one waits.
    pub(super) fn accept(&self) -> Result<Option<Channel>> {
        let accepted = match &self.socket {
            Socket::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(Channel::tcp(stream))
            }),
            Socket::Unix(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                let peer = unix_peer(&stream);
                Ok(Channel::unix(stream, peer))
            }),
        };
        use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        match accepted {
            Ok(channel) => Ok(Some(channel)),
            Err(error) if [WouldBlock, Interrupted, ConnectionAborted].contains(&error.kind()) => Ok(None),
            Err(error) => Err(error).context(|| "cannot accept a connection".to_owned()),
        }
    }
}

/// The URI of an export at a place: its name goes into the path, with what would mean something else escaped.
pub fn uri_of(place: &str, export: &str) -> String {
    let escaped: String = export
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    match place.split_once("/?") {
        Some((start, query)) => format!("{start}/{escaped}?{query}"),
        None if escaped.is_empty() => place.to_owned(),
        None => format!("{place}/{escaped}"),
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Only the file that was made here: another server may have taken the name since.
        if let Some((path, made)) = self.file.take()
            && identity(&path) == Some(made)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether there is no such address, or not its whole kind, on this machine.
fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

/// Binds a Unix socket; what an ended server has left under the name is replaced.
///
/// # Errors
/// The name is that of a file or of a server that listens there, too long, or in a folder that cannot be written.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let what = || format!("cannot listen on '{}'", path.display());
    let bound = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            remove_stale(path).context(what)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    bound.map_err(Error::from).context(what)
}

/// Removes a socket on which nobody listens.
fn remove_stale(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(Error::new(ErrorKind::Permission, "there is a file of that name, which is no socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(ErrorKind::Locked, "another server listens there")),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            Ok(std::fs::remove_file(path)?)
        }
        Err(error) => Err(error.into()),
    }
}

fn address(host: &str, port: u16) -> String {
    match host {
        "" => format!("port {port}"),
        _ if host.contains(':') => format!("[{host}]:{port}"),
        _ => format!("{host}:{port}"),
    }
}

/// Who is at the other end of a Unix socket.
fn unix_peer(stream: &UnixStream) -> String {
    getsockopt(stream, sockopt::PeerCredentials).map_or_else(
        |_| "unix".to_owned(),
        |credentials| format!("unix:pid={},uid={}", credentials.pid(), credentials.uid()),
    )
}

/// Waits until one of the listeners has a connection, the registry has changed, or it is `until`. The places of the
/// listeners that are ready.
pub(super) fn wait(listeners: &[Listener], waker: &Waker, until: Option<Instant>) -> Result<Vec<usize>> {
    let timeout = match until {
        None => PollTimeout::NONE,
        // A millisecond more, so that the moment has passed then.
        Some(until) => {
            let left = until.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    let mut fds = vec![PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
    fds.extend(listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error).context(|| "cannot wait for connections".to_owned()),
    }
    if fds[0].any().unwrap_or(false) {
        waker.clear();
    }
    Ok((0..listeners.len()).filter(|index| fds[index + 1].any().unwrap_or(false)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_not_there_does_not_keep_from_the_others() {
        // TEST-NET-1 of RFC 5737 is nobody's.
        let [nobodys, ours] = ["192.0.2.1:0", "127.0.0.1:0"].map(|address| address.parse().unwrap());
        let listeners = Listener::on(&[nobodys, ours]).unwrap();
        assert_eq!(listeners.len(), 1);
        assert!(listeners[0].uri().starts_with("nbd://127.0.0.1:"));
        Listener::on(&[nobodys]).unwrap_err();
        let taken = SocketAddr::from(([127, 0, 0, 1], listeners[0].port().unwrap()));
        Listener::on(&[taken, ours]).unwrap_err();
    }

    #[test]
    fn a_file_is_no_stale_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "important").unwrap();
        bind(&path).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"important");
        std::fs::remove_file(&path).unwrap();
        drop(bind(&path).unwrap());
        let again = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), ErrorKind::Locked);
        drop(again);
    }
}
