//! Streams and the sparse extents of ESX hosts: what comes through a pipe or lies in a file, walked and read.

use std::io::Cursor;
use std::sync::Arc;

use block::image::{Image as _, Repair};
use block::{BlockDevice, Storage};
use vmdk::stream::Sequential;
use vmdk::{Layout, OpenOptions, Vmdk};

use super::Bounded;

/// The most bytes that are read of one disk.
const MAX_READ: u64 = 1 << 20;

/// Walks the extents of a disk and reads their first and last bytes. Nothing but an error may come of it.
fn walk(disk: &dyn BlockDevice) {
    let mut buf = vec![0; 4096];
    let (mut at, mut done) = (0, 0);
    while at < disk.size() && done < MAX_READ {
        let Ok(found) = disk.layer_extent(at, disk.size() - at) else { return };
        assert!(found.len > 0 && found.len <= disk.size() - at, "an extent outside the disk: {found:?}");
        let len = found.len.min(buf.len() as u64);
        let part = &mut buf[..usize::try_from(len).unwrap()];
        let _ = disk.read_at(part, at);
        let _ = disk.read_at(part, at + found.len - len);
        (at, done) = (at + found.len, done + 4096);
    }
}

/// Reads `bytes` as a stream from a pipe.
pub fn vmdk_sequential(bytes: &[u8]) {
    if let Ok(disk) = Sequential::open(Box::new(Cursor::new(bytes.to_vec()))) {
        walk(&disk);
    }
}

/// Takes `bytes` for an extent of the kind that the first of them selects, behind a descriptor of ours.
pub fn vmdk_extent(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let word = ["SPARSE", "VMFSSPARSE", "SESPARSE"][usize::from(kind % 3)];
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 70000 {word} \
         \"x\"\n"
    );
    let descriptor: Arc<dyn Storage> = Arc::new(Bounded::new(text.into_bytes()));
    let plain = Arc::new(Bounded::new(bytes.to_vec()));
    let extent: Arc<dyn Storage> = Arc::clone(&plain) as Arc<dyn Storage>;
    let layout = Layout::read(&descriptor).unwrap();
    let options = OpenOptions { files: vec![extent], ..OpenOptions::default() };
    if let Ok(disk) = Vmdk::open(descriptor, layout, options) {
        let _ = disk.info();
        walk(&*disk);
        let _ = disk.check(Repair::None);
    }
    assert!(plain.to_bytes() == bytes, "reading has changed the extent");
}
