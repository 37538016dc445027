//! The split virtqueue (section 2.7), the device's side of it.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use super::chain::{Chain, RingError};
use crate::memory::GuestRam;

const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A queue as the driver has set it up, and how far we are in it.
#[derive(Debug, Clone)]
pub struct Queue {
    max_size: u16,
    /// The size that the driver has chosen.
    pub size: u16,
    /// The driver has finished setting it up.
    pub enabled: bool,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring (written by the driver).
    pub driver: u64,
    /// The used ring (written by the device).
    pub device: u64,
    /// `VIRTIO_F_EVENT_IDX` has been accepted.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` has been accepted.
    pub indirect: bool,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The used index at the last decision about an interrupt.
    signalled: Wrapping<u16>,
}

impl Queue {
    /// A queue of at most `max_size` (a power of two) that is not set up.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            event_idx: false,
            indirect: false,
            next_available: Wrapping(0),
            next_used: Wrapping(0),
            signalled: Wrapping(0),
        }
    }

    /// Back to the state of a new one.
    pub fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// The largest size.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Takes the driver's size, if it is one that the queue can have.
    pub fn set_size(&mut self, size: u16) {
        if size.is_power_of_two() && size <= self.max_size && !self.enabled {
            self.size = size;
        }
    }

    /// The next request that is taken has this index in the available ring; what was returned so far is what the used
    /// ring says.
    ///
    /// # Errors
    /// The ring is not memory.
    pub fn resume(&mut self, ram: &GuestRam, next_available: u16) -> Result<(), RingError> {
        self.next_available = Wrapping(next_available);
        self.next_used = Wrapping(ram.load_u16(self.device.saturating_add(2))?);
        self.signalled = self.next_used;
        Ok(())
    }

    /// The index in the available ring of the next request.
    pub fn next_available(&self) -> u16 {
        self.next_available.0
    }

    fn available_event(&self) -> u64 {
        self.device.saturating_add(4 + 8 * u64::from(self.size))
    }

    fn used_event(&self) -> u64 {
        self.driver.saturating_add(4 + 2 * u64::from(self.size))
    }

    fn available_index(&self, ram: &GuestRam) -> Result<Wrapping<u16>, RingError> {
        Ok(Wrapping(ram.load_u16(self.driver.saturating_add(2))?))
    }

    /// Takes the next request off the available ring.
    ///
    /// # Errors
    /// The ring or the chain breaks the rules.
    pub fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, RingError> {
        let count = (self.available_index(ram)? - self.next_available).0;
        if count == 0 {
            return Ok(None);
        }
        if count > self.size {
            return Err(RingError::Available { count, size: self.size });
        }
        let place = u64::from(self.next_available.0 % self.size);
        let head = ram.load_u16(self.driver.saturating_add(4 + 2 * place))?;
        let chain = Chain::parse(ram, self.descriptors, self.size, head, self.indirect)?;
        self.next_available += 1;
        Ok(Some(chain))
    }

    /// Returns a request, of whose writable part `len` bytes have been written.
    ///
    /// # Errors
    /// The ring is not memory.
    pub fn push(&mut self, ram: &GuestRam, head: u16, len: u32) -> Result<(), RingError> {
        let mut element = [0; 8];
        element[..2].copy_from_slice(&head.to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        let place = u64::from(self.next_used.0 % self.size);
        ram.write(self.device.saturating_add(4 + 8 * place), &element)?;
        self.next_used += 1;
        ram.store_u16(self.device.saturating_add(2), self.next_used.0)?;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what has been returned since the last call (section 2.7.7).
    ///
    /// # Errors
    /// The ring is not memory.
    pub fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, RingError> {
        // What we have published must be seen before we look at what the driver wants.
        fence(Ordering::SeqCst);
        let (old, new) = (self.signalled, self.next_used);
        self.signalled = new;
        if old == new {
            return Ok(false);
        }
        if self.event_idx {
            let event = Wrapping(ram.load_u16(self.used_event())?);
            return Ok(new - event - Wrapping(1) < new - old);
        }
        Ok(ram.load_u16(self.driver)? & AVAILABLE_NO_INTERRUPT == 0)
    }

    /// Tells the driver not to notify us: we look by ourselves.
    ///
    /// # Errors
    /// The ring is not memory.
    pub fn disable_notifications(&mut self, ram: &GuestRam) -> Result<(), RingError> {
        // With EVENT_IDX the event that we do not advance is the way to say so.
        if !self.event_idx {
            ram.store_u16(self.device, USED_NO_NOTIFY)?;
        }
        Ok(())
    }

    /// Tells the driver to notify us of the next request; whether one has come in the meantime (section 2.7.10).
    ///
    /// # Errors
    /// The ring is not memory.
    pub fn enable_notifications(&mut self, ram: &GuestRam) -> Result<bool, RingError> {
        if self.event_idx {
            ram.store_u16(self.available_event(), self.next_available.0)?;
        } else {
            ram.store_u16(self.device, 0)?;
        }
        // Our wish must be seen before we look whether there is something already.
        fence(Ordering::SeqCst);
        Ok(self.available_index(ram)? != self.next_available)
    }
}

#[cfg(test)]
mod tests;
