//! The disk: its extents one after the other.

use std::sync::Arc;

use block::device::check_range;
use block::image::{CheckReport, Image, ImageInfo, Repair, Value};
use block::num::{low_u32, to_usize};
use block::{
    BlockDevice, Compressed, CompressedWriter, Error, LayerExtent, Limits, Preallocation, Result, Storage,
    ZeroMode,
};

use crate::SECTOR;
use crate::descriptor::{Access, ExtentLine, Kind, NO_PARENT};
use crate::extent::{Below, Extent, How};
use crate::flat::{Flat, Zero};
use crate::identity::Identity;
use crate::layout::Layout;
use crate::sparse;

/// How a disk is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// For writing.
    pub writable: bool,
    /// What answers for what the disk does not store: its parent.
    pub parent: Option<Parent>,
    /// The files that [`Layout::files`] names, in that order.
    pub files: Vec<Arc<dyn Storage>>,
    /// How hard grains are compressed where they are; `None`: as usual.
    pub level: Option<u32>,
    /// Only the description is wanted: reading fails.
    pub metadata_only: bool,
    /// The structures will be examined, not relied upon.
    pub for_check: bool,
}

/// The image that a disk is a child of.
#[derive(Debug, Clone)]
pub struct Parent {
    /// Its contents.
    pub device: Arc<dyn BlockDevice>,
    /// Its content ID, if it is a disk of this family.
    pub cid: Option<u32>,
    /// What people call it.
    pub name: String,
}

/// A part of the disk.
#[derive(Debug)]
struct Part {
    /// Where it begins on the disk, in bytes.
    start: u64,
    len: u64,
    extent: Box<dyn Extent>,
    /// Its word in the descriptor; empty for a stand-alone extent.
    word: &'static str,
}

/// An open disk.
#[derive(Debug)]
pub struct Vmdk {
    storage: Arc<dyn Storage>,
    layout: Layout,
    identity: Option<Identity>,
    parts: Vec<Part>,
    size: u64,
    parent: Option<Arc<dyn BlockDevice>>,
    writable: bool,
    metadata_only: bool,
}

impl Vmdk {
    /// Puts a disk together from its descriptor and its files.
    ///
    /// # Errors
    /// A file is missing, is not what the descriptor says, or breaks its format's rules; the parent is not the one
    /// that the disk was made for; or the host failed.
    pub fn open(storage: Arc<dyn Storage>, layout: Layout, options: OpenOptions) -> Result<Arc<Self>> {
        check_parent(&layout, &options)?;
        let parent = options.parent.as_ref().map(|parent| Arc::clone(&parent.device));
        let mut parts = vec![];
        let mut start = 0;
        let lines = lines_of(&layout, &storage)?;
        for (number, line) in lines.iter().enumerate() {
            let how = How {
                len: line.sectors * SECTOR,
                below: Below { device: parent.clone(), start },
                writable: options.writable && line.access == Access::ReadWrite,
                metadata_only: options.metadata_only,
                for_check: options.for_check,
                level: options.level,
            };
            let file = match layout.stands_alone {
                true => Some(&storage),
                false => layout.file_index(number).and_then(|index| options.files.get(index)),
            };
            let extent = open_extent(line, file, &how)?;
            let word = if layout.stands_alone { "" } else { line.kind.word() };
            parts.push(Part { start, len: how.len, extent, word });
            start += how.len;
        }
        refuse_shared(&layout, &lines, &options.files)?;
        let identity = layout
            .descriptor
            .as_ref()
            .map(|(descriptor, place)| Identity::new(Arc::clone(&storage), descriptor.clone(), *place));
        Ok(Arc::new(Self {
            storage,
            identity,
            layout,
            parts,
            size: start,
            parent,
            writable: options.writable,
            metadata_only: options.metadata_only,
        }))
    }

    /// Changes when the contents change; a child remembers it.
    pub fn cid(&self) -> Option<u32> {
        self.identity.as_ref().map(Identity::cid)
    }

    /// Index of the part that `offset` lies in.
    fn part_at(&self, offset: u64) -> usize {
        self.parts.partition_point(|part| part.start + part.len <= offset)
    }

    /// Calls `visit` with each part that a request touches, the offset in it, and the bytes of the request that
    /// belong to it.
    fn each(
        &self,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(&Part, u64, std::ops::Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        for part in &self.parts[self.part_at(offset)..] {
            if done == len {
                break;
            }
            let within = offset + done - part.start;
            let piece = (part.len - within).min(len - done);
            visit(part, within, done..done + piece)?;
            done += piece;
        }
        Ok(())
    }

    fn check_readable(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size)?;
        if self.metadata_only {
            return Err(Error::unsupported("the image was opened for its description only"));
        }
        Ok(())
    }

    /// What every change of the contents begins with.
    fn before_write(&self, offset: u64, len: u64) -> Result<()> {
        self.check_readable(offset, len)?;
        if self.read_only() {
            return Err(Error::read_only());
        }
        match &self.identity {
            Some(identity) if len > 0 => identity.contents_change(),
            _ => Ok(()),
        }
    }

    /// A descriptor with a file of its own may be as new as the disk is.
    fn sync_descriptor(&self) -> Result<()> {
        if self.writable && !self.layout.stands_alone { self.storage.sync() } else { Ok(()) }
    }

    /// The only part of a disk that has but one.
    fn only_part(&self) -> Option<&Part> {
        match &self.parts[..] {
            [part] => Some(part),
            _ => None,
        }
    }
}

/// The extents of the disk; a stand-alone one is its own only line.
fn lines_of(layout: &Layout, storage: &Arc<dyn Storage>) -> Result<Vec<ExtentLine>> {
    if let (false, Some(descriptor)) = (layout.stands_alone, layout.descriptor()) {
        return Ok(descriptor.extents().to_vec());
    }
    let sectors = sparse::capacity(storage)?;
    Ok(vec![ExtentLine { access: Access::ReadWrite, sectors, kind: Kind::Sparse, file: None, offset: 0 }])
}

fn open_extent(line: &ExtentLine, file: Option<&Arc<dyn Storage>>, how: &How) -> Result<Box<dyn Extent>> {
    let name = line.file.as_deref();
    if line.kind == Kind::Zero || line.access == Access::None {
        return Ok(Box::new(Zero::new(how.len, name)));
    }
    let file = file.ok_or_else(|| {
        Error::new(
            block::ErrorKind::NotFound,
            format!("extent '{}' was not opened", name.unwrap_or_default()),
        )
    })?;
    let file = Arc::clone(file);
    match line.kind {
        kind if kind.is_flat() => Ok(Box::new(Flat::open(file, line.offset * SECTOR, how)?)),
        _ => sparse::open(file, how),
    }
}

/// Two names can lead to one file: its bytes must not be two parts of the disk all the same.
fn refuse_shared(layout: &Layout, lines: &[ExtentLine], files: &[Arc<dyn Storage>]) -> Result<()> {
    let range = |(number, line): (usize, &ExtentLine)| {
        let file = files.get(layout.file_index(number)?)?;
        let (_, start, end) = line.file_range()?;
        Some((Arc::as_ptr(file).addr(), start, end))
    };
    let mut ranges: Vec<_> = lines.iter().enumerate().filter_map(range).collect();
    ranges.sort_unstable();
    let overlap = |pair: &[(usize, u64, u64)]| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2;
    match ranges.windows(2).find(|pair| overlap(pair)) {
        Some(_) => Err(Error::invalid("two extents of the disk overlap in one file, under two names")),
        None => Ok(()),
    }
}

/// A child must stand on the very parent that it was made for (specification, "Content ID").
fn check_parent(layout: &Layout, options: &OpenOptions) -> Result<()> {
    let wanted = layout.descriptor().map_or(NO_PARENT, |descriptor| descriptor.parent_cid());
    let Some(parent) = &options.parent else { return Ok(()) };
    if wanted == NO_PARENT || parent.cid == Some(wanted) || options.metadata_only {
        return Ok(());
    }
    let found = match parent.cid {
        Some(cid) => format!("has content ID {cid:08x}"),
        None => "is not a VMDK image".to_owned(),
    };
    let text =
        format!("the disk was made for a parent with content ID {wanted:08x}, but '{}' {found}", parent.name);
    Err(Error::new(block::ErrorKind::Corrupt, text).hint(
        "The parent has been changed since, or is another one: what the disk shows would be a mixture. Only if you know \
         that it is the right one (a commit to it was interrupted), rebase -u with the parent's own name records it as it is.",
    ))
}

impl BlockDevice for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        !self.writable || self.parts.iter().all(|part| part.extent.read_only())
    }

    fn limits(&self) -> Limits {
        let grain = self.parts.iter().filter_map(|part| part.extent.describe().grain).max();
        let grain = grain.and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(4096);
        Limits { alignment: 1, preferred: grain, discard_granularity: grain }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_readable(offset, buf.len() as u64)?;
        self.each(offset, buf.len() as u64, |part, within, range| {
            part.extent.read_at(&mut buf[to_usize(range.start)..to_usize(range.end)], within)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.before_write(offset, buf.len() as u64)?;
        self.each(offset, buf.len() as u64, |part, within, range| {
            part.extent.write_at(&buf[to_usize(range.start)..to_usize(range.end)], within)
        })
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.before_write(offset, len)?;
        self.each(offset, len, |part, within, range| {
            part.extent.write_zeroes_at(within, range.end - range.start, mode)
        })
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.before_write(offset, len)?;
        self.each(offset, len, |part, within, range| part.extent.discard_at(within, range.end - range.start))
    }

    fn flush(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.extent.flush())?;
        self.sync_descriptor()
    }

    fn close(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.extent.close())?;
        self.sync_descriptor()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        match self.only_part() {
            Some(part) => part.extent.resize(size, preallocation),
            None => Err(Error::unsupported("Image format driver does not support resize")),
        }
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        self.check_readable(offset, 1)?;
        let part = &self.parts[self.part_at(offset)];
        let within = offset - part.start;
        part.extent.layer_extent(within, max_len.min(part.len - within))
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.parent.as_ref()
    }

    /// Of a disk with more than one extent there is no one file in which offsets count.
    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.only_part().and_then(|part| part.extent.storage())
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.check_readable(offset, len)?;
        self.each(offset, len, |part, within, range| part.extent.reserve(within, range.end - range.start))
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.before_write(offset, len)?;
        let part = &self.parts[self.part_at(offset)];
        let within = offset - part.start;
        if len == 0 || len > part.len - within {
            return Ok(false);
        }
        part.extent.clone_in(within, len, source, source_offset)
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        let able = self.packer().filter(|_| self.writable);
        able.map(|_| self as &dyn CompressedWriter)
    }
}

impl Vmdk {
    /// The ability of the only extent to store compressed grains.
    fn packer(&self) -> Option<&dyn CompressedWriter> {
        self.only_part().and_then(|part| part.extent.compressed_writer())
    }
}

/// What the extent does, with what every change of the contents begins with.
impl CompressedWriter for Vmdk {
    fn cluster_size(&self) -> u32 {
        self.packer().map_or(0, CompressedWriter::cluster_size)
    }

    fn compress(&self, data: &[u8]) -> Result<Compressed> {
        self.packer().ok_or_else(Error::read_only)?.compress(data)
    }

    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        self.before_write(offset, 1)?;
        self.packer().ok_or_else(Error::read_only)?.write_compressed(clusters, offset)
    }
}

impl Image for Vmdk {
    fn format_name(&self) -> &'static str {
        "vmdk"
    }

    fn info(&self) -> Result<ImageInfo> {
        let described: Vec<_> = self.parts.iter().map(|part| (part.extent.describe(), part.word)).collect();
        let number = |id: u32| Value::Int(i64::from(id));
        let mut specific = vec![];
        if let (Some(identity), Some(descriptor)) = (&self.identity, self.layout.descriptor()) {
            specific.push(("cid", number(identity.cid())));
            specific.push(("parent-cid", number(identity.parent_cid())));
            specific.push(("create-type", Value::Text(descriptor.create_type().to_owned())));
        }
        let extents = described.iter().map(|(extent, word)| {
            let mut entry = vec![];
            if extent.compressed {
                entry.push(("compressed", Value::Bool(true)));
            }
            entry.push(("virtual-size", Value::Int(i64::try_from(extent.size).unwrap_or(i64::MAX))));
            entry.push(("filename", Value::Text(extent.filename.clone())));
            if let Some(grain) = extent.grain {
                entry.push(("cluster-size", Value::Int(i64::try_from(grain).unwrap_or(i64::MAX))));
            }
            entry.push(("format", Value::Text((*word).to_owned())));
            Value::Map(entry)
        });
        specific.push(("extents", Value::List(extents.collect())));
        let has_parent = self.layout.descriptor().filter(|descriptor| descriptor.has_parent());
        let backing_file = has_parent.and_then(|descriptor| descriptor.parent_hint()).map(str::to_owned);
        Ok(ImageInfo {
            cluster_size: described.iter().find_map(|(extent, _)| extent.grain).map(low_u32),
            compressed: !described.is_empty() && described.iter().all(|(extent, _)| extent.compressed),
            backing_format: backing_file.as_ref().map(|_| "vmdk".to_owned()),
            backing_file,
            specific,
            ..ImageInfo::default()
        })
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        self.parts.iter().try_for_each(|part| part.extent.check(&mut report, repair))?;
        Ok(report)
    }

    fn content_id(&self) -> Option<Vec<u8>> {
        self.cid().map(|cid| cid.to_le_bytes().to_vec())
    }

    fn adopt_parent(&self, content_id: &[u8]) -> Result<()> {
        let (Some(identity), Ok(cid)) = (&self.identity, content_id.try_into()) else { return Ok(()) };
        if !self.writable {
            return Err(Error::read_only());
        }
        identity.adopt_parent(u32::from_le_bytes(cid))
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn file_at(&self, offset: u64) -> Option<String> {
        let part = self.parts.get(self.part_at(offset)).filter(|_| !self.layout.stands_alone)?;
        part.extent.storage().map(|storage| storage.name())
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}

#[cfg(test)]
mod tests;
