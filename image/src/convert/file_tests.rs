//! Converts between real files: names, places, chains, and what is left behind when something goes wrong.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::testing::{Fault, FaultStorage, Random};
use block::{BlockDevice, ErrorKind, Storage};
use nix::errno::Errno;
use qcow2::create::CreateOptions;
use qcow2::{Header, Qcow2};
use tempfile::TempDir;

use super::*;
use crate::create::create;
use crate::progress::Quiet;

/// A directory of images.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn raw(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// An empty overlay, or (without a backing file) an image of 1 MiB.
    fn qcow2(&self, name: &str, backing: Option<(&str, &str)>) -> String {
        let request = CreateRequest {
            size: backing.is_none().then_some(1 << 20),
            backing_file: backing.map(|(name, _)| name.to_owned()),
            backing_format: backing.map(|(_, format)| format.to_owned()),
            ..CreateRequest::new(self.path(name), Format::Qcow2)
        };
        create(&request).unwrap();
        self.path(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn opened(name: &str) -> Arc<Layer> {
    open(&Spec::from_filename(name).unwrap(), &OpenOptions::default()).unwrap()
}

fn write(name: &str, writes: &[(u64, u8)]) {
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let layer = open(&Spec::from_filename(name).unwrap(), &options).unwrap();
    for (offset, byte) in writes {
        layer.image.write_at(&[*byte; 65536], *offset).unwrap();
    }
    layer.image.close().unwrap();
}

fn bytes(name: &str) -> Vec<u8> {
    let layer = opened(name);
    let mut bytes = vec![0; usize::try_from(layer.image.size()).unwrap()];
    layer.image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes that do not compress, with a hole's worth of zeros in the middle.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random::new(7).fill(&mut bytes);
    bytes[len / 3..len / 2].fill(0);
    bytes
}

fn request(source: &str, target: CreateRequest) -> ConvertRequest {
    ConvertRequest { threads: Some(3), ..ConvertRequest::new(vec![opened(source)], Target::Create(target)) }
}

fn to_qcow2(source: &str, target: &str) -> ConvertRequest {
    request(source, CreateRequest::new(target, Format::Qcow2))
}

#[test]
fn a_disk_goes_round_through_every_form() {
    let images = Images::new();
    let data = noise(3 << 20);
    let raw = images.raw("a.raw", &data);
    let (plain, packed, back) = (images.path("b.qcow2"), images.path("c.qcow2"), images.path("d.raw"));
    convert(&to_qcow2(&raw, &plain), &Quiet).unwrap();
    convert(&ConvertRequest { compress: true, ..to_qcow2(&plain, &packed) }, &Quiet).unwrap();
    let report = convert(&request(&packed, CreateRequest::new(&back, Format::Raw)), &Quiet).unwrap();
    assert_eq!(report.size, 3 << 20);
    assert!(bytes(&packed) == data && std::fs::read(&back).unwrap() == data);
    assert_eq!(images.names(), ["a.raw", "b.qcow2", "c.qcow2", "d.raw"]);
}

#[test]
fn sizes_become_whole_sectors_as_with_qemu() {
    let images = Images::new();
    let raw = images.raw("a", &[1; 1000]);
    let out = images.path("b");
    convert(&request(&raw, CreateRequest::new(&out, Format::Raw)), &Quiet).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), [&[1; 1000][..], &[0; 24]].concat());
    let twice = ConvertRequest::new(
        vec![opened(&raw), opened(&raw)],
        Target::Create(CreateRequest::new(images.path("c"), Format::Qcow2)),
    );
    convert(&twice, &Quiet).unwrap();
    assert_eq!(bytes(&images.path("c")), [&[1; 1000][..], &[0; 24], &[1; 1000], &[0; 24]].concat());
}

#[test]
fn a_backing_file_anywhere_in_the_chain_is_kept_and_nothing_lost() {
    let images = Images::new();
    images.raw("base", &noise(1 << 20));
    let middle = images.qcow2("middle", Some((&images.path("base"), "raw")));
    write(&middle, &[(65536, 1), (131_072, 2)]);
    let top = images.qcow2("top", Some((&middle, "qcow2")));
    write(&top, &[(131_072, 3)]);
    // A relative name counts from the target's directory, and one with another file behind it is compared.
    for (index, backing) in ["base", "middle", "copy"].iter().enumerate() {
        std::fs::copy(images.path("base"), images.path("copy")).unwrap();
        let target = images.path(&format!("out{index}"));
        let create = CreateRequest {
            backing_file: Some((*backing).to_owned()),
            backing_format: Some(if *backing == "middle" { "qcow2" } else { "raw" }.to_owned()),
            ..CreateRequest::new(&target, Format::Qcow2)
        };
        convert(&request(&top, create), &Quiet).unwrap();
        assert!(bytes(&target) == bytes(&top), "{backing}");
        let stored = opened(&target);
        let own = (0..16)
            .filter(|cluster| stored.image.layer_extent(cluster << 16, 1).unwrap().stored == Stored::Data);
        assert_eq!(own.count(), if *backing == "middle" { 1 } else { 2 }, "{backing}");
    }
}

#[test]
fn an_existing_target_is_overwritten_with_what_is_not_there_too() {
    let images = Images::new();
    let data = noise(1 << 20);
    let raw = images.raw("a", &data);
    let target = images.raw("old", &[0xee; 2 << 20]);
    let existing = |is_zero| {
        Target::Existing(Box::new(ExistingTarget {
            spec: Spec::from_filename(&target).unwrap(),
            format: Some(Format::Raw),
            is_zero,
            keep_backing: false,
            policy: crate::policy::Policy::default(),
            secrets: Secrets::default(),
        }))
    };
    convert(&ConvertRequest::new(vec![opened(&raw)], existing(false)), &Quiet).unwrap();
    let found = std::fs::read(&target).unwrap();
    assert!(found[..1 << 20] == data && found[1 << 20..].iter().all(|byte| *byte == 0xee));
    std::fs::write(&target, [0xee; 4096]).unwrap();
    let error = convert(&ConvertRequest::new(vec![opened(&raw)], existing(true)), &Quiet).unwrap_err();
    assert_eq!(error.to_string(), "output file is smaller than input file");
}

#[test]
fn a_target_that_is_read_from_is_refused_and_untouched() {
    let images = Images::new();
    let data = noise(1 << 20);
    images.raw("base", &data);
    let top = images.qcow2("top", Some((&images.path("base"), "raw")));
    std::os::unix::fs::symlink("base", images.path("link")).unwrap();
    for target in ["top", "base", "link"] {
        let error = convert(&request(&top, CreateRequest::new(images.path(target), Format::Raw)), &Quiet)
            .unwrap_err();
        assert!(error.to_string().contains("is the same file as the source"), "{error}");
    }
    assert!(std::fs::read(images.path("base")).unwrap() == data);
    assert_eq!(images.names(), ["base", "link", "top"]);
}

/// Cuts a file off after some bytes.
struct Cutter(String);

impl Progress for Cutter {
    fn update(&self, done: u64, _total: u64) {
        if done > 1 << 20 {
            std::fs::OpenOptions::new().write(true).open(&self.0).unwrap().set_len(4096).unwrap();
        }
    }
}

/// What is past the end of a file reads as zeros: without a look at the length this would pass for a copy.
#[test]
fn a_source_that_is_cut_off_meanwhile_is_not_called_converted() {
    let images = Images::new();
    let raw = images.raw("a", &noise(16 << 20));
    let error = convert(&to_qcow2(&raw, &images.path("b")), &Cutter(raw.clone())).unwrap_err();
    assert_eq!(error.to_string(), format!("'{raw}' became shorter while it was read"));
    assert_eq!(images.names(), ["a"]);
}

/// Stops after some bytes.
struct Impatient(AtomicBool);

impl Progress for Impatient {
    fn update(&self, done: u64, _total: u64) {
        self.0.fetch_or(done > 1 << 20, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[test]
fn an_interrupted_convert_leaves_nothing_new_behind() {
    let images = Images::new();
    let raw = images.raw("a", &noise(16 << 20));
    for (name, left) in [("new", false), ("old", true)] {
        if left {
            images.raw(name, b"before");
        }
        let error =
            convert(&to_qcow2(&raw, &images.path(name)), &Impatient(AtomicBool::new(false))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(error.hints().len(), usize::from(left), "what was overwritten is said to be incomplete");
    }
    assert_eq!(images.names(), ["a", "old"]);
}

#[test]
fn wrong_options_leave_no_trace_and_read_as_in_qemu() {
    let images = Images::new();
    let raw = images.raw("a", &[1; 4096]);
    let target = images.path("b");
    let with = |format, options: &[(&str, &str)], compress| {
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let create = CreateRequest { options, ..CreateRequest::new(&target, format) };
        convert(&ConvertRequest { compress, ..request(&raw, create) }, &Quiet).unwrap_err().to_string()
    };
    assert_eq!(with(Format::Raw, &[], true), "Compression not supported for this file format");
    assert_eq!(
        with(Format::Qcow2, &[("preallocation", "full")], true),
        "Compression and preallocation not supported at the same time"
    );
    assert_eq!(
        with(Format::Qcow2, &[("backing_file", "a")], false),
        "Use of backing file requires explicit backing format"
    );
    assert_eq!(
        with(Format::Qcow2, &[("cluster_size", "3")], false),
        format!(
            "{target}: error while converting qcow2: Cluster size must be a power of two between 512 and 2048k"
        )
    );
    assert_eq!(with(Format::Qcow2, &[("foo", "3")], false), "Invalid parameter 'foo'");
    let backing = with(Format::Qcow2, &[("backing_file", "none"), ("backing_fmt", "raw")], false);
    assert!(
        backing.starts_with(&format!("Could not open '{target}': Could not open backing file: ")),
        "{backing}"
    );
    assert_eq!(images.names(), ["a"]);
}

/// The command line has named the backing file: an untrusted source must not keep the target from having it.
#[test]
fn what_the_command_line_names_for_the_target_is_followed_although_untrusted() {
    let images = Images::new();
    let base = images.raw("base", &[1; 65536]);
    let raw = images.raw("a", &noise(65536));
    let create = CreateRequest {
        backing_file: Some(base),
        backing_format: Some("raw".to_owned()),
        policy: crate::policy::Policy { untrusted: true, allow: vec![], ..crate::policy::Policy::default() },
        ..CreateRequest::new(images.path("b"), Format::Qcow2)
    };
    convert(&request(&raw, create), &Quiet).unwrap();
    assert!(bytes(&images.path("b")) == bytes(&raw));
}

#[test]
fn a_full_disk_is_reported_and_leaves_nothing_behind() {
    let images = Images::new();
    let mounted = Path::new("/proc/self/mounts").exists()
        && std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "none"])
            .arg(images.0.path())
            .status()
            .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let elsewhere = Images::new();
    let raw = elsewhere.raw("a", &noise(16 << 20));
    let results = [
        convert(&to_qcow2(&raw, &images.path("b")), &Quiet),
        convert(&request(&raw, CreateRequest::new(images.path("c"), Format::Raw)), &Quiet),
        convert(
            &ConvertRequest {
                sparse: Some(0),
                ..request(&raw, CreateRequest::new(images.path("d"), Format::Raw))
            },
            &Quiet,
        ),
    ];
    let names = images.names();
    let unmounted = std::process::Command::new("umount").arg(images.0.path()).status().unwrap();
    assert!(unmounted.success());
    let errors: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::NoSpace));
    assert!(errors[0].to_string().starts_with("error while writing at byte "), "{}", errors[0]);
    assert!(errors[2].to_string().contains("not enough space: the image needs 16 MiB"), "{}", errors[2]);
    assert!(names.is_empty(), "{names:?}");
}

/// A qcow2 image in memory, under which things can fail.
fn qcow2_on(storage: &Arc<FaultStorage>, size: u64) -> Arc<Qcow2> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    qcow2::create::create(&*storage, &CreateOptions { cluster_bits: 12, ..CreateOptions::new(size) })
        .unwrap();
    let header = Header::read(&*storage).unwrap();
    Qcow2::open(storage, header, qcow2::OpenOptions { writable: true, ..qcow2::OpenOptions::default() })
        .unwrap()
}

/// Whatever fails under the target, and whenever: the convert ends with that error, or the target is right.
#[test]
fn every_single_fault_under_a_qcow2_target_surfaces() {
    let data = noise(256 << 10);
    let source = || {
        let storage = Arc::new(MemStorage::from_bytes(data.clone()));
        Source::new([Arc::new(Raw::open(storage, RawOptions::default()).unwrap()) as Arc<dyn BlockDevice>])
            .unwrap()
    };
    for compress in [false, true] {
        for n in 0.. {
            let storage = Arc::new(FaultStorage::new(Arc::new(MemStorage::new())));
            let target = qcow2_on(&storage, data.len() as u64);
            storage.heal();
            storage.fail(Fault::nth(n, Errno::EIO));
            let options =
                EngineOptions { threads: 2, chunk: Some(16384), compress, ..EngineOptions::default() };
            let result = convert_devices(&source(), &*target, &options, &Quiet)
                .map(drop)
                .and_then(|()| target.close());
            let before = storage.total();
            match result {
                Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "operation {n}"),
                Ok(()) => {
                    storage.heal();
                    let mut found = vec![0; data.len()];
                    target.read_at(&mut found, 0).unwrap();
                    assert!(found == data, "operation {n}");
                    if n > before {
                        break;
                    }
                }
            }
            assert!(n < 10_000, "the faults never stop");
        }
    }
}

/// Full after some bytes: ENOSPC comes out as such, wherever it strikes.
#[test]
fn a_full_container_surfaces_as_no_space() {
    let data = noise(256 << 10);
    for room in (20_000..160_000).step_by(9_999) {
        let storage = Arc::new(FaultStorage::new(Arc::new(MemStorage::new())));
        let target = qcow2_on(&storage, data.len() as u64);
        storage.limit_room(room);
        let source = Arc::new(
            Raw::open(Arc::new(MemStorage::from_bytes(data.clone())), RawOptions::default()).unwrap(),
        );
        let source = Source::new([source as Arc<dyn BlockDevice>]).unwrap();
        let options = EngineOptions { threads: 3, chunk: Some(16384), ..EngineOptions::default() };
        let result =
            convert_devices(&source, &*target, &options, &Quiet).map(drop).and_then(|()| target.close());
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace, "room for {room}");
    }
}

/// qemu-img takes what a cut-off file has lost for zeros and says nothing. A hole in a sparse file is one thing, the
/// end of it another.
#[test]
fn a_source_that_was_cut_off_is_an_error_also_when_it_is_sparse() {
    let images = Images::new();
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let source = images.qcow2("a", None);
    {
        let layer = open(&Spec::from_filename(&source).unwrap(), &options).unwrap();
        let Some(image) = &layer.qcow2 else { panic!("it is qcow2") };
        image.preallocate(0, 1 << 20, block::Preallocation::Metadata).unwrap();
        image.write_at(&[1; 65536], 0).unwrap();
        image.close().unwrap();
    }
    let whole = std::fs::metadata(&source).unwrap().len();
    for len in [whole - 1, whole - 65536, whole / 2] {
        std::fs::OpenOptions::new().write(true).open(&source).unwrap().set_len(len).unwrap();
        let error = convert(&to_qcow2(&source, &images.path("b")), &Quiet).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{len}: {error}");
        let target = images.path("c");
        let salvage = ConvertRequest { salvage: true, ..to_qcow2(&source, &target) };
        let report = convert(&salvage, &Quiet).unwrap();
        assert!(report.tally.losses.bytes >= 512 && report.tally.losses.ranges.len() == 1, "{len}");
        std::fs::remove_file(&target).unwrap();
    }
}
