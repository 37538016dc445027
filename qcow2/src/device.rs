//! An open image: reading, and the parts that writing shares with it.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::device::check_range;
use block::extent::read_backing;
use block::image::{CheckReport, Image, ImageInfo, Repair};
use block::num::to_usize;
use block::{
    BlockDevice, Compressed, CompressedWriter, Error as BlockError, ErrorKind, LayerExtent, Limits,
    Preallocation, Result, Storage, Stored, ZeroMode,
};
use parking_lot::{Mutex, RwLock};

use crate::alloc::Meta;
use crate::bitmap::{self, Bitmap, Recorder};
use crate::cache::{Slice, SliceCache};
use crate::cipher::Cipher;
use crate::codec::{Codec, Level};
use crate::error::Error;
use crate::features::{autoclear, compatible, incompatible};
use crate::geometry::Geometry;
use crate::header::Header;
use crate::l2::{COPIED, Entry, L1_RESERVED, MAX_HOST_OFFSET, OFFSET_MASK, RawEntry};
use crate::metadata::{Kind, MetadataMap};
use crate::refcount::Refcounts;
use crate::snapshot::{self, Selector, Snapshot};
use block::stripes::Stripes;

/// Largest default size of the L2 cache in bytes: maps 256 GiB with 64 KiB clusters.
const MAX_L2_CACHE: u64 = 32 << 20;
/// Smallest useful one.
const MIN_L2_CACHE: u64 = 1 << 20;
/// Default size of the refcount block cache in bytes.
const REFCOUNT_CACHE: u64 = 4 << 20;
/// Clusters that are counted, at most, to tell whether a file is sparse where data should be.
const MAX_COUNTED: u64 = 4 << 20;
/// Clusters that a request holds at a time.
pub(crate) const MAX_CLUSTERS_HELD: u64 = 4096;

/// How an image is opened. What the image names (backing file, data file) is opened by the caller, who
/// knows what may be opened at all.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Open for writing.
    pub writable: bool,
    /// The backing device, if the image has one.
    pub backing: Option<Arc<dyn BlockDevice>>,
    /// The external data file, for images that have one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Bytes for cached L2 tables. Default: as much as the image needs, up to 32 MiB.
    pub l2_cache_bytes: Option<u64>,
    /// Bytes for cached refcount blocks. Default: 4 MiB.
    pub refcount_cache_bytes: Option<u64>,
    /// How hard compressed clusters are compressed.
    pub compression: Level,
    /// Overrides the image's lazy refcounts feature.
    pub lazy_refcounts: Option<bool>,
    /// Look at the image's own description only: reading guest data fails. Lets `info` open images whose
    /// data file or backing file is missing.
    pub metadata_only: bool,
    /// Show the disk as it was when this snapshot was taken, read-only.
    pub snapshot: Option<Selector>,
    /// The unlocked encryption, for images that are encrypted. Without it only their description can be read.
    pub encryption: Option<Arc<crypt::Volume>>,
}

/// An open qcow2 image.
pub struct Qcow2 {
    pub(crate) storage: Arc<dyn Storage>,
    /// Where guest data lies: the same storage, or the external data file.
    pub(crate) data: Arc<dyn Storage>,
    pub(crate) external: bool,
    /// The external data file must stay a raw copy of the disk.
    pub(crate) external_raw: bool,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    pub(crate) size: AtomicU64,
    pub(crate) writable: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) header: Mutex<Header>,
    /// The active L1 table.
    pub(crate) l1: RwLock<Vec<u64>>,
    pub(crate) slices: SliceCache,
    pub(crate) stripes: Stripes,
    /// Held by whoever changes the size of the disk, or all of its tables at once. Comes before all other locks.
    pub(crate) reshaping: Mutex<()>,
    pub(crate) meta: Mutex<Meta>,
    /// Held by whoever writes tables to the disk.
    pub(crate) flush_lock: Mutex<()>,
    map: OnceLock<MetadataMap>,
    /// Lengths of `storage` and `data` when last looked at.
    storage_len: AtomicU64,
    data_len: AtomicU64,
    pub(crate) cipher: Option<Cipher>,
    pub(crate) codec: Codec,
    pub(crate) level: Level,
    /// The last inflated clusters, by descriptor.
    inflated: Vec<Mutex<Option<Inflated>>>,
    /// Counts the times compressed clusters were freed: what was inflated before is not valid after.
    pub(crate) compressed_epoch: AtomicU64,
    /// The file is sparse where data should be: data extents may be known zeros.
    sparse: OnceLock<bool>,
    pub(crate) snapshots: RwLock<Vec<Snapshot>>,
    pub(crate) bitmaps: RwLock<Vec<Bitmap>>,
    pub(crate) recorder: Recorder,
    /// Writing the header has failed: the disk may hold the old one or the new one. The next flush writes the old one
    /// again, and so does a write to clusters in use, which under the new one may be others' too. Changes under the
    /// metadata lock.
    pub(crate) header_lost: AtomicBool,
    metadata_only: bool,
}

#[derive(Debug)]
struct Inflated {
    offset: u64,
    epoch: u64,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2")
            .field("storage", &self.storage.name())
            .field("geometry", &self.geometry)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// What a run of guest bytes is mapped to in this layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// Not stored here.
    Absent,
    /// Zeros; with the host offset if space is set aside.
    Zero(Option<u64>),
    /// Plain bytes at this host offset.
    Data(u64),
    /// One compressed cluster (or the part of it from the queried byte on).
    Compressed { offset: u64, len: u64 },
}

/// A run of guest bytes mapped in one way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    pub(crate) mapped: Mapped,
    pub(crate) len: u64,
}

impl Mapped {
    /// Whether `next`, which starts `distance` bytes further on, is the same run.
    fn continues(self, next: Self, distance: u64) -> bool {
        match (self, next) {
            (Self::Absent, Self::Absent) | (Self::Zero(None), Self::Zero(None)) => true,
            (Self::Zero(Some(a)), Self::Zero(Some(b))) | (Self::Data(a), Self::Data(b)) => a + distance == b,
            _ => false,
        }
    }
}

impl Qcow2 {
    /// Opens an image whose header has been read. Opening for writing clears unknown autoclear bits and
    /// repairs an image that was not closed cleanly.
    ///
    /// # Errors
    /// The image is corrupt, encrypted (for writing), needs a data file that was not given, or the host failed.
    pub fn open(storage: Arc<dyn Storage>, mut header: Header, options: OpenOptions) -> Result<Arc<Self>> {
        if options.writable {
            let unlocked = options.encryption.is_some() || options.metadata_only;
            header = prepare_for_writing(&storage, header, unlocked)?;
        }
        let geometry = header.geometry();
        let external = header.has(incompatible::DATA_FILE);
        let data = match options.data_file {
            Some(data_file) if external => data_file,
            _ if external && !options.metadata_only => return Err(Error::DataFileRequired.into()),
            _ => Arc::clone(&storage),
        };
        let snapshots = match options.writable {
            true => snapshot::read_table(&*storage, &header).map_err(|error| {
                error
                    .hint("'vimg check -r all' takes snapshots that cannot be read out of the image's table.")
                    .hint("The disk itself can still be read: convert it to a new image.")
            })?,
            false => snapshot::read_entries(&*storage, &header)?,
        };
        let bitmaps = bitmap::read_directory(&*storage, &header)?;
        if let Some(selector) = &options.snapshot {
            header = snapshot::view::header_of(&*storage, &header, &snapshots, selector, options.writable)?;
        }
        let l1 = read_l1(&*storage, &header)?;
        let file_len = storage.len()?;
        let table = match options.writable {
            true => Refcounts::read_table(
                &*storage,
                &geometry,
                header.refcount_table_offset,
                header.refcount_table_clusters,
            )?,
            false => Vec::new(),
        };
        let refcounts = Refcounts::new(
            geometry,
            table,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            options.refcount_cache_bytes.unwrap_or(REFCOUNT_CACHE),
        );
        let tables = l1.iter().filter(|entry| **entry != 0).count() as u64;
        let needed = if options.writable { u64::MAX } else { tables << geometry.cluster_bits };
        let l2_cache = options.l2_cache_bytes.unwrap_or_else(|| needed.clamp(MIN_L2_CACHE, MAX_L2_CACHE));
        let codec = Codec::of(header.compression_type)?;
        codec.check_level(options.compression)?;
        let known_len = if storage.fixed_len() { None } else { Some(file_len) };
        let meta = Meta::new(geometry, refcounts, known_len, false);
        let image = Arc::new(Self {
            external,
            external_raw: external && header.autoclear & autoclear::DATA_FILE_RAW != 0,
            backing: options.backing,
            geometry,
            version: header.version,
            size: AtomicU64::new(header.size),
            writable: options.writable,
            lazy_refcounts: header.version >= 3
                && options.lazy_refcounts.unwrap_or(header.compatible & compatible::LAZY_REFCOUNTS != 0),
            slices: SliceCache::new(l2_cache, geometry.cluster_size()),
            stripes: Stripes::new(),
            reshaping: Mutex::new(()),
            meta: Mutex::new(meta),
            flush_lock: Mutex::new(()),
            map: OnceLock::new(),
            storage_len: AtomicU64::new(file_len),
            data_len: AtomicU64::new(data.len()?),
            cipher: Cipher::new(&header, options.encryption),
            codec,
            level: options.compression,
            inflated: (0..8).map(|_| Mutex::new(None)).collect(),
            compressed_epoch: AtomicU64::new(0),
            sparse: OnceLock::new(),
            l1: RwLock::new(l1),
            header: Mutex::new(header),
            storage,
            data,
            snapshots: RwLock::new(snapshots),
            recorder: Recorder::new(&bitmaps),
            bitmaps: RwLock::new(bitmaps),
            header_lost: AtomicBool::new(false),
            metadata_only: options.metadata_only,
        });
        if image.writable {
            image.refuse_overlaps()?;
            image.check_bitmap_tables()?;
            image.drop_stale_bitmaps()?;
        }
        Ok(image)
    }

    /// Writing to an image whose own structures lie in each other would destroy it.
    fn refuse_overlaps(&self) -> Result<()> {
        match self.map()?.conflict() {
            None => Ok(()),
            Some(cluster) => Err(Error::Overlap { offset: self.geometry.offset_of(cluster) }.into()),
        }
    }

    /// The unlocked encryption, if guest data is encrypted.
    pub fn encryption(&self) -> Option<Arc<crypt::Volume>> {
        self.cipher.as_ref().map(Cipher::volume)
    }

    /// A copy of the header as it is now.
    pub fn header(&self) -> Header {
        self.current_header()
    }

    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The internal snapshots, in table order.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.snapshots.read().clone()
    }

    /// The persistent dirty bitmaps.
    pub fn bitmaps(&self) -> Vec<Bitmap> {
        self.bitmaps.read().clone()
    }

    /// The container.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Where this image's own structures were when it was opened.
    pub(crate) fn map(&self) -> Result<&MetadataMap> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let header = self.header.lock().clone();
        let table = Refcounts::read_table(
            &*self.storage,
            &self.geometry,
            header.refcount_table_offset,
            header.refcount_table_clusters,
        )?;
        let blocks = Refcounts::new(self.geometry, table, 0, 0, 0);
        let cluster = self.geometry.cluster_size();
        let l1 = self.l1.read();
        let snapshots = self.snapshots.read();
        let snapshot_table_len = match header.nb_snapshots {
            0 => 0,
            _ => snapshot::encode_table(&snapshots, header.size)?.len() as u64,
        };
        let fixed = [
            (0, cluster, Kind::Header),
            (header.l1_table_offset, u64::from(header.l1_size) * 8, Kind::L1Table),
            (
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) << self.geometry.cluster_bits,
                Kind::RefcountTable,
            ),
            (header.snapshots_offset, snapshot_table_len, Kind::SnapshotTable),
        ];
        let luks = header.luks.map(|(offset, len)| (offset, len, Kind::CryptoHeader));
        let bitmaps = header.bitmaps.map(|b| (b.directory_offset, b.directory_size, Kind::BitmapDirectory));
        let bitmap_data = bitmap::structures(&*self.storage, &self.geometry, &self.bitmaps.read())?;
        let file_len = self.storage.len()?;
        let snapshot_l1 = snapshots
            .iter()
            .filter(|s| s.check_l1(&self.geometry, file_len).is_ok())
            .map(|s| (s.l1_offset, u64::from(s.l1_size) * 8, Kind::SnapshotL1));
        let tables =
            l1.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0).map(|o| (o, cluster, Kind::L2Table));
        let ranges = fixed
            .into_iter()
            .chain(bitmaps)
            .chain(luks)
            .chain(bitmap_data)
            .chain(snapshot_l1)
            .chain(tables)
            .chain(blocks.block_offsets().map(|offset| (offset, cluster, Kind::RefcountBlock)));
        let map = MetadataMap::new(&self.geometry, ranges);
        drop(l1);
        Ok(self.map.get_or_init(|| map))
    }

    /// Whether `end` lies inside the container or data file, looking again if it has grown.
    fn inside(len: &AtomicU64, storage: &dyn Storage, end: u64) -> Result<bool> {
        if end <= len.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let now = storage.len()?;
        len.store(now, Ordering::Relaxed);
        Ok(end <= now)
    }

    /// Whether guest data up to `end` lies inside the file.
    pub(crate) fn is_inside(&self, end: u64) -> Result<bool> {
        Self::inside(&self.data_len, &*self.data, end)
    }

    /// The offset of the L2 table for a guest offset, if there is one, validated.
    pub(crate) fn l2_table(&self, guest: u64) -> Result<Option<u64>> {
        let index = self.geometry.l1_index(guest);
        let entry = self.l1.read().get(to_usize(index)).copied().unwrap_or(0);
        self.validate_l1_entry(index, entry)
    }

    /// Whether there may be an L2 table for a guest offset. Needs no clusters to be held; what comes of a `true` does.
    pub(crate) fn has_table(&self, guest: u64) -> bool {
        self.l1.read().get(to_usize(self.geometry.l1_index(guest))).is_some_and(|entry| *entry != 0)
    }

    /// The L2 table that an L1 entry names, if any, once it has been found to be one.
    pub(crate) fn validate_l1_entry(&self, index: u64, entry: u64) -> Result<Option<u64>> {
        let offset = entry & OFFSET_MASK;
        if entry & L1_RESERVED != 0 || self.geometry.in_cluster(offset) != 0 {
            return Err(Error::L1Entry { index, entry }.into());
        }
        if offset == 0 {
            return Ok(None);
        }
        // In the session that made it a table may not have been written yet: then it is in memory. But
        // new tables are zeroed on disk at once, so that all of them always lies inside the file.
        if !Self::inside(&self.storage_len, &*self.storage, offset + self.geometry.cluster_size())? {
            let file_len = self.storage_len.load(Ordering::Relaxed);
            return Err(Error::L2TableOutsideFile { l1_index: index, offset, file_len }.into());
        }
        if self.map()?.is_shared(self.geometry.cluster_of(offset)) {
            return Err(Error::L2TableShared { l1_index: index, offset }.into());
        }
        Ok(Some(offset))
    }

    /// The slice of an L2 table that maps a guest offset, and the entry's index in it.
    pub(crate) fn slice(&self, table: u64, guest: u64) -> Result<(Arc<Slice>, u64)> {
        let (slice_offset, index) = self.slice_position(table, guest);
        Ok((self.slices.get(&*self.storage, slice_offset)?, index))
    }

    /// Host offset of the slice, and the index in it.
    pub(crate) fn slice_position(&self, table: u64, guest: u64) -> (u64, u64) {
        let per_slice = self.entries_per_slice();
        let index = self.geometry.l2_index(guest);
        let slice = index / per_slice;
        (table + slice * self.slices.slice_bytes(), index % per_slice)
    }

    /// L2 entries in a slice.
    pub(crate) fn entries_per_slice(&self) -> u64 {
        self.slices.slice_bytes() / self.geometry.l2_entry_size()
    }

    /// Decodes an entry.
    pub(crate) fn decode(&self, slice: &Slice, index: u64, guest: u64) -> Result<Entry> {
        let raw = slice.entry(index, self.geometry.extended_l2);
        let entry = Entry::decode(raw, &self.geometry, self.version, self.external)
            .map_err(|reason| BlockError::from(Error::L2Entry { guest, reason }))?;
        if self.external
            && let Entry::Plain { host: Some(host), .. } = entry
            && host != self.geometry.offset_of(self.geometry.cluster_of(guest))
        {
            return Err(
                Error::DataOnMetadata { guest, offset: host, what: "wrong place of the data file" }.into()
            );
        }
        Ok(entry)
    }

    /// How an entry maps the guest byte at `guest`, and for how many bytes of its cluster in the same way.
    fn map_entry(&self, entry: Entry, guest: u64) -> Mapping {
        let geometry = &self.geometry;
        let within = geometry.in_cluster(guest);
        match entry {
            Entry::Compressed { offset, len } => {
                Mapping { mapped: Mapped::Compressed { offset, len }, len: geometry.cluster_size() - within }
            }
            Entry::Plain { host, allocated, zero, .. } => {
                let size = geometry.subcluster_size();
                let first = within / size;
                let state = |i: u64| ((allocated >> i) & 1, (zero >> i) & 1);
                let same = (first..u64::from(geometry.subclusters()))
                    .take_while(|i| state(*i) == state(first))
                    .count();
                let mapped = match (state(first), host) {
                    ((1, _), Some(host)) => Mapped::Data(host + within),
                    ((_, 1), host) => Mapped::Zero(host.map(|host| host + within)),
                    _ => Mapped::Absent,
                };
                Mapping { mapped, len: (first + same as u64) * size - within }
            }
        }
    }

    /// How the bytes from `guest` on are mapped, for at most `max` bytes. Runs of clusters that follow each
    /// other are joined; ranges without an L2 table are passed over in one step each.
    ///
    /// The clusters of the range are held, as for everything that looks at tables.
    pub(crate) fn lookup(&self, guest: u64, max: u64) -> Result<Mapping> {
        self.join_pieces(guest, max, |at, max| self.lookup_piece(at, max))
    }

    /// The same for a caller that holds nothing: each piece is what it was at one moment. Writers wait for no more
    /// than a piece.
    fn lookup_unheld(&self, guest: u64, max: u64) -> Result<Mapping> {
        let held = |at, max: u64| {
            if !self.has_table(at) {
                return Ok(self.without_table(at));
            }
            if !self.writable {
                return self.lookup_piece(at, max);
            }
            let rest = self.entries_per_slice() - self.geometry.l2_index(at) % self.entries_per_slice();
            let max = max.min(self.geometry.offset_of(rest) - self.geometry.in_cluster(at));
            let (first, last) = self.clusters(at, max);
            let _held = self.stripes.shared(first, last);
            self.lookup_piece(at, max)
        };
        self.join_pieces(guest, max, held)
    }

    fn join_pieces(
        &self,
        guest: u64,
        max: u64,
        lookup_piece: impl Fn(u64, u64) -> Result<Mapping>,
    ) -> Result<Mapping> {
        let mut total = 0;
        let mut first: Option<Mapped> = None;
        while total < max {
            let piece = lookup_piece(guest + total, max - total)?;
            match first {
                None => first = Some(piece.mapped),
                Some(mapped) if mapped.continues(piece.mapped, total) => {}
                Some(_) => break,
            }
            total += piece.len;
            if matches!(piece.mapped, Mapped::Compressed { .. }) {
                break;
            }
        }
        Ok(Mapping { mapped: first.unwrap_or(Mapped::Absent), len: total.min(max) })
    }

    /// The same, ending at the latest with the slice or the L1 entry.
    fn lookup_piece(&self, guest: u64, max: u64) -> Result<Mapping> {
        let Some(table) = self.l2_table(guest)? else { return Ok(self.without_table(guest)) };
        let (slice, first_index) = self.slice(table, guest)?;
        let mut run = self.map_entry(self.decode(&slice, first_index, guest)?, guest);
        if matches!(run.mapped, Mapped::Compressed { .. }) {
            return Ok(run);
        }
        let mut last = slice.entry(first_index, self.geometry.extended_l2);
        let mut index = first_index + 1;
        while run.len < max
            && index < self.entries_per_slice()
            && self.geometry.in_cluster(guest + run.len) == 0
        {
            let at = guest + run.len;
            // Most entries say the same as the one before, one cluster further on: no need to take them apart.
            let entry = slice.entry(index, self.geometry.extended_l2);
            if self.follows(last, entry, run.mapped) {
                run.len += self.geometry.cluster_size();
                last = entry;
                index += 1;
                continue;
            }
            last = entry;
            let next = self.map_entry(self.decode(&slice, index, at)?, at);
            if !run.mapped.continues(next.mapped, run.len) {
                break;
            }
            run.len += next.len;
            index += 1;
        }
        Ok(run)
    }

    /// What a guest offset without an L2 table is mapped to.
    fn without_table(&self, guest: u64) -> Mapping {
        let coverage = self.geometry.l2_coverage();
        Mapping { mapped: Mapped::Absent, len: coverage - (guest & (coverage - 1)) }
    }

    /// Whether an entry means what its predecessor `last` means, which is `mapped`, for the next cluster: all of it
    /// in one way.
    fn follows(&self, last: RawEntry, entry: RawEntry, mapped: Mapped) -> bool {
        let step = match mapped {
            Mapped::Absent | Mapped::Zero(None) => 0,
            Mapped::Zero(Some(_)) | Mapped::Data(_) => self.geometry.cluster_size(),
            Mapped::Compressed { .. } => return false,
        };
        let whole =
            !self.geometry.extended_l2 || matches!(last.bitmap, 0 | 0xffff_ffff | 0xffff_ffff_0000_0000);
        whole
            && entry.bitmap == last.bitmap
            && entry.word == last.word + step
            && (last.word & OFFSET_MASK) + step < MAX_HOST_OFFSET
    }

    /// Checks that `len` bytes of plain data at `host` can be guest data: inside the file, and no metadata.
    pub(crate) fn check_data(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if !Self::inside(&self.data_len, &*self.data, host + len)? {
            let file_len = self.data_len.load(Ordering::Relaxed);
            return Err(Error::DataOutsideFile { guest, offset: host, file_len }.into());
        }
        self.check_data_overlap(guest, host, len)
    }

    pub(crate) fn check_data_overlap(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if self.external {
            return Ok(());
        }
        let (first, end) = (self.geometry.cluster_of(host), self.geometry.clusters_for(host + len));
        match self.map()?.hit(first, end) {
            None => Ok(()),
            Some((_, kind)) => Err(Error::DataOnMetadata { guest, offset: host, what: kind.name() }.into()),
        }
    }

    /// Reads through the whole chain. The clusters of the range are held.
    pub(crate) fn read_held(&self, buf: &mut [u8], guest: u64) -> Result<()> {
        let mut rest = buf;
        let mut at = guest;
        while !rest.is_empty() {
            let mapping = self.lookup(at, rest.len() as u64)?;
            let (piece, tail) = rest.split_at_mut(to_usize(mapping.len));
            match mapping.mapped {
                Mapped::Absent => read_backing(self.backing.as_deref(), piece, at)?,
                Mapped::Zero(_) => piece.fill(0),
                Mapped::Data(host) => {
                    self.check_data(at, host, mapping.len)?;
                    self.read_data(piece, at, host)?;
                }
                Mapped::Compressed { offset, len } => self.read_compressed(piece, at, offset, len)?,
            }
            at += mapping.len;
            rest = tail;
        }
        Ok(())
    }

    /// Fills `piece`, which lies within one compressed cluster.
    fn read_compressed(&self, piece: &mut [u8], guest: u64, offset: u64, len: u64) -> Result<()> {
        let cluster = to_usize(self.geometry.cluster_size());
        if piece.len() == cluster {
            return self.inflate(piece, guest, offset, len);
        }
        let within = to_usize(self.geometry.in_cluster(guest));
        let epoch = self.compressed_epoch.load(Ordering::Acquire);
        let slot = &self.inflated[to_usize(self.geometry.cluster_of(guest) % self.inflated.len() as u64)];
        let mut kept = slot.lock();
        if let Some(known) = kept.as_ref().filter(|k| k.offset == offset && k.epoch == epoch) {
            piece.copy_from_slice(&known.bytes[within..within + piece.len()]);
            return Ok(());
        }
        let mut bytes = kept.take().map_or_else(|| vec![0; cluster], |old| old.bytes);
        self.inflate(&mut bytes, guest, offset, len)?;
        piece.copy_from_slice(&bytes[within..within + piece.len()]);
        *kept = Some(Inflated { offset, epoch, bytes });
        Ok(())
    }

    /// Reads and inflates a whole compressed cluster.
    fn inflate(&self, out: &mut [u8], guest: u64, offset: u64, len: u64) -> Result<()> {
        if !Self::inside(&self.storage_len, &*self.storage, offset + 1)? {
            let file_len = self.storage_len.load(Ordering::Relaxed);
            return Err(Error::DataOutsideFile { guest, offset, file_len }.into());
        }
        self.check_data_overlap(guest, offset, len)?;
        // What a cut-off file has lost must not be inflated as if it were zeros: that could succeed.
        let len = match Self::inside(&self.storage_len, &*self.storage, offset + len)? {
            true => len,
            false => len.min(self.storage_len.load(Ordering::Relaxed).saturating_sub(offset)),
        };
        thread_local! {
            static PACKED: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        PACKED.with_borrow_mut(|packed| {
            packed.resize(to_usize(len), 0);
            self.storage.read_at(packed, offset)?;
            self.codec.decompress(packed, out).map_err(|why| {
                BlockError::from(Error::CompressedData { guest, offset })
                    .hint(format!("The decoder says: {why}."))
            })
        })
    }

    /// The readable part of `guest..guest + len`, split so that no request holds too many clusters.
    pub(crate) fn piece_len(&self, guest: u64, len: u64) -> u64 {
        let most = MAX_CLUSTERS_HELD << self.geometry.cluster_bits;
        len.min(most - self.geometry.in_cluster(guest))
    }

    /// Fails if guest data cannot be used at all.
    pub(crate) fn check_readable(&self) -> Result<()> {
        if self.metadata_only {
            return Err(BlockError::unsupported("the image was opened for its description only"));
        }
        if self.cipher.is_none() && self.header.lock().crypt_method != 0 {
            return Err(no_key());
        }
        Ok(())
    }

    /// First and last cluster of a range (of at least one byte).
    pub(crate) fn clusters(&self, guest: u64, len: u64) -> (u64, u64) {
        (self.geometry.cluster_of(guest), self.geometry.cluster_of(guest + len - 1))
    }

    /// Whether the file has holes where its tables say data: then data extents are looked at twice.
    fn is_sparse(&self) -> bool {
        *self.sparse.get_or_init(|| self.more_counted_than_taken().unwrap_or(false))
    }

    /// Whether clearly more clusters are in use than the file system has given to the file. Where `map` starts to
    /// tell was found by punching holes into images one cluster at a time: qemu-img 10 does so once a ninth more
    /// clusters are counted than taken (405 of 365, not of 366; 105 of 95, not of 96), and two at least.
    fn more_counted_than_taken(&self) -> Result<bool> {
        let Some(allocated) = self.storage.allocated()? else { return Ok(false) };
        let taken = self.geometry.cluster_of(allocated);
        let enough = (taken.saturating_mul(10) / 9).max(taken + 2);
        let clusters = self.geometry.clusters_for(self.storage.len()?);
        if clusters < enough {
            return Ok(false);
        }
        let header = self.current_header();
        let (offset, len) = (header.refcount_table_offset, header.refcount_table_clusters);
        let table = Refcounts::read_table(&*self.storage, &self.geometry, offset, len)?;
        let mut counters = Refcounts::new(self.geometry, table, offset, len, REFCOUNT_CACHE);
        // Nothing that takes so long to count is worth it.
        Ok(counters.count_used(&*self.storage, clusters.min(MAX_COUNTED), enough)? >= enough)
    }

    /// The extent of plain data at `host`, cut where the file changes from data to hole.
    fn data_extent(&self, host: u64, len: u64) -> Result<LayerExtent> {
        if self.is_encrypted() {
            return Ok(LayerExtent::new(Stored::Data, len));
        }
        let mut extent = LayerExtent::new(Stored::Data, len).at(host);
        if self.is_sparse() {
            let found = self.data.extent(host, len)?;
            extent.len = found.len.min(len);
            // Past the end of the file there are no holes but missing bytes, which reading has to find out.
            extent.reads_zero =
                !found.data && Self::inside(&self.data_len, &*self.data, host.saturating_add(extent.len))?;
        }
        Ok(extent)
    }
}

/// Encrypted data is wanted, and nobody has said how to unlock it.
fn no_key() -> BlockError {
    BlockError::usage("Parameter 'encrypt.key-secret' is required for cipher")
}

/// What opening for writing changes or refuses.
fn prepare_for_writing(storage: &Arc<dyn Storage>, mut header: Header, unlocked: bool) -> Result<Header> {
    if header.has(incompatible::CORRUPT) {
        return Err(Error::MarkedCorrupt.into());
    }
    if header.crypt_method != 0 && !unlocked {
        return Err(no_key());
    }
    if header.has(incompatible::DIRTY) {
        let report = crate::check::repair_dirty(storage, &header)?;
        if report.corruptions > 0 || report.check_errors > 0 {
            return Err(BlockError::new(
                ErrorKind::Corrupt,
                "the image was not closed cleanly and could not be repaired",
            )
            .hint("Run 'vimg check' to see what is wrong."));
        }
        header = Header::read(&**storage)?;
    }
    let known = header.autoclear & autoclear::KNOWN;
    if known != header.autoclear {
        header.autoclear = known;
        // Specification, "Header": autoclear_features at 88.
        storage.write_at(&known.to_be_bytes(), 88)?;
        storage.sync()?;
    }
    Ok(header)
}

pub(crate) fn read_l1(storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
    let mut bytes = vec![0; to_usize(u64::from(header.l1_size)) * 8];
    storage.read_at(&mut bytes, header.l1_table_offset)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_be_bytes(*chunk)).collect())
}

impl BlockDevice for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn limits(&self) -> Limits {
        let cluster = block::num::low_u32(self.geometry.cluster_size());
        let subcluster = block::num::low_u32(self.geometry.subcluster_size());
        Limits { alignment: 1, preferred: cluster, discard_granularity: subcluster }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.check_readable()?;
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let len = self.piece_len(at, rest.len() as u64);
            let (piece, tail) = rest.split_at_mut(to_usize(len));
            let (first, last) = self.clusters(at, len);
            let _held = self.stripes.shared(first, last);
            self.read_held(piece, at)?;
            at += len;
            rest = tail;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.write_zeroes(offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn close(&self) -> Result<()> {
        self.close_cleanly()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.resize_to(size, preallocation)
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let size = self.size();
        check_range(offset, 1, size)?;
        self.check_readable()?;
        let max = max_len.min(size - offset);
        let mapping = self.lookup_unheld(offset, max)?;
        Ok(match mapping.mapped {
            Mapped::Absent => LayerExtent::new(Stored::Absent, mapping.len),
            Mapped::Zero(Some(host)) if !self.is_encrypted() => {
                LayerExtent::new(Stored::Zero, mapping.len).at(host)
            }
            Mapped::Zero(_) => LayerExtent::new(Stored::Zero, mapping.len),
            Mapped::Data(host) => self.data_extent(host, mapping.len)?,
            Mapped::Compressed { .. } => LayerExtent::new(Stored::Compressed, mapping.len),
        })
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.backing.as_ref()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        (!self.is_encrypted()).then_some(&self.data)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.reserve_range(offset, len)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.clone_range(offset, len, source, source_offset)
    }

    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        (!self.external && !self.is_encrypted()).then_some(self as _)
    }
}

impl CompressedWriter for Qcow2 {
    fn cluster_size(&self) -> u32 {
        block::num::low_u32(self.geometry.cluster_size())
    }

    fn compress(&self, data: &[u8]) -> Result<Compressed> {
        self.codec.compress(data, self.level)
    }

    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()> {
        self.write_packed(clusters, offset)
    }
}

impl Image for Qcow2 {
    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn info(&self) -> Result<ImageInfo> {
        let header = self.header();
        let text = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|b| String::from_utf8_lossy(b).into_owned());
        Ok(ImageInfo {
            cluster_size: Some(block::num::low_u32(self.geometry.cluster_size())),
            encrypted: header.crypt_method != 0,
            compressed: false,
            dirty: Some(header.has(incompatible::DIRTY)),
            backing_file: text(&header.backing_file),
            backing_format: text(&header.backing_format),
            snapshots: self.snapshots.read().iter().map(|s| s.info(header.size)).collect(),
            specific: self.specific_info(&header),
        })
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        if self.writable {
            if repair != Repair::None {
                // A repair puts tables elsewhere, and what is in memory here would go on in the old ones.
                let error = BlockError::usage("an image that is open for writing cannot be repaired");
                return Err(error.hint("Close it, and repair the file with qcow2::check::check."));
            }
            self.close_cleanly()?;
        }
        let data_file = self.external.then_some(&self.data);
        crate::check::check(&self.storage, &self.header(), data_file, repair)
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn external_data_file(&self) -> Option<&Arc<dyn Storage>> {
        self.external.then_some(&self.data)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}

impl Qcow2 {
    /// Whether the active L1 entry for a guest offset belongs to the active table alone.
    pub(crate) fn l1_copied(&self, index: u64) -> bool {
        self.l1.read().get(to_usize(index)).is_some_and(|entry| entry & COPIED != 0)
    }

    /// The container has grown to at least `end` bytes by our own writing.
    pub(crate) fn grown_to(&self, end: u64) {
        self.storage_len.fetch_max(end, Ordering::Relaxed);
        if !self.external {
            self.data_len.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// The container has been cut: its length has to be looked up again.
    pub(crate) fn forget_lengths(&self) {
        self.storage_len.store(0, Ordering::Relaxed);
        self.data_len.store(0, Ordering::Relaxed);
    }
}
