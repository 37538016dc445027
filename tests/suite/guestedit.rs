//! ext file systems changed by us, judged by e2fsck, debugfs, our own reader and Linux.

use std::path::Path;

use block::testing::Random;
use guestedit::Attributes;
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

/// Thousands of names: blocks are split, and nodes, and the tree grows.
#[test]
fn ext_large_directories() {
    requires!(tool("mke2fs"));
    let dir = Dir::new();
    for (options, count) in [
        ("-t ext4 -b 1024 -N 20000", 6000),
        ("-t ext4 -b 4096 -O ^metadata_csum -N 20000", 3000),
        ("-t ext3 -b 1024 -N 20000", 3000),
        ("-t ext4 -b 1024 -O ^dir_index -N 20000", 2000),
    ] {
        mke2fs(&dir, options, "64M");
        // A directory gets its hash tree from Linux or e2fsck, once it has several blocks.
        let mut fs = edit::open(&dir.file("disk"));
        fs.mkdir(Path::new("/many"), &Attributes::mode(0o755)).unwrap();
        let name = |index: usize| format!("/many/entry number {index} with a name of some length");
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
