//! FAT12, FAT16 and FAT32 with long names (Microsoft, "FAT: General Overview of On-Disk Format", version 1.03).
//!
//! ```text
//!   Fat       paths and operations          (this file)
//!    |
//!   Volume    directories (record), chains of clusters, what is free (table)
//!    |
//!   Staged    changed sectors, in memory until they are synced
//! ```
//!
//! A file gets its new contents in a new chain, and the old one is freed when no directory on the device refers to it any
//! more. There are no owners, modes or attributes here, but for one bit against writing; a mark that says that the file
//! system is mounted stays as it is, and is told of.

mod record;
mod table;

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;

use crate::GuestFs;
use crate::bytes::{corrupt, low32, part};
use crate::types::{Attributes, Clock, DirEntry, Free, Stat};
use record::{Entry, FREE, RECORD, Record};
use table::Volume;

/// The most bytes of a directory: the specification has 65,536 records.
const MOST_DIRECTORY: u64 = 2 << 20;
/// The most names of a path.
const MOST_NAMES: usize = 4096;

/// A FAT file system that is changed.
#[derive(Debug)]
pub(crate) struct Fat {
    volume: Volume,
}

/// A directory: its first cluster (0: the root of FAT12 and FAT16), the sectors it has, and their bytes.
#[derive(Debug)]
struct Directory {
    cluster: u32,
    is_root: bool,
    sectors: Vec<u64>,
    bytes: Vec<u8>,
}

/// What a path leads to.
enum Place {
    Root,
    Entry(Directory, Entry),
}

fn about<T>(result: Result<T>, path: &Path) -> Result<T> {
    result.context(|| path.display().to_string())
}

fn not_found() -> Error {
    Error::new(ErrorKind::NotFound, "no such file or directory")
}

impl Volume {
    fn root(&mut self) -> Result<Directory> {
        if self.shape.is_wide() {
            return self.directory(self.shape.root_cluster, true);
        }
        let (first, count) = self.shape.root;
        self.load(0, true, (first..first + count).collect())
    }

    fn directory(&mut self, cluster: u32, is_root: bool) -> Result<Directory> {
        let chain = self.chain(cluster, MOST_DIRECTORY)?;
        let mut sectors = vec![];
        for cluster in chain {
            let first = self.shape.sector_of(cluster)?;
            sectors.extend(first..first + self.shape.cluster_sectors);
        }
        self.load(cluster, is_root, sectors)
    }

    fn load(&mut self, cluster: u32, is_root: bool, sectors: Vec<u64>) -> Result<Directory> {
        let mut bytes = vec![];
        for sector in &sectors {
            bytes.extend_from_slice(&self.staged.get(*sector)?);
        }
        Ok(Directory { cluster, is_root, sectors, bytes })
    }

    /// Stores the records from `first` on, as many as `bytes` are.
    fn store(&mut self, directory: &mut Directory, first: usize, bytes: &[u8]) -> Result<()> {
        let size = to_usize(self.shape.sector_bytes);
        for (index, record) in (first..).zip(bytes.chunks(RECORD)) {
            let at = index * RECORD;
            let sector =
                directory.sectors.get(at / size).ok_or_else(|| corrupt("a record outside its directory"))?;
            crate::bytes::copy_to(self.staged.edit(*sector)?, at % size, record);
            crate::bytes::copy_to(&mut directory.bytes, at, record);
        }
        Ok(())
    }

    /// Where a path leads. `None`: there is nothing.
    fn find(&mut self, path: &Path) -> Result<Option<Place>> {
        let mut names: Vec<String> = vec![];
        for component in path.components() {
            match component {
                Component::Normal(name) => names.push(name.to_string_lossy().into_owned()),
                Component::ParentDir => drop(names.pop()),
                _ => {}
            }
        }
        if names.len() > MOST_NAMES {
            return Err(Error::unsupported("too far to go"));
        }
        let Some(last) = names.pop() else { return Ok(Some(Place::Root)) };
        let mut here = self.root()?;
        for name in names {
            let Some(entry) = entry_of(&here, &name) else { return Ok(None) };
            if !entry.record.is_directory() {
                return Ok(None);
            }
            here = self.directory(entry.record.cluster(self.shape.is_wide()), false)?;
        }
        let entry = entry_of(&here, &last);
        Ok(entry.map(|entry| Place::Entry(here, entry)))
    }

    /// The entry of a path, which is not the root.
    fn existing(&mut self, path: &Path) -> Result<(Directory, Entry)> {
        match self.find(path)? {
            Some(Place::Entry(directory, entry)) => Ok((directory, entry)),
            Some(Place::Root) => Err(Error::usage("the root directory")),
            None => Err(not_found()),
        }
    }

    /// The directory that a path names.
    fn opened(&mut self, path: &Path) -> Result<Directory> {
        match self.find(path)? {
            Some(Place::Root) => self.root(),
            Some(Place::Entry(_, entry)) if entry.record.is_directory() => {
                self.directory(entry.record.cluster(self.shape.is_wide()), false)
            }
            Some(Place::Entry(..)) => Err(Error::usage("not a directory")),
            None => Err(not_found()),
        }
    }

    fn contents(&mut self, path: &Path, max: u64) -> Result<Vec<u8>> {
        let (_, entry) = self.existing(path)?;
        let size = entry.record.size();
        if entry.record.is_directory() {
            return Err(Error::usage("not a regular file"));
        }
        if size > max {
            return Err(Error::unsupported(format!("{size} bytes, more than the {max} that are read")));
        }
        let chain = self.chain_of(entry.record.cluster(self.shape.is_wide()), size)?;
        self.read_chain(&chain, size)
    }

    fn replace(&mut self, path: &Path, bytes: &[u8], in_place: bool) -> Result<()> {
        let (mut directory, entry) = self.existing(path)?;
        let mut record = entry.record;
        if record.is_directory() {
            return Err(Error::usage("not a regular file"));
        }
        let first = record.cluster(self.shape.is_wide());
        let mut old = if first == 0 { vec![] } else { self.chain(first, u64::MAX)? };
        let needed = clusters(self, bytes)?;
        let kept = if in_place { old.len().min(to_usize(needed)) } else { 0 };
        let surplus = old.split_off(kept);
        let chain = self.extend(old, needed - kept as u64)?;
        self.give_back(&surplus)?;
        record.set_cluster(chain.first().copied().unwrap_or(0));
        record.set_size(low32(bytes.len() as u64));
        record.touch(self.clock.now());
        self.store(&mut directory, entry.last, record.raw())?;
        self.write_chain(&chain, bytes)
    }

    fn make(&mut self, path: &Path, bytes: &[u8], like: &Attributes, is_directory: bool) -> Result<()> {
        let name = path.file_name().ok_or_else(|| Error::usage("a path that does not end with a name"))?;
        let name = name.to_str().ok_or_else(|| Error::usage("a name that is not UTF-8"))?;
        record::check_name(name)?;
        let parent = self.opened(path.parent().unwrap_or(Path::new("/")));
        // Whoever makes something below a file misses a directory there.
        let mut parent =
            parent.map_err(|error| if error.kind() == ErrorKind::Usage { not_found() } else { error })?;
        if entry_of(&parent, name).is_some() {
            return Err(Error::usage("there is something of this name already"));
        }
        let needed = if is_directory { 1 } else { clusters(self, bytes)? };
        let chain = self.extend(vec![], needed)?;
        let first = chain.first().copied().unwrap_or(0);
        if is_directory {
            self.first_records(first, &parent)?;
        } else {
            self.write_chain(&chain, bytes)?;
        }
        let taken: Vec<_> =
            record::entries(&parent.bytes).0.iter().map(|entry| entry.record.name()).collect();
        let (now, writable) = (self.clock.now(), like.mode & 0o200 != 0);
        let records = record::records(name, &taken, |short| {
            let mut record = Record::create(short, is_directory, writable, like.mtime.unwrap_or(now));
            record.set_cluster(first);
            record.set_size(if is_directory { 0 } else { low32(bytes.len() as u64) });
            record
        })?;
        self.add(&mut parent, &records)
    }

    /// The cluster of a new directory.
    fn first_records(&mut self, cluster: u32, parent: &Directory) -> Result<()> {
        let size = to_usize(self.shape.sector_bytes);
        let first = self.shape.sector_of(cluster)?;
        for sector in first..first + self.shape.cluster_sectors {
            self.staged.put(sector, vec![0; size])?;
            self.fresh.insert(sector);
        }
        let now = self.clock.now();
        let mut own = Record::create(*b".          ", true, true, now);
        own.set_cluster(cluster);
        let mut above = Record::create(*b"..         ", true, true, now);
        above.set_cluster(if parent.is_root { 0 } else { parent.cluster });
        let sector = self.staged.edit(first)?;
        crate::bytes::copy_to(sector, 0, own.raw());
        crate::bytes::copy_to(sector, RECORD, above.raw());
        Ok(())
    }

    /// Adds records to a directory, next to each other.
    fn add(&mut self, directory: &mut Directory, records: &[u8]) -> Result<()> {
        let count = records.len() / RECORD;
        loop {
            let end = record::entries(&directory.bytes).1;
            let room = directory.bytes.len() / RECORD;
            let is_free = |index: usize| index >= end || directory.bytes[index * RECORD] == FREE;
            let mut run = 0;
            let found = (0..room).find_map(|index| {
                run = if is_free(index) { run + 1 } else { 0 };
                (run == count).then(|| index + 1 - count)
            });
            if let Some(first) = found {
                self.store(directory, first, records)?;
                let after = first + count;
                // What lies behind the end is not known to be empty.
                if after > end && after < room && !record::is_end(part(&directory.bytes, after * RECORD, 1)) {
                    self.store(directory, after, &[0; RECORD])?;
                }
                return Ok(());
            }
            self.grow(directory)?;
        }
    }

    fn grow(&mut self, directory: &mut Directory) -> Result<()> {
        let full = directory.bytes.len() as u64 + self.shape.cluster_bytes() > MOST_DIRECTORY;
        if directory.cluster == 0 || full {
            return Err(Error::new(ErrorKind::NoSpace, "the directory has no room for more names"));
        }
        // Records behind the end become visible when the end moves.
        let (end, room) = (record::entries(&directory.bytes).1, directory.bytes.len() / RECORD);
        let mut unused = vec![0; (room - end) * RECORD];
        unused.chunks_mut(RECORD).for_each(|record| record[0] = FREE);
        self.store(directory, end, &unused)?;
        let chain = self.chain(directory.cluster, MOST_DIRECTORY)?;
        let chain = self.extend(chain, 1)?;
        let first = self.shape.sector_of(chain.last().copied().unwrap_or(0))?;
        for sector in first..first + self.shape.cluster_sectors {
            self.staged.put(sector, vec![0; to_usize(self.shape.sector_bytes)])?;
            self.fresh.insert(sector);
            directory.sectors.push(sector);
        }
        directory.bytes.resize(directory.bytes.len() + to_usize(self.shape.cluster_bytes()), 0);
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        let (mut directory, entry) = self.existing(path)?;
        let first = entry.record.cluster(self.shape.is_wide());
        let chain = if first == 0 { vec![] } else { self.chain(first, u64::MAX)? };
        if entry.record.is_directory() {
            let inside = self.directory(first, false)?;
            if !record::entries(&inside.bytes).0.is_empty() {
                return Err(Error::usage("the directory is not empty"));
            }
        }
        for index in entry.first..=entry.last {
            let mut raw = part(&directory.bytes, index * RECORD, RECORD).to_vec();
            crate::bytes::copy_to(&mut raw, 0, &[FREE]);
            self.store(&mut directory, index, &raw)?;
        }
        self.give_back(&chain)
    }
}

fn entry_of(directory: &Directory, name: &str) -> Option<Entry> {
    record::entries(&directory.bytes).0.into_iter().find(|entry| entry.is(name))
}

/// How many clusters a file of these bytes needs.
fn clusters(volume: &Volume, bytes: &[u8]) -> Result<u64> {
    let len = bytes.len() as u64;
    if len > u64::from(u32::MAX) {
        return Err(Error::unsupported(format!("a file of {len} bytes on FAT")));
    }
    Ok(len.div_ceil(volume.shape.cluster_bytes()))
}

impl Fat {
    pub(crate) fn open(device: Arc<dyn BlockDevice>, clock: Clock) -> Result<Self> {
        Ok(Self { volume: Volume::open(device, clock)? })
    }

    /// Carries out an operation, as a whole or not at all.
    fn change(&mut self, mut operation: impl FnMut(&mut Volume) -> Result<()>) -> Result<()> {
        let mut result = operation(&mut self.volume);
        let full = matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace);
        if full && self.volume.has_given_back() {
            self.volume.abandon();
            self.volume.write()?;
            result = operation(&mut self.volume);
        }
        match result {
            Ok(()) => self.volume.accept(),
            Err(_) => self.volume.abandon(),
        }
        result
    }
}

impl GuestFs for Fat {
    fn kind(&self) -> Kind {
        Kind::Vfat
    }

    fn backend(&self) -> &'static str {
        "fat"
    }

    fn notes(&self) -> Vec<String> {
        self.volume.notes.clone()
    }

    fn stat(&mut self, path: &Path) -> Result<Option<Stat>> {
        let found = about(self.volume.find(path), path)?;
        let size = self.volume.shape.sector_bytes;
        Ok(found.map(|place| match place {
            Place::Root => {
                let kind = FileKind::Directory;
                Stat { kind, mode: 0o755, uid: 0, gid: 0, size: 0, mtime: 0, links: 1, node: 0 }
            }
            Place::Entry(directory, entry) => {
                let at = (entry.last * RECORD) as u64;
                let sector = directory.sectors.get(to_usize(at / size)).copied().unwrap_or(0);
                entry.record.stat(sector * size + at % size)
            }
        }))
    }

    fn read(&mut self, path: &Path, max: u64) -> Result<Vec<u8>> {
        about(self.volume.contents(path, max), path)
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf> {
        about(self.volume.existing(path).and_then(|_| Err(Error::usage("not a symbolic link"))), path)
    }

    fn list(&mut self, path: &Path) -> Result<Vec<DirEntry>> {
        let directory = about(self.volume.opened(path), path)?;
        let kind =
            |entry: &Entry| if entry.record.is_directory() { FileKind::Directory } else { FileKind::File };
        let entries = record::entries(&directory.bytes).0;
        Ok(entries.iter().map(|entry| DirEntry { name: entry.name().into(), kind: kind(entry) }).collect())
    }

    fn replace(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut result = self.change(|volume| volume.replace(path, bytes, false));
        if matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace) {
            // There may be room if the old clusters are used again.
            result = self.change(|volume| volume.replace(path, bytes, true));
        }
        about(result, path)
    }

    fn create(&mut self, path: &Path, bytes: &[u8], like: &Attributes) -> Result<()> {
        about(self.change(|volume| volume.make(path, bytes, like, false)), path)
    }

    fn mkdir(&mut self, path: &Path, like: &Attributes) -> Result<()> {
        about(self.change(|volume| volume.make(path, &[], like, true)), path)
    }

    fn symlink(&mut self, path: &Path, _target: &Path, _like: &Attributes) -> Result<()> {
        let error = Error::unsupported("there are no symbolic links on FAT").hint("Copy the file instead.");
        about(Err(error), path)
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        about(self.change(|volume| volume.remove(path)), path)
    }

    fn xattr(&mut self, path: &Path, _name: &str) -> Result<Option<Vec<u8>>> {
        match about(self.volume.find(path), path)? {
            Some(_) => Ok(None),
            None => about(Err(not_found()), path),
        }
    }

    fn free(&mut self) -> Result<Free> {
        let clusters = self.volume.free_clusters()?;
        Ok(Free { bytes: clusters * self.volume.shape.cluster_bytes(), inodes: None })
    }

    fn sync(&mut self) -> Result<()> {
        self.volume.write()
    }
}
