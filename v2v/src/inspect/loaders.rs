//! Boot loaders: their configuration files, the EFI system partition, and what can start the disks.

use std::path::{Path, PathBuf};

use guestdisk::Disks;
use guestdisk::boot::firmware::{self, Firmware};
use guestdisk::boot::{BootFile, Loader};
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;

use super::{Inspection, LoaderConfig, System};
use crate::guest::FirmwareKind;
use crate::view::GuestView;

/// The most files.
const MOST_FILES: usize = 1024;

/// Files at known places, as the guest sees them.
const FILES: [(&str, Loader); 22] = [
    ("/boot/grub/grub.cfg", Loader::Grub),
    ("/boot/grub/custom.cfg", Loader::Grub),
    ("/boot/grub/grubenv", Loader::Grub),
    ("/boot/grub2/grub.cfg", Loader::Grub),
    ("/boot/grub2/custom.cfg", Loader::Grub),
    ("/boot/grub2/user.cfg", Loader::Grub),
    ("/boot/grub2/grubenv", Loader::Grub),
    ("/boot/grub2/device.map", Loader::Grub),
    ("/etc/default/grub", Loader::Grub),
    ("/boot/grub/menu.lst", Loader::GrubLegacy),
    ("/boot/grub/grub.conf", Loader::GrubLegacy),
    ("/boot/grub/device.map", Loader::GrubLegacy),
    ("/etc/sysconfig/bootloader", Loader::GrubLegacy),
    ("/etc/kernel/cmdline", Loader::BootLoaderSpec),
    ("/boot/loader/loader.conf", Loader::BootLoaderSpec),
    ("/efi/loader/loader.conf", Loader::BootLoaderSpec),
    ("/boot/efi/loader/loader.conf", Loader::BootLoaderSpec),
    ("/boot/extlinux/extlinux.conf", Loader::Syslinux),
    ("/boot/extlinux.conf", Loader::Syslinux),
    ("/boot/syslinux/syslinux.cfg", Loader::Syslinux),
    ("/etc/default/extlinux", Loader::Syslinux),
    ("/etc/update-extlinux.conf", Loader::Syslinux),
];

/// Folders of which all `*.conf` belong to a loader.
const FOLDERS: [(&str, &str, Loader); 5] = [
    ("/boot/loader/entries", ".conf", Loader::BootLoaderSpec),
    ("/efi/loader/entries", ".conf", Loader::BootLoaderSpec),
    ("/boot/efi/loader/entries", ".conf", Loader::BootLoaderSpec),
    ("/etc/default/grub.d", ".cfg", Loader::Grub),
    ("/etc/kernel/cmdline.d", ".conf", Loader::BootLoaderSpec),
];

/// Finds the configuration files, the EFI system partition and its fallback loader.
pub(super) fn fill(disks: &Disks, view: &GuestView, system: &mut System) {
    let mut files = Files { view, found: vec![] };
    for entry in &system.entries {
        // A unified kernel is no configuration.
        if entry.loader != Loader::UnifiedKernel {
            files.add_file(&entry.source, form_of(&entry.source.path, entry.loader));
        }
    }
    for (path, loader) in FILES {
        files.add(Path::new(path), loader);
    }
    for (folder, end, loader) in FOLDERS {
        for name in view.names_in(folder).iter().filter(|name| name.ends_with(end)) {
            files.add(&Path::new(folder).join(name), loader);
        }
    }
    let efi = firmware::facts(disks).map(|facts| facts.efi).unwrap_or_default();
    let own = |partition: &&firmware::EfiPartition| {
        system.mounts.iter().any(|mount| mount.volume == Some(partition.volume))
    };
    let partition = efi.iter().find(own).or_else(|| efi.first());
    system.esp = partition.map(|partition| partition.volume).or_else(|| esp_of_mount(disks, system));
    let fallback = partition.and_then(|partition| partition.fallback.as_deref());
    system.fallback_loader = fallback.map(|path| PathBuf::from(path.replace('\\', "/")));
    if let Some(volume) = system.esp {
        let alone = GuestView::of_volume(disks, volume);
        for vendor in alone.names_in("/EFI") {
            let path = Path::new("/EFI").join(vendor).join("grub.cfg");
            if let Ok(place) = alone.locate(&path) {
                files.add_file(&alone.boot_file(&place), Loader::Grub);
            }
        }
        if system.fallback_loader.is_none() {
            system.fallback_loader = fallback_of(&alone);
        }
    }
    system.loaders = files.found;
}

/// In which form a file is that this loader's entry comes from: GRUB's `blscfg` offers what the files of the Boot Loader
/// Specification say.
fn form_of(path: &Path, loader: Loader) -> Loader {
    let is_entry = path.extension().is_some_and(|end| end == "conf")
        && path.parent().is_some_and(|folder| folder.ends_with("loader/entries"));
    if is_entry { Loader::BootLoaderSpec } else { loader }
}

/// What is mounted where EFI system partitions are mounted, on a disk without such types.
fn esp_of_mount(disks: &Disks, system: &System) -> Option<usize> {
    let is_there = |path: &Path| ["/boot/efi", "/efi"].iter().any(|known| Path::new(known) == path);
    let volume = system.mounts.iter().find(|mount| is_there(&mount.path))?.volume?;
    let content = disks.volumes().get(volume)?.content.as_ref()?;
    (content.kind == Kind::Vfat).then_some(volume)
}

/// The fallback loader of any machine (UEFI 2.10, 3.5.1.1).
fn fallback_of(esp: &GuestView) -> Option<PathBuf> {
    let names = ["BOOTX64.EFI", "BOOTAA64.EFI", "BOOTIA32.EFI", "BOOTRISCV64.EFI", "BOOTLOONGARCH64.EFI"];
    let found = names.iter().find_map(|name| esp.locate(Path::new("/EFI/BOOT").join(name)).ok());
    found.map(|place| place.path)
}

/// Files, each once.
struct Files<'a> {
    view: &'a GuestView,
    found: Vec<LoaderConfig>,
}

impl Files<'_> {
    fn add(&mut self, path: &Path, loader: Loader) {
        let Ok(place) = self.view.locate(path) else { return };
        let file = self.view.open(&place).is_ok_and(|file| file.metadata().kind == FileKind::File);
        if file {
            self.push(self.view.boot_file(&place), loader);
        }
    }

    fn add_file(&mut self, file: &BootFile, loader: Loader) {
        match self.view.place_of(file) {
            Ok(place) => self.push(self.view.boot_file(&place), loader),
            Err(_) => self.push(file.clone(), loader),
        }
    }

    fn push(&mut self, file: BootFile, loader: Loader) {
        if self.found.len() < MOST_FILES && !self.found.iter().any(|known| known.file == file) {
            self.found.push(LoaderConfig { loader, file });
        }
    }
}

/// By which firmware the disks can be started, the more likely one first.
pub(super) fn firmware(disks: &Disks, found: &mut Inspection) {
    let facts = match firmware::facts(disks) {
        Ok(facts) => facts,
        Err(error) => {
            found.problems.push(error.to_string());
            return;
        }
    };
    let choice = facts.choose(None);
    let kind = |firmware| match firmware {
        Firmware::Bios => FirmwareKind::Bios,
        Firmware::Uefi => FirmwareKind::Uefi,
    };
    if choice.startable {
        found.firmware.push(kind(choice.firmware));
        if choice.both {
            found.firmware.push(kind(choice.firmware.other()));
        }
    }
    found.firmware_reasons.push(format!("{}: {}", choice.firmware, choice.reason));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_grub_takes_from_elsewhere_keep_their_form() {
        for (path, form) in [
            ("/loader/entries/0-rescue.conf", Loader::BootLoaderSpec),
            ("/boot/loader/entries/a.conf", Loader::BootLoaderSpec),
            ("/boot/grub2/grub.cfg", Loader::Grub),
            ("/loader/grub.conf", Loader::Grub),
        ] {
            assert_eq!(form_of(Path::new(path), Loader::Grub), form, "{path}");
        }
    }
}
