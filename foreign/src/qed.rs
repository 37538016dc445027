//! QEMU's enhanced disk (the QED Image File Format Specification).
//!
//! ```text
//!   0     "QED\0", cluster size, clusters of a table, clusters of the header   little-endian
//!   16    features: 1 backing file, 2 needs a check, 4 the backing file is raw
//!   40    where L1 is, size of the disk; where the name of the backing file is and how long
//!   L1    offsets of L2 tables, or 0
//!   L2    offsets of clusters; 0: not here; 1: zeros
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use block::codec::Reader;
use block::image::{CheckReport, ImageInfo};
use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::{Backing, Opened};
use crate::tables::Tables;

const MAGIC: &[u8] = b"QED\0";
const HEADER_LEN: u64 = 64;
const HAS_BACKING: u64 = 1;
const NEED_CHECK: u64 = 2;
const BACKING_IS_RAW: u64 = 4;
const SECTOR: u64 = 512;
/// The longest name of a backing file, in bytes.
const MOST_NAME: u32 = 1023;
/// The entry of a cluster of zeros.
const ZERO: u64 = 1;
/// Most L2 entries that are looked at to answer one question.
const MOST_STEPS: u64 = 1 << 20;

/// Whether these are the first bytes of a QED image.
pub(crate) fn probe(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
}

#[derive(Debug, Clone, Copy)]
struct Header {
    cluster: u64,
    /// In clusters.
    table: u64,
    /// In clusters.
    header: u64,
    features: u64,
    l1_offset: u64,
    size: u64,
    name_offset: u32,
    name_len: u32,
}

impl Header {
    fn parse(bytes: &[u8; 64]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        reader.skip(4)?;
        let (cluster, table, header) = (reader.le_u32()?, reader.le_u32()?, reader.le_u32()?);
        let features = reader.le_u64()?;
        reader.skip(16)?;
        Some(Self {
            cluster: u64::from(cluster),
            table: u64::from(table),
            header: u64::from(header),
            features,
            l1_offset: reader.le_u64()?,
            size: reader.le_u64()?,
            name_offset: reader.le_u32()?,
            name_len: reader.le_u32()?,
        })
    }

    /// The rules of the specification, in qemu's words.
    fn check(&self, file_len: u64) -> Result<()> {
        let refused = |message: &str| Err(Error::invalid(message));
        let unknown = self.features & !(HAS_BACKING | NEED_CHECK | BACKING_IS_RAW);
        if unknown != 0 {
            return Err(Error::unsupported(format!("Unsupported QED features: {unknown:x}")));
        }
        if !self.cluster.is_power_of_two() || !(4 << 10..=64 << 20).contains(&self.cluster) {
            return refused("QED cluster size is invalid");
        }
        if !self.table.is_power_of_two() || !(1..=16).contains(&self.table) {
            return refused("QED table size is invalid");
        }
        if !self.size.is_multiple_of(SECTOR) || self.size > self.most_size() {
            return refused("QED image size is invalid");
        }
        if !self.l1_offset.is_multiple_of(self.cluster)
            || self.l1_offset < self.header_end()
            || self.l1_offset.checked_add(self.table_len()).is_none_or(|end| end > file_len)
        {
            return refused("QED table offset is invalid");
        }
        if self.features & HAS_BACKING == 0 {
            return Ok(());
        }
        if self.name_len > MOST_NAME {
            return refused("QED backing filename is too long");
        }
        if u64::from(self.name_offset) + u64::from(self.name_len) > self.header_end().min(file_len) {
            return refused("QED backing filename is invalid");
        }
        Ok(())
    }

    fn entries(&self) -> u64 {
        self.table * self.cluster / 8
    }

    fn table_len(&self) -> u64 {
        self.table * self.cluster
    }

    fn header_end(&self) -> u64 {
        (self.header * self.cluster).max(HEADER_LEN)
    }

    /// Bytes of the disk that one L2 table describes. At most 2^27 entries of 2^26 bytes.
    fn covered(&self) -> u64 {
        self.entries() * self.cluster
    }

    fn most_size(&self) -> u64 {
        self.covered().saturating_mul(self.entries()).min(u64::MAX >> 1)
    }
}

#[derive(Debug)]
struct Qed {
    tables: Tables,
    header: Header,
    backing: Option<Backing>,
}

/// Reads the header and the name of the backing file.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let tables = Tables::new(Arc::clone(&storage))?;
    tables.check_inside("the header", 0, HEADER_LEN)?;
    let bytes: [u8; 64] = tables.bytes(0)?;
    if !probe(&bytes) {
        return Err(Error::invalid("Image not in QED format"));
    }
    let header = Header::parse(&bytes).ok_or_else(|| Error::invalid("Image not in QED format"))?;
    header.check(tables.file_len())?;
    let backing = backing(&header, &*storage)?;
    let qed = Qed { tables, header, backing: backing.clone() };
    Ok(Opened::new(qed, storage).with_backing(backing))
}

fn backing(header: &Header, storage: &dyn Storage) -> Result<Option<Backing>> {
    if header.features & HAS_BACKING == 0 || header.name_len == 0 {
        return Ok(None);
    }
    let mut name = vec![0; to_usize(u64::from(header.name_len))];
    storage.read_at(&mut name, u64::from(header.name_offset))?;
    let format = (header.features & BACKING_IS_RAW != 0).then_some("raw");
    Ok(Some(Backing { name, format }))
}

/// What an L2 table says of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Absent,
    Zero,
    At(u64),
}

impl Qed {
    fn entry(&self, table: u64, index: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.tables.bytes(table + index * 8)?))
    }

    /// Whether `len` bytes at `offset` can be clusters that are no part of the header.
    fn is_place(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.header.cluster)
            && offset >= self.header.header_end()
            && offset.checked_add(len).is_some_and(|end| end <= self.tables.file_len())
    }

    fn refused(&self, what: &str, guest: u64, place: u64) -> Error {
        let past = place >= self.header.header_end() && place.is_multiple_of(self.header.cluster);
        let kind = if past { ErrorKind::Truncated } else { ErrorKind::Corrupt };
        let len = self.tables.file_len();
        Error::new(
            kind,
            format!(
                "{what} for {guest:#x} is said to lie at {place:#x}, where none can be (file length {len:#x})"
            ),
        )
    }

    /// The L2 table that describes `offset`.
    fn l2_table(&self, offset: u64) -> Result<Option<u64>> {
        match self.entry(self.header.l1_offset, offset / self.header.covered())? {
            0 => Ok(None),
            table if self.is_place(table, self.header.table_len()) && table != self.header.l1_offset => {
                Ok(Some(table))
            }
            table => Err(self.refused("the L2 table", offset, table)),
        }
    }

    fn look_up(&self, table: u64, offset: u64) -> Result<Cluster> {
        let index = offset / self.header.cluster % self.header.entries();
        let l1 = self.header.l1_offset..self.header.l1_offset + self.header.table_len();
        let l2 = table..table + self.header.table_len();
        match self.entry(table, index)? {
            0 => Ok(Cluster::Absent),
            ZERO => Ok(Cluster::Zero),
            // Whether all of the cluster is in the file is seen when it is read: the last one may be cut.
            place if self.is_place(place, 1) && !l1.contains(&place) && !l2.contains(&place) => {
                Ok(Cluster::At(place))
            }
            place => Err(self.refused("the cluster", offset, place)),
        }
    }

    fn find(&self, offset: u64) -> Result<(Cluster, u64)> {
        match self.l2_table(offset)? {
            None => Ok((Cluster::Absent, self.header.covered() - offset % self.header.covered())),
            Some(table) => {
                let cluster = self.header.cluster;
                Ok((self.look_up(table, offset)?, cluster - offset % cluster))
            }
        }
    }
}

impl Layout for Qed {
    fn format_name(&self) -> &'static str {
        "qed"
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn preferred(&self) -> u32 {
        block::num::low_u32(self.header.cluster)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            cluster_size: Some(block::num::low_u32(self.header.cluster)),
            // As qemu-img has it, which shows no trace of the feature bit that asks for a check.
            dirty: Some(false),
            backing_file: self.backing.as_ref().map(|b| String::from_utf8_lossy(&b.name).into_owned()),
            backing_format: self.backing.as_ref().and_then(|backing| backing.format).map(str::to_owned),
            ..ImageInfo::default()
        }
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let (first, covered) = self.find(offset)?;
        let within = offset % self.header.cluster;
        let mut len = covered.min(max_len);
        let mut steps = 0;
        while len < max_len && steps < MOST_STEPS {
            steps += 1;
            // What is wrong further on is told to whoever asks there.
            let Ok((next, covered)) = self.find(offset + len) else { break };
            let goes_on = match (first, next) {
                (Cluster::At(first), Cluster::At(next)) => first.checked_add(within + len) == Some(next),
                (first, next) => first == next,
            };
            if !goes_on {
                break;
            }
            len += covered.min(max_len - len);
        }
        let place = match first {
            Cluster::Absent => Place::Absent,
            Cluster::Zero => Place::Zero,
            Cluster::At(place) => Place::Plain(place + within),
        };
        Ok(Piece { place, len })
    }

    fn check(&self) -> Result<CheckReport> {
        Check::new(self).run()
    }
}

/// A walk through all tables.
#[derive(Debug)]
struct Check<'a> {
    qed: &'a Qed,
    report: CheckReport,
    /// Numbers of the clusters behind the header that something refers to. At most as many as the file has.
    used: HashSet<u64>,
}

impl<'a> Check<'a> {
    fn new(qed: &'a Qed) -> Self {
        let total_clusters = qed.header.size.div_ceil(qed.header.cluster);
        let report = CheckReport { total_clusters, ..CheckReport::default() };
        Self { qed, report, used: HashSet::new() }
    }

    /// As qemu-img does it: places outside the file, clusters that are used twice, clusters that are not used.
    fn run(mut self) -> Result<CheckReport> {
        let header = &self.qed.header;
        self.mark(header.l1_offset, header.table);
        for index in 0..header.size.div_ceil(header.covered()) {
            let table = self.qed.entry(header.l1_offset, index)?;
            if table == 0 {
                continue;
            }
            if !self.qed.is_place(table, header.table_len()) || !self.mark(table, header.table) {
                self.wrong(format!(
                    "ERROR L2 table {index} at {table:#x} is outside the image or used twice"
                ));
                continue;
            }
            self.table(table)?;
        }
        let clusters = self.qed.tables.file_len() / header.cluster;
        let used = self.used.iter().filter(|cluster| (header.header..clusters).contains(*cluster)).count();
        self.report.leaks = clusters.saturating_sub(header.header).saturating_sub(used as u64);
        Ok(self.report)
    }

    fn wrong(&mut self, message: String) {
        self.report.corruptions += 1;
        self.report.say(message);
    }

    /// Notes clusters as used. `false`: one of them is already.
    fn mark(&mut self, offset: u64, clusters: u64) -> bool {
        let first = offset / self.qed.header.cluster;
        let mut fresh = first >= self.qed.header.header;
        for cluster in first..first + clusters {
            fresh &= self.used.insert(cluster);
        }
        fresh
    }

    fn table(&mut self, table: u64) -> Result<()> {
        let cluster = self.qed.header.cluster;
        let mut last = None;
        for index in 0..self.qed.header.entries() {
            let place = self.qed.entry(table, index)?;
            if place <= ZERO {
                continue;
            }
            self.report.allocated_clusters += 1;
            if last.is_some_and(|last: u64| last.checked_add(cluster) != Some(place)) {
                self.report.fragmented_clusters += 1;
            }
            last = Some(place);
            if !self.qed.is_place(place, cluster) {
                self.wrong(format!(
                    "ERROR cluster {index} of the L2 table at {table:#x} is outside the image"
                ));
            } else if !self.mark(place, 1) {
                self.wrong(format!("ERROR cluster {index} of the L2 table at {table:#x} is used twice"));
            }
        }
        Ok(())
    }
}
