//! `info`: the same document and the same text as qemu-img, letter by letter.

use tests::forge::Forge;
use tests::shape::SHAPES;
use tests::skip::qemu10;
use tests::{Dir, requires};

#[test]
fn every_shape_is_described_alike() {
    requires!(qemu10());
    for shape in SHAPES {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        dir.same_json("info --output=json a.qcow2");
        dir.same("info a.qcow2");
        dir.same_json("info -U -f qcow2 --output json a.qcow2");
        dir.same_json("info --backing-chain --output=json a.qcow2");
        dir.same("info --backing-chain a.qcow2");
    }
}

#[test]
fn raw_files_of_every_length() {
    requires!(qemu10());
    let dir = Dir::new();
    for len in [0, 1, 511, 512, 513, 1000, 65536, 192 << 10, 1_000_000, 1000 << 10, 1 << 30, 1 << 43] {
        dir.sparse("a.raw", len);
        dir.same_json("info --output=json a.raw");
        dir.same("info a.raw");
        dir.same("info -f raw a.raw");
    }
}

#[test]
fn names_of_every_form() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 8M");
    dir.sparse("with:colon.raw", 4096);
    for words in [
        "info file:a.qcow2",
        "info ./a.qcow2",
        "info ./with:colon.raw",
        "info with:colon.raw",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2",
        "info --image-opts driver=raw,file.driver=file,file.filename=a.qcow2",
        "info --image-opts driver=raw,offset=512,size=1024,file.driver=file,file.filename=a.qcow2",
        "info --image-opts a.qcow2",
        "info --image-opts driver=nonsense,file.filename=a.qcow2",
        "info -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2",
        "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}",
        "info json:{\"file.filename\":\"a.qcow2\"}",
        "info json:{\"driver\":\"nonsense\"}",
        "info missing.qcow2",
        "info -f qcow2 missing.qcow2",
        "info -f nonsense a.qcow2",
        "info .",
        "info",
        "info a.qcow2 b.qcow2",
        "info --output=xml a.qcow2",
        "info nonsense:a.qcow2",
    ] {
        dir.same(words);
    }
}

/// Only what the parser itself says of broken JSON is in its own words.
#[test]
fn broken_json() {
    let dir = Dir::new();
    for name in ["json:{", "json:", "json:[]", "json:{\"driver\":}"] {
        let ran = dir.linked(&format!("info {name}")).expect_clean_failure();
        assert!(ran.stderr.starts_with(&format!("qemu-img: Could not open '{name}': ")), "{}", ran.story());
    }
}

#[test]
fn snapshots_bitmaps_and_encryption_are_shown() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 snap.qcow2 8M");
    dir.qemu_ok("snapshot -c first snap.qcow2");
    dir.qemu_ok("snapshot -c second snap.qcow2");
    dir.qemu_ok("create -f qcow2 bitmap.qcow2 8M");
    dir.qemu_ok("bitmap --add bitmap.qcow2 daily");
    dir.qemu_ok("bitmap --add -g 32k bitmap.qcow2 hourly");
    dir.qemu_ok("bitmap --disable bitmap.qcow2 hourly");
    let secret = "--object secret,id=s0,data=hush";
    dir.qemu_ok(&format!(
        "create -f qcow2 {secret} -o encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10 luks.qcow2 8M"
    ));
    dir.qemu_ok(&format!(
        "create -f qcow2 {secret} -o encrypt.format=aes,encrypt.key-secret=s0 aes.qcow2 8M"
    ));
    for image in ["snap", "bitmap", "luks", "aes"] {
        dir.same_json(&format!("info --output=json {image}.qcow2"));
        dir.same(&format!("info {image}.qcow2"));
    }
}

#[test]
fn dirty_and_corrupt_images_say_so() {
    requires!(qemu10());
    let dir = Dir::new();
    for bits in [1u64, 2, 3] {
        let mut forge = Forge::new();
        forge.set64(72, bits);
        dir.write("a.qcow2", &forge.bytes());
        dir.same_json("info --output=json a.qcow2");
        dir.same("info a.qcow2");
    }
}

/// A feature that is not known is refused by the name that the image itself gives it.
#[test]
fn unknown_features_are_refused_by_name() {
    requires!(qemu10());
    let dir = Dir::new();
    let mut forge = Forge::new();
    let mut entry = vec![0u8, 17];
    entry.extend_from_slice(b"teleportation");
    entry.resize(48, 0);
    forge.set64(72, 1 << 17).extension(0x6803_f857, &entry);
    dir.write("named.qcow2", &forge.bytes());
    dir.same("info named.qcow2");
    let mut forge = Forge::new();
    forge.set64(72, 1 << 18);
    dir.write("nameless.qcow2", &forge.bytes());
    dir.same("info nameless.qcow2");
}

#[test]
fn backing_names_are_shown_as_qemu_resolves_them() {
    requires!(qemu10());
    let dir = Dir::new();
    std::fs::create_dir(dir.file("sub")).unwrap();
    dir.qemu_ok("create -f qcow2 base.qcow2 8M");
    dir.qemu_ok("create -f qcow2 -b ../base.qcow2 -F qcow2 sub/top.qcow2");
    let absolute = dir.file("base.qcow2").display().to_string();
    dir.qemu_ok(&format!("create -f qcow2 -b {absolute} -F qcow2 absolute.qcow2"));
    dir.qemu_ok("create -f qcow2 -u -b gone.qcow2 -F qcow2 lost.qcow2 8M");
    dir.qemu_ok("create -f qcow2 -u -b nbd://localhost:1/x -F raw remote.qcow2 8M");
    for image in ["sub/top.qcow2", "absolute.qcow2", "lost.qcow2", "remote.qcow2"] {
        dir.same_json(&format!("info --output=json {image}"));
        dir.same(&format!("info {image}"));
    }
    dir.same_json("info --backing-chain --output=json sub/top.qcow2");
    let chain = dir.linked("info --backing-chain lost.qcow2").expect_clean_failure();
    assert_eq!(chain.stderr, dir.qemu("info --backing-chain lost.qcow2").stderr);
}
