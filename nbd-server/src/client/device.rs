//! An export as a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::extent::all_data;
use block::num::{align_down, align_up, to_usize};
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Preallocation, Result, Stored, ZeroMode};
use parking_lot::{Mutex, RwLock};

use crate::proto::{Errno, HeaderStyle, allocation, command, command_flags, transmission};
use crate::uri::ExportName;

use super::connection::Call;
use super::extents::Extents;
use super::failure::{Failure, Outcome};
use super::handshake::{ExportInfo, Negotiated, StartTls};
use super::pool::Pool;

/// The longest payload that is sent or asked for at once, whatever the server allows.
const MOST_PAYLOAD: u64 = 32 << 20;
/// The longest range of a compact request without payload: far from the edge of 32 bits, where servers fall.
const MOST_COMPACT: u64 = 1 << 31;
/// The least that a status is asked for.
const LEAST_STATUS: u64 = 4 << 20;
/// Zeros that are written at once where the server cannot write zeros itself.
const ZEROS: u64 = 1 << 20;

/// A disk that a server exports.
#[derive(Debug)]
pub struct NbdDevice {
    pool: Arc<Pool>,
    size: AtomicU64,
    read_only: bool,
    flushes: bool,
    /// For servers that want whole blocks: who writes parts of a block does so alone.
    parts: RwLock<()>,
    extents: Mutex<Extents>,
}

impl NbdDevice {
    /// Connects to an export.
    ///
    /// # Errors
    /// The server cannot be reached, does not have the export, or it cannot be used; for writing, if it is read-only.
    pub fn open(name: &ExportName, tls: Option<Arc<dyn StartTls>>, writable: bool) -> Result<Self> {
        Self::over(Pool::open(name, tls)?, writable)
    }

    /// A disk over a connection whose handshake is over.
    pub(super) fn of(first: Negotiated, name: ExportName, writable: bool) -> Result<Self> {
        Self::over(Pool::of(first, name), writable)
    }

    fn over(pool: Arc<Pool>, writable: bool) -> Result<Self> {
        if writable && pool.export.can(transmission::READ_ONLY) {
            // qemu's words.
            return Err(Error::new(ErrorKind::ReadOnly, "request on write denied without write permission"));
        }
        Ok(Self {
            size: AtomicU64::new(pool.export.size),
            read_only: !writable,
            flushes: true,
            parts: RwLock::new(()),
            extents: Mutex::default(),
            pool,
        })
    }

    /// The same, but flushes do nothing: what has been written is as safe as the server makes it by itself.
    #[must_use]
    pub fn without_flushes(self) -> Self {
        Self { flushes: false, ..self }
    }

    /// What the server has said of the export.
    pub fn export(&self) -> &ExportInfo {
        &self.pool.export
    }

    /// The export's name.
    pub fn name(&self) -> &ExportName {
        self.pool.name()
    }

    fn can(&self, flag: u16) -> bool {
        self.pool.export.can(flag)
    }

    /// The block that requests have to be multiples of.
    fn block(&self) -> u64 {
        self.pool.export.min_block.into()
    }

    /// The longest payload.
    fn payload(&self) -> u64 {
        let most = u64::from(self.pool.export.max_block).min(MOST_PAYLOAD);
        (most / self.block()).max(1) * self.block()
    }

    /// The longest range of a request without payload.
    fn range(&self) -> u64 {
        if self.pool.style == HeaderStyle::Extended { u64::MAX / 2 + 1 } else { MOST_COMPACT }
    }

    /// Carries out a request.
    fn call(&self, call: &Call<'_>, buf: &mut [u8]) -> Outcome<()> {
        self.pool.run(|link| link.connection.transact(call, buf)).map(drop)
    }

    /// Says what was tried.
    fn explain(&self, call: &Call<'_>, failure: Failure) -> Error {
        let what = match call.command {
            command::READ => "reading",
            command::WRITE => "writing",
            command::TRIM => "discarding",
            command::WRITE_ZEROES => "zeroing",
            command::BLOCK_STATUS => "asking for the extents of",
            command::FLUSH => return failure.into_error().context(format!("{}: flushing", self.name())),
            _ => {
                return failure.into_error().context(format!(
                    "{}: {}",
                    self.name(),
                    command::name(call.command)
                ));
            }
        };
        failure.into_error().context(format!(
            "{}: {what} {} bytes at {:#x}",
            self.name(),
            call.length,
            call.offset
        ))
    }

    /// A request without data in either direction, in as many parts as it takes.
    fn plain(
        &self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> std::result::Result<(), (Failure, Call<'static>)> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let length = (end - at).min(self.range());
            let call = Call { command, flags, offset: at, length, payload: &[] };
            self.call(&call, &mut []).map_err(|failure| (failure, call))?;
            at += length;
        }
        Ok(())
    }

    /// Reads whole blocks.
    fn read_blocks(&self, buf: &mut [u8], mut offset: u64) -> Result<()> {
        for part in buf.chunks_mut(to_usize(self.payload())) {
            let length = part.len() as u64;
            let call = Call { command: command::READ, flags: 0, offset, length, payload: &[] };
            self.call(&call, part).map_err(|failure| self.explain(&call, failure))?;
            offset += length;
        }
        Ok(())
    }

    /// Writes whole blocks.
    fn write_blocks(&self, buf: &[u8], mut offset: u64) -> Result<()> {
        for part in buf.chunks(to_usize(self.payload())) {
            let flags = if self.pool.style == HeaderStyle::Extended { command_flags::PAYLOAD_LEN } else { 0 };
            let length = part.len() as u64;
            let call = Call { command: command::WRITE, flags, offset, length, payload: part };
            self.call(&call, &mut []).map_err(|failure| self.explain(&call, failure))?;
            offset += length;
        }
        Ok(())
    }

    /// The whole blocks around a range.
    fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.block();
        let start = align_down(offset, block);
        // The size is a multiple of the block, so that this stays on the disk.
        let end = align_up(offset + len, block).unwrap_or(u64::MAX).min(self.size());
        (start, end)
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        let block = self.block();
        offset.is_multiple_of(block) && len.is_multiple_of(block)
    }

    /// Writes parts of blocks by reading the rest of them.
    fn write_parts(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (start, end) = self.around(offset, buf.len() as u64);
        let _alone = self.parts.write();
        let mut whole = vec![0; to_usize(end - start)];
        let block = to_usize(self.block());
        let last = whole.len() - block;
        self.read_blocks(&mut whole[..block], start)?;
        if last > 0 {
            self.read_blocks(&mut whole[last..], start + last as u64)?;
        }
        let at = to_usize(offset - start);
        whole[at..at + buf.len()].copy_from_slice(buf);
        self.write_blocks(&whole, start)
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::read_only());
        }
        check_range(offset, len, self.size())
    }

    fn changed(&self, offset: u64, len: u64) {
        self.extents.lock().change(offset, len);
    }

    /// Zeros by the server: whole blocks. `false`: it cannot.
    fn zero_blocks(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<bool> {
        let fast = mode.no_fallback;
        if !self.can(transmission::SEND_WRITE_ZEROES) || fast && !self.can(transmission::SEND_FAST_ZERO) {
            return Ok(false);
        }
        let mut flags = if mode.may_unmap { 0 } else { command_flags::NO_HOLE };
        flags |= if fast { command_flags::FAST_ZERO } else { 0 };
        match self.plain(command::WRITE_ZEROES, flags, offset, len) {
            Ok(()) => Ok(true),
            // Some servers announce what they then refuse.
            Err((Failure::Refused { errno: Errno::ENOTSUP | Errno::EINVAL, .. }, _)) => Ok(false),
            Err((failure, call)) => Err(self.explain(&call, failure)),
        }
    }

    /// Zeros as bytes.
    fn write_zeros(&self, mut offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let zeros = vec![0; to_usize(len.min(ZEROS))];
        while offset < end {
            let now = (end - offset).min(ZEROS);
            self.write(&zeros[..to_usize(now)], offset)?;
            offset += now;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        if self.is_aligned(offset, buf.len() as u64) {
            let _shared = (self.block() > 1).then(|| self.parts.read());
            return self.write_blocks(buf, offset);
        }
        self.write_parts(buf, offset)
    }

    /// Asks the server for the extents from `offset` on.
    fn ask(&self, offset: u64, max_len: u64) -> Result<(u64, u64)> {
        let start = align_down(offset, self.block());
        let wanted = max_len.max(LEAST_STATUS).min(self.range()).saturating_add(offset - start);
        let length =
            align_up(wanted, self.block()).unwrap_or(wanted).min(self.size() - start).min(self.range());
        let call = Call { command: command::BLOCK_STATUS, flags: 0, offset: start, length, payload: &[] };
        let generation = self.extents.lock().generation();
        let statuses = self
            .pool
            .run(|link| {
                let mut answer = link.connection.transact(&call, &mut [])?;
                let ours = answer.statuses.iter().position(|(id, _)| Some(*id) == link.allocation);
                let strange = || Failure::nonsense("a status of a context that has not been chosen");
                Ok(answer.statuses.swap_remove(ours.ok_or_else(strange)?).1)
            })
            .map_err(|failure| self.explain(&call, failure))?;
        let mut extents = self.extents.lock();
        let mut answer = Extents::default();
        answer.keep(0, start, self.size(), &statuses);
        extents.keep(generation, start, self.size(), &statuses);
        // A server that says nothing of the offset itself: then it is data as far as can be known.
        Ok(answer.at(offset).unwrap_or((1, 0)))
    }
}

impl BlockDevice for NbdDevice {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        let export = &self.pool.export;
        Limits {
            alignment: export.min_block,
            preferred: export.preferred_block,
            discard_granularity: export.min_block.max(4096),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        check_range(offset, len, self.size())?;
        if self.is_aligned(offset, len) {
            return self.read_blocks(buf, offset);
        }
        let (start, end) = self.around(offset, len);
        let mut whole = vec![0; to_usize(end - start)];
        self.read_blocks(&mut whole, start)?;
        let at = to_usize(offset - start);
        buf.copy_from_slice(&whole[at..at + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let written = self.write(buf, offset);
        self.changed(offset, len);
        written
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let block = self.block();
        let start = align_up(offset, block).unwrap_or(offset).min(offset + len);
        let end = align_down(offset + len, block).max(start);
        let shared = (block > 1).then(|| self.parts.read());
        let zeroed = end == start || self.zero_blocks(start, end - start, mode)?;
        drop(shared);
        let result = match zeroed {
            false if mode.no_fallback => Err(Error::unsupported("the server cannot write zeros fast")),
            false => self.write_zeros(offset, len),
            true => self
                .write_zeros(offset, start - offset)
                .and_then(|()| self.write_zeros(end, offset + len - end)),
        };
        self.changed(offset, len);
        result
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        let block = self.block();
        let start = align_up(offset, block).unwrap_or(offset);
        let end = align_down(offset + len, block);
        if start >= end || !self.can(transmission::SEND_TRIM) {
            return Ok(());
        }
        let done = match self.plain(command::TRIM, 0, start, end - start) {
            // Nothing has to become of it.
            Err((Failure::Refused { errno: Errno::ENOTSUP | Errno::EINVAL, .. }, _)) => Ok(()),
            other => other.map_err(|(failure, call)| self.explain(&call, failure)),
        };
        self.changed(offset, len);
        done
    }

    fn flush(&self) -> Result<()> {
        if self.read_only || !self.flushes || !self.can(transmission::SEND_FLUSH) {
            return Ok(());
        }
        // There is more than one connection only where a flush on any of them is one of all (CAN_MULTI_CONN).
        let call = Call { command: command::FLUSH, flags: 0, offset: 0, length: 0, payload: &[] };
        self.call(&call, &mut []).map_err(|failure| self.explain(&call, failure))
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if !self.can(transmission::SEND_RESIZE) || preallocation != Preallocation::Off {
            return Err(Error::unsupported("Cannot resize NBD nodes")
                .hint("this server does not change the size of its exports"));
        }
        if self.read_only {
            return Err(Error::read_only());
        }
        if i64::try_from(size).is_err() || !size.is_multiple_of(self.block()) {
            return Err(Error::usage(format!("the export cannot have a size of {size} bytes")));
        }
        let call = Call { command: command::RESIZE, flags: 0, offset: size, length: 0, payload: &[] };
        self.call(&call, &mut []).map_err(|failure| self.explain(&call, failure))?;
        self.size.store(size, Ordering::Release);
        self.changed(0, u64::MAX);
        Ok(())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        if !self.pool.has_allocation {
            return Ok(all_data(offset, max_len, self.size()));
        }
        let known = self.extents.lock().at(offset);
        let (len, flags) = match known {
            Some(known) => known,
            None => self.ask(offset, max_len)?,
        };
        // Space that is given back but does not read as zeros reads as anything: it has to be read.
        let stored = if flags & allocation::ZERO != 0 { Stored::Zero } else { Stored::Data };
        Ok(LayerExtent::new(stored, len.min(max_len)))
    }
}
