//! File systems made by their own tools, read by us: every name, every byte.

use std::path::Path;

use guestdisk::detect::Kind;
use guestdisk::fs::FileSystem;
use tests::command::Cmd;
use tests::guest::{self, Size};
use tests::skip::tool;
use tests::{Dir, requires};

const UNIX: Size = Size { names: 1500, largest: 5_000_000, unix: true };

/// A folder with a tree in `tree`.
fn with_tree(size: Size) -> Dir {
    let dir = Dir::new();
    std::fs::create_dir(dir.file("tree")).unwrap();
    guest::fill(&dir.file("tree"), size);
    dir
}

/// Makes an ext file system of the tree, with these options.
fn mke2fs(dir: &Dir, options: &str) -> FileSystem {
    let _ = std::fs::remove_file(dir.file("disk"));
    // Each of 1500 files takes a block.
    let size = if options.contains("65536") { "1G" } else { "256M" };
    Cmd::new("mke2fs").words("-q -F -d tree").words(options).arg("disk").arg(size).dir(dir.path()).ok();
    Cmd::new("e2fsck").words("-fn disk").dir(dir.path()).ok();
    open(&dir.file("disk"))
}

fn open(path: &Path) -> FileSystem {
    FileSystem::open(guest::open(path)).unwrap_or_else(|error| panic!("{error:?}"))
}

#[test]
fn ext_in_many_shapes() {
    requires!(tool("mke2fs"), tests::skip::root());
    let dir = with_tree(UNIX);
    let shapes = [
        ("-t ext4", Kind::Ext4),
        ("-t ext2", Kind::Ext2),
        ("-t ext2 -b 1024 -r 0 -I 128 -O none", Kind::Ext2),
        ("-t ext3 -b 2048", Kind::Ext3),
        ("-t ext4 -b 1024 -O ^has_journal", Kind::Ext4),
        ("-t ext4 -O ^64bit,^metadata_csum,^flex_bg", Kind::Ext4),
        ("-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode", Kind::Ext4),
        ("-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode,^64bit,^sparse_super", Kind::Ext4),
        ("-t ext4 -O sparse_super2,large_dir,casefold,encrypt,mmp", Kind::Ext4),
        ("-t ext4 -O bigalloc -C 16384", Kind::Ext4),
        ("-t ext4 -b 65536", Kind::Ext4),
    ];
    for (options, kind) in shapes {
        let fs = mke2fs(&dir, options);
        assert_eq!(fs.kind(), kind, "{options}");
        assert!(fs.notes().is_empty(), "{options}: {:?}", fs.notes());
        let names = guest::compare(&fs, &dir.file("tree"), true, &["lost+found"]);
        assert!(names > 1500, "{names}");
    }
}

/// What Linux itself writes: small files and directories within inodes, hash trees, extents out of order.
#[test]
fn ext_as_linux_writes_it() {
    requires!(tool("mke2fs"), guest::mounts("ext4"));
    let dir = with_tree(UNIX);
    for options in
        ["-t ext4 -O inline_data -I 256", "-t ext4 -O inline_data -I 1024 -b 1024", "-t ext3", "-t ext2"]
    {
        let _ = std::fs::remove_file(dir.file("disk"));
        Cmd::new("mke2fs").words("-q -F").words(options).words("disk 256M").dir(dir.path()).ok();
        let mounted = guest::Mounted::new(&dir, "");
        mounted.copy_from(&dir.file("tree"));
        fragment(&mounted.path, &dir.file("tree"));
        drop(mounted);
        let fs = open(&dir.file("disk"));
        assert!(fs.notes().is_empty(), "{options}: {:?}", fs.notes());
        guest::compare(&fs, &dir.file("tree"), true, &["lost+found"]);
    }
}

/// Writes a file with many holes and another between its pieces, on both sides.
fn fragment(guest: &Path, host: &Path) {
    use std::os::unix::fs::FileExt as _;
    for root in [guest, host] {
        let open = |name| std::fs::File::create(root.join(name)).unwrap();
        let (one, other) = (open("fragments"), open("other fragments"));
        for index in 0..700_u64 {
            let bytes = [u8::try_from(index % 251).unwrap(); 5000];
            one.write_all_at(&bytes, index * 12_288).unwrap();
            other.write_all_at(&bytes, (700 - index) * 8192).unwrap();
            if index % 20 == 0 {
                one.sync_data().unwrap();
            }
        }
        for file in [one, other] {
            let times = std::fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
            file.set_times(times).unwrap();
        }
    }
    Cmd::new("touch").arg("-r").arg(host).arg(guest).ok();
}

/// A file system that was copied while it was mounted: the journal holds what is not in its place yet.
#[test]
fn ext_with_a_journal_that_was_not_finished() {
    requires!(tool("mke2fs"), guest::mounts("ext4"));
    let dir = Dir::new();
    for options in ["-t ext4", "-t ext4 -O ^64bit,^metadata_csum", "-t ext3 -b 1024"] {
        let _ = std::fs::remove_file(dir.file("disk"));
        Cmd::new("mke2fs").words("-q -F").words(options).words("disk 64M").dir(dir.path()).ok();
        let mounted = guest::Mounted::new(&dir, ",commit=1");
        std::fs::create_dir(dir.file("mnt/new")).unwrap();
        for index in 0..200 {
            std::fs::write(dir.file(&format!("mnt/new/{index}")), format!("contents {index}")).unwrap();
        }
        for index in 0..100 {
            std::fs::remove_file(dir.file(&format!("mnt/new/{index}"))).unwrap();
        }
        Cmd::new("sync").arg("-f").arg("mnt").dir(dir.path()).ok();
        dir.copy("disk", "copy");
        let fs = open(&dir.file("copy"));
        assert!(fs.notes().iter().any(|note| note.contains("read from it")), "{options}: {:?}", fs.notes());
        guest::compare(&fs, &mounted.path, true, &[]);
        drop(mounted);
        // e2fsck replays the same.
        Cmd::new("e2fsck").words("-fy copy").dir(dir.path()).run();
        let names = |fs: &FileSystem| {
            let mut names: Vec<_> =
                fs.read_dir("/new").unwrap().into_iter().map(|entry| entry.name).collect();
            names.sort();
            names
        };
        let checked = open(&dir.file("copy"));
        assert!(checked.notes().is_empty() && names(&checked) == names(&fs) && names(&fs).len() == 100);
    }
}

/// Makes a file system in `disk` with these words, lets Linux put the tree on it, and fragments some files.
fn written_by_linux(dir: &Dir, mkfs: &str, size: u64, options: &str) -> FileSystem {
    let _ = std::fs::remove_file(dir.file("disk"));
    dir.sparse("disk", size);
    let (program, words) = mkfs.split_once(' ').unwrap();
    Cmd::new(program).words(words).arg("disk").dir(dir.path()).ok();
    let mounted = guest::Mounted::new(dir, options);
    mounted.copy_from(&dir.file("tree"));
    fragment(&mounted.path, &dir.file("tree"));
    drop(mounted);
    open(&dir.file("disk"))
}

#[test]
fn xfs_in_many_shapes() {
    requires!(tool("mkfs.xfs"), guest::mounts("xfs"));
    let dir = with_tree(UNIX);
    let shapes = [
        "mkfs.xfs -q",
        "mkfs.xfs -q -m crc=1,rmapbt=1,bigtime=0 -i size=2048",
        "mkfs.xfs -q -b size=1024 -n size=4096 -i nrext64=1",
        "mkfs.xfs -q -b size=1024 -d agcount=7",
    ];
    for shape in shapes {
        let fs = written_by_linux(&dir, shape, 512 << 20, "");
        assert_eq!(fs.kind(), Kind::Xfs);
        assert!(fs.notes().is_empty(), "{shape}: {:?}", fs.notes());
        guest::compare(&fs, &dir.file("tree"), true, &[]);
    }
}

/// Linux mounts version 4 no more, but mkfs.xfs puts files into one: by a list of names without spaces.
#[test]
fn xfs_of_version_4() {
    requires!(tool("mkfs.xfs"));
    let dir = Dir::new();
    let tree = dir.file("tree");
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    let mut random = block::testing::Random::new(4);
    let mut list = "/none\n0 0\nd--755 0 0\nboot d--755 0 0\ngrub d--755 0 0\n$\n".to_owned();
    for index in 0..800_usize {
        let mut bytes = vec![0; index * 37];
        random.fill(&mut bytes);
        let name = format!("a-file-of-some-name-{index}");
        std::fs::write(tree.join("boot").join(&name), bytes).unwrap();
        list += &format!("{name} ---644 0 0 {}/boot/{name}\n", tree.display());
    }
    list += "$\n";
    for (name, target) in [("short", "boot".to_owned()), ("long", "x/".repeat(400))] {
        std::os::unix::fs::symlink(&target, tree.join(name)).unwrap();
        list += &format!("{name} l--777 0 0 {target}\n");
    }
    dir.write("list", format!("{list}$\n").as_bytes());
    for options in ["-n ftype=0 -i size=256", "-n ftype=1,size=8192 -b size=512", "-i size=1024"] {
        let _ = std::fs::remove_file(dir.file("disk"));
        dir.sparse("disk", 512 << 20);
        Cmd::new("mkfs.xfs").words("-q -m crc=0").words(options).words("-p list disk").dir(dir.path()).ok();
        let fs = open(&dir.file("disk"));
        assert!(guest::compare(&fs, &tree, false, &[]) > 800);
        for name in ["short", "long"] {
            assert_eq!(
                fs.read_link(name).unwrap(),
                std::fs::read_link(tree.join(name)).unwrap(),
                "{options}"
            );
        }
    }
}

#[test]
fn xfs_with_a_log_that_was_not_finished_says_so() {
    requires!(tool("mkfs.xfs"), guest::mounts("xfs"));
    let dir = Dir::new();
    dir.sparse("disk", 512 << 20);
    Cmd::new("mkfs.xfs").words("-q disk").dir(dir.path()).ok();
    let mounted = guest::Mounted::new(&dir, "");
    std::fs::write(dir.file("mnt/file"), b"contents").unwrap();
    Cmd::new("sync").arg("-f").arg("mnt").dir(dir.path()).ok();
    Cmd::new("cp").words("--sparse=always disk copy").dir(dir.path()).ok();
    drop(mounted);
    assert!(open(&dir.file("copy")).notes().iter().any(|note| note.contains("log was not finished")));
    let fs = open(&dir.file("disk"));
    assert!(fs.notes().is_empty(), "{:?}", fs.notes());
    assert_eq!(fs.read("/file", 100).unwrap(), b"contents");
}

#[test]
fn fat_in_all_sizes() {
    requires!(tool("mkfs.vfat"), tool("mcopy"));
    let dir = with_tree(Size { names: 300, largest: 300_000, unix: false });
    for (words, size) in [
        ("-F 12 -s 8", 15 << 20),
        ("-F 16 -s 4", 100 << 20),
        ("-F 32 -s 1", 100 << 20),
        ("-F 32 -S 4096 -s 1", 400 << 20),
        ("-F 16 -f 1 -S 1024", 60 << 20),
    ] {
        let _ = std::fs::remove_file(dir.file("disk"));
        dir.sparse("disk", size);
        Cmd::new("mkfs.vfat").words(words).words("-n LABEL -i 0102abcd disk").dir(dir.path()).ok();
        tests::guest_image::copy_to_fat(&dir.file("tree"), &dir.file("disk"), 0);
        let found = guestdisk::detect::detect(&*guest::open(&dir.file("disk"))).unwrap().unwrap();
        assert_eq!(
            (found.kind, found.uuid.as_str(), found.label.as_str()),
            (Kind::Vfat, "0102-ABCD", "LABEL"),
            "{words}"
        );
        let fs = open(&dir.file("disk"));
        guest::compare(&fs, &dir.file("tree"), false, &[]);
        // Case does not count, and short names are names.
        assert_eq!(fs.read("/BOOT/File-30", 100).unwrap(), dir.read("tree/boot/file-30"), "{words}");
        assert_eq!(fs.read("/EMPTYD~1/../A/TEXT", 1 << 20).unwrap(), dir.read("tree/a/text"), "{words}");
    }
}

#[test]
fn btrfs_in_many_shapes() {
    requires!(tool("mkfs.btrfs"), guest::mounts("btrfs"));
    let dir = with_tree(UNIX);
    for (shape, options) in [
        ("mkfs.btrfs -q", ""),
        ("mkfs.btrfs -q -m single -d single -n 4096", ",compress-force=zlib"),
        ("mkfs.btrfs -q -d dup -O ^no-holes", ",compress-force=lzo"),
        ("mkfs.btrfs -q --mixed", ",compress-force=zstd:9"),
        ("mkfs.btrfs -q -n 65536", ",max_inline=0,compress=zstd"),
    ] {
        let fs = written_by_linux(&dir, shape, 512 << 20, options);
        assert_eq!(fs.kind(), Kind::Btrfs);
        assert!(fs.notes().is_empty(), "{shape}: {:?}", fs.notes());
        guest::compare(&fs, &dir.file("tree"), true, &[]);
    }
}

/// Paths begin in the default subvolume, and lead into others; GRUB sees the top.
#[test]
fn btrfs_with_subvolumes() {
    requires!(tool("mkfs.btrfs"), tool("btrfs"), guest::mounts("btrfs"));
    let dir = Dir::new();
    dir.sparse("disk", 256 << 20);
    Cmd::new("mkfs.btrfs").words("-q disk").dir(dir.path()).ok();
    let mounted = guest::Mounted::new(&dir, "");
    let btrfs = |words: &str| Cmd::new("btrfs").words(words).dir(&mounted.path).ok();
    btrfs("subvolume create root");
    btrfs("subvolume create root/home");
    std::fs::write(mounted.path.join("root/file"), b"in root").unwrap();
    std::fs::write(mounted.path.join("root/home/file"), b"in home").unwrap();
    btrfs("subvolume snapshot -r root snapshot");
    std::fs::write(mounted.path.join("root/file"), b"changed").unwrap();
    std::fs::write(mounted.path.join("file"), b"at the top").unwrap();
    btrfs("subvolume set-default root");
    drop(mounted);
    let fs = open(&dir.file("disk"));
    assert_eq!(fs.read("/file", 100).unwrap(), b"changed");
    assert_eq!(fs.read("/home/file", 100).unwrap(), b"in home");
    let top = FileSystem::open_top(guest::open(&dir.file("disk"))).unwrap();
    assert_eq!(top.read("/file", 100).unwrap(), b"at the top");
    assert_eq!(top.read("/root/home/file", 100).unwrap(), b"in home");
    assert_eq!(top.read("/snapshot/file", 100).unwrap(), b"in root");
    assert_eq!(top.read_dir("/snapshot/home").unwrap(), []);
}
