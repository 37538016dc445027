//! Partition tables and volume groups, made by the tools that make them on real disks, and read by us.

use block::BlockDevice;
use guestdisk::partition::{self, Role, Scheme};
use guestdisk::{Disks, Location};
use tests::command::Cmd;
use tests::guest;
use tests::skip::{root, tool};
use tests::{Dir, requires};

/// Expects that we see what sfdisk does: numbers, places, types, names, UUIDs.
fn same_as_sfdisk(dir: &Dir, context: &str) -> partition::Table {
    let table = partition::read(&*guest::open(&dir.file("disk"))).unwrap().unwrap();
    let theirs = Cmd::new("sfdisk").words("--json disk").dir(dir.path()).ok().json();
    let theirs = &theirs["partitiontable"];
    assert_eq!(theirs["label"], table.scheme.name(), "{context}");
    let sector = u64::from(table.sector_bytes);
    let listed = theirs["partitions"].as_array().unwrap();
    assert_eq!(listed.len(), table.partitions.len(), "{context}: {table:#?}");
    for (ours, theirs) in table.partitions.iter().zip(listed) {
        assert_eq!(theirs["node"], format!("disk{}", ours.number), "{context}");
        let extended = ours.role == Role::Extended;
        assert_eq!(theirs["start"], ours.offset / sector, "{context}: {ours:?}");
        assert_eq!(theirs["size"], ours.len / sector, "{context}: {ours:?}");
        let kind = theirs["type"].as_str().unwrap().to_lowercase();
        assert_eq!(ours.kind.to_string().trim_start_matches("0x"), kind, "{context}");
        assert_eq!(extended, matches!(kind.as_str(), "5" | "f"), "{context}");
        if let Some(name) = theirs["name"].as_str() {
            assert_eq!(name, ours.name, "{context}");
        }
        if let Some(uuid) = theirs["uuid"].as_str() {
            assert_eq!(uuid.to_lowercase(), ours.uuid, "{context}");
        }
        assert_eq!(
            theirs["bootable"] == true || theirs["attrs"] == "LegacyBIOSBootable",
            ours.bootable(),
            "{context}"
        );
    }
    table
}

#[test]
fn tables_of_sfdisk() {
    requires!(tool("sfdisk"));
    let dir = Dir::new();
    for script in [
        "label: dos\nlabel-id: 0x1234abcd\nsize=10MiB, type=83, bootable\nsize=5MiB, type=82",
        "label: dos\nsize=1MiB\ntype=5, size=40MiB\nsize=1MiB, type=8e\nsize=2MiB\nsize=3MiB\nsize=4MiB",
        "label: dos\n4: size=3MiB\n2: type=f, size=20MiB\n5: size=3MiB, bootable\n6: size=1MiB, type=ef",
        "label: dos",
        "label: gpt\nsize=10MiB, type=U, name=\"EFI system\"\nsize=20MiB, name=\"gr\u{fc}n\", attrs=LegacyBIOSBootable\ntype=V",
        "label: gpt\ntable-length: 4\n3: size=10MiB",
        "label: gpt",
    ] {
        let _ = std::fs::remove_file(dir.file("disk"));
        dir.sparse("disk", 64 << 20);
        Cmd::new("sfdisk").words("-q disk").dir(dir.path()).env("LC_ALL", "C.UTF-8").stdin(script).ok();
        if script.contains("size") {
            let table = same_as_sfdisk(&dir, script);
            assert!(table.problems.is_empty(), "{script}: {:?}", table.problems);
        } else {
            let table = partition::read(&*guest::open(&dir.file("disk"))).unwrap().unwrap();
            assert_eq!(table.partitions, [], "{script}");
        }
    }
}

#[test]
fn gpt_of_sgdisk_with_damage() {
    requires!(tool("sgdisk"), tool("sfdisk"));
    let dir = Dir::new();
    dir.sparse("disk", 64 << 20);
    Cmd::new("sgdisk")
        .words("-n 1:0:+10M -t 1:ef00 -c 1:esp -n 7:0:+20M -c 7:root disk")
        .dir(dir.path())
        .ok();
    let good = same_as_sfdisk(&dir, "whole");
    let (last, entries) = ((64 << 20) - 512, (64 << 20) - 33 * 512);
    for (what, offset) in [("header", 512 + 20), ("entries", 1024 + 40)] {
        dir.copy("disk", "saved");
        dir.poke("disk", offset, &[0xee; 8]);
        let table = partition::read(&*guest::open(&dir.file("disk"))).unwrap().unwrap();
        assert_eq!(table.partitions, good.partitions, "{what}");
        assert!(table.problems[0].contains("backup is used"), "{what}: {:?}", table.problems);
        for backup in [last, entries] {
            dir.copy("disk", "both");
            dir.poke("both", backup, &[0xee; 8]);
            let error = partition::read(&*guest::open(&dir.file("both"))).unwrap_err();
            assert_eq!(error.kind(), block::ErrorKind::Corrupt, "{what}");
        }
        dir.copy("saved", "disk");
    }
    // A hybrid: the GPT counts.
    Cmd::new("sgdisk").words("-h 7 disk").dir(dir.path()).ok();
    let table = partition::read(&*guest::open(&dir.file("disk"))).unwrap().unwrap();
    assert_eq!((table.scheme, table.partitions), (Scheme::Gpt, good.partitions));
}

/// Runs a command of LVM without device-mapper, on these devices only.
fn lvm(dir: &Dir, loops: &[&str], words: &str) -> String {
    let filter: Vec<_> = loops.iter().map(|device| format!("\"a|^{device}$|\"")).collect();
    let config = format!(
        "devices {{ use_devicesfile=0 global_filter=[{},\"r|.*|\"] }} global {{ use_lvmpolld=0 locking_type=1 }} backup {{ backup=0 archive=0 }} activation {{ udev_sync=0 udev_rules=0 }}",
        filter.join(",")
    );
    let (command, rest) = words.split_once(' ').unwrap_or((words, ""));
    let ran = Cmd::new("lvm")
        .arg(command)
        .words("--driverloaded n --config")
        .arg(config)
        .words(rest)
        .dir(dir.path())
        .run();
    ran.expect_code(0).stdout
}

/// Loop devices, given back at the end.
struct Loops(Vec<String>);

impl Drop for Loops {
    fn drop(&mut self) {
        for device in &self.0 {
            Cmd::new("losetup").arg("-d").arg(device).run();
        }
    }
}

/// LVM says where the extents of each volume are; we read the same from there.
#[test]
fn volume_groups_of_lvm() {
    requires!(root(), tool("lvm"), guest::mounts("ext4"));
    let dir = Dir::new();
    let mut loops = Loops(vec![]);
    for name in ["a", "b"] {
        dir.sparse(name, 24 << 20);
        loops.0.push(
            Cmd::new("losetup").arg("-f").arg("--show").arg(dir.file(name)).ok().stdout.trim().to_owned(),
        );
    }
    let names = loops.0.clone();
    let devices: Vec<_> = names.iter().map(String::as_str).collect();
    let run = |words: &str| lvm(&dir, &devices, words);
    let [a, b] = [devices[0], devices[1]];
    run(&format!("pvcreate -q -y {a} {b}"));
    let group = format!("vg-test-{}", std::process::id());
    run(&format!("vgcreate -q -s 1M {group} {a} {b}"));
    let create = |words: &str| run(&format!("lvcreate -q -y -an -Zn -Wn {words}"));
    create(&format!("-n root -L 3M {group} {a}"));
    create(&format!("-n striped -i 2 -I 8 -L 8M {group}"));
    run(&format!("lvextend -q {group}/root -L +4M {b}"));
    // Many changes, so that the ring of descriptions has turned.
    for size in 0..6 {
        create(&format!("-n more{size} -L 1M {group}"));
        run(&format!("lvremove -q -y {group}/more{size}"));
    }
    let report = run(&format!(
        "lvs --noheadings --units b --nosuffix -o lv_name,seg_start,seg_size,stripe_size,seg_pe_ranges {group}"
    ));
    drop(loops);
    // Each MiB of the physical volumes says which it is.
    let first = 1 << 20;
    for name in ["a", "b"] {
        for extent in 0..22_u8 {
            dir.poke(name, first + u64::from(extent) * first, &[name.as_bytes()[0] + 2 * extent; 1 << 20]);
        }
    }
    let disks = Disks::open_all(vec![guest::open(&dir.file("a")), guest::open(&dir.file("b"))]).unwrap();
    let mut compared = 0;
    for line in report.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let [name, start, size, stripe, ranges @ ..] = words.as_slice() else { panic!("{report}") };
        if !matches!(*name, "root" | "striped") {
            continue;
        }
        let location = Location::Logical { group: group.clone(), name: (*name).to_owned() };
        let volume = disks.volumes().iter().find(|volume| volume.location == location).unwrap();
        let found = disks.find(&format!("/dev/mapper/{}-{name}", group.replace('-', "--"))).unwrap();
        assert_eq!(found.location, location);
        compare_segment(
            &*volume.device,
            [start, size, stripe].map(|number| number.parse().unwrap()),
            ranges,
            a,
        );
        compared += 1;
    }
    assert!(compared >= 3, "{report}");
    assert_eq!(disks.problems(), Vec::<String>::new());
}

/// Expects the bytes of a segment that lies on ranges such as `/dev/loop0:3-5`, in stripes if there are several.
fn compare_segment(device: &dyn BlockDevice, [start, size, stripe]: [u64; 3], ranges: &[&str], a: &str) {
    let extents: Vec<(u8, u64)> = ranges
        .iter()
        .map(|range| {
            let (name, extents) = range.rsplit_once(':').unwrap();
            let first = extents.split_once('-').unwrap().0.parse().unwrap();
            (if name == a { b'a' } else { b'b' }, first)
        })
        .collect();
    let mut bytes = vec![0; block::num::to_usize(size)];
    device.read_at(&mut bytes, start).unwrap();
    let unit = if extents.len() > 1 { stripe } else { size };
    for (at, byte) in (0_u64..).zip(&bytes).step_by(512) {
        let (chunk, within) = (at / unit, at % unit);
        let (letter, first) = extents[block::num::to_usize(chunk % extents.len() as u64)];
        let offset = chunk / extents.len() as u64 * unit + within;
        let extent = u8::try_from(first + (offset >> 20)).unwrap();
        assert_eq!(*byte, letter + 2 * extent, "byte {at:#x} of a segment at {start:#x}: {ranges:?}");
    }
}

/// A whole way down: a partition, a physical volume in it, a file system on a logical volume.
#[test]
fn a_root_file_system_on_lvm() {
    requires!(root(), tool("lvm"), tool("sfdisk"), tool("mke2fs"), guest::mounts("ext4"));
    use tests::guest_image::{Holds, Part};
    let dir = Dir::new();
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    let grub: &[u8] = b"menuentry Linux {\nsearch --fs-uuid --set=root 01234567-89ab-cdef-0123-456789abcdef\nlinux /vmlinuz root=/dev/mapper/g-root\n}\n";
    let files: &[(&str, &[u8])] = &[("boot/grub/grub.cfg", grub), ("vmlinuz", b"kernel")];
    // The file system is made in a partition of its own and moved into the volume.
    let part = |kind, mib, holds, files| Part { kind, mib, holds, files };
    tests::guest_image::disk(&dir, "fs", "dos", &[part("L", 10, Holds::Ext4(uuid), files)]);
    tests::guest_image::disk(
        &dir,
        "disk",
        "dos",
        &[part("L", 4, Holds::Nothing, &[]), part("8e", 20, Holds::Nothing, &[])],
    );
    let offset = 5 << 20;
    let shown = Cmd::new("losetup")
        .words(&format!("-f --show -o {offset} --sizelimit {} disk", 20 << 20))
        .dir(dir.path())
        .ok()
        .stdout;
    let loops = Loops(vec![shown.trim().to_owned()]);
    let device = shown.trim();
    lvm(&dir, &[device], &format!("pvcreate -q -y {device}"));
    lvm(&dir, &[device], &format!("vgcreate -q -s 1M g {device}"));
    lvm(&dir, &[device], "lvcreate -q -y -an -Zn -Wn -n root -L 12M g");
    drop(loops);
    let whole = dir.read("fs");
    dir.poke("disk", offset + (1 << 20), &whole[1 << 20..11 << 20]);
    let disks = Disks::open(guest::open(&dir.file("disk"))).unwrap();
    let boot = guestdisk::boot::entries(&disks);
    let entry = boot.default_entry().unwrap();
    assert_eq!(entry.kernel.to_string(), "/dev/g/root:/vmlinuz");
    assert_eq!(boot.read(&entry.kernel, 100).unwrap(), b"kernel");
    let root = entry.cmdline.strip_prefix("root=").unwrap();
    assert_eq!(disks.find(root).unwrap().uuid(), uuid);
}
