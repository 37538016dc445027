//! Guests of our own, on any `/dev/kvm`, real or emulated.

pub(crate) mod guest;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::*;
use crate::engine::{Engine as _, Transport};
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

fn linux(kernel: &[u8]) -> MachineSpec {
    let boot = Boot::Linux { kernel: kernel.into(), initrd: None, cmdline: String::new() };
    MachineSpec { boot, ..spec(&Rom::new()) }
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
fn resets_are_told_apart() {
    requires_kvm!();
    for (port, value, how) in
        [(0x64, 0xfe, "keyboard controller"), (0xcf9, 6, "port 0xcf9"), (0x60c, 1, "ACPI")]
    {
        let (outcome, _) = run(spec(Rom::new().out8(port, value).halt()));
        assert_eq!(outcome.ending, Ending::Reset { how });
    }
}

#[test]
fn a_fault_without_a_handler_is_a_triple_fault() {
    requires_kvm!();
    // Long mode with an empty interrupt table: mov rax, [0x10_0000_0000], which is not mapped.
    let (outcome, _) = run(linux(&guest::elf(&[0x48, 0xa1, 0, 0, 0, 0, 0x10, 0, 0, 0], None)));
    assert_eq!(outcome.ending, Ending::TripleFault);
}

#[test]
fn an_elf_kernel_begins_in_long_mode_and_by_pvh_in_protected_mode() {
    requires_kvm!();
    // mov dx, 0x3f8; mov al, 'L'; out dx, al; mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0xb0, b'L', 0xee, 0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef,
        0xf4,
    ];
    for (pvh, mode) in [(None, "long mode"), (Some(guest::ELF_CODE), "protected mode")] {
        let (outcome, output) = run(linux(&guest::elf(&code, pvh)));
        assert_eq!((outcome.ending, &output[..]), (Ending::PowerOff, &b"L"[..]));
        assert_eq!(outcome.cpus[0].mode, mode);
    }
}

#[test]
fn an_endless_loop_is_stopped_from_outside() {
    requires_kvm!();
    let machine = KvmEngine.build(spec(Rom::new().raw(&[0xeb, 0xfe])), Arc::new(Console::default())).unwrap();
    let control = machine.control();
    let thread = std::thread::spawn(|| machine.run().unwrap());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!thread.is_finished());
    control.stop();
    let outcome = thread.join().unwrap();
    assert_eq!(outcome.ending, Ending::Stopped);
    assert_eq!(outcome.cpus[0].code[..2], [0xeb, 0xfe]);
    assert_eq!(outcome.cpus[0].rip, 0);
}

#[test]
fn a_machine_that_was_stopped_before_it_ran_does_not_run() {
    requires_kvm!();
    let machine = KvmEngine.build(spec(Rom::new().power_off()), Arc::new(Console::default())).unwrap();
    machine.control().stop();
    assert_eq!(machine.run().unwrap().ending, Ending::Stopped);
}

#[test]
fn what_is_typed_arrives() {
    requires_kvm!();
    // again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx; out dx, al; cmp al, 'z';
    // jne again
    let mut rom = Rom::new();
    rom.mov_dx(0x3fd)
        .raw(&[0xec, 0xa8, 1, 0x74, 0xf8])
        .mov_dx(0x3f8)
        .raw(&[0xec, 0xee, 0x3c, b'z', 0x75, 0xef]);
    let console = Arc::new(Console::default());
    let machine = KvmEngine.build(spec(rom.power_off()), Arc::clone(&console) as _).unwrap();
    machine.control().type_bytes(b"abc");
    let control = machine.control();
    let thread = std::thread::spawn(|| machine.run().unwrap());
    control.type_bytes(b"xyz");
    assert_eq!(thread.join().unwrap().ending, Ending::PowerOff);
    assert_eq!(*console.0.lock(), b"abcxyz");
}

#[test]
fn the_pci_bus_shows_its_devices() {
    requires_kvm!();
    let mut rom = Rom::new();
    for slot in 0..3 {
        rom.out32(0xcf8, 0x8000_0000 | slot << 11).mov_dx(0xcfc).raw(&[0x66, 0xed]);
        for _ in 0..4 {
            // al to the port, then the next byte of eax.
            rom.print_al().raw(&[0x66, 0xc1, 0xe8, 8]);
        }
    }
    let (outcome, output) = run(spec(rom.power_off()));
    assert_eq!(outcome.ending, Ending::PowerOff);
    let bridge_rng_nothing = [0x86, 0x80, 0xc0, 0x29, 0xf4, 0x1a, 0x44, 0x10, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(output, bridge_rng_nothing);
}

#[test]
fn a_string_instruction_is_as_many_accesses() {
    requires_kvm!();
    // mov si, 0x8000; mov cx, 5; cld; mov dx, 0x3f8; cs rep outsb
    let mut rom = Rom::new();
    rom.raw(&[0xbe, 0x00, 0x80, 0xb9, 0x05, 0x00, 0xfc]).mov_dx(0x3f8).raw(&[0xf3, 0x2e, 0x6e]);
    let (outcome, output) = run(spec(rom.power_off().data(0x8000, b"bytes")));
    assert_eq!((outcome.ending, output), (Ending::PowerOff, b"bytes".to_vec()));
}

#[test]
fn a_real_mode_guest_prints_and_powers_off() {
    requires_kvm!();
    let (outcome, output) = run(spec(Rom::new().print("hello, world\n").power_off()));
    assert_eq!((outcome.ending, output), (Ending::PowerOff, b"hello, world\n".to_vec()));
    assert!(outcome.startup > Duration::ZERO);
    assert_eq!(outcome.cpus[0].mode, "real mode");
}
