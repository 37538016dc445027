//! The seam between the check and what runs the guest.
//!
//! A check knows disks, a way to boot and what to look for on the console; an engine (our own KVM machine, or an
//! installed qemu) turns that into a running guest and tells an [`Observer`] what it does.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{BlockDevice, Result};

/// A disk of the guest. It is written to as the guest pleases: whoever wants to keep it wraps it in an overlay first.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What the guest reads and writes.
    pub device: Arc<dyn BlockDevice>,
    /// The guest sees a read-only disk.
    pub read_only: bool,
    /// What the disk answers when it is asked for its serial number (at most 20 bytes).
    pub serial: String,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// virtio-pci, modern (virtio 1.x, section 4.1): what initramfs images of distributions carry.
    #[default]
    Pci,
    /// virtio-mmio (section 4.2).
    Mmio,
}

/// What is started.
#[derive(Debug, Clone)]
pub enum Boot {
    /// A Linux kernel (bzImage or ELF vmlinux), its initramfs and its command line, as they are.
    Linux {
        /// The bytes of the kernel file.
        kernel: Arc<[u8]>,
        /// The bytes of the initramfs, segments back to back.
        initrd: Option<Arc<[u8]>>,
        /// The whole command line.
        cmdline: String,
    },
    /// The disk's own boot loader, through a firmware (issue 7).
    Firmware {
        /// The firmware's code.
        code: Arc<[u8]>,
        /// Its variable store (UEFI): flash below the code, of which the guest gets a copy.
        vars: Option<Arc<[u8]>>,
    },
}

/// A machine to be run once.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Virtual processors, at least 1.
    pub cpus: u8,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// The disks in the order in which the guest finds them.
    pub disks: Vec<Disk>,
    /// How they are attached.
    pub transport: Transport,
    /// What is started.
    pub boot: Boot,
}

/// Where a virtual processor stood when the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuState {
    /// Its number.
    pub index: u8,
    /// The instruction pointer.
    pub rip: u64,
    /// In long mode, protected mode or real mode; halted or not; in words.
    pub mode: String,
    /// The bytes at the instruction pointer, as far as they can be read (at most 16).
    pub code: Vec<u8>,
}

/// What a disk saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskActivity {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests (zeros included).
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Discard requests.
    pub discards: u64,
    /// Requests that failed, and the first failure in words.
    pub errors: u64,
    /// The first failure.
    pub first_error: Option<String>,
    /// First and last 512-byte sector read.
    pub sectors_read: Option<(u64, u64)>,
    /// First and last 512-byte sector written.
    pub sectors_written: Option<(u64, u64)>,
}

/// How the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// It powered the machine off.
    PowerOff,
    /// It asked for a reset (`how`: ACPI, port 0xcf9, keyboard controller).
    Reset {
        /// By which means.
        how: &'static str,
    },
    /// A triple fault.
    TripleFault,
    /// The processor (or KVM) could not go on.
    Stuck {
        /// KVM's words and numbers.
        reason: String,
    },
    /// It was told to stop by [`Control::stop`].
    Stopped,
    /// The engine's own process ended (qemu).
    EngineDied {
        /// Its last words.
        reason: String,
    },
}

/// Everything that is known when a machine has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How.
    pub ending: Ending,
    /// The processors, where the engine can tell.
    pub cpus: Vec<CpuState>,
    /// The disks, in their order.
    pub disks: Vec<DiskActivity>,
    /// From the call of `run` to the first instruction of the guest.
    pub startup: Duration,
    /// The last text on the screen, as [`Observer::screen`] has it; empty where the engine shows none.
    pub screen: Vec<String>,
    /// The variable store of a UEFI firmware as the guest has left it, as long as the one it began with.
    pub vars: Option<Vec<u8>>,
}

/// Is told what the guest does, from the engine's threads; must return quickly.
pub trait Observer: Send + Sync {
    /// The guest has written these bytes to its serial console at `at`.
    fn console(&self, bytes: &[u8], at: Instant);
    /// The guest executes its first instruction now.
    fn started(&self, at: Instant) {
        let _ = at;
    }
    /// The firmware has written these bytes to its log at `at`.
    fn firmware_log(&self, bytes: &[u8], at: Instant) {
        let _ = (bytes, at);
    }
    /// The text on the screen has changed: its rows from the top (80 by 25 characters), without the blanks at the end
    /// of a row and without the empty rows at the end. Called at most about four times a second.
    fn screen(&self, rows: &[String], at: Instant) {
        let _ = (rows, at);
    }
    /// The guest reads `sectors` sectors of 512 bytes of disk `disk` (as counted in [`MachineSpec::disks`]) from
    /// `sector`. Called before each read, by the thread that serves it.
    fn disk_read(&self, disk: usize, sector: u64, sectors: u64, at: Instant) {
        let _ = (disk, sector, sectors, at);
    }
}

/// Tells an observer of what is read from one disk.
#[derive(Clone)]
pub struct ReadWatch {
    observer: Arc<dyn Observer>,
    disk: usize,
}

impl ReadWatch {
    /// For the disk with this place in [`MachineSpec::disks`].
    pub fn new(observer: Arc<dyn Observer>, disk: usize) -> Self {
        Self { observer, disk }
    }

    /// `sectors` sectors from `sector` are read now.
    pub fn tell(&self, sector: u64, sectors: u64) {
        self.observer.disk_read(self.disk, sector, sectors, Instant::now());
    }
}

impl Debug for ReadWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadWatch({})", self.disk)
    }
}

/// Ends a running machine and types on its console; any thread may call it at any time, also before `run`.
pub trait Control: Send + Sync + Debug {
    /// Makes `run` return [`Ending::Stopped`] soon.
    fn stop(&self);
    /// Types bytes on the serial console.
    fn type_bytes(&self, bytes: &[u8]);
}

/// Runs guests.
pub trait Engine: Send + Sync + Debug {
    /// Its name in reports: `kvm`, `qemu-tcg`, `qemu-kvm`.
    fn name(&self) -> &'static str;

    /// Builds a machine that is ready to be run, and its remote control.
    ///
    /// # Errors
    /// The machine cannot be built: no KVM, not enough memory, a kernel that is none.
    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>>;
}

/// A machine that has been built.
pub trait Runnable: Send + Debug {
    /// Its remote control.
    fn control(&self) -> Arc<dyn Control>;

    /// Runs the guest until it ends or is stopped.
    ///
    /// # Errors
    /// The monitor itself failed; nothing is known about the guest then.
    fn run(self: Box<Self>) -> Result<Outcome>;
}
