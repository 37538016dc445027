//! Requests that were let through before a resize, and come to hold their clusters after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::image::Repair;
use block::mem::MemStorage;
use block::{BlockDevice as _, CompressedWriter as _, ErrorKind, Preallocation, Storage, ZeroMode};

use crate::create::{CreateOptions, create};
use crate::l2::Entry;
use crate::{Header, OpenOptions, Qcow2};

const SIZE: u64 = 1 << 20;
/// Where the disk ends once it has become smaller.
const SHORT: u64 = 64 << 10;
/// A cluster past that.
const AT: u64 = 512 << 10;

fn image(change: impl FnOnce(&mut CreateOptions), data_file: bool) -> (Arc<dyn Storage>, Arc<Qcow2>) {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    let mut options = CreateOptions { cluster_bits: 12, ..CreateOptions::new(SIZE) };
    change(&mut options);
    create(&*storage, &options).unwrap();
    let data_file = data_file.then(|| {
        let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
        file.set_len(SIZE).unwrap();
        file
    });
    let open = OpenOptions { writable: true, data_file, ..OpenOptions::default() };
    let image = Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), open).unwrap();
    (storage, image)
}

/// Lets `request` pass all that it looks at before it holds its clusters; when it gets them the disk is shorter.
fn overtake(image: &Qcow2, request: impl FnOnce() -> block::Result<()> + Send) -> block::Result<()> {
    std::thread::scope(|scope| {
        let held = image.stripes.all();
        let request = scope.spawn(request);
        std::thread::sleep(Duration::from_millis(100));
        image.size.store(SHORT, Ordering::Release);
        drop(held);
        request.join().unwrap()
    })
}

/// Only plain writes looked at the size again: what the others mapped past the end stayed there.
#[test]
fn nothing_is_mapped_past_the_end() {
    type Request = fn(&Qcow2) -> block::Result<()>;
    let requests: [(&str, Request); 7] = [
        ("write", |i| i.write_at(&[1; 4096], AT)),
        ("compressed", |i| i.write_compressed(&[i.compress(&[1; 4096])?], AT)),
        ("zeroes", |i| i.write_zeroes_at(AT, 8192, ZeroMode::UNMAP)),
        ("own zeroes", |i| i.write_own_zeroes(AT, 8192)),
        ("discard", |i| i.discard_at(AT, 8192)),
        ("reserve", |i| i.reserve(AT, 8192)),
        ("preallocate", |i| i.preallocate(AT, 8192, Preallocation::Metadata)),
    ];
    for (name, request) in requests {
        let (_, image) = image(|_| {}, false);
        // A table, and something to let go of.
        image.write_at(&[7; 4096], AT + 4096).unwrap();
        let before = image.entry_at(AT + 4096).unwrap();
        let error = overtake(&image, || request(&image)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{name}");
        assert_eq!(image.entry_at(AT).unwrap(), Entry::UNALLOCATED, "{name}");
        assert_eq!(image.entry_at(AT + 4096).unwrap(), before, "{name}");
    }
}

/// A raw data file became longer again.
#[test]
fn nothing_is_written_past_the_end_of_a_data_file() {
    let raw = |options: &mut CreateOptions| {
        options.data_file = Some(b"data".to_vec());
        options.data_file_raw = true;
    };
    for unmap in [ZeroMode::UNMAP, ZeroMode::ALLOCATE] {
        let (_, image) = image(raw, true);
        image.write_at(&[7; 4096], AT).unwrap();
        let zeroed = overtake(&image, || {
            image.data.set_len(SHORT).unwrap();
            image.write_zeroes_at(AT, 4096, unmap)
        });
        assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(image.data.len().unwrap(), SHORT);
    }
}

/// All of it at once, with real resizes: the image stays free of contradictions and leaks.
#[test]
fn shrinking_beside_every_kind_of_request() {
    let (storage, image) = image(|options| options.cluster_bits = 9, false);
    let packed = image.compress(&[1; 512]).unwrap();
    let packed = [packed];
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (image, done, packed) = (&image, &done, &packed);
            scope.spawn(move || {
                for round in 0..u64::MAX {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let at = (round * 7919 + thread * 104_729) % (SIZE - 40_000) / 512 * 512;
                    let result = match round % 7 {
                        0 => image.write_compressed(packed, at),
                        1 => image.write_zeroes_at(at, 40_000, ZeroMode::UNMAP),
                        2 => image.discard_at(at, 40_000),
                        3 => image.reserve(at, 9000),
                        4 => image.preallocate(at, 9000, Preallocation::Metadata),
                        5 => image.layer_extent(at, 40_000).map(drop),
                        _ => image.write_at(&[7; 700], at),
                    };
                    if let Err(error) = result {
                        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
                    }
                }
            });
        }
        for round in 0..60u64 {
            image.resize(if round % 2 == 0 { SHORT } else { SIZE }, Preallocation::Off).unwrap();
        }
        image.resize(SHORT, Preallocation::Off).unwrap();
        done.store(true, Ordering::Relaxed);
    });
    let mapped = image.l1.read().iter().rposition(|entry| *entry != 0).unwrap_or(0) as u64;
    assert!(mapped < image.geometry.l1_entries_for(SHORT), "{mapped}");
    image.close().unwrap();
    let report = crate::check::check(&storage, &image.header(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{report:?}");
}
