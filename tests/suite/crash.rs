//! What a loss of power leaves, and what a failing disk leaves.
//!
//! A qcow2 image lives on a container that records every change and sync. Whatever subset of the changes since
//! the last sync may have reached the disk: the image opens, checks without corruptions (leaks are allowed),
//! and every byte is what it was at the last flush that had returned, or something written since.

use std::sync::Arc;

use block::image::Repair;
use block::testing::{CrashImage, CrashStorage, Fault, FaultStorage};
use block::{BlockDevice, Preallocation, Storage};
use nix::errno::Errno;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use qcow2::create::CreateOptions;
use qcow2::features::incompatible;
use qcow2::{Header, Qcow2};
use tests::ops::{Model, any_op};
use tests::{Op, Ops};

/// What an image is made of.
#[derive(Debug, Clone)]
struct Kind {
    options: CreateOptions,
    /// Encrypted by LUKS, or by the old AES.
    luks: Option<bool>,
}

impl From<CreateOptions> for Kind {
    fn from(options: CreateOptions) -> Self {
        Self { options, luks: None }
    }
}

impl std::ops::Deref for Kind {
    type Target = CreateOptions;

    fn deref(&self) -> &CreateOptions {
        &self.options
    }
}

/// The kinds of images that are put to the test, with their names.
fn kinds() -> Vec<(&'static str, Kind)> {
    let with = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(128 << 10);
        options.cluster_bits = 9;
        change(&mut options);
        Kind::from(options)
    };
    let encrypted = |luks: bool| Kind { luks: Some(luks), ..with(&|o| o.cluster_bits = 11) };
    vec![
        ("512", with(&|_| {})),
        ("4k", with(&|o| o.cluster_bits = 12)),
        ("v2", with(&|o| (o.version, o.cluster_bits) = (2, 10))),
        ("refcount-1", with(&|o| o.refcount_order = 0)),
        ("refcount-64", with(&|o| o.refcount_order = 6)),
        ("extended", with(&|o| (o.cluster_bits, o.extended_l2, o.size) = (14, true, 512 << 10))),
        ("lazy", with(&|o| o.lazy_refcounts = true)),
        ("zstd", with(&|o| (o.cluster_bits, o.compression_type) = (12, qcow2::header::COMPRESSION_ZSTD))),
        ("luks", encrypted(true)),
        ("aes", encrypted(false)),
    ]
}

fn created(kind: &Kind) -> Vec<u8> {
    let storage = Arc::new(block::mem::MemStorage::new());
    qcow2::create::create(&*storage, kind).unwrap();
    if let Some(luks) = kind.luks {
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
        match luks {
            true => image.add_luks_header(b"nobody looks into it here", 5000).unwrap(),
            false => image.use_old_aes().unwrap(),
        }
        image.close().unwrap();
    }
    storage.to_bytes()
}

/// The key of an image that is encrypted: what its header says of it does not matter here.
fn volume(header: &Header) -> Option<Arc<crypt::Volume>> {
    let volume = match header.crypt_method {
        0 => return None,
        qcow2::header::CRYPT_AES => crypt::Volume::qcow2_aes(b"seven"),
        _ => crypt::Volume::new(crypt::CipherSpec::DEFAULT, &[7; 64]),
    };
    Some(Arc::new(volume.unwrap()))
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> block::Result<Arc<Qcow2>> {
    let header = Header::read(&*storage)?;
    let encryption = volume(&header);
    Qcow2::open(storage, header, qcow2::OpenOptions { writable, encryption, ..qcow2::OpenOptions::default() })
}

/// A workload that is always the same for a seed.
fn workload(options: &Kind, seed: u64, len: usize) -> Ops {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let op = any_op(options.size, 1 << options.cluster_bits, options.luks.is_none());
    Ops(proptest::collection::vec(op, len).new_tree(&mut runner).unwrap().current())
}

fn read_all(disk: &dyn BlockDevice) -> block::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The states of the disk after each operation, the first one before any.
struct History {
    states: Vec<Model>,
}

impl History {
    /// The first byte that is neither what it was in state `from` nor what it has been since.
    fn first_wrong(&self, from: usize, bytes: &[u8]) -> Option<usize> {
        let since = &self.states[from..];
        (0..bytes.len()).find(|&at| !since.iter().any(|state| state.allows(at, bytes[at])))
    }
}

/// Runs a workload on a recording container. Each flush that returns leaves a mark with the number of the
/// state that it made durable.
fn record(options: &Kind, ops: &Ops) -> (CrashStorage, History) {
    record_on(created(options), ops)
}

/// The same on an image that is already there.
fn record_on(image: Vec<u8>, ops: &Ops) -> (CrashStorage, History) {
    let storage = Arc::new(CrashStorage::new(image));
    let disk = open(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
    let mut model = Model::from_bytes(read_all(&*disk).unwrap());
    let mut states = vec![model.clone()];
    for (number, op) in ops.0.iter().enumerate() {
        op.device(&*disk).unwrap_or_else(|error| panic!("{op:?}: {error}"));
        op.model(&mut model);
        states.push(model.clone());
        if *op == Op::Flush {
            storage.mark(number as u64 + 1);
        }
    }
    disk.close().unwrap();
    storage.mark(ops.0.len() as u64);
    drop(disk);
    let storage = Arc::into_inner(storage).expect("the image still holds its container after it was dropped");
    (storage, History { states })
}

/// What has to be true of whatever is left after a loss of power.
fn survives(image: &CrashImage, history: &History) -> Result<(), String> {
    let say = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let storage: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
    let header = Header::read(&*storage).map_err(|error| say("header", &error))?;
    let dirty = header.has(incompatible::DIRTY);
    if !dirty {
        no_corruption(&storage)?;
    }
    let disk = open(Arc::clone(&storage), true).map_err(|error| say("open", &error))?;
    let bytes = read_all(&*disk).map_err(|error| say("read", &error))?;
    let from = image.marks.last().map_or(0, |mark| usize::try_from(*mark).unwrap());
    if let Some(at) = history.first_wrong(from, &bytes) {
        let wanted = history.states[from].bytes()[at];
        return Err(format!("byte {at:#x} is {:#04x}, was {wanted:#04x} when last flushed", bytes[at]));
    }
    // And it goes on from there.
    disk.write_at(&[0x77; 1000], 300).map_err(|error| say("write afterwards", &error))?;
    disk.close().map_err(|error| say("close afterwards", &error))?;
    drop(disk);
    no_corruption(&storage)
}

fn no_corruption(storage: &Arc<dyn Storage>) -> Result<(), String> {
    let header = Header::read(&**storage).map_err(|error| error.to_string())?;
    let report =
        qcow2::check::check(storage, &header, None, Repair::None).map_err(|error| error.to_string())?;
    if report.corruptions > 0 || report.check_errors > 0 { Err(format!("{report:#?}")) } else { Ok(()) }
}

#[test]
fn every_moment_of_a_random_workload_survives_a_power_cut() {
    let mut tried = 0;
    for (name, options) in kinds() {
        for seed in 0..4 {
            let ops = workload(&options, seed, 30);
            let (storage, history) = record(&options, &ops);
            assert!(storage.changes() > 0);
            for image in storage.images(150, seed) {
                tried += 1;
                if let Err(wrong) = survives(&image, &history) {
                    panic!(
                        "{name}, seed {seed}, {}, marks {:?}:\n{wrong}\n{ops:#?}",
                        image.description, image.marks
                    );
                }
            }
        }
    }
    assert!(tried > 1000, "only {tried} images were tried");
}

/// Small enough that every subset can be tried: the first write to an empty image, and an overwrite of zeros.
#[test]
fn every_subset_of_a_first_write() {
    for (name, options) in kinds() {
        let c = 1u64 << options.cluster_bits;
        for ops in [
            vec![Op::Write { offset: c + 7, len: 300, byte: 1 }],
            vec![
                Op::Write { offset: 0, len: c, byte: 1 },
                Op::Flush,
                Op::Zero { offset: 0, len: c, unmap: true },
            ],
            vec![
                Op::Compressed { offset: 0, len: c, byte: 2 },
                Op::Flush,
                Op::Write { offset: 5, len: 5, byte: 3 },
            ],
            vec![
                Op::Write { offset: 0, len: c, byte: 1 },
                Op::Flush,
                Op::Discard { offset: 0, len: c },
                Op::Write { offset: 2 * c, len: c, byte: 4 },
            ],
        ] {
            let ops = if options.luks.is_some() { Ops(ops).uncompressed() } else { Ops(ops) };
            let (storage, history) = record(&options, &ops);
            for image in storage.images(250, 1) {
                if let Err(wrong) = survives(&image, &history) {
                    panic!("{name}, {}, marks {:?}:\n{wrong}\n{ops:#?}", image.description, image.marks);
                }
            }
        }
    }
}

/// A refcount table that outgrows its cluster moves: before that and after it, never in between.
#[test]
fn a_moving_refcount_table_survives_a_power_cut() {
    let mut options = CreateOptions::new(3 << 20);
    (options.cluster_bits, options.refcount_order) = (9, 6);
    // With 64-bit counters and clusters of 512 bytes, one cluster of table counts 2 MiB of file.
    let nearly = Arc::new(block::mem::MemStorage::from_bytes(created(&options.clone().into())));
    let disk = open(Arc::clone(&nearly) as Arc<dyn Storage>, true).unwrap();
    disk.write_at(&vec![1; 1_900_000], 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let table_before = Header::read(&*nearly).unwrap().refcount_table_offset;
    let mut ops = vec![Op::Write { offset: 0, len: 700, byte: 3 }, Op::Flush];
    ops.extend((0..20).map(|n| Op::Write { offset: 1_920_000 + n * 10_000, len: 10_000, byte: 2 }));
    ops.push(Op::Flush);
    let (storage, history) = record_on(nearly.to_bytes(), &Ops(ops));
    let after = block::mem::MemStorage::from_bytes(storage.to_bytes());
    assert_ne!(Header::read(&after).unwrap().refcount_table_offset, table_before, "the table has not moved");
    for image in storage.images(1500, 7) {
        if let Err(wrong) = survives(&image, &history) {
            panic!("{}, marks {:?}:\n{wrong}", image.description, image.marks);
        }
    }
}

/// The n-th call to the disk fails, for every n: the error reaches the caller, nothing is corrupted, what was
/// flushed before is there, and when the disk works again the image can be used.
#[test]
fn every_nth_call_fails() {
    for (name, options) in kinds() {
        for errno in [Errno::EIO, Errno::ENOSPC] {
            let ops = workload(&options, 99, 14);
            for n in 0.. {
                let memory: Arc<dyn Storage> =
                    Arc::new(block::mem::MemStorage::from_bytes(created(&options)));
                let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory)));
                let disk = open(Arc::clone(&faulty) as Arc<dyn Storage>, true).unwrap();
                faulty.fail(Fault::nth(n, errno).on_changes());
                let story = format!("{name}: {errno} at call {n}\n{ops:#?}");
                let (states, failed) = run_failing(&*disk, &ops, &options);
                faulty.heal();
                let history = History { states };
                let bytes = read_all(&*disk)
                    .unwrap_or_else(|error| panic!("{story}: reading after the fault: {error}"));
                if let Some(at) = history.first_wrong(history.states.len() - 2, &bytes) {
                    panic!("{story}: byte {at:#x} is wrong after the fault");
                }
                disk.write_at(&[0x66; 2000], 1000)
                    .unwrap_or_else(|error| panic!("{story}: writing after the fault: {error}"));
                disk.close().unwrap_or_else(|error| panic!("{story}: closing after the fault: {error}"));
                drop(disk);
                no_corruption(&memory).unwrap_or_else(|error| panic!("{story}: {error}"));
                if !failed {
                    break;
                }
                assert!(n < 2000, "{story}: the workload never ends");
            }
        }
    }
}

/// Carries out the operations until one fails; returns the states and whether one failed. The last two
/// states bracket the failed operation, each byte of which may have happened or not.
fn run_failing(disk: &dyn BlockDevice, ops: &Ops, options: &CreateOptions) -> (Vec<Model>, bool) {
    let mut model = Model::new(options.size);
    let mut states = vec![model.clone(), model.clone()];
    for op in &ops.0 {
        let result = op.device(disk);
        op.model(&mut model);
        states.push(model.clone());
        if result.is_err() {
            return (states, true);
        }
    }
    states.push(model);
    (states, disk.flush().is_err())
}

/// A disk that fills up in the middle of a large write, and one that is full from the start.
#[test]
fn a_full_disk_keeps_what_is_there() {
    for (name, options) in kinds() {
        let image = created(&options);
        for room in [0, 512, 4096, 40_000] {
            let memory: Arc<dyn Storage> = Arc::new(block::mem::MemStorage::from_bytes(image.clone()));
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory)));
            let disk = open(Arc::clone(&faulty) as Arc<dyn Storage>, true).unwrap();
            disk.write_at(&[5; 512], 0).unwrap();
            disk.flush().unwrap();
            faulty.limit_room(memory.len().unwrap() + room);
            let size = usize::try_from(options.size - 4096).unwrap();
            let error = disk.write_at(&vec![6; size], 4096).expect_err("there is no room for that");
            assert_eq!(error.kind(), block::ErrorKind::NoSpace, "{name}: {error}");
            let _ = disk.flush();
            faulty.heal();
            let mut first = [0; 512];
            disk.read_at(&mut first, 0).unwrap();
            assert_eq!(first, [5; 512], "{name}, room {room}");
            disk.write_at(&vec![6; size], 4096).unwrap();
            disk.close().unwrap();
            drop(disk);
            no_corruption(&memory).unwrap_or_else(|wrong| panic!("{name}, room {room}: {wrong}"));
        }
    }
}

/// Growing (which moves the L1 table), shrinking and preallocating, interrupted anywhere: the disk has the old
/// size or the new one, and what lies in both is as it was.
#[test]
fn resizing_survives_a_power_cut() {
    for (name, options) in kinds() {
        let (small, half, large) = (options.size, options.size / 2, options.size * 6);
        let storage = Arc::new(CrashStorage::new(created(&options)));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>, true).unwrap();
        let fill = vec![0x4d; usize::try_from(small).unwrap()];
        disk.write_at(&fill, 0).unwrap();
        disk.flush().unwrap();
        storage.mark(1);
        disk.resize(large, Preallocation::Metadata).unwrap();
        storage.mark(2);
        disk.write_at(&[0x4e; 3000], large - 5000).unwrap();
        disk.flush().unwrap();
        disk.resize(half, Preallocation::Off).unwrap();
        storage.mark(3);
        disk.close().unwrap();
        drop(disk);
        let storage = Arc::into_inner(storage).unwrap();
        for image in storage.images(300, 3) {
            let sizes: &[u64] = match image.marks.last() {
                None => &[small],
                Some(1) => &[small, large],
                Some(2) => &[large, half],
                _ => &[half],
            };
            let wrong = resized_correctly(&image, sizes, half);
            assert!(wrong.is_ok(), "{name}, {}, marks {:?}:\n{wrong:?}", image.description, image.marks);
        }
    }
}

/// The image has one of these sizes, and its first `kept` bytes are there once they have been flushed.
fn resized_correctly(image: &CrashImage, sizes: &[u64], kept: u64) -> Result<(), String> {
    let storage: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
    if !Header::read(&*storage).map_err(|error| error.to_string())?.has(incompatible::DIRTY) {
        no_corruption(&storage)?;
    }
    let disk = open(Arc::clone(&storage), true).map_err(|error| error.to_string())?;
    if !sizes.contains(&disk.size()) {
        return Err(format!("the disk has {} bytes, not one of {sizes:?}", disk.size()));
    }
    let bytes = read_all(&*disk).map_err(|error| error.to_string())?;
    let kept = usize::try_from(kept).unwrap();
    if !image.marks.is_empty() && bytes[..kept].iter().any(|&byte| byte != 0x4d) {
        return Err("flushed data is gone".to_owned());
    }
    if let Some(at) = bytes.iter().position(|byte| ![0, 0x4d, 0x4e].contains(byte)) {
        return Err(format!("byte {at:#x} is {:#04x}, which nobody wrote", bytes[at]));
    }
    disk.close().map_err(|error| error.to_string())?;
    drop(disk);
    no_corruption(&storage)
}
