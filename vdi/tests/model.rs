//! The disk against a plain array of bytes: random writes, zeros, discards, flushes and reopens over all kinds of image.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{Model, Op, Random};
use block::{BlockDevice, Storage};
use proptest::prelude::*;
use vdi::{Header, Vdi, check};

#[derive(Debug, Clone)]
struct Shape {
    sectors: u64,
    block_bits: u32,
    parent: Option<u64>,
    fixed: bool,
}

fn shape() -> impl Strategy<Value = Shape> {
    let parent = proptest::option::of(0..400_000u64);
    (1..700u64, 9..=18u32, parent, proptest::bool::weighted(0.1)).prop_map(
        |(sectors, block_bits, parent, fixed)| Shape {
            sectors,
            block_bits,
            parent: parent.filter(|_| !fixed),
            fixed,
        },
    )
}

struct Bench {
    storage: Arc<dyn Storage>,
    parent: Option<Arc<dyn BlockDevice>>,
    vdi: Option<Vdi>,
    model: Model,
}

impl Bench {
    fn new(shape: &Shape) -> Self {
        let size = shape.sectors * 512;
        let bytes = if shape.fixed {
            let storage = MemStorage::new();
            let options = vdi::create::CreateOptions { size, fixed: true, ..Default::default() };
            vdi::create::create(&storage, &options).unwrap();
            storage.to_bytes()
        } else {
            common::forge(size, 1 << shape.block_bits, shape.parent.is_some())
        };
        let mut shown = vec![0; usize::try_from(size).unwrap()];
        let parent = shape.parent.map(|len| {
            let mut contents = vec![0; usize::try_from(len).unwrap()];
            Random::new(77).fill(&mut contents);
            let there = contents.len().min(shown.len());
            shown[..there].copy_from_slice(&contents[..there]);
            common::disk(contents)
        });
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(bytes));
        let mut bench = Self { storage, parent, vdi: None, model: Model::from_bytes(shown) };
        bench.reopen(true);
        bench
    }

    /// Closes the image, checks it, and opens it again.
    fn reopen(&mut self, writable: bool) {
        if let Some(vdi) = self.vdi.take() {
            vdi.close().unwrap();
        }
        let header = Header::read(&*self.storage).unwrap();
        let report = check::check(&self.storage, &header, Repair::None).unwrap();
        assert!(report.is_clean(), "{report:?}");
        self.vdi = Some(common::open(&self.storage, self.parent.clone(), writable).unwrap());
    }

    fn apply(&mut self, op: &Op) {
        if *op == Op::Reopen {
            self.reopen(true);
        }
        op.run(self.vdi.as_ref().unwrap()).unwrap();
        self.model.apply(op);
        judge_extents(self);
    }
}

/// The extents of a disk cover it, and what they say of zeros is true.
fn judge_extents(bench: &Bench) {
    let vdi = bench.vdi.as_ref().unwrap();
    let mut at = 0;
    while at < vdi.size() {
        let found = block::extent::extent(vdi, at, u64::MAX - at).unwrap();
        assert!(found.len >= 1 && found.end() <= vdi.size());
        if found.zero {
            let mut bytes = vec![1; usize::try_from(found.len).unwrap()];
            vdi.read_at(&mut bytes, at).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0), "{found:?}");
        }
        at = found.end();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn it_shows_what_was_written(shape in shape(), raw in proptest::collection::vec(any::<[u64; 3]>(), 1..50)) {
        let mut bench = Bench::new(&shape);
        for raw in raw {
            let op = Op::from_raw(raw, shape.sectors * 512);
            bench.apply(&op);
        }
        bench.model.compare(bench.vdi.as_ref().unwrap()).unwrap();
        judge_extents(&bench);
        bench.reopen(false);
        bench.model.compare(bench.vdi.as_ref().unwrap()).unwrap();
        judge_extents(&bench);
    }
}

/// Every byte of the disk is written by one of several threads, piece by piece in no order.
#[test]
fn threads_do_not_disturb_each_other() {
    const SIZE: u64 = 1 << 20;
    for child in [false, true] {
        let parent = || child.then(|| common::disk(vec![7; 1 << 20]));
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(common::forge(SIZE, 4096, child)));
        let vdi = common::open(&storage, parent(), true).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let vdi = &vdi;
                scope.spawn(move || {
                    let step = usize::from(thread) * 2 + 5;
                    for turn in 0..4096usize {
                        // A quarter of each run of 256 bytes belongs to each thread.
                        let place = (turn * step) % 4096;
                        let offset = place as u64 * 256 + u64::from(thread) * 64;
                        vdi.write_at(&[thread + 1; 64], offset).unwrap();
                        if turn % 1000 == 0 {
                            vdi.flush().unwrap();
                        }
                    }
                });
            }
        });
        vdi.close().unwrap();
        drop(vdi);
        let vdi = common::open(&storage, parent(), false).unwrap();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        vdi.read_at(&mut bytes, 0).unwrap();
        let wrong = bytes.iter().enumerate().find(|(at, byte)| usize::from(**byte) != at / 64 % 4 + 1);
        assert_eq!(wrong, None);
    }
}

/// What was set aside in an order lies in that order, and what was not used is given back.
#[test]
fn places_follow_the_order_in_which_they_were_set_aside() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(common::forge(1 << 20, 65536, false)));
    let before = storage.len().unwrap();
    let vdi = common::open(&storage, None, true).unwrap();
    vdi.reserve(0, 1 << 20).unwrap();
    vdi.write_at(&[2; 10], 65536).unwrap();
    vdi.write_at(&[1; 10], 0).unwrap();
    vdi.flush().unwrap();
    let place = |at| vdi.layer_extent(at, 1).unwrap().host_offset.unwrap();
    assert!(place(0) < place(65536));
    vdi.close().unwrap();
    assert_eq!(storage.len().unwrap(), before + 2 * 65536);
    drop(vdi);
    let header = Header::read(&*storage).unwrap();
    assert_eq!(header.allocated, 2);
}

/// The last block of a disk, and the one before it, are what they are.
#[test]
fn the_extents_end_where_the_map_changes() {
    for written in 0..4u64 {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(common::forge(4 * 512, 512, false)));
        let vdi = common::open(&storage, None, true).unwrap();
        vdi.write_at(&[1; 512], written * 512).unwrap();
        let mut lens = vec![];
        let mut at = 0;
        while at < vdi.size() {
            let found = vdi.layer_extent(at, u64::MAX).unwrap();
            assert_eq!(found.stored == block::Stored::Data, at == written * 512);
            lens.push(found.len);
            at += found.len;
        }
        let expected = [written * 512, 512, (3 - written) * 512];
        assert_eq!(lens, expected.into_iter().filter(|len| *len > 0).collect::<Vec<_>>());
    }
}

/// A block that is known to be zeros hides its parent's, and one that nobody has touched does not.
#[test]
fn zeros_hide_the_parent() {
    let mut bytes = common::forge(4096, 512, true);
    bytes[512..516].copy_from_slice(&0xffff_fffeu32.to_le_bytes());
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(bytes));
    let vdi = common::open(&storage, Some(common::disk(vec![7; 4096])), true).unwrap();
    let mut shown = vec![1; 1024];
    vdi.read_at(&mut shown, 0).unwrap();
    assert_eq!(shown, [vec![0; 512], vec![7; 512]].concat());
    let before = storage.len().unwrap();
    vdi.write_zeroes_at(512, 1024, block::ZeroMode::ALLOCATE).unwrap();
    vdi.close().unwrap();
    assert_eq!(storage.len().unwrap(), before, "no space is taken for zeros");
    vdi.read_at(&mut shown, 512).unwrap();
    assert_eq!(shown, vec![0; 1024]);
}

/// Every session that changes an image gives it another state, which its children would notice; reading does not.
#[test]
fn the_uuid_of_the_state_changes_with_the_contents() {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(common::forge(1 << 20, 65536, false)));
    let state = || Header::read(&*storage).unwrap();
    let first = state();
    common::open(&storage, None, true).unwrap().close().unwrap();
    assert_eq!(state(), first);
    let vdi = common::open(&storage, None, true).unwrap();
    vdi.write_at(&[1], 5).unwrap();
    vdi.flush().unwrap();
    let second = state();
    vdi.write_at(&[2], 6).unwrap();
    vdi.close().unwrap();
    assert_eq!(state(), second);
    assert!(second.modified != first.modified && second.uuid == first.uuid);
}
