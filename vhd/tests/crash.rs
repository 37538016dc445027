//! A loss of power at any moment, and a host that fails at any moment.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashStorage, Fault, FaultStorage, Op, Random};
use block::{BlockDevice, Storage};
use nix::errno::Errno;
use vhd::{Container, DiskType, SizeRule, check};

const SIZE: u64 = 64 << 10;

/// The contents that a byte may have after a crash: what it had when a flush was promised, or any later write.
struct Allowed(Vec<Vec<u8>>);

impl Allowed {
    fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().map(|byte| vec![*byte]).collect())
    }

    fn apply(&mut self, op: &Op) {
        let mut put = |offset: u64, bytes: &[u8]| {
            let start = usize::try_from(offset).unwrap();
            self.0[start..].iter_mut().zip(bytes).for_each(|(allowed, byte)| allowed.push(*byte));
        };
        match op {
            Op::Write { offset, len, seed } => put(*offset, &Op::contents(*len, *seed)),
            Op::Zero { offset, len, .. } | Op::Discard { offset, len } => {
                put(*offset, &vec![0; usize::try_from(*len).unwrap()]);
            }
            _ => {}
        }
    }
}

fn kind(child: bool) -> DiskType {
    if child { DiskType::Differencing } else { DiskType::Dynamic }
}

/// Runs operations; at every flush the state is noted that must be there from then on.
fn crash(child: bool, seed: u64) {
    let parent = || child.then(|| common::disk(vec![7; 40 << 10]));
    let initial = common::forge(SIZE, 4096, kind(child));
    let storage = Arc::new(CrashStorage::new(initial));
    let vhd = common::open(&(Arc::clone(&storage) as _), parent(), true).unwrap();
    let shown = |vhd: &dyn BlockDevice| {
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        vhd.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let mut allowed = vec![Allowed::new(&shown(&vhd))];
    for op in Op::sequence(40, SIZE, seed) {
        op.run(&vhd).unwrap();
        allowed.iter_mut().for_each(|state| state.apply(&op));
        if op == Op::Flush {
            storage.mark(allowed.len() as u64);
            allowed.push(Allowed::new(&shown(&vhd)));
        }
    }
    for image in storage.images(400, seed) {
        let state = usize::try_from(image.marks.last().copied().unwrap_or(0)).unwrap();
        let storage: Arc<dyn Storage> = image.storage;
        let container = Container::read(&storage, SizeRule::Creator).unwrap();
        // Half of them are used as they are: a missing footer is put back by whoever writes next.
        if state % 2 == 0 {
            let report = check::check(&container, Repair::All).unwrap();
            assert_eq!(report.corruptions, 0, "{}: {report:?}", image.description);
        }
        for writable in [false, true] {
            let vhd = common::open(&storage, parent(), writable).unwrap();
            for (at, byte) in shown(&vhd).into_iter().enumerate() {
                assert!(
                    allowed[state].0[at].contains(&byte),
                    "{}: byte {at:#x} is {byte}",
                    image.description
                );
            }
            if writable {
                // A new block does not land on an old one.
                let before = shown(&vhd);
                vhd.write_at(&[0xee; 10], 3 * 4096 + 5).unwrap();
                vhd.close().unwrap();
                let mut expected = before;
                expected[3 * 4096 + 5..][..10].fill(0xee);
                assert!(shown(&vhd) == expected, "{}", image.description);
                let container = Container::read(&storage, SizeRule::Creator).unwrap();
                assert_eq!(container.warnings(), Vec::<String>::new(), "{}", image.description);
            }
        }
    }
}

#[test]
fn what_was_flushed_survives_a_loss_of_power() {
    for seed in 0..6 {
        crash(false, seed);
        crash(true, seed + 100);
    }
}

/// Each operation of the host fails in turn. What is written again afterwards is there.
#[test]
fn a_host_that_fails_leaves_an_image_that_can_be_used() {
    for n in 0..60 {
        let inner = Arc::new(MemStorage::from_bytes(common::forge(SIZE, 4096, DiskType::Dynamic)));
        let storage = Arc::new(FaultStorage::new(Arc::clone(&inner) as _));
        let vhd = common::open(&(Arc::clone(&storage) as _), None, true).unwrap();
        storage.fail(Fault::nth(n, Errno::EIO).on_changes().torn());
        let mut random = Random::new(n);
        let mut model = vec![0; usize::try_from(SIZE).unwrap()];
        for turn in 0..12u8 {
            let (offset, byte) = (random.below(SIZE - 3000), turn + 1);
            let write = || vhd.write_at(&[byte; 3000], offset);
            write().or_else(|_| write()).unwrap();
            model[usize::try_from(offset).unwrap()..][..3000].fill(byte);
            if turn % 3 == 2 {
                vhd.flush().or_else(|_| vhd.flush()).unwrap();
            }
        }
        vhd.close().or_else(|_| vhd.close()).unwrap();
        drop(vhd);
        let storage: Arc<dyn Storage> = inner;
        let container = Container::read(&storage, SizeRule::Creator).unwrap();
        let report = check::check(&container, Repair::None).unwrap();
        assert!(report.is_clean(), "fault {n}: {report:?}");
        let vhd = common::open(&storage, None, false).unwrap();
        let mut shown = vec![0; usize::try_from(SIZE).unwrap()];
        vhd.read_at(&mut shown, 0).unwrap();
        assert!(shown == model, "fault {n}");
    }
}

/// A write that failed and left half of itself behind, zeros that are the answer to it, and a later write to the same
/// block: of the first one nothing comes to light.
#[test]
fn what_a_failed_write_left_behind_is_never_seen() {
    let inner = Arc::new(MemStorage::from_bytes(common::forge(SIZE, 8192, DiskType::Dynamic)));
    let storage = Arc::new(FaultStorage::new(inner as _));
    let image = common::open(&(Arc::clone(&storage) as _), None, true).unwrap();
    // Every operation of the write in turn: the one that writes its data, too.
    for n in 0..8u64 {
        let block = n * 8192;
        storage.fail(Fault::nth(n, Errno::EIO).on_changes().torn());
        let _ = image.write_at(&[7; 4096], block);
        storage.heal();
        image.write_zeroes_at(block, 4096, block::ZeroMode::UNMAP).unwrap();
        image.write_at(&[1; 512], block + 4096).unwrap();
        let mut shown = [9; 4096];
        image.read_at(&mut shown, block).unwrap();
        assert!(shown == [0; 4096], "fault {n}");
    }
}

/// Several threads write, each to sectors of its own in everybody's blocks, and one of them flushes. After a loss of
/// power every sector has what it had when a flush began that was promised, or something newer.
#[test]
fn what_was_flushed_survives_beside_other_threads() {
    use std::sync::atomic::{AtomicU8, Ordering};
    for child in [false, true] {
        const COUNT: usize = 128;
        let place = |sector: usize| sector as u64 * 512;
        let parent = || child.then(|| common::disk(vec![0; 64 << 10]));
        let storage = Arc::new(CrashStorage::new(common::forge(SIZE, 4096, kind(child))));
        let image = common::open(&(Arc::clone(&storage) as _), parent(), true).unwrap();
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
        for crashed in storage.images(250, 3) {
            let (marks, description) = (crashed.marks.clone(), crashed.description.clone());
            let file: Arc<dyn Storage> = crashed.storage;
            let image = common::open(&file, parent(), marks.len() % 2 == 0).unwrap();
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
