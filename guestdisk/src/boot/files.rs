//! The files of all volumes, as boot loaders see them.

use std::path::Path;

use block::{Error, ErrorKind, Result, ResultExt as _};

use super::BootFile;
use crate::detect::Kind;
use crate::disks::{Disks, Location};
use crate::fs::{FileKind, FileSystem};

/// The most bytes of a configuration file that are read.
const MOST_CONFIG: u64 = 1 << 20;
/// The most bytes of one of many small files.
const MOST_SMALL: u64 = 64 << 10;
/// Pages that may be read of all file systems together before nothing is looked for any more: some seconds' worth.
const MOST_WORK: u64 = 16 << 20;

/// A volume with a file system that can be read.
#[derive(Debug)]
struct System {
    /// As it would be mounted, and, of btrfs, as it is without regard to a default subvolume: GRUB counts from there.
    views: Vec<FileSystem>,
}

/// Facts about a volume that loaders go by.
#[derive(Debug, Clone)]
pub(super) struct VolumeFacts {
    pub(super) location: Location,
    pub(super) uuid: String,
    pub(super) label: String,
    pub(super) partuuid: String,
    /// The volume group's UUID and the volume's own, without hyphens, of a logical volume.
    pub(super) lvm_ids: Option<(String, String)>,
    /// The array that it is, or is a partition of.
    pub(super) array: Option<ArrayFacts>,
    /// The UUID of the encrypted volume that it is within, without hyphens; empty if it is within none.
    pub(super) outer_uuid: String,
    pub(super) is_esp: bool,
    pub(super) readable: bool,
}

/// What loaders know an array by.
#[derive(Debug, Clone)]
pub(super) struct ArrayFacts {
    /// Its UUID in 32 digits.
    pub(super) uuid: String,
    /// What follows `md` or `md/`.
    pub(super) names: [String; 3],
}

/// All of them.
#[derive(Debug)]
pub(super) struct Files {
    systems: Vec<Option<System>>,
    pub(super) volumes: Vec<VolumeFacts>,
    /// Why some could not be opened, and what they said when they were.
    pub(super) notes: Vec<String>,
}

impl Files {
    /// Those of a guest without disks.
    pub(super) fn none() -> Self {
        Self { systems: vec![], volumes: vec![], notes: vec![] }
    }

    pub(super) fn open(disks: &Disks) -> Self {
        let mut files = Self { systems: vec![], volumes: vec![], notes: vec![] };
        files.notes.extend(disks.problems().iter().cloned());
        for volume in disks.volumes() {
            let content = volume.content.as_ref();
            let system = if volume.is_readable() { files.system(volume) } else { None };
            match content {
                None => files.notes.push(format!("{}: nothing that is known here", volume.location)),
                Some(_) if disks.within(&volume.location).is_some() => {}
                Some(content)
                    if !content.kind.is_readable()
                        && !matches!(content.kind, Kind::Lvm2 | Kind::LinuxRaid) =>
                {
                    files.notes.push(format!("{}: {}, which is not read", volume.location, content.kind));
                }
                Some(_) => {}
            }
            let is_esp = is_esp(disks, volume);
            files.volumes.push(VolumeFacts {
                location: volume.location.clone(),
                uuid: volume.uuid().to_owned(),
                label: volume.label().to_owned(),
                partuuid: volume.partuuid().to_owned(),
                lvm_ids: lvm_ids(disks, &volume.location),
                array: disks.array_of(&volume.location).map(ArrayFacts::of),
                outer_uuid: disks.outer_uuid(&volume.location).unwrap_or_default().replace('-', ""),
                is_esp,
                readable: system.is_some(),
            });
            files.systems.push(system);
        }
        files
    }

    fn system(&mut self, volume: &crate::Volume) -> Option<System> {
        let main = match volume.file_system() {
            Ok(main) => main,
            Err(error) => {
                self.notes.push(error.to_string());
                return None;
            }
        };
        self.notes.extend(main.notes().iter().map(|note| format!("{}: {note}", volume.location)));
        let mut views = vec![main];
        if views[0].kind() == Kind::Btrfs {
            views.extend(FileSystem::open_top(std::sync::Arc::clone(&volume.device)).ok());
        }
        Some(System { views })
    }

    /// The file at a path of a volume.
    pub(super) fn at(&self, volume: usize, path: impl AsRef<Path>) -> BootFile {
        let location = self.volumes.get(volume).map(|facts| facts.location.clone());
        let location = location.unwrap_or(Location::Whole { disk: volume });
        BootFile { volume, location, path: path.as_ref().to_owned(), section: None }
    }

    /// The view of a volume in which there is something at this path.
    fn view(&self, volume: usize, path: &Path) -> Option<&FileSystem> {
        if self.is_exhausted() {
            return None;
        }
        let system = self.systems.get(volume)?.as_ref()?;
        system.views.iter().find(|view| view.exists(path))
    }

    /// Whether looking for files has cost more than any good disk does.
    pub(super) fn is_exhausted(&self) -> bool {
        let systems = self.systems.iter().flatten();
        systems.flat_map(|system| &system.views).map(FileSystem::work).sum::<u64>() > MOST_WORK
    }

    fn view_or_first(&self, file: &BootFile) -> Result<&FileSystem> {
        let first = || self.systems.get(file.volume)?.as_ref()?.views.first();
        self.view(file.volume, &file.path).or_else(first).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{file}: the volume has no file system that is read"))
        })
    }

    pub(super) fn exists(&self, volume: usize, path: &str) -> bool {
        self.view(volume, Path::new(path)).is_some()
    }

    /// The kind and size of what is at a path.
    pub(super) fn stat(&self, volume: usize, path: &str) -> Option<(FileKind, u64)> {
        let found = self.view(volume, Path::new(path))?.metadata(path).ok()?;
        Some((found.kind, found.size))
    }

    /// The names in a directory, sorted; none if there is no such directory.
    pub(super) fn list(&self, volume: usize, path: &str) -> Vec<String> {
        let Some(view) = self.view(volume, Path::new(path)) else { return vec![] };
        let listed = view.read_dir(path).unwrap_or_default();
        let mut names: Vec<_> =
            listed.into_iter().filter_map(|entry| entry.name.into_string().ok()).collect();
        names.sort();
        names
    }

    pub(super) fn read(&self, file: &BootFile, max_bytes: u64) -> Result<Vec<u8>> {
        let view = self.view_or_first(file)?;
        let Some((offset, len)) = file.section else {
            return view.read(&file.path, max_bytes).context(|| file.location.to_string());
        };
        if len > max_bytes {
            return Err(Error::unsupported(format!(
                "{file}: {len} bytes, more than the {max_bytes} that are read"
            )));
        }
        let open = view.open_file(&file.path).context(|| file.location.to_string())?;
        if offset.checked_add(len).is_none_or(|end| end > open.size()) {
            return Err(Error::invalid(format!(
                "{file}: a section of {len} bytes at {offset:#x} of {}",
                open.size()
            )));
        }
        let mut bytes = vec![0; block::num::to_usize(len)];
        open.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// A configuration file as text.
    pub(super) fn text(&self, file: &BootFile) -> Result<String> {
        self.read(file, MOST_CONFIG).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A small file as text.
    pub(super) fn small_text(&self, file: &BootFile) -> Result<String> {
        self.read(file, MOST_SMALL).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The first bytes of a file.
    pub(super) fn head(&self, file: &BootFile, len: usize) -> Result<Vec<u8>> {
        let open = self.view_or_first(file)?.open_file(&file.path)?;
        let mut bytes = vec![0; len];
        let read = open.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        Ok(bytes)
    }
}

/// An EFI system partition, or an array of such.
fn is_esp(disks: &Disks, volume: &crate::Volume) -> bool {
    let is_typed = |volume: &crate::Volume| {
        volume.partition.as_ref().is_some_and(crate::partition::Partition::is_efi_system)
    };
    let members = disks.array_of(&volume.location).map_or(&[][..], |array| &array.members);
    let of_member = |member: &crate::md::Member| {
        disks.volumes().iter().any(|other| other.location == member.location && is_typed(other))
    };
    is_typed(volume) || members.iter().any(of_member)
}

impl ArrayFacts {
    fn of(array: &crate::md::Array) -> Self {
        let short = array.full_name.split_once(':').map_or(array.full_name.as_str(), |(_, name)| name);
        let names = [array.number.to_string(), array.full_name.clone(), short.to_owned()];
        Self { uuid: array.uuid.replace(':', ""), names }
    }
}

fn lvm_ids(disks: &Disks, location: &Location) -> Option<(String, String)> {
    let Location::Logical { group, name } = location else { return None };
    let group = disks.volume_groups().iter().find(|found| found.name == *group)?;
    let volume = group.volumes.iter().find(|found| found.name == *name)?;
    Some((group.uuid.replace('-', ""), volume.uuid.replace('-', "")))
}
