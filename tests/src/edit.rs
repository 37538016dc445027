//! File systems that are changed: a model of what should be in them, operations at random, and the judgement of their own
//! tools.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::raw::{Raw, RawOptions};
use block::testing::Random;
use block::{BlockDevice, ErrorKind};
use guestedit::{Attributes, GuestFs, Options};

use crate::command::Cmd;
use crate::dir::Dir;

/// The time of all changes.
pub const NOW: i64 = 1_700_000_000;

/// A raw image in a file, to be changed.
pub fn device(path: &Path) -> Arc<dyn BlockDevice> {
    let file = HostFile::open(path, &FileOptions::read_write()).unwrap();
    Arc::new(Raw::open(Arc::new(file), RawOptions::default()).unwrap())
}

/// What an image holds, to be changed.
///
/// # Errors
/// As [`guestedit::open`].
pub fn try_open(path: &Path) -> block::Result<Box<dyn GuestFs>> {
    guestedit::open(device(path), &Options { time: Some(NOW) })
}

/// What an image holds, to be changed.
pub fn open(path: &Path) -> Box<dyn GuestFs> {
    try_open(path).unwrap_or_else(|error| panic!("{error:?}"))
}

/// The extended attribute that all files get.
pub const LABEL: &[u8] = b"system_u:object_r:etc_t:s0\0";

/// What should be of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A file: its bytes, mode and owner.
    File(Vec<u8>, u32, u32),
    /// A directory.
    Directory,
    /// A link.
    Link(PathBuf),
}

/// Something to be done to a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A file of so many bytes.
    Create(PathBuf, usize),
    /// So many other bytes.
    Replace(PathBuf, usize),
    /// A directory.
    Mkdir(PathBuf),
    /// A link.
    Symlink(PathBuf, PathBuf),
    /// The end of something.
    Remove(PathBuf),
    /// Everything to the device.
    Sync,
    /// Closed and opened again.
    Reopen,
}

/// What should be in a file system.
#[derive(Debug, Default)]
pub struct Model {
    /// By path.
    pub nodes: BTreeMap<PathBuf, Node>,
    /// The file system has no extended attributes.
    pub plain: bool,
    seed: u64,
}

impl Model {
    /// An operation that makes sense, most of the time. `links`: the file system has symbolic links.
    pub fn propose(&self, random: &mut Random, largest: u64, links: bool) -> Op {
        let fresh = self.fresh_path(random);
        let existing = self.pick(random, |_| true);
        match (random.below(20), existing) {
            (0..=6, _) => Op::Create(fresh, size(random, largest)),
            (7..=10, _) => match self.pick(random, |node| matches!(node, Node::File(..))) {
                Some(path) => Op::Replace(path, size(random, largest)),
                None => Op::Create(fresh, size(random, largest)),
            },
            (11..=13, _) => Op::Mkdir(fresh),
            (14..=15, _) if links => {
                let target = "x/".repeat(1 + block::num::to_usize(random.below(50)));
                Op::Symlink(fresh, target.into())
            }
            (16..=17, Some(path)) => Op::Remove(path),
            (18, _) => Op::Sync,
            (19, _) => Op::Reopen,
            _ => Op::Create(fresh, size(random, largest)),
        }
    }

    fn pick(&self, random: &mut Random, fits: impl Fn(&Node) -> bool) -> Option<PathBuf> {
        let all: Vec<_> = self.nodes.iter().filter(|(_, node)| fits(node)).map(|(path, _)| path).collect();
        let len = all.len() as u64;
        (len > 0).then(|| all[block::num::to_usize(random.below(len))].clone())
    }

    fn fresh_path(&self, random: &mut Random) -> PathBuf {
        let parent = self.pick(random, |node| matches!(node, Node::Directory)).unwrap_or_else(|| "/".into());
        let parent = if random.below(3) == 0 { "/".into() } else { parent };
        let stem = ["file", "a", "Some longer name of a file.conf", "grün", "x.y.z"];
        let stem = stem[block::num::to_usize(random.below(5))];
        parent.join(format!("{stem}-{}", random.below(10_000)))
    }

    /// Does it to the model and to the file system, which have to agree on whether it can be done. Returns `false` if
    /// there was no room for it.
    pub fn apply(&mut self, fs: &mut dyn GuestFs, op: &Op) -> bool {
        self.seed += 1;
        let like = Attributes {
            mode: 0o600 | u32::try_from(self.seed % 64).unwrap(),
            uid: u32::try_from(self.seed * 37 % 100_000).unwrap(),
            gid: 7,
            mtime: None,
            xattrs: if self.plain { vec![] } else { xattrs() },
        };
        let (result, change) = match op {
            Op::Create(path, len) => {
                let bytes = self.bytes(*len);
                let done = fs.create(path, &bytes, &like);
                (done, Some((path, Some(Node::File(bytes, like.mode, like.uid)))))
            }
            Op::Replace(path, len) => {
                let bytes = self.bytes(*len);
                let Some(Node::File(_, mode, uid)) = self.nodes.get(path) else {
                    fs.replace(path, &bytes).unwrap_err();
                    return true;
                };
                (fs.replace(path, &bytes), Some((path, Some(Node::File(bytes, *mode, *uid)))))
            }
            Op::Mkdir(path) => (fs.mkdir(path, &like), Some((path, Some(Node::Directory)))),
            Op::Symlink(path, target) => {
                (fs.symlink(path, target, &like), Some((path, Some(Node::Link(target.clone())))))
            }
            Op::Remove(path) => (fs.remove(path), Some((path, None))),
            Op::Sync | Op::Reopen => (fs.sync(), None),
        };
        let Some((path, node)) = change else {
            result.unwrap();
            return true;
        };
        if let Err(error) = result {
            if error.kind() == ErrorKind::NoSpace {
                return false;
            }
            assert!(!self.is_possible(op), "{op:?}: {error:?}");
            return true;
        }
        assert!(self.is_possible(op), "{op:?} should have failed");
        match node {
            Some(node) => drop(self.nodes.insert(path.clone(), node)),
            None => drop(self.nodes.remove(path)),
        }
        true
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Random::new(self.seed).fill(&mut bytes);
        bytes
    }

    fn is_possible(&self, op: &Op) -> bool {
        match op {
            Op::Create(path, _) | Op::Mkdir(path) | Op::Symlink(path, _) => {
                let parent = path.parent().unwrap();
                let has_parent = parent == Path::new("/") || self.nodes.get(parent) == Some(&Node::Directory);
                has_parent && !self.nodes.contains_key(path)
            }
            Op::Remove(path) => {
                self.nodes.contains_key(path) && !self.nodes.keys().any(|other| other.parent() == Some(path))
            }
            Op::Replace(path, _) => matches!(self.nodes.get(path), Some(Node::File(..))),
            Op::Sync | Op::Reopen => true,
        }
    }

    /// Compares with what the file system says itself.
    #[track_caller]
    pub fn compare(&self, fs: &mut dyn GuestFs, unix: bool) {
        for (path, node) in &self.nodes {
            let stat = fs.stat(path).unwrap().unwrap_or_else(|| panic!("{} is missing", path.display()));
            if !self.plain {
                assert_eq!(fs.xattr(path, "security.selinux").unwrap().as_deref(), Some(LABEL));
            }
            match node {
                Node::File(bytes, mode, uid) => {
                    assert!(fs.read(path, 1 << 30).unwrap() == *bytes, "{}", path.display());
                    if unix {
                        assert_eq!(
                            (stat.mode, stat.uid, stat.mtime),
                            (*mode, *uid, NOW),
                            "{}",
                            path.display()
                        );
                    }
                }
                Node::Directory => {
                    let mut listed: Vec<_> =
                        fs.list(path).unwrap().into_iter().map(|entry| path.join(entry.name)).collect();
                    listed.sort();
                    let expected = self.nodes.keys().filter(|other| other.parent() == Some(path));
                    assert!(listed.iter().eq(expected), "{}: {listed:?}", path.display());
                }
                Node::Link(target) => assert_eq!(fs.read_link(path).unwrap(), *target),
            }
        }
    }

    /// Compares with a folder that another tool has filled.
    #[track_caller]
    pub fn compare_folder(&self, root: &Path, unix: bool) {
        for (path, node) in &self.nodes {
            let host = root.join(path.strip_prefix("/").unwrap());
            let found = host.symlink_metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            match node {
                Node::File(bytes, mode, uid) => {
                    assert!(std::fs::read(&host).unwrap() == *bytes, "{}", path.display());
                    if unix {
                        let facts = (found.mode() & 0o7777, found.uid(), found.mtime());
                        assert_eq!(facts, (*mode, *uid, NOW), "{}", path.display());
                    }
                }
                Node::Directory => assert!(found.is_dir(), "{}", path.display()),
                Node::Link(target) => assert_eq!(std::fs::read_link(&host).unwrap(), *target),
            }
        }
    }
}

fn xattrs() -> Vec<(Vec<u8>, Vec<u8>)> {
    vec![(b"security.selinux".to_vec(), LABEL.to_vec())]
}

fn size(random: &mut Random, largest: u64) -> usize {
    let limit = match random.below(4) {
        0 => 1,
        1 => 200,
        2 => 20_000.min(largest),
        _ => largest,
    };
    block::num::to_usize(random.below(limit.max(1)))
}

/// Expects that e2fsck finds nothing wrong.
#[track_caller]
pub fn e2fsck(dir: &Dir, disk: &str, story: &dyn std::fmt::Debug) {
    let ran = Cmd::new("e2fsck").words("-fn").arg(disk).dir(dir.path()).run();
    assert!(ran.code == Some(0), "{story:?}\n{}", ran.story());
}

/// Expects that debugfs finds what the model says.
#[track_caller]
pub fn debugfs(dir: &Dir, disk: &str, model: &Model) {
    let _ = std::fs::remove_dir_all(dir.file("dumped"));
    std::fs::create_dir(dir.file("dumped")).unwrap();
    Cmd::new("debugfs").arg("-R").arg("rdump / dumped").arg(disk).dir(dir.path()).ok();
    let _ = std::fs::remove_dir(dir.file("dumped/lost+found"));
    model.compare_folder(&dir.file("dumped"), true);
}
