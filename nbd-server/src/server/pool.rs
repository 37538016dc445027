//! Buffers for large requests, bounded whatever clients do.
//!
//! Small requests are served out of a buffer that every thread has of its own. Larger ones take buffers out of a pool
//! that all connections share and of which no connection gets more than its part; where there is none left, a request
//! is served in small pieces instead. So memory has a limit, and nobody waits for somebody else's client to read.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// Bytes of a buffer.
pub const BUFFER_BYTES: usize = 256 << 10;

/// What all connections share.
#[derive(Debug)]
pub struct Pool {
    free: AtomicUsize,
    /// Buffers that have been made and are not used now.
    spare: Mutex<Vec<Box<[u8]>>>,
}

/// What one connection may take.
#[derive(Debug)]
pub(super) struct Part {
    pool: Arc<Pool>,
    free: AtomicUsize,
}

/// A buffer of [`BUFFER_BYTES`]; goes back when it is dropped. Its contents are whatever was there before.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    part: &'a Part,
    bytes: Option<Box<[u8]>>,
}

fn take(free: &AtomicUsize) -> bool {
    free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1)).is_ok()
}

impl Pool {
    /// A pool of so many bytes, in whole buffers.
    pub fn new(bytes: usize) -> Self {
        Self { free: AtomicUsize::new(bytes / BUFFER_BYTES), spare: Mutex::default() }
    }
}

impl Part {
    /// A part of so many bytes, in whole buffers.
    pub(super) fn new(pool: &Arc<Pool>, bytes: usize) -> Self {
        Self { pool: Arc::clone(pool), free: AtomicUsize::new(bytes / BUFFER_BYTES) }
    }

    /// A buffer, if there is one left.
    pub(super) fn take(&self) -> Option<Buffer<'_>> {
        if !take(&self.free) {
            return None;
        }
        if !take(&self.pool.free) {
            self.free.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let spare = self.pool.spare.lock().pop();
        Some(Buffer { part: self, bytes: Some(spare.unwrap_or_else(|| vec![0; BUFFER_BYTES].into())) })
    }

    /// As many buffers as `len` bytes take, or none at all.
    pub(super) fn take_for(&self, len: usize) -> Option<Vec<Buffer<'_>>> {
        (0..len.div_ceil(BUFFER_BYTES)).map(|_| self.take()).collect()
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            self.part.pool.spare.lock().push(bytes);
        }
        self.part.pool.free.fetch_add(1, Ordering::Relaxed);
        self.part.free.fetch_add(1, Ordering::Relaxed);
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.as_deref_mut().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_takes_from_the_whole_and_gives_back() {
        let pool = Arc::new(Pool::new(3 * BUFFER_BYTES));
        let (one, two) = (Part::new(&pool, 2 * BUFFER_BYTES), Part::new(&pool, 2 * BUFFER_BYTES));
        let first = one.take_for(2 * BUFFER_BYTES).unwrap();
        assert!(one.take().is_none(), "no more than its part");
        assert!(two.take_for(2 * BUFFER_BYTES).is_none(), "only one is left");
        let second = two.take().unwrap();
        assert_eq!(second.len(), BUFFER_BYTES);
        drop((first, second));
        assert_eq!(one.take_for(2 * BUFFER_BYTES).unwrap().len(), 2);
        assert_eq!(pool.spare.lock().len(), 3);
    }
}
