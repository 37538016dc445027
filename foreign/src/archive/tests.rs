use std::io::Write as _;

use super::*;
use block::mem::MemStorage;
use block::testing::Random;
use proptest::prelude::*;

/// Bytes that deflate well, and differently everywhere.
fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![];
    while bytes.len() < len {
        let mut word = [0; 9];
        random.fill(&mut word);
        let times = usize::from(word[8] % 40) + 1;
        for _ in 0..times {
            bytes.extend(&word[..usize::from(word[7] % 8) + 1]);
        }
    }
    bytes.truncate(len);
    bytes
}

fn gzipped(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn storage(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(MemStorage::from_bytes(bytes))
}

fn all_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A header with a right checksum.
fn header(name: &[u8], flag: u8, size: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name);
    header[100..107].copy_from_slice(b"0000644");
    header[124..124 + size.len()].copy_from_slice(size);
    header[156] = flag;
    header[257..265].copy_from_slice(b"ustar\x0000");
    signed(header)
}

fn signed(mut header: Vec<u8>) -> Vec<u8> {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

fn octal(len: usize) -> Vec<u8> {
    format!("{len:011o}").into_bytes()
}

fn contents(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn member(name: &str, bytes: &[u8]) -> Vec<u8> {
    [header(name.as_bytes(), b'0', &octal(bytes.len())), contents(bytes)].concat()
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

fn opened(bytes: Vec<u8>, name: &str) -> Result<Vec<u8>> {
    open(storage(bytes), name, true).map(|found| all_of(&*found.storage))
}

fn error_of(bytes: Vec<u8>, name: &str) -> Error {
    opened(bytes, name).unwrap_err()
}

#[test]
fn members_are_windows() {
    let disk = text(100_000, 1);
    let tar = [member("vm.ovf", b"<xml/>"), member("./disk.vmdk", &disk), end()].concat();
    assert_eq!(opened(tar.clone(), "disk.vmdk").unwrap(), disk);
    assert_eq!(opened(tar.clone(), "./disk.vmdk").unwrap(), disk);
    assert_eq!(opened(tar.clone(), "vm.ovf").unwrap(), b"<xml/>");
    let found = open(storage(tar.clone()), "vm.ovf", true).unwrap();
    assert_eq!((found.storage.name().as_str(), found.slow), ("memory:vm.ovf", false));
    let mut past = [9; 10];
    found.storage.read_at(&mut past, 3).unwrap();
    assert_eq!(&past, b"l/>\0\0\0\0\0\0\0", "what follows the member is not shown");
    let error = error_of(tar, "disk");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.hints(), ["its members are: vm.ovf, disk.vmdk"]);
}

#[test]
fn long_names_come_in_three_ways() {
    let long = format!("{}/disk.raw", "folder".repeat(40));
    let gnu = [
        header(b"././@LongLink", b'L', &octal(long.len() + 1)),
        contents(&[long.as_bytes(), b"\0"].concat()),
        member("folderfolder", b"gnu"),
        end(),
    ];
    assert_eq!(opened(gnu.concat(), &long).unwrap(), b"gnu");
    let record = format!("path={long}\n");
    let record = format!("{} {record}", record.len() + 4);
    let pax =
        [header(b"pax", b'x', &octal(record.len())), contents(record.as_bytes()), member("f", b"pax"), end()];
    assert_eq!(opened(pax.concat(), &long).unwrap(), b"pax");
    let mut prefixed = header(b"disk.raw", b'0', &octal(3));
    prefixed[345..351].copy_from_slice(b"folder");
    let prefixed = [signed(prefixed), contents(b"ust"), end()].concat();
    assert_eq!(opened(prefixed, "folder/disk.raw").unwrap(), b"ust");
}

#[test]
fn sizes_come_in_three_ways() {
    let mut size = vec![0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
    let base_256 = [header(b"d", b'0', &size), contents(b"12345"), end()].concat();
    assert_eq!(opened(base_256, "d").unwrap(), b"12345");
    let pax = [header(b"pax", b'x', &octal(9)), contents(b"9 size=5\n"), header(b"d", b'0', &octal(0))];
    let pax = [pax.concat(), contents(b"12345"), member("e", b"behind"), end()].concat();
    assert_eq!(opened(pax.clone(), "d").unwrap(), b"12345");
    assert_eq!(opened(pax, "e").unwrap(), b"behind");
    // Sizes that lead out of every file.
    size[1..].fill(0xff);
    for size in [&size[..], &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], &[0xff; 12]] {
        let hostile = [header(b"d", b'0', size), end()].concat();
        assert_eq!(error_of(hostile, "d").kind(), ErrorKind::Invalid);
    }
}

#[test]
fn members_that_are_not_one_run_of_bytes_are_refused() {
    let sparse = [header(b"d", b'S', &octal(512)), contents(&[1; 512]), end()].concat();
    assert_eq!(error_of(sparse, "d").kind(), ErrorKind::Unsupported);
    let record = b"22 GNU.sparse.major=1\n";
    let pax = [header(b"pax", b'x', &octal(22)), contents(record), member("d", b"1"), end()].concat();
    let error = error_of(pax, "d");
    assert_eq!(error.to_string(), "the member 'd' is stored as a sparse file");
    for flag in [b'1', b'2', b'5', b'M'] {
        let other = [header(b"d", flag, &octal(0)), end()].concat();
        assert_eq!(error_of(other, "d").kind(), ErrorKind::Unsupported, "{flag}");
    }
}

#[test]
fn damaged_archives_are_refused() {
    let disk = text(5000, 2);
    let good = [member("a", b"a"), member("d", &disk), end()].concat();
    let cut = good[..4096].to_vec();
    assert_eq!(error_of(cut, "d").kind(), ErrorKind::Truncated);
    let without_end = good[..good.len() - 1024].to_vec();
    assert_eq!(opened(without_end, "d").unwrap(), disk);
    let mut wrong = good.clone();
    wrong[1024 + 3] = b'x';
    assert_eq!(error_of(wrong, "d").kind(), ErrorKind::Invalid);
    assert_eq!(
        error_of(vec![7; 4096], "d").to_string(),
        "the file is not a tar archive: there is no header at 0x0"
    );
    error_of(vec![], "d");
    let twice = [member("d", b"old"), member("d", b"new"), end()].concat();
    assert_eq!(error_of(twice, "d").to_string(), "the archive has two members called 'd'");
    for record in ["99 path=x\n", "x", "5 a\nxx", "0 path=x\n", "12345678901234567890 path=x\n", "8 size=\n"]
    {
        let pax =
            [header(b"pax", b'x', &octal(record.len())), contents(record.as_bytes()), member("d", b"1")];
        assert_eq!(error_of(pax.concat(), "d").kind(), ErrorKind::Invalid, "{record}");
    }
    let endless = header(b"x", b'x', &octal(1 << 30));
    assert_eq!(error_of(endless, "d").kind(), ErrorKind::Invalid);
}

#[test]
fn gzip_around_and_inside() {
    let disk = text(3 << 20, 3);
    let tar = [member("first", &text(70_000, 4)), member("disk", &disk), end()].concat();
    assert_eq!(opened(gzipped(&tar), "disk").unwrap(), disk);
    assert!(open(storage(gzipped(&tar)), "disk", true).unwrap().slow);
    let error = error_of(gzipped(&tar), "other");
    assert_eq!(error.hints(), ["its members are: first, disk"]);
    let inside = [member("disk.gz", &gzipped(&disk)), member("disk", &gzipped(&disk)), end()].concat();
    assert_eq!(opened(inside.clone(), "disk.gz").unwrap(), disk);
    assert_eq!(opened(inside.clone(), "disk").unwrap(), disk);
    let as_it_is = open(storage(inside.clone()), "disk", false).unwrap();
    assert_eq!(all_of(&*as_it_is.storage), gzipped(&disk), "a raw disk may begin like gzip");
    let by_name = open(storage(inside), "disk.gz", false).unwrap();
    assert_eq!(all_of(&*by_name.storage), disk);
}

#[test]
fn gzip_streams_are_verified() {
    let data = text(300_000, 5);
    let good = gzipped(&data);
    let len = |bytes: Vec<u8>| Gzip::new(storage(bytes)).unwrap().len();
    assert_eq!(len(good.clone()).unwrap(), 300_000);
    let two = [gzipped(&data), gzipped(b""), gzipped(&data), vec![0; 700]].concat();
    assert_eq!(all_of(&Gzip::new(storage(two)).unwrap()), [data.clone(), data.clone()].concat());
    for cut in [good.len() - 1, good.len() - 8, good.len() / 2] {
        assert_eq!(len(good[..cut].to_vec()).unwrap_err().kind(), ErrorKind::Truncated, "{cut}");
    }
    let mut wrong = good.clone();
    *wrong.last_mut().unwrap() ^= 1;
    assert_eq!(len(wrong).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut wrong = good.clone();
    wrong[good.len() / 2] ^= 0x55;
    let broken = Gzip::new(storage(wrong)).unwrap();
    let error = broken.len().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Truncated), "{error:?}");
    assert_eq!(broken.len().unwrap_err().to_string(), error.to_string(), "it stays broken");
    // The beginning can be read all the same.
    let mut first = [0; 1000];
    broken.read_at(&mut first, 0).unwrap();
    assert_eq!(first, data[..1000]);
    len(vec![0x1f, 0x8b, 8]).unwrap_err();
    let mut named = vec![0x1f, 0x8b, 8, 8 | 4 | 16 | 2, 0, 0, 0, 0, 0, 3, 3, 0, 1, 2, 3];
    named.extend(b"name\0comment\0\x11\x22");
    named.extend(&good[10..]);
    assert_eq!(len(named).unwrap(), 300_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is asked for in whatever order is what was packed.
    #[test]
    fn gzip_is_read_in_any_order(
        seed in 0_u64..1000,
        len in 1_usize..6_000_000,
        reads in prop::collection::vec((0_f64..1.1, 1_usize..400_000), 1..20),
    ) {
        let data = text(len, seed);
        let cut = len / 3;
        let gzip = Gzip::new(storage([gzipped(&data[..cut]), gzipped(&data[cut..])].concat())).unwrap();
        for (place, count) in reads {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a place somewhere")]
            let offset = (place * len as f64) as usize;
            let mut found = vec![1; count];
            gzip.read_at(&mut found, offset as u64).unwrap();
            let mut wanted = data.get(offset..).unwrap_or_default().to_vec();
            wanted.resize(count.max(wanted.len()), 0);
            prop_assert!(found == wanted[..count]);
        }
        prop_assert_eq!(gzip.len().unwrap(), len as u64);
    }

    /// No bytes make the walk along the headers panic or go on without end.
    #[test]
    fn any_headers_end(mutations in prop::collection::vec((0_usize..4096, any::<u8>()), 0..12)) {
        let mut tar = [
            header(b"pax", b'x', &octal(9)), contents(b"9 size=5\n"),
            member("a", &text(700, 1)), header(b"l", b'L', &octal(4)), contents(b"abc\0"), member("d", b"1"), end(),
        ].concat();
        for (at, byte) in mutations {
            if let Some(place) = tar.get_mut(at) {
                *place = byte;
            }
        }
        // Checksums that are right again let the rest be looked at.
        for start in (0..tar.len()).step_by(512) {
            if tar[start + 257..start + 262] == *b"ustar" {
                let fixed = signed(tar[start..start + 512].to_vec());
                tar[start..start + 512].copy_from_slice(&fixed);
            }
        }
        let _ = opened(tar, "d");
    }
}

/// Many readers of one stream, some ahead of the others, all see what was packed.
#[test]
fn gzip_is_read_by_many_at_once() {
    let data = Arc::new(text(12 << 20, 9));
    let gzip = Arc::new(Gzip::new(storage(gzipped(&data))).unwrap());
    std::thread::scope(|scope| {
        for reader in 0..6_usize {
            let (data, gzip) = (Arc::clone(&data), Arc::clone(&gzip));
            scope.spawn(move || {
                let mut buf = vec![0; 300_000];
                for step in 0..30 {
                    let offset = (reader * 977_777 + step * 600_011) % (data.len() - buf.len());
                    gzip.read_at(&mut buf, offset as u64).unwrap();
                    assert!(buf == data[offset..offset + buf.len()]);
                }
            });
        }
    });
}

/// Memory stays bounded: copies of the state thin out as the stream goes on.
#[test]
fn long_streams_keep_few_copies() {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    for _ in 0..700 {
        encoder.write_all(&[7; 1 << 20]).unwrap();
    }
    let gzip = Gzip::new(storage(encoder.finish().unwrap())).unwrap();
    assert_eq!(gzip.len().unwrap(), 700 << 20);
    let mut buf = [0; 4096];
    for offset in [0, 600 << 20, 1 << 20, 333 << 20] {
        gzip.read_at(&mut buf, offset).unwrap();
        assert_eq!(buf, [7; 4096]);
    }
    assert!(gzip.copies() <= 513, "{}", gzip.copies());
}

#[test]
fn a_member_that_a_compressed_archive_does_not_hold_whole_is_refused_where_it_ends() {
    let disk = text(300_000, 5);
    let whole = [member("vm.ovf", b"<xml/>"), member("disk", &disk)].concat();
    let cut = 1024 + 512 + 200_000;
    let found = open(storage(gzipped(&whole[..cut])), "disk", true).unwrap();
    assert_eq!(found.storage.len().unwrap(), 300_000);
    let mut buf = vec![0; 200_000];
    found.storage.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, disk[..200_000]);
    for (offset, len) in [(0, 300_000), (199_999, 2), (250_000, 1000), (200_000, 1)] {
        let error = found.storage.read_at(&mut vec![0; len], offset).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{offset} {len}");
    }
    let found = open(storage(gzipped(&whole)), "disk", true).unwrap();
    assert_eq!(all_of(&*found.storage), disk);
}

#[test]
fn a_wrong_checksum_stays_wrong_however_often_it_is_read() {
    let data = text(100_000, 6);
    let mut packed = gzipped(&data);
    let at = packed.len() - 8;
    packed[at] ^= 1;
    let gzip = Gzip::new(storage(packed)).unwrap();
    for _ in 0..3 {
        let error = gzip.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    // What lies whole before the damage can be read, again and again.
    let data = text(600_000, 7);
    let mut packed = gzipped(&data);
    let at = packed.len() - 8;
    packed[at] ^= 1;
    let gzip = Gzip::new(storage(packed)).unwrap();
    gzip.read_at(&mut vec![0; 600_000], 0).unwrap_err();
    let mut found = vec![0; 300_000];
    gzip.read_at(&mut found, 0).unwrap();
    assert_eq!(found, data[..300_000]);
    gzip.read_at(&mut [0; 1], 599_999).unwrap_err();
    gzip.read_at(&mut [0; 1], 599_999).unwrap_err();
}

/// Sixteen readers with two MiB each, as in a conversion, the last one first.
#[test]
fn readers_side_by_side_inflate_nothing_twice() {
    const ITEM: usize = 2 << 20;
    let data = text(16 * ITEM, 8);
    let gzip = Gzip::new(storage(gzipped(&data))).unwrap();
    for step in (0..ITEM).step_by(64 << 10) {
        for reader in (0..16).rev() {
            let at = reader * ITEM + step;
            let mut buf = vec![0; 64 << 10];
            gzip.read_at(&mut buf, at as u64).unwrap();
            assert!(buf == data[at..][..64 << 10]);
        }
    }
    assert_eq!(gzip.replays(), 0);
}

/// A member of a gzip stream that is called `name` and holds `data`.
fn named(name: &[u8], data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::GzBuilder::new().filename(name).write(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn names_of_gzip_members_cost_what_they_are_long() {
    for len in [1, 4000, 65_535] {
        let packed = [named(&vec![b'n'; len], b"one"), named(&vec![b'm'; 70_000 - len], b"two")].concat();
        let two = Gzip::new(storage(packed)).unwrap();
        let read = two.len();
        assert_eq!(read.is_ok(), len >= 4500, "{len}: {read:?}");
    }
    let packed = named(b"n", b"").repeat(2000);
    let len = packed.len() as u64;
    let device = block::raw::Raw::open(storage(packed), block::raw::RawOptions::default()).unwrap();
    let traced = Arc::new(block::testing::TraceDevice::new(Arc::new(device)));
    let gzip = Gzip::new(Arc::new(block::adapter::DeviceStorage::new(Arc::clone(&traced) as _))).unwrap();
    assert_eq!(gzip.len().unwrap(), 0);
    let read: u64 = traced
        .take()
        .into_iter()
        .map(|trace| match trace {
            block::testing::Trace::Read { len, .. } => len,
            _ => 0,
        })
        .sum();
    assert!(read < 10 * len, "{read} bytes are read of {len}");
}

/// A package may have its disks gzipped one by one, beside its description.
#[test]
fn a_gzipped_file_is_an_archive_of_one() {
    let data = text(200_000, 5);
    let packed = storage(gzipped(&data));
    let name = packed.name();
    let found = open(Arc::clone(&packed), &name, false).unwrap();
    assert!(found.slow && all_of(&*found.storage) == data);
    open(packed, "another", false).unwrap_err();
    assert!(
        is_only_member("/x/d.vmdk.gz", "d.vmdk")
            && is_only_member("D.GZ", "D")
            && is_only_member("/x/d", "d")
    );
    assert!(!is_only_member("/x/d.vmdk.gz", "x") && !is_only_member("d.gz", "d.gz"));
}
