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
mod fstab;
mod kernels;
mod loaders;
mod network;
mod obstacles;
mod release;
mod roots;
mod tools;
mod types;
mod windows;

use block::Result;
use guestdisk::Disks;
use guestdisk::boot::{self, Boot};

use crate::names::DiskNames;
use crate::view::GuestView;

pub use document::{document, to_text};
pub use drivers::DRIVERS;
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
    let mut found = Inspection { problems: disks.problems().to_vec(), ..Inspection::default() };
    let roots = roots::find(disks, &mut found.problems);
    let boot = boot::entries(disks);
    let several = roots.len() > 1;
    for root in roots {
        found.systems.push(system(disks, names, &boot, root, several, &mut found.problems));
    }
    if let Some(windows) = windows::find(disks, found.systems.is_empty()) {
        found.systems.push(windows);
    }
    // What starts by itself comes first.
    found.systems.sort_by_key(|system| !system.entries.iter().any(|entry| entry.default));
    loaders::firmware(disks, &mut found);
    obstacles::without_system(disks, &mut found);
    Ok(found)
}

/// Looks at one Linux.
fn system(
    disks: &Disks,
    names: &DiskNames,
    boot: &Boot,
    root: roots::Root,
    several: bool,
    problems: &mut Vec<String>,
) -> System {
    let mut system = System {
        root: root.volume,
        location: disks.volumes()[root.volume].location.clone(),
        subvolume: root.subvolume,
        ..System::default()
    };
    system.mounts = fstab::mounts(disks, names, &system);
    let view = GuestView::with_names(disks, &system, names);
    release::fill(&view, &mut system);
    system.entries = kernels::entries_of(disks, names, boot, &system, several);
    loaders::fill(disks, &view, &mut system);
    kernels::fill(&view, &mut system, problems);
    tools::fill(&view, &mut system);
    network::fill(&view, &mut system);
    devices::fill(disks, names, &view, &mut system);
    obstacles::fill(disks, &view, &mut system);
    system
}
