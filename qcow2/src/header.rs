//! The header of an image (specification, "Header").
//!
//! Bytes become a [`Header`] only after every field has been held against the format's rules and QEMU's
//! limits; the rest of the crate relies on that and does not check again. [`Header::encode`] gives the whole
//! first cluster as QEMU would write it: unknown fields and extensions are kept.

mod replace;

use block::Storage;
use block::codec::{Reader, Writer};
use block::num::{is_aligned, to_usize};

use crate::error::{Error, Result};
use crate::extension;
use crate::features::{autoclear, incompatible};
use crate::geometry::{CLUSTER_BITS, Geometry, MAX_L1_BYTES, MAX_REFCOUNT_ORDER, MAX_REFCOUNT_TABLE_BYTES};

pub(crate) use replace::patch_first_sector;

/// "QFI\xfb".
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
const V2_LENGTH: u32 = 72;
/// Bytes of a version 3 header at least.
const V3_MIN_LENGTH: u32 = 104;
/// Bytes of a version 3 header up to the last field known here, as written.
pub const V3_LENGTH: u32 = 112;
/// Longest name of a backing file in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Most snapshots of an image (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// `crypt_method` of the old AES encryption.
pub const CRYPT_AES: u32 = 1;
/// `crypt_method` of LUKS.
pub const CRYPT_LUKS: u32 = 2;
/// Clusters up to this size have no room for the feature name table (QEMU's rule).
const NO_FEATURE_NAMES: u64 = 4096;

/// Deflate, the compression type of images without the compression feature bit.
pub const COMPRESSION_ZLIB: u8 = 0;
/// Zstandard.
pub const COMPRESSION_ZSTD: u8 = 1;

/// A validated header: every field is within the format's and QEMU's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Host offset of the active L1 table.
    pub l1_table_offset: u64,
    /// Host offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Incompatible feature bits ([`features::incompatible`](crate::features::incompatible)); 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// log2 of the refcount width in bits; 4 in version 2.
    pub refcount_order: u32,
    /// Length of the header in bytes as found (72 in version 2).
    pub header_length: u32,
    /// [`COMPRESSION_ZLIB`] or [`COMPRESSION_ZSTD`].
    pub compression_type: u8,
    /// Header bytes behind the fields known here, kept as they are.
    pub unknown_fields: Vec<u8>,
    /// Name of the backing file, as stored (not necessarily UTF-8).
    pub backing_file: Option<Vec<u8>>,
    /// Format name of the backing file.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// Host offset and length of the LUKS header.
    pub luks: Option<(u64, u64)>,
    /// The feature name table.
    pub feature_names: Vec<extension::FeatureName>,
    /// The bitmaps extension, if its autoclear bit is set.
    pub bitmaps: Option<extension::BitmapsExtension>,
    /// There is a bitmaps extension without its autoclear bit: its bitmaps are out of date. It is not kept
    /// when the header is written.
    pub stale_bitmaps: bool,
    /// Extensions of unknown type, kept as they are, in order.
    pub unknown_extensions: Vec<(u32, Vec<u8>)>,
}

/// How much damage a reader of the header puts up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// None.
    Strict,
    /// Tables that lie past the end of the file, a missing refcount table, too many snapshots: `check` reports them.
    ForCheck,
}

impl Header {
    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.has(incompatible::EXTENDED_L2),
        }
    }

    /// Whether an incompatible feature bit is set.
    pub fn has(&self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }

    /// Whether guest data lives in an external file.
    pub fn has_data_file(&self) -> bool {
        self.has(incompatible::DATA_FILE)
    }

    /// Whether the external data file is a raw copy of the disk.
    pub fn data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Whether `first_bytes` (8 are enough) begin an image of this format, of whatever version.
    pub fn probe(first_bytes: &[u8]) -> bool {
        let mut reader = Reader::new(first_bytes);
        reader.take(4) == Some(&MAGIC) && reader.be_u32().is_some_and(|version| version >= 2)
    }

    /// Reads and validates the header.
    ///
    /// # Errors
    /// What is wrong with it, in QEMU's words; `Truncated` if the file ends before a table that the header
    /// points to (QEMU reads zeros there); or the host failed.
    pub fn read(storage: &dyn Storage) -> block::Result<Self> {
        Self::read_with(storage, Strictness::Strict)
    }

    /// Reads the header of an image that is to be checked.
    ///
    /// # Errors
    /// As [`read`](Self::read), except for damage that a check reports and may repair.
    pub fn read_for_check(storage: &dyn Storage) -> block::Result<Self> {
        Self::read_with(storage, Strictness::ForCheck)
    }

    fn read_with(storage: &dyn Storage, strictness: Strictness) -> block::Result<Self> {
        let file_len = storage.len()?;
        let mut first = vec![0; to_usize(file_len.min(u64::from(V3_LENGTH)))];
        storage.read_at(&mut first, 0)?;
        let fixed = Fixed::parse(&first)?;
        let mut cluster = vec![0; to_usize(fixed.geometry().cluster_size())];
        storage.read_at(&mut cluster, 0)?;
        Ok(Self::parse(&cluster, file_len, strictness)?)
    }

    /// Validates the first cluster of a file of `file_len` bytes. `cluster` may be longer or, where the file
    /// is, shorter; missing bytes count as zeros.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(cluster: &[u8], file_len: u64, strictness: Strictness) -> Result<Self> {
        let present = cluster.get(..to_usize(file_len.min(cluster.len() as u64))).unwrap_or(cluster);
        let mut header = Fixed::parse(present)?;
        let cluster_size = to_usize(header.geometry().cluster_size());
        let mut padded;
        let cluster = if let Some(cluster) = cluster.get(..cluster_size) {
            cluster
        } else {
            padded = cluster.to_vec();
            padded.resize(cluster_size, 0);
            &padded
        };
        let area = header.extension_area(cluster);
        header.check_features(area)?;
        header.check_tables(strictness)?;
        extension::parse(area, &mut header.header)?;
        header.finish(cluster, file_len, strictness)
    }

    /// The first cluster up to the end of the backing file's name, as QEMU writes it (what follows is zeros).
    ///
    /// # Errors
    /// [`Error::HeaderFull`] if it does not fit; [`Error::BackingNameTooLong`].
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut extensions = Writer::new();
        extension::encode(self, &mut extensions);
        let mut writer = Writer::new();
        let length = self.encoded_length();
        let name = self.backing_file.as_deref().unwrap_or_default();
        let name_len = u32::try_from(name.len()).unwrap_or(u32::MAX);
        if name_len > MAX_BACKING_NAME {
            return Err(Error::BackingNameTooLong(name_len));
        }
        let name_offset = if name.is_empty() { 0 } else { u64::from(length) + extensions.len() as u64 };
        writer.bytes(&MAGIC).be_u32(self.version).be_u64(name_offset).be_u32(name_len);
        self.encode_fixed(&mut writer, length);
        writer.bytes(&extensions.into_bytes()).bytes(name);
        if writer.len() as u64 > self.geometry().cluster_size() {
            return Err(Error::HeaderFull);
        }
        Ok(writer.into_bytes())
    }

    /// The length of the header that [`encode`](Self::encode) writes: all fields known here are there.
    fn encoded_length(&self) -> u32 {
        if self.version < 3 {
            return V2_LENGTH;
        }
        let unknown = u32::try_from(self.unknown_fields.len()).unwrap_or(u32::MAX);
        V3_LENGTH.saturating_add(unknown)
    }

    fn encode_fixed(&self, writer: &mut Writer, length: u32) {
        writer.be_u32(self.cluster_bits).be_u64(self.size).be_u32(self.crypt_method);
        writer.be_u32(self.l1_size).be_u64(self.l1_table_offset);
        writer.be_u64(self.refcount_table_offset).be_u32(self.refcount_table_clusters);
        writer.be_u32(self.nb_snapshots).be_u64(self.snapshots_offset);
        if self.version < 3 {
            return;
        }
        writer.be_u64(self.incompatible).be_u64(self.compatible).be_u64(self.autoclear);
        writer.be_u32(self.refcount_order).be_u32(length);
        writer.u8(self.compression_type).bytes(&[0; 7]).bytes(&self.unknown_fields);
    }

    /// Whether QEMU would put a feature name table into this header.
    pub fn wants_feature_names(&self) -> bool {
        self.version >= 3 && self.geometry().cluster_size() > NO_FEATURE_NAMES
    }
}

/// A header on its way to being trusted: the fixed fields have been read, with the checks that reading the
/// rest depends on.
struct Fixed {
    header: Header,
    backing_offset: u64,
    backing_len: u32,
}

impl std::ops::Deref for Fixed {
    type Target = Header;
    fn deref(&self) -> &Header {
        &self.header
    }
}

impl Fixed {
    /// Reads the fixed fields, checking in QEMU's order up to the backing file's offset.
    fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Error::NotQcow2);
        }
        let mut reader = Reader::new(bytes);
        let mut fixed = Self::parse_v2(&mut reader).ok_or(Error::HeaderTooShort)?;
        match fixed.version {
            2 => {}
            3 => fixed.parse_v3(&mut reader).ok_or(Error::HeaderTooShort)?,
            other => return Err(Error::Version(other)),
        }
        fixed.check_lengths()?;
        Ok(fixed)
    }

    fn parse_v2(reader: &mut Reader<'_>) -> Option<Self> {
        reader.skip(4)?;
        let version = reader.be_u32()?;
        let backing_offset = reader.be_u64()?;
        let backing_len = reader.be_u32()?;
        let header = Header {
            version,
            cluster_bits: reader.be_u32()?,
            size: reader.be_u64()?,
            crypt_method: reader.be_u32()?,
            l1_size: reader.be_u32()?,
            l1_table_offset: reader.be_u64()?,
            refcount_table_offset: reader.be_u64()?,
            refcount_table_clusters: reader.be_u32()?,
            nb_snapshots: reader.be_u32()?,
            snapshots_offset: reader.be_u64()?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_LENGTH,
            compression_type: COMPRESSION_ZLIB,
            unknown_fields: vec![],
            backing_file: None,
            backing_format: None,
            data_file: None,
            luks: None,
            feature_names: vec![],
            bitmaps: None,
            stale_bitmaps: false,
            unknown_extensions: vec![],
        };
        Some(Self { header, backing_offset, backing_len })
    }

    fn parse_v3(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        let header = &mut self.header;
        header.incompatible = reader.be_u64()?;
        header.compatible = reader.be_u64()?;
        header.autoclear = reader.be_u64()?;
        header.refcount_order = reader.be_u32()?;
        header.header_length = reader.be_u32()?;
        if header.header_length > V3_MIN_LENGTH {
            header.compression_type = reader.u8()?;
        }
        Some(())
    }

    fn check_lengths(&self) -> Result<()> {
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return Err(Error::ClusterBits(self.cluster_bits));
        }
        if self.version >= 3 && self.header_length < V3_MIN_LENGTH {
            return Err(Error::HeaderTooShort);
        }
        let cluster_size = self.geometry().cluster_size();
        if u64::from(self.header_length) > cluster_size {
            return Err(Error::HeaderTooLong);
        }
        if !self.header_length.is_multiple_of(8) {
            return Err(Error::HeaderLengthUnaligned(self.header_length));
        }
        if self.backing_offset > cluster_size {
            return Err(Error::BackingOffset(self.backing_offset));
        }
        Ok(())
    }

    /// The bytes between the header and the backing file's name or the end of the cluster.
    fn extension_area<'a>(&self, cluster: &'a [u8]) -> &'a [u8] {
        let start = to_usize(self.header_length.into());
        let end = if self.backing_offset != 0 { to_usize(self.backing_offset) } else { cluster.len() };
        cluster.get(start..end).unwrap_or_default()
    }

    fn check_features(&self, area: &[u8]) -> Result<()> {
        let wanted = self.compression_type != COMPRESSION_ZLIB;
        if self.has(incompatible::COMPRESSION) != wanted {
            return Err(Error::CompressionBit { wanted });
        }
        if self.compression_type > COMPRESSION_ZSTD {
            return Err(Error::CompressionType(self.compression_type));
        }
        let bits = self.incompatible & !incompatible::KNOWN;
        if bits != 0 {
            return Err(Error::Features { bits, names: name_features(bits, area) });
        }
        let geometry = self.geometry();
        if geometry.extended_l2 && geometry.subcluster_size() < 512 {
            return Err(Error::SubclusterSize(geometry.subcluster_size()));
        }
        if self.refcount_order > MAX_REFCOUNT_ORDER {
            return Err(Error::RefcountOrder(self.refcount_order));
        }
        if self.crypt_method > CRYPT_LUKS {
            return Err(Error::CryptMethod(self.crypt_method));
        }
        Ok(())
    }

    fn check_tables(&self, strictness: Strictness) -> Result<()> {
        self.check_refcount_table(strictness)?;
        if self.nb_snapshots > MAX_SNAPSHOTS && strictness == Strictness::Strict {
            return Err(Error::TooManySnapshots(self.nb_snapshots));
        }
        if !self.valid_table(self.snapshots_offset, u64::from(self.nb_snapshots)) {
            return Err(Error::SnapshotTableOffset(self.snapshots_offset));
        }
        self.check_l1_table(strictness)
    }

    fn check_refcount_table(&self, strictness: Strictness) -> Result<()> {
        let clusters = self.refcount_table_clusters;
        if clusters == 0 && strictness == Strictness::Strict {
            return Err(Error::NoRefcountTable);
        }
        let bytes = self.refcount_table_bytes();
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::RefcountTableTooLarge { clusters });
        }
        let on_header = self.refcount_table_offset == 0 && strictness == Strictness::Strict;
        if on_header || !self.valid_table(self.refcount_table_offset, bytes) {
            return Err(Error::RefcountTableOffset(self.refcount_table_offset));
        }
        Ok(())
    }

    fn refcount_table_bytes(&self) -> u64 {
        self.geometry().offset_of(self.refcount_table_clusters.into())
    }

    fn check_l1_table(&self, strictness: Strictness) -> Result<()> {
        let entries = self.l1_size;
        let bytes = u64::from(entries) * 8;
        if bytes > MAX_L1_BYTES {
            return Err(Error::L1TooLarge { entries });
        }
        let on_header = self.l1_table_offset == 0 && entries != 0 && strictness == Strictness::Strict;
        if on_header || !self.valid_table(self.l1_table_offset, bytes) {
            return Err(Error::L1Offset(self.l1_table_offset));
        }
        let needed = self.geometry().l1_entries_for(self.size);
        if needed > i32::MAX.unsigned_abs().into() {
            return Err(Error::TooBig { size: self.size });
        }
        if u64::from(entries) < needed {
            return Err(Error::L1TooSmall { entries, needed });
        }
        Ok(())
    }

    /// Whether a table of `bytes` can be at `offset` at all.
    fn valid_table(&self, offset: u64, bytes: u64) -> bool {
        let end = offset.checked_add(bytes);
        is_aligned(offset, self.geometry().cluster_size())
            && end.is_some_and(|end| i64::try_from(end).is_ok())
    }

    /// What is left when the extensions have been read.
    fn finish(mut self, cluster: &[u8], file_len: u64, strictness: Strictness) -> Result<Header> {
        if self.header_length > V3_LENGTH {
            let unknown = to_usize(V3_LENGTH.into())..to_usize(self.header_length.into());
            self.header.unknown_fields = cluster.get(unknown).unwrap_or_default().to_vec();
        }
        if self.crypt_method == CRYPT_LUKS && self.luks.is_none() {
            return Err(Error::NoCryptoHeader(self.crypt_method));
        }
        self.header.backing_file = self.backing_name(cluster)?;
        if strictness == Strictness::Strict {
            self.check_tables_in_file(file_len)?;
        }
        Ok(self.header)
    }

    fn backing_name(&self, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
        if self.backing_offset == 0 {
            return Ok(None);
        }
        let start = to_usize(self.backing_offset);
        let end = start + to_usize(self.backing_len.into());
        match cluster.get(start..end) {
            Some([]) => Ok(None),
            Some(name) if self.backing_len <= MAX_BACKING_NAME => Ok(Some(name.to_vec())),
            _ => Err(Error::BackingNameTooLong(self.backing_len)),
        }
    }

    /// QEMU reads zeros past the end of the file, which makes a disk of zeros out of a file that has been cut
    /// off. The last cluster of a file may be there in part only: the part that is used has to be.
    fn check_tables_in_file(&self, file_len: u64) -> Result<()> {
        let inside = |what, offset: u64, len: u64| match offset + len <= file_len {
            true => Ok(()),
            false => Err(Error::OutsideFile { what, offset, len, file_len }),
        };
        inside("refcount table", self.refcount_table_offset, self.used_refcount_table_bytes(file_len))?;
        inside("active L1 table", self.l1_table_offset, u64::from(self.l1_size) * 8)
    }

    /// Bytes of the refcount table that count clusters of the file.
    fn used_refcount_table_bytes(&self, file_len: u64) -> u64 {
        let geometry = self.geometry();
        let blocks = geometry.clusters_for(file_len).div_ceil(geometry.refcount_block_entries());
        (blocks * 8).min(self.refcount_table_bytes())
    }
}

/// Names unknown incompatible features as QEMU does: those in the image's table by name, the others together
/// by their hexadecimal mask.
fn name_features(bits: u64, area: &[u8]) -> String {
    let mut unnamed = bits;
    let mut names = vec![];
    for feature in extension::find_feature_names(area) {
        let bit = 1u64.checked_shl(feature.bit.into()).unwrap_or(0);
        if feature.kind == 0 && bits & bit != 0 {
            unnamed &= !bit;
            names.push(printable(&feature.name));
        }
    }
    if unnamed != 0 {
        names.push(format!("Unknown incompatible feature: {unnamed:x}"));
    }
    names.join(", ")
}

/// The name comes from the file: no control characters reach the terminal.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests;
