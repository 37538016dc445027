//! Who is let in and who is not.

use std::io;

use rcgen::{DnType, ExtendedKeyUsagePurpose, date_time_ymd};

use super::authority::{self, Authority};
use super::{exchange, say};
use crate::channel::Session;
use crate::tls::authz::{Authz, Rule};
use crate::tls::client::{self, Options};
use crate::tls::server;

type Pair = (Box<dyn Session>, Box<dyn Session>);

/// Both sides of one folder, after the handshake.
fn pair(authority: &Authority, verify_peer: bool) -> io::Result<Pair> {
    let server = server::Config::from_dir(authority.dir(), verify_peer).unwrap();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    meet(&server, &client, "localhost")
}

fn meet(server: &server::Config, client: &client::Config, hostname: &str) -> io::Result<Pair> {
    let (mut server, mut client) = (server.session()?, client.session(hostname)?);
    exchange(&mut *client, &mut *server)?;
    assert!(!server.handshaking() && !client.handshaking());
    Ok((server, client))
}

fn refused(result: io::Result<Pair>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn both_sides_talk_and_know_each_other() {
    let (mut server, mut client) = pair(&Authority::with_both(), true).unwrap();
    assert_eq!(say(&mut *client, &mut *server, b"hello"), b"hello");
    let much: Vec<u8> = (0..1_000_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    assert_eq!(say(&mut *server, &mut *client, &much), much);
    assert_eq!(server.peer().as_deref(), Some("CN=client,O=Example\\, Inc.,C=GB"));
    assert!(client.peer().unwrap().starts_with("CN=server"));
}

#[test]
fn a_client_without_a_certificate_comes_in_only_where_none_is_required() {
    let authority = Authority::new();
    authority.sign("server", authority::server());
    let (server, _client) = pair(&authority, false).unwrap();
    assert_eq!(server.peer(), None);
    assert!(refused(pair(&authority, true)).contains("has shown no certificate"));
}

#[test]
fn certificates_of_another_authority_do_not_count() {
    let (ours, theirs) = (Authority::with_both(), Authority::with_both());
    let server = server::Config::from_dir(ours.dir(), true).unwrap();
    let client = client::Config::from_dir(theirs.dir(), Options::default()).unwrap();
    assert!(refused(meet(&server, &client, "localhost")).contains("not signed by an authority"));
    // A client that does not mind who the server is still has to be somebody itself.
    let careless = Options { verify_peer: false, ..Options::default() };
    let client = client::Config::from_dir(theirs.dir(), careless.clone()).unwrap();
    assert!(refused(meet(&server, &client, "localhost")).contains("not signed by an authority"));
    let server = server::Config::from_dir(ours.dir(), false).unwrap();
    meet(&server, &client, "anything at all").unwrap();
}

#[test]
fn the_server_has_to_have_the_right_name() {
    let authority = Authority::with_both();
    let server = server::Config::from_dir(authority.dir(), false).unwrap();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    meet(&server, &client, "127.0.0.1").unwrap();
    let message = refused(meet(&server, &client, "example.org"));
    assert!(message.contains("'example.org'") && message.contains("localhost"), "{message}");
    assert!(refused(meet(&server, &client, "[::1]")).contains("::1"));
    assert!(refused(meet(&server, &client, "")).contains("tls-hostname"));
    assert!(refused(meet(&server, &client, "no name")).contains("tls-hostname"));
    let named = Options { hostname: Some("localhost".into()), ..Options::default() };
    let client = client::Config::from_dir(authority.dir(), named).unwrap();
    meet(&server, &client, "").unwrap();
    meet(&server, &client, "example.org").unwrap();
}

/// GnuTLS accepts it, so there are such servers.
#[test]
fn a_certificate_without_proper_names_may_use_its_common_name() {
    let authority = Authority::new();
    let mut params = authority::server();
    params.subject_alt_names.clear();
    params.distinguished_name.push(DnType::CommonName, "old.example.org");
    authority.sign("server", params.clone());
    let server = server::Config::from_dir(authority.dir(), false).unwrap();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    meet(&server, &client, "OLD.example.org").unwrap();
    refused(meet(&server, &client, "new.example.org"));
    // Everything else must be right nevertheless: the authority,
    let other = Authority::new();
    let strict = client::Config::from_dir(other.dir(), Options::default()).unwrap();
    assert!(refused(meet(&server, &strict, "old.example.org")).contains("not signed by an authority"));
    // the list of those that count no more,
    params.serial_number = Some(4711.into());
    authority.sign("server", params.clone());
    authority.revoke(4711, 3000);
    server.reload().unwrap();
    let strict = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    assert!(refused(meet(&server, &strict, "old.example.org")).contains("revoked"));
    // and there is no way around proper names.
    params.serial_number = None;
    params.subject_alt_names = authority::server().subject_alt_names;
    authority.sign("server", params);
    server.reload().unwrap();
    refused(meet(&server, &client, "old.example.org"));
    meet(&server, &client, "localhost").unwrap();
}

#[test]
fn revoked_certificates_do_not_count() {
    let authority = Authority::with_both();
    authority.revoke(1, 3000);
    pair(&authority, true).unwrap();
    authority.revoke_client();
    assert!(refused(pair(&authority, true)).contains("revoked"));
    // A list that is out of date may lack the one that matters.
    authority.revoke(1, 2021);
    assert!(refused(pair(&authority, true)).contains("has expired 2021-01-01"));
}

#[test]
fn certificates_out_of_date_do_not_count() {
    let authority = Authority::with_both();
    let server = server::Config::from_dir(authority.dir(), true).unwrap();
    let mut params = authority::client();
    params.not_after = date_time_ymd(2001, 2, 3);
    authority.sign("client", params);
    // Our own client would not even try.
    let error = client::Config::from_dir(authority.dir(), Options::default()).unwrap_err();
    assert!(
        error.to_string().contains("client-cert.pem': the certificate has expired at 2001-02-03"),
        "{error}"
    );
    drop(server);
}

#[test]
fn a_servers_certificate_does_not_make_a_client() {
    let authority = Authority::with_both();
    let mut params = authority::client();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    authority.sign("client", params);
    assert!(refused(pair(&authority, true)).contains("purpose"));
}

#[test]
fn of_good_certificates_only_those_on_the_list_come_in() {
    let authority = Authority::with_both();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    let allowed = |authz: Authz| {
        let server = server::Config::with_authz(authority.dir(), authz).unwrap();
        meet(&server, &client, "localhost").map(|_| ())
    };
    let name = "CN=client,O=Example\\, Inc.,C=GB";
    allowed(Authz::Simple { identity: name.into() }).unwrap();
    let error = allowed(Authz::Simple { identity: "CN=other".into() }).unwrap_err();
    assert!(error.to_string().contains("not among those"), "{error}");
    let rule = Rule { pattern: "CN=client,*".into(), glob: true, allowed: true };
    allowed(Authz::List { rules: vec![rule], otherwise_allowed: false }).unwrap();
}

#[test]
fn what_is_read_again_holds_for_those_who_come_then() {
    let authority = Authority::with_both();
    let server = server::Config::from_dir(authority.dir(), true).unwrap();
    let shared = server.clone();
    let client = client::Config::from_dir(authority.dir(), Options::default()).unwrap();
    meet(&shared, &client, "localhost").unwrap();
    authority.revoke_client();
    meet(&shared, &client, "localhost").unwrap();
    server.reload().unwrap();
    refused(meet(&shared, &client, "localhost"));
    // What cannot be read changes nothing.
    std::fs::remove_file(authority.file("ca-crl.pem")).unwrap();
    std::fs::write(authority.file("server-key.pem"), "nonsense").unwrap();
    server.reload().unwrap_err();
    assert!(refused(meet(&shared, &client, "localhost")).contains("revoked"));
}

#[test]
fn the_end_is_told() {
    let (mut server, mut client) = pair(&Authority::with_both(), true).unwrap();
    let mut wire = vec![];
    client.seal(b"last words", &mut wire).unwrap();
    client.close(&mut wire);
    // What a man in the middle appends is not part of it.
    wire.extend_from_slice(b"\x17\x03\x03\x00\x10garbage after end");
    server.feed(&wire).unwrap();
    assert!(!server.ended());
    assert_eq!(super::read_all(&mut *server), b"last words");
    assert!(server.ended());
    // The other direction may go on, but whoever has closed does not listen.
    assert_eq!(say(&mut *server, &mut *client, b"answer"), b"");
    assert!(client.ended());
}
