use proptest::prelude::*;

use super::super::layout::{ACPI_START, ZERO_PAGE};
use super::*;

/// A bzImage with this payload, as small as one can be.
fn bzimage(payload: &[u8], version: u16, xloadflags: u16) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &u32::try_from(payload.len().div_ceil(16)).unwrap().to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &version.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &xloadflags.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x40_0000u32.to_le_bytes());
    file.extend(payload);
    file
}

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib << 20).unwrap()
}

fn get(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read(address, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_bzimage_goes_where_it_prefers_with_its_parameters() {
    let ram = ram(64);
    let entry =
        load(&ram, &bzimage(b"kernel", 0x20f, 1), Some(&[9; 5000]), "root=/dev/vda1", ACPI_START).unwrap();
    assert_eq!(entry, Entry::Long { rip: 0x100_0200, rsi: ZERO_PAGE });
    assert_eq!(get(&ram, 0x100_0000, 6), b"kernel");
    let page = get(&ram, ZERO_PAGE, 4096);
    let dword = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    assert_eq!((dword(0x202), page[0x210]), (u32::from_le_bytes(*b"HdrS"), 0xff));
    let initrd = u64::from(dword(0x218));
    assert_eq!((initrd, dword(0x21c)), ((64 << 20) - 8192, 5000));
    assert_eq!(get(&ram, initrd, 5001), [&[9; 5000][..], &[0]].concat());
    assert_eq!(get(&ram, u64::from(dword(0x228)), 15), b"root=/dev/vda1\0");
    assert_eq!(u64::from(dword(0x70)), ACPI_START);
    assert_eq!(page[0x1e8], 5);
    assert_eq!(dword(0x2d0 + 3 * 20 + 8), 63 << 20, "memory above 1 MiB");
}

#[test]
fn a_kernel_without_a_64_bit_entry_begins_in_protected_mode_where_there_is_room() {
    let entry = load(&ram(16), &bzimage(b"kernel", 0x20f, 0), None, "", ACPI_START).unwrap();
    assert_eq!(entry, Entry::Protected { rip: 0x20_0000, rbx: 0, rsi: ZERO_PAGE });
}

#[test]
fn what_cannot_be_started_is_told_with_its_reason() {
    let good = bzimage(&[1; 4096], 0x20f, 1);
    let long = "x".repeat(2048);
    type Case<'a> = (&'a [u8], u64, Option<&'a [u8]>, &'a str, &'a str);
    let cases: [Case<'_>; 7] = [
        (b"MZ", 64, None, "", "neither a bzImage nor an ELF file"),
        (&good[..3000], 64, None, "", "its header tells of"),
        (&bzimage(b"k", 0x204, 0), 64, None, "", "boot protocol 2.04"),
        (&good, 4, None, "", "need 6 MiB of memory, the guest has 4"),
        (&good, 32, Some(&[0; 16 << 20]), "", "kernel and initramfs"),
        (&good, 64, None, &long, "the kernel takes 2047"),
        (b"\x7fELF\x01\x01\x01", 64, None, "", "the kernel has 7 bytes"),
    ];
    for (kernel, mib, initrd, cmdline, words) in cases {
        let error = load(&ram(mib), kernel, initrd, cmdline, ACPI_START).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn memory_above_the_hole_is_in_the_map() {
    let map = memory_map(&ram(4096));
    let memory: u64 = map.iter().filter(|r| r.kind == 1).map(|r| r.len).sum();
    assert_eq!(memory, (4096 << 20) - (0x10_0000 - 0x9_fc00));
    assert_eq!(map.last().map(|r| (r.start, r.len)), Some((1 << 32, 1 << 30)));
    assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start));
}

proptest! {
    #[test]
    fn damaged_kernels_do_no_harm(at in 0usize..0x300, byte in any::<u8>(), len in 0usize..6000) {
        let mut kernel = bzimage(&[1; 4096], 0x20f, 1);
        kernel[at] = byte;
        kernel.truncate(len);
        crate::fuzz::fuzz_kernel(&kernel);
    }

    #[test]
    fn damaged_elf_files_do_no_harm(at in 0usize..0x130, byte in any::<u8>(), len in 0usize..0x140, note in any::<bool>()) {
        let mut kernel = crate::machine::elf_for_tests(&[0xf4; 64], note.then_some(0x10_0000));
        kernel[at] = byte;
        kernel.truncate(len);
        crate::fuzz::fuzz_kernel(&kernel);
    }

    #[test]
    fn any_bytes(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        crate::fuzz::fuzz_kernel(&data);
        crate::fuzz::fuzz_kernel(&[b"\x7fELF\x02\x01", &data[..]].concat());
    }
}
