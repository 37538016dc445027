//! XFS and btrfs: files overwritten where they are, judged by xfs_repair, btrfs check and Linux.

use std::path::Path;

use block::ErrorKind;
use guestedit::Attributes;
use tests::command::Cmd;
use tests::edit;
use tests::skip::tool;
use tests::{Dir, guest, requires};

/// A file system with files of many sizes, written by Linux.
fn make(dir: &Dir, mkfs: &str, mount: &str, fill: impl FnOnce(&Path)) {
    let _ = std::fs::remove_file(dir.file("disk"));
    dir.sparse("disk", 320 << 20);
    let (program, words) = mkfs.split_once(' ').unwrap();
    Cmd::new(program).words(words).arg("disk").dir(dir.path()).ok();
    let mounted = guest::Mounted::new(dir, mount);
    for size in SIZES {
        std::fs::write(mounted.path.join(format!("file-{size}")), contents(size, 1)).unwrap();
    }
    fill(&mounted.path);
}

const SIZES: [usize; 8] = [5000, 4096, 8192, 65_536, 100_001, 1_000_000, 7_000_000, 20_000];

fn contents(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    block::testing::Random::new(seed + size as u64).fill(&mut bytes);
    bytes
}

/// Replaces all files by ones of the same size, shorter and a little longer ones, and compares with what Linux reads.
fn replace_all(dir: &Dir, mount: &str, check: &dyn Fn()) {
    check();
    let mut fs = edit::open(&dir.file("disk"));
    assert_eq!(fs.backend(), "in-place");
    let mut expected = vec![];
    for (index, size) in SIZES.into_iter().enumerate() {
        let new = match index % 4 {
            0 => size,
            1 => size - 1000,
            2 => size.next_multiple_of(4096),
            _ => size / 3,
        };
        let path = format!("/file-{size}");
        let before = fs.stat(Path::new(&path)).unwrap().unwrap();
        fs.replace(Path::new(&path), &contents(new, 2)).unwrap();
        let after = fs.stat(Path::new(&path)).unwrap().unwrap();
        assert_eq!((after.size, after.mtime), (new as u64, edit::NOW));
        assert_eq!((before.mode, before.uid, before.links), (after.mode, after.uid, after.links));
        assert!(fs.read(Path::new(&path), 1 << 30).unwrap() == contents(new, 2));
        expected.push((path, new));
        // What does not fit is refused, and changes nothing.
        let error = fs.replace(Path::new(&expected[index].0), &contents(size + 5_000_000, 3)).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Unsupported && error.hints()[0].contains("appliance"),
            "{error:?}"
        );
    }
    for (what, result) in [
        ("create", fs.create(Path::new("/x"), b"", &Attributes::default())),
        ("mkdir", fs.mkdir(Path::new("/x"), &Attributes::default())),
        ("symlink", fs.symlink(Path::new("/x"), Path::new("y"), &Attributes::default())),
        ("remove", fs.remove(Path::new("/file-5000"))),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Unsupported, "{what}");
    }
    fs.sync().unwrap();
    drop(fs);
    check();
    let mounted = guest::Mounted::new(dir, mount);
    for (path, size) in expected {
        let on_host = mounted.path.join(&path[1..]);
        assert!(std::fs::read(&on_host).unwrap() == contents(size, 2), "{path}");
        // Linux can go on with it.
        let mut file = std::fs::OpenOptions::new().append(true).open(&on_host).unwrap();
        std::io::Write::write_all(&mut file, &[7; 50_000]).unwrap();
    }
    drop(mounted);
    check();
}

#[test]
fn xfs() {
    requires!(tool("mkfs.xfs"), tool("xfs_repair"), guest::mounts("xfs"));
    let dir = Dir::new();
    let check = || drop(Cmd::new("xfs_repair").words("-n disk").dir(dir.path()).ok());
    for options in ["-q", "-q -m bigtime=0,reflink=0 -b size=1024", "-q -i size=2048"] {
        make(&dir, &format!("mkfs.xfs {options}"), "", |_| ());
        replace_all(&dir, "", &check);
    }
}

#[test]
fn xfs_that_is_refused() {
    requires!(tool("mkfs.xfs"), tool("xfs_repair"), guest::mounts("xfs"));
    let dir = Dir::new();
    make(&dir, "mkfs.xfs -q", "", |root| {
        std::fs::write(root.join("original"), contents(100_000, 1)).unwrap();
        Cmd::new("cp").arg("--reflink=always").arg(root.join("original")).arg(root.join("clone")).ok();
        Cmd::new("fallocate").words("-l 100000").arg(root.join("unwritten")).ok();
        Cmd::new("truncate").words("-s 100000").arg(root.join("hole")).ok();
        std::fs::write(root.join("empty"), b"").unwrap();
    });
    let mut fs = edit::open(&dir.file("disk"));
    for (name, reason) in [
        ("clone", "same bytes"),
        ("original", "same bytes"),
        ("unwritten", "never written"),
        ("hole", "do not fit"),
    ] {
        let error = fs.replace(&Path::new("/").join(name), &contents(100_000, 2)).unwrap_err();
        assert!(error.to_string().contains(reason), "{name}: {error:?}");
    }
    fs.replace(Path::new("/empty"), b"").unwrap();
    // A disk that was copied while it was mounted.
    let mounted = guest::Mounted::new(&dir, "");
    std::fs::write(mounted.path.join("new"), b"new").unwrap();
    Cmd::new("sync").arg("-f").arg("mnt").dir(dir.path()).ok();
    dir.copy("disk", "copy");
    let error = edit::try_open(&dir.file("copy")).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("log"), "{error:?}");
    drop(mounted);
}

#[test]
fn btrfs() {
    requires!(tool("mkfs.btrfs"), tool("btrfs"), guest::mounts("btrfs"));
    let dir = Dir::new();
    let check = || {
        Cmd::new("btrfs").words("check disk").dir(dir.path()).ok();
        Cmd::new("btrfs").words("check --check-data-csum disk").dir(dir.path()).ok();
    };
    for (options, mount) in [
        ("-q", ""),
        ("-q -m single -d single", ""),
        ("-q -m dup -d dup", ""),
        ("-q -n 4096 -O ^no-holes", ""),
        ("-q", ",nodatasum"),
    ] {
        make(&dir, &format!("mkfs.btrfs {options}"), mount, |_| ());
        replace_all(&dir, mount, &check);
    }
}

#[test]
fn btrfs_that_is_refused() {
    requires!(tool("mkfs.btrfs"), tool("btrfs"), guest::mounts("btrfs"));
    let dir = Dir::new();
    make(&dir, "mkfs.btrfs -q", "", |root| {
        std::fs::write(root.join("original"), contents(100_000, 1)).unwrap();
        Cmd::new("cp").arg("--reflink=always").arg(root.join("original")).arg(root.join("clone")).ok();
        std::fs::write(root.join("small"), b"within the tree").unwrap();
        Cmd::new("btrfs").words("subvolume create").arg(root.join("sub")).ok();
        std::fs::write(root.join("sub/old"), contents(100_000, 1)).unwrap();
        Cmd::new("sync").arg("-f").arg(root).ok();
        Cmd::new("btrfs").words("subvolume snapshot").arg(root.join("sub")).arg(root.join("snapshot")).ok();
        std::fs::write(root.join("sub/new"), contents(100_000, 1)).unwrap();
    });
    let mut fs = edit::open(&dir.file("disk"));
    for (name, reason) in [
        ("clone", "same bytes"),
        ("original", "same bytes"),
        ("small", "among the file system's records"),
        ("sub/old", "same bytes"),
        ("snapshot/old", "same bytes"),
    ] {
        let error = fs.replace(&Path::new("/").join(name), &contents(100_000, 2)).unwrap_err();
        assert!(error.to_string().contains(reason), "{name}: {error:?}");
    }
    fs.replace(Path::new("/sub/new"), &contents(100_000, 2)).unwrap();
    fs.sync().unwrap();
    Cmd::new("btrfs").words("check --check-data-csum disk").dir(dir.path()).ok();
    let mounted = guest::Mounted::new(&dir, ",compress-force=zstd");
    std::fs::write(mounted.path.join("packed"), vec![b'x'; 300_000]).unwrap();
    drop(mounted);
    let mut fs = edit::open(&dir.file("disk"));
    let error = fs.replace(Path::new("/packed"), &vec![b'y'; 300_000]).unwrap_err();
    assert!(error.to_string().contains("compressed"), "{error:?}");
}

/// Version 4, which Linux does not mount any more.
#[test]
fn xfs_of_version_4() {
    requires!(tool("mkfs.xfs"), tool("xfs_repair"));
    let dir = Dir::new();
    let mut list = "/none\n0 0\nd--755 0 0\n".to_owned();
    for size in SIZES {
        let name = format!("file-{size}");
        dir.write(&name, &contents(size, 1));
        list += &format!("{name} ---644 0 0 {}\n", dir.file(&name).display());
    }
    dir.write("list", format!("{list}$\n").as_bytes());
    dir.sparse("disk", 512 << 20);
    Cmd::new("mkfs.xfs").words("-q -m crc=0 -p list disk").dir(dir.path()).ok();
    let mut fs = edit::open(&dir.file("disk"));
    for size in SIZES {
        let path = format!("/file-{size}");
        fs.replace(Path::new(&path), &contents(size - 7, 2)).unwrap();
        assert!(fs.read(Path::new(&path), 1 << 30).unwrap() == contents(size - 7, 2));
        assert_eq!(fs.stat(Path::new(&path)).unwrap().unwrap().mtime, edit::NOW);
    }
    fs.sync().unwrap();
    Cmd::new("xfs_repair").words("-n disk").dir(dir.path()).ok();
}
