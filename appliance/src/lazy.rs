//! An appliance that is started only if one of a guest's file systems needs it.

use std::fmt;
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use bootcheck::engine::Engine;
use guestdisk::Disks;
use guestdisk::detect::Kind;
use guestedit::GuestFs;

use crate::kernel::Kernel;
use crate::session::{Appliance, Mount, Options};

/// The most disks of an appliance: as many as there are letters, without the mailbox.
const MOST_DISKS: usize = 20;

/// Reads a kernel that is to mount these file systems.
type Read<'a> = Box<dyn FnMut(&[&str]) -> Result<Kernel> + 'a>;

/// The volumes of a guest that an appliance can mount, and the appliance once it runs.
pub struct Lazy<'a> {
    /// Index in [`Disks::volumes`], the volume's bytes, what it holds.
    volumes: Vec<(usize, Arc<dyn BlockDevice>, Kind)>,
    kernels: Vec<Read<'a>>,
    engine: Arc<dyn Engine>,
    options: Options,
    running: Option<Appliance>,
}

impl fmt::Debug for Lazy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy")
            .field("volumes", &self.volumes)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl<'a> Lazy<'a> {
    /// For those of a guest's volumes whose indices are `wanted`. Nothing is started.
    pub fn new(disks: &Disks, wanted: &[usize], engine: Arc<dyn Engine>, options: Options) -> Self {
        let volume = |index: &usize| {
            let volume = disks.volumes().get(*index)?;
            Some((*index, Arc::clone(&volume.device), volume.content.as_ref()?.kind))
        };
        let volumes = wanted.iter().filter_map(volume).collect();
        Self { volumes, kernels: vec![], engine, options, running: None }
    }

    /// A kernel to be tried, after those that were added before: the first that can be read and knows the file systems
    /// is run. `read` is called with their names ([`Kernel::from_guest`], [`Kernel::from_host`]).
    #[must_use]
    pub fn or_kernel(mut self, read: impl FnMut(&[&str]) -> Result<Kernel> + 'a) -> Self {
        self.kernels.push(Box::new(read));
        self
    }

    /// Mounts a volume, by its index in [`Disks::volumes`]; starts the appliance if it does not run yet. Dropping what is
    /// returned unmounts it.
    ///
    /// # Errors
    /// `NotFound` if it is none of the volumes; as [`Appliance::start`] and [`Appliance::mount`]; no kernel knows its
    /// file system.
    pub fn open(&mut self, volume: usize) -> Result<Box<dyn GuestFs>> {
        let place = self.volumes.iter().position(|(index, ..)| *index == volume).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("no file system on volume {volume} for the appliance"))
        })?;
        let appliance = match self.running.take() {
            Some(running) => running,
            None => self.start(place)?,
        };
        let mounted = appliance.mount(&Mount::whole(place, self.volumes[place].2));
        self.running = Some(appliance);
        Ok(Box::new(mounted?))
    }

    fn start(&mut self, first: usize) -> Result<Appliance> {
        if self.volumes.len() > MOST_DISKS {
            return Err(Error::unsupported(format!("an appliance with more than {MOST_DISKS} disks")));
        }
        let mut names: Vec<_> = self.volumes.iter().filter_map(|(.., kind)| linux_name(*kind).ok()).collect();
        names.sort_unstable();
        names.dedup();
        let kernel = self.kernel(&names, linux_name(self.volumes[first].2)?)?;
        let devices = self.volumes.iter().map(|(_, device, _)| Arc::clone(device)).collect();
        Appliance::start(devices, &kernel, &*self.engine, self.options.clone())
            .context(|| format!("with {}", kernel.name))
    }

    /// The first kernel that knows the file system `needed`.
    fn kernel(&mut self, names: &[&str], needed: &str) -> Result<Kernel> {
        let mut why = vec![];
        for read in &mut self.kernels {
            match read(names) {
                Ok(kernel) if kernel.missing.iter().all(|missing| missing != needed) => return Ok(kernel),
                Ok(kernel) => why.push(format!("{} does not know {needed}", kernel.name)),
                Err(error) => why.push(error.to_string()),
            }
        }
        let why = if why.is_empty() { "there is none".to_owned() } else { why.join("; ") };
        Err(Error::unsupported(format!("no kernel for an appliance: {why}"))
            .hint("name one that knows this file system, and the folder of its modules"))
    }

    /// Whether an appliance was needed.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Switches the appliance off, if it runs. All changes are on the devices then.
    ///
    /// # Errors
    /// As [`Appliance::shutdown`].
    pub fn finish(self) -> Result<()> {
        self.running.map_or(Ok(()), Appliance::shutdown)
    }
}

/// The name that Linux has for a file system.
///
/// # Errors
/// `Unsupported` if it is none that can be mounted.
pub fn linux_name(kind: Kind) -> Result<&'static str> {
    match kind {
        Kind::Ntfs => Ok("ntfs3"),
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => Ok("ext4"),
        Kind::Vfat | Kind::Xfs | Kind::Btrfs | Kind::Exfat | Kind::F2fs => Ok(kind.name()),
        Kind::Iso9660 | Kind::Squashfs | Kind::HfsPlus => Ok(kind.name()),
        other => Err(Error::unsupported(format!("{other} is nothing that an appliance can mount"))),
    }
}
