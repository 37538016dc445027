//! The bodies of the fuzz targets, as plain functions of bytes. `fuzz/` wraps them for cargo-fuzz, the suite
//! replays their corpus on stable. A body panics when something is wrong and returns otherwise, whatever
//! the bytes are.

mod appliance;
mod blocks;
mod convert;
mod edit;
mod foreign;
mod guest;
mod inspect;
mod nbd;
mod nbd_server;
mod registry;
mod snapshot;
mod source;
mod vhdx;
mod vmdk;
mod vmdk_stream;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use block::image::{Image as _, Repair};
use block::mem::MemStorage;
use block::{BlockDevice, Error, ErrorKind, HostExtent, Result, Storage, ZeroMode};
use qcow2::create::CreateOptions;
use qcow2::{Header, Qcow2};

pub use self::appliance::appliance_wire;
pub use self::convert::guest_convert;
pub use self::edit::file_system_edit;
pub use self::foreign::{archive_open, foreign_open_read};
pub use self::guest::{
    file_system, grub_cfg, guest_disk, guest_nvram, pack_disk, partition_table, software_raid,
};
pub use self::inspect::{guest_inspect, guest_text, initramfs};
pub use self::nbd::{nbd_client, nbd_handshake};
pub use self::nbd_server::{Seeds, nbd_seeds, nbd_server_handshake, nbd_server_transmission};
pub use self::registry::{hive_seeds, registry_hive};
pub use self::vhdx::vhdx;
pub use self::vmdk::{vmdk, vmdk_edited};
pub use blocks::{block_seeds, mutated, vdi_image, vhd_image};
pub use snapshot::qcow2_snapshot;
pub use source::{damaged, source_libvirt, source_ovf, source_vbox, source_vmx, source_xl};
pub use vmdk_stream::{vmdk_extent, vmdk_sequential};

use crate::forge::Forge;
use crate::ops::{Model, Op};

/// The largest file that a target may make: what a small image can justify, and not more.
const MAX_FILE: u64 = 64 << 20;
/// The most guest bytes that are read at once.
const MAX_READ: u64 = 1 << 20;

/// Memory that refuses to grow without bounds, as a disk does.
#[derive(Debug, Default)]
pub struct Bounded(MemStorage);

impl Bounded {
    /// One that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(MemStorage::from_bytes(bytes))
    }

    /// A copy of the contents.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes()
    }

    fn room(offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= MAX_FILE => Ok(()),
            _ => Err(Error::new(ErrorKind::NoSpace, "No space left on device")),
        }
    }
}

impl Storage for Bounded {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        Self::room(0, len)?;
        self.0.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!(buf.len() as u64 <= MAX_FILE, "a read of {} bytes of a small image", buf.len());
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        Self::room(offset, buf.len() as u64)?;
        self.0.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        Self::room(offset, len)?;
        self.0.zero_range(offset, len, mode)
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard_range(offset, len)
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        Self::room(offset, len)?;
        self.0.allocate_range(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.0.sync()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent> {
        self.0.extent(offset, max_len)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "fuzz".to_owned()
    }
}

/// Opens an image over a bounded storage, with an empty data file if it wants one and no backing file.
fn open(storage: &Arc<Bounded>, writable: bool) -> Result<Arc<Qcow2>> {
    let header = Header::read(&**storage)?;
    let data_file: Option<Arc<dyn Storage>> =
        if header.has_data_file() { Some(Arc::new(Bounded::default())) } else { None };
    let options = qcow2::OpenOptions { writable, data_file, ..qcow2::OpenOptions::default() };
    Qcow2::open(Arc::clone(storage) as Arc<dyn Storage>, header, options)
}

/// Opens an image, describes it, walks its extents and reads what they point to.
pub fn qcow2_open_read(bytes: &[u8]) {
    let storage = Arc::new(Bounded::new(bytes.to_vec()));
    let Ok(disk) = open(&storage, false) else { return };
    let _ = disk.info();
    let mut buf = vec![0; 64 << 10];
    for extent in block::extent::extents(&*disk, 0, u64::MAX).take(300) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.end() <= disk.size(), "an extent outside the disk: {extent:?}");
        let len = extent.len.min(buf.len() as u64);
        let part = &mut buf[..usize::try_from(len).unwrap()];
        let _ = disk.read_at(part, extent.offset);
        let _ = disk.read_at(part, extent.end() - len);
    }
    let size = disk.size();
    for step in 0..8 {
        let offset = size / 8 * step;
        let len = (size - offset).min(MAX_READ).min(buf.len() as u64);
        let _ = disk.read_at(&mut buf[..usize::try_from(len).unwrap()], offset);
    }
    assert!(storage.to_bytes() == bytes, "reading has changed the image");
}

/// Checks an image, without and with repair. What has been repaired has to check clean, or be refused.
pub fn qcow2_check(bytes: &[u8]) {
    let plain = Arc::new(Bounded::new(bytes.to_vec()));
    let storage: Arc<dyn Storage> = Arc::clone(&plain) as Arc<dyn Storage>;
    let Ok(header) = Header::read_for_check(&*storage) else { return };
    let _ = qcow2::check::check(&storage, &header, None, Repair::None);
    assert!(plain.to_bytes() == bytes, "checking has changed the image");
}

/// Repairs an image, first what is leaked, then everything. Guest data that could be read stays what it was, and
/// what the repair calls clean checks clean.
pub fn qcow2_repair(bytes: &[u8]) {
    let plain = Arc::new(Bounded::new(bytes.to_vec()));
    let storage: Arc<dyn Storage> = Arc::clone(&plain) as Arc<dyn Storage>;
    let before = glimpses(bytes);
    for repair in [Repair::Leaks, Repair::All] {
        let Ok(header) = Header::read_for_check(&*storage) else { return };
        let report = qcow2::check::check(&storage, &header, None, repair);
        let after = glimpses(&plain.to_bytes());
        for (offset, contents) in &before {
            assert!(
                after.get(offset) == Some(contents),
                "{repair:?} has changed the data at {offset:#x}: {report:?}"
            );
        }
        let Ok(report) = report else { continue };
        let header = Header::read_for_check(&*storage).expect("the header after a repair");
        let again =
            qcow2::check::check(&storage, &header, None, Repair::None).expect("a check after a repair");
        assert_eq!(report.is_clean(), again.is_clean(), "{repair:?}: {report:?} {again:?}");
    }
}

/// What can be read of some clusters at the start and the end of the disk, by guest offset.
fn glimpses(bytes: &[u8]) -> BTreeMap<u64, Vec<u8>> {
    let mut seen = BTreeMap::new();
    let storage = Arc::new(Bounded::new(bytes.to_vec()));
    let Ok(disk) = open(&storage, false) else { return seen };
    let cluster = u64::from(disk.limits().preferred).max(512);
    let clusters = disk.size().div_ceil(cluster);
    for index in (0..clusters.min(40)).chain(clusters.saturating_sub(4).max(40)..clusters) {
        let offset = index * cluster;
        let mut buf = vec![0; usize::try_from((disk.size() - offset).min(cluster)).unwrap()];
        if disk.read_at(&mut buf, offset).is_ok() {
            seen.insert(offset, buf);
        }
    }
    seen
}

/// Random operations, decoded from bytes, on a good image, or on one that has been tampered with.
///
/// Byte 0 picks the seed; its top bit asks for tampering, then 12 bytes say where. Every further 8 bytes are
/// one operation. On a good image the result has to be what the model says, and check clean.
pub fn qcow2_ops(bytes: &[u8]) {
    let Some((&pick, mut rest)) = bytes.split_first() else { return };
    static SEEDS: LazyLock<Vec<(&str, Vec<u8>)>> = LazyLock::new(writable_seeds);
    let (_, mut image) = SEEDS[usize::from(pick & 0x7f) % SEEDS.len()].clone();
    let tampered = pick & 0x80 != 0;
    if tampered {
        let Some((places, tail)) = rest.split_at_checked(12) else { return };
        for place in places.chunks_exact(3) {
            let at = usize::from(u16::from_be_bytes([place[0], place[1]])) % image.len();
            image[at] ^= place[2];
        }
        rest = tail;
    }
    let storage = Arc::new(Bounded::new(image));
    let Ok(disk) = open(&storage, true) else { return };
    let size = disk.size().min(MAX_READ);
    let Ok(mut model) = read_all(&*disk, size).map(Model::from_bytes) else { return };
    for chunk in rest.chunks_exact(8).take(64) {
        let op = decode(chunk, size);
        match op.device(&*disk) {
            Ok(()) => op.model(&mut model),
            // A good image fails only for lack of space.
            Err(error) => {
                assert!(tampered || error.kind() == ErrorKind::NoSpace, "{op:?}: {error}");
                return;
            }
        }
    }
    let closed = disk.close();
    if tampered {
        return;
    }
    closed.expect("closing a good image");
    model.agree(&read_all(&*disk, size).expect("reading a good image")).expect("wrong data");
    drop(disk);
    expect_clean("after the operations", &storage.to_bytes());
    let disk = open(&storage, false).expect("opening it again");
    model.agree(&read_all(&*disk, size).expect("reading it again")).expect("wrong data after reopening");
}

/// Things done to bitmaps and, while they record, to the disk, decoded from bytes, on a good image or on one whose
/// bytes have been tampered with.
///
/// The top bit of byte 0 asks for tampering: then 12 bytes say where. Every further 4 bytes are a step. Bitmaps have
/// to come back as they were closed, and what checked clean before must not be corrupt after.
pub fn qcow2_bitmaps(bytes: &[u8]) {
    static SEED: LazyLock<Vec<u8>> = LazyLock::new(bitmap_seed);
    let Some((&pick, mut rest)) = bytes.split_first() else { return };
    let mut image = SEED.clone();
    if pick & 0x80 != 0 {
        let Some((places, tail)) = rest.split_at_checked(12) else { return };
        for place in places.chunks_exact(3) {
            let at = usize::from(u16::from_be_bytes([place[0], place[1]])) % image.len();
            image[at] ^= place[2];
        }
        rest = tail;
    }
    let sound = verdict(&image).is_some_and(|report| report.corruptions + report.check_errors == 0);
    let storage = Arc::new(Bounded::new(image));
    let Ok(disk) = open(&storage, true) else { return };
    for step in rest.chunks_exact(4).take(48) {
        let _ = bitmap_step(&disk, [step[0], step[1], step[2], step[3]]);
    }
    let dirty = bits_of(&disk);
    if disk.close().is_err() || !sound {
        return;
    }
    drop(disk);
    let report = verdict(&storage.to_bytes()).expect("checking what was clean");
    assert!(report.corruptions + report.check_errors == 0, "{report:?}");
    let disk = open(&storage, false).expect("opening it again");
    assert_eq!(dirty, bits_of(&disk), "the bitmaps are not what they were");
}

fn verdict(image: &[u8]) -> Option<block::image::CheckReport> {
    let storage: Arc<dyn Storage> = Arc::new(Bounded::new(image.to_vec()));
    let header = Header::read(&*storage).ok()?;
    qcow2::check::check(&storage, &header, None, Repair::None).ok()
}

/// Names and dirty ranges of the bitmaps that can be used.
fn bits_of(disk: &Qcow2) -> Vec<(Vec<u8>, Vec<block::DirtyExtent>)> {
    let bitmaps = disk.bitmaps().into_iter();
    bitmaps
        .filter_map(|bitmap| {
            let bits = disk.dirty_bitmap(&bitmap.name).ok()?;
            assert!(bits.count() <= bits.bits());
            Some((bitmap.name, bits.extents(0, u64::MAX).filter(|extent| extent.dirty).take(100).collect()))
        })
        .collect()
}

/// One step: what, to which bitmap, with which numbers.
fn bitmap_step(disk: &Qcow2, [what, which, a, b]: [u8; 4]) -> Result<()> {
    let name = |pick: u8| [b"one".as_slice(), b"two", b"three", b"a longer name"][usize::from(pick % 4)];
    let size = disk.size().clamp(1, MAX_READ);
    let (offset, len) = (u64::from(a) * 2039 % size, u64::from(b) * 257);
    let len = len.min(size - offset);
    match what % 11 {
        0 => disk.add_bitmap(name(which), Some(1 << (9 + a % 23)), b & 1 != 0),
        1 => disk.remove_bitmap(name(which)),
        2 => disk.clear_bitmap(name(which)),
        3 => disk.enable_bitmap(name(which), a & 1 != 0),
        4 => disk.merge_bitmap(name(which), &*disk.dirty_bitmap(name(a))?),
        5 => disk.flush(),
        6 => disk.close(),
        7 => disk.resize((1 + u64::from(a) * 4) * 512, block::Preallocation::Off),
        8 => disk.discard_at(offset, len),
        _ => disk.write_at(&vec![which; usize::try_from(len).unwrap()], offset),
    }
}

/// An image with bitmaps that record, do not, and hold bits of all kinds.
fn bitmap_seed() -> Vec<u8> {
    let mut options = CreateOptions::new(256 << 10);
    options.cluster_bits = 9;
    let storage = Arc::new(Bounded::new(built(&options, fill)));
    let disk = open(&storage, true).expect("opening the seed");
    for (name, granularity) in [(b"one".as_slice(), 512), (b"two", 4096), (b"three", 1 << 20)] {
        disk.add_bitmap(name, Some(granularity), true).expect("adding a bitmap");
    }
    disk.write_at(&[7; 9000], 70_000).expect("dirtying bitmaps");
    disk.enable_bitmap(b"two", false).expect("stopping a bitmap");
    disk.close().expect("closing the seed");
    drop(disk);
    storage.to_bytes()
}

/// File names, option strings and sizes of every form.
pub fn image_spec(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = image::Spec::from_filename(text);
    let _ = image::Spec::from_image_opts(text);
    let _ = block::size::parse(text);
}

/// A LUKS header: understood, described, written again, and tried with a passphrase unless that takes long.
pub fn luks_header(bytes: &[u8]) {
    const MOST_ROUNDS: u32 = 2000;
    let Ok(header) = crypt::luks::Header::parse(bytes, false) else { return };
    header.info(true);
    // What is not UTF-8 is not kept as it was; what is kept is kept for good.
    if let Ok(encoded) = header.encode() {
        let again = crypt::luks::Header::parse(&encoded, false).expect("what was written can be read");
        assert_eq!(again, header);
    }
    let rounds = header.slots.iter().filter(|slot| slot.active).map(|slot| slot.iterations);
    if header.spec().is_ok() && rounds.chain([header.digest_iterations]).all(|rounds| rounds <= MOST_ROUNDS) {
        let storage = Arc::new(Bounded::new(bytes.to_vec()));
        if let Ok(disk) = crypt::Luks::open(storage, b"pw") {
            let mut sector = [0; 512];
            let _ = disk.read_at(&mut sector, 0);
            let _ = disk.read_at(&mut sector[..3], disk.size().saturating_sub(3));
        }
    }
}

/// The JSON of a LUKS2 header, both copies of which have right checksums: understood, and tried with a passphrase unless
/// that takes long.
pub fn luks2_metadata(json: &[u8]) {
    use crypt::{Container, luks::Effort, luks2::testing};
    let mut bytes = testing::header(json, 1);
    bytes.resize(testing::DATA_OFFSET + 8192, 0x5a);
    let storage = Arc::new(MemStorage::from_bytes(bytes));
    let Ok(disk) = block::raw::Raw::open(storage, block::raw::RawOptions::default()) else { return };
    let disk: Arc<dyn BlockDevice> = Arc::new(disk);
    let Ok(container) = Container::read(&disk) else { return };
    let _ = container.fingerprint();
    let _ = container.unlock(&disk, testing::PASSPHRASE, &mut Effort::at_most(10_000));
    // Nobody finds the key that a stranger's digest asks for: any will do.
    for len in [16, 32, 64] {
        let Ok(inner) = container.open(&disk, &crypt::Secret::zeroed(len)) else { continue };
        let mut sector = [0; 512];
        let _ = inner.read_at(&mut sector, 0);
        let _ = inner.read_at(&mut sector[..3], inner.size().saturating_sub(3));
        let _ = inner.write_at(&sector[..5], inner.size() / 2);
    }
}

fn read_all(disk: &dyn BlockDevice, size: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// One operation from 8 bytes: kind, 3 bytes of offset, 3 of length, byte.
fn decode(chunk: &[u8], size: u64) -> Op {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let unit = if chunk[0] & 0x10 == 0 { 512 } else { 1 };
    let offset = (number(&chunk[1..4]) * unit) % size.max(1);
    let len = (1 + number(&chunk[4..7]) * unit % 70_000).min(size - offset);
    match chunk[0] % 6 {
        0 | 1 => Op::Write { offset, len, byte: chunk[7] },
        2 => Op::Zero { offset, len, unmap: true },
        3 => Op::Zero { offset, len, unmap: false },
        4 => Op::Discard { offset, len },
        _ => Op::Flush,
    }
}

/// Panics unless the image checks clean.
pub fn expect_clean(name: &str, bytes: &[u8]) {
    let storage: Arc<dyn Storage> = Arc::new(Bounded::new(bytes.to_vec()));
    let header = Header::read(&*storage).unwrap_or_else(|error| panic!("{name}: {error}"));
    let data_file: Option<Arc<dyn Storage>> =
        if header.has_data_file() { Some(Arc::new(Bounded::default())) } else { None };
    let report = qcow2::check::check(&storage, &header, data_file.as_ref(), Repair::None)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(report.is_clean(), "{name}: {report:?}");
}

/// Small good images of many kinds, to start from.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = writable_seeds();
    let mut compressed = CreateOptions::new(1 << 20);
    compressed.cluster_bits = 12;
    seeds.push(("zlib", built(&compressed, pack)));
    compressed.compression_type = qcow2::header::COMPRESSION_ZSTD;
    seeds.push(("zstd", built(&compressed, pack)));
    seeds.push(("bitmaps", bitmap_seed()));
    seeds.push(("forged", Forge::with_clusters(9, 32 << 10).bytes()));
    let mut backed = CreateOptions::new(1 << 20);
    backed.cluster_bits = 12;
    backed.backing_file = Some(b"base.raw".to_vec());
    backed.backing_format = Some(b"raw".to_vec());
    seeds.push(("backed", built(&backed, |_| {})));
    seeds
}

/// Those of them that can be written without anything else.
fn writable_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let with = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(256 << 10);
        change(&mut options);
        built(&options, fill)
    };
    vec![
        ("512", with(&|o| o.cluster_bits = 9)),
        ("4k", with(&|o| o.cluster_bits = 12)),
        ("v2", with(&|o| (o.version, o.cluster_bits) = (2, 10))),
        ("refcount-1", with(&|o| (o.cluster_bits, o.refcount_order) = (9, 0))),
        ("refcount-64", with(&|o| (o.cluster_bits, o.refcount_order) = (9, 6))),
        ("extended", with(&|o| (o.cluster_bits, o.extended_l2) = (14, true))),
        ("lazy", with(&|o| (o.cluster_bits, o.lazy_refcounts) = (12, true))),
    ]
}

fn built(options: &CreateOptions, change: impl Fn(&dyn BlockDevice)) -> Vec<u8> {
    let storage = Arc::new(Bounded::default());
    qcow2::create::create(&*storage, options).expect("creating a seed");
    let disk = open(&storage, true).expect("opening a seed");
    change(&*disk);
    disk.close().expect("closing a seed");
    drop(disk);
    storage.to_bytes()
}

/// Some data, some zeros, something at the end.
fn fill(disk: &dyn BlockDevice) {
    let cluster = u64::from(disk.limits().preferred);
    disk.write_at(&[0x11; 3000], 100).expect("filling a seed");
    disk.write_at(&vec![0x22; usize::try_from(2 * cluster).unwrap()], 4 * cluster).expect("filling a seed");
    disk.write_zeroes_at(5 * cluster, cluster, ZeroMode::UNMAP).expect("filling a seed");
    disk.write_at(&[0x33; 512], disk.size() - 512).expect("filling a seed");
}

/// A few compressed clusters.
fn pack(disk: &dyn BlockDevice) {
    let cluster = u64::from(disk.limits().preferred);
    for (index, byte) in [(0, 1u8), (1, 2), (9, 3)] {
        Op::Compressed { offset: index * cluster, len: cluster, byte }.device(disk).expect("packing a seed");
    }
}
