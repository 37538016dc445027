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
