//! New streams: files that are written later, and pipes that are written at once.

use std::sync::Arc;

use block::device::check_range;
use block::num::{len_of, low_u32};
use block::{
    BlockDevice, Compressed, CompressedWriter, Error, LayerExtent, Limits, Result, Storage, Stored, ZeroMode,
};

use super::append::{head, new_header};
use super::marker::SECTOR;
use super::{Level, Stream};
use crate::lookup::Grain;

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Room for the descriptor in sectors, unless it is longer.
const DESCRIPTOR_SECTORS: u64 = 20;

/// Writes a stream without a grain: complete, and ready to be written to.
///
/// # Errors
/// It would be too large, or the host failed.
pub fn create(
    storage: &Arc<dyn Storage>,
    capacity_sectors: u64,
    descriptor: &[u8],
    zero_grains: bool,
) -> Result<()> {
    begin(storage, capacity_sectors, descriptor, zero_grains, None)?.flush()
}

fn begin(
    storage: &Arc<dyn Storage>,
    capacity_sectors: u64,
    descriptor: &[u8],
    zero_grains: bool,
    level: Level,
) -> Result<Stream> {
    let room = len_of(descriptor).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS);
    let header = new_header(capacity_sectors, GRAIN, room, zero_grains);
    let stream = Stream::create(Arc::clone(storage), header, level)?;
    storage.write_at(&head(&header, descriptor), 0)?;
    Ok(stream)
}

/// A new stream on something that can only be appended to, to be filled in the order of the disk.
/// [`close`](BlockDevice::close) completes it; nothing can be read back.
#[derive(Debug)]
pub struct Target {
    stream: Stream,
    size: u64,
}

impl Target {
    /// Writes what stands in front of the first grain.
    ///
    /// # Errors
    /// It would be too large, the level does not exist, or the host failed.
    pub fn new(
        storage: &Arc<dyn Storage>,
        capacity_sectors: u64,
        descriptor: &[u8],
        level: Level,
    ) -> Result<Self> {
        let stream = begin(storage, capacity_sectors, descriptor, false, level)?;
        Ok(Self { stream, size: capacity_sectors * SECTOR })
    }
}

impl BlockDevice for Target {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        let grain = low_u32(self.stream.grain());
        Limits { alignment: grain, preferred: grain, discard_granularity: grain }
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        Err(Error::unsupported("what has been sent cannot be read back"))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, len_of(buf), self.size)?;
        self.stream.write(buf, offset)
    }

    /// There is nothing but zeros where no grain has been sent.
    fn write_zeroes_at(&self, offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size)?;
        self.stream.check_unsent(offset)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size)
    }

    /// Nothing is durable before the end.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.stream.flush()
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        let run = self.stream.run(offset, max_len.min(self.size - offset))?;
        let stored = if run.grain == Grain::Absent { Stored::Absent } else { Stored::Compressed };
        Ok(LayerExtent::new(stored, run.len))
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        Some(self)
    }
}

impl CompressedWriter for Target {
    fn cluster_size(&self) -> u32 {
        low_u32(self.stream.grain())
    }

    fn compress(&self, data: &[u8]) -> Result<Compressed> {
        self.stream.compress(data)
    }

    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        self.stream.append(clusters, offset)
    }
}
