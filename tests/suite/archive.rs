//! Disks in archives: `vm.ova:disk1.vmdk`.

use std::time::Duration;

use tests::foreign::{disk, gzip, tar};
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, requires};

/// A folder with an archive of a description, a qcow2 image and a raw disk, as it is and gzipped.
fn with_archives() -> (Dir, Vec<u8>) {
    let dir = Dir::new();
    let data = disk(3 << 20);
    dir.write("d.raw", &data);
    dir.qemu_ok("convert -O qcow2 d.raw d.qcow2");
    let qcow2 = dir.read("d.qcow2");
    let archive = tar(&[("vm.ovf", b"<Envelope/>"), ("./d.qcow2", &qcow2), ("folder/d.raw", &data)]);
    dir.write("vm.ova", &archive);
    dir.write("vm.tgz", &gzip(&archive));
    dir.write("z.tar", &tar(&[("d.qcow2.gz", &gzip(&qcow2)), ("d.raw", &gzip(&data))]));
    (dir, data)
}

#[test]
fn members_are_disks() {
    requires!(qemu());
    let (dir, data) = with_archives();
    for name in [
        "vm.ova:d.qcow2",
        "./vm.ova:./d.qcow2",
        "vm.ova:folder/d.raw",
        "vm.tgz:d.qcow2",
        "vm.tgz:folder/d.raw",
        "z.tar:d.qcow2.gz",
        "z.tar:d.raw",
    ] {
        assert!(dir.vimg_reads(name) == data, "{name}");
        dir.vimg_ok(&format!("compare {name} d.raw"));
        dir.vimg_ok(&format!("map --output=json {name}"));
        dir.vimg_ok(&format!("measure -O qcow2 {name}"));
        let info = dir.vimg_ok(&format!("info --output=json {name}")).json();
        assert_eq!(info["virtual-size"], 3 << 20);
        assert_eq!(info["filename"], name);
        dir.vimg_ok(&format!("convert -O qcow2 {name} out.qcow2"));
        dir.qemu_ok("compare -f qcow2 -F raw out.qcow2 d.raw");
    }
    dir.vimg_ok("check vm.ova:d.qcow2");
    dir.vimg_ok("checksum vm.ova:d.qcow2");
    dir.vimg_ok("convert --image-opts driver=qcow2,file.filename=vm.ova:d.qcow2 -O raw out.raw");
    assert!(dir.read("out.raw") == data);
    // What begins like gzip and is called raw is a raw disk, unless its name says otherwise.
    dir.vimg_ok("convert -f raw -O raw z.tar:d.raw out.raw");
    assert!(dir.read("out.raw")[..1000] == gzip(&data)[..1000]);
}

#[test]
fn a_member_serves_as_backing_file() {
    requires!(qemu());
    let (dir, data) = with_archives();
    dir.vimg_ok("create -f qcow2 -b vm.ova:d.qcow2 -F qcow2 top.qcow2");
    assert!(dir.vimg_reads("top.qcow2") == data);
    // It is looked for beside the image, as any file is.
    std::fs::create_dir(dir.file("sub")).unwrap();
    std::fs::rename(dir.file("vm.ova"), dir.file("sub/vm.ova")).unwrap();
    std::fs::rename(dir.file("top.qcow2"), dir.file("sub/top.qcow2")).unwrap();
    assert!(dir.vimg_reads("sub/top.qcow2") == data);
    std::fs::rename(dir.file("sub/vm.ova"), dir.file("vm.ova")).unwrap();
    std::fs::rename(dir.file("sub/top.qcow2"), dir.file("top.qcow2")).unwrap();
    // The archive that was named is trusted, and so is its member.
    dir.vimg_ok("--untrusted convert -O raw vm.ova:d.qcow2 out.raw");
    dir.vimg_ok("--untrusted info vm.ova:d.qcow2");
    let ran = dir.vimg("--untrusted convert -O raw top.qcow2 out.raw").expect_clean_failure();
    assert!(ran.stderr.contains("--allow"), "{}", ran.story());
}

/// The name of a member is the last way to read a name with a colon.
#[test]
fn other_readings_come_first() {
    requires!(qemu());
    let (dir, _) = with_archives();
    let other = disk(1 << 20);
    dir.write("vm.ova:d.qcow2", &other);
    assert!(dir.vimg_reads("./vm.ova:d.qcow2") == other, "a file of exactly that name");
    dir.write("nbd", &dir.read("vm.ova"));
    let ran = dir.vimg("info nbd:d.qcow2").expect_clean_failure();
    assert!(!ran.stderr.contains("member"), "{}", ran.story());
    dir.write("file", &dir.read("vm.ova"));
    dir.vimg("info file:d.qcow2x").expect_clean_failure().expect_stderr("No such file");
    dir.vimg("info d.raw:x").expect_clean_failure().expect_stderr("Unknown protocol 'd.raw'");
    dir.vimg("info nowhere.ova:x").expect_clean_failure().expect_stderr("Unknown protocol");
    dir.vimg("info ./nowhere.ova:x").expect_clean_failure().expect_stderr("No such file");
    dir.copy("vm.ova", "a:b.ova");
    dir.vimg_ok("info ./a:b.ova:folder/d.raw");
}

#[test]
fn what_is_not_there_is_named() {
    requires!(qemu());
    let (dir, _) = with_archives();
    for name in ["vm.ova:disk1.vmdk", "vm.ova:", "vm.tgz:nope"] {
        for verb in ["info", "map", "check", "convert -O raw"] {
            let target = if verb.starts_with("convert") { " out.raw" } else { "" };
            let ran = dir.vimg(&format!("{verb} {name}{target}")).expect_clean_failure();
            assert!(
                ran.stderr.contains("vm.ovf, d.qcow2, folder/d.raw"),
                "the members are listed\n{}",
                ran.story()
            );
        }
    }
    dir.vimg_ok("info vm.ova").expect_stderr("vm.ova:MEMBER");
}

#[test]
fn archives_are_not_written() {
    requires!(qemu());
    let (dir, _) = with_archives();
    let before = dir.read("vm.ova");
    for words in [
        "create -f raw vm.ova:new 1M",
        "convert -O raw d.raw vm.ova:new",
        "convert -O raw vm.ova:folder/d.raw vm.ova",
        "resize vm.ova:d.qcow2 9M",
        "check -r all vm.ova:d.qcow2",
        "amend -o lazy_refcounts=on vm.ova:d.qcow2",
        "snapshot -c s vm.ova:d.qcow2",
    ] {
        dir.vimg(words).expect_clean_failure();
        assert!(dir.read("vm.ova") == before, "{words}");
    }
}

/// An OVA as hypervisors export it: a description and disks as streams.
#[test]
fn virtual_appliances() {
    requires!(qemu());
    let dir = Dir::new();
    let data = disk(3 << 20);
    dir.write("d.raw", &data);
    dir.qemu_ok("convert -O vmdk -o subformat=streamOptimized d.raw disk1.vmdk");
    dir.qemu_ok("convert -O vmdk d.raw disk2.vmdk");
    dir.qemu_ok("convert -O vmdk -o subformat=monolithicFlat d.raw disk3.vmdk");
    let names = ["disk1.vmdk", "disk2.vmdk", "disk3.vmdk", "disk3-flat.vmdk"];
    let files = names.map(|name| dir.read(name));
    let mut members = vec![("vm.ovf", &b"<Envelope/>"[..])];
    members.extend(names.into_iter().zip(&files).map(|(name, file)| (name, &file[..])));
    let zipped = gzip(&files[0]);
    members.push(("zipped.vmdk", &zipped));
    dir.write("vm.ova", &tar(&members));
    dir.write("vm.tgz", &gzip(&tar(&members)));
    for name in ["vm.ova:disk1.vmdk", "vm.ova:disk2.vmdk", "vm.tgz:disk1.vmdk", "vm.ova:zipped.vmdk"] {
        assert_eq!(dir.vimg_ok(&format!("info --output=json {name}")).json()["format"], "vmdk");
        dir.vimg_ok(&format!("convert -O qcow2 {name} out.qcow2"));
        dir.qemu_ok("compare -f qcow2 -F raw out.qcow2 d.raw");
        dir.vimg_ok(&format!("check {name}"));
    }
    // A descriptor whose disk is another member.
    let ran = dir.vimg("convert -O raw vm.ova:disk3.vmdk out.raw").expect_clean_failure();
    assert!(ran.stderr.contains("disk3-flat.vmdk"), "{}", ran.story());
}

/// What GNU tar and bsdtar write: long names, pax records, sparse files.
#[test]
fn archives_of_other_programs() {
    requires!(tool("tar"));
    let dir = Dir::new();
    let data = disk(1 << 20);
    let long = format!("{}/{}.raw", "f".repeat(90), "d".repeat(120));
    std::fs::create_dir(dir.file(&"f".repeat(90))).unwrap();
    dir.write(&long, &data);
    dir.write("d.raw", &data);
    for format in ["gnu", "pax", "posix"] {
        Cmd::new("tar").words(&format!("--format={format} -cf a.tar ./d.raw {long}")).dir(dir.path()).ok();
        assert!(dir.vimg_reads("./a.tar:d.raw") == data, "{format}");
        assert!(dir.vimg_reads(&format!("a.tar:{long}")) == data, "{format}");
    }
    Cmd::new("tar").words("--format=ustar -cf a.tar d.raw").dir(dir.path()).ok();
    assert!(dir.vimg_reads("a.tar:d.raw") == data);
    dir.sparse("holes", 4 << 20);
    dir.poke("holes", 2 << 20, b"data");
    for format in ["gnu", "pax"] {
        Cmd::new("tar").words(&format!("--format={format} -S -cf a.tar holes d.raw")).dir(dir.path()).ok();
        dir.vimg("info a.tar:holes").expect_clean_failure().expect_stderr("is stored as a sparse file");
        assert!(dir.vimg_reads("a.tar:d.raw") == data, "{format}: what follows is found");
    }
}

#[test]
fn damaged_archives() {
    let dir = Dir::new();
    let data = disk(1 << 20);
    let good = tar(&[("a", b"1"), ("d", &data)]);
    let packed = gzip(&good);
    let flipped = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 0x55;
        bytes
    };
    for (name, bytes) in [
        ("cut", good[..good.len() / 2].to_vec()),
        ("header", flipped(&good, 1024 + 130)),
        ("cut gzip", packed[..packed.len() / 2].to_vec()),
        ("not tar", gzip(&data)),
        ("empty gzip", gzip(b"")),
    ] {
        dir.write("a.tar", &bytes);
        let ran = dir.vimg_cmd("convert -O raw a.tar:d out.raw").memory_mib(512).timeout(20).run();
        assert!(ran.elapsed < Duration::from_secs(10) && ran.code == Some(1), "{name}\n{}", ran.story());
        ran.expect_clean_failure();
    }
    // A checksum that is wrong is found where the whole stream has to be read.
    let zipped = gzip(&data);
    dir.write("a.tar", &tar(&[("d", &flipped(&zipped, zipped.len() - 6))]));
    dir.vimg("convert -O raw a.tar:d out.raw").expect_clean_failure().expect_stderr("checksum");
}
