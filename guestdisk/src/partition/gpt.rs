//! The GUID Partition Table (UEFI specification 2.10, section 5.3).

use block::BlockDevice;
use block::num::to_usize;

use super::{Partition, PartitionType, Role, Scheme, Table, clip};
use crate::bytes::{self, corrupt, guid, le32, le64};
use crate::crc::crc32;

/// The most bytes of partition entries that are read: 256 times what is usual.
const MOST_ENTRY_BYTES: u64 = 4 << 20;
/// As many partitions as Linux knows on one disk.
const MOST_PARTITIONS: u64 = 256;

/// A header whose fields have been checked.
#[derive(Debug)]
struct Header {
    sector_bytes: u64,
    alternate_lba: u64,
    disk: crate::guid::Guid,
    entries_lba: u64,
    entry_count: u64,
    entry_bytes: u64,
    entries_crc: u32,
}

/// Reads the table by its primary header, or by its backup where that is damaged.
pub(super) fn read(device: &dyn BlockDevice) -> block::Result<Table> {
    let mut faults = vec![];
    for sector_bytes in [512, 4096] {
        match copy(device, 1, sector_bytes) {
            Ok(table) => return Ok(table),
            Err(fault) => faults.push(fault),
        }
    }
    let primary = if faults[0].found { &faults[0] } else { &faults[1] };
    let primary = if primary.found { primary.text.clone() } else { faults[0].text.clone() };
    let mut backups = vec![];
    for (sector_bytes, fault) in [512, 4096].into_iter().zip(&faults) {
        backups.extend(fault.alternate_lba.map(|lba| (lba, sector_bytes)));
        backups.extend((device.size() / sector_bytes).checked_sub(1).map(|lba| (lba, sector_bytes)));
    }
    for (lba, sector_bytes) in backups {
        if let Ok(mut table) = copy(device, lba, sector_bytes) {
            table.problems.insert(0, format!("the primary GPT is damaged ({primary}); its backup is used"));
            return Ok(table);
        }
    }
    Err(corrupt(format!(
        "the MBR announces a GPT, but neither the primary copy ({primary}) nor a backup is intact"
    ))
    .hint("If the disk was grown or cut, its backup is not at its end any more: `sgdisk -e` moves it there."))
}

/// Why a copy is not to be trusted.
struct Fault {
    text: String,
    /// There was a header at least.
    found: bool,
    /// Where an intact header says that the other one is.
    alternate_lba: Option<u64>,
}

impl Fault {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), found: true, alternate_lba: None }
    }
}

/// Reads the copy whose header is at `lba`.
fn copy(device: &dyn BlockDevice, lba: u64, sector_bytes: u64) -> Result<Table, Fault> {
    let header = Header::read(device, lba, sector_bytes)?;
    let entries = header.entries(device).map_err(|text| Fault {
        text,
        found: true,
        alternate_lba: Some(header.alternate_lba).filter(|alternate| *alternate != lba),
    })?;
    Ok(header.table(lba, &entries, device.size()))
}

impl Header {
    fn read(device: &dyn BlockDevice, lba: u64, sector_bytes: u64) -> Result<Self, Fault> {
        let offset = lba.checked_mul(sector_bytes).ok_or_else(|| Fault::new("its place is no place"))?;
        let sector = bytes::read(device, offset, to_usize(sector_bytes))
            .map_err(|error| Fault { found: false, ..Fault::new(error.to_string()) })?;
        if !sector.starts_with(b"EFI PART") {
            return Err(Fault { found: false, ..Fault::new(format!("no header at {offset:#x}")) });
        }
        Self::parse(&sector, lba, sector_bytes)
            .map_err(|text| Fault::new(format!("header at {offset:#x}: {text}")))
    }

    /// Table 5.5 of the specification.
    fn parse(sector: &[u8], lba: u64, sector_bytes: u64) -> Result<Self, String> {
        let size = le32(sector, 12) as usize;
        if !(92..=sector.len()).contains(&size) {
            return Err(format!("its size is {size}"));
        }
        let mut covered = sector[..size].to_vec();
        covered[16..20].fill(0);
        let (stored, computed) = (le32(sector, 16), crc32(&covered));
        if stored != computed {
            return Err(format!("its checksum is {stored:#x}, that of its bytes {computed:#x}"));
        }
        if le64(sector, 24) != lba {
            return Err(format!("it says that it lies in sector {}", le64(sector, 24)));
        }
        let header = Self {
            sector_bytes,
            alternate_lba: le64(sector, 32),
            disk: guid(sector, 56).mixed_endian(),
            entries_lba: le64(sector, 72),
            entry_count: le32(sector, 80).into(),
            entry_bytes: le32(sector, 84).into(),
            entries_crc: le32(sector, 88),
        };
        header.check()
    }

    /// The size of an entry is 128 times a power of two, "for example 128, 256, 512" (table 5.5).
    fn check(self) -> Result<Self, String> {
        let (count, bytes) = (self.entry_count, self.entry_bytes);
        if bytes < 128 || !bytes.is_power_of_two() || bytes * count > MOST_ENTRY_BYTES {
            return Err(format!("{count} partition entries of {bytes} bytes"));
        }
        Ok(self)
    }

    fn entries(&self, device: &dyn BlockDevice) -> Result<Vec<u8>, String> {
        let len = to_usize(self.entry_count * self.entry_bytes);
        let offset = self.entries_lba.saturating_mul(self.sector_bytes);
        let entries = bytes::read(device, offset, len)
            .map_err(|error| format!("partition entries at {offset:#x}: {error}"))?;
        let computed = crc32(&entries);
        if computed != self.entries_crc {
            let stored = self.entries_crc;
            return Err(format!(
                "partition entries at {offset:#x}: their checksum is {stored:#x}, that of their bytes {computed:#x}"
            ));
        }
        Ok(entries)
    }

    fn table(&self, lba: u64, entries: &[u8], disk: u64) -> Table {
        let last = lba.max(self.alternate_lba);
        let mut table = Table {
            scheme: Scheme::Gpt,
            sector_bytes: block::num::low_u32(self.sector_bytes),
            uuid: self.disk.to_string(),
            extent: last.saturating_add(1).saturating_mul(self.sector_bytes),
            partitions: vec![],
            problems: vec![],
        };
        let used = (1..).zip(entries.chunks_exact(to_usize(self.entry_bytes)));
        for (number, entry) in used.take(to_usize(MOST_PARTITIONS)) {
            let partition = self.partition(number, entry, disk, &mut table.problems);
            table.partitions.extend(partition);
        }
        table
    }

    /// Table 5.6 of the specification.
    fn partition(
        &self,
        number: u32,
        entry: &[u8],
        disk: u64,
        problems: &mut Vec<String>,
    ) -> Option<Partition> {
        let kind = guid(entry, 0).mixed_endian();
        if kind.is_nil() {
            return None;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let sectors = last.checked_sub(first).and_then(|len| len.checked_add(1));
        let len = sectors.and_then(|sectors| sectors.checked_mul(self.sector_bytes));
        let place = first.checked_mul(self.sector_bytes).zip(len);
        let Some((offset, len)) = place else {
            problems.push(format!("partition {number} lies in sectors {first} to {last}"));
            return None;
        };
        Some(Partition {
            number,
            offset,
            len: clip(number, offset, len, disk, problems)?,
            kind: PartitionType::Gpt(kind),
            name: bytes::utf16(bytes::part(entry, 56, 72)),
            flags: le64(entry, 48),
            uuid: guid(entry, 16).mixed_endian().to_string(),
            role: Role::Primary,
        })
    }
}
