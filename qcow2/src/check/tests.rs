//! The real qemu-img is the judge: the same counts of problems and the same statistics for images of every
//! kind, sound and damaged. Where this check is stricter, the test says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use block::mem::MemStorage;
use block::testing::{CrashStorage, Random};

use super::*;
use crate::create::{CreateOptions, create};
use crate::{features::incompatible, l2};

pub(super) const COPIED: u64 = l2::COPIED;

/// Runs a tool, `None` (said loudly) if it is not there.
pub(super) fn run(tool: &str, dir: &Path, arguments: &[&str]) -> Option<Output> {
    let output = Command::new(tool).current_dir(dir).args(arguments).output();
    if output.is_err() {
        eprintln!("SKIPPED: no {tool} to compare with");
    }
    output.ok()
}

/// Runs a tool that has to succeed.
pub(super) fn must(tool: &str, dir: &Path, arguments: &[&str]) -> Option<()> {
    let output = run(tool, dir, arguments)?;
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

/// How an image is made with the real tools.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipe {
    pub(super) options: &'static str,
    size: &'static str,
    /// Steps in this order: `write ..` for qemu-io, anything else for qemu-img with the file's name last.
    steps: &'static [&'static str],
}

const fn recipe(options: &'static str, size: &'static str, steps: &'static [&'static str]) -> Recipe {
    Recipe { options, size, steps }
}

pub(super) const RECIPES: &[Recipe] = &[
    recipe("compat=1.1", "64M", &["write 0 256k", "write -z 1M 64k", "write -c 8M 64k", "write -c 9M 64k"]),
    recipe("compat=0.10", "64M", &["write 0 128k", "write -c 1M 64k"]),
    recipe("compression_type=zstd", "64M", &["write 0 256k", "write -c 8M 64k", "write -c 9M 64k"]),
    recipe("extended_l2=on", "64M", &["write 0 2k", "write 64k 64k", "write -z 1M 6k", "write -c 8M 64k"]),
    recipe("data_file=data.raw", "64M", &["write 0 128k", "write -z 1M 64k", "write 5M 64k"]),
    recipe("cluster_size=512", "16M", &["write 0 256k", "write 10M 100k", "write -c 12M 512"]),
    recipe("cluster_size=2M", "1G", &["write 0 256k", "write 10M 100k", "write -c 16M 2M"]),
    recipe("cluster_size=4k,refcount_bits=1", "64M", &["write 0 256k", "write 20M 100k"]),
    recipe("cluster_size=4k,refcount_bits=2", "64M", &["write 0 256k", "write 20M 100k"]),
    recipe("cluster_size=4k,refcount_bits=8", "64M", &["write 0 256k", "write 20M 100k"]),
    recipe("cluster_size=4k,refcount_bits=32", "64M", &["write 0 256k", "write 20M 100k"]),
    recipe("cluster_size=4k,refcount_bits=64", "64M", &["write 0 256k", "write 20M 100k"]),
    recipe("lazy_refcounts=on", "64M", &["write 0 1M"]),
    recipe("preallocation=metadata", "20M", &[]),
    recipe("preallocation=full", "20M", &[]),
    recipe("compat=1.1", "1T", &["write 0 64k", "write 500G 64k", "write 1023G 128k"]),
    recipe("cluster_size=512", "8G", &["write 0 64k", "write 5G 64k"]),
    recipe("compat=1.1", "0", &[]),
    recipe(
        "compat=1.1",
        "64M",
        &["write 0 128k", "snapshot -c one", "write 0 64k", "snapshot -c two", "write -c 4M 64k"],
    ),
    recipe("compat=1.1", "64M", &["write 0 128k", "snapshot -c one"]),
    recipe("compat=1.1", "64M", &["bitmap --add -g 4k @ b", "write 0 1M"]),
    recipe("compat=1.1", "64M", &["write 0 1M", "bitmap --add -g 4k @ b"]),
    recipe("compat=1.1", "64M", &["write 0 1M", "resize @ 4T", "write 3T 64k", "resize @ 8T"]),
    recipe("cluster_size=512", "1M", &["write 0 1M", "resize @ 40M", "write 30M 512"]),
];

/// A directory with an image in it.
pub(super) struct Image {
    pub(super) dir: tempfile::TempDir,
}

impl Image {
    pub(super) fn make(recipe: &Recipe) -> Option<Self> {
        let image = Self { dir: tempfile::tempdir().unwrap() };
        let dir = image.dir.path();
        must(
            "qemu-img",
            dir,
            &["create", "-q", "-f", "qcow2", "-o", recipe.options, "i.qcow2", recipe.size],
        )?;
        for step in recipe.steps {
            if step.starts_with("write") {
                must("qemu-io", dir, &["-c", step, "i.qcow2"])?;
            } else {
                let mut words: Vec<&str> =
                    step.split(' ').map(|w| if w == "@" { "i.qcow2" } else { w }).collect();
                if !step.contains('@') {
                    words.push("i.qcow2");
                }
                must("qemu-img", dir, &words)?;
            }
        }
        Some(image)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("i.qcow2")
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// What `qemu-img check` says of the image with these contents; `None` if it cannot check at all.
    pub(super) fn theirs(&self, bytes: &[u8]) -> Option<CheckReport> {
        std::fs::write(self.path(), bytes).unwrap();
        let output = run("qemu-img", self.dir.path(), &["check", "--output=json", "i.qcow2"])?;
        let json = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = |key: &str| {
            let (_, rest) = json.split_once(&format!("\"{key}\": "))?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        number("total-clusters").or_else(|| number("check-errors"))?;
        let number = |key| number(key).unwrap_or(0);
        Some(CheckReport {
            corruptions: number("corruptions"),
            leaks: number("leaks"),
            check_errors: number("check-errors"),
            total_clusters: number("total-clusters"),
            allocated_clusters: number("allocated-clusters"),
            fragmented_clusters: number("fragmented-clusters"),
            compressed_clusters: number("compressed-clusters"),
            image_end_offset: number("image-end-offset"),
            ..CheckReport::default()
        })
    }
}

pub(super) fn storage(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemStorage::from_bytes(bytes.to_vec()))
}

pub(super) fn check_with(storage: &Arc<dyn Storage>, repair: Repair) -> Result<CheckReport> {
    let header = Header::read_for_check(&**storage)?;
    check(storage, &header, None, repair)
}

pub(super) fn ours(bytes: &[u8]) -> CheckReport {
    check_with(&storage(bytes), Repair::None).unwrap()
}

/// The report without its lines.
fn counts(report: &CheckReport) -> CheckReport {
    CheckReport { messages: vec![], messages_dropped: 0, ..report.clone() }
}

pub(super) fn word(bytes: &[u8], offset: u64) -> u64 {
    let mut reader = block::codec::Reader::new(bytes);
    reader.skip(usize::try_from(offset).unwrap()).unwrap();
    reader.be_u64().unwrap()
}

pub(super) fn poke(bytes: &mut [u8], offset: u64, data: &[u8]) {
    bytes[usize::try_from(offset).unwrap()..][..data.len()].copy_from_slice(data);
}

/// Where the interesting tables of an image are.
pub(super) struct Places {
    pub(super) header: Header,
    pub(super) refcount_block: u64,
    pub(super) l2: Vec<u64>,
}

pub(super) fn places(bytes: &[u8]) -> Places {
    let header = Header::read(&*storage(bytes)).unwrap();
    let l1 = (0..u64::from(header.l1_size)).map(|i| word(bytes, header.l1_table_offset + 8 * i));
    let l2 = l1.map(|entry| entry & l2::OFFSET_MASK).filter(|offset| *offset != 0).collect();
    Places { refcount_block: word(bytes, header.refcount_table_offset), l2, header }
}

#[test]
fn sound_images_are_clean_and_their_statistics_are_qemus() {
    for recipe in RECIPES {
        let Some(image) = Image::make(recipe) else { return };
        let bytes = image.bytes();
        let report = ours(&bytes);
        assert!(report.is_clean(), "{recipe:?}: {:?}", report.messages);
        assert_eq!(counts(&report), image.theirs(&bytes).unwrap(), "{recipe:?}");
    }
}

/// Lines about damage that QEMU does not see.
fn stricter(line: &str, version: u32, extended: bool) -> bool {
    line.contains("lies past the end of the file")
        || line.contains("data of guest offset")
        || line.contains("metadata shares it")
        || ((version < 3 || extended) && line.starts_with("ERROR found l2 entry with reserved bits"))
}

/// A random damage. L1 entries always keep a table's offset: QEMU follows an entry without one to the header.
pub(super) fn damage(bytes: &mut [u8], places: &Places, random: &mut Random) {
    let geometry = places.header.geometry();
    let entry_size = geometry.l2_entry_size();
    let clusters = geometry.clusters_for(bytes.len() as u64);
    let any_cluster = geometry.offset_of(1 + random.below(clusters + 2));
    let pick = random.next_u64();
    match random.below(8) {
        0..4 => {
            let table = places.l2[block::num::to_usize(random.below(places.l2.len() as u64))];
            let at = table + entry_size * random.below(geometry.l2_entries().min(100));
            let old = word(bytes, at);
            let values = [
                old ^ COPIED,
                old ^ 1,
                old ^ (1 << (pick % 64)),
                any_cluster | COPIED,
                any_cluster,
                0,
                COPIED,
                l2::COMPRESSED | (any_cluster + pick % 1000),
                any_cluster + 512,
            ];
            poke(bytes, at, &values[block::num::to_usize(pick >> 8) % values.len()].to_be_bytes());
            if geometry.extended_l2 && random.once_in(3) {
                let bitmaps = [0, 1, 1 << 32, 1 << 32 | 1, u64::from(u32::MAX)];
                poke(bytes, at + 8, &bitmaps[block::num::to_usize(pick >> 16) % bitmaps.len()].to_be_bytes());
            }
        }
        4 => {
            let at = places.header.l1_table_offset;
            let old = word(bytes, at);
            let values = [old ^ COPIED, old ^ 1, 0, (1 << 40) | COPIED];
            if old != 0 {
                poke(bytes, at, &values[block::num::to_usize(pick >> 8) % values.len()].to_be_bytes());
            }
        }
        5..7 => {
            let at = places.refcount_block + random.below((clusters * 4).min(geometry.cluster_size()));
            poke(bytes, at, &pick.to_be_bytes()[..1]);
        }
        _ => {
            let at = places.header.refcount_table_offset + 8 * random.below(2);
            let values = [0, word(bytes, at) | 1, any_cluster, geometry.offset_of(1 << 30)];
            poke(bytes, at, &values[block::num::to_usize(pick >> 8) % values.len()].to_be_bytes());
        }
    }
}

#[test]
fn damaged_images_have_as_many_problems_as_qemu_finds() {
    let mut random = Random::new(2);
    let mut damaged = 0;
    for recipe in RECIPES {
        let Some(image) = Image::make(recipe) else { return };
        let sound = image.bytes();
        let places = places(&sound);
        // Refcounts that overflow their width are one problem here, and one for every reference there.
        if places.l2.is_empty() || sound.len() > 4 << 20 || places.header.refcount_order == 0 {
            continue;
        }
        for _ in 0..15 {
            let mut bytes = sound.clone();
            (0..=random.below(3)).for_each(|_| damage(&mut bytes, &places, &mut random));
            let Some(theirs) = image.theirs(&bytes) else { continue };
            let report = ours(&bytes);
            let extended = places.header.geometry().extended_l2;
            let more =
                report.messages.iter().filter(|l| stricter(l, places.header.version, extended)).count();
            let extra = report.corruptions - theirs.corruptions.min(report.corruptions);
            assert!(extra <= more as u64, "{recipe:?} {:?} {theirs:?}", report.messages);
            let without = CheckReport { corruptions: report.corruptions - extra, ..counts(&report) };
            assert_eq!(without, theirs, "{recipe:?} {:?}", report.messages);
            damaged += u64::from(!report.is_clean());
        }
    }
    assert!(damaged > 100, "only {damaged} images were damaged");
}

/// A small image of our own with `clusters` data clusters, the first at cluster 5, L2 table at 4.
pub(super) fn sample(clusters: u64) -> Vec<u8> {
    sample_with(clusters, &CreateOptions { cluster_bits: 12, ..CreateOptions::new(1 << 20) })
}

pub(super) fn sample_with(clusters: u64, options: &CreateOptions) -> Vec<u8> {
    let memory = MemStorage::new();
    create(&memory, options).unwrap();
    let header = Header::read(&memory).unwrap();
    let geometry = header.geometry();
    memory.write_at(&(COPIED | geometry.offset_of(4)).to_be_bytes(), header.l1_table_offset).unwrap();
    memory.set_len(geometry.offset_of(5 + clusters)).unwrap();
    let mut block = vec![0; 4096];
    memory.read_at(&mut block, geometry.offset_of(2)).unwrap();
    for cluster in 4..5 + clusters {
        crate::refcount::write_counter(&mut block, cluster, geometry.refcount_order, 1);
    }
    memory.write_at(&block, geometry.offset_of(2)).unwrap();
    for index in 0..clusters {
        let entry = COPIED | geometry.offset_of(5 + index);
        memory.write_at(&entry.to_be_bytes(), geometry.offset_of(4) + 8 * index).unwrap();
    }
    let bytes = memory.to_bytes();
    assert!(ours(&bytes).is_clean());
    bytes
}

/// The sample's tables.
pub(super) const L1: u64 = 0x3000;
pub(super) const L2: u64 = 0x4000;
pub(super) const REFCOUNTS: u64 = 0x2000;

pub(super) fn damaged_sample(pokes: &[(u64, &[u8])]) -> Vec<u8> {
    let mut bytes = sample(8);
    pokes.iter().for_each(|(offset, data)| poke(&mut bytes, *offset, data));
    bytes
}

pub(super) fn lines(bytes: &[u8]) -> Vec<String> {
    ours(bytes).messages
}

#[test]
fn metadata_shared_with_a_refcount_that_says_so_is_a_corruption() {
    // Guest cluster 0 is the L1 table: QEMU calls this clean.
    let entry = L1.to_be_bytes();
    let bytes = damaged_sample(&[(L2, &entry), (REFCOUNTS + 6, &[0, 2]), (REFCOUNTS + 10, &[0, 0])]);
    assert_eq!(lines(&bytes), ["ERROR cluster 3 refcount=2 reference=2: metadata shares it"]);
}

#[test]
fn data_behind_the_end_of_the_file_is_a_corruption() {
    let compressed = (l2::COMPRESSED | 0xd000).to_be_bytes();
    let bytes = damaged_sample(&[(L2 + 64, &compressed), (REFCOUNTS + 26, &[0, 1])]);
    assert_eq!(lines(&bytes), ["ERROR: region at offset 0xd000 size 0x200 lies past the end of the file"]);
}

#[test]
fn a_table_that_is_cut_off_is_a_corruption() {
    let mut bytes = sample(0);
    bytes.truncate(0x4800);
    assert_eq!(lines(&bytes), ["ERROR: region at offset 0x4000 size 0x1000 lies past the end of the file"]);
}

#[test]
fn flags_that_only_the_reader_minds_are_corruptions() {
    let options = CreateOptions { version: 2, cluster_bits: 12, ..CreateOptions::new(1 << 20) };
    let mut bytes = sample_with(8, &options);
    poke(&mut bytes, L2 + 7, &[1]);
    assert_eq!(lines(&bytes), ["ERROR found l2 entry with reserved bits set: 8000000000005001"]);
    let bytes = damaged_sample(&[(L1 + 8, &COPIED.to_be_bytes())]);
    assert_eq!(ours(&bytes).corruptions, 0, "behind the L1 table");
}

#[test]
fn data_of_an_external_file_is_where_the_guest_has_it() {
    let data_file = Some(b"data".to_vec());
    let options = CreateOptions { data_file, cluster_bits: 12, ..CreateOptions::new(1 << 20) };
    let memory: Arc<dyn Storage> = Arc::new(MemStorage::new());
    create(&*memory, &options).unwrap();
    memory.write_at(&(COPIED | L2).to_be_bytes(), L1).unwrap();
    memory.write_at(&[0, 1], REFCOUNTS + 8).unwrap();
    memory.set_len(0x5000).unwrap();
    let table: Vec<u8> =
        [COPIED, COPIED | 0x3000, COPIED | 0x2000].iter().flat_map(|e| e.to_be_bytes()).collect();
    memory.write_at(&table, L2).unwrap();
    let header = Header::read(&*memory).unwrap();
    let data = storage(&[1; 0x2000]);
    let report = check(&memory, &header, Some(&data), Repair::None).unwrap();
    let expected = [
        "ERROR data of guest offset 0x1000 is at 0x3000 of the data file",
        "ERROR data of guest offset 0x2000 lies past the end of the data file",
    ];
    assert_eq!((report.corruptions, report.messages), (2, expected.map(str::to_owned).to_vec()));
}

/// After a repair: everything has been fixed, qemu-img agrees, and the mappings are as they were.
pub(super) fn assert_repaired(bytes: &[u8], repair: Repair, corruptions: u64, leaks: u64) -> Vec<u8> {
    let memory = Arc::new(MemStorage::from_bytes(bytes.to_vec()));
    let storage: Arc<dyn Storage> = memory.clone();
    let report = check_with(&storage, repair).unwrap();
    assert!(report.is_clean(), "{:?}", report.messages);
    assert_eq!((report.corruptions_fixed, report.leaks_fixed), (corruptions, leaks), "{:?}", report.messages);
    let repaired = memory.to_bytes();
    assert!(ours(&repaired).is_clean(), "{:?}", lines(&repaired));
    let image = Image { dir: tempfile::tempdir().unwrap() };
    if let Some(theirs) = image.theirs(&repaired) {
        assert!(theirs.is_clean(), "{theirs:?}");
    }
    repaired
}

#[test]
fn leaks_are_given_back_and_nothing_else_is_touched() {
    let leaked = [(REFCOUNTS + 10, &[0u8, 2][..]), (REFCOUNTS + 2 * 9, &[0x12, 0x34])];
    let bytes = damaged_sample(&leaked);
    assert_repaired(&bytes, Repair::Leaks, 0, 2);
    // A corruption is none of its business.
    let both = damaged_sample(&[leaked[0], (REFCOUNTS + 12, &[0, 0])]);
    let storage = storage(&both);
    let report = check_with(&storage, Repair::Leaks).unwrap();
    assert_eq!(
        (report.leaks, report.leaks_fixed, report.corruptions, report.corruptions_fixed),
        (0, 1, 2, 0)
    );
}

#[test]
fn a_flag_that_a_lowered_refcount_asks_for_is_set() {
    let entry = 0x5000u64.to_be_bytes();
    let bytes = damaged_sample(&[(L2, &entry), (REFCOUNTS + 10, &[0, 2])]);
    let repaired = assert_repaired(&bytes, Repair::Leaks, 1, 1);
    assert_eq!(word(&repaired, L2), COPIED | 0x5000);
}

#[test]
fn refcounts_and_flags_are_set_right_and_the_marks_cleared() {
    let entry = 0x5000u64.to_be_bytes();
    let marks = (incompatible::DIRTY | incompatible::CORRUPT).to_be_bytes();
    let bytes = damaged_sample(&[(72, &marks), (L2, &entry), (REFCOUNTS + 12, &[0, 0]), (L1, &[0])]);
    let repaired = assert_repaired(&bytes, Repair::All, 3, 0);
    assert_eq!(Header::read(&*storage(&repaired)).unwrap().incompatible, 0);
    // Two guest clusters in one host cluster: the refcount goes up and both flags go.
    let bytes = damaged_sample(&[(L2 + 8, &(COPIED | 0x5000).to_be_bytes())]);
    let repaired = assert_repaired(&bytes, Repair::All, 3, 1);
    assert_eq!((word(&repaired, L2), word(&repaired, L2 + 8)), (0x5000, 0x5000));
}

#[test]
fn missing_refcount_blocks_are_made_at_the_end() {
    // 64 clusters a block: the data needs three blocks more, and they count each other.
    let options = CreateOptions { cluster_bits: 9, refcount_order: 6, ..CreateOptions::new(32 << 10) };
    let memory = MemStorage::new();
    create(&memory, &options).unwrap();
    let header = Header::read(&memory).unwrap();
    let at = |cluster: u64| cluster * 512;
    memory.write_at(&(COPIED | at(4)).to_be_bytes(), header.l1_table_offset).unwrap();
    let entries: Vec<u8> = (0..64u64).flat_map(|i| (COPIED | at(5 + 3 * i)).to_be_bytes()).collect();
    memory.write_at(&entries, at(4)).unwrap();
    memory.set_len(at(5 + 3 * 63 + 1)).unwrap();
    // The L2 table and 20 clusters in the first block, 65 flags that refcount 0 contradicts.
    assert_repaired(&memory.to_bytes(), Repair::All, 65, 0);
}

/// Damage that does harm when the image is written: clusters that count as less used than they are, and flags
/// that allow writing in place what others see, too.
pub(super) fn harm(bytes: &[u8]) -> usize {
    let copied = |line: &str| {
        let (_, entry) = line.split_once("_entry=")?;
        u64::from_str_radix(entry.split(' ').next()?, 16).ok()
    };
    let harmful = |line: &&String| {
        (line.starts_with("ERROR cluster") && !line.ends_with("shares it"))
            || copied(line).is_some_and(|entry| entry & COPIED != 0)
    };
    lines(bytes).iter().filter(harmful).count()
}

#[test]
fn a_repair_that_is_interrupted_makes_nothing_worse() {
    let bytes = damaged_sample(&[
        (L2, &0x5000u64.to_be_bytes()),
        (L2 + 8, &(COPIED | 0x7000).to_be_bytes()),
        (REFCOUNTS + 16, &[0, 0]),
        (REFCOUNTS + 18, &[0, 5]),
    ]);
    let before = harm(&bytes);
    let crash = Arc::new(CrashStorage::new(bytes));
    let storage: Arc<dyn Storage> = crash.clone();
    assert!(check_with(&storage, Repair::All).unwrap().is_clean());
    for image in crash.images(200, 1) {
        let left = image.storage.to_bytes();
        assert!(harm(&left) <= before, "{}: {:?}", image.description, lines(&left));
        assert!(check_with(&(image.storage as Arc<dyn Storage>), Repair::All).unwrap().is_clean());
    }
}

/// An image that a crashed qemu-io left dirty is repaired, and holds what was written.
#[test]
fn a_dirty_image_of_qemu_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let file = at.join("i.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "i.qcow2", "64M"];
    let Some(()) = must("qemu-img", at, &create) else { return };
    let Some(_) = run("qemu-io", at, &["-c", "write -P 7 0 3M", "-c", "flush", "-c", "abort", "i.qcow2"])
    else {
        return;
    };
    let dirty = std::fs::read(&file).unwrap();
    let storage = storage(&dirty);
    let header = Header::read(&*storage).unwrap();
    assert!(header.has(incompatible::DIRTY));
    assert!(ours(&dirty).corruptions > 0);
    let report = repair_dirty(&storage, &header).unwrap();
    assert!(report.is_clean() && report.corruptions_fixed > 0, "{:?}", report.messages);
    assert!(!Header::read(&*storage).unwrap().has(incompatible::DIRTY));
    let mut repaired = vec![0; block::num::to_usize(storage.len().unwrap())];
    storage.read_at(&mut repaired, 0).unwrap();
    std::fs::write(&file, repaired).unwrap();
    must("qemu-img", at, &["check", "-q", "i.qcow2"]).unwrap();
    let read = run("qemu-io", at, &["-r", "-c", "read -P 7 0 3M", "i.qcow2"]).unwrap();
    assert!(!String::from_utf8_lossy(&read.stdout).contains("verification failed"));
}

/// No bytes may panic anything, and whatever a repair says it has done is so.
#[test]
fn no_damage_panics() {
    let mut random = Random::new(7);
    let sound = sample(8);
    for _ in 0..3000 {
        let mut bytes = sound.clone();
        for _ in 0..=random.below(6) {
            let area = [0, 0x1000, REFCOUNTS, L1, L2][block::num::to_usize(random.below(5))];
            let at = area + random.below(120);
            poke(&mut bytes, at, &random.next_u64().to_be_bytes()[..1]);
        }
        let cut = random.below(3) * random.below(0x4000);
        bytes.truncate(bytes.len() - block::num::to_usize(cut));
        for repair in [Repair::None, Repair::Leaks, Repair::All] {
            let memory = storage(&bytes);
            let Ok(report) = check_with(&memory, repair) else { continue };
            if repair != Repair::None && report.is_clean() {
                let again = check_with(&memory, Repair::None).unwrap();
                assert!(again.is_clean(), "{:?} after {:?}", again.messages, report.messages);
            }
        }
    }
}

/// A container that claims to be enormous, as a sparse file may, and holds `bytes` at its start.
#[derive(Debug)]
struct Enormous {
    bytes: MemStorage,
    len: u64,
}

impl Storage for Enormous {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }
    fn set_len(&self, _: u64) -> Result<()> {
        Ok(())
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.bytes.read_at(buf, offset.min(1 << 40))
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.bytes.write_at(buf, offset)
    }
    fn zero_range(&self, _: u64, _: u64, _: block::ZeroMode) -> Result<()> {
        Ok(())
    }
    fn discard_range(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
    fn allocate_range(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn extent(&self, _: u64, max_len: u64) -> Result<block::HostExtent> {
        Ok(block::HostExtent { data: true, len: max_len })
    }
    fn read_only(&self) -> bool {
        false
    }
    fn name(&self) -> String {
        "enormous".to_owned()
    }
}

#[test]
fn a_file_that_claims_to_be_enormous_costs_nothing() {
    let far = COPIED | (1 << 55);
    let bytes = MemStorage::from_bytes(damaged_sample(&[(L2, &far.to_be_bytes())]));
    let storage: Arc<dyn Storage> = Arc::new(Enormous { bytes, len: i64::MAX.unsigned_abs() });
    let report = check_with(&storage, Repair::None).unwrap();
    // The far cluster has refcount 0, its flag is wrong, and cluster 5 is leaked.
    assert_eq!((report.corruptions, report.leaks), (2, 1), "{:?}", report.messages);
    assert_eq!(report.image_end_offset, (1 << 55) + 0x1000);
    // No refcount table could reach that far.
    let error = check_with(&storage, Repair::All).unwrap_err();
    assert!(error.to_string().contains("too large"), "{error}");
}

/// Four million L1 entries that share one L2 table: QEMU reads that table four million times.
#[test]
fn an_l1_table_full_of_one_l2_table_is_quick() {
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(128 << 30) };
    let memory = Arc::new(MemStorage::new());
    create(&*memory, &options).unwrap();
    let header = Header::read(&*memory).unwrap();
    let table = memory.len().unwrap().next_multiple_of(512);
    memory.set_len(table + 1024).unwrap();
    let entries = (COPIED | table).to_be_bytes().repeat(block::num::to_usize(header.l1_size.into()));
    memory.write_at(&entries, header.l1_table_offset).unwrap();
    let data = (COPIED | (table + 512)).to_be_bytes();
    memory.write_at(&data.repeat(64), table).unwrap();
    let started = std::time::Instant::now();
    let storage: Arc<dyn Storage> = memory;
    let report = check_with(&storage, Repair::None).unwrap();
    assert!(report.corruptions > 4 << 20);
    assert_eq!(report.allocated_clusters, (4 << 20) * 64);
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}

/// 65536 snapshots whose L1 tables lie on top of each other.
#[test]
fn l1_tables_on_top_of_each_other_are_quick() {
    let mut bytes = sample(8);
    let table = bytes.len() as u64;
    bytes.resize(bytes.len() + 65_536 * 64 + (8 << 20), 0);
    let l1 = table + 65_536 * 64;
    let snapshot = |i: u64| crate::snapshot::Snapshot {
        l1_offset: l1 + (i % 1000) * 4096,
        l1_size: 1 << 20,
        ..Default::default()
    };
    let snapshots: Vec<_> = (0..65_536).map(snapshot).collect();
    poke(&mut bytes, table, &crate::snapshot::encode_table(&snapshots, 1 << 20).unwrap());
    poke(&mut bytes, l1, &(COPIED | L2).to_be_bytes().repeat(1 << 19));
    poke(&mut bytes, 60, &65_536u32.to_be_bytes());
    poke(&mut bytes, 64, &table.to_be_bytes());
    let started = std::time::Instant::now();
    let report = ours(&bytes);
    assert!(report.corruptions > 0);
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}
