//! The block device (section 5.2) over any [`BlockDevice`].

mod activity;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::num::{low_u32, to_usize};
use block::{BlockDevice, Error, Result, ZeroMode};
use parking_lot::Mutex;

use super::{Chain, Device, RingError, RingResult};
use crate::engine::{Disk, DiskActivity, ReadWatch};
use crate::memory::GuestRam;
use request::{Kind, Range, Request, SECTOR};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_GEOMETRY: u64 = 1 << 4;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Largest single buffer that a driver should use.
const MAX_SEGMENT: u32 = 4 << 20;
/// Most sectors that one segment of a discard or write-zeroes request may have.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Most segments of such a request.
pub(crate) const MAX_RANGES: u32 = 32;
/// Bytes that go between disk and guest at once.
const CHUNK: usize = 256 << 10;
const CONFIG_WRITEBACK: u64 = 32;
const CONFIG_LEN: usize = 60;

/// The device.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<dyn BlockDevice>,
    read_only: bool,
    serial: [u8; 20],
    queues: u16,
    sectors: u64,
    features: AtomicU64,
    /// The driver's word on the write cache: 1 unless it has said otherwise.
    writeback: AtomicU64,
    activity: Mutex<DiskActivity>,
    reads: Option<ReadWatch>,
}

impl Blk {
    /// A device over `disk` with so many queues (at least 1).
    pub fn new(disk: Disk, queues: u16) -> Self {
        let mut serial = [0; 20];
        for (slot, byte) in serial.iter_mut().zip(disk.serial.bytes()) {
            *slot = byte;
        }
        Self {
            read_only: disk.read_only || disk.device.read_only(),
            serial,
            queues: queues.max(1),
            sectors: disk.device.size() / SECTOR,
            disk: disk.device,
            features: AtomicU64::new(0),
            writeback: AtomicU64::new(1),
            activity: Mutex::default(),
            reads: None,
        }
    }

    /// The same device, with somebody who is told of every read.
    #[must_use]
    pub fn watched_by(self, reads: ReadWatch) -> Self {
        Self { reads: Some(reads), ..self }
    }

    /// What the disk has seen so far.
    pub fn activity(&self) -> DiskActivity {
        self.activity.lock().clone()
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &MAX_SEGMENT.to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        let cylinders = u16::try_from(self.sectors / (16 * 63)).unwrap_or(u16::MAX);
        put(16, &cylinders.to_le_bytes());
        put(18, &[16, 63]);
        put(20, &low_u32(SECTOR).to_le_bytes());
        // Topology: logical and physical blocks are the same; the preferred size is the format's cluster.
        let preferred = u64::from(self.disk.limits().preferred) / SECTOR;
        put(26, &1u16.to_le_bytes());
        put(28, &low_u32(preferred.min(u64::from(MAX_SEGMENT) / SECTOR)).to_le_bytes());
        put(32, &[u8::from(self.write_cache())]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        let granularity = (self.disk.limits().discard_granularity / low_u32(SECTOR)).max(1);
        put(44, &granularity.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Whether writes may stay in caches until a flush (section 5.2.6.2): only if the driver can flush.
    fn write_cache(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        let wish = features & F_CONFIG_WCE == 0 || self.writeback.load(Ordering::Relaxed) != 0;
        features & F_FLUSH != 0 && wish
    }

    fn execute(&self, request: &Request<'_>, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<Answer> {
        match &request.kind {
            Kind::Read => self.read(request, ram, buffer),
            Kind::Write => self.write(request, ram, buffer),
            Kind::Flush => self.flush(),
            Kind::GetId => self.get_id(request, ram),
            Kind::Discard(ranges) => self.discard(ranges),
            Kind::WriteZeroes(ranges) => self.write_zeroes(ranges),
            Kind::Unsupported(_) => Ok(Answer { status: STATUS_UNSUPP, written: 0 }),
        }
    }

    fn read(&self, request: &Request<'_>, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<Answer> {
        let range = self.range(request.sector, request.data_len)?;
        if let Some(reads) = &self.reads {
            reads.tell(request.sector, range.len / SECTOR);
        }
        let mut target = request.data_in();
        for (offset, len) in chunks(&range) {
            buffer.resize(CHUNK, 0);
            let bytes = &mut buffer[..len];
            self.disk.read_at(bytes, offset)?;
            target.write(ram, bytes).map_err(hostile)?;
        }
        activity::read(&mut self.activity.lock(), &range);
        Ok(Answer::ok(range.len))
    }

    fn write(&self, request: &Request<'_>, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<Answer> {
        self.writable()?;
        let range = self.range(request.sector, request.data_len)?;
        let mut source = request.data_out();
        for (offset, len) in chunks(&range) {
            buffer.resize(CHUNK, 0);
            let bytes = &mut buffer[..len];
            source.read(ram, bytes).map_err(hostile)?;
            self.disk.write_at(bytes, offset)?;
        }
        self.write_through()?;
        activity::write(&mut self.activity.lock(), &range);
        Ok(Answer::ok(0))
    }

    fn write_through(&self) -> Result<()> {
        if self.write_cache() { Ok(()) } else { self.disk.flush() }
    }

    fn flush(&self) -> Result<Answer> {
        if !self.read_only {
            self.disk.flush()?;
        }
        self.activity.lock().flushes += 1;
        Ok(Answer::ok(0))
    }

    fn get_id(&self, request: &Request<'_>, ram: &GuestRam) -> Result<Answer> {
        let len = to_usize(request.data_len.min(20));
        request.data_in().write(ram, &self.serial[..len]).map_err(hostile)?;
        Ok(Answer::ok(len as u64))
    }

    fn discard(&self, ranges: &[Range]) -> Result<Answer> {
        self.writable()?;
        for range in ranges {
            let bytes = self.checked(range)?;
            self.disk.discard_at(bytes.offset, bytes.len)?;
            self.activity.lock().discards += 1;
        }
        Ok(Answer::ok(0))
    }

    fn write_zeroes(&self, ranges: &[Range]) -> Result<Answer> {
        self.writable()?;
        for range in ranges {
            let bytes = self.checked(range)?;
            let mode = if range.unmap { ZeroMode::UNMAP } else { ZeroMode::ALLOCATE };
            self.disk.write_zeroes_at(bytes.offset, bytes.len, mode)?;
            activity::write(&mut self.activity.lock(), &bytes);
        }
        self.write_through()?;
        Ok(Answer::ok(0))
    }

    fn checked(&self, range: &Range) -> Result<Bytes> {
        if range.sectors > MAX_RANGE_SECTORS {
            return Err(Error::invalid(format!("a range of {} sectors in one segment", range.sectors)));
        }
        self.range(range.sector, u64::from(range.sectors) * SECTOR)
    }

    fn writable(&self) -> Result<()> {
        if self.read_only { Err(Error::read_only()) } else { Ok(()) }
    }

    /// The bytes of `len` bytes from `sector`, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<Bytes> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!("{len} bytes at sector {sector} are not whole sectors")));
        }
        match sector.checked_add(len / SECTOR) {
            Some(end) if end <= self.sectors => Ok(Bytes { offset: sector * SECTOR, len }),
            _ => Err(Error::new(
                block::ErrorKind::OutOfRange,
                format!(
                    "sectors {sector} to {} lie outside the disk ({} sectors)",
                    sector.saturating_add(len / SECTOR),
                    self.sectors
                ),
            )),
        }
    }
}

/// Bytes of the disk that have been checked to be there.
#[derive(Debug, Clone, Copy)]
struct Bytes {
    offset: u64,
    len: u64,
}

/// The pieces in which a range is transferred.
fn chunks(range: &Bytes) -> impl Iterator<Item = (u64, usize)> + use<> {
    let Bytes { offset, len } = *range;
    (0..len).step_by(CHUNK).map(move |at| (offset + at, to_usize((len - at).min(CHUNK as u64))))
}

/// A buffer of the guest that is none.
fn hostile(error: RingError) -> Error {
    Error::from_source(block::ErrorKind::Invalid, error)
}

/// What the driver is told.
struct Answer {
    status: u8,
    written: u64,
}

impl Answer {
    fn ok(written: u64) -> Self {
        Self { status: STATUS_OK, written }
    }
}

impl Device for Blk {
    fn id(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> (u8, u8, u8) {
        // Mass storage, SCSI: what firmware looks for a disk in.
        (1, 0, 0)
    }

    fn features(&self) -> u64 {
        let mut features =
            F_SIZE_MAX | F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        if self.read_only {
            features |= F_RO;
        } else {
            features |= F_DISCARD | F_WRITE_ZEROES;
        }
        if self.queues > 1 {
            features |= F_MQ;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (i, slot) in data.iter_mut().enumerate() {
            *slot = config.get(to_usize(offset).saturating_add(i)).copied().unwrap_or(0);
        }
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (CONFIG_WRITEBACK, [value]) = (offset, data) {
            self.writeback.store(u64::from(*value & 1), Ordering::Relaxed);
        }
    }

    fn accepted(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        if features == 0 {
            self.writeback.store(1, Ordering::Relaxed);
        }
    }

    fn serve(&self, chain: &Chain, ram: &GuestRam, buffer: &mut Vec<u8>) -> RingResult<u32> {
        let status_at = chain.last_writable().ok_or(RingError::NoAnswer)?;
        let answer = Request::parse(chain, ram).and_then(|request| self.execute(&request, ram, buffer));
        let answer = answer.unwrap_or_else(|error| {
            activity::error(&mut self.activity.lock(), &error);
            Answer { status: STATUS_IOERR, written: 0 }
        });
        ram.write(status_at, &[answer.status])?;
        Ok(u32::try_from(answer.written + 1).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests;
