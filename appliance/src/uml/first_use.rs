//! A disk that tells when it is used for the first time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use bootcheck::memory::GuestRam;
use bootcheck::virtio::blk::Blk;
use bootcheck::virtio::{Chain, Device, RingError};
use parking_lot::Mutex;

use super::run::Event;

/// The disk.
#[derive(Debug)]
pub(super) struct FirstUse {
    disk: Arc<Blk>,
    used: AtomicBool,
    sender: Mutex<Sender<Event>>,
}

impl FirstUse {
    pub(super) fn new(disk: Arc<Blk>, sender: Sender<Event>) -> Self {
        Self { disk, used: AtomicBool::new(false), sender: Mutex::new(sender) }
    }
}

impl Device for FirstUse {
    fn id(&self) -> u16 {
        self.disk.id()
    }

    fn pci_class(&self) -> (u8, u8, u8) {
        self.disk.pci_class()
    }

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.disk.queue_sizes()
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.disk.config_read(offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        self.disk.config_write(offset, data);
    }

    fn accepted(&self, features: u64) {
        self.disk.accepted(features);
    }

    fn serve(&self, chain: &Chain, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<u32, RingError> {
        if !self.used.swap(true, Ordering::Relaxed) {
            // If nobody listens, the machine is being ended.
            drop(self.sender.lock().send(Event::FirstUse));
        }
        self.disk.serve(chain, ram, buffer)
    }
}
