//! What a copy may leave out: zeros there, and the file systems' own checkers and every file must not notice.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use block::num::to_usize;
use guestdisk::fs::FileSystem;
use guestdisk::{Disks, unused};
use tests::guest::{Size, compare, fill, open};
use tests::skip::tool;
use tests::{Cmd, Dir, requires};

/// What lies in free space before anything else does, so that it matters whether it is kept.
const JUNK: u8 = 0xaa;
const SIZE: Size = Size { names: 300, largest: 9 << 20, unix: true };

fn tree(dir: &Dir) -> PathBuf {
    let tree = dir.file("tree");
    if !tree.exists() {
        fill(&tree, SIZE);
    }
    tree
}

/// A file of this many MiB full of junk.
fn junk(dir: &Dir, name: &str, mib: usize) -> PathBuf {
    let path = dir.file(name);
    std::fs::write(&path, vec![JUNK; mib << 20]).unwrap();
    path
}

/// Puts zeros where nothing is. Returns how many bytes that were.
fn empty(path: &Path) -> u64 {
    let found = unused::find(&Disks::open(open(path)).unwrap(), &|_| true).unwrap();
    let [found] = &found[..] else { panic!("one disk") };
    assert_eq!(found.notes, [""; 0]);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    for range in &found.ranges {
        file.write_all_at(&vec![0; to_usize(range.end - range.start)], range.start).unwrap();
    }
    found.bytes()
}

fn has_junk(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let junk = [JUNK; 4096];
    bytes.chunks(4096).filter(|block| **block == junk).count() as u64 * 4096
}

#[test]
fn free_blocks_of_ext() {
    requires!(tool("mke2fs"), tool("e2fsck"), tool("debugfs"));
    let dir = Dir::new();
    let tree = tree(&dir);
    for options in [
        "-t ext4",
        "-t ext4 -b 1024",
        "-t ext4 -O ^flex_bg,^metadata_csum",
        "-t ext4 -O ^resize_inode,meta_bg,^metadata_csum,uninit_bg",
        "-t ext4 -O sparse_super2",
        "-t ext4 -g 2048 -b 1024",
        "-t ext2",
        "-t ext2 -b 2048 -g 8192",
        "-t ext3 -O ^sparse_super,^resize_inode",
    ] {
        let image = junk(&dir, "ext.img", 96);
        Cmd::new("mke2fs").words("-q -F -E nodiscard -d").arg(&tree).words(options).arg(&image).ok();
        let gone = Cmd::new("debugfs").words("-w -R").arg("rm boot/largest").arg(&image).run();
        assert_eq!(gone.code, Some(0), "{}", gone.stderr);
        // The inode of a removed file is in need of nothing more than this.
        let ran = Cmd::new("e2fsck").words("-fy").arg(&image).run();
        assert!(matches!(ran.code, Some(0 | 1)), "{options}: {}", ran.stdout);
        let before = has_junk(&image);
        let left_out = empty(&image);
        // The removed file is left out as well, which was not junk; junk remains in the journal and in tables.
        assert!(
            left_out > 60 << 20 && left_out > before - (8 << 20),
            "{options}: {left_out} of {before} bytes of junk"
        );
        assert!(has_junk(&image) < 12 << 20, "{options}: {} bytes of junk are kept", has_junk(&image));
        let ran = Cmd::new("e2fsck").words("-fn").arg(&image).run();
        assert!(ran.code == Some(0), "{options}: {}{}", ran.stdout, ran.stderr);
        let fs = FileSystem::open(open(&image)).unwrap();
        let kept = dir.file("kept");
        if !kept.exists() {
            Cmd::new("cp").words("-a").arg(&tree).arg(&kept).ok();
            std::fs::remove_file(kept.join("boot/largest")).unwrap();
            // debugfs does not touch the folder.
            Cmd::new("touch").arg("-r").arg(tree.join("boot")).arg(kept.join("boot")).ok();
        }
        compare(&fs, &kept, true, &["lost+found"]);
    }
}

#[test]
fn what_ext_does_not_say_for_certain_is_kept() {
    requires!(tool("mke2fs"), tool("debugfs"));
    let dir = Dir::new();
    let free = |image: &Path| FileSystem::open(open(image)).unwrap().free_ranges().unwrap();
    let make = |options: &str| {
        let image = junk(&dir, "ext.img", 64);
        Cmd::new("mke2fs").words("-q -F -E nodiscard").words(options).arg(&image).ok();
        image
    };
    let image = make("-t ext4");
    assert!(free(&image).is_some());
    for change in ["ssv state 2", "ssv state 0", "feature needs_recovery"] {
        let image = make("-t ext4");
        Cmd::new("debugfs").words("-w -R").arg(change).arg(&image).ok();
        assert_eq!(free(&image), None, "{change}");
    }
    assert_eq!(free(&make("-t ext4 -O bigalloc")), None);
    // A bit of a bitmap that says "free" where the descriptor counts otherwise: the group is kept.
    let image = make("-t ext4 -O ^metadata_csum,^uninit_bg");
    let before: u64 = free(&image).unwrap().iter().map(|range| range.end - range.start).sum();
    Cmd::new("debugfs").words("-w -R").arg("freeb 1").arg(&image).ok();
    let after: u64 = free(&image).unwrap().iter().map(|range| range.end - range.start).sum();
    assert!(after <= before, "{after} {before}");
}

#[test]
fn free_blocks_of_xfs() {
    requires!(tool("mkfs.xfs"), tool("xfs_repair"));
    let dir = Dir::new();
    for options in ["-b size=4096", "-m crc=0 -n ftype=0", "-m reflink=0,rmapbt=1 -i size=1024"] {
        let image = junk(&dir, "xfs.img", 400);
        let proto = dir.file("proto");
        std::fs::write(dir.file("payload"), vec![7; 3 << 20]).unwrap();
        let mut text = "/\n0 0\nd--755 0 0\n".to_owned();
        for index in 0..200 {
            text.push_str(&format!("f{index} ---644 0 0 {}\n", dir.file("payload").display()));
        }
        text.push_str("$\n");
        // Every third of the files is too much for the small trees: as many as fit.
        let text: String = text
            .lines()
            .filter(|line| !line.starts_with('f') || line.contains("5 "))
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&proto, text).unwrap();
        let ran =
            Cmd::new("mkfs.xfs").words("-q -f -K").words(options).arg("-p").arg(&proto).arg(&image).run();
        assert!(ran.code == Some(0), "{options}: {}", ran.stderr);
        let before = has_junk(&image);
        assert!(before > 250 << 20, "{options}: {before}");
        let left_out = empty(&image);
        // Junk remains in the log and in what is set aside for trees.
        assert!(left_out > before - (80 << 20), "{options}: {left_out} of {before}");
        let ran = Cmd::new("xfs_repair").words("-n -f").arg(&image).run();
        assert!(ran.code == Some(0), "{options}: {}{}", ran.stdout, ran.stderr);
        let fs = FileSystem::open(open(&image)).unwrap();
        let names = fs.read_dir("/").unwrap();
        assert_eq!(names.len(), 20, "{options}");
        for entry in names {
            assert!(
                fs.read(Path::new("/").join(&entry.name), 4 << 20).unwrap() == vec![7; 3 << 20],
                "{options}"
            );
        }
    }
}

#[test]
fn free_clusters_of_fat() {
    requires!(tool("mkfs.vfat"), tool("fsck.fat"), tool("mcopy"));
    let dir = Dir::new();
    std::fs::create_dir(dir.file("small")).unwrap();
    for index in 0..40_usize {
        std::fs::write(dir.file(&format!("small/f{index}")), vec![7; index * 10_000]).unwrap();
    }
    for bits in ["16", "32"] {
        let image = junk(&dir, "fat.img", 48);
        Cmd::new("mkfs.vfat").words("-F").arg(bits).arg(&image).ok();
        let copy = Cmd::new("mcopy")
            .words("-Q -s -i")
            .arg(&image)
            .arg(dir.file("small"))
            .arg("::/")
            .env("MTOOLS_SKIP_CHECK", "1")
            .run();
        assert_eq!(copy.code, Some(0), "{}", copy.stderr);
        let before = has_junk(&image);
        let left_out = empty(&image);
        assert!(left_out >= before && has_junk(&image) < 1 << 20, "FAT{bits}: {left_out} of {before}");
        let ran = Cmd::new("fsck.fat").words("-n").arg(&image).run();
        assert!(ran.code == Some(0), "FAT{bits}: {}{}", ran.stdout, ran.stderr);
        let fs = FileSystem::open(open(&image)).unwrap();
        for index in 0..40_usize {
            assert!(fs.read(format!("/small/f{index}"), 1 << 20).unwrap() == vec![7; index * 10_000]);
        }
    }
}

#[test]
fn swap_and_gaps_between_partitions() {
    requires!(tool("sfdisk"), tool("mkswap"));
    let dir = Dir::new();
    for (label, extended) in [("gpt", false), ("dos", false), ("dos", true)] {
        let image = junk(&dir, "disk.img", 128);
        // In the extended partition there are gaps, too, in which its chain lies.
        let more = if extended {
            "start=64MiB, size=48MiB, type=5\nstart=66MiB, size=4MiB\nstart=90MiB, size=4MiB\n"
        } else {
            ""
        };
        let script =
            format!("label: {label}\nstart=4MiB, size=16MiB, type=S\nstart=40MiB, size=8MiB, type=L\n{more}");
        Cmd::new("sfdisk").words("-q").arg(&image).stdin(script).ok();
        let space = junk(&dir, "swap.img", 16);
        Cmd::new("mkswap").words("-q").arg(&space).ok();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(&std::fs::read(&space).unwrap(), 4 << 20).unwrap();
        let bytes = empty(&image);
        let gaps = if extended { 18 + 14 + 14 } else { 18 + 78 };
        let swapped = (16 << 20) - (64 << 10);
        assert_eq!(bytes, (gaps << 20) + swapped, "{label} {extended}");
        let dump = Cmd::new("sfdisk").words("-d").arg(&image).run();
        assert_eq!(dump.code, Some(0), "{}", dump.stderr);
        assert_eq!(dump.stdout.matches("start=").count(), if extended { 5 } else { 2 }, "{}", dump.stdout);
        assert!(!dump.stderr.contains("backup GPT"), "{}", dump.stderr);
        let kept = std::fs::read(&image).unwrap();
        assert!(kept[40 << 20..48 << 20].iter().all(|byte| *byte == JUNK), "what is not known is kept");
        assert!(kept[1 << 20..2 << 20].iter().all(|byte| *byte == JUNK), "a boot loader may be there");
    }
}

/// Frozen, everything is in its place, though the log is not finished: with a removed file that is still open, too. As soon as
/// somebody goes on writing, the log has things to do, and nothing is left out.
#[test]
fn free_blocks_of_a_frozen_xfs() {
    requires!(tool("mkfs.xfs"), tool("xfs_repair"), tool("losetup"), tool("fsfreeze"), tests::skip::root());
    let dir = Dir::new();
    let image = junk(&dir, "xfs.img", 320);
    Cmd::new("mkfs.xfs").words("-q -f -K").arg(&image).ok();
    let script = "
        loop=$(losetup --show -f xfs.img) || exit 77
        trap 'fsfreeze -u m; exec 9>&-; umount m; losetup -d $loop' EXIT
        mkdir m && mount -t xfs -o nouuid $loop m || exit 77
        set -e
        cp -a tree m/ && sync && rm m/tree/boot/largest
        exec 9> m/open; echo x >&9; rm m/open
        fsfreeze -f m; cp xfs.img frozen.img; fsfreeze -u m
        touch m/later; sync; cp xfs.img later.img";
    let tree = tree(&dir);
    let ran = Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).timeout(120).run();
    if ran.code == Some(77) {
        tests::skip::note(&format!("no XFS can be mounted: {}", ran.stderr));
        return;
    }
    assert!(dir.exists("later.img"), "{}", ran.stderr);
    assert_eq!(FileSystem::open(open(&dir.file("later.img"))).unwrap().free_ranges().unwrap(), None);
    let frozen = dir.file("frozen.img");
    let before = has_junk(&frozen);
    let left_out = empty(&frozen);
    assert!(left_out > 200 << 20 && left_out + (16 << 20) > before, "{left_out} of {before} bytes of junk");
    // It is mounted, which finishes the log, and looks for the inode without a name.
    let script = "
        set -e; loop=$(losetup --show -f frozen.img); trap 'umount m; losetup -d $loop' EXIT
        mount -t xfs -o nouuid $loop m; umount m; xfs_repair -n -f frozen.img; mount -t xfs -o nouuid,ro $loop m
        rm tree/boot/largest; sums() { cd $1; find . -type f -exec md5sum {} + | sort; }
        [ \"$(sums tree)\" = \"$(sums m/tree)\" ]";
    let ran = Cmd::new("bash").arg("-c").arg(script).dir(dir.path()).timeout(120).run();
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    drop(tree);
}
