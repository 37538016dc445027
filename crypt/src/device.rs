//! A stand-alone LUKS container as a disk: the sectors behind the header.
//!
//! Sectors are encrypted one by one, so a request that does not begin and end with a sector has to read, change
//! and write the sectors at its edges. Such a request keeps all others out for its time; everybody else goes
//! side by side. (A disk is written in whole sectors nearly always; a lock for every sector would cost more than
//! it gives.)
//!
//! Nothing in the file says which sectors have been written: a new container reads as noise, and a hole in the
//! file is no zeros. Zeros have to be written like everything else, and discarding does nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::image::{Image, ImageInfo};
use block::num::{align_down, align_up, to_usize};
use block::{BlockDevice, Error, LayerExtent, Limits, Preallocation, Result, Storage, Stored, ZeroMode};
use parking_lot::{Mutex, RwLock};

use crate::luks::slots::{self, Change};
use crate::luks::{Effort, Header, Unlocked, Unlocker, unlock_with};
use crate::secret::Secret;
use crate::volume::{SECTOR, Volume};

const SECTOR_BYTES: u64 = SECTOR as u64;
/// Bytes that are encrypted at once on their way to the container: what stays in the processor's cache.
const CHUNK: usize = 128 << 10;

/// An opened LUKS container.
#[derive(Debug)]
pub struct Luks {
    storage: Arc<dyn Storage>,
    /// As it is on the disk.
    header: Mutex<Header>,
    /// Where the disk begins in the container, in bytes.
    payload_offset: u64,
    /// `None`: only the description is wanted.
    volume: Option<Volume>,
    /// The same, with the effort for trying passphrases.
    key: Option<(Secret, Effort)>,
    size: AtomicU64,
    /// Held exclusively by requests that change a part of a sector.
    sectors: RwLock<()>,
}

impl Luks {
    /// Opens a container with a passphrase.
    ///
    /// # Errors
    /// As [`unlock`](crate::luks::unlock); the container ends before the payload; or the host failed.
    pub fn open(storage: Arc<dyn Storage>, passphrase: &[u8]) -> Result<Self> {
        Self::open_with(storage, passphrase, Effort::DEFAULT, &Unlocker::default())
    }

    /// The same with another limit of the work, and with what is known already.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(
        storage: Arc<dyn Storage>,
        passphrase: &[u8],
        effort: Effort,
        unlocker: &Unlocker,
    ) -> Result<Self> {
        let unlocked = unlock_with(&*storage, 0, passphrase, effort, unlocker)?;
        let Unlocked { header, volume, key, .. } = unlocked;
        Ok(Self { volume: Some(volume), key: Some((key, effort)), ..Self::new(storage, header)? })
    }

    /// Opens a container to be described and resized; reading and writing fail.
    ///
    /// # Errors
    /// The header is not one or needs what we do not have, the container ends before the payload, or the host
    /// failed.
    pub fn open_locked(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = Header::read(&*storage, 0)?;
        header.spec()?;
        Self::new(storage, header)
    }

    fn new(storage: Arc<dyn Storage>, header: Header) -> Result<Self> {
        // In sectors, as qemu counts the lengths of files.
        let len = whole_sectors(storage.len()?);
        let Some(size) = len.checked_sub(header.payload_offset) else {
            let text = "Could not refresh total sector count: Input/output error";
            let (end, payload) = (len, header.payload_offset);
            return Err(Error::new(block::ErrorKind::Truncated, text)
                .hint(format!("the file has {end} bytes, and the encrypted disk begins at byte {payload}")));
        };
        Ok(Self {
            storage,
            payload_offset: header.payload_offset,
            header: Mutex::new(header),
            volume: None,
            key: None,
            size: AtomicU64::new(size),
            sectors: RwLock::new(()),
        })
    }

    /// The header.
    pub fn header(&self) -> Header {
        self.header.lock().clone()
    }

    /// Changes which passphrases open the container. Durable on return.
    ///
    /// # Errors
    /// As [`slots::change`]; it was opened without its passphrase, or read-only.
    pub fn change_keys(&self, change: &Change, force: bool) -> Result<()> {
        self.check_writable()?;
        let Some((key, effort)) = &self.key else { return Err(without_passphrase()) };
        slots::change_with(&*self.storage, 0, &mut self.header.lock(), (key, *effort), change, force)
    }

    fn volume(&self) -> Result<&Volume> {
        self.volume.as_ref().ok_or_else(without_passphrase)
    }

    /// Where a range of the disk lies in the container.
    fn place(&self, offset: u64) -> u64 {
        self.payload_offset + offset
    }

    /// Reads and decrypts whole sectors.
    fn read_sectors(&self, volume: &Volume, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut offset = offset;
        for chunk in buf.chunks_mut(CHUNK) {
            self.storage.read_at(chunk, self.place(offset))?;
            volume.decrypt(offset / SECTOR_BYTES, chunk);
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Encrypts and writes whole sectors.
    fn write_sectors(&self, volume: &Volume, buf: &[u8], offset: u64) -> Result<()> {
        let mut scratch = vec![0; buf.len().min(CHUNK)];
        let mut offset = offset;
        for chunk in buf.chunks(CHUNK) {
            let encrypted = &mut scratch[..chunk.len()];
            encrypted.copy_from_slice(chunk);
            volume.encrypt(offset / SECTOR_BYTES, encrypted);
            self.storage.write_at(encrypted, self.place(offset))?;
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Calls `change` with the sector in which `offset` lies, and writes it back.
    fn change_sector(&self, volume: &Volume, offset: u64, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let start = align_down(offset, SECTOR_BYTES);
        let mut sector = [0; SECTOR];
        self.read_sectors(volume, &mut sector, start)?;
        change(&mut sector);
        self.write_sectors(volume, &sector, start)
    }

    /// A write with parts of sectors at its ends. The caller holds the lock exclusively.
    fn write_unaligned(&self, volume: &Volume, mut buf: &[u8], mut offset: u64) -> Result<()> {
        let within = to_usize(offset % SECTOR_BYTES);
        if within != 0 {
            let (head, rest) = buf.split_at(buf.len().min(SECTOR - within));
            self.change_sector(volume, offset, |sector| {
                sector[within..][..head.len()].copy_from_slice(head);
            })?;
            offset += head.len() as u64;
            buf = rest;
        }
        let (middle, tail) = buf.split_at(buf.len() / SECTOR * SECTOR);
        self.write_sectors(volume, middle, offset)?;
        if tail.is_empty() {
            return Ok(());
        }
        let end = offset + middle.len() as u64;
        self.change_sector(volume, end, |sector| sector[..tail.len()].copy_from_slice(tail))
    }

    /// A read with parts of sectors at its ends.
    fn read_unaligned(&self, volume: &Volume, buf: &mut [u8], mut offset: u64) -> Result<()> {
        let mut scratch = vec![0; CHUNK.min(buf.len() + 2 * SECTOR)];
        let mut rest = buf;
        while !rest.is_empty() {
            let within = to_usize(offset % SECTOR_BYTES);
            let room = scratch.len() / SECTOR * SECTOR;
            let len = rest.len().min(room - within);
            let (part, after) = rest.split_at_mut(len);
            let sectors = &mut scratch[..(within + len).next_multiple_of(SECTOR)];
            self.read_sectors(volume, sectors, offset - within as u64)?;
            part.copy_from_slice(&sectors[within..within + len]);
            offset += len as u64;
            rest = after;
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<&Volume> {
        if self.storage.read_only() {
            return Err(Error::read_only());
        }
        self.volume()
    }
}

fn without_passphrase() -> Error {
    Error::unsupported("the image was opened without its passphrase")
}

fn is_aligned(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR)
}

/// The last sector of a file may be incomplete.
fn whole_sectors(bytes: u64) -> u64 {
    align_up(bytes, SECTOR_BYTES).unwrap_or(bytes)
}

impl BlockDevice for Luks {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn limits(&self) -> Limits {
        let alignment = self.storage.alignment().max(512);
        Limits { alignment, ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let volume = self.volume()?;
        let _shared = self.sectors.read();
        if is_aligned(offset, buf.len()) {
            self.read_sectors(volume, buf, offset)
        } else {
            self.read_unaligned(volume, buf, offset)
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let volume = self.check_writable()?;
        if is_aligned(offset, buf.len()) {
            let _shared = self.sectors.read();
            self.write_sectors(volume, buf, offset)
        } else {
            let _alone = self.sectors.write();
            self.write_unaligned(volume, buf, offset)
        }
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size())?;
        if mode.no_fallback {
            return Err(Error::unsupported("an encrypted disk has no fast way to write zeros"));
        }
        let zeros = vec![0; to_usize(len.min(CHUNK as u64))];
        let (mut offset, end) = (offset, offset + len);
        while offset < end {
            // Each piece but the first begins with a sector, and so does what follows it.
            let room = CHUNK as u64 - offset % SECTOR_BYTES;
            let len = room.min(end - offset);
            self.write_at(&zeros[..to_usize(len)], offset)?;
            offset += len;
        }
        Ok(())
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.check_writable().map(drop)
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    /// New bytes read as noise, not as zeros: to write zeros into them takes as long as they are many. What is
    /// preallocated is preallocated in the container.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let new = self.payload_offset.checked_add(size);
        let new = new.filter(|end| i64::try_from(*end).is_ok());
        let new =
            new.ok_or_else(|| Error::new(block::ErrorKind::NoSpace, "The requested file size is too large"))?;
        let container = block::raw::Raw::open(Arc::clone(&self.storage), block::raw::RawOptions::default())?;
        container.resize(new, preallocation)?;
        self.size.store(whole_sectors(size), Ordering::Release);
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        Ok(LayerExtent::new(Stored::Data, max_len.min(self.size() - offset)))
    }
}

impl Image for Luks {
    fn format_name(&self) -> &'static str {
        "luks"
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo { encrypted: true, specific: self.header.lock().info(false), ..ImageInfo::default() })
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}

#[cfg(test)]
mod tests;
