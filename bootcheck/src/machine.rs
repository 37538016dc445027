//! A machine: everything put together, run once, and asked in the end.
//!
//! ```text
//!   thread of the caller    waits for the end, shows lines that do not end, gets the others out of KVM
//!   vcpu0 .. vcpuN          KVM_RUN, exits: ports and memory, by the buses      (confined: sandbox)
//!        |                      serial, clock, power management, reset           16550, CMOS, ACPI
//!        |                      PCI: configuration by ports and ECAM, windows     host bridge, virtio-pci
//!        |  doorbell (ioeventfd)                     ^  message (irqfd), or line
//!        v                                           |
//!   virtioN.Q               takes requests off queue Q of device N, asks the disk  (confined: sandbox)
//! ```
//!
//! The power switch ([`Power`]) is the only thing that all of them look at: whoever ends the machine says why, and
//! the first reason counts.

mod devices;
pub(crate) mod fuzz;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::{Error, Result};

use crate::acpi;
use crate::boot::layout::ACPI_START;
use crate::boot::{Entry, linux};
use crate::cpu::{self, Model};
use crate::engine::{Boot, Control, CpuState, Ending, MachineSpec, Observer, Outcome, Runnable};
use crate::firmware::{FlashMemory, Kind};
use crate::kick;
use crate::kvm::{self, KvmVm, refused};
use crate::memory::{GuestRam, HOLE_START};
use crate::pci::MOVED_ECAM_START;
use crate::power::{Power, Waited};
use crate::sandbox;
use crate::serial::Serial;
use crate::vcpu::{Dead, Vcpu};
use crate::virtio::Common;
use crate::virtio::blk::Blk;
use devices::{Devices, FirmwareDevices};

/// How long a line without an end waits before it is shown.
const CONSOLE_PAUSE: Duration = Duration::from_millis(10);
/// When nothing happens for so long, the processors are asked whether anything can. They bring what the guest has
/// written without an exit.
const LIFE_SIGN: Duration = Duration::from_millis(250);
/// How often the screen and the firmware's log are looked at.
const SCREEN_INTERVAL: Duration = Duration::from_millis(250);
/// Where the upper part of a firmware is seen below 1 MiB.
const SHADOW_LEN: usize = 128 << 10;

/// A machine that is ready to run.
pub(crate) struct Machine {
    // Dropped in this order: processors before the machine that they are of.
    vcpus: Vec<Vcpu>,
    virtio: Vec<Arc<Common>>,
    blks: Vec<Arc<Blk>>,
    control: Arc<Remote>,
    observer: Arc<dyn Observer>,
    dead: Arc<Dead>,
    firmware: Option<FirmwareDevices>,
    flash: Option<FlashMemory>,
    vm: Arc<KvmVm>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

/// The remote control of a machine.
#[derive(Debug)]
struct Remote {
    power: Arc<Power>,
    serial: Arc<Serial>,
}

impl Control for Remote {
    fn stop(&self) {
        self.power.end(Ending::Stopped);
    }

    fn type_bytes(&self, bytes: &[u8]) {
        self.serial.type_bytes(bytes);
    }
}

impl Machine {
    /// Builds a machine.
    ///
    /// # Errors
    /// No KVM, no memory, a kernel that is none, or more than fits.
    pub(crate) fn build(spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Self> {
        if spec.cpus == 0 {
            return Err(Error::usage("a machine without a processor"));
        }
        let kvm = kvm::open()?;
        let (code, vars) = match &spec.boot {
            Boot::Firmware { code, vars } => (Some(code.as_ref()), vars.as_deref()),
            Boot::Linux { .. } => (None, None),
        };
        let uefi = code.is_some_and(|code| Kind::of(code) == Kind::Uefi);
        let ram = GuestRam::below(spec.memory_bytes, if uefi { MOVED_ECAM_START } else { HOLE_START })?;
        let flash = vars.map(|vars| FlashMemory::new(vars, code.map_or(0, <[u8]>::len))).transpose()?;
        let vm = Arc::new(KvmVm::new(&kvm, &ram, code, flash.clone())?);
        let power = Arc::new(Power::default());
        let parts = devices::Plan {
            spec: &spec,
            ram: &ram,
            vm: Arc::clone(&vm) as _,
            power: &power,
            flash: flash.clone(),
        };
        let devices = parts.build(Arc::clone(&observer))?;
        let entry = load(&spec, &ram, &devices)?;
        let model = Model::new(&kvm, spec.cpus)?;
        let mapped_bytes = vm.fd().run_size();
        let mut vcpus = vec![];
        let dead = Arc::new(Dead::new(spec.cpus));
        for index in 0..spec.cpus {
            let mut fd = vm.fd().create_vcpu(u64::from(index)).map_err(refused("create a processor"))?;
            let coalesced = vm.can_coalesce() && fd.map_coalesced_mmio_ring().is_ok();
            model.prepare(&fd, index, &entry)?;
            if index == 0 {
                cpu::set_entry(&fd, &ram, &entry)?;
            }
            let (buses, power) = (Arc::clone(&devices.buses), Arc::clone(&power));
            let dead = Arc::clone(&dead);
            vcpus.push(Vcpu { index, fd, buses, power, ram: ram.clone(), mapped_bytes, coalesced, dead });
        }
        let control = Arc::new(Remote { power, serial: devices.serial });
        let Devices { virtio, blks, firmware, .. } = devices;
        Ok(Self { vcpus, virtio, blks, control, observer, dead, firmware, flash, vm })
    }

    /// Starts a thread for every queue of every device.
    fn start_devices(&self) -> Result<Vec<JoinHandle<()>>> {
        let mut threads = vec![];
        for (number, device) in self.virtio.iter().enumerate() {
            for queue in 0..usize::from(device.queue_count()) {
                let (device, power) = (Arc::clone(device), Arc::clone(&self.control.power));
                let name = format!("virtio{number}.{queue}");
                threads.push(kick::spawn(&name, Arc::clone(&power), move || {
                    if confine(sandbox::Role::Device, &power) {
                        device.work(queue);
                    }
                })?);
            }
        }
        Ok(threads)
    }

    fn start_processors(
        &mut self,
        begin: Instant,
        startup: &Arc<AtomicU64>,
    ) -> Result<Vec<JoinHandle<CpuState>>> {
        // The boot processor last: the others wait for it to wake them.
        let start = |vcpu: Vcpu| {
            let (observer, startup) = (Arc::clone(&self.observer), Arc::clone(startup));
            let (boot, power) = (vcpu.index == 0, Arc::clone(&self.control.power));
            kick::spawn(&format!("vcpu{}", vcpu.index), Arc::clone(&power), move || {
                confine(sandbox::Role::Processor, &power);
                vcpu.run(|at| {
                    if boot {
                        startup.store(nanos(at.duration_since(begin)), Ordering::Release);
                        observer.started(at);
                    }
                })
            })
        };
        std::mem::take(&mut self.vcpus).into_iter().rev().map(start).collect()
    }

    /// Waits for the end, shows what console, log and screen hold while it waits, and looks now and then whether the
    /// guest can still do anything.
    fn watch(&self, processors: &[JoinHandle<CpuState>]) -> Ending {
        let mut screen_seen = Instant::now();
        loop {
            match self.control.power.wait_or_attention(LIFE_SIGN) {
                Waited::Ended(ending) => return ending,
                Waited::Attention => {
                    if let Some(ending) = self.control.power.wait_for(CONSOLE_PAUSE) {
                        return ending;
                    }
                    self.control.serial.flush();
                }
                Waited::Idle => {
                    self.dead.ask();
                    processors.iter().for_each(kick::interrupt);
                }
            }
            if screen_seen.elapsed() >= SCREEN_INTERVAL {
                self.show_firmware();
                screen_seen = Instant::now();
            }
        }
    }

    /// Hands on what is new of the firmware's log and on the screen.
    fn show_firmware(&self) {
        let Some(firmware) = &self.firmware else { return };
        firmware.log.flush();
        if firmware.kind == Kind::Bios
            && let Some(rows) = firmware.screen.look()
        {
            self.observer.screen(&rows, Instant::now());
        }
    }

    fn run_to_end(mut self) -> Result<Outcome> {
        let begin = Instant::now();
        let startup = Arc::new(AtomicU64::new(0));
        let power = Arc::clone(&self.control.power);
        let mut device_threads = vec![];
        let mut processors = vec![];
        let started = self.start_devices().map(|t| device_threads = t);
        let started = started.and_then(|()| self.start_processors(begin, &startup).map(|t| processors = t));
        let ending = if started.is_ok() { self.watch(&processors) } else { Ending::Stopped };
        let mut cpus: Vec<_> =
            processors.into_iter().filter_map(|thread| kick::join(thread, &power)).collect();
        cpus.sort_by_key(|cpu| cpu.index);
        for device in &self.virtio {
            device.stop();
        }
        for thread in device_threads {
            let _ = thread.join();
        }
        self.control.serial.flush();
        self.show_firmware();
        started?;
        Ok(Outcome {
            ending,
            cpus,
            disks: self.blks.iter().map(|blk| blk.activity()).collect(),
            startup: Duration::from_nanos(startup.load(Ordering::Acquire)),
            screen: self.firmware.as_ref().map(|firmware| firmware.screen.rows()).unwrap_or_default(),
            vars: self.flash.as_ref().map(FlashMemory::bytes),
        })
    }
}

/// Confines the calling thread; a machine whose threads cannot be confined does not run.
fn confine(role: sandbox::Role, power: &Power) -> bool {
    let result = sandbox::enter(role);
    if let Err(error) = &result {
        power.end(Ending::Stuck { reason: error.to_string() });
    }
    result.is_ok()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Puts into memory what the guest begins with.
fn load(spec: &MachineSpec, ram: &GuestRam, devices: &Devices) -> Result<Entry> {
    match &spec.boot {
        Boot::Linux { kernel, initrd, cmdline } => {
            acpi::write(ram, ACPI_START, &devices.tables)?;
            linux::load(ram, kernel, initrd.as_deref(), cmdline, ACPI_START)
        }
        Boot::Firmware { code, .. } => {
            let shadow = &code[code.len().saturating_sub(SHADOW_LEN)..];
            ram.write(0x10_0000 - shadow.len() as u64, shadow)?;
            Ok(Entry::Reset)
        }
    }
}

impl Runnable for Machine {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.control) as _
    }

    fn run(self: Box<Self>) -> Result<Outcome> {
        self.run_to_end()
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::guest::elf as elf_for_tests;
