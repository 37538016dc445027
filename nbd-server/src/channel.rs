//! A connection's bytes: a socket (or a pair of pipes), in the clear or through TLS.
//!
//! One thread receives at a time and one thread sends at a time; both may happen at once. The holder sees to that
//! (a lock around each direction). Everything blocks; another thread ends a wait by [`Channel::shutdown`].

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown};
use parking_lot::Mutex;

/// Bytes that are received from the network at once when they have to be deciphered.
const CIPHERTEXT_BYTES: usize = 32 << 10;
/// More will follow (nix has no name for it).
const MSG_MORE: MsgFlags = MsgFlags::from_bits_retain(nix::libc::MSG_MORE);
/// Bytes that are enciphered at once.
const PLAINTEXT_BYTES: usize = 64 << 10;

/// One side of a TLS session, without I/O: bytes from the network go in by [`feed`](Self::feed), what is to be
/// sent comes out of [`seal`](Self::seal).
pub trait Session: Send + std::fmt::Debug {
    /// Whether the handshake is still going on.
    fn handshaking(&self) -> bool;

    /// Takes all of `ciphertext`, which the peer has sent. What it held can then be had by
    /// [`plaintext`](Self::plaintext).
    ///
    /// # Errors
    /// The peer breaks the rules of TLS, or is not who it should be. What [`seal`](Self::seal) gives afterwards
    /// (an alert) is worth sending.
    fn feed(&mut self, ciphertext: &[u8]) -> io::Result<()>;

    /// Moves plaintext to the start of `buf`; how many bytes there were, 0 if there are none now.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    fn plaintext(&mut self, buf: &mut [u8]) -> io::Result<usize>;

    /// Whether the peer has ended the session properly (`close_notify`) and all it said has been read.
    fn ended(&self) -> bool;

    /// Whether something has to be sent although nobody asked for it (handshake messages, key updates).
    fn has_to_send(&self) -> bool;

    /// Appends to `out` what has to be sent, `plaintext` enciphered last.
    ///
    /// # Errors
    /// The session has failed.
    fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> io::Result<()>;

    /// Appends the end of the session (`close_notify`) to `out`.
    fn close(&mut self, out: &mut Vec<u8>);

    /// Who the peer is, if it has shown a certificate or an identity; for logs.
    fn peer(&self) -> Option<String>;
}

/// The clear side of a channel.
#[derive(Debug)]
enum Wire {
    /// A stream socket.
    Socket(OwnedFd),
    /// Two descriptors: standard input and output.
    Pair {
        /// Bytes come from here.
        input: OwnedFd,
        /// Bytes go there.
        output: OwnedFd,
        /// What ends receiving from a pipe.
        stop: Option<Stop>,
    },
}

/// A pipe in which something lies once nothing more is to be received.
#[derive(Debug)]
struct Stop {
    raised: OwnedFd,
    raise: OwnedFd,
}

impl Stop {
    /// Waits until `input` has something to say; `false` if it has not, and is not waited for any more.
    fn wait(&self, input: &OwnedFd) -> nix::Result<bool> {
        let mut fds = [input, &self.raised].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE)?;
        Ok(fds[0].any().unwrap_or(true))
    }
}

/// TLS around a wire.
#[derive(Debug)]
struct Tls {
    session: Mutex<Box<dyn Session>>,
    /// What is being sent. Locked before `session`, for as long as sending takes.
    outgoing: Mutex<Vec<u8>>,
}

/// A connection to a peer.
#[derive(Debug)]
pub struct Channel {
    wire: Wire,
    peer: String,
    tls: Option<Tls>,
}

impl Channel {
    /// A channel over a TCP connection; small messages are not held back, and a peer that has vanished is noticed.
    pub fn tcp(stream: TcpStream) -> Self {
        let peer = stream.peer_addr().as_ref().map_or_else(|_| "tcp".to_owned(), SocketAddr::to_string);
        // Without these it works as well, only slower or longer.
        let _ = stream.set_nodelay(true);
        let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::KeepAlive, &true);
        Self { wire: Wire::Socket(stream.into()), peer, tls: None }
    }

    /// A channel over a Unix socket; `peer` is what it is called in logs.
    pub fn unix(stream: UnixStream, peer: impl Into<String>) -> Self {
        Self { wire: Wire::Socket(stream.into()), peer: peer.into(), tls: None }
    }

    /// A channel over any connected stream socket.
    pub fn socket(socket: OwnedFd, peer: impl Into<String>) -> Self {
        Self { wire: Wire::Socket(socket), peer: peer.into(), tls: None }
    }

    /// A channel over two descriptors, of which each may be a pipe, a file or a socket.
    pub fn pair(input: OwnedFd, output: OwnedFd, peer: impl Into<String>) -> Self {
        // Without it the end has to come from the peer.
        let stop = nix::unistd::pipe2(OFlag::O_CLOEXEC).ok().map(|(raised, raise)| Stop { raised, raise });
        Self { wire: Wire::Pair { input, output, stop }, peer: peer.into(), tls: None }
    }

    /// Who is at the other end, for logs.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Who the peer is by its certificate or key, if it has shown one.
    pub fn tls_peer(&self) -> Option<String> {
        self.tls.as_ref().and_then(|tls| tls.session.lock().peer())
    }

    /// Whether everything is enciphered.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The socket that bytes can be sent to as they are, from a file for instance: only without TLS.
    pub fn clear_socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.wire {
            Wire::Socket(socket) if self.tls.is_none() => Some(socket.as_fd()),
            _ => None,
        }
    }

    /// The socket, given up; `None` for a pair of descriptors or a channel with TLS.
    pub fn into_socket(self) -> Option<OwnedFd> {
        match self.wire {
            Wire::Socket(socket) if self.tls.is_none() => Some(socket),
            _ => None,
        }
    }

    /// Carries out the handshake of `session`; from then on everything goes through it. Nothing that the peer has sent
    /// may be waiting in a buffer of the caller's.
    ///
    /// # Errors
    /// The connection, or the session's rules. The channel is of no use then.
    pub fn start_tls(&mut self, session: Box<dyn Session>) -> io::Result<()> {
        let tls = Tls { session: Mutex::new(session), outgoing: Mutex::new(vec![]) };
        let tls = self.tls.insert(tls);
        let mut ciphertext = vec![0; CIPHERTEXT_BYTES];
        loop {
            tls.send_pending(&self.wire)?;
            if !tls.session.lock().handshaking() {
                return Ok(());
            }
            let received = self.wire.receive(&mut ciphertext)?;
            if received == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the peer left during the TLS handshake",
                ));
            }
            let fed = tls.session.lock().feed(&ciphertext[..received]);
            if let Err(error) = fed {
                // The alert says what was wrong, if it can still be sent.
                let _ = tls.send_pending(&self.wire);
                return Err(error);
            }
        }
    }

    /// Receives some bytes: at least one, or 0 at the end of the connection.
    ///
    /// # Errors
    /// The connection, or the session's rules.
    pub fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => self.wire.receive(buf),
            Some(tls) => tls.receive(&self.wire, buf),
        }
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// As [`receive`](Self::receive); `UnexpectedEof` if the connection ends before.
    pub fn receive_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.receive(buf)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => buf = &mut buf[received..],
            }
        }
        Ok(())
    }

    /// Sends all bytes of all parts.
    ///
    /// # Errors
    /// The connection, or the session's rules. Some bytes may have been sent.
    pub fn send(&self, parts: &[&[u8]]) -> io::Result<()> {
        match &self.tls {
            None => self.wire.send(parts, MsgFlags::empty()),
            Some(tls) => tls.send(&self.wire, parts),
        }
    }

    /// Sends bytes that more will follow soon (`MSG_MORE`).
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_more(&self, parts: &[&[u8]]) -> io::Result<()> {
        match &self.tls {
            None => self.wire.send(parts, MSG_MORE),
            Some(tls) => tls.send(&self.wire, parts),
        }
    }

    /// Something that ends the connection from outside, while somebody else uses the channel.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub fn shutter(&self) -> io::Result<Shutter> {
        let clones = self.wire.descriptors().map(|fd| fd.map(OwnedFd::try_clone).transpose());
        let [one, other, stop] = clones;
        Ok(Shutter { descriptors: [one?, other?, stop?] })
    }

    /// Ends the connection in both directions: whoever waits on it is woken. Of pipes, only whoever receives.
    pub fn shutdown(&self) {
        self.wire.shutdown(Shutdown::Both);
    }

    /// Ends receiving: what has arrived is still received, then comes the end.
    pub fn shutdown_receive(&self) {
        self.wire.shutdown(Shutdown::Read);
    }

    /// Ends the TLS session, if there is one, and sending. Nobody else may be sending.
    pub fn close(&self) {
        if let Some(tls) = &self.tls {
            let mut out = tls.outgoing.lock();
            out.clear();
            tls.session.lock().close(&mut out);
            // The peer may be gone already, and need not be told then.
            let _ = self.wire.send(&[&out], MsgFlags::MSG_DONTWAIT);
        }
        self.wire.shutdown(Shutdown::Write);
    }
}

impl Wire {
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let received = match self {
                Self::Socket(socket) => nix::sys::socket::recv(socket.as_raw_fd(), buf, MsgFlags::empty()),
                Self::Pair { input, stop, .. } => {
                    match stop.as_ref().map_or(Ok(true), |stop| stop.wait(input)) {
                        Ok(true) => nix::unistd::read(input, buf),
                        Ok(false) => Ok(0),
                        Err(error) => Err(error),
                    }
                }
            };
            match received {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn send(&self, parts: &[&[u8]], flags: MsgFlags) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> =
            parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            match self.send_some(rest, flags) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
            }
        }
        Ok(())
    }

    fn send_some(&self, slices: &[IoSlice<'_>], flags: MsgFlags) -> nix::Result<usize> {
        match self {
            Self::Socket(socket) => nix::sys::socket::sendmsg::<()>(
                socket.as_raw_fd(),
                slices,
                &[],
                flags | MsgFlags::MSG_NOSIGNAL,
                None,
            ),
            Self::Pair { output, .. } => nix::sys::uio::writev(output, slices),
        }
    }

    /// The one or two of the connection, and what [`Stop`] has.
    fn descriptors(&self) -> [Option<&OwnedFd>; 3] {
        match self {
            Self::Socket(socket) => [Some(socket), None, None],
            Self::Pair { input, output, stop } => {
                [Some(input), Some(output), stop.as_ref().map(|stop| &stop.raise)]
            }
        }
    }

    fn shutdown(&self, how: Shutdown) {
        shut(self.descriptors(), how);
    }
}

fn shut([one, other, stop]: [Option<&OwnedFd>; 3], how: Shutdown) {
    for socket in [one, other].into_iter().flatten() {
        // A connection that has ended already, or a pipe.
        let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), how);
    }
    if let Some(stop) = stop.filter(|_| how != Shutdown::Write) {
        // A byte or so from each thread, which a pipe has room for.
        let _ = nix::unistd::write(stop, &[0]);
    }
}

/// Ends a connection from outside.
#[derive(Debug)]
pub struct Shutter {
    descriptors: [Option<OwnedFd>; 3],
}

impl Shutter {
    /// See [`Channel::shutdown`].
    pub fn shutdown(&self) {
        shut(self.descriptors.each_ref().map(Option::as_ref), Shutdown::Both);
    }

    /// See [`Channel::shutdown_receive`].
    pub fn shutdown_receive(&self) {
        shut(self.descriptors.each_ref().map(Option::as_ref), Shutdown::Read);
    }
}

impl Tls {
    fn receive(&self, wire: &Wire, buf: &mut [u8]) -> io::Result<usize> {
        let mut ciphertext = [0; CIPHERTEXT_BYTES];
        loop {
            {
                let mut session = self.session.lock();
                let received = session.plaintext(buf)?;
                if received > 0 || session.ended() {
                    return Ok(received);
                }
            }
            let received = wire.receive(&mut ciphertext)?;
            if received == 0 {
                let message = "the connection ended without the end of its TLS session";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            let (fed, has_to_send) = {
                let mut session = self.session.lock();
                (session.feed(&ciphertext[..received]), session.has_to_send())
            };
            if has_to_send {
                self.send_pending(wire)?;
            }
            fed?;
        }
    }

    fn send_pending(&self, wire: &Wire) -> io::Result<()> {
        self.send_sealed(wire, &[])
    }

    fn send(&self, wire: &Wire, parts: &[&[u8]]) -> io::Result<()> {
        // Small parts share a record: a header of its own record would cost the peer a call of its own.
        let mut gathered = Vec::new();
        for part in parts {
            if gathered.len() + part.len() <= PLAINTEXT_BYTES {
                gathered.extend_from_slice(part);
                continue;
            }
            if !gathered.is_empty() {
                self.send_sealed(wire, &gathered)?;
                gathered.clear();
            }
            for piece in part.chunks(PLAINTEXT_BYTES) {
                self.send_sealed(wire, piece)?;
            }
        }
        if gathered.is_empty() { Ok(()) } else { self.send_sealed(wire, &gathered) }
    }

    /// The records must leave in the order in which they were sealed, so that `outgoing` stays locked meanwhile.
    fn send_sealed(&self, wire: &Wire, plaintext: &[u8]) -> io::Result<()> {
        let mut out = self.outgoing.lock();
        out.clear();
        self.session.lock().seal(plaintext, &mut out)?;
        wire.send(&[&out], MsgFlags::empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_in_parts_arrives_in_one() {
        let (left, right) = UnixStream::pair().unwrap();
        let (left, right) = (Channel::unix(left, "left"), Channel::unix(right, "right"));
        left.send(&[b"one ", b"", b"two"]).unwrap();
        let mut buf = [0; 7];
        right.receive_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"one two");
        left.close();
        assert_eq!(right.receive(&mut buf).unwrap(), 0);
        right.receive_exact(&mut buf).unwrap_err();
    }

    #[test]
    fn a_shutdown_wakes_whoever_waits() {
        let (left, _right) = UnixStream::pair().unwrap();
        let left = std::sync::Arc::new(Channel::unix(left, "left"));
        let waiting = std::thread::spawn({
            let left = std::sync::Arc::clone(&left);
            move || left.receive(&mut [0; 1]).unwrap()
        });
        left.shutdown();
        assert_eq!(waiting.join().unwrap(), 0);
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_not_a_signal() {
        let (left, right) = UnixStream::pair().unwrap();
        drop(right);
        Channel::unix(left, "left").send(&[b"hello"]).unwrap_err();
    }
}
