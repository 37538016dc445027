//! What must be known of a disk before any other file is opened: its descriptor, and which files it is spread over.
//!
//! Reading a [`Layout`] touches nothing but the file that it is given. Whoever opens the files it names decides
//! which of the names may be followed at all.

use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::descriptor::{self, Access, Descriptor, ExtentLine, Kind};
use crate::header::{self, Header};

/// The first bytes of a COWD extent.
pub(crate) const COWD_MAGIC: &[u8; 4] = b"COWD";

/// A file that holds a part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentFile {
    /// Its name, as the descriptor says it: from the descriptor's folder, or absolute.
    pub name: String,
    /// Whether any extent in it may be written.
    pub writable: bool,
}

/// Where a descriptor lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// In bytes.
    pub(crate) offset: u64,
    /// How many bytes it may take; `None`: the file is all its own.
    pub(crate) room: Option<u64>,
}

/// An understood descriptor or stand-alone extent.
#[derive(Debug, Clone)]
pub struct Layout {
    /// A stand-alone extent may have none.
    pub(crate) descriptor: Option<(Descriptor, Place)>,
    /// The file itself is the disk's one extent.
    pub(crate) stands_alone: bool,
    files: Vec<ExtentFile>,
    /// Which of the files each extent lies in.
    lies_in: Vec<Option<usize>>,
}

impl Layout {
    /// Whether these are the first bytes of a disk of this family.
    pub fn probe(first: &[u8]) -> bool {
        header::probe(first) || first.starts_with(COWD_MAGIC) || Descriptor::probe(first)
    }

    /// Reads the descriptor, or the header of a file with a descriptor inside.
    ///
    /// # Errors
    /// It is neither, breaks the format's rules, has no part, or is of a kind that lies on raw devices; or the host
    /// failed.
    pub fn read(storage: &Arc<dyn Storage>) -> Result<Self> {
        let mut first = [0; header::LENGTH];
        storage.read_at(&mut first, 0)?;
        if header::probe(&first) {
            return Self::hosted(&**storage, &Header::parse(&first)?);
        }
        if first.starts_with(COWD_MAGIC) {
            return Ok(Self { descriptor: None, stands_alone: true, files: vec![], lies_in: vec![] });
        }
        let len = storage.len()?;
        if len > descriptor::MAX_LEN {
            let text = format!("the descriptor has {len} bytes, more than {}", descriptor::MAX_LEN);
            return Err(Error::invalid(text));
        }
        Self::of_lines(read_text(&**storage, 0, len)?, Place { offset: 0, room: None })
    }

    /// A file with a header in front.
    fn hosted(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let place = header.descriptor_place();
        let found = place.map(|(offset, room)| embedded(storage, offset, room)).transpose()?;
        match (header.is_descriptor_only(), found) {
            (false, descriptor) => {
                if let Some((descriptor, _)) = &descriptor {
                    header.check_descriptor(descriptor)?;
                }
                Ok(Self { descriptor, stands_alone: true, files: vec![], lies_in: vec![] })
            }
            (true, Some((descriptor, place))) => Self::of_lines(descriptor, place),
            (true, None) => Err(Error::invalid("the file has neither a descriptor nor a capacity")),
        }
    }

    /// A descriptor that names its extents.
    fn of_lines(descriptor: Descriptor, place: Place) -> Result<Self> {
        check_create_type(descriptor.create_type())?;
        let lines = descriptor.extents();
        if lines.is_empty() {
            return Err(Error::invalid("the descriptor names no extent: the disk has no contents"));
        }
        if let Some(raw) = lines.iter().find(|line| matches!(line.kind, Kind::VmfsRdm | Kind::VmfsRaw)) {
            return Err(on_raw_devices(raw.kind.word()));
        }
        let mut files: Vec<ExtentFile> = vec![];
        let mut places = std::collections::HashMap::new();
        let mut lies_in = vec![None; lines.len()];
        for (line, place) in lines.iter().zip(&mut lies_in) {
            let Some(name) = file_of(line) else { continue };
            let index = *places.entry(name).or_insert(files.len());
            if index == files.len() {
                files.push(ExtentFile { name: name.to_owned(), writable: false });
            }
            *place = Some(index);
            files[index].writable |= line.access == Access::ReadWrite;
        }
        Ok(Self { files, lies_in, stands_alone: false, descriptor: Some((descriptor, place)) })
    }

    /// The descriptor. A stand-alone extent need not have one.
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.descriptor.as_ref().map(|(descriptor, _)| descriptor)
    }

    /// The files that the disk is spread over, each once. Empty: the file itself holds all.
    pub fn files(&self) -> &[ExtentFile] {
        &self.files
    }

    /// The name of the parent, if the disk has one, from the descriptor's folder.
    ///
    /// # Errors
    /// The disk has a parent, and nothing says which.
    pub fn parent(&self) -> Result<Option<&str>> {
        let Some(descriptor) = self.descriptor().filter(|descriptor| descriptor.has_parent()) else {
            return Ok(None);
        };
        match descriptor.parent_hint() {
            Some(hint) => Ok(Some(hint)),
            None => {
                Err(Error::invalid("the disk has a parent, but no 'parentFileNameHint' says where it is"))
            }
        }
    }

    /// What the user should know: parts of the disk that will not show what they may hold.
    pub fn warnings(&self) -> Vec<String> {
        let lines = self.descriptor().filter(|_| !self.stands_alone).map_or(&[][..], Descriptor::extents);
        let hidden = lines.iter().zip(0..).filter(|(line, _)| line.access == Access::None);
        hidden
            .map(|(line, index)| {
                let file = line.file.as_deref().unwrap_or_default();
                format!("extent {index} ('{file}') is marked NOACCESS: it reads as zeros")
            })
            .collect()
    }

    /// Which of [`files`](Self::files) the extent with this number lies in.
    pub(crate) fn file_index(&self, extent: usize) -> Option<usize> {
        self.lies_in.get(extent).copied().flatten()
    }
}

/// The file of an extent that has one and may be opened.
fn file_of(line: &ExtentLine) -> Option<&str> {
    let has_file = line.access != Access::None && line.kind != Kind::Zero;
    line.file.as_deref().filter(|_| has_file)
}

/// The text inside an extent.
fn embedded(storage: &dyn Storage, offset: u64, room: u64) -> Result<(Descriptor, Place)> {
    let len = room.min(descriptor::MAX_LEN);
    let file_len = storage.len()?;
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(crate::extent::truncated(storage, &format!("the descriptor at {offset:#x}"), file_len));
    }
    Ok((read_text(storage, offset, len)?, Place { offset, room: Some(len) }))
}

fn read_text(storage: &dyn Storage, offset: u64, len: u64) -> Result<Descriptor> {
    let mut text = vec![0; to_usize(len)];
    storage.read_at(&mut text, offset)?;
    Descriptor::parse(&text)
}

/// Refuses what has its bytes on raw devices of the host.
fn check_create_type(kind: &str) -> Result<()> {
    match kind {
        "fullDevice"
        | "partitionedDevice"
        | "vmfsRaw"
        | "vmfsRawDeviceMap"
        | "vmfsPassthroughRawDeviceMap" => Err(on_raw_devices(kind)),
        _ => Ok(()),
    }
}

fn on_raw_devices(kind: &str) -> Error {
    let error = Error::new(ErrorKind::Unsupported, format!("Unsupported image type '{kind}'"));
    error.hint("The disk lies on raw devices of the machine that it was made on: copy it from there.")
}
