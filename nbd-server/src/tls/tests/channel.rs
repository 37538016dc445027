//! Sessions inside of channels, over a socket: what the server and the client use.

use std::io;
use std::os::unix::net::UnixStream;
use std::thread;

use super::authority::Authority;
use crate::channel::{Channel, Session};
use crate::tls::client::{self, Options};
use crate::tls::server;
use crate::tls::{ClientTls, ServerTls};

fn configs() -> (ServerTls, ClientTls) {
    let authority = Authority::with_both();
    let server = server::Config::from_dir(authority.dir(), true).unwrap();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    (ServerTls::X509(server), ClientTls::X509(client))
}

fn sessions() -> (Box<dyn Session>, Box<dyn Session>) {
    let (server, client) = configs();
    (server.session().unwrap(), client.session("localhost").unwrap())
}

/// Two channels after the handshake.
pub(super) fn connect(server: Box<dyn Session>, client: Box<dyn Session>) -> io::Result<(Channel, Channel)> {
    let (left, right) = UnixStream::pair()?;
    let (mut left, mut right) = (Channel::unix(left, "left"), Channel::unix(right, "right"));
    let other = thread::spawn(move || right.start_tls(client).map(|()| right));
    left.start_tls(server)?;
    Ok((left, other.join().unwrap()?))
}

/// Megabytes in both directions at once, each side checking what it gets.
pub(super) fn both_directions(left: &Channel, right: &Channel) {
    const PIECE: usize = 100_003;
    let pattern = |seed: usize| -> Vec<u8> {
        (0..PIECE).map(|i| u8::try_from((i * 7 + seed) % 251).unwrap()).collect()
    };
    let send = |channel: &Channel, seed: usize| {
        for round in 0..60 {
            channel.send(&[&pattern(seed + round)[..5], &pattern(seed + round)[5..]]).unwrap();
        }
    };
    let check = |channel: &Channel, seed: usize| {
        let mut buf = vec![0; PIECE];
        for round in 0..60 {
            channel.receive_exact(&mut buf).unwrap();
            assert!(buf == pattern(seed + round), "round {round}");
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| send(left, 1));
        scope.spawn(|| send(right, 100));
        scope.spawn(|| check(left, 100));
        scope.spawn(|| check(right, 1));
    });
}

#[test]
fn much_in_both_directions_at_once() {
    let (server, client) = sessions();
    let (left, right) = connect(server, client).unwrap();
    both_directions(&left, &right);
    assert_eq!(left.tls_peer().as_deref(), Some("CN=client,O=Example\\, Inc.,C=GB"));
}

#[test]
fn the_end_is_told_from_an_accident() {
    let (server, client) = sessions();
    let (left, right) = connect(server, client).unwrap();
    left.send(&[b"whole"]).unwrap();
    left.close();
    right.receive_exact(&mut [0; 5]).unwrap();
    assert_eq!(right.receive(&mut [0; 1]).unwrap(), 0);

    let (server, client) = sessions();
    let (left, right) = connect(server, client).unwrap();
    left.send(&[b"half"]).unwrap();
    left.shutdown();
    right.receive_exact(&mut [0; 4]).unwrap();
    assert_eq!(right.receive(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn whoever_is_refused_hears_why() {
    let authority = Authority::with_both();
    std::fs::remove_file(authority.file("client-cert.pem")).unwrap();
    let server = server::Config::from_dir(authority.dir(), true).unwrap();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    let (left, right) = UnixStream::pair().unwrap();
    let (mut left, mut right) = (Channel::unix(left, "left"), Channel::unix(right, "right"));
    let session = client.session("localhost").unwrap();
    let other = thread::spawn(move || {
        // In TLS 1.3 the client is done before the server has looked at its certificate.
        right.start_tls(session)?;
        right.receive(&mut [0; 1])
    });
    let error = left.start_tls(server.session().unwrap()).unwrap_err();
    assert!(error.to_string().contains("no certificate"), "{error}");
    let error = other.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("wants a certificate of ours"), "{error}");
}
