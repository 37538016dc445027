//! Requests, and what becomes of them.

use tempfile::TempDir;

use super::*;
use crate::spec::Spec;

struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn request(&self, name: &str, format: Format, options: &[(&str, &str)]) -> CreateRequest {
        CreateRequest {
            size: Some(1 << 20),
            options: options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            ..CreateRequest::new(self.path(name), format)
        }
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.0.path()).unwrap().count()
    }
}

fn message(request: &CreateRequest) -> String {
    create(request).unwrap_err().to_string()
}

#[test]
fn a_request_without_a_size_takes_that_of_the_backing_file() {
    let directory = Directory::new();
    let base = CreateRequest { size: Some(3 << 20), ..directory.request("base", Format::Qcow2, &[]) };
    create(&base).unwrap();
    let top = CreateRequest {
        size: None,
        backing_file: Some("base".into()),
        backing_format: Some("qcow2".into()),
        ..directory.request("top", Format::Qcow2, &[])
    };
    assert_eq!(create(&top).unwrap().size, 3 << 20);
    let without = CreateRequest { size: None, ..directory.request("x", Format::Qcow2, &[]) };
    assert_eq!(message(&without), "Image creation needs a size parameter");
}

#[test]
fn the_backing_files_format_has_to_be_said() {
    let directory = Directory::new();
    create(&directory.request("base", Format::Qcow2, &[])).unwrap();
    let request =
        CreateRequest { backing_file: Some("base".into()), ..directory.request("top", Format::Qcow2, &[]) };
    assert_eq!(message(&request), "Backing file specified without backing format\nDetected format of qcow2.");
    let unsafely = CreateRequest { backing_unsafe: true, ..request };
    assert_eq!(message(&unsafely), "Backing file specified without backing format");
}

#[test]
fn failures_leave_nothing_behind() {
    let directory = Directory::new();
    for options in [
        &[("cluster_size", "3000")][..],
        &[("data_file_raw", "on")],
        &[("data_file", "/no/such/directory/file")],
        &[("preallocation", "bogus")],
        &[("encrypt.format", "luks")],
    ] {
        create(&directory.request("x", Format::Qcow2, options)).unwrap_err();
        assert_eq!(directory.files(), 0, "{options:?}");
    }
}

// Options are looked at before the target is: a typing mistake must not cost a disk.
#[test]
fn an_existing_file_survives_a_request_that_makes_no_sense() {
    let directory = Directory::new();
    let request = directory.request("disk", Format::Qcow2, &[("refcount_bits", "3")]);
    std::fs::write(&request.filename, b"precious").unwrap();
    assert_eq!(message(&request), "Refcount width must be a power of two and may not exceed 64 bits");
    assert_eq!(std::fs::read(&request.filename).unwrap(), b"precious");
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let directory = Directory::new();
    let request = directory.request("disk", Format::Qcow2, &[]);
    create(&request).unwrap();
    let spec = Spec::from_filename(&request.filename).unwrap();
    let running = crate::open(&spec, &OpenOptions { writable: true, ..OpenOptions::default() }).unwrap();
    let error = create(&request).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Locked);
    drop(running);
    crate::open(&spec, &OpenOptions::default()).unwrap();
}

#[test]
fn no_file_of_a_disk_is_lost_because_another_one_is_in_use() {
    let directory = Directory::new();
    let split = ("subformat", "twoGbMaxExtentSparse");
    let request =
        CreateRequest { size: Some(5 << 30), ..directory.request("x.vmdk", Format::Vmdk, &[split]) };
    create(&request).unwrap();
    let names = ["x.vmdk", "x-s001.vmdk", "x-s002.vmdk", "x-s003.vmdk"];
    std::fs::write(directory.path("x-s001.vmdk"), "precious").unwrap();
    let contents = || names.map(|name| std::fs::read(directory.path(name)).unwrap());
    let before = contents();
    for name in ["x-s003.vmdk", "x.vmdk"] {
        let spec = Spec::from_filename(&directory.path(name)).unwrap();
        let options = OpenOptions { writable: true, format: Some(Format::Raw), ..OpenOptions::default() };
        let _in_use = crate::open::open(&spec, &options).unwrap();
        assert_eq!(create(&request).unwrap_err().kind(), block::ErrorKind::Locked);
        assert!(contents() == before, "{name}");
    }
    create(&request).unwrap();
}

#[test]
fn a_data_file_is_made_with_the_image() {
    let directory = Directory::new();
    let data = directory.path("data");
    let created =
        create(&directory.request("disk", Format::Qcow2, &[("data_file", &data), ("data_file_raw", "on")]))
            .unwrap();
    assert_eq!(created.files.len(), 2);
    assert_eq!(std::fs::metadata(&data).unwrap().len(), 1 << 20);
    let own = directory.path("self");
    create(&directory.request("self", Format::Qcow2, &[("data_file", &own)])).unwrap_err();
    assert!(!Path::new(&own).exists());
}

#[test]
fn the_image_may_be_made_under_another_name_first() {
    let directory = Directory::new();
    let temporary = PathBuf::from(directory.path(".disk.tmp"));
    let request = CreateRequest {
        physical_path: Some(temporary.clone()),
        ..directory.request("disk", Format::Qcow2, &[])
    };
    let created = create(&request).unwrap();
    assert!(created.formatting_line.starts_with(&format!("Formatting '{}', fmt=qcow2", request.filename)));
    assert_eq!(created.files, [temporary]);
    assert_eq!(directory.files(), 1);
}

#[test]
fn raw_files_are_whole_sectors() {
    let directory = Directory::new();
    let request = CreateRequest { size: Some(1000), ..directory.request("disk", Format::Raw, &[]) };
    assert_eq!(
        create(&request).unwrap().formatting_line,
        format!("Formatting '{}', fmt=raw size=1000", request.filename)
    );
    assert_eq!(std::fs::metadata(&request.filename).unwrap().len(), 1024);
}
