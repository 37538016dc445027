//! NTFS 1.2 to 3.1, by what is publicly known of it (Microsoft, "Master File Table" and "How NTFS Works"; the
//! documentation of the Linux-NTFS project).
//!
//! ```text
//!   boot sector --> $MFT, record 0 --> records of 1 KiB, each a list of attributes
//!                                        $DATA              a file's bytes, in the record or in runs of clusters
//!                                        $INDEX_ROOT, $INDEX_ALLOCATION, $BITMAP    a directory's names
//!                                        $ATTRIBUTE_LIST    which other records have more attributes
//!                                        $REPARSE_POINT     links, and files that a filter keeps elsewhere
//! ```
//!
//! A node is the number of its record. Names are compared as the volume's `$UpCase` says. The journal is not replayed:
//! what a volume that was not left cleanly says is what lies on the disk, which the notes tell.

mod index;
mod lznt1;
mod record;
mod stream;

use std::collections::VecDeque;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result};
use parking_lot::Mutex;

use super::node::{Entry, FileKind, GoOn, MOST_LINK, Metadata, Node, Nodes};
use super::source::Source;
use crate::bytes::{byte, corrupt, le16, le32, le64, part, read_some};
use record::{Attribute, Body, Record};
use stream::{Clusters, Stream};

/// Records by their numbers.
const LOG_FILE: u64 = 2;
const VOLUME: u64 = 3;
const ROOT: u64 = 5;
const UPCASE: u64 = 10;
/// The first record that a user's file can have.
const FIRST_FREE: u64 = 16;
/// The most bytes of a list of attributes.
const MOST_LIST: u64 = 1 << 20;
/// The most records of one file.
const MOST_RECORDS: usize = 4096;
/// The most bytes of a directory's map of blocks.
const MOST_BITMAP: u64 = 1 << 20;
/// Nodes that are remembered.
const KEPT: usize = 64;
/// From the epoch of Windows (1601) to that of Unix, in seconds.
const EPOCH: i64 = 11_644_473_600;
/// The name of a directory's index: `$I30`.
const I30: [u16; 4] = [0x24, 0x49, 0x33, 0x30];
/// Reparse points: a link to a path.
const SYMLINK: u32 = 0xa000_000c;
/// Reparse points: a junction.
const JUNCTION: u32 = 0xa000_0003;
/// Reparse points: compressed by the filter of Windows images (`compact /exe`, CompactOS).
const WOF: u32 = 0x8000_0017;
/// Reparse points: the bytes lie in a store of the deduplication filter.
const DEDUP: u32 = 0x8000_0013;

/// An NTFS file system.
#[derive(Debug)]
pub(crate) struct Ntfs {
    clusters: Clusters,
    /// Bytes of a record.
    record_bytes: u64,
    mft: Stream,
    /// The upper case of each unit of UTF-16.
    upcase: Vec<u16>,
    recent: Mutex<VecDeque<(u64, Arc<Loaded>)>>,
}

/// A node with all its attributes.
#[derive(Debug)]
struct Loaded {
    record: Record,
    attributes: Vec<Attribute>,
    data: Option<Stream>,
    /// The tag of the reparse point and its data; 0 for none.
    reparse: (u32, Vec<u8>),
}

impl Loaded {
    fn kind(&self) -> FileKind {
        match self.reparse.0 {
            SYMLINK | JUNCTION => FileKind::Symlink,
            _ if self.record.flags & 2 != 0 => FileKind::Directory,
            _ => FileKind::File,
        }
    }

    fn resident(&self, kind: u32) -> Option<&[u8]> {
        self.attributes.iter().find_map(|attribute| match &attribute.body {
            Body::Resident(bytes) if attribute.kind == kind => Some(&bytes[..]),
            _ => None,
        })
    }

    fn stream(&self, kind: u32, name: &[u16]) -> Result<Option<Stream>> {
        stream_of(&self.attributes, kind, name)
    }

    /// Why the bytes of `$DATA` are not those of the file.
    fn filtered(&self) -> Option<&'static str> {
        match self.reparse.0 {
            WOF => Some("it is compressed by a filter of Windows (CompactOS), which is not read here"),
            DEDUP => Some("its bytes are kept by the deduplication of Windows, which is not read here"),
            _ => None,
        }
    }
}

fn stream_of(attributes: &[Attribute], kind: u32, name: &[u16]) -> Result<Option<Stream>> {
    let parts: Vec<_> = attributes.iter().filter(|one| one.kind == kind && one.name == name).collect();
    if parts.is_empty() { Ok(None) } else { Stream::new(parts).map(Some) }
}

/// A size that the boot sector gives in clusters, or as a power of two with the sign turned.
fn size(field: u8, cluster: u64) -> Option<u64> {
    match field.cast_signed() {
        clusters @ 1.. => cluster.checked_mul(clusters.unsigned_abs().into()),
        power => 1_u64.checked_shl(power.unsigned_abs().into()),
    }
}

impl Ntfs {
    pub(crate) fn open(device: Arc<dyn BlockDevice>, notes: &mut Vec<String>) -> Result<Self> {
        let boot = read_some(&*device, 0, 512)?;
        let wrong = || corrupt("the boot sector is not one of an NTFS file system");
        let sector = u64::from(le16(&boot, 11));
        let per_cluster = match byte(&boot, 13) {
            few @ 0..=0x80 => u64::from(few),
            power => 1_u64.checked_shl((256 - u32::from(power)).min(63)).unwrap_or(0),
        };
        let bytes = sector.checked_mul(per_cluster).ok_or_else(wrong)?;
        let record_bytes = size(byte(&boot, 0x40), bytes).ok_or_else(wrong)?;
        let sound = matches!(sector, 512 | 1024 | 2048 | 4096)
            && bytes.is_power_of_two()
            && bytes <= 2 << 20
            && matches!(record_bytes, 512 | 1024 | 2048 | 4096);
        if !sound {
            return Err(wrong());
        }
        let count = le64(&boot, 0x28) / per_cluster;
        let count = count.min(device.size() / bytes);
        let clusters = Clusters { source: Source::new(device), bytes, count };
        let mft = Self::master(&clusters, record_bytes, le64(&boot, 0x30))?;
        let mut own = Self { clusters, record_bytes, mft, upcase: vec![], recent: Mutex::default() };
        own.upcase = own.read_upcase();
        own.look_at_state(notes);
        Ok(own)
    }

    /// The master file table: its first record says where it lies, and its list of attributes may lead to more of it.
    fn master(clusters: &Clusters, record_bytes: u64, lcn: u64) -> Result<Stream> {
        let at =
            lcn.checked_mul(clusters.bytes).ok_or_else(|| corrupt("the master file table lies nowhere"))?;
        let mut block = clusters.source.bytes(at, record_bytes)?;
        record::fix_up(&mut block, b"FILE")?;
        let first = record::parse(&block, clusters.count)?;
        let missing = || corrupt("the master file table has no data");
        let mut attributes = first.attributes;
        let mut mft = stream_of(&attributes, record::DATA, &[])?.ok_or_else(missing)?;
        if let Some(list) = stream_of(&attributes, record::LIST, &[])? {
            let list = list.all(clusters, MOST_LIST)?;
            for number in extensions(&list, 0, Some(record::DATA))? {
                let more = read_record(clusters, &mft, record_bytes, number)?;
                let parts = more.attributes.into_iter();
                attributes.extend(parts.filter(|one| one.kind == record::DATA && one.name.is_empty()));
                mft = stream_of(&attributes, record::DATA, &[])?.ok_or_else(missing)?;
            }
        }
        Ok(mft)
    }

    fn load(&self, number: u64) -> Result<Arc<Loaded>> {
        let mut recent = self.recent.lock();
        if let Some(at) = recent.iter().position(|(own, _)| *own == number)
            && let Some(found) = recent.remove(at)
        {
            recent.push_front(found.clone());
            return Ok(found.1);
        }
        drop(recent);
        let loaded = Arc::new(self.load_anew(number)?);
        let mut recent = self.recent.lock();
        recent.push_front((number, Arc::clone(&loaded)));
        recent.truncate(KEPT);
        Ok(loaded)
    }

    fn load_anew(&self, number: u64) -> Result<Loaded> {
        let mut record = read_record(&self.clusters, &self.mft, self.record_bytes, number)?;
        if record.flags & 1 == 0 || record.base != 0 {
            return Err(corrupt(format!("record {number} is not one of a file")));
        }
        let mut attributes = std::mem::take(&mut record.attributes);
        if let Some(list) = stream_of(&attributes, record::LIST, &[])? {
            let list = list.all(&self.clusters, MOST_LIST)?;
            for extension in extensions(&list, number, None)? {
                let more = read_record(&self.clusters, &self.mft, self.record_bytes, extension)?;
                if more.base != number {
                    return Err(corrupt(format!("record {extension} is not a part of record {number}")));
                }
                attributes.extend(more.attributes);
            }
        }
        let reparse = match stream_of(&attributes, record::REPARSE, &[])? {
            Some(point) => {
                let bytes = point.all(&self.clusters, 16 << 10)?;
                (le32(&bytes, 0), part(&bytes, 8, usize::from(le16(&bytes, 4))).to_vec())
            }
            None => (0, vec![]),
        };
        let data = stream_of(&attributes, record::DATA, &[])?;
        Ok(Loaded { record, attributes, data, reparse })
    }

    /// The volume's table of upper case; that of ASCII if it is damaged.
    fn read_upcase(&self) -> Vec<u16> {
        let own = self.load(UPCASE).and_then(|loaded| match &loaded.data {
            Some(data) => data.all(&self.clusters, 128 << 10),
            None => Err(corrupt("no table of upper case")),
        });
        match own {
            Ok(bytes) if bytes.len() == 128 << 10 && le16(&bytes, 0x7a * 2) == 0x5a => {
                bytes.chunks_exact(2).map(|unit| le16(unit, 0)).collect()
            }
            _ => (0..=u16::MAX)
                .map(|unit| if (0x61..=0x7a).contains(&unit) { unit - 0x20 } else { unit })
                .collect(),
        }
    }

    /// Whether the volume was left cleanly.
    fn look_at_state(&self, notes: &mut Vec<String>) {
        let dirty = self.load(VOLUME).is_ok_and(|volume| {
            volume.resident(record::VOLUME_INFORMATION).is_some_and(|bytes| le16(bytes, 10) & 1 != 0)
        });
        if dirty {
            notes
                .push("the volume is marked as dirty: Windows is going to check it at its next start".into());
        }
        let log = self.load(LOG_FILE).and_then(|log| {
            let mut page = vec![0; 4096];
            log.data.as_ref().map_or(Ok(()), |data| data.read(&self.clusters, &mut page, 0))?;
            Ok(page)
        });
        if log.is_ok_and(|page| is_log_open(&page)) {
            notes.push(
                "its journal was not closed: changes that Windows had begun are not taken into account"
                    .into(),
            );
        }
    }

    fn data(&self, node: Node) -> Result<(Arc<Loaded>, Stream)> {
        let loaded = self.load(node.number)?;
        if let Some(why) = loaded.filtered() {
            return Err(Error::unsupported(why));
        }
        let data = loaded.data.clone().ok_or_else(|| corrupt("a file without data"))?;
        Ok((loaded, data))
    }

    fn upper(&self, name: &[u8]) -> Vec<u16> {
        let text = String::from_utf8_lossy(name);
        text.encode_utf16().map(|unit| self.upcase.get(usize::from(unit)).copied().unwrap_or(unit)).collect()
    }
}

/// Whether the restart page of a journal says that a volume is in use.
fn is_log_open(page: &[u8]) -> bool {
    if part(page, 0, 4) != b"RSTR" {
        return false;
    }
    let area = usize::from(le16(page, 24));
    let (clients, flags) = (le16(page, area + 12), le16(page, area + 14));
    clients != 0xffff && flags & 2 == 0
}

fn read_record(clusters: &Clusters, mft: &Stream, record_bytes: u64, number: u64) -> Result<Record> {
    let at = number.checked_mul(record_bytes).filter(|at| *at < mft.size);
    let at = at.ok_or_else(|| corrupt(format!("there is no record {number}")))?;
    let mut block = vec![0; to_usize(record_bytes)];
    mft.read(clusters, &mut block, at)?;
    record::fix_up(&mut block, b"FILE")?;
    record::parse(&block, clusters.count)
}

/// The records that a list of attributes names besides `own`, in its order; only those of one kind, if that is wanted.
fn extensions(list: &[u8], own: u64, kind: Option<u32>) -> Result<Vec<u64>> {
    let (mut at, mut numbers) = (0, vec![]);
    while at + 26 <= list.len() {
        let len = usize::from(le16(list, at + 4));
        if len < 26 {
            return Err(corrupt(format!("an entry of {len} bytes in a list of attributes")));
        }
        let number = le64(list, at + 16) & 0xffff_ffff_ffff;
        let wanted = kind.is_none_or(|kind| le32(list, at) == kind);
        // Mostly the same as the one before.
        if wanted && number != own && numbers.last() != Some(&number) && !numbers.contains(&number) {
            numbers.push(number);
        }
        if numbers.len() > MOST_RECORDS {
            return Err(corrupt("a list of attributes without an end"));
        }
        at += len;
    }
    Ok(numbers)
}

/// The path of a link as Unix writes it: volumes are not told apart, everything is taken to be on this one.
fn target(data: &[u8], tag: u32) -> Vec<u8> {
    let names = if tag == SYMLINK { 12 } else { 8 };
    let at = names + usize::from(le16(data, 0));
    let path = part(data, at, usize::from(le16(data, 2)));
    let units = path.chunks_exact(2).map(|unit| le16(unit, 0));
    let path: String = char::decode_utf16(units).map(|unit| unit.unwrap_or('\u{fffd}')).collect();
    let path = path.strip_prefix(r"\??\").unwrap_or(&path);
    let path = match path.as_bytes() {
        [drive, b':', ..] if drive.is_ascii_alphabetic() => &path[2..],
        _ => path,
    };
    path.replace('\\', "/").into_bytes()
}

impl Nodes for Ntfs {
    fn root(&self) -> Node {
        Node::new(ROOT)
    }

    fn work(&self) -> u64 {
        self.clusters.source.work()
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let loaded = self.load(node.number)?;
        let standard = loaded.resident(record::STANDARD).unwrap_or_default();
        let kind = loaded.kind();
        let read_only = le32(standard, 32) & 1 != 0;
        let mode = match kind {
            FileKind::Symlink => 0o777,
            FileKind::Directory => 0o755,
            _ if read_only => 0o444,
            _ => 0o644,
        };
        let size = match kind {
            FileKind::Symlink => target(&loaded.reparse.1, loaded.reparse.0).len() as u64,
            FileKind::Directory => 0,
            _ => loaded.data.as_ref().map_or(0, |data| data.size),
        };
        let ticks = i64::try_from(le64(standard, 8)).unwrap_or(0);
        let mtime = ticks / 10_000_000 - EPOCH;
        Ok(Metadata { kind, mode, uid: 0, gid: 0, size, mtime, links: loaded.record.links.into() })
    }

    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()> {
        let loaded = self.load(directory.number)?;
        if loaded.record.flags & 2 == 0 {
            return Err(Error::usage("not a directory"));
        }
        // The volume's own records are no files of anybody.
        let is_root = directory.number == ROOT;
        let visit = &mut |entry: Entry| {
            if is_root && entry.node.number < FIRST_FREE {
                return Ok(true);
            }
            visit(entry)
        };
        let root = loaded.stream(record::INDEX_ROOT, &I30)?;
        let root =
            root.ok_or_else(|| corrupt("a directory without an index"))?.all(&self.clusters, 64 << 10)?;
        if !index::entries(root.get(16..).unwrap_or_default(), visit)? {
            return Ok(());
        }
        let Some(blocks) = loaded.stream(record::INDEX_ALLOCATION, &I30)? else { return Ok(()) };
        let block_bytes = u64::from(le32(&root, 8));
        if !(512..=64 << 10).contains(&block_bytes) || !block_bytes.is_power_of_two() {
            return Err(corrupt(format!("a directory in blocks of {block_bytes} bytes")));
        }
        let used = loaded.stream(record::BITMAP, &I30)?;
        let used = used.map_or(Ok(vec![]), |used| used.all(&self.clusters, MOST_BITMAP))?;
        for block in 0..blocks.size / block_bytes {
            let at = usize::try_from(block / 8).unwrap_or(usize::MAX);
            if at >= used.len() {
                break;
            }
            if used[at] >> (block % 8) & 1 == 0 {
                continue;
            }
            let mut bytes = vec![0; to_usize(block_bytes)];
            blocks.read(&self.clusters, &mut bytes, block * block_bytes)?;
            record::fix_up(&mut bytes, b"INDX")?;
            if !index::entries(bytes.get(24..).unwrap_or_default(), visit)? {
                break;
            }
        }
        Ok(())
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Entry>> {
        let (wanted, mut found) = (self.upper(name), None);
        self.entries(directory, &mut |entry| {
            // Names of other lengths are other names, but where lengths in UTF-8 change with the case.
            let may_be = entry.name.len() == name.len() || !entry.name.is_ascii() || !name.is_ascii();
            if may_be && self.upper(&entry.name) == wanted {
                found = Some(entry);
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    fn same_name(&self, one: &[u8], other: &[u8]) -> bool {
        one == other || self.upper(one) == self.upper(other)
    }

    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        let (_, data) = self.data(node)?;
        data.read(&self.clusters, buf, offset)
    }

    fn read_link(&self, node: Node) -> Result<Vec<u8>> {
        let loaded = self.load(node.number)?;
        let target = target(&loaded.reparse.1, loaded.reparse.0);
        if target.len() as u64 > MOST_LINK {
            return Err(Error::new(ErrorKind::Corrupt, format!("a link of {} bytes", target.len())));
        }
        Ok(target)
    }
}
