//! initramfs images made by the tools that distributions make them with, listed by us.

use std::path::Path;

use tests::command::Cmd;
use tests::skip::{Need, tool};
use tests::{Dir, requires};
use v2v::initramfs::{self, Archive, Limits, describe};

/// The tools, and the names under which we know what they make.
const PACKERS: [(&str, &str); 9] = [
    ("cat", "none"),
    ("gzip -9c", "gzip"),
    ("xz -c --check=crc32", "xz"),
    ("xz -9c --check=none --x86 --lzma2=dict=1MiB", "xz"),
    ("lzma -c", "lzma"),
    ("bzip2 -c", "bzip2"),
    ("lz4 -l -c", "lz4"),
    ("zstd -19 -q -c", "zstd"),
    ("zstd -T2 -1 -q -c", "zstd"),
];

fn tools() -> Need {
    for name in ["cpio", "gzip", "xz", "lzma", "bzip2", "lz4", "zstd"] {
        tool(name)?;
    }
    Ok(())
}

/// A tree with these files; directories are made, and `a -> b` is a link.
fn tree(dir: &Dir, name: &str, files: &[(&str, &[u8])]) {
    for (path, bytes) in files {
        let (path, target) =
            path.split_once(" -> ").map_or((*path, None), |(path, target)| (path, Some(target)));
        let file = dir.file(name).join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        match target {
            Some(target) => std::os::unix::fs::symlink(target, file).unwrap(),
            None => std::fs::write(file, bytes).unwrap(),
        }
    }
}

/// The tree as an archive, packed.
fn pack(dir: &Dir, name: &str, format: &str, packer: &str) -> Vec<u8> {
    let script =
        format!("cd {name} && find . | LC_ALL=C sort | cpio -o -H {format} --quiet | {packer} > ../packed");
    Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).ok();
    dir.read("packed")
}

/// The names that cpio lists.
fn listed(dir: &Dir, name: &str) -> Vec<String> {
    let script = format!("cd {name} && find . | LC_ALL=C sort | cpio -o -H newc --quiet | cpio -t --quiet");
    let ran = Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).ok();
    ran.stdout.lines().map(str::to_owned).collect()
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn read(bytes: &[u8]) -> Archive {
    initramfs::read(bytes, &Limits::default(), &initramfs::is_wanted)
}

fn names(archive: &Archive) -> Vec<&str> {
    archive.members.iter().map(|member| member.path.as_str()).collect()
}

/// The three parts that occur: microcode, the main part, and what we append.
fn parts(dir: &Dir) -> Vec<String> {
    let large: Vec<u8> =
        (0..3_000_000_u32).map(|at| u8::try_from(at.wrapping_mul(at) >> 7 & 0xff).unwrap()).collect();
    tree(dir, "early", &[("kernel/x86/microcode/GenuineIntel.bin", b"microcode")]);
    tree(
        dir,
        "main",
        &[
            ("lib -> usr/lib", b""),
            ("conf/conf.d/resume", b"RESUME=/dev/sda2\n"),
            ("conf/initramfs.conf", b"MODULES=most\n"),
            ("scripts/init-premount/x", b""),
            ("usr/lib/modules/6.1.0-1/kernel/drivers/scsi/vmw_pvscsi.ko", b"module"),
            ("usr/lib/modules/6.1.0-1/kernel/drivers/virtio-blk.ko.xz", b"module"),
            ("usr/lib/modules/6.1.0-1/kernel/fs/ext4.ko", &large),
            ("etc/secret", b"x"),
        ],
    );
    tree(
        dir,
        "more",
        &[("usr/lib/modules/6.1.0-1/kernel/x/virtio_scsi.ko", b"module"), ("conf/conf.d/resume", b"none\n")],
    );
    let all = [listed(dir, "early"), listed(dir, "main"), listed(dir, "more")].concat();
    all.iter().map(|name| name.strip_prefix("./").unwrap_or(name).to_owned()).collect()
}

#[test]
fn every_compression_with_microcode_and_an_appended_part() {
    requires!(tools());
    let dir = Dir::new();
    let expected = parts(&dir);
    let (early, more) = (pack(&dir, "early", "newc", "cat"), pack(&dir, "more", "newc", "cat"));
    for (packer, name) in PACKERS {
        for format in ["newc", "crc"] {
            let main = padded(pack(&dir, "main", format, packer));
            let len = main.len();
            let whole = [padded(early.clone()), main, more.clone()].concat();
            let archive = read(&whole);
            assert_eq!(archive.problem, "", "{packer}");
            assert_eq!(names(&archive), expected, "{packer}");
            // What was unpacked once is the same when it is known again.
            let known = |bytes: &[u8], seen: &[_]| {
                initramfs::read_knowing(bytes, &Limits::default(), &initramfs::is_wanted, seen)
            };
            let seen = known(&whole[..whole.len() - more.len()], &[]).seen;
            let again = known(&whole, &seen);
            assert_eq!((&again.members, &again.segments), (&archive.members, &archive.segments), "{packer}");
            assert_eq!(seen.len(), if matches!(name, "lz4" | "lzma" | "lzo") { 1 } else { 2 }, "{packer}");
            let kinds: Vec<_> = archive.segments.iter().map(|segment| segment.compression.name()).collect();
            assert_eq!(kinds, ["none", name, "none"], "{packer}");
            let main = &archive.segments[1];
            assert_eq!(main.offset, padded(early.clone()).len() as u64, "{packer}");
            assert!(main.len <= len as u64 && main.len + 512 > len as u64, "{packer}: {main:?} of {len}");
            assert!(main.unpacked > 3_000_000, "{packer}");
            let initramfs = describe(&archive, "6.1.0-1", whole.len() as u64);
            assert_eq!(
                (initramfs.generator.as_str(), initramfs.compression.as_str()),
                ("initramfs-tools", name)
            );
            assert_eq!(initramfs.module_names, ["ext4", "virtio_blk", "virtio_scsi", "vmw_pvscsi"]);
            assert_eq!(initramfs.modules.as_deref(), Some("usr/lib/modules/6.1.0-1"));
            assert_eq!((initramfs.module_suffix.as_str(), initramfs.merged_usr), (".ko", true));
            let files: Vec<_> =
                initramfs.files.iter().map(|file| (file.path.as_str(), file.bytes.as_slice())).collect();
            assert_eq!(
                files,
                [("conf/conf.d/resume", &b"none\n"[..]), ("conf/initramfs.conf", &b"MODULES=most\n"[..])],
                "{packer}"
            );
        }
    }
}

/// As Linux takes it: packed archives need no zeros behind them, but for LZ4, which takes what follows for a length.
#[test]
fn parts_without_padding() {
    requires!(tools());
    let dir = Dir::new();
    let expected = parts(&dir);
    let (early, more) = (pack(&dir, "early", "newc", "cat"), pack(&dir, "more", "newc", "gzip -c"));
    for (packer, name) in PACKERS {
        let main = pack(&dir, "main", "newc", packer);
        let archive = read(&[early.clone(), main, more.clone()].concat());
        if name == "lz4" {
            assert_ne!(archive.problem, "");
            continue;
        }
        assert_eq!(archive.problem, "", "{packer}");
        assert_eq!(names(&archive), expected, "{packer}");
    }
}

/// Wherever a file is cut off or changed, what is in front of that is listed, and the rest is told.
#[test]
fn damaged_archives() {
    requires!(tools());
    let dir = Dir::new();
    tree(
        &dir,
        "main",
        &[("a/b/c", b"1"), ("d -> a", b""), ("conf/conf.d/resume", b"RESUME=x"), ("x.ko", &[7; 5000])],
    );
    let mut random = block::testing::Random::new(3);
    for (packer, _) in PACKERS {
        let whole = pack(&dir, "main", "newc", packer);
        let full = read(&whole);
        assert_eq!(full.problem, "", "{packer}");
        // The trailer of cpio's last block may be missing unnoticed.
        for cut in (1..whole.len().saturating_sub(600)).step_by(1 + whole.len() / 60) {
            let archive = read(&whole[..cut]);
            assert_ne!(archive.problem, "", "{packer} {cut}");
            assert!(full.members.starts_with(&archive.members), "{packer} {cut}");
        }
        for _ in 0..60 {
            let mut bytes = whole.clone();
            let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
            bytes[at] = bytes[at].wrapping_add(1 + u8::try_from(random.below(255)).unwrap());
            describe(&read(&bytes), "x", 0);
        }
    }
    assert!(read(b"not an archive").problem.contains("neither"));
    assert!(read(&[0; 4096]).segments.is_empty());
}

/// What unpacks to more than there may be ends with words, not with memory.
#[test]
fn bombs() {
    requires!(tools());
    let dir = Dir::new();
    dir.sparse("main-file", 1 << 30);
    std::fs::create_dir(dir.file("main")).unwrap();
    std::fs::rename(dir.file("main-file"), dir.file("main/zeros")).unwrap();
    let limits = Limits { unpacked_bytes: 64 << 20, ..Limits::default() };
    for packer in ["zstd -1 -q -c", "gzip -1c"] {
        let packed = pack(&dir, "main", "newc", packer);
        let archive = initramfs::read(&packed[..], &limits, &|_| true);
        assert!(archive.problem.contains("more than 67108864 bytes"), "{}", archive.problem);
    }
    let few = Limits { members: 2, ..Limits::default() };
    tree(&dir, "many", &[("a", b""), ("b", b""), ("c", b"")]);
    let archive = initramfs::read(&pack(&dir, "many", "newc", "cat")[..], &few, &|_| true);
    assert_eq!((archive.members.len(), archive.problem.contains("more than 2 files")), (2, true));
}

/// Generators that are told by their files.
#[test]
fn generators() {
    requires!(tools());
    for (files, generator, folder, suffix) in [
        (
            &[
                ("etc/initrd-release", &b"x"[..]),
                ("usr/lib/dracut/build", b""),
                ("usr/lib/modules/5.14/a.ko.xz", b""),
            ][..],
            "dracut",
            Some("usr/lib/modules/5.14"),
            ".ko.xz",
        ),
        (
            &[("init_functions", b""), ("usr/lib/modules/6.9/kernel/b.ko.zst", b"")],
            "mkinitcpio",
            Some("usr/lib/modules/6.9"),
            ".ko.zst",
        ),
        (
            &[("bin/nash", b""), ("lib/ext3.ko", b""), ("init", b"#!/bin/nash\nmkroot /dev/hda1\n")],
            "mkinitrd",
            None,
            ".ko",
        ),
        (&[("init", b"")], "", None, ""),
    ] {
        let dir = Dir::new();
        tree(&dir, "main", files);
        let archive = read(&pack(&dir, "main", "newc", "gzip -c"));
        let found = describe(&archive, "5.14", 1);
        assert_eq!((found.generator.as_str(), found.modules.as_deref()), (generator, folder));
        assert_eq!(found.module_suffix, suffix);
    }
    assert!(!Path::new("main").exists());
}
