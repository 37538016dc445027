//! The one device of all formats here.
//!
//! A format is a [`Layout`]: it says where the bytes of the disk are. Everything that follows from that - reading
//! across borders, falling through to the backing file, keeping unpacked chunks for the next request, refusing what
//! lies past the end of the file - is here once.

use std::fmt::Debug;
use std::sync::Arc;

use block::device::check_range;
use block::extent::read_backing;
use block::image::{CheckReport, Image, ImageInfo, Repair};
use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Result, Storage, Stored};

use crate::units::Units;

/// Nobody has to make room for more than this at once because of how an image was made, in bytes.
const MOST_PREFERRED: u32 = 2 << 20;

/// Where bytes of the disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file as they are, contiguous, from this offset.
    Plain(u64),
    /// In the file, contiguous, from this offset, encrypted.
    Sealed(u64),
    /// Nowhere: they are zeros.
    Zero,
    /// Nowhere in this image.
    Absent,
    /// In a chunk that has to be unpacked as a whole.
    Packed {
        /// Number or offset of the chunk, unique in the image.
        unit: u64,
        /// Bytes of the chunk, unpacked.
        unit_len: u64,
        /// Where in the unpacked chunk.
        within: u64,
    },
}

/// Bytes of the disk that are in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) place: Place,
    /// Length in bytes, at least 1 and at most what was asked for.
    pub(crate) len: u64,
}

/// How a format lays out its disk in its file.
pub(crate) trait Layout: Debug + Send + Sync {
    /// qemu's name of the format.
    fn format_name(&self) -> &'static str;

    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// Bytes that are best read together.
    fn preferred(&self) -> u32;

    /// What the image says of itself.
    fn info(&self) -> ImageInfo;

    /// Where the bytes at `offset` are, for at most `max_len` bytes (at least 1; inside the disk). Ranges that no
    /// table describes are answered in one step.
    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece>;

    /// Unpacks a chunk that [`piece`](Self::piece) has named.
    fn unpack(&self, unit: u64) -> Result<Vec<u8>> {
        Err(Error::invalid(format!("chunk {unit} is not packed")))
    }

    /// Whether packed chunks are called compressed in what is said of the image. qemu-img does so for some formats.
    fn says_compressed(&self) -> bool {
        true
    }

    /// Reads [`Place::Sealed`] bytes; `offset` is theirs on the disk.
    fn read_sealed(&self, buf: &mut [u8], host: u64, offset: u64) -> Result<()> {
        let _ = (buf, host, offset);
        Err(Error::unsupported("the image was opened without its passphrase"))
    }

    /// The same, able to read [`Place::Sealed`] bytes.
    fn unlocked(&self, key: crypt::Volume) -> Result<Arc<dyn Layout>> {
        let _ = key;
        Err(Error::usage("the image is not encrypted"))
    }

    /// Examines the structures.
    fn check(&self) -> Result<CheckReport> {
        Err(Error::unsupported("This image format does not support checks"))
    }
}

/// An image of one of the formats of this crate. Read-only.
#[derive(Debug)]
pub struct Foreign {
    layout: Arc<dyn Layout>,
    storage: Arc<dyn Storage>,
    /// Of the file when it was opened, in bytes.
    len: u64,
    backing: Option<Arc<dyn BlockDevice>>,
    units: Units,
}

impl Foreign {
    pub(crate) fn new(
        layout: Arc<dyn Layout>,
        storage: Arc<dyn Storage>,
        backing: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        let len = storage.len()?;
        Ok(Self { layout, storage, len, backing, units: Units::new() })
    }

    /// The piece at `offset`, as far as it can be trusted.
    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let piece = self.layout.piece(offset, max_len)?;
        debug_assert!(piece.len >= 1 && piece.len <= max_len, "{piece:?} of {max_len}");
        match piece.place {
            Place::Plain(host) | Place::Sealed(host) => self.check_inside(host, piece.len, offset)?,
            Place::Zero | Place::Absent | Place::Packed { .. } => {}
        }
        Ok(piece)
    }

    /// Refuses what the file does not hold.
    fn check_inside(&self, host: u64, len: u64, offset: u64) -> Result<()> {
        match host.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "the disk's bytes at {offset:#x} lie at {host:#x}, past the end of the file (length {:#x})",
                    self.len
                ),
            )),
        }
    }

    fn read_piece(&self, piece: Piece, buf: &mut [u8], offset: u64) -> Result<()> {
        match piece.place {
            Place::Plain(host) => self.storage.read_at(buf, host),
            Place::Sealed(host) => self.layout.read_sealed(buf, host, offset),
            Place::Zero => {
                buf.fill(0);
                Ok(())
            }
            Place::Absent => read_backing(self.backing.as_deref(), buf, offset),
            Place::Packed { unit, unit_len, within } => self.read_unit(unit, unit_len, within, buf),
        }
    }

    /// Reads a part of a packed chunk. What is wanted as a whole is not kept: it will not be asked for again soon.
    fn read_unit(&self, unit: u64, unit_len: u64, within: u64, buf: &mut [u8]) -> Result<()> {
        let whole = within == 0 && buf.len() as u64 == unit_len;
        let unpacked = if whole {
            self.layout.unpack(unit)?.into()
        } else {
            self.units.get(unit, || self.layout.unpack(unit))?
        };
        let start = to_usize(within);
        let part = start.checked_add(buf.len()).and_then(|end| unpacked.get(start..end));
        let part = part.ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, format!("chunk {unit:#x} holds {:#x} bytes only", unpacked.len()))
        })?;
        buf.copy_from_slice(part);
        Ok(())
    }

    /// What is said of a place.
    fn extent_of(&self, piece: Piece) -> LayerExtent {
        match piece.place {
            Place::Plain(host) => LayerExtent::new(Stored::Data, piece.len).at(host),
            Place::Sealed(_) => LayerExtent::new(Stored::Data, piece.len),
            Place::Zero => LayerExtent::new(Stored::Zero, piece.len),
            Place::Absent => LayerExtent::new(Stored::Absent, piece.len),
            Place::Packed { .. } if self.layout.says_compressed() => {
                LayerExtent::new(Stored::Compressed, piece.len)
            }
            Place::Packed { .. } => LayerExtent::new(Stored::Data, piece.len),
        }
    }
}

/// Whether `next`, which begins `len` bytes after `first`, can be told together with it.
fn continues(first: &LayerExtent, next: &LayerExtent) -> bool {
    first.stored == next.stored
        && match (first.host_offset, next.host_offset) {
            (Some(a), Some(b)) => a.checked_add(first.len) == Some(b),
            (None, None) => true,
            _ => false,
        }
}

impl BlockDevice for Foreign {
    fn size(&self) -> u64 {
        self.layout.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment: self.storage.alignment(),
            preferred: self.layout.preferred().min(MOST_PREFERRED),
            ..Limits::default()
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let piece = self.piece(offset, rest.len() as u64)?;
            let (part, after) = rest.split_at_mut(to_usize(piece.len));
            self.read_piece(piece, part, offset)?;
            offset += piece.len;
            rest = after;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        let max_len = max_len.min(self.size() - offset).max(1);
        let mut found = self.extent_of(self.piece(offset, max_len)?);
        while found.len < max_len {
            // What is wrong further on is told to whoever asks there.
            let Ok(piece) = self.piece(offset + found.len, max_len - found.len) else { break };
            let next = self.extent_of(piece);
            if !continues(&found, &next) {
                break;
            }
            found.len += next.len;
        }
        Ok(found)
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.backing.as_ref()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }
}

impl Image for Foreign {
    fn format_name(&self) -> &'static str {
        self.layout.format_name()
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(self.layout.info())
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        if repair != Repair::None {
            let name = self.format_name();
            return Err(Error::unsupported(format!("{name} images are checked, but not repaired"))
                .hint("convert the image to another format; what can be read is all there is"));
        }
        self.layout.check()
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}
