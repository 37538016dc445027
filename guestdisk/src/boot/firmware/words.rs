//! What was found, in words.

use super::{BootCode, EfiPartition, FALLBACK, Facts, Firmware};
use crate::partition::Scheme;

/// Loaders that are named in a sentence.
const NAMED: usize = 3;

impl Facts {
    /// What there is for this firmware, and then for the other one.
    pub fn describe(&self, firmware: Firmware) -> String {
        match firmware {
            Firmware::Bios => format!("{}; {}", self.for_bios(), self.for_uefi()),
            Firmware::Uefi => format!("{}; {}", self.for_uefi(), self.for_bios()),
        }
    }

    fn table(&self) -> &'static str {
        match self.scheme {
            Some(Scheme::Gpt) => "GPT",
            Some(Scheme::Mbr) => "MBR",
            None => "a disk without partitions",
        }
    }

    /// What there is for a BIOS: `MBR with GRUB's boot code`.
    pub fn for_bios(&self) -> String {
        let mut text = format!("{} with {}", self.table(), self.boot_code);
        match (self.boot_code, self.active) {
            _ if self.scheme == Some(Scheme::Gpt) => match self.bios_boot {
                Some(number) => text.push_str(&format!(" and a BIOS boot partition ({number})")),
                None => text.push_str(" and no BIOS boot partition"),
            },
            (code, Some((number, first))) if code.starts_active() => {
                text.push_str(&format!(", partition {number} is active and has {first}"));
            }
            (code, None) if code.starts_active() && self.scheme.is_some() => {
                text.push_str(", no partition is active");
            }
            _ => {}
        }
        text
    }

    /// What there is for UEFI: `an EFI system partition with \EFI\debian\shimx64.efi`.
    pub fn for_uefi(&self) -> String {
        let Some(partition) = self.efi_loader().or_else(|| self.efi.first()) else {
            return "no EFI system partition".to_owned();
        };
        let what = match (&partition.unreadable, partition.programs()) {
            (Some(why), _) => format!(" that cannot be read ({why})"),
            (None, names) if names.is_empty() => " without a loader".to_owned(),
            (None, names) => format!(" with {}", join(&names)),
        };
        let kind = if partition.typed { "an EFI system partition" } else { "a FAT file system" };
        let missing = if partition.fallback.is_none() && !partition.loaders.is_empty() {
            format!(", without {FALLBACK}")
        } else {
            String::new()
        };
        format!("{kind} ({}){what}{missing}", partition.location)
    }

    /// Why a firmware finds nothing to start on this disk, and what may be meant; `None` if it should find something.
    pub fn why_nothing(&self, firmware: Firmware) -> Option<String> {
        match firmware {
            Firmware::Bios if self.has_bios_loader() => None,
            Firmware::Bios if self.efi_loader().is_some() => {
                Some(format!("{}: was it a UEFI machine? There is {}", self.for_bios(), self.for_uefi()))
            }
            Firmware::Bios => Some(self.for_bios()),
            Firmware::Uefi if self.has_fallback() => None,
            Firmware::Uefi => Some(match self.efi_loader() {
                Some(partition) => format!(
                    "no {FALLBACK} on {}: only an entry in NVRAM would start {}",
                    partition.location,
                    join(&partition.programs())
                ),
                None if self.has_bios_loader() => {
                    format!("{}: was it a BIOS machine? ({})", self.for_uefi(), self.for_bios())
                }
                None => self.for_uefi(),
            }),
        }
    }

    /// Whether the first sector would be started by a BIOS although there is nothing in it.
    pub fn starts_nothing(&self) -> bool {
        self.boot_code == BootCode::Empty
    }
}

impl EfiPartition {
    /// The fallback and the loaders.
    fn programs(&self) -> Vec<&str> {
        self.fallback.iter().chain(&self.loaders).map(String::as_str).collect()
    }
}

fn join(names: &[&str]) -> String {
    let named = names.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}
