//! Encryption of guest data (specification, "crypt_method", "Full disk encryption header pointer").
//!
//! Clusters are encrypted in sectors of 512 bytes, each with its own number: LUKS counts where the sector lies in the
//! file that holds the data, the old AES where the guest sees it. Tables, bitmaps and compressed clusters are not
//! encrypted. All plain guest data goes through [`Qcow2::read_data`], [`Qcow2::write_data`] and [`Qcow2::write_parts`];
//! what they encrypt is a copy, in the thread that asks for it, outside of all locks but the stripes.
//!
//! A raw zero in the file is not a zero of the guest here, so whatever relies on the one being the other has to ask
//! [`Qcow2::is_encrypted`] first.

use std::cell::RefCell;
use std::sync::Arc;

use block::num::to_usize;
use block::{Error as BlockError, Result};
use crypt::{SECTOR, Volume};

use crate::device::Qcow2;
use crate::header::{CRYPT_AES, CRYPT_LUKS, Header};

/// Bytes that are encrypted and written at a time.
const PIECE: usize = 512 << 10;

/// How the data of an image is encrypted.
#[derive(Debug)]
pub(crate) struct Cipher {
    volume: Arc<Volume>,
    /// Sectors are numbered as the guest sees them.
    by_guest: bool,
}

/// Bytes to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    Bytes(&'a [u8]),
    Zeros(u64),
}

impl Part<'_> {
    fn len(self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(len) => len,
        }
    }
}

impl Cipher {
    /// The encryption of an image with this header, unlocked; `None` if its data is not encrypted.
    pub(crate) fn new(header: &Header, volume: Option<Arc<Volume>>) -> Option<Self> {
        let volume = volume.filter(|_| header.crypt_method != 0)?;
        Some(Self { volume, by_guest: header.crypt_method == CRYPT_AES })
    }

    /// The cipher with its key.
    pub(crate) fn volume(&self) -> Arc<Volume> {
        Arc::clone(&self.volume)
    }

    /// The number of the sector at these offsets.
    fn sector(&self, guest: u64, host: u64) -> u64 {
        (if self.by_guest { guest } else { host }) / SECTOR as u64
    }
}

/// Bytes from the start of its sector.
fn in_sector(offset: u64) -> usize {
    to_usize(offset % SECTOR as u64)
}

impl Qcow2 {
    /// Whether guest data is encrypted in the file.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// Whether a write of `len` bytes has to keep others from the sectors at its ends.
    pub(crate) fn splits_sectors(&self, guest: u64, len: u64) -> bool {
        self.is_encrypted() && (in_sector(guest) != 0 || in_sector(guest + len) != 0)
    }

    /// Reads plain guest data.
    pub(crate) fn read_data(&self, buf: &mut [u8], guest: u64, host: u64) -> Result<()> {
        let Some(cipher) = &self.cipher else { return self.data.read_at(buf, host) };
        let lead = in_sector(host);
        let head_len = if lead == 0 { 0 } else { (SECTOR - lead).min(buf.len()) };
        let (head, rest) = buf.split_at_mut(head_len);
        if head_len > 0 {
            let back = lead as u64;
            let sector = self.read_sector(cipher, guest - back, host - back)?;
            head.copy_from_slice(&sector[lead..lead + head_len]);
        }
        let (guest, host) = (guest + head_len as u64, host + head_len as u64);
        let whole = rest.len() / SECTOR * SECTOR;
        let (middle, tail) = rest.split_at_mut(whole);
        if whole > 0 {
            self.data.read_at(middle, host)?;
            cipher.volume.decrypt(cipher.sector(guest, host), middle);
        }
        if !tail.is_empty() {
            let sector = self.read_sector(cipher, guest + whole as u64, host + whole as u64)?;
            tail.copy_from_slice(&sector[..tail.len()]);
        }
        Ok(())
    }

    fn read_sector(&self, cipher: &Cipher, guest: u64, host: u64) -> Result<[u8; SECTOR]> {
        let mut sector = [0; SECTOR];
        self.data.read_at(&mut sector, host)?;
        cipher.volume.decrypt(cipher.sector(guest, host), &mut sector);
        Ok(sector)
    }

    /// Writes plain guest data into a cluster that holds some. If it [splits sectors](Self::splits_sectors), the
    /// clusters are held exclusively.
    pub(crate) fn write_data(&self, bytes: &[u8], guest: u64, host: u64) -> Result<()> {
        let Some(cipher) = &self.cipher else { return self.data.write_at(bytes, host) };
        let end = host + bytes.len() as u64;
        let (lead, trail) = (in_sector(host), in_sector(end));
        let (guest_start, host_start) = (guest - lead as u64, host - lead as u64);
        let before = match lead {
            0 => [0; SECTOR],
            _ => self.read_sector(cipher, guest_start, host_start)?,
        };
        let after = match trail {
            0 => [0; SECTOR],
            _ => {
                let back = trail as u64;
                self.read_sector(cipher, guest + bytes.len() as u64 - back, end - back)?
            }
        };
        let after = if trail == 0 { &[][..] } else { &after[trail..] };
        let parts = [Part::Bytes(&before[..lead]), Part::Bytes(bytes), Part::Bytes(after)];
        self.write_parts(cipher, &parts, guest_start, host_start)
    }

    /// Writes parts that follow each other and together are whole sectors.
    pub(crate) fn write_parts(
        &self,
        cipher: &Cipher,
        parts: &[Part<'_>],
        guest: u64,
        host: u64,
    ) -> Result<()> {
        thread_local! {
            static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        SEALED.with_borrow_mut(|sealed| {
            sealed.clear();
            let mut done = 0;
            for part in parts {
                let mut at = 0;
                while at < part.len() {
                    let room = (PIECE - sealed.len()) as u64;
                    let take = to_usize(room.min(part.len() - at));
                    match part {
                        Part::Bytes(bytes) => sealed.extend_from_slice(&bytes[to_usize(at)..][..take]),
                        Part::Zeros(_) => sealed.resize(sealed.len() + take, 0),
                    }
                    at += take as u64;
                    if sealed.len() == PIECE {
                        self.seal(cipher, sealed, guest + done, host + done)?;
                        done += PIECE as u64;
                        sealed.clear();
                    }
                }
            }
            self.seal(cipher, sealed, guest + done, host + done)
        })
    }

    fn seal(&self, cipher: &Cipher, bytes: &mut [u8], guest: u64, host: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        cipher.volume.encrypt(cipher.sector(guest, host), bytes);
        self.data.write_at(bytes, host)
    }

    /// Writes zeros that the guest sees as such.
    pub(crate) fn write_guest_zeros(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        match &self.cipher {
            None => crate::write::write_zeros(&*self.data, host, len),
            Some(cipher) => self.write_parts(cipher, &[Part::Zeros(len)], guest, host),
        }
    }

    /// Makes this image, which is to be empty, one that is encrypted with LUKS: `prefix` is the beginning of the
    /// LUKS header, which takes `len` bytes. Open it anew with the key before it is used.
    ///
    /// # Errors
    /// It is encrypted already, read-only, no space, or the host failed.
    pub fn add_luks_header(&self, prefix: &[u8], len: u64) -> Result<()> {
        let mut area = prefix.to_vec();
        area.resize(to_usize(len), 0);
        let _flushing = self.flush_lock.lock();
        let run = self.place_table(&area)?;
        self.change_header_locked(|header| {
            header.luks = Some((run.offset, len));
            encrypt_with(header, CRYPT_LUKS)
        })
    }

    /// Makes this image, which is to be empty, one with the old AES encryption.
    ///
    /// # Errors
    /// As [`add_luks_header`](Self::add_luks_header).
    pub fn use_old_aes(&self) -> Result<()> {
        self.change_header(|header| encrypt_with(header, CRYPT_AES))
    }
}

fn encrypt_with(header: &mut Header, method: u32) -> Result<()> {
    if header.crypt_method != 0 {
        return Err(BlockError::usage("the image is encrypted already"));
    }
    header.crypt_method = method;
    Ok(())
}
