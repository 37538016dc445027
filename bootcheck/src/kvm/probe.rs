//! Whether this host's KVM is there, is ours to use, and is real.
//!
//! Some hosts offer a `/dev/kvm` without hardware virtualisation under it: KVM's instruction emulator runs the guest
//! then, a hundred times too slow, and gives up at an instruction that it does not know. A small guest finds out: it
//! executes two such instructions and counts to a million.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::{DEVICE, vm};
use crate::boot::Entry;
use crate::cpu::{self, Model};
use crate::engine::Ending;
use crate::kick;
use crate::memory::GuestRam;
use crate::power::Power;
use crate::sys;

/// What this host's KVM is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmState {
    /// There is none.
    Missing,
    /// There is one, but not for this user.
    NoPermission,
    /// It runs guests by emulating their instructions, or not at all: good for small guests only.
    Emulated {
        /// How that was found out.
        reason: String,
    },
    /// It runs guests on the processor.
    Real,
}

/// Where the small guest lies.
const CODE: u64 = 0x10_0000;
/// It takes less than a millisecond on a real machine, and a few where the machine itself is emulated.
const SLOW: Duration = Duration::from_millis(100);
/// By then it is stopped.
const LIMIT: Duration = Duration::from_millis(400);

/// ```text
/// mov   ecx, 0x00200000      ; a place in memory
/// lock cmpxchg16b [rcx]
/// movdqa xmm0, [rcx]
/// paddq xmm0, xmm0
/// mov   ecx, 1000000
/// again: dec ecx
/// jnz   again
/// hlt
/// ```
const GUEST: [u8; 31] = [
    0xb9, 0x00, 0x00, 0x20, 0x00, 0xf0, 0x48, 0x0f, 0xc7, 0x09, 0x66, 0x0f, 0x6f, 0x01, 0x66, 0x0f, 0xd4,
    0xc0, 0xb9, 0x40, 0x42, 0x0f, 0x00, 0xff, 0xc9, 0x75, 0xfc, 0xf4, 0xf4, 0xf4, 0xf4,
];

/// A busy host makes a real processor look slow: the best of so many attempts counts.
const ATTEMPTS: usize = 3;

/// Why the guest did not run as it should.
#[derive(Debug)]
enum Flaw {
    /// It could not do something.
    Wrong(String),
    /// It took too long.
    Slow(String),
}

/// Looks at this host's KVM; takes a few milliseconds, and little more than a second at the most.
pub fn probe() -> KvmState {
    match std::fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return KvmState::NoPermission,
        Err(_) => return KvmState::Missing,
        Ok(_) => {}
    }
    let mut reason = String::new();
    for _ in 0..ATTEMPTS {
        reason = match vm::open().and_then(|kvm| try_guest(&kvm)) {
            Ok(None) => return KvmState::Real,
            Ok(Some(Flaw::Slow(reason))) => reason,
            Ok(Some(Flaw::Wrong(reason))) => return KvmState::Emulated { reason },
            Err(error) => return KvmState::Emulated { reason: error.to_string() },
        };
    }
    KvmState::Emulated { reason }
}

/// Runs the guest; why it does not run as it should, if so.
fn try_guest(kvm: &Kvm) -> block::Result<Option<Flaw>> {
    let ram = GuestRam::new(4 << 20)?;
    ram.write(CODE, &GUEST)?;
    // No interrupt controllers: HLT is to end it.
    let machine = kvm.create_vm().map_err(vm::refused("create a virtual machine"))?;
    sys::map_memory(&machine, &ram, &[], 0)?;
    let vcpu = machine.create_vcpu(0).map_err(vm::refused("create a processor"))?;
    let entry = Entry::Long { rip: CODE, rsi: 0 };
    Model::new(kvm, 1)?.identify(&vcpu, 0)?;
    cpu::set_entry(&vcpu, &ram, &entry)?;
    cpu::allow_sse(&vcpu)?;
    let power = Arc::new(Power::default());
    let start = Instant::now();
    let done = Arc::clone(&power);
    let thread = kick::spawn("probe", Arc::clone(&power), move || {
        let result = run(vcpu);
        done.end(Ending::Stopped);
        result
    })?;
    power.wait_for(LIMIT);
    let result = kick::join(thread, &power);
    let elapsed = start.elapsed();
    // The memory and the machine outlive the thread.
    drop(machine);
    drop(ram);
    Ok(result.unwrap_or_else(|| Some(Flaw::Wrong("its processor stopped".into()))).or_else(|| {
        let slow = || format!("it takes {} ms to count to a million", elapsed.as_millis());
        (elapsed > SLOW).then(|| Flaw::Slow(slow()))
    }))
}

/// Runs to the guest's HLT; why it did not get there, if so.
fn run(mut vcpu: VcpuFd) -> Option<Flaw> {
    let wrong = |what: String| Some(Flaw::Wrong(what));
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => None,
        Ok(VcpuExit::InternalError) => {
            wrong("it cannot execute an instruction that every kernel uses".into())
        }
        Ok(other) => wrong(format!("a guest that should halt ended with {other:?}")),
        Err(e) if e.errno() == nix::libc::EINTR => {
            Some(Flaw::Slow(format!("it takes more than {} ms to count to a million", LIMIT.as_millis())))
        }
        Err(e) => wrong(format!("it cannot run a guest: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_in_a_moment_whatever_the_host_is() {
        let start = Instant::now();
        let state = probe();
        assert!(start.elapsed() < Duration::from_secs(5), "{state:?} after {:?}", start.elapsed());
        assert_eq!(state == KvmState::Missing, !std::path::Path::new(DEVICE).exists());
    }
}
