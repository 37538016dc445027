//! `rebase`: another backing file under the same contents, and qemu-img's words.

use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

/// base <- mid <- top, and two images that have nothing to do with them.
pub(crate) fn family(overlay_options: &str, cluster: u64) -> Dir {
    let dir = Dir::new();
    let size = 24 * cluster.max(64 << 10) + if cluster > 512 { 1024 } else { 0 };
    dir.qemu_ok(&format!("create -q -f qcow2 base.qcow2 {size}"));
    io(&dir, "base.qcow2", &["write -P 1 0 512k", "write -P 0 600k 64k", "write -z 768k 64k"]);
    dir.qemu_ok("create -q -f qcow2 -b base.qcow2 -F qcow2 -o cluster_size=4k mid.qcow2");
    io(
        &dir,
        "mid.qcow2",
        &["write -P 2 100k 30k", "write -z 0 40k", "write -P 1 200k 8k", "write -P 3 900k 77k"],
    );
    let data_file = if overlay_options.contains("DATA") { ",data_file=top.data" } else { "" };
    let options = overlay_options.replace(",DATA", "");
    dir.qemu_ok(&format!("create -q -f qcow2 -b mid.qcow2 -F qcow2 -o {options}{data_file} top.qcow2"));
    io(&dir, "top.qcow2", &["write -P 4 300k 5k", "write -z 448k 64k", "write -P 5 1M 130k"]);
    let larger = size + 3 * (1 << 20) + 512;
    dir.qemu_ok(&format!("create -q -f qcow2 -o cluster_size=512 larger.qcow2 {larger}"));
    io(&dir, "larger.qcow2", &["write -P 1 0 300k", "write -P 9 1300k 1M"]);
    let mut bytes = vec![0; 700_000];
    bytes[..400 << 10].fill(1);
    bytes[600_000..].fill(7);
    dir.write("smaller.raw", &bytes);
    dir
}

pub(crate) fn io(dir: &Dir, image: &str, lines: &[&str]) {
    let mut cmd = tests::command::qemu_io().words("-f qcow2").arg(image).dir(dir.path());
    for line in lines {
        cmd = cmd.arg("-c").arg(*line);
    }
    let ran = cmd.ok();
    assert!(!ran.stdout.contains("failed"), "{}", ran.story());
}

/// Both tools do the same to copies of a folder: same exit code and words, same contents, no more space taken.
#[track_caller]
fn alike(original: &Dir, words: &str, image: &str) -> Dir {
    let before = original.qemu_reads(image);
    let (theirs, ours) = (original.duplicate(), original.duplicate());
    let words: Vec<&str> =
        words.split_whitespace().map(|word| if word == "''" { "" } else { word }).collect();
    let mut qemu = tests::command::qemu_img().dir(theirs.path());
    let mut vimg = tests::command::vimg_as_qemu_img().dir(ours.path());
    for word in words {
        (qemu, vimg) = (qemu.arg(word), vimg.arg(word));
    }
    let (a, b) = (qemu.run(), vimg.run().expect_no_panic());
    let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    // qemu-img 10.0.2 can die of an overlay that is smaller than its old backing file.
    let died = a.signal.is_some();
    let equal = a.code == b.code && a.stdout == b.stdout && a.stderr == b.stderr;
    assert!(if died { b.code == Some(0) } else { equal }, "{story}");
    ours.qemu(&format!("check {image}")).expect_code(0);
    ours.vimg_checks(image);
    assert!(ours.qemu_reads(image) == before, "{story}the contents have changed");
    assert!(ours.vimg_reads(image) == before, "{story}the contents have changed for vimg");
    if died {
        return ours;
    }
    let (more, less) = (ours.taken(image), theirs.taken(image));
    assert!(more <= less + (64 << 10), "{story}takes {more} bytes, with qemu-img {less}");
    let info = |dir: &Dir| dir.qemu_ok(&format!("info --output=json {image}")).json();
    for key in ["backing-filename", "backing-filename-format", "full-backing-filename"] {
        assert_eq!(info(&ours)[key], info(&theirs)[key], "{story}{key}");
    }
    ours
}

const TARGETS: &[&str] = &[
    "rebase -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    "rebase -f qcow2 -b '' top.qcow2",
    "rebase -f qcow2 -b larger.qcow2 -F qcow2 top.qcow2",
    "rebase -f qcow2 -b smaller.raw -F raw top.qcow2",
    "rebase -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
];

#[test]
fn every_shape_of_overlay_keeps_its_contents() {
    requires!(qemu10());
    let mut shapes: Vec<(String, u64)> = SHAPES
        .iter()
        .filter(|shape| shape.data_file == 0 && shape.backing == 0)
        .filter(|shape| !shape.options.contains("preallocation"))
        .map(|shape| (shape.options.to_owned(), shape.cluster))
        .collect();
    shapes.push(("cluster_size=64k,DATA".to_owned(), 64 << 10));
    shapes.push(("cluster_size=16k,extended_l2=on,DATA".to_owned(), 16 << 10));
    for (index, (options, cluster)) in shapes.iter().enumerate() {
        let original = family(options, *cluster);
        // All targets for some, one or two for the others.
        for (number, words) in TARGETS.iter().enumerate() {
            if index % 16 == 0 || (number + index) % 5 == 0 || (index % 3 == 0 && options.contains("ext")) {
                alike(&original, words, "top.qcow2");
            }
        }
    }
}

#[test]
fn copies_are_compressed_on_demand() {
    requires!(qemu10());
    for (options, cluster) in
        [("cluster_size=64k", 64 << 10), ("cluster_size=4k,compression_type=zstd", 4 << 10)]
    {
        let original = family(options, cluster);
        for words in &TARGETS[..4] {
            let words = words.replace("rebase", "rebase -c");
            let ours = alike(&original, &words, "top.qcow2");
            let map = ours.qemu_ok("map --output=json top.qcow2").json();
            let packed = map.as_array().unwrap().iter().any(|e| e["compressed"] == true && e["depth"] == 0);
            assert!(packed, "{words}: {map}");
        }
    }
    // Subclusters: what the overlay stores in part cannot be packed.
    let original = family("cluster_size=64k,extended_l2=on", 64 << 10);
    alike(&original, "rebase -f qcow2 -c -b larger.qcow2 -F qcow2 top.qcow2", "top.qcow2");
}

#[test]
fn overlays_of_another_size() {
    requires!(qemu10());
    for size in ["100k", "1M", "1000k", "5M"] {
        let original = family("cluster_size=64k", 64 << 10);
        original.qemu_ok(&format!("resize -q --shrink top.qcow2 {size}"));
        for words in TARGETS {
            alike(&original, words, "top.qcow2");
        }
    }
}

#[test]
fn names_are_changed_without_looking() {
    requires!(qemu10());
    let original = family("cluster_size=64k", 64 << 10);
    for words in [
        "rebase -u -b nope.qcow2 -F qcow2 top.qcow2",
        "rebase -u -b nope.qcow2 -F vmdk top.qcow2",
        "rebase -u -b '' top.qcow2",
        "rebase -u top.qcow2",
        "rebase -u -F raw top.qcow2",
        "rebase -u -c -b base.qcow2 -F raw top.qcow2",
        "rebase -u -p -b base.qcow2 -F qcow2 top.qcow2",
        "rebase -u -b base.qcow2 top.qcow2",
        "rebase -u -b base.qcow2 -F foo top.qcow2",
        "rebase -u -b /dev/null/../x -F qcow2 top.qcow2",
    ] {
        let (theirs, ours) = (original.duplicate(), original.duplicate());
        let args = |cmd: tests::command::Cmd| {
            words.split_whitespace().fold(cmd, |cmd, word| cmd.arg(if word == "''" { "" } else { word }))
        };
        let a = args(tests::command::qemu_img().dir(theirs.path())).run();
        let b = args(tests::command::vimg_as_qemu_img().dir(ours.path())).run();
        let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
        let percent = words.contains(" -p ");
        assert!(a.code == b.code && (percent || a.stdout == b.stdout) && a.stderr == b.stderr, "{story}");
        let mut infos = [&theirs, &ours].map(|dir| dir.qemu_ok("info --output=json top.qcow2").json());
        for info in &mut infos {
            info.as_object_mut().unwrap().remove("actual-size");
            info["children"] = serde_json::Value::Null;
        }
        assert_eq!(infos[0], infos[1], "{story}");
    }
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    requires!(qemu10());
    let dir = family("cluster_size=64k", 64 << 10);
    dir.qemu_ok("create -q -f qcow2 -o data_file=d.raw,data_file_raw=on flat.qcow2 4M");
    dir.qemu_ok("create -q -f qcow2 -o cluster_size=512 tight.qcow2 4M");
    dir.qemu_ok("create -q -f qcow2 -u -b gone.qcow2 -F qcow2 orphan.qcow2 4M");
    dir.qemu_ok("create -q -f qcow2 -u -b orphan.qcow2 -F qcow2 nephew.qcow2 4M");
    dir.qemu_ok("create -q -f qcow2 -o data_file=e.raw -b mid.qcow2 -F qcow2 outside.qcow2");
    let long = "x".repeat(450);
    let longer = "x".repeat(1024);
    let before: Vec<_> = ["top.qcow2", "tight.qcow2", "flat.qcow2"].map(|name| dir.read(name)).into();
    for words in [
        "rebase",
        "rebase top.qcow2",
        "rebase -F qcow2 top.qcow2",
        "rebase -b a top.qcow2 b",
        "rebase -b base.qcow2 top.qcow2",
        "rebase -b nope.qcow2 -F qcow2 top.qcow2",
        "rebase -b nope.qcow2 top.qcow2",
        "rebase -b base.qcow2 -F foo top.qcow2",
        "rebase -b base.qcow2 -F raw missing.qcow2",
        "rebase -b nephew.qcow2 -F qcow2 top.qcow2",
        "rebase -b larger.qcow2 -F qcow2 orphan.qcow2",
        "rebase -b smaller.raw -F qcow2 top.qcow2",
        "rebase -b top.qcow2 -F qcow2 top.qcow2",
        "rebase -b top.qcow2 -F qcow2 mid.qcow2",
        "rebase -b ./top.qcow2 -F qcow2 base.qcow2",
        "rebase -t foo -b base.qcow2 -F qcow2 top.qcow2",
        "rebase -T foo -b base.qcow2 -F qcow2 top.qcow2",
        "rebase -f raw -b base.qcow2 -F qcow2 smaller.raw",
        "rebase -c -f raw -b base.qcow2 -F qcow2 smaller.raw",
        "rebase -u -f raw -b base.qcow2 -F qcow2 smaller.raw",
        "rebase -b base.qcow2 -F qcow2 flat.qcow2",
        "rebase -u -b base.qcow2 -F qcow2 flat.qcow2",
        "rebase -c -b base.qcow2 -F qcow2 outside.qcow2",
        "rebase -f qcow2 --image-opts -b base.qcow2 driver=qcow2,file.filename=top.qcow2",
        "rebase --image-opts -b nope -F raw driver=qcow2,file.filename=top.qcow2",
        &format!("rebase -u -b {long} -F qcow2 tight.qcow2"),
        &format!("rebase -u -b {longer} -F qcow2 top.qcow2"),
    ] {
        let (theirs, ours) = (dir.duplicate().qemu(words), dir.linked(words).expect_no_panic());
        let usage = theirs.stderr.contains("\nTry '");
        let equal = theirs.code == ours.code && theirs.stdout == ours.stdout;
        let story = format!("--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        assert!(equal && (usage || theirs.stderr == ours.stderr), "{story}");
    }
    let after: Vec<_> = ["top.qcow2", "tight.qcow2", "flat.qcow2"].map(|name| dir.read(name)).into();
    assert!(before == after, "what was refused has left traces");
}

#[test]
fn relative_names_count_from_the_overlay() {
    requires!(qemu10());
    let dir = family("cluster_size=64k", 64 << 10);
    std::fs::create_dir(dir.file("sub")).unwrap();
    dir.qemu_ok("create -q -f qcow2 -b ../mid.qcow2 -F qcow2 sub/over.qcow2");
    dir.same("rebase -b base.qcow2 -F qcow2 sub/over.qcow2").expect_code(1);
    let before = dir.qemu_reads("sub/over.qcow2");
    dir.vimg_ok("rebase -b ../larger.qcow2 -F qcow2 sub/over.qcow2");
    assert!(dir.qemu_reads("sub/over.qcow2") == before);
    dir.vimg_ok("rebase --image-opts -b ../base.qcow2 -F qcow2 driver=qcow2,file.filename=sub/over.qcow2");
    assert!(dir.qemu_reads("sub/over.qcow2") == before);
}

/// qemu-img lets an image become its own backing file with -u; nobody can open it afterwards.
#[test]
fn no_image_becomes_its_own_backing_file() {
    let dir = family("cluster_size=64k", 64 << 10);
    let before = dir.read("top.qcow2");
    dir.vimg("rebase -u -b top.qcow2 -F qcow2 top.qcow2").expect_code(1).expect_stderr("infinite loop");
    dir.vimg(
        "rebase --image-opts -b top.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2,file.locking=off",
    )
    .expect_code(1);
    assert!(dir.read("top.qcow2") == before);
    // A longer way round is allowed, for whoever exchanges images: but not without a word.
    dir.vimg_ok("rebase -u -b top.qcow2 -F qcow2 base.qcow2").expect_stderr("warning:");
    dir.vimg("info --backing-chain top.qcow2").expect_code(1).expect_stderr("infinite loop");
}

#[test]
fn locked_images_stay_as_they_are() {
    requires!(qemu10());
    let dir = family("cluster_size=64k", 64 << 10);
    for (held, words) in [
        ("top.qcow2", "rebase -b base.qcow2 -F qcow2 top.qcow2"),
        ("mid.qcow2", "rebase -b base.qcow2 -F qcow2 top.qcow2"),
        ("larger.qcow2", "rebase -b larger.qcow2 -F qcow2 top.qcow2"),
        ("mid.qcow2", "rebase -U -b base.qcow2 -F qcow2 top.qcow2"),
    ] {
        let _holder = crate::locks::Holder::new(&dir, "-f qcow2", held);
        let ran = dir.same(words);
        assert_eq!(ran.code, Some(1), "{}", ran.story());
    }
}
