//! File systems that are changed: opened, a little of everything is done to them, and they are read again. Nothing may
//! panic, run on, or take more memory than the input justifies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::mem::MemStorage;
use block::overlay::Overlay;
use guestdisk::fs::FileKind;
use guestedit::{Attributes, GuestFs, Options};

/// The most names that are looked at.
const MOST_NAMES: usize = 40;
/// The most bytes that are read of a file.
const MOST_BYTES: u64 = 1 << 20;

/// A file system of any kind, as [`pack_disk`](super::pack_disk) makes it.
pub fn file_system_edit(bytes: &[u8]) {
    let store = Arc::new(MemStorage::new());
    let Ok(overlay) = Overlay::new(super::guest::device(bytes), store, 4096) else { return };
    let device = Arc::new(overlay);
    let options = Options { time: Some(1_700_000_000) };
    let Ok(mut fs) = guestedit::open(Arc::clone(&device) as _, &options) else { return };
    let names = names(&mut *fs);
    for (index, path) in names.iter().enumerate() {
        change(&mut *fs, path, index);
    }
    let _ = (fs.free(), fs.sync());
    drop(fs);
    if let Ok(mut fs) = guestedit::open(device, &options) {
        for path in &names {
            let _ = (fs.stat(path), fs.read(path, MOST_BYTES), fs.remove(path));
        }
        let _ = fs.sync();
    }
}

fn names(fs: &mut dyn GuestFs) -> Vec<PathBuf> {
    let (mut todo, mut names) = (vec![PathBuf::from("/")], vec![]);
    while let Some(folder) = todo.pop() {
        let Ok(entries) = fs.list(&folder) else { continue };
        for entry in entries.into_iter().take(12) {
            if names.len() >= MOST_NAMES {
                return names;
            }
            let path = folder.join(entry.name);
            let is_directory = matches!(fs.stat(&path), Ok(Some(stat)) if stat.kind == FileKind::Directory);
            if is_directory && folder.components().count() < 6 {
                todo.push(path.clone());
            }
            names.push(path);
        }
    }
    names
}

fn change(fs: &mut dyn GuestFs, path: &Path, index: usize) {
    let like = Attributes {
        xattrs: vec![(b"security.selinux".to_vec(), vec![b'l'; 40])],
        ..Attributes::mode(0o644)
    };
    let sizes = [0, 40, 3000, 20_000, 200_000];
    let bytes = vec![b'x'; sizes[index % sizes.len()]];
    let _ = (fs.read(path, MOST_BYTES), fs.read_link(path), fs.xattr(path, "security.selinux"));
    let _ = fs.replace(path, &bytes);
    let _ = fs.create(&path.join("new file with a long name"), &bytes, &like);
    let _ = fs.mkdir(&path.join("new directory"), &like);
    let _ = fs.create(&path.with_file_name(format!("another file {index}")), &bytes, &like);
    let _ = fs.symlink(
        &path.with_file_name(format!("link {index}")),
        Path::new(&"t".repeat(20 + 10 * index)),
        &like,
    );
    if index.is_multiple_of(3) {
        let _ = fs.remove(path);
    }
    if index.is_multiple_of(7) {
        let _ = fs.sync();
    }
}
