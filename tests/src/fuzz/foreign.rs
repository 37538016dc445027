//! Bodies of the fuzz targets for the formats that are only read, and for archives.

use std::sync::Arc;

use block::image::Image as _;
use block::{BlockDevice, Storage};

use super::Bounded;

/// The most guest bytes that are read at once.
const MOST: u64 = 64 << 10;

/// Opens the bytes as every format that recognises them, describes, checks, walks and reads.
pub fn foreign_open_read(bytes: &[u8]) {
    let plain = Arc::new(Bounded::new(bytes.to_vec()));
    let storage: Arc<dyn Storage> = Arc::clone(&plain) as Arc<dyn Storage>;
    let mut first = [0; 2048];
    storage.read_at(&mut first, 0).expect("memory can be read");
    for format in foreign::Format::ALL {
        if !format.probe(&first, &*storage).expect("memory can be read") {
            continue;
        }
        let Ok(opened) = format.read(Arc::clone(&storage)) else { continue };
        let _ = opened.check();
        let Ok(disk) = opened.open(None, None) else { continue };
        let _ = disk.info();
        read_here_and_there(&*disk);
    }
    assert!(plain.to_bytes() == bytes, "reading has changed the image");
}

fn read_here_and_there(disk: &dyn BlockDevice) {
    let mut buf = vec![0; 64 << 10];
    for extent in block::extent::extents(disk, 0, u64::MAX).take(100) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.end() <= disk.size(), "an extent outside the disk: {extent:?}");
        let len = extent.len.min(MOST);
        let part = &mut buf[..usize::try_from(len).unwrap()];
        let _ = disk.read_at(part, extent.offset);
        let _ = disk.read_at(part, extent.end() - len);
    }
    for step in 0..8 {
        let offset = disk.size() / 8 * step;
        let len = (disk.size() - offset).min(MOST);
        let _ = disk.read_at(&mut buf[..usize::try_from(len).unwrap()], offset);
    }
}

/// Looks for the member `d` in the bytes, and reads it.
pub fn archive_open(bytes: &[u8]) {
    for inflate in [false, true] {
        let storage = Arc::new(Bounded::new(bytes.to_vec()));
        let Ok(found) = foreign::archive::open(storage, "d", inflate) else { continue };
        let mut buf = vec![0; 64 << 10];
        for offset in [0, 1 << 20, 100, 70_000] {
            let _ = found.storage.read_at(&mut buf, offset);
        }
        let _ = found.storage.len();
    }
}
