//! Amending: random lives against an array of bytes, and a loss of power or a failing disk at every point of it.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashImage, CrashStorage, Fault, FaultStorage};
use block::{BlockDevice as _, Result, Storage, ZeroMode};
use nix::errno::Errno;
use proptest::prelude::*;
use qcow2::amend::{Amendment, amend};
use qcow2::create::{CreateOptions, create};
use qcow2::{Header, OpenOptions, Qcow2};

/// What lies behind the images of these tests.
const BEHIND: u8 = 0xb5;

fn backing(len: usize) -> Option<Arc<dyn block::BlockDevice>> {
    let options = block::raw::RawOptions { offset: 0, size: None };
    let bytes = Arc::new(MemStorage::from_bytes(vec![BEHIND; len]));
    (len > 0).then(|| Arc::new(block::raw::Raw::open(bytes, options).unwrap()) as Arc<dyn block::BlockDevice>)
}

fn options(behind: usize) -> OpenOptions {
    OpenOptions { writable: true, backing: backing(behind), ..OpenOptions::default() }
}

fn open(storage: &Arc<dyn Storage>, behind: usize) -> Result<Arc<Qcow2>> {
    Qcow2::open(Arc::clone(storage), Header::read(&**storage)?, options(behind))
}

fn change(storage: &Arc<dyn Storage>, behind: usize, amendment: &Amendment) -> Result<()> {
    amend(storage, options(behind), amendment, &mut |_, _| Ok(())).map(drop)
}

fn bytes_of(image: &Qcow2) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn check(storage: &Arc<dyn Storage>, leaks_too: bool) {
    let header = Header::read(&**storage).unwrap();
    let report = qcow2::check::check(storage, &header, None, Repair::None).unwrap();
    assert!(report.corruptions == 0 && report.check_errors == 0, "{report:#?}");
    assert!(!leaks_too || report.leaks == 0, "{report:#?}");
}

/// An image with data, zeros of both kinds and holes, over a backing file or nothing, with a long name in its header.
fn filled(cluster_bits: u32, version: u32, behind: usize, name: usize) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
    let create_options = CreateOptions {
        cluster_bits,
        version,
        backing_file: (behind > 0).then(|| vec![b'n'; name]),
        backing_format: (behind > 0).then(|| b"raw".to_vec()),
        ..CreateOptions::new(64 << cluster_bits)
    };
    create(&*storage, &create_options).unwrap();
    let image = open(&storage, behind).unwrap();
    let c = 1u64 << cluster_bits;
    image.write_at(&vec![3; usize::try_from(9 * c).unwrap()], c / 2).unwrap();
    image.write_zeroes_at(3 * c, 2 * c, ZeroMode::ALLOCATE).unwrap();
    image.write_zeroes_at(6 * c, 2 * c, ZeroMode::UNMAP).unwrap();
    image.write_zeroes_at(40 * c, 5 * c, ZeroMode::UNMAP).unwrap();
    image.close().unwrap();
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The amendments that crash and fault tests go through, each with the version that it starts from.
fn amendments() -> Vec<(u32, Amendment)> {
    let amendment = Amendment::default;
    vec![
        (3, Amendment { refcount_order: Some(0), ..amendment() }),
        (3, Amendment { refcount_order: Some(6), ..amendment() }),
        (2, Amendment { version: Some(3), ..amendment() }),
        (
            2,
            Amendment {
                version: Some(3),
                refcount_order: Some(3),
                lazy_refcounts: Some(true),
                ..amendment()
            },
        ),
        (3, Amendment { version: Some(2), ..amendment() }),
        (3, Amendment { lazy_refcounts: Some(true), ..amendment() }),
    ]
}

/// Sizes of what lies behind, and of its name: none, and a header that takes one sector or more.
const KINDS: [(u32, usize, usize); 4] =
    [(9, 0, 0), (9, 100_000, 30), (13, 1_000_000, 30), (13, 1_000_000, 420)];

#[test]
fn every_moment_of_an_amendment_survives_a_power_cut() {
    let mut tried = 0;
    for (cluster_bits, behind, name) in KINDS {
        for (version, amendment) in amendments() {
            let before = filled(cluster_bits, version, behind, name);
            let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(before.clone()));
            let disk = bytes_of(&open(&storage, behind).unwrap()).unwrap();
            let recorder = Arc::new(CrashStorage::new(before));
            let storage = Arc::clone(&recorder) as Arc<dyn Storage>;
            change(&storage, behind, &amendment).unwrap();
            drop(storage);
            let recorder = Arc::into_inner(recorder).unwrap();
            for image in recorder.images(150, 5) {
                // Two long headers of different versions have to pass through a state with neither's names.
                tried += 1;
                let story = format!("{cluster_bits} {name} {amendment:?}: {}", image.description);
                survives(&image, behind, name, &disk, &story);
            }
        }
    }
    assert!(tried > 500, "only {tried} images were tried");
}

fn survives(image: &CrashImage, behind: usize, name: usize, disk: &[u8], story: &str) {
    let storage: Arc<dyn Storage> = Arc::clone(&image.storage) as Arc<dyn Storage>;
    let header = Header::read(&*storage).unwrap_or_else(|error| panic!("{story}: {error}"));
    assert_eq!(
        header.backing_file.map_or(0, |found| found.len()),
        name,
        "{story}: the name of the backing file"
    );
    check(&storage, false);
    let opened = open(&storage, behind).unwrap_or_else(|error| panic!("{story}: {error}"));
    assert!(bytes_of(&opened).unwrap() == disk, "{story}: the disk is another");
    opened.write_at(&[0x77; 1000], 300).unwrap_or_else(|error| panic!("{story}: {error}"));
    opened.close().unwrap();
    drop(opened);
    check(&storage, false);
}

#[test]
fn every_nth_call_fails() {
    for (cluster_bits, behind, name) in KINDS {
        for (version, amendment) in amendments() {
            let before = filled(cluster_bits, version, behind, name);
            for n in 0.. {
                let memory: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(before.clone()));
                let disk = bytes_of(&open(&memory, behind).unwrap()).unwrap();
                let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory)));
                faulty.fail(Fault::nth(n, Errno::EIO).on_changes());
                let result = change(&(Arc::clone(&faulty) as Arc<dyn Storage>), behind, &amendment);
                faulty.heal();
                check(&memory, false);
                let image = open(&memory, behind).unwrap();
                assert!(bytes_of(&image).unwrap() == disk, "{amendment:?}: call {n}: the disk is another");
                image.close().unwrap();
                if result.is_ok() {
                    break;
                }
                assert!(n < 500, "{amendment:?} never ends");
            }
        }
    }
}

#[test]
fn an_interrupted_change_of_width_leaves_nothing() {
    let before = filled(9, 3, 0, 0);
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(before.clone()));
    let amendment = Amendment { refcount_order: Some(6), ..Amendment::default() };
    let mut calls = 0;
    let stopped = amend(&storage, options(0), &amendment, &mut |done, total| {
        calls += 1;
        assert!(done <= total);
        if calls > 1 { Err(block::Error::new(block::ErrorKind::Cancelled, "stop")) } else { Ok(()) }
    });
    assert_eq!(stopped.unwrap_err().kind(), block::ErrorKind::Cancelled);
    let mut after = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut after, 0).unwrap();
    assert!(after == before, "something has changed");
}

#[derive(Debug, Clone)]
enum Op {
    Write { at: u32, len: u32, byte: u8 },
    Zero { at: u32, len: u32, unmap: bool },
    Amend(Amendment),
}

fn op() -> impl Strategy<Value = Op> {
    let place = (any::<u32>(), 1..60_000u32);
    let amendment = (
        proptest::option::of(2..=3u32),
        proptest::option::of(0..=6u32),
        proptest::option::of(any::<bool>()),
        proptest::option::weighted(0.3, (1..600u64).prop_map(|sectors| sectors * 512)),
    );
    prop_oneof![
        3 => (place.clone(), any::<u8>()).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => (place, any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero { at, len, unmap }),
        3 => amendment.prop_map(|(version, refcount_order, lazy_refcounts, size)| {
            Op::Amend(Amendment { version, refcount_order, lazy_refcounts, size, ..Amendment::default() })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_life_leaves_the_bytes_of_the_model(
        cluster_bits in prop_oneof![Just(9u32), Just(12), Just(16)],
        behind in prop_oneof![Just(0usize), Just(150_000)],
        ops in proptest::collection::vec(op(), 1..16),
    ) {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
        let size = 200_704;
        create(&*storage, &CreateOptions { cluster_bits, ..CreateOptions::new(size) }).unwrap();
        let mut model = vec![BEHIND; behind];
        model.resize(usize::try_from(size).unwrap(), 0);
        for op in ops {
            match op {
                Op::Amend(amendment) => live_on(&storage, behind, &amendment, &mut model),
                other => {
                    let image = open(&storage, behind).unwrap();
                    touch(&image, &other, &mut model);
                    image.close().unwrap();
                }
            }
            check(&storage, true);
            let image = open(&storage, behind).unwrap();
            prop_assert!(bytes_of(&image).unwrap() == model, "the disk is another");
        }
    }
}

fn touch(image: &Qcow2, op: &Op, model: &mut [u8]) {
    let range = |at: u32, len: u32| {
        let at = at as usize % model.len();
        at..(at + len as usize).min(model.len())
    };
    match *op {
        Op::Write { at, len, byte } => {
            let range = range(at, len);
            image.write_at(&vec![byte; range.len()], range.start as u64).unwrap();
            model[range].fill(byte);
        }
        Op::Zero { at, len, unmap } => {
            let range = range(at, len);
            let mode = if unmap { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
            image.write_zeroes_at(range.start as u64, range.len() as u64, mode).unwrap();
            model[range].fill(0);
        }
        Op::Amend(_) => {}
    }
}

/// Amends, and if that is refused expects that nothing has changed.
fn live_on(storage: &Arc<dyn Storage>, behind: usize, amendment: &Amendment, model: &mut Vec<u8>) {
    let before = Header::read(&**storage).unwrap();
    match change(storage, behind, amendment) {
        Ok(()) => {
            let after = Header::read(&**storage).unwrap();
            assert_eq!(after.version, amendment.version.unwrap_or(before.version));
            assert_eq!(after.refcount_order, amendment.refcount_order.unwrap_or(before.refcount_order));
            if let Some(size) = amendment.size {
                model.resize(usize::try_from(size).unwrap(), 0);
            }
        }
        Err(error) => {
            assert_eq!(error.kind(), block::ErrorKind::Usage, "{error}");
            assert_eq!(Header::read(&**storage).unwrap(), before);
        }
    }
}

/// A run of clusters that takes more than one refcount block counts: of an L1 table, or of a LUKS header.
#[test]
fn tables_may_be_longer_than_a_refcount_block_counts() {
    for order in [4, 6] {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
        let small = CreateOptions { cluster_bits: 9, refcount_order: order, ..CreateOptions::new(1 << 20) };
        create(&*storage, &small).unwrap();
        let image = open(&storage, 0).unwrap();
        image.write_at(&[7; 5000], 1000).unwrap();
        image.add_luks_header(b"a header", 2_068_480).unwrap();
        image.close().unwrap();
        drop(image);
        check(&storage, true);
        let header = Header::read(&*storage).unwrap();
        let volume = crypt::Volume::new(crypt::CipherSpec::DEFAULT, &[7; 64]).unwrap();
        let options = OpenOptions { encryption: Some(Arc::new(volume)), ..options(0) };
        let image = Qcow2::open(Arc::clone(&storage), header, options).unwrap();
        image.resize(2 << 30, block::Preallocation::Off).unwrap();
        image.write_at(&[9; 5000], (2 << 30) - 6000).unwrap();
        let mut bytes = [0; 5000];
        image.read_at(&mut bytes, (2 << 30) - 6000).unwrap();
        assert_eq!(bytes, [9; 5000]);
        image.close().unwrap();
        drop(image);
        check(&storage, true);
    }
}
