//! What a Linux guest calls its disks, as far as that follows from how they are attached.

use crate::guest::{Bus, Disk};

/// `a`, `b`, ..., `z`, `aa`, `ab`, ...: how the kernel counts disks.
pub(crate) fn letters(index: usize) -> String {
    let mut letters = vec![];
    let mut rest = index;
    loop {
        letters.push(u8::try_from(rest % 26).unwrap_or_default() + b'a');
        if rest < 26 {
            break;
        }
        rest = rest / 26 - 1;
    }
    letters.iter().rev().map(|letter| char::from(*letter)).collect()
}

/// The prefix of disks' names on a bus.
const fn prefix(bus: Bus) -> Option<&'static str> {
    match bus {
        Bus::Ide | Bus::Sata | Bus::Scsi | Bus::VirtioScsi | Bus::Usb => Some("sd"),
        Bus::Virtio => Some("vd"),
        Bus::Xen => Some("xvd"),
        Bus::Nvme | Bus::Floppy => None,
    }
}

/// Names the disks that have no name yet, which are in the order of their addresses. Where disks of several kinds of
/// controllers share a prefix, it depends on which driver comes first, and none of them is named.
pub(crate) fn assign(disks: &mut [Disk]) {
    for wanted in ["sd", "vd", "xvd"] {
        let of_prefix = |disk: &Disk| disk.bus.and_then(prefix) == Some(wanted);
        let mut buses: Vec<Bus> =
            disks.iter().filter(|disk| of_prefix(disk)).filter_map(|disk| disk.bus).collect();
        buses.dedup();
        if buses.len() != 1 || disks.iter().any(|disk| of_prefix(disk) && disk.guest_name.is_some()) {
            continue;
        }
        for (index, disk) in disks.iter_mut().filter(|disk| of_prefix(disk)).enumerate() {
            disk.guest_name = Some(format!("{wanted}{}", letters(index)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_count_as_the_kernel_does() {
        let counted: Vec<String> = [0, 1, 25, 26, 27, 51, 52, 701, 702].map(letters).into();
        assert_eq!(counted, ["a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"]);
    }

    fn names(buses: &[Bus]) -> Vec<Option<String>> {
        let disk = |bus: &Bus| Disk { bus: Some(*bus), ..Disk::new("d", super::super::image("d", None)) };
        let mut disks: Vec<Disk> = buses.iter().map(disk).collect();
        assign(&mut disks);
        disks.into_iter().map(|disk| disk.guest_name).collect()
    }

    #[test]
    fn only_what_follows_is_named() {
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(names(&[Bus::Scsi, Bus::Scsi]), [some("sda"), some("sdb")]);
        assert_eq!(names(&[Bus::Scsi, Bus::Sata, Bus::Virtio]), [None, None, some("vda")]);
        assert_eq!(names(&[Bus::Xen, Bus::Scsi]), [some("xvda"), some("sda")]);
        assert_eq!(names(&[Bus::Nvme]), [None]);
    }
}
