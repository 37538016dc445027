//! A look at a kernel file before a machine is built for it: a kernel that is cut off says nothing when it runs.

use block::codec::Reader;

/// Offset of the count of 512-byte sectors of real-mode code (Linux's boot protocol, "The real-mode kernel header").
const SETUP_SECTS: usize = 0x1f1;
/// The header's own magic number.
const HDRS: usize = 0x202;
/// A program header of ELF64 that is loaded.
const PT_LOAD: u32 = 1;

/// What is wrong with the file of a kernel, if something is: neither a bzImage nor an ELF file, or not all of one.
pub fn defect(kernel: &[u8]) -> Option<String> {
    if kernel.starts_with(b"\x7fELF") {
        return elf_defect(kernel);
    }
    if kernel.get(HDRS..HDRS + 4) == Some(b"HdrS") {
        return bzimage_defect(kernel);
    }
    let what = match kernel {
        [] => "it is empty",
        [0x1f, 0x8b, ..] => "it is a gzip file",
        [b'M', b'Z', ..] => "it is an EFI program without Linux's boot header",
        _ => "it has neither Linux's boot header nor that of an ELF file",
    };
    Some(format!("this is no kernel that can be started: {what}"))
}

/// "The real-mode kernel header": setup_sects at 0x1f1, syszie in units of 16 bytes at 0x1f4.
fn bzimage_defect(kernel: &[u8]) -> Option<String> {
    let setup_sectors = match kernel.get(SETUP_SECTS).copied()? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let paragraphs = kernel.get(SETUP_SECTS + 3..SETUP_SECTS + 7)?;
    let paragraphs = paragraphs.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    // The last paragraph need not be full.
    let least = ((setup_sectors + 1) * 512 + paragraphs * 16).saturating_sub(15);
    cut_off(kernel.len() as u64, least)
}

fn cut_off(len: u64, least: u64) -> Option<String> {
    (len < least)
        .then(|| format!("the kernel is cut off: its file has {len} bytes, its header says {least} or more"))
}

/// ELF64: e_phoff at 0x20, e_phentsize at 0x36, e_phnum at 0x38.
fn elf_defect(kernel: &[u8]) -> Option<String> {
    let Some(end) = elf_end(kernel) else {
        return Some(
            "the kernel's ELF header is cut off or of another kind than ELF64, little-endian".to_owned(),
        );
    };
    cut_off(kernel.len() as u64, end)
}

/// The end of the last loaded segment in the file.
fn elf_end(kernel: &[u8]) -> Option<u64> {
    if kernel.get(4..6) != Some(&[2, 1]) {
        return None;
    }
    let mut header = Reader::new(kernel.get(0x20..0x40)?);
    let table = header.le_u64()?;
    let mut counts = Reader::new(kernel.get(0x36..0x3a)?);
    let (entry_size, count) = (counts.le_u16()?, counts.le_u16()?);
    if entry_size < 0x38 || count == 0 {
        return None;
    }
    let mut end = 0;
    for index in 0..u64::from(count) {
        let start = usize::try_from(table.checked_add(index * u64::from(entry_size))?).ok()?;
        let mut entry = Reader::new(kernel.get(start..start.checked_add(0x28)?)?);
        let kind = entry.le_u32()?;
        let _flags = entry.le_u32()?;
        let offset = entry.le_u64()?;
        let _addresses = (entry.le_u64()?, entry.le_u64()?);
        let len = entry.le_u64()?;
        if kind == PT_LOAD {
            end = offset.checked_add(len)?.max(end);
        }
    }
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(paragraphs: u32) -> Vec<u8> {
        let mut kernel = vec![0; 5 * 512 + paragraphs as usize * 16];
        kernel[SETUP_SECTS] = 4;
        kernel[SETUP_SECTS + 3..SETUP_SECTS + 7].copy_from_slice(&paragraphs.to_le_bytes());
        kernel[HDRS..HDRS + 4].copy_from_slice(b"HdrS");
        kernel
    }

    fn elf(offset: u64, len: u64) -> Vec<u8> {
        let mut kernel = vec![0; 0x40 + 0x38];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[0x20..0x28].copy_from_slice(&0x40_u64.to_le_bytes());
        kernel[0x36..0x38].copy_from_slice(&0x38_u16.to_le_bytes());
        kernel[0x38..0x3a].copy_from_slice(&1_u16.to_le_bytes());
        kernel[0x40..0x44].copy_from_slice(&PT_LOAD.to_le_bytes());
        kernel[0x48..0x50].copy_from_slice(&offset.to_le_bytes());
        kernel[0x60..0x68].copy_from_slice(&len.to_le_bytes());
        kernel
    }

    #[test]
    fn whole_kernels_have_no_defect() {
        assert_eq!(defect(&bzimage(1000)), None);
        let mut signed = bzimage(1000);
        signed.extend([1; 3000]);
        assert_eq!(defect(&signed), None);
        assert_eq!(defect(&elf(0x40, 0x38)), None);
    }

    #[test]
    fn cut_kernels_are_seen() {
        let kernel = bzimage(1000);
        let said = defect(&kernel[..kernel.len() - 500]).unwrap();
        assert!(said.starts_with("the kernel is cut off: its file has 18060 bytes"), "{said}");
        assert!(defect(&elf(0x40, 0x39)).unwrap().contains("cut off"));
        assert!(defect(&elf(u64::MAX, 2)).unwrap().contains("ELF header"));
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        for (bytes, words) in
            [(&b""[..], "empty"), (b"\x1f\x8b\x08", "gzip"), (b"MZ", "EFI"), (b"#!/bin/sh", "neither")]
        {
            assert!(defect(bytes).unwrap().contains(words), "{bytes:?}");
        }
    }

    #[test]
    fn no_prefix_panics() {
        for whole in [bzimage(10), elf(0x40, 0x38)] {
            for len in 0..whole.len() {
                let _ = defect(&whole[..len]);
            }
        }
    }
}
