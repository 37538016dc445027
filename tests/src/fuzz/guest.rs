//! Disks of guests: a file system is opened, walked and read; a script is run. Nothing may panic, run on, or take more
//! memory than the input justifies.
//!
//! An input is a disk without its empty sectors ([`pack_disk`]): four bytes with the number of its sectors, then each sector
//! that is not all zeros with its number in front. So a file system of hundreds of megabytes makes a small corpus, and
//! whoever changes bytes of it changes structures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::device::check_range;
use block::{BlockDevice, LayerExtent, Result, Stored, ZeroMode};
use guestdisk::fs::{FileKind, FileSystem};
use guestdisk::{Disks, boot, partition};

/// The most names that are visited, and the most bytes that are read of each file.
const MOST_NAMES: usize = 300;
const MOST_BYTES: usize = 1 << 20;
/// The most bytes that a reader may want at once.
const MOST_READ: usize = 32 << 20;
const SECTOR: usize = 512;

/// A disk of which only some sectors are not empty.
#[derive(Debug)]
struct Packed {
    size: u64,
    sectors: HashMap<u64, [u8; SECTOR]>,
}

impl Packed {
    fn parse(input: &[u8]) -> Self {
        let (head, records) = input.split_at(input.len().min(4));
        let mut size = [0; 4];
        size[..head.len()].copy_from_slice(head);
        let sector = |record: &[u8]| {
            let (number, bytes) = record.split_at(4);
            let number = u32::from_le_bytes(number.try_into().unwrap());
            (u64::from(number), bytes.try_into().unwrap())
        };
        let sectors = records.chunks_exact(4 + SECTOR).map(sector).collect();
        Self { size: u64::from(u32::from_le_bytes(size)) * SECTOR as u64, sectors }
    }
}

impl Packed {
    /// Makes the checksums of all superblocks of software RAID right.
    fn seal(&mut self) {
        let word =
            |sector: &[u8; SECTOR], at: usize| u32::from_le_bytes(sector[at..at + 4].try_into().unwrap());
        let starts: Vec<u64> = self
            .sectors
            .iter()
            .filter(|(_, sector)| word(sector, 0) == 0xa92b_4efc)
            .map(|(at, _)| *at)
            .collect();
        for start in starts {
            let is_new = word(&self.sectors[&start], 4) == 1;
            let raw: Vec<u8> = (0..8)
                .flat_map(|at| self.sectors.get(&(start + at)).copied().unwrap_or([0; SECTOR]))
                .collect();
            let entries = u32::from_le_bytes(raw[220..224].try_into().unwrap()).min(1920);
            let (len, sum_at) = if is_new { (256 + 2 * entries as usize, 216) } else { (4096, 152) };
            let mut sum = 0;
            for (at, word) in (0..).step_by(4).zip(raw[..len].chunks(4)).filter(|(at, _)| *at != sum_at) {
                let mut bytes = [0; 4];
                bytes[..word.len()].copy_from_slice(word);
                let _: usize = at;
                sum += u64::from(u32::from_le_bytes(bytes));
            }
            let folded = u32::try_from(((sum & 0xffff_ffff) + (sum >> 32)) & 0xffff_ffff).unwrap();
            let sector = self.sectors.get_mut(&start).unwrap();
            sector[sum_at..sum_at + 4].copy_from_slice(&folded.to_le_bytes());
        }
    }
}

impl BlockDevice for Packed {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        assert!(buf.len() <= MOST_READ, "a read of {} bytes", buf.len());
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let within = block::num::to_usize(at % SECTOR as u64);
            let len = (SECTOR - within).min(rest.len());
            let (piece, more) = rest.split_at_mut(len);
            match self.sectors.get(&(at / SECTOR as u64)) {
                Some(sector) => piece.copy_from_slice(&sector[within..within + len]),
                None => piece.fill(0),
            }
            at += len as u64;
            rest = more;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        Ok(LayerExtent::new(Stored::Data, max_len.min(self.size - offset)))
    }
}

/// The input that stands for a disk.
pub fn pack_disk(disk: &[u8]) -> Vec<u8> {
    let mut packed = u32::try_from(disk.len().div_ceil(SECTOR)).unwrap().to_le_bytes().to_vec();
    for (number, sector) in (0_u32..).zip(disk.chunks(SECTOR)) {
        if sector.iter().any(|byte| *byte != 0) {
            packed.extend(number.to_le_bytes());
            packed.extend_from_slice(sector);
            packed.resize(packed.len() + SECTOR - sector.len(), 0);
        }
    }
    packed
}

/// The disk that an input stands for.
pub(super) fn device(input: &[u8]) -> Arc<dyn BlockDevice> {
    Arc::new(Packed::parse(input))
}

/// A partition table, with everything that it leads to.
pub fn partition_table(bytes: &[u8]) {
    let device = device(bytes);
    if let Ok(Some(table)) = partition::read(&*device) {
        for found in &table.partitions {
            assert!(found.offset + found.len <= device.size());
            found.slice(Arc::clone(&device)).unwrap();
        }
    }
    let _ = partition::slice(device, 5);
}

/// Everything that a guest's disk may hold: partitions, volumes of LVM, file systems, boot entries.
pub fn guest_disk(bytes: &[u8]) {
    let Ok(disks) = Disks::open(device(bytes)) else { return };
    for volume in disks.volumes() {
        let size = volume.device.size();
        let mut buf = [0; 600];
        let len = block::num::to_usize(size.min(600));
        let _ = volume.device.read_at(&mut buf[..len], size - len as u64);
        if size > 0 {
            let _ = volume.device.layer_extent(size / 2, size);
        }
    }
    if let Ok(facts) = boot::firmware::facts(&disks) {
        let choice = facts.choose(None);
        assert!(!choice.both || choice.startable, "{facts:?}");
        let _ = facts.why_nothing(choice.firmware.other());
    }
    let _ = boot::nvram::boot_entries(bytes);
    let boot = boot::entries(&disks);
    for entry in &boot.entries {
        let _ = boot.read(&entry.kernel, MOST_BYTES as u64);
    }
    let _ = boot.default_entry();
}

/// Members of software RAID on one disk, whose superblocks have right checksums whatever is in them: the arrays are read and written.
pub fn software_raid(bytes: &[u8]) {
    let mut disk = Packed::parse(bytes);
    disk.seal();
    let over = block::overlay::Overlay::new(Arc::new(disk), Arc::new(block::mem::MemStorage::new()), 4096);
    let Ok(disks) = over.and_then(|over| Disks::open(Arc::new(over))) else { return };
    for volume in disks.volumes() {
        let size = volume.device.size();
        let len = size.min(70_000);
        let mut buf = vec![0x5a; block::num::to_usize(len)];
        for at in [0, size / 2 - len / 2, size - len] {
            let _ = volume.device.read_at(&mut buf, at);
            if len > 0 {
                let _ = volume.device.layer_extent(at, size);
            }
            let _ = volume.device.write_at(&buf, at);
            let _ = volume.device.write_zeroes_at(at, len, ZeroMode::UNMAP);
            disks.on_disks(volume, at..at + len);
        }
    }
    for array in disks.arrays() {
        assert!(
            disks.find(&format!("/dev/{}", array.name)).is_ok() || array.size == 0 || array.device().is_ok()
        );
    }
    if let Ok(found) = v2v::inspect::inspect(&disks) {
        let _ = v2v::inspect::document(&disks, &found);
        let _ = v2v::inspect::to_text(&disks, &found);
    }
}

/// A file system of any kind.
pub fn file_system(bytes: &[u8]) {
    if let Ok(fs) = FileSystem::open(device(bytes)) {
        walk(&fs);
    }
    if let Ok(fs) = FileSystem::open_top(device(bytes)) {
        let _ = fs.read_dir("/");
    }
}

/// Reads everything, as far as the limits go.
fn walk(fs: &FileSystem) {
    let (mut todo, mut names) = (vec![PathBuf::from("/")], 0);
    while let Some(folder) = todo.pop() {
        let Ok(entries) = fs.read_dir(&folder) else { continue };
        for entry in entries {
            names += 1;
            if names > MOST_NAMES {
                return;
            }
            let path = folder.join(&entry.name);
            visit(fs, &path);
            let is_directory =
                fs.symlink_metadata(&path).is_ok_and(|found| found.kind == FileKind::Directory);
            if is_directory && folder.components().count() < 20 {
                todo.push(path);
            }
        }
    }
}

fn visit(fs: &FileSystem, path: &Path) {
    let _ = fs.metadata(path);
    let _ = fs.read_link(path);
    let Ok(file) = fs.open_file(path) else { return };
    let mut buf = vec![0; MOST_BYTES.min(block::num::to_usize(file.size()))];
    let _ = file.read_at(&mut buf, 0);
    let _ = file.read_at(&mut buf, file.size() / 2);
    let len = buf.len().min(100);
    let _ = file.read_at(&mut buf[..len], file.size().saturating_sub(50));
}

/// A variable store of a UEFI machine.
pub fn guest_nvram(bytes: &[u8]) {
    let _ = boot::nvram::volume_len(bytes);
    let Ok(entries) = boot::nvram::boot_entries(bytes) else { return };
    assert!(entries.len() <= bytes.len(), "more entries than bytes");
    for entry in entries {
        assert!(entry.to_string().len() <= 64 + 4 * bytes.len());
    }
}

/// A script of GRUB.
pub fn grub_cfg(bytes: &[u8]) {
    let _ = boot::grub_titles(&String::from_utf8_lossy(bytes));
}
