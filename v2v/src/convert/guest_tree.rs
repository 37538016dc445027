//! The guest's real files behind the questions of a conversion.

use std::path::{Path, PathBuf};

use block::{ErrorKind, Result};
use guestdisk::fs::{FileKind, FileSystem};

use super::tree::{Place, Tree};
use crate::view::{self, GuestView};

impl GuestView {
    /// The file system that a place is on, and whether it counts from the top of a btrfs: where there is something of this
    /// name, or else where there is its folder.
    fn of_place(&self, place: &Place) -> Option<&FileSystem> {
        let systems = || [false, true].into_iter().filter_map(|from_top| self.system(place, from_top));
        let has = |system: &&FileSystem| system.symlink_metadata(&place.path).is_ok();
        let has_parent =
            |system: &&FileSystem| place.path.parent().is_some_and(|parent| system.exists(parent));
        systems().find(has).or_else(|| systems().find(has_parent))
    }

    fn system(&self, place: &Place, from_top: bool) -> Option<&FileSystem> {
        let place = view::Place {
            guest_path: PathBuf::new(),
            volume: place.volume,
            path: place.path.clone(),
            from_top,
        };
        self.file_system(&place).ok()
    }
}

fn names(system: &FileSystem, path: &Path) -> Vec<(String, FileKind)> {
    let entries = system.read_dir(path).unwrap_or_default();
    let named = entries.into_iter().filter_map(|entry| {
        let name = entry.name.into_string().ok()?;
        let kind = match entry.kind {
            FileKind::Unknown => system.symlink_metadata(path.join(&name)).ok()?.kind,
            known => known,
        };
        Some((name, kind))
    });
    let mut names: Vec<_> = named.collect();
    names.sort_by(|one, other| one.0.cmp(&other.0));
    names
}

impl Tree for GuestView {
    fn locate(&self, path: &Path) -> Option<Place> {
        let place = match Self::locate(self, path) {
            Ok(place) => place,
            Err(_) => {
                Self::locate(self, path.parent()?).ok()?;
                self.locate_new(path).ok()?
            }
        };
        Some(Place { volume: place.volume, path: place.path })
    }

    fn read(&self, place: &Place, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        let Some(system) = self.of_place(place) else { return Ok(None) };
        match system.metadata(&place.path) {
            Ok(found) if found.kind == FileKind::File => system.read(&place.path, max_bytes).map(Some),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, path: &Path) -> Vec<(String, FileKind)> {
        let Ok(place) = Self::locate(self, path) else { return vec![] };
        self.file_system(&place).map(|system| names(system, &place.path)).unwrap_or_default()
    }

    fn kind(&self, path: &Path) -> Option<FileKind> {
        self.symlink_metadata(path).ok().map(|found| found.kind)
    }

    fn link(&self, path: &Path) -> Option<PathBuf> {
        self.read_link(path).ok()
    }

    fn stat(&self, place: &Place) -> Option<(FileKind, u64)> {
        let found = self.of_place(place)?.symlink_metadata(&place.path).ok()?;
        Some((found.kind, found.size))
    }

    fn list_at(&self, place: &Place) -> Vec<(String, FileKind)> {
        self.of_place(place).map(|system| names(system, &place.path)).unwrap_or_default()
    }
}
