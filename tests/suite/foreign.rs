//! Formats that are only read: what qemu-img says of them, vimg says; what it refuses, it refuses for a reason.

use std::time::Duration;

use tests::foreign::{Packing, bochs, cloop, disk, dmg, old_parallels};
use tests::skip::{qemu, qemu10, tool};
use tests::{Dir, Op, Ops, command, requires};

/// Writes here and there, zeros included; on a disk of 9 MiB.
fn scattered() -> Ops {
    let write = |offset, len, byte| Op::Write { offset, len, byte };
    Ops(vec![
        write(5 << 20, 1 << 20, 2),
        write(100 << 10, 70 << 10, 1),
        write(1 << 20, 512, 3),
        write((9 << 20) - 1536, 1536, 4),
        Op::Zero { offset: 3 << 20, len: 64 << 10, unmap: false },
        write((2 << 20) + 4096, 300 << 10, 5),
    ])
}

/// Everything that both tools say of an image of qemu's is the same, and so is its disk.
fn compare_all(dir: &Dir, image: &str) {
    for words in ["info", "info --output=json", "map", "map --output=json", "check", "check --output=json"] {
        dir.same(&format!("{words} {image}"));
    }
    assert!(dir.qemu_reads(image) == dir.vimg_reads(image), "{image}: different disks");
    dir.qemu_ok(&format!("convert -O qcow2 {image} by-qemu.qcow2"));
    dir.vimg_ok(&format!("compare {image} by-qemu.qcow2"));
}

#[test]
fn images_that_qemu_writes() {
    requires!(qemu10());
    for options in [
        "-f qed",
        "-f qed -o cluster_size=4k,table_size=2",
        "-f qed -o cluster_size=1M,table_size=2",
        "-f parallels",
        "-f parallels -o cluster_size=64k",
        "-f qcow",
    ] {
        let dir = Dir::new();
        let format = options.split_whitespace().nth(1).unwrap();
        dir.qemu_ok(&format!("create {options} a {}", 9 << 20));
        compare_all(&dir, "a");
        dir.qemu_io(format, "a", &scattered());
        compare_all(&dir, "a");
        // Named or recognised, it is the same.
        dir.same_json(&format!("info -f {format} --output=json a"));
    }
}

/// Whatever order qemu-io writes in.
#[test]
fn images_of_random_writes() {
    requires!(qemu10());
    let dir = Dir::new();
    let mut random = block::testing::Random::new(11);
    let mut number = |below: u64| {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        u64::from_le_bytes(bytes) % below
    };
    for round in 0..9 {
        let (format, options) =
            [("qed", "-o cluster_size=4k,table_size=2"), ("parallels", "-o cluster_size=8k"), ("qcow", "")]
                [round % 3];
        let size = (1 + number(6000)) * 512;
        dir.qemu_ok(&format!("create -f {format} {options} a {size}"));
        let mut ops = Ops::default();
        for _ in 0..30 {
            let offset = number(size);
            let len = (1 + number(40_000)).min(size - offset);
            let byte = u8::try_from(1 + number(255)).unwrap();
            ops.0.push(match number(4) {
                0 => Op::Zero { offset, len, unmap: false },
                _ => Op::Write { offset, len, byte },
            });
        }
        dir.qemu_io(format, "a", &ops);
        dir.same("map --output=json a");
        dir.same("check a");
        assert!(dir.qemu_reads("a") == dir.vimg_reads("a"), "{format} {size} {ops:?}");
    }
}

#[test]
fn images_on_backing_files() {
    requires!(qemu10());
    for format in ["qed", "qcow"] {
        let dir = Dir::new();
        dir.write("base.raw", &disk(9 << 20));
        dir.qemu_ok("convert -O qcow2 base.raw base.qcow2");
        for (backing, of) in [("base.raw", "raw"), ("base.qcow2", "qcow2")] {
            dir.qemu_ok(&format!("create -f {format} -b {backing} -F {of} a"));
            if (format, of) != ("qcow", "raw") {
                dir.qemu_io(format, "a", &scattered());
            }
            compare_all(&dir, "a");
            dir.same("info --backing-chain a");
            dir.same_json("info --backing-chain --output=json a");
        }
        std::fs::remove_file(dir.file("base.qcow2")).unwrap();
        dir.vimg("convert -O raw a out.raw").expect_clean_failure();
    }
}

#[test]
fn compressed_and_encrypted_qcow() {
    requires!(qemu10());
    let dir = Dir::new();
    let text: Vec<u8> = (0..4_u32 << 20).map(|at| u8::try_from(at / 300 % 251).unwrap()).collect();
    dir.write("d.raw", &text);
    // qemu-img 10 exits with 1 and says nothing; the image is complete.
    let _ = dir.qemu("convert -c -O qcow d.raw a");
    dir.qemu_ok("compare -f raw d.raw a");
    compare_all(&dir, "a");
    let secret = "--object secret,id=s,data=pass";
    dir.qemu_ok(&format!("convert {secret} -O qcow -o encrypt.format=aes,encrypt.key-secret=s d.raw sealed"));
    dir.same("info sealed");
    dir.same_json("info --output=json sealed");
    let opened = "driver=qcow,encrypt.key-secret=s,file.filename=sealed";
    dir.vimg_ok(&format!("convert {secret} --image-opts {opened} -O raw out.raw"));
    assert!(dir.read("out.raw") == dir.read("d.raw"));
    dir.same(&format!("map {secret} --output=json --image-opts {opened}"));
    dir.same_outcome("convert -O raw sealed out.raw");
    // Requests that are no whole sectors.
    dir.vimg_ok(&format!("dd {secret} --image-opts if={opened} of=part.raw bs=700 count=5"));
    assert!(dir.read("part.raw")[..3500] == dir.read("d.raw")[..3500]);
}

#[test]
fn parallels_with_the_old_magic() {
    requires!(qemu10());
    let dir = Dir::new();
    let data = disk(1 << 20);
    dir.write("a", &old_parallels(&data));
    compare_all(&dir, "a");
    assert!(dir.vimg_reads("a") == data);
}

#[test]
fn cloop_images() {
    requires!(qemu10());
    let dir = Dir::new();
    for (len, block) in [(1 << 20, 64 << 10), (700 * 1024, 32 << 10), (3 << 20, 1 << 20), (512, 512)] {
        let data = disk(len);
        dir.write("a", &cloop(&data, block));
        compare_all(&dir, "a");
        assert!(dir.vimg_reads("a")[..len] == data);
    }
    requires!(tool("create_compressed_fs"));
    let data = disk(1 << 20);
    dir.write("d.raw", &data);
    command::Cmd::new("create_compressed_fs").words("d.raw made").dir(dir.path()).ok();
    compare_all(&dir, "made");
    assert!(dir.vimg_reads("made")[..data.len()] == data);
}

/// qemu-img calls all of a disk data; vimg says where there is none, so that a nearly empty disk is copied at once.
#[test]
fn bochs_images() {
    requires!(qemu10());
    let dir = Dir::new();
    for (len, extent, version) in [(1 << 20, 16 << 10, 2), (1 << 20, 4096, 1), (700 * 512, 1 << 20, 2)] {
        let data = disk(len);
        dir.write("a", &bochs(&data, extent, version));
        dir.same("info a");
        dir.same_json("info --output=json a");
        dir.same("check a");
        assert!(dir.qemu_reads("a") == data && dir.vimg_reads("a") == data);
        let map = dir.vimg_ok("map --output=json a").json();
        let zeros = map.as_array().unwrap().iter().filter(|entry| entry["zero"] == true).count();
        assert!(zeros > 0, "{map}");
    }
    requires!(tool("bximage"));
    command::Cmd::new("bximage").words("-func=create -hd=10M -imgmode=growing -q made").dir(dir.path()).ok();
    dir.same("info made");
    assert!(dir.qemu_reads("made") == dir.vimg_reads("made"));
}

#[test]
fn apple_disk_images() {
    requires!(qemu10());
    let dir = Dir::new();
    let data = disk(2 << 20);
    for (packings, fork) in [
        (&[Packing::Zlib][..], false),
        (&[Packing::Raw, Packing::Zlib], true),
        (&[Packing::Bzip2], false),
        (&[Packing::Adc, Packing::Zlib, Packing::Raw, Packing::Bzip2], false),
    ] {
        dir.write("a.dmg", &dmg(&data, packings, fork));
        assert!(dir.vimg_reads("a.dmg") == data, "{packings:?}");
        // Recognised by what it is, not by its name.
        dir.copy("a.dmg", "a.raw");
        assert_eq!(dir.vimg_ok("info --output=json a.raw").json()["format"], "dmg");
        if packings.iter().all(|packing| matches!(packing, Packing::Zlib | Packing::Raw)) {
            dir.same("info a.dmg");
            dir.same_json("info --output=json a.dmg");
            dir.same("check a.dmg");
            assert!(dir.qemu_reads("a.dmg") == data, "{packings:?}");
        }
    }
}

/// What a guest writes into its raw disk decides nothing when the disk is called raw.
#[test]
fn raw_is_raw_when_it_is_called_so() {
    requires!(qemu());
    let dir = Dir::new();
    let data = disk(1 << 20);
    dir.qemu_ok("create -f qed x.qed 1M");
    dir.qemu_ok("create -f qcow x.qcow 1M");
    dir.qemu_ok("create -f parallels x.parallels 1M");
    dir.qemu_ok("create -f vmdk x.vmdk 1M");
    dir.qemu_ok("create -f vdi x.vdi 1M");
    dir.qemu_ok("create -f vhdx x.vhdx 1M");
    dir.qemu_ok("create -f vpc x.vpc 1M");
    dir.qemu_ok("create -f vpc -o subformat=fixed x.fixed 1M");
    dir.qemu_ok("create -f qcow2 x.qcow2 1M");
    dir.write("x.cloop", &cloop(&data, 64 << 10));
    dir.write("x.bochs", &bochs(&data, 16 << 10, 2));
    dir.write("x.dmg", &dmg(&data, &[Packing::Zlib], false));
    dir.write("x.tar", &tests::foreign::tar(&[("d", &data)]));
    dir.write("x.gz", &tests::foreign::gzip(&data));
    for name in [
        "qed",
        "qcow",
        "parallels",
        "vmdk",
        "vdi",
        "vhdx",
        "vpc",
        "fixed",
        "qcow2",
        "cloop",
        "bochs",
        "dmg",
        "tar",
        "gz",
    ] {
        let image = format!("x.{name}");
        let info = dir.vimg_ok(&format!("info -f raw --output=json {image}")).json();
        assert_eq!(info["format"], "raw");
        dir.vimg_ok(&format!("convert -f raw -O raw {image} out.raw"));
        let (out, bytes) = (dir.read("out.raw"), dir.read(&image));
        assert!(out[..bytes.len()] == bytes && out[bytes.len()..].iter().all(|byte| *byte == 0), "{name}");
    }
    // And what is only believed to be raw is warned about before it is written.
    dir.sparse("guess", 1 << 20);
    dir.vimg_ok("resize guess 2M").expect_stderr("WARNING: Image format was not specified for 'guess'");
}

/// A file is what its contents say, whatever it is called.
#[test]
fn names_do_not_count() {
    requires!(qemu());
    let dir = Dir::new();
    let data = disk(1 << 20);
    dir.qemu_ok("create -f qed a 1M");
    for (format, bytes) in [
        ("qed", dir.read("a")),
        ("cloop", cloop(&data, 64 << 10)),
        ("bochs", bochs(&data, 16 << 10, 1)),
        ("parallels", old_parallels(&data)),
        ("dmg", dmg(&data, &[Packing::Adc], false)),
        ("raw", data),
    ] {
        for name in ["a.raw", "a.dmg", "a.qcow2", "a.vmdk"] {
            dir.write(name, &bytes);
            assert_eq!(dir.vimg_ok(&format!("info --output=json {name}")).json()["format"], format, "{name}");
        }
    }
}

#[test]
fn they_are_neither_made_nor_written() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qed a 1M");
    for format in ["qed", "qcow", "parallels", "cloop", "bochs", "dmg"] {
        let ran = dir.vimg(&format!("create -f {format} new 1M")).expect_clean_failure();
        assert!(ran.stderr.contains("does not support image creation"), "{}", ran.story());
        assert!(!dir.exists("new"));
    }
    let before = dir.read("a");
    dir.vimg("resize a 2M").expect_clean_failure().expect_stderr("does not write them");
    dir.vimg("check -r all a").expect_clean_failure();
    assert!(dir.read("a") == before);
}

/// Places that cannot be: refused where they are read, and counted by the check as by qemu-img.
#[test]
fn damaged_qed() {
    requires!(qemu10());
    let dir = Dir::new();
    let fresh = || {
        dir.qemu_ok("create -f qed a 9M");
        dir.qemu_io("qed", "a", &scattered());
    };
    fresh();
    let table = |dir: &Dir| u64::from_le_bytes(dir.read("a")[0x10000..0x10008].try_into().unwrap());
    let len = dir.read("a").len() as u64;
    let entry = table(&dir) + 8 * 40;
    let first = u64::from_le_bytes(
        dir.read("a")[usize::try_from(table(&dir)).unwrap() + 8..][..8].try_into().unwrap(),
    );
    for (at, value, reads) in [
        (entry, first, true),
        (entry, len + 65536, false),
        (entry, 0x10200, false),
        (entry, 0x10000, false),
        (table(&dir) + 8, 0, true),
        (0x10000, len + 65536, false),
        (0x10000, 0, true),
    ] {
        fresh();
        dir.poke("a", at, &value.to_le_bytes());
        let (theirs, ours) = (dir.qemu("check --output=json a"), dir.vimg("check --output=json a"));
        assert_eq!(
            (theirs.code, theirs.stdout.clone()),
            (ours.code, ours.stdout.clone()),
            "{at:#x} {value:#x}"
        );
        let ran = dir.vimg("convert -O raw a out.raw");
        assert!(ran.code == Some(if reads { 0 } else { 1 }), "{at:#x} {value:#x}\n{}", ran.story());
    }
    for cut in [1000, 65536, len - 0x10000 - 100] {
        fresh();
        std::fs::OpenOptions::new().write(true).open(dir.file("a")).unwrap().set_len(len - cut).unwrap();
        dir.vimg("convert -O raw a out.raw").expect_clean_failure();
    }
    for (at, bytes) in [(4, 3000_u32), (8, 3), (8, 32), (16, 8), (40, 0x3000_0000), (48, 1000), (52, 1 << 30)]
    {
        fresh();
        dir.poke("a", at, &bytes.to_le_bytes());
        dir.same("info a");
    }
}

#[test]
fn damaged_parallels() {
    requires!(qemu10());
    let dir = Dir::new();
    let fresh = || {
        dir.qemu_ok("create -f parallels a 9M");
        dir.qemu_io("parallels", "a", &scattered());
    };
    for (at, value) in [(44, 0x746f_6e59_u32), (48, 7), (64 + 16, 1), (64 + 16, 2)] {
        fresh();
        dir.poke("a", at, &value.to_le_bytes());
        dir.same("check a");
        dir.same_json("check --output=json a");
    }
    for (at, value) in [(28, 0_u32), (28, 0x7fff_ffff), (32, 0x7fff_ffff)] {
        fresh();
        dir.poke("a", at, &value.to_le_bytes());
        dir.same("info a");
    }
    for extra in [100, 3 << 20] {
        fresh();
        let len = dir.read("a").len() as u64;
        std::fs::OpenOptions::new().write(true).open(dir.file("a")).unwrap().set_len(len + extra).unwrap();
        dir.same("check a");
    }
    // qemu-img aborts on the first of these, and reads zeros from all of them.
    fresh();
    dir.poke("a", 64 + 16, &900_u32.to_le_bytes());
    dir.vimg("check a").expect_code(2).expect_stderr("ERROR cluster 4 is outside image");
    dir.vimg("convert -O raw a out.raw").expect_clean_failure();
    fresh();
    dir.poke("a", 32, &3_u32.to_le_bytes());
    dir.vimg("convert -O raw a out.raw").expect_clean_failure();
    fresh();
    let len = dir.read("a").len() as u64;
    std::fs::OpenOptions::new().write(true).open(dir.file("a")).unwrap().set_len(len - 1000).unwrap();
    dir.vimg("check a").expect_code(2);
    dir.vimg("convert -O raw a out.raw").expect_clean_failure();
}

/// Each of these is refused, at once and with little memory.
#[test]
fn hostile_headers() {
    let dir = Dir::new();
    let data = disk(1 << 20);
    let cloop = cloop(&data, 64 << 10);
    let bochs = bochs(&data, 16 << 10, 2);
    let dmg = dmg(&data, &[Packing::Zlib, Packing::Raw], false);
    let koly = dmg.len() - 512;
    let cases: &[(&str, &[u8], usize, &[u8])] = &[
        ("cloop: no block size", &cloop, 128, &[0, 0, 0, 0]),
        ("cloop: odd block size", &cloop, 128, &[0, 1, 0, 1]),
        ("cloop: huge blocks", &cloop, 128, &[0xff, 0xff, 0xfe, 0]),
        ("cloop: too many blocks", &cloop, 132, &[0xff, 0xff, 0xff, 0xff]),
        ("cloop: more blocks than the file", &cloop, 132, &[0, 0xff, 0xff, 0xff]),
        ("cloop: offsets go back", &cloop, 136 + 8, &[0; 8]),
        ("cloop: offset past the end", &cloop, 136 + 8, &[0x7f; 8]),
        ("cloop: broken block", &cloop, 136 + 17 * 8 + 100, &[0x55; 64]),
        ("cloop: version", &cloop, 12, b"4.0"),
        ("bochs: huge catalog", &bochs, 72, &[0xff; 4]),
        ("bochs: small catalog", &bochs, 72, &[1, 0, 0, 0]),
        ("bochs: small bitmap", &bochs, 76, &[1, 0, 0, 0]),
        ("bochs: no extent", &bochs, 80, &[0; 4]),
        ("bochs: huge extent", &bochs, 80, &[0, 0, 0, 0x80]),
        ("bochs: huge disk", &bochs, 88, &[0xff; 8]),
        ("bochs: kind", &bochs, 48, b"Undoable"),
        ("bochs: version", &bochs, 64, &[0, 0, 9, 0]),
        ("bochs: extent past the end", &bochs, 512, &[0xff, 0xff, 0xff, 0x7f]),
        ("dmg: many sectors", &dmg, koly + 492, &[0, 0, 0, 0, 0, 0xff, 0xff, 0xff]),
    ];
    for (name, good, at, bytes) in cases {
        let mut image = good.to_vec();
        image[*at..at + bytes.len()].copy_from_slice(bytes);
        dir.write("a", &image);
        let limited = dir.vimg_cmd("convert -O raw a out.raw").memory_mib(512).timeout(20).run();
        assert!(limited.elapsed < Duration::from_secs(10), "{name}: {:?}", limited.elapsed);
        assert!(limited.code == Some(1), "{name}\n{}", limited.story());
        limited.expect_clean_failure();
    }
    // A trailer that makes no sense is none: what is left is a raw disk.
    for (at, bytes) in [(koly + 4, [0, 0, 0, 9]), (koly + 216, [0xff; 4]), (koly + 224, [0xff; 4])] {
        let mut image = dmg.clone();
        image[at..at + 4].copy_from_slice(&bytes);
        dir.write("a", &image);
        assert_eq!(dir.vimg_ok("info --output=json a").json()["format"], "raw");
    }
    for (image, cuts) in [(&cloop, [200, 136, 20_000]), (&bochs, [400, 600, 9000])] {
        for cut in cuts {
            dir.write("a", &image[..cut]);
            dir.vimg("convert -O raw a out.raw").expect_clean_failure();
        }
    }
}
