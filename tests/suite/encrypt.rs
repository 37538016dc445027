//! Encrypted qcow2 images, in both directions: what one tool encrypts, the other reads and writes.

use tests::command::{qemu_img, qemu_io, vimg};
use tests::shape::Shape;
use tests::skip::qemu10;
use tests::{Cmd, Dir, Ops, Ran, requires};

/// Passphrases that the command lines of these tests name.
const SECRETS: &str =
    "--object secret,id=s0,data=abc123 --object secret,id=s1,data=other --object secret,id=bad,data=wrong";

/// How the image is named with its key.
fn opts(image: &str, secret: &str) -> String {
    format!("--image-opts driver=qcow2,encrypt.key-secret={secret},file.filename={image}")
}

/// The first word is the command, which the secrets follow.
fn with_secrets(cmd: Cmd, words: &str, dir: &Dir) -> Ran {
    let (command, rest) = words.split_once(' ').unwrap();
    cmd.words(command).words(SECRETS).words(rest).dir(dir.path()).run()
}

fn theirs(dir: &Dir, words: &str) -> Ran {
    with_secrets(qemu_img(), words, dir)
}

fn ours(dir: &Dir, words: &str) -> Ran {
    with_secrets(vimg(), words, dir).expect_no_panic()
}

fn linked(dir: &Dir, words: &str) -> Ran {
    with_secrets(tests::command::vimg_as_qemu_img(), words, dir).expect_no_panic()
}

/// Lets qemu-io carry out `ops` on an encrypted image.
fn write(dir: &Dir, image: &str, ops: &Ops) {
    let mut cmd = qemu_io().words(SECRETS).words(&opts(image, "s0")).dir(dir.path());
    for line in ops.qemu_io() {
        cmd = cmd.arg("-c").arg(line);
    }
    let ran = cmd.ok();
    assert!(!ran.stdout.contains("failed"), "{}", ran.story());
}

/// The disk as one of the tools sees it.
fn read(dir: &Dir, tool: fn(&Dir, &str) -> Ran, image: &str, secret: &str) -> Vec<u8> {
    tool(dir, &format!("convert {} -O raw out.raw", opts(image, secret))).expect_code(0);
    dir.read("out.raw")
}

#[track_caller]
fn same(dir: &Dir, words: &str) -> Ran {
    let (a, b) = (theirs(dir, words), linked(dir, words));
    let equal = a.code == b.code && a.stdout == b.stdout && a.stderr == b.stderr;
    assert!(equal, "the tools differ\n--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    a
}

/// Kinds of images: what stands after `-o`.
const KINDS: &[(&str, u64)] = &[
    ("encrypt.format=luks,encrypt.iter-time=10,cluster_size=64k", 64 << 10),
    ("encrypt.format=luks,encrypt.iter-time=10,cluster_size=512", 512),
    ("encrypt.format=luks,encrypt.iter-time=10,cluster_size=4k,compat=0.10", 4 << 10),
    ("encrypt.format=luks,encrypt.iter-time=10,cluster_size=16k,extended_l2=on", 16 << 10),
    ("encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,cluster_size=4k", 4 << 10),
    (
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc,\
         encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,cluster_size=4k",
        4 << 10,
    ),
    (
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1,cluster_size=4k",
        4 << 10,
    ),
    ("encrypt.format=luks,encrypt.iter-time=10,encrypt.hash-alg=sha512,cluster_size=4k", 4 << 10),
    ("encrypt.format=luks,encrypt.iter-time=10,cluster_size=64k,data_file=NAME.data", 64 << 10),
    ("encrypt.format=aes,cluster_size=64k", 64 << 10),
    ("encrypt.format=aes,cluster_size=512", 512),
    ("encrypt.format=aes,cluster_size=4k,compat=0.10", 4 << 10),
    ("encryption=on,cluster_size=16k,extended_l2=on", 16 << 10),
];

fn create(kind: &str, image: &str, size: u64) -> String {
    let options = kind.replace("NAME", image);
    format!("create -f qcow2 -o {options},encrypt.key-secret=s0 {image} {size}")
}

/// A tour of reads, writes and zeros at odd places, without compressed clusters.
fn tour(cluster: u64, size: u64, seed: u8) -> Ops {
    Ops::tour(size, cluster, seed, false, false)
}

fn size_for(cluster: u64) -> u64 {
    let shape = Shape { name: "", options: "", cluster, backing: 0, data_file: 0 };
    shape.size()
}

#[test]
fn what_qemu_encrypts_is_read_here() {
    requires!(qemu10());
    for (kind, cluster) in KINDS {
        let dir = Dir::new();
        let size = size_for(*cluster);
        theirs(&dir, &create(kind, "a.qcow2", size)).expect_code(0);
        write(&dir, "a.qcow2", &tour(*cluster, size, 1));
        assert!(read(&dir, ours, "a.qcow2", "s0") == read(&dir, theirs, "a.qcow2", "s0"), "{kind}");
        dir.vimg_checks("a.qcow2");
    }
}

#[test]
fn what_is_encrypted_here_qemu_reads_and_goes_on_with() {
    requires!(qemu10());
    for (kind, cluster) in KINDS {
        let dir = Dir::new();
        let size = size_for(*cluster);
        let ran = same_creation(&dir, kind, size);
        write(&dir, "a.qcow2", &tour(*cluster, size, 2));
        let bytes = read(&dir, theirs, "a.qcow2", "s0");
        assert!(read(&dir, ours, "a.qcow2", "s0") == bytes, "{kind}");
        // Once more through our own writer.
        dir.write("source.raw", &bytes);
        let options = kind.replace("NAME", "b.qcow2");
        let words = format!("convert -f raw -O qcow2 -o {options},encrypt.key-secret=s0 source.raw b.qcow2");
        ours(&dir, &words).expect_code(0);
        assert!(read(&dir, theirs, "b.qcow2", "s0") == bytes, "{kind}: converted\n{}", ran.story());
        for image in ["a.qcow2", "b.qcow2"] {
            theirs(&dir, &format!("check {}", opts(image, "s0"))).expect_code(0);
            dir.vimg_checks(image);
        }
    }
}

/// Both tools say the same while they create; the image is ours.
fn same_creation(dir: &Dir, kind: &str, size: u64) -> Ran {
    let words = create(kind, "a.qcow2", size);
    let a = theirs(dir, &words);
    let length = dir.read("a.qcow2").len();
    let b = linked(dir, &words);
    let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
    assert!(a.code == Some(0) && b.code == Some(0) && a.stdout == b.stdout, "{story}");
    // (Tiny clusters: where the header goes in an image with so many of them is up to the tool.)
    assert!(dir.read("a.qcow2").len() == length || kind.contains("cluster_size=512"), "{story}");
    b
}

#[test]
fn info_is_qemus() {
    requires!(qemu10());
    for (kind, _) in KINDS {
        let dir = Dir::new();
        ours(&dir, &create(kind, "a.qcow2", 1 << 20)).expect_code(0);
        dir.same_json("info --output=json a.qcow2");
        dir.same("info a.qcow2");
    }
}

#[test]
fn keys_that_are_missing_or_wrong() {
    requires!(qemu10());
    for format in ["luks,encrypt.iter-time=10", "aes"] {
        let dir = Dir::new();
        theirs(&dir, &format!("create -f qcow2 -o encrypt.format={format},encrypt.key-secret=s0 a.qcow2 1M"))
            .expect_code(0);
        for words in [
            "convert -O raw a.qcow2 out.raw".to_owned(),
            "map a.qcow2".to_owned(),
            "resize a.qcow2 2M".to_owned(),
            "compare a.qcow2 a.qcow2".to_owned(),
            "measure -O raw a.qcow2".to_owned(),
            "amend -o compat=1.1 a.qcow2".to_owned(),
            format!("map {}", opts("a.qcow2", "nobody")),
            "map --image-opts driver=qcow2,encrypt.format=qcow,encrypt.key-secret=s0,file.filename=a.qcow2"
                .to_owned(),
        ] {
            let (a, b) = (theirs(&dir, &words), linked(&dir, &words));
            let story = format!("--- qemu-img\n{}--- vimg\n{}", a.story(), b.story());
            assert!(a.code == b.code && a.code != Some(0), "{story}");
            if !words.contains("format=qcow") {
                assert!(b.stderr.starts_with(&a.stderr), "{story}");
            }
        }
        dir.vimg_ok("info a.qcow2");
        dir.vimg_ok("check a.qcow2");
    }
    let dir = Dir::new();
    theirs(
        &dir,
        "create -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s0 a.qcow2 1M",
    );
    same(&dir, &format!("map {}", opts("a.qcow2", "bad")));
    same(
        &dir,
        "map --image-opts driver=qcow2,encrypt.format=aes,encrypt.key-secret=s0,file.filename=a.qcow2",
    );
    same(&dir, &format!("map --output=json {}", opts("a.qcow2", "s0")));
}

#[test]
fn options_that_do_not_go_together() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("raw", 1 << 20);
    for options in [
        "encryption=on",
        "encryption=on,encrypt.format=luks,encrypt.key-secret=s0",
        "encryption=off,encrypt.key-secret=s0",
        "encrypt.format=luks",
        "encrypt.format=luks,encrypt.key-secret=nobody",
        "encrypt.format=nonsense,encrypt.key-secret=s0",
        "encrypt.key-secret=s0",
        "encrypt.cipher-alg=aes-128",
        "encrypt.format=aes,encrypt.cipher-alg=aes-128,encrypt.key-secret=s0",
        "encrypt.format=luks,encrypt.cipher-alg=nonsense,encrypt.key-secret=s0",
    ] {
        same(&dir, &format!("create -f qcow2 -o {options} a.qcow2 1M"));
    }
    same(&dir, "convert -f raw -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s0 raw a.qcow2");
    for options in [
        "encrypt.format=luks",
        "encrypt.format=luks,cluster_size=4k,encrypt.key-secret=s0",
        "encrypt.format=luks,encrypt.key-secret=nobody",
    ] {
        same(&dir, &format!("measure -O qcow2 -o {options} --size 1G"));
    }
    same(&dir, "measure -O qcow2 -o encrypt.format=aes,encrypt.key-secret=s0 --size 1G");
}

#[test]
fn resized_preallocated_and_amended() {
    requires!(qemu10());
    for kind in
        ["encrypt.format=luks,encrypt.iter-time=10", "encrypt.format=aes", "encrypt.format=aes,compat=0.10"]
    {
        let dir = Dir::new();
        for mode in ["metadata", "full"] {
            ours(
                &dir,
                &format!("create -f qcow2 -o {kind},preallocation={mode},encrypt.key-secret=s0 a.qcow2 4M"),
            )
            .expect_code(0);
            assert!(read(&dir, theirs, "a.qcow2", "s0") == vec![0; 4 << 20], "{kind}, {mode}");
            theirs(&dir, &format!("check {}", opts("a.qcow2", "s0"))).expect_code(0);
        }
        write(&dir, "a.qcow2", &tour(65536, 4 << 20, 3));
        let mut bytes = read(&dir, theirs, "a.qcow2", "s0");
        ours(&dir, &format!("resize {} 6M", opts("a.qcow2", "s0"))).expect_code(0);
        bytes.resize(6 << 20, 0);
        assert!(read(&dir, theirs, "a.qcow2", "s0") == bytes, "{kind}: larger");
        for words in ["compat=1.1,refcount_bits=8", "refcount_bits=16", "compat=0.10"] {
            ours(&dir, &format!("amend -o {words} {}", opts("a.qcow2", "s0"))).expect_code(0);
            assert!(read(&dir, theirs, "a.qcow2", "s0") == bytes, "{kind}: {words}");
            theirs(&dir, &format!("check {}", opts("a.qcow2", "s0"))).expect_code(0);
        }
    }
}

#[test]
fn key_slots_are_added_and_erased() {
    requires!(qemu10());
    let original = Dir::new();
    theirs(
        &original,
        "create -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s0 a.qcow2 1M",
    )
    .expect_code(0);
    write(&original, "a.qcow2", &tour(65536, 1 << 20, 4));
    let bytes = read(&original, theirs, "a.qcow2", "s0");
    let image = opts("a.qcow2", "s0");
    let dir = Dir::new();
    dir.write("a.qcow2", &original.read("a.qcow2"));
    for options in [
        "encrypt.state=active",
        "encrypt.state=active,encrypt.new-secret=nobody",
        "encrypt.state=active,encrypt.old-secret=s0,encrypt.new-secret=s1",
        "encrypt.state=nonsense",
        "encrypt.new-secret=s1",
        "encrypt.iter-time=10",
        "encrypt.state=inactive",
        "encrypt.state=inactive,encrypt.new-secret=s1",
        "encrypt.state=inactive,encrypt.iter-time=1",
        "encrypt.state=inactive,encrypt.old-secret=bad",
        "encrypt.state=inactive,encrypt.keyslot=9",
        "encrypt.state=inactive,encrypt.keyslot=0",
        "encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=0",
    ] {
        same(&dir, &format!("amend -o {options} {image}"));
    }
    ours(&dir, &format!("amend -o encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10 {image}"))
        .expect_code(0);
    assert!(read(&dir, theirs, "a.qcow2", "s1") == bytes);
    ours(&dir, &format!("amend -o encrypt.state=inactive,encrypt.old-secret=s0 {}", opts("a.qcow2", "s1")))
        .expect_code(0);
    assert!(read(&dir, theirs, "a.qcow2", "s1") == bytes);
    assert_eq!(theirs(&dir, &format!("map {image}")).code, Some(1));
    theirs(
        &dir,
        &format!(
            "amend -o encrypt.state=active,encrypt.new-secret=s0,encrypt.iter-time=10 {}",
            opts("a.qcow2", "s1")
        ),
    )
    .expect_code(0);
    assert!(read(&dir, ours, "a.qcow2", "s0") == bytes);
}

/// An encrypted image on an encrypted one.
#[test]
fn chains_of_encrypted_images() {
    requires!(qemu10());
    let dir = Dir::new();
    theirs(
        &dir,
        "create -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s0 base.qcow2 1M",
    )
    .expect_code(0);
    write(&dir, "base.qcow2", &tour(65536, 1 << 20, 5));
    let backing = r#"json:{"driver":"qcow2","encrypt.key-secret":"s0","file":{"driver":"file","filename":"base.qcow2"}}"#;
    let create = |cmd: Cmd| {
        let options = format!(
            "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s0,backing_file={},backing_fmt=qcow2",
            backing.replace(',', ",,")
        );
        cmd.words("create -f qcow2 -u")
            .words(SECRETS)
            .arg("-o")
            .arg(options)
            .words("top.qcow2 1M")
            .dir(dir.path())
            .run()
            .expect_code(0)
    };
    create(vimg());
    assert!(read(&dir, ours, "top.qcow2", "s0") == read(&dir, theirs, "base.qcow2", "s0"));
    write(&dir, "top.qcow2", &tour(65536, 1 << 20, 6));
    assert!(read(&dir, ours, "top.qcow2", "s0") == read(&dir, theirs, "top.qcow2", "s0"));
}
