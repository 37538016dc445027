//! Shared keys: who has one, and who has not.

use std::io;
use std::path::PathBuf;

use proptest::prelude::*;

use super::{authority::Authority, channel, exchange, hostile, say};
use crate::channel::Session;
use crate::tls::client::{self, Options};
use crate::tls::psk::{Client, Server};
use crate::tls::server;

/// A file of keys in a folder that goes away.
struct File(tempfile::TempDir);

impl File {
    fn new(text: &str) -> Self {
        let file = Self(tempfile::tempdir().unwrap());
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("keys.psk")
    }
}

const KEYS: &str = "alice:00112233445566778899aabbccddeeff\nqemu:ffeeddccbbaa99887766554433221100\n";

fn meet(server: &Server, client: &Client) -> io::Result<(Box<dyn Session>, Box<dyn Session>)> {
    let (mut server, mut client) = (server.session()?, client.session("")?);
    exchange(&mut *client, &mut *server)?;
    assert!(!server.handshaking() && !client.handshaking());
    Ok((server, client))
}

#[test]
fn who_has_the_key_comes_in() {
    let file = File::new(KEYS);
    let server = Server::from_file(&file.path()).unwrap();
    let client = Client::from_file(&file.path(), Some("alice")).unwrap();
    let (mut server_side, mut client_side) = meet(&server, &client).unwrap();
    let much: Vec<u8> = (0..1_000_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    assert!(say(&mut *client_side, &mut *server_side, &much) == much);
    assert!(say(&mut *server_side, &mut *client_side, &much) == much);
    assert_eq!(server_side.peer().as_deref(), Some("alice"));
    assert_eq!(client_side.peer(), None);
    // QEMU's folder and QEMU's name.
    let client = Client::from_dir(file.0.path(), None).unwrap();
    let (server_side, _) = meet(&Server::from_dir(file.0.path()).unwrap(), &client).unwrap();
    assert_eq!(server_side.peer().as_deref(), Some("qemu"));
}

#[test]
fn who_has_another_key_or_none_stays_outside() {
    let server = Server::from_file(&File::new(KEYS).path()).unwrap();
    let refused = |keys: &str| {
        let client = Client::from_file(&File::new(keys).path(), None).unwrap();
        meet(&server, &client).map(|_| ()).unwrap_err().to_string()
    };
    let message = refused("alice:11112233445566778899aabbccddeeff");
    assert!(message.contains("'alice', but has another key"), "{message}");
    let message = refused("mallory:00112233445566778899aabbccddeeff");
    assert!(message.contains("no key of user 'mallory'"), "{message}");
}

#[test]
fn keys_that_are_read_again_hold_for_those_who_come_then() {
    let file = File::new(KEYS);
    let server = Server::from_file(&file.path()).unwrap();
    let client = Client::from_file(&file.path(), Some("alice")).unwrap();
    file.write("bob:22\n");
    meet(&server, &client).unwrap();
    server.reload().unwrap();
    meet(&server, &client).map(|_| ()).unwrap_err();
    file.write("nonsense");
    server.reload().unwrap_err();
    meet(&server, &Client::from_file(&File::new("bob:22").path(), None).unwrap()).unwrap();
}

/// Neither side is talked into the other way of doing it.
#[test]
fn certificates_are_no_substitute() {
    let authority = Authority::with_both();
    let file = File::new(KEYS);
    let mut with_key = Client::from_dir(file.0.path(), None).unwrap().session("").unwrap();
    let mut with_certificate = server::Config::from_dir(authority.dir(), false).unwrap().session().unwrap();
    exchange(&mut *with_key, &mut *with_certificate).unwrap_err();
    assert!(with_key.handshaking());

    let mut with_key = Server::from_dir(file.0.path()).unwrap().session().unwrap();
    let options = Options { verify_peer: false, ..Options::default() };
    let mut with_certificate =
        client::Config::from_dir(authority.dir(), options).unwrap().session("x").unwrap();
    let error = exchange(&mut *with_certificate, &mut *with_key).unwrap_err();
    assert!(error.to_string().contains("has not shown a key"), "{error}");
}

/// OpenSSL itself as the server that has a certificate: the client must not take that for the key.
#[test]
fn a_client_with_a_key_does_not_trust_certificates() {
    use openssl::ssl::{Ssl, SslContext, SslFiletype, SslMethod};
    let authority = Authority::with_both();
    let mut builder = SslContext::builder(SslMethod::tls_server()).unwrap();
    builder.set_certificate_chain_file(authority.file("server-cert.pem")).unwrap();
    builder.set_private_key_file(authority.file("server-key.pem"), SslFiletype::PEM).unwrap();
    let ssl = Ssl::new(&builder.build()).unwrap();
    let (left, right) = std::os::unix::net::UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || ssl.accept(left).map(|_| ()).map_err(|_| ()));
    let file = File::new(KEYS);
    let session = Client::from_dir(file.0.path(), None).unwrap().session("").unwrap();
    let error = crate::channel::Channel::unix(right, "right").start_tls(session).unwrap_err();
    assert!(error.to_string().contains("certificate verify failed"), "{error}");
    server.join().unwrap().unwrap_err();
}

#[test]
fn much_in_both_directions_at_once() {
    let file = File::new(KEYS);
    let server = Server::from_dir(file.0.path()).unwrap().session().unwrap();
    let client = Client::from_dir(file.0.path(), None).unwrap().session("").unwrap();
    let (left, right) = channel::connect(server, client).unwrap();
    channel::both_directions(&left, &right);
    left.close();
    assert_eq!(right.receive(&mut [0; 1]).unwrap(), 0);
    assert_eq!(left.tls_peer().as_deref(), Some("qemu"));
}

#[test]
fn an_end_that_is_none_is_an_error() {
    let file = File::new(KEYS);
    let server = Server::from_dir(file.0.path()).unwrap().session().unwrap();
    let client = Client::from_dir(file.0.path(), None).unwrap().session("").unwrap();
    let (left, right) = channel::connect(server, client).unwrap();
    left.shutdown();
    assert_eq!(right.receive(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_instead_of_a_handshake(bytes in proptest::collection::vec(any::<u8>(), 0..600), record in any::<bool>()) {
        let mut bytes = bytes;
        if record {
            bytes.splice(0..0, [22, 3, 1, 0, 200]);
        }
        let file = File::new(KEYS);
        hostile::survive(&mut *Server::from_dir(file.0.path()).unwrap().session().unwrap(), &bytes);
        hostile::survive(&mut *Client::from_dir(file.0.path(), None).unwrap().session("").unwrap(), &bytes);
    }

    #[test]
    fn one_bit_changed_anywhere(at in any::<prop::sample::Index>(), bit in 0_u8..8, step in 0..4) {
        let file = File::new(KEYS);
        let mut server = Server::from_dir(file.0.path()).unwrap().session().unwrap();
        let mut client = Client::from_dir(file.0.path(), None).unwrap().session("").unwrap();
        let mut wire = vec![];
        for turn in 0..4 {
            let (from, to) = if turn % 2 == 0 { (&mut client, &mut server) } else { (&mut server, &mut client) };
            wire.clear();
            let words: &[u8] = if from.handshaking() { b"" } else { b"words" };
            from.seal(words, &mut wire).unwrap();
            if wire.is_empty() {
                break;
            }
            if turn == step {
                let at = at.index(wire.len());
                wire[at] ^= 1 << bit;
                hostile::survive(&mut **to, &wire);
                break;
            }
            to.feed(&wire).unwrap();
        }
    }
}
