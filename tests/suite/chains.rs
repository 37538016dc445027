//! Chains: random ones against a model, with the power cut and the disk failing during rebase and commit, and long
//! ones within the limits of the process.

use std::sync::Arc;

use block::image::Repair;
use block::mem::MemStorage;
use block::testing::{CrashStorage, Fault, FaultStorage};
use block::{BlockDevice, Preallocation, Storage, ZeroMode};
use image::convert::{EngineOptions, Fresh, Source, convert_devices};
use image::progress::Quiet;
use image::rebase::{CopyOptions, Side, copy_differences};
use nix::errno::Errno;
use proptest::prelude::*;
use qcow2::create::CreateOptions;
use qcow2::{Header, Qcow2};
use tests::skip::qemu10;
use tests::{Dir, requires};

/// What an image of these tests is like.
#[derive(Debug, Clone, Copy)]
struct Shape {
    version: u32,
    cluster_bits: u32,
    extended: bool,
    /// In sectors.
    size: u64,
}

impl Shape {
    fn create(self, storage: &dyn Storage) {
        let mut options = CreateOptions::new(self.size * 512);
        (options.version, options.cluster_bits, options.extended_l2) =
            (self.version, self.cluster_bits, self.extended);
        // That there is a backing file matters, not its name: it is opened by the test.
        options.backing_file = Some(b"below".to_vec());
        options.backing_format = Some(b"qcow2".to_vec());
        qcow2::create::create(storage, &options).unwrap();
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        prop_oneof![1 => Just(2u32), 4 => Just(3u32)],
        prop_oneof![9..=13u32, Just(14), Just(16)],
        any::<bool>(),
        1..600u64,
    )
        .prop_map(|(version, cluster_bits, extended, size)| Shape {
            version,
            cluster_bits,
            extended: extended && cluster_bits >= 14 && version == 3,
            size,
        })
}

fn open(storage: &Arc<dyn Storage>, backing: Option<Arc<dyn BlockDevice>>, writable: bool) -> Arc<Qcow2> {
    let header = Header::read(&**storage).unwrap();
    let options = qcow2::OpenOptions { writable, backing, ..qcow2::OpenOptions::default() };
    Qcow2::open(Arc::clone(storage), header, options).unwrap()
}

fn read_all(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[track_caller]
fn sound(storage: &Arc<dyn Storage>, leaks: bool, story: &str) {
    let report =
        qcow2::check::check(storage, &Header::read(&**storage).unwrap(), None, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{story}: {report:#?}");
    assert!(leaks || report.leaks == 0, "{story}: {report:#?}");
}

/// A chain in memory, bottom first, and what each member shows.
#[derive(Default)]
struct Chain {
    files: Vec<Arc<dyn Storage>>,
    shows: Vec<Vec<u8>>,
}

impl Chain {
    /// Opens the members up to and with `top`; those in `writable` for writing.
    fn open(&self, top: usize, writable: &[usize]) -> Vec<Arc<Qcow2>> {
        let mut opened: Vec<Arc<Qcow2>> = vec![];
        for (index, file) in self.files.iter().enumerate().take(top + 1) {
            let backing = opened.last().map(|layer| Arc::clone(layer) as Arc<dyn BlockDevice>);
            opened.push(open(file, backing, writable.contains(&index)));
        }
        opened
    }

    /// Adds a member on top.
    fn push(&mut self, shape: Shape) {
        let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
        shape.create(&*file);
        let mut bytes = self.shows.last().cloned().unwrap_or_default();
        bytes.resize(usize::try_from(shape.size * 512).unwrap(), 0);
        self.files.push(file);
        self.shows.push(bytes);
    }

    fn top(&self) -> usize {
        self.files.len() - 1
    }

    /// Every member is sound and shows what it should.
    fn judge(&self, upto: usize, story: &str) {
        for file in &self.files {
            sound(file, false, story);
        }
        for (index, (layer, shows)) in self.open(upto, &[]).iter().zip(&self.shows).enumerate() {
            let read = read_all(&**layer);
            let wrong = read.iter().zip(shows).position(|(a, b)| a != b);
            assert!(read.len() == shows.len() && wrong.is_none(), "{story}: member {index} at {wrong:?}");
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Push(Shape),
    Write(u32, u32, u8),
    Zero(u32, u32),
    Discard(u32, u32),
    Compressed(u32, u8),
    Resize(u64),
    /// The top onto another member, or onto nothing; compressed.
    Rebase(u8, bool),
    /// The top into the member so many below.
    Commit(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (any::<u32>(), prop_oneof![1..3000u32, 1..100_000u32]);
    prop_oneof![
        2 => shape().prop_map(Op::Push),
        6 => (place(), 1u8..).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        3 => place().prop_map(|(at, len)| Op::Zero(at, len)),
        1 => place().prop_map(|(at, len)| Op::Discard(at, len)),
        2 => (any::<u32>(), 1u8..).prop_map(|(at, byte)| Op::Compressed(at, byte)),
        1 => (1..700u64).prop_map(Op::Resize),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(at, packed)| Op::Rebase(at, packed)),
        2 => any::<u8>().prop_map(Op::Commit),
    ]
}

/// Rebases an open image from the devices of one chain to those of another; the members from `common` on downwards
/// are in both.
fn rebase(top: &Qcow2, old: &[Arc<Qcow2>], new: &[Arc<Qcow2>], compress: bool) -> block::Result<()> {
    let shared = old.iter().zip(new).take_while(|(a, b)| Arc::ptr_eq(a, b)).count();
    let side = |chain: &[Arc<Qcow2>]| {
        let device = chain.last().map(|layer| Arc::clone(layer) as Arc<dyn BlockDevice>);
        Side::new(device, u32::try_from(chain.len() - shared).unwrap())
    };
    copy_differences(top, &side(old)?, &side(new)?, CopyOptions { threads: 3, compress }, &Quiet)?;
    top.flush()?;
    top.change_header(|header| {
        header.backing_file = (!new.is_empty()).then(|| b"another".to_vec());
        header.backing_format = (!new.is_empty()).then(|| b"qcow2".to_vec());
        Ok(())
    })?;
    top.close()
}

fn commit(top: &Arc<Qcow2>, base: &Qcow2, hops: usize) -> block::Result<()> {
    let source = Source::new([Arc::clone(top) as Arc<dyn BlockDevice>])?;
    if base.size() < source.size() {
        base.resize(source.size(), Preallocation::Off)?;
    }
    let fresh = Fresh::Base { layers_above: u32::try_from(hops).unwrap() };
    let options = EngineOptions { threads: 3, fresh, sparse: 64 << 10, ..EngineOptions::default() };
    convert_devices(&source, base, &options, &Quiet)?;
    base.close()?;
    if hops == 1 {
        top.make_empty()?;
        top.close()?;
    }
    Ok(())
}

fn carry_out(op: &Op, chain: &mut Chain) -> block::Result<()> {
    let top = chain.top();
    let size = chain.shows[top].len() as u64;
    let range = |at: u32, len: u32| (u64::from(at) % size, u64::from(len).min(size - u64::from(at) % size));
    let bytes = |(at, len): (u64, u64)| usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
    match *op {
        Op::Push(shape) if chain.files.len() < 6 => chain.push(shape),
        Op::Push(_) => {}
        Op::Write(at, len, byte) => {
            let (at, len) = range(at, len);
            let open = chain.open(top, &[top]);
            open[top].write_at(&vec![byte; usize::try_from(len).unwrap()], at)?;
            open[top].close()?;
            chain.shows[top][bytes((at, len))].fill(byte);
        }
        Op::Zero(at, len) => {
            let (at, len) = range(at, len);
            let open = chain.open(top, &[top]);
            open[top].write_zeroes_at(at, len, ZeroMode::UNMAP)?;
            open[top].close()?;
            chain.shows[top][bytes((at, len))].fill(0);
        }
        Op::Discard(at, len) => {
            let (at, len) = range(at, len);
            let open = chain.open(top, &[top]);
            open[top].discard_at(at, len)?;
            open[top].close()?;
            chain.shows[top] = read_all(&*open[top]);
        }
        Op::Compressed(at, byte) => {
            let open = chain.open(top, &[top]);
            let writer = open[top].compressed_writer().unwrap();
            let cluster = u64::from(writer.cluster_size());
            let at = u64::from(at) % size / cluster * cluster;
            let packed = writer.compress(&vec![byte; usize::try_from(cluster).unwrap()])?;
            writer.write_compressed(&[packed], at)?;
            open[top].close()?;
            chain.shows[top][bytes((at, cluster.min(size - at)))].fill(byte);
        }
        Op::Resize(sectors) => {
            let open = chain.open(top, &[top]);
            open[top].resize(sectors * 512, Preallocation::Off)?;
            open[top].close()?;
            chain.shows[top].resize(usize::try_from(sectors * 512).unwrap(), 0);
        }
        Op::Rebase(onto, compress) => {
            // Onto nothing, or onto any member below: those in between drop out of the chain.
            let keep = usize::from(onto) % (top + 1);
            let open = chain.open(top, &[top]);
            rebase(&open[top], &open[..top], &open[..keep], compress)?;
            drop(open);
            chain.files.drain(keep..top);
            chain.shows.drain(keep..top);
        }
        Op::Commit(hops) if top > 0 => {
            let hops = 1 + usize::from(hops) % top;
            let base = top - hops;
            let open = chain.open(top, &[top, base]);
            commit(&open[top], &open[base], hops)?;
            drop(open);
            let shows = chain.shows[top].clone();
            let longer = shows.len().max(chain.shows[base].len());
            let old = std::mem::replace(&mut chain.shows[base], shows);
            if old.len() == longer {
                let len = chain.shows[base].len();
                chain.shows[base].extend_from_slice(&old[len..]);
            }
            // What lies between shows something else now, as with qemu-img: judged as it reads.
            for (index, layer) in chain.open(top, &[]).iter().enumerate().take(top).skip(base + 1) {
                chain.shows[index] = read_all(&**layer);
            }
        }
        Op::Commit(_) => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn random_chains_show_what_the_model_shows(
        first in shape(),
        ops in proptest::collection::vec(op(), 1..25),
    ) {
        let mut chain = Chain::default();
        chain.push(first);
        for (number, op) in ops.iter().enumerate() {
            carry_out(op, &mut chain).unwrap();
            chain.judge(chain.top(), &format!("after {number}: {op:?}"));
        }
    }

    /// Two chains on one base, the overlay moved from the one to the other.
    #[test]
    fn an_overlay_moves_to_another_branch(
        base in shape(), old in shape(), new in shape(), over in shape(),
        writes in proptest::collection::vec((0..4usize, any::<u32>(), 1..40_000u32, any::<u8>()), 1..20),
        compress in any::<bool>(),
    ) {
        let shapes = [base, old, new, over];
        let files: Vec<Arc<dyn Storage>> = shapes.iter().map(|shape| {
            let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
            shape.create(&*file);
            file
        }).collect();
        let below = |file: usize| match file { 0 => None, 1 | 2 => Some(0), _ => Some(1) };
        let opened = |writable: usize| {
            let mut found: Vec<Arc<Qcow2>> = vec![];
            for (index, file) in files.iter().enumerate() {
                let backing = below(index).map(|below| Arc::clone(&found[below]) as Arc<dyn BlockDevice>);
                found.push(open(file, backing, index == writable));
            }
            found
        };
        for (file, at, len, byte) in writes {
            let image = &opened(file)[file];
            let at = u64::from(at) % image.size();
            let len = u64::from(len).min(image.size() - at);
            if byte % 4 == 0 {
                image.write_zeroes_at(at, len, ZeroMode::UNMAP).unwrap();
            } else {
                image.write_at(&vec![byte; usize::try_from(len).unwrap()], at).unwrap();
            }
            image.close().unwrap();
        }
        let before = {
            let open = opened(3);
            let before = read_all(&*open[3]);
            let (b, o, n) = (&open[0], &open[1], &open[2]);
            rebase(&open[3], &[b, o].map(Arc::clone), &[b, n].map(Arc::clone), compress).unwrap();
            before
        };
        let open = opened(4);
        let moved = self::open(&files[3], Some(Arc::clone(&open[2]) as Arc<dyn BlockDevice>), false);
        prop_assert!(read_all(&*moved) == before);
        sound(&files[3], false, "the overlay");
    }
}

/// The images of the tests below: a base full of data, another one, and an overlay with something in it.
fn three(extended: bool) -> (Arc<dyn Storage>, Arc<dyn Storage>, MemStorage) {
    let bits = if extended { 14 } else { 9 };
    let shape = |sectors| Shape { version: 3, cluster_bits: bits, extended, size: sectors };
    let image = |byte: u8, len: u64| {
        let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
        shape(len).create(&*file);
        let disk = open(&file, None, true);
        disk.write_at(&vec![byte; 9000], 2048).unwrap();
        disk.write_at(&vec![byte + 1; 700], 30_000).unwrap();
        disk.close().unwrap();
        file
    };
    let (old, new) = (image(1, 90), image(5, 70));
    let over = MemStorage::new();
    shape(80).create(&over);
    let over: Arc<dyn Storage> = Arc::new(over);
    let disk = open(&over, Some(open(&old, None, false)), true);
    disk.write_at(&[9; 3000], 4000).unwrap();
    disk.write_zeroes_at(8192, 1024, ZeroMode::UNMAP).unwrap();
    disk.close().unwrap();
    drop(disk);
    let mut bytes = vec![0; usize::try_from(over.len().unwrap()).unwrap()];
    over.read_at(&mut bytes, 0).unwrap();
    let copy = MemStorage::new();
    copy.write_at(&bytes, 0).unwrap();
    (old, new, copy)
}

#[test]
fn a_rebase_survives_a_power_cut_at_any_moment() {
    let mut tried = 0;
    for (extended, compress) in [(false, false), (false, true), (true, false)] {
        let (old, new, over) = three(extended);
        let storage = Arc::new(CrashStorage::new(over.to_bytes()));
        let before = {
            let file = Arc::clone(&storage) as Arc<dyn Storage>;
            let (o, n) = (open(&old, None, false), open(&new, None, false));
            let top = open(&file, Some(Arc::clone(&o) as Arc<dyn BlockDevice>), true);
            let before = read_all(&*top);
            rebase(&top, &[o], &[n], compress).unwrap();
            before
        };
        storage.mark(1);
        let (mut with_old, mut with_new) = (0, 0);
        for image in storage.images(400, 7) {
            let file = Arc::clone(&image.storage) as Arc<dyn Storage>;
            sound(&file, true, &image.description);
            let rebased = Header::read(&*file).unwrap().backing_file.as_deref() == Some(b"another");
            *(if rebased { &mut with_new } else { &mut with_old }) += 1;
            let backing = open(if rebased { &new } else { &old }, None, false);
            let top = open(&file, Some(backing), false);
            assert!(read_all(&*top) == before, "rebased {rebased}: {}", image.description);
            assert!(rebased || image.marks.is_empty(), "{}: it had returned", image.description);
            tried += 1;
        }
        assert!(with_old > 10 && with_new > 0, "{with_old} old, {with_new} new");
    }
    assert!(tried > 300, "only {tried} were tried");
}

#[test]
fn a_commit_survives_a_power_cut_at_any_moment() {
    let mut tried = 0;
    for extended in [false, true] {
        let (base, _, over) = three(extended);
        let mut bytes = vec![0; usize::try_from(base.len().unwrap()).unwrap()];
        base.read_at(&mut bytes, 0).unwrap();
        // One after the other: first the base changes, which is durable before anything happens to the top.
        let base_storage = Arc::new(CrashStorage::new(bytes));
        let top_storage = Arc::new(CrashStorage::new(over.to_bytes()));
        let before = {
            let b = open(&(Arc::clone(&base_storage) as Arc<dyn Storage>), None, true);
            let backing = Some(Arc::clone(&b) as Arc<dyn BlockDevice>);
            let top = open(&(Arc::clone(&top_storage) as Arc<dyn Storage>), backing, true);
            let before = read_all(&*top);
            commit(&top, &b, 1).unwrap();
            before
        };
        let shows = |base: &Arc<dyn Storage>, top: &Arc<dyn Storage>, story: &str| {
            sound(base, true, story);
            sound(top, true, story);
            let top = open(top, Some(open(base, None, false)), false);
            assert!(read_all(&*top) == before, "{story}");
        };
        let full: Arc<dyn Storage> = Arc::new(over);
        for image in base_storage.images(250, 3) {
            shows(
                &(Arc::clone(&image.storage) as Arc<dyn Storage>),
                &full,
                &format!("base, {}", image.description),
            );
            tried += 1;
        }
        let done = MemStorage::new();
        done.write_at(&base_storage.to_bytes(), 0).unwrap();
        let done: Arc<dyn Storage> = Arc::new(done);
        for image in top_storage.images(250, 4) {
            shows(
                &done,
                &(Arc::clone(&image.storage) as Arc<dyn Storage>),
                &format!("top, {}", image.description),
            );
            tried += 1;
        }
        let emptied = open(&(top_storage as Arc<dyn Storage>), None, false);
        assert!(read_all(&*emptied).iter().all(|byte| *byte == 0), "the top is not empty");
    }
    assert!(tried > 100, "only {tried} were tried");
}

/// Growing over a longer backing file: the old disk, or the new one with zeros, never what the backing file has there.
#[test]
fn growing_over_a_longer_backing_file_survives_a_power_cut() {
    for (version, extended, sectors) in [(3, false, 400), (3, true, 400), (2, false, 200), (3, false, 10)] {
        let bits = if extended { 14 } else { 9 };
        let base: Arc<dyn Storage> = Arc::new(MemStorage::new());
        Shape { version: 3, cluster_bits: 9, extended: false, size: 300 }.create(&*base);
        open(&base, None, true).write_at(&vec![0xbb; 300 * 512], 0).unwrap();
        let over = MemStorage::new();
        let old_size = 9 * 512 + 512 * u64::from(extended) * 3;
        Shape { version, cluster_bits: bits, extended, size: old_size / 512 }.create(&over);
        let storage = Arc::new(CrashStorage::new(over.to_bytes()));
        {
            let file = Arc::clone(&storage) as Arc<dyn Storage>;
            let top = open(&file, Some(open(&base, None, false)), true);
            top.resize(sectors * 512, Preallocation::Off).unwrap();
            storage.mark(1);
            top.close().unwrap();
        }
        let mut sizes = std::collections::BTreeSet::new();
        for image in storage.images(300, 5) {
            let file = Arc::clone(&image.storage) as Arc<dyn Storage>;
            sound(&file, true, &image.description);
            let top = open(&file, Some(open(&base, None, false)), false);
            sizes.insert(top.size());
            let read = read_all(&*top);
            let old = usize::try_from(old_size).unwrap();
            assert!(read[..old].iter().all(|byte| *byte == 0xbb), "{}: the old part", image.description);
            let shown = read[old..].iter().position(|byte| *byte != 0);
            assert_eq!(shown, None, "version {version}: {} shows its backing file", image.description);
            assert!(
                top.size() == sectors * 512 || image.marks.is_empty(),
                "{}: it had returned",
                image.description
            );
        }
        assert_eq!(sizes.len(), 2, "{sizes:?}");
    }
}

/// Whoever writes past the new end while the disk becomes shorter is refused, or has been undone.
#[test]
fn a_write_cannot_slip_past_the_end_of_a_shrinking_disk() {
    for round in 0..40u64 {
        let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
        Shape { version: 3, cluster_bits: 9, extended: false, size: 256 }.create(&*file);
        let disk = open(&file, None, true);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut at = 64 * 512 + round * 100;
                while disk.write_at(&[7; 1000], at).is_ok() {
                    at = 64 * 512 + (at * 31 + 512) % (190 * 512);
                }
            });
            std::thread::sleep(std::time::Duration::from_micros(50 * (round % 8)));
            disk.resize(64 * 512, Preallocation::Off).unwrap();
            writer.join().unwrap();
        });
        disk.resize(256 * 512, Preallocation::Off).unwrap();
        let left = read_all(&*disk)[64 * 512..].iter().position(|byte| *byte != 0);
        assert_eq!(left, None, "round {round}: what was cut off is back");
        disk.close().unwrap();
        drop(disk);
        sound(&file, false, "after the race");
    }
}

/// Every single failure of the disk during a rebase or commit is reported, and the contents stay.
#[test]
fn a_failing_disk_changes_nothing_that_is_shown() {
    let mut failures = 0;
    for n in 0.. {
        let (old, new, over) = three(false);
        let before = {
            let file: Arc<dyn Storage> = Arc::new(over);
            let before = read_all(&*open(&file, Some(open(&old, None, false)), false));
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&file)));
            let (o, n2) = (open(&old, None, false), open(&new, None, false));
            let top = open(&(Arc::clone(&faulty) as Arc<dyn Storage>), Some(Arc::clone(&o) as _), true);
            faulty.fail(Fault::nth(n, Errno::EIO).on_changes());
            let failed = rebase(&top, &[Arc::clone(&o)], &[Arc::clone(&n2)], false).is_err();
            faulty.heal();
            drop(top);
            let rebased = Header::read(&*file).unwrap().backing_file.as_deref() == Some(b"another");
            let top = open(&file, Some(if rebased { n2 } else { o }), false);
            assert!(read_all(&*top) == before, "fault {n}: failed {failed}, rebased {rebased}");
            sound(&file, true, &format!("fault {n}"));
            if !failed {
                assert!(rebased, "fault {n}: success without effect");
                break;
            }
            before
        };
        // The same fault during a commit, in the base and in the top.
        for in_base in [true, false] {
            let (base, _, over) = three(false);
            let over: Arc<dyn Storage> = Arc::new(over);
            let faulty = Arc::new(FaultStorage::new(Arc::clone(if in_base { &base } else { &over })));
            {
                let weak = Arc::clone(&faulty) as Arc<dyn Storage>;
                let b = open(if in_base { &weak } else { &base }, None, true);
                let top = open(if in_base { &over } else { &weak }, Some(Arc::clone(&b) as _), true);
                faulty.fail(Fault::nth(n, Errno::EIO).on_changes());
                let _ = commit(&top, &b, 1);
                faulty.heal();
            }
            let top = open(&over, Some(open(&base, None, false)), false);
            assert!(read_all(&*top) == before, "fault {n} in base {in_base}: other contents");
            sound(&base, true, "base");
            sound(&over, true, "top");
        }
        failures += 1;
    }
    assert!(failures > 5, "only {failures} failures");
}

/// Builds a chain of `members` images, each storing a cluster of its own.
fn long_chain(members: u32) -> Dir {
    let dir = Dir::new();
    for index in 0..members {
        let file: Arc<dyn Storage> = Arc::new(MemStorage::new());
        let mut options = CreateOptions::new(32 << 20);
        options.backing_file = (index > 0).then(|| format!("m{}.qcow2", index - 1).into_bytes());
        options.backing_format = (index > 0).then(|| b"qcow2".to_vec());
        qcow2::create::create(&*file, &options).unwrap();
        let disk = open(&file, None, true);
        let byte = u8::try_from(index % 250 + 1).unwrap();
        disk.write_at(&vec![byte; 64 << 10], u64::from(index % 500) << 16).unwrap();
        disk.close().unwrap();
        drop(disk);
        let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
        file.read_at(&mut bytes, 0).unwrap();
        dir.write(&format!("m{index}.qcow2"), &bytes);
    }
    dir
}

#[test]
fn chains_of_two_hundred_images() {
    requires!(qemu10());
    let dir = long_chain(200);
    let bytes = dir.qemu_reads("m199.qcow2");
    // In bounded memory, from a soft limit that would not do.
    let run =
        |words: &str| dir.vimg_cmd(words).memory_mib(1500).limit("--nofile=100:4096").run().expect_code(0);
    run("convert -O raw m199.qcow2 out.raw");
    assert!(dir.read("out.raw") == bytes);
    let map = dir.qemu_ok("map --output=json m199.qcow2");
    assert_eq!(run("map --output=json m199.qcow2").stdout, map.stdout);
    run("compare m199.qcow2 out.raw");
    run("measure -O qcow2 m199.qcow2");
    run("check m199.qcow2");
    run("info --backing-chain m199.qcow2");
    run("rebase -b m50.qcow2 -F qcow2 m199.qcow2");
    assert!(dir.qemu_reads("m199.qcow2") == bytes);
    run("rebase -u -b m198.qcow2 -F qcow2 m199.qcow2");
    run("commit -b m10.qcow2 m199.qcow2");
    assert!(dir.vimg_reads("m10.qcow2") == bytes);
    // And where the hard limit will not do either, an error that says so.
    dir.vimg_cmd("convert -O raw m199.qcow2 out.raw")
        .limit("--nofile=100:100")
        .run()
        .expect_code(1)
        .expect_stderr("Too many open files")
        .expect_stderr("limit on open files is 100");
}

#[test]
fn the_longest_chain_and_one_longer() {
    let dir = long_chain(1001);
    let run = |words: &str| dir.vimg_cmd(words).limit("--nofile=4096:4096").run();
    run("convert -O raw m999.qcow2 out.raw").expect_code(0);
    assert!(dir.read("out.raw")[499 << 16] == u8::try_from(999 % 250 + 1).unwrap());
    run("rebase -b '' m1000.qcow2").expect_code(1).expect_stderr("more than 1000 members");
}

#[test]
fn missing_members_and_circles_are_named() {
    requires!(qemu10());
    let dir = Dir::new();
    dir.qemu_ok("create -q -f qcow2 -u -b gone.qcow2 -F qcow2 l1.qcow2 1M");
    dir.qemu_ok("create -q -f qcow2 -b l1.qcow2 -F qcow2 -u l2.qcow2 1M");
    dir.qemu_ok("create -q -f qcow2 -b l2.qcow2 -F qcow2 -u l3.qcow2 1M");
    for image in ["l1", "l2", "l3"] {
        dir.same(&format!("map {image}.qcow2")).expect_code(1);
    }
    dir.vimg("map l3.qcow2")
        .expect_stderr("'l1.qcow2' names 'gone.qcow2' as its backing file, 3 levels below 'l3.qcow2'");
    dir.vimg_ok("rebase -u -b l3.qcow2 -F qcow2 l1.qcow2");
    let ran = dir.vimg("map l3.qcow2").expect_code(1);
    ran.expect_stderr("creates an infinite loop").expect_stderr("'l1.qcow2' names 'l3.qcow2'");
}
