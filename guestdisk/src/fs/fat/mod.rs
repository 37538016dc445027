//! FAT12, FAT16 and FAT32 with long names (Microsoft, "FAT: General Overview of On-Disk Format", version 1.03).
//!
//! ```text
//!   +----------+-------+-----------+----------------+------------------------- ..
//!   | boot     | FAT   | FAT again | root directory | cluster 2, cluster 3
//!   | sector   |       |           | (FAT12/16)     |
//!   +----------+-------+-----------+----------------+------------------------- ..
//! ```
//!
//! There are no inodes: a node is the place of its directory entry on the device, 0 the root.

mod entry;
mod free;

use std::ops::Range;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, Result};
use parking_lot::Mutex;

use super::node::{Entry as Found, FileKind, GoOn, Metadata, Node, Nodes};
use super::source::Source;
use crate::bytes::{self, byte, corrupt, le16, le32, part};
pub use entry::CODE_PAGE;
use entry::{Entry, Names};

/// The most bytes of a directory: the specification has 65,536 entries of 32 bytes.
const MOST_DIRECTORY: u64 = 2 << 20;

/// The boot sector's parameters, checked.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    cluster_bytes: u64,
    fat_offset: u64,
    fat_bytes: u64,
    root_offset: u64,
    root_bytes: u64,
    data_offset: u64,
    clusters: u64,
    root_cluster: u32,
    bits: u32,
    serial: u32,
    label: String,
}

impl Parameters {
    /// `None` if the sector is not one of FAT.
    pub(crate) fn parse(sector: &[u8], device: u64) -> Option<Self> {
        let sector_bytes = u64::from(le16(sector, 11));
        let per_cluster = u64::from(byte(sector, 13));
        let (reserved, fats) = (u64::from(le16(sector, 14)), u64::from(byte(sector, 16)));
        let media = byte(sector, 21);
        let plausible = matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
            && per_cluster.is_power_of_two()
            && reserved > 0
            && (1..=4).contains(&fats)
            && (media >= 0xf8 || media == 0xf0);
        if !plausible {
            return None;
        }
        let fat32 = le16(sector, 22) == 0;
        let either = |short: usize, long: usize| match le16(sector, short) {
            0 => u64::from(le32(sector, long)),
            value => value.into(),
        };
        let (fat_sectors, sectors) = (either(22, 36), either(19, 32));
        let root_bytes = u64::from(le16(sector, 17)) * 32;
        let root_sector = reserved + fats * fat_sectors;
        let data_sector = root_sector + root_bytes.div_ceil(sector_bytes);
        let clusters = sectors.checked_sub(data_sector)? / per_cluster;
        // One of the copies may be the only one that is kept ("ExtFlags").
        let flags = if fat32 { le16(sector, 40) } else { 0 };
        let active = if flags & 0x80 != 0 { u64::from(flags & 15) } else { 0 };
        let (serial, label) = if fat32 { (67, 71) } else { (39, 43) };
        let parameters = Self {
            cluster_bytes: sector_bytes * per_cluster,
            fat_offset: (reserved + active.min(fats - 1) * fat_sectors) * sector_bytes,
            fat_bytes: fat_sectors * sector_bytes,
            root_offset: root_sector * sector_bytes,
            root_bytes,
            data_offset: data_sector * sector_bytes,
            clusters,
            root_cluster: if fat32 { le32(sector, 44) } else { 0 },
            bits: match clusters {
                _ if fat32 => 32,
                0..4085 => 12,
                _ => 16,
            },
            serial: le32(sector, serial),
            label: entry::label(part(sector, label, 11)),
        };
        let sound = fat_sectors > 0 && clusters > 0 && parameters.data_offset < device;
        (sound && (fat32 || root_bytes > 0)).then_some(parameters)
    }

    /// The identifier as `blkid` shows it.
    pub(crate) fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.serial >> 16, self.serial & 0xffff)
    }
}

/// The volume's label: that of the root directory (of which the first cluster is looked at), else that of the boot
/// sector. Damage counts as absence.
pub(crate) fn read_label(device: &dyn BlockDevice, parameters: &Parameters) -> String {
    let (offset, len) = match parameters.bits {
        32 => {
            let index = u64::from(parameters.root_cluster).saturating_sub(2).min(parameters.clusters);
            (parameters.data_offset + index * parameters.cluster_bytes, parameters.cluster_bytes)
        }
        _ => (parameters.root_offset, parameters.root_bytes),
    };
    let records = bytes::read_some(device, offset, to_usize(len)).unwrap_or_default();
    let mut used = records.chunks_exact(32).take_while(|record| record[0] != 0);
    let label = used.find(|record| entry::is_label(record)).map(|record| entry::label(part(record, 0, 11)));
    label.unwrap_or_else(|| parameters.label.clone())
}

/// A FAT file system.
#[derive(Debug)]
pub(crate) struct Fat {
    source: Source,
    parameters: Parameters,
    /// Where the last read of a file ended, so that the next one need not begin at the start of the chain.
    last: Mutex<Last>,
}

/// A place in a chain: the `index`-th cluster of the one that begins with `first`.
#[derive(Debug, Clone, Copy, Default)]
struct Last {
    first: u32,
    index: u64,
    cluster: u32,
}

impl Fat {
    pub(crate) fn open(device: Arc<dyn BlockDevice>) -> Result<Self> {
        let sector = bytes::read_some(&*device, 0, 512)?;
        let parameters = Parameters::parse(&sector, device.size())
            .ok_or_else(|| corrupt("the boot sector is not one of a FAT file system"))?;
        Ok(Self { source: Source::new(device), parameters, last: Mutex::default() })
    }

    /// The cluster after this one; `None` at the end of a chain.
    fn next(&self, cluster: u32) -> Result<Option<u32>> {
        let parameters = &self.parameters;
        let index = u64::from(cluster);
        let (at, len) = match parameters.bits {
            12 => (index + index / 2, 2),
            16 => (index * 2, 2),
            _ => (index * 4, 4),
        };
        if at + len > parameters.fat_bytes {
            return Err(corrupt(format!("cluster {cluster:#x} has no entry in the FAT")));
        }
        let mut raw = [0; 4];
        self.source.read(&mut raw[..to_usize(len)], parameters.fat_offset + at)?;
        let raw = u32::from_le_bytes(raw);
        let (value, end) = match parameters.bits {
            12 => (if cluster & 1 == 1 { raw >> 4 } else { raw & 0xfff }, 0xff7),
            16 => (raw, 0xfff7),
            _ => (raw & 0x0fff_ffff, 0x0fff_fff7),
        };
        Ok((value < end).then_some(value))
    }

    /// Where a cluster lies.
    fn cluster_offset(&self, cluster: u32) -> Result<u64> {
        let index = u64::from(cluster).checked_sub(2).filter(|index| *index < self.parameters.clusters);
        let index = index.ok_or_else(|| {
            corrupt(format!(
                "cluster {cluster:#x} is none of the file system's {:#x}",
                self.parameters.clusters
            ))
        })?;
        Ok(self.parameters.data_offset + index * self.parameters.cluster_bytes)
    }

    /// The `index`-th cluster of a chain.
    fn nth(&self, first: u32, index: u64) -> Result<u32> {
        let last = *self.last.lock();
        let near = last.first == first && last.index <= index && last.cluster != 0;
        let (mut at, mut cluster) = if near { (last.index, last.cluster) } else { (0, first) };
        while at < index {
            if at > self.parameters.clusters {
                return Err(corrupt(format!("the chain of cluster {first:#x} runs in a circle")));
            }
            cluster = self.next(cluster)?.ok_or_else(|| {
                corrupt(format!("the chain of cluster {first:#x} ends after {} clusters", at + 1))
            })?;
            at += 1;
        }
        *self.last.lock() = Last { first, index, cluster };
        Ok(cluster)
    }

    /// Reads a chain.
    fn read_chain(&self, first: u32, buf: &mut [u8], offset: u64) -> Result<()> {
        let (size, mut done) = (self.parameters.cluster_bytes, 0);
        while done < buf.len() {
            let at = offset + done as u64;
            let (index, within) = (at / size, at % size);
            let start = self.cluster_offset(self.nth(first, index)?)?;
            let mut len = size - within;
            // Clusters that follow one another are read together.
            let mut next = index + 1;
            while done as u64 + len < buf.len() as u64 {
                let follows = self.cluster_offset(self.nth(first, next)?)? == start + (next - index) * size;
                if !follows {
                    break;
                }
                (len, next) = (len + size, next + 1);
            }
            let len = to_usize(len).min(buf.len() - done);
            self.source.read(&mut buf[done..done + len], start + within)?;
            done += len;
        }
        Ok(())
    }

    /// Visits the 32-byte records of a directory with their places on the device.
    fn records(&self, directory: Node, visit: &mut dyn FnMut(u64, &[u8]) -> Result<GoOn>) -> Result<()> {
        let parameters = &self.parameters;
        let mut cluster = match directory.number {
            0 if parameters.bits != 32 => {
                let root = self.source.bytes(parameters.root_offset, parameters.root_bytes)?;
                return visit_records(&root, parameters.root_offset, visit).map(drop);
            }
            0 => parameters.root_cluster,
            number => {
                let found = self.entry(number)?;
                if !found.is_directory() {
                    return Err(Error::new(block::ErrorKind::NotFound, "not a directory"));
                }
                found.cluster()
            }
        };
        let mut walked = 0;
        while walked < MOST_DIRECTORY {
            let offset = self.cluster_offset(cluster)?;
            let bytes = self.source.bytes(offset, parameters.cluster_bytes)?;
            if !visit_records(&bytes, offset, visit)? {
                break;
            }
            let Some(next) = self.next(cluster)? else { break };
            cluster = next;
            walked += parameters.cluster_bytes;
        }
        Ok(())
    }

    fn entry(&self, offset: u64) -> Result<Entry> {
        let mut raw = [0; 32];
        self.source.read(&mut raw, offset)?;
        Ok(Entry::new(raw, self.parameters.bits == 32))
    }

    /// Visits the files of a directory with both of their names.
    fn names(&self, directory: Node, visit: &mut dyn FnMut(Names, Entry, u64) -> Result<GoOn>) -> Result<()> {
        let mut long = entry::LongName::default();
        let wide = self.parameters.bits == 32;
        self.records(directory, &mut |offset, record| {
            let Some(entry) = long.record(record, wide) else { return Ok(true) };
            let names = long.names(&entry);
            if names.short == "." || names.short == ".." { Ok(true) } else { visit(names, entry, offset) }
        })
    }
}

/// Whether there may be more.
fn visit_records(
    bytes: &[u8],
    offset: u64,
    visit: &mut dyn FnMut(u64, &[u8]) -> Result<GoOn>,
) -> Result<GoOn> {
    for (index, record) in (0..).zip(bytes.chunks_exact(32)) {
        if record[0] == 0 || !visit(offset + index * 32, record)? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Nodes for Fat {
    fn work(&self) -> u64 {
        self.source.work()
    }

    fn root(&self) -> Node {
        Node::new(0)
    }

    fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        self.free_ranges()
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        if node.number == 0 {
            let kind = FileKind::Directory;
            return Ok(Metadata { kind, mode: 0o755, uid: 0, gid: 0, size: 0, mtime: 0, links: 1 });
        }
        Ok(self.entry(node.number)?.metadata())
    }

    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Found) -> Result<GoOn>) -> Result<()> {
        self.names(directory, &mut |names, entry, offset| visit(found(names.best(), &entry, offset)))
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Found>> {
        let mut result = None;
        self.names(directory, &mut |names, entry, offset| {
            let same = |own: &str| self.same_name(own.as_bytes(), name);
            if names.long.as_deref().is_some_and(same) || same(&names.short) {
                result = Some(found(names.best(), &entry, offset));
            }
            Ok(result.is_none())
        })?;
        Ok(result)
    }

    fn same_name(&self, one: &[u8], other: &[u8]) -> bool {
        let fold = |name| String::from_utf8_lossy(name).to_lowercase();
        one.eq_ignore_ascii_case(other) || fold(one) == fold(other)
    }

    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        let entry = self.entry(node.number)?;
        if buf.is_empty() { Ok(()) } else { self.read_chain(entry.cluster(), buf, offset) }
    }
}

fn found(name: &str, entry: &Entry, offset: u64) -> Found {
    Found { name: name.as_bytes().to_vec(), node: Node::new(offset), kind: entry.metadata().kind }
}
