//! `vimg serve` before clients that none of us wrote: nbdinfo, nbdcopy, the qemu tools, fio, libnbd's Python, and the
//! crates.io `nbd` crate.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

use serde_json::Value;
use tests::requires;
use tests::server::{Server, libnbd, python};
use tests::skip::{qemu, qemu10, tool};
use tests::{Cmd, Dir};

pub(crate) const MIB: usize = 1 << 20;

/// Bytes of a disk: stretches of noise, of a pattern and of zeros, none like another.
pub(crate) fn disk(len: usize) -> Vec<u8> {
    let mut random = block::testing::Random::new(5);
    let mut bytes = vec![0; len];
    for (number, piece) in bytes.chunks_mut(192 << 10).enumerate() {
        match number % 3 {
            0 => random.fill(piece),
            1 => piece.fill(u8::try_from(number % 250 + 1).unwrap()),
            _ => {}
        }
    }
    bytes
}

fn nbdinfo(server: &Server, export: &str) -> Value {
    let json = Cmd::new("nbdinfo").arg("--json").arg(server.uri_of(export)).ok().json();
    json["exports"][0].clone()
}

fn read_by_nbdcopy(dir: &Dir, uri: &str) -> Vec<u8> {
    let copy = dir.file("nbdcopy.out");
    let _ = std::fs::remove_file(&copy);
    Cmd::new("nbdcopy").arg(uri).arg(&copy).ok();
    std::fs::read(copy).unwrap()
}

#[test]
fn nbdinfo_sees_the_exact_size_and_every_flag() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.write("odd.raw", &disk(1_000_003));
    let server = Server::start(&dir, "-f raw --description odd odd.raw");
    let seen = nbdinfo(&server, "");
    assert_eq!(seen["export-size"], 1_000_003);
    assert_eq!(seen["description"], "odd");
    for flag in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(seen[flag], true, "{flag} in {seen:#}");
    }
    assert_eq!(seen["is_read_only"], false);
    assert_eq!(seen["contexts"], serde_json::json!(["base:allocation"]));
    server.stop();

    let server = Server::start(&dir, "-f raw -r odd.raw");
    let seen = nbdinfo(&server, "");
    assert_eq!(
        (&seen["is_read_only"], &seen["can_trim"]),
        (&Value::Bool(true), &Value::Bool(false)),
        "{seen:#}"
    );
    assert_eq!(read_by_nbdcopy(&dir, &server.uri()), disk(1_000_003));
}

#[test]
fn every_format_is_the_same_disk() {
    requires!(qemu(), tool("nbdcopy"));
    let dir = Dir::new();
    let bytes = disk(6 * MIB);
    dir.write("disk.raw", &bytes);
    std::fs::write(dir.file("key"), "open sesame").unwrap();
    for (format, options) in
        [("qcow2", ""), ("vmdk", ""), ("vhdx", ""), ("vdi", ""), ("vpc", "-o force_size=on")]
    {
        dir.vimg_ok(&format!("convert -f raw -O {format} {options} disk.raw disk.{format}"));
    }
    dir.vimg_ok("convert -f raw -O qcow2 -c disk.raw small.qcow2");
    dir.vimg_ok("create -f qcow2 -b small.qcow2 -F qcow2 top.qcow2");
    dir.vimg_ok("convert -f raw -O vmdk -o subformat=streamOptimized disk.raw disk1.vmdk");
    dir.write("disk.ovf", b"<Envelope/>");
    Cmd::new("tar").words("-cf disk.ova disk.ovf disk1.vmdk").dir(dir.path()).ok();
    let secret = "--object secret,id=s,file=key";
    dir.vimg_ok(&format!("convert -O luks -o key-secret=s,iter-time=10 {secret} disk.qcow2 disk.luks"));
    let luks =
        format!("{secret} --image-opts driver=luks,key-secret=s,file.driver=file,file.filename=disk.luks");
    for image in [
        "-f raw disk.raw",
        "disk.qcow2",
        "disk.vmdk",
        "disk.vhdx",
        "disk.vdi",
        "disk.vpc",
        "top.qcow2",
        "disk.ova:disk1.vmdk",
        &luks,
    ] {
        let server = Server::start(&dir, &format!("--read-only {image}"));
        assert!(read_by_nbdcopy(&dir, &server.uri()) == bytes, "{image}: nbdcopy reads another disk");
        let same = Cmd::new("qemu-img").words("compare -f raw -F raw disk.raw").arg(server.uri());
        same.dir(dir.path()).ok();
        server.stop();
    }
}

#[test]
fn qemu_img_converts_maps_and_asks() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.write("disk.raw", &disk(6 * MIB));
    dir.vimg_ok("convert -f raw -O qcow2 disk.raw disk.qcow2");
    let server = Server::start(&dir, "-f qcow2 disk.qcow2");
    let uri = server.uri();
    let info = Cmd::new("qemu-img").words("info --output=json").arg(&uri).ok().json();
    assert_eq!(info["virtual-size"], 6 * MIB);
    // What qemu-img sees of holes through us is what it sees of the file itself.
    let holes = |map: Value| -> Vec<(u64, u64)> {
        let all = map.as_array().unwrap().iter();
        let zero = all.filter(|extent| extent["zero"] == true);
        zero.map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap())).collect()
    };
    let through = Cmd::new("qemu-img").words("map --output=json").arg(&uri).ok().json();
    let local = dir.qemu_ok("map --output=json -U disk.qcow2").json();
    assert_eq!(holes(through), holes(local));
    Cmd::new("qemu-img").words("convert -O qcow2").arg(&uri).arg(dir.file("copy.qcow2")).ok();
    server.stop();
    dir.qemu_ok("compare disk.qcow2 copy.qcow2");

    // And the other way: a convert into an export.
    dir.vimg_ok("create -f qcow2 target.qcow2 6M");
    let server = Server::start(&dir, "-f qcow2 target.qcow2");
    Cmd::new("qemu-img")
        .words("convert -n --target-is-zero -f qcow2 -O raw disk.qcow2")
        .arg(server.uri())
        .dir(dir.path())
        .ok();
    server.stop();
    dir.qemu_ok("compare disk.qcow2 target.qcow2");
    dir.qemu_checks("target.qcow2");
    assert!(dir.taken("target.qcow2") < 5 * MIB as u64, "holes have been written");
}

#[test]
fn qemu_io_writes_what_a_local_image_would_get() {
    requires!(qemu());
    let dir = Dir::new();
    for name in ["ours.qcow2", "local.qcow2"] {
        dir.vimg_ok(&format!("create -f qcow2 {name} 8M"));
    }
    let server = Server::start(&dir, "-f qcow2 ours.qcow2");
    let commands = [
        "write -P 1 0 3M",
        "write -P 2 1000448 512",
        "write -f -P 3 4M 4k",
        "write -z 512k 256k",
        "write -z -u 2M 64k",
        "discard 1M 128k",
        "flush",
        "aio_write -P 9 5M 1M",
        "aio_write -P 8 7M 64k",
        "aio_flush",
        "write -P 5 8388096 512",
    ];
    let run = |target: &[&str]| {
        let mut cmd = Cmd::new("qemu-io").dir(dir.path());
        for word in target {
            cmd = cmd.arg(*word);
        }
        for command in commands {
            cmd = cmd.arg("-c").arg(command);
        }
        let ran = cmd.ok();
        assert!(!ran.stdout.contains("failed"), "{}", ran.story());
    };
    run(&["-f", "raw", "--discard=unmap", &server.uri()]);
    run(&["-f", "qcow2", "--discard=unmap", "local.qcow2"]);
    server.stop();
    dir.qemu_checks("ours.qcow2");
    dir.qemu_ok("compare ours.qcow2 local.qcow2");
}

#[test]
fn fio_verifies_what_it_has_written() {
    requires!(tool("fio"));
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 disk.qcow2 32M");
    let server = Server::start(&dir, "disk.qcow2");
    let ran = Cmd::new("fio")
        .words("--name=v --ioengine=nbd --rw=randwrite --bsrange=512-64k --size=24M --iodepth=16")
        .words("--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --fsync=64")
        .arg(format!("--uri={}", server.uri()))
        .dir(dir.path())
        .run();
    if ran.stdout.contains("nbd") && ran.stdout.contains("not loadable") {
        tests::skip::note("fio without its nbd engine");
        return;
    }
    assert_eq!(ran.code, Some(0), "{}", ran.story());
    server.stop();
    dir.vimg_checks("disk.qcow2");
}

/// The card's own crate: EXPORT_NAME, 124 zeros, cookie 0, simple replies.
#[test]
fn the_nbd_crates_client() {
    let dir = Dir::new();
    let bytes = disk(MIB);
    dir.write("disk.raw", &bytes);
    let server = Server::start(&dir, "-f raw -x it disk.raw");
    let mut socket = server.connect();
    let export = nbd::client::handshake(&mut socket, b"it").unwrap();
    assert_eq!(export.size, MIB as u64);
    let mut client = nbd::client::NbdClient::new(&mut socket, &export);
    let mut read = vec![0; 100_000];
    client.seek(SeekFrom::Start(12_345)).unwrap();
    client.read_exact(&mut read).unwrap();
    assert!(read == bytes[12_345..112_345]);
    client.seek(SeekFrom::Start(777)).unwrap();
    client.write_all(b"from the crate").unwrap();
    client.flush().unwrap();
    drop(socket);
    server.stop();
    assert_eq!(&dir.read("disk.raw")[777..791], b"from the crate");
}

/// Flags, contexts over a chain, DF, FUA, zero lengths, errors, odd sizes: see the script.
#[test]
fn libnbd_in_the_corners() {
    requires!(libnbd(), qemu());
    let dir = Dir::new();
    dir.write("odd.raw", &disk(1_000_003));
    dir.qemu_ok("create -f qcow2 base.qcow2 1M");
    dir.qemu_ok("bitmap --add base.qcow2 b0");
    Cmd::new("qemu-io").words("-f qcow2 base.qcow2 -c").arg("write -P 1 0 256k").dir(dir.path()).ok();
    dir.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    dir.qemu_ok("bitmap --add top.qcow2 b1");
    Cmd::new("qemu-io").words("-f qcow2 top.qcow2 -c").arg("write -P 2 128k 64k").dir(dir.path()).ok();
    let raw = Server::start(&dir, "-f raw odd.raw");
    let read_only = Server::start(&dir, "-f raw -r -U odd.raw");
    let chain = Server::start(&dir, "-r -B b0 -B b1 -A -x chain top.qcow2");
    let script = include_str!("nbd/corners.py");
    let uris = [raw.uri(), read_only.uri(), chain.uri_of("chain")];
    python(&dir, script, &uris.each_ref().map(String::as_str));
    raw.stop();
    assert_eq!(dir.read("odd.raw").len(), 1_000_003, "a write past the end has grown the file");
}

#[test]
fn several_exports_are_listed() {
    requires!(tool("nbdinfo"));
    let dir = Dir::new();
    dir.write("a.raw", &disk(MIB));
    dir.write("b.raw", &disk(2 * MIB));
    let server = Server::start(&dir, "-f raw --description both one=a.raw two=b.raw");
    let listed = Cmd::new("nbdinfo").words("--list --json").arg(server.uri()).ok().json();
    let exports = listed["exports"].as_array().unwrap();
    let names: Vec<_> = exports.iter().map(|export| export["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "two"]);
    assert!(exports.iter().all(|export| export["description"] == "both"));
    assert_eq!(exports[1]["export-size"], 2 * MIB);
    assert!(read_by_nbdcopy(&dir, &server.uri_of("two")) == disk(2 * MIB));
    Cmd::new("nbdinfo").arg(server.uri_of("three")).run().expect_clean_failure();
    let ours = dir.vimg_cmd("serve --output=json --list").arg(server.uri()).ok().json();
    assert_eq!(ours["exports"][1]["name"], "two");
    assert_eq!(ours["exports"][1]["size"], 2 * MIB);
}

#[test]
fn an_overlay_leaves_the_image_as_it_is() {
    requires!(qemu());
    let dir = Dir::new();
    dir.write("disk.raw", &disk(MIB));
    let before = std::fs::metadata(dir.file("disk.raw")).unwrap().modified().unwrap();
    let server = Server::start(&dir, "-f raw --overlay disk.raw");
    let uri = server.uri();
    let write = Cmd::new("qemu-io").words("-f raw -c").arg("write -P 7 4k 300k").words("-c flush").arg(&uri);
    write.ok();
    let read = Cmd::new("qemu-io").words("-f raw -c").arg("read -P 7 4k 300k").arg(&uri).ok();
    assert!(!read.stdout.contains("failed"), "{}", read.story());
    server.stop();
    assert!(dir.read("disk.raw") == disk(MIB));
    assert_eq!(std::fs::metadata(dir.file("disk.raw")).unwrap().modified().unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something has been left behind");
}

#[test]
fn snapshots_windows_and_partitions() {
    requires!(tool("nbdcopy"), qemu());
    let dir = Dir::new();
    let bytes = disk(4 * MIB);
    dir.write("disk.raw", &bytes);
    dir.vimg_ok("convert -f raw -O qcow2 disk.raw disk.qcow2");
    dir.vimg_ok("snapshot -c then disk.qcow2");
    Cmd::new("qemu-io").words("-f qcow2 disk.qcow2 -c").arg("write -P 9 0 4M").dir(dir.path()).ok();
    let shown = |words: &str| {
        let server = Server::start(&dir, words);
        read_by_nbdcopy(&dir, &server.uri())
    };
    assert!(shown("--snapshot then disk.qcow2") == bytes);
    assert!(shown("disk.qcow2") == vec![9; 4 * MIB]);
    assert!(shown("-f raw --offset 1000 --length 70001 disk.raw") == bytes[1000..71_001]);
    assert!(shown("-f raw --offset 1M disk.raw") == bytes[MIB..]);
    dir.vimg("serve -f raw --offset 5M --socket x disk.raw").expect_clean_failure();
    dir.vimg("serve -f raw --offset 1M --length 4M --socket x disk.raw").expect_clean_failure();

    // One partition, of type 0x83, from sector 2048 with 1024 sectors.
    let mut table = vec![0; 4 * MIB];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 4, 0, 0]);
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    table[MIB..MIB + 524_288].copy_from_slice(&bytes[..524_288]);
    dir.write("parted.raw", &table);
    assert!(shown("-f raw --partition 1 parted.raw") == bytes[..524_288]);
    dir.vimg("serve -f raw --partition 2 --socket x parted.raw").expect_clean_failure();
}
