//! Images that other products have made, from the source package of qemu (`scripts/samples.sh` fetches them): vimg sees in
//! them what qemu-img sees, converts them to every format and back, and refuses the ones that were made to break readers.

use std::path::{Path, PathBuf};

use tests::skip::{Need, qemu10};
use tests::{Dir, requires};

/// The folder of the samples.
fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("VIMG_SAMPLES")?);
    folder.join("complete").exists().then_some(folder)
}

/// Samples are there.
fn samples() -> Need {
    folder().map(drop).ok_or_else(|| "no sample images (scripts/samples.sh fetches them)".to_owned())
}

/// A folder with copies of some samples.
fn with(names: &[&str]) -> Dir {
    let dir = Dir::new();
    for name in names {
        copy(&folder().unwrap().join(name), &dir.file(name));
    }
    dir
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("--sparse=always").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// File, format.
const READABLE: &[(&str, &str)] = &[
    ("d2v-zerofilled.vhd", "vpc"),
    ("hyperv2012r2-dynamic.vhd", "vpc"),
    ("virtualpc-dynamic.vhd", "vpc"),
    ("iotest-dynamic-1G.vhdx", "vhdx"),
    ("test-disk2vhd.vhdx", "vhdx"),
    ("iotest-version3.vmdk", "vmdk"),
    ("parallels-v1", "parallels"),
    ("parallels-v2", "parallels"),
    ("empty.bochs", "bochs"),
    ("simple-pattern.cloop", "cloop"),
    ("simple-dmg.dmg", "dmg"),
];

#[test]
fn other_products_images_are_what_qemu_img_says() {
    requires!(qemu10(), samples());
    let names: Vec<_> = READABLE.iter().map(|(name, _)| *name).collect();
    let dir = with(&names);
    for (name, format) in READABLE {
        let info = dir.same_json(&format!("info --output=json {name}"));
        assert_eq!(info["format"], *format, "{name}");
        dir.qemu_ok(&format!("convert -f {format} -O raw {name} theirs.raw"));
        dir.vimg_ok(&format!("convert {name} ours.raw"));
        // The contents; the holes are a matter of taste.
        dir.vimg_ok("compare -f raw -F raw theirs.raw ours.raw");
        dir.vimg_ok(&format!("compare -F raw {name} theirs.raw"));
    }
}

#[test]
fn other_products_images_go_to_every_format_and_back() {
    requires!(qemu10(), samples());
    // qemu-img needs minutes to compare the empty 127 GiB of Hyper-V's; vimg has to see that they are equal all the same.
    let sources = [
        ("hyperv2012r2-dynamic.vhd", false),
        ("iotest-version3.vmdk", false),
        ("iotest-dynamic-1G.vhdx", true),
        ("parallels-v2", true),
        ("simple-dmg.dmg", true),
    ];
    let dir = with(&sources.map(|(name, _)| name));
    let targets =
        ["qcow2", "vmdk", "vdi", "vhdx", "vpc -o force_size=on", "vmdk -o subformat=streamOptimized"];
    for (source, with_qemu) in sources {
        for target in targets {
            dir.vimg_ok(&format!("convert -O {target} {source} out"));
            dir.vimg_ok(&format!("compare {source} out"));
            if with_qemu {
                let format = target.split(' ').next().unwrap();
                dir.qemu_ok(&format!("compare -F {format} {source} out"));
            }
            std::fs::remove_file(dir.file("out")).unwrap();
        }
    }
}

#[test]
fn a_dirty_vhdx_is_read_as_its_log_says_without_being_changed() {
    requires!(qemu10(), samples());
    let dir = with(&["iotest-dirtylog-10G-4M.vhdx"]);
    dir.copy("iotest-dirtylog-10G-4M.vhdx", "replayed.vhdx");
    let before = dir.read("iotest-dirtylog-10G-4M.vhdx");
    dir.qemu("check -r all replayed.vhdx");
    dir.qemu_ok("check replayed.vhdx");
    dir.vimg_ok("compare iotest-dirtylog-10G-4M.vhdx replayed.vhdx");
    assert!(dir.read("iotest-dirtylog-10G-4M.vhdx") == before, "reading changes nothing");
}

#[test]
fn images_made_to_break_readers_are_refused() {
    requires!(qemu10(), samples());
    let dir = with(&["afl5.img", "afl9.vmdk"]);
    for (name, format) in [("afl5.img", "vpc"), ("afl9.vmdk", "vmdk")] {
        for words in
            [format!("info {name}"), format!("info -f {format} {name}"), format!("convert {name} out.raw")]
        {
            dir.vimg_cmd(&words).timeout(20).memory_mib(512).run().expect_code(1).expect_clean_failure();
        }
    }
}
