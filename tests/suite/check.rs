//! `check`: the same counts, lines and exit codes as qemu-img for images with every kind of fault.

use tests::forge::{COMPRESSED, COPIED, Forge, at};
use tests::shape::SHAPES;
use tests::skip::{qemu, qemu10};
use tests::{Dir, requires};

#[test]
fn every_shape_is_clean_and_counted_alike() {
    requires!(qemu10());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        dir.same("check a.qcow2");
        let report = dir.same_json("check --output=json a.qcow2");
        assert_eq!(report["check-errors"], 0, "{}", shape.name);
        dir.same("check -q a.qcow2");
    }
}

const C: u64 = 65536;

/// What can be wrong, one thing at a time.
fn faults() -> Vec<(&'static str, Forge)> {
    let mut faults = vec![];
    let mut add = |name, change: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::new();
        change(&mut forge);
        faults.push((name, forge));
    };
    let data = at::DATA as u64 * C;
    add("nothing", &|_| {});
    add("leak", &|f| {
        f.refcount(5, 2);
    });
    add("leak of a cluster nobody uses", &|f| {
        f.set(6 * 65536, &[0; 65536]).refcount(6, 1);
    });
    add("refcount of the data is 0", &|f| {
        f.refcount(5, 0);
    });
    add("refcount of the header is 0", &|f| {
        f.refcount(0, 0);
    });
    add("refcount of the L2 table is 0", &|f| {
        f.refcount(4, 0);
    });
    add("refcount of the L2 table is 2", &|f| {
        f.refcount(4, 2);
    });
    add("COPIED missing at the data", &|f| {
        f.l2(0, data);
    });
    add("COPIED missing at the L2 table", &|f| {
        f.l1(0, 4 * C);
    });
    add("COPIED with refcount 2", &|f| {
        f.l2(1, data | COPIED).refcount(5, 2);
    });
    add("two entries share a cluster", &|f| {
        f.l2(1, data);
    });
    add("data offset unaligned", &|f| {
        f.l2(0, (data + 512) | COPIED);
    });
    add("data beyond the end of the file", &|f| {
        f.l2(1, (100 * C) | COPIED);
    });
    add("L2 table beyond the end of the file", &|f| {
        f.l1(0, (100 * C) | COPIED);
    });
    add("L2 offset unaligned", &|f| {
        f.l1(0, (4 * C + 512) | COPIED);
    });
    add("data in the header", &|f| {
        f.l2(1, COPIED);
    });
    add("data in the refcount block", &|f| {
        f.l2(1, (2 * C) | COPIED);
    });
    add("reserved bits in an L2 entry", &|f| {
        f.l2(0, data | COPIED | 2);
    });
    add("reserved bits in an L1 entry", &|f| {
        f.l1(0, (4 * C) | COPIED | 1);
    });
    add("refcount block unaligned", &|f| {
        f.set64(65536, 2 * C + 512);
    });
    add("refcount block beyond the end", &|f| {
        f.set64(65536 + 8, 100 * C);
    });
    add("refcount block is the header", &|f| {
        f.set64(65536 + 8, 0x10000);
    });
    add("no refcount block at all", &|f| {
        f.set64(65536, 0);
    });
    add("compressed cluster", &|f| {
        f.l2(1, COMPRESSED | (data + 100)).refcount(5, 2).l2(0, data);
    });
    add("compressed and COPIED", &|f| {
        f.l2(1, COMPRESSED | COPIED | (data + 100)).refcount(5, 2).l2(0, data);
    });
    add("compressed beyond the end", &|f| {
        f.l2(1, COMPRESSED | (100 * C));
    });
    add("zero cluster with a place", &|f| {
        f.l2(0, data | COPIED | 1);
    });
    add("zero cluster in version 2", &|f| {
        f.set32(4, 2).l2(1, 1);
    });
    add("dirty", &|f| {
        f.set64(72, 1).refcount(5, 0);
    });
    add("corrupt bit", &|f| {
        f.set64(72, 2);
    });
    faults
}

/// Where vimg is stricter than qemu-img on purpose, and why.
const STRICTER: &[(&str, &str)] = &[
    (
        "L2 offset unaligned",
        "qemu goes on through a table that it has just called corrupted, and counts what it finds there",
    ),
    ("refcount block unaligned", "qemu reports every refcount of the block by itself, vimg the block"),
    ("zero cluster in version 2", "qemu does not notice that it will refuse to read this entry"),
];

#[test]
fn every_fault_is_counted_as_qemu_counts_it() {
    requires!(qemu10());
    let mut wrong = vec![];
    for (name, forge) in faults() {
        let dir = Dir::new();
        dir.write("a.qcow2", &forge.bytes());
        if STRICTER.iter().any(|(stricter, _)| *stricter == name) {
            let (theirs, ours) = (dir.qemu("check a.qcow2"), dir.linked("check a.qcow2").expect_no_panic());
            let found = ours.code == theirs.code || (theirs.code == Some(0) && ours.code == Some(2));
            assert!(found && ours.stdout.contains("errors were found"), "{name}: {}", ours.story());
            continue;
        }
        for words in ["check -f qcow2 a.qcow2", "check -f qcow2 --output=json a.qcow2"] {
            let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_no_panic());
            if theirs.code != ours.code || theirs.stdout != ours.stdout || theirs.stderr != ours.stderr {
                wrong.push(format!("=== {name}\n--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of the verdicts differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Checking never changes an image.
#[test]
fn nothing_is_written() {
    for (name, forge) in faults() {
        let dir = Dir::new();
        dir.write("a.qcow2", &forge.bytes());
        dir.vimg("check a.qcow2").expect_no_panic();
        assert!(dir.read("a.qcow2") == forge.bytes(), "{name}: the image was changed");
    }
}

#[test]
fn codes_of_the_odd_cases() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    for words in [
        "check -f raw a.raw",
        "check -f raw --output=json a.raw",
        "check missing.qcow2",
        "check -f qcow2 a.raw",
        "check -f nonsense a.raw",
        "check --output=xml a.raw",
    ] {
        dir.same(words);
    }
    assert_eq!(dir.vimg("check -f raw a.raw").code, Some(63));
    assert_eq!(dir.vimg("check").code, Some(1));
}

/// Snapshots and bitmaps are not written by this version, but their clusters are counted.
#[test]
fn snapshots_and_bitmaps_are_accounted_for() {
    requires!(qemu());
    let dir = Dir::new();
    for options in
        ["cluster_size=64k", "cluster_size=4k", "compat=0.10", "extended_l2=on", "refcount_bits=64"]
    {
        dir.qemu_ok(&format!("create -f qcow2 -o {options} a.qcow2 4M"));
        let ops = |seed| tests::Ops::tour(4 << 20, 4096, seed, false, false);
        dir.qemu_io("qcow2", "a.qcow2", &ops(1));
        dir.qemu_ok("snapshot -c one a.qcow2");
        dir.qemu_io("qcow2", "a.qcow2", &ops(2));
        dir.qemu_ok("snapshot -c two a.qcow2");
        dir.qemu_io("qcow2", "a.qcow2", &ops(3));
        if !options.contains("0.10") {
            dir.qemu_ok("bitmap --add -g 64k a.qcow2 b0");
            dir.qemu_io("qcow2", "a.qcow2", &ops(4));
        }
        dir.same("check a.qcow2");
        dir.same_json("check --output=json a.qcow2");
        assert!(dir.vimg_reads("a.qcow2") == dir.qemu_reads("a.qcow2"), "{options}");
    }
}
