//! Directories: finding, adding and removing names.
//!
//! Names are found by reading all blocks: the nodes of a hash tree look empty to that. Only adding a name needs the tree
//! ([`super::index`]), because the hash decides where it belongs.

use block::num::to_usize;
use block::{Error, Result};
use guestdisk::fs::FileKind;

use super::inode::{FLAG_INDEX, FLAG_INLINE_DATA, Inode};
use super::map::{Map, Run};
use super::records::{self, Named, Record};
use super::volume::Volume;
use crate::bytes::{corrupt, le32, low32, part, put_le32};
use crate::crc::crc32c;

/// The most bytes of a directory that are looked through.
const MOST_BYTES: u64 = 256 << 20;
const MOST_NAME: usize = 255;

/// What visits records: their block on the device (`None`: they are in the inode), and their name. Whether to go on.
type See<'a> = &'a mut dyn FnMut(Option<u64>, Record, &[u8]) -> bool;

/// Where a name was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) inode: u64,
    /// Block on the device; `None`: the names are in the inode.
    block: Option<u64>,
    at: usize,
}

/// The byte for what a name is the name of.
pub(super) fn kind_byte(kind: FileKind) -> u8 {
    match kind {
        FileKind::File => 1,
        FileKind::Directory => 2,
        FileKind::CharDevice => 3,
        FileKind::BlockDevice => 4,
        FileKind::Fifo => 5,
        FileKind::Socket => 6,
        FileKind::Symlink => 7,
        FileKind::Unknown => 0,
    }
}

pub(super) fn kind_of(byte: u8) -> FileKind {
    use FileKind::{BlockDevice, CharDevice, Directory, Fifo, File, Socket, Symlink};
    let kinds = [File, Directory, CharDevice, BlockDevice, Fifo, Socket, Symlink];
    usize::from(byte).checked_sub(1).and_then(|index| kinds.get(index).copied()).unwrap_or(FileKind::Unknown)
}

/// Refuses what cannot be a name.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    let fine = (1..=MOST_NAME).contains(&name.len())
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
        && !matches!(name, b"." | b"..");
    let shown = String::from_utf8_lossy(name);
    if fine { Ok(()) } else { Err(Error::usage(format!("{shown:?} cannot be a name of a file"))) }
}

impl Volume {
    /// Visits the names of a directory, `.` and `..` included, until it has been enough.
    pub(super) fn visit(&mut self, dir: &Inode, see: See<'_>) -> Result<()> {
        if dir.kind() != FileKind::Directory {
            return Err(Error::new(block::ErrorKind::NotFound, "not a directory"));
        }
        dir.check_readable()?;
        if dir.has(FLAG_INLINE_DATA) {
            return self.visit_inline(dir, see);
        }
        let map = self.map(dir)?;
        let blocks = dir.size().min(MOST_BYTES).div_ceil(self.geometry.block);
        for run in map.runs.iter().filter(|run| !run.unwritten) {
            for index in 0..run.len.min(blocks.saturating_sub(run.logical)) {
                let number = run.start + index;
                let block = self.block(number)?;
                for record in records::records(&block, block.len())? {
                    if record.inode != 0 && !see(Some(number), record, record.name(&block)) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Names within the inode: four bytes with the parent, then records; more of them in an attribute ("Inline Data").
    fn visit_inline(&mut self, dir: &Inode, see: See<'_>) -> Result<()> {
        let (head, tail) = self.inline(dir)?;
        for piece in [part(&head, 4, head.len()), &tail] {
            for record in records::records(piece, piece.len())? {
                if record.inode != 0 && !see(None, record, record.name(piece)) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Finds a name.
    pub(super) fn lookup(&mut self, dir: &Inode, name: &[u8]) -> Result<Option<Found>> {
        let mut found = None;
        self.visit(dir, &mut |block, record, own| {
            if own == name {
                found = Some(Found { inode: record.inode.into(), block, at: record.at });
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// Whether there is nothing in a directory.
    pub(super) fn is_empty(&mut self, dir: &Inode) -> Result<bool> {
        let mut empty = true;
        self.visit(dir, &mut |_, _, name| {
            empty = matches!(name, b"." | b"..");
            empty
        })?;
        Ok(empty)
    }

    /// Where names end in a block: before the record for the checksum.
    pub(super) fn names_end(&self, block: &[u8]) -> Result<usize> {
        if !self.geometry.has_checksums() {
            return Ok(block.len());
        }
        if !records::has_tail(block) {
            return Err(corrupt("a directory block without a place for its checksum"));
        }
        Ok(block.len() - records::TAIL)
    }

    /// Where names end in a new block.
    pub(super) fn new_names_end(&self) -> usize {
        self.block_bytes() - if self.geometry.has_checksums() { records::TAIL } else { 0 }
    }

    /// Stores a block of names with its checksum.
    pub(super) fn store_names(&mut self, dir: &Inode, number: u64, mut block: Vec<u8>) -> Result<()> {
        if self.geometry.has_checksums() {
            let end = block.len() - records::TAIL;
            let checksum = crc32c(self.seed_of(dir), part(&block, 0, end));
            put_le32(&mut block, end + 8, checksum);
        }
        self.staged.put(number, block)
    }

    /// A new block of these names, which have to fit.
    pub(super) fn new_names(&self, names: &[Named]) -> Result<Vec<u8>> {
        let block = records::fill(self.block_bytes(), self.new_names_end(), names);
        let mut block = block.ok_or_else(|| Error::unsupported("more names than a block can hold"))?;
        if self.geometry.has_checksums() {
            records::write_tail(&mut block);
        }
        Ok(block)
    }

    /// Adds a name, which is not there yet. The directory is stored.
    pub(super) fn add_name(
        &mut self,
        dir: &mut Inode,
        name: &[u8],
        inode: u64,
        kind: FileKind,
    ) -> Result<()> {
        dir.check_directory()?;
        let byte = if self.geometry.has_file_types() { kind_byte(kind) } else { 0 };
        let named = Named { inode: low32(inode), kind: byte, name: name.to_vec() };
        if dir.has(FLAG_INLINE_DATA) {
            self.expand(dir)?;
        }
        if dir.has(FLAG_INDEX) {
            self.add_indexed(dir, &named)?;
        } else {
            self.add_linear(dir, &named)?;
        }
        dir.touch(self.clock.now());
        self.store(dir)
    }

    /// Puts a name into a block if there is room.
    pub(super) fn add_to(&mut self, dir: &Inode, number: u64, named: &Named) -> Result<bool> {
        let mut block = self.block(number)?.to_vec();
        let end = self.names_end(&block)?;
        if !records::insert(&mut block, end, named.inode, named.kind, &named.name)? {
            return Ok(false);
        }
        self.store_names(dir, number, block)?;
        Ok(true)
    }

    fn add_linear(&mut self, dir: &mut Inode, named: &Named) -> Result<()> {
        let map = self.map(dir)?;
        let blocks: Vec<_> = map.runs.iter().flat_map(|run| run.start..run.start + run.len).collect();
        // Most often there is room in the last one.
        for number in blocks.into_iter().rev() {
            if self.add_to(dir, number, named)? {
                return Ok(());
            }
        }
        let block = self.new_names(std::slice::from_ref(named))?;
        let (_, number) = self.append_block(dir, map)?;
        self.store_names(dir, number, block)
    }

    /// Gives a directory one more block. Returns its number in the directory and on the device.
    pub(super) fn append_block(&mut self, dir: &mut Inode, map: Map) -> Result<(u64, u64)> {
        let logical = dir.size() / self.geometry.block;
        let last = map.runs.last().copied();
        if last.is_some_and(|last| last.logical + last.len > logical) || dir.size() >= MOST_BYTES {
            return Err(corrupt(format!("a directory of {} bytes that has more blocks", dir.size())));
        }
        let goal = last.map_or(self.goal_of(dir), |last| last.start + last.len);
        let number = self.take_block(goal)?;
        let mut runs = map.runs;
        match runs.last_mut() {
            Some(last) if last.logical + last.len == logical && last.start + last.len == number => {
                last.len += 1;
            }
            _ => runs.push(Run { logical, start: number, len: 1, unwritten: false }),
        }
        self.build_map(dir, &runs)?;
        for block in map.meta {
            self.give_back(block, 1)?;
        }
        dir.set_size(dir.size() + self.geometry.block);
        Ok((logical, number))
    }

    /// Gives a directory that is within its inode a block.
    fn expand(&mut self, dir: &mut Inode) -> Result<()> {
        let parent = le32(dir.block_field(), 0);
        let mut names = vec![
            Named { inode: low32(dir.number), kind: kind_byte(FileKind::Directory), name: b".".to_vec() },
            Named { inode: parent, kind: kind_byte(FileKind::Directory), name: b"..".to_vec() },
        ];
        self.visit(dir, &mut |_, record, name| {
            names.push(Named { inode: record.inode, kind: record.kind, name: name.to_vec() });
            true
        })?;
        let block = self.new_names(&names)?;
        self.drop_inline(dir)?;
        dir.set_size(0);
        let (_, number) = self.append_block(dir, Map::default())?;
        self.store_names(dir, number, block)
    }

    /// The block of a new directory. The inode is not stored.
    pub(super) fn first_block(&mut self, dir: &mut Inode, parent: u64) -> Result<()> {
        let kind = if self.geometry.has_file_types() { kind_byte(FileKind::Directory) } else { 0 };
        let named = |inode, name: &[u8]| Named { inode: low32(inode), kind, name: name.to_vec() };
        let block = self.new_names(&[named(dir.number, b"."), named(parent, b"..")])?;
        let (_, number) = self.append_block(dir, Map::default())?;
        self.store_names(dir, number, block)
    }

    /// Removes a name that has been found. The directory is stored.
    pub(super) fn remove_name(&mut self, dir: &mut Inode, found: Found, name: &[u8]) -> Result<()> {
        dir.check_directory()?;
        let found = match found.block {
            Some(_) => found,
            None => {
                self.expand(dir)?;
                self.lookup(dir, name)?.ok_or_else(|| corrupt("a name was lost"))?
            }
        };
        let number = found.block.ok_or_else(|| corrupt("a directory within its inode"))?;
        let mut block = self.block(number)?.to_vec();
        let end = self.names_end(&block)?;
        records::remove(&mut block, end, found.at)?;
        self.store_names(dir, number, block)?;
        dir.touch(self.clock.now());
        self.store(dir)
    }

    /// All names of a directory but `.` and `..`.
    pub(super) fn names(&mut self, dir: &Inode) -> Result<Vec<(Vec<u8>, FileKind)>> {
        const MOST_NAMES: usize = 1 << 20;
        let (mut names, typed) = (vec![], self.geometry.has_file_types());
        self.visit(dir, &mut |_, record, name| {
            if !matches!(name, b"." | b"..") {
                names.push((name.to_vec(), if typed { kind_of(record.kind) } else { FileKind::Unknown }));
            }
            names.len() <= MOST_NAMES
        })?;
        match names.iter().find(|(name, _)| check_name(name).is_err()) {
            Some((name, _)) => {
                Err(corrupt(format!("a name that no file can have: {:?}", String::from_utf8_lossy(name))))
            }
            None if names.len() > MOST_NAMES => {
                Err(Error::unsupported(format!("a directory of more than {MOST_NAMES} names")))
            }
            None => Ok(names),
        }
    }

    /// Reads all of a file, a link or the like.
    pub(super) fn contents(&mut self, inode: &Inode, max: u64) -> Result<Vec<u8>> {
        inode.check_readable()?;
        let size = inode.size();
        if size > max {
            return Err(Error::unsupported(format!("{size} bytes, more than the {max} that are read")));
        }
        if inode.is_fast_link() {
            return Ok(part(inode.block_field(), 0, to_usize(size)).to_vec());
        }
        if inode.has(FLAG_INLINE_DATA) {
            let (mut bytes, tail) = self.inline(inode)?;
            bytes.extend(tail);
            bytes.resize(to_usize(size.min(1 << 20)), 0);
            return Ok(bytes);
        }
        let map = self.map(inode)?;
        let (mut bytes, size) = (vec![], to_usize(size));
        while bytes.len() < size {
            // Grown as the bytes come: a size is only a claim.
            let from = bytes.len();
            bytes.resize(size.min(from + (1 << 20)), 0);
            self.read_mapped(&map, &mut bytes[from..], from as u64)?;
        }
        Ok(bytes)
    }
}
