//! Opening a machine's disks.

use std::sync::Arc;

use block::{BlockDevice, Result, ResultExt as _};
use image::{BackingMode, OpenOptions, Spec};

use crate::guest::{Disk, DiskImage, Guest};

/// An opened disk of a machine.
#[derive(Debug)]
pub struct OpenedDisk {
    /// The disk; what reads it need not keep the rest.
    pub device: Arc<dyn BlockDevice>,
    /// Its size in bytes.
    pub size: u64,
    /// The format of its image.
    pub format: image::Format,
    /// The images that it is made of, the top first, as `vimg info` shows their names.
    pub chain: Vec<String>,
    /// What a person should know, in sentences.
    pub notes: Vec<String>,
    /// The opened image.
    pub layer: Arc<image::Layer>,
}

/// Opens all disks of a machine with their chains, in its order. Nothing is ever written to them, whatever `options` say;
/// the rest of `options` (policy, secrets) holds for each.
///
/// # Errors
/// What prevents a disk from being opened, with the disk's name.
pub fn open_disks(guest: &Guest, options: &OpenOptions) -> Result<Vec<OpenedDisk>> {
    let options = OpenOptions {
        writable: false,
        writable_base: None,
        resizable: false,
        backing: BackingMode::Follow,
        metadata_only: false,
        ..options.clone()
    };
    guest.disks.iter().map(|disk| open(disk, &options).context(|| format!("disk '{}'", disk.id))).collect()
}

fn open(disk: &Disk, options: &OpenOptions) -> Result<OpenedDisk> {
    let (name, format) = match &disk.image {
        DiskImage::Name { name, format } => (name.clone(), format.as_deref()),
        DiskImage::Empty { size_bytes } => {
            let node = serde_json::json!({ "driver": "null-co", "size": size_bytes, "read-zeroes": true });
            (format!("json:{node}"), Some("raw"))
        }
    };
    let spec = Spec::from_filename(&name)?;
    let known = format.and_then(image::Format::from_name);
    // What a description calls a disk is a weaker word than the options in its own name.
    let format = options.format.or_else(|| if spec.format().is_some() { None } else { known });
    let layer = image::open(&spec, &OpenOptions { format, ..options.clone() })?;
    let device = layer.device();
    let size = device.size();
    let mut notes: Vec<String> = layer.chain().flat_map(|layer| layer.warnings.clone()).collect();
    if let Some(capacity) = disk.capacity_bytes.filter(|capacity| *capacity != size) {
        notes.push(format!(
            "The description says that the disk '{}' has {capacity} bytes; its image has {size}.",
            disk.id
        ));
    }
    let chain = layer.chain().map(|layer| layer.filename.clone()).collect();
    Ok(OpenedDisk { device, size, format: layer.format, chain, notes, layer })
}
