//! Snapshot tables of the real qemu-img, tables of our own, and damaged ones.

use std::process::Command;

use block::ErrorKind;
use block::mem::MemStorage;
use proptest::prelude::*;

use super::*;
use crate::create::{CreateOptions, create};

fn snapshot(id: &str, name: &str) -> Snapshot {
    Snapshot {
        id: id.into(),
        name: name.into(),
        date_sec: 1_700_000_000,
        vm_state_size: 1 << 33,
        disk_size: Some(1 << 20),
        extra_len: 24,
        ..Snapshot::default()
    }
}

/// An image whose snapshot table is `table`.
fn with_table(table: &[u8], count: u32) -> (MemStorage, Header) {
    let storage = MemStorage::new();
    create(&storage, &CreateOptions::new(1 << 20)).unwrap();
    storage.write_at(table, 0x40000).unwrap();
    let mut header = Header::read(&storage).unwrap();
    (header.nb_snapshots, header.snapshots_offset) = (count, 0x40000);
    (storage, header)
}

#[test]
fn a_table_survives_being_written() {
    let mut all = vec![snapshot("1", "first"), snapshot("2", "first"), snapshot("", "")];
    all[1].unknown_extra = b"something new".to_vec();
    all[1].extra_len = 37;
    all[1].icount = Some(7);
    let table = encode_table(&all, 0).unwrap();
    let (storage, header) = with_table(&table, 3);
    assert_eq!(read_table(&storage, &header).unwrap(), all);
}

#[test]
fn an_old_entry_gets_what_it_does_not_say() {
    let old = Snapshot { disk_size: None, ..snapshot("1", "old") };
    assert_eq!(old.info(42).disk_size, 42);
    let table = encode_table(&[old], 42).unwrap();
    let (storage, header) = with_table(&table, 1);
    let read = read_table(&storage, &header).unwrap();
    assert_eq!((read[0].disk_size, read[0].vm_state_size), (Some(42), 1 << 33));
}

#[test]
fn limits_are_kept() {
    let mut table = encode_table(&[snapshot("1", "a")], 0).unwrap();
    table[36..40].copy_from_slice(&1025u32.to_be_bytes());
    table.resize(2000, 0);
    let (storage, header) = with_table(&table, 1);
    let error = read_table(&storage, &header).unwrap_err();
    assert_eq!(error.message(), "Too much extra metadata in snapshot table entry 0");
    assert_eq!(error.hints().len(), 1);
    table[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    let (storage, header) = with_table(&table, 1);
    assert_eq!(read_table(&storage, &header).unwrap_err().message(), error.message());
    let huge = Snapshot { name: vec![b'n'; 65_535], ..snapshot("1", "") };
    assert_eq!(encode_table(&vec![huge; 1100], 0), Err(Error::SnapshotTableTooBig));
    assert_eq!(encode_table(&vec![snapshot("", ""); 65_537], 0), Err(Error::TooManySnapshots(65_537)));
}

/// QEMU shows a snapshot made of garbage, or of zeros.
#[test]
fn a_table_that_cannot_be_is_refused() {
    let table = encode_table(&[snapshot("1", "a")], 0).unwrap();
    let (storage, header) = with_table(&table, 2);
    assert_eq!(read_table(&storage, &header).unwrap_err().kind(), ErrorKind::Truncated);
    let outside = Snapshot { l1_offset: 1 << 40, l1_size: 1, ..snapshot("1", "a") };
    let (storage, header) = with_table(&encode_table(&[outside], 0).unwrap(), 1);
    assert_eq!(read_table(&storage, &header).unwrap_err().kind(), ErrorKind::Truncated);
    for (l1_offset, l1_size, text) in
        [(1, 1, "Snapshot L1 table offset invalid"), (0, u32::MAX, "Snapshot L1 table too large")]
    {
        let wrong = Snapshot { l1_offset, l1_size, ..snapshot("1", "a") };
        let (storage, header) = with_table(&encode_table(&[wrong], 0).unwrap(), 1);
        assert_eq!(read_table(&storage, &header).unwrap_err().message(), text);
    }
}

#[test]
fn tables_of_qemu_are_encoded_as_they_were_found() {
    let dir = tempfile::tempdir().unwrap();
    let qemu_img =
        |arguments: &[&str]| Command::new("qemu-img").current_dir(dir.path()).args(arguments).output();
    let Ok(_) = qemu_img(&["create", "-f", "qcow2", "i.qcow2", "64M"]) else {
        eprintln!("SKIPPED: no qemu-img to compare with");
        return;
    };
    for name in ["one", "two", "two"] {
        assert!(qemu_img(&["snapshot", "-c", name, "i.qcow2"]).unwrap().status.success());
    }
    let bytes = std::fs::read(dir.path().join("i.qcow2")).unwrap();
    let storage = MemStorage::from_bytes(bytes.clone());
    let header = Header::read(&storage).unwrap();
    let table = read_table(&storage, &header).unwrap();
    let shown: Vec<_> =
        table.iter().map(|s| s.info(0)).map(|info| (info.id, info.name, info.icount)).collect();
    let expected = [("1", "one"), ("2", "two"), ("3", "two")];
    assert_eq!(shown, expected.map(|(id, name)| (id.to_owned(), name.to_owned(), Some(0))));
    let encoded = encode_table(&table, header.size).unwrap();
    assert_eq!(encoded, bytes[to_usize(header.snapshots_offset)..][..encoded.len()]);
}

proptest! {
    #[test]
    fn no_table_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), count in 0u32..5, short in any::<bool>()) {
        let mut bytes = bytes;
        // Lengths that are not mostly impossible.
        if short {
            for at in [12, 14, 36, 38] {
                if let Some(byte) = bytes.get_mut(at) { *byte = 0; }
            }
        }
        let (storage, header) = with_table(&bytes, count);
        let _ = read_table(&storage, &header);
    }
}

#[test]
fn ids_come_before_names() {
    let all = [snapshot("1", "2"), snapshot("2", "x"), snapshot("3", "x")];
    let find = |selector: Selector| selector.find(&all);
    assert_eq!(find(Selector::IdOrName("2".into())), Some(1));
    assert_eq!(find(Selector::IdOrName("x".into())), Some(1));
    assert_eq!(find(Selector::IdOrName("y".into())), None);
    let both = |id: Option<&str>, name: Option<&str>| Selector::Both {
        id: id.map(Into::into),
        name: name.map(Into::into),
    };
    assert_eq!(find(both(Some("3"), Some("x"))), Some(2));
    assert_eq!(find(both(Some("1"), Some("x"))), None);
    assert_eq!(find(both(None, Some("2"))), Some(0));
}
