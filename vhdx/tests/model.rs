//! The driver against a plain array of bytes, over the shapes that an image can have; and what other programs would
//! find in the file afterwards.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::sync::Arc;

use block::image::{Image as _, Repair};
use block::mem::MemStorage;
use block::testing::{Model, Op};
use block::{BlockDevice, Storage, Stored, ZeroMode};
use common::{Differencing, Shape, open};
use proptest::prelude::*;
use vhdx::Source;
use vhdx::create::{CreateOptions, create};

fn shapes() -> Vec<Shape> {
    let plain = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new((3 << 20) + 512) };
        change(&mut options);
        Shape::Plain(options)
    };
    vec![
        plain(&|_| {}),
        plain(&|o| o.fixed = true),
        plain(&|o| o.block_state_zero = false),
        plain(&|o| (o.size, o.logical_sector_size) = (3 << 20, 4096)),
        plain(&|o| o.block_size = Some(2 << 20)),
        Shape::Differencing(Differencing { sector_size: 512, seed: 1 }),
        Shape::Differencing(Differencing { sector_size: 512, seed: 2 }),
        Shape::Differencing(Differencing { sector_size: 4096, seed: 3 }),
    ]
}

fn run(shape: &Shape, raw: &[[u64; 3]]) {
    let (storage, parent, bytes) = shape.make();
    let mut image = open(&storage, true, parent.as_ref());
    let mut model = Model::from_bytes(bytes);
    for raw in raw {
        let op = Op::from_raw(*raw, image.size());
        if op == Op::Reopen {
            image.close().unwrap();
            drop(image);
            image = open(&storage, true, parent.as_ref());
        }
        op.run(&*image).unwrap();
        model.apply(&op);
        if let Op::Read { offset, len } = op {
            model.compare_range(&*image, offset, len).unwrap();
        }
    }
    model.compare(&*image).unwrap();
    walk(&*image);
    image.close().unwrap();
    drop(image);
    assert!(!Source::read(&storage).unwrap().has_pending_log(), "closed, and the log is not empty");
    let image = open(&storage, false, parent.as_ref());
    model.compare(&*image).unwrap();
    let report = image.check(Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// What extents say is what is read: places in the file, zeros, what the parent answers for.
fn walk(image: &dyn BlockDevice) {
    let mut offset = 0;
    while offset < image.size() {
        let extent = image.layer_extent(offset, u64::MAX).unwrap();
        let len = extent.len.min(1 << 20);
        let mut read = vec![0; usize::try_from(len).unwrap()];
        image.read_at(&mut read, offset).unwrap();
        let mut expected = vec![0; read.len()];
        match (extent.stored, extent.host_offset) {
            (Stored::Data, Some(host)) => image.host_storage().unwrap().read_at(&mut expected, host).unwrap(),
            (Stored::Absent, None) => {
                let parent = image.backing().map(|parent| &**parent);
                block::extent::read_backing(parent, &mut expected, offset).unwrap();
            }
            (Stored::Zero, None) => {}
            other => panic!("{other:?}"),
        }
        assert!(read == expected, "{extent:?} at {offset:#x}");
        offset += extent.len;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_is_an_array_of_bytes(
        which in 0..8usize,
        raw in proptest::collection::vec(any::<[u64; 3]>(), 1..40)
    ) {
        run(&shapes()[which], &raw);
    }
}

#[test]
fn every_shape_is_tried() {
    for (seed, shape) in (0..).zip(shapes()) {
        let mut random = block::testing::Random::new(seed);
        let raw: Vec<_> =
            (0..60).map(|_| [random.next_u64(), random.next_u64(), random.next_u64()]).collect();
        run(&shape, &raw);
    }
}

fn created(options: &CreateOptions) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*storage, options).unwrap();
    storage
}

#[test]
fn a_large_disk_opens_at_once_and_is_one_extent() {
    let options = CreateOptions { block_state_zero: false, ..CreateOptions::new(64 << 40) };
    let storage = created(&options);
    let image = open(&storage, true, None);
    assert_eq!(image.layer_extent(0, u64::MAX).unwrap().stored, Stored::Zero);
    image.write_at(b"end", (64 << 40) - 3).unwrap();
    image.close().unwrap();
    let mut end = [0; 5];
    image.read_at(&mut end, (64 << 40) - 5).unwrap();
    assert_eq!(&end, b"\0\0end");
    assert!(storage.len().unwrap() < 100 << 20);
}

#[test]
fn places_are_given_in_the_order_in_which_they_are_set_aside() {
    let options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(8 << 20) };
    let storage = created(&options);
    let image = open(&storage, true, None);
    let before = storage.len().unwrap();
    image.reserve(0, 8 << 20).unwrap();
    for block in [5, 1, 3, 0, 2, 4] {
        image.write_at(&[7; 100], block << 20).unwrap();
    }
    let extent = image.layer_extent(0, u64::MAX).unwrap();
    assert_eq!((extent.host_offset, extent.len), (Some(before), 6 << 20));
    image.close().unwrap();
    assert_eq!(storage.len().unwrap(), before + (6 << 20), "what was not used is given back");
    assert!(image.layer_extent(6 << 20, u64::MAX).unwrap().host_offset.is_none());
}

#[test]
fn only_the_first_write_changes_what_children_know_the_disk_by() {
    let storage = created(&CreateOptions::new(1 << 20));
    let id = |storage: &Arc<dyn Storage>| Source::read(storage).unwrap().data_write_guid();
    let created = id(&storage);
    let image = open(&storage, true, None);
    image.flush().unwrap();
    image.close().unwrap();
    assert_eq!(id(&storage), created, "nothing was written");
    image.write_at(&[1], 0).unwrap();
    let changed = id(&storage);
    assert_ne!(changed, created);
    image.write_at(&[1], 1).unwrap();
    image.close().unwrap();
    assert_eq!((id(&storage), image.data_write_guid()), (changed, changed));
}

/// Zeros that are asked for are zeros for every reader, not only for those that take undefined blocks for zeros.
#[test]
fn zeros_are_said_to_be_zeros() {
    let options =
        CreateOptions { block_size: Some(1 << 20), block_state_zero: false, ..CreateOptions::new(2 << 20) };
    let storage = created(&options);
    let image = open(&storage, true, None);
    image.write_zeroes_at(0, 1 << 20, ZeroMode::UNMAP.fast()).unwrap();
    image.close().unwrap();
    let mut bat = [0; 16];
    storage.read_at(&mut bat, 2 << 20).unwrap();
    assert_eq!(bat, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let storage = created(&CreateOptions::new(1 << 20));
    let image = open(&storage, false, None);
    assert!(image.read_only());
    assert_eq!(image.write_at(&[1], 0).unwrap_err().kind(), block::ErrorKind::ReadOnly);
    assert_eq!(image.write_zeroes_at(0, 1, ZeroMode::UNMAP).unwrap_err().kind(), block::ErrorKind::ReadOnly);
    assert_eq!(image.discard_at(0, 1).unwrap_err().kind(), block::ErrorKind::ReadOnly);
    image.flush().unwrap();
    image.close().unwrap();
}

/// Many threads in the same blocks at once.
#[test]
fn threads_do_not_hurt_each_other() {
    for shape in shapes() {
        let (storage, parent, bytes) = shape.make();
        let image = open(&storage, true, parent.as_ref());
        let sectors = bytes.len() / 512;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let image = &image;
                scope.spawn(move || {
                    for sector in (thread..sectors).step_by(4) {
                        let byte = u8::try_from(sector % 251).unwrap() + 1;
                        image.write_at(&[byte; 512], sector as u64 * 512).unwrap();
                        if sector % 997 == 0 {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        image.close().unwrap();
        let mut read = vec![0; bytes.len()];
        image.read_at(&mut read, 0).unwrap();
        for (sector, bytes) in read.chunks_exact(512).enumerate() {
            let byte = u8::try_from(sector % 251).unwrap() + 1;
            assert!(bytes.iter().all(|&b| b == byte), "sector {sector} of {shape:?}");
        }
    }
}

/// After a commit the parent is another one by its GUID, and the child has to know it.
#[test]
fn a_changed_parent_is_recorded() {
    let (storage, parent, bytes) = Shape::Differencing(Differencing { sector_size: 512, seed: 9 }).make();
    let image = open(&storage, true, parent.as_ref());
    image.adopt_parent(&[0x5a; 16]).unwrap();
    assert!(image.adopt_parent(&[1; 3]).is_err());
    image.close().unwrap();
    drop(image);
    let source = Source::read(&storage).unwrap();
    let locator = source.metadata().parent.clone().unwrap();
    assert_eq!(
        (locator.linkage.clone(), locator.names()),
        (vec![vhdx::Guid([0x5a; 16])], vec!["parent.vhdx".to_owned()])
    );
    Model::from_bytes(bytes).compare(&*open(&storage, false, parent.as_ref())).unwrap();
}
