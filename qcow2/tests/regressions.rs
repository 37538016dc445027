#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]
//! Bugs that were there once, each with its harm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use block::image::{Image as _, Repair};
use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::{Fault, FaultStorage, Operation};
use block::{BlockDevice, ErrorKind, Preallocation, Storage, ZeroMode};
use nix::errno::Errno;
use qcow2::check::check;
use qcow2::create::{CreateOptions, create};
use qcow2::features::incompatible;
use qcow2::snapshot::Selector;
use qcow2::{Header, OpenOptions, Qcow2};

/// An image of small clusters, so that its tables are soon too short, over storage that can fail.
fn image(options: &CreateOptions) -> (Arc<FaultStorage>, Arc<Qcow2>) {
    let storage = Arc::new(FaultStorage::new(Arc::new(MemStorage::new())));
    create(&*storage, options).unwrap();
    let image = open(&(Arc::clone(&storage) as _));
    (storage, image)
}

fn small_clusters(size: u64) -> CreateOptions {
    CreateOptions { cluster_bits: 9, ..CreateOptions::new(size) }
}

fn open(storage: &Arc<dyn Storage>) -> Arc<Qcow2> {
    let options = OpenOptions {
        writable: true,
        l2_cache_bytes: Some(0),
        refcount_cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    Qcow2::open(Arc::clone(storage), Header::read(&**storage).unwrap(), options).unwrap()
}

/// Reads all of a disk.
fn contents(image: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What is on disk contradicts itself nowhere, and shows the same bytes. Leaks are allowed or not.
fn judge(storage: &Arc<FaultStorage>, expected: &[u8], leaks: bool, story: &str) {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    let report = check(&storage, &Header::read(&*storage).unwrap(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{story}");
    assert!(leaks || report.leaks == 0, "{story}: {} leaks", report.leaks);
    assert!(contents(&open(&storage)) == expected, "{story}: other bytes");
}

/// The refcount table was made longer in memory before its longer copy was on disk, and stayed so if that
/// failed: the next flush wrote entries past the end of the old table, into whatever lay there. And when it was
/// the header's sync that failed, the table that the disk might name was not the one that was kept up to date.
#[test]
fn a_refcount_table_that_cannot_move_stays_where_it_is() {
    // 64-bit counters: a block counts 64 clusters, a table of one cluster 64 blocks, 2 MiB in all.
    let options = CreateOptions { refcount_order: 6, ..small_clusters(4 << 20) };
    let almost = 1_900_000;
    for n in 0.. {
        let (storage, image) = image(&options);
        image.write_at(&vec![1; almost], 0).unwrap();
        image.flush().unwrap();
        let table = image.header().refcount_table_clusters;
        let mut model = vec![0; 4 << 20];
        model[..almost].fill(1);
        storage.fail(Fault::nth(n, Errno::EIO).on_changes());
        let mut failed = false;
        for at in (almost..2_300_000).step_by(50_000) {
            failed |= image.write_at(&[2; 50_000], at as u64).is_err();
        }
        failed |= image.flush().is_err();
        storage.heal();
        for at in (almost..2_300_000).step_by(50_000) {
            image.write_at(&[3; 50_000], at as u64).unwrap();
            model[at..at + 50_000].fill(3);
        }
        image.flush().unwrap();
        judge(&storage, &model, true, &format!("call {n}, before close"));
        image.close().unwrap();
        assert!(image.header().refcount_table_clusters > table);
        judge(&storage, &model, true, &format!("call {n}"));
        if !failed {
            break;
        }
    }
}

/// The L1 table was made longer in memory before the header named its longer copy. When that failed, the next
/// attempt found the table long enough and changed the size only: an image that nobody could open.
#[test]
fn a_resize_that_failed_can_be_tried_again() {
    for n in 0.. {
        let (storage, image) = image(&small_clusters(1 << 20));
        image.write_at(&[1; 100_000], 0).unwrap();
        image.flush().unwrap();
        let mut model = vec![0; 1 << 20];
        model[..100_000].fill(1);
        storage.fail(Fault::nth(n, Errno::EIO).on_changes());
        let failed = image.resize(8 << 20, Preallocation::Off).is_err();
        storage.heal();
        image.write_at(&[2; 70_000], 300_000).unwrap();
        model[300_000..370_000].fill(2);
        image.flush().unwrap();
        model.resize(usize::try_from(image.size()).unwrap(), 0);
        judge(&storage, &model, true, &format!("call {n}, after the failure"));
        image.resize(8 << 20, Preallocation::Off).unwrap();
        image.write_at(&[3; 70_000], 7 << 20).unwrap();
        image.close().unwrap();
        model.resize(8 << 20, 0);
        model[7 << 20..(7 << 20) + 70_000].fill(3);
        judge(&storage, &model, true, &format!("call {n}"));
        if !failed {
            break;
        }
    }
}

/// A failed discard made the flush forget clusters that nothing referred to any more: leaks for ever.
#[test]
fn a_discard_that_fails_leaks_nothing() {
    let (storage, image) = image(&small_clusters(1 << 20));
    image.write_at(&[1; 100_000], 0).unwrap();
    image.flush().unwrap();
    storage.fail(Fault::nth(0, Errno::EIO).on(&[Operation::Discard]));
    image.write_zeroes_at(0, 100_000, ZeroMode::UNMAP).unwrap();
    let _ = image.flush();
    storage.heal();
    image.close().unwrap();
    judge(&storage, &vec![0; 1 << 20], false, "discard");
}

/// The dirty bit was thought to be set although a failed close had cleared it on disk: what was written then
/// left refcounts out of date in an image that called itself clean.
#[test]
fn a_close_that_failed_does_not_leave_a_false_dirty_bit() {
    let options = CreateOptions { lazy_refcounts: true, ..small_clusters(1 << 20) };
    for n in 0.. {
        let (storage, image) = image(&options);
        image.write_at(&[1; 5000], 0).unwrap();
        storage.fail(Fault::nth(n, Errno::EIO).on(&[Operation::Sync]));
        let failed = image.close().is_err();
        storage.heal();
        image.write_at(&[2; 5000], 50_000).unwrap();
        image.flush().unwrap();
        assert!(Header::read(&*storage).unwrap().has(incompatible::DIRTY), "sync {n}");
        image.close().unwrap();
        assert!(!Header::read(&*storage).unwrap().has(incompatible::DIRTY), "sync {n}");
        if !failed {
            break;
        }
    }
}

/// A snapshot is deleted by marking clusters as the active table's own, L2 entries first and then L1 entries. A
/// crash in between leaves a cluster that may be written in a table that may not. Filling further subclusters of
/// such a cluster changed that table, and the copy made of it for the next write was made from the file, without
/// the change: lost bytes.
#[test]
fn subclusters_are_not_linked_in_a_table_that_is_about_to_be_copied() {
    let options = CreateOptions { cluster_bits: 14, extended_l2: true, ..CreateOptions::new(1 << 20) };
    let (storage, first) = image(&options);
    first.write_at(&[1; 512], 0).unwrap();
    first.close().unwrap();
    let l1 = first.header().l1_table_offset;
    drop(first);
    let mut entry = [0; 8];
    storage.read_at(&mut entry, l1).unwrap();
    entry[0] &= 0x7f;
    storage.write_at(&entry, l1).unwrap();

    let image = open(&(Arc::clone(&storage) as _));
    image.write_at(&[2; 512], 4096).unwrap();
    image.write_at(&[3; 512], 100_000).unwrap();
    image.close().unwrap();
    let mut model = vec![0; 1 << 20];
    model[..512].fill(1);
    model[4096..4608].fill(2);
    model[100_000..100_512].fill(3);
    judge(&storage, &model, false, "subclusters");
}

/// A request that was on its way when the disk became smaller subtracted its offset from the new size: a panic.
/// Such a request may fail or do nothing.
#[test]
fn requests_may_be_overtaken_by_a_resize() {
    let (storage, image) = image(&small_clusters(1 << 20));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..3000u64 {
                    let at = (round * 7919 + thread * 104_729) % ((1 << 20) - 40_000);
                    let done = match round % 5 {
                        0 => image.write_zeroes_at(at, 40_000, ZeroMode::UNMAP),
                        1 => image.write_zeroes_at(at, 700, ZeroMode::ALLOCATE),
                        2 => image.discard_at(at, 40_000),
                        3 => image.layer_extent(at, 40_000).map(|_| ()),
                        _ => image.write_at(&[7; 700], at),
                    };
                    if let Err(error) = done {
                        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
                    }
                }
            });
        }
        for round in 0..150u64 {
            image.resize(if round % 2 == 0 { 200_192 } else { 1 << 20 }, Preallocation::Off).unwrap();
        }
    });
    image.close().unwrap();
    let storage: Arc<dyn Storage> = storage;
    let report = check(&storage, &Header::read(&*storage).unwrap(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
}

/// Two entries that each claim to have the only reference to one cluster: when the first lets go of it, it is free;
/// a table put there was then overwritten with guest data through the second.
#[test]
fn a_cluster_that_two_entries_claim_never_lets_data_onto_a_table() {
    let options = small_clusters(1 << 20);
    let (storage, first) = image(&options);
    first.write_at(&[1; 1024], 0).unwrap();
    first.close().unwrap();
    drop(first);
    // L2 entry 1 names the cluster of entry 0.
    let header = Header::read(&*storage).unwrap();
    let mut entry = [0; 8];
    storage.read_at(&mut entry, header.l1_table_offset).unwrap();
    let table = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    storage.read_at(&mut entry, table).unwrap();
    storage.write_at(&entry, table + 8).unwrap();
    let shared = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;

    let image = open(&(Arc::clone(&storage) as _));
    image.discard_at(0, 512).unwrap();
    image.flush().unwrap();
    // Every L2 table covers 32 KiB: the first new one takes the first free cluster.
    image.write_at(&[2; 512], 40 << 10).unwrap();
    image.flush().unwrap();
    storage.read_at(&mut entry, header.l1_table_offset + 8).unwrap();
    let new_table = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    assert_eq!(new_table, shared, "the test wants the new table where the shared cluster was");
    let error = image.write_at(&[3; 512], 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let mut back = [0; 512];
    image.read_at(&mut back, 40 << 10).unwrap();
    assert_eq!(back, [2; 512]);
}

/// A header that could not be written is written again, as it was, before anything else is.
#[test]
fn a_header_change_that_fails_leaves_the_old_header() {
    let options = CreateOptions { refcount_order: 4, ..small_clusters(1 << 20) };
    for n in 0.. {
        let (storage, image) = image(&options);
        image.write_at(&[7; 4096], 8192).unwrap();
        image.flush().unwrap();
        let expected = contents(&image);
        let name = |name: &str| {
            let name = name.as_bytes().to_vec();
            move |header: &mut Header| {
                header.backing_file = Some(name);
                Ok(())
            }
        };
        storage.fail(Fault::nth(n, Errno::EIO).on_changes());
        let changed = image.change_header(name("some.base"));
        storage.heal();
        if changed.is_ok() {
            assert_eq!(n, 2, "one write and one sync can fail");
            return;
        }
        assert_eq!(image.header().backing_file, None);
        image.flush().unwrap();
        let on_disk = Header::read(&*storage).unwrap();
        assert_eq!(on_disk.backing_file, None, "fault {n}");
        judge(&storage, &expected, false, &format!("fault {n}"));
        image.change_header(name("another")).unwrap();
        assert_eq!(Header::read(&*storage).unwrap().backing_file.unwrap(), b"another");
    }
}

/// The longer refcount table found no room where it would have been counted, grew once more for that, and then took
/// the shorter table's place in the header, with entries past its end.
#[test]
fn a_refcount_table_that_grows_twice_at_once_is_the_longer_one() {
    // One cluster of refcount table counts 16384 clusters of 512 bytes, two count 32768. All of the first half is
    // used, and in the second half every other cluster is an L2 table (which nothing has counted).
    const C: u64 = 512;
    let tables = 8192u64;
    let disk = tables * 64 * C;
    let memory = Arc::new(MemStorage::new());
    create(&*memory, &CreateOptions { cluster_bits: 9, ..CreateOptions::new(disk) }).unwrap();
    let header = Header::read(&*memory).unwrap();
    assert_eq!(header.refcount_table_clusters, 1);
    let (table, l1) = (header.refcount_table_offset, header.l1_table_offset);
    let blocks = l1 + tables * 8;
    let entries: Vec<u8> = (0..64).flat_map(|i| (blocks + i * C).to_be_bytes()).collect();
    memory.write_at(&entries, table).unwrap();
    memory.write_at(&[0, 1].repeat(64 * 256), blocks).unwrap();
    let l2 = |i: u64| (16_384 + 2 * i) * C;
    let entries: Vec<u8> = (0..tables).flat_map(|i| (1 << 63 | l2(i)).to_be_bytes()).collect();
    memory.write_at(&entries, l1).unwrap();
    memory.set_len(l2(tables)).unwrap();
    let storage: Arc<dyn Storage> = memory;
    let image = open(&storage);
    image.write_at(&[7; 512], 0).unwrap();
    image.close().unwrap();
    drop(image);
    let header = Header::read(&*storage).unwrap();
    assert!(header.refcount_table_clusters > 2, "{}", header.refcount_table_clusters);
    let report = check(&storage, &header, None, Repair::None).unwrap();
    let others: Vec<_> =
        report.messages.iter().filter(|line| !line.contains("refcount=0 reference=1")).collect();
    assert!(
        others.iter().all(|line| line.contains("OFLAG_COPIED L2") || line.contains("Leaked")),
        "{others:?}"
    );
    assert!(report.corruptions <= 2 * tables, "{report:?}");
    let mut buf = [0; 512];
    open(&storage).read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [7; 512]);
}

/// A file that tells which of its bytes would survive a loss of power.
#[derive(Debug)]
struct Lossy {
    live: MemStorage,
    durable: parking_lot::Mutex<Vec<u8>>,
}

impl Lossy {
    fn new(bytes: Vec<u8>) -> Self {
        Self { live: MemStorage::from_bytes(bytes.clone()), durable: parking_lot::Mutex::new(bytes) }
    }
}

/// One of two files; whenever this one changes or is synced, `moment` is told.
struct Watched {
    file: Arc<Lossy>,
    moment: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

impl Storage for Watched {
    fn len(&self) -> block::Result<u64> {
        self.file.live.len()
    }
    fn set_len(&self, len: u64) -> block::Result<()> {
        self.file.live.set_len(len)?;
        (self.moment)();
        Ok(())
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> block::Result<()> {
        self.file.live.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> block::Result<()> {
        self.file.live.write_at(buf, offset)?;
        (self.moment)();
        Ok(())
    }
    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> block::Result<()> {
        self.file.live.zero_range(offset, len, mode)?;
        (self.moment)();
        Ok(())
    }
    fn discard_range(&self, _: u64, _: u64) -> block::Result<()> {
        Ok(())
    }
    fn allocate_range(&self, offset: u64, len: u64) -> block::Result<()> {
        self.file.live.allocate_range(offset, len)
    }
    fn sync(&self) -> block::Result<()> {
        *self.file.durable.lock() = self.file.live.to_bytes();
        (self.moment)();
        Ok(())
    }
    fn extent(&self, offset: u64, max_len: u64) -> block::Result<block::HostExtent> {
        self.file.live.extent(offset, max_len)
    }
    fn read_only(&self) -> bool {
        false
    }
    fn name(&self) -> String {
        "watched".to_owned()
    }
}

/// What an external data file holds has to be durable before the tables say that it counts, and when a flush
/// returns. The file holds garbage where nothing has been written: it must never show.
#[test]
fn data_of_an_external_file_is_durable_before_it_counts() {
    let size = 64 * 4096;
    let options =
        CreateOptions { data_file: Some(b"data".to_vec()), cluster_bits: 12, ..CreateOptions::new(size) };
    let memory = MemStorage::new();
    create(&memory, &options).unwrap();
    let image = Arc::new(Lossy::new(memory.to_bytes()));
    let data = Arc::new(Lossy::new(vec![0xee; usize::try_from(size).unwrap()]));
    // At every moment: everything of the image's file is there, but of the data file only what has been synced.
    let moments = Arc::new(parking_lot::Mutex::new(vec![]));
    let moment = {
        let (image, data, moments) = (Arc::clone(&image), Arc::clone(&data), Arc::clone(&moments));
        move || moments.lock().push((image.live.to_bytes(), data.durable.lock().clone()))
    };
    let storage: Arc<dyn Storage> = Arc::new(Watched { file: Arc::clone(&image), moment: Box::new(moment) });
    let file: Arc<dyn Storage> = Arc::new(Watched { file: Arc::clone(&data), moment: Box::new(|| {}) });
    let options = OpenOptions { writable: true, data_file: Some(file), ..OpenOptions::default() };
    let disk = Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), options).unwrap();
    let mut flushed = vec![];
    for step in 0..6u8 {
        let offset = u64::from(step) * 5 * 4096;
        disk.write_at(&vec![step + 1; 3 * 4096], offset).unwrap();
        if step % 2 == 1 {
            disk.flush().unwrap();
            let after = (image.durable.lock().clone(), data.durable.lock().clone());
            flushed.push((offset, step + 1, after));
        }
    }
    disk.close().unwrap();
    let reopen = |(image, data): &(Vec<u8>, Vec<u8>)| {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(image.clone()));
        let data: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(data.clone()));
        let options = OpenOptions { data_file: Some(data), ..OpenOptions::default() };
        contents(&Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), options).unwrap())
    };
    let moments = moments.lock();
    assert!(moments.len() > 6, "{}", moments.len());
    for (index, moment) in moments.iter().enumerate() {
        assert!(!reopen(moment).contains(&0xee), "moment {index}: what has not been written shows");
    }
    for (offset, byte, after) in &flushed {
        let at = usize::try_from(*offset).unwrap();
        assert!(reopen(after)[at..at + 3 * 4096].iter().all(|b| b == byte), "lost by a flush: {offset:#x}");
    }
}

/// Making space for what is added to a disk began with the cluster in which the old disk ended. Where that had shown
/// the backing file it became a cluster of zeros: lost bytes.
#[test]
fn growing_with_space_in_advance_keeps_what_the_backing_file_shows() {
    for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for (extended_l2, cluster_bits, version) in [(false, 12, 3), (false, 12, 2), (true, 14, 3)] {
            for (size, new) in [(10_240u64, 40_960u64), (10_240, 11_264), (33_280, 65_536)] {
                let len = |bytes: u64| usize::try_from(bytes).unwrap();
                let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
                let options = CreateOptions {
                    cluster_bits,
                    extended_l2,
                    version,
                    backing_file: Some(b"base".to_vec()),
                    backing_format: Some(b"raw".to_vec()),
                    ..CreateOptions::new(size)
                };
                create(&*storage, &options).unwrap();
                let base: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(vec![7; len(size)]));
                let base: Arc<dyn BlockDevice> = Arc::new(Raw::open(base, RawOptions::default()).unwrap());
                let open = OpenOptions { writable: true, backing: Some(base), ..OpenOptions::default() };
                let image =
                    Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), open).unwrap();
                image.resize(new, mode).unwrap();
                image.close().unwrap();
                let mut bytes = vec![1; len(new)];
                image.read_at(&mut bytes, 0).unwrap();
                let mut expected = vec![7; len(size)];
                expected.resize(len(new), 0);
                let bad = bytes.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!(bad, None, "{mode:?} {extended_l2} v{version} {size} {new}");
                let report = check(&storage, &Header::read(&*storage).unwrap(), None, Repair::None).unwrap();
                assert!(report.is_clean());
            }
        }
    }
}

/// Requests that were on their way when a snapshot of a smaller disk was applied noted changes of L1 entries that there
/// were no more. The next flush panicked and lost all that it had taken.
#[test]
fn requests_may_be_overtaken_by_a_snapshot_of_a_smaller_disk() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    let options = CreateOptions {
        cluster_bits: 9,
        backing_file: Some(b"base".to_vec()),
        backing_format: Some(b"raw".to_vec()),
        ..CreateOptions::new(40_960)
    };
    create(&*storage, &options).unwrap();
    let base: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(vec![7; 4 << 20]));
    let base: Arc<dyn BlockDevice> = Arc::new(Raw::open(base, RawOptions::default()).unwrap());
    let open = OpenOptions { writable: true, backing: Some(base), ..OpenOptions::default() };
    let image = Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), open).unwrap();
    image.create_snapshot(b"small", SystemTime::UNIX_EPOCH).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (image, done) = (&image, &done);
            scope.spawn(move || {
                let mut round = 0u64;
                while round < 4000 && !done.load(Ordering::Relaxed) {
                    round += 1;
                    let at = (round * 7919 + thread * 104_729) % ((1 << 20) - 40_000);
                    let result = match round % 5 {
                        0 => image.write_zeroes_at(at, 40_000, ZeroMode::UNMAP),
                        1 => image.reserve(at, 40_000),
                        2 => image.discard_at(at, 40_000),
                        3 => image.write_own_zeroes(at, 40_000),
                        _ => image.preallocate(at, 40_000, Preallocation::Metadata),
                    };
                    if let Err(error) = result {
                        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
                    }
                }
            });
        }
        for _ in 0..40u64 {
            image.resize(1 << 20, Preallocation::Off).unwrap();
            std::thread::yield_now();
            image.apply_snapshot(&Selector::IdOrName(b"1".to_vec())).unwrap();
            image.flush().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    image.close().unwrap();
    let report = check(&storage, &Header::read(&*storage).unwrap(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{report:?}");
}

fn volume() -> Arc<crypt::Volume> {
    Arc::new(crypt::Volume::new(crypt::CipherSpec::DEFAULT, &[7; 64]).unwrap())
}

/// Resizing an encrypted image that had been opened for its description only wrote zeros as they are, which decrypt to
/// noise.
#[test]
fn what_cannot_be_read_is_not_resized() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*storage, &CreateOptions { cluster_bits: 12, ..CreateOptions::new(10_240) }).unwrap();
    let open = |key: bool, metadata_only: bool| {
        let options = OpenOptions {
            writable: true,
            metadata_only,
            encryption: key.then(volume),
            ..OpenOptions::default()
        };
        Qcow2::open(Arc::clone(&storage), Header::read(&*storage).unwrap(), options).unwrap()
    };
    let image = open(false, false);
    image.add_luks_header(b"x", 5000).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(true, false);
    image.write_at(&[9; 10_240], 0).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(false, true);
    assert!(image.resize(5120, Preallocation::Off).is_err());
    assert!(image.resize(40_960, Preallocation::Off).is_err());
    assert!(image.make_empty().is_err());
    image.close().unwrap();
    drop(image);
    let image = open(true, false);
    assert_eq!(contents(&image), vec![9; 10_240]);
}

/// A repair through an image that was open for writing moved the refcount structures away under it: the next write
/// went on in the old ones.
#[test]
fn an_image_that_is_open_for_writing_is_not_repaired() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*storage, &small_clusters(1 << 20)).unwrap();
    let image = open(&storage);
    image.write_at(&[9; 100_000], 0).unwrap();
    image.close().unwrap();
    let table = image.header().refcount_table_offset;
    drop(image);
    let mut entry = [0; 8];
    storage.read_at(&mut entry, table).unwrap();
    entry[7] |= 1;
    storage.write_at(&entry, table).unwrap();
    let image = open(&storage);
    assert_eq!(image.check(Repair::All).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(image.check(Repair::None).unwrap().corruptions, 1);
}

/// A bitmap that was added while the disk became larger was too short for it when it was stored. Nothing can open such
/// an image.
#[test]
fn a_bitmap_may_be_added_while_the_disk_grows() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*storage, &small_clusters(1 << 20)).unwrap();
    let image = open(&storage);
    for round in 0..300u32 {
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                image.resize(if round % 2 == 0 { 64 << 20 } else { 1 << 20 }, Preallocation::Off).unwrap();
            });
            scope.spawn(|| {
                start.wait();
                for _ in 0..round * 20 {
                    std::hint::spin_loop();
                }
                image.add_bitmap(b"b", Some(512), true).unwrap();
            });
        });
        image.close().unwrap();
        let header = Header::read(&*storage).unwrap();
        let r = Qcow2::open(Arc::clone(&storage), header, OpenOptions::default());
        assert!(r.is_ok(), "round {round}: {:?}", r.err());
        let bits = image.dirty_bitmap(b"b").unwrap();
        assert_eq!(bits.len(), image.size(), "round {round}");
        image.remove_bitmap(b"b").unwrap();
        image.close().unwrap();
    }
}
