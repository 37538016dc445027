//! The snapshot table (specification, "Snapshots"): reading and encoding it. What taking, applying and
//! deleting a snapshot does to the rest of the image is elsewhere.
//!
//! Extra data that is not known here is kept as it is.

mod change;
mod ops;
mod tally;
pub(crate) mod view;

use block::Storage;
use block::codec::{Reader, Writer};
use block::image::SnapshotInfo;
use block::num::{is_aligned, to_usize};

use crate::error::Error;
use crate::geometry::{Geometry, MAX_L1_BYTES};
pub use ops::MAX_NAME;

use crate::header::Header;

/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// Where the length of the extra data is: last in the fixed part.
const EXTRA_LEN_AT: usize = 36;
/// Bytes of the extra data known here.
const KNOWN_EXTRA: usize = 24;
/// Extra data that version 3 asks for: the machine state's and the disk's size.
pub(crate) const REQUIRED_EXTRA: u32 = 16;
/// Most extra data (QEMU's limit).
pub(crate) const MAX_EXTRA: u32 = 1024;
/// Largest table in bytes (QEMU's limit).
pub(crate) const MAX_TABLE: u64 = 64 << 20;

/// Which snapshot is meant. Neither ids nor names need be unique in a file; the first entry that fits is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// The one with this id or, if there is none, the one with this name.
    IdOrName(Vec<u8>),
    /// The one that has all that is given.
    Both {
        /// Its id.
        id: Option<Vec<u8>>,
        /// Its name.
        name: Option<Vec<u8>>,
    },
}

impl Selector {
    /// The index of the snapshot that is meant.
    pub fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let first = |fits: &dyn Fn(&Snapshot) -> bool| snapshots.iter().position(fits);
        match self {
            Self::IdOrName(text) => first(&|s| s.id == *text).or_else(|| first(&|s| s.name == *text)),
            Self::Both { id, name } => first(&|s| {
                id.as_ref().is_none_or(|id| s.id == *id) && name.as_ref().is_none_or(|name| s.name == *name)
            }),
        }
    }
}

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// Host offset of its L1 table.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// Unique id (a number as text, if QEMU made it).
    pub id: Vec<u8>,
    /// The user's name for it, not necessarily unique.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of that.
    pub date_nsec: u32,
    /// Nanoseconds that the guest had been running.
    pub vm_clock_nsec: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Size of the disk at that time in bytes; `None` if the entry does not say.
    pub disk_size: Option<u64>,
    /// Instruction count of a recorded run; `None` if the entry does not say or says that there is none.
    pub icount: Option<u64>,
    /// Length of the extra data as found; what is written may be longer.
    pub extra_len: u32,
    /// Extra data behind the fields known here.
    pub unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// What people want to know of it. `disk_size` is the image's, for entries that do not say.
    pub fn info(&self, disk_size: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self.vm_state_size,
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.icount,
            disk_size: self.disk_size.unwrap_or(disk_size),
        }
    }

    /// Bytes of its entry as it was found, without padding.
    fn len_as_found(&self) -> u64 {
        FIXED + u64::from(self.extra_len) + (self.id.len() + self.name.len()) as u64
    }

    /// Whether its L1 table can be where the entry says.
    ///
    /// # Errors
    /// [`Error::SnapshotL1`]; [`Error::OutsideFile`].
    pub fn check_l1(&self, geometry: &Geometry, file_len: u64) -> Result<(), Error> {
        let len = u64::from(self.l1_size) * 8;
        if len > MAX_L1_BYTES {
            return Err(Error::SnapshotL1 { too_large: true });
        }
        let end = self.l1_offset.checked_add(len);
        let (true, Some(end)) = (is_aligned(self.l1_offset, geometry.cluster_size()), end) else {
            return Err(Error::SnapshotL1 { too_large: false });
        };
        if end > file_len {
            let what = "L1 table of a snapshot";
            return Err(Error::OutsideFile { what, offset: self.l1_offset, len, file_len });
        }
        Ok(())
    }

    /// Parses an entry and returns it with its length without padding. `None`: `bytes` are too few.
    fn parse(bytes: &[u8]) -> Option<(Self, u64)> {
        let mut reader = Reader::new(bytes);
        let (l1_offset, l1_size) = (reader.be_u64()?, reader.be_u32()?);
        let (id_len, name_len) = (reader.be_u16()?, reader.be_u16()?);
        let (date_sec, date_nsec, vm_clock_nsec) = (reader.be_u32()?, reader.be_u32()?, reader.be_u64()?);
        let (vm_state_size, extra_len) = (reader.be_u32()?.into(), reader.be_u32()?);
        let extra = reader.take(usize::try_from(extra_len).ok()?)?;
        let id = reader.take(id_len.into())?.to_vec();
        let name = reader.take(name_len.into())?.to_vec();
        let mut snapshot = Self {
            l1_offset,
            l1_size,
            id,
            name,
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            extra_len,
            unknown_extra: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
            disk_size: None,
            icount: None,
        };
        snapshot.parse_extra(extra);
        Some((snapshot, reader.position() as u64))
    }

    fn parse_extra(&mut self, extra: &[u8]) {
        let mut reader = Reader::new(extra);
        if let Some(size) = reader.be_u64() {
            self.vm_state_size = size;
        }
        self.disk_size = reader.be_u64();
        self.icount = reader.be_u64().filter(|count| *count != u64::MAX);
    }

    /// The entry as [`encode_table`] writes it, which says everything.
    pub(crate) fn completed(mut self, disk_size: u64) -> Self {
        self.disk_size.get_or_insert(disk_size);
        self.extra_len = u32::try_from(KNOWN_EXTRA + self.unknown_extra.len()).unwrap_or(u32::MAX);
        self
    }

    fn encode(&self, disk_size: u64, writer: &mut Writer) {
        let len16 = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let (id_len, name_len) = (len16(&self.id), len16(&self.name));
        let extra_len = u32::try_from(KNOWN_EXTRA + self.unknown_extra.len()).unwrap_or(u32::MAX);
        writer.be_u64(self.l1_offset).be_u32(self.l1_size).be_u16(id_len).be_u16(name_len);
        writer.be_u32(self.date_sec).be_u32(self.date_nsec).be_u64(self.vm_clock_nsec);
        writer.be_u32(u32::try_from(self.vm_state_size).unwrap_or(0)).be_u32(extra_len);
        writer.be_u64(self.vm_state_size).be_u64(self.disk_size.unwrap_or(disk_size));
        writer.be_u64(self.icount.unwrap_or(u64::MAX)).bytes(&self.unknown_extra);
        writer.bytes(&self.id[..id_len.into()]).bytes(&self.name[..name_len.into()]);
    }
}

/// Reads the snapshot table.
///
/// # Errors
/// Limits of QEMU that it breaks, in QEMU's words; `Truncated` if the file ends before the table or before
/// the L1 table of a snapshot; or the host failed.
pub fn read_table(storage: &dyn Storage, header: &Header) -> block::Result<Vec<Snapshot>> {
    let snapshots = read_entries(storage, header)?;
    let file_len = storage.len()?;
    for snapshot in &snapshots {
        snapshot.check_l1(&header.geometry(), file_len)?;
    }
    Ok(snapshots)
}

/// The same without a look at the places of L1 tables: a snapshot that cannot be read does not keep anybody from
/// reading the disk. Whoever uses a snapshot calls [`Snapshot::check_l1`] first.
///
/// # Errors
/// As [`read_table`], but for L1 tables.
pub fn read_entries(storage: &dyn Storage, header: &Header) -> block::Result<Vec<Snapshot>> {
    let file_len = storage.len()?;
    Entries::new(storage, header, file_len).map(|entry| entry.and_then(Entry::within_limits)).collect()
}

/// The bytes of a snapshot table, the last entry without padding as in QEMU. Entries that do not say how large the disk was get `disk_size`.
///
/// # Errors
/// [`Error::SnapshotTableTooBig`]; [`Error::TooManySnapshots`].
pub fn encode_table(snapshots: &[Snapshot], disk_size: u64) -> Result<Vec<u8>, Error> {
    let count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
    if count > crate::header::MAX_SNAPSHOTS {
        return Err(Error::TooManySnapshots(count));
    }
    let mut writer = Writer::new();
    for snapshot in snapshots {
        snapshot.encode(disk_size, writer.pad_to(8));
        if writer.len() as u64 > MAX_TABLE {
            return Err(Error::SnapshotTableTooBig);
        }
    }
    Ok(writer.into_bytes())
}

/// Bytes of the table as it is in the file, if these are its entries.
pub(crate) fn stored_len(snapshots: &[Snapshot]) -> u64 {
    snapshots.iter().fold(0u64, |len, snapshot| len.next_multiple_of(8) + snapshot.len_as_found())
}

/// An entry and its place in the table.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) index: usize,
    pub(crate) snapshot: Snapshot,
    /// Bytes from the start of the table to the end of this entry, without padding: QEMU does not write that
    /// behind the last one.
    pub(crate) end: u64,
}

impl Entry {
    fn within_limits(self) -> block::Result<Snapshot> {
        if self.snapshot.extra_len > MAX_EXTRA {
            return Err(Error::SnapshotExtraData(self.index).into());
        }
        if self.end > MAX_TABLE {
            return Err(Error::SnapshotTableTooBig.into());
        }
        Ok(self.snapshot)
    }
}

/// Walks the table entry by entry. What it holds in memory is bounded by an entry, and an entry by the file.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    storage: &'a dyn Storage,
    offset: u64,
    count: u32,
    file_len: u64,
    index: u32,
    position: u64,
    tolerant: bool,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(storage: &'a dyn Storage, header: &Header, file_len: u64) -> Self {
        let (offset, count) = (header.snapshots_offset, header.nb_snapshots);
        Self { storage, offset, count, file_len, index: 0, position: 0, tolerant: false }
    }

    /// For a check: entries with too much extra data come without the excess (but with its length), and there are
    /// no more entries than an image may have.
    pub(crate) fn tolerant(storage: &'a dyn Storage, header: &Header, file_len: u64) -> Self {
        let entries = Self::new(storage, header, file_len);
        Self { count: entries.count.min(crate::header::MAX_SNAPSHOTS), tolerant: true, ..entries }
    }

    /// `len` bytes at `skip` bytes from the current position.
    fn peek(&self, skip: u64, len: u64) -> block::Result<Vec<u8>> {
        let start = self.offset.saturating_add(self.position).saturating_add(skip);
        if start.checked_add(len).is_none_or(|end| end > self.file_len) {
            let what = "snapshot table";
            let len = self.position.saturating_add(skip).saturating_add(len);
            return Err(Error::OutsideFile { what, offset: self.offset, len, file_len: self.file_len }.into());
        }
        let mut bytes = vec![0; to_usize(len)];
        self.storage.read_at(&mut bytes, start)?;
        Ok(bytes)
    }

    fn entry(&mut self) -> block::Result<Entry> {
        let mut bytes = self.peek(0, FIXED)?;
        let (names, extra_len) = variable_lengths(&bytes);
        if !self.tolerant && u64::from(extra_len) + names > u64::from(MAX_EXTRA) + 2 * u64::from(u16::MAX) {
            return Err(Error::SnapshotExtraData(to_usize(self.index.into())).into());
        }
        let kept = if self.tolerant { extra_len.min(MAX_EXTRA) } else { extra_len };
        bytes[EXTRA_LEN_AT..].copy_from_slice(&kept.to_be_bytes());
        bytes.extend(self.peek(FIXED, kept.into())?);
        bytes.extend(self.peek(FIXED + u64::from(extra_len), names)?);
        let (mut snapshot, _) = Snapshot::parse(&bytes).ok_or(Error::SnapshotTableTooBig)?;
        snapshot.extra_len = extra_len;
        let end = self.position + FIXED + u64::from(extra_len) + names;
        self.position = end.next_multiple_of(8);
        let index = to_usize(self.index.into());
        self.index += 1;
        Ok(Entry { index, snapshot, end })
    }
}

/// The lengths of id and name together and of the extra data, from an entry's fixed part.
fn variable_lengths(fixed: &[u8]) -> (u64, u32) {
    let mut reader = Reader::new(fixed);
    let lengths = reader.skip(12).and_then(|()| {
        let (id, name) = (reader.be_u16()?, reader.be_u16()?);
        reader.skip(20)?;
        Some((u64::from(id) + u64::from(name), reader.be_u32()?))
    });
    lengths.unwrap_or_default()
}

impl Iterator for Entries<'_> {
    type Item = block::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index >= self.count {
            return None;
        }
        let entry = self.entry();
        if entry.is_err() {
            self.index = self.count;
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
