//! What an image says of itself beyond what all formats have: the format-specific part of `info`.

use block::image::Value;

use crate::bitmap::Bitmap;
use crate::device::Qcow2;
use crate::features::{compatible, incompatible};
use crate::header::{COMPRESSION_ZSTD, Header};

impl Qcow2 {
    /// The keys of `info`'s format-specific part, in QEMU's order.
    pub(crate) fn specific_info(&self, header: &Header) -> Vec<(&'static str, Value)> {
        let compression = if header.compression_type == COMPRESSION_ZSTD { "zstd" } else { "zlib" };
        let compat = if header.version == 2 { "0.10" } else { "1.1" };
        let text = |text: &str| Value::Text(text.to_owned());
        let mut keys = vec![("compat", text(compat)), ("compression-type", text(compression))];
        if header.version >= 3 {
            let lazy = header.compatible & compatible::LAZY_REFCOUNTS != 0;
            keys.push(("lazy-refcounts", Value::Bool(lazy)));
            let bitmaps = self.bitmaps.read();
            if !bitmaps.is_empty() {
                keys.push(("bitmaps", Value::List(bitmaps.iter().map(bitmap_value).collect())));
            }
        }
        keys.push(("refcount-bits", Value::Int(1 << header.refcount_order)));
        if let Some(name) = &header.data_file {
            keys.push(("data-file", text(&String::from_utf8_lossy(name))));
        }
        if header.crypt_method == 1 {
            keys.push(("encrypt", Value::Map(vec![("format", text("aes"))])));
        }
        if header.crypt_method == 2 {
            keys.push(("encrypt", Value::Map(vec![("format", text("luks"))])));
        }
        if header.version >= 3 {
            if self.external {
                keys.push(("data-file-raw", Value::Bool(self.external_raw)));
            }
            keys.push(("corrupt", Value::Bool(header.has(incompatible::CORRUPT))));
            keys.push(("extended-l2", Value::Bool(self.geometry.extended_l2)));
        }
        keys
    }
}

fn bitmap_value(bitmap: &Bitmap) -> Value {
    let flags = [("in-use", bitmap.in_use()), ("auto", bitmap.auto())];
    let flags =
        flags.iter().filter(|(_, set)| *set).map(|(name, _)| Value::Text((*name).to_owned())).collect();
    Value::Map(vec![
        ("flags", Value::List(flags)),
        ("name", Value::Text(bitmap.display_name())),
        ("granularity", Value::Int(i64::try_from(bitmap.granularity()).unwrap_or(i64::MAX))),
    ])
}
