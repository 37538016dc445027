//! virtio over PCI, modern (section 4.1): one memory window with all structures, MSI-X, the interrupt line without.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use block::Result;
use parking_lot::Mutex;

use super::common::{Common, Interrupt};
use super::msix::{CONTROL_WRITABLE, Msix};
use super::{Device, Queue};
use crate::bus::number;
use crate::memory::GuestRam;
use crate::pci::{
    CAP_MSIX, CAP_VENDOR, COMMAND_INTX_DISABLE, COMMAND_MEMORY, ConfigSpace, Function, Identity, OFFSET_BAR0,
    OFFSET_COMMAND, OFFSET_INTERRUPT_LINE, STATUS_INTERRUPT,
};
use crate::vm::{Line, Vm};

/// The length of the memory window.
pub(crate) const BAR_LEN: u32 = 0x8000;
// What lies in it, a page each.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// `VIRTIO_MSI_NO_VECTOR`.
const NO_VECTOR: u16 = 0xffff;
const COMMON_LEN: usize = 64;

/// Where a device is on the bus.
#[derive(Debug, Clone)]
pub struct PciPlace {
    /// The address of its window before the guest moves it; 0: not set up (firmware does that).
    pub address: u32,
    /// Its interrupt line.
    pub line: Line,
    /// The first of KVM's numbers for its messages.
    pub first_gsi: u32,
}

/// Interrupts by message or by line.
#[derive(Debug)]
struct PciInterrupt {
    msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    line: Line,
    /// The command and status registers are in there.
    config: Mutex<ConfigSpace>,
}

impl PciInterrupt {
    fn fire(&self, vector: u16, isr: u8) {
        if self.msix.enabled() {
            if vector != NO_VECTOR {
                self.msix.fire(vector);
            }
        } else {
            self.isr.fetch_or(isr, Ordering::AcqRel);
            self.settle_line();
        }
    }

    /// The line follows the ISR, unless messages are used or the guest has disabled it.
    fn settle_line(&self) {
        let mut config = self.config.lock();
        let asserted = self.isr.load(Ordering::Acquire) != 0;
        config.set_status(STATUS_INTERRUPT, asserted);
        let disabled = config.command() & COMMAND_INTX_DISABLE != 0 || self.msix.enabled();
        self.line.set(asserted && !disabled);
    }

    /// Reading the ISR acknowledges.
    fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::AcqRel);
        self.settle_line();
        isr
    }

    fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.settle_line();
    }

    /// A vector that the driver asks for, as far as it exists (section 4.1.5.1.2.1).
    fn vector(&self, wanted: u16) -> u16 {
        if usize::from(wanted) <= self.queue_vectors.len() { wanted } else { NO_VECTOR }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        let vector =
            self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        self.fire(vector, ISR_QUEUE);
    }

    fn config(&self) {
        self.fire(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }
}

/// The addresses of notifications that KVM turns into events without an exit.
#[derive(Debug, Default)]
struct Doorbells {
    /// A driver has begun to use the device.
    wanted: bool,
    /// The window in which they are attached; 0 if they are not.
    attached: u64,
}

/// A virtio device on the bus.
#[derive(Debug)]
pub struct VirtioPci {
    common: Arc<Common>,
    interrupt: Arc<PciInterrupt>,
    vm: Arc<dyn Vm>,
    /// Where the window is decoded; 0 if it is not.
    window: AtomicU64,
    doorbells: Mutex<Doorbells>,
    /// Offsets in configuration space of the MSI-X capability and of the window into the window.
    msix_at: u8,
    access_at: u8,
}

impl VirtioPci {
    /// Puts `device` on the bus.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(device: Arc<dyn Device>, ram: GuestRam, vm: Arc<dyn Vm>, place: PciPlace) -> Result<Self> {
        let queues = device.queue_sizes().len();
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let mut config = config_space(device.as_ref(), &place);
        let access_at = add_structures(&mut config);
        let msix_at = add_msix(&mut config, vectors);
        let interrupt = Arc::new(PciInterrupt {
            msix: Msix::new(Arc::clone(&vm), place.first_gsi, vectors)?,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            line: place.line,
            config: Mutex::new(config),
        });
        let common = Arc::new(Common::new(device, ram, Arc::clone(&interrupt) as _)?);
        let this = Self {
            common,
            interrupt,
            vm,
            window: AtomicU64::new(0),
            doorbells: Mutex::default(),
            msix_at,
            access_at,
        };
        this.place_window();
        Ok(this)
    }

    /// The device without its transport.
    pub fn common(&self) -> &Arc<Common> {
        &self.common
    }

    /// Takes up where the guest has put the window, and whether it is to be decoded.
    fn place_window(&self) {
        let config = self.interrupt.config.lock();
        let decoded = config.command() & COMMAND_MEMORY != 0;
        let address = if decoded { u64::from(config.bar()) } else { 0 };
        drop(config);
        self.window.store(address, Ordering::Release);
        self.settle_doorbells(&mut self.doorbells.lock());
    }

    fn doorbell(window: u64, queue: u16) -> u64 {
        window + NOTIFY + u64::from(queue) * u64::from(NOTIFY_STEP)
    }

    /// Has the doorbells where the window is now. Where attaching fails, notifications arrive as writes.
    fn settle_doorbells(&self, doorbells: &mut Doorbells) {
        let window = if doorbells.wanted { self.window.load(Ordering::Acquire) } else { 0 };
        if doorbells.attached == window {
            return;
        }
        for (queue, kick) in self.common.kicks() {
            if doorbells.attached != 0 {
                self.vm.detach_doorbell(Self::doorbell(doorbells.attached, queue), None, kick);
            }
            if window != 0 {
                let _ = self.vm.attach_doorbell(Self::doorbell(window, queue), None, kick);
            }
        }
        doorbells.attached = window;
    }

    fn set_status(&self, status: u8) {
        if status == 0 {
            self.common.set_status(0);
            self.interrupt.reset();
            return;
        }
        if status & super::common::STATUS_DRIVER_OK != 0 {
            let mut doorbells = self.doorbells.lock();
            doorbells.wanted = true;
            self.settle_doorbells(&mut doorbells);
        }
        self.common.set_status(status);
    }

    /// The common configuration structure (section 4.1.4.3) as it reads now.
    fn common_bytes(&self) -> [u8; COMMON_LEN] {
        let mut bytes = [0; COMMON_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let (device_select, driver_select) = self.common.feature_selects();
        put(0, &device_select.to_le_bytes());
        put(4, &self.common.device_features().to_le_bytes());
        put(8, &driver_select.to_le_bytes());
        put(12, &self.common.driver_features().to_le_bytes());
        put(16, &self.interrupt.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(18, &self.common.queue_count().to_le_bytes());
        put(20, &[self.common.status(), self.common.generation()]);
        let index = self.common.selected_queue_index();
        put(22, &index.to_le_bytes());
        // A queue that does not exist has size 0 and no vector.
        let vector = self.interrupt.queue_vectors.get(usize::from(index));
        put(26, &vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire)).to_le_bytes());
        if let Some(queue) = self.common.selected_queue() {
            put(24, &queue.size.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &index.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.driver.to_le_bytes());
            put(48, &queue.device.to_le_bytes());
        }
        bytes
    }

    /// What the registers that the early boot reads most hold, without rendering the rest.
    fn common_read(&self, offset: u64, data: &mut [u8]) {
        if let (20, [byte]) = (offset, &mut *data) {
            *byte = self.common.status();
            return;
        }
        let bytes = self.common_bytes();
        for (i, slot) in data.iter_mut().enumerate() {
            *slot = bytes.get(block::num::to_usize(offset).saturating_add(i)).copied().unwrap_or(0);
        }
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let value = number(data);
        let word = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, data.len()) {
            (0, 4) => self.common.select_device_features(value),
            (8, 4) => self.common.select_driver_features(value),
            (12, 4) => self.common.set_driver_features(value),
            (16, 2) => self.interrupt.config_vector.store(self.interrupt.vector(word), Ordering::Release),
            (20, 1) => self.set_status(u8::try_from(value & 0xff).unwrap_or(0)),
            (22, 2) => self.common.select_queue(word),
            (26, 2) => self.set_queue_vector(word),
            (24, 2) => self.with_queue(|q| q.set_size(word)),
            (28, 2) if word == 1 => self.with_queue(|q| q.enabled = true),
            (32..56, 4) => self.with_queue(|q| set_half(ring_address(q, offset), offset & 4 != 0, value)),
            (32 | 40 | 48, 8) => {
                self.common_write(offset, &data[..4]);
                self.common_write(offset + 4, &data[4..]);
            }
            _ => {}
        }
    }

    fn set_queue_vector(&self, wanted: u16) {
        let index = usize::from(self.common.selected_queue_index());
        if let Some(vector) = self.interrupt.queue_vectors.get(index) {
            vector.store(self.interrupt.vector(wanted), Ordering::Release);
        }
    }

    fn with_queue(&self, change: impl FnOnce(&mut Queue)) {
        if let Some(mut queue) = self.common.selected_queue() {
            change(&mut queue);
        }
    }

    /// The window's part that `VIRTIO_PCI_CAP_PCI_CFG` names now: offset and length (section 4.1.4.9).
    fn accessed(&self) -> Option<(u64, usize)> {
        let config = self.interrupt.config.lock();
        let at = self.access_at;
        let dword =
            |offset: u8| u32::from(config.register(offset)) | u32::from(config.register(offset + 2)) << 16;
        let (bar, offset, len) = (config.register(at + 4) & 0xff, dword(at + 8), dword(at + 12));
        let len = usize::try_from(len).ok().filter(|l| matches!(l, 1 | 2 | 4))?;
        (bar == 0 && offset < BAR_LEN && offset.is_multiple_of(u32::try_from(len).ok()?))
            .then_some((u64::from(offset), len))
    }

    fn data_register(&self) -> u8 {
        self.access_at + 16
    }
}

/// Which of the three ring addresses a register holds.
fn ring_address(queue: &mut Queue, offset: u64) -> &mut u64 {
    match offset {
        ..40 => &mut queue.descriptors,
        40..48 => &mut queue.driver,
        _ => &mut queue.device,
    }
}

pub(super) fn set_half(address: &mut u64, high: bool, value: u32) {
    *address = if high {
        *address & 0xffff_ffff | u64::from(value) << 32
    } else {
        *address & !0xffff_ffff | u64::from(value)
    };
}

fn config_space(device: &dyn Device, place: &PciPlace) -> ConfigSpace {
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1040 + device.id(),
        revision: 1,
        class: device.pci_class(),
        subsystem: (0x1af4, 0x1100),
        interrupt: true,
    });
    config.memory_bar(place.address, BAR_LEN);
    if place.address != 0 {
        config.put(usize::from(OFFSET_COMMAND), &COMMAND_MEMORY.to_le_bytes());
        let line = u8::try_from(place.line.gsi()).unwrap_or(0xff);
        config.put(usize::from(OFFSET_INTERRUPT_LINE), &[line]);
    }
    config
}

/// The capabilities that say where the structures lie (section 4.1.4); returns the place of the last.
fn add_structures(config: &mut ConfigSpace) -> u8 {
    let structure = |kind: u8, offset: u64, len: u64, more: &[u8]| {
        let mut body = vec![u8::try_from(16 + more.len()).unwrap_or(0), kind, 0, 0, 0, 0];
        body.extend(block::num::low_u32(offset).to_le_bytes());
        body.extend(block::num::low_u32(len).to_le_bytes());
        body.extend(more);
        body
    };
    config.capability(CAP_VENDOR, &structure(1, COMMON, COMMON_LEN as u64, &[]));
    config.capability(CAP_VENDOR, &structure(3, ISR, 4, &[]));
    config.capability(CAP_VENDOR, &structure(4, DEVICE, PAGE, &[]));
    config.capability(CAP_VENDOR, &structure(2, NOTIFY, PAGE, &NOTIFY_STEP.to_le_bytes()));
    let at = config.capability(CAP_VENDOR, &structure(5, 0, 0, &[0; 4])).unwrap_or(0);
    config.allow(usize::from(at) + 4, &[0xff]);
    config.allow(usize::from(at) + 8, &[0xff; 12]);
    at
}

fn add_msix(config: &mut ConfigSpace, vectors: u16) -> u8 {
    let mut body = vec![];
    body.extend((vectors - 1).to_le_bytes());
    body.extend(block::num::low_u32(TABLE).to_le_bytes());
    body.extend(block::num::low_u32(PENDING).to_le_bytes());
    let at = config.capability(CAP_MSIX, &body).unwrap_or(0);
    config.allow(usize::from(at) + 2, &CONTROL_WRITABLE.to_le_bytes());
    at
}

/// Whether an access touches any of the registers.
fn touches(offset: u8, len: usize, registers: std::ops::Range<u8>) -> bool {
    let start = usize::from(offset);
    start < usize::from(registers.end) && start + len > usize::from(registers.start)
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        let register = self.data_register();
        if touches(offset, data.len(), register..register + 4)
            && let Some((at, len)) = self.accessed()
        {
            let mut bytes = [0; 4];
            self.memory_read(at, &mut bytes[..len]);
            self.interrupt.config.lock().put(usize::from(register), &bytes);
        }
        self.interrupt.config.lock().read(offset, data);
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        self.interrupt.config.lock().write(offset, data);
        let touches = |registers| touches(offset, data.len(), registers);
        if touches(OFFSET_COMMAND..OFFSET_COMMAND + 2) || touches(OFFSET_BAR0..OFFSET_BAR0 + 4) {
            self.place_window();
            self.interrupt.settle_line();
        }
        if touches(self.msix_at + 2..self.msix_at + 4) {
            let control = self.interrupt.config.lock().register(self.msix_at + 2);
            self.interrupt.msix.control(control);
            self.interrupt.settle_line();
        }
        let register = self.data_register();
        if touches(register..register + 4)
            && let Some((at, len)) = self.accessed()
        {
            let mut bytes = [0; 4];
            self.interrupt.config.lock().read(register, &mut bytes);
            self.memory_write(at, &bytes[..len]);
        }
    }

    fn window(&self) -> Option<(u64, u64)> {
        let address = self.window.load(Ordering::Acquire);
        (address != 0).then_some((address, u64::from(BAR_LEN)))
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.common_read(at, data),
            ISR => {
                data.fill(0);
                if let (0, [first, ..]) = (at, data) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE => self.common.device().config_read(at, data),
            TABLE => self.interrupt.msix.table_read(at, data),
            PENDING => self.interrupt.msix.pending_read(at, data),
            _ => data.fill(0),
        }
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        let at = offset % PAGE;
        match offset - at {
            COMMON => self.common_write(at, data),
            DEVICE => self.common.device().config_write(at, data),
            NOTIFY => self.common.notify(u16::try_from(at / u64::from(NOTIFY_STEP)).unwrap_or(u16::MAX)),
            TABLE => self.interrupt.msix.table_write(at, data),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
