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
    for shape in shapes().step_by(3) {
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

/// What an image should hold: the disk, and every snapshot by its id.
#[derive(Default)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Model {
    fn next(&self) -> u32 {
        self.snapshots.iter().filter_map(|(id, _)| id.parse::<u32>().ok()).max().unwrap_or(0) + 1
    }

    fn create(&mut self) {
        self.snapshots.push((self.next().to_string(), self.disk.clone()));
    }

    fn apply(&mut self, id: &str) {
        self.disk = self.snapshots.iter().find(|(known, _)| known == id).unwrap().1.clone();
    }

    fn delete(&mut self, id: &str) {
        self.snapshots.retain(|(known, _)| known != id);
    }

    #[track_caller]
    fn agrees(&self, dir: &Dir, story: &str) {
        assert!(dir.vimg_reads("a.qcow2") == self.disk, "{story}: the disk");
        assert!(dir.qemu_reads("a.qcow2") == self.disk, "{story}: the disk, for qemu-img");
        for (id, bytes) in &self.snapshots {
            dir.vimg_ok(&format!("convert -l {id} -O raw a.qcow2 view.raw"));
            assert!(dir.read("view.raw") == *bytes, "{story}: snapshot {id}");
            dir.qemu_ok(&format!("convert -l {id} -O raw a.qcow2 view.raw"));
            assert!(dir.read("view.raw") == *bytes, "{story}: snapshot {id}, for qemu-img");
        }
        dir.same("snapshot -l a.qcow2");
    }
}

/// Every step by one tool or the other, in both orders, and after each of them nothing is wrong.
#[test]
fn both_tools_take_turns() {
    requires!(qemu10());
    let wanted = [
        "default",
        "v2-512",
        "v2-2m",
        "512",
        "2m",
        "refcount-2",
        "refcount-4",
        "refcount-64",
        "lazy",
        "zstd-4k",
        "extended-16k",
        "pre-metadata-v2",
        "pre-metadata-extended",
        "backing-1",
        "backing-1-extended",
    ];
    for shape in shapes().filter(|shape| wanted.contains(&shape.name)) {
        for first in [0_usize, 1] {
            let dir = Dir::new();
            shape.build_with_qemu(&dir, "a.qcow2", false);
            let mut model = Model { disk: dir.qemu_reads("a.qcow2"), ..Model::default() };
            let mut story = shape.name.to_owned();
            let steps = ["-c", "w", "-c", "-a 1", "w", "-d 1", "-c", "w", "-a 2", "-d 3", "w", "-d 2"];
            for (turn, step) in (first..).zip(steps) {
                let words = match step {
                    "-c" => format!("snapshot -c s{} a.qcow2", model.next()),
                    step => format!("snapshot {} a.qcow2", step.replace("-d ", "-d s")),
                };
                story += &format!(", {} {step}", ["vimg", "qemu-img"][turn % 2]);
                match step.split_once(' ') {
                    _ if step == "w" => {
                        let ops = shape.tour(u8::try_from(turn + 3).unwrap(), false).uncompressed();
                        dir.qemu_io("qcow2", "a.qcow2", &ops);
                        model.disk = dir.qemu_reads("a.qcow2");
                    }
                    None => model.create(),
                    Some(("-a", id)) => model.apply(id),
                    Some((_, id)) => model.delete(id),
                }
                if step != "w" {
                    let ran = if turn % 2 == 0 { dir.vimg(&words) } else { dir.qemu(&words) };
                    assert!(ran.code == Some(0), "{story}\n{}", ran.story());
                }
                let checked = dir.qemu("check -f qcow2 a.qcow2");
                assert!(checked.code == Some(0), "{story}\n{}", checked.story());
            }
            model.agrees(&dir, &story);
            dir.vimg_checks("a.qcow2");
        }
    }
}

#[test]
fn the_disk_takes_the_size_of_the_snapshot_that_is_applied() {
    requires!(qemu10());
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        let dir = Dir::new();
        dir.qemu_ok(&format!("create -f qcow2 -o {options} a.qcow2 1M"));
        dir.vimg_ok("snapshot -c small a.qcow2");
        dir.vimg_ok("resize a.qcow2 40M");
        dir.vimg_ok("snapshot -c large a.qcow2");
        dir.vimg_ok("resize --shrink a.qcow2 3M");
        for (name, size) in [("large", 40 << 20), ("small", 1 << 20), ("large", 40 << 20)] {
            dir.copy("a.qcow2", "b.qcow2");
            dir.vimg_ok(&format!("snapshot -a {name} a.qcow2"));
            dir.qemu_ok(&format!("snapshot -a {name} b.qcow2"));
            for file in ["a.qcow2", "b.qcow2"] {
                let info = dir.same_json(&format!("info --output=json {file}"));
                assert_eq!(info["virtual-size"], size, "{options}, {name}");
                dir.qemu_checks(file);
            }
        }
    }
}

#[test]
fn what_cannot_be_done_is_refused_in_the_same_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    for (options, words) in [
        ("", "snapshot -a nope a.qcow2"),
        ("", "snapshot -d nope a.qcow2"),
        ("", "snapshot -d 1 a.qcow2"),
        ("", "snapshot -U -c x a.qcow2"),
        ("", "snapshot -l -c x a.qcow2"),
        ("", "snapshot -c x -d y a.qcow2"),
        ("", "snapshot -c x -c y a.qcow2"),
        ("", "snapshot -l -l a.qcow2"),
        ("", "snapshot -c x"),
        ("", "snapshot -c"),
        ("", "snapshot -c x a.qcow2 b"),
        ("", "snapshot -c x missing.qcow2"),
        ("", "snapshot -c x -f raw a.raw"),
        ("", "snapshot -a x -f raw a.raw"),
        ("", "snapshot -d x -f raw a.raw"),
        ("", "snapshot -c x a.raw"),
        ("-o data_file=a.data", "snapshot -c x a.qcow2"),
        ("-o data_file=a.data", "snapshot -a x a.qcow2"),
        ("-o data_file=a.data", "snapshot -d x a.qcow2"),
        ("-o refcount_bits=1", "snapshot -c x a.qcow2"),
    ] {
        dir.qemu_ok(&format!("create -f qcow2 {options} a.qcow2 1M"));
        dir.qemu_io(
            "qcow2",
            "a.qcow2",
            &tests::Ops(vec![tests::Op::Write { offset: 0, len: 70_000, byte: 1 }]),
        );
        dir.copy("a.qcow2", "before.qcow2");
        dir.linked(words).expect_no_panic();
        let unchanged = dir.read("a.qcow2") == dir.read("before.qcow2");
        assert!(unchanged, "vimg {words} has changed the image with {options:?}");
        dir.same(words);
    }
}

/// A bitmap would not know what changes when a snapshot is applied.
#[test]
fn bitmaps_prevent_what_they_prevent_in_qemu() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    dir.qemu_ok("bitmap --add a.qcow2 b");
    dir.same("snapshot -a nope a.qcow2");
    dir.vimg_ok("snapshot -c s a.qcow2");
    dir.qemu_checks("a.qcow2");
    dir.same("snapshot -a s a.qcow2");
    dir.vimg_ok("snapshot -d s a.qcow2");
    dir.qemu_checks("a.qcow2");
    dir.same_json("info --output=json a.qcow2");
}

#[test]
fn names_and_ids_are_found_as_qemu_finds_them() {
    requires!(qemu10());
    for words in ["-d 2", "-d 1", "-d x", "-a 2", "-a x", "-a 1"] {
        let dir = Dir::new();
        dir.qemu_ok("create -f qcow2 a.qcow2 1M");
        for (name, byte) in [("2", 1), ("x", 2), ("x", 3), ("1", 4)] {
            dir.qemu_io(
                "qcow2",
                "a.qcow2",
                &tests::Ops(vec![tests::Op::Write { offset: 0, len: 512, byte }]),
            );
            dir.qemu_ok(&format!("snapshot -c {name} a.qcow2"));
        }
        dir.copy("a.qcow2", "b.qcow2");
        dir.vimg_ok(&format!("snapshot {words} a.qcow2"));
        dir.qemu_ok(&format!("snapshot {words} b.qcow2"));
        assert_eq!(dir.vimg("snapshot -l a.qcow2").stdout, dir.qemu("snapshot -l b.qcow2").stdout, "{words}");
        assert!(dir.qemu_reads("a.qcow2") == dir.qemu_reads("b.qcow2"), "{words}");
        dir.qemu_checks("a.qcow2");
    }
}

#[test]
fn a_name_is_cut_and_an_id_is_one_more() {
    requires!(qemu10());
    let dir = Dir::new();
    let long = "n".repeat(300);
    dir.qemu_ok("create -f qcow2 a.qcow2 1M");
    dir.copy("a.qcow2", "b.qcow2");
    for words in [
        format!("-c {long}"),
        "-c two".into(),
        format!("-d {}", &long[..255]),
        "-c three".into(),
        "-d three".into(),
        "-c four".into(),
    ] {
        dir.vimg_ok(&format!("snapshot {words} a.qcow2"));
        dir.qemu_ok(&format!("snapshot {words} b.qcow2"));
    }
    let names = |file: &str| {
        let info = dir.qemu_ok(&format!("info --output=json {file}")).json();
        let list = info["snapshots"].as_array().unwrap().clone();
        let of = |snapshot: &serde_json::Value| {
            ["id", "name", "vm-state-size", "vm-clock-sec", "vm-clock-nsec", "icount"]
                .map(|key| snapshot[key].to_string())
        };
        list.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(names("a.qcow2"), names("b.qcow2"));
}

/// The machine's state lies behind the end of the disk. qemu-img applies and deletes such snapshots as any other.
#[test]
fn a_snapshot_with_machine_state_is_one_like_any_other() {
    requires!(qemu10());
    let dir = Dir::new();
    // One L2 table of 512-byte clusters maps 32 KiB: the state begins behind that.
    dir.qemu_ok("create -f qcow2 -o cluster_size=512 a.qcow2 64k");
    dir.qemu_io("qcow2", "a.qcow2", &tests::Ops(vec![tests::Op::Write { offset: 0, len: 65536, byte: 7 }]));
    dir.qemu_ok("snapshot -c state a.qcow2");
    // The first half of the disk becomes the state: the disk of the snapshot, and the disk, end there.
    let table = dir.peek64("a.qcow2", 64);
    dir.poke64("a.qcow2", table + 40, 32 << 10);
    dir.poke64("a.qcow2", table + 48, 32 << 10);
    dir.poke64("a.qcow2", 24, 32 << 10);
    dir.qemu_checks("a.qcow2");
    dir.same("snapshot -l a.qcow2");
    dir.same("info a.qcow2");
    for words in [
        "snapshot -a state",
        "snapshot -c again",
        "snapshot -d state",
        "resize a.qcow2 1M",
        "snapshot -d again",
    ] {
        let words = if words.starts_with("resize") { words.to_owned() } else { format!("{words} a.qcow2") };
        dir.vimg_ok(&words);
        dir.qemu_checks("a.qcow2");
        dir.vimg_checks("a.qcow2");
    }
    let disk = dir.qemu_reads("a.qcow2");
    assert!(disk[..32 << 10].iter().all(|byte| *byte == 7));
    assert!(disk[32 << 10..].iter().all(|byte| *byte == 0), "machine state shows where the disk has grown");
}

/// One entry of the table that leads nowhere does not take the disk and the other snapshots with it.
#[test]
fn a_snapshot_that_leads_nowhere_takes_nothing_with_it() {
    let dir = Dir::new();
    dir.vimg_ok("create -q -f qcow2 a.qcow2 1M");
    dir.vimg_ok("bench -q -w -c 4 -s 64k --pattern 5 a.qcow2");
    dir.vimg_ok("snapshot -c one a.qcow2");
    dir.vimg_ok("snapshot -c two a.qcow2");
    let disk = dir.vimg_reads("a.qcow2");
    let table = dir.peek64("a.qcow2", 64);
    dir.poke64("a.qcow2", table, 0x1234_5678_9abc_def1);
    assert_eq!(dir.vimg_reads("a.qcow2"), disk);
    assert_eq!(dir.vimg_ok("snapshot -l a.qcow2").stdout.lines().count(), 4);
    dir.vimg_ok("info a.qcow2");
    dir.vimg_ok("convert -l two -O raw a.qcow2 two.raw");
    assert_eq!(dir.read("two.raw"), disk);
    let ran = dir.vimg("convert -l one -O raw a.qcow2 one.raw").expect_code(1);
    assert!(ran.stderr.contains("L1 table"), "{}", ran.story());
    assert!(!dir.exists("one.raw"));
    let ran = dir.vimg("snapshot -d two a.qcow2").expect_code(1);
    assert!(ran.stderr.contains("convert it to a new image"), "{}", ran.story());
}
