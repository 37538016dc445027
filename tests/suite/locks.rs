//! Image locks: vimg and qemu respect each other's, with the same words.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Child;

use tests::command;
use tests::skip::{qemu, qemu10, tool};
use tests::{Dir, requires};

/// qemu-io with an image open, until dropped.
pub(crate) struct Holder {
    child: Child,
}

impl Holder {
    /// Opens `image` with `args` (`-r` for read-only) and returns when it is open.
    pub(crate) fn new(dir: &Dir, args: &str, image: &str) -> Self {
        let mut child = command::qemu_io().words(args).arg(image).dir(dir.path()).spawn();
        // An answer to a command shows that the image is open.
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answer = lines.next().expect("qemu-io has not opened the image").unwrap();
        assert!(answer.contains("iB") || answer.contains("bytes"), "{answer}");
        // Keep the pipe open, or qemu-io is killed by its prompt.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_in_use_is_refused_in_qemus_words() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 4M");
    dir.qemu_ok("create -f qcow2 other.qcow2 4M");
    let _holder = Holder::new(&dir, "-f qcow2", "a.qcow2");
    for words in [
        "info a.qcow2",
        "info --output=json a.qcow2",
        "map a.qcow2",
        "check a.qcow2",
        "measure -O qcow2 a.qcow2",
        "compare a.qcow2 other.qcow2",
        "convert -O raw a.qcow2 out.raw",
        "resize a.qcow2 8M",
        "create -f qcow2 a.qcow2 1M",
        "convert -O qcow2 other.qcow2 a.qcow2",
        "convert -n -O qcow2 other.qcow2 a.qcow2",
    ] {
        let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_clean_failure());
        assert_eq!(theirs.code, ours.code, "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        // vimg may add who holds it.
        let said = theirs.stderr.trim_end();
        assert!(ours.stderr.starts_with(said), "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
    }
    assert_eq!(
        dir.qemu_ok("info -U --output=json a.qcow2").json()["virtual-size"],
        4 << 20,
        "it was changed"
    );
    for words in ["info -U a.qcow2", "map -U a.qcow2", "check -U a.qcow2", "compare -U a.qcow2 other.qcow2"] {
        dir.linked(words).expect_code(0);
    }
    dir.linked("convert -U -O raw a.qcow2 out.raw").expect_code(0);
}

#[test]
fn readers_share() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 4M");
    dir.qemu_ok("create -f qcow2 b.qcow2 4M");
    let _holder = Holder::new(&dir, "-r -f qcow2", "a.qcow2");
    for words in [
        "info a.qcow2",
        "map a.qcow2",
        "check a.qcow2",
        "convert -O raw a.qcow2 out.raw",
        "compare a.qcow2 b.qcow2",
    ] {
        dir.linked(words).expect_code(0);
    }
    let (theirs, ours) =
        (dir.qemu("resize a.qcow2 8M"), dir.linked("resize a.qcow2 8M").expect_clean_failure());
    assert!(ours.stderr.starts_with(theirs.stderr.trim_end()), "{}\n{}", theirs.story(), ours.story());
}

#[test]
fn raw_images_in_use() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.sparse("a.raw", 4 << 20);
    dir.sparse("b.raw", 4 << 20);
    let _holder = Holder::new(&dir, "-f raw", "a.raw");
    for words in [
        "info a.raw",
        "map -f raw a.raw",
        "compare -f raw -F raw a.raw b.raw",
        "convert -f raw -O qcow2 a.raw out.qcow2",
        "resize -f raw a.raw 8M",
        "measure -f raw -O qcow2 a.raw",
    ] {
        let (theirs, ours) = (dir.qemu(words), dir.linked(words).expect_no_panic());
        assert_eq!(theirs.code, ours.code, "--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        assert!(ours.stderr.starts_with(theirs.stderr.trim_end()), "{}\n{}", theirs.story(), ours.story());
    }
}

/// The backing file of a running machine's image may be read by others, its top may not.
#[test]
fn chains_in_use() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 base.qcow2 4M");
    dir.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    let _holder = Holder::new(&dir, "-f qcow2", "top.qcow2");
    dir.vimg("info top.qcow2").expect_clean_failure().expect_stderr("lock");
    dir.vimg_ok("info base.qcow2");
    dir.vimg_ok("convert -O raw base.qcow2 out.raw");
    dir.vimg("resize base.qcow2 8M").expect_clean_failure().expect_stderr("lock");
}

#[test]
fn a_server_holds_the_image() {
    requires!(qemu10(), tool("qemu-nbd"));
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 a.qcow2 4M");
    let socket = dir.file("sock");
    let mut server = tests::Cmd::new("qemu-nbd")
        .words("-f qcow2 -t -k")
        .arg(&socket)
        .arg("a.qcow2")
        .dir(dir.path())
        .spawn();
    for _ in 0..200 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (theirs, ours) = (dir.qemu("info a.qcow2"), dir.linked("info a.qcow2"));
    let shared = dir.linked("info -U a.qcow2");
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(theirs.code, ours.code, "{}", ours.story());
    assert!(ours.stderr.starts_with(theirs.stderr.trim_end()), "{}\n{}", theirs.story(), ours.story());
    assert_eq!(shared.code, Some(0), "{}", shared.story());
    // And nothing is left behind.
    dir.vimg_ok("info a.qcow2");
}
