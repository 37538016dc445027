//! What the guest's boot loader would start: kernels, initramfs images and command lines.
//!
//! ```text
//!   EFI System Partition      /boot, /                          what is understood
//!   EFI/debian/grub.cfg  -->  grub/grub.cfg, grub2/grub.cfg     GRUB 2 (and what it sources)
//!   loader/entries/*.conf     loader/entries/*.conf             Boot Loader Specification, type 1
//!   EFI/Linux/*.efi                                             unified kernel images (type 2)
//!   syslinux.cfg              extlinux/extlinux.conf            syslinux and extlinux
//!                             grub/menu.lst, grub/grub.conf     GRUB of the first generation
//! ```
//!
//! [`entries`] looks at all volumes of a guest and gives the entries in the order of its menu, the one that would be
//! started without anybody's doing marked as the default. Nothing is guessed: a kernel that no boot loader knows of is no
//! entry. What was looked at is told in any case ([`Boot::looked_at`]).

mod bls;
mod config;
mod discover;
mod files;
pub mod firmware;
mod grub;
pub mod nvram;
mod uki;
mod version;

use std::fmt;
use std::path::PathBuf;

use block::{Error, ErrorKind, Result};

use crate::disks::{Disks, Location};
use files::Files;

#[doc(hidden)]
pub use grub::titles as grub_titles;

/// Whose configuration an entry is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Loader {
    /// GRUB 2.
    Grub,
    /// GRUB of the first generation ("legacy").
    GrubLegacy,
    /// A file of the Boot Loader Specification, read by systemd-boot.
    BootLoaderSpec,
    /// A unified kernel image.
    UnifiedKernel,
    /// extlinux or syslinux.
    Syslinux,
}

impl fmt::Display for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grub => "GRUB 2",
            Self::GrubLegacy => "GRUB legacy",
            Self::BootLoaderSpec => "Boot Loader Specification",
            Self::UnifiedKernel => "unified kernel image",
            Self::Syslinux => "syslinux",
        })
    }
}

/// A file on one of the guest's volumes, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFile {
    /// Index of the volume in [`Disks::volumes`].
    pub volume: usize,
    /// Where that volume lies.
    pub location: Location,
    /// The path within the volume.
    pub path: PathBuf,
    /// Offset and length in bytes, if only a part of the file is meant: a section of a unified kernel image.
    pub section: Option<(u64, u64)>,
}

/// `disk 1 partition 2:/boot/vmlinuz`
impl fmt::Display for BootFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.location, self.path.display())
    }
}

/// Something that the boot loader offers to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What the menu shows.
    pub title: String,
    /// By what the boot loader's configuration refers to it; titles of submenus in front, with `>`.
    pub id: String,
    /// The kernel.
    pub kernel: BootFile,
    /// Initramfs images, to be loaded one after the other.
    pub initrds: Vec<BootFile>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The file that the entry is from.
    pub source: BootFile,
    /// Whose configuration that is.
    pub loader: Loader,
    /// It is what starts without anybody's doing. Exactly one entry is, if there is any.
    pub default: bool,
}

/// What the boot loaders of a guest offer.
#[derive(Debug)]
pub struct Boot {
    /// In the order of the menus, those of the loader that comes first in front.
    pub entries: Vec<Entry>,
    /// Which files were read, which were looked for in vain, and what could not be understood.
    pub looked_at: Vec<String>,
    files: Files,
}

/// Finds out what the boot loaders of a guest offer. An empty list of entries is not an error; [`Boot::default_entry`]
/// makes it one.
pub fn entries(disks: &Disks) -> Boot {
    let mut finder = discover::Finder::new(Files::open(disks));
    finder.run();
    finder.finish()
}

impl Boot {
    /// The entry that would be started.
    ///
    /// # Errors
    /// `NotFound` if there is none, with what was looked at.
    pub fn default_entry(&self) -> Result<&Entry> {
        let entry = self.entries.iter().find(|entry| entry.default).or_else(|| self.entries.first());
        entry.ok_or_else(|| self.nothing())
    }

    /// The entry of this id or title, or of this number in the list (from 1).
    ///
    /// # Errors
    /// `NotFound`, with the titles there are.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        let by = |same: &dyn Fn(&Entry) -> bool| self.entries.iter().find(|entry| same(entry));
        let numbered =
            || name.parse::<usize>().ok()?.checked_sub(1).and_then(|index| self.entries.get(index));
        by(&|entry| entry.id == name)
            .or_else(|| by(&|entry| entry.title == name))
            .or_else(numbered)
            .ok_or_else(|| {
                if self.entries.is_empty() {
                    return self.nothing();
                }
                let error = Error::new(ErrorKind::NotFound, format!("no boot entry is called '{name}'"));
                let titles: Vec<_> = (1..)
                    .zip(&self.entries)
                    .map(|(number, entry)| format!("{number} '{}'", entry.title))
                    .collect();
                error.hint(format!("There are: {}.", titles.join(", ")))
            })
    }

    fn nothing(&self) -> Error {
        let error = Error::new(ErrorKind::NotFound, "no boot loader of this guest offers a Linux kernel");
        error.hint(format!("Looked at: {}.", self.looked_at.join("; ")))
    }

    /// The bytes of a kernel, an initramfs or a configuration, if they are at most `max_bytes`.
    ///
    /// # Errors
    /// `NotFound` if the file that the boot loader names is not there; `Unsupported` if it is larger; the file system is
    /// damaged or the device failed.
    pub fn read(&self, file: &BootFile, max_bytes: u64) -> Result<Vec<u8>> {
        self.files.read(file, max_bytes)
    }
}

/// The most bytes of a command line: eight times what Linux takes.
const MOST_CMDLINE: usize = 16 << 10;

/// Puts words together, as far as a command line reaches.
fn cmdline<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let mut line = String::new();
    for word in words {
        if line.len() + word.len() >= MOST_CMDLINE {
            break;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

#[cfg(test)]
mod tests;
