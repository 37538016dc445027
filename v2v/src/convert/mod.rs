//! What has to be changed in a guest so that it boots on KVM.
//!
//! Driven by what is there (kernels, modules, initramfs images, files of boot loaders), never by the name of a
//! distribution. `docs/v2v-changes.md` lists every change with its reason and what undoes it.
//!
//! ```text
//!   tree       the guest's files, mounts resolved          draft     changes that build on each other
//!   names      what /dev/sda1 means, what it becomes       text      lines, columns, names of devices within text
//!   cmdline    kernel command lines                        loaders   grub.cfg, menu.lst, BLS, grubenv, extlinux
//!   tables     fstab, crypttab, resume, LVM                nics      names of network interfaces
//!   lvm        filters of LVM                          units    of systemd, and what else names devices
//!   services   consoles, guest tools, Xorg, modprobe       uefi      the fallback loader
//!   in_place   what of a plan fits where files can only be overwritten
//!   verify     whether the boot loader still offers what it did
//!   initrd     drivers in early boot: modules, index, cpio, segment    regeneration   the guest's own configuration
//! ```

mod cmdline;
mod draft;
mod guest_tree;
pub mod in_place;
mod index;
mod initrd;
#[cfg(test)]
mod initrd_tests;
mod loaders;
mod lvm;
mod modules;
mod names;
mod nics;
#[cfg(test)]
mod properties;
mod regeneration;
mod segment;
mod services;
mod tables;
mod text;
pub mod tree;
mod uefi;
mod units;
mod verify;
mod windows;

use block::Result;
use guestdisk::Disks;

use crate::guest::{FirmwareKind, Guest, Origin};
use crate::inspect::{Inspection, System, SystemKind};
use crate::names::DiskNames;
use crate::plan::{Plan, PlanOptions};
use crate::view::GuestView;
use cmdline::Cmdlines;
pub(crate) use draft::digest;
use draft::{Draft, Why};
use names::Names;
use tree::Tree;
pub use verify::verify;

/// Changes for one Linux.
pub(crate) fn linux(
    tree: &dyn Tree,
    guest: &Guest,
    system: &System,
    names: &Names,
    options: &PlanOptions,
) -> Result<Plan> {
    let mut draft = Draft::new(tree);
    let from_elsewhere = guest.origin != Origin::Kvm;
    let lines = Cmdlines { names, from_xen: from_elsewhere, add_serial: options.serial_console };
    tables::convert(&mut draft, names, system);
    units::convert(&mut draft, names);
    loaders::convert(&mut draft, system, &lines);
    services::lvm_devices(&mut draft);
    services::modprobe(&mut draft, options.bus.modules().get(1).copied().unwrap_or("virtio_blk"));
    let links = match options.no_nic_names {
        true => vec![],
        false => nics::convert(&mut draft, &system.interfaces, &guest.nics),
    };
    let missing = initrd::convert(&mut draft, system, options.bus, &lines, &links)?;
    regeneration::convert(&mut draft, &missing.drivers);
    if from_elsewhere {
        services::xen_console(&mut draft, system);
    }
    if options.serial_console {
        services::serial_login(&mut draft, system);
    }
    services::xorg(&mut draft);
    if !options.keep_tools {
        services::tools(&mut draft, system);
    }
    uefi::convert(&mut draft, system, guest.firmware.kind == Some(FirmwareKind::Uefi));
    if options.autorelabel && system.selinux {
        let why = Why::new(
            "selinux",
            "all files get their labels at the first boot",
            "remove /.autorelabel before it",
        );
        draft.write("/.autorelabel", vec![], 0o644, why);
    }
    draft.finish()
}

/// Whether a kernel that looks for its root itself is older than `PARTUUID=` for all partition tables.
fn has_old_kernel(system: &System) -> bool {
    const KNOWS_PARTUUID: (u32, u32) = (3, 8);
    let alone = system.kernels.iter().filter(|kernel| kernel.initrds.is_empty());
    alone.filter_map(|kernel| segment::version(&kernel.release)).any(|version| version < KNOWS_PARTUUID)
}

/// The command line with which a hypervisor starts the kernel of a guest without a boot loader of its own
/// ([`Guest::direct_boot`](crate::guest::Guest::direct_boot)), for KVM. `None` if the guest has a boot loader.
pub fn direct_boot(disks: &Disks, guest: &Guest, options: &PlanOptions) -> Option<String> {
    let direct = guest.direct_boot.as_ref()?;
    let names = Names::new(disks, guest, options.bus);
    let from_xen = guest.origin != Origin::Kvm;
    let lines = Cmdlines { names: &names, from_xen, add_serial: options.serial_console };
    let reader = if direct.initrd.is_some() { names::Reader::Tags } else { names::Reader::Kernel };
    Some(lines.edit(&direct.cmdline, reader, &mut vec![]))
}

/// The changes of all systems of a guest.
pub(crate) fn plan(
    disks: &Disks,
    guest: &Guest,
    inspection: &Inspection,
    options: &PlanOptions,
) -> Result<Plan> {
    let names = Names::new(disks, guest, options.bus);
    let source = DiskNames::of(guest);
    let mut whole = Plan::default();
    for system in &inspection.systems {
        let one = match system.kind {
            SystemKind::Linux => {
                let view = GuestView::with_names(disks, system, &source);
                let names = names.clone();
                let names = if has_old_kernel(system) { names.without_partuuid() } else { names };
                linux(&view, guest, system, &names, options)?
            }
            SystemKind::Windows => {
                windows::convert(&GuestView::with_names(disks, system, &source), system, options)?
            }
            SystemKind::Other => windows::other(system),
        };
        let starts = inspection.systems.len() == 1 || system.entries.iter().any(|entry| entry.default);
        whole.add(if starts { one } else { one.of_another() });
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::Init;

    /// A Linux with systemd and nothing else.
    pub(crate) fn system() -> System {
        System {
            distribution: "debian".to_owned(),
            product: "Debian GNU/Linux 12 (bookworm)".to_owned(),
            init: Init::Systemd,
            ..System::default()
        }
    }
}
