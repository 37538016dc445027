//! Header extensions (specification, "Header extensions").
//!
//! They follow the header in the first cluster: a type, a length, the contents, padding to 8 bytes. Types
//! that are not known are kept as they are, in their order, and written back behind the known ones.

use block::codec::{Reader, Writer};

use crate::error::{Error, Result};
use crate::header::Header;

/// Ends the list.
const END: u32 = 0;
/// Format name of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Persistent dirty bitmaps.
const BITMAPS: u32 = 0x2385_2875;
/// Where the LUKS header is.
const LUKS: u32 = 0x0537_be77;
/// Name of the external data file.
const DATA_FILE: u32 = 0x4441_5441;

/// QEMU's limit for the length of the backing format's name.
const MAX_FORMAT_NAME: usize = 15;
/// Bytes of an entry of the feature name table.
const FEATURE_ENTRY: usize = 48;
/// Bytes of a feature's name, at most.
pub const MAX_FEATURE_NAME: usize = 46;
/// QEMU's limit for the number of bitmaps in an image.
pub const MAX_BITMAPS: u32 = 65_535;
/// QEMU's limit for the bitmap directory in bytes.
pub const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;

/// A feature bit's name, from the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Bit number.
    pub bit: u8,
    /// The name.
    pub name: String,
}

impl FeatureName {
    fn parse(entry: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(entry);
        let (kind, bit) = (reader.u8()?, reader.u8()?);
        let name = reader.take(MAX_FEATURE_NAME)?.split(|&byte| byte == 0).next()?;
        Some(Self { kind, bit, name: String::from_utf8_lossy(name).into_owned() })
    }

    fn encode(&self, writer: &mut Writer) {
        let mut name = [0; MAX_FEATURE_NAME];
        let len = self.name.len().min(MAX_FEATURE_NAME);
        name[..len].copy_from_slice(&self.name.as_bytes()[..len]);
        writer.u8(self.kind).u8(self.bit).bytes(&name);
    }
}

/// Reads the feature name table out of the extensions in `area`, if there is one that can be read; other
/// faults are left to whoever parses the extensions for good. For the refusal of unknown features, which
/// must come before everything that depends on them.
pub fn find_feature_names(area: &[u8]) -> Vec<FeatureName> {
    let mut names = vec![];
    let mut reader = Reader::new(area);
    while let Ok(Some((kind, data))) = next(&mut reader) {
        if kind == FEATURE_NAMES {
            names = parse_feature_names(data);
        }
    }
    names
}

fn parse_feature_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks_exact(FEATURE_ENTRY).filter_map(FeatureName::parse).collect()
}

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Length of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Host offset of the bitmap directory.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    fn parse(data: &[u8], cluster_size: u64) -> Result<Self> {
        let bad = |text: String| Error::Extension(text);
        let mut reader = Reader::new(data);
        let fields = || Some((reader.be_u32()?, reader.be_u32()?, reader.be_u64()?, reader.be_u64()?));
        let (count, reserved, directory_size, directory_offset) =
            { fields }().ok_or_else(|| bad("bitmaps_ext: Invalid extension length".into()))?;
        if reserved != 0 {
            return Err(bad("bitmaps_ext: Reserved field is not zero".into()));
        }
        if count > MAX_BITMAPS {
            return Err(bad(format!(
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            )));
        }
        if count == 0 {
            return Err(bad("found bitmaps extension with zero bitmaps".into()));
        }
        if !block::num::is_aligned(directory_offset, cluster_size) {
            return Err(bad("bitmaps_ext: invalid bitmap directory offset".into()));
        }
        if directory_size > MAX_BITMAP_DIRECTORY {
            return Err(bad(format!(
                "bitmaps_ext: bitmap directory size ({directory_size}) exceeds the maximum supported size \
                 ({MAX_BITMAP_DIRECTORY})"
            )));
        }
        Ok(Self { count, directory_size, directory_offset })
    }

    fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.be_u32(self.count).be_u32(0).be_u64(self.directory_size).be_u64(self.directory_offset);
        writer.into_bytes()
    }
}

/// The next extension's type and contents; `None` at the end.
fn next<'a>(reader: &mut Reader<'a>) -> Result<Option<(u32, &'a [u8])>> {
    let Some((kind, len)) = reader.be_u32().zip(reader.be_u32()) else {
        return Ok(None);
    };
    let data = usize::try_from(len).ok().and_then(|len| reader.take(len)).ok_or(Error::ExtensionTooLarge)?;
    if kind == END {
        return Ok(None);
    }
    // The padding may be cut off by the end of the area.
    let padding = data.len().next_multiple_of(8) - data.len();
    reader.skip(padding.min(reader.remaining()));
    Ok(Some((kind, data)))
}

/// Parses the extensions in `area`, which reaches from the end of the header to the backing file name or
/// the end of the cluster, into `header`, whose fixed fields are there already. Of several extensions of one
/// type the last one counts, as in QEMU.
///
/// # Errors
/// An extension that reaches past the area or whose contents cannot be.
pub fn parse(area: &[u8], header: &mut Header) -> Result<()> {
    let mut reader = Reader::new(area);
    while let Some((kind, data)) = next(&mut reader)? {
        match kind {
            BACKING_FORMAT => header.backing_format = Some(backing_format(data)?),
            FEATURE_NAMES => header.feature_names = parse_feature_names(data),
            BITMAPS => bitmaps(data, header)?,
            LUKS => header.luks = Some(luks(data, header)?),
            DATA_FILE => header.data_file = Some(data.to_vec()),
            _ => header.unknown_extensions.push((kind, data.to_vec())),
        }
    }
    Ok(())
}

fn backing_format(data: &[u8]) -> Result<Vec<u8>> {
    if data.len() > MAX_FORMAT_NAME {
        let text = format!("ERROR: ext_backing_format: len={} too large (>=16)", data.len());
        return Err(Error::Extension(text));
    }
    Ok(data.to_vec())
}

/// Without the autoclear bit the bitmaps have been left behind by a program that does not know them: they
/// are not looked at, and gone when the header is next written (specification, "Bitmaps extension").
fn bitmaps(data: &[u8], header: &mut Header) -> Result<()> {
    if data.len() != 24 {
        return Err(Error::Extension("bitmaps_ext: Invalid extension length".into()));
    }
    if header.autoclear & crate::features::autoclear::BITMAPS == 0 {
        header.stale_bitmaps = true;
        return Ok(());
    }
    header.bitmaps = Some(BitmapsExtension::parse(data, header.geometry().cluster_size())?);
    Ok(())
}

fn luks(data: &[u8], header: &Header) -> Result<(u64, u64)> {
    if header.crypt_method != crate::header::CRYPT_LUKS {
        let text = "CRYPTO header extension only expected with LUKS encryption method";
        return Err(Error::Extension(text.into()));
    }
    let mut reader = Reader::new(data);
    let (Some((offset, len)), 0) = (reader.be_u64().zip(reader.be_u64()), reader.remaining()) else {
        let text = format!("CRYPTO header extension size {}, but expected size 16", data.len());
        return Err(Error::Extension(text));
    };
    let cluster_size = header.geometry().cluster_size();
    if !block::num::is_aligned(offset, cluster_size) {
        let text =
            format!("Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'");
        return Err(Error::Extension(text));
    }
    Ok((offset, len))
}

/// Writes the extensions of `header` in QEMU's order, the end marker included.
pub fn encode(header: &Header, writer: &mut Writer) {
    if let Some(format) = &header.backing_format {
        put(writer, BACKING_FORMAT, format);
    }
    if let Some(name) = &header.data_file {
        put(writer, DATA_FILE, name);
    }
    if let Some((offset, len)) = header.luks {
        let mut data = Writer::new();
        data.be_u64(offset).be_u64(len);
        put(writer, LUKS, &data.into_bytes());
    }
    if !header.feature_names.is_empty() {
        let mut data = Writer::new();
        header.feature_names.iter().for_each(|feature| feature.encode(&mut data));
        put(writer, FEATURE_NAMES, &data.into_bytes());
    }
    if let Some(bitmaps) = &header.bitmaps {
        put(writer, BITMAPS, &bitmaps.encode());
    }
    for (kind, data) in &header.unknown_extensions {
        put(writer, *kind, data);
    }
    writer.be_u32(END).be_u32(0);
}

fn put(writer: &mut Writer, kind: u32, data: &[u8]) {
    // All of them have to fit a cluster of at most 2 MiB, which `Header::encode` checks.
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    writer.be_u32(kind).be_u32(len).bytes(data);
    let padding = data.len().next_multiple_of(8) - data.len();
    writer.bytes(&[0; 8][..padding]);
}
