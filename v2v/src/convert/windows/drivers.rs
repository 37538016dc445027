//! A tree of drivers of the virtio-win project, as its ISO image or its package has it: folders of the drivers, of the
//! versions of Windows and of the processors, in some order.

use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};

use crate::inspect::Windows;

/// The most files of a tree, and how deep it may be.
const MOST_FILES: usize = 20_000;
const MOST_DEPTH: usize = 6;
/// The most bytes of a driver's file.
const MOST_BYTES: u64 = 64 << 20;
/// Folders whose drivers are not for everybody, and endings that nobody needs.
const SKIPPED: [&str; 2] = ["sriov", "vioprot"];
const ENDINGS: [&str; 7] = ["inf", "cat", "sys", "dll", "exe", "cer", "man"];

/// The files for one version of Windows.
#[derive(Debug)]
pub(super) struct Drivers {
    root: PathBuf,
    files: Vec<PathBuf>,
}

/// The folders for a version, the best one first: those of the version before serve as well, where there is none.
fn folders(facts: &Windows) -> Vec<&'static str> {
    const SERVERS: [&str; 4] = ["2k25", "2k22", "2k19", "2k16"];
    match (facts.version, facts.server) {
        ((10, _), true) => {
            let first = match facts.build {
                26_100.. => 0,
                20_348.. => 1,
                17_763.. => 2,
                _ => 3,
            };
            SERVERS[first..].iter().copied().chain(["w10"]).collect()
        }
        ((10, _), false) if facts.build >= 22_000 => vec!["w11", "w10"],
        ((10, _), false) => vec!["w10"],
        ((6, 3), true) => vec!["2k12r2"],
        ((6, 3), false) => vec!["w8.1", "2k12r2"],
        ((6, 2), true) => vec!["2k12"],
        ((6, 2), false) => vec!["w8", "2k12"],
        ((6, 1), true) => vec!["2k8r2", "w7"],
        ((6, 1), false) => vec!["w7", "2k8r2"],
        ((6, 0), _) => vec!["2k8"],
        ((5, 2), _) => vec!["2k3"],
        ((5, 1), _) => vec!["xp"],
        _ => vec![],
    }
}

/// A folder's name in one spelling: `Win10` and `w10` are the same.
fn plain(name: &str) -> String {
    let name = name.to_lowercase();
    match name.strip_prefix("win") {
        Some(rest) if rest.starts_with(|first: char| first.is_ascii_digit()) && !rest.starts_with("2k") => {
            format!("w{rest}")
        }
        Some(rest) if rest.starts_with("2k") => rest.to_owned(),
        _ => name,
    }
}

impl Drivers {
    /// Chooses the files for a Windows out of a tree.
    ///
    /// # Errors
    /// `Usage` if it is no folder; `NotFound` if it has no drivers for this Windows.
    pub(super) fn open(root: &Path, facts: &Windows, architecture: &str) -> Result<Self> {
        let what = || root.display().to_string();
        let found = std::fs::metadata(root).context(what)?;
        if !found.is_dir() {
            return Err(Error::usage(format!("'{}' is not a folder", root.display())).hint(
                "An ISO image has to be mounted or unpacked first: mount -o loop,ro virtio-win.iso /mnt",
            ));
        }
        let mut all = vec![];
        list(root, 0, &mut all).context(what)?;
        let processor: &[&str] = match architecture {
            "i686" => &["x86", "i386"],
            "aarch64" => &["arm64"],
            _ => &["amd64", "x64"],
        };
        for version in folders(facts) {
            let fits = |path: &&PathBuf| {
                let path = path.strip_prefix(root).unwrap_or(path);
                let names: Vec<String> = path.iter().map(|name| plain(&name.to_string_lossy())).collect();
                let (file, above) =
                    names.split_last().map_or(("", &names[..]), |(file, above)| (file.as_str(), above));
                let ending = file.rsplit_once('.').map_or("", |(_, ending)| ending);
                above.iter().any(|name| name == version)
                    && above.iter().any(|name| processor.contains(&name.as_str()))
                    && !above.iter().any(|name| SKIPPED.contains(&name.as_str()))
                    && ENDINGS.contains(&ending)
            };
            let files: Vec<PathBuf> = all.iter().filter(fits).cloned().collect();
            if !files.is_empty() {
                return Ok(Self { root: root.to_owned(), files });
            }
        }
        let (major, minor) = facts.version;
        let message = format!(
            "'{}' has no drivers for Windows {major}.{minor} (build {}, {})",
            root.display(),
            facts.build,
            processor[0]
        );
        Err(Error::new(ErrorKind::NotFound, message)
            .hint("Give the root of the virtio-win ISO image, or attach the disks by SATA: --bus sata."))
    }

    /// The contents of one file.
    ///
    /// # Errors
    /// `NotFound`; it cannot be read.
    pub(super) fn file(&self, name: &str) -> Result<Vec<u8>> {
        let same = |path: &&PathBuf| path.file_name().is_some_and(|own| own.eq_ignore_ascii_case(name));
        let path = self.files.iter().find(same).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("'{}' has no {name} for this Windows", self.root.display()),
            )
            .hint("Give the root of the virtio-win ISO image, or attach the disks by SATA: --bus sata.")
        })?;
        read(path)
    }

    /// All files by their names, sorted; of several with one name the first.
    ///
    /// # Errors
    /// One cannot be read.
    pub(super) fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files: Vec<(String, Vec<u8>)> = vec![];
        for path in &self.files {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if !files.iter().any(|(known, _)| known.eq_ignore_ascii_case(name)) {
                files.push((name.to_owned(), read(path)?));
            }
        }
        files.sort();
        Ok(files)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let what = || path.display().to_string();
    let len = std::fs::metadata(path).context(what)?.len();
    if len > MOST_BYTES {
        return Err(Error::unsupported(format!("'{}': a driver of {len} bytes", path.display())));
    }
    std::fs::read(path).context(what)
}

/// The regular files of a tree, sorted; links are not followed.
fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries = std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() && depth < MOST_DEPTH {
            list(&entry.path(), depth + 1, files)?;
        } else if kind.is_file() && files.len() < MOST_FILES {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(version: (u32, u32), build: u32, server: bool) -> Windows {
        Windows { version, build, server, ..Windows::default() }
    }

    #[test]
    fn versions_have_their_folders() {
        for (facts, first) in [
            (windows((10, 0), 19_045, false), "w10"),
            (windows((10, 0), 22_631, false), "w11"),
            (windows((10, 0), 17_763, true), "2k19"),
            (windows((10, 0), 20_348, true), "2k22"),
            (windows((10, 0), 14_393, true), "2k16"),
            (windows((6, 3), 9600, true), "2k12r2"),
            (windows((6, 1), 7601, false), "w7"),
            (windows((5, 1), 2600, false), "xp"),
        ] {
            assert_eq!(folders(&facts).first(), Some(&first));
        }
        assert_eq!(["Win10", "W8.1", "Win2k16", "Win8.1"].map(plain), ["w10", "w8.1", "2k16", "w8.1"]);
    }
}
