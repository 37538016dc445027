//! `commit`: the base holds what the chain showed, the chain shows what it showed, in qemu-img's words.

use std::time::Duration;

use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

use crate::locks::Holder;
use crate::rebase::{family, io};

/// Both tools commit in copies of a folder: same exit code and words, and all of `images` hold the same afterwards,
/// which for `top.qcow2` is what it held before. vimg takes no more space.
#[track_caller]
fn alike(original: &Dir, words: &str, images: &[&str]) -> Dir {
    let before = original.qemu_reads("top.qcow2");
    let (theirs, ours) = (original.duplicate(), original.duplicate());
    let (a, b) = (theirs.qemu(words), ours.linked(words).expect_no_panic());
    let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    assert!(a.code == b.code && a.stdout == b.stdout && a.stderr == b.stderr, "{story}");
    for image in ["top.qcow2"].iter().chain(images) {
        let reads = ours.qemu_reads(image);
        assert!(ours.vimg_reads(image) == reads, "{story}{image}: the tools read different contents");
        assert!(theirs.qemu_reads(image) == reads, "{story}{image}: other contents than with qemu-img");
        let (more, less) = (ours.taken(image), theirs.taken(image));
        assert!(more <= less + (128 << 10), "{story}{image} takes {more} bytes, with qemu-img {less}");
        if image.ends_with(".qcow2") {
            ours.qemu_checks(image);
            ours.vimg_checks(image);
            let depths = |dir: &Dir| {
                let map = dir.qemu_ok(&format!("map --output=json {image}")).json();
                let own = map.as_array().unwrap().iter().filter(|extent| extent["depth"] == 0);
                own.filter(|e| e["present"] == true).map(|e| e["length"].as_u64().unwrap()).sum::<u64>()
            };
            assert!(depths(&ours) <= depths(&theirs), "{story}{image} stores more than with qemu-img");
        }
    }
    let after = ours.qemu_reads("top.qcow2");
    assert!(after == before, "{story}the contents of the chain have changed");
    ours
}

#[test]
fn every_shape_of_overlay_is_committed_and_emptied() {
    requires!(qemu10());
    let mut shapes: Vec<(String, u64)> = SHAPES
        .iter()
        .filter(|shape| shape.data_file == 0 && shape.backing == 0)
        .filter(|shape| !shape.options.contains("preallocation"))
        .map(|shape| (shape.options.to_owned(), shape.cluster))
        .collect();
    shapes.push(("cluster_size=64k,DATA".to_owned(), 64 << 10));
    shapes.push(("cluster_size=16k,extended_l2=on,DATA".to_owned(), 16 << 10));
    // Every third, and those that are more than another cluster size.
    let special =
        |options: &str| ["extended", "DATA", "refcount_bits=1,"].iter().any(|word| options.contains(word));
    for (index, (options, cluster)) in shapes.iter().enumerate() {
        if index % 3 != 0 && !special(options) {
            continue;
        }
        let original = family(options, *cluster);
        let ours = alike(&original, "commit -f qcow2 top.qcow2", &["mid.qcow2", "base.qcow2"]);
        let map = ours.qemu_ok("map --output=json top.qcow2").json();
        let own = map.as_array().unwrap().iter().any(|e| e["depth"] == 0 && e["present"] == true);
        assert!(!own, "{options}: the overlay still stores something: {map}");
        match index % 4 {
            0 => drop(alike(&original, "commit -f qcow2 -d top.qcow2", &["mid.qcow2", "base.qcow2"])),
            1 => drop(alike(&original, "commit -f qcow2 -b base.qcow2 top.qcow2", &["base.qcow2"])),
            _ => {}
        }
    }
}

#[test]
fn every_shape_of_base() {
    requires!(qemu10());
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=4k,refcount_bits=1",
        "lazy_refcounts=on",
        "data_file=mid.data",
    ] {
        let original = family("cluster_size=64k", 64 << 10);
        original
            .qemu_ok(&format!("convert -O qcow2 -B base.qcow2 -F qcow2 -o {options} mid.qcow2 new.qcow2"));
        original.qemu_ok("rebase -u -b new.qcow2 -F qcow2 top.qcow2");
        alike(&original, "commit -f qcow2 top.qcow2", &["new.qcow2"]);
    }
}

#[test]
fn raw_bases() {
    requires!(qemu10());
    for size in ["400k", "700416", "3M"] {
        let original = Dir::new();
        original.write("base.raw", &vec![0xee; 700_416]);
        original.qemu_ok(&format!("create -q -f qcow2 -b base.raw -F raw top.qcow2 {size}"));
        io(&original, "top.qcow2", &["write -P 9 128k 64k", "write -z 256k 64k", "write -P 0 320k 64k"]);
        let ours = alike(&original, "commit top.qcow2", &[]);
        let (a, b) = (ours.read("base.raw"), original.duplicate());
        b.qemu_ok("commit top.qcow2");
        assert!(a == b.read("base.raw"), "{size}: the raw base differs");
    }
}

#[test]
fn layers_of_different_sizes() {
    requires!(qemu10());
    for (top, mid) in [("5M", "512k"), ("300k", "5M"), ("1000k", "1M"), ("6M", "5M"), ("700k", "600k")] {
        let original = family("cluster_size=64k", 64 << 10);
        original.qemu_ok(&format!("resize -q --shrink mid.qcow2 {mid}"));
        original.qemu_ok(&format!("resize -q --shrink top.qcow2 {top}"));
        alike(&original, "commit top.qcow2", &["mid.qcow2", "base.qcow2"]);
        alike(&original, "commit -b base.qcow2 top.qcow2", &["base.qcow2"]);
        alike(&original, "commit -d top.qcow2", &["mid.qcow2"]);
    }
}

#[test]
fn snapshots_and_bitmaps_stay() {
    requires!(qemu10());
    let original = family("cluster_size=4k", 4 << 10);
    original.qemu_ok("snapshot -c before top.qcow2");
    io(&original, "top.qcow2", &["write -P 8 310k 50k", "write -P 7 1100k 100k"]);
    original.qemu_ok("snapshot -c below mid.qcow2");
    let ours = alike(&original, "commit top.qcow2", &["mid.qcow2"]);
    let theirs = original.duplicate();
    theirs.qemu_ok("commit top.qcow2");
    for dir in [&ours, &theirs] {
        dir.qemu_ok("snapshot -a before top.qcow2");
        dir.qemu_checks("top.qcow2");
    }
    assert!(ours.qemu_reads("top.qcow2") == theirs.qemu_reads("top.qcow2"), "the snapshot differs");

    let original = family("cluster_size=64k", 64 << 10);
    original.qemu_ok("bitmap --add top.qcow2 b");
    let ours = alike(&original, "commit top.qcow2", &["mid.qcow2"]);
    let info = ours.qemu_ok("info --output=json top.qcow2").json();
    assert_eq!(info["format-specific"]["data"]["bitmaps"].as_array().map(Vec::len), Some(1), "{info}");
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    requires!(qemu10());
    let dir = family("cluster_size=64k", 64 << 10);
    dir.qemu_ok("create -q -f qcow2 -u -b gone.qcow2 -F qcow2 orphan.qcow2 4M");
    let images = ["top.qcow2", "mid.qcow2", "base.qcow2"];
    let before: Vec<_> = images.iter().map(|name| dir.read(name)).collect();
    for words in [
        "commit",
        "commit a b",
        "commit base.qcow2",
        "commit -f raw smaller.raw",
        "commit missing.qcow2",
        "commit orphan.qcow2",
        "commit -b larger.qcow2 top.qcow2",
        "commit -b nope.qcow2 top.qcow2",
        "commit -b top.qcow2 top.qcow2",
        "commit -r foo top.qcow2",
        "commit -r -1 top.qcow2",
        "commit -t foo top.qcow2",
        "commit -f qcow2 --image-opts driver=qcow2,file.filename=top.qcow2",
    ] {
        dir.same(words);
    }
    let after: Vec<_> = images.iter().map(|name| dir.read(name)).collect();
    assert!(before == after, "what was refused has left traces");
}

#[test]
fn bases_are_found_by_any_of_their_names() {
    requires!(qemu10());
    let original = family("cluster_size=64k", 64 << 10);
    for name in ["base.qcow2", "./base.qcow2", "mid.qcow2", ".//mid.qcow2"] {
        alike(&original, &format!("commit -b {name} top.qcow2"), &["base.qcow2"]);
    }
    let dir = original.duplicate();
    let absolute = dir.file("base.qcow2");
    dir.vimg_ok(&format!("commit -q -b {} top.qcow2", absolute.display()));
    dir.vimg_ok("commit --image-opts driver=qcow2,file.filename=top.qcow2").expect_stdout("Image committed.");
}

#[test]
fn locked_bases_stay_as_they_are() {
    requires!(qemu10());
    for (how, held, words) in [
        ("", "mid.qcow2", "commit top.qcow2"),
        ("-r", "mid.qcow2", "commit top.qcow2"),
        ("", "base.qcow2", "commit -b base.qcow2 top.qcow2"),
        ("-r", "base.qcow2", "commit -b base.qcow2 top.qcow2"),
    ] {
        let dir = family("cluster_size=64k", 64 << 10);
        // A writer is wanted: whoever holds it, even for reading, is in its way.
        let _holder = Holder::new(&dir, &format!("{how} -f qcow2"), held);
        let ran = dir.same(words);
        assert_eq!(ran.code, Some(1), "{}", ran.story());
    }
}

/// An interrupted commit leaves the chain as it was, and can be repeated.
#[test]
fn an_interruption_does_no_harm() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -q -f qcow2 base.qcow2 16M");
    io(&dir, "base.qcow2", &["write -P 1 0 16M"]);
    dir.qemu_ok("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 20M");
    io(&dir, "top.qcow2", &["write -P 2 2M 10M", "write -z 13M 1M", "write -P 3 18M 1M"]);
    let before = dir.qemu_reads("top.qcow2");
    let child = dir.vimg_cmd("commit -r 4M top.qcow2").spawn();
    std::thread::sleep(Duration::from_millis(700));
    let pid = child.id().to_string();
    tests::command::Cmd::new("kill").arg("-INT").arg(&pid).ok();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(dir.qemu_reads("top.qcow2") == before, "the contents have changed");
    assert!(dir.qemu_reads("base.qcow2")[..20 << 20] != before[..], "the interruption came too late");
    dir.qemu_checks("top.qcow2");
    dir.qemu_checks("base.qcow2");
    dir.vimg_ok("commit top.qcow2");
    assert!(dir.qemu_reads("top.qcow2") == before && dir.qemu_reads("base.qcow2") == before);
}
