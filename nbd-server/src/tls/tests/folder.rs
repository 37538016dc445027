//! Every file that is not as it should be is named, and what to do is said.

use rcgen::{KeyPair, date_time_ymd};

use super::authority::{self, Authority};
use crate::tls::client::{self, Options};
use crate::tls::server;

fn server_error(authority: &Authority, verify_peer: bool) -> block::Error {
    server::Config::from_dir(authority.dir(), verify_peer).unwrap_err()
}

#[track_caller]
fn says(error: &block::Error, words: &[&str]) {
    let text = format!("{error:?}");
    assert!(!error.hints().is_empty(), "no hint: {text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn a_folder_that_is_none() {
    let authority = Authority::with_both();
    let file = authority.file("ca-cert.pem");
    says(&server::Config::from_dir(&file, false).unwrap_err(), &["ca-cert.pem", "it is a file"]);
    let nowhere = authority.file("nowhere");
    says(&client::Config::from_dir(&nowhere, Options::default()).unwrap_err(), &["nowhere", "No such file"]);
}

#[test]
fn files_that_are_missing() {
    let authority = Authority::with_both();
    let lacks = |name: &str| {
        let authority = Authority::with_both();
        std::fs::remove_file(authority.file(name)).unwrap();
        authority
    };
    says(&server_error(&lacks("server-cert.pem"), false), &["server-cert.pem"]);
    says(&server_error(&lacks("server-key.pem"), false), &["server-key.pem"]);
    says(&server_error(&lacks("ca-cert.pem"), true), &["ca-cert.pem"]);
    server::Config::from_dir(lacks("ca-cert.pem").dir(), false).unwrap();
    let error = client::Config::from_dir(lacks("ca-cert.pem").dir(), Options::default()).unwrap_err();
    says(&error, &["ca-cert.pem"]);
    let careless = Options { verify_peer: false, ..Options::default() };
    client::Config::from_dir(lacks("ca-cert.pem").dir(), careless).unwrap();
    client::Config::from_dir(lacks("client-cert.pem").dir(), Options::default()).unwrap();
    drop(authority);
}

#[test]
fn files_that_are_something_else() {
    let authority = Authority::with_both();
    let put = |name: &str, text: &str| {
        let authority = Authority::with_both();
        std::fs::write(authority.file(name), text).unwrap();
        authority
    };
    let certificate = std::fs::read_to_string(authority.file("server-cert.pem")).unwrap();
    let key = std::fs::read_to_string(authority.file("server-key.pem")).unwrap();
    says(
        &server_error(&put("server-cert.pem", &key), false),
        &["server-cert.pem", "no certificate", "BEGIN CERTIFICATE"],
    );
    says(&server_error(&put("server-key.pem", &certificate), false), &["server-key.pem", "no private key"]);
    says(&server_error(&put("server-cert.pem", ""), false), &["server-cert.pem", "no certificate"]);
    says(
        &server_error(&put("server-cert.pem", &certificate[..100]), false),
        &["server-cert.pem", "not good PEM"],
    );
    says(&server_error(&put("ca-cert.pem", "x"), true), &["ca-cert.pem", "no certificate"]);
    says(&server_error(&put("ca-crl.pem", &certificate), true), &["ca-crl.pem", "BEGIN X509 CRL"]);
    let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    says(
        &server_error(&put("server-cert.pem", nonsense), false),
        &["server-cert.pem", "cannot be understood"],
    );
    let protected = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    says(&server_error(&put("server-key.pem", protected), false), &["server-key.pem", "passphrase"]);
}

#[test]
fn a_key_of_another_certificate() {
    let authority = Authority::with_both();
    let other = KeyPair::generate().unwrap().serialize_pem();
    std::fs::write(authority.file("server-key.pem"), other).unwrap();
    says(&server_error(&authority, false), &["server-key.pem", "does not belong", "server-cert.pem"]);
}

#[test]
fn a_certificate_out_of_date() {
    let authority = Authority::new();
    let mut params = authority::server();
    params.not_after = date_time_ymd(2020, 5, 6);
    authority.sign("server", params.clone());
    says(&server_error(&authority, false), &["server-cert.pem", "expired", "2020-05-06"]);
    params.not_before = date_time_ymd(2999, 1, 1);
    params.not_after = date_time_ymd(3000, 1, 1);
    authority.sign("server", params);
    says(&server_error(&authority, false), &["server-cert.pem", "not valid before", "2999-01-01"]);
}
