//! What an image says of itself: the documents of `info`, for programs and for people.

pub mod human;
mod luks;

use std::collections::HashSet;

use block::file::HostFile;
use block::image::{ImageInfo, SnapshotInfo};
use block::num::align_up;
use block::{Error, Result, ResultExt as _, Storage as _};
use serde_json::{Map, Value, json};

use crate::open::{BackingMode, Layer, OpenOptions, open};
use crate::spec::{Spec, could_not_open};

/// The description of one image.
#[derive(Debug, Clone)]
pub struct Description {
    filename: String,
    format: &'static str,
    /// It is shown as what lies below a format.
    is_protocol: bool,
    /// It is a protocol, however it is shown.
    has_protocol_data: bool,
    virtual_size: u64,
    actual_size: Option<u64>,
    image: ImageInfo,
    full_backing_filename: Option<String>,
    /// What it lies in; `None` for a protocol shown as an image.
    child: Option<Box<Self>>,
    /// Further files of the image.
    extents: Vec<Self>,
}

impl Description {
    /// Describes an opened image, without what lies behind it.
    ///
    /// # Errors
    /// The host failed.
    pub fn of(layer: &Layer) -> Result<Self> {
        let mut info = layer.image.info()?;
        luks::complete(&mut info, layer)?;
        let child = match (layer.protocol_only, &layer.container) {
            (Some(_), _) => None,
            (None, Some(container)) => Some(Box::new(Self::of(container)?)),
            (None, None) => Some(Box::new(Self::of_protocol(layer)?)),
        };
        let extents = layer.extents.iter().map(|file| Self::of_file(file)).collect::<Result<Vec<_>>>()?;
        if layer.format == crate::Format::Raw {
            // What raw says of itself is what it lies in says.
            info.cluster_size = child.as_ref().and_then(|child| child.image.cluster_size);
        }
        Ok(Self {
            filename: layer.filename.clone(),
            format: layer.protocol_only.unwrap_or(layer.format.name()),
            is_protocol: false,
            has_protocol_data: layer.protocol_only.is_some(),
            virtual_size: whole_sectors(layer.image.size()),
            actual_size: match &child {
                Some(child) => sum(child.actual_size, &extents),
                None => layer.storage.allocated()?,
            },
            image: info,
            full_backing_filename: layer.full_backing_filename.clone(),
            child,
            extents,
        })
    }

    fn of_file(file: &HostFile) -> Result<Self> {
        Ok(Self {
            filename: file.path().display().to_string(),
            format: if file.fixed_len() { "host_device" } else { "file" },
            is_protocol: true,
            has_protocol_data: true,
            virtual_size: whole_sectors(file.len()?),
            actual_size: file.allocated()?,
            image: ImageInfo::default(),
            full_backing_filename: None,
            child: None,
            extents: vec![],
        })
    }

    fn of_protocol(layer: &Layer) -> Result<Self> {
        Ok(Self {
            filename: match (&layer.file, &layer.member) {
                (Some(file), None) => file.path().display().to_string(),
                _ => layer.source_name.clone(),
            },
            format: protocol_name(&layer.protocol),
            is_protocol: true,
            has_protocol_data: true,
            virtual_size: whole_sectors(layer.storage.len()?),
            actual_size: layer.storage.allocated()?,
            image: ImageInfo::default(),
            full_backing_filename: None,
            child: None,
            extents: vec![],
        })
    }

    /// As qemu-img's JSON, keys in its order.
    pub fn to_json(&self) -> Value {
        let mut document = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                document.insert(key.to_owned(), value);
            }
        };
        put("children", Some(self.children()));
        put("backing-filename-format", self.image.backing_format.clone().map(Value::from));
        put("snapshots", self.snapshots());
        put("virtual-size", Some(self.virtual_size.into()));
        put("filename", Some(self.filename.clone().into()));
        put("cluster-size", self.image.cluster_size.map(Value::from));
        put("format", Some(self.format.into()));
        put("actual-size", self.actual_size.map(Value::from));
        put("format-specific", self.specific());
        put("full-backing-filename", self.full_backing_filename.clone().map(Value::from));
        put("encrypted", self.image.encrypted.then_some(Value::Bool(true)));
        put("backing-filename", self.image.backing_file.clone().map(Value::from));
        put("dirty-flag", self.has_dirty_flag().then(|| self.image.dirty.unwrap_or(false).into()));
        Value::Object(document)
    }

    /// A disk of nothing cannot be dirty, nor what lies on it; nor can plain bytes behind a network.
    fn has_dirty_flag(&self) -> bool {
        if WITHOUT_DIRTY_FLAG.contains(&self.format) {
            return false;
        }
        let lowest = std::iter::successors(Some(self), |this| this.child.as_deref()).last();
        let plain = matches!(self.format, "raw" | "nbd");
        !lowest.is_some_and(|lowest| plain && lowest.format == "nbd" || lowest.format.starts_with("null-"))
    }

    fn children(&self) -> Value {
        let child = |(name, child): (String, &Self)| json!({ "name": name, "info": child.to_json() });
        Value::Array(self.named_children().map(child).collect())
    }

    /// What it lies in, in qemu's order: extents before the file.
    fn named_children(&self) -> impl Iterator<Item = (String, &Self)> {
        let extents = self.extents.iter().enumerate().map(|(at, extent)| (format!("extents.{at}"), extent));
        extents.chain(self.child.iter().map(|child| ("file".to_owned(), &**child)))
    }

    fn snapshots(&self) -> Option<Value> {
        let list: Vec<_> = self.image.snapshots.iter().map(snapshot).collect();
        (!list.is_empty()).then_some(Value::Array(list))
    }

    fn specific(&self) -> Option<Value> {
        if self.has_protocol_data {
            return matches!(self.format, "file" | "host_device")
                .then(|| json!({ "type": "file", "data": {} }));
        }
        let data = &self.image.specific;
        (!data.is_empty()).then(|| json!({ "type": self.format, "data": crate::json::object(data) }))
    }
}

/// Formats whose drivers in qemu cannot tell whether an image was closed.
const WITHOUT_DIRTY_FLAG: &[&str] = &["bochs", "cloop", "dmg", "parallels"];

fn snapshot(snapshot: &SnapshotInfo) -> Value {
    const NANOSECONDS: u64 = 1_000_000_000;
    let mut document = Map::new();
    if let Some(icount) = snapshot.icount {
        document.insert("icount".to_owned(), icount.into());
    }
    document.insert("vm-clock-nsec".to_owned(), (snapshot.vm_clock_nsec % NANOSECONDS).into());
    document.insert("name".to_owned(), snapshot.name.clone().into());
    document.insert("date-sec".to_owned(), snapshot.date_sec.into());
    document.insert("date-nsec".to_owned(), snapshot.date_nsec.into());
    document.insert("vm-clock-sec".to_owned(), (snapshot.vm_clock_nsec / NANOSECONDS).into());
    document.insert("id".to_owned(), snapshot.id.clone().into());
    document.insert("vm-state-size".to_owned(), snapshot.vm_state_size.into());
    Value::Object(document)
}

/// Bytes that a file and the extents of its image take, each file counted once, if that can be known.
fn sum(file: Option<u64>, extents: &[Description]) -> Option<u64> {
    let mut seen = HashSet::new();
    let others = extents.iter().filter(|extent| seen.insert(&extent.filename));
    others.map(|extent| extent.actual_size).try_fold(file?, |sum, size| Some(sum.saturating_add(size?)))
}

/// qemu counts in sectors of 512 bytes.
fn whole_sectors(bytes: u64) -> u64 {
    align_up(bytes, 512).unwrap_or(bytes)
}

/// The protocol's name for as long as the program runs: there are few of them.
fn protocol_name(name: &str) -> &'static str {
    match name {
        "host_device" => "host_device",
        "nbd" => "nbd",
        "null-co" => "null-co",
        "null-aio" => "null-aio",
        _ => "file",
    }
}

/// Describes an image and, with `chain`, each image behind it, opening one at a time.
///
/// # Errors
/// As [`open`]; a chain that returns to itself, in qemu's words.
pub fn describe(
    spec: &Spec,
    options: &OpenOptions,
    chain: bool,
) -> Result<Vec<(Description, std::sync::Arc<Layer>)>> {
    let mut described = vec![];
    let mut seen = HashSet::new();
    let mut options = OpenOptions { backing: BackingMode::Ignore, metadata_only: true, ..options.clone() };
    let mut layer = open(spec, &options)?;
    loop {
        if layer
            .file
            .as_ref()
            .is_some_and(|file| !seen.insert((file.identity(), layer.filename.starts_with("json:"))))
        {
            return Err(Error::invalid(format!(
                "Backing file '{}' creates an infinite loop.",
                layer.filename
            )));
        }
        let description = Description::of(&layer)?;
        let next = chain.then(|| behind(&layer, &description, &mut options)).transpose()?.flatten();
        described.push((description, layer));
        match next {
            Some(next) => layer = next,
            None => return Ok(described),
        }
    }
}

/// Opens the image behind `layer`.
fn behind(
    layer: &Layer,
    description: &Description,
    options: &mut OpenOptions,
) -> Result<Option<std::sync::Arc<Layer>>> {
    let Some(full) = &layer.full_backing_filename else { return Ok(None) };
    let format = description.image.backing_format.as_deref();
    options.format = None;
    let context = || could_not_open(full);
    let folder = layer.confined_to.as_deref();
    let node = crate::open::backing_node(full, format, folder, &options.policy).context(context)?;
    crate::open::open_node(&node, options).context(context).map(Some)
}

/// The JSON document of `info`: of one image, or the list of a chain.
pub fn document(described: &[Description], chain: bool) -> Value {
    let mut all: Vec<_> = described.iter().map(Description::to_json).collect();
    match (chain, all.len()) {
        (false, 1) => all.remove(0),
        _ => Value::Array(all),
    }
}
