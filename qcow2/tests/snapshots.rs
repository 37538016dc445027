//! Creating, applying and deleting snapshots while the power fails, while the disk fails, and where counters run out.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

use std::sync::Arc;
use std::time::SystemTime;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashStorage, Fault, FaultStorage};
use block::{BlockDevice, ErrorKind, Preallocation, Result, Storage, ZeroMode};
use nix::errno::Errno;
use qcow2::check::check;
use qcow2::create::{CreateOptions, create};
use qcow2::features::incompatible;
use qcow2::snapshot::Selector;
use qcow2::{Header, OpenOptions, Qcow2};

/// The kinds of images that are put to the test.
fn kinds() -> Vec<(&'static str, CreateOptions)> {
    let with = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(96 << 10);
        options.cluster_bits = 9;
        change(&mut options);
        options
    };
    vec![
        ("512", with(&|_| {})),
        ("4k", with(&|o| (o.cluster_bits, o.size) = (12, 256 << 10))),
        ("v2", with(&|o| (o.version, o.cluster_bits) = (2, 10))),
        ("refcount-2", with(&|o| o.refcount_order = 1)),
        ("refcount-64", with(&|o| o.refcount_order = 6)),
        ("extended", with(&|o| (o.cluster_bits, o.extended_l2, o.size) = (14, true, 512 << 10))),
        ("lazy", with(&|o| o.lazy_refcounts = true)),
    ]
}

fn open(storage: &Arc<dyn Storage>, writable: bool, snapshot: Option<Selector>) -> Result<Arc<Qcow2>> {
    let header = Header::read(&**storage)?;
    Qcow2::open(Arc::clone(storage), header, OpenOptions { writable, snapshot, ..OpenOptions::default() })
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// One thing that is done to an image.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u64, u64, u8),
    Pack(u64, u8),
    Zero(u64, u64),
    Create,
    Apply(&'static str),
    Delete(&'static str),
    Resize(u64),
}

/// Sharing of every kind: whole tables, some clusters of a table, compressed clusters in one host cluster.
fn story(options: &CreateOptions) -> Vec<Step> {
    let (c, size) = (1 << options.cluster_bits, options.size);
    let mut steps = vec![
        Step::Write(0, size / 3, 1),
        Step::Pack(size / 2 / c, 2),
        Step::Pack(size / 2 / c + 1, 3),
        Step::Create,
        Step::Write(c / 2, 2 * c, 4),
        Step::Write(size - 1000, 1000, 5),
        Step::Pack(size / 2 / c, 6),
        Step::Create,
        Step::Zero(4 * c, 3 * c),
        Step::Apply("1"),
        Step::Write(3 * c, c, 7),
        Step::Delete("1"),
        Step::Write(0, 700, 8),
        Step::Apply("2"),
        Step::Apply("2"),
        Step::Create,
        Step::Delete("2"),
        Step::Write(c, c, 9),
        Step::Delete("3"),
        Step::Write(0, 5 * c, 10),
    ];
    if options.version > 2 {
        steps.insert(9, Step::Resize(size * 3));
        steps.insert(12, Step::Resize(size / 2));
        steps.push(Step::Create);
    }
    if options.refcount_order == 1 {
        // Compressed clusters would be in use more than three times.
        steps.retain(|step| !matches!(step, Step::Pack(..)));
    }
    steps
}

impl Step {
    fn run(self, disk: &Qcow2) -> Result<()> {
        match self {
            Self::Write(at, len, byte) => {
                let len = len.min(disk.size().saturating_sub(at));
                disk.write_at(&vec![byte; usize::try_from(len).unwrap()], at)
            }
            Self::Pack(cluster, byte) => {
                let writer = disk.compressed_writer().unwrap();
                let packed = writer.compress(&vec![byte; writer.cluster_size() as usize])?;
                writer.write_compressed(&[packed], cluster * u64::from(writer.cluster_size()))
            }
            Self::Zero(at, len) => disk.write_zeroes_at(at, len, ZeroMode::UNMAP),
            Self::Create => disk.create_snapshot(b"name", SystemTime::UNIX_EPOCH).map(drop),
            Self::Apply(id) => disk.apply_snapshot(&Selector::IdOrName(id.into())),
            Self::Delete(id) => disk.delete_snapshot(&Selector::IdOrName(id.into())).map(drop),
            Self::Resize(size) => disk.resize(size, Preallocation::Off),
        }
    }

    /// Whether it happens altogether or not at all.
    fn atomic(self) -> bool {
        matches!(self, Self::Create | Self::Apply(_) | Self::Delete(_))
    }
}

/// What an image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct World {
    disk: Vec<u8>,
    snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

impl World {
    fn of(storage: &Arc<dyn Storage>) -> Self {
        let disk = open(storage, false, None).unwrap();
        let snapshots = disk.snapshots().into_iter().map(|snapshot| {
            let view = open(storage, false, Some(Selector::IdOrName(snapshot.id.clone()))).unwrap();
            (snapshot.id, contents(&*view))
        });
        Self { snapshots: snapshots.collect(), disk: contents(&*disk) }
    }

    /// Whether it lies between two others, byte by byte.
    fn between(&self, before: &Self, after: &Self) -> bool {
        let sized = self.disk.len() == before.disk.len() || self.disk.len() == after.disk.len();
        let byte = |world: &Self, at: usize| world.disk.get(at).copied().unwrap_or(0);
        sized
            && self.snapshots == before.snapshots
            && self.snapshots == after.snapshots
            && (0..self.disk.len()).all(|at| [byte(before, at), byte(after, at)].contains(&self.disk[at]))
    }
}

fn created(options: &CreateOptions) -> MemStorage {
    let storage = MemStorage::new();
    create(&storage, options).unwrap();
    storage
}

#[track_caller]
fn no_corruption(storage: &Arc<dyn Storage>, what: &str) {
    let report = check(storage, &Header::read(&**storage).unwrap(), None, Repair::None).unwrap();
    assert!(report.corruptions == 0 && report.check_errors == 0, "{what}: {report:#?}");
}

#[test]
fn a_power_cut_finds_the_state_before_or_the_state_after() {
    let mut tried = 0;
    for (name, options) in kinds() {
        let steps = story(&options);
        let storage = Arc::new(CrashStorage::new(created(&options).to_bytes()));
        let shared = Arc::clone(&storage) as Arc<dyn Storage>;
        let disk = open(&shared, true, None).unwrap();
        let mut worlds = vec![World::of(&shared)];
        for (number, step) in (1..).zip(&steps) {
            step.run(&disk).unwrap_or_else(|error| panic!("{name}: {step:?}: {error}"));
            disk.flush().unwrap();
            storage.mark(number);
            worlds.push(World::of(&shared));
        }
        disk.close().unwrap();
        drop((disk, shared));
        let storage = Arc::into_inner(storage).unwrap();
        for image in storage.images(700, 11) {
            tried += 1;
            let passed = usize::try_from(image.marks.last().copied().unwrap_or(0)).unwrap();
            let what = format!("{name}, {}, after step {passed} of {steps:?}", image.description);
            let left: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
            if !Header::read(&*left).unwrap().has(incompatible::DIRTY) {
                no_corruption(&left, &what);
            }
            let disk = open(&left, true, None).unwrap_or_else(|error| panic!("{what}: {error}"));
            let found = World::of(&left);
            let (before, after) = (&worlds[passed], worlds.get(passed + 1).unwrap_or(&worlds[passed]));
            let whole = steps.get(passed).is_none_or(|step| step.atomic());
            assert!(
                found == *before || found == *after || (!whole && found.between(before, after)),
                "{what}: neither the state before nor after"
            );
            // And it goes on from there.
            disk.write_at(&[0x77; 1000], 300).unwrap();
            let later = disk.create_snapshot(b"later", SystemTime::UNIX_EPOCH);
            assert!(later.is_ok() || options.refcount_order == 1, "{what}: {later:?}");
            disk.close().unwrap();
            drop(disk);
            no_corruption(&left, &what);
        }
    }
    assert!(tried > 2000, "only {tried} images were tried");
}

/// The n-th change fails, for every n of every operation: the error reaches the caller, nothing has happened, and
/// when the disk works again the image can be used.
#[test]
fn a_failed_operation_changes_nothing() {
    for (name, options) in kinds() {
        let steps = story(&options);
        let memory: Arc<dyn Storage> = Arc::new(created(&options));
        let mut image = open(&memory, true, None).unwrap();
        for (at, step) in steps.iter().enumerate() {
            if step.atomic() {
                image.close().unwrap();
                every_failure_of(*step, &memory, &format!("{name}, step {at}, {step:?}"));
                image = open(&memory, true, None).unwrap();
            }
            step.run(&image).unwrap();
        }
        image.close().unwrap();
    }
}

fn copy(storage: &Arc<dyn Storage>) -> Arc<dyn Storage> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    Arc::new(MemStorage::from_bytes(bytes))
}

fn every_failure_of(step: Step, original: &Arc<dyn Storage>, what: &str) {
    let before = World::of(original);
    for n in 0.. {
        let memory = copy(original);
        let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory)));
        let disk = open(&(Arc::clone(&faulty) as Arc<dyn Storage>), true, None).unwrap();
        faulty.fail(Fault::nth(n, Errno::EIO).on_changes());
        let result = step.run(&disk);
        let untouched = result.is_ok();
        faulty.heal();
        let what = format!("{what}, call {n}: {result:?}");
        if result.is_err() {
            assert!(contents(&*disk) == before.disk, "{what}: the disk has changed");
            assert_eq!(disk.snapshots().len(), before.snapshots.len(), "{what}");
            disk.flush().unwrap_or_else(|error| panic!("{what}: flushing afterwards: {error}"));
            assert!(World::of(&memory) == before, "{what}: the image has changed");
            step.run(&disk).unwrap_or_else(|error| panic!("{what}: once more: {error}"));
        }
        disk.write_at(&[0x66; 900], 1000).unwrap_or_else(|error| panic!("{what}: writing: {error}"));
        disk.close().unwrap_or_else(|error| panic!("{what}: closing: {error}"));
        drop(disk);
        let report = check(&memory, &Header::read(&*memory).unwrap(), None, Repair::None).unwrap();
        assert!(report.is_clean(), "{what}: {report:#?}");
        if untouched {
            // Holes that could not be made do not count as failures, so a success need not be the end.
            let done = n > 0 && faulty.total() < n + 200;
            if done {
                return;
            }
        }
        assert!(n < 500, "{what}: this never ends");
    }
}

#[test]
fn a_counter_that_runs_out_is_noticed_before_anything_happens() {
    let mut options = CreateOptions::new(1 << 20);
    (options.cluster_bits, options.refcount_order) = (9, 0);
    let storage: Arc<dyn Storage> = Arc::new(created(&options));
    let disk = open(&storage, true, None).unwrap();
    // Nothing is shared yet.
    disk.create_snapshot(b"empty", SystemTime::UNIX_EPOCH).unwrap();
    disk.write_at(&[1; 5000], 0).unwrap();
    disk.flush().unwrap();
    let before = World::of(&storage);
    let error = disk.create_snapshot(b"full", SystemTime::UNIX_EPOCH).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Unsupported, "Invalid argument"));
    disk.apply_snapshot(&Selector::IdOrName("1".into())).unwrap();
    assert!(contents(&*disk).iter().all(|byte| *byte == 0));
    disk.write_at(&[2; 5000], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(World::of(&storage).snapshots, before.snapshots);
    let report = check(&storage, &disk.header(), None, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

/// Refcount table and blocks have to grow for the new state, in the middle of making it.
#[test]
fn a_snapshot_can_need_more_refcount_blocks_and_a_longer_table() {
    let mut options = CreateOptions::new(3 << 20);
    (options.cluster_bits, options.refcount_order) = (9, 6);
    for full in (1_700_000..2_090_000).step_by(4096) {
        let storage: Arc<dyn Storage> = Arc::new(created(&options));
        let disk = open(&storage, true, None).unwrap();
        disk.write_at(&vec![1; full], 0).unwrap();
        disk.flush().unwrap();
        let before = contents(&*disk);
        disk.create_snapshot(b"s", SystemTime::UNIX_EPOCH).unwrap();
        disk.write_at(&vec![2; 100_000], 50_000).unwrap();
        disk.apply_snapshot(&Selector::IdOrName("s".into())).unwrap();
        assert!(contents(&*disk) == before, "{full}");
        disk.delete_snapshot(&Selector::IdOrName("s".into())).unwrap();
        disk.close().unwrap();
        let report = check(&storage, &disk.header(), None, Repair::None).unwrap();
        assert!(report.is_clean(), "{full}: {report:#?}");
    }
}

/// An image without snapshots is as it was before there were any: no table, every cluster its own.
#[test]
fn what_a_snapshot_took_is_given_back() {
    let storage: Arc<dyn Storage> = Arc::new(created(&CreateOptions::new(64 << 20)));
    let disk = open(&storage, true, None).unwrap();
    disk.write_at(&vec![1; 5 << 20], 0).unwrap();
    disk.flush().unwrap();
    let allocated = |disk: &Qcow2| check(disk.storage(), &disk.header(), None, Repair::None).unwrap();
    let before = allocated(&disk);
    for _ in 0..20 {
        disk.create_snapshot(b"again", SystemTime::UNIX_EPOCH).unwrap();
        disk.delete_snapshot(&Selector::IdOrName("again".into())).unwrap();
    }
    let (header, after) = (disk.header(), allocated(&disk));
    assert_eq!((header.nb_snapshots, header.snapshots_offset), (0, 0));
    assert!(after.is_clean());
    // Free places are used again: the file has not grown by more than one state needs.
    assert!(after.image_end_offset < before.image_end_offset + (2 << 20), "{after:#?}");
    let in_place = disk.storage().len().unwrap();
    disk.write_at(&vec![2; 5 << 20], 0).unwrap();
    disk.close().unwrap();
    assert!(disk.storage().len().unwrap() <= in_place, "clusters that belong to the disk alone were copied");
}

/// An image with a snapshot that shares everything but the first cluster, and where its parts are.
struct Forged {
    storage: Arc<dyn Storage>,
    header: Header,
    /// L1 and L2 table of the snapshot.
    l1: u64,
    l2: u64,
}

impl Forged {
    fn new() -> Self {
        let mut options = CreateOptions::new(1 << 20);
        options.cluster_bits = 12;
        let storage: Arc<dyn Storage> = Arc::new(created(&options));
        let disk = open(&storage, true, None).unwrap();
        disk.write_at(&[1; 40_000], 0).unwrap();
        disk.create_snapshot(b"s", SystemTime::UNIX_EPOCH).unwrap();
        disk.write_at(&[2; 4096], 0).unwrap();
        disk.close().unwrap();
        let l1 = disk.snapshots()[0].l1_offset;
        let header = disk.header();
        drop(disk);
        let mut forged = Self { storage, header, l1, l2: 0 };
        forged.l2 = forged.word(l1) & 0x00ff_ffff_ffff_fe00;
        forged
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.storage.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn set(&self, at: u64, value: u64) {
        self.storage.write_at(&value.to_be_bytes(), at).unwrap();
    }

    /// Sets the (16-bit) refcount of a host cluster.
    fn refcount(&self, host: u64, value: u16) {
        let block = self.word(self.header.refcount_table_offset);
        self.storage.write_at(&value.to_be_bytes(), block + host / 4096 * 2).unwrap();
    }

    /// The operation fails, and not a byte of what the image names has changed.
    fn refuses(&self, step: Step) {
        let before = World::of_disk(&self.storage);
        let disk = open(&self.storage, true, None).unwrap();
        let error = step.run(&disk).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Truncated), "{step:?}: {error:?}");
        disk.close().unwrap();
        drop(disk);
        assert!(World::of_disk(&self.storage) == before, "{step:?} has changed the image");
        assert_eq!(Header::read(&*self.storage).unwrap().nb_snapshots, 1, "{step:?}");
    }
}

impl World {
    /// The active disk alone: the snapshot may be past reading.
    fn of_disk(storage: &Arc<dyn Storage>) -> Vec<u8> {
        contents(&*open(storage, false, None).unwrap())
    }
}

#[test]
fn a_snapshot_that_lies_is_refused_and_does_no_damage() {
    const COPIED: u64 = 1 << 63;
    let header_field = |forged: &Forged| forged.header.refcount_table_offset;
    type Lie<'a> = (&'a str, &'a dyn Fn(&Forged));
    let lies: [Lie<'_>; 8] = [
        ("an L2 table on the refcount table", &|f| f.set(f.l1, header_field(f))),
        ("an L2 table on the header's neighbour, unaligned", &|f| f.set(f.l1, 0x1200)),
        ("an L2 table behind the end of the file", &|f| f.set(f.l1, 1 << 40)),
        ("reserved bits in its L1 table", &|f| f.set(f.l1, f.word(f.l1) | 1)),
        ("data on the header's refcount table", &|f| f.set(f.l2 + 8, header_field(f))),
        ("data on its own L2 table", &|f| f.set(f.l2 + 8, f.l2 | COPIED)),
        ("data that is counted as free", &|f| f.refcount(f.word(f.l2) & !COPIED, 0)),
        ("data that is counted once and used twice", &|f| f.refcount(f.word(f.l2 + 16) & !COPIED, 1)),
    ];
    for (lie, tell) in lies {
        let forged = Forged::new();
        tell(&forged);
        open(&forged.storage, true, None).unwrap_or_else(|error| panic!("{lie}: {error}"));
        forged.refuses(Step::Delete("1"));
        if !lie.contains("once") {
            forged.refuses(Step::Apply("1"));
        }
    }
}

#[test]
fn snapshots_that_overlap_cannot_be_written_beside() {
    let forged = Forged::new();
    let table = forged.header.snapshots_offset;
    for place in [0, forged.header.l1_table_offset, forged.header.refcount_table_offset, table] {
        forged.set(table, place);
        let error = open(&forged.storage, true, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{place:#x}: {error}");
        open(&forged.storage, false, None).unwrap();
    }
}

/// After a failure the disk may hold the header of either state. The refcount table that moves before the next flush
/// must not get into the new one: with it a crash would leave clusters that two refer to and one is counted.
#[test]
fn a_refcount_table_that_moves_after_a_failure_belongs_to_the_old_state() {
    let mut options = CreateOptions::new(4 << 20);
    (options.cluster_bits, options.refcount_order) = (9, 6);
    let mut tried = 0;
    for n in 0.. {
        let crash = Arc::new(CrashStorage::new(created(&options).to_bytes()));
        let faulty = Arc::new(FaultStorage::new(Arc::clone(&crash) as Arc<dyn Storage>));
        let shared = Arc::clone(&faulty) as Arc<dyn Storage>;
        let disk = open(&shared, true, None).unwrap();
        disk.write_at(&vec![1; 1_700_000], 0).unwrap();
        disk.flush().unwrap();
        faulty.fail(Fault::nth(n, Errno::EIO).on(&[block::testing::Operation::Sync]));
        let result = disk.create_snapshot(b"s", SystemTime::UNIX_EPOCH);
        faulty.heal();
        if result.is_ok() {
            break;
        }
        let table = disk.header().refcount_table_clusters;
        let mut at = 1_700_000;
        while disk.header().refcount_table_clusters == table && at < 3_900_000 {
            disk.write_at(&[2; 5000], at).unwrap();
            at += 5000;
        }
        crash.mark(1);
        drop((shared, faulty));
        std::mem::forget(disk);
        for image in crash.images(200, n) {
            let left: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
            no_corruption(&left, &format!("sync {n}, {}", image.description));
            tried += 1;
        }
    }
    assert!(tried > 100);
}
