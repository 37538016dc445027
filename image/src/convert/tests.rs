//! The engine against a model that is obviously right: the source's bytes are the target's bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{BlockDevice, ErrorKind, Result};
use proptest::prelude::*;

use super::testing::{Asked, Cell, Fake, layered};
use super::*;
use crate::progress::{Progress, Quiet};

const SECTOR: usize = 512;

fn source(disks: impl IntoIterator<Item = Arc<Fake>>) -> Source {
    Source::new(disks.into_iter().map(|disk| disk as Arc<dyn BlockDevice>)).unwrap()
}

fn options() -> EngineOptions {
    EngineOptions { threads: 3, chunk: Some(8192), sparse: 512, ..EngineOptions::default() }
}

fn target(size: u64, cluster: u64) -> Fake {
    Fake { size, cluster, ..Fake::default() }
}

fn convert(from: &Source, to: &Fake, options: &EngineOptions) -> Result<Tally> {
    convert_devices(from, to, options, &Quiet)
}

fn all(source: &Source) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(source.size()).unwrap()];
    source.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Sectors: nothing, explicit zeros, data that is zero, or data.
fn any_cells() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(0u8..8, 1..200),
        proptest::collection::vec((0u8..8, 1usize..60), 1..8).prop_map(|runs| runs
            .into_iter()
            .flat_map(|(kind, len)| std::iter::repeat_n(kind, len))
            .collect()),
    ]
}

fn fill(fake: &Fake, cells: &[u8]) {
    let mut map = fake.cells.lock();
    for (index, kind) in (0..).zip(cells) {
        match kind {
            0 | 1 => None,
            2 => map.insert(index, Cell::Zero),
            3 => map.insert(index, Cell::Data(vec![0; SECTOR])),
            4 => map.insert(
                index,
                Cell::Data((0..SECTOR).map(|i| u8::try_from((i * 7 + 1) % 251).unwrap()).collect()),
            ),
            kind => map.insert(index, Cell::Data(vec![*kind; SECTOR])),
        };
    }
}

fn disk(cells: &[u8], backing: Option<Arc<Fake>>) -> Arc<Fake> {
    let fake =
        Fake { backing: backing.map(|b| b as Arc<dyn BlockDevice>), ..Fake::sized(cells.len() as u64 * 512) };
    fill(&fake, cells);
    Arc::new(fake)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_target_holds_what_the_source_holds(
        (first, base, second) in (any_cells(), any_cells(), any_cells()),
        cut in 0u64..512,
        cluster in prop_oneof![Just(512u64), Just(1024), Just(4096)],
        sparse in prop_oneof![Just(0u64), Just(512), Just(1536), Just(4096), Just(65536)],
        chunk in prop_oneof![Just(512u64), Just(4096), Just(20480)],
        threads in 1usize..5,
        (unknown, ordered, compress, salvage) in any::<(bool, bool, bool, bool)>(),
    ) {
        let mut last = Arc::into_inner(disk(&second, None)).unwrap();
        last.size -= cut.min(last.size - 1);
        let from = source([disk(&first, Some(disk(&base, None))), Arc::new(last)]);
        let to = target(from.size(), cluster);
        let fresh = if unknown { Fresh::Unknown } else { Fresh::Zeros };
        if unknown {
            to.write_at(&vec![0xee; usize::try_from(to.size).unwrap()], 0).unwrap();
        }
        let options = EngineOptions { threads, chunk: Some(chunk), sparse, fresh, ordered, compress, salvage, ..options() };
        convert(&from, &to, &options).unwrap();
        prop_assert!(to.contents() == all(&from));
    }

    #[test]
    fn a_target_with_a_backing_disk_reads_the_same(
        (top, middle, base, other) in (any_cells(), any_cells(), any_cells(), any_cells()),
        cluster in prop_oneof![Just(512u64), Just(2048)],
        layers_above in prop_oneof![Just(None), Just(Some(1)), Just(Some(2))],
        (compress, keep) in any::<(bool, bool)>(),
    ) {
        let base = disk(&base, None);
        let middle = disk(&middle, Some(Arc::clone(&base)));
        let from = source([disk(&top, Some(Arc::clone(&middle)))]);
        let backing = match layers_above {
            None => disk(&other, None),
            Some(1) => middle,
            Some(_) => base,
        };
        let to = Fake { backing: Some(backing), ..target(from.size(), cluster) };
        let options = EngineOptions {
            fresh: Fresh::Backing { layers_above }, compress, sparse: if keep { 0 } else { 512 }, ..options()
        };
        convert(&from, &to, &options).unwrap();
        prop_assert!(to.contents() == all(&from));
    }

    #[test]
    fn a_fault_anywhere_surfaces_and_nothing_hangs(
        cells in any_cells(),
        (reading, at) in (any::<bool>(), 0usize..200),
        (threads, ordered, compress) in (1usize..5, any::<bool>(), any::<bool>()),
    ) {
        let offset = (at % cells.len() * SECTOR) as u64;
        let mut from = Arc::into_inner(disk(&cells, None)).unwrap();
        let mut to = target(from.size, 512);
        if reading {
            from.bad_reads = vec![(offset, None)];
        } else {
            to.bad_writes = vec![offset];
        }
        let stored = from.cells.lock().get(&(offset / 512)).cloned();
        let (from, options) = (source([Arc::new(from)]), EngineOptions { threads, ordered, compress, ..options() });
        let result = convert(&from, &to, &options);
        // Packed clusters do not go through write_at.
        let must_fail = match stored {
            Some(Cell::Data(bytes)) if reading || !compress => reading || bytes.iter().any(|byte| *byte != 0),
            _ => false,
        };
        if must_fail {
            let error = result.unwrap_err();
            let words = if reading { "error while reading at byte " } else { "error while writing at byte " };
            prop_assert!(error.to_string().starts_with(words), "{error}");
            prop_assert_eq!(error.kind(), if reading { ErrorKind::Io } else { ErrorKind::NoSpace });
        }
    }

    #[test]
    fn salvage_loses_the_bad_sectors_and_nothing_else(
        cells in any_cells(),
        bad in proptest::collection::btree_set(0usize..200, 0..5),
        threads in 1usize..4,
    ) {
        let bad: std::collections::BTreeSet<_> = bad.into_iter().map(|at| at % cells.len()).collect();
        let mut from = Arc::into_inner(disk(&cells, None)).unwrap();
        let mut expected = from.contents();
        from.bad_reads = bad.iter().map(|at| ((at * SECTOR) as u64, None)).collect();
        for at in &bad {
            expected[at * SECTOR..(at + 1) * SECTOR].fill(0);
        }
        let touched = |at: &&usize| matches!(from.cells.lock().get(&(**at as u64)), Some(Cell::Data(_)));
        let lost = bad.iter().filter(touched).count() * SECTOR;
        let (from, to) = (source([Arc::new(from)]), target((cells.len() * SECTOR) as u64, 512));
        let tally = convert(&from, &to, &EngineOptions { salvage: true, threads, ..options() }).unwrap();
        prop_assert!(to.contents() == expected);
        prop_assert_eq!(tally.losses.bytes, lost as u64);
        prop_assert_eq!(tally.losses.ranges.iter().map(|lost| lost.len).sum::<u64>(), lost as u64);
    }
}

/// Space is given out in the order of guest offsets, whichever worker is faster.
#[test]
fn reservations_come_in_order() {
    let cells: Vec<u8> = (0..2000u32).map(|i| if i % 7 == 0 { 0 } else { 5 }).collect();
    for _ in 0..20 {
        let (from, to) = (source([disk(&cells, None)]), target(2000 * 512, 512));
        convert(&from, &to, &EngineOptions { threads: 4, ..options() }).unwrap();
        let asked = to.asked.lock();
        let offsets: Vec<u64> =
            asked.iter().map(|asked| if let Asked::Reserve(at, _) = asked { *at } else { 0 }).collect();
        assert!(offsets.len() > 200 && offsets.is_sorted());
    }
}

/// Compressed clusters are packed in order, many in one call.
#[test]
fn compressed_clusters_are_written_in_order_and_together() {
    let (from, to) = (source([disk(&[5; 4096], None)]), target(4096 * 512, 512));
    convert(&from, &to, &EngineOptions { compress: true, chunk: Some(64 << 10), threads: 4, ..options() })
        .unwrap();
    let asked = to.asked.lock();
    assert_eq!(asked.len(), 32);
    assert!(asked.iter().zip(0..).all(|(asked, index)| *asked == Asked::Packed(index * (64 << 10), 128)));
}

/// A hole costs nothing, however large.
#[test]
fn an_exbibyte_of_nothing_takes_a_few_steps() {
    let huge = Arc::new(Fake { cluster: 65536, ..Fake::sized(1 << 60) });
    huge.cells.lock().insert(1 << 40, Cell::Data(vec![1; 65536]));
    let to = Fake { cluster: 65536, ..Fake::sized(1 << 60) };
    let tally = convert(&source([Arc::clone(&huge)]), &to, &EngineOptions::default()).unwrap();
    assert_eq!(tally.copied, 65536);
    assert!(huge.lookups.load(Ordering::Relaxed) < 100);
    assert_eq!(*to.cells.lock(), *huge.cells.lock());
}

/// qemu-img -B takes everything below the source's top layer for the new backing file and loses what layers in
/// between hold.
#[test]
fn a_backing_disk_further_down_the_chain_loses_nothing() {
    let base = disk(&[5, 5, 5, 5], None);
    let middle = disk(&[0, 2, 6, 0], Some(Arc::clone(&base)));
    let from = source([disk(&[7, 0, 0, 0], Some(middle))]);
    let to = Fake { backing: Some(base), ..target(2048, 512) };
    convert(&from, &to, &EngineOptions { fresh: Fresh::Backing { layers_above: Some(2) }, ..options() })
        .unwrap();
    assert_eq!(to.contents(), all(&from));
    assert_eq!(to.cells.lock().len(), 3, "the last cluster comes from the base");
}

/// A relocated copy of the backing file is recognised by its contents.
#[test]
fn an_equal_backing_disk_is_not_copied() {
    let from = source([layered(&[None, Some(9)], 8, Some(disk(&[5; 8], None)))]);
    let to = Fake { backing: Some(disk(&[5, 5, 5, 5, 5, 5, 6, 5], None)), ..target(8 * 512, 512) };
    convert(&from, &to, &EngineOptions { fresh: Fresh::Backing { layers_above: None }, ..options() })
        .unwrap();
    assert_eq!(to.contents(), all(&from));
    assert_eq!(to.cells.lock().keys().copied().collect::<Vec<_>>(), [1, 6]);
}

fn shareable(cells: &[u8]) -> Fake {
    let mut fake = Arc::into_inner(disk(cells, None)).unwrap();
    fake.host = Some(Arc::new(block::mem::MemStorage::from_bytes(fake.contents())));
    fake
}

#[test]
fn whole_blocks_are_shared_and_the_rest_is_copied() {
    let cells: Vec<u8> = [vec![5; 1001], vec![0; 303], vec![6; 50]].concat();
    let from = source([Arc::new(shareable(&cells))]);
    let to = Fake { shares: true, ..target(from.size(), 512) };
    let tally = convert(&from, &to, &options()).unwrap();
    assert_eq!(to.contents(), all(&from));
    assert_eq!(tally.shared, 1000 * 512 + 48 * 512);
    assert_eq!(tally.copied, 3 * 512);
}

#[test]
fn sharing_that_fails_is_not_tried_again() {
    let from = source([Arc::new(shareable(&[5; 1000]))]);
    let to = target(from.size(), 512);
    let tally = convert(&from, &to, &EngineOptions { threads: 1, ..options() }).unwrap();
    assert_eq!(to.contents(), all(&from));
    assert_eq!((tally.shared, tally.copied), (0, 512_000));
    let shares = to.asked.lock().iter().filter(|asked| matches!(asked, Asked::Share(..))).count();
    assert_eq!(shares, 1);
}

struct StopAfter(u64, AtomicBool);

impl Progress for StopAfter {
    fn update(&self, done: u64, _total: u64) {
        if done >= self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }
}

#[test]
fn an_interrupted_convert_stops_soon() {
    let (from, to) = (source([disk(&[5; 4000], None)]), target(4000 * 512, 512));
    let error =
        convert_devices(&from, &to, &options(), &StopAfter(100_000, AtomicBool::new(false))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(to.cells.lock().len() < 1000);
}

#[test]
fn a_panicking_device_ends_the_convert_with_an_error() {
    let (from, to) = (source([disk(&[5; 4000], None)]), target(4000 * 512, 512));
    to.panics.store(true, Ordering::Relaxed);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = convert(&from, &to, &options());
    std::panic::set_hook(hook);
    assert_eq!(result.unwrap_err().message(), "internal error: a worker thread ended unexpectedly");
}

#[test]
fn a_smaller_target_is_refused() {
    let error = convert(&source([disk(&[5; 4], None)]), &target(512, 512), &options()).unwrap_err();
    assert_eq!(error.to_string(), "output file is smaller than input file");
}

#[test]
fn places_that_cannot_be_looked_up_stop_or_are_tried() {
    let bad = || {
        let mut fake = Arc::into_inner(disk(&[0, 0, 0, 0, 5, 5, 0, 0], None)).unwrap();
        fake.bad_extents = vec![2048];
        source([Arc::new(fake)])
    };
    let error = convert(&bad(), &target(4096, 512), &options()).unwrap_err();
    assert_eq!(error.to_string(), "error while reading block status at offset 2048: Input/output error");
    let to = target(4096, 512);
    convert(&bad(), &to, &EngineOptions { salvage: true, ..options() }).unwrap();
    assert_eq!(to.contents(), all(&bad()));
}

/// A contradiction in a table concerns a whole cluster: looking at its sectors one by one is of no use.
#[test]
fn salvage_gives_up_a_cluster_whose_table_is_bad() {
    let mut from = Fake { cluster: 65536, ..Fake::sized(4 * 65536) };
    for index in 0..4 {
        from.cells.lock().insert(index, Cell::Data(vec![5; 65536]));
    }
    from.bad_reads = vec![(65536, Some(ErrorKind::Corrupt))];
    let (from, to) = (source([Arc::new(from)]), target(4 * 65536, 512));
    let tally = convert(&from, &to, &EngineOptions { salvage: true, chunk: None, ..options() }).unwrap();
    assert_eq!(tally.losses.bytes, 65536);
    assert_eq!(
        tally.losses.ranges[0].to_string(),
        "65536 bytes at offset 65536 could not be read: bad table for 65536"
    );
}

struct Totals(parking_lot::Mutex<Vec<(u64, u64)>>);

impl Progress for Totals {
    fn update(&self, done: u64, total: u64) {
        self.0.lock().push((done, total));
    }

    fn wants_estimate(&self) -> bool {
        true
    }
}

#[test]
fn progress_counts_what_there_is_to_do() {
    let (from, to) = (source([disk(&[vec![5; 100], vec![0; 900]].concat(), None)]), target(1000 * 512, 512));
    let totals = Totals(parking_lot::Mutex::default());
    convert_devices(&from, &to, &options(), &totals).unwrap();
    let totals = totals.0.into_inner();
    assert!(totals.iter().all(|(done, total)| *total == 51_200 && done <= total));
    assert_eq!((totals.first(), totals.last()), (Some(&(0, 51_200)), Some(&(51_200, 51_200))));
}
