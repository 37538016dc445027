//! Persistent dirty bitmaps against an array of flags for each: whatever is done to the disk and to the bitmaps,
//! reopened or cut off in between, a bitmap either knows of every write or says that it does not.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashImage, CrashStorage, Fault, FaultStorage};
use block::{BlockDevice, Compressed, DirtyBitmap, Preallocation, Storage, ZeroMode};
use nix::errno::Errno;
use proptest::prelude::*;
use qcow2::check::check;
use qcow2::create::{CreateOptions, create};
use qcow2::{Header, OpenOptions, Qcow2};

const NAMES: [&str; 3] = ["a", "second", "bitmap-c"];

fn open(storage: &Arc<dyn Storage>, writable: bool) -> block::Result<Arc<Qcow2>> {
    let options = OpenOptions {
        writable,
        l2_cache_bytes: Some(0),
        refcount_cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    Qcow2::open(Arc::clone(storage), Header::read(&**storage)?, options)
}

fn created(options: &CreateOptions) -> Vec<u8> {
    let storage = MemStorage::new();
    create(&storage, options).unwrap();
    storage.to_bytes()
}

fn options(cluster_bits: u32, size: u64) -> CreateOptions {
    CreateOptions { cluster_bits, ..CreateOptions::new(size) }
}

/// Nothing contradicts itself, and with `leaks` false nothing is lost.
fn verdict(storage: &Arc<dyn Storage>, leaks: bool) -> Result<(), String> {
    let header = Header::read(&**storage).map_err(|error| error.to_string())?;
    let report = check(storage, &header, None, Repair::None).map_err(|error| error.to_string())?;
    let bad = report.corruptions + report.check_errors + if leaks { 0 } else { report.leaks };
    if bad > 0 { Err(format!("{report:#?}")) } else { Ok(()) }
}

/// What a bitmap should be.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    name: &'static str,
    granularity: u64,
    enabled: bool,
    bits: Vec<bool>,
}

impl Model {
    fn set(&mut self, size: u64, offset: u64, len: u64) {
        let end = (offset + len).min(size);
        if offset < end {
            let granule = |at: u64| usize::try_from(at / self.granularity).unwrap();
            let (first, last) = (granule(offset), granule(end - 1));
            self.bits[first..=last].fill(true);
        }
    }

    fn fit(&mut self, size: u64) {
        self.bits.resize(usize::try_from(size.div_ceil(self.granularity)).unwrap(), false);
    }
}

fn flags(bits: &DirtyBitmap) -> Vec<bool> {
    let mut flags = vec![];
    for extent in bits.extents(0, u64::MAX) {
        let end = (extent.offset + extent.len).div_ceil(bits.granularity());
        flags.resize(usize::try_from(end).unwrap(), extent.dirty);
    }
    flags
}

/// The bitmaps of an image as they are.
fn models(image: &Qcow2) -> Vec<Model> {
    let bitmaps = image.bitmaps();
    let models = bitmaps.iter().map(|bitmap| Model {
        name: NAMES.into_iter().find(|name| name.as_bytes() == bitmap.name).unwrap(),
        granularity: bitmap.granularity(),
        enabled: bitmap.auto(),
        bits: flags(&image.dirty_bitmap(&bitmap.name).unwrap()),
    });
    models.collect()
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Compressed(u64, u64),
    Flush,
    Reopen,
    Crash,
    Resize(u64),
    Add(usize, u8, bool),
    Remove(usize),
    Clear(usize),
    Enable(usize, bool),
    Merge(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (any::<u64>(), prop_oneof![1..2000u64, 1..70_000u64, 1..400_000u64]);
    let name = || 0..NAMES.len();
    prop_oneof![
        6 => place().prop_map(|(at, len)| Op::Write(at, len)),
        2 => place().prop_map(|(at, len)| Op::Zero(at, len)),
        1 => place().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => (any::<u64>(), 1..4u64).prop_map(|(at, count)| Op::Compressed(at, count)),
        1 => Just(Op::Flush),
        2 => Just(Op::Reopen),
        2 => Just(Op::Crash),
        1 => any::<u64>().prop_map(Op::Resize),
        4 => (name(), 9..17u8, any::<bool>()).prop_map(|(n, bits, on)| Op::Add(n, bits, on)),
        1 => name().prop_map(Op::Remove),
        1 => name().prop_map(Op::Clear),
        2 => (name(), any::<bool>()).prop_map(|(n, on)| Op::Enable(n, on)),
        1 => (name(), name()).prop_map(|(a, b)| Op::Merge(a, b)),
    ]
}

struct Bench {
    memory: Arc<MemStorage>,
    image: Arc<Qcow2>,
    cluster: u64,
    bitmaps: Vec<Model>,
    /// What is on disk, by the last close.
    stored: Vec<Model>,
    written_since: bool,
}

impl Bench {
    fn new(options: &CreateOptions) -> Self {
        let memory = Arc::new(MemStorage::from_bytes(created(options)));
        let image = open(&(Arc::clone(&memory) as _), true).unwrap();
        let cluster = 1 << options.cluster_bits;
        Self { memory, image, cluster, bitmaps: vec![], stored: vec![], written_since: false }
    }

    fn place(&self, at: u64, len: u64) -> (u64, u64) {
        let at = at % self.image.size();
        (at, len.min(self.image.size() - at))
    }

    fn wrote(&mut self, offset: u64, len: u64) {
        let size = self.image.size();
        self.bitmaps
            .iter_mut()
            .filter(|bitmap| bitmap.enabled)
            .for_each(|bitmap| bitmap.set(size, offset, len));
        self.written_since = true;
    }

    fn find(&mut self, name: usize) -> Option<&mut Model> {
        self.bitmaps.iter_mut().find(|bitmap| bitmap.name == NAMES[name])
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write(at, len) => {
                let (at, len) = self.place(at, len);
                self.image.write_at(&vec![7; usize::try_from(len).unwrap()], at).unwrap();
                self.wrote(at, len);
            }
            Op::Zero(at, len) => {
                let (at, len) = self.place(at, len);
                self.image.write_zeroes_at(at, len, ZeroMode::UNMAP).unwrap();
                self.wrote(at, len);
            }
            Op::Discard(at, len) => {
                let (at, len) = self.place(at, len);
                self.image.discard_at(at, len).unwrap();
                self.wrote(at, len);
            }
            Op::Compressed(at, count) => self.compressed(at, count),
            Op::Flush => self.image.flush().unwrap(),
            Op::Reopen => self.reopen(),
            Op::Crash => self.crash(),
            Op::Resize(size) => {
                let size = (size % 3000 + 1) * 512;
                self.image.resize(size, Preallocation::Off).unwrap();
                self.bitmaps.iter_mut().for_each(|bitmap| bitmap.fit(size));
                if !self.bitmaps.is_empty() || !self.stored.is_empty() {
                    // Resizing stores them.
                    self.stored = self.bitmaps.clone();
                    self.written_since = false;
                }
                if self.bitmaps.is_empty() {
                    self.image.close().unwrap();
                    self.stored.clear();
                }
            }
            Op::Add(name, bits, enabled) => {
                let added = self.image.add_bitmap(NAMES[name].as_bytes(), Some(1 << bits), enabled);
                assert_eq!(added.is_ok(), self.find(name).is_none());
                if added.is_ok() {
                    let mut model =
                        Model { name: NAMES[name], granularity: 1 << bits, enabled, bits: vec![] };
                    model.fit(self.image.size());
                    self.bitmaps.push(model);
                }
            }
            Op::Remove(name) => {
                let removed = self.image.remove_bitmap(NAMES[name].as_bytes());
                assert_eq!(removed.is_ok(), self.find(name).is_some());
                self.bitmaps.retain(|bitmap| bitmap.name != NAMES[name]);
            }
            Op::Clear(name) => {
                let cleared = self.image.clear_bitmap(NAMES[name].as_bytes());
                let model = self.find(name);
                assert_eq!(cleared.is_ok(), model.is_some());
                if let Some(model) = model {
                    model.bits.fill(false);
                }
            }
            Op::Enable(name, enabled) => {
                let done = self.image.enable_bitmap(NAMES[name].as_bytes(), enabled);
                let model = self.find(name);
                assert_eq!(done.is_ok(), model.is_some());
                if let Some(model) = model {
                    model.enabled = enabled;
                }
            }
            Op::Merge(to, from) => self.merge(to, from),
        }
    }

    fn compressed(&mut self, at: u64, count: u64) {
        let clusters = self.image.size().div_ceil(self.cluster);
        let first = at % clusters;
        let count = count.min(clusters - first);
        let writer = self.image.compressed_writer().unwrap();
        let data = vec![9; usize::try_from(self.cluster).unwrap()];
        let packed: Vec<Compressed> = (0..count).map(|_| writer.compress(&data).unwrap()).collect();
        writer.write_compressed(&packed, first * self.cluster).unwrap();
        self.wrote(first * self.cluster, count * self.cluster);
    }

    fn merge(&mut self, to: usize, from: usize) {
        let Ok(source) = self.image.dirty_bitmap(NAMES[from].as_bytes()) else {
            assert!(self.find(from).is_none());
            return;
        };
        let merged = self.image.merge_bitmap(NAMES[to].as_bytes(), &source);
        let size = self.image.size();
        let model = self.find(to);
        assert_eq!(merged.is_ok(), model.is_some());
        if let Some(model) = model {
            source.extents(0, u64::MAX).filter(|e| e.dirty).for_each(|e| model.set(size, e.offset, e.len));
        }
    }

    fn reopen(&mut self) {
        self.image.close().unwrap();
        let storage: Arc<dyn Storage> = Arc::clone(&self.memory) as _;
        verdict(&storage, false).unwrap();
        self.image = open(&storage, true).unwrap();
        assert_eq!(models(&self.image), self.bitmaps);
        assert_eq!(models(&open(&storage, false).unwrap()), self.bitmaps);
        self.stored = self.bitmaps.clone();
        self.written_since = false;
    }

    /// The program dies here; everything that it wrote is on disk.
    fn crash(&mut self) {
        let copy: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(self.memory.to_bytes()));
        // Opening repairs what lazy refcounts have left.
        let image = open(&copy, true).unwrap();
        verdict(&copy, true).unwrap();
        for bitmap in image.bitmaps() {
            let stored = self.stored.iter().find(|stored| stored.name.as_bytes() == bitmap.name);
            if bitmap.in_use() {
                image.dirty_bitmap(&bitmap.name).unwrap_err();
            } else if bitmap.auto() {
                assert!(!self.written_since, "'{}' has missed a write", bitmap.display_name());
            }
            if let (false, Some(stored)) = (bitmap.in_use(), stored.filter(|_| !self.written_since)) {
                assert_eq!(flags(&image.dirty_bitmap(&bitmap.name).unwrap()), stored.bits);
            }
        }
        // And a bitmap that is in use stays so, and can be removed.
        let size = image.size();
        image.write_at(&[1], size - 1).unwrap();
        image.close().unwrap();
        for bitmap in image.bitmaps() {
            image.remove_bitmap(&bitmap.name).unwrap();
        }
        image.close().unwrap();
        let header = Header::read(&*copy).unwrap();
        assert!(header.bitmaps.is_none() && header.autoclear == 0);
        verdict(&copy, true).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn bitmaps_know_of_every_write(
        cluster_bits in prop_oneof![9..=12u32, Just(16)],
        refcount_order in 0..=6u32,
        lazy_refcounts in any::<bool>(),
        sectors in 1..3000u64,
        ops in proptest::collection::vec(op(), 1..30),
    ) {
        let options = CreateOptions { refcount_order, lazy_refcounts, ..options(cluster_bits, sectors * 512) };
        let mut bench = Bench::new(&options);
        for op in &ops {
            bench.apply(op);
            prop_assert_eq!(models(&bench.image), bench.bitmaps.clone(), "after {:?}", op);
        }
        bench.reopen();
    }
}

/// An image with a bitmap that records, one that does not, and one that is full.
fn with_bitmaps(options: &CreateOptions) -> Vec<u8> {
    let memory = Arc::new(MemStorage::from_bytes(created(options)));
    let image = open(&(Arc::clone(&memory) as _), true).unwrap();
    image.add_bitmap(b"a", Some(512), true).unwrap();
    image.add_bitmap(b"second", Some(4096), true).unwrap();
    image.write_at(&[1; 700], 5000).unwrap();
    image.write_at(&[1; 512], options.size - 9000).unwrap();
    image.enable_bitmap(b"second", false).unwrap();
    image.add_bitmap(b"bitmap-c", Some(1024), true).unwrap();
    image.write_zeroes_at(0, options.size, ZeroMode::UNMAP).unwrap();
    // There is something to overwrite in place, which no other sync stands in the way of.
    image.write_at(&[0x11; 4000], 18_000).unwrap();
    image.clear_bitmap(b"a").unwrap();
    image.write_at(&[1; 700], 5000).unwrap();
    image.close().unwrap();
    drop(image);
    memory.to_bytes()
}

/// A session: what is done, with a mark after each thing that has been promised.
fn session(storage: &Arc<dyn Storage>, mark: &dyn Fn(u64)) -> block::Result<()> {
    let image = open(storage, true)?;
    image.write_at(&[0xaa; 600], 20_000)?;
    image.flush()?;
    mark(1);
    image.remove_bitmap(b"bitmap-c")?;
    image.clear_bitmap(b"second")?;
    image.close()?;
    mark(2);
    image.write_at(&[0xbb; 600], 21_000)?;
    image.flush()?;
    mark(3);
    image.close()
}

/// Whether a bitmap that claims to be up to date is: every sector that differs from how the disk was when the bitmaps
/// were stored is marked.
fn misses_nothing(storage: &Arc<dyn Storage>, before: &[u8], after_close: &[u8]) -> Result<(), String> {
    let image = open(storage, true).map_err(|error| format!("open: {error}"))?;
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).map_err(|error| format!("read: {error}"))?;
    for bitmap in image.bitmaps().iter().filter(|bitmap| !bitmap.in_use() && bitmap.name == b"a") {
        let bits = image.dirty_bitmap(&bitmap.name).map_err(|error| format!("bits: {error}"))?;
        let differs = |at: usize| bytes[at] != before[at];
        for at in (0..bytes.len()).filter(|at| differs(*at)) {
            let dirty = bits.extent(at as u64, u64::MAX).unwrap().dirty;
            if !dirty {
                return Err(format!("byte {at:#x} has been written, and bitmap 'a' does not know"));
            }
        }
    }
    let known = |at: usize| [0, 0xaa, 0xbb, before[at], after_close[at]].contains(&bytes[at]);
    if let Some(at) = (0..bytes.len()).find(|at| !known(*at)) {
        return Err(format!("byte {at:#x} is {:#x}", bytes[at]));
    }
    image.write_at(&[3; 10], 0).map_err(|error| format!("write: {error}"))?;
    image.close().map_err(|error| format!("close: {error}"))?;
    drop(image);
    verdict(storage, true)
}

fn disk_of(bytes: &[u8]) -> Vec<u8> {
    let image = open(&(Arc::new(MemStorage::from_bytes(bytes.to_vec())) as _), false).unwrap();
    let mut disk = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut disk, 0).unwrap();
    disk
}

#[test]
fn no_power_cut_lets_a_bitmap_miss_a_write() {
    for (cluster_bits, lazy_refcounts) in [(9, false), (12, false), (9, true)] {
        let options = CreateOptions { lazy_refcounts, ..options(cluster_bits, 128 << 10) };
        let start = with_bitmaps(&options);
        let before = disk_of(&start);
        let storage = Arc::new(CrashStorage::new(start));
        session(&(Arc::clone(&storage) as _), &|number| storage.mark(number)).unwrap();
        let after = disk_of(&storage.to_bytes());
        for CrashImage { storage, description, marks, .. } in storage.images(1200, 5) {
            let storage: Arc<dyn Storage> = storage as _;
            // A lazily counted image is repaired when it is opened.
            let repaired = lazy_refcounts.then(|| open(&storage, true).map(drop)).transpose();
            let wrong = repaired
                .map_err(|error| format!("repair: {error}"))
                .and_then(|_| verdict(&storage, true))
                .and_then(|()| misses_nothing(&storage, &before, &after));
            assert!(wrong.is_ok(), "{cluster_bits}, {description}, marks {marks:?}: {wrong:?}");
        }
    }
}

#[test]
fn any_call_may_fail() {
    let options = options(9, 128 << 10);
    let start = with_bitmaps(&options);
    let before = disk_of(&start);
    for errno in [Errno::EIO, Errno::ENOSPC] {
        for n in 0.. {
            let memory: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(start.clone()));
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory)));
            faulty.fail(Fault::nth(n, errno).on_changes());
            let done = session(&(Arc::clone(&faulty) as _), &|_| {});
            faulty.heal();
            let wrong = verdict(&memory, true).and_then(|()| misses_nothing(&memory, &before, &before));
            assert!(wrong.is_ok(), "{errno} at call {n}: {wrong:?}");
            if done.is_ok() && n > 200 {
                break;
            }
            assert!(n < 2000, "the session never ends");
        }
    }
}

/// After a failure the same image goes on, and in the end its bitmaps are right.
#[test]
fn a_close_that_failed_can_be_repeated() {
    let options = options(9, 128 << 10);
    for n in 0..60 {
        let memory = Arc::new(MemStorage::from_bytes(with_bitmaps(&options)));
        let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
        let image = open(&(Arc::clone(&faulty) as _), true).unwrap();
        let mut expected = models(&image);
        faulty.fail(Fault::nth(n, Errno::EIO).on_changes());
        let first = image.write_at(&[1; 100], 60_000).and_then(|()| image.close());
        faulty.heal();
        image.write_at(&[1; 100], 60_000).unwrap();
        image.write_at(&[2; 100], 70_000).unwrap();
        image.close().unwrap();
        drop(image);
        for model in expected.iter_mut().filter(|model| model.enabled) {
            model.set(options.size, 60_000, 100);
            model.set(options.size, 70_000, 100);
        }
        let storage: Arc<dyn Storage> = memory as _;
        assert_eq!(models(&open(&storage, false).unwrap()), expected, "call {n}, {first:?}");
        verdict(&storage, true).unwrap();
    }
}

/// Growing and shrinking, interrupted: the image can be used, and no bitmap claims to be right that is not.
#[test]
fn resizing_with_bitmaps_survives_a_power_cut() {
    let options = options(9, 64 << 10);
    let storage = Arc::new(CrashStorage::new(with_bitmaps(&options)));
    let image = open(&(Arc::clone(&storage) as _), true).unwrap();
    image.resize(4 << 20, Preallocation::Off).unwrap();
    storage.mark(1);
    image.write_at(&[5; 100], 3 << 20).unwrap();
    image.resize(32 << 10, Preallocation::Off).unwrap();
    storage.mark(2);
    image.close().unwrap();
    drop(image);
    for CrashImage { storage, description, marks, .. } in storage.images(600, 5) {
        let storage: Arc<dyn Storage> = storage as _;
        let image = open(&storage, true).unwrap_or_else(|error| panic!("{description} {marks:?}: {error}"));
        for bitmap in image.bitmaps().iter().filter(|bitmap| !bitmap.in_use()) {
            let bits = image.dirty_bitmap(&bitmap.name).unwrap();
            assert_eq!(bits.len(), image.size());
            let expected = if bitmap.name == b"bitmap-c" { (64 << 10) / 1024 } else { 0 };
            if image.size() > 64 << 10 && bitmap.name == b"bitmap-c" {
                assert_eq!(bits.count(), expected, "{description} {marks:?}");
            }
        }
        image.write_at(&[3; 10], 0).unwrap();
        image.close().unwrap();
        drop(image);
        verdict(&storage, true).unwrap_or_else(|wrong| panic!("{description} {marks:?}: {wrong}"));
    }
}

#[test]
fn threads_that_write_at_once_are_all_recorded() {
    let memory = Arc::new(MemStorage::from_bytes(created(&options(12, 4 << 20))));
    let storage: Arc<dyn Storage> = Arc::clone(&memory) as _;
    let image = open(&storage, true).unwrap();
    image.add_bitmap(b"a", Some(512), true).unwrap();
    image.close().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for i in 0..400u64 {
                    image.write_at(&[1; 512], (i * 16 + thread * 4) * 512).unwrap();
                    if i % 100 == thread {
                        image.close().unwrap();
                    }
                }
            });
        }
    });
    image.close().unwrap();
    drop(image);
    let image = open(&storage, false).unwrap();
    assert_eq!(image.dirty_bitmap(b"a").unwrap().count(), 1600);
    verdict(&storage, false).unwrap();
}

/// Bitmaps of other programs that have not been kept up to date go with the first opening for writing.
#[test]
fn stale_bitmaps_go() {
    let mut bytes = with_bitmaps(&options(9, 64 << 10));
    bytes[88..96].fill(0);
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(bytes));
    assert!(Header::read(&*storage).unwrap().stale_bitmaps);
    let image = open(&storage, true).unwrap();
    assert!(image.bitmaps().is_empty() && !Header::read(&*storage).unwrap().stale_bitmaps);
    image.add_bitmap(b"a", None, true).unwrap();
    image.close().unwrap();
    assert_eq!(image.bitmaps().len(), 1);
    verdict(&storage, true).unwrap();
}
