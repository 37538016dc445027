//! `dd`: the same disk as qemu-img's, but for the space that zeros take.

use tests::skip::qemu10;
use tests::{Dir, requires};

/// A disk with data, zeros and holes.
fn disk(dir: &Dir, name: &str, len: u64) {
    dir.sparse(name, len);
    dir.poke(name, 0, &[1; 70_000]);
    dir.poke(name, 1 << 20, &[0; 65536]);
    dir.poke(name, (1 << 20) + 65536, &[3; 1000]);
    dir.poke(name, len - 600, &[7; 600]);
}

#[test]
fn every_window_of_every_format() {
    requires!(qemu10());
    let dir = Dir::new();
    disk(&dir, "odd.raw", (2 << 20) + 700);
    dir.qemu_ok("convert -f raw -O qcow2 -o cluster_size=4k odd.raw a.qcow2");
    dir.qemu_ok("create -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
    for words in [
        "if=odd.raw of=out",
        "-f raw if=odd.raw of=out bs=1M",
        "-f raw if=odd.raw of=out bs=1M count=1",
        "-f raw if=odd.raw of=out bs=1M skip=1",
        "-f raw if=odd.raw of=out bs=1M skip=1 count=2",
        "-f raw if=odd.raw of=out bs=1M skip=1 count=1",
        "-f raw if=odd.raw of=out bs=1M skip=2 count=1",
        "-f raw if=odd.raw of=out bs=1M skip=3",
        "-f raw if=odd.raw of=out bs=300 count=7",
        "-f raw if=odd.raw of=out bs=300 skip=6990",
        "-f raw if=odd.raw of=out bs=300 skip=6992",
        "-f raw if=odd.raw of=out bs=1.5k skip=3 count=0x100",
        "-f raw if=odd.raw of=out bs=2147483647",
        "-f raw if=odd.raw of=out count=0",
        "-f raw if=odd.raw of=out count=9223372036854775807",
        "-f raw if=odd.raw of=out skip=9223372036854775807",
        "-f raw -O qcow2 if=odd.raw of=out bs=1 skip=1045 count=9000",
        "-f raw --output-format=qcow2 if=odd.raw of=out skip=7",
        "-U -O raw if=a.qcow2 of=out bs=4096 skip=10 count=500",
        "--force-share --format=qcow2 -O qcow2 if=top.qcow2 of=out bs=4096 skip=10",
        "-O qcow2 if=top.qcow2 of=out bs=700k skip=1",
        "--image-opts if=driver=qcow2,file.filename=top.qcow2 of=out skip=100",
        "if=a.qcow2 of=other if=top.qcow2 of=out bs=1 bs=1k",
    ] {
        let theirs = dir.qemu(&format!("dd {words}"));
        std::fs::rename(dir.file("out"), dir.file("theirs")).unwrap();
        let ours = dir.linked(&format!("dd {words}")).expect_no_panic();
        let same = (theirs.code, &theirs.stdout, &theirs.stderr) == (ours.code, &ours.stdout, &ours.stderr);
        assert!(same, "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        assert!(dir.qemu_reads("theirs") == dir.qemu_reads("out"), "{words}: the disks differ");
        if words.contains("qcow2 if=") && words.contains('O') {
            dir.qemu_checks("out");
        }
    }
}

#[test]
fn wrong_operands_in_qemus_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 1 << 20);
    for words in [
        "",
        "if=a.raw",
        "of=out",
        "if=a.raw of=out foo=1",
        "if=a.raw of=out extra",
        "if=a.raw of=out =x",
        "if=a.raw of=out isize=3",
        "if=a.raw of=out osize=3",
        "if=a.raw of=out conv=sparse",
        "if",
        "bs=0",
        "bs=",
        "bs=abc",
        "bs=-1",
        "bs=2147483648",
        "bs=512x",
        "bs=1e3",
        "bs=x count=y",
        "count=y bs=x",
        "count=x",
        "count=-1",
        "count=1k",
        "count=0.5",
        "count=99999999999999999999",
        "skip=-1",
        "skip=1k",
        "skip=",
        "if=missing of=out",
        "if=a.raw of=/nonexistent/out",
        "-f nonsense if=a.raw of=out",
        "if= of=out",
        "-O nonsense if=a.raw of=out",
        "-O nonsense if=missing of=out",
        "if=a.raw of=",
        "-q if=a.raw of=out",
        "--image-opts -f raw if=driver=raw,file.filename=a.raw of=out",
        "--image-opts if=a.raw of=out",
    ] {
        dir.same(&format!("dd {words}"));
        assert!(!dir.exists("out"), "{words}");
    }
}

/// qemu-img empties the file first and then copies what is left of it.
#[test]
fn an_input_is_never_its_own_output() {
    let dir = Dir::new();
    disk(&dir, "a.raw", 2 << 20);
    let before = dir.read("a.raw");
    dir.vimg("dd -f raw if=a.raw of=a.raw").expect_clean_failure();
    assert!(dir.read("a.raw") == before);
}

#[test]
fn zeros_take_no_space_and_failures_leave_nothing() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = Dir::new();
    dir.write("a.raw", &vec![0; 8 << 20]);
    dir.vimg_ok("dd -f raw bs=1M if=a.raw of=out.raw");
    assert_eq!(std::fs::metadata(dir.file("out.raw")).unwrap().blocks(), 0);
    dir.write("cut.qcow2", &{
        dir.vimg_ok("convert -f raw -O qcow2 -S 0 a.raw full.qcow2");
        let mut bytes = dir.read("full.qcow2");
        bytes.truncate(3 << 20);
        bytes
    });
    dir.vimg("dd if=cut.qcow2 of=new.raw").expect_clean_failure();
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("new.raw")), "{left:?}");
}
