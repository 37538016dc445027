//! Guests of our own, on any `/dev/kvm`, real or emulated.

pub(crate) mod guest;

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

mod firmware;

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
    run_within(Duration::from_secs(20), spec)
}

fn run_within(limit: Duration, spec: MachineSpec) -> (Outcome, Vec<u8>) {
    let console = Arc::new(Console::default());
    let machine = KvmEngine.build(spec, Arc::clone(&console) as _).unwrap();
    let control = machine.control();
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let timer = std::thread::spawn(move || {
        if waits.recv_timeout(limit).is_err() {
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
fn a_guest_that_has_halted_for_good_ends() {
    requires_kvm!();
    let (outcome, output) = run(MachineSpec { cpus: 2, ..spec(Rom::new().print("bye").halt()) });
    let Ending::Stuck { reason } = outcome.ending else { panic!("{outcome:?}") };
    assert!(reason.starts_with("the guest has halted with interrupts off at"), "{reason}");
    assert_eq!((output, outcome.cpus.len()), (b"bye".to_vec(), 2));
    assert_eq!(outcome.cpus[1].mode, "real mode, not started");
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
    let bridge_rng_nothing = [0x86, 0x80, 0x37, 0x12, 0xf4, 0x1a, 0x44, 0x10, 0xff, 0xff, 0xff, 0xff];
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

/// A disk of 16 sectors, each full of its number.
fn disk(read_only: bool) -> (Arc<block::mem::MemStorage>, Disk) {
    let bytes = (0..16u8).flat_map(|sector| [sector; 512]).collect();
    let storage = Arc::new(block::mem::MemStorage::from_bytes(bytes));
    let device = block::raw::Raw::open(Arc::clone(&storage) as _, block::raw::RawOptions::default()).unwrap();
    (storage, Disk { device: Arc::new(device), read_only, serial: "serial".to_owned() })
}

/// Where the guest has its rings and buffers, in segment f000.
const TABLE: u16 = 0x4000;
const AVAILABLE: u16 = 0x5000;
const USED: u16 = 0x6000;
const HEADERS: u16 = 0x7000;
const STATUSES: u16 = 0x7800;
const DATA: u16 = 0x8000;

fn linear(offset: u16) -> u32 {
    0xf_0000 | u32::from(offset)
}

/// Requests (type, sector, length of data) laid out for a device, data of each 512 bytes apart.
fn requests(rom: &mut Rom, requests: &[(u32, u64, u32)]) {
    let (mut table, mut ring, mut headers) = (vec![], vec![0, 0], vec![]);
    for (i, &(kind, sector, len)) in (0u16..).zip(requests) {
        headers.extend([u64::from(kind), sector].map(u64::to_le_bytes).concat());
        ring.extend((3 * i).to_le_bytes());
        let writable = if kind == 1 { 0 } else { 2u16 };
        let buffers = [
            (linear(HEADERS + 16 * i), 16, 1),
            (linear(DATA + 512 * i), len, 1 | writable),
            (linear(STATUSES + i), 1, 2),
        ];
        for (at, (address, len, flags)) in (3 * i + 1..).zip(buffers) {
            table.extend(u64::from(address).to_le_bytes());
            table.extend(len.to_le_bytes());
            table.extend([flags.to_le_bytes(), at.to_le_bytes()].concat());
        }
    }
    ring.splice(2..2, u16::try_from(requests.len()).unwrap().to_le_bytes());
    rom.data(TABLE, &table).data(AVAILABLE, &ring).data(HEADERS, &headers);
    rom.data(USED, &[0; 256]).data(STATUSES, &[0xee; 16]);
}

const RINGS: [u16; 3] = [TABLE, AVAILABLE, USED];

#[test]
fn a_guest_reads_writes_and_flushes_its_disk() {
    requires_kvm!();
    let (storage, disk) = disk(false);
    let mut rom = Rom::new();
    // Read 3; write 5; flush; read past the end; ask for the serial number.
    requests(&mut rom, &[(0, 3, 512), (1, 5, 512), (4, 0, 0), (0, 16, 512), (8, 0, 20)]);
    rom.data(DATA + 512, &[0x77; 512]);
    rom.virtio_start(1, RINGS.map(linear)).virtio_write(1, 0x3000, 2, 0).await_word(USED + 2, 5);
    for i in 0..5 {
        rom.print_byte(STATUSES + i);
    }
    rom.print_byte(DATA + 511).print_byte(DATA + 4 * 512).print_byte(DATA + 4 * 512 + 5);
    let (outcome, output) = run(MachineSpec { disks: vec![disk], ..spec(rom.power_off()) });
    assert_eq!(outcome.ending, Ending::PowerOff);
    assert_eq!(output, [0, 0, 0, 1, 0, 3, b's', b'l']);
    assert_eq!(storage.to_bytes()[5 * 512..7 * 512], [[0x77; 512], [6; 512]].concat());
    let seen = &outcome.disks[0];
    assert_eq!((seen.reads, seen.writes, seen.flushes, seen.errors), (1, 1, 1, 1));
    assert_eq!((seen.sectors_read, seen.sectors_written), (Some((3, 3)), Some((5, 5))));
    assert!(seen.first_error.as_ref().unwrap().contains("outside the disk (16 sectors)"));
}

#[test]
fn a_broken_ring_ends_neither_guest_nor_monitor() {
    requires_kvm!();
    let mut rom = Rom::new();
    requests(&mut rom, &[(0, 0, 512)]);
    // The available index is far ahead of the ring.
    rom.data(AVAILABLE + 2, &0x1234u16.to_le_bytes());
    rom.virtio_start(1, RINGS.map(linear)).virtio_write(1, 0x3000, 2, 0);
    let again = rom.code().len();
    // Until DEVICE_NEEDS_RESET: test al, 0x40; jz again.
    rom.virtio_read(1, 20).raw(&[0xa8, 0x40, 0x0f, 0x84]);
    let back = i32::try_from(again).unwrap() - i32::try_from(rom.code().len() + 2).unwrap();
    rom.raw(&i16::try_from(back).unwrap().to_le_bytes());
    let (outcome, output) =
        run(MachineSpec { disks: vec![disk(false).1], ..spec(rom.print("R").power_off()) });
    assert_eq!((outcome.ending, &output[..]), (Ending::PowerOff, &b"R"[..]));
    assert_eq!(outcome.disks[0].reads, 0);
}

#[test]
fn the_serial_port_interrupts_by_the_pic() {
    requires_kvm!();
    let mut handler = Rom::new();
    // in al, 0x3fa acknowledges; the interrupt is disabled again; end of interrupt; iret.
    handler.mov_dx(0x3fa).raw(&[0xec]).out8(0x3f9, 0).print("T").out8(0x20, 0x20).raw(&[0xcf]);
    let mut rom = Rom::new();
    rom.data(0x3000, &handler.code()).vector(0x0c, 0x3000);
    for (port, value) in [(0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
        rom.out8(port, value);
    }
    // Enable the transmitter's interrupt; sti; hlt.
    rom.out8(0x3f9, 2).raw(&[0xfb, 0xf4, 0xfa]).print("E").power_off();
    let (outcome, output) = run(spec(&rom));
    assert_eq!((outcome.ending, &output[..]), (Ending::PowerOff, &b"TE"[..]));
}

#[test]
fn a_disk_interrupts_by_message() {
    requires_kvm!();
    let mut handler = Rom::new();
    handler.print("M").wrmsr(0x80b, 0).raw(&[0xcf]);
    let mut rom = Rom::new();
    requests(&mut rom, &[(0, 3, 512)]);
    rom.data(0x3000, &handler.code()).vector(0x40, 0x3000);
    // The local APIC in x2APIC mode, enabled.
    rom.wrmsr(0x1b, 0xfee0_0d00).wrmsr(0x80f, 0x1ff);
    // MSI-X: vector 1 is interrupt 0x40 of this processor.
    rom.config(1, 0x98 + 2, 2, 0x8000);
    for (offset, value) in [(0x4010, 0xfee0_0000), (0x4018, 0x40), (0x401c, 0)] {
        rom.virtio_write(1, offset, 4, value);
    }
    rom.virtio_start(1, RINGS.map(linear))
        .virtio_write(1, 0x3000, 2, 0)
        .raw(&[0xfb, 0xf4, 0xfa])
        .await_word(USED + 2, 1)
        .print_byte(DATA);
    let (outcome, output) = run(MachineSpec { disks: vec![disk(false).1], ..spec(rom.power_off()) });
    assert_eq!((outcome.ending, &output[..]), (Ending::PowerOff, &b"M\x03"[..]));
}
