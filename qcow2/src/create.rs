//! Making an empty image.
//!
//! The layout is QEMU's: header, refcount table, first refcount block, L1 table, then the remaining refcount
//! blocks of an L1 table that is too large for one. Where one block is enough, which is everything but
//! gigantic disks with tiny clusters, the file is byte for byte what `qemu-img create` makes (as a file with
//! holes). The header is written last, so that an interrupted `create` leaves nothing that looks like an image.

use block::num::{align_up, to_usize};
use block::{Preallocation, Storage, ZeroMode};

use crate::error::Error;
use crate::extension::FeatureName;
use crate::features::{autoclear, compatible, incompatible};
use crate::geometry::{CLUSTER_BITS, Geometry, MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MAX_REFCOUNT_TABLE_BYTES};
use crate::header::{COMPRESSION_ZLIB, Header, V3_LENGTH};
use crate::refcount::write_counter;

/// Clusters of an image with extended L2 entries are at least this large: subclusters have 512 bytes.
const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Disks are whole sectors.
const SECTOR: u64 = 512;

/// What a new image is to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to whole sectors of 512 bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// Name of the backing file, as it is to be stored.
    pub backing_file: Option<Vec<u8>>,
    /// Format name of the backing file.
    pub backing_format: Option<Vec<u8>>,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// [`COMPRESSION_ZLIB`] or [`COMPRESSION_ZSTD`](crate::header::COMPRESSION_ZSTD).
    pub compression_type: u8,
    /// Name of the external data file, as it is to be stored. Whoever calls makes that file.
    pub data_file: Option<Vec<u8>>,
    /// The external data file is to stay a raw copy of the disk.
    pub data_file_raw: bool,
    /// What will be preallocated afterwards; [`create`] only checks that it goes with the rest.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            backing_file: None,
            backing_format: None,
            lazy_refcounts: false,
            extended_l2: false,
            compression_type: COMPRESSION_ZLIB,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }

    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
        }
    }

    /// Whether these options can be had together.
    ///
    /// # Errors
    /// `Usage`, in QEMU's words.
    pub fn validate(&self) -> block::Result<()> {
        self.header().map(drop)
    }

    /// The header of the image, with its tables placed.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn header(&self) -> block::Result<Header> {
        self.check_numbers()?;
        self.check_version()?;
        self.check_combinations()?;
        let layout = Layout::new(self)?;
        let header = self.header_at(&layout);
        header.encode().map_err(|error| self.header_error(error))?;
        Ok(header)
    }

    fn check_numbers(&self) -> block::Result<()> {
        if self.extended_l2 && self.version >= 3 && self.cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            return usage(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return usage(CLUSTER_SIZE);
        }
        if self.refcount_order > MAX_REFCOUNT_ORDER {
            return usage(REFCOUNT_WIDTH);
        }
        Ok(())
    }

    /// Version 2 can do less.
    fn check_version(&self) -> block::Result<()> {
        if self.version >= 3 {
            return Ok(());
        }
        let needs_version_3 = [
            (
                self.extended_l2,
                "Extended L2 entries are only supported with compatibility level 1.1 and above",
            ),
            (self.lazy_refcounts, "Lazy refcounts only supported with compatibility level 1.1 and above"),
            (
                self.refcount_order != 4,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above",
            ),
            (
                self.data_file.is_some(),
                "External data files are only supported with compatibility level 1.1 and above",
            ),
            (
                self.compression_type != COMPRESSION_ZLIB,
                "Non-zlib compression type is only supported with compatibility level 1.1 and above",
            ),
        ];
        match needs_version_3.iter().find(|(wanted, _)| *wanted) {
            Some((_, text)) => usage(&format!("{text} (use version=v3 or greater)")),
            None => Ok(()),
        }
    }

    fn check_combinations(&self) -> block::Result<()> {
        let backing = self.backing_file.is_some();
        if backing && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return usage(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        if self.backing_format.is_some() && !backing {
            return usage("Backing format cannot be used without backing file");
        }
        if self.data_file_raw && self.data_file.is_none() {
            return usage("data-file-raw requires data-file");
        }
        if self.data_file_raw && backing {
            return usage("Backing file and data-file-raw cannot be used at the same time");
        }
        Ok(())
    }

    fn header_at(&self, layout: &Layout) -> Header {
        let bit = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_bits,
            size: layout.disk_size,
            crypt_method: 0,
            l1_size: layout.l1_entries,
            l1_table_offset: layout.l1_offset,
            refcount_table_offset: self.geometry().cluster_size(),
            refcount_table_clusters: layout.table_clusters,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: bit(self.data_file.is_some(), incompatible::DATA_FILE)
                | bit(self.compression_type != COMPRESSION_ZLIB, incompatible::COMPRESSION)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: bit(self.data_file_raw, autoclear::DATA_FILE_RAW),
            refcount_order: self.refcount_order,
            header_length: if self.version >= 3 { V3_LENGTH } else { 72 },
            compression_type: self.compression_type,
            unknown_fields: vec![],
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            luks: None,
            feature_names: vec![],
            bitmaps: None,
            stale_bitmaps: false,
            unknown_extensions: vec![],
        };
        if header.wants_feature_names() {
            header.feature_names = feature_names();
        }
        header
    }

    /// QEMU writes the backing file's name in a second step and complains about that one.
    fn header_error(&self, error: Error) -> block::Error {
        let (Some(name), reason) = (&self.backing_file, strerror(&error)) else {
            return error.into();
        };
        let name = String::from_utf8_lossy(name);
        let format = String::from_utf8_lossy(self.backing_format.as_deref().unwrap_or_default());
        block::Error::usage(format!(
            "Could not assign backing file '{name}' with format '{format}': {reason}"
        ))
    }
}

const CLUSTER_SIZE: &str = "Cluster size must be a power of two between 512 and 2048k";
const REFCOUNT_WIDTH: &str = "Refcount width must be a power of two and may not exceed 64 bits";

fn usage<T>(message: &str) -> block::Result<T> {
    Err(block::Error::usage(message))
}

fn strerror(error: &Error) -> &'static str {
    match error {
        Error::HeaderFull => "No space left on device",
        _ => "Invalid argument",
    }
}

/// log2 of a cluster size in bytes.
///
/// # Errors
/// `Usage`: not a power of two from 512 bytes to 2 MiB.
pub fn cluster_bits(bytes: u64) -> block::Result<u32> {
    match bytes.is_power_of_two().then(|| bytes.trailing_zeros()) {
        Some(bits) if CLUSTER_BITS.contains(&bits) => Ok(bits),
        _ => usage(CLUSTER_SIZE),
    }
}

/// log2 of a refcount width in bits.
///
/// # Errors
/// `Usage`: not a power of two from 1 to 64.
pub fn refcount_order(bits: u64) -> block::Result<u32> {
    match bits.is_power_of_two().then(|| bits.trailing_zeros()) {
        Some(order) if order <= MAX_REFCOUNT_ORDER => Ok(order),
        _ => usage(REFCOUNT_WIDTH),
    }
}

/// The feature name table of new images.
pub fn feature_names() -> Vec<FeatureName> {
    const INCOMPATIBLE: [&str; 5] =
        ["dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries"];
    const COMPATIBLE: [&str; 1] = ["lazy refcounts"];
    const AUTOCLEAR: [&str; 2] = ["bitmaps", "raw external data"];
    let kinds = [&INCOMPATIBLE[..], &COMPATIBLE, &AUTOCLEAR];
    let table = (0..).zip(kinds).flat_map(|(kind, names)| {
        (0..).zip(names).map(move |(bit, name)| FeatureName { kind, bit, name: (*name).to_owned() })
    });
    table.collect()
}

/// Where everything in a new image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    geometry: Geometry,
    /// Virtual size in whole sectors.
    disk_size: u64,
    table_clusters: u32,
    /// Refcount blocks: one before the L1 table, the others behind it.
    blocks: u64,
    l1_entries: u32,
    /// 0 if there is no L1 table.
    l1_offset: u64,
    /// All clusters of the file.
    clusters: u64,
    file_len: u64,
}

impl Layout {
    fn new(options: &CreateOptions) -> block::Result<Self> {
        let too_large = || {
            block::Error::usage(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            )
        };
        let geometry = options.geometry();
        let disk_size = align_up(options.size, SECTOR).ok_or_else(too_large)?;
        let l1_entries = geometry.l1_entries_for(disk_size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        let (table_clusters, blocks) = refcount_clusters(&geometry, 1 + l1_clusters);
        if geometry.offset_of(table_clusters) > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large());
        }
        let clusters = 1 + table_clusters + blocks + l1_clusters;
        let l1_offset = geometry.offset_of(1 + table_clusters + 1);
        let l1_is_last = blocks == 1;
        let file_len = if l1_is_last { l1_offset + l1_entries * 8 } else { geometry.offset_of(clusters) };
        Ok(Self {
            geometry,
            disk_size,
            table_clusters: block::num::low_u32(table_clusters),
            blocks,
            l1_entries: block::num::low_u32(l1_entries),
            l1_offset: if l1_entries == 0 { 0 } else { l1_offset },
            clusters,
            file_len,
        })
    }

    /// The host cluster of a refcount block.
    fn block_cluster(&self, index: u64) -> u64 {
        match index {
            0 => 1 + u64::from(self.table_clusters),
            _ => self.clusters - self.blocks + index,
        }
    }

    fn write_refcounts(&self, storage: &dyn Storage) -> block::Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        let mut table = Vec::with_capacity(to_usize(self.blocks * 8));
        for index in 0..self.blocks {
            let counted = (self.clusters - index * per_block).min(per_block);
            let offset = self.geometry.offset_of(self.block_cluster(index));
            storage.write_at(&block_of_ones(&self.geometry, counted), offset)?;
            table.extend_from_slice(&offset.to_be_bytes());
        }
        storage.write_at(&table, self.geometry.cluster_size())
    }
}

/// Clusters of the refcount table and the number of blocks that count `others` clusters and themselves.
pub(crate) fn refcount_clusters(geometry: &Geometry, others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (0, 0);
    loop {
        let total = others + table + blocks;
        let wanted_blocks = total.div_ceil(geometry.refcount_block_entries());
        let wanted_table = geometry.clusters_for(wanted_blocks * 8);
        if (wanted_table, wanted_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (wanted_table, wanted_blocks);
    }
}

/// A refcount block whose first `count` counters are 1.
fn block_of_ones(geometry: &Geometry, count: u64) -> Vec<u8> {
    let mut block = vec![0; to_usize(geometry.cluster_size())];
    (0..count).for_each(|index| write_counter(&mut block, index, geometry.refcount_order, 1));
    block
}

/// Makes an empty image, whatever was in `storage` before. It is not flushed.
///
/// # Errors
/// `Usage` for options that cannot be had, in QEMU's words; `NoSpace`; or the host failed.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> block::Result<()> {
    let header = options.header()?;
    let layout = Layout::new(options)?;
    clear(storage, layout.file_len)?;
    layout.write_refcounts(storage)?;
    let mut first = header.encode()?;
    first.resize(to_usize(layout.geometry.cluster_size()), 0);
    storage.write_at(&first, 0)
}

/// Makes `len` bytes of zeros of the storage.
fn clear(storage: &dyn Storage, len: u64) -> block::Result<()> {
    if storage.fixed_len() {
        let present = storage.len()?;
        if present < len {
            let text = format!("the device has {present} bytes, an empty image takes {len}");
            return Err(block::Error::new(block::ErrorKind::NoSpace, text));
        }
        return storage.zero_range(0, len, ZeroMode::UNMAP);
    }
    storage.set_len(0)?;
    storage.set_len(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;
    use std::process::Command;

    fn made(options: &CreateOptions) -> Vec<u8> {
        let storage = MemStorage::from_bytes(b"something else was here".to_vec());
        create(&storage, options).unwrap();
        Header::read(&storage).unwrap();
        storage.to_bytes()
    }

    fn refused(change: impl FnOnce(&mut CreateOptions)) -> String {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        options.validate().unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_is_refused_in_qemus_words() {
        let v2 = "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)";
        assert_eq!(refused(|o| (o.version, o.lazy_refcounts) = (2, true)), v2);
        let text = "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes";
        assert_eq!(refused(|o| (o.cluster_bits, o.extended_l2) = (13, true)), text);
        assert_eq!(refused(|o| o.data_file_raw = true), "data-file-raw requires data-file");
        let text = "Backing format cannot be used without backing file";
        assert_eq!(refused(|o| o.backing_format = Some(b"raw".to_vec())), text);
        let text = "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
        assert_eq!(refused(|o| o.size = (2 << 50) + 1), text);
        assert_eq!(refused(|o| o.size = u64::MAX), text);
        assert_eq!(cluster_bits(500).unwrap_err().to_string(), CLUSTER_SIZE);
        assert_eq!(cluster_bits(4 << 20).unwrap_err().to_string(), CLUSTER_SIZE);
        assert_eq!(refcount_order(0).unwrap_err().to_string(), REFCOUNT_WIDTH);
    }

    #[test]
    fn a_backing_name_may_fill_the_first_cluster_to_its_last_byte() {
        let name = |len| {
            move |o: &mut CreateOptions| {
                o.cluster_bits = 9;
                o.backing_file = Some(vec![b'a'; len]);
                o.backing_format = Some(b"raw".to_vec());
            }
        };
        let mut fits = CreateOptions::new(1 << 20);
        name(376)(&mut fits);
        assert_eq!(made(&fits)[511], b'a');
        assert!(refused(name(377)).ends_with("with format 'raw': No space left on device"));
        assert!(refused(name(1024)).ends_with("with format 'raw': Invalid argument"));
    }

    /// The file that `qemu-img create` makes, or `None` (said loudly) where there is no qemu-img.
    fn qemus(options: &CreateOptions) -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image.qcow2");
        let on = |wanted| if wanted { "on" } else { "off" };
        let mut list = format!(
            "compat={},cluster_size={},refcount_bits={},lazy_refcounts={},extended_l2={},compression_type={}",
            if options.version == 2 { "0.10" } else { "1.1" },
            1u64 << options.cluster_bits,
            1u64 << options.refcount_order,
            on(options.lazy_refcounts),
            on(options.extended_l2),
            if options.compression_type == 1 { "zstd" } else { "zlib" },
        );
        if let Some(name) = &options.data_file {
            let name = String::from_utf8_lossy(name);
            list += &format!(",data_file={name},data_file_raw={}", on(options.data_file_raw));
        }
        let mut command = Command::new("qemu-img");
        command.current_dir(dir.path()).args(["create", "-q", "-f", "qcow2", "-u", "-o", &list]);
        if let Some(name) = &options.backing_file {
            command.args(["-b", &String::from_utf8_lossy(name), "-F", "raw"]);
        }
        let Ok(output) = command.arg(&file).arg(options.size.to_string()).output() else {
            eprintln!("SKIPPED: no qemu-img to compare with");
            return None;
        };
        assert!(output.status.success(), "{list}: {}", String::from_utf8_lossy(&output.stderr));
        Some(std::fs::read(file).unwrap())
    }

    fn matrix() -> Vec<CreateOptions> {
        let mut all = vec![];
        for size in [0, 1, 1 << 20, (1 << 30) + 512] {
            for cluster_bits in [9, 12, 13, 14, 16, 21] {
                let base = CreateOptions { cluster_bits, ..CreateOptions::new(size) };
                all.push(CreateOptions { version: 2, ..base.clone() });
                all.extend((0..=6).map(|refcount_order| CreateOptions { refcount_order, ..base.clone() }));
                all.push(CreateOptions { lazy_refcounts: true, compression_type: 1, ..base.clone() });
                if cluster_bits >= 14 {
                    all.push(CreateOptions { extended_l2: true, ..base.clone() });
                }
                let backing_file = Some(b"base.raw".to_vec());
                let backing_format = Some(b"raw".to_vec());
                all.push(CreateOptions { backing_file, backing_format, ..base });
            }
        }
        all
    }

    /// Byte for byte, where one refcount block is enough.
    #[test]
    fn an_image_is_what_qemu_img_makes() {
        for options in matrix() {
            let layout = Layout::new(&options).unwrap();
            if layout.blocks != 1 {
                continue;
            }
            let Some(theirs) = qemus(&options) else { return };
            let ours = made(&options);
            assert!(ours == theirs, "{options:?}: {} and {} bytes", ours.len(), theirs.len());
        }
    }

    /// The header says what qemu-img says; the data file is somebody else's.
    #[test]
    fn an_image_with_a_data_file_has_qemus_header() {
        let data_file = Some(b"data.raw".to_vec());
        let options = CreateOptions { data_file, ..CreateOptions::new(1 << 20) };
        let Some(theirs) = qemus(&options) else { return };
        assert!(made(&options) == theirs);
    }

    /// Images whose L1 table takes more than one refcount block: every cluster is counted once.
    #[test]
    fn gigantic_disks_have_exact_refcounts() {
        for (size, cluster_bits, refcount_order) in [
            (512 << 20, 9, 4),
            (8 << 30, 9, 4),
            (1 << 30, 9, 6),
            (8 << 40, 12, 6),
            (128 << 30, 9, 6),
            (128 << 30, 9, 0),
        ] {
            let options = CreateOptions { cluster_bits, refcount_order, ..CreateOptions::new(size) };
            let layout = Layout::new(&options).unwrap();
            let bytes = made(&options);
            assert_eq!(bytes.len() as u64, layout.file_len);
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("image.qcow2");
            std::fs::write(&file, bytes).unwrap();
            let Ok(output) = Command::new("qemu-img").arg("check").arg(&file).output() else {
                eprintln!("SKIPPED: no qemu-img to compare with");
                return;
            };
            assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
