//! A LUKS container is a disk like any other, and never anything but noise in the file.

use block::mem::MemStorage;
use block::testing::{Model, Op};
use proptest::prelude::*;

use super::*;
use crate::luks::{CreateOptions, create};
use crate::{Algorithm, CipherSpec, IvGenerator, Mode};

fn container(mode: Mode, len: u64) -> Arc<MemStorage> {
    let spec = CipherSpec { algorithm: Algorithm::Aes128, mode, iv: IvGenerator::Plain64 };
    let options = CreateOptions { spec, iter_time: 0, ..CreateOptions::default() };
    let created = create(&options, b"pw").unwrap();
    let storage = MemStorage::from_bytes(created.prefix);
    storage.set_len(created.header.payload_offset + len).unwrap();
    Arc::new(storage)
}

/// All zeros, with the model of it.
fn zeroed(mode: Mode, len: u64) -> (Luks, Model) {
    let luks = Luks::open(container(mode, len) as _, b"pw").unwrap();
    luks.write_zeroes_at(0, len, ZeroMode::UNMAP).unwrap();
    let model = Model::new(len);
    model.compare(&luks).unwrap();
    (luks, model)
}

#[test]
fn it_is_a_disk() {
    for (seed, mode) in (0..).zip([Mode::Xts, Mode::Cbc, Mode::Ctr, Mode::Ecb]) {
        let (luks, mut model) = zeroed(mode, 300 << 10);
        for op in Op::sequence(80, 300 << 10, seed) {
            op.run(&luks).unwrap();
            model.apply(&op);
            model.compare(&luks).unwrap();
        }
        assert_eq!(
            luks.read_at(&mut [0; 2], (300 << 10) - 1).unwrap_err().kind(),
            block::ErrorKind::OutOfRange
        );
        // Again from the file.
        let again = Luks::open(Arc::clone(&luks.storage), b"pw").unwrap();
        model.compare(&again).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_is_a_disk_whatever_is_done(raw in prop::collection::vec(any::<[u64; 3]>(), 1..30)) {
        const SIZE: u64 = 40_000 / 512 * 512;
        let (luks, mut model) = zeroed(Mode::Xts, SIZE);
        for raw in raw {
            let op = Op::from_raw(raw, SIZE);
            op.run(&luks).unwrap();
            model.apply(&op);
            prop_assert!(model.compare(&luks).is_ok());
        }
    }
}

/// Many write parts of the same sectors at once; nobody's bytes are lost.
#[test]
fn neighbours_in_a_sector_do_not_hurt_each_other() {
    let (luks, _) = zeroed(Mode::Cbc, 4096);
    std::thread::scope(|scope| {
        for writer in 0..4_u8 {
            let luks = &luks;
            scope.spawn(move || {
                for round in 0..100_u8 {
                    for place in 0..32 {
                        let at = u64::from(writer) * 32 + place * 128;
                        luks.write_at(&[writer ^ round; 32], at).unwrap();
                        let mut seen = [0; 32];
                        luks.read_at(&mut seen, at).unwrap();
                        assert_eq!(seen, [writer ^ round; 32]);
                    }
                }
            });
        }
    });
}

#[test]
fn what_is_not_open_is_not_shown() {
    let storage = container(Mode::Xts, 1000);
    let locked = Luks::open_locked(Arc::clone(&storage) as _).unwrap();
    assert_eq!((locked.size(), locked.info().unwrap().encrypted), (1024, true));
    locked.read_at(&mut [0; 512], 0).unwrap_err();
    locked.write_at(&[0; 512], 0).unwrap_err();
    let error = Luks::open(Arc::clone(&storage) as _, b"no").unwrap_err();
    assert_eq!(error.to_string(), "Invalid password, cannot unlock any keyslot");
    storage.set_len(locked.header().payload_offset - 512).unwrap();
    let error = Luks::open(storage, b"pw").unwrap_err();
    assert_eq!(error.to_string(), "Could not refresh total sector count: Input/output error");
}

#[test]
fn the_size_follows_a_resize_and_no_zeros_are_seen_in_the_file() {
    let (luks, _) = zeroed(Mode::Xts, 4096);
    luks.resize(8192, Preallocation::Full).unwrap();
    assert_eq!((luks.size(), luks.storage.len().unwrap()), (8192, luks.payload_offset + 8192));
    let mut sector = [1; 512];
    luks.storage.read_at(&mut sector, luks.payload_offset).unwrap();
    assert!(sector.iter().filter(|byte| **byte == 0).count() < 50);
    let extent = luks.layer_extent(100, u64::MAX).unwrap();
    assert_eq!(extent, LayerExtent::new(Stored::Data, 8092));
    luks.resize(512, Preallocation::Off).unwrap();
    assert_eq!(luks.size(), 512);
    assert!(luks.resize(u64::MAX - 5, Preallocation::Off).is_err());
}
