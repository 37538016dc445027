//! Manifests: the digests of the files of a package (DSP0243, section 5.1).
//!
//! ```text
//!   SHA256(disk1.vmdk)= 6d3d..      one line for each file; SHA1 and SHA512 as well
//! ```

use std::path::Path;
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::{Error, ErrorKind, Result, ResultExt as _, Storage};
use sha1::Sha1;
use sha2::{Sha256, Sha512};

use super::ova::Archive;
use super::text;

/// Bytes that are read at once.
const STEP: usize = 1 << 20;
/// The most files in a manifest.
const MOST_ENTRIES: usize = 10_000;

/// A digest's algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// SHA-1, of older products.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// Its name in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        let name = name.trim().replace('-', "").to_ascii_uppercase();
        [Self::Sha1, Self::Sha256, Self::Sha512].into_iter().find(|algorithm| algorithm.name() == name)
    }

    /// Digits of its digests.
    const fn digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// What a manifest says of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file, relative to the manifest.
    pub file: String,
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The digest in hexadecimal, lower case.
    pub digest: String,
}

/// The manifest of a package, and where its files are.
#[derive(Debug)]
pub struct Manifest {
    name: String,
    entries: Vec<Entry>,
    notes: Vec<String>,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Folder(std::path::PathBuf),
    Archive(Box<Archive>),
}

/// What a verification has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Files that are what the manifest says.
    pub files: Vec<String>,
    /// Bytes that were read.
    pub bytes: u64,
    /// What a person should know: files that are not there, a certificate that nobody has looked at.
    pub notes: Vec<String>,
}

impl Manifest {
    /// The manifest of a package: an OVF file, an OVA, or a folder with an OVF file in it. `None`: it has none, or the name is
    /// not that of a package.
    ///
    /// # Errors
    /// The host's; `Invalid`: it is not understood.
    pub fn find(source: &str) -> Result<Option<Self>> {
        let found = super::kind::find(source)?;
        let path = Path::new(&found.name);
        match found.kind {
            super::Kind::Ovf => Self::beside(path),
            super::Kind::Ova => Self::within(path),
            _ => Ok(None),
        }
    }

    /// That of an OVF file: `vm.mf` beside `vm.ovf`.
    fn beside(ovf: &Path) -> Result<Option<Self>> {
        let path = ovf.with_extension("mf");
        if !path.is_file() {
            return Ok(None);
        }
        let name = path.display().to_string();
        let (entries, mut notes) = parse(&text::read_file(&path)?).context(|| name.clone())?;
        notes.extend(ovf.with_extension("cert").is_file().then(certificate_note));
        Ok(Some(Self { name, entries, notes, files: Files::Folder(super::folder_of(ovf)) }))
    }

    /// That of an archive: the one beside the description.
    fn within(path: &Path) -> Result<Option<Self>> {
        let archive = Archive::open(path)?;
        let Some(name) = archive.beside_description("mf") else { return Ok(None) };
        let (entries, mut notes) = parse(&archive.read(&name)?).context(|| name.clone())?;
        notes.extend(archive.beside_description("cert").is_some().then(certificate_note));
        Ok(Some(Self { name, entries, notes, files: Files::Archive(Box::new(archive)) }))
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it says, in its order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Bytes that a verification will read.
    ///
    /// # Errors
    /// The host's.
    pub fn total_bytes(&self) -> Result<u64> {
        self.entries.iter().try_fold(0_u64, |sum, entry| {
            let len = self.open(entry)?.map_or(Ok(0), |storage| storage.len())?;
            Ok(sum.saturating_add(len))
        })
    }

    /// Compares every file with its digest, reading each once. `progress` is told how many bytes have been read since it was
    /// last told, and says whether to go on.
    ///
    /// # Errors
    /// `Corrupt`: a file is not what the manifest says; `Cancelled`; the host's.
    pub fn verify(&self, progress: &mut dyn FnMut(u64) -> bool) -> Result<Verified> {
        let mut verified = Verified { notes: self.notes.clone(), ..Verified::default() };
        for entry in &self.entries {
            let Some(storage) = self.open(entry)? else {
                verified
                    .notes
                    .push(format!("The manifest lists '{}', which is not in the package.", entry.file));
                continue;
            };
            let found = digest(&*storage, entry.algorithm, &mut |bytes| {
                verified.bytes += bytes;
                progress(bytes)
            })
            .context(|| format!("could not verify '{}'", entry.file))?;
            if found != entry.digest {
                return Err(mismatch(entry, &found, &self.name));
            }
            verified.files.push(entry.file.clone());
        }
        Ok(verified)
    }

    /// The file of an entry; `None`: it is not there.
    fn open(&self, entry: &Entry) -> Result<Option<Arc<dyn Storage>>> {
        match &self.files {
            Files::Archive(archive) => archive.member(&entry.file),
            Files::Folder(folder) => {
                let outside = entry.file.starts_with('/') || entry.file.split('/').any(|part| part == "..");
                let path = folder.join(&entry.file);
                if outside || !path.is_file() {
                    return Ok(None);
                }
                Ok(Some(Arc::new(HostFile::open(&path, &FileOptions::read_only())?)))
            }
        }
    }
}

fn certificate_note() -> String {
    "The package is signed (.cert); the signature was not verified.".to_owned()
}

fn mismatch(entry: &Entry, found: &str, manifest: &str) -> Error {
    let algorithm = entry.algorithm.name();
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "'{}' has the {algorithm} {found}, and the manifest '{manifest}' says {}",
            entry.file, entry.digest
        ),
    )
    .hint("the package was damaged or changed: export or copy it again")
}

/// The lines of a manifest, and notes about those that are not understood.
fn parse(bytes: &[u8]) -> Result<(Vec<Entry>, Vec<String>)> {
    let text = text::decode(bytes, None)?;
    let (mut entries, mut notes) = (vec![], vec![]);
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match entry(line.trim()) {
            Some(entry) => entries.push(entry),
            None if notes.len() < 5 => {
                notes.push(format!("Line {} of the manifest is not understood.", number + 1));
            }
            None => {}
        }
        if entries.len() > MOST_ENTRIES {
            return Err(Error::invalid(format!("the manifest has more than {MOST_ENTRIES} entries")));
        }
    }
    if entries.is_empty() && !notes.is_empty() {
        return Err(Error::invalid("no line of the manifest is understood"));
    }
    Ok((entries, notes))
}

/// `SHA256(NAME)= DIGEST`; names may have parentheses in them.
fn entry(line: &str) -> Option<Entry> {
    let (algorithm, rest) = line.split_once('(')?;
    let at = rest.rfind(')')?;
    let (file, digest) = (rest.get(..at)?, rest.get(at + 1..)?);
    let algorithm = Algorithm::from_name(algorithm)?;
    let digest = digest.trim().strip_prefix('=')?.trim().to_ascii_lowercase();
    let sound = digest.len() == algorithm.digits() && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    (sound && !file.is_empty()).then(|| Entry { file: file.to_owned(), algorithm, digest })
}

/// The digest of a file.
fn digest(
    storage: &dyn Storage,
    algorithm: Algorithm,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<String> {
    match algorithm {
        Algorithm::Sha1 => digest_with::<Sha1>(storage, progress),
        Algorithm::Sha256 => digest_with::<Sha256>(storage, progress),
        Algorithm::Sha512 => digest_with::<Sha512>(storage, progress),
    }
}

fn digest_with<D: sha2::Digest>(
    storage: &dyn Storage,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<String> {
    let (len, mut at) = (storage.len()?, 0);
    let mut buf = vec![0; STEP];
    let mut digest = D::new();
    while at < len {
        let step = (len - at).min(STEP as u64);
        let part = buf.get_mut(..block::num::to_usize(step)).unwrap_or_default();
        storage.read_at(part, at)?;
        digest.update(&*part);
        at += step;
        if !progress(step) {
            return Err(Error::new(ErrorKind::Cancelled, "the verification was interrupted"));
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_manifests() {
        let sha1 = "a".repeat(40);
        let text = format!(
            "SHA1(a (1).ovf)= {sha1}\r\nSHA256(b.vmdk)={}\nSHA512 (c) = {}\n\n",
            "B".repeat(64),
            "c".repeat(128)
        );
        let (entries, notes) = parse(text.as_bytes()).unwrap();
        assert_eq!(entries.len(), 3, "{entries:?}");
        assert_eq!(entries[0], Entry { file: "a (1).ovf".into(), algorithm: Algorithm::Sha1, digest: sha1 });
        assert_eq!(entries[1].digest, "b".repeat(64));
        assert!(notes.is_empty());
        let (_, notes) = parse(format!("{text}MD5(x)= 00\n").as_bytes()).unwrap();
        assert_eq!(notes.len(), 1);
        parse(b"nothing of the kind\n").unwrap_err();
    }

    #[test]
    fn digests_are_those_of_everybody() {
        let storage = block::mem::MemStorage::from_bytes(b"abc".to_vec());
        let of = |algorithm| digest(&storage, algorithm, &mut |_| true).unwrap();
        assert_eq!(of(Algorithm::Sha1), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(of(Algorithm::Sha256), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(of(Algorithm::Sha512).starts_with("ddaf35a193617abacc417349ae204131"));
        assert_eq!(
            digest(&storage, Algorithm::Sha1, &mut |_| false).unwrap_err().kind(),
            ErrorKind::Cancelled
        );
    }
}
