//! Who changes which file system of the guest: our own writers where they can, an appliance where they cannot.

use std::sync::Arc;

use appliance::{Appliance, Kernel, Mount, Options};
use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Disks;
use guestdisk::detect::Kind;
use guestedit::GuestFs;
use v2v::inspect::{Inspection, System, SystemKind};
use v2v::names::DiskNames;
use v2v::plan::{Action, Plan};
use v2v::view::GuestView;

use super::Args;
use crate::app::App;
use crate::cmd::bootcheck::choose::{Chosen, choose};
use crate::exit::{Failure, Outcome};

/// `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// Our own writers, and the appliance where they cannot.
    Auto,
    /// Only our own.
    Native,
    /// Only the appliance.
    Appliance,
}

impl Backend {
    pub(super) fn parse(args: &Args) -> Outcome<Self> {
        match args.backend.as_str() {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "appliance" => Ok(Self::Appliance),
            other => Err(Failure::usage(format!(
                "--backend expects 'auto', 'native' or 'appliance' not '{other}'"
            ))),
        }
    }
}

/// Opens volumes for changes.
pub(super) struct Writers<'a> {
    disks: &'a Disks,
    plan: &'a Plan,
    backend: Backend,
    /// What is known of the guest, for its kernel.
    inspection: &'a Inspection,
    names: &'a DiskNames,
    engine: &'a str,
    app: &'a App,
    /// The volumes that it has, in the order of its disks.
    appliance: Option<(Appliance, Vec<usize>)>,
}

impl<'a> Writers<'a> {
    pub(super) fn new(
        disks: &'a Disks,
        plan: &'a Plan,
        (inspection, names): (&'a Inspection, &'a DiskNames),
        backend: Backend,
        engine: &'a str,
        app: &'a App,
    ) -> Self {
        Self { disks, plan, backend, inspection, names, engine, app, appliance: None }
    }

    /// Opens a volume.
    ///
    /// # Errors
    /// It cannot be changed by what may be used.
    pub(super) fn open(&mut self, index: usize) -> Result<Box<dyn GuestFs>> {
        let volume = self.volume(index)?;
        if self.is_for_appliance(index)? {
            let kind = volume.content.as_ref().map(|content| content.kind);
            let kind = kind.ok_or_else(|| Error::unsupported("no file system that is known here"))?;
            return self.mounted(index, kind).context(|| volume.location.to_string());
        }
        guestedit::open_volume(volume, &guestedit::Options::default())
    }

    /// Everything is on the devices when this returns.
    ///
    /// # Errors
    /// The appliance or a device failed.
    pub(super) fn finish(self) -> Result<()> {
        self.appliance.map_or(Ok(()), |(appliance, _)| appliance.shutdown())
    }

    fn volume(&self, index: usize) -> Result<&'a guestdisk::Volume> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no volume {index}"));
        self.disks.volumes().get(index).ok_or_else(missing)
    }

    /// Whether a volume is left to the appliance: because that is wanted, or because our own writers cannot do what the
    /// plan has for it.
    fn is_for_appliance(&self, index: usize) -> Result<bool> {
        match self.backend {
            Backend::Native => return Ok(false),
            Backend::Appliance => return Ok(true),
            Backend::Auto => {}
        }
        let volume = self.volume(index)?;
        let own = match guestedit::open_volume(volume, &guestedit::Options::default()) {
            Ok(own) => own,
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(true),
            Err(error) => return Err(error),
        };
        // In place, files keep the space that they have.
        let mut changes = self.plan.changes.iter().filter(|change| change.volume == index);
        Ok(own.backend() == "in-place"
            && changes.any(|change| !matches!(change.action, Action::Replace { .. })))
    }

    fn mounted(&mut self, index: usize, kind: Kind) -> Result<Box<dyn GuestFs>> {
        if self.appliance.is_none() {
            self.appliance = Some(self.start()?);
        }
        let Some((appliance, volumes)) = &self.appliance else {
            return Err(Error::unsupported("no appliance"));
        };
        let disk = volumes.iter().position(|volume| *volume == index);
        let disk = disk.ok_or_else(|| Error::unsupported("the appliance does not have this volume"))?;
        Ok(Box::new(appliance.mount(&Mount::whole(disk, kind))?))
    }

    /// Starts the appliance with all volumes that are going to be changed by it.
    fn start(&self) -> Result<(Appliance, Vec<usize>)> {
        let mut volumes: Vec<usize> = self.plan.changes.iter().map(|change| change.volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        let mut chosen = vec![];
        for index in volumes {
            if self.is_for_appliance(index)? {
                chosen.push(index);
            }
        }
        let devices =
            chosen.iter().map(|index| Ok(Arc::clone(&self.volume(*index)?.device))).collect::<Result<_>>()?;
        let kinds: Vec<Kind> = chosen
            .iter()
            .filter_map(|index| Some(self.volume(*index).ok()?.content.as_ref()?.kind))
            .collect();
        let names: Vec<&str> = kinds.iter().map(|kind| module(*kind)).collect();
        let kernel = self.kernel(&names)?;
        let engine = self.engine()?;
        self.app.tell(&format!("appliance: {} under {}", kernel.name, engine.engine.name()));
        let options = Options { append: engine.append.to_owned(), ..Options::default() };
        let appliance = Appliance::start(devices, &kernel, &*engine.engine, options)?;
        Ok((appliance, chosen))
    }

    fn engine(&self) -> Result<Chosen> {
        choose(self.engine, self.app).map_err(|failure| match failure {
            Failure::Error { error, .. } => {
                error.context("this guest's file systems are changed by an appliance, which has to be run")
            }
            _ => Error::unsupported("no engine"),
        })
    }

    /// The guest's own kernel, or else this machine's.
    fn kernel(&self, file_systems: &[&str]) -> Result<Kernel> {
        let linux = self.inspection.systems.iter().find(|system| system.kind == SystemKind::Linux);
        let error = match linux.map(|system| self.guest_kernel(system, file_systems)) {
            Some(Ok(kernel)) => return Ok(kernel),
            Some(Err(error)) => error,
            None => Error::new(ErrorKind::NotFound, "the guest has no Linux kernel"),
        };
        let release = nix::sys::utsname::uname().map_err(Error::from)?;
        let (kernel, modules) = appliance::usual_places(&release.release().to_string_lossy());
        Kernel::from_host(&kernel, &modules, file_systems).map_err(|own| {
            error
                .context("no kernel for the appliance")
                .hint(format!("this machine's kernel cannot be used either: {own}"))
        })
    }

    fn guest_kernel(&self, system: &System, file_systems: &[&str]) -> Result<Kernel> {
        let missing = || Error::new(ErrorKind::NotFound, "the guest has no kernel whose modules are there");
        let view = GuestView::with_names(self.disks, system, self.names);
        let usable = |kernel: &&v2v::inspect::Kernel| {
            kernel.modules.is_some() && kernel.image.as_ref().is_some_and(|image| image.section.is_none())
        };
        let kernels = || system.kernels.iter().filter(usable);
        let kernel =
            kernels().find(|kernel| kernel.default).or_else(|| kernels().next_back()).ok_or_else(missing)?;
        let (Some(image), Some(modules)) = (&kernel.image, &kernel.modules) else { return Err(missing()) };
        let (image, modules) = (view.place_of(image)?, view.locate(modules)?);
        let (boot, root) = (view.file_system(&image)?, view.file_system(&modules)?);
        Kernel::from_guest(boot, &image.path, root, &modules.path, file_systems)
    }
}

/// The module of a file system.
fn module(kind: Kind) -> &'static str {
    match kind {
        Kind::Xfs => "xfs",
        Kind::Btrfs => "btrfs",
        Kind::Vfat => "vfat",
        Kind::Ntfs => "ntfs3",
        _ => "ext4",
    }
}
