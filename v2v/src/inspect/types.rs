//! What an inspection finds.

use std::path::PathBuf;
use std::sync::Arc;

use guestdisk::Location;
use guestdisk::boot::{BootFile, Entry, Loader};

use super::windows::Windows;
use crate::guest::FirmwareKind;
use crate::initramfs::Seen;

/// Everything that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Operating systems; usually one.
    pub systems: Vec<System>,
    /// BIOS, UEFI, both or nothing: how these disks can be started.
    pub firmware: Vec<FirmwareKind>,
    /// Why that is so, in sentences.
    pub firmware_reasons: Vec<String>,
    /// What is damaged or not understood, in sentences.
    pub problems: Vec<String>,
}

/// An operating system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    /// The volume (index in [`guestdisk::Disks::volumes`]) that holds its root.
    pub root: usize,
    /// Where that is.
    pub location: Location,
    /// The folder within the volume that is its root: empty, or a subvolume of btrfs (`@`, `root`), as
    /// [`guestdisk::Volume::file_system`] has it; where it is not there, as [`guestdisk::fs::FileSystem::open_top`] has it.
    pub subvolume: PathBuf,
    /// Linux, Windows, something else.
    pub kind: SystemKind,
    /// `ID` of os-release (`debian`, `rhel`), or `windows`.
    pub distribution: String,
    /// `ID_LIKE` of os-release.
    pub like: Vec<String>,
    /// `VERSION_ID`, or the version of Windows.
    pub version: String,
    /// For people: `PRETTY_NAME`, `ProductName`.
    pub product: String,
    /// `x86_64`, `i686`, `aarch64`; empty if not known.
    pub architecture: String,
    /// The host name; empty if not known.
    pub host_name: String,
    /// `deb`, `rpm`, `pacman`, `apk`; empty if not known.
    pub packages: String,
    /// What starts services.
    pub init: Init,
    /// What is mounted where, by fstab; the root itself included.
    pub mounts: Vec<Mount>,
    /// The kernels: all that the boot loader offers, and those that lie around besides.
    pub kernels: Vec<Kernel>,
    /// What the boot loaders offer that starts this system, in the order of the menus.
    pub entries: Vec<Entry>,
    /// Boot loaders' configuration files that name devices or kernels.
    pub loaders: Vec<LoaderConfig>,
    /// The EFI system partition (index of the volume).
    pub esp: Option<usize>,
    /// The fallback loader `\EFI\BOOT\BOOTX64.EFI` (or of the other architectures) that is there.
    pub fallback_loader: Option<PathBuf>,
    /// Guest tools of other hypervisors.
    pub tools: Vec<Tools>,
    /// Network interfaces that the configuration names.
    pub interfaces: Vec<Interface>,
    /// SELinux is on (enforcing or permissive).
    pub selinux: bool,
    /// Names of devices that will not exist on KVM, or that may change.
    pub device_names: Vec<DeviceName>,
    /// What is known of a Windows; `None` if it is none, or its registry was not read.
    pub windows: Option<Windows>,
    /// What stands in the way of KVM.
    pub obstacles: Vec<Obstacle>,
}

impl Default for System {
    /// A Linux of which nothing is known, on the first disk as a whole.
    fn default() -> Self {
        Self {
            root: 0,
            location: Location::Whole { disk: 0 },
            subvolume: PathBuf::new(),
            kind: SystemKind::Linux,
            distribution: String::new(),
            like: vec![],
            version: String::new(),
            product: String::new(),
            architecture: String::new(),
            host_name: String::new(),
            packages: String::new(),
            init: Init::Unknown,
            mounts: vec![],
            kernels: vec![],
            entries: vec![],
            loaders: vec![],
            esp: None,
            fallback_loader: None,
            tools: vec![],
            interfaces: vec![],
            selinux: false,
            device_names: vec![],
            windows: None,
            obstacles: vec![],
        }
    }
}

/// The family of an operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SystemKind {
    /// Linux.
    Linux,
    /// Windows.
    Windows,
    /// Something else that was recognised (a BSD, DOS).
    Other,
}

impl SystemKind {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Windows => "windows",
            Self::Other => "other",
        }
    }
}

/// What starts services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Init {
    /// systemd.
    Systemd,
    /// Something with `/etc/inittab`.
    SysV,
    /// OpenRC.
    OpenRc,
    /// Not known.
    #[default]
    Unknown,
}

impl Init {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::SysV => "sysv",
            Self::OpenRc => "openrc",
            Self::Unknown => "unknown",
        }
    }
}

/// A line of fstab.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// What is mounted, as fstab names it.
    pub spec: String,
    /// Where (`/`, `/boot`, `none` for swap).
    pub path: PathBuf,
    /// The type of file system as fstab has it.
    pub kind: String,
    /// The options as fstab has them.
    pub options: String,
    /// When a start checks it (the sixth field of fstab): 0 is never.
    pub pass: u32,
    /// The volume (index) that it means; `None` if there is none.
    pub volume: Option<usize>,
    /// Line of fstab, from 1; 0 if the mount is not from there.
    pub line: usize,
}

/// A kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Its release (`6.1.0-30-amd64`).
    pub release: String,
    /// Its image.
    pub image: Option<BootFile>,
    /// The images of its initramfs, in the order in which they are loaded.
    pub initrds: Vec<BootFile>,
    /// Its folder of modules as the guest sees it, without symbolic links (`/usr/lib/modules/6.1.0-30-amd64`).
    pub modules: Option<PathBuf>,
    /// Ids of the boot entries that start it.
    pub entries: Vec<String>,
    /// It is what starts without anybody's doing.
    pub default: bool,
    /// A part of a unified kernel image: nothing can be appended.
    pub unified: bool,
    /// What its initramfs is; `None` if there is none or it cannot be read (then an obstacle says why).
    pub initramfs: Option<Initramfs>,
    /// Where the drivers are that matter; those of which nothing can be said are left out, which is all if neither the list
    /// of what is built in nor modules were found.
    pub drivers: Vec<Driver>,
}

/// What an initramfs is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Initramfs {
    /// `initramfs-tools`, `dracut`, `mkinitcpio`, `mkinitrd`; empty if not known.
    pub generator: String,
    /// Compression of the largest segment: `none`, `gzip`, `xz`, `lzma`, `bzip2`, `lz4`, `zstd`.
    pub compression: String,
    /// How many segments (cpio archives) it has; the early one with microcode included.
    pub segments: usize,
    /// Its length in bytes.
    pub len: u64,
    /// The folder that holds modules within it, without a leading slash (`usr/lib/modules/RELEASE`); a folder of the
    /// archive itself, never through its link `lib`.
    pub modules: Option<String>,
    /// Names of modules in it, `_` for `-`, sorted.
    pub module_names: Vec<String>,
    /// How module files end in it: `.ko`, `.ko.xz`, `.ko.zst`, `.ko.gz`.
    pub module_suffix: String,
    /// `lib` is a link to `usr/lib`.
    pub merged_usr: bool,
    /// `mdadm` is in it, which puts arrays of software RAID together.
    pub has_mdadm: bool,
    /// Small configuration files in it (`conf/conf.d/resume`, `etc/cmdline.d/*.conf`, `etc/crypttab`): what it does
    /// with devices whatever the command line says.
    pub files: Vec<InitramfsFile>,
    /// Of several images the last: where its modules are, as it has them.
    pub module_paths: Vec<String>,
    /// Why the last image could not be read to its end; empty if it could.
    pub problem: String,
    /// What need not be unpacked again where it is seen again.
    pub seen: Vec<Arc<Seen>>,
}

/// A small configuration file in an initramfs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InitramfsFile {
    /// Its path without a leading slash.
    pub path: String,
    /// Type and permissions, as `st_mode` has them.
    pub mode: u32,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// A driver and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The module's name with `_` (`virtio_blk`).
    pub name: String,
    /// Where.
    pub place: DriverPlace,
}

/// Where a driver is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DriverPlace {
    /// In the kernel itself.
    BuiltIn,
    /// In the initramfs.
    Initramfs,
    /// Only among the modules of the root file system.
    Modules,
    /// Nowhere.
    Missing,
}

impl DriverPlace {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BuiltIn => "built-in",
            Self::Initramfs => "initramfs",
            Self::Modules => "modules",
            Self::Missing => "missing",
        }
    }
}

/// A file of a boot loader's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Whose.
    pub loader: Loader,
    /// The file.
    pub file: BootFile,
}

/// Guest tools of another hypervisor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tools {
    /// `open-vm-tools`, `vmware-tools`, `virtualbox-guest-additions`, `xe-guest-utilities`, `hyperv-daemons`, `parallels-tools`.
    pub name: String,
    /// Its units or init scripts (paths within the root) that are enabled.
    pub services: Vec<PathBuf>,
}

/// A network interface that the guest's configuration names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// The name (`ens33`, `eth0`).
    pub name: String,
    /// The address, where the configuration or an earlier rule ties the name to it; lower case with colons.
    pub mac: Option<String>,
    /// The files (within the root) that name it.
    pub files: Vec<PathBuf>,
    /// It has a fixed address.
    pub is_static: bool,
}

/// A name of a device in a configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceName {
    /// The file as the guest sees it.
    pub file: PathBuf,
    /// The file within that file, which is an initramfs; empty if it is a file of its own.
    pub member: String,
    /// Line, from 1; 0 if the file has no lines.
    pub line: usize,
    /// The name (`/dev/sda1`).
    pub name: String,
    /// The volume (index) that it means; `None` if there is none.
    pub volume: Option<usize>,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// A stable word for programs (`no-virtio-driver`, `hibernated`, `bitlocker`, `xen-only-kernel`, `encrypted`).
    pub code: &'static str,
    /// What it is, in a sentence.
    pub message: String,
    /// What can be done; empty if nothing is known.
    pub hint: String,
    /// The guest cannot boot on KVM as long as it is there and nothing is changed about it.
    pub fatal: bool,
}
