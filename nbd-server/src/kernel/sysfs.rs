//! What the kernel shows of its nbd devices below `/sys/block`.

use std::path::{Path, PathBuf};

use super::Device;

/// Where the kernel shows its disks.
pub(super) const BLOCK: &str = "/sys/block";
/// sysfs counts in sectors of this size, whatever the device's own are.
const SECTOR_BYTES: u64 = 512;

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Which.
    pub device: Device,
    /// Bytes; 0 if it is not connected.
    pub size: u64,
    /// The process that has connected it, if it is connected. It may have ended since, where the kernel talks to the
    /// server itself.
    pub pid: Option<u32>,
    /// What whoever connected it calls the other end, if anything.
    pub backend: Option<String>,
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// The devices of its partitions.
    pub partitions: Vec<PartitionDevice>,
}

impl Status {
    /// Whether it has a disk. (One that is being taken down may have one of the two marks still.)
    pub fn connected(&self) -> bool {
        self.pid.is_some() || self.size > 0
    }
}

/// The device of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionDevice {
    /// Its number in the partition table.
    pub number: u32,
    /// Its name, without a path: `nbd0p1`.
    pub name: String,
    /// Its first byte on the disk.
    pub offset: u64,
    /// Its size in bytes.
    pub len: u64,
}

/// All devices that there are, by number.
pub(super) fn devices(block: &Path) -> Vec<Device> {
    let entries = std::fs::read_dir(block).into_iter().flatten().flatten();
    let mut devices: Vec<_> =
        entries.filter_map(|entry| Device::from_name(entry.file_name().to_str()?)).collect();
    devices.sort_unstable();
    devices
}

/// A device; `None` if there is none of this number.
pub(super) fn status(block: &Path, device: Device) -> Option<Status> {
    let dir = block.join(device.name());
    let size = number(&dir.join("size"))?.saturating_mul(SECTOR_BYTES);
    Some(Status {
        device,
        size,
        pid: number(&dir.join("pid")).and_then(|pid| pid.try_into().ok()),
        backend: text(&dir.join("backend")).filter(|name| !name.is_empty()),
        read_only: number(&dir.join("ro")) == Some(1),
        block_size: number(&dir.join("queue/logical_block_size"))
            .and_then(|n| n.try_into().ok())
            .unwrap_or(512),
        partitions: partitions(&dir),
    })
}

/// The device numbers (`43:0`) of a device and of its partitions, and the names of what is built on them.
pub(super) fn numbers_and_holders(block: &Path, device: Device) -> (Vec<String>, Vec<String>) {
    let dir = block.join(device.name());
    let parts = partitions(&dir).into_iter().map(|partition| dir.join(partition.name));
    let dirs: Vec<PathBuf> = std::iter::once(dir.clone()).chain(parts).collect();
    let numbers = dirs.iter().filter_map(|dir| text(&dir.join("dev"))).collect();
    let holders = dirs.iter().flat_map(|dir| std::fs::read_dir(dir.join("holders"))).flatten().flatten();
    (numbers, holders.map(|holder| holder.file_name().to_string_lossy().into_owned()).collect())
}

fn partitions(dir: &Path) -> Vec<PartitionDevice> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries.filter_map(|entry| partition(&entry.path())).collect();
    all.sort_unstable_by_key(|partition| partition.number);
    all
}

fn partition(dir: &Path) -> Option<PartitionDevice> {
    Some(PartitionDevice {
        number: number(&dir.join("partition"))?.try_into().ok()?,
        name: dir.file_name()?.to_str()?.to_owned(),
        offset: number(&dir.join("start"))?.saturating_mul(SECTOR_BYTES),
        len: number(&dir.join("size"))?.saturating_mul(SECTOR_BYTES),
    })
}

fn text(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim_end().to_owned())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn a_connected_device_is_described() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (name, text) in [
            ("nbd11/size", "131072\n"),
            ("nbd11/pid", "4711\n"),
            ("nbd11/backend", "vimg:/a b.qcow2\n"),
            ("nbd11/ro", "1\n"),
            ("nbd11/dev", "43:352\n"),
            ("nbd11/queue/logical_block_size", "4096\n"),
            ("nbd11/nbd11p2/partition", "2\n"),
            ("nbd11/nbd11p2/start", "2048\n"),
            ("nbd11/nbd11p2/size", "8\n"),
            ("nbd11/nbd11p2/dev", "259:0\n"),
            ("nbd11/nbd11p2/holders/dm-0/x", ""),
            ("nbd2/size", "0\n"),
            ("nbdkit/size", "0\n"),
            ("sda/size", "1\n"),
        ] {
            write(root, name, text);
        }
        let [two, eleven] = devices(root)[..] else { panic!("{:?}", devices(root)) };
        assert!(!status(root, two).unwrap().connected());
        let status = status(root, eleven).unwrap();
        assert!(status.connected() && status.read_only);
        assert_eq!((status.size, status.pid, status.block_size), (64 << 20, Some(4711), 4096));
        assert_eq!(status.backend.as_deref(), Some("vimg:/a b.qcow2"));
        let partition = PartitionDevice { number: 2, name: "nbd11p2".to_owned(), offset: 1 << 20, len: 4096 };
        assert_eq!(status.partitions, [partition]);
        let (numbers, holders) = numbers_and_holders(root, eleven);
        assert_eq!(numbers, ["43:352", "259:0"]);
        assert_eq!(holders, ["dm-0"]);
    }

    #[test]
    fn nothing_is_made_of_what_is_not_there_or_nonsense() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(devices(&root.path().join("none")), []);
        write(root.path(), "nbd0/size", "many");
        assert_eq!(status(root.path(), Device::new(0).unwrap()), None);
    }
}
