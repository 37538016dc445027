//! TLS of `vimg serve` before the eyes of GnuTLS: certificates by certtool, keys by psktool, clients of libnbd and QEMU.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use tests::command::Ran;
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, requires};

/// A folder with an image of one mebibyte, and what belongs to an authority in folders below it.
struct Place(Dir);

/// A server, until it goes out of scope.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    fn new() -> Self {
        let dir = Dir::new();
        dir.write("disk.raw", &[7; 1 << 20]);
        Self(dir)
    }

    fn certtool(&self, words: &str) {
        Cmd::new("certtool").dir(self.0.path()).words(words).ok();
    }

    /// Makes `folder` with an authority, a server by the name `localhost` and a client.
    fn authority(&self, folder: &str) {
        std::fs::create_dir(self.0.file(folder)).unwrap();
        let ca = "cn = Authority\nca\ncert_signing_key\ncrl_signing_key\nexpiration_days = 30\n";
        self.0.write("ca.info", ca.as_bytes());
        self.certtool(&format!("--generate-privkey --key-type ecdsa --outfile {folder}/ca-key.pem"));
        self.certtool(&format!(
            "--generate-self-signed --load-privkey {folder}/ca-key.pem --template ca.info --outfile {folder}/ca-cert.pem"
        ));
        self.sign(
            folder,
            "server",
            "cn = server\ndns_name = localhost\ntls_www_server\nencryption_key\nsigning_key\nexpiration_days = 30\n",
        );
        self.sign(folder, "client", CLIENT);
    }

    /// Only a certificate of RSA may say all that QEMU insists on (`encryption_key`); the authorities' are of ECDSA.
    fn sign(&self, folder: &str, side: &str, template: &str) {
        self.0.write("template.info", template.as_bytes());
        self.certtool(&format!(
            "--generate-privkey --key-type rsa --bits 2048 --outfile {folder}/{side}-key.pem"
        ));
        self.certtool(&format!(
            "--generate-certificate --load-ca-certificate {folder}/ca-cert.pem --load-ca-privkey {folder}/ca-key.pem \
             --load-privkey {folder}/{side}-key.pem --template template.info --outfile {folder}/{side}-cert.pem"
        ));
    }

    /// Serves the image on the socket `s` with these options.
    fn serve(&self, options: &str) -> Served {
        let _ = std::fs::remove_file(self.0.file("s"));
        let child = self.0.vimg_cmd(&format!("serve --format raw --socket s {options} disk.raw")).spawn();
        let served = Served(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(self.0.file("s")).is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        served
    }

    /// nbdinfo with TLS, by the certificates in a folder.
    fn nbdinfo(&self, folder: &str) -> Ran {
        let here = self.0.path().display();
        let uri = format!("nbds+unix:///?socket={here}/s&tls-certificates={here}/{folder}");
        Cmd::new("nbdinfo").arg("--size").arg(uri).run()
    }

    fn nbdinfo_in_the_clear(&self) -> Ran {
        Cmd::new("nbdinfo")
            .arg("--size")
            .arg(format!("nbd+unix:///?socket={}/s", self.0.path().display()))
            .run()
    }

    /// qemu-img with TLS: the object is called `t`.
    fn qemu(&self, object: &str, more: &str) -> Ran {
        Cmd::new("qemu-img")
            .dir(self.0.path())
            .words("info --object")
            .arg(object)
            .arg("--image-opts")
            .arg(format!("driver=nbd,path=s,tls-creds=t{more}"))
            .run()
    }
}

const CLIENT: &str = "country = GB\norganization = Example\ncn = client\nserial = 77\ntls_www_client\nencryption_key\nsigning_key\nexpiration_days = 30\n";
const SIZE: &str = "1048576";

#[test]
fn certificates_of_gnutls_are_understood_in_both_versions() {
    requires!(qemu(), tool("certtool"), tool("nbdinfo"));
    let place = Place::new();
    place.authority("pki");
    let _served = place.serve("--tls-dir pki --tls-verify-peer");
    place.nbdinfo("pki").expect_code(0).expect_stdout(SIZE);
    for version in ["1.2", "1.3"] {
        let priority = format!("NORMAL:-VERS-ALL:+VERS-TLS{version}");
        let object = format!("tls-creds-x509,id=t,dir=pki,endpoint=client,priority={priority}");
        place.qemu(&object, ",tls-hostname=localhost").expect_code(0).expect_stdout("1 MiB");
    }
    let old = "tls-creds-x509,id=t,dir=pki,endpoint=client,priority=NORMAL:-VERS-ALL:+VERS-TLS1.1";
    place.qemu(old, ",tls-hostname=localhost").expect_code(1);
    // A name that the certificate does not have.
    let object = "tls-creds-x509,id=t,dir=pki,endpoint=client";
    place
        .qemu(object, ",tls-hostname=example.org")
        .expect_code(1)
        .expect_stderr("does not match the hostname");
    // Forced is forced.
    place.nbdinfo_in_the_clear().expect_code(1);
}

#[test]
fn clients_without_a_good_certificate_stay_outside() {
    requires!(tool("certtool"), tool("nbdinfo"));
    let place = Place::new();
    place.authority("pki");
    place.authority("other");
    std::fs::create_dir(place.0.file("none")).unwrap();
    place.0.write("none/ca-cert.pem", &place.0.read("pki/ca-cert.pem"));
    // A stranger: it trusts the server, but its certificate is by somebody else.
    place.0.write("other/ca-cert.pem", &place.0.read("pki/ca-cert.pem"));
    {
        let _served = place.serve("--tls-dir pki --tls-verify-peer");
        place.nbdinfo("none").expect_code(1);
        place.nbdinfo("other").expect_code(1);
        place.nbdinfo("pki").expect_code(0);
    }
    {
        let _served = place.serve("--tls-dir pki");
        place.nbdinfo("none").expect_code(0).expect_stdout(SIZE);
    }
    place.0.write("revoke.info", b"expiration_days = 30\n");
    place.certtool(
        "--generate-crl --load-ca-privkey pki/ca-key.pem --load-ca-certificate pki/ca-cert.pem \
         --load-certificate pki/client-cert.pem --template revoke.info --outfile pki/ca-crl.pem",
    );
    // Only the server shall know of the list.
    std::fs::create_dir(place.0.file("revoked")).unwrap();
    for name in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        place.0.write(&format!("revoked/{name}"), &place.0.read(&format!("pki/{name}")));
    }
    let _served = place.serve("--tls-dir pki --tls-verify-peer");
    place.nbdinfo("revoked").expect_code(1);
    place.sign("pki", "client", &CLIENT.replace("serial = 77", "serial = 78"));
    std::fs::remove_file(place.0.file("pki/ca-crl.pem")).unwrap();
    place.nbdinfo("pki").expect_code(0);
}

#[test]
fn a_server_does_not_start_with_bad_certificates() {
    requires!(tool("certtool"));
    let place = Place::new();
    place.authority("pki");
    let refused = |words: &str| {
        let ran = place.0.vimg("serve --format raw --socket s --tls-dir pki disk.raw");
        ran.expect_clean_failure().expect_stderr(words);
    };
    place.sign(
        "pki",
        "server",
        "cn = server\nactivation_date = \"2020-01-01\"\nexpiration_date = \"2020-02-02\"\n",
    );
    refused("server-cert.pem': the certificate has expired at 2020-02-0");
    place.sign("pki", "server", "cn = server\nexpiration_days = 30\n");
    place.0.write("pki/server-key.pem", &place.0.read("pki/client-key.pem"));
    refused("server-key.pem': the key does not belong to the certificate");
    std::fs::remove_file(place.0.file("pki/server-cert.pem")).unwrap();
    refused("server-cert.pem': there is no such file");
}

#[test]
fn keys_of_psktool_are_understood_in_both_versions() {
    requires!(qemu(), tool("psktool"), tool("nbdinfo"), psk());
    let place = Place::new();
    for folder in ["keys", "wrong"] {
        std::fs::create_dir(place.0.file(folder)).unwrap();
        for user in ["qemu", "alice"] {
            Cmd::new("psktool").dir(place.0.path()).words(&format!("-u {user} -p {folder}/keys.psk")).ok();
        }
    }
    let nbdinfo = |user: &str, folder: &str| {
        let here = place.0.path().display();
        let uri = format!("nbds+unix://{user}@/?socket={here}/s&tls-psk-file={here}/{folder}/keys.psk");
        Cmd::new("nbdinfo").arg("--size").arg(uri).run()
    };
    let _served = place.serve("--tls-psk keys/keys.psk");
    nbdinfo("alice", "keys").expect_code(0).expect_stdout(SIZE);
    nbdinfo("alice", "wrong").expect_code(1);
    nbdinfo("mallory", "keys").expect_code(1);
    for version in ["1.2", "1.3"] {
        let priority = format!("NORMAL:-VERS-ALL:+VERS-TLS{version}:+ECDHE-PSK:+DHE-PSK:+PSK");
        let object =
            |folder: &str| format!("tls-creds-psk,id=t,dir={folder},endpoint=client,priority={priority}");
        place.qemu(&object("keys"), "").expect_code(0).expect_stdout("1 MiB");
        place.qemu(&object("wrong"), "").expect_code(1);
    }
    place.nbdinfo_in_the_clear().expect_code(1);
}

/// A build of vimg with TLS-PSK.
fn psk() -> Result<(), String> {
    let dir = Dir::new();
    dir.write("keys", b"a:00\n");
    dir.write("disk.raw", &[0; 512]);
    // There is no client, so that it ends at once.
    let said = dir.vimg("serve --format raw --stdio --tls-psk keys disk.raw").stderr;
    if said.contains("not part of this build") {
        Err("this build of vimg has no TLS-PSK".to_owned())
    } else {
        Ok(())
    }
}

#[test]
fn certificates_are_read_again_on_sighup() {
    requires!(tool("certtool"), tool("nbdinfo"));
    let place = Place::new();
    place.authority("pki");
    place.authority("new");
    let served = place.serve("--tls-dir pki --tls-verify-peer");
    place.nbdinfo("pki").expect_code(0);
    place.nbdinfo("new").expect_code(1);
    for name in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        place.0.write(&format!("pki/{name}"), &place.0.read(&format!("new/{name}")));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(served.0.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while place.nbdinfo("new").code != Some(0) {
        assert!(Instant::now() < deadline, "nothing was read again");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn clients_may_do_without_where_it_is_optional() {
    requires!(tool("certtool"), tool("nbdinfo"));
    let place = Place::new();
    place.authority("pki");
    let _served = place.serve("--tls-dir pki --tls-optional");
    place.nbdinfo_in_the_clear().expect_code(0).expect_stdout(SIZE);
    place.nbdinfo("pki").expect_code(0).expect_stdout(SIZE);
}

#[test]
fn data_go_through_tls_unharmed() {
    requires!(tool("certtool"), tool("nbdcopy"));
    let place = Place::new();
    place.authority("pki");
    let bytes: Vec<u8> =
        (0..16_u32 << 20).map(|i| u8::try_from(i.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect();
    place.0.write("disk.raw", &bytes);
    let served = place.serve("--tls-dir pki --tls-verify-peer");
    let here = place.0.path().display();
    let uri = format!("nbds+unix:///?socket={here}/s&tls-certificates={here}/pki");
    Cmd::new("nbdcopy").dir(place.0.path()).arg(uri.as_str()).arg("copy.raw").ok();
    assert!(place.0.read("copy.raw") == bytes);
    let reversed: Vec<u8> = bytes.iter().rev().copied().collect();
    place.0.write("reversed.raw", &reversed);
    Cmd::new("nbdcopy").dir(place.0.path()).arg("--flush").arg("reversed.raw").arg(uri.as_str()).ok();
    drop(served);
    assert!(place.0.read("disk.raw") == reversed);
}

/// Whoever sits between can put words in front of the client's: after STARTTLS they must count for nothing.
#[test]
fn words_in_the_clear_after_starttls_are_not_heard() {
    requires!(tool("certtool"));
    let place = Place::new();
    place.authority("pki");
    let _served = place.serve("--tls-dir pki --tls-optional");
    let mut stream = UnixStream::connect(place.0.file("s")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let option = |number: u8| [&b"IHAVEOPT\0\0\0"[..], &[number, 0, 0, 0, 0]].concat();
    // Flags, STARTTLS, and in the same breath STRUCTURED_REPLY and LIST.
    stream.write_all(&[&[0, 0, 0, 3][..], &option(5), &option(8), &option(3)].concat()).unwrap();
    let mut heard = vec![];
    // A reset is an end as well.
    let _ = stream.read_to_end(&mut heard);
    let greeting = 18;
    let acknowledged = greeting + 20;
    assert_eq!(
        heard[greeting..acknowledged],
        [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &[0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0]].concat()
    );
    let rest = &heard[acknowledged..];
    assert!(rest.is_empty() || rest[0] == 21, "an alert of TLS at most: {rest:x?}");
}
