//! Unified kernel images: a program for UEFI with kernel, initramfs and command line as its sections (UAPI.5; Microsoft,
//! "PE Format").

use block::{Error, Result};

use super::files::Files;
use super::{BootFile, Entry, Loader};
use crate::bytes::{le16, le32, part, text};

/// Where the table of sections has to be.
const HEAD_BYTES: usize = 64 << 10;
/// The most bytes of a section that is text.
const MOST_TEXT: u64 = 64 << 10;

/// A section: name, offset and length in the file.
type Section = (String, u64, u64);

/// The sections that are named in the first bytes of a program.
pub(crate) fn sections(head: &[u8]) -> Option<Vec<Section>> {
    let at = le32(head, 0x3c) as usize;
    if !head.starts_with(b"MZ") || part(head, at, 4) != b"PE\0\0" {
        return None;
    }
    let (count, optional) = (usize::from(le16(head, at + 6)), usize::from(le16(head, at + 20)));
    let table = part(head, at + 24 + optional, 40 * count);
    let section = |raw: &[u8]| {
        // The size in the file is rounded up, the size in memory may be larger than the file has.
        let len = le32(raw, 8).min(le32(raw, 16));
        (text(part(raw, 0, 8)), u64::from(le32(raw, 20)), u64::from(len))
    };
    Some(table.chunks_exact(40).map(section).collect())
}

/// The entry that an image stands for; `None` if it is another program for UEFI.
pub(super) fn entry(files: &Files, file: &BootFile) -> Result<Option<Entry>> {
    let sections = sections(&files.head(file, HEAD_BYTES)?)
        .ok_or_else(|| Error::invalid(format!("{file}: not a program for UEFI")))?;
    let section = |wanted: &str| {
        let (_, offset, len) = sections.iter().find(|(name, ..)| name == wanted)?;
        Some(BootFile { section: Some((*offset, *len)), ..file.clone() })
    };
    let words = |wanted| {
        let bytes = section(wanted).map(|section| files.read(&section, MOST_TEXT)).transpose()?;
        Ok::<_, Error>(bytes.map(|bytes| text(&bytes)).unwrap_or_default())
    };
    let Some(kernel) = section(".linux") else { return Ok(None) };
    let (release, version) = (words(".osrel")?, words(".uname")?);
    let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let value = |key: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim().trim_matches(['"', '\'']).to_owned())
    };
    let title = value("PRETTY_NAME").unwrap_or_else(|| name.clone());
    Ok(Some(Entry {
        title: if version.is_empty() { title } else { format!("{title} ({})", version.trim()) },
        id: name,
        kernel,
        // Microcode goes first.
        initrds: [".ucode", ".initrd"].into_iter().filter_map(section).collect(),
        cmdline: words(".cmdline")?.trim().to_owned(),
        source: file.clone(),
        loader: Loader::UnifiedKernel,
        default: false,
    }))
}
