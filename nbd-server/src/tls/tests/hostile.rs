//! Bytes that are not TLS: an error at most.

use proptest::prelude::*;

use super::authority::Authority;
use super::{exchange, read_all};
use crate::channel::Session;
use crate::tls::client::{self, Options};
use crate::tls::server;

/// Both sides, before the handshake.
fn fresh() -> (Box<dyn Session>, Box<dyn Session>) {
    use std::sync::OnceLock;
    static CONFIGS: OnceLock<(server::Config, client::Config)> = OnceLock::new();
    let (server, client) = CONFIGS.get_or_init(|| {
        let authority = Authority::with_both();
        let server = server::Config::from_dir(authority.dir(), true).unwrap();
        (server, client::Config::from_dir(authority.dir(), Options::default()).unwrap())
    });
    (server.session().unwrap(), client.session("localhost").unwrap())
}

/// Everything a channel does with a session, whatever comes.
pub(super) fn survive(session: &mut dyn Session, bytes: &[u8]) {
    let mut out = vec![];
    for piece in bytes.chunks(97) {
        let failed = session.feed(piece).is_err();
        let _ = session.plaintext(&mut [0; 10]);
        let _ = session.seal(&[], &mut out);
        let _ = (session.handshaking(), session.has_to_send(), session.ended(), session.peer());
        if failed {
            break;
        }
    }
    let _ = session.seal(b"words", &mut out);
    session.close(&mut out);
    let _ = session.feed(bytes);
    assert!(!format!("{session:?}").is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn garbage_instead_of_a_handshake(bytes in proptest::collection::vec(any::<u8>(), 0..600), record in any::<bool>()) {
        let mut bytes = bytes;
        if record {
            bytes.splice(0..0, [22, 3, 1, 0, 200]);
        }
        let (mut server, mut client) = fresh();
        survive(&mut *server, &bytes);
        survive(&mut *client, &bytes);
    }

    #[test]
    fn a_handshake_with_one_bit_changed(at in any::<prop::sample::Index>(), bit in 0_u8..8, server_side in any::<bool>()) {
        let (mut server, mut client) = fresh();
        let mut wire = vec![];
        client.seal(&[], &mut wire).unwrap();
        if server_side {
            let at = at.index(wire.len());
            wire[at] ^= 1 << bit;
            survive(&mut *server, &wire);
        } else {
            server.feed(&wire).unwrap();
            wire.clear();
            server.seal(&[], &mut wire).unwrap();
            let at = at.index(wire.len());
            wire[at] ^= 1 << bit;
            survive(&mut *client, &wire);
        }
    }

    #[test]
    fn a_record_with_one_bit_changed_says_nothing_else(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let (mut server, mut client) = fresh();
        exchange(&mut *client, &mut *server).unwrap();
        let mut wire = vec![];
        client.seal(&[7; 100], &mut wire).unwrap();
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        if server.feed(&wire).is_ok() {
            // More is waited for, for the length has grown; or it was the version, which says nothing in TLS 1.3.
            let read = read_all(&mut *server);
            prop_assert!(read.is_empty() || read == [7; 100]);
        }
    }
}

#[test]
fn nbd_in_the_clear_is_refused() {
    let (mut server, _) = fresh();
    let error = server.feed(b"IHAVEOPT\0\0\0\x07\0\0\0\0").unwrap_err();
    assert!(error.to_string().contains("not TLS"), "{error}");
    // And an alert says so.
    let mut alert = vec![];
    server.seal(&[], &mut alert).unwrap();
    assert_eq!(alert.first(), Some(&21));
}
