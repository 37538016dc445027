//! What one thread does while another is half-way through something else, at exactly the wrong moment.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashStorage, Fault, FaultStorage, Operation};
use block::{BlockDevice, ErrorKind, Preallocation, Result, Storage, ZeroMode};
use nix::errno::Errno;
use parking_lot::Mutex;
use qcow2::check::check;
use qcow2::create::{CreateOptions, create};
use qcow2::snapshot::Selector;
use qcow2::{Header, OpenOptions, Qcow2};

type Hook = Box<dyn FnOnce() + Send>;

/// A container that does something else first when its length is asked for or changed.
#[derive(Default)]
struct Hooked {
    inner: MemStorage,
    at_len: Mutex<Option<Hook>>,
    at_set_len: Mutex<Option<Hook>>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Storage for Hooked {
    fn len(&self) -> Result<u64> {
        let hook = self.at_len.lock().take();
        hook.into_iter().for_each(|hook| hook());
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let hook = self.at_set_len.lock().take();
        hook.into_iter().for_each(|hook| hook());
        self.inner.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.inner.zero_range(offset, len, mode)
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.discard_range(offset, len)
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.allocate_range(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<block::HostExtent> {
        self.inner.extent(offset, max_len)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

fn open(storage: &Arc<dyn Storage>, writable: bool, snapshot: Option<&[u8]>) -> Result<Arc<Qcow2>> {
    let snapshot = snapshot.map(|id| Selector::IdOrName(id.to_vec()));
    let options = OpenOptions { writable, snapshot, ..OpenOptions::default() };
    Qcow2::open(Arc::clone(storage), Header::read(&**storage)?, options)
}

fn judge(storage: &Arc<dyn Storage>, leaks: bool) {
    let report = check(storage, &Header::read(&**storage).unwrap(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
    assert!(leaks || report.leaks == 0, "{report:?}");
}

fn small_clusters(size: u64) -> CreateOptions {
    CreateOptions { cluster_bits: 9, ..CreateOptions::new(size) }
}

/// An extent walk looked tables up without holding anything: a table that a resize took away and cut off the file
/// between two looks was reported as corruption.
#[test]
fn extents_are_found_beside_a_resize() {
    let storage = Arc::new(Hooked::default());
    create(&*storage, &small_clusters(1 << 20)).unwrap();
    let disk = open(&(Arc::clone(&storage) as _), true, None).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.flush().unwrap();
    for at in [600 << 10, 900 << 10] {
        disk.write_at(&[2; 512], at).unwrap();
    }
    disk.flush().unwrap();
    // Cutting the file once lets the image forget how long it is.
    disk.resize(800 << 10, Preallocation::Off).unwrap();
    let (done, finished) = mpsc::channel();
    let shrinker = Arc::clone(&disk);
    *storage.at_len.lock() = Some(Box::new(move || {
        std::thread::spawn(move || {
            shrinker.resize(64 << 10, Preallocation::Off).unwrap();
            done.send(()).unwrap();
        });
        // It may have to wait until the extent has been found.
        let _ = finished.recv_timeout(Duration::from_millis(300));
    }));
    let extent = disk.layer_extent(600 << 10, 512).unwrap();
    assert_eq!(extent.len, 512);
    assert!(storage.at_len.lock().is_none(), "nothing happened beside it");
}

/// The same with everything that changes tables as a whole, by chance.
#[test]
fn extents_are_found_beside_snapshots() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*storage, &small_clusters(256 << 10)).unwrap();
    let disk = open(&storage, true, None).unwrap();
    let done = AtomicBool::new(false);
    let first = |text: &[u8]| Selector::IdOrName(text.to_vec());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let mut at = 0;
                    while at < 64 << 10 {
                        at += disk.layer_extent(at, (256 << 10) - at).map_or_else(
                            |error| {
                                assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
                                512
                            },
                            |extent| extent.len,
                        );
                    }
                }
            });
        }
        for round in 0..40u8 {
            disk.write_at(&vec![round; 100 << 10], 0).unwrap();
            disk.create_snapshot(b"a", SystemTime::UNIX_EPOCH).unwrap();
            disk.write_at(&vec![round + 1; 80 << 10], 10 << 10).unwrap();
            disk.resize(64 << 10, Preallocation::Off).unwrap();
            disk.flush().unwrap();
            disk.apply_snapshot(&first(b"a")).unwrap();
            disk.delete_snapshot(&first(b"a")).unwrap();
            disk.discard_at(0, 128 << 10).unwrap();
            disk.flush().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    disk.close().unwrap();
    judge(&storage, false);
}

/// Taking a snapshot failed at the very end, with the header written but not known to be durable. The disk went on
/// writing to clusters that were its own as far as it knew, and after a loss of power they were the snapshot's.
#[test]
fn a_snapshot_that_failed_never_shows_what_was_written_later() {
    const OLD: [u8; 2048] = [1; 2048];
    let mut seen = 0;
    for n in 0..40 {
        let memory = MemStorage::new();
        create(&memory, &small_clusters(64 << 10)).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(memory);
        let disk = open(&storage, true, None).unwrap();
        disk.write_at(&OLD, 0).unwrap();
        disk.close().unwrap();
        drop(disk);
        let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
        storage.read_at(&mut bytes, 0).unwrap();
        let crash = Arc::new(CrashStorage::new(bytes));
        let fault = Arc::new(FaultStorage::new(Arc::clone(&crash) as _));
        let disk = open(&(Arc::clone(&fault) as _), true, None).unwrap();
        fault.fail(Fault::nth(n, Errno::EIO).on(&[Operation::Sync]));
        if disk.create_snapshot(b"a", SystemTime::UNIX_EPOCH).is_ok() {
            break;
        }
        fault.fail(Fault::always(Errno::EIO).at(0..512).on(&[Operation::Write]));
        let refused = disk.write_at(&[2; 512], 512);
        fault.heal();
        disk.write_at(&[3; 512], 1024).unwrap();
        for image in crash.images(300, n) {
            let storage: Arc<dyn Storage> = image.storage;
            judge(&storage, true);
            let Ok(snapshot) = open(&storage, false, Some(b"a")) else { continue };
            let mut bytes = vec![0; OLD.len()];
            snapshot.read_at(&mut bytes, 0).unwrap();
            assert!(bytes == OLD, "sync {n}, {}", image.description);
            assert!(refused.is_err(), "sync {n}: written while the header is in doubt");
            seen += 1;
        }
        disk.close().unwrap();
    }
    assert!(seen > 0, "the snapshot never came back");
}

/// A bitmap was added after the resize of the disk had begun, and stored by another thread's close before the new size
/// was. A loss of power after that left a bitmap that was too short, and an image that nothing opens.
#[test]
fn a_bitmap_added_and_stored_while_the_disk_grows_fits_after_a_crash() {
    for enabled in [true, false] {
        let memory = MemStorage::new();
        let options = CreateOptions { data_file: Some(b"data".to_vec()), ..small_clusters(1 << 20) };
        create(&memory, &options).unwrap();
        let crash = Arc::new(CrashStorage::new(memory.to_bytes()));
        let data = Arc::new(Hooked::default());
        data.inner.set_len(1 << 20).unwrap();
        let options =
            OpenOptions { writable: true, data_file: Some(Arc::clone(&data) as _), ..OpenOptions::default() };
        let disk = Qcow2::open(Arc::clone(&crash) as _, Header::read(&*crash).unwrap(), options).unwrap();
        let other = Arc::clone(&disk);
        *data.at_set_len.lock() = Some(Box::new(move || {
            other.add_bitmap(b"b", Some(512), enabled).unwrap();
            other.write_at(&[1; 512], 0).unwrap();
            other.close().unwrap();
        }));
        disk.resize(64 << 20, Preallocation::Off).unwrap();
        assert!(data.at_set_len.lock().is_none());
        disk.close().unwrap();
        let bits = disk.dirty_bitmap(b"b").unwrap();
        assert_eq!((bits.len(), bits.count() > 0), (64 << 20, enabled));
        for image in crash.images(300, 1) {
            let metadata_only = OpenOptions { metadata_only: true, ..OpenOptions::default() };
            let header = Header::read(&*image.storage).unwrap();
            let size = header.size;
            let disk = Qcow2::open(image.storage, header, metadata_only);
            let disk = disk.unwrap_or_else(|error| panic!("{}: {error}", image.description));
            for bitmap in disk.bitmaps().iter().filter(|bitmap| !bitmap.in_use()) {
                let bits = u64::from(bitmap.table_size) * 512 * 8;
                assert!(bits * 512 >= size, "{}", image.description);
            }
        }
    }
}
