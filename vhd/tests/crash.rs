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
