//! Encrypted volumes among the others: which key is for which, and what guests call the disk within.

use std::sync::Arc;

use block::{Error, ErrorKind, Result, ResultExt as _};

use super::{Disks, Location, Volume};
use crate::detect::Kind;
use crate::fs::FileSystem;
use crate::keys::{Keys, Selector};

/// How often encrypted volumes are looked for within others.
const MOST_STORIES: usize = 3;
/// The most bytes of a crypttab.
const MOST_TABLE: u64 = 64 << 10;
/// Where a root lies on its volume: as a whole, or in a subvolume of btrfs.
const ROOTS: [&str; 4] = ["", "/@", "/root", "/@rootfs"];

impl Disks {
    /// Adds what is within encrypted volumes for which there are keys, and the logical volumes of all of them.
    pub(super) fn add_encrypted_and_logical(&mut self, keys: &Keys) -> Result<()> {
        let mut seen = 0;
        for story in 0..MOST_STORIES {
            let before = self.volumes.len();
            for index in seen..before {
                if let Some(device) = self.open_encrypted(index, keys)? {
                    let outer = Box::new(self.volumes[index].location.clone());
                    self.push(Location::Decrypted { outer }, device, None)?;
                }
            }
            seen = before;
            let nothing_new = self.volumes.len() == before;
            if nothing_new && story > 0 {
                break;
            }
            self.add_logical()?;
        }
        self.check_selectors(keys)?;
        self.read_tables();
        Ok(())
    }

    fn open_encrypted(&self, index: usize, keys: &Keys) -> Result<Option<Arc<dyn block::BlockDevice>>> {
        let volume = &self.volumes[index];
        if keys.is_empty() || !is_encrypted(volume) {
            return Ok(None);
        }
        let selects = |selector: &Selector| self.selects(selector, volume);
        let found = keys.open(&volume.device, &selects).context(|| {
            let uuid = volume.uuid();
            format!("{} (LUKS, UUID {uuid})", volume.location)
        })?;
        Ok(found.map(|opened| Arc::new(opened) as _))
    }

    /// Whether a key is for a volume.
    fn selects(&self, selector: &Selector, volume: &Volume) -> bool {
        let Selector::Name(name) = selector else { return true };
        let uuid = name.strip_prefix("UUID=").unwrap_or(name);
        uuid.eq_ignore_ascii_case(volume.uuid())
            || volume.location.to_string() == *name
            || self.find(name).is_ok_and(|found| found.location == volume.location)
    }

    /// A key that is for nothing is a mistake.
    fn check_selectors(&self, keys: &Keys) -> Result<()> {
        let encrypted = || self.volumes.iter().filter(|volume| is_encrypted(volume));
        for key in keys.all() {
            if encrypted().any(|volume| self.selects(&key.selector, volume)) {
                continue;
            }
            let wanted = match &key.selector {
                // One who does not know what is encrypted may give a key all the same.
                Selector::All => continue,
                Selector::Name(name) => name,
            };
            let known: Vec<_> =
                encrypted().map(|volume| format!("{} (UUID {})", volume.location, volume.uuid())).collect();
            let error = Error::new(
                ErrorKind::NotFound,
                format!("a key was given for '{wanted}', which is no encrypted volume of this guest"),
            );
            return Err(match known.is_empty() {
                true => error.hint("nothing on these disks is encrypted by LUKS"),
                false => error.hint(format!("encrypted are: {}", known.join(", "))),
            });
        }
        Ok(())
    }

    /// What crypttab calls the disks within: `name source key options` (crypttab(5)).
    fn read_tables(&mut self) {
        let within: Vec<_> = (0..self.volumes.len())
            .filter(|index| matches!(self.volumes[*index].location, Location::Decrypted { .. }))
            .collect();
        if within.is_empty() {
            return;
        }
        let mut names = vec![];
        for text in self.volumes.iter().filter(|volume| volume.is_readable()).flat_map(tables) {
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let entries: Vec<(&str, &str)> = lines
                .filter_map(|line| {
                    let mut words = line.split_whitespace();
                    Some((words.next()?, words.next()?))
                })
                .collect();
            for (name, source) in &entries {
                let outer = self
                    .find(source)
                    .ok()
                    .filter(|volume| is_encrypted(volume))
                    .map(|volume| &volume.location);
                let found = match outer {
                    Some(outer) => self.within(outer),
                    // Named by what the guest called its disks elsewhere, but there is only one that can be meant.
                    None if entries.len() == 1 && within.len() == 1 => Some(within[0]),
                    None => None,
                };
                names.extend(found.map(|index| ((*name).to_owned(), index)));
            }
        }
        self.mapped = names;
    }

    /// The index of the disk within an encrypted volume, if it was opened.
    pub fn within(&self, outer: &Location) -> Option<usize> {
        let is_it = |volume: &Volume| matches!(&volume.location, Location::Decrypted { outer: own } if **own == *outer);
        self.volumes.iter().position(is_it)
    }

    /// Whether something lies there that was not opened for want of a key.
    pub fn is_locked(&self, volume: &Volume) -> bool {
        is_encrypted(volume) && self.within(&volume.location).is_none()
    }

    /// The volume that device-mapper knows by a name that is not LVM's: by crypttab, or as systemd and installers call it.
    pub(super) fn by_mapped_name(&self, name: &str) -> Option<&Volume> {
        let by_table = self.mapped.iter().find(|(own, _)| own == name).map(|(_, index)| *index);
        let by_uuid = || {
            let outer = self.by(name.strip_prefix("luks-")?, Volume::uuid)?;
            self.within(&outer.location)
        };
        self.volumes.get(by_table.or_else(by_uuid)?)
    }

    /// The UUID of the encrypted volume that something is the disk within.
    pub(crate) fn outer_uuid(&self, location: &Location) -> Option<&str> {
        let Location::Decrypted { outer } = location else { return None };
        self.volumes.iter().find(|volume| volume.location == **outer).map(Volume::uuid)
    }
}

fn is_encrypted(volume: &Volume) -> bool {
    volume.content.as_ref().is_some_and(|content| content.kind == Kind::Luks)
}

/// The crypttabs of a volume: of each root on it.
fn tables(volume: &Volume) -> Vec<String> {
    let default = FileSystem::open(Arc::clone(&volume.device)).ok();
    let is_btrfs = default.as_ref().is_some_and(|fs| fs.kind() == Kind::Btrfs);
    let top = is_btrfs.then(|| FileSystem::open_top(Arc::clone(&volume.device)).ok()).flatten();
    let mut found = vec![];
    for fs in [default, top].iter().flatten() {
        for root in &ROOTS[..if is_btrfs { ROOTS.len() } else { 1 }] {
            if let Ok(bytes) = fs.read(format!("{root}/etc/crypttab"), MOST_TABLE) {
                found.push(String::from_utf8_lossy(&bytes).into_owned());
            }
        }
    }
    found
}
