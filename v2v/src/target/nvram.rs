//! Variable stores of UEFI.
//!
//! QEMU's firmware keeps its variables in a firmware volume (UEFI Platform Initialization 1.7, volume 3, section 2.2.1 and
//! 3.2.1). A store of another hypervisor can be taken over only if it is just that, of the size that the firmware expects.

/// `EFI_SYSTEM_NV_DATA_FV_GUID`, as it lies in a file.
const NV_DATA: [u8; 16] =
    [0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50];
/// Where the type of a firmware volume stands.
const GUID_AT: usize = 16;
/// Where its length stands.
const LENGTH_AT: usize = 32;
/// Where its signature stands.
const SIGNATURE_AT: usize = 40;

/// What a file of variables is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// A firmware volume, which QEMU's firmware can use if it expects this many bytes.
    Raw {
        /// Length of the file in bytes.
        len: usize,
    },
    /// VMware's own format.
    Vmware,
    /// A qcow2 image, which holds a store inside.
    Qcow2,
    /// Something else, or damaged.
    Unknown,
}

impl Store {
    /// Finds out what a whole file is.
    pub fn of(bytes: &[u8]) -> Self {
        if bytes.starts_with(b"MRVN") {
            return Self::Vmware;
        }
        if bytes.starts_with(b"QFI\xfb") {
            return Self::Qcow2;
        }
        let field = |at: usize, len: usize| bytes.get(at..at + len);
        let is_volume = field(SIGNATURE_AT, 4) == Some(b"_FVH") && field(GUID_AT, 16) == Some(&NV_DATA);
        let len = field(LENGTH_AT, 8).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
        match len {
            Some(len) if is_volume && len <= bytes.len() as u64 => Self::Raw { len: bytes.len() },
            _ => Self::Unknown,
        }
    }

    /// Whether it can replace an empty store of `template` bytes.
    pub fn fits(self, template: usize) -> bool {
        self == Self::Raw { len: template }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(len: usize, claimed: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[GUID_AT..GUID_AT + 16].copy_from_slice(&NV_DATA);
        bytes[LENGTH_AT..LENGTH_AT + 8].copy_from_slice(&claimed.to_le_bytes());
        bytes[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(b"_FVH");
        bytes
    }

    #[test]
    fn only_a_whole_firmware_volume_is_taken_over() {
        let store = Store::of(&volume(0x20000, 0x20000));
        assert_eq!(store, Store::Raw { len: 0x20000 });
        assert!(store.fits(0x20000) && !store.fits(0x84000));
        assert_eq!(Store::of(&volume(0x20000, 0x20001)), Store::Unknown, "cut off");
        assert_eq!(Store::of(b"MRVN...."), Store::Vmware);
        assert_eq!(Store::of(b"QFI\xfb"), Store::Qcow2);
        for len in 0..64 {
            assert_eq!(Store::of(&vec![0xff; len]), Store::Unknown);
        }
    }

    /// The firmware's own empty store is the judge.
    #[test]
    fn the_empty_store_of_ovmf_is_one() {
        for path in ["/usr/share/OVMF/OVMF_VARS.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"] {
            let Ok(bytes) = std::fs::read(path) else {
                eprintln!("skipped: no {path}");
                continue;
            };
            assert_eq!(Store::of(&bytes), Store::Raw { len: bytes.len() }, "{path}");
        }
    }
}
