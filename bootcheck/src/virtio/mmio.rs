//! virtio over plain registers (section 4.2), version 2.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use block::Result;

use super::common::{Common, Interrupt, STATUS_DRIVER_OK};
use super::pci::set_half;
use super::{Device, Queue};
use crate::bus::{Registers, answer, number};
use crate::memory::GuestRam;
use crate::vm::{Line, Vm};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"vimg");
const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;

#[derive(Debug)]
struct MmioInterrupt {
    status: AtomicU32,
    line: Line,
}

impl MmioInterrupt {
    fn fire(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.line.set(true);
    }

    fn acknowledge(&self, bits: u32) {
        if self.status.fetch_and(!bits, Ordering::AcqRel) & !bits == 0 {
            self.line.set(false);
            // A queue may have fired in between.
            if self.status.load(Ordering::Acquire) != 0 {
                self.line.set(true);
            }
        }
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.fire(1);
    }

    fn config(&self) {
        self.fire(2);
    }
}

/// A virtio device behind registers.
#[derive(Debug)]
pub struct VirtioMmio {
    common: Arc<Common>,
    interrupt: Arc<MmioInterrupt>,
    vm: Arc<dyn Vm>,
    address: u64,
}

impl VirtioMmio {
    /// Puts `device` at `address`.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(
        device: Arc<dyn Device>,
        ram: GuestRam,
        vm: Arc<dyn Vm>,
        address: u64,
        line: Line,
    ) -> Result<Self> {
        let interrupt = Arc::new(MmioInterrupt { status: AtomicU32::new(0), line });
        let common = Arc::new(Common::new(device, ram, Arc::clone(&interrupt) as _)?);
        Ok(Self { common, interrupt, vm, address })
    }

    /// The device without its transport.
    pub fn common(&self) -> &Arc<Common> {
        &self.common
    }

    fn set_status(&self, status: u8) {
        let starts = status & !self.common.status() & STATUS_DRIVER_OK != 0;
        let doorbell = self.address + QUEUE_NOTIFY;
        for (queue, kick) in self.common.kicks() {
            if status == 0 {
                self.vm.detach_doorbell(doorbell, Some(u32::from(queue)), kick);
            } else if starts {
                let _ = self.vm.attach_doorbell(doorbell, Some(u32::from(queue)), kick);
            }
        }
        self.common.set_status(status);
        if status == 0 {
            self.interrupt.acknowledge(u32::MAX);
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = |get: fn(&Queue) -> u32| self.common.selected_queue().map_or(0, |q| get(&q));
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => u32::from(self.common.device().id()),
            0x0c => VENDOR,
            0x10 => self.common.device_features(),
            0x34 => queue(|q| u32::from(q.max_size())),
            0x44 => queue(|q| u32::from(q.enabled)),
            0x60 => self.interrupt.status.load(Ordering::Acquire),
            0x70 => u32::from(self.common.status()),
            0xfc => u32::from(self.common.generation()),
            // No shared memory regions: lengths and bases of ones.
            0xb0..=0xbc => u32::MAX,
            _ => 0,
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let word = u16::try_from(value).unwrap_or(u16::MAX);
        let queue = |change: &dyn Fn(&mut Queue)| {
            if let Some(mut queue) = self.common.selected_queue() {
                change(&mut queue);
            }
        };
        match offset {
            0x14 => self.common.select_device_features(value),
            0x20 => self.common.set_driver_features(value),
            0x24 => self.common.select_driver_features(value),
            0x30 => self.common.select_queue(word),
            0x38 => queue(&|q| q.set_size(word)),
            0x44 => queue(&|q| q.enabled = value & 1 != 0),
            QUEUE_NOTIFY => self.common.notify(word),
            0x64 => self.interrupt.acknowledge(value),
            0x70 => self.set_status(u8::try_from(value & 0xff).unwrap_or(0)),
            0x80 | 0x84 => queue(&|q| set_half(&mut q.descriptors, offset & 4 != 0, value)),
            0x90 | 0x94 => queue(&|q| set_half(&mut q.driver, offset & 4 != 0, value)),
            0xa0 | 0xa4 => queue(&|q| set_half(&mut q.device, offset & 4 != 0, value)),
            _ => {}
        }
    }
}

impl Registers for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(CONFIG) {
            Some(at) => self.common.device().config_read(at, data),
            None if data.len() == 4 && offset.is_multiple_of(4) => answer(data, self.register(offset)),
            None => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(CONFIG) {
            Some(at) => self.common.device().config_write(at, data),
            None if data.len() == 4 && offset.is_multiple_of(4) => self.set_register(offset, number(data)),
            None => {}
        }
    }
}
