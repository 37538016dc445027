//! Repairing damage of every kind: what can be made right is, the real qemu-img agrees, the guest's data stays what
//! it was, and a crash at any moment leaves the image as it was or better.

use block::BlockDevice as _;
use block::mem::MemStorage;
use block::num::to_usize;
use block::testing::{CrashStorage, Fault, FaultStorage, Random};
use nix::errno::Errno;

use super::tests::*;
use super::*;
use crate::create::CreateOptions;
use crate::device::{OpenOptions, Qcow2};
use crate::features::incompatible;
use crate::geometry::Geometry;
use crate::l2;
use crate::snapshot::{Snapshot, encode_table};

/// Every cluster of the disk, as far as it can be read.
fn readable(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let storage = storage(bytes);
    let image =
        Header::read(&*storage).and_then(|header| Qcow2::open(storage, header, OpenOptions::default()));
    let Ok(image) = image else { return vec![] };
    let cluster = image.geometry().cluster_size();
    let mut contents = vec![];
    for offset in (0..image.size().min(256 * cluster)).step_by(to_usize(cluster)) {
        let mut buf = vec![0; to_usize(cluster.min(image.size() - offset))];
        contents.push(image.read_at(&mut buf, offset).is_ok().then_some(buf));
    }
    contents
}

/// What could be read before can be read after, and is the same.
fn assert_not_less(before: &[Option<Vec<u8>>], bytes: &[u8], story: &str) {
    let after = readable(bytes);
    for (index, (old, new)) in
        before.iter().zip(after.iter().map(Some).chain(std::iter::repeat(None))).enumerate()
    {
        if let Some(old) = old {
            let new = new.and_then(Option::as_ref);
            assert!(new == Some(old), "{story}: cluster {index} was readable, and is another now");
        }
    }
}

/// Repairs a copy. Whatever the damage: the report is true, data that could be read stays, an error changes nothing.
/// Returns the image and the report, if there is one.
fn repaired(bytes: &[u8], repair: Repair) -> Option<(Vec<u8>, CheckReport)> {
    let memory = Arc::new(MemStorage::from_bytes(bytes.to_vec()));
    let storage: Arc<dyn Storage> = memory.clone();
    let before = readable(bytes);
    let result = check_with(&storage, repair);
    let image = memory.to_bytes();
    let Ok(report) = result else {
        assert!(image == bytes, "an error, and yet the image is another: {result:?}");
        return None;
    };
    assert_not_less(&before, &image, "repaired");
    let again = ours(&image);
    assert_eq!(again.is_clean(), report.is_clean(), "{:?} after {:?}", again.messages, report.messages);
    let first = ours(bytes);
    assert!(
        harm(&image) <= harm(bytes),
        "{repair:?}: {:?} after {:?} and {:?}",
        again.messages,
        first.messages,
        report.messages
    );
    Some((image, report))
}

/// A repair of everything that succeeds; the real qemu-img finds the image clean.
fn all_right(bytes: &[u8]) -> Vec<u8> {
    let (image, report) = repaired(bytes, Repair::All).expect("a repair");
    assert!(report.is_clean(), "{report:?}");
    let judge = Image { dir: tempfile::tempdir().unwrap() };
    if let Some(theirs) = judge.theirs(&image) {
        assert!(theirs.is_clean(), "{theirs:?} after {:?}", report.messages);
    }
    survives_crashes(bytes);
    image
}

/// Whatever a power cut leaves can be read as before, is not worse, and can be repaired.
fn survives_crashes(bytes: &[u8]) {
    let before = readable(bytes);
    let damage = harm(bytes);
    let crash = Arc::new(CrashStorage::new(bytes.to_vec()));
    let storage: Arc<dyn Storage> = crash.clone();
    check_with(&storage, Repair::All).unwrap();
    for image in crash.images(150, 3) {
        let left = image.storage.to_bytes();
        assert_not_less(&before, &left, &image.description);
        assert!(harm(&left) <= damage, "{}: {:?}", image.description, lines(&left));
        let (_, report) = repaired(&left, Repair::All).expect("a repair after a crash");
        assert!(report.is_clean(), "{}: {:?}", image.description, report.messages);
    }
}

/// Where the refcount table's entries are in the sample.
const TABLE: u64 = 0x1000;

fn entry(word: u64) -> [u8; 8] {
    word.to_be_bytes()
}

#[test]
fn damaged_refcount_structures_are_made_anew() {
    let damages: [&[(u64, &[u8])]; 12] = [
        &[(TABLE, &entry(0x2001))],
        &[(TABLE, &entry(0x2200))],
        &[(TABLE, &entry(0))],
        &[(TABLE, &entry(0x1000))],
        &[(TABLE, &entry(0x3000))],
        &[(TABLE, &entry(0x40_0000))],
        &[(TABLE + 8, &entry(0x2000))],
        &[(TABLE + 8, &entry(0x40_0000)), (REFCOUNTS + 10, &[0, 9])],
        &[(56, &[0, 0, 0, 0])],
        &[(48, &entry(0))],
        &[(48, &entry(0x40_0000))],
        &[(L2, &entry(COPIED | 0x2000)), (L2 + 8, &entry(0x1000))],
    ];
    for damage in damages {
        let image = all_right(&damaged_sample(damage));
        let header = Header::read(&*storage(&image)).unwrap();
        assert!(header.refcount_table_offset != 0x1000 || damage[0].0 == TABLE, "{damage:x?}");
    }
}

/// The old structure stays as it is: only the switch in the header makes the new one count.
#[test]
fn the_old_structure_is_not_touched() {
    let bytes = damaged_sample(&[(TABLE + 8, &entry(0x2000))]);
    let image = all_right(&bytes);
    assert!(image[0x1000..0x3000] == bytes[0x1000..0x3000]);
    assert_ne!(word(&image, 48), 0x1000);
}

#[test]
fn refcounts_of_every_width_are_made_anew() {
    for order in 0..=6 {
        let options =
            CreateOptions { cluster_bits: 9, refcount_order: order, ..CreateOptions::new(32 << 10) };
        let mut bytes = sample_with(16, &options);
        let table = Header::read(&*storage(&bytes)).unwrap().refcount_table_offset;
        poke(&mut bytes, table, &entry(0));
        all_right(&bytes);
    }
}

/// Two guest clusters in one host cluster need a refcount of 2, which one bit cannot say.
#[test]
fn refcounts_that_do_not_fit_are_an_error() {
    let options = CreateOptions { cluster_bits: 12, refcount_order: 0, ..CreateOptions::new(1 << 20) };
    let mut bytes = sample_with(8, &options);
    poke(&mut bytes, L2 + 8, &entry(0x5000));
    for damage in [(L2, entry(0x5000)), (TABLE, entry(0))] {
        poke(&mut bytes, damage.0, &damage.1);
        assert!(repaired(&bytes, Repair::All).is_none());
        let error = check_with(&storage(&bytes), Repair::All).unwrap_err();
        assert!(error.to_string().contains("overflow cluster offset=0x5000"), "{error}");
    }
}

#[test]
fn data_on_metadata_moves_and_reads_as_before_in_qemu() {
    // The L1 table, the L2 table itself, the header's neighbour; two entries in one cluster.
    for target in [L1, L2] {
        let bytes = damaged_sample(&[(L2 + 64, &entry(target)), (L2 + 72, &entry(COPIED | target))]);
        let (image, report) = repaired(&bytes, Repair::All).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let moved = word(&image, L2 + 64) & l2::OFFSET_MASK;
        assert!(moved > L2 && moved == word(&image, L2 + 72) & l2::OFFSET_MASK);
        assert_eq!(word(&image, L2 + 64) & COPIED, 0, "two entries share it");
        assert_eq!(word(&image, moved + 8) & l2::OFFSET_MASK, word(&bytes, target + 8) & l2::OFFSET_MASK);
        all_right(&bytes);
    }
}

/// LUKS numbers sectors by their place in the file: what moves is noise.
#[test]
fn encrypted_data_on_metadata_stays_where_it_can_be_decrypted() {
    let memory = Arc::new(MemStorage::from_bytes(sample(8)));
    let storage: Arc<dyn Storage> = memory.clone();
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let image = Qcow2::open(storage.clone(), Header::read(&*storage).unwrap(), options).unwrap();
    image.add_luks_header(b"not looked at here", 5000).unwrap();
    image.close().unwrap();
    drop(image);
    memory.write_at(&entry(L1), L2 + 64).unwrap();
    let (image, report) = repaired(&memory.to_bytes(), Repair::All).unwrap();
    assert_eq!(word(&image, L2 + 64), L1, "{report:?}");
    assert!(report.corruptions > 0, "{report:?}");
}

#[test]
fn zero_clusters_lose_an_impossible_place() {
    let image = all_right(&damaged_sample(&[(L2, &entry(COPIED | 0x5200 | 1))]));
    assert_eq!(word(&image, L2), 1);
}

/// Entries that lead nowhere are left as they are, and nothing that they may have meant is given away.
#[test]
fn what_cannot_be_followed_keeps_its_leaks() {
    let damages: [&[(u64, &[u8])]; 3] = [
        &[(L1, &entry(COPIED | 0x4200))],
        &[(L1, &entry(COPIED | 0x400_0000))],
        &[(L1, &entry(COPIED | 0x400_0000)), (TABLE + 8, &entry(0x2000))],
    ];
    for damage in damages {
        let bytes = damaged_sample(damage);
        let (image, report) = repaired(&bytes, Repair::All).unwrap();
        assert!(report.corruptions > 0 && report.leaks >= 7, "{report:?}");
        let (again, _) = repaired(&image, Repair::All).unwrap();
        let mut fixed = again.clone();
        poke(&mut fixed, L1, &entry(COPIED | L2));
        let left = ours(&fixed);
        assert!(left.corruptions == 0, "{:?}", left.messages);
        repaired(&bytes, Repair::Leaks);
    }
}

/// An image with snapshots whose table is `table` bytes at cluster 13, with the disk's own L1 table as theirs.
fn with_snapshots(count: u32, table: &[u8]) -> Vec<u8> {
    let mut bytes = sample(8);
    bytes.resize(0xf000 + table.len().next_multiple_of(0x1000), 0);
    let l1 = bytes[0x3000..0x4000].to_vec();
    poke(&mut bytes, 0xe000, &l1);
    poke(&mut bytes, 0xf000, table);
    poke(&mut bytes, 60, &count.to_be_bytes());
    poke(&mut bytes, 64, &entry(0xf000));
    let memory = storage(&bytes);
    let _ = check_with(&memory, Repair::All);
    let mut sound = vec![0; to_usize(memory.len().unwrap())];
    memory.read_at(&mut sound, 0).unwrap();
    sound
}

fn snapshot(id: u8) -> Snapshot {
    let l1_size = Header::read(&*storage(&sample(8))).unwrap().l1_size;
    Snapshot { l1_offset: 0xe000, l1_size, id: vec![id], name: b"name".to_vec(), ..Snapshot::default() }
}

/// An entry with `extra` bytes of extra data.
fn raw_entry(extra: u32) -> Vec<u8> {
    let whole = encode_table(&[snapshot(b'1')], 1 << 20).unwrap();
    let mut raw = whole[..36].to_vec();
    raw.extend(extra.to_be_bytes());
    let mut data = whole[40..64].to_vec();
    data.resize(to_usize(extra.into()), 0xee);
    raw.extend(data);
    raw.extend(&whole[64..]);
    raw
}

#[test]
fn snapshot_entries_are_completed_or_cut() {
    for extra in [0, 8, 1032, 5000, 200_000] {
        let mut bytes = with_snapshots(1, &raw_entry(24));
        assert!(ours(&bytes).is_clean(), "{:?}", ours(&bytes));
        let table = raw_entry(extra);
        let clusters = table.len().div_ceil(0x1000) as u64;
        bytes.resize(0xf000 + 0x1000 * to_usize(clusters), 0);
        poke(&mut bytes, 0xf000, &table);
        for cluster in 15..15 + clusters {
            poke(&mut bytes, REFCOUNTS + 2 * cluster, &[0, 1]);
        }
        let image = all_right(&bytes);
        let header = Header::read(&*storage(&image)).unwrap();
        let snapshots = crate::snapshot::read_table(&*storage(&image), &header).unwrap();
        assert_eq!(snapshots.len(), 1);
        assert_eq!((&snapshots[0].id, &snapshots[0].name), (&vec![b'1'], &b"name".to_vec()));
        assert_eq!(snapshots[0].extra_len, extra.clamp(24, 1024));
        assert_eq!(snapshots[0].l1_offset, 0xe000);
    }
}

#[test]
fn snapshots_past_the_end_of_the_file_are_dropped_and_their_clusters_kept() {
    let mut bytes = with_snapshots(1, &raw_entry(24));
    poke(&mut bytes, 64, &entry(0x100_0000));
    let (image, report) = repaired(&bytes, Repair::All).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{report:?}");
    assert!(report.leaks > 0);
    assert_eq!(Header::read(&*storage(&image)).unwrap().nb_snapshots, 0);
    all_right(&image);
    survives_crashes_to_leaks(&bytes);
}

/// Nothing could open such an image for writing, and the repair left the entry where it was.
#[test]
fn a_snapshot_whose_l1_table_cannot_be_is_taken_out_and_the_others_stay() {
    type Damage = fn(&mut Snapshot, u64);
    let bad: [(&str, Damage); 6] = [
        ("unaligned", |s, _| s.l1_offset += 512),
        ("too large", |s, _| s.l1_size = u32::MAX),
        ("far outside", |s, _| s.l1_offset = 1 << 40),
        ("at the end", |s, len| s.l1_offset = len),
        ("on the header", |s, _| s.l1_offset = 0),
        ("wraps around", |s, _| s.l1_offset = u64::MAX << 12),
    ];
    for (name, change) in bad {
        let mut lost = snapshot(b'2');
        let empty = Snapshot { l1_offset: 0, l1_size: 0, ..snapshot(b'2') };
        let sound = encode_table(&[empty, snapshot(b'1')], 1 << 20).unwrap();
        let mut bytes = with_snapshots(2, &sound);
        change(&mut lost, bytes.len() as u64);
        let table = encode_table(&[lost, snapshot(b'1')], 1 << 20).unwrap();
        let place = table_place(&bytes);
        poke(&mut bytes, place, &table);
        let writable = |bytes: &[u8]| {
            let storage = storage(bytes);
            let header = Header::read(&*storage).unwrap();
            Qcow2::open(storage, header, OpenOptions { writable: true, ..OpenOptions::default() })
        };
        let error = writable(&bytes).unwrap_err();
        let told = error.hints().iter().any(|hint| hint.contains("check -r all"));
        assert!(told || name == "on the header", "{name}: {error:?}");
        let (image, report) = repaired(&bytes, Repair::All).unwrap();
        assert!(report.corruptions_fixed > 0 && report.corruptions == 0, "{name}: {report:?}");
        let kept = writable(&image).unwrap().snapshots();
        assert_eq!(kept.iter().map(|s| s.id.clone()).collect::<Vec<_>>(), [b"1"], "{name}");
        all_right(&image);
        survives_crashes_to_leaks(&bytes);
    }
}

fn table_place(bytes: &[u8]) -> u64 {
    Header::read(&*storage(bytes)).unwrap().snapshots_offset
}

fn survives_crashes_to_leaks(bytes: &[u8]) {
    let before = readable(bytes);
    let crash = Arc::new(CrashStorage::new(bytes.to_vec()));
    let storage: Arc<dyn Storage> = crash.clone();
    check_with(&storage, Repair::All).unwrap();
    for image in crash.images(100, 5) {
        let left = image.storage.to_bytes();
        assert_not_less(&before, &left, &image.description);
        assert!(harm(&left) <= harm(bytes), "{}: {:?}", image.description, lines(&left));
    }
}

/// More snapshots than an image may have: ordinary opening refuses it, the check does not.
#[test]
fn overhanging_snapshots_are_dropped() {
    let entries: Vec<Snapshot> =
        (0..65_536).map(|_| Snapshot { l1_offset: 0, ..Default::default() }).collect();
    let mut table = encode_table(&entries, 1 << 20).unwrap();
    table.extend(encode_table(&[snapshot(b'7')], 1 << 20).unwrap());
    let bytes = with_snapshots(65_536, &table);
    let mut many = bytes.clone();
    poke(&mut many, 60, &65_537u32.to_be_bytes());
    Header::read(&*storage(&many)).unwrap_err();
    let report = ours(&many);
    assert!(report.check_errors > 0 && report.messages[0].starts_with("ERROR snapshot table too large"));
    let (image, report) = repaired(&many, Repair::All).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    assert_eq!(Header::read(&*storage(&image)).unwrap().nb_snapshots, 65_536);
}

/// Whatever fails on the way: the image is not worse, and a second attempt makes it right.
#[test]
fn a_repair_that_fails_can_be_tried_again() {
    let damages: [&[(u64, &[u8])]; 4] = [
        &[(TABLE + 8, &entry(0x2000))],
        &[(L2 + 64, &entry(L1)), (L2, &entry(0x5000))],
        &[(L2, &entry(COPIED | 0x5200 | 1)), (REFCOUNTS + 12, &[0, 0])],
        &[(REFCOUNTS + 12, &[0, 7]), (REFCOUNTS + 16, &[0, 0]), (L2, &entry(0x5000))],
    ];
    for damage in damages {
        let bytes = damaged_sample(damage);
        let before = readable(&bytes);
        for n in 0.. {
            let memory = Arc::new(MemStorage::from_bytes(bytes.clone()));
            let faults = Arc::new(FaultStorage::new(memory.clone()));
            faults.fail(Fault::nth(n, Errno::EIO).on_changes().torn());
            let storage: Arc<dyn Storage> = faults.clone();
            let done = check_with(&storage, Repair::All).is_ok();
            let left = memory.to_bytes();
            assert_not_less(&before, &left, "after an error");
            assert!(harm(&left) <= harm(&bytes), "{n}: {:?}", lines(&left));
            let (_, report) = repaired(&left, Repair::All).unwrap();
            assert!(report.is_clean(), "{n}: {report:?}");
            if done {
                assert!(n > 2);
                break;
            }
        }
    }
}

#[test]
fn no_room_on_the_device_changes_nothing() {
    let bytes = damaged_sample(&[(TABLE + 8, &entry(0x2000))]);
    let memory = Arc::new(MemStorage::from_bytes(bytes.clone()));
    let faults = Arc::new(FaultStorage::new(memory.clone()));
    faults.limit_room(bytes.len() as u64);
    let storage: Arc<dyn Storage> = faults;
    check_with(&storage, Repair::All).unwrap_err();
    assert!(memory.to_bytes()[..bytes.len()] == bytes);
}

/// Damage of all metadata: bytes of the header's table fields, tables and blocks, and of snapshots.
fn maul(bytes: &mut [u8], geometry: &Geometry, random: &mut Random) {
    let clusters = geometry.clusters_for(bytes.len() as u64);
    let any = |random: &mut Random| geometry.offset_of(random.below(clusters + 2));
    let values = |random: &mut Random| match random.below(8) {
        0 => 0,
        1 => any(random) | COPIED,
        2 => any(random),
        3 => any(random) | 1,
        4 => any(random) + 512,
        5 => l2::COMPRESSED | (any(random) + random.below(2000)),
        6 => 1 << random.below(64),
        _ => random.next_u64(),
    };
    let header = Header::read_for_check(&*storage(bytes)).unwrap();
    let area = match random.below(7) {
        0 => header.l1_table_offset,
        1 => header.refcount_table_offset,
        2 => word(bytes, header.refcount_table_offset) & !0x1ff,
        3 if header.nb_snapshots > 0 => header.snapshots_offset,
        _ => word(bytes, header.l1_table_offset) & l2::OFFSET_MASK,
    };
    let at = area + 8 * random.below(20);
    if at + 8 <= bytes.len() as u64 && at >= 512 {
        let value = values(random);
        poke(bytes, at, &value.to_be_bytes());
    }
}

/// Any damage: the repair ends, keeps what could be read, and what it calls clean qemu-img finds clean.
#[test]
fn what_is_called_clean_is_clean() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = Random::new(seed.unwrap_or(11));
    let (mut clean, mut judged) = (0, 0);
    for recipe in RECIPES {
        let Some(image) = Image::make(recipe) else { return };
        let sound = image.bytes();
        if sound.len() > 4 << 20 || recipe.options.contains("data_file") {
            continue;
        }
        let geometry = Header::read(&*storage(&sound)).unwrap().geometry();
        for _ in 0..8 {
            let mut bytes = sound.clone();
            (0..=random.below(3)).for_each(|_| maul(&mut bytes, &geometry, &mut random));
            for repair in [Repair::All, Repair::Leaks] {
                let Some((after, report)) = repaired(&bytes, repair) else { continue };
                if report.is_clean() && after != sound {
                    clean += 1;
                    if random.once_in(4) {
                        let theirs = image.theirs(&after).unwrap();
                        assert!(theirs.is_clean(), "{recipe:?} {theirs:?} after {:?}", report.messages);
                        judged += 1;
                    }
                }
            }
        }
    }
    assert!(clean > 60 && judged > 10, "{clean} {judged}");
}

#[test]
fn marks_are_cleared_only_when_nothing_is_left() {
    let marks = (incompatible::DIRTY | incompatible::CORRUPT).to_be_bytes();
    let image = all_right(&damaged_sample(&[(72, &marks), (TABLE + 8, &entry(0x2000))]));
    assert_eq!(word(&image, 72), 0);
    let bytes = damaged_sample(&[(72, &marks), (TABLE + 8, &entry(0x2000)), (L1, &entry(0x4200))]);
    let (image, _) = repaired(&bytes, Repair::All).unwrap();
    assert_eq!(word(&image, 72), word(&marks, 0));
}
