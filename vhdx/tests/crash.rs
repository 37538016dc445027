//! Loss of power at any moment, and a host that fails: the image opens, its log is replayed, what was flushed is
//! there, and the structures check clean.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashImage, CrashStorage, Fault, FaultStorage, Model, Op, Random};
use block::{BlockDevice, Storage};
use common::{Differencing, Shape, open};
use nix::errno::Errno;
use vhdx::create::CreateOptions;
use vhdx::{OpenOptions, Source, Vhdx};

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn shapes() -> Vec<Shape> {
    let plain = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(4 << 20) };
    vec![
        Shape::Plain(plain),
        Shape::Plain(CreateOptions { block_state_zero: false, ..plain }),
        Shape::Plain(CreateOptions { fixed: true, size: 2 << 20, ..plain }),
        Shape::Differencing(Differencing { sector_size: 512, seed: 7 }),
    ]
}

/// Few and small operations, spread over the blocks.
fn workload(size: u64, seed: u64, count: usize) -> Vec<Op> {
    let mut random = Random::new(seed);
    let mut ops = vec![];
    while ops.len() < count {
        let op = Op::from_raw([random.next_u64(), random.next_u64(), random.next_u64()], size);
        match op {
            Op::Write { len, .. } if len > 100_000 => {}
            Op::Read { .. } | Op::Reopen => ops.push(Op::Flush),
            op => ops.push(op),
        }
    }
    ops
}

/// The states of the disk after each operation, the first one before any.
type History = Vec<Model>;

/// Runs a workload on a recording file. A flush that has returned leaves a mark with the number of the state.
fn record(
    file: Vec<u8>,
    parent: Option<&Arc<dyn BlockDevice>>,
    ops: &[Op],
    bytes: Vec<u8>,
) -> (CrashStorage, History) {
    let storage = Arc::new(CrashStorage::new(file));
    let image = open(&(Arc::clone(&storage) as Arc<dyn Storage>), true, parent);
    let mut states = vec![Model::from_bytes(bytes)];
    for (number, op) in (1..).zip(ops) {
        op.run(&*image).unwrap();
        let mut next = states.last().unwrap().clone();
        next.apply(op);
        states.push(next);
        if *op == Op::Flush {
            storage.mark(number);
        }
    }
    image.close().unwrap();
    storage.mark(ops.len() as u64);
    drop(image);
    (Arc::into_inner(storage).unwrap(), states)
}

/// The first byte that is neither what it was when last flushed nor what it has been since.
fn first_wrong(history: &History, from: usize, shown: &[u8]) -> Option<usize> {
    if history[from..].iter().any(|state| state.bytes() == shown) {
        return None;
    }
    (0..shown.len()).find(|&at| {
        !history[from..].iter().any(|state| state.find_difference(&shown[at..=at], at as u64).is_none())
    })
}

fn survives(
    image: &CrashImage,
    parent: Option<&Arc<dyn BlockDevice>>,
    history: &History,
) -> Result<(), String> {
    let say = |what: &str, error: block::Error| format!("{what}: {error:?}");
    let storage: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
    let from = image.marks.last().map_or(0, |mark| usize::try_from(*mark).unwrap());
    let report = vhdx::check::check(&storage, Repair::None).map_err(|error| say("check", error))?;
    if !report.is_clean() {
        return Err(format!("{report:#?}"));
    }
    let before = bytes_of(&*storage);
    // A reader replays in memory, a writer on the disk; both see the same.
    let mut seen: Vec<Vec<u8>> = vec![];
    for writable in [false, true] {
        let source = Source::read(&storage).map_err(|error| say("read", error))?;
        let disk = Vhdx::open(source, OpenOptions { writable, parent: parent.cloned() })
            .map_err(|error| say("open", error))?;
        let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
        disk.read_at(&mut bytes, 0).map_err(|error| say("read all", error))?;
        if let Some(at) = first_wrong(history, from, &bytes) {
            return Err(format!("byte {at:#x} is {:#04x}", bytes[at]));
        }
        if !writable && bytes_of(&*storage) != before {
            return Err("a reader has changed the file".to_owned());
        }
        seen.push(bytes);
        if writable {
            // And it goes on from there.
            disk.write_at(&[0x77; 1000], 300).map_err(|error| say("write afterwards", error))?;
            disk.close().map_err(|error| say("close afterwards", error))?;
        }
    }
    if seen[0] != seen[1] {
        return Err("reader and writer see different disks".to_owned());
    }
    if Source::read(&storage).map_err(|error| say("read again", error))?.has_pending_log() {
        return Err("the log is not empty after closing".to_owned());
    }
    let report = vhdx::check::check(&storage, Repair::None).map_err(|error| say("check again", error))?;
    if report.is_clean() { Ok(()) } else { Err(format!("afterwards: {report:#?}")) }
}

#[test]
fn every_moment_survives_a_power_cut() {
    let mut pending = 0;
    for shape in shapes() {
        for seed in 0..2 {
            let (storage, parent, bytes) = shape.make();
            let ops = workload(bytes.len() as u64, seed, 14);
            let (storage, history) = record(bytes_of(&*storage), parent.as_ref(), &ops, bytes);
            assert!(storage.changes() > 0);
            for image in storage.images(40, seed) {
                let file: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
                pending += usize::from(Source::read(&file).is_ok_and(|source| source.has_pending_log()));
                if let Err(wrong) = survives(&image, parent.as_ref(), &history) {
                    panic!(
                        "{shape:?}, seed {seed}, {}, marks {:?}:\n{wrong}\n{ops:#?}",
                        image.description, image.marks
                    );
                }
            }
        }
    }
    assert!(pending > 10, "only {pending} images had a log to replay");
}

/// The replay itself is interrupted, at each of its changes.
#[test]
fn a_replay_can_be_interrupted_and_repeated() {
    let (storage, _, bytes) = shapes()[0].make();
    let ops = workload(bytes.len() as u64, 5, 12);
    let (storage, history) = record(bytes_of(&*storage), None, &ops, bytes);
    let mut tried = 0;
    for image in storage.images(200, 1) {
        let file: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
        if !Source::read(&file).unwrap().has_pending_log() {
            continue;
        }
        tried += 1;
        if tried > 6 {
            break;
        }
        let again = Arc::new(CrashStorage::new(image.storage.to_bytes()));
        drop(Source::read(&(Arc::clone(&again) as Arc<dyn Storage>)).unwrap().replay().unwrap());
        for twice in Arc::into_inner(again).unwrap().images(15, 2) {
            let twice = CrashImage { marks: image.marks.clone(), ..twice };
            survives(&twice, None, &history)
                .unwrap_or_else(|wrong| panic!("{}, then {}: {wrong}", image.description, twice.description));
        }
    }
    assert!(tried > 2);
}

/// A host that fails at the n-th change, and recovers: nothing that was flushed is lost, and going on works.
#[test]
fn a_failing_host_costs_what_was_not_flushed_and_nothing_else() {
    for shape in shapes() {
        for nth in (0..40).step_by(3) {
            let (file, parent, bytes) = shape.make();
            let memory = Arc::new(MemStorage::from_bytes(bytes_of(&*file)));
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory) as _));
            let storage: Arc<dyn Storage> = Arc::clone(&faulty) as Arc<dyn Storage>;
            let image = open(&storage, true, parent.as_ref());
            faulty.fail(Fault::nth(nth, Errno::EIO).on_changes().torn());
            let mut states = vec![Model::from_bytes(bytes)];
            let mut flushed = 0;
            for op in workload(image.size(), nth, 12) {
                let done = op.run(&*image);
                let mut next = states.last().unwrap().clone();
                next.apply(&op);
                states.push(next);
                match done {
                    Ok(()) if op == Op::Flush => flushed = states.len() - 1,
                    Ok(()) => {}
                    // A write that failed may have happened or not, and so may its parts.
                    Err(_) => op.run(&*image).unwrap_or_else(|error| panic!("{op:?} again: {error}")),
                }
            }
            image.close().or_else(|_| image.close()).unwrap();
            drop(image);
            let storage: Arc<dyn Storage> = memory;
            let image = open(&storage, false, parent.as_ref());
            let mut read = vec![0; usize::try_from(image.size()).unwrap()];
            image.read_at(&mut read, 0).unwrap();
            let last = states.len() - 1;
            assert!(flushed <= last);
            assert_eq!(states[last].find_difference(&read, 0), None, "{shape:?}, failure {nth}");
            let report = vhdx::check::check(&storage, Repair::None).unwrap();
            assert!(report.is_clean(), "{shape:?}, failure {nth}: {report:?}");
        }
    }
}

/// Several threads write, each to sectors of its own in everybody's blocks, and one of them flushes. After a loss of
/// power every sector has what it had when a flush began that was promised, or something newer.
#[test]
fn what_was_flushed_survives_beside_other_threads() {
    use std::sync::atomic::{AtomicU8, Ordering};
    for child in [false, true] {
        const COUNT: usize = 24;
        let place = |sector: usize| sector as u64 % 8 * 512 + sector as u64 / 8 % 3 * (1 << 20);
        let shape = &shapes()[usize::from(child)];
        let (made, parent, _) = shape.make();
        let storage = Arc::new(CrashStorage::new(bytes_of(&*made)));
        let file: Arc<dyn Storage> = Arc::clone(&storage) as _;
        let image = open(&file, true, parent.as_ref());
        let done: Vec<AtomicU8> = (0..COUNT).map(|_| AtomicU8::new(0)).collect();
        let promised = std::sync::Mutex::new(vec![vec![0u8; COUNT]]);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let (image, done, promised, storage) = (&image, &done, &promised, &storage);
                scope.spawn(move || {
                    let mut random = Random::new(thread as u64);
                    for turn in 1..=60u8 {
                        let sector = usize::try_from(random.below(COUNT as u64 / 4)).unwrap() * 4 + thread;
                        image.write_at(&[turn; 512], place(sector)).unwrap();
                        done[sector].store(turn, Ordering::SeqCst);
                        if turn % 10 == 0 && thread < 2 {
                            let seen = done.iter().map(|byte| byte.load(Ordering::SeqCst)).collect();
                            image.flush().unwrap();
                            let mut promised = promised.lock().unwrap();
                            storage.mark(promised.len() as u64);
                            promised.push(seen);
                        }
                    }
                });
            }
        });
        let promised = promised.into_inner().unwrap();
        for crashed in storage.images(40, 3) {
            let (marks, description) = (crashed.marks.clone(), crashed.description.clone());
            let file: Arc<dyn Storage> = crashed.storage;
            let image = open(&file, marks.len() % 2 == 0, parent.as_ref());
            for sector in 0..COUNT {
                let least = marks.iter().map(|mark| promised[usize::try_from(*mark).unwrap()][sector]).max();
                let mut shown = [0; 512];
                image.read_at(&mut shown, place(sector)).unwrap();
                let all = least.unwrap_or(0)..=done[sector].load(Ordering::SeqCst);
                assert!(
                    shown.iter().all(|byte| all.contains(byte)),
                    "{description}: {sector}: {all:?} {shown:?}"
                );
            }
        }
    }
}
