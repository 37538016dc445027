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

/// One snapshot of the forged disk, its table at cluster 6, its L1 table at 7.
fn with_snapshot(f: &mut Forge, extra: u32) {
    let mut entry: Vec<u8> = [7 * C, 0].concat_be();
    entry.truncate(8);
    entry.extend(1u32.to_be_bytes());
    entry.extend([0, 1, 0, 2]);
    entry.extend([0; 20]);
    entry.extend(extra.to_be_bytes());
    let mut data = [0, 16 * C, u64::MAX].concat_be();
    data.resize(usize::try_from(extra).unwrap(), 0xee);
    entry.extend(data);
    entry.extend(b"1s1");
    f.set32(60, 1).set64(64, 6 * C).set(6 * 65536, &entry);
    f.set64(7 * 65536, 4 * C).set(8 * 65536 - 1, &[0]);
    f.refcount(6, 1).refcount(7, 1).refcount(4, 2).refcount(5, 2);
    f.l1(0, 4 * C).l2(0, 5 * C);
}

/// One bitmap: directory at cluster 7, table at 8, data at 9.
fn with_bitmap(f: &mut Forge) {
    let mut entry = [8 * C].concat_be();
    entry.extend(1u32.to_be_bytes());
    entry.extend(0u32.to_be_bytes());
    entry.extend([1, 16, 0, 2, 0, 0, 0, 0]);
    entry.extend(b"b0\0\0\0\0\0\0");
    let mut extension = 1u32.to_be_bytes().to_vec();
    extension.extend(0u32.to_be_bytes());
    extension.extend([entry.len() as u64, 7 * C].concat_be());
    f.set64(88, 1).extension(0x2385_2875, &extension);
    f.set(7 * 65536, &entry).set64(8 * 65536, 9 * C).set(10 * 65536 - 1, &[0]);
    f.refcount(7, 1).refcount(8, 1).refcount(9, 1);
}

/// Big-endian bytes of words.
trait ConcatBe {
    fn concat_be(&self) -> Vec<u8>;
}

impl<const N: usize> ConcatBe for [u64; N] {
    fn concat_be(&self) -> Vec<u8> {
        self.iter().flat_map(|word| word.to_be_bytes()).collect()
    }
}

/// What more can be wrong where a repair is concerned.
fn more_faults() -> Vec<(&'static str, Forge)> {
    let mut faults = vec![];
    let mut add = |name, change: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::new();
        change(&mut forge);
        faults.push((name, forge));
    };
    let data = at::DATA as u64 * C;
    add("refcount table entry with reserved bits", &|f| {
        f.set64(65536, 2 * C + 1);
    });
    add("two refcount blocks in one", &|f| {
        f.set64(65536 + 8, 2 * C);
    });
    add("refcount table of no clusters", &|f| {
        f.set32(56, 0);
    });
    add("refcount table beyond the end", &|f| {
        f.set64(48, 100 * C);
    });
    add("data in the refcount table", &|f| {
        f.l2(1, C | COPIED);
    });
    add("data in the L1 table", &|f| {
        f.l2(1, (3 * C) | COPIED);
    });
    add("data in the L2 table", &|f| {
        f.l2(1, (4 * C) | COPIED);
    });
    add("L2 table in the refcount table", &|f| {
        f.l1(0, C | COPIED);
    });
    add("L2 table in the L1 table", &|f| {
        f.l1(0, (3 * C) | COPIED);
    });
    add("two L1 entries with one L2 table", &|f| {
        f.set32(36, 2).set64(24, 1 << 30).l1(1, (4 * C) | COPIED);
    });
    add("zero cluster at an unaligned place", &|f| {
        f.l2(0, (data + 512) | COPIED | 1);
    });
    add("leak and corrupt bit", &|f| {
        f.set64(72, 2).refcount(5, 3);
    });
    add("leak and refcount 0", &|f| {
        f.set(6 * 65536, &[0; 65536]).refcount(6, 1).refcount(5, 0);
    });
    add("snapshot", &|f| with_snapshot(f, 24));
    add("snapshot without extra data", &|f| with_snapshot(f, 0));
    add("snapshot with half of its extra data", &|f| with_snapshot(f, 8));
    add("snapshot with too much extra data", &|f| with_snapshot(f, 1032));
    add("snapshot table beyond the end", &|f| {
        with_snapshot(f, 24);
        f.set64(64, 100 * C);
    });
    add("snapshot with an unaligned L1 table", &|f| {
        with_snapshot(f, 24);
        f.set64(6 * 65536, 7 * C + 512);
    });
    add("snapshot with an L1 table beyond the end", &|f| {
        with_snapshot(f, 24);
        f.set64(6 * 65536, 100 * C);
    });
    add("snapshot with an L2 table beyond the end", &|f| {
        with_snapshot(f, 24);
        f.set64(7 * 65536, 100 * C);
    });
    add("snapshot whose clusters count once", &|f| {
        with_snapshot(f, 24);
        f.refcount(4, 1).refcount(5, 1);
    });
    add("snapshot and COPIED", &|f| {
        with_snapshot(f, 24);
        f.l1(0, (4 * C) | COPIED).l2(0, data | COPIED);
    });
    add("snapshot with an L2 table of its own", &|f| {
        with_snapshot(f, 24);
        f.set64(7 * 65536, 8 * C).set64(8 * 65536, 5 * C).set(9 * 65536 - 1, &[0]);
        f.refcount(8, 2).refcount(4, 1).l1(0, (4 * C) | COPIED);
    });
    add("bitmap", &with_bitmap);
    add("bitmap's data counts twice", &|f| {
        with_bitmap(f);
        f.refcount(9, 2);
    });
    add("bitmap's table does not count", &|f| {
        with_bitmap(f);
        f.refcount(8, 0);
    });
    add("bitmaps of a program that does not know them", &|f| {
        with_bitmap(f);
        f.set64(88, 0);
    });
    add("bitmap directory of garbage", &|f| {
        with_bitmap(f);
        f.set(7 * 65536 + 16, &[0; 16]);
    });
    faults
}

/// Where the outcome of a repair is another than qemu's on purpose, and why (docs/qcow2-check.md says it in full).
const OTHER_REPAIRS: &[(&str, &str)] = &[
    ("L2 table beyond the end of the file (leaks)", KEPT),
    ("L2 table beyond the end of the file (all)", KEPT),
    ("L2 offset unaligned (leaks)", "qemu counts what it makes of the garbage"),
    ("L2 offset unaligned (all)", "qemu counts what it makes of the garbage"),
    ("refcount block beyond the end (all)", "qemu lets the file grow to the block and counts it, too"),
    ("zero cluster in version 2 (leaks)", "qemu does not notice that it will refuse to read this entry"),
    ("zero cluster in version 2 (all)", "qemu does not notice that it will refuse to read this entry"),
    ("data in the refcount table (all)", "the table moves away: no flag has to go"),
    ("data in the L2 table (all)", "the data moves away: one flag less has to go"),
    ("snapshot table beyond the end (leaks)", KEPT),
    ("snapshot table beyond the end (all)", KEPT),
    ("snapshot with an unaligned L1 table (leaks)", KEPT),
    ("snapshot with an unaligned L1 table (all)", KEPT),
    ("snapshot with an L1 table beyond the end (leaks)", KEPT),
    ("snapshot with an L1 table beyond the end (all)", KEPT),
    ("snapshot with an L2 table beyond the end (leaks)", KEPT),
    ("snapshot with an L2 table beyond the end (all)", KEPT),
];

const KEPT: &str = "what looks leaked may be what the damaged entry meant: qemu gives it away";

/// Exit code and counts of a repair.
fn outcome(ran: &tests::command::Ran) -> Vec<String> {
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap_or_default();
    let count = |key: &str| json.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let keys = ["corruptions", "corruptions-fixed", "leaks", "leaks-fixed", "check-errors"];
    let counts = keys.map(|key| format!("{key} {}", count(key)));
    [vec![format!("code {:?}", ran.code)], counts.to_vec()].concat()
}

/// Both tools repair copies of every damaged image. The outcome is the same, except where it is said why not; and
/// whatever vimg calls clean, qemu-img finds clean.
#[test]
fn repairs_end_as_those_of_qemu() {
    requires!(qemu10());
    let mut wrong = vec![];
    for (name, forge) in faults().into_iter().chain(more_faults()) {
        for mode in ["leaks", "all"] {
            let dir = Dir::new();
            dir.write("a.qcow2", &forge.bytes());
            dir.write("b.qcow2", &forge.bytes());
            let theirs = dir.qemu(&format!("check -f qcow2 --output=json -r {mode} a.qcow2"));
            let ours = dir.vimg(&format!("check -f qcow2 --output=json -r {mode} b.qcow2")).expect_no_panic();
            let after = dir.qemu("check -f qcow2 b.qcow2");
            if ours.code == Some(0) && after.code != Some(0) {
                wrong.push(format!("=== {name} ({mode}) is not clean\n{}{}", ours.story(), after.story()));
            }
            let label = format!("{name} ({mode})");
            // Where qemu gives up, a report or a repair is no worse.
            if theirs.code == Some(1) && theirs.stdout.trim().is_empty() {
                continue;
            }
            let known = OTHER_REPAIRS.iter().any(|(other, _)| *other == label);
            if (outcome(&theirs) == outcome(&ours)) == known {
                wrong.push(format!(
                    "=== {label}\n--- qemu-img\n{:?}\n--- vimg\n{:?}",
                    outcome(&theirs),
                    outcome(&ours)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of the repairs differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Snapshots, bitmaps and a LUKS header are counted anew together with everything else, and hold what they held.
#[test]
fn a_rebuild_counts_every_structure() {
    requires!(qemu10());
    const SECRET: &str = "--object secret,id=s,data=word";
    let node = |name: &str| format!("driver=qcow2,file.filename={name},encrypt.key-secret=s");
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on", "refcount_bits=8", "luks"] {
        let dir = Dir::new();
        let luks = options == "luks";
        if luks {
            let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
            dir.qemu_ok(&format!("create {SECRET} -f qcow2 -o {luks} a.qcow2 4M"));
            let image = node("a.qcow2");
            let write = format!("{SECRET} --image-opts {image} -c");
            tests::command::qemu_io().words(&write).arg("write -P 7 1M 1M").dir(dir.path()).ok();
        } else {
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
        }
        dir.copy("a.qcow2", "b.qcow2");
        let table = dir.peek64("b.qcow2", 48);
        dir.poke64("b.qcow2", table, dir.peek64("b.qcow2", table) | 2);
        assert_eq!(dir.vimg("check b.qcow2").code, Some(2), "{options}");
        dir.vimg_ok("check -r all b.qcow2");
        if luks {
            dir.qemu_ok(&format!("check {SECRET} --image-opts {}", node("b.qcow2")));
            dir.qemu_ok(&format!("compare {SECRET} --image-opts {} {}", node("a.qcow2"), node("b.qcow2")));
            continue;
        }
        dir.qemu_ok("check b.qcow2");
        dir.qemu_ok("compare a.qcow2 b.qcow2");
        for snapshot in ["one", "two"] {
            for image in ["a", "b"] {
                dir.qemu_ok(&format!("convert -l {snapshot} -O raw {image}.qcow2 {image}.raw"));
            }
            assert!(dir.read("a.raw") == dir.read("b.raw"), "{options}: snapshot {snapshot}");
        }
        let info = |name: &str| dir.qemu_ok(&format!("info --output=json {name}")).stdout;
        let bitmaps = |text: String| {
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            json["format-specific"]["data"]["bitmaps"].clone()
        };
        assert_eq!(bitmaps(info("a.qcow2")), bitmaps(info("b.qcow2")), "{options}");
        // All of it can be written again.
        dir.qemu_io("qcow2", "b.qcow2", &tests::Ops::tour(4 << 20, 4096, 9, false, false));
        dir.qemu_ok("snapshot -d one b.qcow2");
        dir.qemu_ok("check b.qcow2");
    }
}
