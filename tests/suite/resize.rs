//! `resize`: the same sizes, the same words, and afterwards the same disk.

use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

/// Copies everything in one folder to another.
fn clone_of(dir: &Dir) -> Dir {
    let copy = Dir::new();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

#[test]
fn every_shape_grows_and_shrinks_alike() {
    requires!(qemu10());
    for shape in SHAPES {
        let original = Dir::new();
        shape.build_with_qemu(&original, "a.qcow2", false);
        let half = shape.size() / 2 / 512 * 512;
        for words in [
            format!("resize -f qcow2 a.qcow2 +{}", 5 * shape.cluster),
            format!("resize -f qcow2 a.qcow2 {}", 200 * shape.cluster),
            format!("resize -f qcow2 --shrink a.qcow2 {half}"),
            format!("resize -f qcow2 --shrink a.qcow2 -{half}"),
            format!("resize -f qcow2 a.qcow2 {half}"),
            format!("resize -f qcow2 --preallocation=metadata a.qcow2 +{}", 3 * shape.cluster),
            format!("resize -f qcow2 --preallocation=full a.qcow2 +{}", 3 * shape.cluster),
        ] {
            let (theirs, ours) = (clone_of(&original), clone_of(&original));
            let (a, b) = (theirs.qemu(&words), ours.linked(&words).expect_no_panic());
            let story = format!("{}: --- qemu-img\n{}--- vimg\n{}", shape.name, a.story(), b.story());
            assert!(a.code == b.code && a.stdout == b.stdout && a.stderr == b.stderr, "{story}");
            let verdicts = [ours.qemu("check a.qcow2"), ours.vimg("check a.qcow2")];
            for verdict in &verdicts {
                assert!(verdict.code == Some(0), "{story}\nafterwards\n{}", verdict.story());
            }
            let same = ours.qemu_reads("a.qcow2") == theirs.qemu_reads("a.qcow2");
            assert!(same, "{story}\nafterwards the contents differ");
        }
    }
}

#[test]
fn raw_and_wrong_sizes() {
    requires!(qemu10());
    let dir = Dir::new();
    for words in [
        "resize -f raw a.raw 2M",
        "resize -f raw a.raw +1M",
        "resize -f raw a.raw 512k",
        "resize -f raw --shrink a.raw 512k",
        "resize -f raw --shrink a.raw -1k",
        "resize -f raw a.raw +0",
        "resize -f raw --shrink a.raw -100M",
        "resize -f raw --preallocation=full a.raw +1M",
        "resize -f raw --preallocation=falloc a.raw +1M",
        "resize -f raw --preallocation=metadata a.raw +1M",
        "resize -f raw a.raw 1000000",
        "resize -f raw a.raw nonsense",
        "resize -f raw a.raw +",
        "resize -q -f raw a.raw 3M",
        "resize -f raw missing.raw 3M",
        "resize a.raw 3M",
    ] {
        dir.sparse("a.raw", 1 << 20);
        let theirs = dir.qemu(words);
        let len = std::fs::metadata(dir.file("a.raw")).unwrap().len();
        dir.sparse("a.raw", 1 << 20);
        let ours = dir.linked(words).expect_no_panic();
        let story = format!("--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        let equal = theirs.code == ours.code && theirs.stdout == ours.stdout && theirs.stderr == ours.stderr;
        assert!(equal, "{story}");
        assert_eq!(std::fs::metadata(dir.file("a.raw")).unwrap().len(), len, "{story}");
    }
}

/// The tail of a larger backing file must not show through where the disk grows. (qemu-img cannot do that
/// for version 2, which has no zero clusters, and refuses; vimg writes zeros.)
#[test]
fn growing_does_not_uncover_the_backing_file() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.write("base.raw", &vec![0xaa; 8 << 20]);
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on"] {
        dir.qemu_ok(&format!("create -f qcow2 -b base.raw -F raw -o {options} a.qcow2 2M"));
        dir.linked("resize a.qcow2 6M").expect_code(0).expect_stdout("Image resized.");
        let bytes = dir.qemu_reads("a.qcow2");
        assert!(bytes[..2 << 20].iter().all(|&byte| byte == 0xaa), "{options}: the old part has changed");
        assert!(bytes[2 << 20..].iter().all(|&byte| byte == 0), "{options}: the backing file shows through");
        assert!(dir.vimg_reads("a.qcow2") == bytes, "{options}");
        dir.qemu_checks("a.qcow2");
    }
}

#[test]
fn snapshots_prevent_what_they_prevent_in_qemu() {
    requires!(qemu10());
    for options in ["compat=0.10", "compat=1.1"] {
        let original = Dir::new();
        original.qemu_ok(&format!("create -f qcow2 -o {options} a.qcow2 4M"));
        original.qemu_ok("snapshot -c s a.qcow2");
        for words in ["resize a.qcow2 8M", "resize --shrink a.qcow2 1M"] {
            let (theirs, ours) = (clone_of(&original), clone_of(&original));
            let (a, b) = (theirs.qemu(words), ours.linked(words).expect_no_panic());
            let story = format!("{options}: --- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
            assert!(a.code == b.code && a.stdout == b.stdout, "{story}");
            ours.qemu_checks("a.qcow2");
        }
    }
}
