//! Guests of our own, on any `/dev/kvm`, real or emulated.

mod guest;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::*;
use crate::engine::{Disk, Engine as _, Transport};
use crate::kvm::KvmEngine;
use guest::Rom;

/// Keeps what the guest writes.
#[derive(Debug, Default)]
struct Console(Mutex<Vec<u8>>);

impl Observer for Console {
    fn console(&self, bytes: &[u8], _at: Instant) {
        self.0.lock().extend_from_slice(bytes);
    }
}

/// Returns from the test, with a note, where there is no KVM.
macro_rules! requires_kvm {
    () => {
        if let Err(reason) = kvm::open() {
            note_skip(&reason.to_string());
            return;
        }
    };
}
use requires_kvm;

#[expect(clippy::print_stderr, reason = "the note is for whoever runs the tests")]
fn note_skip(reason: &str) {
    use std::io::Write as _;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    eprintln!("SKIPPED {test}: {reason}");
    let Some(path) = std::env::var_os("VIMG_SKIP_LOG") else { return };
    if let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        let _ = log.write_all(format!("{test}\t{reason}\n").as_bytes());
    }
}

fn spec(rom: &Rom) -> MachineSpec {
    MachineSpec {
        cpus: 1,
        memory_bytes: 16 << 20,
        disks: vec![],
        transport: Transport::Pci,
        boot: Boot::Firmware { code: rom.image().into(), vars: None },
    }
}

/// Runs a machine; one that does not end by itself is stopped after some seconds.
fn run(spec: MachineSpec) -> (Outcome, Vec<u8>) {
    let console = Arc::new(Console::default());
    let machine = KvmEngine.build(spec, Arc::clone(&console) as _).unwrap();
    let control = machine.control();
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let timer = std::thread::spawn(move || {
        if waits.recv_timeout(Duration::from_secs(20)).is_err() {
            control.stop();
        }
    });
    let outcome = machine.run().unwrap();
    let _ = done.send(());
    timer.join().unwrap();
    let output = std::mem::take(&mut *console.0.lock());
    (outcome, output)
}

#[test]
fn a_real_mode_guest_prints_and_powers_off() {
    requires_kvm!();
    let (outcome, output) = run(spec(Rom::new().print("hello, world\n").power_off()));
    assert_eq!((outcome.ending, output), (Ending::PowerOff, b"hello, world\n".to_vec()));
    assert!(outcome.startup > Duration::ZERO);
    assert_eq!(outcome.cpus[0].mode, "real mode");
}
