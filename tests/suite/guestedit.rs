//! ext file systems changed by us, judged by e2fsck, debugfs, our own reader and Linux.

use std::path::Path;

use block::testing::Random;
use guestedit::Attributes;
use proptest::prelude::*;
use tests::command::Cmd;
use tests::edit::{self, Model, Op};
use tests::skip::tool;
use tests::{Dir, guest, requires};

/// File systems as they occur, and as they hardly do.
const SHAPES: [&str; 15] = [
    "-t ext4",
    "-t ext2",
    "-t ext3",
    "-t ext2 -b 1024 -r 0 -I 128 -O none",
    "-t ext4 -b 1024 -O 64bit",
    "-t ext4 -b 1024 -I 128 -O ^64bit,^extra_isize",
    "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg",
    "-t ext4 -O ^metadata_csum,^uninit_bg,^64bit",
    "-t ext4 -b 1024 -g 1024 -O ^flex_bg,^extents,^64bit",
    "-t ext4 -O ^dir_index,^filetype,^huge_file",
    "-t ext4 -b 1024 -g 256 -O meta_bg,^resize_inode",
    "-t ext4 -b 2048 -O sparse_super2,mmp,large_dir,inline_data",
    "-t ext4 -I 512 -O inline_data,metadata_csum_seed,orphan_file",
    "-t ext4 -O encrypt,casefold,ea_inode,project,verity",
    "-t ext4 -b 65536",
];

fn mke2fs(dir: &Dir, options: &str, size: &str) {
    let _ = std::fs::remove_file(dir.file("disk"));
    // Lazily, as on a large disk: bitmaps and tables that nobody has written.
    Cmd::new("mke2fs")
        .words("-q -F -E lazy_itable_init=1")
        .words(options)
        .arg("disk")
        .arg(size)
        .dir(dir.path())
        .ok();
}

/// Carries out a sequence of operations, with a check after every so many.
fn run(dir: &Dir, seed: u64, count: usize, check_every: usize, story: &str) {
    let (mut random, mut model) = (Random::new(seed), Model::default());
    model.plain = story.contains("-r 0");
    let mut fs = edit::open(&dir.file("disk"));
    let mut done = vec![];
    for index in 1..=count {
        let op = model.propose(&mut random, 300_000, true);
        done.push(op.clone());
        model.apply(&mut *fs, &op);
        if op == Op::Reopen {
            fs = edit::open(&dir.file("disk"));
        }
        if index % check_every == 0 {
            fs.sync().unwrap();
            edit::e2fsck(dir, "disk", &(story, seed, &done));
        }
    }
    fs.sync().unwrap();
    edit::e2fsck(dir, "disk", &(story, seed, &done));
    model.compare(&mut *fs, true);
    edit::debugfs(dir, "disk", &model);
    let reader = guestdisk::fs::FileSystem::open(guest::open(&dir.file("disk"))).unwrap();
    // (debugfs leaves links to whoever calls it.)
    guest::compare(&reader, &dir.file("dumped"), false, &["lost+found"]);
}

#[test]
fn ext_at_random_in_many_shapes() {
    requires!(tool("mke2fs"), tool("debugfs"), tests::skip::root());
    let dir = Dir::new();
    for (seed, options) in (1..).zip(SHAPES) {
        mke2fs(&dir, options, if options.contains("65536") { "256M" } else { "40M" });
        run(&dir, seed, 150, 10, options);
    }
}

/// Sequences that nobody has chosen. (What fails is made smaller by proptest: fewer operations.)
#[test]
fn ext_property() {
    requires!(tool("mke2fs"), tool("debugfs"), tests::skip::root());
    let dir = Dir::new();
    let config = ProptestConfig {
        cases: 8,
        max_shrink_iters: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(shape in 0..SHAPES.len() - 1, seed in 0..u64::MAX, count in 1..120_usize)| {
        mke2fs(&dir, SHAPES[shape], "24M");
        run(&dir, seed, count, count, SHAPES[shape]);
    });
}

/// Thousands of names: blocks are split, and nodes, and the tree grows.
#[test]
fn ext_large_directories() {
    requires!(tool("mke2fs"));
    let dir = Dir::new();
    for (options, count, tune) in [
        ("-t ext4 -b 1024 -N 20000", 6000, "debugfs -w -R \"ssv flags 1\""),
        ("-t ext4 -b 4096 -O ^metadata_csum -N 20000", 3000, "debugfs -w -R \"ssv flags 2\""),
        ("-t ext3 -b 1024 -N 20000", 3000, "tune2fs -E hash_alg=tea"),
        ("-t ext4 -b 1024 -N 20000", 2000, "tune2fs -E hash_alg=legacy"),
        ("-t ext4 -b 1024 -O ^dir_index -N 20000", 2000, "true"),
    ] {
        mke2fs(&dir, options, "64M");
        Cmd::new("sh").arg("-c").arg(format!("{tune} disk")).dir(dir.path()).ok();
        // A directory gets its hash tree from Linux or e2fsck, once it has several blocks.
        let mut fs = edit::open(&dir.file("disk"));
        fs.mkdir(Path::new("/many"), &Attributes::mode(0o755)).unwrap();
        let name = |index: usize| format!("/many/entrée {index} with a name of some length");
        let add = |fs: &mut dyn guestedit::GuestFs, range: std::ops::Range<usize>| {
            for index in range {
                fs.create(Path::new(&name(index)), b"", &Attributes::mode(0o644)).unwrap();
            }
            fs.sync().unwrap();
        };
        add(&mut *fs, 0..200);
        drop(fs);
        edit::e2fsck(&dir, "disk", &options);
        Cmd::new("e2fsck").words("-fyD disk").dir(dir.path()).run();
        let mut fs = edit::open(&dir.file("disk"));
        add(&mut *fs, 200..count);
        edit::e2fsck(&dir, "disk", &options);
        let tree = Cmd::new("debugfs").arg("-R").arg("htree /many").arg("disk").dir(dir.path()).ok();
        let shown = tree.story();
        assert_eq!(options.contains("^dir_index"), shown.contains("Not a hash-indexed"), "{shown}");
        for index in (0..count).step_by(3) {
            fs.remove(Path::new(&name(index))).unwrap();
        }
        fs.sync().unwrap();
        assert_eq!(fs.list(Path::new("/many")).unwrap().len(), count - count.div_ceil(3));
        edit::e2fsck(&dir, "disk", &options);
    }
}

/// A file system that was copied while it was mounted: we bring the journal to its end as e2fsck does.
#[test]
fn ext_journal_is_replayed_as_by_e2fsck() {
    requires!(tool("mke2fs"), guest::mounts("ext4"));
    let dir = Dir::new();
    for (options, mount) in [
        ("-t ext4", ""),
        ("-t ext4 -O ^64bit,^metadata_csum", ""),
        ("-t ext3 -b 1024", ""),
        ("-t ext4 -b 1024 -O 64bit,metadata_csum -J size=1", ""),
        ("-t ext4 -O metadata_csum", ",data=journal"),
        ("-t ext3 -b 1024", ",data=journal"),
        ("-t ext4 -O ^64bit,^metadata_csum", ",journal_checksum"),
        ("-t ext4 -O ^64bit,^metadata_csum", ",journal_checksum,journal_async_commit,data=writeback"),
    ] {
        mke2fs(&dir, options, "64M");
        let mounted = guest::Mounted::new(&dir, &format!(",commit=1{mount}"));
        std::fs::create_dir(dir.file("mnt/new")).unwrap();
        for index in 0..300 {
            std::fs::write(dir.file(&format!("mnt/new/{index}")), format!("contents {index}")).unwrap();
        }
        // What begins like a block of the journal is escaped if it goes there.
        let magic = [&[0xc0, 0x3b, 0x39, 0x98][..], &[7; 9000]].concat();
        std::fs::write(dir.file("mnt/magic"), &magic).unwrap();
        Cmd::new("sync").arg("-f").arg("mnt").dir(dir.path()).ok();
        for index in 0..100 {
            std::fs::remove_file(dir.file(&format!("mnt/new/{index}"))).unwrap();
        }
        std::fs::remove_file(dir.file("mnt/new/200")).unwrap();
        let held = std::fs::File::open(dir.file("mnt/new/201")).unwrap();
        std::fs::remove_file(dir.file("mnt/new/201")).unwrap();
        Cmd::new("sync").arg("-f").arg("mnt").dir(dir.path()).ok();
        dir.copy("disk", "copy");
        dir.copy("disk", "theirs");
        drop(held);
        drop(mounted);
        let mut fs = edit::open(&dir.file("copy"));
        assert!(
            fs.notes().iter().any(|note| note.contains("written from it")),
            "{options}: {:?}",
            fs.notes()
        );
        assert!(fs.notes().iter().any(|note| note.contains("removed while")), "{options}: {:?}", fs.notes());
        fs.sync().unwrap();
        edit::e2fsck(&dir, "copy", &options);
        Cmd::new("e2fsck").words("-fy theirs").dir(dir.path()).run();
        let dump = |disk: &str| {
            std::fs::create_dir(dir.file(&format!("{disk}.d"))).unwrap();
            let rdump = format!("rdump / {disk}.d");
            Cmd::new("debugfs").arg("-R").arg(rdump).arg(disk).dir(dir.path()).ok();
        };
        dump("copy");
        dump("theirs");
        Cmd::new("diff").words("-r copy.d theirs.d").dir(dir.path()).ok();
        assert_eq!(fs.list(Path::new("/new")).unwrap().len(), 198);
        assert!(fs.read(Path::new("/magic"), 1 << 20).unwrap() == magic, "{options}{mount}");
        let _ = std::fs::remove_dir_all(dir.file("copy.d"));
        let _ = std::fs::remove_dir_all(dir.file("theirs.d"));
    }
}

/// Linux goes on where we have ended, and the other way round, several times.
#[test]
fn ext_in_turn_with_linux() {
    requires!(tool("mke2fs"), guest::mounts("ext4"));
    let dir = Dir::new();
    for options in ["-t ext4", "-t ext4 -b 1024 -O inline_data -I 256", "-t ext3", "-t ext2 -b 1024"] {
        mke2fs(&dir, options, "64M");
        for round in 0..4 {
            let mounted = guest::Mounted::new(&dir, "");
            let on = |name: &str| mounted.path.join(name);
            std::fs::create_dir(on(&format!("by linux {round}"))).unwrap();
            for index in 0..200 {
                let name = format!("by linux {round}/{index} with a long name for many blocks");
                std::fs::write(on(&name), format!("{index}").repeat(index)).unwrap();
            }
            std::os::unix::fs::symlink("x".repeat(70 + 30 * round), on(&format!("link {round}"))).unwrap();
            std::fs::hard_link(
                on(&format!("by linux {round}/7 with a long name for many blocks")),
                on(&format!("hard {round}")),
            )
            .unwrap();
            if round > 0 {
                for index in (0..400).step_by(3) {
                    let name = format!("by us {}/{index} with a long name for many blocks", round - 1);
                    assert_eq!(std::fs::read(on(&name)).unwrap(), index.to_string().repeat(index).as_bytes());
                    std::fs::remove_file(on(&name)).unwrap();
                }
                let target = std::fs::read_link(on(&format!("our link {}", round - 1))).unwrap();
                assert_eq!(target.as_os_str().len(), 40 + 30 * (round - 1));
            }
            drop(mounted);
            edit::e2fsck(&dir, "disk", &(options, round, "linux"));
            let mut fs = edit::open(&dir.file("disk"));
            let link = fs.read_link(Path::new(&format!("/link {round}"))).unwrap();
            assert_eq!(link.as_os_str().len(), 70 + 30 * round);
            let ours = format!("/by us {round}");
            fs.mkdir(Path::new(&ours), &Attributes::mode(0o755)).unwrap();
            for index in 0..400 {
                let name = format!("{ours}/{index} with a long name for many blocks");
                fs.create(
                    Path::new(&name),
                    index.to_string().repeat(index).as_bytes(),
                    &Attributes::mode(0o644),
                )
                .unwrap();
            }
            for index in 0..200 {
                let name = format!("/by linux {round}/{index} with a long name for many blocks");
                assert_eq!(
                    fs.read(Path::new(&name), 1 << 20).unwrap(),
                    index.to_string().repeat(index).as_bytes()
                );
                match index % 3 {
                    0 => fs.replace(Path::new(&name), &vec![7; index * 40]).unwrap(),
                    1 => fs.remove(Path::new(&name)).unwrap(),
                    _ => fs
                        .create(Path::new(&format!("{name} more")), b"more", &Attributes::mode(0o644))
                        .unwrap(),
                }
            }
            let target = "y".repeat(40 + 30 * round);
            fs.symlink(Path::new(&format!("/our link {round}")), Path::new(&target), &Attributes::default())
                .unwrap();
            assert_eq!(fs.stat(Path::new(&format!("/hard {round}"))).unwrap().unwrap().links, 1);
            fs.sync().unwrap();
            drop(fs);
            edit::e2fsck(&dir, "disk", &(options, round, "us"));
        }
    }
}

/// A disk that is nearly full: the blocks of a file are used again, and what cannot be done leaves no trace.
#[test]
fn ext_without_room() {
    requires!(tool("mke2fs"));
    let dir = Dir::new();
    for options in ["-t ext4 -b 1024", "-t ext4 -b 1024 -O ^has_journal,^extents,^64bit", "-t ext2 -b 4096"] {
        mke2fs(&dir, options, "16M");
        let mut fs = edit::open(&dir.file("disk"));
        let (large, small) = (Path::new("/large"), Path::new("/small"));
        let free = fs.free().unwrap().bytes;
        let len = usize::try_from(free / 3 * 2).unwrap();
        fs.create(large, &vec![1; len], &Attributes::mode(0o600)).unwrap();
        fs.replace(large, &vec![2; len + 100_000]).unwrap();
        assert_eq!(
            fs.create(small, &vec![3; len], &Attributes::default()).unwrap_err().kind(),
            block::ErrorKind::NoSpace
        );
        assert_eq!(fs.replace(large, &vec![3; 2 * len]).unwrap_err().kind(), block::ErrorKind::NoSpace);
        assert_eq!(fs.stat(small).unwrap(), None);
        assert!(fs.read(large, 1 << 30).unwrap() == vec![2; len + 100_000]);
        fs.sync().unwrap();
        edit::e2fsck(&dir, "disk", &options);
        fs.remove(large).unwrap();
        // What has been given back is found again.
        fs.create(small, &vec![4; len], &Attributes::default()).unwrap();
        fs.remove(small).unwrap();
        fs.sync().unwrap();
        let (before, after) = (free, fs.free().unwrap().bytes);
        assert!(before.abs_diff(after) <= 8192, "{before} {after}");
        edit::e2fsck(&dir, "disk", &options);
        let mut made = 0;
        while fs.create(Path::new(&format!("/file {made}")), b"x", &Attributes::default()).is_ok() {
            made += 1;
        }
        fs.sync().unwrap();
        assert!(made > 1000, "{made}");
        edit::e2fsck(&dir, "disk", &options);
    }
}

/// Attributes in the inode, in a block, and in one that is shared.
#[test]
fn ext_attributes() {
    requires!(tool("mke2fs"), guest::mounts("ext4"), tool("getfattr"));
    let dir = Dir::new();
    for options in ["-t ext4", "-t ext4 -I 128", "-t ext4 -b 1024 -O ^metadata_csum -I 512"] {
        mke2fs(&dir, options, "32M");
        let mounted = guest::Mounted::new(&dir, "");
        for name in ["one", "two"] {
            std::fs::write(mounted.path.join(name), b"x").unwrap();
            for (attribute, len) in [("user.small", 20), ("user.large", 400)] {
                let value = "v".repeat(len);
                Cmd::new("setfattr")
                    .arg("-n")
                    .arg(attribute)
                    .arg("-v")
                    .arg(value)
                    .arg(mounted.path.join(name))
                    .ok();
            }
        }
        drop(mounted);
        let mut fs = edit::open(&dir.file("disk"));
        let one = Path::new("/one");
        assert_eq!(fs.xattr(one, "user.large").unwrap().unwrap(), "v".repeat(400).as_bytes());
        assert_eq!(fs.xattr(one, "user.none").unwrap(), None);
        fs.replace(one, &vec![1; 10_000]).unwrap();
        let xattrs = vec![
            (b"security.selinux".to_vec(), b"label".to_vec()),
            (b"user.zeros".to_vec(), vec![0; 300]),
            (b"user.empty".to_vec(), vec![]),
            (b"trusted.a".to_vec(), b"abc".repeat(30)),
        ];
        let like = Attributes { xattrs: xattrs.clone(), ..Attributes::mode(0o644) };
        fs.create(Path::new("/three"), b"three", &like).unwrap();
        fs.remove(Path::new("/two")).unwrap();
        fs.sync().unwrap();
        edit::e2fsck(&dir, "disk", &options);
        for (name, value) in &xattrs {
            let name = std::str::from_utf8(name).unwrap();
            assert_eq!(fs.xattr(Path::new("/three"), name).unwrap().as_ref(), Some(value));
        }
        let mounted = guest::Mounted::new(&dir, "");
        let shown =
            Cmd::new("getfattr").words("-d -m - -e hex mnt/one mnt/three").dir(dir.path()).ok().story();
        for part in ["user.zeros=0x0000", "user.empty", "security.selinux=0x6c6162656c", "trusted.a=0x616263"]
        {
            assert!(shown.contains(part), "{shown}");
        }
        assert!(shown.matches("user.large=0x7676").count() == 1, "{shown}");
        drop(mounted);
    }
}

/// FAT of all three widths, judged by fsck.vfat, mtools and our own reader.
#[test]
fn fat_at_random() {
    requires!(tool("mkfs.vfat"), tool("mcopy"));
    let dir = Dir::new();
    for (seed, (size, options)) in (1..).zip([
        (4 << 20, "-F 12"),
        (20 << 20, "-F 16"),
        (48 << 20, "-F 32 -s 1"),
        (300 << 20, "-F 32"),
        (64 << 20, "-F 16 -S 4096 -r 64"),
        (8 << 20, "-F 12 -s 8 -f 1"),
    ]) {
        let _ = std::fs::remove_file(dir.file("disk"));
        dir.sparse("disk", size);
        Cmd::new("mkfs.vfat").words(options).arg("disk").dir(dir.path()).ok();
        let fsck = |story: &dyn std::fmt::Debug| {
            let ran = Cmd::new("fsck.vfat").words("-n disk").dir(dir.path()).run();
            assert!(ran.code == Some(0), "{options} {story:?}\n{}", ran.story());
        };
        let (mut random, mut model) = (Random::new(seed), Model::default());
        model.plain = true;
        let mut fs = edit::open(&dir.file("disk"));
        let (free, mut done) = (fs.free().unwrap(), vec![]);
        for index in 1..=200 {
            let op = model.propose(&mut random, 100_000, false);
            done.push(op.clone());
            model.apply(&mut *fs, &op);
            if op == Op::Reopen {
                fs = edit::open(&dir.file("disk"));
            }
            if index % 10 == 0 {
                fs.sync().unwrap();
                fsck(&done);
            }
        }
        model.compare(&mut *fs, false);
        fs.sync().unwrap();
        let reader = guestdisk::fs::FileSystem::open(guest::open(&dir.file("disk"))).unwrap();
        let _ = std::fs::remove_dir_all(dir.file("out"));
        std::fs::create_dir(dir.file("out")).unwrap();
        Cmd::new("mcopy").env("LC_ALL", "C.UTF-8").words("-s -n -m -i disk ::* out").dir(dir.path()).ok();
        model.compare_folder(&dir.file("out"), false);
        guest::compare(&reader, &dir.file("out"), false, &[]);
        // Everything goes, and all of the room comes back.
        while let Some(path) = model.nodes.keys().next_back().cloned() {
            assert!(model.apply(&mut *fs, &Op::Remove(path)));
        }
        fs.sync().unwrap();
        fsck(&"emptied");
        // (On FAT32 the root directory keeps the clusters that it has got.)
        let left = fs.free().unwrap().bytes;
        assert!(
            left == free.bytes || options.contains("32") && left + 65_536 > free.bytes,
            "{left} {free:?}"
        );
    }
}

/// An initramfs of 60 MB: it is written in one piece.
#[test]
fn ext_large_file() {
    requires!(tool("mke2fs"), tool("debugfs"));
    let dir = Dir::new();
    for (options, most) in [("-t ext4", 4), ("-t ext4 -b 1024", 12), ("-t ext3", 40)] {
        // (With ext3 there are blocks of pointers between the others.)
        mke2fs(&dir, options, "1G");
        let mut bytes = vec![0; 60_000_000];
        Random::new(1).fill(&mut bytes);
        let mut fs = edit::open(&dir.file("disk"));
        let path = Path::new("/initrd.img");
        fs.create(path, &bytes[..50_000_000], &Attributes::mode(0o644)).unwrap();
        fs.replace(path, &bytes).unwrap();
        fs.sync().unwrap();
        edit::e2fsck(&dir, "disk", &options);
        let shown =
            Cmd::new("debugfs").arg("-R").arg("dump /initrd.img out").arg("disk").dir(dir.path()).ok();
        assert!(dir.read("out") == bytes, "{}", shown.story());
        let blocks = Cmd::new("debugfs").arg("-R").arg("blocks /initrd.img").arg("disk").dir(dir.path()).ok();
        let blocks: Vec<u64> = blocks.stdout.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let jumps = blocks.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) > 20).count();
        assert!(jumps <= most, "{options}: {jumps} jumps");
    }
}

/// What is not understood is refused before anything is changed.
#[test]
fn ext_that_is_refused() {
    requires!(tool("mke2fs"), tool("debugfs"));
    let dir = Dir::new();
    let refused = |reason: &str| {
        let before = dir.read("disk");
        let error = edit::try_open(&dir.file("disk")).unwrap_err();
        assert!(
            error.kind() == block::ErrorKind::Unsupported && error.to_string().contains(reason),
            "{error:?}"
        );
        assert!(!error.hints().is_empty() && dir.read("disk") == before, "{error:?}");
    };
    for (options, reason) in [("-t ext4 -O bigalloc -C 16384", "bigalloc"), ("-t ext4 -O quota", "quotas")] {
        mke2fs(&dir, options, "32M");
        refused(reason);
    }
    for (state, reason) in [("0", "not unmounted"), ("3", "damaged")] {
        mke2fs(&dir, "-t ext2", "32M");
        Cmd::new("debugfs")
            .arg("-w")
            .arg("-R")
            .arg(format!("ssv state {state}"))
            .arg("disk")
            .dir(dir.path())
            .ok();
        refused(reason);
    }
    // One file that cannot be changed is no reason to refuse the others.
    mke2fs(&dir, "-t ext4 -O encrypt,verity,casefold", "32M");
    let mut fs = edit::open(&dir.file("disk"));
    for name in ["/encrypted", "/sealed"] {
        fs.create(Path::new(name), b"x", &Attributes::mode(0o644)).unwrap();
    }
    fs.mkdir(Path::new("/folded"), &Attributes::mode(0o755)).unwrap();
    fs.sync().unwrap();
    drop(fs);
    for (name, flags) in [("encrypted", "0x80800"), ("sealed", "0x180000"), ("folded", "0x40080000")] {
        let words = format!("sif /{name} flags {flags}");
        Cmd::new("debugfs").arg("-w").arg("-R").arg(words).arg("disk").dir(dir.path()).ok();
    }
    let mut fs = edit::open(&dir.file("disk"));
    for (name, reason) in [("/encrypted", "encrypted"), ("/sealed", "fs-verity")] {
        let error = fs.replace(Path::new(name), b"y").unwrap_err();
        assert!(error.to_string().contains(reason), "{error:?}");
    }
    let error = fs.create(Path::new("/folded/x"), b"", &Attributes::default()).unwrap_err();
    assert!(error.to_string().contains("upper and lower case"), "{error:?}");
    fs.create(Path::new("/x"), b"", &Attributes::default()).unwrap();
}

/// Links in parents are followed within the file system, a link at the end is not; what makes no sense is `Usage`.
#[test]
fn paths_and_refusals_of_operations() {
    use block::ErrorKind::{NotFound, Usage};
    requires!(tool("mke2fs"));
    let dir = Dir::new();
    mke2fs(&dir, "-t ext4", "16M");
    let mut fs = edit::open(&dir.file("disk"));
    let like = Attributes::mode(0o644);
    let path = |text: &'static str| Path::new(text);
    fs.mkdir(path("/usr"), &Attributes::mode(0o755)).unwrap();
    fs.mkdir(path("/usr/lib"), &Attributes::mode(0o755)).unwrap();
    for (name, target) in
        [("/lib", "usr/lib"), ("/abs", "/usr/lib"), ("/out", "../../../usr"), ("/loop", "loop")]
    {
        fs.symlink(path(name), path(target), &like).unwrap();
    }
    fs.create(path("/lib/one"), b"1", &like).unwrap();
    fs.create(path("/abs/two"), b"2", &like).unwrap();
    fs.create(path("/out/lib/../lib/three"), b"3", &like).unwrap();
    let mut names: Vec<_> = fs.list(path("/usr/lib")).unwrap().into_iter().map(|entry| entry.name).collect();
    names.sort();
    assert_eq!(names, ["one", "three", "two"]);
    assert_eq!(fs.stat(path("/lib")).unwrap().unwrap().kind, guestedit::FileKind::Symlink);
    assert_eq!(fs.stat(path("/lib/one/x")).unwrap(), None);
    assert_eq!(fs.stat(path("/")).unwrap().unwrap().kind, guestedit::FileKind::Directory);
    let long = format!("/{}", "x".repeat(256));
    for (result, kind) in [
        (fs.replace(path("/lib"), b""), Usage),
        (fs.replace(path("/usr"), b""), Usage),
        (fs.replace(path("/none"), b""), NotFound),
        (fs.create(path("/none/x"), b"", &like), NotFound),
        (fs.create(path("/lib/one/x"), b"", &like), NotFound),
        (fs.create(path("/lib/one"), b"", &like), Usage),
        (fs.create(path("/lib"), b"", &like), Usage),
        (fs.create(Path::new(&long), b"", &like), Usage),
        (fs.mkdir(path("/usr"), &like), Usage),
        (fs.mkdir(path("/"), &like), Usage),
        (fs.symlink(path("/empty"), path(""), &like), Usage),
        (fs.remove(path("/usr")), Usage),
        (fs.remove(path("/")), Usage),
        (fs.remove(path("/none")), NotFound),
        (fs.list(path("/lib")).map(drop), Usage),
        (fs.read(path("/lib"), 10).map(drop), Usage),
        (fs.read_link(path("/usr")).map(drop), Usage),
        (fs.xattr(path("/usr"), "nonsense").map(drop), Usage),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    fs.create(path("/loop/x"), b"", &like).unwrap_err();
    fs.remove(path("/lib")).unwrap();
    assert_eq!(fs.read(path("/usr/lib/one"), 10).unwrap(), b"1");
    fs.remove(path("/usr/lib/one")).unwrap();
    fs.sync().unwrap();
    edit::e2fsck(&dir, "disk", &"paths");
    // What is not synced has not happened.
    fs.remove(path("/usr/lib/two")).unwrap();
    drop(fs);
    assert!(edit::open(&dir.file("disk")).stat(path("/usr/lib/two")).unwrap().is_some());
}
