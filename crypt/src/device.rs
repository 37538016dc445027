//! A stand-alone LUKS container as a disk: the sectors behind the header.
//!
//! Nothing in the file says which sectors have been written: a new container reads as noise, and a hole in the
//! file is no zeros. Zeros have to be written like everything else, and discarding does nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::image::{Image, ImageInfo};
use block::num::align_up;
use block::{BlockDevice, Error, LayerExtent, Limits, Preallocation, Result, Storage, Stored, ZeroMode};
use parking_lot::Mutex;

use crate::luks::slots::{self, Change};
use crate::luks::{Effort, Header, Unlocked, Unlocker, unlock_with};
use crate::secret::Secret;
use crate::sectors::Sectors;
use crate::volume::SECTOR;

const SECTOR_BYTES: u64 = SECTOR as u64;

/// An opened LUKS container.
#[derive(Debug)]
pub struct Luks {
    storage: Arc<dyn Storage>,
    /// As it is on the disk.
    header: Mutex<Header>,
    /// Where the disk begins in the container, in bytes.
    payload_offset: u64,
    /// `None`: only the description is wanted.
    sectors: Option<Sectors>,
    /// The same, with the effort for trying passphrases.
    key: Option<(Secret, Effort)>,
    size: AtomicU64,
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
        Ok(Self {
            sectors: Some(Sectors::new(volume, 0)),
            key: Some((key, effort)),
            ..Self::new(storage, header)?
        })
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
            sectors: None,
            key: None,
            size: AtomicU64::new(size),
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

    fn sectors(&self) -> Result<&Sectors> {
        self.sectors.as_ref().ok_or_else(without_passphrase)
    }

    fn check_writable(&self) -> Result<&Sectors> {
        if self.storage.read_only() {
            return Err(Error::read_only());
        }
        self.sectors()
    }
}

fn without_passphrase() -> Error {
    Error::unsupported("the image was opened without its passphrase")
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
        self.sectors()?.read(&*self.storage, self.payload_offset, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.check_writable()?.write(&*self.storage, self.payload_offset, buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size())?;
        if mode.no_fallback {
            return Err(Error::unsupported("an encrypted disk has no fast way to write zeros"));
        }
        self.check_writable()?.write_zeros(&*self.storage, self.payload_offset, offset, len)
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
