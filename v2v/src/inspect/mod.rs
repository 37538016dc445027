//! What is on the disks of a guest, read-only: systems, kernels and their drivers, boot loaders, names in use.
//!
//! ```text
//!   Disks --roots--> System --fstab--> GuestView       the tree with its mounts
//!                       |
//!        release        what it is           kernels, drivers   what it starts, and what that brings
//!        loaders        who starts it        devices            names that will not exist
//!        network        names of interfaces  tools, obstacles   what is in the way
//! ```
//!
//! It goes by files, not by names of distributions: one that nobody has heard of is inspected as far as its files are of a
//! known form. Disks are taken as hostile: files have a limit of size, lists one of length, and whatever is damaged is told
//! by [`Inspection::problems`] rather than ending everything.

mod devices;
mod document;
mod drivers;
mod elf;
pub(crate) mod fstab;
mod initrds;
mod kernels;
mod loaders;
mod missing;
mod network;
mod obstacles;
mod release;
mod roots;
mod tools;
mod types;
mod windows;

use std::sync::Arc;

use block::Result;
use guestdisk::Disks;
use guestdisk::boot;

use crate::initramfs::Seen;
use crate::names::DiskNames;
use crate::view::GuestView;

pub use document::{document, to_text};
pub use drivers::DRIVERS;
pub(crate) use missing::{is_missed, is_waited_for, stops};
pub use windows::Windows;
pub(crate) use windows::open_hive;

pub use types::{
    DeviceName, Driver, DriverPlace, Init, Initramfs, InitramfsFile, Inspection, Interface, Kernel,
    LoaderConfig, Mount, Obstacle, System, SystemKind, Tools,
};

/// Parsers of text that comes from the disks, for tests with arbitrary bytes.
#[doc(hidden)]
pub mod parsers {
    pub use super::devices::names_in_text;
    pub use super::fstab::parse as fstab;
    pub use super::network::parse as network;
    pub use super::release::parse_os_release as os_release;
}

/// Looks at the disks of a guest.
///
/// # Errors
/// A device failed. Damage is no error.
pub fn inspect(disks: &Disks) -> Result<Inspection> {
    inspect_with(disks, &DiskNames::default())
}

/// The same, where the source says what the guest calls its disks.
///
/// # Errors
/// As [`inspect`].
pub fn inspect_with(disks: &Disks, names: &DiskNames) -> Result<Inspection> {
    look(disks, names, &[])
}

/// The same, of a guest that was inspected before: parts of an initramfs that are still what they were, by their digest, are
/// not unpacked again.
///
/// # Errors
/// As [`inspect`].
pub fn inspect_again(disks: &Disks, names: &DiskNames, before: &Inspection) -> Result<Inspection> {
    let kernels = before.systems.iter().flat_map(|system| &system.kernels);
    let known = kernels.filter_map(|kernel| kernel.initramfs.as_ref()).flat_map(|found| &found.seen);
    look(disks, names, &known.cloned().collect::<Vec<_>>())
}

fn look(disks: &Disks, names: &DiskNames, known: &[Arc<Seen>]) -> Result<Inspection> {
    let mut found = Inspection { problems: disks.problems().to_vec(), ..Inspection::default() };
    found.systems = roots(disks, names, &mut found.problems);
    let several = found.systems.len() > 1;
    for system in &mut found.systems {
        let starts = !several || system.entries.iter().any(|entry| entry.default);
        fill(disks, names, system, known, &mut found.problems, starts);
    }
    if let Some(windows) = windows::find(disks, found.systems.is_empty()) {
        found.systems.push(windows);
    }
    loaders::firmware(disks, &mut found);
    obstacles::without_system(disks, &mut found);
    Ok(found)
}

/// The systems of a guest with nothing but what makes their trees: where their roots are, what they mount, and what starts
/// them. The one that starts by itself comes first.
pub fn trees(disks: &Disks, names: &DiskNames) -> Vec<System> {
    roots(disks, names, &mut vec![])
}

fn roots(disks: &Disks, names: &DiskNames, problems: &mut Vec<String>) -> Vec<System> {
    let found = roots::find(disks, problems);
    let (boot, several) = (boot::entries(disks), found.len() > 1);
    let system = |root: roots::Root| {
        let mut system = System {
            root: root.volume,
            location: disks.volumes()[root.volume].location.clone(),
            subvolume: root.subvolume,
            ..System::default()
        };
        let names = &with_arrays(disks, names, &system);
        system.mounts = fstab::mounts(disks, names, &system);
        system.entries = kernels::entries_of(disks, names, &boot, &system, several);
        system
    };
    let mut systems: Vec<_> = found.into_iter().map(system).collect();
    systems.sort_by_key(|system| !system.entries.iter().any(|entry| entry.default));
    systems
}

/// The names of disks, and those of arrays in the system's own configuration.
fn with_arrays(disks: &Disks, names: &DiskNames, system: &System) -> DiskNames {
    if disks.arrays().is_empty() {
        return names.clone();
    }
    let root = System { root: system.root, subvolume: system.subvolume.clone(), ..System::default() };
    let view = GuestView::with_names(disks, &root, names);
    let conf = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"].into_iter().find_map(|path| view.text(path));
    conf.map_or_else(|| names.clone(), |conf| names.with_arrays(disks, &conf))
}

/// Looks at one Linux.
fn fill(
    disks: &Disks,
    names: &DiskNames,
    system: &mut System,
    known: &[Arc<Seen>],
    problems: &mut Vec<String>,
    starts: bool,
) {
    let names = &with_arrays(disks, names, system);
    let view = GuestView::with_names(disks, system, names);
    release::fill(&view, system);
    loaders::fill(disks, &view, system);
    kernels::fill(&view, system, known, problems);
    tools::fill(&view, system);
    network::fill(&view, system);
    devices::fill(disks, names, &view, system);
    obstacles::fill(disks, names, &view, system, starts);
}
