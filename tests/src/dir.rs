//! A folder that one test works in, gone afterwards, with the tools at hand.
//!
//! Command lines are given as one string of words: `dir.qemu("create -f qcow2 a.qcow2 8M")`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::command::{self, Cmd, Ran};
use crate::ops::Ops;

/// A temporary folder.
#[derive(Debug)]
pub struct Dir {
    dir: tempfile::TempDir,
}

impl Default for Dir {
    fn default() -> Self {
        Self::new()
    }
}

impl Dir {
    /// A fresh, empty one.
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("vimg-test-").tempdir().unwrap() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vimg WORDS`, ready to run.
    pub fn vimg_cmd(&self, words: &str) -> Cmd {
        command::vimg().words(words).dir(self.path())
    }

    /// Runs `vimg WORDS`.
    pub fn vimg(&self, words: &str) -> Ran {
        self.vimg_cmd(words).run()
    }

    /// Runs `vimg WORDS` and expects success.
    #[track_caller]
    pub fn vimg_ok(&self, words: &str) -> Ran {
        self.vimg(words).expect_code(0)
    }

    /// Runs vimg under the name qemu-img.
    pub fn linked(&self, words: &str) -> Ran {
        command::vimg_as_qemu_img().words(words).dir(self.path()).run()
    }

    /// Runs `qemu-img WORDS`.
    pub fn qemu(&self, words: &str) -> Ran {
        command::qemu_img().words(words).dir(self.path()).run()
    }

    /// Runs `qemu-img WORDS` and expects success.
    #[track_caller]
    pub fn qemu_ok(&self, words: &str) -> Ran {
        self.qemu(words).expect_code(0)
    }

    /// Lets qemu-io carry out `ops` on an image.
    #[track_caller]
    pub fn qemu_io(&self, format: &str, image: &str, ops: &Ops) {
        let mut cmd = command::qemu_io().words("-f").arg(format).arg(image).dir(self.path());
        for line in ops.qemu_io() {
            cmd = cmd.arg("-c").arg(line);
        }
        let ran = cmd.ok();
        assert!(!ran.stdout.contains("failed"), "{}", ran.story());
    }

    /// Makes a file of these bytes.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// The bytes of a file.
    #[track_caller]
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.file(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Whether the file exists.
    pub fn exists(&self, name: &str) -> bool {
        self.file(name).exists()
    }

    /// Makes a sparse file of this length in bytes.
    pub fn sparse(&self, name: &str, len: u64) {
        File::create(self.file(name)).unwrap().set_len(len).unwrap();
    }

    /// Overwrites bytes of a file.
    pub fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.file(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Reads a big-endian integer of 8 bytes from a file.
    pub fn peek64(&self, name: &str, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        File::open(self.file(name)).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    }

    /// Overwrites 8 bytes of a file with a big-endian integer.
    pub fn poke64(&self, name: &str, offset: u64, value: u64) {
        self.poke(name, offset, &value.to_be_bytes());
    }

    /// Overwrites 4 bytes of a file with a big-endian integer.
    pub fn poke32(&self, name: &str, offset: u64, value: u32) {
        self.poke(name, offset, &value.to_be_bytes());
    }

    /// Copies a file within the folder.
    pub fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.file(from), self.file(to)).unwrap();
    }

    /// A folder with copies of all files of this one.
    pub fn duplicate(&self) -> Self {
        let copy = Self::new();
        for entry in std::fs::read_dir(self.path()).unwrap().map(Result::unwrap) {
            std::fs::copy(entry.path(), copy.file(&entry.file_name().to_string_lossy())).unwrap();
        }
        copy
    }

    /// The space that a file takes, in bytes.
    pub fn taken(&self, name: &str) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(self.file(name)).unwrap().blocks() * 512
    }

    /// The bytes of the disk that qemu-img sees in an image.
    #[track_caller]
    pub fn qemu_reads(&self, image: &str) -> Vec<u8> {
        let raw = self.file("qemu-reads.raw");
        command::qemu_img().words("convert -O raw").arg(image).arg(&raw).dir(self.path()).ok();
        let bytes = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        bytes
    }

    /// The bytes of the disk that vimg sees in an image.
    #[track_caller]
    pub fn vimg_reads(&self, image: &str) -> Vec<u8> {
        let raw = self.file("vimg-reads.raw");
        command::vimg().words("convert -O raw").arg(image).arg(&raw).dir(self.path()).ok();
        let bytes = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        bytes
    }

    /// Expects that qemu-img finds nothing wrong with an image.
    #[track_caller]
    pub fn qemu_checks(&self, image: &str) {
        self.qemu(&format!("check -f qcow2 {image}")).expect_code(0);
    }

    /// Expects that vimg finds nothing wrong with an image.
    #[track_caller]
    pub fn vimg_checks(&self, image: &str) {
        self.vimg(&format!("check -f qcow2 {image}")).expect_code(0);
    }

    /// Runs the same words with both tools, vimg under the other's name, and expects the same exit code,
    /// the same standard output and the same standard error. Returns what qemu-img did.
    ///
    /// Only what a usage error says is free: Debian's wording is not upstream's either.
    #[track_caller]
    pub fn same(&self, words: &str) -> Ran {
        let (theirs, ours) = (self.qemu(words), self.linked(words).expect_no_panic());
        let said_the_same = if theirs.stderr.contains("\nTry '") {
            !ours.stderr.is_empty()
        } else {
            theirs.stderr == ours.stderr
        };
        let equal = theirs.code == ours.code && theirs.stdout == ours.stdout && said_the_same;
        assert!(equal, "the tools differ\n--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        theirs
    }

    /// Runs the same words with both tools and expects the same exit code and the same standard output;
    /// and, if there is an error message in the one, one in the other.
    #[track_caller]
    pub fn same_outcome(&self, words: &str) -> Ran {
        let (theirs, ours) = (self.qemu(words), self.linked(words).expect_no_panic());
        let equal = theirs.code == ours.code
            && theirs.stdout == ours.stdout
            && theirs.stderr.is_empty() == ours.stderr.is_empty();
        assert!(equal, "the tools differ\n--- qemu-img\n{}--- vimg\n{}", theirs.story(), ours.story());
        theirs
    }

    /// Runs the same words with both tools and expects the same exit code and the same JSON document, its
    /// keys in the same order.
    #[track_caller]
    pub fn same_json(&self, words: &str) -> Value {
        let (theirs, ours) = (self.qemu(words), self.linked(words).expect_no_panic());
        assert!(
            theirs.code == ours.code && theirs.stdout == ours.stdout,
            "the tools differ\n--- qemu-img\n{}--- vimg\n{}",
            theirs.story(),
            ours.story()
        );
        if theirs.stdout.is_empty() { Value::Null } else { theirs.json() }
    }
}
