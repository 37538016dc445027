//! From a list of names to what an initramfs is: who made it, which modules it has, and where.

use std::collections::{BTreeMap, BTreeSet};

use super::{Archive, Compression, Member};
use crate::inspect::{Initramfs, InitramfsFile};

/// Files (beginnings of paths) that only one generator writes; the first that fits counts.
const GENERATORS: [(&str, &str); 17] = [
    ("conf/initramfs.conf", "initramfs-tools"),
    ("scripts/init-premount", "initramfs-tools"),
    ("scripts/functions", "initramfs-tools"),
    ("usr/lib/dracut", "dracut"),
    ("lib/dracut", "dracut"),
    ("dracut-state.sh", "dracut"),
    ("init_functions", "mkinitcpio"),
    ("buildconfig", "mkinitcpio"),
    ("etc/booster.init.yaml", "booster"),
    ("sbin/nlplug-findfs", "mkinitfs"),
    ("usr/sbin/nlplug-findfs", "mkinitfs"),
    ("etc/initrd.scripts", "genkernel"),
    ("mkinitrd.config", "mkinitrd"),
    ("config/start.sh", "mkinitrd"),
    ("run_all.sh", "mkinitrd"),
    ("bin/nash", "mkinitrd"),
    ("sbin/nash", "mkinitrd"),
];

/// Configuration that says with which devices an initramfs works: paths, and beginnings of paths with a star.
const CONFIGURATION: [&str; 27] = [
    "init",
    "conf/conf.d/*",
    "conf/param.conf",
    "conf/modules",
    "conf/initramfs.conf",
    "etc/conf.d/*",
    "etc/cmdline.d/*",
    "etc/cmdline",
    "etc/crypttab",
    "cryptroot/*",
    "etc/fstab",
    "etc/fstab.empty",
    "etc/fstab.sys",
    "etc/mdadm.conf",
    "etc/mdadm/*",
    "etc/lvm/devices/*",
    "etc/lvm/lvm.conf",
    "etc/lvm/lvmlocal.conf",
    "etc/modules-load.d/*",
    "etc/udev/rules.d/70-persistent*",
    "etc/initrd-release",
    "usr/lib/initrd-release",
    "buildconfig",
    "config",
    "etc/booster.init.yaml",
    "etc/initrd.defaults",
    "mkinitrd.config",
];

/// Whether the contents of this file say something of devices: what to give [`super::read`].
pub fn is_wanted(path: &str) -> bool {
    let fits = |known: &&str| match known.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path == *known,
    };
    // dracut's hooks that wait for devices are named after them, as is what says how long systemd waits.
    CONFIGURATION.iter().any(fits) || path.contains("/devexists-") || path.ends_with(".device.d/timeout.conf")
}

/// The name of a module by its file: without folder and endings, `_` for `-`.
pub fn module_name(path: &str) -> Option<(String, &'static str)> {
    let name = path.rsplit('/').next()?;
    let suffixes = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
    let suffix = suffixes.into_iter().find(|suffix| name.len() > suffix.len() && name.ends_with(suffix))?;
    Some((name[..name.len() - suffix.len()].replace('-', "_"), suffix))
}

/// The paths of the modules among these files, as they come.
pub fn module_paths(members: &[Member]) -> Vec<String> {
    let files = members.iter().filter(|member| member.is_file());
    files.map(|member| &member.path).filter(|path| module_name(path).is_some()).cloned().collect()
}

/// What an initramfs is made of. `len`: the length of its file.
pub fn describe(archive: &Archive, release: &str, len: u64) -> Initramfs {
    let merged_usr = archive
        .get("lib")
        .is_some_and(|lib| lib.is_link() && matches!(lib.target.trim_matches('/'), "usr/lib" | "./usr/lib"));
    let mut found = Modules::default();
    for member in archive.members.iter().filter(|member| member.is_file()) {
        found.take(&member.path, merged_usr);
    }
    Initramfs {
        generator: generator(archive).to_owned(),
        compression: compression(archive).name().to_owned(),
        segments: archive.segments.len(),
        len,
        modules: found.folder(release),
        module_suffix: found.suffix(),
        module_names: found.names.into_iter().collect(),
        merged_usr,
        has_mdadm: archive.members.iter().any(|member| member.path.ends_with("bin/mdadm")),
        files: files(archive),
        module_paths: module_paths(&archive.members),
        problem: archive.problem.clone(),
        seen: archive.seen.clone(),
    }
}

/// That of the last archive which is an initramfs rather than microcode or something appended: the largest.
fn compression(archive: &Archive) -> Compression {
    let largest = archive.segments.iter().max_by_key(|segment| segment.unpacked);
    largest.map_or(Compression::None, |segment| segment.compression)
}

fn generator(archive: &Archive) -> &'static str {
    let has = |start: &str| {
        let begins = |member: &Member| {
            member.path.strip_prefix(start).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        archive.members.iter().any(begins)
    };
    GENERATORS.iter().find(|(start, _)| has(start)).map_or("", |(_, name)| name)
}

/// The wanted files that count: the last of each path.
fn files(archive: &Archive) -> Vec<InitramfsFile> {
    let mut files: BTreeMap<&str, InitramfsFile> = BTreeMap::new();
    for member in &archive.members {
        let Some(bytes) = &member.bytes else { continue };
        let file = InitramfsFile { path: member.path.clone(), mode: member.mode, bytes: bytes.clone() };
        files.insert(&member.path, file);
    }
    files.into_values().collect()
}

/// The modules that have been seen.
#[derive(Default)]
struct Modules {
    names: BTreeSet<String>,
    /// How often each ending occurs, and each folder of a release.
    suffixes: BTreeMap<&'static str, usize>,
    folders: BTreeMap<String, usize>,
}

impl Modules {
    fn take(&mut self, path: &str, merged_usr: bool) {
        let Some((name, suffix)) = module_name(path) else { return };
        self.names.insert(name);
        *self.suffixes.entry(suffix).or_default() += 1;
        let Some(folder) = folder_of(path) else { return };
        // Through the link, the archive has it there.
        let folder = if merged_usr && folder.starts_with("lib/") {
            format!("usr/{folder}")
        } else {
            folder.to_owned()
        };
        *self.folders.entry(folder).or_default() += 1;
    }

    /// The folder of this release, or the one with most modules.
    fn folder(&self, release: &str) -> Option<String> {
        let of_release = |folder: &&String| folder.rsplit('/').next() == Some(release);
        let most = || self.folders.iter().max_by_key(|(_, count)| **count).map(|(folder, _)| folder);
        self.folders.keys().find(of_release).or_else(most).cloned()
    }

    fn suffix(&self) -> String {
        let most = self.suffixes.iter().max_by_key(|(_, count)| **count);
        most.map_or(String::new(), |(suffix, _)| (*suffix).to_owned())
    }
}

/// `usr/lib/modules/RELEASE` of a path below it.
fn folder_of(path: &str) -> Option<&str> {
    let at = if path.starts_with("lib/modules/") {
        "lib/modules/".len()
    } else {
        path.starts_with("usr/lib/modules/").then_some("usr/lib/modules/".len())?
    };
    let end = path[at..].find('/')?;
    Some(&path[..at + end])
}
