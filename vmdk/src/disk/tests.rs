use block::ErrorKind;
use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::*;

/// A disk of a descriptor with these lines, over these files.
fn open(lines: &str, files: &[&Arc<MemStorage>], writable: bool) -> Result<(Arc<MemStorage>, Arc<Vmdk>)> {
    let text = format!("version=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n{lines}");
    open_text(&text, files, OpenOptions { writable, ..OpenOptions::default() })
}

fn open_text(
    text: &str,
    files: &[&Arc<MemStorage>],
    mut options: OpenOptions,
) -> Result<(Arc<MemStorage>, Arc<Vmdk>)> {
    let memory = Arc::new(MemStorage::from_bytes(text.as_bytes().to_vec()));
    let storage: Arc<dyn Storage> = Arc::clone(&memory) as _;
    let layout = Layout::read(&storage)?;
    options.files = files.iter().map(|file| Arc::clone(*file) as Arc<dyn Storage>).collect();
    Ok((memory, Vmdk::open(storage, layout, options)?))
}

fn memory(byte: u8, sectors: usize) -> Arc<MemStorage> {
    Arc::new(MemStorage::from_bytes(vec![byte; sectors * 512]))
}

const MIXED: &str =
    "RW 2 FLAT \"a\" 1\nRW 3 ZERO\nRDONLY 1 FLAT \"b\" 0\nNOACCESS 2 FLAT \"c\" 0\nRW 1 VMFS \"d\"";

#[test]
fn every_extent_keeps_its_place_whatever_may_be_done_with_it() {
    let (a, b, d) = (memory(1, 3), memory(2, 1), memory(4, 1));
    let (_, disk) = open(MIXED, &[&a, &b, &d], false).unwrap();
    assert_eq!(disk.size(), 9 * 512);
    let mut bytes = vec![9; 9 * 512];
    disk.read_at(&mut bytes, 0).unwrap();
    let sectors: Vec<u8> = bytes.as_chunks::<512>().0.iter().map(|sector| sector[0]).collect();
    assert_eq!(sectors, [1, 1, 0, 0, 0, 2, 0, 0, 4]);
    assert!(bytes.as_chunks::<512>().0.iter().all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    assert_eq!(disk.layout.warnings().len(), 1);
    assert_eq!(
        disk.layout.files().iter().map(|f| (&*f.name, f.writable)).collect::<Vec<_>>(),
        [("a", true), ("b", false), ("d", true)]
    );
}

#[test]
fn writes_cross_extents_and_stop_at_those_that_may_not_be_written() {
    let (a, b, d) = (memory(1, 3), memory(2, 1), memory(4, 1));
    let (_, disk) = open(MIXED, &[&a, &b, &d], true).unwrap();
    disk.write_at(&[7; 600], 100).unwrap();
    assert_eq!(a.to_bytes()[512 + 100..512 + 700], [7; 600]);
    disk.write_at(&[5; 512], 8 * 512).unwrap();
    assert_eq!(d.to_bytes(), [5; 512]);
    disk.write_zeroes_at(2 * 512, 3 * 512, ZeroMode::UNMAP).unwrap();
    assert_eq!(disk.write_at(&[1; 512], 3 * 512).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.write_at(&[1; 512], 5 * 512).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(b.to_bytes(), [2; 512]);
}

#[test]
fn the_content_id_changes_once_and_before_the_first_write() {
    let a = memory(0, 8);
    let (descriptor, disk) = open("RW 8 FLAT \"a\" 0", &[&a], true).unwrap();
    let before = descriptor.to_bytes();
    disk.flush().unwrap();
    assert_eq!(descriptor.to_bytes(), before);
    disk.write_at(&[1], 0).unwrap();
    let cid = disk.cid().unwrap();
    assert_ne!(cid, 0x1234_5678);
    disk.write_at(&[1], 0).unwrap();
    assert_eq!(disk.cid(), Some(cid));
    let expected = String::from_utf8(before).unwrap().replace("12345678", &format!("{cid:08x}"));
    assert_eq!(String::from_utf8(descriptor.to_bytes()).unwrap(), expected);
}

/// As qemu-img writes it if the first digit is a zero.
#[test]
fn a_short_content_id_is_replaced_by_one_as_short() {
    let text = "version=1\nCID=136d649\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 8 FLAT \"a\" 0\n";
    let a = memory(0, 8);
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let (descriptor, disk) = open_text(text, &[&a], options).unwrap();
    disk.write_at(&[1], 0).unwrap();
    assert_eq!(descriptor.to_bytes().len(), text.len());
    let layout = Layout::read(&(descriptor as Arc<dyn Storage>)).unwrap();
    assert_eq!(layout.descriptor().map(|descriptor| descriptor.cid()), disk.cid());
    assert_ne!(disk.cid(), Some(0x0136_d649));
}

#[test]
fn a_parent_with_another_content_id_is_refused_and_named() {
    let text = "version=1\nCID=1\nparentCID=aabbccdd\nparentFileNameHint=\"p.vmdk\"\ncreateType=\"custom\"\nRW 1 ZERO";
    let device: Arc<dyn BlockDevice> = Arc::new(Raw::open(memory(3, 1), RawOptions::default()).unwrap());
    let parent = |cid| Parent { device: Arc::clone(&device), cid, name: "p.vmdk".to_owned() };
    let with =
        |cid| open_text(text, &[], OpenOptions { parent: Some(parent(cid)), ..OpenOptions::default() });
    let error = with(Some(0x1111_1111)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("aabbccdd") && text.contains("'p.vmdk' has content ID 11111111"), "{text}");
    assert!(with(None).unwrap_err().to_string().contains("is not a VMDK image"));
    let (_, disk) = with(Some(0xaabb_ccdd)).unwrap();
    assert_eq!(disk.layout.parent().unwrap(), Some("p.vmdk"));
    assert!(disk.backing().is_some());
}

#[test]
fn a_flat_extent_that_is_larger_than_its_file_is_refused() {
    let a = memory(1, 3);
    let error = open("RW 3 FLAT \"a\" 1", &[&a], false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated);
    assert!(error.to_string().contains("0x800"), "{error}");
}

#[test]
fn a_disk_without_extents_or_on_raw_devices_is_refused() {
    assert_eq!(open("", &[], false).unwrap_err().kind(), ErrorKind::Invalid);
    open("RDONLY 5 ZERO", &[], false).unwrap();
    let error = open("RW 5 VMFSRDM \"x\"", &[], false).unwrap_err();
    assert_eq!(error.to_string(), "Unsupported image type 'VMFSRDM'");
    let text = "version=1\nCID=1\ncreateType=\"fullDevice\"\nRW 5 FLAT \"/dev/sda\" 0";
    let error = open_text(text, &[], OpenOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.hints().len()), (ErrorKind::Unsupported, 1));
}

#[test]
fn an_overlong_descriptor_is_refused_unread() {
    let text = format!("version=1\nCID=1\ncreateType=\"custom\"\nRW 1 ZERO\n{}", "#\n".repeat(600_000));
    assert_eq!(open_text(&text, &[], OpenOptions::default()).unwrap_err().kind(), ErrorKind::Invalid);
}
