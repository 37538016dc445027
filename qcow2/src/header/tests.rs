//! Headers of the real qemu-img come back byte for byte, and what it refuses is refused in its words.

use std::path::Path;
use std::process::Command;

use block::ErrorKind;
use block::mem::MemStorage;
use proptest::prelude::*;

use super::*;
use crate::create::{CreateOptions, create};
use crate::extension::{BitmapsExtension, FeatureName};

/// Runs qemu-img; `None` (said loudly) if there is none.
fn qemu_img(dir: &Path, arguments: &[&str]) -> Option<std::process::Output> {
    let output = Command::new("qemu-img").current_dir(dir).args(arguments).output();
    if output.is_err() {
        eprintln!("SKIPPED: no qemu-img to compare with");
    }
    output.ok()
}

/// An image made by qemu-img with these steps, `i.qcow2` at the end of each.
fn made_by_qemu(steps: &[&[&str]]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    for step in steps {
        let mut arguments = step.to_vec();
        let size = arguments.pop_if(|last| last.ends_with('M'));
        arguments.push("i.qcow2");
        arguments.extend(size);
        let output = qemu_img(dir.path(), &arguments)?;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Some(std::fs::read(dir.path().join("i.qcow2")).unwrap())
}

fn create_steps(options: &str) -> Vec<&str> {
    vec!["create", "-q", "-f", "qcow2", "-u", "-o", options, "64M"]
}

fn assert_encodes_as_found(bytes: &[u8], what: &str) {
    let header = Header::read(&MemStorage::from_bytes(bytes.to_vec())).unwrap();
    let cluster = to_usize(header.geometry().cluster_size());
    let mut encoded = header.encode().unwrap();
    encoded.resize(cluster, 0);
    assert!(encoded == bytes[..cluster], "{what}: {header:?}");
}

#[test]
fn headers_of_qemu_are_encoded_as_they_were_found() {
    let backing = "backing_file=some/base.img,backing_fmt=raw";
    let mut all = vec!["data_file=d.raw".to_owned(), "data_file=d.raw,data_file_raw=on".to_owned()];
    for cluster in ["512", "4k", "8k", "64k", "2M"] {
        all.push(format!("compat=0.10,cluster_size={cluster}"));
        all.push(format!("compat=0.10,cluster_size={cluster},{backing}"));
        all.push(format!("cluster_size={cluster},lazy_refcounts=on,compression_type=zstd"));
        all.push(format!("cluster_size={cluster},refcount_bits=1,{backing}"));
    }
    all.push(format!("extended_l2=on,refcount_bits=64,{backing}"));
    for options in all {
        let Some(bytes) = made_by_qemu(&[&create_steps(&options)]) else { return };
        assert_encodes_as_found(&bytes, &options);
    }
}

#[test]
fn headers_that_qemu_has_rewritten_are_encoded_as_they_were_found() {
    let create = create_steps("lazy_refcounts=off");
    let bitmap = ["bitmap", "--add", "-g", "4k"];
    let rebase = ["rebase", "-u", "-b", "other.raw", "-F", "raw"];
    let snapshot = ["snapshot", "-c", "one"];
    let amend = ["amend", "-o", "lazy_refcounts=on"];
    for steps in [&rebase[..], &snapshot, &amend] {
        let Some(bytes) = made_by_qemu(&[&create, steps]) else { return };
        assert_encodes_as_found(&bytes, steps[0]);
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("i.qcow2");
    std::fs::write(&file, made_by_qemu(&[&create]).unwrap()).unwrap();
    let arguments = [&bitmap[..], &["i.qcow2", "name"]].concat();
    assert!(qemu_img(dir.path(), &arguments).unwrap().status.success());
    assert_encodes_as_found(&std::fs::read(file).unwrap(), "bitmap");
}

/// Unknown fields and extensions survive, as they do in QEMU.
#[test]
fn what_is_not_known_is_kept() {
    let mut header = sample_header();
    header.header_length = 120;
    header.unknown_fields = b"ABCDEFGH".to_vec();
    header.unknown_extensions = vec![(0xdead_beef, b"abc".to_vec()), (1, vec![])];
    let bytes = header.encode().unwrap();
    assert_eq!(parse(&bytes), Ok(header));
}

fn sample_header() -> Header {
    CreateOptions::new(64 << 20).header().unwrap()
}

/// As long as the tables of the sample need.
const SAMPLE_LEN: u64 = 0x30008;

fn parse(cluster: &[u8]) -> Result<Header> {
    Header::parse(cluster, i64::MAX.unsigned_abs(), Strictness::Strict)
}

fn image() -> Vec<u8> {
    let storage = MemStorage::new();
    create(&storage, &CreateOptions::new(64 << 20)).unwrap();
    storage.to_bytes()
}

/// An image of [`image`] with changes.
type Pokes<'a> = &'a [(usize, &'a [u8])];

fn poked(pokes: Pokes<'_>) -> Vec<u8> {
    let mut bytes = image();
    for (offset, data) in pokes {
        bytes[*offset..*offset + data.len()].copy_from_slice(data);
    }
    bytes
}

const BITMAPS: [u8; 8] = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];

fn bitmaps(count: u32, reserved: u32, size: u64, offset: u64) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.bytes(&BITMAPS).be_u32(count).be_u32(reserved).be_u64(size).be_u64(offset);
    writer.into_bytes()
}

#[test]
fn what_qemu_refuses_is_refused_in_its_words() {
    let named = [&[0, 5][..], b"my feature\0\0"].concat();
    let bitmap_ext = [
        bitmaps(1, 1, 24, 0x20000),
        bitmaps(0, 0, 24, 0x20000),
        bitmaps(65536, 0, 24, 0x20000),
        bitmaps(1, 0, 67_107_841, 0x20000),
        bitmaps(1, 0, 24, 0x20100),
    ];
    let mut cases: Vec<Vec<(usize, &[u8])>> = vec![
        vec![(4, &[0, 0, 0, 4])],
        vec![(20, &[0, 0, 0, 8])],
        vec![(20, &[0, 0, 0, 22])],
        vec![(100, &[0, 0, 0, 100])],
        vec![(100, &[0, 1, 17, 112])],
        vec![(8, &[0, 0, 0, 0, 0, 1, 17, 112]), (16, &[0, 0, 0, 5])],
        vec![(8, &[0, 0, 0, 0, 0, 0, 3, 232]), (16, &[0, 0, 7, 208])],
        vec![(104, &[1])],
        vec![(79, &[8])],
        vec![(79, &[8]), (104, &[2])],
        vec![(79, &[0x21])],
        vec![(79, &[0x61]), (74, &[1]), (0x78 + 48 * 7, &named)],
        vec![(96, &[0, 0, 0, 7])],
        vec![(32, &[0, 0, 0, 3])],
        vec![(32, &[0, 0, 0, 2])],
        vec![(56, &[0, 0, 0, 0])],
        vec![(56, &[0, 0, 0, 129])],
        vec![(56, &[255; 4])],
        vec![(48, &[0, 0, 0, 0, 0, 1, 2, 0])],
        vec![(48, &[0x7f, 255, 255, 255, 255, 255, 0, 0])],
        vec![(60, &[0, 1, 0, 1])],
        vec![(60, &[0, 0, 0, 1]), (64, &[0, 0, 0, 0, 0, 3, 0, 1])],
        vec![(36, &[0, 0x40, 0, 1])],
        vec![(40, &[0, 0, 0, 0, 0, 3, 2, 0])],
        vec![(36, &[0; 4])],
        vec![(24, &[0x80, 0, 0, 0, 0, 0, 0, 0])],
        vec![(24, &[0x10, 0, 0, 0, 0, 0, 0, 0])],
        vec![(24, &[0, 0, 0, 0, 0x40, 0, 0, 0])],
        vec![(0x74, &[0, 1, 17, 112])],
        vec![(0x70, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16])],
        vec![(0x70, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])],
        vec![(32, &[0, 0, 0, 2]), (0x70, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])],
        vec![(32, &[0, 0, 0, 2]), (0x70, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 8])],
        vec![(0x70, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 16])],
    ];
    cases.extend(bitmap_ext.iter().map(|extension| vec![(0x70, extension.as_slice()), (95, &[1])]));
    let dir = tempfile::tempdir().unwrap();
    for case in &cases {
        let bytes = poked(case);
        let ours = Header::read(&MemStorage::from_bytes(bytes.clone())).unwrap_err();
        std::fs::write(dir.path().join("i.qcow2"), bytes).unwrap();
        let Some(output) = qemu_img(dir.path(), &["info", "i.qcow2"]) else { return };
        let theirs = String::from_utf8_lossy(&output.stderr);
        assert_eq!(format!("qemu-img: Could not open 'i.qcow2': {ours}\n"), theirs, "{case:x?}");
    }
}

#[test]
fn a_file_that_has_been_cut_off_is_refused() {
    let bytes = image();
    assert_eq!(bytes.len() as u64, SAMPLE_LEN);
    for len in [0x30007, 0x30000, 0x20001, 0x10004] {
        let error = Header::read(&MemStorage::from_bytes(bytes[..len].to_vec())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{len:#x}: {error}");
        Header::read_for_check(&MemStorage::from_bytes(bytes[..len].to_vec())).unwrap();
    }
    let error = Header::read(&MemStorage::from_bytes(bytes[..0x30007].to_vec())).unwrap_err();
    let text = "active L1 table at 0x30000 (length 0x8) lies past the end of the file (length 0x30007)";
    assert_eq!(error.message(), text);
    for len in [3, 60, 100] {
        let error = Header::read(&MemStorage::from_bytes(bytes[..len].to_vec())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{len}: {error}");
    }
}

#[test]
fn tables_on_the_header_and_odd_headers_are_refused() {
    let reading =
        |pokes: Pokes<'_>| Header::read(&MemStorage::from_bytes(poked(pokes))).unwrap_err().to_string();
    assert_eq!(reading(&[(40, &[0; 8])]), "Active L1 table offset invalid");
    assert_eq!(reading(&[(48, &[0; 8])]), "Reference count table offset invalid");
    assert_eq!(reading(&[(100, &[0, 0, 0, 117])]), "qcow2 header length 117 is not a multiple of 8");
    assert_eq!(reading(&[(20, &[0, 0, 0, 13]), (79, &[16])]), "Unsupported subcluster size: 256");
}

#[test]
fn a_feature_name_cannot_play_tricks_on_the_terminal() {
    let named = [&[0, 5][..], b"\x1b[2Jevil\0"].concat();
    let bytes = poked(&[(79, &[0x20]), (0x78, &named)]);
    let error = Header::read(&MemStorage::from_bytes(bytes)).unwrap_err();
    assert_eq!(error.message(), "Unsupported qcow2 feature(s): ?[2Jevil");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn bitmaps_without_their_autoclear_bit_are_stale() {
    let bytes = poked(&[(0x70, &bitmaps(1, 0, 24, 0x20000))]);
    let header = Header::read(&MemStorage::from_bytes(bytes)).unwrap();
    assert_eq!((header.bitmaps, header.stale_bitmaps), (None, true));
}

#[test]
fn a_header_that_does_not_fit_says_so() {
    let mut header = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 20) }.header().unwrap();
    header.unknown_extensions.push((7, vec![0; 400]));
    assert_eq!(header.encode(), Err(Error::HeaderFull));
    header.unknown_extensions.clear();
    header.backing_file = Some(vec![b'x'; 1024]);
    assert_eq!(header.encode(), Err(Error::BackingNameTooLong(1024)));
}

#[test]
fn probing_needs_the_magic_and_a_version() {
    assert!(Header::probe(b"QFI\xfb\0\0\0\x03"));
    assert!(!Header::probe(b"QFI\xfb\0\0\0\x01"));
    assert!(!Header::probe(b"QFI\xfb\0\0\0"));
}

prop_compose! {
    fn any_feature()(kind in 0u8..3, bit in 0u8..64, name in "[a-z ]{0,46}") -> FeatureName {
        FeatureName { kind, bit, name }
    }
}

prop_compose! {
    fn any_bitmaps()(count in 1u32..65_536, directory_size in 1u64..1 << 20, at in 1u64..1 << 20) -> BitmapsExtension {
        BitmapsExtension { count, directory_size, directory_offset: at << 21 }
    }
}

prop_compose! {
    fn any_header()(
        version in 2u32..=3,
        cluster_bits in 16u32..=21,
        l1_size in 1u32..1 << 20,
        tables in any::<[u32; 3]>(),
        nb_snapshots in 0u32..=65_536,
        compression_type in 0u8..=1,
        bits in any::<[u64; 3]>(),
        refcount_order in 0u32..=6,
        unknown_words in 0usize..4,
        backing_file in proptest::option::of("[ -~]{1,1023}"),
        strings in (proptest::option::of("[a-z0-9]{0,15}"), proptest::option::of("[ -~]{0,80}")),
        luks in proptest::option::of((0u64..1 << 30, any::<u64>())),
        feature_names in proptest::collection::vec(any_feature(), 0..10),
        bitmaps in proptest::option::of(any_bitmaps()),
        unknown_extensions in proptest::collection::vec((1u32..100, proptest::collection::vec(any::<u8>(), 0..40)), 0..4),
    ) -> Header {
        let v3 = version == 3;
        let only_v3 = |value: u64| if v3 { value } else { 0 };
        let unknown_fields = vec![0xa5; if v3 { 8 * unknown_words } else { 0 }];
        let zstd = v3 && compression_type == COMPRESSION_ZSTD;
        let known = incompatible::KNOWN & !incompatible::COMPRESSION;
        let bitmaps = bitmaps.filter(|_| v3);
        Header {
            version,
            cluster_bits,
            size: u64::from(l1_size) << 20,
            crypt_method: if luks.is_some() { CRYPT_LUKS } else { 0 },
            l1_size,
            l1_table_offset: u64::from(tables[0] | 1) << 21,
            refcount_table_offset: u64::from(tables[1] | 1) << 21,
            refcount_table_clusters: 1 + tables[1] % 4,
            nb_snapshots,
            snapshots_offset: u64::from(tables[2]) << 21,
            incompatible: only_v3(bits[0] & known | if zstd { incompatible::COMPRESSION } else { 0 }),
            compatible: only_v3(bits[1]),
            autoclear: only_v3(bits[2] & !autoclear::BITMAPS | u64::from(bitmaps.is_some())),
            refcount_order: if v3 { refcount_order } else { 4 },
            header_length: if v3 { V3_LENGTH + u32::try_from(unknown_fields.len()).unwrap() } else { V2_LENGTH },
            compression_type: u8::from(zstd),
            unknown_fields,
            backing_file: backing_file.map(String::into_bytes),
            backing_format: strings.0.map(String::into_bytes),
            data_file: strings.1.map(String::into_bytes),
            luks: luks.map(|(at, len)| (at << 21, len)),
            feature_names,
            bitmaps,
            stale_bitmaps: false,
            unknown_extensions,
        }
    }
}

proptest! {
    #[test]
    fn a_header_survives_being_written(header in any_header()) {
        prop_assert_eq!(parse(&header.encode().unwrap()), Ok(header));
    }

    #[test]
    fn no_header_panics(
        pokes in proptest::collection::vec((0usize..0x300, any::<u8>()), 1..12),
        cluster in any::<bool>(),
        file_len in any::<u64>(),
    ) {
        let mut bytes = image()[..if cluster { 0x10000 } else { 0x300 }].to_vec();
        pokes.iter().for_each(|(at, value)| bytes[*at] = *value);
        for strictness in [Strictness::Strict, Strictness::ForCheck] {
            if let Ok(header) = Header::parse(&bytes, file_len, strictness) {
                let _ = header.encode();
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let bytes = [&MAGIC[..], &[0, 0, 0, 3], &bytes].concat();
        let _ = Header::read(&MemStorage::from_bytes(bytes));
    }
}
