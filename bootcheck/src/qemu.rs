//! The engine that runs an installed qemu-system-x86_64: the same check where there is no KVM for our own machine.
//!
//! ```text
//!   this process                                          qemu
//!     overlay -> Counted -> NBD server  <-- Unix socket --  blockdev nbd
//!     observer  <-- its standard output ------------------  serial port
//!     Control   --- its standard input  ----------------->  serial port
//!     qmp       <-- Unix socket: events, registers  ----->  monitor
//!     observer  <-- Unix socket --------------------------  the firmware's log (port 0x402)
//!     observer  <-- a file, through qmp ------------------  the screen of a BIOS guest, while it is text
//! ```
//!
//! All sockets and files lie in a private folder that is removed in the end. The NBD server is the caller's
//! ([`ServeDisks`]): this crate knows no protocol for disks. qemu gets no network, no window, and a sandbox that
//! keeps it from starting programs.

mod args;
mod qmp;
mod registers;
mod run;
mod screen;

use std::ffi::OsString;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;

use block::{BlockDevice, Result, ResultExt as _};

use crate::counted::Counted;
use crate::engine::{Boot, Disk, Engine, MachineSpec, Observer, ReadWatch, Runnable};
use crate::folder::Folder;
use run::{Machine, Parts};
use screen::Screen;

/// How qemu runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor, through KVM.
    Kvm,
    /// By translating them.
    Tcg,
}

/// Serves disks to qemu.
pub trait ServeDisks: Send + Sync + Debug {
    /// Serves `disks` by NBD on a Unix socket at `socket`, under the names `disk0`, `disk1`, .. until what is returned
    /// is dropped.
    ///
    /// # Errors
    /// The socket cannot be made.
    fn serve(&self, disks: Vec<(Arc<dyn BlockDevice>, bool)>, socket: &Path) -> Result<Box<dyn Send>>;
}

/// An installed qemu.
#[derive(Debug, Clone)]
pub struct QemuEngine {
    /// The program.
    pub program: PathBuf,
    /// Words in front of it (`setpriv --pdeathsig KILL`, so that it does not outlive us).
    pub wrapper: Vec<OsString>,
    /// How it runs guests.
    pub accelerator: Accelerator,
    /// Where the private folder is made.
    pub directory: PathBuf,
    /// Who serves the disks.
    pub server: Arc<dyn ServeDisks>,
}

impl Engine for QemuEngine {
    fn name(&self) -> &'static str {
        match self.accelerator {
            Accelerator::Kvm => "qemu-kvm",
            Accelerator::Tcg => "qemu-tcg",
        }
    }

    fn build(&self, spec: MachineSpec, observer: Arc<dyn Observer>) -> Result<Box<dyn Runnable>> {
        let folder = Folder::new(&self.directory, "qemu")?;
        write_boot(&spec.boot, &folder)?;
        let disks: Vec<_> =
            spec.disks.iter().enumerate().map(|disk| Arc::new(counted(disk, &observer))).collect();
        let served = disks.iter().zip(&spec.disks);
        let served = served.map(|(counted, disk)| (Arc::clone(counted) as _, disk.read_only)).collect();
        let server = self.server.serve(served, &folder.file(args::NBD))?;
        let (sender, events) = mpsc::channel();
        let args = args::args(&spec, self.accelerator, folder.path());
        let screen = args::has_screen(&spec.boot).then(|| Screen::new(folder.file(args::SCREEN)));
        let has_firmware = matches!(spec.boot, Boot::Firmware { .. });
        Ok(Box::new(Machine::new(Parts {
            engine: self.clone(),
            args,
            folder,
            server,
            disks,
            observer,
            sender,
            events,
            screen,
            has_firmware,
        })))
    }
}

/// A disk with its place, counted and watched. qemu has a look at it before the guest does, which is not told.
fn counted((index, disk): (usize, &Disk), observer: &Arc<dyn Observer>) -> Counted {
    let reads = ReadWatch::new(Arc::clone(observer), index);
    Counted::new(Arc::clone(&disk.device)).watched_by(reads).from_reset()
}

/// Writes what is booted into files that qemu can read.
fn write_boot(boot: &Boot, folder: &Folder) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.file(name);
        std::fs::write(&path, bytes).context(|| format!("could not write '{}'", path.display()))
    };
    match boot {
        Boot::Linux { kernel, initrd, .. } => {
            write(args::KERNEL, kernel)?;
            initrd.as_ref().map_or(Ok(()), |initrd| write(args::INITRD, initrd))
        }
        Boot::Firmware { code, vars } => {
            write(args::CODE, code)?;
            vars.as_ref().map_or(Ok(()), |vars| write(args::VARS, vars))
        }
    }
}
