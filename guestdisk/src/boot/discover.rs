//! Where boot loaders keep their configurations, and which of them comes first.

use super::files::Files;
use super::{Boot, BootFile, Entry, bls, config, grub, uki};

/// The most configurations, and the most entries of all of them.
const MOST_CONFIGS: usize = 64;
const MOST_ENTRIES: usize = 4096;
/// How much of a boot loader is searched for its name.
const LOADER_BYTES: usize = 1 << 20;

/// Where GRUB's folder may be on a volume: on a file system of its own, in that of the root, in subvolumes of btrfs.
const BOOT_FOLDERS: &[&str] = &["/boot", "", "/@/boot", "/@boot", "/@rootfs/boot", "/root/boot"];
/// Where syslinux and extlinux look for theirs.
const SYSLINUX: &[&str] = &[
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/syslinux.cfg",
    "/EFI/syslinux/syslinux.cfg",
    "/EFI/BOOT/syslinux.cfg",
];

/// The entries of one configuration.
#[derive(Debug)]
pub(super) struct Group {
    entries: Vec<Entry>,
    /// Index of the one that starts by itself.
    default: Option<usize>,
    sources: Vec<BootFile>,
}

impl Group {
    pub(super) fn new(entries: Vec<Entry>, default: Option<usize>, sources: Vec<BootFile>) -> Self {
        Self { entries, default, sources }
    }
}

/// Collects the configurations in the order in which they count.
pub(super) struct Finder {
    files: Files,
    entries: Vec<Entry>,
    looked_at: Vec<String>,
    /// Files and directories that have been taken account of.
    seen: Vec<(usize, std::path::PathBuf)>,
    configs: usize,
    has_default: bool,
}

impl Finder {
    pub(super) fn new(files: Files) -> Self {
        Self { files, entries: vec![], looked_at: vec![], seen: vec![], configs: 0, has_default: false }
    }

    pub(super) fn run(&mut self) {
        let readable = (0..self.files.volumes.len()).filter(|index| self.files.volumes[*index].readable);
        let readable: Vec<_> = readable.collect();
        let (efi, others): (Vec<_>, Vec<_>) = readable.iter().partition(|index| self.is_esp(**index));
        let systemd_first = efi.iter().any(|volume| self.starts_systemd_boot(*volume));
        for volume in &efi {
            self.fallback_image(*volume);
        }
        if systemd_first {
            self.systemd_boot(&efi, &others);
        }
        for volume in &efi {
            self.grub_on_esp(*volume);
        }
        for volume in others.iter().chain(&efi) {
            self.grub(*volume);
        }
        if !systemd_first {
            self.systemd_boot(&efi, &others);
        }
        for volume in others.iter().chain(&efi) {
            self.syslinux(*volume);
            self.grub_legacy(*volume);
        }
        if self.files.is_exhausted() {
            self.looked_at
                .push("the file systems took too long to read: not everything was looked at".into());
        }
        let count = readable.len();
        self.looked_at.push(format!(
            "on {count} file systems: grub/grub.cfg and grub2/grub.cfg in / and /boot, EFI/*/grub.cfg, loader/entries/*.conf, \
             EFI/Linux/*.efi, EFI/BOOT/BOOTX64.EFI, extlinux.conf, syslinux.cfg, grub/menu.lst"
        ));
    }

    pub(super) fn finish(mut self) -> Boot {
        if !self.has_default
            && let Some(first) = self.entries.first_mut()
        {
            first.default = true;
        }
        let mut looked_at = std::mem::take(&mut self.files.notes);
        looked_at.append(&mut self.looked_at);
        Boot { entries: self.entries, looked_at, files: self.files }
    }

    /// The EFI System Partition, or what looks like one on a disk without such types.
    fn is_esp(&self, volume: usize) -> bool {
        self.files.volumes[volume].is_esp || self.files.exists(volume, "/EFI/BOOT")
    }

    /// Whether the program that firmware starts is systemd-boot, which says so.
    fn starts_systemd_boot(&self, volume: usize) -> bool {
        let names = ["/EFI/BOOT/BOOTX64.EFI", "/EFI/BOOT/BOOTAA64.EFI"];
        names.iter().any(|name| {
            let file = self.files.at(volume, name);
            let head = self.files.head(&file, LOADER_BYTES).unwrap_or_default();
            head.windows(12).any(|window| window == b"systemd-boot")
        })
    }

    /// Takes the entries of a configuration.
    fn take(&mut self, group: Group) {
        for source in &group.sources {
            self.seen.push((source.volume, source.path.clone()));
        }
        let names: Vec<_> = group.sources.iter().map(ToString::to_string).collect();
        self.looked_at.push(format!("{}: {} entries", names.join(" and "), group.entries.len()));
        for (index, mut entry) in group.entries.into_iter().enumerate() {
            if self.entries.len() >= MOST_ENTRIES {
                break;
            }
            // The loader that comes first decides.
            entry.default = !self.has_default && group.default == Some(index);
            self.entries.push(entry);
        }
        if !self.has_default && !self.entries.is_empty() {
            if !self.entries.iter().any(|entry| entry.default) {
                self.entries[0].default = true;
            }
            self.has_default = true;
        }
    }

    /// A file that is there and has not been read yet.
    fn fresh(&mut self, volume: usize, path: &str) -> Option<BootFile> {
        let file = self.files.at(volume, path);
        let known = self.seen.iter().any(|(known, path)| *known == volume && *path == file.path);
        if known || self.configs >= MOST_CONFIGS || !self.files.exists(volume, path) {
            return None;
        }
        self.configs += 1;
        Some(file)
    }

    /// What a firmware starts without being told may be a kernel by itself.
    fn fallback_image(&mut self, volume: usize) {
        let file = self.files.at(volume, "/EFI/BOOT/BOOTX64.EFI");
        if self.files.exists(volume, "/EFI/BOOT/BOOTX64.EFI")
            && let Ok(Some(entry)) = uki::entry(&self.files, &file)
        {
            self.take(Group::new(vec![entry], Some(0), vec![file]));
        }
    }

    /// The small configurations that lead from the EFI System Partition to the large one.
    fn grub_on_esp(&mut self, volume: usize) {
        let mut vendors = self.files.list(volume, "/EFI");
        vendors.sort_by_key(|vendor| vendor.eq_ignore_ascii_case("BOOT"));
        for vendor in vendors {
            self.grub_config(volume, &format!("/EFI/{vendor}/grub.cfg"), true);
        }
    }

    fn grub(&mut self, volume: usize) {
        for folder in BOOT_FOLDERS {
            for name in ["grub", "grub2"] {
                let efi = self.files.volumes.iter().any(|facts| facts.is_esp);
                self.grub_config(volume, &format!("{folder}/{name}/grub.cfg"), efi);
            }
        }
    }

    fn grub_config(&mut self, volume: usize, path: &str, efi: bool) {
        let Some(file) = self.fresh(volume, path) else { return };
        let menu = grub::menu(&self.files, &file, efi);
        self.looked_at.extend(menu.notes);
        self.seen.extend(menu.directories.into_iter().map(|(volume, path)| (volume, path.into())));
        let default = menu.entries.iter().position(|entry| entry.default);
        let mut sources = menu.sources;
        if sources.is_empty() {
            sources.push(file);
        }
        self.take(Group::new(menu.entries, default, sources));
    }

    /// What systemd-boot shows: the files of the specification, then unified kernel images.
    fn systemd_boot(&mut self, efi: &[usize], others: &[usize]) {
        let (mut entries, mut sources) = (vec![], vec![]);
        let mut pattern = None;
        for volume in efi.iter().chain(others).copied() {
            if let Some(file) = self.fresh(volume, "/loader/loader.conf") {
                let text = self.files.text(&file).unwrap_or_default();
                pattern = pattern.or_else(|| bls::default_pattern(&text).map(str::to_owned));
                sources.push(file);
            }
            for folder in ["/loader/entries", "/boot/loader/entries"] {
                let Some(directory) = self.fresh(volume, folder) else { continue };
                let specs = bls::read(&self.files, volume, folder);
                entries.extend(specs.iter().filter_map(|(spec, file)| bls::entry(&self.files, spec, file)));
                sources.push(directory);
            }
            for folder in ["/EFI/Linux", "/boot/EFI/Linux", "/boot/efi/EFI/Linux"] {
                let Some(directory) = self.fresh(volume, folder) else { continue };
                entries.extend(self.unified(volume, folder));
                sources.push(directory);
            }
        }
        if sources.is_empty() {
            return;
        }
        let fits = |entry: &Entry, pattern: &str| {
            bls::fits(pattern, &entry.id) || bls::fits(pattern, &format!("{}.conf", entry.id))
        };
        let default = pattern.and_then(|pattern| entries.iter().position(|entry| fits(entry, &pattern)));
        self.take(Group::new(entries, default.or(Some(0)), sources));
    }

    /// The unified kernel images of a folder, the newest first.
    fn unified(&mut self, volume: usize, folder: &str) -> Vec<Entry> {
        let mut names = self.files.list(volume, folder);
        names.retain(|name| name.to_ascii_lowercase().ends_with(".efi"));
        names.sort_by(|one, other| super::version::compare(other, one));
        let mut entries = vec![];
        for name in names.into_iter().take(MOST_CONFIGS) {
            match uki::entry(&self.files, &self.files.at(volume, format!("{folder}/{name}"))) {
                Ok(entry) => entries.extend(entry),
                Err(error) => self.looked_at.push(error.to_string()),
            }
        }
        entries
    }

    fn syslinux(&mut self, volume: usize) {
        for path in SYSLINUX {
            if let Some(file) = self.fresh(volume, path) {
                let group = config::syslinux(&self.files, &file);
                self.take(group);
            }
        }
    }

    fn grub_legacy(&mut self, volume: usize) {
        for path in ["/boot/grub/menu.lst", "/grub/menu.lst", "/boot/grub/grub.conf", "/grub/grub.conf"] {
            if let Some(file) = self.fresh(volume, path)
                && let Some(group) = config::grub_legacy(&self.files, &file)
            {
                self.take(group);
            }
        }
    }
}
