//! A request (section 5.2.6), taken apart and understood before anything is done.

use block::num::to_usize;
use block::{Error, Result};

use super::MAX_RANGES;
use crate::memory::GuestRam;
use crate::virtio::{Chain, Cursor, RingError};

/// Bytes of a sector, whatever the block size is.
pub(crate) const SECTOR: u64 = 512;
const HEADER_BYTES: usize = 16;
const HEADER_LEN: u64 = HEADER_BYTES as u64;
const RANGE_LEN: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// A segment of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) sector: u64,
    pub(crate) sectors: u32,
    pub(crate) unmap: bool,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    Unsupported(u32),
}

/// A request.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) kind: Kind,
    pub(crate) sector: u64,
    /// Bytes of data, in whichever direction it goes.
    pub(crate) data_len: u64,
    chain: &'a Chain,
}

impl<'a> Request<'a> {
    /// Understands a chain, the last writable byte of which is the status.
    pub(crate) fn parse(chain: &'a Chain, ram: &GuestRam) -> Result<Self> {
        let mut header = [0; HEADER_BYTES];
        chain.reader().read(ram, &mut header).map_err(|e| bad("header", e))?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let out_len = chain.readable_len().saturating_sub(HEADER_LEN);
        let in_len = chain.writable_len().saturating_sub(1);
        let (kind, data_len) = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => (Kind::Read, in_len),
            T_OUT => (Kind::Write, out_len),
            T_FLUSH => (Kind::Flush, 0),
            T_GET_ID => (Kind::GetId, in_len),
            T_DISCARD => (Kind::Discard(ranges(chain, ram, out_len, false)?), out_len),
            T_WRITE_ZEROES => (Kind::WriteZeroes(ranges(chain, ram, out_len, true)?), out_len),
            other => (Kind::Unsupported(other), 0),
        };
        Ok(Self { kind, sector, data_len, chain })
    }

    /// Where the guest's data begins.
    pub(crate) fn data_out(&self) -> Cursor<'a> {
        let mut cursor = self.chain.reader();
        cursor.skip(HEADER_LEN);
        cursor
    }

    /// Where data for the guest goes.
    pub(crate) fn data_in(&self) -> Cursor<'a> {
        self.chain.writer()
    }
}

fn bad(what: &str, error: RingError) -> Error {
    Error::from_source(block::ErrorKind::Invalid, error).context(format!("{what} of a request"))
}

/// Reads the segments of a discard or write-zeroes request; flags other than "unmap" (of write-zeroes) are refused
/// (section 5.2.6.2).
fn ranges(chain: &Chain, ram: &GuestRam, len: u64, unmap_allowed: bool) -> Result<Vec<Range>> {
    let count = len / RANGE_LEN as u64;
    if count == 0 || count > u64::from(MAX_RANGES) || !len.is_multiple_of(RANGE_LEN as u64) {
        return Err(Error::invalid(format!("segments of a request take {len} bytes")));
    }
    let mut cursor = chain.reader();
    cursor.skip(HEADER_LEN);
    let mut bytes = vec![0; to_usize(len)];
    cursor.read(ram, &mut bytes).map_err(|e| bad("segments", e))?;
    bytes.as_chunks::<RANGE_LEN>().0.iter().map(|chunk| range(*chunk, unmap_allowed)).collect()
}

fn range(bytes: [u8; RANGE_LEN], unmap_allowed: bool) -> Result<Range> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    if flags > u32::from(unmap_allowed) {
        return Err(Error::unsupported(format!("flags {flags:#x} in a segment of a request")));
    }
    Ok(Range {
        sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        sectors: u32::from_le_bytes([n0, n1, n2, n3]),
        unmap: flags & 1 != 0,
    })
}
