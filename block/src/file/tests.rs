//! Files of several file systems and cache modes against a plain vector of bytes.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use tempfile::TempDir;

use super::*;
use crate::ErrorKind;
use crate::mem::MemStorage;
use crate::testing::Random;
use crate::zero::is_zero;

/// Folders on different file systems: `/dev/shm` cannot zero ranges, nor (in older kernels) do `O_DIRECT`.
fn folders() -> Vec<TempDir> {
    let mut folders = vec![tempfile::tempdir().unwrap()];
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folders.push(folder),
        Err(error) => eprintln!("SKIPPED: tests on tmpfs: {error}"),
    }
    folders
}

fn create(path: &Path, cache: CacheMode) -> Option<HostFile> {
    match HostFile::open(path, &FileOptions { cache, ..FileOptions::creating(CreateMode::New) }) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            eprintln!("SKIPPED: cache mode {} at {}: {error}", cache.name(), path.display());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn contents(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0xAA; to_usize(storage.len().unwrap())];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Every hole that the file claims to have must read as zeros.
fn check_holes(file: &HostFile, expected: &[u8]) {
    let mut offset = 0;
    while offset < expected.len() {
        let extent = file.extent(offset as u64, (expected.len() - offset) as u64).unwrap();
        assert!(extent.len > 0);
        let end = offset + to_usize(extent.len);
        assert!(extent.data || is_zero(&expected[offset..end]), "a hole at {offset} is none");
        offset = end;
    }
}

/// Does one random thing to the file and to the vector that is its model.
fn step(file: &HostFile, model: &mut Vec<u8>, random: &mut Random) {
    const LIMIT: u64 = 300_000;
    let align = [1, 512, 4096][to_usize(random.below(3))];
    let offset = random.below(LIMIT) / align * align;
    let longest = [100, 5000, 70_000][to_usize(random.below(3))];
    let len = (random.below(longest) + 1).next_multiple_of(align);
    let range = to_usize(offset)..to_usize(offset + len);
    let mut data = vec![0; to_usize(len)];
    random.fill(&mut data);
    match random.below(12) {
        0..=3 => {
            file.write_at(&data, offset).unwrap();
            model.resize(model.len().max(range.end), 0);
            model[range].copy_from_slice(&data);
        }
        4 | 5 => {
            let (a, b) = data.split_at(data.len() / 3);
            file.write_vectored_at(&[IoSlice::new(a), IoSlice::new(&[]), IoSlice::new(b)], offset).unwrap();
            model.resize(model.len().max(range.end), 0);
            model[range].copy_from_slice(&data);
        }
        6..=8 => {
            let mode = if random.once_in(2) { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
            file.zero_range(offset, len, mode).unwrap();
            model.resize(model.len().max(range.end), 0);
            model[range].fill(0);
        }
        9 => {
            file.set_len(offset).unwrap();
            model.resize(to_usize(offset), 0);
        }
        10 => {
            file.allocate_range(offset, len).unwrap();
            model.resize(model.len().max(range.end), 0);
        }
        _ => {
            let mut read = vec![0xAA; data.len()];
            file.read_at(&mut read, offset).unwrap();
            let mut expected = vec![0; data.len()];
            let existing = model.get(range.start..range.end.min(model.len())).unwrap_or_default();
            expected[..existing.len()].copy_from_slice(existing);
            assert!(read == expected, "read of {len} at {offset}");
        }
    }
}

#[test]
fn random_requests_agree_with_a_vector_in_every_mode_on_every_file_system() {
    for folder in folders() {
        for cache in CacheMode::ALL {
            let Some(file) = create(&folder.path().join(cache.name()), cache) else { continue };
            let mut model = vec![];
            let mut random = Random::new(cache as u64 + 1);
            for number in 0..300 {
                step(&file, &mut model, &mut random);
                assert_eq!(file.len().unwrap(), model.len() as u64, "{cache:?}, step {number}");
                if number % 10 == 0 {
                    assert!(contents(&file) == model, "{cache:?}, step {number}");
                    check_holes(&file, &model);
                }
            }
            file.sync().unwrap();
            assert!(fs::read(file.path()).unwrap() == model, "{cache:?}");
        }
    }
}

#[test]
fn discarded_bytes_are_old_or_zero_and_the_length_stays() {
    for folder in folders() {
        let file = create(&folder.path().join("x"), CacheMode::Writeback).unwrap();
        file.write_at(&[7; 20_000], 0).unwrap();
        file.discard_range(3000, 10_000).unwrap();
        file.discard_range(19_000, 10_000).unwrap();
        file.discard_range(u64::MAX, 10).unwrap();
        let bytes = contents(&file);
        assert_eq!(bytes.len(), 20_000);
        assert!(bytes.iter().all(|byte| [0, 7].contains(byte)));
        assert!(bytes[..3000].iter().chain(&bytes[13_000..19_000]).all(|&byte| byte == 7));
    }
}

#[test]
fn far_past_the_end_everything_is_zero_and_nothing_can_be_written() {
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let folder = tempfile::tempdir().unwrap();
        let Some(file) = create(&folder.path().join("x"), cache) else { continue };
        for offset in [1 << 40, i64::MAX as u64 - 3, i64::MAX as u64, u64::MAX - 3] {
            let mut buf = [1; 100];
            file.read_at(&mut buf, offset).unwrap();
            assert_eq!(buf, [0; 100]);
        }
        for offset in [i64::MAX as u64 - 3, u64::MAX - 3] {
            file.write_at(&[1; 10], offset).unwrap_err();
            file.zero_range(offset, 10, ZeroMode::UNMAP).unwrap_err();
            file.allocate_range(offset, 10).unwrap_err();
        }
        assert_eq!(file.len().unwrap(), 0);
    }
}

#[test]
fn holes_are_seen_and_forgotten_when_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = create(&folder.path().join("x"), CacheMode::Writeback).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_at(&[1; 65536], 1 << 20).unwrap();
    let extent = |offset, len| file.extent(offset, len).unwrap();
    let hole = extent(0, u64::MAX);
    if hole.data {
        eprintln!("SKIPPED: the file system of {} does not tell holes", folder.path().display());
        return;
    }
    assert_eq!(hole.len, 1 << 20);
    assert_eq!(extent(1 << 20, 1 << 30), HostExtent { data: true, len: 65536 });
    assert_eq!(extent(1 << 19, 10), HostExtent { data: false, len: 10 });
    // The answer for the hole is remembered now; a write must not be hidden by it.
    file.write_at(&[1; 4096], 1 << 19).unwrap();
    assert_eq!(extent(1 << 19, 10), HostExtent { data: true, len: 10 });
    assert!(!extent((1 << 19) + 4096, 10).data);
    file.zero_range(1 << 20, 65536, ZeroMode::UNMAP).unwrap();
    assert!(!extent(1 << 20, 10).data);
    // Past the last data, and past the end, it is all one hole.
    assert_eq!(extent(1 << 29, u64::MAX).len, u64::MAX - (1 << 29));
}

#[test]
fn space_is_taken_and_given_back_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let file = create(&folder.path().join("x"), CacheMode::Writeback).unwrap();
    let allocated = || file.allocated().unwrap().unwrap();
    file.zero_range(0, 1 << 20, ZeroMode::UNMAP).unwrap();
    assert_eq!((file.len().unwrap(), allocated()), (1 << 20, 0));
    file.allocate_range(0, 1 << 20).unwrap();
    assert!(allocated() >= 1 << 20);
    file.zero_range(0, 1 << 20, ZeroMode::UNMAP).unwrap();
    assert!(allocated() < 1 << 16, "{}", allocated());
    file.zero_range(1 << 20, 1 << 20, ZeroMode::ALLOCATE).unwrap();
    assert_eq!(file.len().unwrap(), 2 << 20);
    assert!((1 << 20..2 << 20).contains(&allocated()), "{}", allocated());
}

/// `ftruncate` to a length computed a moment ago would cut off what another thread has just written.
#[test]
fn growing_in_many_threads_loses_nothing() {
    for (cache, each) in [(CacheMode::Writeback, 2000), (CacheMode::None, 200)] {
        let folder = tempfile::tempdir().unwrap();
        let Some(file) = create(&folder.path().join("x"), cache) else { continue };
        const THREADS: u64 = 4;
        const UNIT: u64 = 1000;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let file = &file;
                scope.spawn(move || {
                    for turn in 0..each {
                        let offset = (turn * THREADS + thread) * UNIT;
                        if thread == 0 {
                            file.zero_range(offset, UNIT, ZeroMode::UNMAP).unwrap();
                        } else {
                            file.write_at(&[1; 1000], offset).unwrap();
                        }
                    }
                });
            }
        });
        let bytes = contents(&file);
        assert_eq!(bytes.len() as u64, THREADS * each * UNIT);
        for (index, piece) in bytes.chunks(1000).enumerate() {
            let expected = u8::from(!(index as u64).is_multiple_of(THREADS));
            assert!(piece.iter().all(|&byte| byte == expected), "{cache:?}: piece {index}");
        }
    }
}

/// A write of a part of a block reads the block and writes it back: what an aligned write has put there in
/// between must not be undone.
#[test]
fn an_unaligned_direct_write_does_not_undo_an_aligned_one() {
    let folder = tempfile::tempdir().unwrap();
    let Some(file) = create(&folder.path().join("x"), CacheMode::None) else { return };
    file.write_at(&[0; 8192], 0).unwrap();
    thread::scope(|scope| {
        let small = scope.spawn(|| {
            for _ in 0..100 {
                file.write_at(&[0xEE; 100], 1000).unwrap();
            }
        });
        let mut turn = 0_u8;
        while !small.is_finished() {
            turn = turn.wrapping_add(1);
            file.write_at(&AlignedFilled::new(turn).0, 0).unwrap();
            let mut buf = [0; 1000];
            file.read_at(&mut buf, 0).unwrap();
            assert_eq!(buf, [turn; 1000]);
        }
    });
}

/// 4096 equal bytes that go straight to the device.
struct AlignedFilled(AlignedBuf);

impl AlignedFilled {
    fn new(byte: u8) -> Self {
        let mut buf = AlignedBuf::new(4096, 4096);
        buf.fill(byte);
        Self(buf)
    }
}

/// Two parts of one block, written at once under `O_DIRECT`: each write is a read and a write of the block.
#[test]
fn neighbours_in_one_block_do_not_undo_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let Some(file) = create(&folder.path().join("x"), CacheMode::None) else { return };
    file.write_at(&[0; 8192], 0).unwrap();
    thread::scope(|scope| {
        for thread in 0..4_u8 {
            let file = &file;
            scope.spawn(move || {
                let offset = u64::from(thread) * 100 + 4000;
                for turn in 0..50 {
                    file.write_at(&[turn; 100], offset).unwrap();
                    let mut buf = [0; 100];
                    file.read_at(&mut buf, offset).unwrap();
                    assert_eq!(buf, [turn; 100]);
                }
            });
        }
    });
}

#[test]
fn opening_says_what_the_host_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let open = |path: &Path, options: FileOptions| HostFile::open(path, &options);
    let error = open(&path, FileOptions::read_only()).unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::NotFound, "No such file or directory".into()));
    let error = open(folder.path(), FileOptions::read_only()).unwrap_err();
    assert!(error.message().contains("to be a regular file"), "{error}");
    open(&path, FileOptions::creating(CreateMode::New)).unwrap().write_at(b"abc", 0).unwrap();
    let error = open(&path, FileOptions::creating(CreateMode::New)).unwrap_err();
    assert_eq!(error.message(), "File exists");
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    let followed = open(&link, FileOptions::read_only()).unwrap();
    assert_eq!(followed.identity(), open(&path, FileOptions::read_only()).unwrap().identity());
    open(&link, FileOptions { follow: false, ..FileOptions::read_only() }).unwrap_err();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
    let error = open(&fifo, FileOptions::read_only()).unwrap_err();
    assert!(error.message().contains("to be a regular file"), "{error}");
    assert_eq!(open(&path, FileOptions::creating(CreateMode::Truncate)).unwrap().len().unwrap(), 0);
}

#[test]
fn a_file_in_use_is_not_emptied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let user = HostFile::open(&path, &FileOptions::creating(CreateMode::New)).unwrap();
    user.write_at(b"precious", 0).unwrap();
    user.lock(Permissions::CONSISTENT_READ, Permissions::CONSISTENT_READ).unwrap();
    let error = HostFile::open(&path, &FileOptions::creating(CreateMode::Truncate)).unwrap_err();
    assert_eq!(error.message(), "Failed to get \"write\" lock");
    assert_eq!(error.hints()[0], format!("Is another process using the image [{}]?", path.display()));
    assert_eq!(contents(&user), b"precious");
    user.unlock();
    HostFile::open(&path, &FileOptions::creating(CreateMode::Truncate)).unwrap();
    assert_eq!(user.len().unwrap(), 0);
}

#[test]
fn a_file_open_for_reading_is_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    fs::write(&path, b"abc").unwrap();
    let file = HostFile::open(&path, &FileOptions::read_only()).unwrap();
    assert!(file.read_only());
    let source = MemStorage::new();
    for result in [
        file.write_at(b"x", 0),
        file.write_vectored_at(&[IoSlice::new(b"x")], 0),
        file.zero_range(0, 1, ZeroMode::UNMAP),
        file.discard_range(0, 1),
        file.allocate_range(0, 1),
        file.set_len(0),
        file.clone_range(0, &source, 0, 1).map(drop),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    file.sync().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"abc");
}

#[test]
fn cache_modes_have_qemus_names() {
    for mode in CacheMode::ALL {
        assert_eq!(CacheMode::parse(mode.name()), Some(mode));
    }
    assert_eq!(CacheMode::parse("off"), Some(CacheMode::None));
    assert_eq!(CacheMode::parse("Writeback"), None);
}

/// Runs a program and returns what it prints, or nothing if it is missing or fails.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A block device over a file, while root.
struct Loop(String);

impl Loop {
    fn new(folder: &Path, len: u64) -> Option<Self> {
        let path = folder.join("device");
        File::create(&path).unwrap().set_len(len).unwrap();
        let device = run("losetup", &["--find", "--show", path.to_str().unwrap()]);
        if device.is_none() {
            eprintln!("SKIPPED: no loop device to be had (that takes root): block devices are not tested");
        }
        device.map(Self)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn block_devices_have_a_fixed_length_and_all_abilities() {
    let folder = tempfile::tempdir().unwrap();
    const LEN: u64 = 4 << 20;
    let Some(device) = Loop::new(folder.path(), LEN) else { return };
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let options = FileOptions { cache, ..FileOptions::creating(CreateMode::Truncate) };
        let file = HostFile::open(Path::new(&device.0), &options).unwrap();
        assert!(file.is_block_device() && file.fixed_len());
        assert_eq!(file.len().unwrap(), LEN);
        let mut model = vec![3; to_usize(LEN)];
        file.write_at(&model, 0).unwrap();
        for (offset, len, mode) in [
            (0, 4096, ZeroMode::UNMAP),
            (10_000, 50_000, ZeroMode::UNMAP),
            (100_001, 70_000, ZeroMode::ALLOCATE),
            (200_100, 200, ZeroMode::UNMAP),
            (LEN - 1000, 1000, ZeroMode::ALLOCATE),
        ] {
            file.zero_range(offset, len, mode).unwrap();
            model[to_usize(offset)..to_usize(offset + len)].fill(0);
        }
        file.write_at(b"unaligned", 300_001).unwrap();
        model[300_001..300_010].copy_from_slice(b"unaligned");
        file.sync().unwrap();
        assert!(contents(&file) == model, "{cache:?}");
        file.discard_range(1 << 20, 1 << 20).unwrap();
        let mut beyond = [1; 1000];
        file.read_at(&mut beyond, LEN - 500).unwrap();
        assert!(is_zero(&beyond));
        assert_eq!(file.write_at(&[1; 1024], LEN - 512).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(file.write_at(&[1; 10], LEN).unwrap_err().kind(), ErrorKind::NoSpace);
        file.zero_range(LEN, 512, ZeroMode::UNMAP).unwrap_err();
        file.allocate_range(0, LEN).unwrap();
        assert_eq!(file.allocate_range(0, LEN + 1).unwrap_err().kind(), ErrorKind::NoSpace);
        file.set_len(1000).unwrap();
        file.set_len(LEN + 1).unwrap_err();
        assert_eq!(file.extent(0, LEN).unwrap(), HostExtent { data: true, len: LEN });
        assert_eq!(file.alignment(), if cache.direct() { 512 } else { 1 });
    }
}

/// A file system that shares blocks between files, while root.
struct Mounted {
    folder: PathBuf,
    _device: Loop,
}

impl Mounted {
    fn new(folder: &Path) -> Option<Self> {
        let device = Loop::new(folder, 400 << 20)?;
        let target = folder.join("mounted");
        fs::create_dir(&target).unwrap();
        let made = run("mkfs.xfs", &["-q", "-m", "reflink=1", &device.0]);
        let mounted = made.and_then(|_| run("mount", &[&device.0, target.to_str()?]));
        if mounted.is_none() {
            eprintln!("SKIPPED: no xfs to be mounted: sharing of blocks is not tested");
        }
        mounted.map(|_| Self { folder: target, _device: device })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.folder.to_str().unwrap()]);
    }
}

#[test]
fn blocks_are_shared_where_the_file_system_can() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(folder.path()) else { return };
    let source = create(&mounted.folder.join("source"), CacheMode::Writeback).unwrap();
    let target = create(&mounted.folder.join("target"), CacheMode::Writeback).unwrap();
    let mut data = vec![0; 1_000_000];
    Random::new(1).fill(&mut data);
    source.write_at(&data, 0).unwrap();
    assert!(target.clone_range(0, &source, 0, 524_288).unwrap());
    assert_eq!(target.len().unwrap(), 524_288);
    assert!(contents(&target) == data[..524_288]);
    // An unaligned end is possible where both files end.
    assert!(target.clone_range(524_288, &source, 524_288, 475_712).unwrap());
    assert!(contents(&target) == data);
    // Unaligned: the kernel refuses, and nothing has changed.
    assert!(!target.clone_range(100, &source, 0, 4096).unwrap());
    assert!(!target.clone_range(0, &source, 0, 100).unwrap());
    assert!(!target.clone_range(0, &source, 1 << 30, 4096).unwrap());
    assert!(contents(&target) == data);
    assert!(target.clone_range(4096, &source, 0, 0).unwrap());
    // Another file system, and a source without a descriptor.
    let elsewhere = create(&folder.path().join("elsewhere"), CacheMode::Writeback).unwrap();
    elsewhere.write_at(&data, 0).unwrap();
    assert!(!target.clone_range(0, &elsewhere, 0, 4096).unwrap());
    assert!(!target.clone_range(0, &MemStorage::from_bytes(data.clone()), 0, 4096).unwrap());
    // A refusal for one pair is not one for all; the copy is independent of the original.
    assert!(target.clone_range(0, &source, 4096, 4096).unwrap());
    target.write_at(b"x", 0).unwrap();
    assert!(contents(&source) == data);
    assert!(contents(&target)[1..4096] == data[4097..8192]);
    let shared: Arc<dyn Storage> = Arc::new(target);
    assert!(!shared.clone_range(8192, &MemStorage::new(), 0, 4096).unwrap());
    drop((shared, source));
}

/// A check must not even leave the trace of having read. (Root may do that with any file, others with their own.)
#[test]
fn reading_can_leave_the_time_of_access_alone() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    fs::write(&path, [1; 4096]).unwrap();
    // Older than its contents: even mounts with relatime would note the next read.
    let file = File::options().write(true).open(&path).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    file.set_times(fs::FileTimes::new().set_accessed(long_ago)).unwrap();
    let options = FileOptions { keep_access_time: true, ..FileOptions::default() };
    let opened = HostFile::open(&path, &options).unwrap();
    let mut buf = [0; 4096];
    opened.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [1; 4096]);
    assert_eq!(fs::metadata(&path).unwrap().atime(), 1_000_000);
}
