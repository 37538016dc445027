//! A list of disk operations that can be carried out by qemu-io, by one of our own devices, and on a
//! plain `Vec<u8>`, which is the model that both are judged by.

use block::num::to_usize;
use block::{BlockDevice, ZeroMode};
use proptest::prelude::*;

/// One operation. Offsets and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Write `len` bytes of a pattern that depends on `seed` alone (qemu-io repeats one byte).
    Write {
        /// First byte.
        offset: u64,
        /// Length.
        len: u64,
        /// The byte that is written.
        byte: u8,
    },
    /// Write one cluster compressed.
    Compressed {
        /// First byte, a multiple of the cluster size.
        offset: u64,
        /// Length, one cluster, or less at the end of the disk.
        len: u64,
        /// The byte that is written.
        byte: u8,
    },
    /// Write zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Length.
        len: u64,
        /// Space may be given back.
        unmap: bool,
    },
    /// Say that a range is not needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// Make everything so far durable.
    Flush,
}

impl Op {
    /// The range it touches.
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Self::Write { offset, len, .. }
            | Self::Compressed { offset, len, .. }
            | Self::Zero { offset, len, .. }
            | Self::Discard { offset, len } => (offset, len),
            Self::Flush => (0, 0),
        }
    }

    /// A plain write for a compressed one.
    fn uncompressed(self) -> Self {
        match self {
            Self::Compressed { offset, len, byte } => Self::Write { offset, len, byte },
            other => other,
        }
    }

    /// The command that makes qemu-io do it.
    pub fn qemu_io(&self) -> String {
        match *self {
            Self::Write { offset, len, byte } => format!("write -q -P {byte} {offset} {len}"),
            Self::Compressed { offset, len, byte } => format!("write -q -c -P {byte} {offset} {len}"),
            Self::Zero { offset, len, unmap: false } => format!("write -q -z {offset} {len}"),
            Self::Zero { offset, len, unmap: true } => format!("write -q -z -u {offset} {len}"),
            Self::Discard { offset, len } => format!("discard -q {offset} {len}"),
            Self::Flush => "flush".to_owned(),
        }
    }

    /// Carries it out on a device of ours.
    ///
    /// # Errors
    /// Those of the device.
    pub fn device(&self, device: &dyn BlockDevice) -> block::Result<()> {
        match *self {
            Self::Write { offset, len, byte } => device.write_at(&vec![byte; to_usize(len)], offset),
            Self::Compressed { offset, len, byte } => compress(device, offset, len, byte),
            Self::Zero { offset, len, unmap } => {
                let mode = if unmap { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
                device.write_zeroes_at(offset, len, mode)
            }
            Self::Discard { offset, len } => device.discard_at(offset, len),
            Self::Flush => device.flush(),
        }
    }

    /// Carries it out on the model. Discarded bytes are `None` afterwards: anything may be read there
    /// that had been there before, or zero.
    pub fn model(&self, model: &mut Model) {
        let (offset, len) = self.range();
        let range = to_usize(offset)..to_usize(offset + len);
        match *self {
            Self::Write { byte, .. } | Self::Compressed { byte, .. } => model.set(range, byte),
            Self::Zero { .. } => model.set(range, 0),
            Self::Discard { .. } => model.forget(range),
            Self::Flush => {}
        }
    }
}

fn compress(device: &dyn BlockDevice, offset: u64, len: u64, byte: u8) -> block::Result<()> {
    let writer = device.compressed_writer().expect("the test asked for compression where there is none");
    let mut data = vec![0; writer.cluster_size() as usize];
    data[..to_usize(len)].fill(byte);
    match writer.compress(&data)? {
        packed @ block::Compressed::Packed(_) => writer.write_compressed(&[packed], offset),
        block::Compressed::Incompressible => device.write_at(&data[..to_usize(len)], offset),
    }
}

/// A perfect disk: what every byte has to read as, or, after a discard, may read as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    bytes: Vec<u8>,
    unsure: Vec<bool>,
}

impl Model {
    /// A disk of zeros.
    pub fn new(len: u64) -> Self {
        Self::from_bytes(vec![0; to_usize(len)])
    }

    /// A disk of these bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        let unsure = vec![false; bytes.len()];
        Self { bytes, unsure }
    }

    /// What it holds (old bytes where it has been discarded).
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether `byte` may be read at this place.
    pub fn allows(&self, at: usize, byte: u8) -> bool {
        self.bytes[at] == byte || (self.unsure[at] && byte == 0)
    }

    /// Changes the size; new bytes are zeros.
    pub fn resize(&mut self, len: u64) {
        self.bytes.resize(to_usize(len), 0);
        self.unsure.resize(to_usize(len), false);
    }

    fn set(&mut self, range: std::ops::Range<usize>, byte: u8) {
        self.bytes[range.clone()].fill(byte);
        self.unsure[range].fill(false);
    }

    fn forget(&mut self, range: std::ops::Range<usize>) {
        self.unsure[range].fill(true);
    }

    /// Compares with what was read; where that had been discarded, takes over what it turned out to be
    /// (but nothing other than the old byte or zero).
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn agree(&mut self, read: &[u8]) -> Result<(), String> {
        if read.len() != self.bytes.len() {
            return Err(format!("the disk has {} bytes, not {}", read.len(), self.bytes.len()));
        }
        for (at, &found) in read.iter().enumerate() {
            let wanted = self.bytes[at];
            if !self.allows(at, found) {
                return Err(format!("byte {at:#x} is {found:#04x}, not {wanted:#04x}"));
            }
            self.bytes[at] = found;
        }
        self.unsure.fill(false);
        Ok(())
    }
}

/// A list of operations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ops(pub Vec<Op>);

impl Ops {
    /// The same with plain writes for compressed ones: qemu refuses to compress over a cluster that is there.
    #[must_use]
    pub fn uncompressed(&self) -> Self {
        Self(self.0.iter().map(|op| op.uncompressed()).collect())
    }

    /// The commands for qemu-io.
    pub fn qemu_io(&self) -> Vec<String> {
        self.0.iter().map(Op::qemu_io).collect()
    }

    /// Carries them out on a device.
    ///
    /// # Errors
    /// The first that fails.
    pub fn device(&self, device: &dyn BlockDevice) -> block::Result<()> {
        self.0.iter().try_for_each(|op| op.device(device))
    }

    /// Carries them out on the model.
    pub fn model(&self, model: &mut Model) {
        for op in &self.0 {
            op.model(model);
        }
    }

    /// A fixed list that meets every kind of place in an image: whole and partial clusters, ranges over
    /// cluster borders, zeros over data and over nothing, discards, the end of the disk. `seed` varies the
    /// bytes, so that the layers of a chain differ. No discards without `discards`: what they leave is not
    /// defined, which a test that compares two implementations cannot use.
    pub fn tour(size: u64, cluster: u64, seed: u8, compressed: bool, discards: bool) -> Self {
        let c = cluster;
        let byte = |n: u8| seed.wrapping_mul(16).wrapping_add(n);
        let mut ops = vec![
            Op::Write { offset: 0, len: c, byte: byte(1) },
            Op::Write { offset: 2 * c - 512, len: 1024, byte: byte(2) },
            Op::Write { offset: 4 * c, len: 3 * c, byte: byte(3) },
            Op::Zero { offset: 5 * c, len: c, unmap: false },
            Op::Zero { offset: 7 * c, len: 2 * c, unmap: true },
            Op::Write { offset: 7 * c + c / 2, len: 512, byte: byte(4) },
            Op::Zero { offset: 6 * c + c / 4, len: c / 4, unmap: true },
            Op::Write { offset: size - 512, len: 512, byte: byte(5) },
            Op::Write { offset: 9 * c, len: c, byte: byte(6) },
        ];
        if discards {
            ops.push(Op::Discard { offset: 9 * c, len: c });
        }
        if compressed {
            ops.push(Op::Compressed { offset: 10 * c, len: c, byte: byte(7) });
            ops.push(Op::Compressed { offset: 11 * c, len: c, byte: byte(8) });
            ops.push(Op::Write { offset: 11 * c + 100, len: 100, byte: byte(9) });
        }
        Self(ops)
    }
}

/// Random operations on a disk of `size` bytes with clusters of `cluster` bytes: some at any byte, some
/// on sectors, some on whole clusters, because each meets different code.
pub fn any_op(size: u64, cluster: u64, compressed: bool) -> impl Strategy<Value = Op> {
    let unit = prop_oneof![2 => Just(1u64), 2 => Just(512u64), 3 => Just(cluster)];
    let range = (unit, any::<u64>(), any::<u64>()).prop_map(move |(unit, a, b)| {
        let units = size / unit;
        let first = a % units;
        let most = (units - first).min((4 * cluster / unit).max(1));
        (first * unit, (1 + b % most) * unit)
    });
    let clusters = size / cluster;
    let one_cluster = any::<u64>().prop_map(move |a| ((a % clusters) * cluster, cluster));
    let packed = if compressed { 2 } else { 0 };
    prop_oneof![
        6 => (range.clone(), 1u8..).prop_map(|((offset, len), byte)| Op::Write { offset, len, byte }),
        3 => (range.clone(), any::<bool>()).prop_map(|((offset, len), unmap)| Op::Zero { offset, len, unmap }),
        2 => range.prop_map(|(offset, len)| Op::Discard { offset, len }),
        1 => Just(Op::Flush),
        packed => (one_cluster, 1u8..).prop_map(|((offset, len), byte)| Op::Compressed { offset, len, byte }),
    ]
}
