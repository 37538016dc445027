//! An image that comes through a pipe: of the one kind that can be read without looking back.

use std::io::Read;
use std::sync::Arc;

use block::mem::MemStorage;
use block::{Result, ResultExt as _};
use vmdk::stream::Sequential;

use super::Layer;
use crate::format::Format;

/// What such an image is called in messages.
const NAME: &str = "-";

/// Opens the image that `input` brings, for a reader who goes through it from start to end, once.
///
/// # Errors
/// It is not of a kind that can be read like that, or breaks the rules of its format.
pub fn open_pipe(input: Box<dyn Read + Send>) -> Result<Arc<Layer>> {
    let image = Sequential::open(input).context(|| format!("Could not open '{NAME}'"))?;
    Ok(Arc::new(Layer {
        filename: NAME.to_owned(),
        format: Format::Vmdk,
        probed: false,
        sequential: true,
        protocol_only: None,
        protocol: "pipe".to_owned(),
        image: Arc::new(image),
        qcow2: None,
        luks: None,
        storage: Arc::new(MemStorage::new()),
        file: None,
        container: None,
        data_file: None,
        extents: vec![],
        backing: None,
        source_name: "standard input".to_owned(),
        member: None,
        full_backing_filename: None,
        confined_to: None,
        key_secret: None,
        effort: crypt::luks::Effort::default(),
        warnings: vec![],
    }))
}
