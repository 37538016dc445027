//! The programs that UEFI could start: the fallback, and what installers leave in their folders.

use super::{EfiPartition, FALLBACK};
use crate::detect::Kind;
use crate::disks::{Disks, Location, Volume};
use crate::fs::{FileKind, FileSystem};
use crate::md::{Member, MemberState};

/// The most loaders that are told, and the most folders that are looked into.
const MOST_LOADERS: usize = 16;
const MOST_FOLDERS: usize = 64;

/// The partitions of the first disk that are for UEFI, or hold something for it.
pub(super) fn partitions(disks: &Disks) -> Vec<EfiPartition> {
    let first = |volume: &Volume| volume.location.disk() == Some(0);
    let volumes = disks.volumes().iter().filter(|volume| first(volume));
    volumes.filter_map(|volume| partition(disks, volume)).collect()
}

/// What a firmware sees on a partition: it knows nothing of arrays, and reads a member of RAID 1 whose superblock is at its end as
/// if it were the array, as long as it holds the same.
fn seen<'a>(disks: &'a Disks, volume: &'a Volume) -> &'a Volume {
    let is_it = |member: &Member| {
        member.location == volume.location && member.data_offset == 0 && member.state == MemberState::InSync
    };
    let array = disks.arrays().iter().find(|array| array.level == "raid1" && array.members.iter().any(is_it));
    let location = array.map(|array| Location::Array { name: array.name.clone(), partition: None });
    let whole = location.and_then(|location| disks.volumes().iter().find(|other| other.location == location));
    whole.unwrap_or(volume)
}

fn partition(disks: &Disks, volume: &Volume) -> Option<EfiPartition> {
    let typed = volume.partition.as_ref().is_some_and(crate::partition::Partition::is_efi_system);
    let location = volume.location.clone();
    let volume = seen(disks, volume);
    let index = disks.volumes().iter().position(|other| std::ptr::eq(other, volume))?;
    let is_fat = volume.content.as_ref().is_some_and(|content| content.kind == Kind::Vfat);
    if !typed && !is_fat {
        return None;
    }
    let mut found =
        EfiPartition { location, volume: index, typed, unreadable: None, loaders: vec![], fallback: None };
    // What is no FAT file system is nothing that a firmware can read, either.
    match volume.file_system() {
        Ok(system) if is_fat => look(&system, &mut found),
        Ok(_) => found.unreadable = Some("it holds no FAT file system".to_owned()),
        Err(error) => found.unreadable = Some(error.to_string()),
    }
    let holds_something = found.fallback.is_some() || !found.loaders.is_empty();
    (typed || holds_something).then_some(found)
}

fn look(system: &FileSystem, found: &mut EfiPartition) {
    let mut folders = vec![];
    for vendor in names(system, "/EFI", true) {
        let vendor = format!("/EFI/{vendor}");
        let inner = names(system, &vendor, true);
        folders.push(vendor.clone());
        folders.extend(inner.into_iter().map(|inner| format!("{vendor}/{inner}")));
    }
    for folder in folders.iter().take(MOST_FOLDERS) {
        for name in names(system, folder, false) {
            let path = format!("{folder}/{name}").replace('/', "\\");
            if path.eq_ignore_ascii_case(FALLBACK) {
                found.fallback = Some(path);
            } else if is_loader(&name) && found.loaders.len() < MOST_LOADERS {
                found.loaders.push(path);
            }
        }
    }
    // What the folder of the fallback holds besides it are helpers, unless there is no fallback.
    if found.fallback.is_some() {
        found.loaders.retain(|path| !path.to_ascii_uppercase().starts_with(r"\EFI\BOOT\"));
    }
}

/// The folders, or the files, of a folder, sorted.
fn names(system: &FileSystem, path: &str, folders: bool) -> Vec<String> {
    let listed = system.read_dir(path).unwrap_or_default();
    let wanted = |kind| (kind == FileKind::Directory) == folders;
    let listed = listed.into_iter().filter(|entry| wanted(entry.kind));
    let mut names: Vec<_> = listed
        .filter_map(|entry| entry.name.into_string().ok())
        .filter(|name| name != "." && name != "..")
        .collect();
    names.sort();
    names
}

/// Programs that start something; not shells, tests of memory, and the parts that loaders load.
fn is_loader(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let helper = ["fb", "mm", "mokmanager", "fwup", "memtest", "shell", "keytool", "hashtool", "bootmgr.efi"];
    name.ends_with(".efi") && !helper.iter().any(|helper| name.starts_with(helper))
}
