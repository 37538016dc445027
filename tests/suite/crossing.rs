//! Every format to every other: what goes in comes out, whoever writes and whoever reads.

use std::sync::Arc;

use image::{OpenOptions, Spec};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::ops::{Model, any_op};
use tests::skip::qemu10;
use tests::{Dir, Ops, open_here, requires};

use crate::random_ops::cases;

/// Formats and options in which images can be made, by both programs.
const KINDS: &[&str] = &[
    "raw",
    "qcow2",
    "vmdk",
    "vmdk -o subformat=monolithicFlat",
    "vmdk -o subformat=twoGbMaxExtentSparse",
    "vmdk -o subformat=twoGbMaxExtentFlat",
    "vmdk -o subformat=streamOptimized",
    "vmdk -o compat6,zeroed_grain,adapter_type=lsilogic",
    "vdi",
    "vdi -o static=on",
    "vhdx",
    "vhdx -o subformat=fixed",
    "vpc -o force_size=on",
    "vpc -o subformat=fixed,force_size=on",
];

fn format_of(kind: &str) -> &str {
    kind.split(' ').next().unwrap()
}

/// A disk of `size` bytes: noise, zeros and text, at unaligned places, the last bytes included.
fn disk(dir: &Dir, name: &str, size: u64) {
    let mut random = block::testing::Random::new(size);
    dir.sparse(name, size);
    let mut noise = vec![0; 150_000];
    for _ in 0..12 {
        random.fill(&mut noise);
        let len = 1 + random.below(noise.len() as u64);
        let len = len.min(size);
        let offset = random.below(size - len + 1);
        dir.poke(name, offset, &noise[..usize::try_from(len).unwrap()]);
    }
    dir.poke(name, size - 1, b"!");
}

/// The file that `convert -O KIND` made, with its extents, gives way to the next.
fn clear(dir: &Dir) {
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("out") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

/// Ours are read by qemu-img and by us, qemu-img's by us, all with the same bytes. `-f` is always named: a fixed VHD is
/// raw for qemu-img otherwise.
fn crossing(size: u64) {
    let dir = Dir::new();
    disk(&dir, "in.raw", size);
    for kind in KINDS {
        let format = format_of(kind);
        dir.vimg_ok(&format!("convert -f raw -O {kind} in.raw out.img"));
        dir.qemu_ok(&format!("compare -f raw -F {format} in.raw out.img"));
        dir.vimg_ok(&format!("compare -f raw -F {format} in.raw out.img"));
        dir.qemu_ok(&format!("info -f {format} out.img"));
        let checked = dir.qemu(&format!("check -f {format} out.img"));
        assert!(matches!(checked.code, Some(0 | 63)), "{kind}: {}", checked.story());
        let checked = dir.vimg(&format!("check -f {format} out.img"));
        assert!(matches!(checked.code, Some(0 | 63)), "{kind}: {}", checked.story());
        clear(&dir);

        dir.qemu_ok(&format!("convert -f raw -O {kind} in.raw out.img"));
        dir.vimg_ok(&format!("compare -f raw -F {format} in.raw out.img"));
        dir.vimg_ok(&format!("convert -f {format} -O qcow2 out.img out.qcow2"));
        dir.qemu_ok("compare -f raw -F qcow2 in.raw out.qcow2");
        clear(&dir);
    }
}

#[test]
fn a_disk_goes_through_every_format() {
    requires!(qemu10());
    crossing(21 << 20);
}

#[test]
fn a_disk_of_odd_length_goes_through_every_format() {
    requires!(qemu10());
    crossing((3 << 20) + 512 * 3);
}

#[test]
fn a_disk_of_more_than_two_extents_goes_through_every_sparse_format() {
    requires!(qemu10());
    let dir = Dir::new();
    disk(&dir, "in.raw", (5 << 30) + 512);
    for kind in KINDS.iter().filter(|kind| !kind.contains("static") && !kind.contains("fixed")) {
        let format = format_of(kind);
        dir.vimg_ok(&format!("convert -f raw -O {kind} in.raw out.img"));
        dir.vimg_ok(&format!("compare -f raw -F {format} in.raw out.img"));
        dir.qemu_ok(&format!("compare -f raw -F {format} in.raw out.img"));
        clear(&dir);
    }
}

/// Formats that both programs write to, in steps of 512 bytes.
const WRITABLE: &[&str] = &[
    "vmdk",
    "vmdk -o subformat=monolithicFlat",
    "vmdk -o subformat=twoGbMaxExtentSparse",
    "vmdk -o compat6,zeroed_grain",
    "vdi",
    "vdi -o static=on",
    "vhdx -o block_size=1M",
    "vhdx -o subformat=fixed,block_size=1M",
    "vpc -o force_size=on",
    "vpc -o subformat=fixed,force_size=on",
];

/// Bytes of the disk that is written to: more than one block of every format, and not a whole number of them.
const SIZE: u64 = (5 << 20) + 1024;

fn open(dir: &Dir, format: &str) -> Arc<image::Layer> {
    let options =
        OpenOptions { writable: true, format: image::Format::from_name(format), ..OpenOptions::default() };
    let spec = Spec::from_filename(dir.file("out.img").to_str().unwrap()).unwrap();
    image::open(&spec, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// Random operations by both programs in turn on one image; after every turn both read what the model says.
fn story(kind: &str, batches: &[Ops]) -> Result<(), TestCaseError> {
    let (dir, format) = (Dir::new(), format_of(kind));
    match batches.len() % 2 {
        0 => dir.vimg_ok(&format!("create -f {kind} out.img {SIZE}")),
        _ => dir.qemu_ok(&format!("create -f {kind} out.img {SIZE}")),
    };
    let mut model = Model::new(SIZE);
    for (turn, ops) in batches.iter().enumerate() {
        if turn % 2 == 0 {
            let _open = open_here();
            let layer = open(&dir, format);
            for op in &ops.0 {
                op.device(&*layer.device())
                    .map_err(|error| TestCaseError::fail(format!("{op:?}: {error}")))?;
                op.model(&mut model);
            }
            layer.device().close().map_err(|error| TestCaseError::fail(error.to_string()))?;
        } else {
            dir.qemu_io(format, "out.img", ops);
            ops.model(&mut model);
        }
        for (who, convert) in [("vimg", Dir::vimg_ok as fn(&Dir, &str) -> _), ("qemu", Dir::qemu_ok)] {
            convert(&dir, &format!("convert -f {format} -O raw out.img back.raw"));
            model
                .agree(&dir.read("back.raw"))
                .map_err(|text| TestCaseError::fail(format!("{who} reads: {text}")))?;
        }
        for check in
            [dir.qemu(&format!("check -f {format} out.img")), dir.vimg(&format!("check -f {format} out.img"))]
        {
            prop_assert!(matches!(check.code, Some(0 | 63)), "{}", check.story());
        }
    }
    Ok(())
}

#[test]
fn both_write_to_one_image_in_turn() {
    requires!(qemu10());
    for kind in WRITABLE {
        let config =
            Config { cases: cases(2), max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
        let batch = proptest::collection::vec(any_op(SIZE, 64 << 10, false), 1..12).prop_map(Ops);
        let mut runner = TestRunner::new(config);
        runner
            .run(&proptest::collection::vec(batch, 2..5), |batches| story(kind, &batches))
            .unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
}
