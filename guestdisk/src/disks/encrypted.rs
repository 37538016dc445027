//! Encrypted volumes among the others: which key is for which, and what guests call the disk within.

use std::sync::Arc;

use block::{Error, ErrorKind, Result, ResultExt as _};
use crypt::luks::Effort;

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
        // One for all: there may be a thousand volumes.
        let mut effort = keys.effort();
        let (mut seen, mut failed) = (0, None);
        for story in 0..MOST_STORIES {
            let before = self.volumes.len();
            for index in seen..before {
                match self.open_encrypted(index, keys, &mut effort) {
                    Ok(Some(device)) => {
                        let outer = Box::new(self.volumes[index].location.clone());
                        self.push(Location::Decrypted { outer }, device, None)?;
                    }
                    Ok(None) => {}
                    // A key for all of them need not be for each.
                    Err(error) if error.kind() != ErrorKind::Io && !self.is_named(index, keys) => {
                        self.add_problems(vec![format!("{error}: it stays locked")]);
                        failed.get_or_insert(error);
                    }
                    Err(error) => return Err(error),
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
        let is_within = |volume: &Volume| matches!(volume.location, Location::Decrypted { .. });
        if let Some(error) = failed.filter(|_| !self.volumes.iter().any(is_within)) {
            return Err(error);
        }
        self.read_tables();
        Ok(())
    }

    fn open_encrypted(
        &self,
        index: usize,
        keys: &Keys,
        effort: &mut Effort,
    ) -> Result<Option<Arc<dyn block::BlockDevice>>> {
        let volume = &self.volumes[index];
        if keys.is_empty() || !is_encrypted(volume) {
            return Ok(None);
        }
        let selects = |selector: &Selector| self.selects(selector, volume);
        let found = keys.open(&volume.device, &selects, effort).context(|| {
            let uuid = volume.uuid().escape_debug();
            format!("{} (LUKS, UUID {uuid})", volume.location)
        })?;
        Ok(found.map(|opened| Arc::new(opened) as _))
    }

    /// Whether a key is for this volume by name.
    fn is_named(&self, index: usize, keys: &Keys) -> bool {
        keys.names(&|selector| self.selects(selector, &self.volumes[index]))
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
            let known: Vec<_> = encrypted()
                .map(|volume| format!("{} (UUID {})", volume.location, volume.uuid().escape_debug()))
                .collect();
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

#[cfg(test)]
mod tests {
    use block::BlockDevice;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};
    use crypt::luks2::{Kdf, testing};
    use crypt::{Container, Secret};

    use super::*;
    use crate::keys::Key;

    fn keys(selector: &str, passphrase: &str) -> Keys {
        let key = Key { selector: Selector::parse(selector), passphrases: vec![Secret::from(passphrase)] };
        Keys::new(vec![key], Effort::DEFAULT)
    }

    /// A disk that is encrypted as a whole, with swap space in it.
    fn disk() -> Arc<dyn BlockDevice> {
        let kdf = Kdf::Argon2 { id: true, time: 1, memory: 32, lanes: 1, salt: vec![3; 32] };
        let (bytes, _) = testing::volume(&kdf, 512, 16 << 10);
        let disk = Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap();
        let disk: Arc<dyn BlockDevice> = Arc::new(disk);
        let container = Container::read(&disk).unwrap();
        let key = container.unlock(&disk, testing::PASSPHRASE, &mut Effort::default()).unwrap();
        let inner = container.open(&disk, &key).unwrap();
        inner.write_zeroes_at(0, 16 << 10, block::ZeroMode::ALLOCATE).unwrap();
        inner.write_at(b"SWAPSPACE2", 4086).unwrap();
        disk
    }

    #[test]
    fn what_is_within_is_a_volume_and_its_key_is_found_once() {
        let disk = disk();
        let locked = Disks::open(Arc::clone(&disk)).unwrap();
        assert_eq!(locked.volumes().len(), 1);
        assert!(locked.is_locked(&locked.volumes()[0]));
        let keys = keys("all", "pw");
        // All passphrases, as long as none has opened anything.
        assert_eq!(keys.passphrases_to_type().len(), 1);
        for _ in 0..2 {
            let disks = Disks::open_with(vec![Arc::clone(&disk)], &keys).unwrap();
            let [outer, inner] = disks.volumes() else { panic!("{disks:?}") };
            assert_eq!(inner.content.as_ref().unwrap().kind, Kind::Swap);
            assert_eq!(disks.within(&outer.location), Some(1));
            assert!(!disks.is_locked(outer));
            assert_eq!(inner.location.to_string(), "disk 1 (decrypted)");
            let mapper = disks.find(&format!("/dev/mapper/luks-{}", outer.uuid())).unwrap();
            assert_eq!(mapper.location, inner.location);
            // The slot is gone: who derives the key again does not find it.
            disk.write_at(&[0; 4096], 32 << 10).unwrap();
        }
        let fresh = self::keys("all", "pw");
        assert_eq!(Disks::open_with(vec![disk], &fresh).unwrap_err().kind(), ErrorKind::Permission);
    }

    /// An encrypted disk whose description has been changed, and that has its keys or lacks them.
    fn edited(edit: impl Fn(&str) -> String, has_keys: bool) -> Arc<dyn BlockDevice> {
        let kdf = Kdf::Argon2 { id: true, time: 1, memory: 32, lanes: 1, salt: vec![4; 32] };
        let (plain, json) = testing::volume(&kdf, 512, 16 << 10);
        let mut bytes = testing::header(edit(&json).as_bytes(), 6);
        bytes.extend_from_slice(&plain[bytes.len()..]);
        if !has_keys {
            bytes[32 << 10..testing::DATA_OFFSET].fill(0);
        }
        Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
    }

    const MUCH: &str = r#""memory":2000000"#;

    /// A key for all of them opens those that it fits; one that fits none is an error, and so is one that is for a volume.
    #[test]
    fn a_key_for_all_need_not_open_each() {
        // Another digest: the key of one is not that of the other.
        let apart = |json: &str| json.replacen("CQkJ", "CgkJ", 1);
        let foreign = || edited(apart, false);
        let unknown = || edited(|json| json.replace(r#""type":"crypt""#, r#""type":"linear""#), true);
        let dear = || edited(|json| apart(json).replace(r#""memory":32"#, MUCH), true);
        let others = [
            (foreign(), ErrorKind::Permission),
            (unknown(), ErrorKind::Unsupported),
            (dear(), ErrorKind::Denied),
        ];
        for (other, kind) in others {
            for order in [[0, 1], [1, 0]] {
                let both = order.map(|index| if index == 0 { disk() } else { Arc::clone(&other) });
                let disks = Disks::open_with(both.to_vec(), &keys("all", "pw")).unwrap();
                let locked = order.iter().position(|index| *index == 1).unwrap();
                assert_eq!(disks.volumes().len(), 3, "{kind:?}");
                assert!(disks.is_locked(&disks.volumes()[locked]));
                let [problem] = disks.problems() else { panic!("{:?}", disks.problems()) };
                assert!(problem.contains(&format!("disk {}", locked + 1)), "{problem}");
                let named = keys(&format!("disk {}", locked + 1), "pw");
                assert_eq!(Disks::open_with(both.to_vec(), &named).unwrap_err().kind(), kind);
            }
            let error = Disks::open_with(vec![other], &keys("all", "pw")).unwrap_err();
            assert_eq!(error.kind(), kind);
        }
    }

    /// A passphrase that would have to be tried on a slot that costs too much does not keep the next from a cheap one.
    #[test]
    fn too_much_work_for_one_passphrase_is_not_too_much_for_all() {
        let with_two_slots = |json: &str| {
            let (start, end) = (json.find(r#"{"0":"#).unwrap() + 5, json.find("},\n\"tokens\"").unwrap());
            let second = json[start..end].replace(r#""memory":32"#, MUCH);
            let json = format!("{},\"1\":{second}{}", &json[..end], &json[end..]);
            json.replace(r#""keyslots":["0"]"#, r#""keyslots":["0","1"]"#)
        };
        let disk = edited(with_two_slots, true);
        let given = |passphrases: &[&str]| {
            let passphrases = passphrases.iter().map(|text| Secret::from(*text)).collect();
            Keys::new(vec![Key { selector: Selector::All, passphrases }], Effort::DEFAULT)
        };
        let alone = Disks::open_with(vec![Arc::clone(&disk)], &given(&["no"])).unwrap_err();
        assert_eq!(alone.kind(), ErrorKind::Denied);
        let disks = Disks::open_with(vec![disk], &given(&["no", "pw"])).unwrap();
        assert_eq!(disks.volumes().len(), 2);
    }

    #[test]
    fn keys_for_nothing_are_mistakes() {
        let disk = disk();
        let open = |selector: &str, passphrase: &str| {
            Disks::open_with(vec![Arc::clone(&disk)], &keys(selector, passphrase))
                .map(|disks| disks.volumes().len())
        };
        for selector in ["all", "/dev/sda", "01234567-89AB-4def-8123-456789abcdef", "disk 1"] {
            assert_eq!(open(selector, "pw").unwrap(), 2, "{selector}");
            assert_eq!(open(selector, "no").unwrap_err().kind(), ErrorKind::Permission);
        }
        let error = open("/dev/sdb", "pw").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.hints()[0].contains("disk 1"), "{error:?}");
    }
}
