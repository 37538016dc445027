//! Streams written, walked as somebody does who cannot seek, and read.

use block::mem::MemStorage;
use block::testing::Random;

use super::append::{head, new_header};
use super::*;

const GRAIN: usize = 65536;

/// A new stream in memory.
fn create(capacity: u64) -> (Arc<MemStorage>, Stream) {
    let storage = Arc::new(MemStorage::new());
    let header = new_header(capacity, 128, 20, false);
    storage.write_at(&head(&header, b"# Disk DescriptorFile\n"), 0).unwrap();
    let stream = Stream::create(Arc::clone(&storage) as _, header, None).unwrap();
    (storage, stream)
}

fn reopen(storage: &Arc<MemStorage>, writable: bool) -> Result<Stream> {
    let header = Header::read(&**storage, 0).unwrap();
    Stream::open(Arc::clone(storage) as _, header, writable, None)
}

fn read(stream: &Stream, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0xee; len];
    stream.read(&mut buf, offset, &|part, _| {
        part.fill(0);
        Ok(())
    })?;
    Ok(buf)
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random::new(seed).fill(&mut bytes);
    bytes[len / 2..].fill(3);
    bytes
}

/// Goes through a stream from front to back, believing nothing but markers, and returns the number of grains.
fn walk(bytes: &[u8], capacity: u64) -> usize {
    let sector = |at: usize| &bytes[at * 512..(at + 1) * 512];
    let first = Header::parse(sector(0)).unwrap();
    assert_eq!((first.version, first.flags, first.gd_offset, first.rgd_offset), (3, 0x30001, GD_AT_END, 0));
    assert_eq!(first.capacity, capacity);
    let (mut at, mut table, mut directory, mut grains) = (128, vec![0u32; 512], vec![], 0);
    let (mut gd_at, mut last_grain) = (0, None);
    directory.resize(to_usize(first.gd_entries()), 0u32);
    let put =
        |table: &mut Vec<u32>, directory: &mut Vec<u32>, last: Option<u64>, sectors: &[u8], at: usize| {
            let found: Vec<u32> =
                sectors.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
            assert_eq!(found, *table, "the table lists the grains in front of it");
            directory[to_usize(last.unwrap() / 512)] = u32::try_from(at).unwrap();
            table.fill(0);
        };
    loop {
        match Marker::parse(sector(at)).unwrap() {
            Marker::Grain { sector: lba, size } => {
                let grain = lba / 128;
                assert!(lba % 128 == 0 && last_grain.is_none_or(|last| grain > last), "in order");
                assert!(
                    last_grain.is_none_or(|last| grain / 512 == last / 512) || table.iter().all(|e| *e == 0)
                );
                let data = at * 512 + 12;
                let mut out = vec![0; GRAIN];
                assert_eq!(codec::decompress(&bytes[data..data + size as usize], &mut out), Ok(GRAIN));
                table[to_usize(grain % 512)] = u32::try_from(at).unwrap();
                at += (12 + size as usize).div_ceil(512);
                (last_grain, grains) = (Some(grain), grains + 1);
            }
            Marker::GrainTable { sectors } => {
                assert_eq!(sectors, 4);
                put(&mut table, &mut directory, last_grain, &bytes[(at + 1) * 512..(at + 5) * 512], at + 1);
                at += 5;
            }
            Marker::GrainDirectory { sectors } => {
                gd_at = at + 1;
                let found: Vec<u32> = bytes[gd_at * 512..]
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .take(directory.len())
                    .map(|e| u32::from_le_bytes(*e))
                    .collect();
                assert_eq!(found, directory);
                assert_eq!(sectors, first.gd_sectors());
                at += 1 + to_usize(sectors);
            }
            Marker::Footer { sectors } => {
                let footer = Header::parse(sector(at + 1)).unwrap();
                assert_eq!((sectors, footer), (1, Header { gd_offset: gd_at as u64, ..first }));
                at += 2;
            }
            Marker::EndOfStream => {
                assert!(table.iter().all(|entry| *entry == 0), "every grain is in a table");
                assert_eq!((at + 1) * 512, bytes.len());
                return grains;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_stream_is_what_the_specification_says() {
    // Three tables, the second of them without a grain, the last grain cut off by the end of the disk.
    let capacity = 2 * 512 * 128 + 200;
    let (storage, stream) = create(capacity);
    let last = (2 * 512 + 1) * GRAIN as u64;
    stream.write(&noise(1, 3 * GRAIN), 0).unwrap();
    stream.write(&noise(2, GRAIN), 511 * GRAIN as u64).unwrap();
    stream.write(&noise(3, 72 * 512), last).unwrap();
    assert_eq!(read(&stream, GRAIN as u64, GRAIN).unwrap(), noise(1, 3 * GRAIN)[GRAIN..2 * GRAIN]);
    assert!(reopen(&storage, false).unwrap_err().to_string().contains("Invalid footer"));
    stream.flush().unwrap();
    assert_eq!(walk(&storage.to_bytes(), capacity), 5);
    let stream = reopen(&storage, false).unwrap();
    assert_eq!(read(&stream, 0, 3 * GRAIN).unwrap(), noise(1, 3 * GRAIN));
    assert_eq!(read(&stream, 1000, 5000).unwrap(), noise(1, 3 * GRAIN)[1000..6000]);
    assert_eq!(read(&stream, last, 72 * 512).unwrap(), noise(3, 72 * 512));
    assert_eq!(stream.run(100, 1 << 40).unwrap().len, 3 * GRAIN as u64 - 100);
    assert_eq!(stream.run(3 * GRAIN as u64, 1 << 40).unwrap().len, 508 * GRAIN as u64);
    assert!(read(&stream, 4 * GRAIN as u64, GRAIN).unwrap() == [0; GRAIN]);
}

#[test]
fn an_empty_stream_is_one_too() {
    let (storage, stream) = create(1 << 22);
    stream.flush().unwrap();
    assert_eq!(walk(&storage.to_bytes(), 1 << 22), 0);
    let before = storage.to_bytes();
    let again = reopen(&storage, true).unwrap();
    again.flush().unwrap();
    assert!(storage.to_bytes() == before, "nothing to do");
}

#[test]
fn a_stream_can_be_continued_behind_its_last_grain() {
    let (storage, stream) = create(1 << 22);
    for grain in [0, 7, 511, 512, 700] {
        stream.write(&noise(grain, GRAIN), grain * GRAIN as u64).unwrap();
        stream.flush().unwrap();
        assert!(walk_lengths(&storage) > 0);
    }
    let stream = reopen(&storage, true).unwrap();
    assert_eq!(stream.write(&[1; GRAIN], 699 * GRAIN as u64).unwrap_err().kind(), ErrorKind::Unsupported);
    stream.write(&[1; GRAIN], 700 * GRAIN as u64).unwrap_err();
    stream.write(&noise(9, GRAIN), 701 * GRAIN as u64).unwrap();
    stream.write(&noise(9, GRAIN), 5000 * GRAIN as u64).unwrap();
    stream.flush().unwrap();
    let stream = reopen(&storage, false).unwrap();
    for grain in [0, 7, 511, 512, 700] {
        assert!(read(&stream, grain * GRAIN as u64, GRAIN).unwrap() == noise(grain, GRAIN), "{grain}");
    }
    assert!(read(&stream, 5000 * GRAIN as u64, GRAIN).unwrap() == noise(9, GRAIN));
}

/// The length of a stream that ends as it has to.
fn walk_lengths(storage: &Arc<MemStorage>) -> usize {
    reopen(storage, false).unwrap();
    storage.to_bytes().len()
}

#[test]
fn parts_of_grains_are_not_written() {
    let (_, stream) = create(1000);
    for (offset, len) in [(0, 512), (512, GRAIN), (0, GRAIN + 512)] {
        assert_eq!(stream.write(&vec![1; len], offset).unwrap_err().kind(), ErrorKind::Unsupported);
    }
    stream.write(&vec![1; 1000 * 512], 0).unwrap();
    stream.write_zeroes(0, GRAIN as u64, false).unwrap_err();
}

#[test]
fn zeros_take_nothing_unless_a_parent_shines_through() {
    let (storage, stream) = create(1 << 13);
    stream.write_zeroes(0, 10 * GRAIN as u64, false).unwrap();
    stream.write_zeroes(20 * GRAIN as u64, 2 * GRAIN as u64, true).unwrap();
    stream.flush().unwrap();
    assert_eq!(walk(&storage.to_bytes(), 1 << 13), 2);
    let stream = reopen(&storage, false).unwrap();
    assert_eq!(stream.run(0, 1 << 22).unwrap(), Run { grain: Grain::Absent, len: 20 * GRAIN as u64 });
}

#[test]
fn padding_behind_the_end_is_tolerated_a_missing_end_is_not() {
    let (storage, stream) = create(1 << 13);
    stream.write(&noise(5, GRAIN), 0).unwrap();
    stream.flush().unwrap();
    let bytes = storage.to_bytes();
    storage.set_len(bytes.len() as u64 + 5000).unwrap();
    reopen(&storage, false).unwrap();
    for cut in [1, 512, 512 * 2, 512 * 3, 512 * 8, 40_000] {
        storage.set_len((bytes.len() - cut) as u64).unwrap();
        assert_eq!(reopen(&storage, false).unwrap_err().kind(), ErrorKind::Truncated, "{cut}");
    }
}

#[test]
fn damaged_grains_are_errors_that_name_their_place() {
    let (storage, stream) = create(1 << 13);
    stream.write(&noise(5, 2 * GRAIN), 0).unwrap();
    stream.flush().unwrap();
    let place = 128 * 512;
    for (at, bytes) in [
        (place, &1u64.to_le_bytes()[..]),
        (place + 8, &0u32.to_le_bytes()[..]),
        (place + 8, &200_000u32.to_le_bytes()[..]),
        (place + 8, &300u32.to_le_bytes()[..]),
        (place + 12, &[0xff, 0xff][..]),
        (place + 2000, &[0xff; 64][..]),
    ] {
        let copy = Arc::new(MemStorage::from_bytes(storage.to_bytes()));
        copy.write_at(bytes, at).unwrap();
        let stream = reopen(&copy, false).unwrap();
        let error = read(&stream, 0, 2 * GRAIN).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("0x10000"), "{error}");
        read(&stream, GRAIN as u64, GRAIN).unwrap();
    }
}

/// A storage that can only be appended to.
#[derive(Debug, Default)]
struct Pipe(parking_lot::Mutex<Vec<u8>>);

impl Storage for Pipe {
    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a pipe has no length to set")
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        panic!("a pipe cannot be read back")
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut bytes = self.0.lock();
        assert_eq!(offset, bytes.len() as u64, "a pipe cannot be sought in");
        bytes.extend_from_slice(buf);
        Ok(())
    }

    fn zero_range(&self, _offset: u64, _len: u64, _mode: block::ZeroMode) -> Result<()> {
        panic!("a pipe cannot be zeroed")
    }

    fn discard_range(&self, _offset: u64, _len: u64) -> Result<()> {
        panic!("a pipe cannot be discarded")
    }

    fn allocate_range(&self, _offset: u64, _len: u64) -> Result<()> {
        panic!("a pipe cannot be allocated")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<block::HostExtent> {
        Ok(block::HostExtent { data: true, len: max_len })
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "pipe".to_owned()
    }
}

/// A descriptor that says no more than it has to.
const TEXT: &[u8] =
    b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n";

/// A stream sent through a pipe: three grains, the last at the end of the second table.
fn sent() -> (Vec<u8>, Vec<u8>) {
    use block::{BlockDevice as _, CompressedWriter as _};
    let capacity = 1024 * 128 - 8;
    let mut disk = vec![0; to_usize(capacity * 512)];
    let pipe = Arc::new(Pipe::default());
    let target = Target::new(&(Arc::clone(&pipe) as Arc<dyn Storage>), capacity, TEXT, Some(9)).unwrap();
    for grain in [0, 700, 1023usize] {
        let range = grain * GRAIN..((grain + 1) * GRAIN).min(disk.len());
        disk[range.clone()].copy_from_slice(&noise(grain as u64, range.len()));
        let mut bytes = disk[range].to_vec();
        bytes.resize(GRAIN, 0);
        let packed = target.compress(&bytes).unwrap();
        target.write_compressed(&[packed], (grain * GRAIN) as u64).unwrap();
    }
    target.write_zeroes_at(0, 512, block::ZeroMode::UNMAP).unwrap_err();
    target.close().unwrap();
    let bytes = std::mem::take(&mut *pipe.0.lock());
    assert_eq!(walk(&bytes, capacity), 3);
    (bytes, disk)
}

#[test]
fn a_pipe_takes_a_stream_and_gives_it_back() {
    use block::BlockDevice as _;
    let (bytes, disk) = sent();
    let source = Sequential::open(Box::new(std::io::Cursor::new(bytes.clone()))).unwrap();
    assert_eq!((source.size(), source.descriptor()), (disk.len() as u64, TEXT));
    let mut at = 0;
    let mut kinds = vec![];
    while at < source.size() {
        let found = source.layer_extent(at, 1 << 30).unwrap();
        kinds.push((found.stored, found.len / GRAIN as u64));
        at += found.len;
    }
    use block::Stored::{Absent, Compressed};
    assert_eq!(kinds, [(Compressed, 1), (Absent, 699), (Compressed, 1), (Absent, 322), (Compressed, 0)]);
    // In parts that do not fit the grains, as far as they were announced or not.
    let source = Sequential::open(Box::new(std::io::Cursor::new(bytes))).unwrap();
    let mut all = vec![0xee; disk.len()];
    for (part, index) in all.chunks_mut(100_000).zip(0..) {
        source.read_at(part, index * 100_000).unwrap();
    }
    assert!(all == disk);
    assert!(source.read_at(&mut [0; 10], 0).unwrap_err().to_string().contains("once"));
    source.layer_extent(source.size(), 1).unwrap_err();
}

#[test]
fn a_pipe_that_ends_early_is_noticed() {
    use block::BlockDevice as _;
    let (bytes, disk) = sent();
    for len in [100, 5000, 65536, 70_000, bytes.len() - 512 * 3, bytes.len() - 512] {
        let read =
            Sequential::open(Box::new(std::io::Cursor::new(bytes[..len].to_vec()))).and_then(|source| {
                source.read_at(&mut vec![0; disk.len()], 0)?;
                source.layer_extent(source.size() - 1, 1)
            });
        assert_eq!(read.unwrap_err().kind(), ErrorKind::Truncated, "{len}");
    }
}

#[test]
fn a_pipe_with_zeros_where_grains_were_is_noticed() {
    use block::BlockDevice as _;
    let (mut bytes, disk) = sent();
    // As a download that has skipped a part leaves it.
    let marker = (700 * GRAIN as u64 / 512).to_le_bytes();
    let second = (65536..).step_by(512).find(|at| bytes[*at..at + 8] == marker).unwrap();
    bytes[second..second + GRAIN].fill(0);
    let source = Sequential::open(Box::new(std::io::Cursor::new(bytes))).unwrap();
    let error = source.read_at(&mut vec![0; disk.len()], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated);
}

#[test]
fn a_disk_with_a_parent_does_not_come_through_a_pipe() {
    let (mut bytes, _) = sent();
    let at = bytes.windows(8).position(|text| text == b"ffffffff").unwrap();
    bytes[at..at + 8].copy_from_slice(b"12345678");
    let error = Sequential::open(Box::new(std::io::Cursor::new(bytes))).unwrap_err();
    assert!(error.to_string().contains("parent"), "{error}");
}

/// Bytes of a small grain.
const SMALL: usize = 4096;

/// Appends grains at random, in order, with a flush after each few; returns the disk and what it was at each flush.
fn fill(
    storage: Arc<dyn Storage>,
    capacity: u64,
    seed: u64,
    mut flushed: impl FnMut(u64),
) -> Result<Vec<Vec<u8>>> {
    let header = new_header(capacity, 8, 20, false);
    let stream = Stream::create(Arc::clone(&storage), header, None)?;
    storage.write_at(&head(&header, b"# Disk DescriptorFile\n"), 0)?;
    stream.flush()?;
    let mut disk = vec![0; to_usize(capacity * 512)];
    let mut states = vec![disk.clone()];
    flushed(0);
    let mut random = Random::new(seed);
    let mut stream = stream;
    let mut grain = 0;
    while grain * 8 < capacity {
        let at = to_usize(grain) * SMALL;
        let end = (at + SMALL).min(disk.len());
        let mut bytes = vec![0; end - at];
        let random_len = to_usize(random.below(2000)).min(bytes.len());
        random.fill(&mut bytes[..random_len]);
        bytes[0] = 1;
        stream.write(&bytes, at as u64)?;
        disk[at..end].copy_from_slice(&bytes);
        if random.below(3) == 0 {
            stream.flush()?;
            states.push(disk.clone());
            flushed(states.len() as u64 - 1);
        }
        if random.below(5) == 0 {
            stream.flush()?;
            states.push(disk.clone());
            flushed(states.len() as u64 - 1);
            stream = Stream::open(Arc::clone(&storage), Header::read(&*storage, 0)?, true, Some(1))?;
        }
        grain += 1 + random.below(200);
    }
    stream.flush()?;
    states.push(disk);
    flushed(states.len() as u64 - 1);
    Ok(states)
}

#[test]
fn what_has_been_flushed_is_there() {
    for seed in 0..20 {
        let storage = Arc::new(MemStorage::new());
        let capacity = 8 * 1500 + seed;
        let states = fill(Arc::clone(&storage) as _, capacity, seed, |_| ()).unwrap();
        let stream = reopen(&storage, false).unwrap();
        let disk = states.last().unwrap();
        assert!(read(&stream, 0, disk.len()).unwrap() == *disk, "seed {seed}");
    }
}

/// Power may fail at any moment: the disk is what it was at the last flush or later, or the file is known to have no
/// end. What a reader is shown is never a mixture.
#[test]
fn a_power_cut_leaves_a_state_that_was_flushed_or_a_stream_without_end() {
    let (mut opened, mut refused) = (0, 0);
    for seed in 0..4 {
        let crash = Arc::new(block::testing::CrashStorage::new(vec![]));
        let states = fill(Arc::clone(&crash) as _, 8 * 1200, seed, |mark| crash.mark(mark)).unwrap();
        for image in crash.images(150, seed) {
            let header = Header::read(&*image.storage, 0);
            let stream = header.and_then(|h| Stream::open(Arc::clone(&image.storage) as _, h, false, None));
            let Ok(stream) = stream else {
                refused += 1;
                continue;
            };
            let shown = read(&stream, 0, states[0].len()).unwrap();
            let passed = image.marks.iter().max().map_or(0, |mark| to_usize(*mark));
            assert!(states[passed..].contains(&shown), "{}", image.description);
            opened += 1;
        }
    }
    assert!(opened > 20 && refused > 20, "{opened} opened, {refused} refused");
}

#[test]
fn a_write_that_fails_is_never_followed_by_an_end() {
    use block::testing::{Fault, FaultStorage, Operation};
    let storage = Arc::new(MemStorage::new());
    let faulty = Arc::new(FaultStorage::new(Arc::clone(&storage) as _));
    let header = new_header(1 << 16, 128, 20, false);
    storage.write_at(&head(&header, b""), 0).unwrap();
    let stream = Stream::create(Arc::clone(&faulty) as _, header, None).unwrap();
    stream.write(&noise(1, GRAIN), 0).unwrap();
    faulty.fail(Fault::nth(0, nix::errno::Errno::ENOSPC).on(&[Operation::Write]).torn());
    stream.write(&noise(2, GRAIN), GRAIN as u64).unwrap_err();
    stream.write(&noise(2, GRAIN), 2 * GRAIN as u64).unwrap_err();
    stream.flush().unwrap_err();
    assert_eq!(reopen(&storage, false).unwrap_err().kind(), ErrorKind::Truncated);
}

#[test]
fn what_cannot_be_appended_takes_nothing_with_it() {
    use block::testing::{Fault, FaultStorage, Operation};
    for operation in [Operation::Write, Operation::SetLen, Operation::Sync] {
        let (storage, stream) = create(1 << 16);
        stream.write(&noise(1, GRAIN), 0).unwrap();
        stream.flush().unwrap();
        drop(stream);
        let faulty = Arc::new(FaultStorage::new(Arc::clone(&storage) as _));
        let header = Header::read(&*storage, 0).unwrap();
        let stream = Stream::open(Arc::clone(&faulty) as _, header, true, None).unwrap();
        stream.write(&noise(2, GRAIN), GRAIN as u64).unwrap();
        stream.flush().unwrap();
        faulty.fail(Fault::nth(0, nix::errno::Errno::ENOSPC).on(&[operation]).torn());
        stream.write(&noise(3, GRAIN), 2 * GRAIN as u64).unwrap_err();
        drop(stream);
        let stream = reopen(&storage, false).unwrap();
        assert!(read(&stream, 0, GRAIN).unwrap() == noise(1, GRAIN), "{operation:?}");
        assert!(read(&stream, GRAIN as u64, GRAIN).unwrap() == noise(2, GRAIN), "{operation:?}");
        assert!(read(&stream, 2 * GRAIN as u64, GRAIN).unwrap() == vec![0; GRAIN], "{operation:?}");
    }
}

#[test]
fn giving_up_leaves_what_was_complete_complete() {
    let (storage, stream) = create(1 << 16);
    stream.write(&noise(1, GRAIN), 0).unwrap();
    stream.flush().unwrap();
    drop(stream);
    let before = storage.to_bytes();
    let stream = reopen(&storage, true).unwrap();
    stream.write(&noise(1, GRAIN), 0).unwrap_err();
    drop(stream);
    assert!(storage.to_bytes() == before);
    let stream = reopen(&storage, true).unwrap();
    stream.write(&noise(2, GRAIN), GRAIN as u64).unwrap();
    drop(stream);
    assert!(read(&reopen(&storage, false).unwrap(), GRAIN as u64, GRAIN).unwrap() == noise(2, GRAIN));
}
