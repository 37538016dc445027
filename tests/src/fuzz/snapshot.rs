//! Snapshots of good images, and of images that have been tampered with.

use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use block::image::{Image as _, Repair};
use block::{BlockDevice, Storage};
use qcow2::snapshot::Selector;
use qcow2::{Header, Qcow2};

use super::{Bounded, MAX_READ, decode, open, read_all, writable_seeds};

/// The most operations of one input.
const MAX_OPS: usize = 24;

/// Good images with two snapshots each, one with narrow counters with one.
static SEEDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let with_snapshots = |(_, image): (&str, Vec<u8>)| {
        let storage = Arc::new(Bounded::new(image));
        let disk = open(&storage, true).expect("opening a seed");
        for byte in [1, 2] {
            let _ = disk.create_snapshot(b"seed", SystemTime::UNIX_EPOCH);
            disk.write_at(&[byte; 5000], u64::from(byte) * 4096).expect("writing to a seed");
        }
        disk.close().expect("closing a seed");
        drop(disk);
        storage.to_bytes()
    };
    writable_seeds().into_iter().map(with_snapshots).collect()
});

/// Lists and reads snapshots, creates, applies and deletes some.
///
/// Byte 0 picks the seed, byte 1 says how many of the following triples tamper with it (in the header, the snapshot
/// table, an L1 table, the refcounts, or anywhere). Every further 8 bytes are an operation. Whatever happens, an image
/// that a check finds no corruption in has none afterwards.
pub fn qcow2_snapshot(bytes: &[u8]) {
    let [pick, tampering, rest @ ..] = bytes else { return };
    let mut image = SEEDS[usize::from(*pick) % SEEDS.len()].clone();
    let Some((places, ops)) = rest.split_at_checked(3 * usize::from(tampering % 8)) else { return };
    for place in places.chunks_exact(3) {
        let at = place_of(&image, place[0], place[1]);
        image[at] ^= place[2];
    }
    let good = corruptions(&image) == Some(0);
    let storage = Arc::new(Bounded::new(image));
    view_all(&storage);
    let Ok(disk) = open(&storage, true) else { return };
    for chunk in ops.chunks_exact(8).take(MAX_OPS) {
        operation(&disk, chunk);
    }
    let closed = disk.close();
    drop(disk);
    view_all(&storage);
    if good && closed.is_ok() {
        assert_eq!(corruptions(&storage.to_bytes()), Some(0), "a good image has been damaged");
    }
}

/// A place in an image, with a liking for tables.
fn place_of(image: &[u8], area: u8, at: u8) -> usize {
    let word = |at: usize| image.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()));
    let table = usize::try_from(word(64)).unwrap_or(0);
    let start = match area % 8 {
        0 => 24,
        1 | 2 => table,
        3 => usize::try_from(word(40)).unwrap_or(0),
        4 => usize::try_from(word(table)).unwrap_or(0),
        5 => usize::try_from(word(usize::try_from(word(48)).unwrap_or(0))).unwrap_or(0),
        _ => usize::from(area) * 256,
    };
    start.saturating_add(usize::from(at)) % image.len()
}

/// What a check counts; `None`: it cannot be checked, or not opened.
fn corruptions(image: &[u8]) -> Option<u64> {
    let storage: Arc<dyn Storage> = Arc::new(Bounded::new(image.to_vec()));
    let header = Header::read(&*storage).ok()?;
    let report = qcow2::check::check(&storage, &header, None, Repair::None).ok()?;
    (report.check_errors == 0).then_some(report.corruptions)
}

/// Every snapshot as far as it can be read.
fn view_all(storage: &Arc<Bounded>) {
    let Ok(disk) = open(storage, false) else { return };
    let _ = disk.info();
    for snapshot in disk.snapshots().into_iter().take(8) {
        let Ok(header) = Header::read(&**storage) else { return };
        let options = qcow2::OpenOptions {
            snapshot: Some(Selector::Both { id: Some(snapshot.id), name: Some(snapshot.name) }),
            ..qcow2::OpenOptions::default()
        };
        let view = Qcow2::open(Arc::clone(storage) as Arc<dyn Storage>, header, options);
        if let Ok(view) = view {
            let _ = read_all(&*view, view.size().min(MAX_READ / 4));
        }
    }
}

fn operation(disk: &Qcow2, chunk: &[u8]) {
    let snapshots = disk.snapshots();
    let chosen = snapshots.get(usize::from(chunk[1]) % snapshots.len().max(1));
    let selector = chosen.map(|s| Selector::Both { id: Some(s.id.clone()), name: None });
    match (chunk[0] % 8, selector) {
        (0 | 1, _) => drop(disk.create_snapshot(&chunk[1..5], SystemTime::UNIX_EPOCH)),
        (2, Some(selector)) => drop(disk.apply_snapshot(&selector)),
        (3, Some(selector)) => drop(disk.delete_snapshot(&selector)),
        _ => {
            let size = disk.size().min(MAX_READ);
            if size > 0 {
                drop(decode(chunk, size).device(disk));
            }
        }
    }
}
