//! Trees of files to put into file systems, and the comparison of what is read back with what was put in.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::Random;
use block::{BlockDevice, Storage};
use guestdisk::fs::{FileKind, FileSystem};

use crate::command::Cmd;
use crate::dir::Dir;
use crate::skip::{self, Need};

/// A raw image in a file as a device.
pub fn open(path: &Path) -> Arc<dyn BlockDevice> {
    let file = HostFile::open(path, &FileOptions::read_only()).unwrap();
    raw(Arc::new(file))
}

/// The same for writing.
pub fn open_writable(path: &Path) -> Arc<dyn BlockDevice> {
    let file = HostFile::open(path, &FileOptions::read_write()).unwrap();
    raw(Arc::new(file))
}

/// Bytes as a device.
pub fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    raw(Arc::new(MemStorage::from_bytes(bytes)))
}

fn raw(storage: Arc<dyn Storage>) -> Arc<dyn BlockDevice> {
    Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
}

/// How much is put into a tree.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Names in the largest directory.
    pub names: usize,
    /// Bytes of the largest file.
    pub largest: usize,
    /// Symbolic links and names that differ in case only.
    pub unix: bool,
}

/// Fills a folder with files of many kinds: empty, small, large, sparse, in deep and in large directories, with long
/// names and names in other scripts, and links.
pub fn fill(root: &Path, size: Size) {
    let mut random = Random::new(42);
    let mut bytes = |len: usize| {
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        bytes
    };
    std::fs::create_dir_all(root.join("boot/grub")).unwrap();
    std::fs::create_dir_all(root.join("a/b/c/d/e/f")).unwrap();
    std::fs::create_dir(root.join("empty directory")).unwrap();
    for len in [0, 1, 30, 59, 60, 61, 120, 150, 511, 512, 513, 1023, 1024, 4095, 4096, 4097, 65_536, 100_000]
    {
        std::fs::write(root.join(format!("boot/file-{len}")), bytes(len)).unwrap();
    }
    std::fs::write(root.join("boot/largest"), bytes(size.largest)).unwrap();
    std::fs::write(root.join("a/b/c/d/e/f/deep"), b"deep").unwrap();
    std::fs::write(root.join(format!("a/{}", "long".repeat(50))), b"long name").unwrap();
    std::fs::write(root.join("a/grün 日本.txt"), b"unicode").unwrap();
    // Compressible, with holes in it.
    let sparse = std::fs::File::create(root.join("a/sparse")).unwrap();
    sparse.set_len(size.largest as u64 / 2 + 77).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[b'x'; 9000], size.largest as u64 / 4).unwrap();
    std::fs::write(root.join("a/text"), "all work and no play\n".repeat(20_000)).unwrap();
    std::fs::create_dir(root.join("many")).unwrap();
    for index in 0..size.names {
        std::fs::write(root.join(format!("many/entry number {index}")), index.to_string()).unwrap();
    }
    if size.unix {
        unix(root);
    }
}

fn unix(root: &Path) {
    symlink("boot/file-30", root.join("short link")).unwrap();
    symlink("/boot", root.join("a/absolute link")).unwrap();
    symlink("../../short link", root.join("a/b/relative link")).unwrap();
    symlink(format!("/{}", "x/".repeat(90)), root.join("long dangling link")).unwrap();
    symlink(format!("/{}", "y/".repeat(450)), root.join("longer dangling link")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    std::fs::write(root.join("a/penguin \u{1f427}"), b"beyond 16 bits").unwrap();
    std::fs::write(root.join("Case"), b"upper").unwrap();
    std::fs::write(root.join("case"), b"lower").unwrap();
    std::fs::set_permissions(root.join("boot/file-1"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(root.join("boot/file-59"), Some(70_000), Some(80_000)).unwrap();
    std::fs::hard_link(root.join("boot/file-60"), root.join("a/hard link")).unwrap();
    nix::unistd::mkfifo(&root.join("a/fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
}

/// Whether images of this file system can be mounted here.
///
/// # Errors
/// It takes the superuser, a loop device and a kernel that knows the file system.
pub fn mounts(kind: &str) -> Need {
    skip::root()?;
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.split_whitespace().any(|word| word == kind) {
        return Err(format!("this kernel has no {kind} (or has not loaded it)"));
    }
    match Cmd::new("losetup").arg("-f").run().code {
        Some(0) => Ok(()),
        _ => Err("no loop device can be had".to_owned()),
    }
}

/// A mounted image.
#[derive(Debug)]
pub struct Mounted {
    /// Where its files are.
    pub path: PathBuf,
}

impl Mounted {
    /// Mounts `disk` of a folder on `mnt` in it.
    pub fn new(dir: &Dir, options: &str) -> Self {
        let path = dir.file("mnt");
        std::fs::create_dir_all(&path).unwrap();
        Cmd::new("mount").words("-o").arg(format!("loop{options}")).words("disk mnt").dir(dir.path()).ok();
        Self { path }
    }

    /// Copies everything in a folder to it.
    pub fn copy_from(&self, folder: &Path) {
        Cmd::new("cp").arg("-a").arg(folder.join(".")).arg(&self.path).ok();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut ran = Cmd::new("umount").arg(&self.path).run();
        // A process that another test is starting may hold a file of ours until it has become the other program.
        for _ in 0..20 {
            if ran.code == Some(0) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
            ran = Cmd::new("umount").arg(&self.path).run();
        }
        assert!(ran.code == Some(0) || std::thread::panicking(), "{}", ran.story());
    }
}

/// What is compared of a file besides its bytes.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    kind: FileKind,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    mtime: i64,
    link: Option<PathBuf>,
}

/// What the host says of a path.
fn host_facts(path: &Path) -> Facts {
    let found = path.symlink_metadata().unwrap();
    let kind = match found.mode() >> 12 {
        1 => FileKind::Fifo,
        4 => FileKind::Directory,
        8 => FileKind::File,
        10 => FileKind::Symlink,
        other => panic!("{}: {other}", path.display()),
    };
    Facts {
        kind,
        mode: found.mode() & 0o7777,
        owner: (found.uid(), found.gid()),
        size: if kind == FileKind::File { found.len() } else { 0 },
        mtime: found.mtime(),
        link: (kind == FileKind::Symlink).then(|| std::fs::read_link(path).unwrap()),
    }
}

fn guest_facts(fs: &FileSystem, path: &Path) -> Facts {
    let found = fs.symlink_metadata(path).unwrap();
    Facts {
        kind: found.kind,
        mode: found.mode,
        owner: (found.uid, found.gid),
        size: if found.kind == FileKind::File { found.size } else { 0 },
        mtime: found.mtime,
        link: (found.kind == FileKind::Symlink).then(|| fs.read_link(path).unwrap()),
    }
}

/// Expects that a file system holds what a folder does, names, metadata and bytes. Returns the number of names.
/// `unix`: with modes, owners and times, which FAT does not keep. The names in `extra` may be there besides.
#[track_caller]
pub fn compare(fs: &FileSystem, host: &Path, unix: bool, extra: &[&str]) -> usize {
    let mut count = 0;
    let mut todo = vec![PathBuf::from("/")];
    while let Some(folder) = todo.pop() {
        let on_host = |path: &Path| host.join(path.strip_prefix("/").unwrap());
        let listed = fs.read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let total = listed.len();
        let mut guest: BTreeMap<OsString, FileKind> =
            listed.into_iter().map(|entry| (entry.name, entry.kind)).collect();
        assert_eq!(guest.len(), total, "{}: names come twice", folder.display());
        guest.retain(|name, _| folder != Path::new("/") || !extra.iter().any(|known| *known == name));
        let names: Vec<_> =
            std::fs::read_dir(on_host(&folder)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let mut sorted = names.clone();
        sorted.sort();
        assert!(guest.keys().eq(sorted.iter()), "{}: {:?} / {sorted:?}", folder.display(), guest.keys());
        count += names.len();
        for name in sorted {
            let path = folder.join(&name);
            let (theirs, ours) = (host_facts(&on_host(&path)), guest_facts(fs, &path));
            if unix {
                assert_eq!(ours, theirs, "{}", path.display());
            } else {
                assert_eq!((ours.kind, ours.size), (theirs.kind, theirs.size), "{}", path.display());
            }
            assert!(
                matches!(guest[&name], FileKind::Unknown) || guest[&name] == theirs.kind,
                "{}",
                path.display()
            );
            match theirs.kind {
                FileKind::Directory => todo.push(path),
                FileKind::File => compare_bytes(fs, &path, &std::fs::read(on_host(&path)).unwrap()),
                _ => {}
            }
        }
    }
    count
}

#[track_caller]
fn compare_bytes(fs: &FileSystem, path: &Path, bytes: &[u8]) {
    let read = fs.read(path, 1 << 30).unwrap_or_else(|error| panic!("{error}"));
    if let Some(at) = read.iter().zip(bytes).position(|(ours, theirs)| ours != theirs) {
        panic!("{}: byte {at:#x} of {:#x} differs", path.display(), bytes.len());
    }
    assert_eq!(read.len(), bytes.len(), "{}", path.display());
    // A piece from the middle, not aligned to anything.
    let file = fs.open_file(path).unwrap();
    let from = bytes.len() / 3;
    let mut piece = vec![0; bytes.len() / 2 + 3];
    let len = file.read_at(&mut piece, from as u64).unwrap();
    assert!(
        piece[..len] == bytes[from..bytes.len().min(from + piece.len())],
        "{}: a piece of it",
        path.display()
    );
}
