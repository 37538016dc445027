//! Extended attributes (kernel documentation, "Extended Attributes"): behind the fields of the inode, or in a block that
//! inodes with the same attributes may share. Data that is kept in an inode is an attribute, too ("Inline Data").

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::inode::{FLAG_INLINE_DATA, Inode};
use super::superblock::field;
use super::volume::Volume;
use crate::bytes::{byte, copy_to, corrupt, le16, le32, part, put_le16, put_le32};
use crate::crc::crc32c;

const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry without its name.
const ENTRY: usize = 16;
const BLOCK_HEADER: usize = 32;
const BLOCK_CHECKSUM: usize = 16;
/// The most attributes of one file.
const MOST: usize = 4096;

/// Prefixes of names, by the number that stands for them.
const PREFIXES: [(u8, &[u8]); 7] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (8, b"system.richacl"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
    (7, b"system."),
];
/// The index and name of the attribute that holds data.
const INLINE: (u8, &[u8]) = (7, b"data");

/// An attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attribute {
    index: u8,
    name: Vec<u8>,
    value: Vec<u8>,
    /// The inode that holds the value, of large ones.
    value_inode: u32,
    hash: u32,
}

/// The number and the rest of a full name.
fn split(name: &[u8]) -> Result<(u8, &[u8])> {
    let found = PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // The first three are whole names.
        (prefix.ends_with(b".") != rest.is_empty()).then_some((*index, rest))
    });
    found.filter(|(_, rest)| rest.len() <= 255).ok_or_else(|| {
        Error::usage(format!("{:?} is no name of an extended attribute", String::from_utf8_lossy(name)))
    })
}

impl Attribute {
    pub(super) fn new(name: &[u8], value: &[u8]) -> Result<Self> {
        let (index, name) = split(name)?;
        let hash = hash(name, value);
        Ok(Self { index, name: name.to_vec(), value: value.to_vec(), value_inode: 0, hash })
    }

    fn is(&self, (index, name): (u8, &[u8])) -> bool {
        self.index == index && self.name == name
    }

    fn entry_len(&self) -> usize {
        (ENTRY + self.name.len()).next_multiple_of(4)
    }

    fn value_len(&self) -> usize {
        if self.value_inode == 0 { self.value.len().next_multiple_of(4) } else { 0 }
    }
}

/// The hash of a name and its value.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    let hash = name.iter().fold(0_u32, |hash, byte| hash << 5 ^ hash >> 27 ^ u32::from(*byte));
    value.chunks(4).fold(hash, |hash, piece| {
        let mut word = [0; 4];
        word[..piece.len()].copy_from_slice(piece);
        hash << 16 ^ hash >> 16 ^ u32::from_le_bytes(word)
    })
}

/// Reads entries. Offsets of values count from the start of `base`, in which entries begin at `from`.
fn parse(base: &[u8], from: usize) -> Result<Vec<Attribute>> {
    let (mut found, mut at) = (vec![], from);
    while at + 4 <= base.len() && le32(base, at) != 0 {
        let name_len = usize::from(byte(base, at));
        let (offset, size) = (usize::from(le16(base, at + 2)), le32(base, at + 8) as usize);
        let value_inode = le32(base, at + 4);
        let name = part(base, at + ENTRY, name_len).to_vec();
        let value = if value_inode == 0 { part(base, offset, size).to_vec() } else { vec![] };
        let whole = value_inode != 0 || value.len() == size;
        if name.len() < name_len || !whole || found.len() >= MOST {
            return Err(corrupt(format!("an extended attribute of {size} bytes at {offset:#x}")));
        }
        let hash = le32(base, at + 12);
        found.push(Attribute { index: byte(base, at + 1), name, value, value_inode, hash });
        at += (ENTRY + name_len).next_multiple_of(4);
    }
    Ok(found)
}

/// Writes entries from `from`, and their values before the end. `false`: they do not fit.
fn encode(base: &mut [u8], from: usize, list: &[Attribute]) -> bool {
    let entries: usize = list.iter().map(Attribute::entry_len).sum();
    let values: usize = list.iter().map(Attribute::value_len).sum();
    if from + entries + 4 + values > base.len() {
        return false;
    }
    if let Some(area) = base.get_mut(from..) {
        area.fill(0);
    }
    let (mut at, mut end) = (from, base.len());
    for one in list {
        let small = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        end -= one.value_len();
        let place = if one.value_inode == 0 && !one.value.is_empty() { end } else { 0 };
        copy_to(base, at, &[u8::try_from(one.name.len()).unwrap_or(u8::MAX), one.index]);
        put_le16(base, at + 2, small(place));
        put_le32(base, at + 4, one.value_inode);
        put_le32(base, at + 8, u32::try_from(one.value.len()).unwrap_or(u32::MAX));
        put_le32(base, at + 12, one.hash);
        copy_to(base, at + ENTRY, &one.name);
        copy_to(base, end, &one.value);
        at += one.entry_len();
    }
    true
}

impl Inode {
    /// The attributes within the inode.
    fn own_attributes(&self) -> Result<Vec<Attribute>> {
        let area = part(self.raw(), self.attribute_area()?.start, usize::MAX);
        if self.attribute_area()?.is_empty() || le32(area, 0) != MAGIC {
            return Ok(vec![]);
        }
        parse(part(area, 4, area.len()), 0)
    }

    /// Gives the inode these attributes within itself. `false`: they do not fit.
    fn set_own_attributes(&mut self, list: &[Attribute]) -> Result<bool> {
        let area = self.attribute_area()?;
        if area.len() < 8 {
            return Ok(list.is_empty());
        }
        let area = &mut self.raw_mut()[area];
        let mut base = vec![0; area.len() - 4];
        if !encode(&mut base, 0, list) {
            return Ok(false);
        }
        area.fill(0);
        if !list.is_empty() {
            put_le32(area, 0, MAGIC);
            copy_to(area, 4, &base);
        }
        Ok(true)
    }
}

impl Volume {
    /// The block of attributes of an inode, and what is in it.
    fn shared_attributes(&mut self, inode: &Inode) -> Result<Vec<Attribute>> {
        if inode.attribute_block() == 0 {
            return Ok(vec![]);
        }
        let block = self.block(inode.attribute_block())?;
        if le32(&block, 0) != MAGIC || le32(&block, 8) != 1 {
            return Err(corrupt(format!("no extended attributes in block {:#x}", inode.attribute_block())));
        }
        parse(&block, BLOCK_HEADER)
    }

    /// The value of an attribute by its full name.
    pub(super) fn attribute(&mut self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let wanted = split(name)?;
        let mut all = inode.own_attributes()?;
        all.extend(self.shared_attributes(inode)?);
        match all.into_iter().find(|one| one.is(wanted) && !one.is(INLINE)) {
            Some(one) if one.value_inode != 0 => {
                Err(Error::unsupported("the value of the attribute is kept in an inode of its own"))
            }
            found => Ok(found.map(|one| one.value)),
        }
    }

    /// Gives a new inode its attributes: as many as fit into itself, the others in a block.
    pub(super) fn set_attributes(&mut self, inode: &mut Inode, list: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        let (mut own, mut shared) = (vec![], vec![]);
        for (name, value) in list {
            own.push(Attribute::new(name, value)?);
            if !inode.set_own_attributes(&own)? {
                shared.extend(own.pop());
            }
        }
        inode.set_own_attributes(&own)?;
        if !list.is_empty() {
            self.announce_attributes()?;
        }
        if shared.is_empty() {
            return Ok(());
        }
        shared.sort_by(|one, other| {
            (one.index, one.name.len(), &one.name).cmp(&(other.index, other.name.len(), &other.name))
        });
        let mut block = vec![0; self.block_bytes()];
        if !encode(&mut block, BLOCK_HEADER, &shared) {
            return Err(Error::new(ErrorKind::NoSpace, "the extended attributes do not fit into a block"));
        }
        let number = self.take_block(self.goal_of(inode))?;
        for (at, value) in [(0, MAGIC), (4, 1), (8, 1)] {
            put_le32(&mut block, at, value);
        }
        let all = shared.iter().fold(0_u32, |all, one| all << 16 ^ all >> 16 ^ one.hash);
        put_le32(&mut block, 12, all);
        inode.set_attribute_block(number);
        self.store_attributes(number, block)
    }

    /// Says in the superblock that there are extended attributes, as Linux does with the first of them.
    fn announce_attributes(&mut self) -> Result<()> {
        const EXT_ATTR: u32 = 0x8;
        let flags = le32(&self.superblock()?, field::COMPAT);
        if !self.geometry.has_features() {
            return Err(Error::unsupported(
                "an ext file system of the first revision has no extended attributes",
            ));
        }
        if flags & EXT_ATTR != 0 {
            return Ok(());
        }
        self.edit_superblock(|raw| put_le32(raw, field::COMPAT, flags | EXT_ATTR))
    }

    fn store_attributes(&mut self, number: u64, mut block: Vec<u8>) -> Result<()> {
        if self.geometry.has_checksums() {
            put_le32(&mut block, BLOCK_CHECKSUM, 0);
            let checksum = crc32c(crc32c(self.geometry.seed, &number.to_le_bytes()), &block);
            put_le32(&mut block, BLOCK_CHECKSUM, checksum);
        }
        self.staged.put(number, block)
    }

    /// Gives back the block of attributes of an inode that is removed, or one reference to it.
    pub(super) fn drop_attributes(&mut self, inode: &Inode) -> Result<()> {
        let mut all = inode.own_attributes()?;
        all.extend(self.shared_attributes(inode)?);
        if all.iter().any(|one| one.value_inode != 0) {
            return Err(Error::unsupported(
                "it has an extended attribute that is kept in an inode of its own",
            )
            .hint("Use the appliance backend for this file."));
        }
        let number = inode.attribute_block();
        if number == 0 {
            return Ok(());
        }
        let mut block = self.block(number)?.to_vec();
        match le32(&block, 4) {
            0 | 1 => self.give_back(number, 1),
            references => {
                put_le32(&mut block, 4, references - 1);
                self.store_attributes(number, block)
            }
        }
    }

    // Data that is kept in the inode.

    /// The two pieces of it: in the place of the block numbers, and in an attribute.
    pub(super) fn inline(&mut self, inode: &Inode) -> Result<(Vec<u8>, Vec<u8>)> {
        let size = to_usize(inode.size().min(1 << 20));
        let head = part(inode.block_field(), 0, size).to_vec();
        let tail = inode.own_attributes()?.into_iter().find(|one| one.is(INLINE));
        let tail = tail.map_or(vec![], |one| one.value);
        Ok((head, part(&tail, 0, size.saturating_sub(super::inode::BLOCK_FIELD_BYTES)).to_vec()))
    }

    /// Takes the data out of an inode, which then has an empty map.
    pub(super) fn drop_inline(&mut self, inode: &mut Inode) -> Result<()> {
        if inode.has(FLAG_INLINE_DATA) {
            let mut list = inode.own_attributes()?;
            list.retain(|one| !one.is(INLINE));
            inode.set_own_attributes(&list)?;
            inode.clear_map(self.geometry.has_extents());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_prefixes() {
        assert_eq!(split(b"security.selinux").unwrap(), (6, &b"selinux"[..]));
        assert_eq!(split(b"system.posix_acl_access").unwrap(), (2, &b""[..]));
        assert_eq!(split(b"system.data").unwrap(), (7, &b"data"[..]));
        for bad in [&b"selinux"[..], b"user.", b"", &[b'u'; 300]] {
            split(bad).unwrap_err();
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let list = [
            Attribute::new(b"security.selinux", b"system_u:object_r:etc_t:s0\0").unwrap(),
            Attribute::new(b"user.x", b"").unwrap(),
            Attribute::new(b"system.posix_acl_access", &[7; 9]).unwrap(),
        ];
        for from in [0, 32] {
            let mut base = vec![0xaa; 180];
            assert!(encode(&mut base, from, &list));
            assert_eq!(parse(&base, from).unwrap(), list);
        }
        assert!(!encode(&mut [0; 100], 0, &list));
    }

    #[test]
    fn damaged_entries_are_errors() {
        let mut base = vec![0; 64];
        assert!(encode(&mut base, 0, &[Attribute::new(b"user.x", b"value").unwrap()]));
        for (at, value) in [(0, 255), (3, 1), (10, 1)] {
            let mut bad = base.clone();
            bad[at] = value;
            assert!(parse(&bad, 0).is_err(), "{at}");
        }
    }
}
