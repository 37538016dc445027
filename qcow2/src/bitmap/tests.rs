//! Directories of the real qemu-img, and what it refuses.

use std::path::Path;
use std::process::{Command, Output};

use block::ErrorKind;
use block::mem::MemStorage;
use proptest::prelude::*;

use super::*;

fn qemu_img(dir: &Path, arguments: &[&str]) -> Option<Output> {
    let output = Command::new("qemu-img").current_dir(dir).args(arguments).output();
    if output.is_err() {
        eprintln!("SKIPPED: no qemu-img to compare with");
    }
    output.ok()
}

/// An image of qemu-img's with two bitmaps.
fn image(dir: &Path) -> Option<Vec<u8>> {
    let steps: [&[&str]; 4] = [
        &["create", "-q", "-f", "qcow2", "i.qcow2", "64M"],
        &["bitmap", "--add", "i.qcow2", "b0"],
        &["bitmap", "--add", "-g", "4096", "i.qcow2", "bitmap-one"],
        &["bitmap", "--disable", "i.qcow2", "b0"],
    ];
    for step in steps {
        let output = qemu_img(dir, step)?;
        assert!(output.status.success(), "{step:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Some(std::fs::read(dir.join("i.qcow2")).unwrap())
}

fn read(bytes: &[u8]) -> block::Result<Vec<Bitmap>> {
    let storage = MemStorage::from_bytes(bytes.to_vec());
    read_directory(&storage, &Header::read(&storage)?)
}

#[test]
fn bitmaps_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let Some(bytes) = image(dir.path()) else { return };
    let shown: Vec<_> = read(&bytes)
        .unwrap()
        .iter()
        .map(|b| (b.display_name(), b.granularity(), b.auto(), b.in_use()))
        .collect();
    assert_eq!(
        shown,
        [("b0".to_owned(), 65_536, false, false), ("bitmap-one".to_owned(), 4096, true, false)]
    );
}

#[test]
fn what_qemu_refuses_is_refused_in_its_words() {
    let dir = tempfile::tempdir().unwrap();
    let Some(sound) = image(dir.path()) else { return };
    let header = Header::read(&MemStorage::from_bytes(sound.clone())).unwrap();
    let extension = header.bitmaps.unwrap();
    let directory = to_usize(extension.directory_offset);
    let count = sound.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap() + 8;
    let size = |size: u64| (count + 8, size.to_be_bytes().to_vec());
    let cases = [
        (count, vec![0, 0, 0, 1]),
        (count, vec![0, 0, 0, 3]),
        size(extension.directory_size - 8),
        size(extension.directory_size - 1),
        size(extension.directory_size + 24),
        size(20),
        size(0),
        (directory, vec![0; 8]),
        (directory + 7, vec![1]),
        (directory + 8, vec![0; 4]),
        (directory + 8, vec![0x08, 0, 0, 1]),
        (directory + 8, vec![0, 0, 0x20, 1]),
        (directory + 15, vec![4]),
        (directory + 16, vec![2]),
        (directory + 17, vec![8]),
        (directory + 17, vec![32]),
        (directory + 18, vec![4, 0]),
        (directory + 20, vec![0, 0, 0, 8]),
        (directory + 20, vec![0x80, 0, 0, 0]),
    ];
    for (at, data) in cases {
        let mut bytes = sound.clone();
        // The directory is the last thing in the file; QEMU reads zeros behind it.
        bytes.resize(directory + 0x10000, 0);
        bytes[at..at + data.len()].copy_from_slice(&data);
        let ours = read(&bytes).unwrap_err();
        std::fs::write(dir.path().join("i.qcow2"), bytes).unwrap();
        let output = qemu_img(dir.path(), &["info", "i.qcow2"]).unwrap();
        let theirs = String::from_utf8_lossy(&output.stderr);
        assert_eq!(format!("qemu-img: Could not open 'i.qcow2': {ours}\n"), theirs, "{at:#x} {data:x?}");
    }
}

#[test]
fn a_directory_past_the_end_is_a_truncated_file() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut bytes) = image(dir.path()) else { return };
    bytes.truncate(bytes.len() - 1);
    assert_eq!(read(&bytes).unwrap_err().kind(), ErrorKind::Truncated);
}

/// A hostile image: many bitmaps whose tables lie in each other, each entry naming a cluster. What is looked at is
/// bounded by the file, not by what it claims.
#[test]
fn tables_that_lie_in_each_other_are_read_once() {
    let geometry = Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false };
    let len = 4u64 << 20;
    let storage = MemStorage::from_bytes(512u64.to_be_bytes().repeat(to_usize(len / 8)));
    let entry = |index: u64| Bitmap {
        table_offset: index % 64 * 512,
        table_size: 0x80000,
        flags: 0,
        granularity_bits: 9,
        name: index.to_be_bytes().to_vec(),
    };
    let bitmaps: Vec<Bitmap> = (0..65_535).map(entry).collect();
    let started = std::time::Instant::now();
    let found = structures(&storage, &geometry, &bitmaps).unwrap();
    assert!(found.len() as u64 <= 65_535 + len / 512 + 1, "{} ranges", found.len());
    assert!(started.elapsed().as_secs() < 10);
    let map = crate::metadata::MetadataMap::new(&geometry, found.into_iter());
    assert!(map.conflict().is_some());
}

proptest! {
    #[test]
    fn no_directory_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 1u32..4) {
        let mut header = crate::create::CreateOptions::new(1 << 20).header().unwrap();
        let directory_size = bytes.len() as u64;
        header.bitmaps = Some(BitmapsExtension { count, directory_size, directory_offset: 0 });
        let _ = read_directory(&MemStorage::from_bytes(bytes), &header);
    }
}
