//! OVA: the files of an OVF package in one archive (DMTF DSP0243 1.1.0, section 5.3), written in one pass over the disks.
//!
//! ```text
//!   NAME.ovf        first, as importers want it; room is left for it, for it tells how long the disks are
//!   NAME.mf         SHA-256 of every other file; its length is known beforehand
//!   NAME-disk1.vmdk streamOptimized, hashed while it is made
//!   ...
//! ```
//!
//! A tar header stands before its file and has its length, so both are written when the file is complete. The output must
//! therefore be a file that can be sought in.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use image::convert::{ConvertRequest, PipeTarget, Target, convert};
use image::progress::Progress;
use image::target::Placement;
use image::{CreateRequest, Format, Layer};
use sha2::{Digest as _, Sha256};

use super::Machine;
use super::ovf::{DiskFile, Product, envelope};

/// Tar counts in these (POSIX.1-2017, pax, "ustar Interchange Format").
const BLOCK: u64 = 512;
/// The longest file name of a header without a prefix.
const LONGEST_NAME: usize = 100;
/// Lengths from here on do not fit eleven octal digits.
const OCTAL_LIMIT: u64 = 1 << 33;
/// Hexadecimal digits of SHA-256.
const DIGEST_LEN: u64 = 64;

/// A disk to be packed.
#[derive(Debug)]
pub struct Source {
    /// The opened image.
    pub layer: Arc<Layer>,
    /// What is read instead: an overlay over it, in which the guest was changed.
    pub disk: Option<Arc<dyn BlockDevice>>,
}

/// Writes the archive `path` with the machine's disks. It appears under its name when it is complete. Returns the files of
/// the disks.
///
/// # Errors
/// `Usage`: not as many sources as the machine has disks, or its name is too long for an archive; a disk cannot be read;
/// no space; `Cancelled`.
pub fn write(
    path: &Path,
    machine: &Machine,
    product: &Product,
    sources: &[Source],
    progress: &dyn Progress,
) -> Result<Vec<DiskFile>> {
    if sources.len() != machine.disks.len() {
        let message = format!("the machine has {} disks, {} are given", machine.disks.len(), sources.len());
        return Err(Error::usage(message));
    }
    let placement = Placement::new(path)?;
    let physical = placement.partial().unwrap_or(path);
    let file = File::options().write(true).create(true).truncate(true).open(physical);
    let file = file.map_err(Error::from).context(|| format!("Could not create '{}'", path.display()))?;
    let mut names = Names::of(path)?;
    names.disks = (1..=sources.len()).map(|number| format!("{}-disk{number}.vmdk", names.stem)).collect();
    let unknown: Vec<DiskFile> =
        names.disks.iter().map(|name| DiskFile { name: name.clone(), len: u64::MAX }).collect();
    let mut archive = Archive::new(file, &names, envelope(machine, product, &unknown).len())?;
    let total: u64 = machine.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add);
    let mut before = 0;
    for (source, (disk, name)) in sources.iter().zip(machine.disks.iter().zip(&names.disks)) {
        let part = Part { progress, before, total };
        pack(&mut archive, name, source, &part).context(|| disk.path.display().to_string())?;
        before = before.saturating_add(disk.size_bytes);
    }
    let files = archive.files();
    archive.finish(&names, &envelope(machine, product, &files))?;
    placement.complete(true)?;
    Ok(files)
}

fn pack(archive: &mut Archive, name: &str, source: &Source, progress: &dyn Progress) -> Result<()> {
    let format = Format::from_name("vmdk").ok_or_else(|| Error::unsupported("VMDK is not built in"))?;
    let options = [("subformat", "streamOptimized"), ("adapter_type", "lsilogic")];
    let create = CreateRequest {
        options: options.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        ..CreateRequest::new(name, format)
    };
    let output = archive.begin(name)?;
    let target = Target::Pipe(Box::new(PipeTarget::new(create, Box::new(output))));
    let request = ConvertRequest {
        disk: source.disk.clone(),
        ..ConvertRequest::new(vec![Arc::clone(&source.layer)], target)
    };
    convert(&request, progress)?;
    archive.end()
}

/// One disk's share of the progress.
struct Part<'a> {
    progress: &'a dyn Progress,
    before: u64,
    total: u64,
}

impl Progress for Part<'_> {
    fn update(&self, done: u64, _total: u64) {
        self.progress.update(self.before.saturating_add(done).min(self.total), self.total);
    }

    fn cancelled(&self) -> bool {
        self.progress.cancelled()
    }

    fn wants_estimate(&self) -> bool {
        self.progress.wants_estimate()
    }

    fn warn(&self, message: &str) {
        self.progress.warn(message);
    }
}

/// The names of the files in the archive.
struct Names {
    stem: String,
    disks: Vec<String>,
}

impl Names {
    fn of(path: &Path) -> Result<Self> {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let stem = stem
            .ok_or_else(|| Error::usage(format!("'{}' cannot be the name of an archive", path.display())))?;
        Ok(Self { stem: stem.to_owned(), disks: vec![] })
    }

    fn envelope(&self) -> String {
        format!("{}.ovf", self.stem)
    }

    fn manifest(&self) -> String {
        format!("{}.mf", self.stem)
    }

    /// The length of the manifest: `SHA256(NAME)= DIGEST` and a newline for each file.
    fn manifest_len(&self) -> u64 {
        let names = self.disks.iter().map(String::len).chain([self.envelope().len()]);
        names.map(|len| line("", "").len() as u64 + DIGEST_LEN + len as u64).sum()
    }
}

/// A line of a manifest (DSP0243, section 5.1).
fn line(name: &str, digest: &str) -> String {
    format!("SHA256({name})= {digest}\n")
}

/// The archive while it is written.
struct Archive {
    shared: Arc<Mutex<Shared>>,
    files: Vec<(DiskFile, String)>,
    /// Bytes that were set aside for the envelope.
    room: u64,
}

struct Shared {
    file: File,
    position: u64,
    member: Option<Member>,
}

struct Member {
    name: String,
    header_at: u64,
    len: u64,
    hash: Sha256,
}

/// Takes the bytes of a file of the archive.
struct Output(Arc<Mutex<Shared>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &mut *shared;
        shared.file.write_all(bytes)?;
        shared.position += bytes.len() as u64;
        if let Some(member) = &mut shared.member {
            member.hash.update(bytes);
            member.len += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Archive {
    /// Leaves room for an envelope of at most `envelope_len` bytes and for the manifest.
    fn new(mut file: File, names: &Names, envelope_len: usize) -> Result<Self> {
        for name in names.disks.iter().chain([&names.envelope()]) {
            header(name, 0)?;
        }
        let room = (envelope_len as u64).next_multiple_of(BLOCK);
        let position = BLOCK + room + BLOCK + names.manifest_len().next_multiple_of(BLOCK);
        file.seek(SeekFrom::Start(position))?;
        let shared = Shared { file, position, member: None };
        Ok(Self { shared: Arc::new(Mutex::new(shared)), files: vec![], room })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Shared) -> Result<T>) -> Result<T> {
        act(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn begin(&self, name: &str) -> Result<Output> {
        self.with(|shared| {
            let header_at = shared.position;
            shared.position += BLOCK;
            shared.file.seek(SeekFrom::Start(shared.position))?;
            shared.member = Some(Member { name: name.to_owned(), header_at, len: 0, hash: Sha256::new() });
            Ok(())
        })?;
        Ok(Output(Arc::clone(&self.shared)))
    }

    fn end(&mut self) -> Result<()> {
        let done = self.with(|shared| {
            let Some(Member { name, header_at, len, hash }) = shared.member.take() else {
                return Err(Error::new(ErrorKind::Io, "no file has been begun in the archive"));
            };
            shared.write_at(header_at, &header(&name, len)?)?;
            shared.position = shared.position.next_multiple_of(BLOCK);
            shared.file.seek(SeekFrom::Start(shared.position))?;
            Ok((DiskFile { name, len }, hexadecimal(hash)))
        })?;
        self.files.push(done);
        Ok(())
    }

    fn files(&self) -> Vec<DiskFile> {
        self.files.iter().map(|(file, _)| file.clone()).collect()
    }

    /// Writes what stands in front, and the end of the archive.
    fn finish(self, names: &Names, envelope: &str) -> Result<()> {
        let mut envelope = envelope.as_bytes().to_vec();
        if envelope.len() as u64 > self.room {
            return Err(Error::new(ErrorKind::Io, "the envelope has outgrown its room"));
        }
        // White space may follow the root element (XML 1.0, section 2.1).
        envelope.resize(to_usize(self.room), b' ');
        let mut hash = Sha256::new();
        hash.update(&envelope);
        let mut manifest = line(&names.envelope(), &hexadecimal(hash));
        for (file, digest) in &self.files {
            manifest.push_str(&line(&file.name, digest));
        }
        self.with(|shared| {
            shared.write_at(0, &header(&names.envelope(), self.room)?)?;
            shared.write_at(BLOCK, &envelope)?;
            let at = BLOCK + self.room;
            shared.write_at(at, &header(&names.manifest(), manifest.len() as u64)?)?;
            shared.write_at(at + BLOCK, manifest.as_bytes())?;
            // Two blocks of zeros.
            shared.file.set_len(shared.position + 2 * BLOCK)?;
            Ok(shared.file.sync_all()?)
        })
    }
}

impl Shared {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.seek(SeekFrom::Start(offset))?;
        Ok(self.file.write_all(bytes)?)
    }
}

fn hexadecimal(hash: Sha256) -> String {
    use std::fmt::Write as _;
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The header of a regular file. Lengths from 8 GiB are written in base 256, as GNU tar and everybody else does.
///
/// # Errors
/// `Usage`: the name is longer than 100 bytes.
fn header(name: &str, len: u64) -> Result<[u8; 512]> {
    if name.len() > LONGEST_NAME {
        return Err(Error::usage(format!(
            "'{name}' is longer than the {LONGEST_NAME} bytes that an archive takes"
        )));
    }
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if len < OCTAL_LIMIT {
        put(124, format!("{len:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &len.to_be_bytes());
    }
    // The same disks make the same archive: it has no time of its own.
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_octal_until_they_do_not_fit() {
        assert_eq!(&header("a", 0o123).unwrap()[124..136], b"00000000123\0");
        assert_eq!(&header("a", OCTAL_LIMIT - 1).unwrap()[124..136], b"77777777777\0");
        assert_eq!(header("a", OCTAL_LIMIT).unwrap()[124..136], [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
        header(&"x".repeat(100), 0).unwrap();
        header(&"x".repeat(101), 0).unwrap_err();
    }
}
