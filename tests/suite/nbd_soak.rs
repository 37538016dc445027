//! Random requests over several connections, held against a perfect disk; for longer with `VIMG_SOAK_SECONDS`.

use std::time::Duration;

use tests::server::{Server, libnbd, python};
use tests::{Cmd, Dir, requires};

/// Seconds of a soak, for each image.
fn seconds() -> u64 {
    std::env::var("VIMG_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

fn seed() -> u64 {
    let given = std::env::var("VIMG_SOAK_SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| u64::from(std::process::id()))
}

#[expect(clippy::print_stdout, reason = "the seed is what repeats a failure")]
fn soak(image: &str, make: &str, words: &str) {
    let dir = Dir::new();
    if make.is_empty() {
        dir.sparse(image, 16 << 20);
    } else {
        dir.vimg_ok(make);
    }
    let server = Server::start(&dir, &format!("{words} {image}"));
    let (seed, seconds) = (seed(), seconds());
    println!("soak of {image}: VIMG_SOAK_SEED={seed}");
    let half = |part: u64| {
        let arguments = [server.uri(), (seed + part).to_string(), format!("{}", seconds as f64 / 2.0)];
        let ran = python(&dir, include_str!("nbd/soak.py"), &arguments.each_ref().map(String::as_str));
        println!("{}", ran.stdout.trim());
        server.memory_kib().0
    };
    let before = half(0);
    let after = half(1);
    assert!(after < before + (16 << 10), "memory grows: {before} KiB, then {after} KiB");
    std::thread::sleep(Duration::from_millis(10));
    server.stop();
    if image.ends_with("qcow2") {
        dir.vimg_checks(image);
        if tests::command::find("qemu-img").is_some() {
            Cmd::new("qemu-img").words("check").arg(image).dir(dir.path()).ok();
        }
    }
}

#[test]
fn raw() {
    requires!(libnbd());
    soak("disk.raw", "", "-f raw");
}

#[test]
fn qcow2() {
    requires!(libnbd());
    soak("disk.qcow2", "create -f qcow2 -o cluster_size=4k disk.qcow2 16M", "");
}

#[test]
fn overlay_with_zeros_detected() {
    requires!(libnbd());
    soak("disk.raw", "", "-f raw --overlay --detect-zeroes unmap");
}
