//! VHD and VDI: formats that are a table and blocks.

use std::sync::Arc;

use block::image::{Image, Repair};
use block::testing::Random;
use block::{BlockDevice, Result, Storage};

use super::Bounded;

/// Extents that are looked at.
const MAX_EXTENTS: usize = 2000;

/// Walks over what a disk says of itself, and reads some of it.
fn look_at(image: &dyn Image) {
    let (mut at, mut buf) = (0, vec![0; 70_000]);
    for _ in 0..MAX_EXTENTS {
        if at >= image.size() {
            break;
        }
        let Ok(found) = image.layer_extent(at, u64::MAX) else { break };
        assert!(found.len >= 1 && found.len <= image.size() - at, "{found:?} at {at}");
        let len = found.len.min(buf.len() as u64);
        let part = &mut buf[..usize::try_from(len).unwrap()];
        // What cannot be read is an error; zeros that were promised are zeros.
        if image.read_at(part, at).is_ok() && found.reads_zero {
            assert!(part.iter().all(|byte| *byte == 0), "{found:?} at {at}");
        }
        at += found.len;
    }
    drop(image.info());
}

/// Writes here and there; what was written last is what is read, and everything else stays as it was.
fn write_to(image: &dyn Image, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    for turn in 0..8u8 {
        let len = (1 + random.below(5000)).min(image.size());
        let offset = random.below(image.size() - len + 1);
        let bytes = vec![turn + 1; usize::try_from(len).unwrap()];
        image.write_at(&bytes, offset)?;
        let mut read = vec![0; bytes.len()];
        image.read_at(&mut read, offset)?;
        assert!(read == bytes, "{len} bytes at {offset}");
    }
    image.close()
}

fn seed_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

/// A VHD: opened, described, read, checked, written to, and checked again.
pub fn vhd_image(bytes: &[u8]) {
    let storage: Arc<dyn Storage> = Arc::new(Bounded::new(bytes.to_vec()));
    let probed = vhd::Container::probe(bytes, &*storage).unwrap();
    for rule in [vhd::SizeRule::Creator, vhd::SizeRule::Geometry, vhd::SizeRule::CurrentSize] {
        let Ok(container) = vhd::Container::read(&storage, rule) else { continue };
        assert!(probed || container.footer().disk_type == vhd::DiskType::Fixed);
        drop((container.warnings(), container.parent_names().len()));
        vhd::check::check(&container, Repair::None).unwrap();
        if let Ok(image) = vhd::Vhd::open(&container, vhd::OpenOptions::default()) {
            look_at(&image);
        }
    }
    let Ok(container) = vhd::Container::read(&storage, vhd::SizeRule::Creator) else { return };
    let options = vhd::OpenOptions { writable: true, ..vhd::OpenOptions::default() };
    let Ok(image) = vhd::Vhd::open(&container, options) else { return };
    if image.size() == 0 || write_to(&image, seed_of(bytes)).is_err() {
        return;
    }
    drop(image);
    let container = vhd::Container::read(&storage, vhd::SizeRule::Creator).unwrap();
    let report = vhd::check::check(&container, Repair::None).unwrap();
    // A copy of the footer that was damaged before is not our business.
    assert!(report.messages.iter().all(|line| line.contains("footer")), "{:?}", report.messages);
}

/// A VDI: opened, described, read, checked, repaired, written to, and checked again.
pub fn vdi_image(bytes: &[u8]) {
    let storage: Arc<dyn Storage> = Arc::new(Bounded::new(bytes.to_vec()));
    let Ok(header) = vdi::Header::read(&*storage) else { return };
    vdi::check::check(&storage, &header, Repair::None).unwrap();
    if let Ok(image) = vdi::Vdi::open(Arc::clone(&storage), header.clone(), vdi::OpenOptions::default()) {
        look_at(&image);
    }
    let options = vdi::OpenOptions { writable: true, ..vdi::OpenOptions::default() };
    let Ok(image) = vdi::Vdi::open(Arc::clone(&storage), header.clone(), options) else { return };
    if image.size() == 0 || write_to(&image, seed_of(bytes)).is_err() {
        return;
    }
    drop(image);
    let header = vdi::Header::read(&*storage).unwrap();
    let report = vdi::check::check(&storage, &header, Repair::All).unwrap();
    // Numbers that were left out stay left out.
    let only_left_out =
        report.messages.iter().all(|line| line.contains("mismatch") || line.contains("too large"));
    assert!(only_left_out, "{:?}", report.messages);
}

/// Good images of both formats, to start from.
pub fn block_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![];
    for (size, block_size) in [(40_000u64, 4096u32), (3 << 20, 2 << 20)] {
        for disk_type in [vhd::DiskType::Dynamic, vhd::DiskType::Differencing] {
            let footer = vhd::Footer::new(size / 512 * 512, vhd::Geometry::MAX, disk_type).unwrap().encode();
            let entries = u32::try_from(size.div_ceil(u64::from(block_size))).unwrap();
            let header = vhd::DynamicHeader::new(1536, entries, block_size);
            let table = vec![0xff; usize::try_from(header.table_bytes()).unwrap()];
            seeds.push([footer.clone(), header.encode(), table, footer].concat());
        }
        let blocks = u32::try_from(size.div_ceil(u64::from(block_size))).unwrap();
        let header = vdi::Header {
            image_type: vdi::ImageType::Dynamic,
            map_offset: 512,
            data_offset: 1024,
            disk_size: size / 512 * 512,
            block_size,
            blocks,
            allocated: 0,
            uuid: vdi::Uuid([1; 16]),
            modified: vdi::Uuid([2; 16]),
            parent: vdi::Uuid::default(),
            parent_modified: vdi::Uuid::default(),
        };
        seeds.push([header.encode(), vec![0xff; 512], vec![7; 4096]].concat());
    }
    seeds
}

/// The same with a few bytes changed and the sums put right, so that more than the sums is tested.
pub fn mutated(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    if random.once_in(4) {
        bytes.truncate(usize::try_from(random.below(bytes.len() as u64 + 1)).unwrap());
    }
    for _ in 0..random.below(4) {
        let value = [0, 1, 0x7f, 0x80, 0xff][usize::try_from(random.below(5)).unwrap()];
        let at = usize::try_from(random.below(bytes.len() as u64 + 1)).unwrap();
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
    }
    // Places in the tables that are likely to mean something.
    for start in [1536, 512] {
        let at = start + 4 * usize::try_from(random.below(10)).unwrap();
        if let Some(word) = bytes.get_mut(at..at + 4).filter(|_| random.once_in(2)) {
            let number = u32::try_from(random.below(24)).unwrap();
            word.copy_from_slice(&if start == 512 { number.to_le_bytes() } else { number.to_be_bytes() });
        }
    }
    let end = bytes.len().saturating_sub(512);
    for (at, len, sum_at) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let Some(record) = bytes.get_mut(at..at + len).filter(|record| record.starts_with(b"c")) else {
            continue;
        };
        record[sum_at..sum_at + 4].fill(0);
        let sum = !record.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        record[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}
