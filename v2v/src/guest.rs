//! A virtual machine, as every source describes it and every target needs it.

mod document;

use std::path::PathBuf;

pub use document::{document, from_document};

/// A whole machine. What a source does not say is `None` or empty; sources do not invent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guest {
    /// What the machine is called.
    pub name: String,
    /// Whose machine it was.
    pub origin: Origin,
    /// Its identity as firmware tells the guest (SMBIOS), in the usual form with hyphens.
    pub uuid: Option<String>,
    /// Its generation id (for Windows domain controllers), in the usual form.
    pub genid: Option<String>,
    /// What people wrote about it.
    pub description: Option<String>,
    /// The guest system in the words of the source (`debian12-64`, `Debian_64`, OVF's number).
    pub os_hint: Option<String>,
    /// The processor's family in libvirt's words (`x86_64`, `i686`, `aarch64`).
    pub architecture: Option<String>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Processors.
    pub cpus: Cpus,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// Hard disks, in the order in which the guest's firmware looks at them: the boot disk first, unless
    /// [`Disk::boot_order`] says otherwise.
    pub disks: Vec<Disk>,
    /// CD and floppy drives.
    pub removables: Vec<Removable>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Screen.
    pub display: Option<Display>,
    /// Sound card in libvirt's words (`ich9`, `ac97`, `sb16`, `es1370`, `ich6`).
    pub sound: Option<String>,
    /// Number of serial ports.
    pub serial_ports: u32,
    /// The hardware clock runs in local time.
    pub local_time: bool,
    /// It has a TPM.
    pub tpm: bool,
    /// A paravirtual guest without a boot loader of its own (Xen).
    pub direct_boot: Option<DirectBoot>,
    /// What was not understood, is lost, or needs a person, in whole sentences.
    pub notes: Vec<String>,
}

/// Whose product a machine comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Not known: plain disks.
    #[default]
    Unknown,
    /// VMware.
    Vmware,
    /// VirtualBox.
    VirtualBox,
    /// Xen.
    Xen,
    /// Hyper-V.
    HyperV,
    /// QEMU or KVM.
    Kvm,
    /// A physical machine.
    Physical,
}

impl Origin {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Vmware => "vmware",
            Self::VirtualBox => "virtualbox",
            Self::Xen => "xen",
            Self::HyperV => "hyper-v",
            Self::Kvm => "kvm",
            Self::Physical => "physical",
        }
    }
}

/// The processors of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpus {
    /// How many; `None`: the source does not say (1).
    pub count: Option<u32>,
    /// Sockets, cores in each, threads in each core; the product is `count`.
    pub topology: Option<(u32, u32, u32)>,
    /// The model in libvirt's words.
    pub model: Option<String>,
}

/// What starts the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// BIOS or UEFI; `None`: the source does not say, the disks decide.
    pub kind: Option<FirmwareKind>,
    /// UEFI with Secure Boot.
    pub secure_boot: bool,
    /// The source's variable store, in its own format.
    pub nvram: Option<PathBuf>,
}

/// BIOS or UEFI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FirmwareKind {
    /// A PC's BIOS.
    Bios,
    /// UEFI.
    Uefi,
}

impl FirmwareKind {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }
}

/// What a disk or drive is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bus {
    /// IDE.
    Ide,
    /// SATA (AHCI).
    Sata,
    /// SCSI, whatever the controller.
    Scsi,
    /// NVMe.
    Nvme,
    /// virtio-blk.
    Virtio,
    /// virtio-scsi.
    VirtioScsi,
    /// Xen's block device.
    Xen,
    /// USB.
    Usb,
    /// A floppy controller.
    Floppy,
}

impl Bus {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::Sata => "sata",
            Self::Scsi => "scsi",
            Self::Nvme => "nvme",
            Self::Virtio => "virtio",
            Self::VirtioScsi => "virtio-scsi",
            Self::Xen => "xen",
            Self::Usb => "usb",
            Self::Floppy => "floppy",
        }
    }
}

/// A hard disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// By what the source calls it (`scsi0:0`, `xvda`, a path); for messages.
    pub id: String,
    /// What it is attached to; `None`: not known.
    pub bus: Option<Bus>,
    /// The controller's model in the source's words (`pvscsi`, `lsilogic`, `PIIX4`).
    pub controller: Option<String>,
    /// The name without `/dev/` that a Linux guest gives it on the source, as far as that follows from the
    /// description (`sda`, `xvda`, `nvme0n1`).
    pub guest_name: Option<String>,
    /// Where its bytes are.
    pub image: DiskImage,
    /// 1 is tried first; `None`: in the order of the list.
    pub boot_order: Option<u32>,
    /// The guest may not write to it.
    pub read_only: bool,
    /// Its serial number.
    pub serial: Option<String>,
    /// Where it is attached: which controller of those of its bus (of IDE: which channel), and which number there (target,
    /// unit, port), from 0.
    pub slot: Option<(u32, u32)>,
    /// What else names in `/dev/disk/by-id` and `by-path` are made of on the source: WWNs, addresses, whole links.
    pub identities: Vec<String>,
    /// Its size in bytes, if the source says it (OVF does): what the image should have.
    pub capacity_bytes: Option<u64>,
}

impl Disk {
    /// A disk of which nothing else is known.
    pub fn new(id: impl Into<String>, image: DiskImage) -> Self {
        Self {
            id: id.into(),
            bus: None,
            controller: None,
            guest_name: None,
            image,
            boot_order: None,
            read_only: false,
            serial: None,
            slot: None,
            identities: vec![],
            capacity_bytes: None,
        }
    }
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskImage {
    /// A name as `vimg` opens it everywhere (a path, `ARCHIVE:MEMBER`, a URL), and its format if the source says it.
    Name {
        /// The name.
        name: String,
        /// The format (`raw`, `vmdk`, ...), `None` to find out from the contents.
        format: Option<String>,
    },
    /// An empty disk of this many bytes.
    Empty {
        /// Its size.
        size_bytes: u64,
    },
}

/// A drive with a medium that can be taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removable {
    /// CD-ROM or floppy.
    pub kind: RemovableKind,
    /// What it is attached to.
    pub bus: Option<Bus>,
    /// The medium in it, if that is a file.
    pub medium: Option<String>,
}

/// What a drive takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemovableKind {
    /// CDs and DVDs.
    Cdrom,
    /// Floppy disks.
    Floppy,
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nic {
    /// Its address in lower case with colons; `None`: the source does not say.
    pub mac: Option<String>,
    /// The model in libvirt's words (`e1000`, `vmxnet3`, `rtl8139`, `virtio`, `pcnet`, `netfront`).
    pub model: Option<String>,
    /// What it is connected to.
    pub network: Network,
    /// The name of that on the source.
    pub network_name: Option<String>,
    /// VMware's slot number, from which guests name it (`ens192`).
    pub slot: Option<u32>,
}

/// What a network card is connected to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Network {
    /// A network that the hypervisor manages, or not known.
    #[default]
    Managed,
    /// A bridge of the host.
    Bridge,
    /// Address translation by the host.
    Nat,
    /// Only the host can be reached.
    HostOnly,
}

/// How the screen is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Display {
    /// `vnc` or `spice`.
    pub protocol: String,
    /// Video memory in bytes.
    pub video_bytes: Option<u64>,
}

/// What a hypervisor boots without a boot loader of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectBoot {
    /// The kernel's file on the host.
    pub kernel: String,
    /// The initramfs' file on the host.
    pub initrd: Option<String>,
    /// The command line.
    pub cmdline: String,
}
