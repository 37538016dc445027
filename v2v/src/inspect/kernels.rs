//! The kernels of a system: what the boot loaders offer, and what lies around besides.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guestdisk::Disks;
use guestdisk::boot::{Boot, BootFile, Entry};
use guestdisk::fs::{File, FileKind};

use super::drivers::Known;
use super::{Kernel, System, initrds};
use crate::initramfs::Seen;
use crate::names::DiskNames;
use crate::view::{GuestView, Place};

/// The most kernels of a system.
const MOST_KERNELS: usize = 128;
/// How much of a kernel is read: as far as its version's address can reach.
const HEAD: u64 = 0x1_0400;

/// What kernels' files are called, in front of the release.
const IMAGE_NAMES: [&str; 8] =
    ["vmlinuz-", "vmlinux-", "vmlinuz.", "bzImage-", "Image-", "Image.gz-", "kernel-", "linux-"];

/// The entries that start this system: those whose `root=` means it, and, where that is not clear, all that mean no other.
pub(super) fn entries_of(
    disks: &Disks,
    names: &DiskNames,
    boot: &Boot,
    system: &System,
    several: bool,
) -> Vec<Entry> {
    let own = |entry: &&Entry| {
        let root = word(&entry.cmdline, "root=").and_then(|root| names.find(disks, root));
        root == Some(system.root) || root.is_none() && (!several || entry.kernel.volume == system.root)
    };
    let fits: Vec<Entry> = boot.entries.iter().filter(own).cloned().collect();
    // A name that means something else here than on the source.
    if fits.is_empty() && !several { boot.entries.clone() } else { fits }
}

/// The value of the last word of a command line that begins with `key`.
pub(super) fn word<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    cmdline.split_whitespace().rev().find_map(|word| word.strip_prefix(key))
}

/// Finds the kernels of a system. `known`: what need not be unpacked again.
pub(super) fn fill(view: &GuestView, system: &mut System, known: &[Arc<Seen>], problems: &mut Vec<String>) {
    let mut kernels: Vec<Kernel> = vec![];
    for entry in &system.entries {
        let image = plain(view, &entry.kernel);
        let initrds: Vec<_> = entry.initrds.iter().map(|file| plain(view, file)).collect();
        let is_same = |known: &Kernel| known.image.as_ref() == Some(&image) && known.initrds == initrds;
        if let Some(known) = kernels.iter_mut().find(|known| is_same(known)) {
            known.entries.push(entry.id.clone());
            known.default |= entry.default;
        } else if kernels.len() < MOST_KERNELS {
            kernels.push(Kernel {
                release: release(view, &image),
                unified: image.section.is_some(),
                image: Some(image),
                initrds,
                entries: vec![entry.id.clone()],
                default: entry.default,
                ..Kernel::default()
            });
        }
    }
    lying_around(view, &mut kernels);
    let read = initrds::read(view, &kernels, known, problems);
    for kernel in &mut kernels {
        let known = Known::of(view, &kernel.release);
        kernel.modules.clone_from(&known.folder);
        let found = read.iter().find(|(files, _)| *files == kernel.initrds);
        kernel.initramfs = found.and_then(|(_, found)| found.clone());
        kernel.drivers = known.drivers(kernel.initramfs.as_ref());
    }
    system.kernels = kernels;
}

/// A file without symbolic links; as it is if it cannot be found.
fn plain(view: &GuestView, file: &BootFile) -> BootFile {
    match view.place_of(file) {
        Ok(place) => BootFile { section: file.section, ..view.boot_file(&place) },
        Err(_) => file.clone(),
    }
}

/// Kernels that no boot loader offers.
fn lying_around(view: &GuestView, kernels: &mut Vec<Kernel>) {
    let in_boot = view.names_in("/boot").into_iter().map(|name| Path::new("/boot").join(name));
    let is_kernel = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        IMAGE_NAMES.iter().any(|start| name.starts_with(start)) || name == "vmlinuz"
    };
    let in_boot: Vec<PathBuf> = in_boot.filter(is_kernel).collect();
    let releases = view.names_in("/lib/modules").into_iter();
    let beside_modules = releases.map(|release| Path::new("/lib/modules").join(release).join("vmlinuz"));
    for path in in_boot.into_iter().chain(beside_modules) {
        let Ok(place) = view.locate(&path) else { continue };
        if kernels.len() >= MOST_KERNELS
            || !view.metadata(&place.guest_path).is_ok_and(|found| found.kind == FileKind::File)
        {
            continue;
        }
        let image = view.boot_file(&place);
        let release = release(view, &image);
        // A copy of one that is known, as Fedora keeps in the folder of modules.
        let known = kernels.iter().any(|known| {
            known.image.as_ref() == Some(&image) || !release.is_empty() && known.release == release
        });
        if !known {
            let initrds = initrd_by_name(view, &place, &release);
            kernels.push(Kernel { release, image: Some(image), initrds, ..Kernel::default() });
        }
    }
}

/// The initramfs that belongs to a kernel by its name.
fn initrd_by_name(view: &GuestView, kernel: &Place, release: &str) -> Vec<BootFile> {
    if release.is_empty() {
        return vec![];
    }
    let folder = kernel.guest_path.parent().unwrap_or(Path::new("/boot"));
    let names = ["initrd.img-", "initramfs-", "initrd-", "initramfs.img-"];
    let candidates = names.iter().flat_map(|start| ["", ".img"].map(|end| format!("{start}{release}{end}")));
    let found = candidates.filter_map(|name| view.locate(folder.join(name)).ok()).next();
    found.map(|place| view.boot_file(&place)).into_iter().collect()
}

/// The release of a kernel: what its image says of itself, else what it is called.
fn release(view: &GuestView, image: &BootFile) -> String {
    let head = view.place_of(image).ok().and_then(|place| {
        let file = view.open(&place).ok()?;
        let mut head = vec![];
        Part::new(&file, image.section).take(HEAD).read_to_end(&mut head).ok()?;
        Some(head)
    });
    head.and_then(|head| release_in(&head)).or_else(|| release_of(&image.path)).unwrap_or_default()
}

/// The first word of the version string of a bzImage (Linux documentation, "The Linux/x86 Boot Protocol", `kernel_version`).
fn release_in(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let pointer = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    let text = head.get(usize::from(pointer).checked_add(0x200).filter(|at| *at > 0x200)?..)?;
    let word = text.split(|byte| byte.is_ascii_whitespace() || *byte == 0).next()?;
    std::str::from_utf8(word).ok().filter(|word| is_release(word)).map(str::to_owned)
}

/// By the name of the file, or of the folder that it lies in.
fn release_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let by_name = IMAGE_NAMES.iter().find_map(|start| name.strip_prefix(start));
    let by_folder = || path.parent()?.file_name()?.to_str();
    let numbered = |release: &&str| release.starts_with(|c: char| c.is_ascii_digit());
    by_name.or_else(|| by_folder().filter(numbered)).filter(|release| is_release(release)).map(str::to_owned)
}

/// Whether it can be the name of a folder of modules.
fn is_release(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '~' | '@' | ':');
    !text.is_empty() && text.len() <= 128 && !text.starts_with('.') && text.chars().all(allowed)
}

/// A part of a file, or all of it, as a stream.
pub(super) struct Part<'a> {
    file: &'a File<'a>,
    offset: u64,
    /// Bytes that are left.
    pub(super) left: u64,
}

impl<'a> Part<'a> {
    pub(super) fn new(file: &'a File<'a>, section: Option<(u64, u64)>) -> Self {
        let (offset, len) = section.unwrap_or((0, file.size()));
        Self { file, offset, left: len.min(file.size().saturating_sub(offset)) }
    }
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(block::num::to_usize(self.left));
        let read = self.file.read_at(&mut buf[..len], self.offset);
        let read = read.map_err(|error| std::io::Error::other(error.to_string()))?;
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The head of a bzImage of this version.
    pub(crate) fn bzimage(version: &str) -> Vec<u8> {
        let mut head = vec![0; 0x400];
        head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x206..0x208].copy_from_slice(&[0x0f, 2]);
        head[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        head[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
        head
    }

    #[test]
    fn releases_in_images() {
        let version = "6.1.0-30-amd64 (debian-kernel@lists.debian.org) #1 SMP";
        assert_eq!(release_in(&bzimage(version)).unwrap(), "6.1.0-30-amd64");
        assert_eq!(release_in(&bzimage("../../etc x")), None);
        assert_eq!(release_in(&bzimage("")), None);
        assert_eq!(release_in(b"MZ"), None);
        let mut far = bzimage(version);
        far[0x20e..0x210].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(release_in(&far), None);
    }

    #[test]
    fn releases_in_names() {
        for (path, release) in [
            ("/boot/vmlinuz-6.1.0-30-amd64", Some("6.1.0-30-amd64")),
            ("/usr/lib/modules/6.9.1-arch1-1/vmlinuz", Some("6.9.1-arch1-1")),
            ("/0123456789abcdef/5.14.0-1.el9/linux", Some("5.14.0-1.el9")),
            ("/boot/vmlinuz", None),
            ("/boot/vmlinuz-", None),
        ] {
            assert_eq!(release_of(Path::new(path)).as_deref(), release, "{path}");
        }
    }

    #[test]
    fn the_last_root_counts() {
        assert_eq!(word("ro root=/dev/sda1 quiet root=UUID=1", "root="), Some("UUID=1"));
        assert_eq!(word("noroot=1", "root="), None);
    }
}
