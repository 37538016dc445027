use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use proptest::prelude::*;

use super::*;
use crate::virtio::common::{STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET};
use crate::virtio::driver::*;
use crate::virtio::{Common, Interrupt};

const SECTORS: u64 = 64;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Interrupt for Counter {
    fn queue(&self, _index: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn config(&self) {
        self.0.fetch_add(1000, Ordering::Relaxed);
    }
}

struct Bench {
    blk: Arc<Blk>,
    storage: Arc<MemStorage>,
    common: Common,
    driver: Driver,
    interrupts: Arc<Counter>,
}

fn device(bytes: &[u8], read_only: bool) -> (Arc<MemStorage>, Disk) {
    let storage = Arc::new(MemStorage::from_bytes(bytes.to_vec()));
    let device = Arc::new(Raw::open(Arc::clone(&storage) as _, RawOptions::default()).unwrap());
    (storage, Disk { device, read_only, serial: "vimg-test".into() })
}

fn pattern() -> Vec<u8> {
    (0..SECTORS * SECTOR).map(|i| (i / SECTOR).to_le_bytes()[0]).collect()
}

fn bench_with(read_only: bool) -> Bench {
    let (storage, disk) = device(&pattern(), read_only);
    let blk = Arc::new(Blk::new(disk, 1));
    let ram = GuestRam::new(1 << 20).unwrap();
    let interrupts = Arc::new(Counter::default());
    let common = Common::new(Arc::clone(&blk) as _, ram.clone(), Arc::clone(&interrupts) as _).unwrap();
    let bench = Bench { blk, storage, common, driver: Driver::new(ram, QUEUE_SIZE), interrupts };
    bench.start();
    bench
}

fn bench() -> Bench {
    bench_with(false)
}

impl Bench {
    fn start(&self) {
        self.common.select_driver_features(0);
        self.common
            .set_driver_features(low_u32(self.common.features() & 0xffff_ffff & !crate::virtio::F_EVENT_IDX));
        self.common.select_driver_features(1);
        self.common.set_driver_features(1);
        self.common.set_status(3 | STATUS_FEATURES_OK);
        assert_eq!(self.common.status() & STATUS_FEATURES_OK, STATUS_FEATURES_OK);
        let mut queue = self.common.selected_queue().unwrap();
        (queue.descriptors, queue.driver, queue.device) = (DESCRIPTORS, AVAILABLE, USED);
        queue.enabled = true;
        drop(queue);
        self.common.set_status(3 | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.driver.put(HEADER, &bytes);
        self.driver.put(STATUS, &[0xee]);
    }

    /// One request with these data buffers; the status, and the length that is returned.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS, 1, true));
        self.driver.chain(&buffers);
        self.serve();
        let returned = self.driver.returned();
        assert_eq!(returned.len(), 1);
        (self.driver.get(STATUS, 1)[0], returned[0].1)
    }

    fn serve(&self) {
        self.common.serve_queue(0, &mut vec![]);
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn reads_and_writes_reach_the_disk() {
    let mut b = bench();
    assert_eq!(b.request(IN, 5, &[(DATA, 512, true), (DATA + 4096, 512, true)]), (STATUS_OK, 1025));
    assert_eq!((b.driver.get(DATA, 512), b.driver.get(DATA + 4096, 512)), (vec![5; 512], vec![6; 512]));
    b.driver.put(DATA, &[0xab; 1024]);
    assert_eq!(b.request(OUT, 62, &[(DATA, 1024, false)]), (STATUS_OK, 1));
    assert_eq!(b.storage.to_bytes()[62 * 512..], [0xab; 1024]);
    assert_eq!(b.request(FLUSH, 0, &[]), (STATUS_OK, 1));
    let activity = b.blk.activity();
    assert_eq!((activity.reads, activity.read_bytes, activity.sectors_read), (1, 1024, Some((5, 6))));
    assert_eq!(
        (activity.writes, activity.written_bytes, activity.sectors_written),
        (1, 1024, Some((62, 63)))
    );
    assert_eq!((activity.flushes, activity.errors, activity.first_error), (1, 0, None));
    assert_eq!(b.interrupts.0.load(Ordering::Relaxed), 3);
}

#[test]
fn what_lies_past_the_end_is_an_error_that_is_remembered() {
    let mut b = bench();
    for (sector, len) in
        [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)]
    {
        assert_eq!(b.request(IN, sector, &[(DATA, len, true)]), (STATUS_IOERR, 1), "{sector}+{len}");
        assert_eq!(b.request(OUT, sector, &[(DATA, len, false)]), (STATUS_IOERR, 1), "{sector}+{len}");
    }
    assert_eq!(b.storage.to_bytes(), pattern());
    let activity = b.blk.activity();
    assert_eq!(activity.errors, 10);
    assert!(activity.first_error.unwrap().contains("sectors 64 to 65"));
    assert_eq!(b.common.status() & STATUS_NEEDS_RESET, 0);
}

#[test]
fn buffers_outside_memory_and_the_wrong_way_round_are_errors() {
    let mut b = bench();
    assert_eq!(b.request(IN, 0, &[(0x10_0000, 512, true)]), (STATUS_IOERR, 1));
    assert_eq!(b.request(OUT, 0, &[(u64::MAX - 100, 512, false)]), (STATUS_IOERR, 1));
    // A write whose data is writable has no data; so has a read whose data is readable.
    assert_eq!(b.request(OUT, 3, &[(DATA, 512, true)]), (STATUS_OK, 1));
    assert_eq!(b.request(IN, 3, &[(DATA, 512, false)]), (STATUS_OK, 1));
    assert_eq!(b.storage.to_bytes(), pattern());
}

#[test]
fn any_split_of_header_data_and_status_is_legal() {
    let mut b = bench();
    b.header(IN, 7);
    b.driver.chain(&[
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (DATA, 100, true),
        (DATA + 100, 413, true),
    ]);
    b.serve();
    assert_eq!(b.driver.returned(), [(0, 513)]);
    assert_eq!(b.driver.get(DATA, 513), [&[7; 512][..], &[STATUS_OK]].concat());
}

#[test]
fn discards_and_zeros_take_several_segments() {
    let mut b = bench();
    let segment = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    b.driver.put(DATA, &[segment(2, 1, 1), segment(9, 2, 0)].concat());
    assert_eq!(b.request(WRITE_ZEROES, 0, &[(DATA, 32, false)]), (STATUS_OK, 1));
    let bytes = b.storage.to_bytes();
    assert_eq!((bytes[1024], bytes[9 * 512], bytes[10 * 512], bytes[11 * 512]), (0, 0, 0, 11));
    b.driver.put(DATA, &segment(20, 4, 0));
    assert_eq!(b.request(DISCARD, 0, &[(DATA, 16, false)]), (STATUS_OK, 1));
    assert_eq!(b.blk.activity().discards, 1);
    for bad in [segment(60, 5, 0), segment(0, 1, 2), segment(u64::MAX, 1, 0), segment(0, u32::MAX, 0)] {
        b.driver.put(DATA, &bad);
        assert_eq!(b.request(DISCARD, 0, &[(DATA, 16, false)]).0, STATUS_IOERR);
        assert_eq!(b.request(WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, STATUS_IOERR);
    }
    assert_eq!(b.request(DISCARD, 0, &[(DATA, 15, false)]).0, STATUS_IOERR);
    assert_eq!(b.request(DISCARD, 0, &[]).0, STATUS_IOERR);
}

#[test]
fn the_serial_number_and_unknown_requests() {
    let mut b = bench();
    assert_eq!(b.request(GET_ID, 0, &[(DATA, 20, true)]), (STATUS_OK, 21));
    assert_eq!(b.driver.get(DATA, 20), *b"vimg-test\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(b.request(99, 0, &[]), (STATUS_UNSUPP, 1));
}

#[test]
fn a_read_only_disk_is_announced_and_stays_as_it_is() {
    let mut b = bench_with(true);
    assert_eq!(b.blk.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(b.request(OUT, 0, &[(DATA, 512, false)]).0, STATUS_IOERR);
    assert_eq!(b.request(IN, 1, &[(DATA, 512, true)]).0, STATUS_OK);
    assert_eq!(b.request(FLUSH, 0, &[]).0, STATUS_OK);
    assert_eq!(b.storage.to_bytes(), pattern());
}

#[test]
fn a_broken_ring_needs_a_reset_and_then_works_again() {
    let mut b = bench();
    b.driver.publish(QUEUE_SIZE);
    b.serve();
    assert_eq!(b.common.status() & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
    assert_eq!(b.interrupts.0.load(Ordering::Relaxed), 1000, "the driver is told");
    assert_eq!(
        b.common.fault(),
        Some(RingError::Descriptor { index: QUEUE_SIZE, size: u32::from(QUEUE_SIZE) })
    );
    b.common.set_status(3 | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    assert_eq!(b.common.status() & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET, "only a reset helps");
    b.common.set_status(0);
    b.driver.put(AVAILABLE, &[0; 4]);
    b.driver.put(USED, &[0; 4]);
    b.driver = Driver::new(b.driver.ram.clone(), QUEUE_SIZE);
    b.start();
    assert_eq!(b.request(IN, 1, &[(DATA, 512, true)]).0, STATUS_OK);
}

#[test]
fn a_chain_without_room_for_the_status_breaks_the_ring() {
    for buffers in [
        &[(HEADER, 16, false)][..],
        &[(HEADER, 16, false), (DATA, 0, true)],
        &[(HEADER, 16, false), (u64::MAX, 1, true)],
    ] {
        let mut b = bench();
        b.header(FLUSH, 0);
        b.driver.chain(buffers);
        b.serve();
        assert_eq!(b.common.status() & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
    }
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let b = bench();
    b.common.set_status(0);
    for (low, high) in [(1 << 31, 1), (0, 0), (0, 3)] {
        b.common.select_driver_features(0);
        b.common.set_driver_features(low);
        b.common.select_driver_features(1);
        b.common.set_driver_features(high);
        b.common.set_status(3 | STATUS_FEATURES_OK);
        assert_eq!(b.common.status(), 3, "{low:#x} {high:#x}");
        b.common.set_status(0);
    }
}

#[test]
fn without_a_flush_there_is_no_write_cache() {
    let (_, disk) = device(&pattern(), false);
    let blk = Blk::new(disk, 1);
    blk.accepted(F_FLUSH);
    assert!(blk.write_cache());
    blk.accepted(0);
    assert!(!blk.write_cache());
    blk.accepted(F_FLUSH | F_CONFIG_WCE);
    blk.config_write(CONFIG_WRITEBACK, &[0]);
    assert!(!blk.write_cache());
}

#[test]
fn the_configuration_tells_the_capacity() {
    let (_, disk) = device(&pattern(), false);
    let blk = Blk::new(disk, 3);
    let mut config = [0xff; 64];
    blk.config_read(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    blk.config_read(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    assert_eq!(blk.features() & F_MQ, F_MQ);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a vector that is a perfect disk.
    #[test]
    fn random_requests_agree_with_a_vector(
        requests in proptest::collection::vec((0u32..3, 0..SECTORS + 2, 0u32..9, any::<u8>(), any::<bool>()), 1..40),
    ) {
        let mut b = bench();
        let mut model = pattern();
        for (kind, sector, count, fill, indirect) in requests {
            let (start, len) = (to_usize(sector) * 512, count as usize * 512);
            let fits = start + len <= model.len();
            let writable = kind != 1;
            b.header(if kind == 2 { FLUSH } else { kind }, sector);
            b.driver.put(DATA, &vec![fill; len]);
            let half = count * 512 / 2;
            let buffers = [(HEADER, 16, false), (DATA, half, writable), (DATA + u64::from(half), count * 512 - half, writable), (STATUS, 1, true)];
            if indirect { b.driver.indirect(0x8000, &buffers) } else { b.driver.chain(&buffers) };
            b.serve();
            prop_assert_eq!(b.driver.returned().len(), 1);
            let status = b.driver.get(STATUS, 1)[0];
            prop_assert_eq!(status == STATUS_OK, fits || kind == 2);
            match kind {
                0 if fits => prop_assert_eq!(b.driver.get(DATA, len), &model[start..start + len]),
                1 if fits => model[start..start + len].fill(fill),
                _ => {}
            }
        }
        prop_assert_eq!(b.storage.to_bytes(), model);
    }
}
