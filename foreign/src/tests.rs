//! The common device, over the smallest images that show what it does. The formats themselves are judged by qemu-img,
//! in the integration suite.

use std::sync::Arc;

use block::image::{Image as _, Repair};
use block::mem::MemStorage;
use block::testing::{Fault, FaultStorage, Operation};
use block::{BlockDevice, ErrorKind, Storage, Stored, ZeroMode};
use nix::errno::Errno;

use crate::{Foreign, Format};

const CLUSTER: usize = 4096;

/// A QED image of 16 clusters: the header, L1, L2, and two clusters, of ones and twos; the third is zeros.
fn qed(backing: bool) -> Vec<u8> {
    let mut image = vec![0; 5 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QED\0");
    for (at, value) in
        [(4, CLUSTER), (8, 1), (12, 1), (16, usize::from(backing)), (40, CLUSTER), (48, 16 * CLUSTER)]
    {
        put(at, &(value as u64).to_le_bytes()[..if at < 16 { 4 } else { 8 }]);
    }
    if backing {
        put(56, &64_u32.to_le_bytes());
        put(60, &4_u32.to_le_bytes());
        put(64, b"base");
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_le_bytes());
    for (index, place) in [(0, 3 * CLUSTER), (1, 4 * CLUSTER), (2, 1)] {
        put(2 * CLUSTER + 8 * index, &(place as u64).to_le_bytes());
    }
    image[3 * CLUSTER..4 * CLUSTER].fill(1);
    image[4 * CLUSTER..].fill(2);
    image
}

fn opened(storage: Arc<dyn Storage>, backing: Option<Arc<dyn BlockDevice>>) -> block::Result<Arc<Foreign>> {
    Format::Qed.read(storage)?.open(backing, None)
}

fn memory(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(MemStorage::from_bytes(bytes))
}

fn raw(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    Arc::new(block::raw::Raw::open(memory(bytes), block::raw::RawOptions::default()).unwrap())
}

#[test]
fn reads_go_across_borders_and_through_to_the_backing_file() {
    let found = Format::Qed.read(memory(qed(true))).unwrap();
    assert_eq!(found.backing().unwrap().name, b"base");
    // The backing file ends in the middle of cluster 3.
    let disk = found.open(Some(raw(vec![9; 3 * CLUSTER + 100])), None).unwrap();
    let mut all = vec![5; 16 * CLUSTER];
    disk.read_at(&mut all, 0).unwrap();
    let parts = [(1, CLUSTER), (2, CLUSTER), (0, CLUSTER), (9, 100), (0, 13 * CLUSTER - 100)];
    let wanted: Vec<u8> = parts.into_iter().flat_map(|(byte, len)| vec![byte; len]).collect();
    assert!(all == wanted);
    let mut some = vec![5; 10_000];
    disk.read_at(&mut some, 4000).unwrap();
    assert!(some == wanted[4000..14_000]);
    assert_eq!(
        disk.read_at(&mut some, 16 * CLUSTER as u64 - 9999).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
}

#[test]
fn extents_are_as_long_as_they_can_be() {
    let disk = opened(memory(qed(false)), None).unwrap();
    let extents: Vec<_> = block::extent::extents(&*disk, 0, u64::MAX)
        .map(|e| e.unwrap())
        .map(|e| (e.stored, e.len, e.host_offset))
        .collect();
    let cluster = CLUSTER as u64;
    assert_eq!(
        extents,
        [
            (Stored::Data, 2 * cluster, Some(3 * cluster)),
            (Stored::Zero, cluster, None),
            (Stored::Absent, 13 * cluster, None)
        ]
    );
}

#[test]
fn nothing_can_be_written_or_repaired() {
    let disk = opened(memory(qed(false)), None).unwrap();
    assert!(disk.read_only());
    for refused in
        [disk.write_at(&[1], 0), disk.write_zeroes_at(0, 1, ZeroMode::UNMAP), disk.discard_at(0, 1)]
    {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    assert!(disk.check(Repair::None).unwrap().is_clean());
    assert_eq!(disk.check(Repair::All).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn what_the_file_does_not_hold_is_an_error_with_its_place() {
    for (cut, first_wrong) in [(4 * CLUSTER + 100, CLUSTER + 100), (3 * CLUSTER, 0)] {
        let disk = opened(memory(qed(false)[..cut].to_vec()), None).unwrap();
        let mut byte = [0];
        for offset in [0, CLUSTER, CLUSTER + 99, CLUSTER + 100, 2 * CLUSTER - 1] {
            let read = disk.read_at(&mut byte, offset as u64);
            assert_eq!(read.is_ok(), offset < first_wrong, "cut at {cut:#x}, read at {offset:#x}: {read:?}");
        }
        // What is whole can be read all the same.
        disk.read_at(&mut byte, 2 * CLUSTER as u64).unwrap();
        let report = disk.check(Repair::None).unwrap();
        assert!(report.corruptions > 0, "{report:?}");
    }
}

/// Whichever read fails, the error comes through, and the next attempt succeeds.
#[test]
fn failures_of_the_host_are_told() {
    let storage = Arc::new(FaultStorage::new(memory(qed(false))));
    for nth in 1..20 {
        storage.fail(Fault::nth(nth, Errno::EIO).on(&[Operation::Read]));
        let read = || {
            let disk = opened(Arc::clone(&storage) as _, None)?;
            let mut all = vec![0; 16 * CLUSTER];
            disk.read_at(&mut all, 0).map(|()| all)
        };
        match read() {
            Ok(all) => assert!(all[..CLUSTER] == [1; CLUSTER] && all[CLUSTER..2 * CLUSTER] == [2; CLUSTER]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Io, "{error}");
                read().unwrap();
            }
        }
    }
}
