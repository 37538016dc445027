//! A stream as an extent of a disk.

use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::num::low_u32;
use block::{Compressed, CompressedWriter, Error, LayerExtent, Result, Storage, Stored, ZeroMode};

use super::Stream;
use crate::extent::{Below, Description, Extent, How};
use crate::header::Header;
use crate::lookup::Grain;
use crate::tabled::{check_grains, check_len};

/// A compressed extent and what lies under it.
#[derive(Debug)]
pub(crate) struct StreamExtent {
    stream: Stream,
    len: u64,
    below: Below,
}

impl StreamExtent {
    /// Opens the extent in `storage`, whose header is `header`.
    ///
    /// # Errors
    /// As [`Stream::open`], or more is expected of it than it holds.
    pub(crate) fn open(storage: Arc<dyn Storage>, header: Header, how: &How) -> Result<Self> {
        check_len(&*storage, header.capacity, how)?;
        let stream = Stream::open(storage, header, how.writable, how.level)?;
        Ok(Self { stream, len: how.len, below: how.below.clone() })
    }
}

impl Extent for StreamExtent {
    fn describe(&self) -> Description {
        Description {
            size: self.len,
            filename: self.stream.storage().name(),
            grain: Some(self.stream.grain()),
            compressed: true,
        }
    }

    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(self.stream.storage())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.stream.read(buf, offset, &|part, at| self.below.read(part, at))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let run = self.stream.run(offset, max_len)?;
        let stored = match run.grain {
            Grain::Absent => Stored::Absent,
            Grain::Zero => Stored::Zero,
            Grain::At(_) => Stored::Compressed,
        };
        Ok(LayerExtent::new(stored, run.len))
    }

    fn read_only(&self) -> bool {
        !self.stream.writable()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.stream.write(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let _ = mode;
        self.stream.write_zeroes(offset, len, self.below.covers(offset))
    }

    fn flush(&self) -> Result<()> {
        self.stream.flush()
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        self.stream.writable().then_some(self as &dyn CompressedWriter)
    }

    /// Every grain is inflated: that nothing is wrong with its place says little.
    fn check(&self, report: &mut CheckReport, repair: Repair) -> Result<()> {
        let _ = repair;
        let grain = self.stream.grain();
        let mut buf = vec![0; block::num::to_usize(grain)];
        check_grains(self.stream.lookup(), self.len, report, |index, _| {
            let len = grain.min(self.len - index * grain);
            let buf = &mut buf[..block::num::to_usize(len)];
            self.stream.read(buf, index * grain, &|_, _| Ok(()))
        })
    }
}

impl CompressedWriter for StreamExtent {
    fn cluster_size(&self) -> u32 {
        low_u32(self.stream.grain())
    }

    fn compress(&self, data: &[u8]) -> Result<Compressed> {
        self.stream.compress(data)
    }

    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        if clusters.iter().any(|cluster| matches!(cluster, Compressed::Incompressible)) {
            return Err(Error::unsupported("a stream has no grains that are not compressed"));
        }
        self.stream.append(clusters, offset)
    }
}
