//! What is inside a guest: its tree, its systems, and the commands that show them.

use std::path::{Path, PathBuf};

use block::ErrorKind;
use guestdisk::Disks;
use tests::command::Cmd;
use tests::guest_image::{Holds, Part, disk};
use tests::skip::{Need, tool};
use tests::{Dir, requires};
use v2v::inspect::{Mount, System};
use v2v::names::DiskNames;
use v2v::view::GuestView;

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const BOOT: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";
const MIB: u64 = 1 << 20;

fn tools() -> Need {
    for name in ["sfdisk", "mke2fs", "debugfs", "mkfs.vfat", "mcopy"] {
        tool(name)?;
    }
    Ok(())
}

/// Runs commands of debugfs on the file system at an offset of a disk.
fn debugfs(dir: &Dir, name: &str, offset: u64, commands: &str) {
    let image = format!("{}?offset={offset}", dir.file(name).display());
    Cmd::new("debugfs").words("-w -f -").arg(image).stdin(commands).ok();
}

fn mount(spec: &str, path: &str) -> Mount {
    Mount {
        spec: spec.into(),
        path: path.into(),
        kind: "ext4".into(),
        options: "defaults".into(),
        ..Mount::default()
    }
}

#[test]
fn one_tree_of_several_volumes() {
    requires!(tools());
    let dir = Dir::new();
    let parts = [
        Part {
            kind: "L",
            mib: 20,
            holds: Holds::Ext4(ROOT),
            files: &[
                ("etc/hostname", b"host"),
                ("boot/hidden", b"x"),
                ("boot/efi/hidden", b"x"),
                ("usr/lib/a", b"a"),
            ],
        },
        Part {
            kind: "L",
            mib: 20,
            holds: Holds::Ext4(BOOT),
            files: &[("deep/file", b"deep"), ("efi/x", b"")],
        },
        Part {
            kind: "U",
            mib: 34,
            holds: Holds::Vfat("12ab34cd"),
            files: &[("EFI/BOOT/BOOTX64.EFI", b"loader")],
        },
    ];
    let device = disk(&dir, "d", "gpt", &parts);
    debugfs(
        &dir,
        "d",
        MIB,
        "symlink /lib usr/lib\nsymlink /to-boot /boot/deep\nsymlink /loop /loop\nsymlink /out ../../../etc\n",
    );
    debugfs(&dir, "d", 21 * MIB, "symlink /deep/back ../../etc/hostname\nsymlink /abs /etc/hostname\n");
    let disks = Disks::open(device).unwrap();
    let mounts = vec![
        mount("/dev/sda3", "/boot/efi"),
        mount(&format!("UUID={BOOT}"), "/boot"),
        mount("/dev/sda9", "/nowhere"),
        Mount { kind: "swap".into(), ..mount("/dev/sda1", "/boot") },
    ];
    let view = GuestView::new(&disks, &System { mounts, ..System::default() });
    for (path, volume, within, real) in [
        ("/boot/deep/file", 1, "/deep/file", "/boot/deep/file"),
        ("/to-boot/file", 1, "/deep/file", "/boot/deep/file"),
        ("/boot/deep/back", 0, "/etc/hostname", "/etc/hostname"),
        ("/boot/abs", 0, "/etc/hostname", "/etc/hostname"),
        ("/to-boot/../../out/hostname", 0, "/etc/hostname", "/etc/hostname"),
        ("/boot", 1, "/", "/boot"),
        ("/", 0, "/", "/"),
        ("/lib/a", 0, "/usr/lib/a", "/usr/lib/a"),
        ("/boot/efi/efi/boot/bootx64.efi", 2, "/EFI/BOOT/BOOTX64.EFI", "/boot/efi/efi/boot/bootx64.efi"),
    ] {
        let place = view.locate(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!((place.volume, place.path.as_path()), (volume, Path::new(within)), "{path}");
        assert_eq!(place.guest_path, Path::new(real), "{path}");
        let back = view.guest_path(volume, within).unwrap();
        assert_eq!(back.to_string_lossy().to_lowercase(), real.to_lowercase(), "{path}");
    }
    assert_eq!(view.read("/to-boot/file", 100).unwrap(), b"deep");
    assert_eq!(view.read("/boot/efi/EFI/BOOT/BOOTX64.EFI", 100).unwrap(), b"loader");
    assert_eq!(view.read("/boot/hidden", 100).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(view.locate("/loop").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(view.locate_link("/boot/abs").unwrap().path, Path::new("/abs"));
    assert_eq!(view.read_link("/boot/deep/back").unwrap(), Path::new("../../etc/hostname"));
    assert_eq!(view.locate_new("/to-boot/a/b").unwrap().path, Path::new("/deep/a/b"));
    assert_eq!(view.locate_new("/lib/a").unwrap().path, Path::new("/usr/lib/a"));
    assert_eq!(view.names_in("/boot"), ["abs", "deep", "efi", "lost+found"]);
    assert_eq!(view.metadata("/to-boot").unwrap().kind, guestdisk::fs::FileKind::Directory);
    view.locate("/etc/hostname/x").unwrap_err();
    view.locate("/x".repeat(5000)).unwrap_err();
    let alone = GuestView::of_volume(&disks, 1);
    assert_eq!(alone.locate("/deep/back").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(alone.read("/deep/file", 4).unwrap(), b"deep");
}

/// What the source calls its disks decides over the order in which they come.
#[test]
fn names_of_disks() {
    requires!(tools());
    let dir = Dir::new();
    let part = |uuid: &'static str| [Part { kind: "L", mib: 8, holds: Holds::Ext4(uuid), files: &[] }];
    let disks =
        Disks::open_all(vec![disk(&dir, "a", "dos", &part(ROOT)), disk(&dir, "b", "dos", &part(BOOT))])
            .unwrap();
    let names = DiskNames { names: vec![Some("sdb".into()), Some("sda".into())], ..DiskNames::default() };
    for (name, plain, told) in [
        ("/dev/sda1", Some(0), Some(1)),
        ("/dev/sdb1", Some(1), Some(0)),
        ("/dev/hdb1", Some(1), Some(1)),
        ("/dev/cciss/c0d1p1", Some(1), Some(1)),
        ("/dev/sda7", None, None),
        ("/dev/disk/by-id/ata-X-part1", None, None),
    ] {
        assert_eq!(DiskNames::default().find(&disks, name), plain, "{name}");
        assert_eq!(names.find(&disks, name), told, "{name}");
    }
    let uuid = PathBuf::from(format!("/dev/disk/by-uuid/{BOOT}"));
    assert_eq!(names.find(&disks, &uuid.to_string_lossy()), Some(1));
}
