//! The digests against their definition, written down a second time and slowly.

use std::sync::Arc;

use block::BlockDevice;
use proptest::prelude::*;

use super::*;
use crate::convert::testing::Fake;
use crate::progress::Quiet;

/// docs/checksum.md, word by word.
fn by_definition(disk: &[u8]) -> [u8; 32] {
    fn top(chunks: &[&[u8]]) -> [u8; 32] {
        match chunks {
            [] => sha2::Sha256::of(&[]),
            [chunk] => sha2::Sha256::of(&[&[0], chunk]),
            _ => {
                let left = chunks.len().next_power_of_two() / 2;
                sha2::Sha256::of(&[&[1], &top(&chunks[..left]), &top(&chunks[left..])])
            }
        }
    }
    let chunks: Vec<&[u8]> = disk.chunks(4 << 20).collect();
    sha2::Sha256::of(&[&[2], &(disk.len() as u64).to_be_bytes(), &top(&chunks)])
}

fn tree_of(device: Arc<dyn BlockDevice>, threads: usize) -> [u8; 32] {
    let source = Source::new([device]).unwrap();
    let meter = Meter::new(&Quiet, source.size());
    tree::digest::<sha2::Sha256>(&source, threads, &meter).unwrap()
}

fn linear_of(device: Arc<dyn BlockDevice>, threads: usize) -> [u8; 32] {
    let len = device.size();
    let source = Source::new([device]).unwrap();
    let meter = Meter::new(&Quiet, source.size());
    linear::digest(&source, len, threads, &meter).unwrap()
}

#[test]
fn trees_of_every_number_of_leaves_are_those_of_the_definition() {
    for count in 0..70_u64 {
        let mut tree = tree::Tree::<sha2::Sha256>::new();
        tree.push_zeros(count);
        let digests: Vec<[u8; 32]> =
            vec![sha2::Sha256::of(&[&[0], &vec![0; 4 << 20][..]]); usize::try_from(count).unwrap().min(1)];
        let leaf = digests.first().copied().unwrap_or_default();
        fn top(leaf: [u8; 32], count: u64) -> [u8; 32] {
            match count {
                0 => sha2::Sha256::of(&[]),
                1 => leaf,
                _ => {
                    let left = count.next_power_of_two() / 2;
                    sha2::Sha256::of(&[&[1], &top(leaf, left), &top(leaf, count - left)])
                }
            }
        }
        assert_eq!(tree.top(), top(leaf, count), "{count} leaves");
    }
}

#[test]
fn the_largest_disk_costs_nothing() {
    let started = std::time::Instant::now();
    tree_of(Arc::new(Fake::sized(60 << 40)), 2);
    tree_of(Arc::new(Fake::sized((1 << 62) + 512)), 2);
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

#[test]
fn digests_are_read_as_they_are_written() {
    for algorithm in Algorithm::ALL {
        let digest = Digest { algorithm, bytes: sha2::Sha256::of(&[b"x"]) };
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
    }
    for wrong in ["", "abc", "tree-md5:00", &"0".repeat(63), &"g".repeat(64), &"0".repeat(66)] {
        assert_eq!(Digest::parse(wrong), None, "{wrong}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn disks_of_any_contents(
        len in 0_usize..20 << 20,
        runs in prop::collection::vec((0_usize..20 << 20, 1_usize..6 << 20, any::<u8>()), 0..4),
        threads in 1_usize..5,
    ) {
        let mut bytes = vec![0_u8; len];
        for (start, run, byte) in runs {
            let start = start.min(len);
            let end = (start + run).min(len);
            bytes[start..end].fill(byte);
        }
        let device = Fake::with(bytes.clone());
        prop_assert_eq!(linear_of(Arc::clone(&device) as _, threads), sha2::Sha256::of(&[&bytes]));
        bytes.resize(len.next_multiple_of(512), 0);
        prop_assert_eq!(tree_of(device, threads), by_definition(&bytes));
    }
}
