//! How large a file will be: the document of `measure`.

use block::extent::extents;
use block::num::{align_down, align_up};
use block::{Error, Result, Stored};
use serde_json::{Map, Value};

use crate::create::make;
use crate::format::Format;
use crate::open::Layer;
use crate::options::Options;
use crate::secret::Secrets;

/// What a conversion needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measurement {
    /// Bytes for the data there is now.
    pub required: u64,
    /// Bytes when everything has been written.
    pub fully_allocated: u64,
    /// Bytes for the bitmaps of the source, if source and target both can have some.
    pub bitmaps: Option<u64>,
}

impl Measurement {
    /// As JSON, keys in qemu-img's order.
    pub fn to_json(&self) -> Value {
        let mut document = Map::new();
        if let Some(bitmaps) = self.bitmaps {
            document.insert("bitmaps".to_owned(), bitmaps.into());
        }
        document.insert("required".to_owned(), self.required.into());
        document.insert("fully-allocated".to_owned(), self.fully_allocated.into());
        Value::Object(document)
    }

    /// As text, two or three lines.
    pub fn to_text(&self) -> String {
        let bitmaps = self.bitmaps.map_or_else(String::new, |bytes| format!("bitmaps size: {bytes}\n"));
        format!("required size: {}\nfully allocated size: {}\n{bitmaps}", self.required, self.fully_allocated)
    }
}

/// What is to be measured.
#[derive(Debug, Clone, Copy)]
pub enum Subject<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// The disk of an image.
    Image(&'a Layer),
}

/// The creation options that a measurement can be given: those of the format on a file.
///
/// # Errors
/// Options that do not exist, or values that are none, in qemu's words.
pub fn target_options(format: Format, given: &[(String, String)]) -> Result<Options> {
    Options::new(crate::options::of_target(format, ""), given)
}

/// Measures `subject` in `format` with creation options, which may refer to secrets.
///
/// # Errors
/// Options that make no sense, a disk that is too large, or the source cannot be read.
pub fn measure(
    subject: Subject<'_>,
    format: Format,
    options: &Options,
    secrets: &Secrets,
) -> Result<Measurement> {
    let size = match subject {
        Subject::Size(size) => size,
        Subject::Image(layer) => layer.image.size(),
    };
    match format {
        Format::Raw => {
            let size = align_up(size, 512).unwrap_or(size);
            Ok(Measurement { required: size, fully_allocated: size, bitmaps: None })
        }
        Format::Luks => make::measured_luks(size, options, secrets),
        _ if crate::formats::driver(format).is_some() => {
            Err(Error::unsupported(format!("Block driver '{format}' does not support size measurement")))
        }
        _ => measure_qcow2(subject, size, options, secrets),
    }
}

fn measure_qcow2(
    subject: Subject<'_>,
    size: u64,
    options: &Options,
    secrets: &Secrets,
) -> Result<Measurement> {
    let encryption = make::Encryption::new(options, secrets)?;
    let target = make::measured_options(size, options)?;
    let geometry = target.geometry();
    let everything = target.backing_file.is_some()
        || matches!(target.preallocation, block::Preallocation::Falloc | block::Preallocation::Full);
    let allocated = match subject {
        _ if everything => size,
        Subject::Size(_) => 0,
        Subject::Image(layer) => allocated_bytes(layer, geometry.cluster_size())?,
    };
    let measured = qcow2::measure::measure(&geometry, size, allocated)?;
    let bitmaps = match subject {
        Subject::Image(layer) if target.version >= 3 => bitmap_bytes(layer, size, geometry.cluster_size()),
        _ => None,
    };
    let header = encryption.map_or(0, |encryption| encryption.header_len());
    let header = header.next_multiple_of(geometry.cluster_size());
    Ok(Measurement {
        required: measured.required + header,
        fully_allocated: measured.fully_allocated + header,
        bitmaps,
    })
}

/// Bytes of the clusters of the target that will hold data.
fn allocated_bytes(layer: &Layer, cluster: u64) -> Result<u64> {
    let device = layer.device();
    let (mut bytes, mut counted_to) = (0, 0);
    for extent in extents(&*device, 0, device.size()) {
        let extent = extent?;
        if extent.zero || extent.stored == Stored::Absent {
            continue;
        }
        let start = align_down(extent.offset, cluster).max(counted_to);
        let end = align_up(extent.end(), cluster).unwrap_or(u64::MAX);
        bytes += end.saturating_sub(start);
        counted_to = counted_to.max(end);
    }
    Ok(bytes)
}

/// Bytes that the bitmaps of a qcow2 source take in a target with clusters of `cluster` bytes, if all their bits
/// are set. `None`: the source has no room for bitmaps at all.
fn bitmap_bytes(layer: &Layer, size: u64, cluster: u64) -> Option<u64> {
    let source = layer.qcow2.as_ref().filter(|source| source.header().version >= 3)?;
    let mut directory = 0;
    let mut total: u64 = 0;
    for bitmap in source.bitmaps() {
        let bits = size.div_ceil(bitmap.granularity());
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Some(total + directory.next_multiple_of(cluster))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(size: u64, format: Format, given: &[(&str, &str)]) -> Measurement {
        let given: Vec<_> =
            given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        measure(Subject::Size(size), format, &target_options(format, &given).unwrap(), &Secrets::default())
            .unwrap()
    }

    #[test]
    fn raw_files_are_whole_sectors() {
        let text = measured(1000, Format::Raw, &[]).to_text();
        assert_eq!(text, "required size: 1024\nfully allocated size: 1024\n");
    }

    #[test]
    fn an_empty_qcow2_image_is_its_tables() {
        let empty = measured(1 << 30, Format::Qcow2, &[]);
        assert_eq!((empty.required, empty.fully_allocated), (393_216, 1_074_135_040));
        let full = measured(1 << 30, Format::Qcow2, &[("preallocation", "full")]);
        assert_eq!(full.required, full.fully_allocated);
    }
}
