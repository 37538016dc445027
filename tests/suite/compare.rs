//! `compare`: verdicts, words and exit codes.

use tests::shape::SHAPES;
use tests::skip::{qemu, qemu10};
use tests::{Dir, Op, Ops, requires};

#[test]
fn every_shape_with_its_contents() {
    requires!(qemu10());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        dir.qemu_ok("convert -O raw a.qcow2 a.raw");
        dir.same("compare -F raw a.qcow2 a.raw");
        dir.same("compare -f raw -F qcow2 a.raw a.qcow2");
        dir.same_outcome("compare -s a.qcow2 a.qcow2");
        // One byte in the middle of nowhere.
        dir.poke("a.raw", shape.size() / 2 + 77, &[0xee]);
        let verdict = dir.same("compare -F raw a.qcow2 a.raw");
        assert_eq!(verdict.code, Some(1), "{}", verdict.story());
        dir.same("compare -q -F raw a.qcow2 a.raw");
    }
}

#[test]
fn different_lengths() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("short.raw", 1 << 20);
    dir.sparse("long.raw", 3 << 20);
    dir.sparse("odd.raw", (1 << 20) + 700);
    dir.sparse("data.raw", 3 << 20);
    dir.poke("data.raw", (2 << 20) + 1234, b"x");
    dir.qemu_ok("create -f qcow2 empty.qcow2 3M");
    for (a, b) in [
        ("short", "long"),
        ("long", "short"),
        ("short", "odd"),
        ("odd", "short"),
        ("short", "data"),
        ("data", "short"),
        ("data", "long"),
    ] {
        dir.same(&format!("compare -f raw -F raw {a}.raw {b}.raw"));
        dir.same(&format!("compare -s -f raw -F raw {a}.raw {b}.raw"));
        // Only where the percentages stop on their way is each tool's own affair.
        let words = format!("compare -p -f raw -F raw {a}.raw {b}.raw");
        let (theirs, ours) = (dir.qemu(&words), dir.linked(&words).expect_no_panic());
        let verdict = theirs.stdout.rsplit('\r').next().unwrap().trim_end();
        assert!(
            ours.code == theirs.code && ours.stdout.contains(verdict),
            "{}{}",
            theirs.story(),
            ours.story()
        );
        assert!(ours.stdout.contains("    (0.00/100%)\r"), "{}", ours.story());
    }
    dir.same("compare -f raw long.raw empty.qcow2");
    dir.same("compare -s -f raw long.raw empty.qcow2");
}

#[test]
fn failures_have_their_own_codes() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    dir.same("compare a.raw missing.raw");
    dir.same("compare missing.raw a.raw");
    dir.same("compare -f nonsense a.raw a.raw");
    dir.same("compare -T nonsense a.raw a.raw");
    for words in ["compare a.raw", "compare a.raw a.raw a.raw", "compare --nonsense a.raw a.raw"] {
        assert_eq!(dir.qemu(words).code, dir.linked(words).expect_no_panic().code, "{words}");
    }
}

/// The difference that is found is the first one, whichever thread came upon which first.
#[test]
fn the_first_of_many_differences() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 256M");
    dir.qemu_ok("create -f qcow2 b.qcow2 256M");
    let mut ops = Ops::default();
    for n in (3..250).rev().step_by(7) {
        ops.0.push(Op::Write { offset: (n << 20) + 1536, len: 512, byte: 9 });
    }
    dir.qemu_io("qcow2", "b.qcow2", &ops);
    for _ in 0..10 {
        let verdict = dir.same("compare a.qcow2 b.qcow2");
        assert!(verdict.stdout.contains("Content mismatch at offset"), "{}", verdict.story());
    }
}
