//! `amend`: the same words, and afterwards an image that both tools find sound, that says the same of itself, and
//! that holds the same disk.

use tests::shape::{SHAPES, Shape};
use tests::skip::qemu10;
use tests::{Dir, Ran, requires};

/// Copies everything in one folder to another.
fn clone_of(dir: &Dir) -> Dir {
    let copy = Dir::new();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// What an image says of itself, without what depends on where things lie.
fn described(dir: &Dir) -> serde_json::Value {
    let mut info = dir.qemu("info --output=json -f qcow2 a.qcow2").json();
    let fields = info.as_object_mut().unwrap();
    fields.remove("actual-size");
    fields.remove("children");
    info
}

/// What both tools make of one image. `words` is what stands after `-o`.
struct Tried {
    theirs: Dir,
    ours: Dir,
    code: Option<i32>,
    story: String,
}

fn last_of(progress: &str) -> &str {
    progress.rsplit('\r').find(|part| !part.trim().is_empty()).unwrap_or(progress)
}

fn amend(original: &Dir, words: &str, name: &str) -> Tried {
    let (theirs, ours) = (clone_of(original), clone_of(original));
    let line = format!("amend -f qcow2 -o {words} a.qcow2");
    let (a, b) = (theirs.qemu(&line), ours.linked(&line).expect_no_panic());
    let story = format!("{name}: --- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    assert!(a.code == b.code && a.stdout == b.stdout && a.stderr == b.stderr, "{story}");
    Tried { theirs, ours, code: a.code, story }
}

impl Tried {
    /// Both images are sound and alike, for either tool.
    fn alike(&self) -> &Self {
        let verdicts = [self.ours.qemu("check -f qcow2 a.qcow2"), self.ours.vimg("check -f qcow2 a.qcow2")];
        for verdict in &verdicts {
            assert!(verdict.code == Some(0), "{}\nafterwards\n{}", self.story, verdict.story());
        }
        assert_eq!(described(&self.theirs), described(&self.ours), "{}", self.story);
        let same = self.ours.qemu_reads("a.qcow2") == self.theirs.qemu_reads("a.qcow2");
        assert!(same, "{}\nafterwards the contents differ", self.story);
        let same = self.theirs.vimg_reads("a.qcow2") == self.ours.vimg_reads("a.qcow2");
        assert!(same, "{}\nafterwards vimg finds that the contents differ", self.story);
        self
    }

    /// And the disk is what it was.
    fn unchanged(&self, original: &[u8]) -> &Self {
        assert!(
            self.ours.qemu_reads("a.qcow2") == original,
            "{}\nafterwards the disk is another",
            self.story
        );
        self
    }
}

/// Amended for the most part as a whole, and with what comes after it, with snapshots taken in between.
fn built(shape: &Shape, snapshots: bool) -> Dir {
    let dir = Dir::new();
    shape.build_with_qemu(&dir, "a.qcow2", false);
    if snapshots {
        let fills = shape.options.contains("refcount_bits=1") || shape.options.contains("refcount_bits=2");
        assert!(!fills, "{}: no room in the refcounts for snapshots", shape.name);
        dir.qemu_ok("snapshot -c one a.qcow2");
        let cluster = shape.cluster;
        for command in [
            format!("write -P 9 {} {}", 2 * cluster, 3 * cluster),
            format!("write -z {} {}", 3 * cluster, 3 * cluster),
            format!("write -z -u {} {}", 8 * cluster, 2 * cluster),
        ] {
            let io = tests::command::qemu_io().words("-f qcow2 a.qcow2 -c").arg(command).dir(dir.path());
            io.ok();
        }
        dir.qemu_ok("snapshot -c two a.qcow2");
    }
    dir
}

/// vimg alone; qemu-img only looks at the result.
fn ours_alone(original: &Dir, words: &str, name: &str, disk: &[u8]) {
    let dir = clone_of(original);
    let ran = dir.linked(&format!("amend -f qcow2 -o {words} a.qcow2")).expect_no_panic();
    assert!(ran.code == Some(0) || name.contains("v2"), "{name}: {}", ran.story());
    for verdict in [dir.qemu("check -f qcow2 a.qcow2"), dir.vimg("check -f qcow2 a.qcow2")] {
        assert!(verdict.code == Some(0), "{name}: {}\nafterwards\n{}", ran.story(), verdict.story());
    }
    assert!(dir.qemu_reads("a.qcow2") == disk, "{name}: {}\nafterwards the disk is another", ran.story());
}

#[test]
fn every_shape_is_amended_alike() {
    requires!(qemu10());
    for shape in SHAPES {
        let original = built(shape, false);
        let bytes = original.qemu_reads("a.qcow2");
        for words in ["compat=0.10", "compat=1.1", "refcount_bits=64", "lazy_refcounts=on"] {
            // qemu-img takes minutes over the refcounts of images with large clusters.
            if words.starts_with("refcount") && shape.cluster > 4096 {
                ours_alone(&original, words, shape.name, &bytes);
                continue;
            }
            // qemu-img forgets the compression type of the image, and with it what is compressed.
            if words == "compat=0.10" && shape.options.contains("zstd") {
                continue;
            }
            amend(&original, words, shape.name).alike().unchanged(&bytes);
        }
        let half = shape.size() / 2 / 512 * 512;
        for words in [format!("size={half}"), format!("size={},compat=v3", 300 * shape.cluster)] {
            amend(&original, &words, shape.name).alike();
        }
    }
}

#[test]
fn snapshots_keep_what_they_hold() {
    requires!(qemu10());
    for name in ["512", "v2-4k", "4k", "backing-2", "backing-3-512", "backing-1-v2", "refcount-64"] {
        let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
        let original = built(shape, true);
        let bytes = original.qemu_reads("a.qcow2");
        let snapshot = |dir: &Dir, name: &str| {
            dir.qemu_ok(&format!("convert -f qcow2 -O raw -l {name} a.qcow2 snap.raw"));
            dir.read("snap.raw")
        };
        let (one, two) = (snapshot(&original, "one"), snapshot(&original, "two"));
        for words in [
            "compat=0.10,refcount_bits=16",
            "compat=1.1",
            "compat=1.1,refcount_bits=64",
            "compat=1.1,refcount_bits=1",
        ] {
            let tried = amend(&original, words, shape.name);
            tried.alike().unchanged(&bytes);
            assert!(snapshot(&tried.ours, "one") == one, "{}: snapshot one", tried.story);
            assert!(snapshot(&tried.ours, "two") == two, "{}: snapshot two", tried.story);
            // And the image goes on from there, whoever writes to it.
            if tried.code == Some(0) {
                tried.ours.qemu_ok("snapshot -a one a.qcow2");
                assert!(tried.ours.vimg_reads("a.qcow2") == one, "{}: after snapshot -a", tried.story);
                tried.ours.qemu_ok("snapshot -d one a.qcow2");
                tried.ours.qemu_ok("snapshot -d two a.qcow2");
                tried.ours.qemu_checks("a.qcow2");
            }
        }
    }
}

/// One after the other, on one image, the tools taking turns.
#[test]
fn a_long_life() {
    requires!(qemu10());
    for name in ["512", "backing-3-512", "4k"] {
        let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
        let dir = built(shape, false);
        let bytes = dir.qemu_reads("a.qcow2");
        let steps = [
            "refcount_bits=1",
            "refcount_bits=32",
            "refcount_bits=16",
            "compat=0.10",
            "compat=1.1,refcount_bits=2",
            "refcount_bits=16,compat=v2",
            "compat=v3,lazy_refcounts=on",
            "refcount_bits=8",
            "refcount_bits=64",
        ];
        for (step, words) in steps.iter().cycle().take(18).enumerate() {
            let line = format!("amend -f qcow2 -o {words} a.qcow2");
            let ran = if step % 3 == 1 { dir.qemu(&line) } else { dir.vimg(&line) };
            let story = format!("{name}: step {step}\n{}", ran.story());
            assert!(ran.code == Some(0) && ran.stderr.is_empty(), "{story}");
            for verdict in [dir.qemu("check a.qcow2"), dir.vimg("check a.qcow2")] {
                assert!(verdict.code == Some(0), "{story}{}", verdict.story());
            }
            assert!(dir.qemu_reads("a.qcow2") == bytes, "{story}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    requires!(qemu10());
    let images = [
        ("create -f qcow2 -o cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -o compat=0.10,cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -o extended_l2=on,cluster_size=16k a.qcow2 64M", ""),
        ("create -f qcow2 -o refcount_bits=8,cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -o data_file=a.data,cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -o data_file=a.data,data_file_raw=on,cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -u -b b.raw -F raw -o cluster_size=4k a.qcow2 64M", ""),
        ("create -f qcow2 -o cluster_size=4k a.qcow2 64M", "snapshot -c s a.qcow2"),
        ("create -f qcow2 -o compat=0.10,cluster_size=4k a.qcow2 64M", "snapshot -c s a.qcow2"),
    ];
    let options = [
        "cluster_size=4k",
        "extended_l2=on",
        "preallocation=off",
        "compression_type=zlib",
        "encryption=on",
        "encrypt.format=luks",
        "encrypt.state=active",
        "encrypt.iter-time=10",
        "encrypt.nonsense=1",
        "compat=9",
        "compat=",
        "compat=0.10",
        "compat=v3",
        "refcount_bits=1",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=0",
        "refcount_bits=abc",
        "lazy_refcounts=on",
        "lazy_refcounts=maybe",
        "size=0",
        "size=100",
        "size=8E",
        "size=7E",
        "size=3P",
        "size=32M",
        "size=128M",
        "backing_fmt=raw",
        "backing_file=b.raw",
        "backing_file=",
        "data_file=b.data",
        "data_file=",
        "data_file_raw=on",
        "data_file_raw=off",
        "nocow=on",
        "nonsense=1",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,refcount_bits=16",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,size=128M",
        "compat=1.1,size=128M",
        "size=8E,refcount_bits=3",
        "compat=2,refcount_bits=3",
        "encrypt.state=x,refcount_bits=3",
        "refcount_bits=16,data_file_raw=on,size=1",
        "compat=1.1,",
    ];
    for (create, then) in images {
        let original = Dir::new();
        original.sparse("b.raw", 64 << 20);
        original.qemu_ok(create);
        if !then.is_empty() {
            original.qemu_ok(then);
        }
        for words in options {
            let tried = amend(&original, words, create);
            if tried.code == Some(0) && !words.starts_with("data_file=") && words != "size=3P" {
                let found = described(&tried.theirs);
                assert_eq!(found, described(&tried.ours), "{}", tried.story);
                tried.ours.qemu_checks("a.qcow2");
            }
        }
    }
}

#[test]
fn words_around_the_options() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o cluster_size=4k a.qcow2 1M");
    dir.sparse("a.raw", 1 << 20);
    for words in [
        "amend -f qcow2 -o help",
        "amend -f qcow2 -o compat=0.10,help",
        "amend -f qcow2 -o ? missing.qcow2",
        "amend -o help a.qcow2",
        "amend -o help missing.qcow2",
        "amend -o help",
        "amend -o compat=1.1",
        "amend -o help -f raw",
        "amend -o help -f vmdk",
        "amend -o help a.raw",
        "amend -f raw -o size=1M a.raw",
        "amend -f raw -p -o size=1M a.raw",
        "amend a.qcow2",
        "amend -o compat=1.1 a.qcow2 a.qcow2",
        "amend -t nonsense -o compat=1.1 a.qcow2",
        "amend -t none -o compat=1.1 a.qcow2",
        "amend --cache writethrough -o compat=1.1 a.qcow2",
        "amend --force -o compat=1.1 a.qcow2",
        "amend -o , a.qcow2",
        "amend -o compat=1.1 missing.qcow2",
        "amend -q -p -o compat=1.1 a.qcow2",
        "amend -p -o size=1M a.qcow2",
        "amend -p -o nonsense=1 a.qcow2",
        "amend -p -o compat=9 a.qcow2",
        "amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=a.qcow2",
        "amend --image-opts -f qcow2 -o lazy_refcounts=on driver=qcow2,file.filename=a.qcow2",
        "amend -o lazy_refcounts=on -o lazy_refcounts=off a.qcow2",
    ] {
        dir.same(words);
    }
    let show = |ran: &Ran| last_of(&ran.stdout).to_owned();
    for words in ["compat=0.10", "compat=1.1,refcount_bits=64", "refcount_bits=8,size=2M"] {
        let line = format!("amend -p -o {words} a.qcow2");
        let theirs = clone_of(&dir).qemu(&line);
        let ours = dir.linked(&line).expect_code(0);
        assert_eq!(show(&theirs), show(&ours), "{}{}", theirs.story(), ours.story());
    }
}

/// A disk of version 2 with zero clusters would read as its backing file there, or not at all.
#[test]
fn zero_clusters_become_clusters_of_zeros() {
    requires!(qemu10());
    for backing in ["", "-b base.raw -F raw"] {
        for cluster in [512u64, 65536] {
            let original = Dir::new();
            original.write("base.raw", &vec![0x5a; 4 << 20]);
            original.qemu_ok(&format!("create -f qcow2 {backing} -o cluster_size={cluster} a.qcow2 8M"));
            let io = tests::command::qemu_io().words("-f qcow2 a.qcow2").dir(original.path());
            [
                "write -P 1 0 1M",
                "write -z 64k 128k",
                "write -z -u 256k 192k",
                "write -z 2M 1M",
                "write -z 3500k 1M",
            ]
            .iter()
            .fold(io, |io, command| io.arg("-c").arg(*command))
            .ok();
            original.qemu_ok("snapshot -c s a.qcow2");
            let io = tests::command::qemu_io().words("-f qcow2 a.qcow2").dir(original.path());
            ["write -P 2 128k 128k", "write -z 512k 256k"].iter().fold(io, |io, c| io.arg("-c").arg(*c)).ok();
            let bytes = original.qemu_reads("a.qcow2");
            amend(&original, "compat=0.10", backing).alike().unchanged(&bytes);
        }
    }
}

/// qemu-img leaves a description of bitmaps behind that version 2 cannot have, and their clusters leaked.
#[test]
fn bitmaps_do_not_survive_a_downgrade() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o cluster_size=4k a.qcow2 64M");
    dir.qemu_ok("bitmap --add a.qcow2 one");
    dir.qemu_ok("bitmap --add --disable -g 512 a.qcow2 two");
    dir.vimg("amend -o compat=0.10 a.qcow2").expect_code(0).expect_stderr("cannot hold bitmaps");
    dir.qemu("check a.qcow2").expect_code(0).expect_stdout("No errors");
    let info = dir.qemu("info --output=json a.qcow2");
    assert!(info.stderr.is_empty(), "{}", info.story());
    assert_eq!(info.json()["format-specific"]["data"]["compat"], "0.10");
}

/// qemu-img makes an image out of this of which nothing that was compressed can be read.
#[test]
fn zstd_does_not_go_with_version_2() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o compression_type=zstd a.qcow2 1M");
    dir.vimg("amend -o compat=0.10 a.qcow2")
        .expect_code(1)
        .expect_stderr("Cannot downgrade an image with incompatible features 0x8 set");
    dir.qemu_checks("a.qcow2");
}

/// Snapshot tables of old images lack fields that version 3 asks for.
#[test]
fn short_snapshot_entries_are_completed() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o compat=0.10,cluster_size=4k a.qcow2 64M");
    dir.qemu_ok("snapshot -c s a.qcow2");
    // Extra data of 0 bytes: the id and the name follow at once (specification, "Snapshots").
    let table = dir.peek64("a.qcow2", 64);
    dir.poke32("a.qcow2", table + 36, 0);
    dir.poke("a.qcow2", table + 40, b"1s\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    dir.qemu_checks("a.qcow2");
    dir.vimg("amend -o compat=1.1 a.qcow2").expect_code(0);
    let check = dir.qemu("check a.qcow2").expect_code(0);
    assert!(check.stderr.is_empty(), "{}", check.story());
    assert!(
        dir.qemu("snapshot -l a.qcow2").stdout.contains("64 MiB")
            || dir.qemu("snapshot -l a.qcow2").stdout.contains('s')
    );
    let table = dir.peek64("a.qcow2", 64);
    assert_eq!(dir.peek64("a.qcow2", table + 48), 64 << 20);
}
