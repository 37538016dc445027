//! From paths to nodes: names are looked up one by one, symbolic links followed, with limits to both.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};

use super::FileSystem;
use super::node::{FileKind, Node};

/// Symbolic links that are followed for one path: as many as Linux follows.
const MOST_LINKS: u32 = 40;
/// Names in one path, those that links bring included.
const MOST_NAMES: u32 = 4096;

/// Pages that may be read to find one path. A directory of a million names has about ten thousand.
const MOST_WORK: u64 = 1 << 20;

/// Where a path leads.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) node: Node,
    /// The way there without symbolic links.
    pub(super) path: PathBuf,
}

/// Says which file an error is about.
pub(super) fn about<T>(result: Result<T>, path: &Path) -> Result<T> {
    result.context(|| path.display().to_string())
}

fn not_found(path: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("{}: no such file or directory", path.display()))
}

impl FileSystem {
    /// Where a path leads, all links followed.
    pub(super) fn locate(&self, path: &Path) -> Result<Place> {
        self.follow(path, true)
    }

    /// Where a path leads, but for a link at its end.
    pub(super) fn locate_link(&self, path: &Path) -> Result<Place> {
        self.follow(path, false)
    }

    fn follow(&self, path: &Path, last: bool) -> Result<Place> {
        // Names that are still to come, the next one last.
        let mut names: Vec<_> = names_of(path).collect();
        // The directories on the way, for `..`.
        let mut way = vec![(self.nodes.root(), FileKind::Directory)];
        let mut real = PathBuf::from("/");
        let (mut links, mut steps) = (0, 0);
        let work = self.nodes.work();
        while let Some(name) = names.pop() {
            steps += 1;
            if steps > MOST_NAMES || self.nodes.work() - work > MOST_WORK {
                return Err(Error::unsupported(format!("{}: too far to go", path.display())));
            }
            if name == ".." {
                if way.len() > 1 {
                    way.pop();
                    real.pop();
                }
                continue;
            }
            let (here, kind) = way[way.len() - 1];
            if kind != FileKind::Directory {
                return Err(Error::new(ErrorKind::NotFound, format!("{}: not a directory", path.display())));
            }
            let entry =
                about(self.nodes.lookup(here, name.as_bytes()), path)?.ok_or_else(|| not_found(path))?;
            let kind = match entry.kind {
                FileKind::Unknown => about(self.nodes.metadata(entry.node), path)?.kind,
                known => known,
            };
            if kind != FileKind::Symlink || names.is_empty() && !last {
                way.push((entry.node, kind));
                real.push(OsStr::from_bytes(&entry.name));
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Error::unsupported(format!("{}: too many symbolic links", path.display())));
            }
            let target = about(self.nodes.read_link(entry.node), path)?;
            let target = Path::new(OsStr::from_bytes(&target));
            if target.has_root() {
                way.truncate(1);
                real = PathBuf::from("/");
            }
            names.extend(names_of(target));
        }
        Ok(Place { node: way[way.len() - 1].0, path: real })
    }
}

/// The names of a path, the last first; `..` is one of them.
fn names_of(path: &Path) -> impl Iterator<Item = std::ffi::OsString> {
    path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    })
}
