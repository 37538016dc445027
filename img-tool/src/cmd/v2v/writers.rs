//! Who changes which file system of the guest: our own writers where they can, an appliance where they cannot.

use std::path::Path;
use std::sync::Arc;

use appliance::{HostEngine, Kernel, Lazy, Options};
use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::Disks;
use guestedit::GuestFs;
use v2v::inspect::{Inspection, System, SystemKind};
use v2v::names::DiskNames;
use v2v::plan::{Action, Plan};
use v2v::view::GuestView;

use super::Args;
use super::runner::runner;
use crate::app::App;
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
    /// Only this host's kernel.
    Mount,
}

impl Backend {
    /// With `untrusted`, this program gives up what it would take to start an appliance.
    pub(super) fn parse(args: &Args, untrusted: bool) -> Outcome<Self> {
        if untrusted && args.virtio_win.is_some() {
            return Err(Error::usage("--untrusted excludes --virtio-win, which takes the appliance")
                .hint("attach the disks by SATA, without changes: --bus sata --no-changes")
                .into());
        }
        if untrusted && (args.bootcheck || matches!(args.backend.as_str(), "appliance" | "mount")) {
            let error =
                Error::usage("--untrusted excludes --bootcheck, --backend appliance and --backend mount");
            return Err(error
                .hint("boot the result afterwards: vimg bootcheck --untrusted --firmware auto DISK")
                .into());
        }
        match args.backend.as_str() {
            "auto" if untrusted => Ok(Self::Native),
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "appliance" => Ok(Self::Appliance),
            "mount" => Ok(Self::Mount),
            other => Err(Failure::usage(format!(
                "--backend expects 'auto', 'native', 'appliance' or 'mount' not '{other}'"
            ))),
        }
    }
}

/// Opens volumes for changes.
pub(super) struct Writers<'a> {
    disks: &'a Disks,
    /// Volumes that are left to the appliance.
    left: Vec<usize>,
    appliance: Option<Lazy<'a>>,
    backend: Backend,
}

/// What is known of a guest.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    pub(super) disks: &'a Disks,
    pub(super) inspection: &'a Inspection,
    pub(super) names: &'a DiskNames,
    pub(super) plan: &'a Plan,
}

impl<'a> Writers<'a> {
    /// Decides who changes which volume.
    ///
    /// # Errors
    /// A volume is left to the appliance, and nothing can run it.
    pub(super) fn new(known: Known<'a>, backend: Backend, args: &'a Args, app: &'a App) -> Result<Self> {
        let mut volumes: Vec<usize> = known.plan.changes.iter().map(|change| change.volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        let mut left = vec![];
        for index in volumes {
            if is_for_appliance(known, backend, index)? {
                left.push(index);
            }
        }
        let appliance =
            if left.is_empty() { None } else { Some(appliance(known, &left, backend, args, app)?) };
        Ok(Self { disks: known.disks, left, appliance, backend })
    }

    /// Opens a volume.
    ///
    /// # Errors
    /// It cannot be changed.
    pub(super) fn open(&mut self, index: usize) -> Result<Box<dyn GuestFs>> {
        let volume = volume(self.disks, index)?;
        match &mut self.appliance {
            Some(appliance) if self.left.contains(&index) => {
                appliance.open(index).context(|| volume.location.to_string())
            }
            _ => guestedit::open_volume(volume, &guestedit::Options::default())
                .map_err(|error| self.way_out(error)),
        }
    }

    /// What cannot be changed by our own writers can be changed otherwise.
    fn way_out(&self, error: Error) -> Error {
        match (error.kind(), self.backend) {
            (ErrorKind::Unsupported, Backend::Native) => error.hint(
                "a small Linux in a test machine can change it: --backend appliance, or auto, which takes it where it has to \
                 (neither with --untrusted)",
            ),
            _ => error,
        }
    }

    /// Everything is on the devices when this returns.
    ///
    /// # Errors
    /// The appliance or a device failed.
    pub(super) fn finish(self) -> Result<()> {
        self.appliance.map_or(Ok(()), Lazy::finish)
    }
}

fn volume(disks: &Disks, index: usize) -> Result<&guestdisk::Volume> {
    let missing = || Error::new(ErrorKind::NotFound, format!("no volume {index}"));
    disks.volumes().get(index).ok_or_else(missing)
}

/// Whether a volume is left to the appliance: because that is wanted, or because our own writers cannot do what the
/// plan has for it.
fn is_for_appliance(known: Known<'_>, backend: Backend, index: usize) -> Result<bool> {
    match backend {
        Backend::Native => return Ok(false),
        Backend::Appliance | Backend::Mount => return Ok(true),
        Backend::Auto => {}
    }
    let opened = guestedit::open_volume(volume(known.disks, index)?, &guestedit::Options::default());
    let mut own = match opened {
        Ok(own) => own,
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(true),
        Err(error) => return Err(error),
    };
    if own.backend() != "in-place" {
        return Ok(false);
    }
    // In place, files keep the space that they have.
    for change in known.plan.changes.iter().filter(|change| change.volume == index) {
        let fits = match &change.action {
            Action::Replace { bytes } => {
                own.stat(&change.path)?.is_some_and(|stat| bytes.len() as u64 <= stat.size)
            }
            _ => false,
        };
        if !fits {
            return Ok(true);
        }
    }
    Ok(false)
}

fn appliance<'a>(
    known: Known<'a>,
    left: &[usize],
    backend: Backend,
    args: &'a Args,
    app: &App,
) -> Result<Lazy<'a>> {
    if backend == Backend::Mount {
        app.warn("this host's kernel mounts the guest's file systems: only for guests that are trusted");
        let lazy = Lazy::new(known.disks, left, Arc::new(HostEngine), Options::default());
        return Ok(lazy.or_kernel(|_| Ok(Kernel::of_host())));
    }
    let kinds = left.iter().filter_map(|index| known.disks.volumes().get(*index)?.content.as_ref());
    let names: Vec<_> = kinds.filter_map(|content| appliance::linux_name(content.kind).ok()).collect();
    let runner = runner(args, &names, app).map_err(|failure| match failure {
        Failure::Error { error, .. } => {
            error.context("this guest's file systems are changed by an appliance, which has to be run")
        }
        _ => Error::unsupported("no engine"),
    })?;
    app.tell(&format!("appliance: run by {}", runner.engine.name()));
    let usual = Options::default();
    let memory_bytes = runner.memory_bytes.unwrap_or(usual.memory_bytes);
    let options = Options { append: runner.append.to_owned(), memory_bytes, ..usual };
    let lazy = Lazy::new(known.disks, left, runner.engine, options);
    if let Some(modules) = runner.uml {
        return Ok(lazy.or_kernel(move |names| Kernel::from_uml(&modules, names)));
    }
    if let (Some(kernel), Some(modules)) = (&args.appliance_kernel, &args.appliance_modules) {
        return Ok(lazy.or_kernel(|names| Kernel::from_host(kernel, modules, names)));
    }
    Ok(lazy.or_kernel(move |names| guest_kernel(known, names)).or_kernel(own_kernel))
}

/// The kernel of this machine.
fn own_kernel(file_systems: &[&str]) -> Result<Kernel> {
    let name = nix::sys::utsname::uname().map_err(Error::from)?;
    let (kernel, modules) = appliance::usual_places(&name.release().to_string_lossy());
    let (kernel, modules): (&Path, &Path) = (&kernel, &modules);
    Kernel::from_host(kernel, modules, file_systems)
}

/// The guest's own kernel: the one that it starts, if that can be read.
fn guest_kernel(known: Known<'_>, file_systems: &[&str]) -> Result<Kernel> {
    let missing = || Error::new(ErrorKind::NotFound, "the guest has no Linux kernel whose modules are there");
    let linux = known.inspection.systems.iter().find(|system| system.kind == SystemKind::Linux);
    let system: &System = linux.ok_or_else(missing)?;
    let view = GuestView::with_names(known.disks, system, known.names);
    let usable = |kernel: &&v2v::inspect::Kernel| {
        kernel.modules.is_some() && kernel.image.as_ref().is_some_and(|image| image.section.is_none())
    };
    let mut kernels = system.kernels.iter().filter(usable);
    let kernel = kernels.clone().find(|kernel| kernel.default).or_else(|| kernels.next_back());
    let kernel = kernel.ok_or_else(missing)?;
    let (Some(image), Some(modules)) = (&kernel.image, &kernel.modules) else { return Err(missing()) };
    let (image, modules) = (view.place_of(image)?, view.locate(modules)?);
    let (boot, root) = (view.file_system(&image)?, view.file_system(&modules)?);
    Kernel::from_guest(boot, &image.path, root, &modules.path, file_systems)
}
