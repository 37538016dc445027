//! A disk for tests: clusters in memory, a backing disk, faults on demand, and a record of what was asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::device::check_range;
use block::extent::read_backing;
use block::num::to_usize;
use block::{
    BlockDevice, Compressed, CompressedWriter, Error, ErrorKind, LayerExtent, Limits, Result, Storage,
    Stored, ZeroMode,
};
use parking_lot::Mutex;

/// What a cluster of a [`Fake`] holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cell {
    Data(Vec<u8>),
    Zero,
}

/// What was asked of a [`Fake`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Reserve(u64, u64),
    Packed(u64, u64),
    Zero(u64, u64),
    Share(u64, u64),
}

/// A disk that stores whole clusters and leaves the others to its backing disk.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    pub(crate) cells: Mutex<BTreeMap<u64, Cell>>,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) asked: Mutex<Vec<Asked>>,
    /// Reads that touch one of these offsets fail in this way.
    pub(crate) bad_reads: Vec<(u64, Option<ErrorKind>)>,
    /// Writes that touch one of these offsets fail.
    pub(crate) bad_writes: Vec<u64>,
    /// Extents at these offsets cannot be looked up.
    pub(crate) bad_extents: Vec<u64>,
    /// The n-th write from now panics.
    pub(crate) panics: AtomicBool,
    /// How many extents were looked up.
    pub(crate) lookups: AtomicU64,
    /// The bytes lie here at the same offsets.
    pub(crate) host: Option<Arc<dyn Storage>>,
    /// Whether sharing works.
    pub(crate) shares: bool,
}

impl Fake {
    /// An empty disk.
    pub(crate) fn sized(size: u64) -> Self {
        Self { size, cluster: 512, ..Self::default() }
    }

    /// A disk full of data, in clusters of 512 bytes.
    pub(crate) fn with(bytes: Vec<u8>) -> Arc<Self> {
        let fake = Self::sized(bytes.len() as u64);
        for (index, chunk) in bytes.chunks(512).enumerate() {
            let mut cell = chunk.to_vec();
            cell.resize(512, 0);
            fake.cells.lock().insert(index as u64, Cell::Data(cell));
        }
        Arc::new(fake)
    }

    /// All of it.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut buf = vec![0; to_usize(self.size)];
        self.read_at(&mut buf, 0).unwrap();
        buf
    }

    /// Calls `act` for every cluster that a range touches, with the range inside it.
    fn each(
        &self,
        offset: u64,
        len: u64,
        mut act: impl FnMut(u64, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        check_range(offset, len, self.size)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (index, start) = (at / self.cluster, at % self.cluster);
            let stop = self.cluster.min(start + end - at);
            act(index, to_usize(start)..to_usize(stop))?;
            at += stop - start;
        }
        Ok(())
    }

    /// The bytes of a cluster, from wherever they come.
    fn whole(&self, index: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(self.cluster)];
        match self.cells.lock().get(&index) {
            Some(Cell::Data(cell)) => bytes.copy_from_slice(cell),
            Some(Cell::Zero) => {}
            None => read_backing(self.backing.as_deref(), &mut bytes, index * self.cluster)?,
        }
        Ok(bytes)
    }
}

fn fault() -> Error {
    std::io::Error::from_raw_os_error(5).into()
}

impl BlockDevice for Fake {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits { preferred: u32::try_from(self.cluster).unwrap(), ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        if let Some((at, kind)) = self.bad_reads.iter().find(|(at, _)| range.contains(at)) {
            return Err(kind.map_or_else(fault, |kind| Error::new(kind, format!("bad table for {at}"))));
        }
        let mut done = 0;
        self.each(offset, buf.len() as u64, |index, inside| {
            let bytes = self.whole(index)?;
            buf[done..done + inside.len()].copy_from_slice(&bytes[inside.clone()]);
            done += inside.len();
            Ok(())
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        assert!(!self.panics.load(Ordering::Relaxed), "as the test asked");
        let range = offset..offset + buf.len() as u64;
        if self.bad_writes.iter().any(|at| range.contains(at)) {
            return Err(std::io::Error::from_raw_os_error(28).into());
        }
        let mut done = 0;
        self.each(offset, buf.len() as u64, |index, inside| {
            let mut bytes = self.whole(index)?;
            bytes[inside.clone()].copy_from_slice(&buf[done..done + inside.len()]);
            self.cells.lock().insert(index, Cell::Data(bytes));
            done += inside.len();
            Ok(())
        })
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        self.asked.lock().push(Asked::Zero(offset, len));
        self.each(offset, len, |index, inside| {
            let whole = inside.len() as u64 == self.cluster.min(self.size - index * self.cluster);
            let mut bytes = self.whole(index)?;
            bytes[inside].fill(0);
            self.cells.lock().insert(index, if whole { Cell::Zero } else { Cell::Data(bytes) });
            Ok(())
        })
    }

    fn discard_at(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        if self.bad_extents.contains(&offset) {
            return Err(fault());
        }
        let stored = |cell: Option<&Cell>| match cell {
            Some(Cell::Data(_)) => Stored::Data,
            Some(Cell::Zero) => Stored::Zero,
            None => Stored::Absent,
        };
        let cells = self.cells.lock();
        let index = offset / self.cluster;
        let kind = stored(cells.get(&index));
        let end = (offset + max_len).min(self.size);
        let mut stop = (index + 1) * self.cluster;
        if kind == Stored::Absent {
            stop = cells.range(index..).next().map_or(u64::MAX, |(next, _)| next * self.cluster);
        } else {
            while stop < end && stored(cells.get(&(stop / self.cluster))) == kind {
                stop += self.cluster;
            }
        }
        let extent = LayerExtent::new(kind, stop.min(end) - offset);
        Ok(if self.host.is_some() && kind == Stored::Data { extent.at(offset) } else { extent })
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.backing.as_ref()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.host.as_ref()
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.asked.lock().push(Asked::Reserve(offset, len));
        Ok(())
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.asked.lock().push(Asked::Share(offset, len));
        if self.shares {
            let mut bytes = vec![0; to_usize(len)];
            source.read_at(&mut bytes, source_offset)?;
            self.write_at(&bytes, offset)?;
        }
        Ok(self.shares)
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        Some(self)
    }
}

impl CompressedWriter for Fake {
    fn cluster_size(&self) -> u32 {
        u32::try_from(self.cluster).unwrap()
    }

    fn compress(&self, data: &[u8]) -> Result<Compressed> {
        assert_eq!(data.len() as u64, self.cluster);
        let same = data.iter().all(|byte| *byte == data[0]);
        Ok(if same { Compressed::Packed(vec![data[0]]) } else { Compressed::Incompressible })
    }

    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        self.asked.lock().push(Asked::Packed(offset, clusters.len() as u64));
        for (index, packed) in (offset / self.cluster..).zip(clusters) {
            let Compressed::Packed(packed) = packed else { panic!("only packed clusters") };
            assert_eq!(packed.len(), 1);
            self.cells.lock().insert(index, Cell::Data(vec![packed[0]; to_usize(self.cluster)]));
        }
        Ok(())
    }
}

/// A disk of `sectors` sectors whose first clusters (of one sector each) hold the given bytes, over a backing disk.
pub(crate) fn layered(cells: &[Option<u8>], sectors: u64, backing: Option<Arc<Fake>>) -> Arc<Fake> {
    let mut fake = Fake::sized(sectors * 512);
    fake.backing = backing.map(|backing| backing as Arc<dyn BlockDevice>);
    for (index, byte) in (0..).zip(cells) {
        if let Some(byte) = byte {
            fake.cells.lock().insert(index, Cell::Data(vec![*byte; 512]));
        }
    }
    Arc::new(fake)
}
