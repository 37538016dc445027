//! Dirty bitmaps: `bitmap`, and what happens to bitmaps when images are written, resized and converted. Both tools
//! do the same to copies of one image; qemu says what the bitmaps are afterwards.

use tests::command::{Cmd, Ran};
use tests::shape::SHAPES;
use tests::skip::{qemu10, tool};
use tests::{Dir, Op, Ops, requires};

/// What a tool printed, with qemu's made-up names of nodes replaced by the name of the image.
fn told(ran: &Ran) -> (Option<i32>, String, String) {
    let mut words = vec![];
    for word in ran.stderr.split_inclusive([' ', '\n']) {
        let node = word.trim_start_matches('\'').starts_with("#block")
            || word.contains(".qcow2")
            || word.contains(".raw");
        // The whole text stands for itself but for the words that name the image.
        words.push(if node && ran.stderr.contains("Can't") { "IMAGE " } else { word });
    }
    (ran.code, ran.stdout.clone(), words.concat())
}

fn both(theirs: &Dir, ours: &Dir, words: &str) {
    let (a, b) = (theirs.qemu(words), ours.linked(words).expect_no_panic());
    let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    let free = a.stderr.contains("\nTry '");
    assert_eq!(a.code, b.code, "{story}");
    assert!(free || told(&a) == told(&b), "{story}");
}

/// The same bitmaps with the same bits, and nothing wrong.
fn judge(theirs: &Dir, ours: &Dir, image: &str, story: &str) {
    let (a, b) = (theirs.qemu_bitmaps(image), ours.qemu_bitmaps(image));
    assert_eq!(a, b, "{story}: the bitmaps differ (left: qemu-img's)");
    let verdicts = [ours.qemu(&format!("check {image}")), ours.vimg(&format!("check {image}"))];
    for verdict in verdicts {
        assert!(verdict.code == Some(0), "{story}: {}", verdict.story());
    }
}

/// An image with some data and bitmaps of every kind; made by qemu.
fn original(options: &str) -> Dir {
    let dir = Dir::new();
    dir.qemu_ok(&format!("create -f qcow2 -o {options} a.qcow2 5M"));
    dir.qemu_ok("bitmap --add a.qcow2 b0");
    dir.qemu_ok("bitmap --add -g 512 a.qcow2 fine");
    io(&dir, "a.qcow2", &["write -P 1 100k 3k", "write -P 2 4M 600k", "discard 1M 128k"]);
    dir.qemu_ok("bitmap --add --disable -g 4k a.qcow2 off");
    dir.qemu_ok("bitmap --disable a.qcow2 fine");
    io(&dir, "a.qcow2", &["write -P 3 2M 1k"]);
    dir
}

fn io(dir: &Dir, image: &str, commands: &[&str]) {
    let mut command = Cmd::new("qemu-io").words("-f qcow2").dir(dir.path());
    for each in commands {
        command = command.arg("-c").arg(*each);
    }
    command.arg(image).ok();
}

/// Marks a bitmap as being in use, as a crash does.
fn break_bitmap(dir: &Dir, image: &str, index: usize) {
    let bytes = dir.read(image);
    let at = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap() + 8;
    let mut entry = usize::try_from(dir.peek64(image, at as u64 + 16)).unwrap();
    for _ in 0..index {
        let name = usize::from(u16::from_be_bytes([bytes[entry + 18], bytes[entry + 19]]));
        entry += (24 + name).next_multiple_of(8);
    }
    dir.poke(image, entry as u64 + 15, &[bytes[entry + 15] | 1]);
}

const SEQUENCES: &[&[&str]] = &[
    &["--add IMG new", "--add IMG new", "--remove IMG new", "--remove IMG new"],
    &["--add -g 1M IMG new", "--merge b0 IMG new", "--merge fine IMG new", "--disable IMG new"],
    &["--add -g 512 --merge b0 --disable IMG new", "--merge new --enable IMG fine"],
    &["--clear IMG b0", "--merge fine --clear --merge off IMG b0", "--clear IMG off"],
    &["--remove IMG b0", "--remove IMG fine", "--remove IMG off", "--remove IMG off"],
    &["--remove --add IMG b0", "--add --remove --add IMG x"],
    &["--enable IMG fine", "--enable --disable --enable IMG off", "--disable --disable IMG b0"],
    &["--merge b0 IMG b0", "--merge nx IMG b0", "--merge b0 IMG nx", "--merge off --merge nx IMG b0"],
    &["--add --merge nx IMG new", "--add --merge nx --remove IMG new2"],
    &["--clear IMG nx", "--enable IMG nx", "--disable IMG nx"],
    &[
        "--add -g 100 IMG x",
        "--add -g 256 IMG x",
        "--add -g 4G IMG x",
        "--add -g 2G IMG x",
        "--add -g 0 IMG y",
    ],
    &[
        "--add -g foo IMG x",
        "--add -g 768 IMG x",
        "--add -g 8T IMG x",
        "--add -g -5 IMG x",
        "--add -g 0x10000 IMG x",
    ],
    &["--add -g 100 IMG b0", "--add -g 512 IMG b0", "--add -g 0.5k IMG z", "--add -g 1e IMG z2"],
    &[
        "-g 64k --enable IMG b0",
        "-F raw --remove IMG b0",
        "-b IMG --remove IMG b0",
        "-F raw -b x -g 4k --remove IMG b0",
    ],
    &["IMG b0", "--add", "--add IMG", "--add IMG b0 b1", "-g 64k IMG", "-g bad IMG"],
    &["--add -f raw IMG x", "--remove -f raw IMG x", "--add -f foo IMG x", "--add -f raw -g 3 IMG x"],
    &["--add --image-opts driver=qcow2,file.filename=IMG x", "--add --image-opts -f qcow2 IMG x"],
    &["--add nofile x", "--merge b0 -b nofile IMG b0", "--merge b0 -b IMG IMG b0"],
    &["--bogus IMG b0", "--merge", "--add -q IMG b0", "-U --add IMG b0"],
    &["--add IMG a,b", "--add -- IMG -dash", "--add IMG é", "--remove -- IMG -dash"],
    &["--object secret,id=s,data=abc --add IMG x"],
    &["--ad IMG abbreviated", "--en IMG abbreviated", "--merge=b0 IMG abbreviated"],
];

#[test]
fn every_sequence_of_actions_is_carried_out_alike() {
    requires!(qemu10(), tool("qemu-nbd"));
    let original = original("cluster_size=64k");
    for sequence in SEQUENCES {
        let (theirs, ours) = (original.duplicate(), original.duplicate());
        for words in *sequence {
            both(&theirs, &ours, &format!("bitmap {}", words.replace("IMG", "a.qcow2")));
        }
        judge(&theirs, &ours, "a.qcow2", &format!("{sequence:?}"));
    }
}

#[test]
fn names_have_limits() {
    requires!(qemu10());
    let (theirs, ours) = (original("cluster_size=64k"), original("cluster_size=64k"));
    for name in ["x".repeat(1023), "y".repeat(1024), String::new()] {
        let run =
            |program: Cmd, dir: &Dir| program.words("bitmap --add a.qcow2").arg(&name).dir(dir.path()).run();
        let a = run(Cmd::new("qemu-img"), &theirs);
        let b = run(ours.vimg_cmd(""), &ours);
        assert_eq!(a.code, b.code, "{}{}", a.story(), b.story());
        let end = |ran: &Ran| ran.stderr.rsplit(": ").next().unwrap_or_default().to_owned();
        assert_eq!(end(&a), end(&b));
    }
    assert_eq!(theirs.qemu_bitmaps("a.qcow2"), ours.qemu_bitmaps("a.qcow2"));
}

#[test]
fn what_cannot_have_bitmaps_says_so() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o compat=0.10 v2.qcow2 1M");
    dir.qemu_ok("create -f qcow2 huge.qcow2 60T");
    dir.sparse("r.raw", 1 << 20);
    let (theirs, ours) = (dir.duplicate(), dir.duplicate());
    for words in [
        "--add v2.qcow2 b0",
        "--remove v2.qcow2 b0",
        "--add -g 100 v2.qcow2 b0",
        "--add r.raw b0",
        "--add -g 100 -f raw r.raw b0",
        "--add -f raw r.raw b0",
        "--remove -f raw r.raw b0",
        "--merge b0 -f raw r.raw b0",
        "--add -g 512 huge.qcow2 b0",
        "--add -g 8k huge.qcow2 b0",
        "--add -g 16k huge.qcow2 b0",
        "--add huge.qcow2 b1",
    ] {
        both(&theirs, &ours, &format!("bitmap {words}"));
    }
    judge(&theirs, &ours, "huge.qcow2", "60 TiB");
}

#[test]
fn bitmaps_of_another_image_are_merged() {
    requires!(qemu10(), tool("qemu-nbd"));
    let original = original("cluster_size=4k");
    original.qemu_ok("create -f qcow2 b.qcow2 5M");
    original.qemu_ok("create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2");
    original.qemu_ok("create -f qcow2 large.qcow2 6M");
    original.sparse("r.raw", 5 << 20);
    let (theirs, ours) = (original.duplicate(), original.duplicate());
    for words in [
        "--add --merge b0 -b a.qcow2 -F qcow2 b.qcow2 b0",
        "--add -g 1M --merge fine --merge b0 -b a.qcow2 b.qcow2 coarse",
        "--add --merge b0 -b a.qcow2 large.qcow2 x",
        "--merge nx -b a.qcow2 b.qcow2 b0",
        "--merge b0 -b a.qcow2 b.qcow2 nx",
        "--merge b0 -b r.raw -F raw b.qcow2 b0",
        "--merge b0 -b a.qcow2 -F foo b.qcow2 b0",
        "--add --merge b0 -b a.qcow2 over.qcow2 x",
        "--merge b0 over.qcow2 x",
    ] {
        both(&theirs, &ours, &format!("bitmap {words}"));
    }
    for image in ["b.qcow2", "large.qcow2", "over.qcow2"] {
        judge(&theirs, &ours, image, image);
    }
}

#[test]
fn an_inconsistent_bitmap_can_only_be_removed() {
    requires!(qemu10(), tool("qemu-nbd"));
    let broken = original("cluster_size=64k");
    break_bitmap(&broken, "a.qcow2", 0);
    for words in [
        "bitmap --add a.qcow2 b0",
        "bitmap --clear a.qcow2 b0",
        "bitmap --enable a.qcow2 b0",
        "bitmap --disable a.qcow2 b0",
        "bitmap --merge fine a.qcow2 b0",
        "bitmap --merge b0 a.qcow2 fine",
        "bitmap --clear a.qcow2 fine",
        "bitmap --remove a.qcow2 b0",
        "resize a.qcow2 6M",
        "resize --shrink a.qcow2 1M",
        "convert --bitmaps -O qcow2 a.qcow2 copy.qcow2",
        "convert --bitmaps --skip-broken-bitmaps -O qcow2 a.qcow2 copy.qcow2",
    ] {
        let (theirs, ours) = (broken.duplicate(), broken.duplicate());
        both(&theirs, &ours, words);
        judge(&theirs, &ours, "a.qcow2", words);
        assert_eq!(theirs.exists("copy.qcow2"), ours.exists("copy.qcow2"), "{words}");
    }
    // Writing does not bring it to life again.
    Cmd::new("qemu-io").words("-f qcow2 -c").arg("write 0 1k").arg("a.qcow2").dir(broken.path()).ok();
    write_with_us(&broken, "a.qcow2", &Ops(vec![Op::Write { offset: 0, len: 700, byte: 1 }]));
    assert_eq!(broken.qemu_bitmaps("a.qcow2")[0].flags, ["in-use", "auto"]);
}

fn open_ours(dir: &Dir, image: &str) -> std::sync::Arc<image::Layer> {
    let spec = image::Spec::from_filename(dir.file(image).to_str().unwrap()).unwrap();
    let options = image::OpenOptions { writable: true, ..image::OpenOptions::default() };
    image::open(&spec, &options).unwrap()
}

fn write_with_us(dir: &Dir, image: &str, ops: &Ops) {
    let _open = tests::open_here();
    let device = open_ours(dir, image).device();
    ops.device(&*device).unwrap();
    device.close().unwrap();
}

#[test]
fn what_we_write_is_recorded_as_qemu_records_it() {
    requires!(qemu10(), tool("qemu-nbd"));
    let chosen = ["512", "lazy", "extended", "backing-2", "data-file"];
    for shape in SHAPES.iter().filter(|shape| chosen.contains(&shape.name)) {
        let full = Dir::new();
        shape.build_with_qemu(&full, "a.qcow2", false);
        let empty = Dir::new();
        shape.build("a.qcow2", |words| drop(empty.qemu_ok(words)), |_, _| {});
        for dir in [&full, &empty] {
            for words in ["-g 512 a.qcow2 fine", "-g 64k a.qcow2 usual", "-g 1M a.qcow2 coarse"] {
                dir.qemu_ok(&format!("bitmap --add {words}"));
            }
            dir.qemu_ok("bitmap --add --disable a.qcow2 off");
        }
        let tour = shape.tour(9, true);
        let mut rounds = vec![(&empty, tour.clone())];
        rounds.extend(tour.0.chunks(10).map(|ops| (&full, Ops(ops.to_vec()).uncompressed())));
        for (original, ops) in rounds {
            let (theirs, ours) = (original.duplicate(), original.duplicate());
            theirs.qemu_io("qcow2", "a.qcow2", &ops);
            write_with_us(&ours, "a.qcow2", &ops);
            judge(&theirs, &ours, "a.qcow2", &format!("{}: {ops:?}", shape.name));
        }
    }
}

/// A program that dies leaves bitmaps that say so, ours or theirs; then the other goes on.
#[test]
fn a_crash_is_noticed_by_the_other_tool() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = original("cluster_size=64k");
    let layer = open_ours(&dir, "a.qcow2");
    layer.device().write_at(&[1; 100], 0).unwrap();
    let copy = Dir::new();
    std::fs::copy(dir.file("a.qcow2"), copy.file("a.qcow2")).unwrap();
    layer.image.close().unwrap();
    let flags: Vec<_> = copy.qemu_bitmaps("a.qcow2").iter().map(|bitmap| bitmap.flags.clone()).collect();
    // Only what records is in danger.
    assert_eq!(flags, [vec!["in-use", "auto"], vec![], vec![]]);
    copy.qemu_checks("a.qcow2");
    copy.same("bitmap --clear a.qcow2 b0");
    copy.vimg_ok("bitmap --remove a.qcow2 b0");
    copy.qemu_checks("a.qcow2");
    assert_eq!(copy.qemu_bitmaps("a.qcow2").len(), 2);
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    requires!(qemu10(), tool("qemu-nbd"));
    let original = original("cluster_size=4k");
    original.qemu_ok("bitmap --enable a.qcow2 fine");
    for words in ["6M", "700M", "+512", "5M", "--shrink 4300288", "--shrink 100352", "--shrink 512"] {
        let (theirs, ours) = (original.duplicate(), original.duplicate());
        both(&theirs, &ours, &format!("resize a.qcow2 {words}"));
        judge(&theirs, &ours, "a.qcow2", words);
        both(&theirs, &ours, "resize a.qcow2 900M");
        judge(&theirs, &ours, "a.qcow2", words);
    }
}

#[test]
fn stale_bitmaps_are_announced_and_go() {
    requires!(qemu10());
    let original = original("cluster_size=64k");
    original.poke64("a.qcow2", 88, 0);
    for words in
        ["info a.qcow2", "check a.qcow2", "map a.qcow2", "bitmap --add a.qcow2 c", "resize a.qcow2 6M"]
    {
        let (theirs, ours) = (original.duplicate(), original.duplicate());
        let (a, b) = (theirs.qemu(words), ours.linked(words).expect_no_panic());
        let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
        assert_eq!(a.code, b.code, "{story}");
        // qemu-img forgets the line feed.
        let warning = "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent\n\
                       Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.";
        assert!(a.stderr.contains(warning) && b.stderr.contains(warning), "{story}");
        assert_eq!(theirs.qemu_bitmaps("a.qcow2"), ours.qemu_bitmaps("a.qcow2"), "{story}");
        let again = [&theirs, &ours].map(|dir| dir.qemu("info a.qcow2").stderr.contains("lacking"));
        assert_eq!(again[0], again[1], "{story}");
    }
}

#[test]
fn convert_takes_bitmaps_along() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = original("cluster_size=4k");
    dir.qemu_ok("create -f qcow2 large.qcow2 6M");
    dir.qemu_ok("create -f qcow2 -o compat=0.10 v2.qcow2 5M");
    dir.qemu_ok("create -f qcow2 same.qcow2 5M");
    dir.qemu_ok("bitmap --add same.qcow2 fine");
    dir.sparse("r.raw", 5 << 20);
    for (words, target) in [
        ("--bitmaps -O qcow2 a.qcow2 o.qcow2", "o.qcow2"),
        ("--bitmaps -c -o cluster_size=64k -O qcow2 a.qcow2 o.qcow2", "o.qcow2"),
        ("--bitmaps -o cluster_size=2M -O qcow2 a.qcow2 o.qcow2", "o.qcow2"),
        ("--bitmaps --skip-broken-bitmaps -o cluster_size=512 -O qcow2 a.qcow2 o.qcow2", "o.qcow2"),
        ("--bitmaps -O qcow2 -B large.qcow2 -F qcow2 a.qcow2 o.qcow2", "o.qcow2"),
        ("--bitmaps -n -O qcow2 a.qcow2 large.qcow2", "large.qcow2"),
        ("--bitmaps -n -O qcow2 a.qcow2 same.qcow2", "same.qcow2"),
        ("--bitmaps -n -O qcow2 a.qcow2 v2.qcow2", "v2.qcow2"),
        ("-n -O qcow2 r.raw same.qcow2", "same.qcow2"),
        ("--bitmaps -O raw a.qcow2 o.raw", "a.qcow2"),
        ("--bitmaps -O qcow2 -o compat=0.10 a.qcow2 o.raw", "a.qcow2"),
        ("--skip-broken-bitmaps -O qcow2 a.qcow2 o.qcow2", "a.qcow2"),
        ("--bitmaps -O qcow2 a.qcow2 a.qcow2 o.qcow2", "a.qcow2"),
        ("--bitmaps -O qcow2 -f raw r.raw o.qcow2", "a.qcow2"),
        ("--bitmaps -O qcow2 v2.qcow2 o.qcow2", "a.qcow2"),
        ("--bitmaps -O qcow2 large.qcow2 o.qcow2", "o.qcow2"),
    ] {
        let (theirs, ours) = (dir.duplicate(), dir.duplicate());
        both(&theirs, &ours, &format!("convert {words}"));
        if target == "same.qcow2" {
            // What reads as zeros already we do not write, and so do not record, and a failure leaves no half of the
            // bitmaps behind.
            ours.qemu_checks(target);
            assert_eq!(ours.qemu_bitmaps(target).len(), 1);
            continue;
        }
        judge(&theirs, &ours, target, words);
        if target == "o.qcow2" {
            assert!(theirs.qemu_reads(target) == ours.qemu_reads(target), "{words}");
        }
    }
}

#[test]
fn measure_counts_bitmaps() {
    requires!(qemu10());
    let dir = original("cluster_size=64k");
    for options in ["", "-o cluster_size=4k", "-o compat=0.10", "-o cluster_size=2M", "-o cluster_size=512"] {
        dir.same(&format!("measure -O qcow2 {options} a.qcow2"));
        dir.same(&format!("measure -O qcow2 {options} --output=json a.qcow2"));
    }
    dir.same("measure -O raw a.qcow2");
}

/// What commit and rebase write is recorded where it is written; bitmaps stay in their images.
#[test]
fn commit_and_rebase_record_and_move_nothing() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = original("cluster_size=64k");
    dir.qemu_ok("create -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
    dir.qemu_ok("bitmap --add top.qcow2 tt");
    io(&dir, "top.qcow2", &["write 100k 1k", "write 3M 64k"]);
    dir.qemu_ok("create -f qcow2 other.qcow2 5M");
    for words in [
        "commit top.qcow2",
        "commit -d top.qcow2",
        "rebase -b other.qcow2 -F qcow2 top.qcow2",
        "rebase -u -b other.qcow2 -F qcow2 top.qcow2",
    ] {
        let (theirs, ours) = (dir.duplicate(), dir.duplicate());
        both(&theirs, &ours, words);
        judge(&theirs, &ours, "a.qcow2", words);
        judge(&theirs, &ours, "top.qcow2", words);
    }
}

#[test]
fn snapshots_and_bitmaps() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = original("cluster_size=64k");
    for words in ["snapshot -c s a.qcow2", "snapshot -a s a.qcow2", "snapshot -d s a.qcow2"] {
        let ours = dir.duplicate();
        both(&dir, &ours, words);
        judge(&dir, &ours, "a.qcow2", words);
    }
}
