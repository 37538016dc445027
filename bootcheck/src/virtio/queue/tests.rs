use proptest::prelude::*;

use super::*;
use crate::virtio::driver::*;

const SIZE: u16 = 8;

fn ring() -> (Queue, Driver) {
    let ram = GuestRam::new(1 << 20).unwrap();
    let mut queue = Queue::new(SIZE);
    (queue.descriptors, queue.driver, queue.device) = (DESCRIPTORS, AVAILABLE, USED);
    queue.enabled = true;
    queue.indirect = true;
    (queue, Driver::new(ram, SIZE))
}

/// The contents of a chain's readable part.
fn contents(chain: &Chain, ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(chain.readable_len()).unwrap()];
    chain.reader().read(ram, &mut bytes).unwrap();
    bytes
}

#[test]
fn requests_come_out_in_order_and_go_back() {
    let (mut queue, mut driver) = ring();
    let ram = driver.ram.clone();
    assert_eq!(queue.pop(&ram).unwrap(), None);
    for round in 0..100u32 {
        driver.put(BUFFERS, &round.to_le_bytes());
        let head = driver.chain(&[(BUFFERS, 2, false), (BUFFERS + 2, 2, false), (BUFFERS + 16, 8, true)]);
        let chain = queue.pop(&ram).unwrap().unwrap();
        assert_eq!(contents(&chain, &ram), round.to_le_bytes());
        chain.writer().write(&ram, &[7; 8]).unwrap();
        queue.push(&ram, chain.head, 8).unwrap();
        assert!(queue.wants_interrupt(&ram).unwrap());
        assert!(!queue.wants_interrupt(&ram).unwrap(), "nothing new");
        assert_eq!(driver.returned(), [(u32::from(head), 8)]);
    }
    assert_eq!(driver.get(BUFFERS + 16, 8), [7; 8]);
}

#[test]
fn indirect_tables_are_chains_too() {
    let (mut queue, mut driver) = ring();
    let ram = driver.ram.clone();
    driver.put(BUFFERS, b"indirect");
    driver.indirect(0x8000, &[(BUFFERS, 3, false), (BUFFERS + 3, 5, false), (BUFFERS + 32, 1, true)]);
    let chain = queue.pop(&ram).unwrap().unwrap();
    assert_eq!((contents(&chain, &ram), chain.writable_len()), (b"indirect".to_vec(), 1));
    assert_eq!(chain.last_writable(), Some(BUFFERS + 32));
}

#[test]
fn hostile_chains_are_errors() {
    let cases: [(&str, &[Descriptor], RingError); 8] = [
        ("loop", &[(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)], RingError::TooLong),
        ("itself", &[(BUFFERS, 1, NEXT, 0)], RingError::TooLong),
        ("outside the table", &[(BUFFERS, 1, NEXT, 8)], RingError::Descriptor { index: 8, size: 8 }),
        ("order", &[(BUFFERS, 1, NEXT | WRITE, 1), (BUFFERS, 1, 0, 0)], RingError::Order),
        ("large", &[(BUFFERS, u32::MAX, NEXT, 1), (BUFFERS, 1, 0, 0)], RingError::TooLarge),
        ("odd table", &[(0x8000, 24, INDIRECT, 0)], RingError::IndirectLength(24)),
        ("empty table", &[(0x8000, 0, INDIRECT, 0)], RingError::IndirectLength(0)),
        (
            "more after a table",
            &[(0x8000, 16, INDIRECT | NEXT, 1), (BUFFERS, 1, 0, 0)],
            RingError::IndirectPlace,
        ),
    ];
    for (name, table, error) in cases {
        let (mut queue, mut driver) = ring();
        for (index, descriptor) in (0..).zip(table) {
            driver.descriptor(DESCRIPTORS, index, *descriptor);
        }
        driver.publish(0);
        assert_eq!(queue.pop(&driver.ram), Err(error), "{name}");
    }
}

#[test]
fn hostile_rings_are_errors() {
    let (mut queue, mut driver) = ring();
    driver.descriptor(0x8000, 0, (0x8000, 16, INDIRECT, 0));
    driver.descriptor(DESCRIPTORS, 0, (0x8000, 16, INDIRECT, 0));
    driver.publish(0);
    assert_eq!(queue.pop(&driver.ram), Err(RingError::IndirectPlace), "nested");

    let (mut queue, mut driver) = ring();
    driver.publish(SIZE);
    assert_eq!(queue.pop(&driver.ram), Err(RingError::Descriptor { index: 8, size: 8 }));

    let (mut queue, driver) = ring();
    driver.put(AVAILABLE + 2, &9u16.to_le_bytes());
    assert_eq!(queue.pop(&driver.ram), Err(RingError::Available { count: 9, size: 8 }));

    for address in [0x10_0000, u64::MAX - 1, u64::MAX, 0xfffff, 3] {
        let (mut queue, mut driver) = ring();
        driver.chain(&[(BUFFERS, 1, false)]);
        queue.driver = address;
        assert!(matches!(queue.pop(&driver.ram), Err(RingError::Outside(_))), "{address:#x}");
        queue.device = address;
        queue.push(&driver.ram, 0, 0).unwrap_err();
        queue.enable_notifications(&driver.ram).unwrap_err();
    }
}

#[test]
fn without_indirect_tables_accepted_there_are_none() {
    let (mut queue, mut driver) = ring();
    queue.indirect = false;
    driver.indirect(0x8000, &[(BUFFERS, 1, false)]);
    assert_eq!(queue.pop(&driver.ram), Err(RingError::IndirectPlace));
}

#[test]
fn event_indices_say_when_to_interrupt_and_when_to_notify() {
    let (mut queue, mut driver) = ring();
    queue.event_idx = true;
    let ram = driver.ram.clone();
    // The driver wants to hear of the third request.
    driver.put(AVAILABLE + 4 + 2 * u64::from(SIZE), &2u16.to_le_bytes());
    let mut interrupts = vec![];
    for _ in 0..5 {
        driver.chain(&[(BUFFERS, 1, true)]);
        let chain = queue.pop(&ram).unwrap().unwrap();
        queue.push(&ram, chain.head, 1).unwrap();
        interrupts.push(queue.wants_interrupt(&ram).unwrap());
    }
    assert_eq!(interrupts, [false, false, true, false, false]);
    assert!(!queue.enable_notifications(&ram).unwrap());
    assert_eq!(driver.get(USED + 4 + 8 * u64::from(SIZE), 2), [5, 0], "avail_event");
    driver.chain(&[(BUFFERS, 1, true)]);
    assert!(queue.enable_notifications(&ram).unwrap(), "one has come in the meantime");
}

#[test]
fn sizes_that_a_queue_cannot_have_are_ignored() {
    let mut queue = Queue::new(16);
    for (size, expected) in [(0, 16), (3, 16), (32, 16), (4, 4)] {
        queue.set_size(size);
        assert_eq!(queue.size, expected);
    }
}

proptest! {
    #[test]
    fn any_split_of_the_same_bytes_is_the_same_request(
        bytes in proptest::collection::vec(any::<u8>(), 1..200),
        cuts in proptest::collection::vec(1usize..60, 1..8),
        indirect in any::<bool>(),
    ) {
        let (mut queue, mut driver) = ring();
        let ram = driver.ram.clone();
        let (mut buffers, mut at) = (vec![], 0usize);
        for (i, cut) in (0u64..).zip(cuts.iter().chain([&usize::MAX])) {
            let piece = &bytes[at..bytes.len().min(at.saturating_add(*cut))];
            at += piece.len();
            let address = BUFFERS + 0x1000 * i + 1;
            driver.put(address, piece);
            buffers.push((address, u32::try_from(piece.len()).unwrap(), false));
        }
        buffers.truncate(usize::from(SIZE));
        let expected: usize = buffers.iter().map(|b| b.1 as usize).sum();
        if indirect { driver.indirect(0x8000, &buffers) } else { driver.chain(&buffers) };
        let chain = queue.pop(&ram).unwrap().unwrap();
        prop_assert_eq!(contents(&chain, &ram), &bytes[..expected]);
        let mut cursor = chain.reader();
        cursor.skip(expected as u64 / 2);
        let mut rest = vec![0; expected - expected / 2];
        cursor.read(&ram, &mut rest).unwrap();
        prop_assert_eq!(&rest[..], &bytes[expected / 2..expected]);
        prop_assert!(cursor.read(&ram, &mut [0]).is_err(), "the chain has an end");
    }

    /// Any table, however it is linked, is followed in bounded time and without a panic.
    #[test]
    fn any_table_ends(
        table in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..10), 8),
        inner in proptest::collection::vec((0u64..0x20_0000, any::<u32>(), 0u16..8, 0u16..70), 64),
        head in 0u16..9,
    ) {
        let (mut queue, mut driver) = ring();
        for (index, (address, len, flags, next)) in (0..).zip(table) {
            let descriptor = if flags & INDIRECT != 0 { (0x8000, len % 65 * 16, flags, next) } else { (address, len, flags, next) };
            driver.descriptor(DESCRIPTORS, index, descriptor);
        }
        for (index, descriptor) in (0..).zip(inner) {
            driver.descriptor(0x8000, index, descriptor);
        }
        driver.publish(head);
        if let Ok(Some(chain)) = queue.pop(&driver.ram) {
            let _ = chain.last_writable();
            let _ = chain.reader().read(&driver.ram, &mut [0; 64]);
            let _ = chain.writer().write(&driver.ram, &[0; 64]);
        }
    }
}
