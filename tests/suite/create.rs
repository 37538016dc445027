//! `create`: the same words to both tools make the same image, or fail in the same way.

use tests::shape::SHAPES;
use tests::skip::{qemu, qemu10};
use tests::{Dir, requires};

/// `info` of an image in `dir`, without what depends on the host file system.
fn described(dir: &Dir, name: &str) -> serde_json::Value {
    let mut document = dir.qemu_ok(&format!("info --output=json {name}")).json();
    forget_allocation(&mut document);
    document
}

/// Takes out `actual-size`, which is a matter of the host's file system, and the length of the file, which
/// has a test of its own.
fn forget_allocation(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            map.remove("actual-size");
            if map.get("format").is_some_and(|format| format == "file") {
                map.remove("virtual-size");
            }
            map.values_mut().for_each(forget_allocation);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(forget_allocation),
        _ => {}
    }
}

#[test]
fn every_shape_is_created_as_qemu_creates_it() {
    requires!(qemu10());
    for shape in SHAPES {
        let (theirs, ours) = (Dir::new(), Dir::new());
        shape.build(
            "a.qcow2",
            |words| {
                let (a, b) = (theirs.qemu_ok(words), ours.linked(words).expect_code(0));
                assert_eq!(a.stdout, b.stdout, "{}: the Formatting line differs", shape.name);
                assert_eq!(a.stderr, b.stderr, "{}", shape.name);
            },
            |_, _| {},
        );
        assert_eq!(described(&theirs, "a.qcow2"), described(&ours, "a.qcow2"), "{}", shape.name);
        ours.qemu_checks("a.qcow2");
        ours.vimg_checks("a.qcow2");
        let compared = format!("compare {} a.qcow2", theirs.file("a.qcow2").display());
        ours.qemu_ok(&compared);
    }
}

/// A fresh image without preallocation has the same structures at the same places, so that a tool which
/// relies on what qemu does finds what it expects.
#[test]
fn fresh_images_have_the_same_length() {
    requires!(qemu10());
    for shape in SHAPES.iter().filter(|shape| shape.backing == 0) {
        let (theirs, ours) = (Dir::new(), Dir::new());
        let words = shape.create_words("a.qcow2", None);
        theirs.qemu_ok(&words);
        ours.vimg_ok(&words);
        let len = |dir: &Dir| std::fs::metadata(dir.file("a.qcow2")).unwrap().len();
        // qemu's file ends with the last sector it wrote, ours may end with the cluster.
        assert!(
            len(&ours).abs_diff(len(&theirs)) <= shape.cluster,
            "{}: qemu's file has {} bytes, ours {}",
            shape.name,
            len(&theirs),
            len(&ours)
        );
    }
}

/// What qemu writes into an image made by vimg reads back, and the image stays clean.
#[test]
fn qemu_can_use_what_vimg_created() {
    requires!(qemu());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build(
            "a.qcow2",
            |words| {
                dir.vimg_ok(words);
            },
            |layer, seed| dir.qemu_io("qcow2", layer, &shape.tour(seed, false)),
        );
        dir.qemu_checks("a.qcow2");
        dir.vimg_checks("a.qcow2");
        let reference = Dir::new();
        shape.build_with_qemu(&reference, "a.qcow2", false);
        assert!(dir.qemu_reads("a.qcow2") == reference.qemu_reads("a.qcow2"), "{}", shape.name);
        assert!(dir.vimg_reads("a.qcow2") == reference.qemu_reads("a.qcow2"), "{}", shape.name);
    }
}

#[test]
fn sizes_of_every_spelling() {
    requires!(qemu10());
    let dir = Dir::new();
    for size in [
        "0",
        "1",
        "511",
        "512",
        "513",
        "1000",
        "1k",
        "1K",
        "64M",
        "1.5G",
        "0.5k",
        "0x10000",
        "1T",
        "10b",
        "2P",
        "1e6",
        "-1",
        "1X",
        "",
        "9223372036854775808",
        "8E",
        "7.5E",
        "1.1",
        "0x1G",
        "1kk",
        "M",
        "1 k",
    ] {
        for format in ["qcow2", "raw"] {
            if format == "raw" && ["2P", "7.5E"].contains(&size) {
                continue; // the host file system decides
            }
            dir.same(&format!("create -f {format} size.img {size}"));
            let _ = std::fs::remove_file(dir.file("size.img"));
        }
    }
}

/// Each of these is refused by qemu-img in its own words, which scripts and people search for.
#[test]
fn wrong_options_are_refused_in_the_same_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 base.qcow2 1M");
    dir.sparse("base.raw", 1 << 20);
    for words in [
        "-f qcow2 -o cluster_size=100 a.qcow2 1M",
        "-f qcow2 -o cluster_size=256 a.qcow2 1M",
        "-f qcow2 -o cluster_size=4M a.qcow2 1M",
        "-f qcow2 -o cluster_size=abc a.qcow2 1M",
        "-f qcow2 -o refcount_bits=3 a.qcow2 1M",
        "-f qcow2 -o refcount_bits=0 a.qcow2 1M",
        "-f qcow2 -o refcount_bits=128 a.qcow2 1M",
        "-f qcow2 -o compat=0.10,refcount_bits=8 a.qcow2 1M",
        "-f qcow2 -o compat=0.10,lazy_refcounts=on a.qcow2 1M",
        "-f qcow2 -o compat=0.10,compression_type=zstd a.qcow2 1M",
        "-f qcow2 -o compat=0.10,extended_l2=on a.qcow2 1M",
        "-f qcow2 -o compat=0.10,data_file=d.raw a.qcow2 1M",
        "-f qcow2 -o extended_l2=on,cluster_size=8k a.qcow2 1M",
        "-f qcow2 -o compat=4 a.qcow2 1M",
        "-f qcow2 -o compression_type=lzma a.qcow2 1M",
        "-f qcow2 -o preallocation=some a.qcow2 1M",
        "-f qcow2 -o lazy_refcounts=maybe a.qcow2 1M",
        "-f qcow2 -o data_file_raw=on a.qcow2 1M",
        "-f qcow2 -o data_file=d.raw,data_file_raw=on -b base.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -o preallocation=full -b base.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -o nonsense=1 a.qcow2 1M",
        "-f qcow2 -o size=2M,, a.qcow2 1M",
        "-f qcow2 -o , a.qcow2 1M",
        "-f qcow2 a.qcow2 4P",
        "-f qcow2 -o cluster_size=512 a.qcow2 129G",
        "-f qcow2 a.qcow2",
        "-f raw a.raw",
        "-f nonsense a.x 1M",
        "-f qcow2 -b base.qcow2 a.qcow2",
        "-f qcow2 -b base.raw a.qcow2",
        "-f qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -b missing.qcow2 -F qcow2 a.qcow2",
        "-f qcow2 -b missing.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -b a.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -b base.qcow2 -F nonsense a.qcow2 1M",
        "-f raw -b base.raw -F raw a.raw 1M",
        "-f raw -o preallocation=metadata a.raw 1M",
        "-f qcow2 missing-dir/a.qcow2 1M",
        "-f raw missing-dir/a.raw 1M",
        "-f qcow2 nosuchproto:a.qcow2 1M",
    ] {
        dir.same(&format!("create {words}"));
        // qemu itself leaves one of these behind; what counts is that vimg does not.
        for name in ["a.qcow2", "a.raw", "d.raw"] {
            let _ = std::fs::remove_file(dir.file(name));
        }
        dir.linked(&format!("create {words}")).expect_clean_failure();
        let left = ["a.qcow2", "a.raw", "d.raw"].into_iter().find(|name| dir.exists(name));
        assert_eq!(left, None, "a failed create left its file behind: {words}");
    }
}

#[test]
fn good_options_of_every_spelling() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 base.qcow2 3M");
    dir.sparse("base.raw", 1_000_000);
    for words in [
        "-f qcow2 -q a.qcow2 1M",
        "-f qcow2 -o size=2M a.qcow2",
        "-f qcow2 -o size=2M a.qcow2 4M",
        "-f qcow2 -o cluster_size=4k -o refcount_bits=8 a.qcow2 1M",
        "-f qcow2 -b base.qcow2 -F qcow2 a.qcow2",
        "-f qcow2 -b base.raw -F raw a.qcow2",
        "-f qcow2 -b base.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -u -b missing.qcow2 -F qcow2 a.qcow2 1M",
        "-f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 a.qcow2",
        "-f qcow2 -b ./base.qcow2 -F qcow2 -o extended_l2=on,preallocation=metadata a.qcow2",
        "a.raw 1M",
        "-f raw -o preallocation=falloc a.raw 1M",
        "-f raw -o preallocation=full a.raw 1M",
        "-f raw a.raw 1000",
        "-f qcow2 -o data_file=d.raw a.qcow2 1M",
        "-f qcow2 -o help",
        "-f raw -o help",
    ] {
        dir.same(&format!("create {words}"));
        for name in ["a.qcow2", "a.raw", "d.raw"] {
            let _ = std::fs::remove_file(dir.file(name));
        }
    }
}

#[test]
fn raw_is_as_long_as_asked() {
    let dir = Dir::new();
    for (mode, space) in [("off", false), ("falloc", true), ("full", true)] {
        dir.vimg_ok(&format!("create -f raw -o preallocation={mode} a.raw 3M"));
        let found = std::fs::metadata(dir.file("a.raw")).unwrap();
        assert_eq!(found.len(), 3 << 20);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&found) * 512;
        assert_eq!(blocks >= 3 << 20, space, "preallocation={mode} took {blocks} bytes");
    }
}
