//! NTFS made by mkntfs and written by ntfs-3g, read by us.

use std::path::Path;

use block::testing::Random;
use guestdisk::detect::Kind;
use guestdisk::fs::{FileKind, FileSystem};
use tests::command::Cmd;
use tests::guest::{self, Size};
use tests::skip::{self, Need, tool};
use tests::{Dir, requires};

/// Whether ntfs-3g can mount here.
fn ntfs_3g() -> Need {
    tool("mkntfs")?;
    tool("ntfs-3g")?;
    skip::root()?;
    std::fs::metadata("/dev/fuse").map(drop).map_err(|_| "this kernel has no FUSE".to_owned())
}

/// Makes a file system in `disk` with these words and has `fill` write to it, mounted.
fn written(dir: &Dir, mkfs: &str, fill: impl FnOnce(&Path)) {
    let _ = std::fs::remove_file(dir.file("disk"));
    Cmd::new("truncate").words("-s 128M disk").dir(dir.path()).ok();
    Cmd::new("mkntfs").words("-q -F").words(mkfs).words("disk").dir(dir.path()).ok();
    std::fs::create_dir_all(dir.file("mnt")).unwrap();
    Cmd::new("ntfs-3g").words("-o compression disk mnt").dir(dir.path()).ok();
    fill(&dir.file("mnt"));
    Cmd::new("umount").arg(dir.file("mnt")).ok();
    // The daemon goes on writing after umount has returned.
    for _ in 0..100 {
        if Cmd::new("ntfsinfo").words("-m disk").dir(dir.path()).run().code == Some(0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn open(dir: &Dir) -> FileSystem {
    FileSystem::open(guest::open(&dir.file("disk"))).unwrap_or_else(|error| panic!("{error:?}"))
}

#[test]
fn trees_in_clusters_of_all_sizes() {
    requires!(ntfs_3g());
    let dir = Dir::new();
    guest::fill(&dir.file("tree"), Size { names: 500, largest: 5_000_000, unix: false });
    for options in ["-c 4096", "-c 512", "-c 65536"] {
        written(&dir, options, |mounted| {
            Cmd::new("cp").arg("-a").arg(dir.file("tree/.")).arg(mounted).ok();
        });
        let fs = open(&dir);
        assert_eq!(fs.kind(), Kind::Ntfs);
        assert!(fs.notes().is_empty(), "{options}: {:?}", fs.notes());
        let names = guest::compare(&fs, &dir.file("tree"), false, &["System Volume Information"]);
        assert!(names > 500, "{options}: {names}");
        // Names have no case.
        assert!(fs.exists("/BOOT/File-30") && fs.exists("/A/GR\u{dc}N \u{65e5}\u{672c}.TXT"));
        assert!(!fs.exists("/$MFT") && !fs.exists("/BOOT/File-31"));
    }
}

#[test]
fn compressed_fragmented_and_linked_files() {
    requires!(ntfs_3g(), tool("setfattr"));
    let dir = Dir::new();
    guest::fill(&dir.file("tree"), Size { names: 10, largest: 3_000_000, unix: false });
    written(&dir, "-C", |mounted| {
        Cmd::new("cp").arg("-a").arg(dir.file("tree/.")).arg(mounted).ok();
        Cmd::new("setfattr").words("-n system.ntfs_attrib_be -v 0x00000800").arg(mounted.join("a")).ok();
        for name in ["text", "sparse", "deep"] {
            let from = if name == "deep" { "boot/largest".to_owned() } else { format!("a/{name}") };
            std::fs::copy(dir.file("tree").join(from), mounted.join("a").join(format!("packed {name}")))
                .unwrap();
        }
        // Many pieces: their list does not fit a record.
        use std::os::unix::fs::FileExt as _;
        let one = std::fs::File::create(mounted.join("fragments")).unwrap();
        for index in 0..3000_u64 {
            one.write_all_at(&[u8::try_from(index % 251).unwrap(); 4096], index * 8192).unwrap();
        }
        std::fs::hard_link(mounted.join("boot/file-60"), mounted.join("hard link")).unwrap();
    });
    let fs = open(&dir);
    for (name, from) in [("text", "a/text"), ("sparse", "a/sparse"), ("deep", "boot/largest")] {
        let bytes = fs.read(format!("/a/packed {name}"), 1 << 26).unwrap();
        assert!(bytes == std::fs::read(dir.file("tree").join(from)).unwrap(), "{name}");
    }
    let fragments = fs.read("/fragments", 1 << 26).unwrap();
    assert_eq!(fragments.len(), 2999 * 8192 + 4096);
    for (index, piece) in fragments.chunks(8192).enumerate() {
        assert!(piece[..4096].iter().all(|byte| usize::from(*byte) == index % 251), "{index}");
        assert!(piece[4096..].iter().all(|byte| *byte == 0), "{index}");
    }
    assert_eq!(fs.metadata("/hard link").unwrap().links, 2);
    assert_eq!(fs.metadata("/boot").unwrap().kind, FileKind::Directory);
}

/// Everything is read; nothing may panic or go on for ever.
fn walk(fs: &FileSystem) {
    let (mut todo, mut seen) = (vec![std::path::PathBuf::from("/")], 0);
    while let Some(folder) = todo.pop() {
        for entry in fs.read_dir(&folder).unwrap_or_default() {
            seen += 1;
            if seen > 2000 || fs.work() > 100_000 {
                return;
            }
            let path = folder.join(&entry.name);
            let _ = (fs.symlink_metadata(&path), fs.read(&path, 1 << 22), fs.read_link(&path));
            if entry.kind == FileKind::Directory && path.components().count() < 12 {
                todo.push(path);
            }
        }
    }
}

#[test]
fn damage_is_told_or_passed_over() {
    requires!(ntfs_3g());
    let dir = Dir::new();
    guest::fill(&dir.file("tree"), Size { names: 60, largest: 100_000, unix: false });
    written(&dir, "", |mounted| {
        Cmd::new("cp").arg("-a").arg(dir.file("tree/.")).arg(mounted).ok();
    });
    let whole = std::fs::read(dir.file("disk")).unwrap();
    let whole = &whole[..32 << 20];
    let mft = u64::from_le_bytes(whole[0x30..0x38].try_into().unwrap()) * 4096;
    let mft = usize::try_from(mft).unwrap();
    let mut random = Random::new(3);
    let fresh: std::sync::Arc<dyn block::BlockDevice> = guest::disk(whole.to_vec());
    walk(&FileSystem::open(fresh).unwrap());
    for _ in 0..60 {
        let mut bytes = whole.to_vec();
        let mut dice = [0; 64];
        random.fill(&mut dice);
        for roll in dice.chunks(4) {
            // Within the first records, and what is before the last bytes of a sector.
            let at = mft + usize::from(u16::from_le_bytes([roll[0], roll[1]])) * 3 % (160 << 10);
            bytes[at] = match roll[2] % 4 {
                0 => 0xff,
                1 => 0,
                _ => roll[3],
            };
        }
        if let Ok(fs) = FileSystem::open(guest::disk(bytes)) {
            walk(&fs);
        }
    }
}
