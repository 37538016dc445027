//! Internal snapshots: the same words as qemu-img, snapshots of either tool used by the other, and what each of
//! them shows.

use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

/// Shapes that can hold snapshots: no data file, and counters that can count to two.
fn shapes() -> impl Iterator<Item = &'static tests::Shape> {
    SHAPES.iter().filter(|shape| shape.data_file == 0 && shape.name != "refcount-1")
}

#[test]
fn snapshots_of_qemu_are_listed_and_read() {
    requires!(qemu10());
    for shape in shapes() {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", false);
        let before = dir.qemu_reads("a.qcow2");
        dir.qemu_ok("snapshot -c first a.qcow2");
        dir.qemu_io("qcow2", "a.qcow2", &shape.tour(9, false).uncompressed());
        dir.qemu_ok("snapshot -c 1 a.qcow2");
        dir.same("snapshot -l a.qcow2");
        dir.same("info a.qcow2");
        for selector in
            ["first", "1", "2", "snapshot.id=2", "snapshot.name=1", "snapshot.id=1,snapshot.name=first"]
        {
            dir.qemu_ok(&format!("convert -l {selector} -O raw a.qcow2 theirs.raw"));
            dir.vimg_ok(&format!("convert -l {selector} -O raw a.qcow2 ours.raw"));
            assert!(dir.read("theirs.raw") == dir.read("ours.raw"), "{}: -l {selector}", shape.name);
            dir.same(&format!("measure -l {selector} -O qcow2 a.qcow2"));
        }
        dir.vimg_ok("convert -l first -O raw a.qcow2 first.raw");
        assert!(dir.read("first.raw") == before, "{}", shape.name);
        dir.vimg_ok("compare -F raw --a-snapshot first a.qcow2 first.raw");
        dir.vimg("compare -F raw --a-snapshot 2 a.qcow2 first.raw").expect_code(1);
        dir.vimg_ok("compare --a-snapshot first --b-snapshot 1 a.qcow2 a.qcow2");
    }
}

/// qemu-img shows every snapshot with the size that the disk has now, and so loses the end of a larger one.
#[test]
fn a_snapshot_has_a_size_of_its_own() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    dir.qemu_ok("snapshot -c small a.qcow2");
    dir.qemu_ok("resize a.qcow2 4M");
    dir.qemu_ok("snapshot -c large a.qcow2");
    dir.qemu_ok("resize --shrink a.qcow2 2M");
    for (name, size) in [("small", 1 << 20), ("large", 4 << 20)] {
        dir.vimg_ok(&format!("convert -l {name} -O raw a.qcow2 a.raw"));
        assert_eq!(dir.read("a.raw").len(), size, "{name}");
        dir.vimg_ok(&format!("measure -l {name} a.qcow2")).expect_stdout(&format!("required size: {size}"));
    }
}

#[test]
fn missing_and_misnamed_snapshots_are_refused_in_the_same_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    dir.qemu_ok("snapshot -c one a.qcow2");
    dir.sparse("a.raw", 1 << 20);
    for selector in ["nope", "snapshot.id=9", "snapshot.name=1", "snapshot.id=", "snapshot.foo=1", "one,two"]
    {
        dir.same(&format!("convert -l {selector} -O raw a.qcow2 b.raw"));
        dir.same(&format!("measure -l {selector} a.qcow2"));
        assert!(!dir.exists("b.raw"));
    }
    for words in [
        "convert -l one -f raw -O raw a.raw b.raw",
        "convert -l one -O raw a.qcow2 a.qcow2 b.raw",
        "convert -l snapshot.id=1 -O raw a.qcow2 a.qcow2 b.raw",
        "measure -l one -f raw a.raw",
        "measure -l one --size 1M",
        "snapshot",
        "snapshot a b",
        "snapshot -l missing",
        "snapshot -f raw a.raw",
        "snapshot -f raw -l a.qcow2",
        "snapshot -f nope a.qcow2",
        "snapshot -U a.qcow2",
        "snapshot -q a.qcow2",
        "snapshot --image-opts driver=qcow2,file.filename=a.qcow2",
        "snapshot --image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2",
        "snapshot -Z a.qcow2",
    ] {
        dir.same(words);
    }
}
