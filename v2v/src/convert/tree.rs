//! The files of a guest as a conversion sees them: one tree in which everything is mounted.

use std::path::{Path, PathBuf};

use block::Result;
use guestdisk::fs::FileKind;

/// A file by the volume that it lies on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Index in [`guestdisk::Disks::volumes`].
    pub volume: usize,
    /// The path within the volume, without symbolic links on the way.
    pub path: PathBuf,
}

/// What a conversion asks of a guest's files. Paths are absolute, as the guest sees them.
pub trait Tree {
    /// Where a path lies: links are followed, the last one too, and what is mounted on the way. The last name may be one
    /// that does not exist (yet); `None` if its folder does not.
    fn locate(&self, path: &Path) -> Option<Place>;

    /// The contents of a regular file of at most `max_bytes`; `None` if there is no such file.
    ///
    /// # Errors
    /// It is larger, or it cannot be read.
    fn read(&self, place: &Place, max_bytes: u64) -> Result<Option<Vec<u8>>>;

    /// The names in a folder, sorted, with what they are; none if there is no such folder.
    fn list(&self, path: &Path) -> Vec<(String, FileKind)>;

    /// What a path is, the link itself if it is one; `None` if there is nothing.
    fn kind(&self, path: &Path) -> Option<FileKind>;

    /// Where a symbolic link points; `None` if it is none.
    fn link(&self, path: &Path) -> Option<PathBuf>;

    /// What a place is and how long, the link itself if it is one; `None` if there is nothing.
    fn stat(&self, place: &Place) -> Option<(FileKind, u64)>;

    /// The names in a folder of a volume, sorted; none if there is no such folder.
    fn list_at(&self, place: &Place) -> Vec<(String, FileKind)>;
}

#[cfg(test)]
pub(crate) mod memory {
    //! A guest in memory, for tests.

    use std::collections::BTreeMap;

    use super::*;

    /// Files on volume 0, and what is under `/boot` on volume 1 if `boot` says so.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Memory {
        pub(crate) files: BTreeMap<PathBuf, Node>,
        pub(crate) boot: bool,
    }

    #[derive(Debug, Clone)]
    pub(crate) enum Node {
        File(Vec<u8>),
        Link(PathBuf),
        Directory,
    }

    impl Memory {
        pub(crate) fn file(mut self, path: &str, bytes: impl AsRef<[u8]>) -> Self {
            self.put(path, Node::File(bytes.as_ref().to_vec()));
            self
        }

        pub(crate) fn link_to(mut self, path: &str, target: &str) -> Self {
            self.put(path, Node::Link(target.into()));
            self
        }

        pub(crate) fn folder(mut self, path: &str) -> Self {
            self.put(path, Node::Directory);
            self
        }

        pub(crate) fn put(&mut self, path: &str, node: Node) {
            let path = PathBuf::from(path);
            for parent in path.ancestors().skip(1) {
                self.files.entry(parent.to_owned()).or_insert(Node::Directory);
            }
            self.files.insert(path, node);
        }

        fn real(&self, path: &Path, left: usize) -> Option<PathBuf> {
            let mut at = PathBuf::from("/");
            let names: Vec<_> = path.iter().skip(1).collect();
            for (index, name) in names.iter().enumerate() {
                if *name == ".." {
                    at.pop();
                    continue;
                }
                let next = at.join(name);
                match self.files.get(&next) {
                    Some(Node::Link(target)) => {
                        let rest: PathBuf = names[index + 1..].iter().collect();
                        let whole = at.join(target).join(rest);
                        return self.real(&whole, left.checked_sub(1)?);
                    }
                    None if index + 1 < names.len() => return None,
                    _ => at = next,
                }
            }
            Some(at)
        }

        pub(crate) fn place_of(&self, path: &Path) -> Place {
            match path.strip_prefix("/boot") {
                Ok(rest) if self.boot => Place { volume: 1, path: Path::new("/").join(rest) },
                _ => Place { volume: 0, path: path.to_owned() },
            }
        }

        pub(crate) fn path_of(place: &Place) -> PathBuf {
            match place.volume {
                1 => Path::new("/boot").join(place.path.strip_prefix("/").unwrap()),
                _ => place.path.clone(),
            }
        }
    }

    impl Tree for Memory {
        fn locate(&self, path: &Path) -> Option<Place> {
            self.real(path, 20).map(|real| self.place_of(&real))
        }

        fn read(&self, place: &Place, max_bytes: u64) -> Result<Option<Vec<u8>>> {
            match self.files.get(&Self::path_of(place)) {
                Some(Node::File(bytes)) if bytes.len() as u64 > max_bytes => {
                    Err(block::Error::unsupported("too large"))
                }
                Some(Node::File(bytes)) => Ok(Some(bytes.clone())),
                _ => Ok(None),
            }
        }

        fn list(&self, path: &Path) -> Vec<(String, FileKind)> {
            self.locate(path).map(|place| self.list_at(&place)).unwrap_or_default()
        }

        fn kind(&self, path: &Path) -> Option<FileKind> {
            let parent = self.real(path.parent().unwrap_or(path), 20)?;
            let path = path.file_name().map_or(parent.clone(), |name| parent.join(name));
            self.stat(&self.place_of(&path)).map(|found| found.0)
        }

        fn link(&self, path: &Path) -> Option<PathBuf> {
            let parent = self.real(path.parent()?, 20)?;
            match self.files.get(&parent.join(path.file_name()?)) {
                Some(Node::Link(target)) => Some(target.clone()),
                _ => None,
            }
        }

        fn stat(&self, place: &Place) -> Option<(FileKind, u64)> {
            Some(match self.files.get(&Self::path_of(place))? {
                Node::File(bytes) => (FileKind::File, bytes.len() as u64),
                Node::Link(_) => (FileKind::Symlink, 0),
                Node::Directory => (FileKind::Directory, 0),
            })
        }

        fn list_at(&self, place: &Place) -> Vec<(String, FileKind)> {
            let path = Self::path_of(place);
            let within = self.files.iter().filter(|(own, _)| own.parent() == Some(&path));
            within
                .map(|(own, node)| {
                    let kind = match node {
                        Node::File(_) => FileKind::File,
                        Node::Link(_) => FileKind::Symlink,
                        Node::Directory => FileKind::Directory,
                    };
                    (own.file_name().unwrap().to_str().unwrap().to_owned(), kind)
                })
                .collect()
        }
    }
}
