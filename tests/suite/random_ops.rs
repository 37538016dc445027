//! Random operations, through the library, through qemu-io, and through both in turn on the same image,
//! against a `Vec<u8>`; at the end qemu-img has the last word.

use std::sync::Arc;

use image::{Layer, OpenOptions, Spec};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::ops::{Model, any_op};
use tests::shape::{SHAPES, Shape};
use tests::skip::qemu;
use tests::{Dir, Ops, open_here, requires};

/// How often each shape is tried; `PROPTEST_CASES` for more.
pub(crate) fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub(crate) fn open(dir: &Dir, name: &str) -> Arc<Layer> {
    let spec = Spec::from_filename(dir.file(name).to_str().unwrap()).unwrap();
    let options =
        OpenOptions { writable: true, format: Some(image::Format::Qcow2), ..OpenOptions::default() };
    image::open(&spec, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// Carries out `ops` through the library, closes, and compares with the model.
fn through_the_library(dir: &Dir, name: &str, ops: &Ops, model: &mut Model) -> Result<(), TestCaseError> {
    let _open = open_here();
    let layer = open(dir, name);
    let disk = layer.device();
    for op in &ops.0 {
        op.device(&*disk).map_err(|error| TestCaseError::fail(format!("{op:?}: {error}")))?;
        op.model(model);
    }
    let mut read = vec![0; model.bytes().len()];
    disk.read_at(&mut read, 0).map_err(|error| TestCaseError::fail(error.to_string()))?;
    disk.close().map_err(|error| TestCaseError::fail(error.to_string()))?;
    model.agree(&read).map_err(|text| TestCaseError::fail(format!("read back at once: {text}")))
}

fn through_qemu(dir: &Dir, name: &str, ops: &Ops, model: &mut Model) -> Result<(), TestCaseError> {
    let ops = ops.uncompressed();
    dir.qemu_io("qcow2", name, &ops);
    ops.model(model);
    model.agree(&dir.qemu_reads(name)).map_err(|text| TestCaseError::fail(format!("qemu's own: {text}")))
}

/// Both tools find the image clean and read the same disk from it.
fn judge(dir: &Dir, name: &str, model: &mut Model) -> Result<(), TestCaseError> {
    let verdict = dir.qemu(&format!("check -f qcow2 {name}"));
    prop_assert!(verdict.code == Some(0), "{}", verdict.story());
    let verdict = dir.vimg(&format!("check -f qcow2 {name}"));
    prop_assert!(verdict.code == Some(0), "{}", verdict.story());
    model.agree(&dir.qemu_reads(name)).map_err(|text| TestCaseError::fail(format!("qemu reads: {text}")))?;
    model.agree(&dir.vimg_reads(name)).map_err(|text| TestCaseError::fail(format!("vimg reads: {text}")))
}

/// Builds an image of this shape, carries out batches of operations in turn, and judges.
fn story(shape: &Shape, batches: &[Ops]) -> Result<(), TestCaseError> {
    let dir = Dir::new();
    let name = "a.qcow2";
    shape.build_with_qemu(&dir, name, false);
    let mut model = Model::from_bytes(dir.qemu_reads(name));
    for (turn, ops) in batches.iter().enumerate() {
        match turn % 2 {
            0 => through_the_library(&dir, name, ops, &mut model)?,
            _ => through_qemu(&dir, name, ops, &mut model)?,
        }
    }
    judge(&dir, name, &mut model)
}

/// The shapes of whose names `pick` approves, each tried some times.
fn try_shapes(pick: impl Fn(&Shape) -> bool) {
    for shape in SHAPES.iter().filter(|shape| pick(shape)) {
        let mut runner = TestRunner::new(Config {
            cases: cases(4),
            max_shrink_iters: 200,
            failure_persistence: None,
            ..Config::default()
        });
        let packed = shape.compressible();
        let ops = proptest::collection::vec(any_op(shape.size(), shape.cluster, packed), 1..25).prop_map(Ops);
        let batches = proptest::collection::vec(ops, 1..4);
        runner
            .run(&batches, |batches| story(shape, &batches))
            .unwrap_or_else(|error| panic!("{}: {error}", shape.name));
    }
}

/// The `part`-th of four parts of the shapes, so that they can run side by side.
fn part(part: usize) {
    try_shapes(|shape| SHAPES.iter().position(|other| other == shape).unwrap() % 4 == part);
}

#[test]
fn all_shapes_part_1() {
    requires!(qemu());
    part(0);
}

#[test]
fn all_shapes_part_2() {
    requires!(qemu());
    part(1);
}

#[test]
fn all_shapes_part_3() {
    requires!(qemu());
    part(2);
}

#[test]
fn all_shapes_part_4() {
    requires!(qemu());
    part(3);
}

/// Many threads write to their own stripes of one image at once: each stripe has to come out as its own
/// thread left it, although their clusters and tables are shared.
#[test]
fn many_threads_at_once() {
    requires!(qemu());
    for shape in SHAPES.iter().filter(|shape| {
        ["512", "default", "extended", "refcount-1", "backing-2", "lazy", "data-file"].contains(&shape.name)
    }) {
        let dir = Dir::new();
        shape.build_with_qemu(&dir, "a.qcow2", false);
        let before = dir.qemu_reads("a.qcow2");
        let opened = open_here();
        let layer = open(&dir, "a.qcow2");
        let disk = layer.device();
        let size = before.len() / 512 * 512;
        let writers: Vec<_> = (0..8usize)
            .map(|thread| {
                let disk = Arc::clone(&disk);
                std::thread::spawn(move || {
                    for sector in (thread..size / 512).step_by(8) {
                        let byte = u8::try_from(sector % 251).unwrap() | 1;
                        disk.write_at(&[byte; 512], sector as u64 * 512).unwrap();
                        if sector % 97 == 0 {
                            disk.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        disk.close().unwrap();
        drop((disk, layer, opened));
        dir.qemu_checks("a.qcow2");
        let mut model = before.clone();
        for (sector, bytes) in model[..size].chunks_exact_mut(512).enumerate() {
            bytes.fill(u8::try_from(sector % 251).unwrap() | 1);
        }
        assert!(dir.qemu_reads("a.qcow2") == model, "{}", shape.name);
    }
}

/// Readers while others write elsewhere never see anything but the old or the new bytes of a place.
#[test]
fn readers_among_writers() {
    let dir = Dir::new();
    dir.vimg_ok("create -f qcow2 -o cluster_size=4k a.qcow2 1M");
    let layer = open(&dir, "a.qcow2");
    let disk = layer.device();
    let size = 1usize << 20;
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (disk, done) = (Arc::clone(&disk), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut buf = vec![0; size];
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    disk.read_at(&mut buf, 0).unwrap();
                    for (page, bytes) in buf.chunks_exact(4096).enumerate() {
                        let wanted = u8::try_from(page % 255).unwrap() + 1;
                        assert!(
                            bytes.iter().all(|&b| b == 0 || b == wanted),
                            "page {page} holds foreign bytes"
                        );
                    }
                }
            })
        })
        .collect();
    for page in 0..size / 4096 {
        disk.write_at(&[u8::try_from(page % 255).unwrap() + 1; 4096], page as u64 * 4096).unwrap();
        if page % 3 == 0 {
            disk.write_zeroes_at(page as u64 * 4096, 4096, block::ZeroMode::UNMAP).unwrap();
        }
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}
