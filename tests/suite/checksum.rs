//! `checksum`: one digest for one disk, however it is stored.

use std::collections::BTreeSet;

use tests::shape::SHAPES;
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, requires};

/// The digest that vimg prints.
#[track_caller]
fn digest(dir: &Dir, words: &str) -> String {
    let ran = dir.vimg_ok(&format!("checksum {words}"));
    ran.stdout.split_once("  ").unwrap_or_else(|| panic!("{}", ran.story())).0.to_owned()
}

/// A disk of data, written zeros and holes that ends in the middle of a sector.
fn disk(dir: &Dir, name: &str) {
    dir.sparse(name, (21 << 20) + 700);
    dir.poke(name, 0, &[1; 70_000]);
    dir.poke(name, (4 << 20) - 5, &[2; 10]);
    dir.poke(name, 8 << 20, &vec![0; 5 << 20]);
    dir.poke(name, (21 << 20) + 100, &[9; 600]);
}

#[test]
fn every_shape_has_the_digest_of_its_bytes() {
    requires!(qemu(), tool("sha256sum"));
    for (index, shape) in SHAPES.iter().enumerate() {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", true);
        dir.qemu_ok("convert -O raw a.qcow2 a.raw");
        // One algorithm reads as the other.
        let algorithms = if index % 5 == 0 { "tree-sha256 tree-blake3 sha256" } else { "tree-sha256" };
        for algorithm in algorithms.split(' ') {
            let of = |image: &str| digest(&dir, &format!("--algorithm={algorithm} {image}"));
            assert_eq!(of("-f qcow2 a.qcow2"), of("-f raw a.raw"), "{} {algorithm}", shape.name);
        }
        let theirs = Cmd::new("sha256sum").arg("a.raw").dir(dir.path()).ok().stdout;
        let ours = dir.vimg_ok("checksum --algorithm=sha256 -f raw a.raw").stdout;
        assert_eq!(ours, theirs, "{}", shape.name);
        dir.poke("a.raw", shape.size() - 1, b"?");
        assert_ne!(digest(&dir, "-f raw a.raw"), digest(&dir, "a.qcow2"), "{}", shape.name);
    }
}

/// The program in the documentation is the definition.
#[test]
fn the_definition_in_the_documentation_gives_the_same() {
    requires!(tool("python3"));
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/checksum.md")).unwrap();
    let program = text.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let dir = Dir::new();
    dir.write("definition.py", program.as_bytes());
    disk(&dir, "odd.raw");
    for (name, len) in [("empty.raw", 0), ("one.raw", 512), ("two.raw", 8 << 20), ("five.raw", 20 << 20)] {
        dir.sparse(name, len);
    }
    dir.poke("five.raw", 13 << 20, b"x");
    for name in ["odd.raw", "empty.raw", "one.raw", "two.raw", "five.raw"] {
        let said = Cmd::new("python3").words("definition.py").arg(name).dir(dir.path()).ok().stdout;
        assert_eq!(digest(&dir, &format!("-f raw {name}")), said.trim(), "{name}");
    }
}

#[test]
fn zeros_layouts_and_threads_make_no_difference() {
    requires!(qemu());
    let dir = Dir::new();
    disk(&dir, "a.raw");
    dir.qemu_ok("convert -f raw -O qcow2 -S 0 a.raw full.qcow2");
    dir.qemu_ok("convert -f raw -O qcow2 -c a.raw small.qcow2");
    dir.qemu_ok("create -q -f qcow2 -b full.qcow2 -F qcow2 top.qcow2");
    let mut digests = BTreeSet::new();
    for words in [
        "-f raw a.raw",
        "full.qcow2",
        "small.qcow2",
        "top.qcow2",
        "--threads 1 top.qcow2",
        "--threads 7 -U -T none top.qcow2",
        "--image-opts driver=qcow2,file.filename=top.qcow2",
        "--untrusted full.qcow2",
    ] {
        digests.insert(digest(&dir, words));
    }
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[test]
fn an_empty_disk_of_60_tib_costs_next_to_nothing() {
    let dir = Dir::new();
    dir.vimg_ok("create -q -f qcow2 -o cluster_size=2M huge.qcow2 60T");
    let ran = dir.vimg_cmd("checksum huge.qcow2").timeout(20).ok();
    assert!(ran.elapsed.as_secs() < 10, "{:?}", ran.elapsed);
}

#[test]
fn lists_are_checked_as_sha256sum_checks_them() {
    requires!(qemu(), tool("sha256sum"));
    let dir = Dir::new();
    disk(&dir, "a.raw");
    dir.qemu_ok("convert -f raw -O qcow2 a.raw b.qcow2");
    let list = dir.vimg_ok("checksum a.raw b.qcow2").stdout;
    assert_eq!(list.lines().count(), 2);
    dir.write("LIST", list.as_bytes());
    assert_eq!(dir.vimg_ok("checksum -c LIST").stdout, "a.raw: OK\nb.qcow2: OK\n");
    assert_eq!(dir.vimg_ok("checksum -q --check LIST").stdout, "");
    let piped = dir.vimg_cmd("checksum -c -").stdin(list.as_bytes()).ok();
    assert_eq!(piped.stdout, "a.raw: OK\nb.qcow2: OK\n");
    // The list of the other tool, and ours read by it.
    let theirs = Cmd::new("sha256sum").arg("a.raw").dir(dir.path()).ok().stdout;
    dir.write("THEIRS", theirs.as_bytes());
    dir.vimg_ok("checksum -c THEIRS").expect_stdout("a.raw: OK");
    dir.write("OURS", dir.vimg_ok("checksum --algorithm sha256 a.raw").stdout.as_bytes());
    Cmd::new("sha256sum").words("-c OURS").dir(dir.path()).ok().expect_stdout("a.raw: OK");

    dir.poke("a.raw", 5 << 20, b"changed");
    let ran = dir.vimg("checksum -c LIST").expect_code(1);
    assert_eq!(ran.stdout, "a.raw: FAILED\nb.qcow2: OK\n");
    assert_eq!(ran.stderr, "vimg: WARNING: 1 computed checksum did NOT match\n");
    std::fs::remove_file(dir.file("a.raw")).unwrap();
    let ran = dir.vimg("checksum -c LIST").expect_code(1).expect_stderr("1 listed image could not be read");
    assert_eq!(ran.stdout, "a.raw: FAILED open or read\nb.qcow2: OK\n");
    let documents = dir.vimg("checksum --output=json -c LIST").expect_code(1).json();
    assert!(documents[0]["error"].is_string() && documents[1]["matches"] == true, "{documents}");

    dir.write("BAD", b"nonsense\n");
    dir.vimg("checksum -c BAD").expect_clean_failure().expect_stderr("no properly formatted checksum lines");
    dir.write("HALF", format!("nonsense\n# a comment\n{}", list.lines().nth(1).unwrap()).as_bytes());
    dir.vimg_ok("checksum -c HALF").expect_stderr("1 line is improperly formatted");
}

#[test]
fn several_images_and_wrong_words() {
    let dir = Dir::new();
    disk(&dir, "a.raw");
    dir.sparse("b.raw", 1 << 20);
    let ran = dir.vimg("checksum a.raw missing.raw b.raw").expect_code(1).expect_stderr("missing.raw");
    assert_eq!(ran.stdout.lines().count(), 2, "{}", ran.story());
    let documents = dir.vimg_ok("checksum --output json --algorithm tree-blake3 a.raw b.raw").json();
    assert_eq!(documents[1]["virtual-size"], 1 << 20);
    assert_eq!(documents[1]["algorithm"], "tree-blake3");
    assert_eq!(documents[0]["digest"].as_str().unwrap().len(), 64);
    dir.vimg_ok("checksum -p a.raw b.raw").expect_stdout("(100.00/100%)");
    for words in [
        "",
        "--algorithm=md5 a.raw",
        "-f nonsense a.raw",
        "-T nonsense a.raw",
        "--output=xml a.raw",
        "missing",
    ] {
        dir.vimg(&format!("checksum {words}")).expect_clean_failure();
    }
}

/// Half a digest of half a disk would be worse than none.
#[test]
fn a_disk_that_cannot_be_read_has_no_digest() {
    let dir = Dir::new();
    disk(&dir, "a.raw");
    dir.vimg_ok("convert -f raw -O qcow2 -S 0 a.raw a.qcow2");
    let mut bytes = dir.read("a.qcow2");
    bytes.truncate(11 << 20);
    dir.write("a.qcow2", &bytes);
    for algorithm in ["tree-sha256", "sha256"] {
        let ran = dir.vimg(&format!("checksum --algorithm={algorithm} a.qcow2")).expect_clean_failure();
        assert_eq!(ran.stdout, "", "{}", ran.story());
    }
}
