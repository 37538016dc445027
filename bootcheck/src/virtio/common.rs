//! What both transports share: feature negotiation, device status, queues and the threads that serve them.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{Result, ResultExt as _};
use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

use super::{Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Queue, RingError, RingResult};
use crate::memory::GuestRam;

pub(crate) const STATUS_DRIVER_OK: u8 = 4;
pub(crate) const STATUS_FEATURES_OK: u8 = 8;
pub(crate) const STATUS_NEEDS_RESET: u8 = 0x40;
/// Requests that are returned before the driver hears of them, while there are more.
const BATCH: u32 = 16;
/// The longest that a returned request waits for its interrupt while there are more.
const BATCH_TIME: Duration = Duration::from_micros(500);

/// How a device interrupts its driver.
pub trait Interrupt: Debug + Send + Sync {
    /// A queue has something for the driver.
    fn queue(&self, index: u16);
    /// The configuration or the status has changed.
    fn config(&self);
}

#[derive(Debug, Default)]
struct State {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u8,
}

#[derive(Debug)]
struct Slot {
    queue: Mutex<Queue>,
    kick: EventFd,
}

/// A device with everything but its registers.
#[derive(Debug)]
pub struct Common {
    device: Arc<dyn Device>,
    ram: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    state: Mutex<State>,
    queues: Vec<Slot>,
    stopping: AtomicBool,
    /// The last ring error, in words.
    fault: Mutex<Option<RingError>>,
}

impl Common {
    /// A device that has just been reset.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(device: Arc<dyn Device>, ram: GuestRam, interrupt: Arc<dyn Interrupt>) -> Result<Self> {
        let slot = |size| -> Result<Slot> {
            let kick = EventFd::new(0).context(|| "cannot make an event descriptor".into())?;
            Ok(Slot { queue: Mutex::new(Queue::new(size)), kick })
        };
        let queues = device.queue_sizes().into_iter().map(slot).collect::<Result<_>>()?;
        Ok(Self {
            device,
            ram,
            interrupt,
            state: Mutex::default(),
            queues,
            stopping: AtomicBool::new(false),
            fault: Mutex::default(),
        })
    }

    /// The device behind it.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// How many queues it has.
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// All feature bits that are offered.
    pub fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    pub(crate) fn feature_selects(&self) -> (u32, u32) {
        let state = self.state.lock();
        (state.device_feature_select, state.driver_feature_select)
    }

    pub(crate) fn select_device_features(&self, word: u32) {
        self.state.lock().device_feature_select = word;
    }

    pub(crate) fn select_driver_features(&self, word: u32) {
        self.state.lock().driver_feature_select = word;
    }

    /// The selected 32 of the offered features.
    pub(crate) fn device_features(&self) -> u32 {
        half(self.features(), self.state.lock().device_feature_select)
    }

    /// The selected 32 of the features that the driver has written.
    pub(crate) fn driver_features(&self) -> u32 {
        let state = self.state.lock();
        half(state.driver_features, state.driver_feature_select)
    }

    pub(crate) fn set_driver_features(&self, value: u32) {
        let mut state = self.state.lock();
        if state.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let (keep, bits) = match state.driver_feature_select {
            0 => (0xffff_ffff_0000_0000, u64::from(value)),
            1 => (0x0000_0000_ffff_ffff, u64::from(value) << 32),
            _ => return,
        };
        state.driver_features = state.driver_features & keep | bits;
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.state.lock().status
    }

    pub(crate) fn generation(&self) -> u8 {
        self.state.lock().generation
    }

    /// The driver writes the status (section 3.1.1); 0 resets.
    pub fn set_status(&self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut state = self.state.lock();
        let added = value & !state.status;
        // Needing a reset is ours to say, and cannot be taken back.
        let mut status = value & !STATUS_NEEDS_RESET | state.status & STATUS_NEEDS_RESET;
        let features = state.driver_features;
        if added & STATUS_FEATURES_OK != 0 && !self.acceptable(features) {
            status &= !STATUS_FEATURES_OK;
        }
        state.status = status;
        drop(state);
        if added & status & STATUS_FEATURES_OK != 0 {
            self.device.accepted(features);
        }
        if added & status & STATUS_DRIVER_OK != 0 {
            self.start(features);
        }
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.features() == 0 && features & F_VERSION_1 != 0
    }

    /// The driver is ready: what it has put into the rings before it said so is served too.
    fn start(&self, features: u64) {
        for slot in &self.queues {
            let mut queue = slot.queue.lock();
            queue.event_idx = features & F_EVENT_IDX != 0;
            queue.indirect = features & F_INDIRECT_DESC != 0;
            drop(queue);
            let _ = slot.kick.write(1);
        }
    }

    fn reset(&self) {
        {
            let mut state = self.state.lock();
            *state = State { generation: state.generation, ..State::default() };
        }
        // Waits for the requests that are being served. The state is not locked: the thread that serves one may
        // want it.
        for slot in &self.queues {
            slot.queue.lock().reset();
        }
        self.device.accepted(0);
    }

    pub(crate) fn select_queue(&self, index: u16) {
        self.state.lock().queue_select = index;
    }

    pub(crate) fn selected_queue_index(&self) -> u16 {
        self.state.lock().queue_select
    }

    /// The selected queue, if it exists.
    pub(crate) fn selected_queue(&self) -> Option<MutexGuard<'_, Queue>> {
        let index = self.selected_queue_index();
        self.queues.get(usize::from(index)).map(|slot| slot.queue.lock())
    }

    /// The event descriptor that stands for a notification of each queue.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        (0..).zip(self.queues.iter().map(|slot| &slot.kick))
    }

    /// The driver notifies a queue.
    pub(crate) fn notify(&self, index: u16) {
        if let Some(slot) = self.queues.get(usize::from(index)) {
            let _ = slot.kick.write(1);
        }
    }

    /// Why the device needs a reset, if it ever did.
    pub fn fault(&self) -> Option<RingError> {
        *self.fault.lock()
    }

    fn break_down(&self, queue: &mut Queue, error: RingError) {
        queue.enabled = false;
        *self.fault.lock() = Some(error);
        let mut state = self.state.lock();
        if state.status & STATUS_DRIVER_OK == 0 {
            return;
        }
        state.status |= STATUS_NEEDS_RESET;
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        self.interrupt.config();
    }

    fn running(&self) -> bool {
        let status = self.status();
        status & STATUS_DRIVER_OK != 0 && status & STATUS_NEEDS_RESET == 0
    }

    /// Serves queue `index` until [`stop`](Self::stop): the body of its thread.
    pub fn work(&self, index: usize) {
        let Some(slot) = self.queues.get(index) else { return };
        let mut buffer = vec![];
        while !self.stopping.load(Ordering::Acquire) {
            if slot.kick.read().is_err() {
                return;
            }
            self.serve_queue(index, &mut buffer);
        }
    }

    /// Ends the threads that are in [`work`](Self::work), after the requests that they serve.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for slot in &self.queues {
            let _ = slot.kick.write(1);
        }
    }

    /// Serves what a queue holds.
    pub(crate) fn serve_queue(&self, index: usize, buffer: &mut Vec<u8>) {
        let Some(slot) = self.queues.get(index) else { return };
        let mut queue = slot.queue.lock();
        if !queue.enabled || !self.running() {
            return;
        }
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        let service = Service {
            device: &*self.device,
            ram: &self.ram,
            stopping: &self.stopping,
            interrupt: &|| self.interrupt.queue(number),
        };
        if let Err(error) = service.drain(&mut queue, buffer) {
            self.break_down(&mut queue, error);
        }
    }
}

/// What it takes to serve a queue.
pub(crate) struct Service<'a> {
    pub(crate) device: &'a dyn Device,
    pub(crate) ram: &'a GuestRam,
    /// No further request is begun.
    pub(crate) stopping: &'a AtomicBool,
    /// Interrupts the driver.
    pub(crate) interrupt: &'a dyn Fn(),
}

impl Service<'_> {
    /// Serves what a queue holds, until it is empty and the driver has been asked to notify us of more.
    pub(crate) fn drain(&self, queue: &mut Queue, buffer: &mut Vec<u8>) -> RingResult<()> {
        loop {
            queue.disable_notifications(self.ram)?;
            let result = self.drain_once(queue, buffer);
            self.signal(queue)?;
            result?;
            if self.stopping.load(Ordering::Acquire) || !queue.enable_notifications(self.ram)? {
                return Ok(());
            }
        }
    }

    fn drain_once(&self, queue: &mut Queue, buffer: &mut Vec<u8>) -> RingResult<()> {
        let (mut count, mut since) = (0, Instant::now());
        while !self.stopping.load(Ordering::Acquire) {
            let Some(chain) = queue.pop(self.ram)? else { break };
            let len = self.device.serve(&chain, self.ram, buffer)?;
            queue.push(self.ram, chain.head, len)?;
            count += 1;
            if count == BATCH || since.elapsed() > BATCH_TIME {
                self.signal(queue)?;
                (count, since) = (0, Instant::now());
            }
        }
        Ok(())
    }

    fn signal(&self, queue: &mut Queue) -> RingResult<()> {
        if queue.wants_interrupt(self.ram)? {
            (self.interrupt)();
        }
        Ok(())
    }
}

/// One of the two halves of the feature bits; zeros beyond them.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => block::num::low_u32(features & 0xffff_ffff),
        1 => block::num::low_u32(features >> 32),
        _ => 0,
    }
}
