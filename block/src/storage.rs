//! The host side: the bytes of a container that formats keep their structures in.

use std::fmt::Debug;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use crate::device::ZeroMode;
use crate::error::{Error, Result};

/// A run of bytes of a storage that is data or hole throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostExtent {
    /// Whether there may be bytes other than zero (false: a hole).
    pub data: bool,
    /// Length in bytes, at least 1.
    pub len: u64,
}

/// A container of bytes: a file, a block device, memory, or a [`BlockDevice`](crate::BlockDevice) seen
/// as one. Methods may be called from any number of threads. Those that change something refuse, unless a container has them:
/// it is read-only then.
pub trait Storage: Debug + Send + Sync {
    /// The length in bytes now.
    ///
    /// # Errors
    /// The host failed.
    fn len(&self) -> Result<u64>;

    /// Whether the length is 0.
    ///
    /// # Errors
    /// The host failed.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends to `len` bytes; new bytes read as zeros. A container of fixed length (a block
    /// device) accepts any length up to its own and does nothing.
    ///
    /// # Errors
    /// No space, read-only, or host failure.
    fn set_len(&self, _len: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// Fills `buf` from `offset`; bytes past the end read as zeros.
    ///
    /// # Errors
    /// The host failed.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`, extending the container where needed.
    ///
    /// # Errors
    /// No space, read-only, or host failure.
    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// Writes the buffers one after the other from `offset`.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> Result<()> {
        for buf in bufs {
            self.write_at(buf, offset)?;
            offset += buf.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros, extending the container where needed. With
    /// [`ZeroMode::may_unmap`] space may be given back.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at); `Unsupported` if [`ZeroMode::no_fallback`] and there is no fast way.
    fn zero_range(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        Err(Error::read_only())
    }

    /// Gives back the space of a range, as far as the host can; what it reads as is unspecified.
    ///
    /// # Errors
    /// The host failed (that it cannot discard is not a failure).
    fn discard_range(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// Takes space for a range without changing what it reads as, extending the container where needed.
    ///
    /// # Errors
    /// No space, `Unsupported` where the host cannot.
    fn allocate_range(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// When this returns, every completed write is durable.
    ///
    /// # Errors
    /// The host failed.
    fn sync(&self) -> Result<()>;

    /// Whether there is data or a hole at `offset` (below the length), for at most `max_len` bytes.
    ///
    /// # Errors
    /// The host failed.
    fn extent(&self, offset: u64, max_len: u64) -> Result<HostExtent>;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Whether the length cannot change (a block device).
    fn fixed_len(&self) -> bool {
        false
    }

    /// Changes the length of a container whose length is [fixed](Self::fixed_len), where whoever provides it can do that
    /// (an export). `Ok(false)`: nobody can.
    ///
    /// # Errors
    /// It was refused, or failed.
    fn resize_fixed(&self, len: u64) -> Result<bool> {
        let _ = len;
        Ok(false)
    }

    /// Requests in multiples of this many bytes avoid copies (O_DIRECT, device sectors); 1 if anything
    /// goes. Unaligned requests work all the same.
    fn alignment(&self) -> u32 {
        1
    }

    /// Bytes of host storage that are taken (`st_blocks`), if that can be known.
    ///
    /// # Errors
    /// The host failed.
    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Makes `len` bytes at `offset` share the blocks of `source` at `source_offset` (FICLONERANGE).
    /// `Ok(false)`: not possible for this pair or alignment; nothing has changed.
    ///
    /// # Errors
    /// No space, or host failure.
    fn clone_range(&self, offset: u64, source: &dyn Storage, source_offset: u64, len: u64) -> Result<bool> {
        let _ = (offset, source, source_offset, len);
        Ok(false)
    }

    /// The descriptor of the file behind it, if it is a file.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What people call it: a path, usually.
    fn name(&self) -> String;
}
