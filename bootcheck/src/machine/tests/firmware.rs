//! What only firmware boots have: the screen, flash for variables, the order of the disks.

use super::*;

/// A segment whose limit is 4 GiB.
const FLAT: u64 = 0x00cf_9300_0000_ffff;
const TABLE: u16 = 0x9000;
const TABLE_POINTER: u16 = 0x9100;

/// Makes everything up to 4 GiB addressable through ds in real mode.
fn reach_all_memory(rom: &mut Rom) {
    let mut pointer = 15u16.to_le_bytes().to_vec();
    pointer.extend((0xf_0000 + u32::from(TABLE)).to_le_bytes());
    rom.data(TABLE, &[0, FLAT].map(u64::to_le_bytes).concat()).data(TABLE_POINTER, &pointer);
    // lgdt cs:[pointer]
    rom.raw(&[0x66, 0x2e, 0x0f, 0x01, 0x16]).raw(&TABLE_POINTER.to_le_bytes());
    // mov eax, cr0; or al, 1; mov cr0, eax; mov bx, 8; mov ds, bx; and al, 0xfe; mov cr0, eax
    rom.raw(&[0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0xbb, 8, 0, 0x8e, 0xdb]);
    rom.raw(&[0x24, 0xfe, 0x0f, 0x22, 0xc0]);
}

/// mov byte [address], value
fn store(rom: &mut Rom, address: u32, value: u8) {
    rom.raw(&[0x67, 0xc6, 0x05]).raw(&address.to_le_bytes()).raw(&[value]);
}

/// mov al, [address], and al to the serial port
fn print(rom: &mut Rom, address: u32) {
    rom.raw(&[0x67, 0xa0]).raw(&address.to_le_bytes()).print_al();
}

#[test]
fn the_guest_programs_its_flash_and_gets_it_back() {
    requires_kvm!();
    let vars: Arc<[u8]> = (0..0x2000u32).map(|i| (i >> 8).to_le_bytes()[0]).collect();
    let mut rom = Rom::new();
    reach_all_memory(&mut rom);
    // The flash lies below the ROM of 64 KiB.
    let flash = 0xffff_0000 - 0x2000;
    print(&mut rom, flash + 0x123);
    for (offset, byte) in (0x200..).zip(*b"var") {
        store(&mut rom, flash + offset, 0x10);
        store(&mut rom, flash + offset, byte);
    }
    print(&mut rom, flash + 0x201);
    store(&mut rom, flash, 0x70);
    print(&mut rom, flash + 0x201);
    for command in [0x20, 0xd0, 0xff] {
        store(&mut rom, flash + 0x1000, command);
    }
    print(&mut rom, flash + 0x1000);
    print(&mut rom, flash + 0xfff);
    // The ROM itself does not listen.
    store(&mut rom, 0xffff_0000 + 0x9000, 0xff);
    print(&mut rom, 0xffff_0000 + 0x9008);
    let boot = Boot::Firmware { code: rom.power_off().image().into(), vars: Some(Arc::clone(&vars)) };
    let (outcome, output) = run(MachineSpec { boot, ..spec(&rom) });
    assert_eq!(outcome.ending, Ending::PowerOff);
    assert_eq!(output, [1, b'a', 0x80, 0xff, 0x0f, 0xff]);
    let left = outcome.vars.unwrap();
    assert_eq!((left.len(), &left[0x1ff..0x204]), (vars.len(), &b"\x01var\x02"[..]));
    assert!(left[0x1000..].iter().all(|byte| *byte == 0xff));
    assert_eq!(vars[0x200], 2, "the caller's are as they were");
}

#[test]
fn a_variable_store_that_is_none_is_refused() {
    requires_kvm!();
    let boot = Boot::Firmware { code: Rom::new().image().into(), vars: Some([0; 100].into()) };
    let error = KvmEngine.build(MachineSpec { boot, ..spec(&Rom::new()) }, Arc::new(Console::default()));
    assert!(error.unwrap_err().to_string().contains("variable store of 100 bytes"));
}

#[test]
fn the_screen_is_what_the_guest_wrote_last() {
    requires_kvm!();
    let mut rom = Rom::new();
    reach_all_memory(&mut rom);
    for (cell, byte) in (0..).zip(b"No OS") {
        store(&mut rom, 0xb_8000 + 160 + 2 * cell, *byte);
    }
    let (outcome, _) = run(spec(rom.power_off()));
    assert_eq!((outcome.ending, outcome.screen), (Ending::PowerOff, vec![String::new(), "No OS".into()]));
}

#[test]
fn a_loaders_reads_and_the_firmwares_log_are_told() {
    #[derive(Debug, Default)]
    struct Ears {
        reads: Mutex<Vec<(usize, u64, u64)>>,
        log: Mutex<Vec<u8>>,
    }
    impl Observer for Ears {
        fn console(&self, _bytes: &[u8], _at: Instant) {}
        fn firmware_log(&self, bytes: &[u8], _at: Instant) {
            self.log.lock().extend_from_slice(bytes);
        }
        fn disk_read(&self, disk: usize, sector: u64, sectors: u64, _at: Instant) {
            self.reads.lock().push((disk, sector, sectors));
        }
    }
    requires_kvm!();
    let mut rom = Rom::new();
    requests(&mut rom, &[(0, 3, 512), (0, 15, 512)]);
    for byte in b"log" {
        rom.out8(0x402, *byte);
    }
    rom.virtio_start(2, RINGS.map(linear)).virtio_write(2, 0x3000, 2, 0).await_word(USED + 2, 2);
    let disks = vec![disk(false).1, disk(false).1];
    let ears = Arc::new(Ears::default());
    let spec = MachineSpec { disks, ..spec(rom.power_off()) };
    let outcome = KvmEngine.build(spec, Arc::clone(&ears) as _).unwrap().run().unwrap();
    assert_eq!(outcome.ending, Ending::PowerOff);
    assert_eq!(*ears.reads.lock(), [(1, 3, 1), (1, 15, 1)]);
    assert_eq!(*ears.log.lock(), b"log");
}

/// Debian's package `seabios`.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// A disk of 1 MiB full of `byte`, with `code` in its boot sector; sector 5 cannot be read.
fn boot_disk(byte: u8, code: &[u8]) -> Disk {
    use block::testing::{Fault, FaultStorage, Operation};
    use nix::errno::Errno;
    let mut bytes = vec![byte; 1 << 20];
    bytes[..code.len()].copy_from_slice(code);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    let storage = FaultStorage::new(Arc::new(block::mem::MemStorage::from_bytes(bytes)));
    storage.fail(Fault::always(Errno::EIO).on(&[Operation::Read]).at(5 * 512..6 * 512));
    let device = block::raw::Raw::open(Arc::new(storage), block::raw::RawOptions::default()).unwrap();
    Disk { device: Arc::new(device), read_only: false, serial: String::new() }
}

/// A boot sector that shows a byte of sector 1 of the first disk and of the second, `E` if sector 5 of that one is an
/// error, and powers off as SeaBIOS would.
fn boot_sector() -> Vec<u8> {
    // xor ax, ax; mov ds, ax; mov es, ax
    let mut code = vec![0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0];
    // mov si, packet; mov ah, 0x42; mov dl, disk; int 0x13
    let read = |packet: u16, disk: u8| {
        let [low, high] = packet.to_le_bytes();
        [0xbe, low, high, 0xb4, 0x42, 0xb2, disk, 0xcd, 0x13]
    };
    // mov ah, 0x0e; mov bx, 7; int 0x10
    let print = [0xb4, 0x0e, 0xbb, 7, 0, 0xcd, 0x10];
    for disk in [0x80, 0x81] {
        // mov al, [0x8000]
        code.extend([&read(0x7d00, disk)[..], &[0xa0, 0x00, 0x80], &print].concat());
    }
    // mov al, 'E'; jc over; mov al, 'X'; over:
    code.extend([&read(0x7d10, 0x81)[..], &[0xb0, b'E', 0x72, 2, 0xb0, b'X'], &print].concat());
    // SeaBIOS keeps a character until the next one: mov al, '.'
    code.extend([&[0xb0, b'.'][..], &print].concat());
    // mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt
    code.extend([0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4]);
    code.resize(0x100, 0);
    for sector in [1u64, 5] {
        // One sector to 0000:8000.
        code.extend([0x10, 0, 1, 0, 0x00, 0x80, 0, 0]);
        code.extend(sector.to_le_bytes());
    }
    code
}

/// The judge is SeaBIOS: our devices are as it expects them, and loaders find the disks through it.
#[test]
fn a_bios_boots_the_first_disk_and_reads_the_others() {
    requires_kvm!();
    let Ok(code) = std::fs::read(SEABIOS) else {
        note_skip("no SeaBIOS on this machine");
        return;
    };
    let disks = vec![boot_disk(b'1', &boot_sector()), boot_disk(b'2', &[0xf4])];
    let boot = Boot::Firmware { code: code.into(), vars: None };
    let spec = MachineSpec { boot, disks, memory_bytes: 64 << 20, ..spec(&Rom::new()) };
    let (outcome, output) = run_within(Duration::from_secs(180), spec);
    let output = String::from_utf8_lossy(&output);
    assert_eq!(outcome.ending, Ending::PowerOff, "{output}");
    assert!(output.contains("12E"), "{output}");
    assert_eq!(outcome.disks[0].errors, 0);
    assert!(outcome.disks[1].errors > 0);
}
