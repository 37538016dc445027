//! Physical volumes made by hand. The suite has volumes that LVM itself has made.

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::*;
use crate::crc;

const UUIDS: [&str; 2] = ["AAAAAA-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaa1", "BBBBBB-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbb2"];

fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let storage = Arc::new(MemStorage::from_bytes(bytes));
    Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
}

/// A physical volume of 16 extents of 4096 bytes from 64 KiB on, each filled with `fill` plus its number. The text begins
/// at `text_offset` of an area of 8 KiB at 4 KiB.
fn physical(index: usize, fill: u8, text: &str, text_offset: usize) -> Vec<u8> {
    let mut bytes = vec![0; 65536 + 16 * 4096];
    let label = &mut bytes[512..1024];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(UUIDS[index].replace('-', "").as_bytes());
    label[72..80].copy_from_slice(&65536_u64.to_le_bytes());
    label[104..112].copy_from_slice(&4096_u64.to_le_bytes());
    label[112..120].copy_from_slice(&8192_u64.to_le_bytes());
    let sum = crc::update(0xf597_a6cf, &label[20..]);
    label[16..20].copy_from_slice(&sum.to_le_bytes());
    let area = &mut bytes[4096..12288];
    for (at, byte) in text.bytes().enumerate() {
        let mut place = text_offset + at;
        if place >= 8192 {
            place = place - 8192 + 512;
        }
        area[place] = byte;
    }
    area[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
    area[20] = 1;
    area[24..32].copy_from_slice(&4096_u64.to_le_bytes());
    area[32..40].copy_from_slice(&8192_u64.to_le_bytes());
    area[40..48].copy_from_slice(&(text_offset as u64).to_le_bytes());
    area[48..56].copy_from_slice(&(text.len() as u64).to_le_bytes());
    area[56..60].copy_from_slice(&crc::update(0xf597_a6cf, text.as_bytes()).to_le_bytes());
    let sum = crc::update(0xf597_a6cf, &area[4..512]);
    area[..4].copy_from_slice(&sum.to_le_bytes());
    for (number, extent) in (fill..).zip(bytes[65536..].chunks_mut(4096)) {
        extent.fill(number);
    }
    bytes
}

fn text(sequence: u32, volumes: &str) -> String {
    let members: Vec<_> = UUIDS
        .iter()
        .enumerate()
        .map(|(index, uuid)| format!("pv{index} {{\nid = \"{uuid}\"\npe_start = 128\npe_count = 16\n}}"))
        .collect();
    format!(
        "vg-0 {{\nid = \"group\"\nseqno = {sequence}\nextent_size = 8\nphysical_volumes {{\n{}\n}}\n\
         logical_volumes {{\n{volumes}\n}}\n}}\ncontents = \"Text Format Volume Group\"\n",
        members.join("\n")
    )
}

const VOLUMES: &str = r#"
linear { id = "l" status = ["READ", "VISIBLE"]
  segment2 { start_extent = 2 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv1", 15] }
  segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 3] }
}
striped { id = "s" status = ["VISIBLE"]
  segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 2 stripe_size = 4 stripes = ["pv0", 0, "pv1", 0] }
}
thin { status = ["VISIBLE"]
  segment1 { start_extent = 0 extent_count = 4 type = "thin" thin_pool = "pool" }
}
outside { status = ["VISIBLE"]
  segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 15] }
}
gap { status = []
  segment1 { start_extent = 1 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 0] }
}"#;

fn group(devices: &[Vec<u8>]) -> Group {
    let devices: Vec<_> = devices.iter().cloned().map(disk).collect();
    let mut found = scan(&devices).unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
    found.groups.pop().unwrap()
}

fn content(group: &Group, name: &str) -> Result<Vec<u8>> {
    let volume = group.volumes.iter().find(|volume| volume.name == name).unwrap();
    let device = volume.device()?;
    let mut bytes = vec![0; block::num::to_usize(device.size())];
    device.read_at(&mut bytes, 0)?;
    // The same by pieces.
    for (offset, piece) in (0..).step_by(1000).zip(bytes.chunks(1000)) {
        let mut again = vec![0; piece.len()];
        device.read_at(&mut again, offset)?;
        assert_eq!(again, piece);
    }
    Ok(bytes)
}

#[test]
fn linear_and_striped_volumes() {
    // One text is older, the other wraps at the end of its area.
    let group = group(&[physical(0, 1, &text(4, VOLUMES), 8192 - 100), physical(1, 101, &text(3, ""), 512)]);
    assert_eq!((group.name.as_str(), group.extent_bytes, group.missing.len()), ("vg-0", 4096, 0));
    let linear = content(&group, "linear").unwrap();
    let heads: Vec<_> = linear.chunks(4096).map(|extent| extent[0]).collect();
    assert_eq!(heads, [4, 5, 116]);
    let striped = content(&group, "striped").unwrap();
    let heads: Vec<_> = striped.chunks(2048).map(|stripe| stripe[0]).collect();
    assert_eq!(heads, [1, 101, 1, 101, 2, 102, 2, 102]);
    let error = content(&group, "thin").unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Unsupported);
    assert!(error.to_string().contains("type 'thin'"), "{error}");
    for broken in ["outside", "gap"] {
        assert_eq!(content(&group, broken).unwrap_err().kind(), block::ErrorKind::Invalid, "{broken}");
    }
}

#[test]
fn a_missing_disk_is_told() {
    let group = group(&[physical(0, 1, &text(4, VOLUMES), 512)]);
    assert_eq!(group.missing, [UUIDS[1]]);
    assert_eq!(content(&group, "striped").unwrap_err().kind(), block::ErrorKind::NotFound);
}

#[test]
fn damage_is_told_and_nothing_else_happens() {
    let good = physical(0, 1, &text(4, VOLUMES), 512);
    for at in [512 + 40, 4096 + 45, 4096 + 700] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let found = scan(&[disk(bad)]).unwrap();
        assert!(found.groups.is_empty() && found.problems.len() == 1, "{at}: {found:?}");
    }
}

#[test]
fn names_of_device_mapper() {
    assert_eq!(mapper_name("vg-0", "root-b"), "vg--0-root--b");
}

#[test]
fn extents_that_no_volume_has() {
    let plain = r#"
linear { id = "l" status = ["VISIBLE"]
  segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 3] }
}
hidden { id = "h" status = []
  segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 2 stripe_size = 4 stripes = ["pv0", 0, "pv1", 14] }
}"#;
    let disks = [physical(0, 1, &text(4, plain), 512), physical(1, 101, &text(3, ""), 512)];
    let group = group(&disks);
    let ranges: Vec<Range<u64>> = group.unallocated().into_iter().map(|(_, range)| range).collect();
    let extents = |first: u64, end: u64| 65536 + first * 4096..65536 + end * 4096;
    assert_eq!(ranges, [extents(2, 3), extents(5, 16), extents(0, 14)]);
    let places = group.volumes[1].places(2048..6144);
    let places: Vec<Range<u64>> = places.into_iter().map(|(_, range)| range).collect();
    let at = |extent: u64, offset: u64| 65536 + extent * 4096 + offset;
    assert_eq!(places, [at(14, 0)..at(14, 2048), at(0, 2048)..at(0, 4096)]);
}

/// Of a group that is not understood as a whole, everything is in use.
#[test]
fn a_volume_of_another_type_keeps_all_extents() {
    let group = group(&[physical(0, 1, &text(4, VOLUMES), 512), physical(1, 101, &text(3, ""), 512)]);
    assert!(group.unallocated().is_empty());
}
