//! The driver against a plain array of bytes: random writes, zeros, discards, flushes, resizes and reopens
//! over the shapes that an image can have.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]
#![expect(clippy::print_stderr, reason = "a skipped judge is announced")]

use std::sync::Arc;

use block::mem::MemStorage;
use block::{BlockDevice, Compressed, Preallocation, Storage, ZeroMode};
use proptest::prelude::*;
use qcow2::check::check;
use qcow2::create::{CreateOptions, create};
use qcow2::snapshot::Selector;
use qcow2::{Header, OpenOptions, Qcow2};

#[derive(Debug, Clone)]
enum Op {
    Write { at: u32, len: u32, byte: u8 },
    Zero { at: u32, len: u32, unmap: bool },
    Discard { at: u32, len: u32 },
    Compressed { cluster: u32, count: u32, byte: u8 },
    Reserve { at: u32, len: u32 },
    Flush,
    Reopen,
    Resize { size: u32 },
    Snapshot,
    ApplySnapshot { which: u32 },
    DeleteSnapshot { which: u32 },
    Read { at: u32, len: u32 },
}

fn op() -> impl Strategy<Value = Op> {
    let place = (any::<u32>(), prop_oneof![1..2000u32, 1..70_000u32, 1..400_000u32]);
    prop_oneof![
        6 => (place.clone(), 1..=255u8).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => (place.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero { at, len, unmap }),
        2 => place.clone().prop_map(|(at, len)| Op::Discard { at, len }),
        1 => (any::<u32>(), 1..5u32, any::<u8>())
            .prop_map(|(cluster, count, byte)| Op::Compressed { cluster, count, byte }),
        1 => place.clone().prop_map(|(at, len)| Op::Reserve { at, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => any::<u32>().prop_map(|size| Op::Resize { size }),
        2 => Just(Op::Snapshot),
        1 => any::<u32>().prop_map(|which| Op::ApplySnapshot { which }),
        1 => any::<u32>().prop_map(|which| Op::DeleteSnapshot { which }),
        2 => place.prop_map(|(at, len)| Op::Read { at, len }),
    ]
}

#[derive(Debug, Clone)]
struct Shape {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    zstd: bool,
    lazy: bool,
    backing_len: Option<u32>,
    size: u32,
    small_caches: bool,
    /// Encrypted with LUKS or with the old AES.
    cipher: Option<Method>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Luks,
    OldAes,
}

impl Method {
    /// Key 7, and a cipher that needs little setting up.
    fn volume(self) -> Arc<crypt::Volume> {
        let volume = match self {
            Self::Luks => crypt::Volume::new(crypt::CipherSpec::DEFAULT, &[7; 64]),
            Self::OldAes => crypt::Volume::qcow2_aes(b"seven"),
        };
        Arc::new(volume.unwrap())
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let sizes = 1..4000u32;
    (
        prop_oneof![1 => Just(2u32), 4 => Just(3u32)],
        prop_oneof![9..=12u32, Just(14), Just(16)],
        0..=6u32,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        proptest::option::of(1..1_500_000u32),
        sizes,
        (
            any::<bool>(),
            prop_oneof![2 => Just(None), 1 => Just(Some(Method::Luks)), 1 => Just(Some(Method::OldAes))],
        ),
    )
        .prop_map(
            |(
                version,
                cluster_bits,
                order,
                extended,
                zstd,
                lazy,
                backing_len,
                sectors,
                (small_caches, cipher),
            )| {
                Shape {
                    version,
                    cluster_bits,
                    refcount_order: if version == 2 { 4 } else { order },
                    extended_l2: extended && cluster_bits >= 14 && version == 3,
                    zstd: zstd && version == 3,
                    lazy: lazy && version == 3,
                    backing_len,
                    size: sectors * 512,
                    small_caches,
                    cipher,
                }
            },
        )
}

/// An image under test beside the bytes that it should hold.
struct Bench {
    shape: Shape,
    storage: Arc<dyn Storage>,
    backing: Option<Arc<dyn BlockDevice>>,
    image: Arc<Qcow2>,
    model: Vec<u8>,
    /// Bytes that a discard has left undefined.
    undefined: Vec<bool>,
    snapshots: Vec<Kept>,
}

/// A snapshot that should be there.
#[derive(Clone)]
struct Kept {
    id: Vec<u8>,
    model: Vec<u8>,
    undefined: Vec<bool>,
}

/// Turns an empty image into an encrypted one.
fn encrypt(storage: &Arc<dyn Storage>, method: Option<Method>) {
    let header = Header::read(&**storage).unwrap();
    let image =
        Qcow2::open(Arc::clone(storage), header, OpenOptions { writable: true, ..OpenOptions::default() })
            .unwrap();
    match method {
        None => {}
        Some(Method::Luks) => image.add_luks_header(b"not looked at here", 5000).unwrap(),
        Some(Method::OldAes) => image.use_old_aes().unwrap(),
    }
    image.close().unwrap();
}

fn backing_byte(at: usize) -> u8 {
    u8::try_from(at / 512 % 251).unwrap() | 1
}

impl Bench {
    fn new(shape: Shape) -> Self {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
        let options = CreateOptions {
            version: shape.version,
            cluster_bits: shape.cluster_bits,
            refcount_order: shape.refcount_order,
            extended_l2: shape.extended_l2,
            compression_type: u8::from(shape.zstd),
            lazy_refcounts: shape.lazy,
            ..CreateOptions::new(u64::from(shape.size))
        };
        create(&*storage, &options).unwrap();
        encrypt(&storage, shape.cipher);
        let backing_bytes: Vec<u8> = (0..shape.backing_len.unwrap_or(0) as usize).map(backing_byte).collect();
        let mut model = backing_bytes.clone();
        model.resize(shape.size as usize, 0);
        let backing = shape.backing_len.map(|_| {
            let raw = block::raw::Raw::open(
                Arc::new(MemStorage::from_bytes(backing_bytes)),
                block::raw::RawOptions { offset: 0, size: None },
            );
            Arc::new(raw.unwrap()) as Arc<dyn BlockDevice>
        });
        let image = Self::open(&shape, &storage, backing.as_ref());
        let undefined = vec![false; model.len()];
        Self { shape, storage, backing, image, model, undefined, snapshots: vec![] }
    }

    fn open(shape: &Shape, storage: &Arc<dyn Storage>, backing: Option<&Arc<dyn BlockDevice>>) -> Arc<Qcow2> {
        let header = Header::read(&**storage).unwrap();
        let options = OpenOptions {
            writable: true,
            backing: backing.cloned(),
            encryption: shape.cipher.map(Method::volume),
            l2_cache_bytes: shape.small_caches.then_some(0),
            refcount_cache_bytes: shape.small_caches.then_some(0),
            ..OpenOptions::default()
        };
        Qcow2::open(Arc::clone(storage), header, options).unwrap()
    }

    fn range(&self, at: u32, len: u32) -> std::ops::Range<usize> {
        let at = at as usize % self.model.len();
        at..(at + len as usize).min(self.model.len())
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { at, len, byte } => {
                let range = self.range(*at, *len);
                let buf: Vec<u8> =
                    range.clone().map(|i| byte.wrapping_add(u8::try_from(i % 7).unwrap())).collect();
                self.image.write_at(&buf, range.start as u64).unwrap();
                self.undefined[range.clone()].fill(false);
                self.model[range].copy_from_slice(&buf);
            }
            Op::Zero { at, len, unmap } => {
                let range = self.range(*at, *len);
                let mode = if *unmap { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
                self.image.write_zeroes_at(range.start as u64, range.len() as u64, mode).unwrap();
                self.undefined[range.clone()].fill(false);
                self.model[range].fill(0);
            }
            Op::Discard { at, len } => {
                let range = self.range(*at, *len);
                self.image.discard_at(range.start as u64, range.len() as u64).unwrap();
                self.undefined[range].fill(true);
            }
            Op::Compressed { cluster, count, byte } => self.compressed(*cluster, *count, *byte),
            Op::Reserve { at, len } => {
                let range = self.range(*at, *len);
                self.image.reserve(range.start as u64, range.len() as u64).unwrap();
            }
            Op::Flush => self.image.flush().unwrap(),
            Op::Reopen => self.reopen(),
            Op::Resize { size } => self.resize(u64::from(size % 4000 + 1) * 512),
            Op::Snapshot => self.snapshot(),
            Op::ApplySnapshot { which } => self.apply_snapshot(*which),
            Op::DeleteSnapshot { which } => self.delete_snapshot(*which),
            Op::Read { at, len } => {
                let range = self.range(*at, *len);
                let mut buf = vec![0; range.len()];
                self.image.read_at(&mut buf, range.start as u64).unwrap();
                self.same(&buf, range);
            }
        }
    }

    fn compressed(&mut self, cluster: u32, count: u32, byte: u8) {
        let size = 1usize << self.shape.cluster_bits;
        let clusters = self.model.len().div_ceil(size);
        let first = cluster as usize % clusters;
        let count = (count as usize).min(clusters - first);
        let Some(writer) = self.image.compressed_writer() else {
            assert!(self.shape.cipher.is_some());
            return;
        };
        let packed: Vec<Compressed> = (first..first + count)
            .map(|c| {
                let mut data = vec![0; size];
                let end = ((c + 1) * size).min(self.model.len());
                data[..end - c * size].fill(byte);
                writer.compress(&data).unwrap()
            })
            .collect();
        if packed.contains(&Compressed::Incompressible) {
            return;
        }
        writer.write_compressed(&packed, (first * size) as u64).unwrap();
        let range = first * size..((first + count) * size).min(self.model.len());
        self.undefined[range.clone()].fill(false);
        self.model[range].fill(byte);
    }

    fn snapshot(&mut self) {
        match self.image.create_snapshot(b"snap", std::time::SystemTime::UNIX_EPOCH) {
            Ok(entry) => self.snapshots.push(Kept {
                id: entry.id,
                model: self.model.clone(),
                undefined: self.undefined.clone(),
            }),
            // Narrow counters run out.
            Err(error) => {
                assert!(self.shape.refcount_order < 4, "{error}");
                assert_eq!(error.message(), "Invalid argument");
            }
        }
    }

    fn pick(&self, which: u32) -> Option<(usize, Selector)> {
        let index = which as usize % self.snapshots.len().max(1);
        let kept = self.snapshots.get(index)?;
        Some((index, Selector::Both { id: Some(kept.id.clone()), name: None }))
    }

    fn apply_snapshot(&mut self, which: u32) {
        let Some((index, selector)) = self.pick(which) else { return };
        match self.image.apply_snapshot(&selector) {
            Ok(()) => {
                self.model = self.snapshots[index].model.clone();
                self.undefined = self.snapshots[index].undefined.clone();
            }
            Err(error) => {
                assert!(self.shape.refcount_order < 4, "{error}");
                assert_eq!(error.message(), "Invalid argument");
            }
        }
    }

    fn delete_snapshot(&mut self, which: u32) {
        let Some((index, selector)) = self.pick(which) else { return };
        self.image.delete_snapshot(&selector).unwrap();
        self.snapshots.remove(index);
    }

    /// Every snapshot shows what it should, to whoever opens the image now.
    fn verify_snapshots(&self) {
        assert_eq!(self.image.snapshots().len(), self.snapshots.len());
        for kept in &self.snapshots {
            let header = Header::read(&*self.storage).unwrap();
            let options = OpenOptions {
                backing: self.backing.clone(),
                snapshot: Some(Selector::IdOrName(kept.id.clone())),
                encryption: self.shape.cipher.map(Method::volume),
                ..OpenOptions::default()
            };
            let view = Qcow2::open(Arc::clone(&self.storage), header, options).unwrap();
            assert_eq!(view.size(), kept.model.len() as u64);
            let mut buf = vec![0; kept.model.len()];
            view.read_at(&mut buf, 0).unwrap();
            let wrong = (0..buf.len()).find(|&i| !kept.undefined[i] && buf[i] != kept.model[i]);
            assert_eq!(wrong, None, "snapshot {}", String::from_utf8_lossy(&kept.id));
        }
    }

    fn resize(&mut self, size: u64) {
        if self.shape.version == 2 && !self.snapshots.is_empty() {
            self.image.resize(size, Preallocation::Off).unwrap_err();
            return;
        }
        self.image.resize(size, Preallocation::Off).unwrap();
        self.model.resize(usize::try_from(size).unwrap(), 0);
        self.undefined.resize(usize::try_from(size).unwrap(), false);
    }

    fn reopen(&mut self) {
        self.image.close().unwrap();
        self.image = Self::open(&self.shape, &self.storage, self.backing.as_ref());
    }

    fn same(&self, buf: &[u8], range: std::ops::Range<usize>) {
        for (i, byte) in range.zip(buf) {
            assert!(
                self.undefined[i] || *byte == self.model[i],
                "byte {i:#x}: {byte:#x} instead of {:#x}",
                self.model[i]
            );
        }
    }

    fn finish(mut self) -> Arc<dyn Storage> {
        self.verify();
        self.reopen();
        self.verify();
        self.verify_snapshots();
        self.image.close().unwrap();
        let report =
            check(&self.storage, &Header::read(&*self.storage).unwrap(), None, block::image::Repair::None);
        let report = report.unwrap();
        assert!(report.is_clean(), "{report:?}");
        self.ask_qemu();
        Arc::clone(&self.storage)
    }

    /// The real tool's opinion, where it is installed.
    fn ask_qemu(&self) {
        let mut bytes = vec![0; usize::try_from(self.storage.len().unwrap()).unwrap()];
        self.storage.read_at(&mut bytes, 0).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        std::fs::write(&path, bytes).unwrap();
        if self.shape.cipher.is_some() {
            // It would ask for a passphrase that there is none of.
            return;
        }
        match std::process::Command::new("qemu-img").args(["check", "-q"]).arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(_) => eprintln!("skipped: qemu-img check (not installed)"),
        }
    }

    fn verify(&self) {
        let mut buf = vec![0; self.model.len()];
        self.image.read_at(&mut buf, 0).unwrap();
        self.same(&buf, 0..self.model.len());
        let covered: u64 = block::extent::extents(&*self.image, 0, u64::MAX).map(|e| e.unwrap().len).sum();
        assert_eq!(covered, self.model.len() as u64);
        for extent in block::extent::extents(&*self.image, 0, u64::MAX).map(Result::unwrap).filter(|e| e.zero)
        {
            let range = usize::try_from(extent.offset).unwrap()..usize::try_from(extent.end()).unwrap();
            assert!(buf[range].iter().all(|b| *b == 0), "{extent:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_leaves_the_bytes_of_the_model(
        shape in shape(),
        ops in proptest::collection::vec(op(), 1..40),
    ) {
        let mut bench = Bench::new(shape);
        for op in &ops {
            bench.apply(op);
        }
        bench.finish();
    }
}

#[test]
fn many_threads_write_their_own_places() {
    for (extended_l2, cipher) in
        [(false, None), (true, None), (false, Some(Method::Luks)), (true, Some(Method::OldAes))]
    {
        let shape = Shape {
            version: 3,
            cluster_bits: 14,
            refcount_order: 4,
            extended_l2,
            zstd: false,
            lazy: false,
            backing_len: Some(100_000),
            size: 8 << 20,
            small_caches: true,
            cipher,
        };
        let mut bench = Bench::new(shape);
        let image = &bench.image;
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                scope.spawn(move || {
                    let mut state = thread;
                    for round in 0..300u64 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(thread);
                        // Threads interleave in 4 KiB slots: clusters are shared, bytes are not.
                        let slot = ((state >> 33) % 256) * 8 + thread;
                        let at = slot * 4096;
                        let byte = u8::try_from(round % 200).unwrap() + 1;
                        match state >> 60 {
                            0 => image.write_zeroes_at(at, 4096, ZeroMode::UNMAP).unwrap(),
                            1 => image.flush().unwrap(),
                            _ => image.write_at(&[byte; 4096], at).unwrap(),
                        }
                        let mut buf = [0; 4096];
                        image.read_at(&mut buf, at).unwrap();
                        if state >> 60 > 1 {
                            assert_eq!(buf, [byte; 4096], "thread {thread} at {at:#x}");
                        }
                    }
                });
            }
        });
        let mut buf = vec![0; bench.model.len()];
        bench.image.read_at(&mut buf, 0).unwrap();
        bench.model = buf;
        bench.finish();
    }
}
