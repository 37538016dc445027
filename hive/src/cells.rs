//! The base block, bins and cells.

use block::{Error, ErrorKind, Result};

/// Bytes of the base block, and what bins are multiples of.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a bin's header.
const BIN_HEADER: usize = 32;
/// The most bytes of a hive: Windows itself has a limit of 2 GiB.
const MOST: usize = 1 << 30;
/// Where the checksum of the base block lies.
const CHECKSUM: usize = 508;
/// An offset that leads nowhere.
pub(crate) const NOWHERE: u32 = u32::MAX;

pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// Two bytes; zero outside.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u16::from_le_bytes(*field))
}

/// Four bytes; zero outside.
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_le_bytes(*field))
}

/// Sets four bytes; nothing outside.
pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

/// Sets bytes; nothing outside.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        field.copy_from_slice(value);
    }
}

/// A hive.
#[derive(Debug, Clone)]
pub struct Hive {
    /// The base block.
    pub(crate) base: Vec<u8>,
    /// The bins; offsets count from here.
    pub(crate) bins: Vec<u8>,
    /// What follows the bins in the file, as it was.
    pub(crate) rest: Vec<u8>,
    /// The free cell at the end of the bin that was made last (offset), if one was.
    pub(crate) tail: Option<usize>,
    pub(crate) changed: bool,
}

impl Hive {
    /// Takes the bytes of a hive's file.
    ///
    /// # Errors
    /// `Corrupt` if it is none or its bins are damaged; `Unsupported` if its version is not known. One that is in use
    /// ([`is_clean`](Self::is_clean)) is none.
    pub fn parse(mut bytes: Vec<u8>) -> Result<Self> {
        if bytes.len() < BLOCK || !bytes.starts_with(b"regf") {
            return Err(corrupt("this is not a registry hive"));
        }
        if bytes.len() > MOST {
            return Err(Error::unsupported(format!("a registry hive of {} bytes", bytes.len())));
        }
        let (major, minor) = (le32(&bytes, 20), le32(&bytes, 24));
        if major != 1 || !(3..=6).contains(&minor) || le32(&bytes, 28) != 0 {
            return Err(Error::unsupported(format!("a registry hive of version {major}.{minor}")));
        }
        let len = le32(&bytes, 40) as usize;
        if len > bytes.len() - BLOCK || len < BLOCK || !len.is_multiple_of(BLOCK) {
            return Err(corrupt(format!("its bins have {len:#x} bytes, its file {:#x}", bytes.len())));
        }
        let rest = bytes.split_off(BLOCK + len);
        let bins = bytes.split_off(BLOCK);
        let hive = Self { base: bytes, bins, rest, tail: None, changed: false };
        // What a log is going to replace may be anything yet.
        if hive.is_clean() {
            hive.check()?;
        }
        Ok(hive)
    }

    /// A hive with a key at its root and nothing else, as Windows makes them but for its protection: everyone may do
    /// everything.
    pub fn empty() -> Self {
        let mut base = vec![0; BLOCK];
        put(&mut base, 0, b"regf");
        for (at, value) in [(4, 1), (8, 1), (20, 1), (24, 5), (32, 1), (44, 1)] {
            put32(&mut base, at, value);
        }
        let mut hive = Self { base, bins: vec![], rest: vec![], tail: None, changed: true };
        hive.make_root();
        hive
    }

    /// Whether the hive was closed properly: otherwise its logs hold changes that are not in it
    /// ([`recover`](Self::recover)).
    pub fn is_clean(&self) -> bool {
        le32(&self.base, 4) == le32(&self.base, 8) && le32(&self.base, CHECKSUM) == self.checksum()
    }

    /// Whether its base block is what was written.
    pub(crate) fn has_sound_base(&self) -> bool {
        le32(&self.base, CHECKSUM) == self.checksum()
    }

    /// The bytes of the file, with everything that was changed; exactly those that it was made of if nothing was.
    pub fn into_bytes(mut self) -> Vec<u8> {
        if self.changed {
            self.close();
            self.rest.clear();
        }
        let mut bytes = self.base;
        bytes.append(&mut self.bins);
        bytes.append(&mut self.rest);
        bytes
    }

    /// Whether anything is different from what it was made of.
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    pub(crate) fn minor(&self) -> u32 {
        le32(&self.base, 24)
    }

    fn checksum(&self) -> u32 {
        let words = self.base[..CHECKSUM].chunks_exact(4);
        match words.fold(0, |sum, word| sum ^ le32(word, 0)) {
            0 => 1,
            u32::MAX => u32::MAX - 1,
            sum => sum,
        }
    }

    /// Brings the base block up to date.
    pub(crate) fn close(&mut self) {
        let len = u32::try_from(self.bins.len()).unwrap_or(0);
        put32(&mut self.base, 40, len);
        let sum = self.checksum();
        put32(&mut self.base, CHECKSUM, sum);
    }

    /// Looks through bins and cells.
    pub(crate) fn check(&self) -> Result<()> {
        let mut at = 0;
        while at < self.bins.len() {
            let bin = &self.bins[at..];
            let len = le32(bin, 8) as usize;
            if !bin.starts_with(b"hbin") || len < BLOCK || !len.is_multiple_of(BLOCK) || len > bin.len() {
                return Err(corrupt(format!("a damaged bin at {at:#x}")));
            }
            let mut cell = BIN_HEADER;
            while cell < len {
                let size = le32(bin, cell).cast_signed().unsigned_abs() as usize;
                if size < 8 || !size.is_multiple_of(8) || size > len - cell {
                    return Err(corrupt(format!("a damaged cell at {:#x}", at + cell)));
                }
                cell += size;
            }
            at += len;
        }
        Ok(())
    }

    /// What an allocated cell holds.
    pub(crate) fn cell(&self, offset: u32) -> Result<&[u8]> {
        let at = offset as usize;
        let wrong = || corrupt(format!("there is no cell at {offset:#x}"));
        let size = le32(&self.bins, at).cast_signed();
        if offset == NOWHERE || size > -8 {
            return Err(wrong());
        }
        let end = at.checked_add(size.unsigned_abs() as usize);
        end.and_then(|end| self.bins.get(at + 4..end)).ok_or_else(wrong)
    }

    /// The same, to be changed.
    pub(crate) fn cell_mut(&mut self, offset: u32) -> Result<&mut [u8]> {
        let len = self.cell(offset)?.len();
        let at = offset as usize + 4;
        self.changed = true;
        self.bins.get_mut(at..at + len).ok_or_else(|| corrupt("there is no such cell"))
    }

    /// A cell for these bytes.
    pub(crate) fn allocate(&mut self, bytes: &[u8]) -> Result<u32> {
        let need = (bytes.len() + 4).next_multiple_of(8);
        let free = |hive: &Self, at: usize| le32(&hive.bins, at) as usize;
        let at = match self.tail.filter(|at| free(self, *at) >= need) {
            Some(at) => at,
            None => self.new_bin(need)?,
        };
        let left = free(self, at) - need;
        let size = u32::try_from(need).map_err(|_| Error::unsupported("a value of this length"))?;
        put32(&mut self.bins, at, size.wrapping_neg());
        self.bins[at + 4..at + need].fill(0);
        put(&mut self.bins, at + 4, bytes);
        self.tail = (left > 0).then_some(at + need);
        if left > 0 {
            put32(&mut self.bins, at + need, u32::try_from(left).unwrap_or(0));
        }
        self.changed = true;
        u32::try_from(at).map_err(|_| Error::unsupported("the hive becomes too large"))
    }

    /// A new bin that has room for a cell of `need` bytes. Returns where its free cell is.
    fn new_bin(&mut self, need: usize) -> Result<usize> {
        let (at, len) = (self.bins.len(), (need + BIN_HEADER).next_multiple_of(BLOCK));
        if at + len > MOST {
            return Err(Error::unsupported("the hive becomes too large"));
        }
        let number = |value: usize| u32::try_from(value).unwrap_or(0);
        let mut bin = vec![0; len];
        put(&mut bin, 0, b"hbin");
        put32(&mut bin, 4, number(at));
        put32(&mut bin, 8, number(len));
        put32(&mut bin, BIN_HEADER, number(len - BIN_HEADER));
        self.bins.append(&mut bin);
        Ok(at + BIN_HEADER)
    }

    /// Gives a cell up; nothing happens if there is none.
    pub(crate) fn release(&mut self, offset: u32) {
        if let Ok(cell) = self.cell(offset) {
            let size = u32::try_from(cell.len() + 4).unwrap_or(0);
            put32(&mut self.bins, offset as usize, size);
            self.changed = true;
        }
    }
}
