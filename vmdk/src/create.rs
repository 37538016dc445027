//! New disks: what they are to be like, and the bytes that they begin with.
//!
//! What is written is what qemu-img writes (and VMware's products accept): the same text, the same geometry, the same
//! places. Opening, naming and removing files is the caller's.

use std::sync::Arc;

use block::codec::Writer;
use block::num::align_up;
use block::raw::preallocate;
use block::{Error, Preallocation, Result, Storage, ZeroMode};

use crate::SECTOR;
use crate::descriptor::{MAX_EXTENTS, MAX_LEN, NO_PARENT};
use crate::header::{Header, NEWLINES, flags};
use crate::identity::random_cid;

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Room for the embedded descriptor in sectors.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Entries of a grain table.
const GTES: u32 = 512;
/// Bytes of all extents but the last of a disk in several files.
const SPLIT: u64 = 1 << 31;
/// Sectors per track, of every geometry.
const SECTORS_PER_TRACK: u64 = 63;

/// What kind of disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subformat {
    /// One sparse file with the descriptor inside.
    MonolithicSparse,
    /// A descriptor and one flat file.
    MonolithicFlat,
    /// A descriptor and sparse files for 2 GiB each.
    TwoGbMaxExtentSparse,
    /// A descriptor and flat files of 2 GiB each.
    TwoGbMaxExtentFlat,
    /// One file of compressed grains, for transport.
    StreamOptimized,
}

impl Subformat {
    const NAMES: [(&'static str, Self); 5] = [
        ("monolithicSparse", Self::MonolithicSparse),
        ("monolithicFlat", Self::MonolithicFlat),
        ("twoGbMaxExtentSparse", Self::TwoGbMaxExtentSparse),
        ("twoGbMaxExtentFlat", Self::TwoGbMaxExtentFlat),
        ("streamOptimized", Self::StreamOptimized),
    ];

    /// The subformat of that name, in whatever case.
    pub fn from_name(name: &str) -> Option<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, subformat)| *subformat)
    }

    /// Its `createType`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }

    /// Whether the bytes lie in its files as they are.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the disk is spread over several files.
    fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// Whether everything is in one file.
    pub fn is_one_file(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }
}

/// What a new disk is to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up to whole sectors.
    pub size: u64,
    /// What kind of disk.
    pub subformat: Subformat,
    /// `ide`, `buslogic`, `lsilogic` or `legacyESX`.
    pub adapter: String,
    /// The version of the virtual hardware.
    pub hardware: String,
    /// The version of VMware's tools in the guest.
    pub tools: String,
    /// Grains of zeros have an entry of their own.
    pub zero_grains: bool,
    /// The parent's name, as the descriptor is to say it, and its content ID.
    pub parent: Option<(String, u32)>,
    /// How much of flat files gets space.
    pub preallocation: Preallocation,
}

/// A file that a new disk is made of, beside its main file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewExtent {
    /// Its name, in the folder of the main file.
    pub file: String,
    /// Its part of the disk.
    pub sectors: u64,
}

impl CreateOptions {
    /// Checks what can be checked before anything is made.
    ///
    /// # Errors
    /// In qemu's words: the adapter is not known, flat disks with a parent or grains of zeros, or too large.
    pub fn validate(&self) -> Result<()> {
        if !["ide", "buslogic", "lsilogic", "legacyESX"].contains(&self.adapter.as_str()) {
            return Err(Error::usage(format!("invalid parameter value: {}", self.adapter)));
        }
        if self.subformat.is_flat() && self.parent.is_some() {
            return Err(Error::usage("Flat image can't have backing file"));
        }
        if self.subformat.is_flat() && self.zero_grains {
            return Err(Error::usage("Flat image can't enable zeroed grain"));
        }
        if self.preallocation == Preallocation::Metadata {
            return Err(Error::usage("Unsupported preallocation mode: metadata"));
        }
        if i64::try_from(self.size).is_err() {
            return Err(Error::usage("Image size must be less than 8 EiB!"));
        }
        if self.subformat.is_split() && self.size.div_ceil(SPLIT) > MAX_EXTENTS as u64 {
            return Err(Error::usage(format!("the disk would have more than {MAX_EXTENTS} extents")));
        }
        let texts = [&self.hardware, &self.tools];
        let parent = self.parent.iter().map(|(name, _)| name);
        if texts.into_iter().chain(parent).any(|text| text.contains(['"', '\n', '\r'])) {
            return Err(Error::usage("a descriptor cannot hold quotation marks or line breaks in a value"));
        }
        // As the file that is made will be read.
        if self.subformat.is_flat() {
            Ok(())
        } else {
            Header::parse(&self.header(self.sectors()).encode()).map(drop)
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.size.div_ceil(SECTOR)
    }

    /// The files beside a main file that is to be called `named` (its name without folders).
    pub fn extents(&self, named: &str) -> Vec<NewExtent> {
        let (base, suffix) = split_name(named);
        let (sectors, letter) = (self.sectors(), if self.subformat.is_flat() { 'f' } else { 's' });
        if self.subformat.is_one_file() {
            return vec![];
        }
        if !self.subformat.is_split() {
            return vec![NewExtent { file: format!("{base}-flat{suffix}"), sectors }];
        }
        let part = |index: u64| NewExtent {
            file: format!("{base}-{letter}{:03}{suffix}", index + 1),
            sectors: (sectors - index * (SPLIT / SECTOR)).min(SPLIT / SECTOR),
        };
        (0..sectors.div_ceil(SPLIT / SECTOR)).map(part).collect()
    }

    /// The text of the descriptor of a disk whose main file is to be called `named`.
    ///
    /// # Errors
    /// A name cannot be written into it, or there is no randomness.
    pub fn descriptor(&self, named: &str) -> Result<String> {
        if named.contains(['"', '\n', '\r']) {
            return Err(Error::usage(
                "a descriptor cannot hold quotation marks or line breaks in a file's name",
            ));
        }
        let (parent_cid, hint) = match &self.parent {
            Some((name, cid)) => (*cid, format!("parentFileNameHint=\"{name}\"\n")),
            None => (NO_PARENT, String::new()),
        };
        let encoding = if named.is_ascii() { "" } else { "encoding=\"UTF-8\"\n" };
        let heads = if self.adapter == "ide" { 16 } else { 255 };
        let text = format!(
            "# Disk DescriptorFile\nversion=1\n{encoding}CID={:08x}\nparentCID={parent_cid:08x}\n\
             createType=\"{}\"\n{hint}\n# Extent description\n{}\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{}\"\nddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"{SECTORS_PER_TRACK}\"\nddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            random_cid(NO_PARENT)?,
            self.subformat.name(),
            self.extent_lines(named),
            self.hardware,
            self.sectors() / (SECTORS_PER_TRACK * heads),
            self.adapter,
            self.tools,
        );
        let room = if self.subformat.is_one_file() { DESCRIPTOR_SECTORS * SECTOR } else { MAX_LEN };
        if text.len() as u64 > room {
            return Err(Error::usage("the descriptor would be too long: choose a shorter name"));
        }
        Ok(text)
    }

    fn extent_lines(&self, named: &str) -> String {
        if self.subformat.is_one_file() {
            return format!("RW {} SPARSE \"{named}\"\n", self.sectors());
        }
        let (kind, offset) = if self.subformat.is_flat() { ("FLAT", " 0") } else { ("SPARSE", "") };
        let line = |extent: &NewExtent| format!("RW {} {kind} \"{}\"{offset}\n", extent.sectors, extent.file);
        self.extents(named).iter().map(line).collect()
    }

    /// Makes the contents of an extent's own file, which is empty. `descriptor`: for a file that holds it, too.
    ///
    /// # Errors
    /// The host failed.
    pub fn make_extent(&self, storage: &dyn Storage, sectors: u64, descriptor: Option<&str>) -> Result<()> {
        if self.subformat.is_flat() {
            if storage.fixed_len() {
                let text = "an extent of a new disk cannot be a device";
                return Err(Error::unsupported(text));
            }
            return preallocate(storage, sectors * SECTOR, self.preallocation);
        }
        make_sparse(storage, &self.header(sectors), descriptor)
    }

    /// Makes a file with the descriptor and everything else inside.
    ///
    /// # Errors
    /// The host failed.
    pub fn make_one_file(&self, storage: &Arc<dyn Storage>, descriptor: &str) -> Result<()> {
        match self.subformat {
            Subformat::StreamOptimized => {
                crate::stream::create(storage, self.sectors(), descriptor.as_bytes(), self.zero_grains)
            }
            _ => self.make_extent(&**storage, self.sectors(), Some(descriptor)),
        }
    }

    /// The header of a sparse extent: descriptor, redundant directory and tables, directory and tables, grains.
    fn header(&self, capacity: u64) -> Header {
        let zero_grains = if self.zero_grains { flags::ZERO_GRAINS } else { 0 };
        let mut header = Header {
            version: if self.zero_grains { 2 } else { 1 },
            flags: flags::NEWLINE_TEST | flags::REDUNDANT | zero_grains,
            capacity,
            grain: GRAIN,
            descriptor_offset: 1,
            descriptor_len: DESCRIPTOR_SECTORS,
            gtes_per_gt: GTES,
            rgd_offset: 1 + DESCRIPTOR_SECTORS,
            gd_offset: 0,
            overhead: 0,
            unclean: false,
            newlines: NEWLINES,
            compression: 0,
        };
        let tables = header.gd_sectors() + header.gd_entries() * header.gt_sectors();
        header.gd_offset = header.rgd_offset + tables;
        let overhead = header.gd_offset + tables;
        header.overhead = align_up(overhead, GRAIN).unwrap_or(overhead);
        header
    }
}

/// A name and what follows its last point, the point included.
fn split_name(name: &str) -> (&str, &str) {
    name.rfind('.').map_or((name, ""), |point| name.split_at(point))
}

/// Writes the metadata of an empty sparse extent. The grain tables are all zeros, and a hole.
fn make_sparse(storage: &dyn Storage, header: &Header, descriptor: Option<&str>) -> Result<()> {
    let overhead = header.overhead * SECTOR;
    if storage.fixed_len() {
        if overhead > storage.len()? {
            return Err(Error::usage("Cannot grow device files"));
        }
        storage.zero_range(0, overhead, ZeroMode::UNMAP)?;
    } else {
        storage.set_len(overhead)?;
    }
    for directory in [header.rgd_offset, header.gd_offset] {
        write_directory(storage, header, directory)?;
    }
    if let Some(text) = descriptor {
        storage.write_at(text.as_bytes(), header.descriptor_offset * SECTOR)?;
    }
    // Last: what has no header is no extent.
    storage.write_at(&header.encode(), 0)
}

/// A directory whose tables follow it.
fn write_directory(storage: &dyn Storage, header: &Header, directory: u64) -> Result<()> {
    const CHUNK: u64 = 1 << 18;
    let first = directory + header.gd_sectors();
    let mut index = 0;
    while index < header.gd_entries() {
        let count = (header.gd_entries() - index).min(CHUNK);
        let mut writer = Writer::new();
        for entry in index..index + count {
            let sector = first + entry * header.gt_sectors();
            let sector = u32::try_from(sector).map_err(|_| Error::usage("L1 size too big"))?;
            writer.le_u32(sector);
        }
        let bytes = writer.into_bytes();
        storage.write_at(&bytes, directory * SECTOR + index * 4)?;
        index += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
