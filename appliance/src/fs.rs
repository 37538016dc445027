//! A file system that the appliance has mounted.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;
use guestedit::{Attributes, DirEntry, Free, GuestFs, Stat};

use crate::session::{Output, Session};
use crate::wire::{Action, Listing, Maybe, Message, PIECE, Ran, Room, WireAttributes, WireStat};

/// The most names of a directory, and bytes of them; as guestdisk has it.
const MOST_ENTRIES: usize = 1 << 20;
const MOST_NAME_BYTES: usize = 64 << 20;

/// A mounted file system. Its changes are made at once, by the appliance's kernel, and are durable after
/// [`sync`](GuestFs::sync) or [`Appliance::shutdown`](crate::Appliance::shutdown). Dropping it unmounts it, and undoes nothing.
#[derive(Debug)]
pub struct Mounted {
    session: Arc<Session>,
    number: u64,
    kind: Kind,
    gone: bool,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.gone {
            self.session.let_go(self.number);
        }
    }
}

impl Mounted {
    pub(crate) fn new(session: Arc<Session>, number: u64, kind: Kind) -> Self {
        Self { session, number, kind, gone: false }
    }

    /// Writes everything and lets the file system go.
    ///
    /// # Errors
    /// It could not be written; the appliance has ended.
    pub fn unmount(mut self) -> Result<()> {
        self.gone = true;
        self.session.unmount(self.number)
    }

    /// Runs a program of the guest inside the appliance, with this file system as its root, `/proc`, `/sys`, `/dev` and
    /// `/run` as it expects them, and no environment but `environment`: a stranger's program, which can do to this
    /// file system and the appliance's other disks whatever it likes. Only for users who ask for it.
    ///
    /// # Errors
    /// There is no such program; the appliance has ended.
    pub fn run(&mut self, words: &[&str], environment: &[(&str, &str)], limit: Duration) -> Result<Output> {
        let bytes = |text: &str| text.as_bytes().to_vec();
        let action = Action::Run {
            words: words.iter().map(|word| bytes(word)).collect(),
            environment: environment.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
            limit_seconds: limit.as_secs().max(1),
        };
        let Ran { code, timed_out, output } = self.session.run(self.number, action, limit)?;
        Ok(Output { code, timed_out, bytes: output })
    }

    /// Gives something an extended attribute, or another value for it.
    ///
    /// # Errors
    /// `NotFound`; the file system keeps no such attributes; the appliance has ended.
    pub fn set_xattr(&mut self, path: &Path, name: &str, value: &[u8]) -> Result<()> {
        self.act(path, Action::SetXattr { name: name.into(), value: value.into() }).map(drop)
    }

    fn act(&self, path: &Path, action: Action) -> Result<Vec<u8>> {
        self.session
            .act(self.number, path.as_os_str().as_bytes(), action)
            .context(|| path.display().to_string())
    }

    fn ask<A: Message>(&self, path: &Path, action: Action) -> Result<A> {
        A::decode(&self.act(path, action)?).map_err(|error| lie(path, &error.to_string()))
    }

    /// What is there; a regular file is expected.
    fn regular(&mut self, path: &Path) -> Result<Stat> {
        match self.stat(path)? {
            Some(stat) if stat.kind == FileKind::File => Ok(stat),
            Some(_) => Err(Error::usage(format!("{}: not a regular file", path.display()))),
            None => Err(Error::new(ErrorKind::NotFound, format!("{}: no such file", path.display()))),
        }
    }

    fn write(
        &mut self,
        path: &Path,
        create: bool,
        bytes: &[u8],
        attributes: Option<WireAttributes>,
    ) -> Result<()> {
        self.act(path, Action::Open { create })?;
        for piece in bytes.chunks(PIECE as usize) {
            self.act(path, Action::Append { bytes: piece.to_vec() })?;
        }
        self.act(path, Action::Close { attributes }).map(drop)
    }

    /// Makes a file; what has been made of it goes if it cannot be completed.
    fn make(&mut self, path: &Path, bytes: &[u8], attributes: WireAttributes) -> Result<()> {
        if self.stat(path)?.is_some() {
            return Err(exists(path));
        }
        let made = self.write(path, true, bytes, Some(attributes));
        if made.is_err() {
            // The first failure is the one to be told.
            drop(self.act(path, Action::Remove));
        }
        made
    }
}

fn exists(path: &Path) -> Error {
    Error::usage(format!("{}: there is something of this name", path.display()))
}

fn lie(path: &Path, what: &str) -> Error {
    Error::invalid(format!("{}: the appliance says {what}", path.display()))
}

/// By the type bits of `st_mode`.
fn kind_of(mode: u32) -> FileKind {
    match mode >> 12 {
        1 => FileKind::Fifo,
        2 => FileKind::CharDevice,
        4 => FileKind::Directory,
        6 => FileKind::BlockDevice,
        8 => FileKind::File,
        10 => FileKind::Symlink,
        12 => FileKind::Socket,
        _ => FileKind::Unknown,
    }
}

fn wire(attributes: &Attributes) -> WireAttributes {
    let Attributes { mode, uid, gid, mtime, xattrs } = attributes.clone();
    WireAttributes { mode: mode & 0o7777, uid, gid, mtime, xattrs }
}

impl GuestFs for Mounted {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn backend(&self) -> &'static str {
        "appliance"
    }

    fn stat(&mut self, path: &Path) -> Result<Option<Stat>> {
        let found: WireStat = match self.ask(path, Action::Stat { follow: false }) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            result => result?,
        };
        Ok(Some(Stat {
            kind: kind_of(found.mode),
            mode: found.mode & 0o7777,
            uid: found.uid,
            gid: found.gid,
            size: found.size,
            mtime: found.mtime,
            links: u32::try_from(found.links).unwrap_or(u32::MAX),
            node: found.inode,
        }))
    }

    fn read(&mut self, path: &Path, max: u64) -> Result<Vec<u8>> {
        let size = self.regular(path)?.size;
        if size > max {
            let text = format!("{}: {size} bytes, more than the {max} that are read", path.display());
            return Err(Error::unsupported(text));
        }
        let mut bytes = vec![];
        while (bytes.len() as u64) < size {
            let piece = self.act(path, Action::Read { offset: bytes.len() as u64, len: PIECE })?;
            if piece.is_empty() || piece.len() as u64 > size - bytes.len() as u64 {
                return Err(lie(path, "something else each time"));
            }
            bytes.extend(piece);
        }
        Ok(bytes)
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf> {
        Ok(OsString::from_vec(self.act(path, Action::ReadLink)?).into())
    }

    fn list(&mut self, path: &Path) -> Result<Vec<DirEntry>> {
        let (mut entries, mut bytes) = (vec![], 0);
        loop {
            let listing: Listing = self.ask(path, Action::List { skip: entries.len() as u64 })?;
            let is_empty = listing.entries.is_empty();
            for (name, mode) in listing.entries {
                let is_name = !name.is_empty() && !name.contains(&b'/') && !name.contains(&0);
                bytes += name.len();
                if !is_name || name == b"." || name == b".." {
                    return Err(lie(path, "a name that no file can have"));
                }
                if entries.len() >= MOST_ENTRIES || bytes > MOST_NAME_BYTES {
                    let text = format!("{}: a directory of more than {MOST_ENTRIES} names", path.display());
                    return Err(Error::unsupported(text));
                }
                entries.push(DirEntry { name: OsString::from_vec(name), kind: kind_of(mode) });
            }
            if !listing.more || is_empty {
                return Ok(entries);
            }
        }
    }

    fn replace(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.regular(path)?;
        self.write(path, false, bytes, None)
    }

    fn create(&mut self, path: &Path, bytes: &[u8], like: &Attributes) -> Result<()> {
        self.make(path, bytes, wire(like))
    }

    fn mkdir(&mut self, path: &Path, like: &Attributes) -> Result<()> {
        self.act(path, Action::MakeDirectory { attributes: wire(like) }).map(drop)
    }

    fn symlink(&mut self, path: &Path, target: &Path, like: &Attributes) -> Result<()> {
        let target = target.as_os_str().as_bytes();
        if target.is_empty() || target.len() > 4095 || target.contains(&0) {
            return Err(Error::usage(format!("{}: a link to {} bytes", path.display(), target.len())));
        }
        if self.stat(path)?.is_some() {
            return Err(exists(path));
        }
        self.act(path, Action::Symlink { target: target.to_vec(), attributes: wire(like) }).map(drop)
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        self.act(path, Action::Remove).map(drop)
    }

    fn xattr(&mut self, path: &Path, name: &str) -> Result<Option<Vec<u8>>> {
        let Maybe(value) = self.ask(path, Action::GetXattr { name: name.into() })?;
        Ok(value)
    }

    fn free(&mut self) -> Result<Free> {
        let Room { free_bytes, free_inodes, .. } = self.ask(Path::new("/"), Action::Free)?;
        Ok(Free { bytes: free_bytes, inodes: free_inodes })
    }

    fn sync(&mut self) -> Result<()> {
        self.act(Path::new("/"), Action::Sync).map(drop)
    }
}
