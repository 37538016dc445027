//! `vimg p2v --receive`: a machine comes over TLS, over connections that break, and to a receiver that is killed.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tests::command::Ran;
use tests::server::{Server, fresh_socket};
use tests::skip::tool;
use tests::{Cmd, Dir, requires};

use super::p2v::{DISK_MIB, MIB, Machine, json, leak, tools};

/// An authority with a certificate for `localhost` and one for a client.
fn authority(dir: &Dir, folder: &str) {
    std::fs::create_dir(dir.file(folder)).unwrap();
    let certtool = |words: &str| Cmd::new("certtool").dir(dir.path()).words(words).ok();
    dir.write("ca.info", b"cn = Authority\nca\ncert_signing_key\nexpiration_days = 30\n");
    certtool(&format!("--generate-privkey --key-type ecdsa --outfile {folder}/ca-key.pem"));
    certtool(&format!(
        "--generate-self-signed --load-privkey {folder}/ca-key.pem --template ca.info --outfile {folder}/ca-cert.pem"
    ));
    for (side, template) in [
        ("server", "cn = server\ndns_name = localhost\ntls_www_server\nsigning_key\nexpiration_days = 30\n"),
        ("client", "cn = client\ntls_www_client\nsigning_key\nexpiration_days = 30\n"),
    ] {
        dir.write("template.info", template.as_bytes());
        certtool(&format!("--generate-privkey --key-type ecdsa --outfile {folder}/{side}-key.pem"));
        certtool(&format!(
            "--generate-certificate --load-ca-certificate {folder}/ca-cert.pem --load-ca-privkey {folder}/ca-key.pem \
             --load-privkey {folder}/{side}-key.pem --template template.info --outfile {folder}/{side}-cert.pem"
        ));
    }
}

/// Passes connections on to a port, and cuts them all, once, when so many bytes have gone there.
fn cutter(port: u16, after: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let passed = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            for (from, to, counts) in [(near.try_clone(), far.try_clone(), true), (Ok(far), Ok(near), false)]
            {
                let (from, to, passed) = (from.unwrap(), to.unwrap(), Arc::clone(&passed));
                std::thread::spawn(move || pass(from, to, counts.then_some((&*passed, after))));
            }
        }
    });
    own
}

fn pass(mut from: TcpStream, mut to: TcpStream, limit: Option<(&AtomicU64, u64)>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
        if let Some((passed, after)) = limit {
            let before = passed.fetch_add(read as u64, Ordering::Relaxed);
            if before < after && before + read as u64 >= after {
                break;
            }
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).map(|all| all.flatten().collect()).unwrap_or(vec![]);
    let mut names: Vec<String> =
        entries.iter().map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, Some(1), "{}{}", ran.stdout, ran.stderr);
    assert!(words.iter().all(|word| ran.stderr.contains(word)), "{words:?}: {}", ran.stderr);
}

/// The whole way: authorities that do not know each other, a connection that is cut in the middle, the same command once more,
/// and a folder that `vimg v2v` takes.
#[test]
fn a_machine_comes_over_tls_and_a_connection_that_was_cut() {
    requires!(tools(), tool("certtool"));
    let machine = Machine::new();
    let dir = &machine.dir;
    authority(dir, "ours");
    authority(dir, "theirs");
    let words = "p2v --receive in --listen 127.0.0.1:0 --tls-dir ours --once";
    let mut receiver = Server::run(&dir.vimg_cmd(words), dir.file("none"));
    let port: u16 = receiver.uris[0].rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(receiver.uris[0], format!("nbds://127.0.0.1:{port}"));
    let uri = |scheme: &str, port: u16, folder: &str| {
        let here = dir.path().display();
        format!("{scheme}://127.0.0.1:{port}/web1?tls-certificates={here}/{folder}&tls-hostname=localhost")
    };
    refused(&machine.p2v("--to").arg(uri("nbds", port, "theirs")).run(), &["certificate"]);
    refused(&machine.p2v("--to").arg(format!("nbd://127.0.0.1:{port}/web1")).run(), &["TLS"]);
    // One that shows no certificate at all.
    std::fs::create_dir(dir.file("bare")).unwrap();
    std::fs::copy(dir.file("ours/ca-cert.pem"), dir.file("bare/ca-cert.pem")).unwrap();
    refused(&machine.p2v("--to").arg(uri("nbds", port, "bare")).run(), &[]);
    assert_eq!(names(&dir.file("in")), [""; 0]);
    // At this rate something has been made safe before the cut.
    let uri = uri("nbds", cutter(port, 80 * MIB), "ours");
    refused(
        &machine.p2v("--whole --threads 1 --rate 16M --to").arg(&uri).run(),
        &["the same command goes on from there"],
    );
    let partial = [".vimg-p2v-receive.json", "sda.qcow2.partial"];
    assert_eq!(names(&dir.file("in/web1")), partial);
    // Another machine does not get into its folder.
    machine.file("sys/block/sda/device/serial", "T-2\n");
    refused(&machine.p2v("--state other --to").arg(&uri).run(), &["half copied"]);
    machine.file("sys/block/sda/device/serial", "T-1\n");
    dir.poke("disk.raw", 5000, b"changed meanwhile");
    let ran = machine.p2v("--whole --verify --to").arg(&uri).ok();
    assert!(ran.stdout.contains("were there already"), "{}", ran.stdout);
    assert_eq!(receiver.wait().code, Some(0));
    assert_eq!(names(&dir.file("in/web1")), ["machine.json", "sda.qcow2"]);
    assert!(!dir.exists("vimg-p2v-state.json"));
    dir.qemu_checks("in/web1/sda.qcow2");
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.raw("in/web1/sda.qcow2")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    let folder = dir.file("in/web1");
    let guest = v2v::source::read(folder.to_str().unwrap(), &v2v::source::SourceOptions::default()).unwrap();
    let disks = v2v::source::open_disks(&guest, &image::OpenOptions::default()).unwrap();
    assert_eq!((guest.name.as_str(), disks[0].size), ("old-server", DISK_MIB * MIB));
}

/// A receiver that was killed is started again, and the copy goes on; what it had taken and not used is given back.
#[test]
fn a_receiver_that_was_killed_goes_on() {
    requires!(tools());
    let machine = Machine::new();
    let dir = &machine.dir;
    let receiver = |words: &str| {
        let socket = fresh_socket(dir);
        let cmd = dir.vimg_cmd("p2v --receive in --socket").arg(&socket).words(words);
        (Server::run(&cmd, socket.clone()), format!("nbd+unix:///?socket={}", socket.display()))
    };
    let (first, uri) = receiver("");
    let mut sender = machine.p2v("--whole --threads 1 --rate 12M --state state --to").arg(&uri).spawn();
    let state = dir.file("state");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(180);
    while !state.exists() || json(&state)["disks"][0]["done"].as_object().unwrap().is_empty() {
        assert!(
            std::time::Instant::now() < deadline && sender.try_wait().unwrap().is_none(),
            "nothing is safe"
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // Killed, as everything is that goes out of scope.
    drop(first);
    assert!(!sender.wait().unwrap().success());
    assert_eq!(names(&dir.file("in")), [".vimg-p2v-receive.json", "sda.qcow2.partial"]);
    leak(&dir.file("in/sda.qcow2.partial"));
    let (mut second, again) = receiver("--once");
    // It is where it was.
    let told = std::fs::read_to_string(&state).unwrap();
    let moved = |there: &str| told.replace(uri.split_once('=').unwrap().1, there.split_once('=').unwrap().1);
    std::fs::write(&state, moved(&again)).unwrap();
    let ran = machine.p2v("--whole --state state --to").arg(&again).ok();
    assert!(ran.stdout.contains("were there already"), "{}", ran.stdout);
    assert_eq!(second.wait().code, Some(0));
    dir.qemu_checks("in/sda.qcow2");
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.raw("in/sda.qcow2")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    // The folder is removed, and somebody else has begun in it: nothing of what was safe is there.
    std::fs::remove_dir_all(dir.file("in")).unwrap();
    let (_other, again) = receiver("");
    let mut sender = machine.p2v("--whole --threads 1 --rate 1M --state other --to").arg(&again).spawn();
    while !dir.exists("other") {
        assert!(std::time::Instant::now() < deadline && sender.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    sender.kill().unwrap();
    sender.wait().unwrap();
    std::fs::write(&state, moved(&again)).unwrap();
    machine.p2v("--whole --state state --to").arg(&again).ok();
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.raw("in/sda.qcow2")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    // The machine is there now, and is not overwritten.
    let (third, uri) = receiver("");
    refused(&machine.p2v("--to").arg(&uri).run(), &["complete machine"]);
    refused(&machine.p2v("--to").arg(uri.replace("///?", "///..?")).run(), &["cannot be the folder"]);
    refused(&machine.p2v("--to").arg(uri.replace("///?", "///vimg-p2v?")).run(), &["not of a folder"]);
    assert_eq!(third.stop().code, Some(0));
}
