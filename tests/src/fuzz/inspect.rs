//! What is inside guests: initramfs images, configuration files, whole disks.

use guestdisk::Disks;
use v2v::initramfs::{self, Limits};
use v2v::inspect::{document, inspect, parsers, to_text};
use v2v::view::GuestView;

use super::guest::device;

/// The most bytes that an archive may unpack to here.
const MOST_UNPACKED: u64 = 8 << 20;

/// An initramfs.
pub fn initramfs(bytes: &[u8]) {
    let limits = Limits { unpacked_bytes: MOST_UNPACKED, members: 1000, ..Limits::default() };
    let archive = initramfs::read(bytes, &limits, &initramfs::is_wanted);
    assert!(archive.members.len() <= 1000);
    let found = initramfs::describe(&archive, "6.1", bytes.len() as u64);
    assert!(found.module_names.is_sorted());
    for (one, next) in archive.segments.iter().zip(archive.segments.iter().skip(1)) {
        assert!(one.offset + one.len <= next.offset);
    }
    // What has been unpacked is the same when it is known again.
    let known = initramfs::read_knowing(bytes, &limits, &initramfs::is_wanted, &[]);
    let again = initramfs::read_knowing(bytes, &limits, &initramfs::is_wanted, &known.seen);
    if archive.problem.is_empty() {
        assert_eq!((&again.members, &again.segments), (&archive.members, &archive.segments));
    }
    assert_eq!(again.problem.is_empty(), archive.problem.is_empty());
}

/// A configuration file of any kind.
pub fn guest_text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().count();
    assert!(parsers::fstab(&text).iter().all(|mount| (1..=lines).contains(&mount.line)));
    assert!(parsers::names_in_text(&text).iter().all(|(line, _)| (1..=lines).contains(line)));
    let _ = parsers::network(&text);
    let _ = parsers::os_release(&text);
}

/// The disk of a guest, packed as [`super::pack_disk`] does it.
pub fn guest_inspect(bytes: &[u8]) {
    let Ok(disks) = Disks::open(device(bytes)) else { return };
    let Ok(found) = inspect(&disks) else { return };
    let text = to_text(&disks, &found);
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
    let _ = document(&disks, &found).to_string();
    for system in &found.systems {
        let view = GuestView::new(&disks, system);
        for path in ["/etc/fstab", "/boot/x/../y", "/vmlinuz", "/lib/modules"] {
            if let Ok(place) = view.locate(path) {
                assert!(place.volume < disks.volumes().len());
            }
            let _ = view.locate_new(path);
        }
    }
}
