//! A LUKS volume of a guest, of either version: opened to the disk within.
//!
//! This is what dm-crypt does for a guest. [`Luks`](crate::Luks) is another matter: an image in the format that qemu calls
//! `luks`, which grows, and whose passphrases can be changed.

use std::sync::Arc;

use block::adapter::DeviceStorage;
use block::device::check_range;
use block::num::{align_down, low_u32};
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Result, Storage, Stored, ZeroMode};

use crate::luks::{self, Effort, Header};
use crate::luks2::Metadata;
use crate::secret::Secret;
use crate::sectors::Sectors;
use crate::volume::Volume;

/// A header of either version, checked in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Container {
    /// LUKS1.
    One(Box<Header>),
    /// LUKS2.
    Two(Box<Metadata>),
}

impl Container {
    /// Reads the header at the start of a device.
    ///
    /// # Errors
    /// There is none, it is damaged, or it needs what is not here, by name; or the device failed.
    pub fn read(device: &Arc<dyn BlockDevice>) -> Result<Self> {
        let storage = DeviceStorage::new(Arc::clone(device));
        let mut start = [0; 8];
        storage.read_at(&mut start, 0)?;
        if start == luks::MAGIC {
            let header = Header::read(&storage, 0)?;
            header.spec()?;
            return Ok(Self::One(Box::new(header)));
        }
        Ok(Self::Two(Box::new(Metadata::read(&storage)?)))
    }

    /// 1 or 2.
    pub fn version(&self) -> u32 {
        match self {
            Self::One(_) => 1,
            Self::Two(_) => 2,
        }
    }

    /// The name of the volume.
    pub fn uuid(&self) -> &str {
        match self {
            Self::One(header) => &header.uuid,
            Self::Two(metadata) => &metadata.uuid,
        }
    }

    /// What its volume key is recognised by, so that one who keeps keys finds the right one without any derivation. No secret.
    pub fn fingerprint(&self) -> Vec<u8> {
        match self {
            Self::One(header) => [&header.digest[..], &header.digest_salt].concat(),
            Self::Two(metadata) => [&metadata.digest.digest[..], &metadata.digest.salt].concat(),
        }
    }

    /// The volume key, by a passphrase. What trying it costs is taken from `effort`.
    ///
    /// # Errors
    /// `Permission`: no slot has that passphrase; `Denied`: trying it takes more work or memory than `effort` allows; or the
    /// device failed.
    pub fn unlock(
        &self,
        device: &Arc<dyn BlockDevice>,
        passphrase: &[u8],
        effort: &mut Effort,
    ) -> Result<Secret> {
        let storage = DeviceStorage::new(Arc::clone(device));
        match self {
            Self::One(header) => Ok(luks::find_key(&storage, 0, header, passphrase, effort)?.1),
            Self::Two(metadata) => Ok(metadata.unlock(&storage, passphrase, effort)?.1),
        }
    }

    /// The disk within, by the volume key.
    ///
    /// # Errors
    /// The device ends before the disk does, or the key is of a length that the cipher does not have.
    pub fn open(&self, device: &Arc<dyn BlockDevice>, key: &Secret) -> Result<Decrypted> {
        match self {
            Self::One(header) => {
                let volume = Volume::new(header.spec()?.0, key)?;
                Decrypted::new(device, volume, 0, header.payload_offset, None)
            }
            Self::Two(metadata) => {
                let segment = &metadata.segment;
                Decrypted::new(device, metadata.volume(key)?, segment.iv_tweak, segment.offset, segment.size)
            }
        }
    }
}

/// The disk within an encrypted volume.
#[derive(Debug)]
pub struct Decrypted {
    storage: DeviceStorage,
    sectors: Sectors,
    start: u64,
    size: u64,
    sector_size: u32,
}

impl Decrypted {
    fn new(
        device: &Arc<dyn BlockDevice>,
        volume: Volume,
        first: u64,
        start: u64,
        size: Option<u64>,
    ) -> Result<Self> {
        let sector = volume.sector_size() as u64;
        let len = device.size();
        // What is no whole sector at the end is not there (dm-crypt refuses such a device; cryptsetup cuts it off).
        let room = len.checked_sub(start).map(|room| align_down(room, sector));
        match room {
            Some(room) if size.is_none_or(|size| size <= room && size.is_multiple_of(sector)) => Ok(Self {
                storage: DeviceStorage::new(Arc::clone(device)),
                sectors: Sectors::new(volume, first),
                start,
                size: size.unwrap_or(room),
                sector_size: low_u32(sector),
            }),
            _ => Err(Error::new(
                ErrorKind::Truncated,
                format!("the encrypted disk at {start:#x} does not fit on its device ({len:#x} bytes)"),
            )),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only() { Err(Error::read_only()) } else { Ok(()) }
    }
}

impl BlockDevice for Decrypted {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn limits(&self) -> Limits {
        let alignment = self.storage.alignment().max(self.sector_size);
        Limits { alignment, ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.sectors.read(&self.storage, self.start, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.check_writable()?;
        self.sectors.write(&self.storage, self.start, buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size)?;
        self.check_writable()?;
        if mode.no_fallback {
            return Err(Error::unsupported("an encrypted disk has no fast way to write zeros"));
        }
        self.sectors.write_zeros(&self.storage, self.start, offset, len)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size)?;
        self.check_writable()
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        Ok(LayerExtent::new(Stored::Data, max_len.min(self.size - offset)))
    }
}

#[cfg(test)]
mod tests;
