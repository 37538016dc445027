//! Who uses a device: what stands in the way of disconnecting it, in words that help to find it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::{Device, sysfs};

/// Mounts, swap areas, devices on top and processes that use a device or one of its partitions. Neither our own process
/// nor the one that has connected it (`owner`, as the kernel shows it) is counted.
pub(super) fn of(device: Device, owner: Option<u32>) -> Vec<String> {
    let (numbers, holders) = sysfs::numbers_and_holders(Path::new(sysfs::BLOCK), device);
    let mut users: Vec<String> = read("/proc/self/mountinfo")
        .lines()
        .filter_map(|line| mounted(line, &numbers, device))
        .map(|(source, place)| format!("{source} is mounted on {place}"))
        .collect();
    users.extend(holders.into_iter().map(|name| format!("/dev/{name} is built on it")));
    let swaps = read("/proc/swaps");
    let swaps = swaps.lines().filter_map(|line| line.split_whitespace().next());
    users.extend(swaps.filter(|path| is_part_of(path, device)).map(|path| format!("{path} is swap space")));
    users.extend(processes(&numbers, owner));
    users
}

/// Source and mount point, if a line of `/proc/self/mountinfo` (proc(5)) is about one of the devices.
fn mounted<'a>(line: &'a str, numbers: &[String], device: Device) -> Option<(&'a str, &'a str)> {
    let mut words = line.split(' ');
    let number = words.nth(2)?;
    let place = words.nth(1)?;
    let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
    // btrfs shows a number of its own.
    let ours = numbers.iter().any(|ours| ours == number) || is_part_of(source, device);
    ours.then_some((source, place))
}

/// `/dev/nbd0` or `/dev/nbd0p1` of `/dev/nbd0`.
fn is_part_of(path: &str, device: Device) -> bool {
    let rest = path.strip_prefix("/dev/").and_then(|name| name.strip_prefix(&device.name()));
    rest.is_some_and(|rest| {
        rest.is_empty()
            || rest.strip_prefix('p').is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// Processes that have one of the devices open.
fn processes(numbers: &[String], owner: Option<u32>) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // The kernel shows the thread.
    let owns = |pid| owner.is_some_and(|owner| Path::new(&format!("/proc/{pid}/task/{owner}")).exists());
    let others = pids.filter(|pid| *pid != std::process::id() && !owns(*pid));
    others
        .filter(|pid| has_open(*pid, numbers))
        .map(|pid| format!("process {pid} ({}) has it open", read(&format!("/proc/{pid}/comm")).trim_end()))
        .collect()
}

fn has_open(pid: u32, numbers: &[String]) -> bool {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::metadata(file.path()).ok()).any(|file| {
        let is_device = file.mode() & nix::libc::S_IFMT == nix::libc::S_IFBLK;
        let number = file.rdev();
        is_device && numbers.contains(&format!("{}:{}", major(number), minor(number)))
    })
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_recognised_by_number_or_by_name() {
        let nbd1 = Device::new(1).unwrap();
        let line = "36 35 43:33 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/nbd1p1 rw";
        let numbers = ["43:32".to_owned(), "43:33".to_owned()];
        assert_eq!(mounted(line, &numbers, nbd1), Some(("/dev/nbd1p1", "/mnt/a\\040b")));
        let btrfs = "36 35 0:47 / /mnt rw - btrfs /dev/nbd1 rw";
        assert_eq!(mounted(btrfs, &numbers, nbd1), Some(("/dev/nbd1", "/mnt")));
        let other = "36 35 43:160 / /mnt rw - ext4 /dev/nbd11 rw";
        assert_eq!(mounted(other, &numbers, nbd1), None);
        assert_eq!(mounted("36 35", &numbers, nbd1), None);
        assert_eq!(mounted("", &numbers, nbd1), None);
    }
}
