//! The LUKS header of an encrypted qcow2 image, as far as `info` shows it.

use block::Result;
use block::image::{ImageInfo, Value};
use crypt::luks::{HEADER_LEN, Header};

use crate::open::Layer;

/// Adds what the LUKS header says to the description of an image that is encrypted with it. What is no header is
/// left out: `info` is to work where the contents cannot be reached.
///
/// # Errors
/// The host failed.
pub(super) fn complete(info: &mut ImageInfo, layer: &Layer) -> Result<()> {
    let Some((offset, len)) = layer.qcow2.as_ref().and_then(|image| image.header().luks) else {
        return Ok(());
    };
    let slot = info.specific.iter_mut().find(|(key, _)| *key == "encrypt");
    let Some((_, described)) = slot.filter(|_| len >= HEADER_LEN as u64) else { return Ok(()) };
    let mut bytes = [0; HEADER_LEN];
    layer.storage.read_at(&mut bytes, offset)?;
    if let Ok(header) = Header::parse(&bytes, false) {
        *described = Value::Map(header.info(true));
    }
    Ok(())
}
