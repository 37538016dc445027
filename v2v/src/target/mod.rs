//! Describing a machine for whoever is going to run it.
//!
//! ```text
//!   Guest       what the source says                 TargetSpec   what was decided: disks, firmware, buses, networks
//!        \                                          /
//!         '------------- Machine::new -------------'             every gap filled, every doubt noted
//!                             |
//!     libvirt   qemu   proxmox   kubevirt   ovf + ova            text, and nothing but text
//! ```
//!
//! The same machine always gives the same text. Nothing is looked up on the host: whether a file or a bridge is there is the
//! caller's business.

pub mod kubevirt;
pub mod libvirt;
pub mod machine;
pub mod network;
pub mod nvram;
pub mod os;
pub mod ova;
pub mod ovf;
pub mod proxmox;
pub mod qemu;
mod shell;
#[cfg(test)]
mod tests;
mod xml;
mod yaml;

use std::path::PathBuf;

use crate::guest::{Bus, DirectBoot, FirmwareKind};

pub use machine::{Drive, Machine, MachineDisk, MachineNic};
pub use network::{Connection, NetworkMap};
pub use os::OsFacts;

/// What was decided about a guest that is being described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetSpec {
    /// Its new name; `None`: as on the source.
    pub name: Option<String>,
    /// Its hard disks as they were written, in the order of the source.
    pub disks: Vec<OutputDisk>,
    /// BIOS or UEFI.
    pub firmware: FirmwareKind,
    /// UEFI with Secure Boot.
    pub secure_boot: bool,
    /// The firmware's files; `None`: whoever runs the guest chooses them.
    pub loader: Option<Loader>,
    /// The guest's own variable store, converted and in place.
    pub nvram: Option<PathBuf>,
    /// The board.
    pub chipset: Chipset,
    /// The guest's operating system.
    pub os: OsFacts,
    /// What the guest sees of the processor.
    pub cpu: CpuMode,
    /// Without KVM, which is very slow.
    pub emulated: bool,
    /// What network cards become.
    pub nic_model: NicModel,
    /// What network cards are plugged into.
    pub networks: NetworkMap,
    /// Started by this kernel, without a boot loader of the guest's.
    pub direct_boot: Option<DirectBoot>,
    /// The guest agent of QEMU is expected in the guest: give it its channel.
    pub agent: bool,
}

impl Default for TargetSpec {
    fn default() -> Self {
        Self {
            name: None,
            disks: vec![],
            firmware: FirmwareKind::Bios,
            secure_boot: false,
            loader: None,
            nvram: None,
            chipset: Chipset::Q35,
            os: OsFacts::default(),
            cpu: CpuMode::HostModel,
            emulated: false,
            nic_model: NicModel::Virtio,
            networks: NetworkMap::default(),
            direct_boot: None,
            agent: true,
        }
    }
}

/// A disk of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputDisk {
    /// Its file.
    pub path: PathBuf,
    /// `raw`, `qcow2` or `vmdk`.
    pub format: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it is attached to: virtio, virtio-scsi, SCSI, SATA or IDE.
    pub bus: Bus,
}

/// The firmware's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loader {
    /// The code, which the guest cannot change.
    pub code: PathBuf,
    /// Empty variables, which are copied for every guest.
    pub variables: PathBuf,
}

/// The board.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Chipset {
    /// PCI Express (Q35, of 2007).
    #[default]
    Q35,
    /// Plain PCI (i440FX, of 1996), for systems that are older than the other.
    Pc,
}

impl Chipset {
    /// Its name, as QEMU and libvirt have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// What the guest sees of the host's processor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CpuMode {
    /// A model with the host's features: libvirt can still move the guest to a similar host.
    #[default]
    HostModel,
    /// Exactly the host's.
    HostPassthrough,
    /// This model, in QEMU's words (`x86-64-v2-AES`, `Skylake-Server`).
    Named(String),
}

/// What network cards become.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NicModel {
    /// virtio, for guests that have its driver.
    #[default]
    Virtio,
    /// What they were, where QEMU has it; `e1000` otherwise.
    Keep,
    /// This model, in QEMU's words.
    Named(String),
}
