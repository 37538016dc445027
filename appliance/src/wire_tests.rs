//! The language: what is written is read back, and nothing else is.

use proptest::prelude::*;

use crate::wire::*;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..20)
}

fn attributes() -> impl Strategy<Value = WireAttributes> {
    let xattrs = prop::collection::vec((bytes(), bytes()), 0..3);
    (any::<u32>(), any::<u32>(), any::<u32>(), any::<Option<i64>>(), xattrs)
        .prop_map(|(mode, uid, gid, mtime, xattrs)| WireAttributes { mode, uid, gid, mtime, xattrs })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        any::<bool>().prop_map(|follow| Action::Stat { follow }),
        Just(Action::ReadLink),
        any::<(u64, u32)>().prop_map(|(offset, len)| Action::Read { offset, len }),
        any::<u64>().prop_map(|skip| Action::List { skip }),
        any::<bool>().prop_map(|create| Action::Open { create }),
        bytes().prop_map(|bytes| Action::Append { bytes }),
        prop::option::of(attributes()).prop_map(|attributes| Action::Close { attributes }),
        attributes().prop_map(|attributes| Action::MakeDirectory { attributes }),
        (bytes(), attributes()).prop_map(|(target, attributes)| Action::Symlink { target, attributes }),
        Just(Action::Remove),
        bytes().prop_map(|name| Action::GetXattr { name }),
        Just(Action::ListXattrs),
        (bytes(), bytes()).prop_map(|(name, value)| Action::SetXattr { name, value }),
        Just(Action::Free),
        Just(Action::Sync),
        (prop::collection::vec(bytes(), 0..3), prop::collection::vec((bytes(), bytes()), 0..3), any::<u64>())
            .prop_map(|(words, environment, limit_seconds)| Action::Run {
                words,
                environment,
                limit_seconds
            }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Hello),
        (any::<u64>(), any::<u32>(), any::<bool>(), ".*", ".*").prop_map(
            |(disk, partition, read_only, kind, options)| {
                Request::Mount(MountRequest { disk, partition, kind, read_only, options })
            }
        ),
        any::<u64>().prop_map(|mount| Request::Unmount { mount }),
        (any::<u64>(), bytes(), action()).prop_map(|(mount, path, action)| Request::Act {
            mount,
            path,
            action
        }),
        Just(Request::PowerOff),
    ]
}

/// What is written is read back, and is not read if anything is missing or too much.
#[track_caller]
fn round_trip<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
    let payload = message.encode();
    assert_eq!(M::decode(&payload).as_ref(), Ok(message));
    for len in 0..payload.len() {
        assert_eq!(M::decode(&payload[..len]), Err(Nonsense), "{len} of {}", payload.len());
    }
    let more = [&payload[..], &[0]].concat();
    assert_eq!(M::decode(&more), Err(Nonsense));
}

fn nothing_panics(payload: &[u8]) {
    drop(Request::decode(payload));
    drop(Hello::decode(payload));
    drop(Listing::decode(payload));
    drop(Names::decode(payload));
    drop(Maybe::decode(payload));
    drop(Ran::decode(payload));
    drop(Failure::decode(payload));
    let _ = (Room::decode(payload), WireStat::decode(payload), Number::decode(payload));
}

proptest! {
    #[test]
    fn requests_are_read_back(request in request()) {
        round_trip(&request);
    }

    #[test]
    fn damaged_payloads_panic_nowhere(request in request(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut payload = request.encode();
        let at = at.index(payload.len());
        payload[at] = with;
        nothing_panics(&payload);
    }

    #[test]
    fn any_bytes_panic_nowhere(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        nothing_panics(&payload);
    }

    /// However the stream is cut and whatever is between them, bells are found and nothing of the rest is lost.
    #[test]
    fn bells_are_found(
        parts in prop::collection::vec((prop::collection::vec(0_u8..5, 0..12), any::<[u32; 3]>()), 0..6),
        cut in 1_usize..40,
    ) {
        let (mut stream, mut bells, mut noise) = (Vec::<u8>::new(), vec![], Vec::<u8>::new());
        for (between, [id, len, crc]) in &parts {
            stream.extend(between);
            noise.extend(between);
            let bell = Bell { id: *id, status: id % 2, len: len % (WINDOW + 1), crc: *crc };
            stream.extend(bell.encode());
            bells.push(bell);
        }
        let (mut found, mut rest, mut scanner) = (vec![], Vec::<u8>::new(), Scanner::default());
        for piece in stream.chunks(cut) {
            scanner.push(piece, |bell| found.push(bell), |bytes| rest.extend(bytes));
        }
        prop_assert_eq!(found, bells);
        prop_assert_eq!(rest, noise);
    }
}

#[test]
fn answers_are_read_back() {
    round_trip(&Number(u64::MAX));
    round_trip(&Maybe(None));
    round_trip(&Maybe(Some(b"value".to_vec())));
    round_trip(&Names(vec![b"user.a".to_vec(), vec![]]));
    round_trip(&Room { free_bytes: 1, total_bytes: 2, free_inodes: Some(3) });
    round_trip(&Room { free_bytes: 1, total_bytes: 2, free_inodes: None }.clone());
    round_trip(&WireStat { mode: 1, uid: 2, gid: 3, size: 4, mtime: -5, links: 6, inode: 7 });
    round_trip(&Listing { entries: vec![(b"name".to_vec(), 0o100_000)], more: true });
    round_trip(&Ran { code: Some(3), timed_out: false, output: b"text".to_vec() });
    round_trip(&Failure { errno: 28, message: "No space left on device".to_owned() });
    round_trip(&Hello {
        version: VERSION,
        release: "6.1".to_owned(),
        disks: vec![(0, 1 << 40)],
        file_systems: vec!["xfs".to_owned()],
        notes: vec![],
    });
}

#[test]
fn the_checksum_is_the_usual_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    assert_eq!(crc32(b""), 0);
    assert_eq!(crc32(b"The quick brown fox jumps over the lazy dog"), 0x414f_a339);
}

#[test]
fn a_bell_with_one_wrong_bit_is_none() {
    let good = Bell { id: 1, status: 0, len: 20, crc: 3 }.encode();
    for bit in 0..BELL_BYTES * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Bell::decode(&bad), None, "bit {bit}");
    }
    // And one that promises more than there is room for is none either.
    assert_eq!(Bell::decode(&Bell { id: 1, status: 0, len: WINDOW + 1, crc: 3 }.encode()), None);
}

#[test]
fn a_count_cannot_make_us_allocate() {
    let mut payload = u64::MAX.to_le_bytes().to_vec();
    payload.extend([0; 100]);
    assert_eq!(Names::decode(&payload), Err(Nonsense));
}
