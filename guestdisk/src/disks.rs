//! All disks of a guest, and the volumes on them.

mod encrypted;
mod whole;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result};

use crate::detect::{Content, detect};
use crate::fs::FileSystem;
use crate::keys::Keys;
use crate::lvm;
use crate::md;
use crate::partition::{self, Partition, Role, Table};
use whole::Look;

/// The most volumes that are looked at.
const MOST_VOLUMES: usize = 1024;
/// How often arrays are looked for on arrays, and how many volumes lie on one another.
const MOST_STORIES: usize = 4;

/// What can be found on the disks of one guest.
#[derive(Debug)]
pub struct Disks {
    disks: Vec<Disk>,
    volumes: Vec<Volume>,
    arrays: Vec<md::Array>,
    groups: Vec<lvm::Group>,
    /// Names that device-mapper gives to what is within encrypted volumes, with their indices.
    mapped: Vec<(String, usize)>,
    books: Vec<(usize, Range<u64>)>,
    problems: Vec<String>,
}

/// One disk.
#[derive(Debug)]
pub struct Disk {
    /// The disk itself.
    pub device: Arc<dyn BlockDevice>,
    /// Its partition table, if it has one.
    pub table: Option<Table>,
    /// It has partitions, and the superblock of an array of whole disks: whichever counts, nothing on it is taken for free.
    pub doubtful: bool,
}

/// Where a volume lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// All of the disk of this index.
    Whole {
        /// Index of the disk, from 0.
        disk: usize,
    },
    /// A partition.
    Partition {
        /// Index of the disk, from 0.
        disk: usize,
        /// Number of the partition.
        number: u32,
    },
    /// A logical volume of LVM.
    Logical {
        /// Name of the volume group.
        group: String,
        /// Name of the volume.
        name: String,
    },
    /// An array of Linux software RAID, or a partition of one.
    Array {
        /// What it is called in `/dev/`: `md0`, `md/root`.
        name: String,
        /// Number of the partition.
        partition: Option<u32>,
    },
    /// The disk within an encrypted volume.
    Decrypted {
        /// Where the encrypted volume lies.
        outer: Box<Self>,
    },
}

impl Location {
    /// The disk that it lies on; `None` for a logical volume or an array, which may lie on several, and for what is encrypted.
    pub fn disk(&self) -> Option<usize> {
        match self {
            Self::Whole { disk } | Self::Partition { disk, .. } => Some(*disk),
            Self::Logical { .. } | Self::Array { .. } | Self::Decrypted { .. } => None,
        }
    }
}

/// `disk 1`, `disk 1 partition 2`, `/dev/group/name`, `/dev/md0`, `/dev/md0p1`, `disk 1 partition 2 (decrypted)`: disks count
/// from 1 for people.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole { disk } => write!(f, "disk {}", disk + 1),
            Self::Partition { disk, number } => write!(f, "disk {} partition {number}", disk + 1),
            Self::Logical { group, name } => write!(f, "/dev/{group}/{name}"),
            Self::Array { name, partition: None } => write!(f, "/dev/{name}"),
            // As udev has it: a `p` after a digit.
            Self::Array { name, partition: Some(number) } => {
                let p = if name.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
                write!(f, "/dev/{name}{p}{number}")
            }
            Self::Decrypted { outer } => write!(f, "{outer} (decrypted)"),
        }
    }
}

/// Something that could hold a file system: a disk, a partition, a logical volume, an array.
#[derive(Debug)]
pub struct Volume {
    /// Where it lies.
    pub location: Location,
    /// Its bytes.
    pub device: Arc<dyn BlockDevice>,
    /// What it holds, as far as that is known.
    pub content: Option<Content>,
    /// The entry of the partition table that it is.
    pub partition: Option<Partition>,
}

impl Volume {
    /// The file system on it.
    ///
    /// # Errors
    /// As [`FileSystem::open`].
    pub fn file_system(&self) -> Result<FileSystem> {
        use block::ResultExt as _;
        FileSystem::open(Arc::clone(&self.device)).context(|| self.location.to_string())
    }

    /// Whether there is a file system on it that can be read.
    pub fn is_readable(&self) -> bool {
        self.content.as_ref().is_some_and(|content| content.kind.is_readable())
    }

    /// The UUID of what it holds; empty if there is none.
    pub fn uuid(&self) -> &str {
        self.content.as_ref().map_or("", |content| &content.uuid)
    }

    /// The label of what it holds; empty if there is none.
    pub fn label(&self) -> &str {
        self.content.as_ref().map_or("", |content| &content.label)
    }

    /// The PARTUUID; empty if it is no partition or has none.
    pub fn partuuid(&self) -> &str {
        self.partition.as_ref().map_or("", |partition| &partition.uuid)
    }

    fn partlabel(&self) -> &str {
        self.partition.as_ref().map_or("", |partition| &partition.name)
    }
}

impl Disks {
    /// Looks at one disk.
    ///
    /// # Errors
    /// As [`open_all`](Self::open_all).
    pub fn open(device: Arc<dyn BlockDevice>) -> Result<Self> {
        Self::open_all(vec![device])
    }

    /// Looks at all disks of a guest, in the order in which the guest has them. Whatever is damaged on them is told by
    /// [`problems`](Self::problems).
    ///
    /// # Errors
    /// A device failed.
    pub fn open_all(devices: Vec<Arc<dyn BlockDevice>>) -> Result<Self> {
        Self::open_with(devices, &Keys::default())
    }

    /// The same with keys for encrypted volumes, whose insides are volumes, too.
    ///
    /// # Errors
    /// A device failed; `NotFound`: a key is for a volume that is not there or not encrypted. Where a key is for a volume by name, or
    /// keys for all of them have opened none: `Permission`: none of the keys opens it; `Denied`: that is too much work; what the
    /// volume needs that is not here, by name. Volumes that stay locked besides others are [`problems`](Self::problems).
    pub fn open_with(devices: Vec<Arc<dyn BlockDevice>>, keys: &Keys) -> Result<Self> {
        let mut disks = Self {
            disks: vec![],
            volumes: vec![],
            arrays: vec![],
            groups: vec![],
            mapped: vec![],
            books: vec![],
            problems: vec![],
        };
        for look in disks.look(devices)? {
            disks.add(look)?;
        }
        disks.add_arrays()?;
        disks.add_encrypted_and_logical(keys)?;
        Ok(disks)
    }

    fn add(&mut self, look: Look) -> Result<()> {
        let Look { device, table, is_whole, doubtful } = look;
        let disk = self.disks.len();
        if is_whole {
            self.push(Location::Whole { disk }, Arc::clone(&device), None)?;
        }
        match &table {
            Some(table) if !is_whole || table.partitions.is_empty() => {
                self.problems
                    .extend(table.problems.iter().map(|problem| format!("disk {}: {problem}", disk + 1)));
                for found in table.partitions.iter().filter(|found| found.role != Role::Extended) {
                    let location = Location::Partition { disk, number: found.number };
                    self.push(location, Arc::new(found.slice(Arc::clone(&device))?), Some(found.clone()))?;
                }
            }
            _ => {}
        }
        self.disks.push(Disk { device, table, doubtful });
        Ok(())
    }

    fn push(
        &mut self,
        location: Location,
        device: Arc<dyn BlockDevice>,
        partition: Option<Partition>,
    ) -> Result<()> {
        if self.volumes.len() >= MOST_VOLUMES {
            return Ok(());
        }
        let content = match detect(&*device) {
            Ok(content) => content,
            // Bad blocks of an array.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.problems.push(format!("{location}: {error}"));
                None
            }
            Err(error) => return Err(error),
        };
        self.volumes.push(Volume { location, device, content, partition });
        Ok(())
    }

    /// Adds the arrays whose members have been found, and their partitions.
    fn add_arrays(&mut self) -> Result<()> {
        let mut seen = 0;
        for _ in 0..MOST_STORIES {
            let is_member = |volume: &&Volume| {
                volume.content.as_ref().is_some_and(|found| found.kind == crate::detect::Kind::LinuxRaid)
            };
            let members = self.volumes[seen..].iter().filter(is_member);
            let members: Vec<_> =
                members.map(|volume| (volume.location.clone(), Arc::clone(&volume.device))).collect();
            if members.is_empty() {
                break;
            }
            seen = self.volumes.len();
            let found = md::scan(&members, &self.arrays)?;
            self.problems.extend(found.problems);
            for array in &found.arrays {
                if let Ok(device) = array.device() {
                    self.add_array(&array.name, device)?;
                }
            }
            self.arrays.extend(found.arrays);
        }
        Ok(())
    }

    fn add_array(&mut self, name: &str, device: Arc<dyn BlockDevice>) -> Result<()> {
        let location = |partition| Location::Array { name: name.to_owned(), partition };
        let table = match partition::read(&*device) {
            Ok(table) => table,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.problems.push(format!("{}: {error}", location(None)));
                None
            }
            Err(error) => return Err(error),
        };
        let partitions = table.map(|table| table.partitions).unwrap_or_default();
        if partitions.is_empty() {
            return self.push(location(None), device, None);
        }
        for found in partitions.iter().filter(|found| found.role != Role::Extended) {
            let part = Arc::new(found.slice(Arc::clone(&device))?);
            self.push(location(Some(found.number)), part, Some(found.clone()))?;
        }
        Ok(())
    }

    /// Adds the logical volumes of all groups whose physical volumes have been found.
    fn add_logical(&mut self) -> Result<()> {
        let is_physical = |volume: &&Volume| {
            volume.content.as_ref().is_some_and(|found| found.kind == crate::detect::Kind::Lvm2)
        };
        let physical: Vec<_> =
            self.volumes.iter().filter(is_physical).map(|volume| Arc::clone(&volume.device)).collect();
        let found = lvm::scan(&physical)?;
        self.add_problems(found.problems);
        for group in &found.groups {
            for logical in group.volumes.iter().filter(|logical| logical.visible) {
                let location = Location::Logical { group: group.name.clone(), name: logical.name.clone() };
                // There already, if what is encrypted has been looked into since.
                if self.volumes.iter().any(|volume| volume.location == location) {
                    continue;
                }
                match logical.device() {
                    Ok(device) => self.push(location, device, None)?,
                    Err(error) => self.add_problems(vec![format!("{location}: {error}")]),
                }
            }
        }
        self.groups = found.groups;
        let on_disk = |(device, range)| self.on_disk(&device, range);
        self.books = found.books.into_iter().filter_map(on_disk).collect();
        Ok(())
    }

    /// Each once.
    fn add_problems(&mut self, problems: Vec<String>) {
        for problem in problems {
            if !self.problems.contains(&problem) {
                self.problems.push(problem);
            }
        }
    }

    /// The disks, as they were given.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Everything that could hold a file system, in the order of disks and partitions, then arrays, logical volumes last.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// The disk that a volume lies on as a whole, and where it begins there; `None` for a logical volume or an array.
    pub fn place(&self, volume: &Volume) -> Option<(usize, u64)> {
        let disk = volume.location.disk()?;
        Some((disk, volume.partition.as_ref().map_or(0, |partition| partition.offset)))
    }

    /// Where a range of a volume lies on disks: in every copy, for an array whose members hold the same. Nothing, if it lies
    /// there in another form, or if that is not known.
    pub fn on_disks(&self, volume: &Volume, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        let mut found = vec![];
        self.collect_places(volume, range, MOST_STORIES, &mut found);
        found
    }

    fn collect_places(
        &self,
        volume: &Volume,
        range: Range<u64>,
        stories: usize,
        found: &mut Vec<(usize, Range<u64>)>,
    ) {
        if let Some((disk, base)) = self.place(volume) {
            found.push((disk, base + range.start..base + range.end));
            return;
        }
        let Some(stories) = stories.checked_sub(1) else { return };
        let places = match self.array_of(&volume.location) {
            Some(array) => {
                let base = volume.partition.as_ref().map_or(0, |partition| partition.offset);
                array.places(&(base + range.start..base + range.end))
            }
            None => self.logical(volume).map(|logical| logical.places(range)).unwrap_or_default(),
        };
        for (device, range) in places {
            if let Some(below) = self.volume_of(&device) {
                self.collect_places(below, range, stories, found);
            }
        }
    }

    /// The volume that has this device.
    pub(crate) fn volume_of(&self, device: &Arc<dyn BlockDevice>) -> Option<&Volume> {
        let same = |volume: &&Volume| std::ptr::addr_eq(Arc::as_ptr(&volume.device), Arc::as_ptr(device));
        self.volumes.iter().find(same)
    }

    /// What LVM knows of a volume, if it is a logical one whose bytes are nobody else's: not of a group with snapshots, which
    /// share what they do not keep themselves.
    pub(crate) fn logical(&self, volume: &Volume) -> Option<&lvm::Logical> {
        let Location::Logical { group, name } = &volume.location else { return None };
        let group = self.groups.iter().find(|found| found.name == *group)?;
        let plain = group.volumes.iter().all(lvm::Logical::is_plain);
        group.volumes.iter().find(|logical| logical.name == *name).filter(|_| plain)
    }

    /// The array that is this volume or has it as a partition.
    pub fn array_of(&self, location: &Location) -> Option<&md::Array> {
        let Location::Array { name, .. } = location else { return None };
        self.arrays.iter().find(|array| array.name == *name)
    }

    /// The arrays of Linux software RAID, those that cannot be read included.
    pub fn arrays(&self) -> &[md::Array] {
        &self.arrays
    }

    /// A range of a volume's device, on the disk that it lies on.
    fn on_disk(&self, device: &Arc<dyn BlockDevice>, range: Range<u64>) -> Option<(usize, Range<u64>)> {
        let (disk, base) = self.place(self.volume_of(device)?)?;
        Some((disk, base.checked_add(range.start)?..base.checked_add(range.end)?))
    }

    /// Where LVM keeps its own books: indexes of disks, and bytes there. Labels of physical volumes, and their metadata.
    pub fn lvm_books(&self) -> &[(usize, Range<u64>)] {
        &self.books
    }

    /// Where the bytes of a logical volume lie, in their order: indexes of disks, and bytes there. `None` if there is no such
    /// volume, it is neither linear nor striped, or not all of it lies on these disks as it is.
    pub fn logical_places(&self, group: &str, name: &str) -> Option<Vec<(usize, Range<u64>)>> {
        let group = self.groups.iter().find(|found| found.name == group)?;
        let logical = group.volumes.iter().find(|logical| logical.name == name)?;
        if !logical.is_plain() {
            return None;
        }
        let places = logical.places(0..logical.size);
        places.into_iter().map(|(device, range)| self.on_disk(&device, range)).collect()
    }

    /// The volume groups of LVM.
    pub fn volume_groups(&self) -> &[lvm::Group] {
        &self.groups
    }

    /// What is wrong, in sentences for people.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The volume that a guest would find under a name as `root=` and fstab have it: `UUID=`, `LABEL=`, `PARTUUID=`,
    /// `PARTLABEL=`, `/dev/disk/by-*/...`, `/dev/GROUP/NAME`, `/dev/mapper/GROUP-NAME`, `/dev/md0`, `/dev/md/NAME`,
    /// `/dev/md0p1`, and `/dev/sda1` and the like, by the order of the disks.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, name: &str) -> Result<&Volume> {
        let found = match Name::parse(name) {
            Some(Name::Uuid(uuid)) => self.by(uuid, Volume::uuid),
            Some(Name::Label(label)) => self.volumes.iter().find(|volume| volume.label() == label),
            Some(Name::PartUuid(uuid)) => self.by(uuid, Volume::partuuid),
            Some(Name::PartLabel(label)) => self.volumes.iter().find(|volume| volume.partlabel() == label),
            Some(Name::Place(location)) => self.volumes.iter().find(|volume| volume.location == location),
            Some(Name::Array(name)) => self.by_array(name, md::Array::answers_to),
            Some(Name::ArrayId(id)) => self.by_array(id, md::Array::has_id),
            Some(Name::Mapper(name)) => {
                let is_it = |volume: &&Volume| match &volume.location {
                    Location::Logical { group, name: own } => lvm::mapper_name(group, own) == name,
                    _ => false,
                };
                self.volumes.iter().find(is_it).or_else(|| self.by_mapped_name(name))
            }
            None => None,
        };
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no volume of this guest is '{name}'")))
    }

    /// An array, or a partition of one (`NAMEp1`, `NAME1`, `NAME-part1`), where `is` knows the name of an array.
    fn by_array(&self, name: &str, is: impl Fn(&md::Array, &str) -> bool) -> Option<&Volume> {
        self.volumes.iter().find(|volume| {
            let Location::Array { partition, .. } = &volume.location else { return false };
            let Some(array) = self.array_of(&volume.location) else { return false };
            let Some(number) = partition else { return is(array, name) };
            let stem = name.strip_suffix(&number.to_string());
            let stems = stem.map(|stem| [Some(stem), stem.strip_suffix('p'), stem.strip_suffix("-part")]);
            stems.into_iter().flatten().flatten().any(|stem| is(array, stem))
        })
    }

    fn by(&self, wanted: &str, own: impl Fn(&Volume) -> &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| !wanted.is_empty() && own(volume).eq_ignore_ascii_case(wanted))
    }
}

/// The ways to name a volume.
#[derive(Debug, PartialEq, Eq)]
enum Name<'a> {
    Uuid(&'a str),
    Label(&'a str),
    PartUuid(&'a str),
    PartLabel(&'a str),
    Place(Location),
    Mapper(&'a str),
    /// A device of an array or a partition of one, without `/dev/`.
    Array(&'a str),
    /// What follows `/dev/disk/by-id/md-`.
    ArrayId(&'a str),
}

/// What is in front of a name, the folder of links that udev makes of it, and what it is the name of.
type Tag<'a> = (&'static str, &'static str, fn(&'a str) -> Name<'a>);

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let tags: [Tag<'a>; 4] = [
            ("UUID=", "/dev/disk/by-uuid/", Self::Uuid),
            ("LABEL=", "/dev/disk/by-label/", Self::Label),
            ("PARTUUID=", "/dev/disk/by-partuuid/", Self::PartUuid),
            ("PARTLABEL=", "/dev/disk/by-partlabel/", Self::PartLabel),
        ];
        for (tag, link, make) in tags {
            if let Some(value) = name.strip_prefix(tag).or_else(|| name.strip_prefix(link)) {
                return Some(make(value.trim_matches('"')));
            }
        }
        let device = name.strip_prefix("/dev/")?;
        if let Some(id) = device.strip_prefix("disk/by-id/md-") {
            return Some(Self::ArrayId(id));
        }
        let after = device.strip_prefix("md").unwrap_or_default();
        if after.starts_with('/') || after.starts_with(|first: char| first.is_ascii_digit()) {
            return Some(Self::Array(device));
        }
        if let Some(name) = device.strip_prefix("mapper/") {
            return Some(Self::Mapper(name));
        }
        if let Some((group, name)) = device.split_once('/') {
            return Some(Self::Place(Location::Logical { group: group.to_owned(), name: name.to_owned() }));
        }
        kernel_name(device).map(Self::Place)
    }
}

/// `sda1`, `vdb`, `xvda2`, `hda`, `nvme0n1p3`, `mmcblk0p1`.
fn kernel_name(name: &str) -> Option<Location> {
    let place = |disk: usize, number: &str| match number {
        "" => Some(Location::Whole { disk }),
        _ => Some(Location::Partition { disk, number: number.parse().ok()? }),
    };
    if let Some(rest) = name.strip_prefix("nvme") {
        let (controller, rest) = rest.split_once('n')?;
        let (namespace, number) = rest.split_once('p').unwrap_or((rest, ""));
        // Either each disk has a controller, or all are namespaces of the first.
        let (controller, namespace): (usize, usize) = (controller.parse().ok()?, namespace.parse().ok()?);
        return place(controller.checked_add(namespace.checked_sub(1)?)?, number);
    }
    if let Some(rest) = name.strip_prefix("mmcblk") {
        let (disk, number) = rest.split_once('p').unwrap_or((rest, ""));
        return place(disk.parse().ok()?, number);
    }
    let rest = ["xvd", "sd", "vd", "hd"].into_iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let number = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let letters = &rest[..rest.len() - number.len()];
    if letters.is_empty() || letters.len() > 3 {
        return None;
    }
    // a to z, then aa to zz.
    let index = letters.bytes().fold(0, |sum, letter| sum * 26 + usize::from(letter - b'a') + 1) - 1;
    place(index, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_sector_without_entries_hides_nothing() {
        let mut bytes = vec![0; 8192];
        bytes[4086..4096].copy_from_slice(b"SWAPSPACE2");
        for signature in [[0, 0], [0x55, 0xaa]] {
            bytes[510..512].copy_from_slice(&signature);
            let storage = Arc::new(block::mem::MemStorage::from_bytes(bytes.clone()));
            let device = block::raw::Raw::open(storage, block::raw::RawOptions::default()).unwrap();
            let disks = Disks::open(Arc::new(device)).unwrap();
            let [volume] = disks.volumes() else { panic!("{disks:?}") };
            assert_eq!(volume.location, Location::Whole { disk: 0 });
            assert_eq!(volume.content.as_ref().unwrap().kind, crate::detect::Kind::Swap);
        }
    }

    #[test]
    fn names_of_volumes() {
        let partition = |disk, number| Some(Name::Place(Location::Partition { disk, number }));
        assert_eq!(Name::parse("UUID=ab-1"), Some(Name::Uuid("ab-1")));
        assert_eq!(Name::parse("LABEL=\"my root\""), Some(Name::Label("my root")));
        assert_eq!(Name::parse("/dev/disk/by-partuuid/12-01"), Some(Name::PartUuid("12-01")));
        assert_eq!(Name::parse("/dev/sdb3"), partition(1, 3));
        assert_eq!(Name::parse("/dev/xvdaa12"), partition(26, 12));
        assert_eq!(Name::parse("/dev/nvme1n1p2"), partition(1, 2));
        assert_eq!(Name::parse("/dev/nvme0n2p1"), partition(1, 1));
        assert_eq!(Name::parse("/dev/vda"), Some(Name::Place(Location::Whole { disk: 0 })));
        assert_eq!(Name::parse("/dev/mapper/vg-root"), Some(Name::Mapper("vg-root")));
        assert_eq!(Name::parse("/dev/md0"), Some(Name::Array("md0")));
        assert_eq!(Name::parse("/dev/md/root"), Some(Name::Array("md/root")));
        assert_eq!(Name::parse("/dev/disk/by-id/md-name-a:0"), Some(Name::ArrayId("name-a:0")));
        for nothing in
            ["", "root", "/dev/", "/dev/sd", "/dev/sda1x", "/dev/nvme", "/dev/sdaaaa", "/dev/\u{e9}"]
        {
            assert_eq!(Name::parse(nothing), None, "{nothing}");
        }
    }
}
