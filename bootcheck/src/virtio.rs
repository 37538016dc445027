//! virtio 1.2 devices: the split queue, what both transports share, the transports, and the devices.
//!
//! Everything that comes from the guest is hostile until it has been checked: a request that makes no sense gets an
//! error status, a ring that makes no sense stops the device until the guest resets it (`DEVICE_NEEDS_RESET`), and
//! nothing stops the monitor.

pub mod blk;
mod chain;
mod common;
#[cfg(test)]
pub(crate) mod driver;
pub(crate) mod fuzz;
mod mmio;
mod msix;
mod pci;
mod queue;
pub mod rng;

use std::fmt::Debug;

pub use chain::{Chain, Cursor, RingError, RingResult};
pub(crate) use common::Service;
pub use common::{Common, Interrupt};
pub use mmio::VirtioMmio;
pub(crate) use pci::BAR_LEN;
pub use pci::{PciPlace, VirtioPci};
pub use queue::Queue;

use crate::memory::GuestRam;

/// `VIRTIO_F_INDIRECT_DESC`.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// A kind of device, without its transport.
pub trait Device: Debug + Send + Sync {
    /// Its number (section 5).
    fn id(&self) -> u16;
    /// Class, subclass and programming interface on PCI.
    fn pci_class(&self) -> (u8, u8, u8);
    /// The feature bits of its kind (the bits of the rings are added).
    fn features(&self) -> u64;
    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads its configuration; zeros past the end.
    fn config_read(&self, offset: u64, data: &mut [u8]);
    /// Writes its configuration.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// The driver has accepted these features; 0 after a reset.
    fn accepted(&self, features: u64) {
        let _ = features;
    }
    /// Serves one request and returns how many bytes were written to its device-writable part. `buffer` is kept
    /// from request to request.
    ///
    /// # Errors
    /// The request cannot even be answered.
    fn serve(&self, chain: &Chain, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<u32, RingError>;
}
