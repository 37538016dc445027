//! The boot sector and the table of clusters (chapters 3 to 5 of the specification).

use std::collections::HashSet;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result};

use crate::bytes::{byte, corrupt, le16, le32, low32, put_le32};
use crate::staged::Staged;
use crate::types::Clock;

/// The most clusters: all of them are looked at for what is free. This is 16 GiB of the smaller ones.
const MOST_CLUSTERS: u64 = 4 << 20;

/// The boot sector's parameters, checked. Places are sectors.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) sector_bytes: u64,
    pub(super) cluster_sectors: u64,
    /// Where each copy of the table begins.
    tables: Vec<u64>,
    table_sectors: u64,
    /// The root directory of FAT12 and FAT16: its first sector, and how many.
    pub(super) root: (u64, u64),
    /// FAT32: the first cluster of the root directory.
    pub(super) root_cluster: u32,
    data: u64,
    clusters: u64,
    bits: u32,
    /// FAT32: the sector that counts what is free.
    info: Option<u64>,
}

impl Shape {
    fn parse(sector: &[u8], device_bytes: u64) -> Result<Self> {
        let sector_bytes = u64::from(le16(sector, 11));
        let cluster_sectors = u64::from(byte(sector, 13));
        let (reserved, copies) = (u64::from(le16(sector, 14)), u64::from(byte(sector, 16)));
        let wide = le16(sector, 22) == 0;
        let either = |short: usize, long: usize| match le16(sector, short) {
            0 => u64::from(le32(sector, long)),
            value => value.into(),
        };
        let (table_sectors, sectors) = (either(22, 36), either(19, 32));
        if !matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
            || !cluster_sectors.is_power_of_two()
            || reserved == 0
        {
            return Err(corrupt("the boot sector is not one of a FAT file system"));
        }
        if wide && le16(sector, 42) != 0 {
            return Err(Error::unsupported(format!("FAT32 of version {:#x}", le16(sector, 42))));
        }
        let root_sectors = (u64::from(le16(sector, 17)) * 32).div_ceil(sector_bytes);
        let root = reserved + copies * table_sectors;
        let data = root + root_sectors;
        let room = sectors.saturating_sub(data) / cluster_sectors;
        let bits = match room {
            _ if wide => 32,
            0..4085 => 12,
            _ => 16,
        };
        // One of the copies may be the only one that is kept ("ExtFlags").
        let flags = if wide { le16(sector, 40) } else { 0 };
        let active = if flags & 0x80 != 0 { Some(u64::from(flags & 15)) } else { None };
        let tables = (0..copies).filter(|copy| active.is_none_or(|active| active == *copy));
        let tables: Vec<_> = tables.map(|copy| reserved + copy * table_sectors).collect();
        let info = Some(u64::from(le16(sector, 48))).filter(|info| wide && (1..reserved).contains(info));
        let shape = Self {
            sector_bytes,
            cluster_sectors,
            tables,
            table_sectors,
            root: (root, root_sectors),
            root_cluster: if wide { le32(sector, 44) } else { 0 },
            data,
            clusters: room.min((table_sectors * sector_bytes * 8 / u64::from(bits)).saturating_sub(2)),
            bits,
            info,
        };
        let fits = sectors.checked_mul(sector_bytes).is_some_and(|bytes| bytes <= device_bytes);
        if shape.clusters > MOST_CLUSTERS {
            return Err(Error::unsupported(format!("a FAT file system of {} clusters", shape.clusters)));
        }
        if !fits || shape.clusters == 0 || shape.tables.is_empty() {
            return Err(corrupt(format!(
                "a FAT file system of {sectors} sectors with {} clusters on a device of {device_bytes:#x} bytes",
                shape.clusters
            )));
        }
        Ok(shape)
    }

    pub(super) fn is_wide(&self) -> bool {
        self.bits == 32
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        self.cluster_sectors * self.sector_bytes
    }

    /// Values from this one on end a chain; the one below it marks a bad cluster.
    fn end_mark(&self) -> u32 {
        0x0fff_fff8 & if self.bits == 32 { u32::MAX } else { (1 << self.bits) - 1 }
    }

    /// The first sector of a cluster.
    pub(super) fn sector_of(&self, cluster: u32) -> Result<u64> {
        let index = u64::from(cluster).checked_sub(2).filter(|index| *index < self.clusters);
        let index = index.ok_or_else(|| {
            corrupt(format!("cluster {cluster:#x} is none of the file system's {:#x}", self.clusters))
        })?;
        Ok(self.data + index * self.cluster_sectors)
    }
}

/// A FAT file system as clusters.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) staged: Staged,
    pub(super) shape: Shape,
    pub(super) clock: Clock,
    /// Clusters that nothing refers to any more once all changes have reached the device.
    freed: HashSet<u32>,
    /// Those of them that the operation under way has added.
    current: Vec<u32>,
    /// Sectors of clusters that have been taken for directories since the last sync.
    pub(super) fresh: HashSet<u64>,
    /// Where free clusters are looked for first.
    next: u32,
    pub(super) notes: Vec<String>,
}

impl Volume {
    pub(super) fn open(device: Arc<dyn BlockDevice>, clock: Clock) -> Result<Self> {
        let mut sector = vec![0; to_usize(device.size().min(512))];
        device.read_at(&mut sector, 0)?;
        let shape = Shape::parse(&sector, device.size())?;
        let mut volume = Self {
            staged: Staged::new(device, shape.sector_bytes),
            shape,
            clock,
            freed: HashSet::new(),
            current: vec![],
            fresh: HashSet::new(),
            next: 2,
            notes: vec![],
        };
        if volume.is_dirty(&sector)? {
            volume.notes.push("the file system was not unmounted".to_owned());
        }
        Ok(volume)
    }

    /// Whether the marks of Windows or Linux say that it is mounted.
    fn is_dirty(&mut self, sector: &[u8]) -> Result<bool> {
        let mark = byte(sector, if self.shape.is_wide() { 0x41 } else { 0x25 }) & 1 != 0;
        let clean = match self.shape.bits {
            12 => true,
            16 => self.value(1)? & 0x8000 != 0,
            _ => self.value(1)? & 0x0800_0000 != 0,
        };
        Ok(mark || !clean)
    }

    // The table.

    /// Where an entry lies in the table: byte, and how many bytes.
    fn entry_place(&self, cluster: u32) -> (u64, usize) {
        let index = u64::from(cluster);
        match self.shape.bits {
            12 => (index + index / 2, 2),
            16 => (index * 2, 2),
            _ => (index * 4, 4),
        }
    }

    fn raw_entry(&mut self, cluster: u32) -> Result<u32> {
        let (at, len) = self.entry_place(cluster);
        let (size, mut raw) = (self.shape.sector_bytes, [0; 4]);
        let first = self.shape.tables[0];
        for (index, byte) in (0..).zip(&mut raw[..len]) {
            let at: u64 = at + index;
            if at / size >= self.shape.table_sectors {
                return Err(corrupt(format!("cluster {cluster:#x} has no entry in the table")));
            }
            *byte = crate::bytes::byte(&self.staged.get(first + at / size)?, to_usize(at % size));
        }
        Ok(u32::from_le_bytes(raw))
    }

    /// An entry of the table.
    fn value(&mut self, cluster: u32) -> Result<u32> {
        let raw = self.raw_entry(cluster)?;
        Ok(match self.shape.bits {
            12 if cluster & 1 == 1 => raw >> 4,
            12 => raw & 0xfff,
            16 => raw,
            _ => raw & 0x0fff_ffff,
        })
    }

    /// Changes an entry in all copies of the table. The bits that do not belong to it stay as they are.
    fn set(&mut self, cluster: u32, value: u32) -> Result<()> {
        let old = self.raw_entry(cluster)?;
        let new = match self.shape.bits {
            12 if cluster & 1 == 1 => value << 4 | old & 0xf,
            12 => value & 0xfff | old & 0xf000,
            16 => value,
            _ => value & 0x0fff_ffff | old & 0xf000_0000,
        };
        let (at, len) = self.entry_place(cluster);
        let size = self.shape.sector_bytes;
        for table in self.shape.tables.clone() {
            for (index, byte) in (0..).zip(&new.to_le_bytes()[..len]) {
                let at: u64 = at + index;
                let sector = self.staged.edit(table + at / size)?;
                crate::bytes::copy_to(sector, to_usize(at % size), &[*byte]);
            }
        }
        Ok(())
    }

    /// All clusters of a chain.
    pub(super) fn chain(&mut self, first: u32, most_bytes: u64) -> Result<Vec<u32>> {
        let (mut chain, mut cluster) = (vec![], first);
        let most = most_bytes.div_ceil(self.shape.cluster_bytes()).min(self.shape.clusters);
        loop {
            self.shape.sector_of(cluster)?;
            if chain.len() as u64 >= most {
                return Err(corrupt(format!(
                    "the chain of cluster {first:#x} has more than {most} clusters"
                )));
            }
            chain.push(cluster);
            cluster = self.value(cluster)?;
            if cluster >= self.shape.end_mark() {
                return Ok(chain);
            }
        }
    }

    /// The chain of a file of this size, which has to be long enough for it.
    pub(super) fn chain_of(&mut self, first: u32, size: u64) -> Result<Vec<u32>> {
        let needed = size.div_ceil(self.shape.cluster_bytes());
        let chain = if first == 0 { vec![] } else { self.chain(first, u64::MAX)? };
        if (chain.len() as u64) < needed {
            return Err(corrupt(format!("a file of {size} bytes in {} clusters", chain.len())));
        }
        Ok(chain)
    }

    /// Links clusters to a chain.
    fn link(&mut self, chain: &[u32]) -> Result<()> {
        for pair in chain.windows(2) {
            self.set(pair[0], pair[1])?;
        }
        let end = self.shape.end_mark() | 7;
        chain.last().map_or(Ok(()), |last| self.set(*last, end))
    }

    /// Makes a chain of what there is and `count` more clusters, in one piece if possible.
    pub(super) fn extend(&mut self, mut chain: Vec<u32>, count: u64) -> Result<Vec<u32>> {
        if count > 0 {
            let taken = self.find_free(count)?;
            self.next = taken.last().copied().unwrap_or(self.next);
            // Marked at once, so that they are found no more.
            chain.extend(taken);
            self.count_free(-count.cast_signed())?;
        }
        self.link(&chain)?;
        Ok(chain)
    }

    fn find_free(&mut self, count: u64) -> Result<Vec<u32>> {
        let end = low32(self.shape.clusters + 2);
        let start = self.next.clamp(2, end - 1);
        let wanted = to_usize(count);
        let (mut run, mut all): (Vec<u32>, Vec<u32>) = (vec![], vec![]);
        for cluster in (start..end).chain(2..start) {
            if self.value(cluster)? != 0 {
                run.clear();
                continue;
            }
            if run.last().is_some_and(|last| last + 1 != cluster) {
                run.clear();
            }
            run.push(cluster);
            if all.len() < wanted {
                all.push(cluster);
            }
            if run.len() == wanted {
                return Ok(run);
            }
        }
        if all.len() < wanted {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("the guest's file system has {} free clusters, {count} are needed", all.len()),
            )
            .hint("Make room within the guest, or give it a larger partition."));
        }
        Ok(all)
    }

    /// Notes that nothing will refer to clusters any more once the operation has reached the device.
    pub(super) fn give_back(&mut self, chain: &[u32]) -> Result<()> {
        for cluster in chain {
            if !self.freed.insert(*cluster) {
                return Err(corrupt(format!("cluster {cluster:#x} belongs to two files")));
            }
            self.current.push(*cluster);
        }
        Ok(())
    }

    /// How many clusters are free, those included that have been given back.
    pub(super) fn free_clusters(&mut self) -> Result<u64> {
        let mut free = self.freed.len() as u64;
        for cluster in 2..low32(self.shape.clusters + 2) {
            free += u64::from(self.value(cluster)? == 0);
        }
        Ok(free)
    }

    /// Keeps the count of FAT32, if there is one ("FSInfo Sector Structure").
    fn count_free(&mut self, change: i64) -> Result<()> {
        let Some(info) = self.shape.info else { return Ok(()) };
        let (now, next) = (self.staged.get(info)?, self.next);
        let free = le32(&now, 488);
        if le32(&now, 0) != 0x4161_5252 || le32(&now, 484) != 0x6141_7272 || free == u32::MAX {
            return Ok(());
        }
        let free = low32(u64::from(free).saturating_add_signed(change).min(self.shape.clusters));
        let sector = self.staged.edit(info)?;
        put_le32(sector, 488, free);
        put_le32(sector, 492, next);
        Ok(())
    }

    // Operations.

    pub(super) fn accept(&mut self) {
        self.staged.accept();
        self.current.clear();
    }

    pub(super) fn abandon(&mut self) {
        self.staged.abandon();
        for cluster in self.current.drain(..) {
            self.freed.remove(&cluster);
        }
    }

    pub(super) fn has_given_back(&self) -> bool {
        !self.freed.is_empty()
    }

    /// Brings all changes to the device: tables and new directories, then the others, then what has become free.
    pub(super) fn write(&mut self) -> Result<()> {
        let (root, fresh) = (self.shape.root.0, &self.fresh);
        self.staged.write(|sector| sector < root || fresh.contains(&sector))?;
        self.staged.flush()?;
        self.staged.write(|_| true)?;
        self.staged.flush()?;
        self.fresh.clear();
        if self.freed.is_empty() {
            return Ok(());
        }
        let mut freed: Vec<_> = self.freed.iter().copied().collect();
        freed.sort_unstable();
        let released = freed.iter().try_for_each(|cluster| self.set(*cluster, 0));
        if let Err(error) = released.and_then(|()| self.count_free(i64::try_from(freed.len()).unwrap_or(0))) {
            self.staged.abandon();
            return Err(error);
        }
        self.freed.clear();
        self.staged.accept();
        self.staged.write(|_| true)?;
        self.staged.flush()
    }

    // Contents.

    /// Runs of sectors that follow one another, of so many bytes of a chain.
    fn runs(&self, chain: &[u32], bytes: u64) -> Result<Vec<(u64, u64)>> {
        let mut runs: Vec<(u64, u64)> = vec![];
        let needed = to_usize(bytes.div_ceil(self.shape.cluster_bytes()));
        for cluster in chain.iter().take(needed) {
            let (sector, count) = (self.shape.sector_of(*cluster)?, self.shape.cluster_sectors);
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == sector => last.1 += count,
                _ => runs.push((sector, count)),
            }
        }
        Ok(runs)
    }

    /// Writes a file's bytes to its chain, zeros to the rest of the last sector.
    pub(super) fn write_chain(&mut self, chain: &[u32], bytes: &[u8]) -> Result<()> {
        let size = to_usize(self.shape.sector_bytes);
        let mut done = 0;
        for (sector, count) in self.runs(chain, bytes.len() as u64)? {
            let piece = crate::bytes::part(bytes, done, to_usize(count) * size);
            let whole = piece.len() / size * size;
            if whole > 0 {
                self.staged.write_through(sector, &piece[..whole])?;
            }
            if whole < piece.len() {
                let mut last = piece[whole..].to_vec();
                last.resize(size, 0);
                self.staged.write_through(sector + (whole / size) as u64, &last)?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Reads a file's bytes.
    pub(super) fn read_chain(&mut self, chain: &[u32], size: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        for (sector, count) in self.runs(chain, size)? {
            let from = bytes.len();
            let len = to_usize(count * self.shape.sector_bytes).min(to_usize(size) - from);
            bytes.resize(from + len, 0);
            self.staged.read_through(sector, 0, &mut bytes[from..])?;
        }
        Ok(bytes)
    }
}
