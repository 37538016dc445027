//! A virtual processor's thread: runs the guest, serves what it exits for, and says where it stood in the end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::Mutex;

use crate::bus::Bus;
use crate::engine::{CpuState, Ending};
use crate::memory::GuestRam;
use crate::power::Power;
use crate::sys;

const PAGE: u64 = 4096;
const INTERRUPT_FLAG: u64 = 0x200;
/// Bytes of code that are shown.
const CODE_LEN: usize = 16;

/// Ports and memory addresses of the machine's devices.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    pub(crate) ports: Bus,
    pub(crate) memory: Bus,
    /// Held while the ring of coalesced writes, which all processors share, is emptied.
    pub(crate) ring: Mutex<()>,
}

/// A processor that has not started yet.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) fd: VcpuFd,
    pub(crate) buses: Arc<Buses>,
    pub(crate) power: Arc<Power>,
    pub(crate) ram: GuestRam,
    /// Length of the mapping that KVM answers in.
    pub(crate) mapped_bytes: usize,
    /// Some port writes come by a ring.
    pub(crate) coalesced: bool,
    pub(crate) dead: Arc<Dead>,
}

/// Which processors cannot go on by themselves: halted with interrupts off, or never started. When none can, nothing
/// will happen any more.
#[derive(Debug)]
pub(crate) struct Dead {
    processors: Mutex<BTreeSet<u8>>,
    count: u8,
}

impl Dead {
    /// Of `count` processors.
    pub(crate) fn new(count: u8) -> Self {
        Self { processors: Mutex::default(), count }
    }

    /// Forgets what was taken down: the processors are about to be asked.
    pub(crate) fn ask(&self) {
        self.processors.lock().clear();
    }

    /// Takes down the state of a processor; whether none can go on.
    fn note(&self, index: u8, dead: bool) -> bool {
        let mut processors = self.processors.lock();
        if dead {
            processors.insert(index);
        } else {
            processors.remove(&index);
        }
        processors.len() == usize::from(self.count)
    }
}

/// Why KVM came back.
enum Exit {
    Port,
    Read(u64, usize),
    Write(u64, [u8; 8], usize),
    Nothing,
    /// By a signal of ours: the machine ends, or somebody wants to know whether we live.
    Interrupted,
    InternalError,
    End(Ending),
    Stuck(String),
}

impl Vcpu {
    /// Runs until the machine ends. `started` is called before the first instruction.
    pub(crate) fn run(mut self, started: impl FnOnce(Instant)) -> CpuState {
        started(Instant::now());
        while !self.power.is_off() {
            if let Some(ending) = self.step() {
                self.power.end(ending);
            }
        }
        self.finish()
    }

    /// Runs to the next exit and serves it.
    fn step(&mut self) -> Option<Ending> {
        let exit = self.exit();
        // What the guest wrote before, without an exit, comes first.
        self.drain();
        match exit {
            Exit::Port => self.port(),
            Exit::Read(address, len) => {
                let mut data = [0; 8];
                self.buses.memory.read(address, &mut data[..len]);
                sys::answer_read(&mut self.fd, data);
            }
            Exit::Write(address, data, len) => self.buses.memory.write(address, &data[..len]),
            Exit::Nothing => {}
            Exit::Interrupted => return self.last_breath(),
            Exit::InternalError => return Some(self.internal_error()),
            Exit::End(ending) => return Some(ending),
            Exit::Stuck(reason) => return Some(self.stuck(&reason)),
        }
        None
    }

    fn exit(&mut self) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Exit::Port,
            Ok(VcpuExit::MmioRead(address, data)) => Exit::Read(address, data.len().min(8)),
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let (mut copy, len) = ([0; 8], data.len().min(8));
                copy[..len].copy_from_slice(&data[..len]);
                Exit::Write(address, copy, len)
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) | VcpuExit::Hlt) => {
                Exit::Nothing
            }
            Ok(VcpuExit::Shutdown) => Exit::End(Ending::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => Exit::End(system_event(kind)),
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Exit::Stuck(format!("KVM cannot enter the guest ({reason:#x})"))
            }
            Ok(other) => Exit::Stuck(format!("KVM left the guest for an unknown reason ({other:?})")),
            Err(error) => match error.errno() {
                nix::libc::EINTR => Exit::Interrupted,
                nix::libc::EAGAIN => Exit::Nothing,
                _ => Exit::Stuck(format!("KVM cannot run the guest: {error}")),
            },
        }
    }

    /// Serves the port writes that KVM has kept for us.
    fn drain(&mut self) {
        if !self.coalesced {
            return;
        }
        let buses = Arc::clone(&self.buses);
        let _lock = buses.ring.lock();
        while let Ok(Some(write)) = self.fd.coalesced_mmio_read() {
            let len = usize::try_from(write.len).unwrap_or(0).min(write.data.len());
            buses.ports.write(write.phys_addr, &write.data[..len]);
        }
    }

    fn port(&mut self) {
        let Some(exit) = sys::port_exit(&mut self.fd, self.mapped_bytes) else { return };
        let port = u64::from(exit.port);
        for access in exit.data.chunks_exact_mut(exit.size) {
            if exit.out {
                self.buses.ports.write(port, access);
            } else {
                self.buses.ports.read(port, access);
            }
        }
    }

    /// The end of a machine none of whose processors can go on. (One that has not run yet has not halted.)
    fn last_breath(&self) -> Option<Ending> {
        let dead = match self.fd.get_mp_state().map(|s| s.mp_state) {
            Ok(KVM_MP_STATE_HALTED) => self.fd.get_regs().is_ok_and(|r| r.rflags & INTERRUPT_FLAG == 0),
            Ok(KVM_MP_STATE_UNINITIALIZED) => true,
            _ => false,
        };
        let all = self.dead.note(self.index, dead);
        all.then(|| self.stuck("the guest has halted with interrupts off"))
    }

    fn internal_error(&mut self) -> Ending {
        let (suberror, data) = sys::internal_error(&mut self.fd);
        let words = match suberror {
            1 => "KVM cannot emulate an instruction".to_owned(),
            2 => "an exception while another was delivered".to_owned(),
            3 => "an exit while an event was delivered".to_owned(),
            4 => "an unexpected exit of the processor".to_owned(),
            other => format!("suberror {other}"),
        };
        let data = data.iter().map(|d| format!("{d:#x}")).collect::<Vec<_>>().join(" ");
        self.stuck(&format!("internal error of KVM: {words} [{data}]"))
    }

    fn stuck(&self, reason: &str) -> Ending {
        let state = self.state();
        let code = state.code.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
        Ending::Stuck { reason: format!("{reason} at {:#x} ({}), code {code}", state.rip, state.mode) }
    }

    /// An access that has been served counts only when the processor runs again: let it, for no time at all, so
    /// that it shows the state after the instruction.
    fn finish(&mut self) -> CpuState {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.drain();
        self.state()
    }

    fn state(&self) -> CpuState {
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        let sregs = self.fd.get_sregs().unwrap_or_default();
        let activity = match self.fd.get_mp_state().map(|s| s.mp_state) {
            Ok(KVM_MP_STATE_HALTED) => ", halted",
            Ok(KVM_MP_STATE_UNINITIALIZED) => ", not started",
            _ => "",
        };
        let mode = format!("{} mode{activity}", mode(&sregs));
        CpuState { index: self.index, rip, mode, code: self.code(&sregs, rip) }
    }

    fn code(&self, sregs: &kvm_sregs, rip: u64) -> Vec<u8> {
        let linear = sregs.cs.base.wrapping_add(rip);
        let mut code = vec![0; CODE_LEN];
        let translated = self.fd.translate_gva(linear).ok().filter(|t| t.valid != 0);
        let physical = translated.map_or(linear, |t| t.physical_address);
        // Up to the end of the page: the next may lie anywhere.
        let left = block::num::to_usize(PAGE - physical % PAGE);
        code.truncate(left);
        if self.ram.read(physical, &mut code).is_err() {
            code.clear();
        }
        code
    }
}

fn mode(sregs: &kvm_sregs) -> &'static str {
    if sregs.efer & 0x400 != 0 && sregs.cs.l != 0 {
        "long"
    } else if sregs.efer & 0x400 != 0 {
        "compatibility"
    } else if sregs.cr0 & 1 != 0 {
        "protected"
    } else {
        "real"
    }
}

fn system_event(kind: u32) -> Ending {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Ending::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Ending::Reset { how: "hypervisor call" },
        other => Ending::Stuck { reason: format!("the guest reported system event {other}") },
    }
}
