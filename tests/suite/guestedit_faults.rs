//! A host that fails while a guest's file system is changed, and one that stops.

use std::path::Path;
use std::sync::Arc;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::{Fault, FaultStorage};
use guestedit::{Attributes, GuestFs, Options};
use nix::errno::Errno;
use tests::command::Cmd;
use tests::edit;
use tests::skip::tool;
use tests::{Dir, requires};

/// A small file system with some files, made by its own tool.
fn image(dir: &Dir, options: &str) -> Vec<u8> {
    let _ = std::fs::remove_file(dir.file("disk"));
    if options == "vfat" {
        dir.sparse("disk", 8 << 20);
        Cmd::new("mkfs.vfat").words("disk").dir(dir.path()).ok();
    } else {
        Cmd::new("mke2fs").words("-q -F").words(options).words("disk 8M").dir(dir.path()).ok();
    }
    let mut fs = edit::open(&dir.file("disk"));
    fs.create(Path::new("/old"), &[1; 30_000], &Attributes::mode(0o644)).unwrap();
    fs.create(Path::new("/gone"), &[2; 30_000], &Attributes::mode(0o644)).unwrap();
    fs.mkdir(Path::new("/dir"), &Attributes::mode(0o755)).unwrap();
    fs.sync().unwrap();
    dir.read("disk")
}

/// A little of everything.
fn work(fs: &mut dyn GuestFs) -> block::Result<()> {
    fs.replace(Path::new("/old"), &[3; 50_000])?;
    fs.create(Path::new("/dir/new"), &[4; 20_000], &Attributes::mode(0o600))?;
    fs.mkdir(Path::new("/dir/sub"), &Attributes::mode(0o700))?;
    fs.remove(Path::new("/gone"))?;
    fs.sync()?;
    fs.create(Path::new("/last"), b"last", &Attributes::mode(0o600))?;
    fs.sync()
}

fn device(bytes: Vec<u8>) -> (Arc<MemStorage>, Arc<FaultStorage>, Arc<Raw>) {
    let memory = Arc::new(MemStorage::from_bytes(bytes));
    let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory) as _));
    let raw = Raw::open(Arc::clone(&faulty) as _, RawOptions::default()).unwrap();
    (memory, faulty, Arc::new(raw))
}

const KINDS: [&str; 4] =
    ["-t ext4 -b 1024", "-t ext4 -O ^64bit,^metadata_csum,^extents", "-t ext2 -b 1024", "vfat"];

fn check(dir: &Dir, kind: &str, words: &str) -> i32 {
    let program = if kind == "vfat" { "fsck.vfat" } else { "e2fsck" };
    Cmd::new(program).words(words).arg("disk").dir(dir.path()).run().code.unwrap_or(99)
}

/// Each operation of the host fails once: that is an error, and afterwards everything can be done again.
#[test]
fn every_operation_fails_once() {
    requires!(tool("mke2fs"), tool("mkfs.vfat"));
    let dir = Dir::new();
    for kind in KINDS {
        let bytes = image(&dir, kind);
        let mut number = 0;
        loop {
            let (memory, faulty, raw) = device(bytes.clone());
            let mut fs = guestedit::open(raw, &Options { time: Some(edit::NOW) }).unwrap();
            faulty.fail(Fault::nth(number, Errno::EIO));
            let before = faulty.total();
            let failed = work(&mut *fs).is_err();
            if !failed && faulty.total() - before <= number {
                break;
            }
            faulty.heal();
            let _ = fs.remove(Path::new("/dir/sub"));
            let _ = fs.remove(Path::new("/dir/new"));
            let _ = fs.create(Path::new("/gone"), b"", &Attributes::mode(0o644));
            let _ = fs.remove(Path::new("/last"));
            work(&mut *fs).unwrap_or_else(|error| panic!("{kind} {number}: {error:?}"));
            dir.write("disk", &memory.to_bytes());
            assert_eq!(check(&dir, kind, if kind == "vfat" { "-n" } else { "-fn" }), 0, "{kind} {number}");
            let mut fs = edit::open(&dir.file("disk"));
            assert!(fs.read(Path::new("/old"), 1 << 20).unwrap() == vec![3; 50_000], "{kind} {number}");
            number += 1;
        }
        assert!(number > 20, "{kind}: {number}");
    }
}

/// The host stops at each of its changes: what is on the disk then can be repaired, and each file is the old or the new
/// one.
#[test]
fn the_host_stops() {
    requires!(tool("mke2fs"), tool("mkfs.vfat"));
    let dir = Dir::new();
    for kind in KINDS {
        let bytes = image(&dir, kind);
        for number in 0.. {
            let (memory, faulty, raw) = device(bytes.clone());
            let mut fs = guestedit::open(raw, &Options { time: Some(edit::NOW) }).unwrap();
            faulty.fail(Fault::from_nth(number, Errno::EIO).on_changes());
            if work(&mut *fs).is_ok() {
                assert!(number > 8, "{kind}: {number}");
                break;
            }
            drop(fs);
            dir.write("disk", &memory.to_bytes());
            let code = check(&dir, kind, if kind == "vfat" { "-a" } else { "-fy" });
            assert!(code <= 1, "{kind} {number}: {code}");
            let mut fs = edit::open(&dir.file("disk"));
            let old = fs.read(Path::new("/old"), 1 << 20).unwrap();
            assert!(old == vec![1; 30_000] || old == vec![3; 50_000], "{kind} {number}");
            for (path, contents) in [("/gone", vec![2; 30_000]), ("/dir/new", vec![4; 20_000])] {
                if fs.stat(Path::new(path)).unwrap().is_some() {
                    assert!(fs.read(Path::new(path), 1 << 20).unwrap() == contents, "{kind} {number} {path}");
                }
            }
        }
    }
}
