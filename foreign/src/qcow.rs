//! QEMU's copy on write, version 1: what there was before qcow2.
//!
//! ```text
//!   0     "QFI\xfb", 1, where the backing file's name is and how long        big-endian
//!   20    time of change; size of the disk; bits of a cluster, of an L2 table; encryption; where L1 is
//!   L1    offsets of L2 tables, or 0
//!   L2    offsets of clusters, or 0; with bit 63: of deflated clusters, their length in the bits below
//! ```
//!
//! A cluster that was written in part only may end at the end of the file: what is missing has never been written.

use std::sync::Arc;

use block::codec::Reader;
use block::image::ImageInfo;
use block::num::{align_down, to_usize};
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::{Backing, Opened};
use crate::tables::Tables;
use crate::unpack::inflate;

const MAGIC: &[u8] = b"QFI\xfb\0\0\0\x01";
const HEADER_LEN: u64 = 48;
const COMPRESSED: u64 = 1 << 63;
const SECTOR: u64 = 512;
/// Longest name of a backing file, in bytes.
const MOST_NAME: u32 = 1023;
/// qemu addresses L1 with an `int` and keeps it in memory.
const MOST_L1: u64 = i32::MAX as u64 / 8;
/// Most L2 entries that are looked at to answer one question.
const MOST_STEPS: u64 = 1 << 20;

/// Whether these are the first bytes of a qcow image, version 1.
pub(crate) fn probe(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
}

#[derive(Debug)]
struct Header {
    size: u64,
    cluster_bits: u32,
    l2_bits: u32,
    encrypted: bool,
    l1_offset: u64,
    backing: Option<(u64, u32)>,
}

impl Header {
    fn parse(bytes: &[u8; 48]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        reader.skip(8)?;
        let (name_offset, name_len) = (reader.be_u64()?, reader.be_u32()?);
        reader.skip(4)?;
        let size = reader.be_u64()?;
        let (cluster_bits, l2_bits) = (u32::from(reader.u8()?), u32::from(reader.u8()?));
        reader.skip(2)?;
        let crypt = reader.be_u32()?;
        let l1_offset = reader.be_u64()?;
        let backing = (name_offset != 0).then_some((name_offset, name_len));
        (crypt <= 1).then_some(Self {
            size,
            cluster_bits,
            l2_bits,
            encrypted: crypt == 1,
            l1_offset,
            backing,
        })
    }

    /// The limits of the format, in qemu's words.
    fn check(&self) -> Result<()> {
        let refused = |message: &str| Err(Error::invalid(message));
        if self.size <= 1 {
            return refused("Image size is too small (must be at least 2 bytes)");
        }
        if !(9..=16).contains(&self.cluster_bits) {
            return refused("Cluster size must be between 512 and 64k");
        }
        if !(6..=13).contains(&self.l2_bits) {
            return refused("L2 table size must be between 512 and 64k");
        }
        if self.l1_entries() > MOST_L1 {
            return refused("Image too large");
        }
        match self.backing {
            Some((_, len)) if len > MOST_NAME => refused("Backing file name too long"),
            _ => Ok(()),
        }
    }

    fn l1_entries(&self) -> u64 {
        self.size.div_ceil(1 << (self.cluster_bits + self.l2_bits))
    }
}

#[derive(Debug)]
struct Qcow {
    tables: Tables,
    header: Header,
    backing: Option<Backing>,
    key: Option<crypt::Volume>,
}

/// Reads the header and the name of the backing file.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let qcow = open(Arc::clone(&storage))?;
    let backing = qcow.backing.clone();
    Ok(Opened::new(qcow, storage).with_backing(backing))
}

fn open(storage: Arc<dyn Storage>) -> Result<Qcow> {
    let tables = Tables::new(storage)?;
    tables.check_inside("the header", 0, HEADER_LEN)?;
    let bytes: [u8; 48] = tables.bytes(0)?;
    if !probe(&bytes) {
        return Err(Error::invalid("Image not in qcow format"));
    }
    let header = Header::parse(&bytes);
    let header = header.ok_or_else(|| Error::unsupported("invalid encryption method in qcow header"))?;
    header.check()?;
    tables.check_inside("the L1 table", header.l1_offset, header.l1_entries() * 8)?;
    let backing = match header.backing {
        Some((offset, len)) if len > 0 => {
            tables.check_inside("the name of the backing file", offset, u64::from(len))?;
            let mut name = vec![0; to_usize(u64::from(len))];
            tables.storage().read_at(&mut name, offset)?;
            Some(Backing { name, format: None })
        }
        _ => None,
    };
    Ok(Qcow { tables, header, backing, key: None })
}

/// What an L2 table says of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Absent,
    At(u64),
    Packed(u64),
}

impl Qcow {
    fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    fn entry(&self, offset: u64) -> Result<u64> {
        Ok(u64::from_be_bytes(self.tables.bytes(offset)?))
    }

    /// Where the L2 table is that covers `offset`.
    fn l2_table(&self, offset: u64) -> Result<Option<u64>> {
        let index = offset >> (self.header.cluster_bits + self.header.l2_bits);
        let table = self.entry(self.header.l1_offset + index * 8)?;
        if table == 0 {
            return Ok(None);
        }
        if table < HEADER_LEN {
            return Err(corrupt(&format!("the L2 table for {offset:#x}"), table));
        }
        self.tables.check_inside("an L2 table", table, 8 << self.header.l2_bits)?;
        Ok(Some(table))
    }

    /// What the L2 table at `table` says of the cluster in which `offset` lies.
    fn look_up(&self, table: u64, offset: u64) -> Result<Cluster> {
        let index = (offset >> self.header.cluster_bits) & ((1 << self.header.l2_bits) - 1);
        let entry = self.entry(table + index * 8)?;
        Ok(match entry {
            0 => Cluster::Absent,
            _ if entry & COMPRESSED != 0 => Cluster::Packed(entry),
            _ if entry < HEADER_LEN => return Err(corrupt(&format!("the cluster at {offset:#x}"), entry)),
            _ => Cluster::At(entry),
        })
    }

    /// Bytes from `offset` to the end of the range that one L2 table covers.
    fn left_in_table(&self, offset: u64) -> u64 {
        let covered = 1_u64 << (self.header.cluster_bits + self.header.l2_bits);
        covered - offset % covered
    }

    /// How far what no table stores goes on.
    fn absent(&self, offset: u64, max_len: u64) -> Result<u64> {
        let mut len = 0;
        let mut steps = 0;
        while len < max_len && steps < MOST_STEPS {
            steps += 1;
            let at = offset + len;
            match self.l2_table(at)? {
                None => len += self.left_in_table(at),
                Some(table) if self.look_up(table, at)? == Cluster::Absent => {
                    len += self.cluster() - at % self.cluster();
                }
                Some(_) => break,
            }
        }
        Ok(len.clamp(1, max_len))
    }

    /// The part of a plain cluster that is in the file.
    fn plain(&self, host: u64, offset: u64, max_len: u64) -> Result<Piece> {
        let there = self.tables.file_len().saturating_sub(host);
        let start = host - offset % self.cluster();
        if start >= self.tables.file_len() {
            // The device says so, with the places.
            return Ok(Piece { place: Place::Plain(host), len: max_len });
        }
        if there == 0 {
            return Ok(Piece { place: Place::Zero, len: max_len });
        }
        let len = there.min(max_len);
        let place = if self.header.encrypted { Place::Sealed(host) } else { Place::Plain(host) };
        Ok(Piece { place, len })
    }
}

fn corrupt(what: &str, place: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what} lies at {place:#x}, in the header"))
}

impl Layout for Qcow {
    fn format_name(&self) -> &'static str {
        "qcow"
    }

    fn size(&self) -> u64 {
        // qemu counts whole sectors.
        align_down(self.header.size, SECTOR)
    }

    fn preferred(&self) -> u32 {
        1 << self.header.cluster_bits
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            cluster_size: Some(1 << self.header.cluster_bits),
            encrypted: self.header.encrypted,
            dirty: Some(false),
            backing_file: self.backing.as_ref().map(|b| String::from_utf8_lossy(&b.name).into_owned()),
            ..ImageInfo::default()
        }
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let within = offset % self.cluster();
        let found = match self.l2_table(offset)? {
            Some(table) => self.look_up(table, offset)?,
            None => Cluster::Absent,
        };
        let own = (self.cluster() - within).min(max_len);
        match found {
            Cluster::Absent => Ok(Piece { place: Place::Absent, len: self.absent(offset, max_len)? }),
            Cluster::At(start) => {
                let host = start.checked_add(within).ok_or_else(|| corrupt("a cluster", start))?;
                self.plain(host, offset, own)
            }
            Cluster::Packed(entry) => {
                let place = Place::Packed { unit: entry, unit_len: self.cluster(), within };
                Ok(Piece { place, len: own })
            }
        }
    }

    fn unpack(&self, entry: u64) -> Result<Vec<u8>> {
        let shift = 63 - self.header.cluster_bits;
        let (start, len) = (entry & ((1 << shift) - 1), entry >> shift & (self.cluster() - 1));
        self.tables.check_inside("a compressed cluster", start, len)?;
        let mut packed = vec![0; to_usize(len)];
        self.tables.storage().read_at(&mut packed, start)?;
        let context = |error: Error| error.context(format!("compressed cluster at {start:#x}"));
        inflate(&packed, to_usize(self.cluster()), false).map_err(context)
    }

    fn read_sealed(&self, buf: &mut [u8], host: u64, offset: u64) -> Result<()> {
        let Some(key) = &self.key else {
            return Err(Error::unsupported("the image was opened without its passphrase"));
        };
        // Whole sectors, which begin where those of the disk do: clusters are made of them.
        let before = offset % SECTOR;
        let start = host.checked_sub(before).ok_or_else(|| corrupt("a cluster", host))?;
        let wanted = to_usize(before) + buf.len();
        let mut sectors = vec![0; wanted.next_multiple_of(to_usize(SECTOR))];
        self.tables.storage().read_at(&mut sectors, start)?;
        key.decrypt((offset - before) / SECTOR, &mut sectors);
        buf.copy_from_slice(&sectors[to_usize(before)..wanted]);
        Ok(())
    }

    fn unlocked(&self, key: crypt::Volume) -> Result<Arc<dyn Layout>> {
        if !self.header.encrypted {
            return Err(Error::usage("the image is not encrypted"));
        }
        let fresh = open(Arc::clone(self.tables.storage()))?;
        Ok(Arc::new(Self { key: Some(key), ..fresh }))
    }
}
