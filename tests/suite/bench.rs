//! `bench`: the same requests, announced in the same words.

use tests::skip::qemu10;
use tests::{Dir, Ran, requires};

/// What was said, without the time that it took.
fn without_time(ran: &Ran) -> String {
    let lines = ran.stdout.lines().map(|line| match line.strip_prefix("Run completed in ") {
        Some(rest) if rest.strip_suffix(" seconds.").is_some_and(|time| time.parse::<f64>().is_ok()) => {
            "(time)"
        }
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn same(dir: &Dir, words: &str) -> Ran {
    let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_no_panic());
    let equal = theirs.code == ours.code
        && without_time(&theirs) == without_time(&ours)
        && (theirs.stderr == ours.stderr || theirs.stderr.contains("\nTry '") && !ours.stderr.is_empty());
    assert!(equal, "the tools differ\n--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
    theirs
}

#[test]
fn every_option_is_announced_alike() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 3 << 20);
    dir.qemu_ok("create -f qcow2 a.qcow2 3M");
    for words in [
        "a.qcow2",
        "-c 100 a.raw",
        "-q -c 100 -f raw a.raw",
        "-q --count=0x64 --depth=4 --offset=1M --buffer-size=8k --step-size=512 --format=raw a.raw",
        "-c 10 -d 100 -s 3 -f raw a.raw",
        "-c 3 -S 0 -f raw a.raw",
        "-c 3 -s 3M -f raw a.raw",
        "-c 3 -o 1M -s 1.5k -S 1M -f raw a.raw",
        "-c 100 -w -f raw a.raw",
        "-c 3 -w a.raw",
        "-c 100 -w --pattern 3 -d 4 a.qcow2",
        "-c 100 --write --flush-interval 10 --no-drain -d 4 -f raw a.raw",
        "-c 100 -w --flush-interval 10 -d 4 a.qcow2",
        "-c 100 -w --flush-interval 64 a.qcow2",
        "-c 100 -w --no-drain a.qcow2",
        "-c 100 --no-drain --pattern 3 a.qcow2",
        "-c 3 -i threads -f raw a.raw",
        "-c 3 -i native -t none -f raw a.raw",
        "-c 3 --native --cache=none -f raw a.raw",
        "-c 3 --aio=io_uring -f raw a.raw",
        "-c 3 -t writethrough -w -f raw a.raw",
        "-c 3 -U a.qcow2",
        "-c 3 --force-share a.qcow2",
        "-c 3 --image-opts driver=raw,file.filename=a.raw",
    ] {
        let ran = same(&dir, &format!("bench {words}"));
        assert_eq!(ran.code, Some(0), "{}", ran.story());
    }
}

#[test]
fn wrong_options_in_qemus_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 3 << 20);
    dir.qemu_ok("create -f qcow2 empty.qcow2 0");
    for words in [
        "",
        "-f raw",
        "-f raw a.raw b.raw",
        "-f nonsense a.raw",
        "missing",
        "--object secret,id=a,data=b a.raw",
        "-c 0 a.raw",
        "-c x a.raw",
        "-c -1 a.raw",
        "-c 1k a.raw",
        "-c 99999999999 a.raw",
        "-d 0 a.raw",
        "-d x a.raw",
        "-d -1 a.raw",
        "-s 0 a.raw",
        "-s x a.raw",
        "-s 5G a.raw",
        "-s 2147483648 a.raw",
        "-S x a.raw",
        "-S 2147483648 a.raw",
        "-o x a.raw",
        "-o -1 a.raw",
        "-w --pattern 300 a.raw",
        "-w --pattern x a.raw",
        "-w --flush-interval x a.raw",
        "-w --flush-interval -1 a.raw",
        "-w --flush-interval 10 a.raw",
        "--flush-interval 100 a.raw",
        "-i foo a.raw",
        "-i native a.raw",
        "-n a.raw",
        "-n -i threads -f raw a.raw",
        "-t foo a.raw",
        "-t foo -f nonsense a.raw",
        "-U -w -f raw a.raw",
        "-f raw --image-opts driver=raw,file.filename=a.raw",
        "-c 3 -s 4M -f raw a.raw",
        "-c 3 -o 1G -f raw a.raw",
        "-c 3 -o 3M -f raw a.raw",
        "-c 3 -o 3145727 -f raw a.raw",
        "-c 2000 -s 8k -S 4k -f raw a.raw",
        "-c 3 empty.qcow2",
    ] {
        let ran = same(&dir, &format!("bench {words}"));
        assert_eq!(ran.code, Some(1), "{}", ran.story());
    }
}

#[test]
fn what_is_written_is_the_pattern() {
    requires!(qemu10());
    let (theirs, ours) = (Dir::new(), Dir::new());
    for dir in [&theirs, &ours] {
        dir.qemu_ok("create -f qcow2 a.qcow2 3M");
    }
    for words in [
        "bench -w --pattern 65 -c 50 -d 3 -s 3000 -S 70000 -o 123456 a.qcow2",
        "bench -w --pattern 0x42 -c 10 -d 8 -s 512 -S 1M --flush-interval 8 a.qcow2",
        "bench -w --pattern=0 -c 1 -o 1M a.qcow2",
    ] {
        theirs.qemu_ok(words);
        ours.linked(words).expect_code(0);
        assert!(theirs.qemu_reads("a.qcow2") == ours.qemu_reads("a.qcow2"), "{words}");
        ours.qemu_checks("a.qcow2");
    }
}
