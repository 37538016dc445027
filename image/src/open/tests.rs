//! Chains on real files.

use std::path::Path;
use std::sync::Arc;

use block::ErrorKind;
use block::file::{FileOptions, HostFile};
use block::lock::Permissions;
use tempfile::TempDir;

use super::*;
use crate::create::{CreateRequest, create};

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

    /// A qcow2 image of 1 MiB, on `backing` if there is one (which need not exist).
    fn qcow2(&self, name: &str, backing: Option<(&str, &str)>) -> String {
        let request = CreateRequest {
            size: Some(1 << 20),
            backing_file: backing.map(|(name, _)| name.to_owned()),
            backing_format: backing.map(|(_, format)| format.to_owned()),
            backing_unsafe: true,
            ..CreateRequest::new(self.path(name), Format::Qcow2)
        };
        create(&request).unwrap();
        self.path(name)
    }
}

fn opened(name: &str, options: &OpenOptions) -> Result<Arc<Layer>> {
    open(&Spec::from_filename(name)?, options)
}

fn simply(name: &str) -> Result<Arc<Layer>> {
    opened(name, &OpenOptions::default())
}

fn first_bytes(layer: &Layer) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    layer.device().read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn chains_are_followed_from_the_directory_of_each_image() {
    let images = Images::new();
    std::fs::create_dir(images.path("sub")).unwrap();
    images.raw("base.raw", &[7; 4096]);
    images.qcow2("sub/middle.qcow2", Some(("../base.raw", "raw")));
    let top = images.qcow2("top.qcow2", Some(("sub/middle.qcow2", "qcow2")));
    let layer = simply(&top).unwrap();
    let formats: Vec<_> = layer.chain().map(|layer| (layer.format, layer.probed)).collect();
    assert_eq!(formats, [(Format::Qcow2, false), (Format::Qcow2, false), (Format::Raw, false)]);
    assert_eq!(first_bytes(&layer), [7; 4]);
    let ignoring = OpenOptions { backing: BackingMode::Ignore, ..OpenOptions::default() };
    let alone = opened(&top, &ignoring).unwrap();
    assert_eq!(alone.chain().count(), 1);
    assert_eq!(alone.full_backing_filename, Some(images.path("sub/middle.qcow2")));
}

#[test]
fn a_missing_member_is_named_with_its_place_in_the_chain() {
    let images = Images::new();
    images.qcow2("b", Some(("gone", "qcow2")));
    let top = images.qcow2("a", Some(("b", "qcow2")));
    let error = simply(&top).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        format!(
            "Could not open '{top}': Could not open backing file: Could not open backing file: \
             Could not open '{}': No such file or directory",
            images.path("gone")
        )
    );
}

// qemu-img opens an endless chain over and over until it runs out of descriptors.
#[test]
fn endless_chains_are_noticed_whatever_names_they_go_by() {
    let images = Images::new();
    let own = images.qcow2("self", Some(("self", "qcow2")));
    images.qcow2("one", Some(("two", "qcow2")));
    let two = images.qcow2("two", Some(("link", "qcow2")));
    std::os::unix::fs::symlink(images.path("one"), images.path("link")).unwrap();
    for name in [own, two] {
        let error = simply(&name).unwrap_err().to_string();
        assert!(error.ends_with("creates an infinite loop."), "{error}");
        let spec = Spec::from_filename(&name).unwrap();
        let error = crate::info::describe(&spec, &OpenOptions::default(), true).unwrap_err().to_string();
        assert!(
            error.starts_with("Backing file '") && error.ends_with("creates an infinite loop."),
            "{error}"
        );
        crate::check::Subject::open(&spec, &OpenOptions::default()).unwrap_err();
    }
}

#[test]
fn chains_may_be_long_but_not_without_end() {
    let images = Images::new();
    images.raw("0", &[9; 4096]);
    for index in 1..=MAX_CHAIN {
        let format = if index == 1 { "raw" } else { "qcow2" };
        images.qcow2(&index.to_string(), Some((&(index - 1).to_string(), format)));
    }
    let deepest = simply(&images.path(&(MAX_CHAIN - 1).to_string())).unwrap();
    assert_eq!(deepest.chain().count(), MAX_CHAIN);
    let error = simply(&images.path(&MAX_CHAIN.to_string())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    drop(deepest);
}

#[test]
fn untrusted_images_are_opened_alone_or_not_at_all() {
    let images = Images::new();
    let base = images.raw("base.raw", &[7; 4096]);
    let top = images.qcow2("top", Some(("base.raw", "raw")));
    let json =
        images.qcow2("json", Some((&format!("json:{{'driver':'raw','file.filename':'{base}'}}"), "raw")));
    let untrusted = |allow: &[&str]| OpenOptions {
        policy: Policy {
            untrusted: true,
            allow: allow.iter().map(PathBuf::from).collect(),
            ..Policy::default()
        },
        ..OpenOptions::default()
    };
    let error = opened(&top, &untrusted(&[])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert_eq!(error.hints(), [format!("if you trust that file, add --allow {base}")]);
    assert_eq!(first_bytes(&opened(&top, &untrusted(&[&base])).unwrap()), [7; 4]);
    assert_eq!(first_bytes(&simply(&json).unwrap()), [7; 4], "trusted, it is followed as qemu does");
    assert_eq!(opened(&json, &untrusted(&[&base])).unwrap_err().kind(), ErrorKind::Denied);
    let chosen = format!("json:{{'driver':'qcow2','file.filename':'{json}','backing':null}}");
    opened(&chosen, &untrusted(&[])).unwrap();
    let ignoring = OpenOptions { backing: BackingMode::Ignore, ..untrusted(&[]) };
    opened(&top, &ignoring).unwrap();
}

#[test]
fn untrusted_data_files_are_not_opened() {
    let images = Images::new();
    let data = images.path("data");
    let request = CreateRequest {
        size: Some(1 << 20),
        options: vec![("data_file".into(), data.clone())],
        ..CreateRequest::new(images.path("image"), Format::Qcow2)
    };
    create(&request).unwrap();
    let policy = Policy { untrusted: true, allow: vec![], ..Policy::default() };
    let untrusted = OpenOptions { policy, ..OpenOptions::default() };
    assert_eq!(opened(&request.filename, &untrusted).unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(simply(&request.filename).unwrap().data_file.as_ref().unwrap().path(), Path::new(&data));
}

#[test]
fn raw_is_what_nothing_else_is_and_says_so() {
    let images = Images::new();
    let name = images.raw("disk", b"no format has this magic");
    let layer = simply(&name).unwrap();
    assert!(layer.probed && layer.probed_raw_warning().unwrap().contains(&name));
    let named = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    assert!(!opened(&name, &named).unwrap().probed);
    let foreign = images.raw("foreign", b"LUKS\xba\xbe\0\x02");
    assert_eq!(simply(&foreign).unwrap_err().kind(), ErrorKind::Unsupported);
    opened(&foreign, &named).unwrap();
}

#[test]
fn an_image_in_a_part_of_a_file_can_be_named() {
    let images = Images::new();
    let inner = images.qcow2("inner", None);
    let mut bytes = vec![0; 1 << 20];
    bytes.extend(std::fs::read(&inner).unwrap());
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let outer = images.raw("outer", &bytes);
    let text = format!("driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename={outer}");
    let layer = open(&Spec::from_image_opts(&text).unwrap(), &OpenOptions::default()).unwrap();
    assert_eq!((layer.image.size(), layer.format), (1 << 20, Format::Qcow2));
    assert_eq!(layer.container.as_ref().unwrap().format, Format::Raw);
}

/// Another program that writes to the image.
fn writer(path: &str) -> HostFile {
    let file = HostFile::open(Path::new(path), &FileOptions::read_write()).unwrap();
    let shared = Permissions::ALL.without(Permissions::WRITE | Permissions::RESIZE);
    file.lock(Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE, shared).unwrap();
    file
}

#[test]
fn images_in_use_are_refused_unless_sharing_is_forced() {
    let images = Images::new();
    let name = images.qcow2("image", None);
    let running = writer(&name);
    let error = simply(&name).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert_eq!(error.message(), "Failed to get shared \"write\" lock");
    opened(&name, &OpenOptions { force_share: true, ..OpenOptions::default() }).unwrap();
    let without = format!("json:{{'driver':'qcow2','file.filename':'{name}','file.locking':'off'}}");
    simply(&without).unwrap();
    drop(running);
    let reading = simply(&name).unwrap();
    simply(&name).unwrap();
    let writing = OpenOptions { writable: true, ..OpenOptions::default() };
    assert_eq!(opened(&name, &writing).unwrap_err().kind(), ErrorKind::Locked);
    drop(reading);
    opened(&name, &writing).unwrap();
}

#[test]
fn read_only_nodes_are_not_written() {
    let images = Images::new();
    let name = images.qcow2("image", None);
    let spec = Spec::from_image_opts(&format!("driver=qcow2,read-only=on,file.filename={name}")).unwrap();
    let writing = OpenOptions { writable: true, ..OpenOptions::default() };
    assert_eq!(open(&spec, &writing).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn options_belong_to_formats() {
    let images = Images::new();
    let name = images.qcow2("image", None);
    let message =
        |text: String| open(&Spec::from_image_opts(&text).unwrap(), &OpenOptions::default()).unwrap_err();
    let error = message(format!("driver=qcow2,offset=512,file.filename={name}")).to_string();
    assert!(error.ends_with("Block format 'qcow2' does not support the option 'offset'"), "{error}");
    let error = message(format!("driver=raw,l2-cache-size=1M,file.filename={name}")).to_string();
    assert!(error.ends_with("Block format 'raw' does not support the option 'l2-cache-size'"), "{error}");
}
