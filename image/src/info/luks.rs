//! The LUKS header of an encrypted image, as far as `info` shows it (LUKS1 on-disk format, version 1.2.3).

use block::image::{ImageInfo, Value};
use block::num::to_usize;
use block::{Result, Storage};

use crate::open::Layer;

/// Bytes of a LUKS1 header.
const HEADER_LEN: usize = 592;
/// Where the key slots begin, and what one takes.
const SLOTS_OFFSET: usize = 208;
const SLOT_LEN: usize = 48;
/// Key slots of a header.
const SLOTS: usize = 8;
/// Marks a slot that is in use.
const SLOT_ACTIVE: u32 = 0x00AC_71F3;
const SECTOR: i64 = 512;

/// Adds what the LUKS header says to the description of an image that is encrypted with it.
///
/// # Errors
/// The host failed.
pub(super) fn complete(info: &mut ImageInfo, layer: &Layer) -> Result<()> {
    let Some((offset, len)) = layer.qcow2.as_ref().and_then(|image| image.header().luks) else {
        return Ok(());
    };
    let slot = info.specific.iter_mut().find(|(key, _)| *key == "encrypt");
    let Some((_, described)) = slot.filter(|_| to_usize(len) >= HEADER_LEN) else { return Ok(()) };
    if let Some(details) = describe(&*layer.storage, offset)? {
        *described = Value::Map(details);
    }
    Ok(())
}

/// Reads and describes the header; `None` if it is not one.
fn describe(storage: &dyn Storage, offset: u64) -> Result<Option<Vec<(&'static str, Value)>>> {
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(&mut bytes, offset)?;
    Ok(bytes.starts_with(b"LUKS\xba\xbe\0\x01").then(|| Fields(&bytes).describe()))
}

struct Fields<'a>(&'a [u8; HEADER_LEN]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    }

    fn int(&self, at: usize) -> Value {
        Value::Int(i64::from(self.u32(at)))
    }

    fn sectors(&self, at: usize) -> Value {
        Value::Int(i64::from(self.u32(at)) * SECTOR)
    }

    /// Text that ends with the first zero byte.
    fn text(&self, at: usize, len: usize) -> String {
        let bytes = self.0.get(at..at + len).unwrap_or_default();
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(len);
        String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
    }

    fn describe(&self) -> Vec<(&'static str, Value)> {
        let text = |text: &str| Value::Text(text.to_owned());
        let mode = self.text(40, 32);
        let (mode, generator) = mode.split_once('-').unwrap_or((mode.as_str(), ""));
        let (generator, generator_hash) = match generator.split_once(':') {
            Some((generator, hash)) => (generator, Some(hash)),
            None => (generator, None),
        };
        let mut described = vec![
            ("ivgen-alg", text(generator)),
            ("detached-header", Value::Bool(false)),
            ("hash-alg", Value::Text(self.text(72, 32))),
            ("cipher-alg", Value::Text(self.cipher(mode))),
            ("uuid", Value::Text(self.text(168, 40))),
        ];
        described.extend(generator_hash.map(|hash| ("ivgen-hash-alg", text(hash))));
        described.extend([
            ("format", text("luks")),
            ("cipher-mode", text(mode)),
            ("slots", Value::List((0..SLOTS).map(|index| self.slot(index)).collect())),
            ("payload-offset", self.sectors(104)),
            ("master-key-iters", self.int(164)),
        ]);
        described
    }

    /// The cipher with the length of its key; a key for XTS is two keys.
    fn cipher(&self, mode: &str) -> String {
        let bits = self.u32(108).saturating_mul(8) / if mode == "xts" { 2 } else { 1 };
        format!("{}-{bits}", self.text(8, 32))
    }

    fn slot(&self, index: usize) -> Value {
        let at = SLOTS_OFFSET + index * SLOT_LEN;
        let active = self.u32(at) == SLOT_ACTIVE;
        let mut slot = vec![("active", Value::Bool(active))];
        if active {
            slot.push(("iters", self.int(at + 4)));
        }
        slot.push(("key-offset", self.sectors(at + 40)));
        if active {
            slot.push(("stripes", self.int(at + 44)));
        }
        Value::Map(slot)
    }
}
