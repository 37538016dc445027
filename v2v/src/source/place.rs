//! Where a description lies, and where the names in it lead.
//!
//! A description names files as they were called where the machine ran. Of a machine that has been copied only the last part
//! of such a name may still be true: a file of that name beside the description is taken then, and a note says so. What a
//! package names (OVF) lies in the package, and nowhere else; what other descriptions name may lie anywhere, unless they are
//! untrusted.

use std::path::{Component, Path, PathBuf};

use block::{Error, ErrorKind, Result};
use image::Policy;

/// The most folders that are searched beside that of the description.
const BESIDE: &[&str] = &["", "Snapshots", "Virtual Hard Disks", "../Virtual Hard Disks", "../Snapshots"];

/// The folder of a description, and the rules for names in it.
#[derive(Debug, Clone)]
pub(crate) struct Place<'a> {
    folder: PathBuf,
    policy: &'a Policy,
    /// Names must not lead out of the folder.
    confined: bool,
    /// There are no files: names are kept as they are.
    nowhere: bool,
    /// What a nameless machine is called.
    stem: String,
}

impl<'a> Place<'a> {
    /// That of the description `path`.
    ///
    /// # Errors
    /// The path is not UTF-8.
    pub(crate) fn of_file(path: &Path, policy: &'a Policy, confined: bool) -> Result<Self> {
        let folder = super::folder_of(path);
        super::path_text(&folder)?;
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        Ok(Self { folder, policy, confined: confined || policy.untrusted, nowhere: false, stem })
    }

    /// No place: a description without files.
    pub(crate) fn nowhere(policy: &'a Policy) -> Self {
        Self { folder: PathBuf::from("."), policy, confined: false, nowhere: true, stem: "guest".to_owned() }
    }

    /// Whether files can be looked for.
    pub(crate) fn is_real(&self) -> bool {
        !self.nowhere
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name of the description without its ending.
    pub(crate) fn stem(&self) -> &str {
        &self.stem
    }

    /// The file that a name in the description means, as a name that `vimg` opens.
    ///
    /// # Errors
    /// `Denied` for what the policy forbids.
    pub(crate) fn file(&self, name: &str, notes: &mut Vec<String>) -> Result<String> {
        let named = clean(name);
        let path = self.folder.join(&named);
        if self.nowhere {
            return super::path_text(&path);
        }
        let path = match self.instead(&path, &named) {
            Some(other) => {
                let shown = other.display();
                notes.push(format!("'{name}' is not there; '{shown}' was taken for it."));
                other
            }
            None => path,
        };
        self.check(&path)?;
        super::path_text(&path)
    }

    /// The same where it matters little: what cannot be used becomes a note.
    pub(crate) fn side_file(&self, name: &str, what: &str, notes: &mut Vec<String>) -> Option<String> {
        let mut said = vec![];
        match self.file(name, &mut said) {
            Ok(path) if self.nowhere || Path::new(&path).exists() => {
                notes.append(&mut said);
                Some(path)
            }
            Ok(_) => {
                notes.push(format!("The {what} '{name}' is not there."));
                None
            }
            Err(error) => {
                notes.push(format!("The {what} is left out: {error}."));
                None
            }
        }
    }

    /// Another file for one that is not there: of the same name, where copies of machines have them.
    fn instead(&self, path: &Path, named: &str) -> Option<PathBuf> {
        if path.symlink_metadata().is_ok() {
            return None;
        }
        let last = named.rsplit('/').next().filter(|last| !last.is_empty() && *last != "..")?;
        let mut others = BESIDE.iter().map(|folder| self.folder.join(folder).join(last));
        others.find(|other| other != path && other.is_file())
    }

    /// Whether a name may lead there.
    fn check(&self, path: &Path) -> Result<()> {
        if !self.confined || self.is_inside(path) || self.is_allowed(path) {
            return Ok(());
        }
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let message = format!(
            "the description names '{}', which lies outside its folder '{}'",
            path.display(),
            self.folder.display()
        );
        Err(Error::new(ErrorKind::Denied, message)
            .hint(format!("if you trust the description, add --allow '{}'", real.display())))
    }

    fn is_inside(&self, path: &Path) -> bool {
        match (path.canonicalize(), self.folder.canonicalize()) {
            (Ok(real), Ok(folder)) => real.starts_with(folder),
            // There is no such file, which is for whoever opens it to say, unless it would lie elsewhere.
            _ => {
                let rest = path.strip_prefix(&self.folder).unwrap_or(path);
                !rest.is_absolute() && !rest.components().any(|part| part == Component::ParentDir)
            }
        }
    }

    fn is_allowed(&self, path: &Path) -> bool {
        let Ok(real) = path.canonicalize() else { return false };
        let allowed = self.policy.allow.iter().filter_map(|allowed| allowed.canonicalize().ok());
        allowed.into_iter().any(|allowed| real.starts_with(allowed))
    }
}

/// A name with slashes only. Windows' names have backslashes, and may begin with a drive, which nothing here has.
fn clean(name: &str) -> String {
    let windows = name.contains('\\') && !name.contains('/');
    let drive = name.as_bytes().first().is_some_and(u8::is_ascii_alphabetic) && name.get(1..3) == Some(":\\");
    let name = name.strip_prefix("file://").unwrap_or(name);
    match (windows || drive, drive) {
        (_, true) => format!("/{}", name.replace('\\', "/")),
        (true, false) => name.replace('\\', "/"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_beside_the_description_or_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vm");
        std::fs::create_dir_all(folder.join("Snapshots")).unwrap();
        for file in ["vm/a.vmdk", "vm/Snapshots/b.vdi", "outside.vmdk"] {
            std::fs::write(dir.path().join(file), b"x").unwrap();
        }
        let policy = Policy::default();
        let find = |confined, name: &str| {
            let mut notes = vec![];
            let place = Place::of_file(&folder.join("vm.vmx"), &policy, confined).unwrap();
            place.file(name, &mut notes).map(|file| (file, notes.len()))
        };
        let at = |rest: &str| folder.join(rest).display().to_string();
        assert_eq!(find(true, "a.vmdk").unwrap(), (at("a.vmdk"), 0));
        assert_eq!(find(true, "/vmfs/volumes/x/vm/a.vmdk").unwrap(), (at("a.vmdk"), 1));
        assert_eq!(find(true, r"C:\VMs\x\a.vmdk").unwrap(), (at("a.vmdk"), 1));
        assert_eq!(find(true, r"Snapshots\b.vdi").unwrap(), (at("Snapshots/b.vdi"), 0));
        assert_eq!(find(true, "elsewhere/b.vdi").unwrap(), (at("Snapshots/b.vdi"), 1));
        assert_eq!(find(true, "missing.vmdk").unwrap(), (at("missing.vmdk"), 0));
        assert_eq!(find(false, "../outside.vmdk").unwrap(), (at("../outside.vmdk"), 0));
        for name in ["../outside.vmdk", "../nothing", "/etc/hostname"] {
            assert_eq!(find(true, name).unwrap_err().kind(), ErrorKind::Denied, "{name}");
        }
        let policy = Policy { allow: vec![dir.path().to_owned()], ..Policy::default() };
        let place = Place::of_file(&folder.join("vm.vmx"), &policy, true).unwrap();
        place.file("../outside.vmdk", &mut vec![]).unwrap();
    }

    #[test]
    fn a_name_is_never_read_as_a_protocol() {
        let policy = Policy::default();
        let place = Place::of_file(Path::new("vm.vmx"), &policy, false).unwrap();
        for name in ["nbd://server", "json:{}", "null-co://", "a:b"] {
            let file = place.file(name, &mut vec![]).unwrap();
            assert!(file.starts_with("./"), "{file}");
        }
    }
}
