//! What another product wrote about a machine, read into a [`Guest`].
//!
//! ```text
//!   name --kind--> VMX, OVF, OVA, libvirt XML, xl.cfg, .vbox, Hyper-V export, disks      by content, not by extension
//!             |  one parser each: text to a tree or dictionary, without I/O
//!             v
//!        description --place--> names of disks      relative to the description's folder, under the policy
//!             |
//!             v
//!          Guest --open_disks--> devices            read-only, with their chains
//! ```
//!
//! Every description is a stranger's: its size is bounded before it is read, the names in it lead nowhere that the policy
//! does not allow, and what is not understood becomes a note, not a guess. `docs/v2v-sources.md` lists, for each product,
//! what is read and what is ignored.

mod disks;
mod hyperv;
mod kind;
mod libvirt;
mod machine;
mod manifest;
mod names;
mod open;
mod ova;
mod ovf;
mod place;
mod text;
mod units;
mod vbox;
mod vmx;
mod words;
mod xl;
mod xml;

use std::path::{Path, PathBuf};

use block::{Error, Result, ResultExt as _};
use image::Policy;

pub use disks::{is_disk_name, parse_nic};
pub use kind::Kind;
pub use manifest::{Algorithm, Entry, Manifest, Verified};
pub(crate) use names::letters;
pub use open::{OpenedDisk, open_disks};
pub use ovf::systems;

use crate::guest::{Bus, DiskImage, FirmwareKind, Guest, Nic};
use place::Place;

/// What the command line says about a machine: it overrules the description, and is all there is for plain disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceOptions {
    /// What the machine is called.
    pub name: Option<String>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Number of processors.
    pub cpus: Option<u32>,
    /// BIOS or UEFI.
    pub firmware: Option<FirmwareKind>,
    /// Network cards; if there are any, they take the place of those of the description.
    pub nics: Vec<Nic>,
    /// What all hard disks are attached to.
    pub bus: Option<Bus>,
    /// Further disks, behind those of the source: names as `vimg` opens them.
    pub disks: Vec<String>,
    /// Which machine of an OVF package with several, by its id or name.
    pub system: Option<String>,
    /// Whether somebody says which format the disks have: what is named like a description but is none is a disk then.
    pub disks_have_format: bool,
    /// What names in descriptions may lead to.
    pub policy: Policy,
}

/// Reads what `source` - a file, folder, archive or URI - says about a machine.
///
/// # Errors
/// `NotFound`; `Invalid` for a description that breaks its format's rules; `Unsupported` for one that cannot be used
/// (encrypted machines, packages in pieces), with what can be done about it; `Usage` where the user has to choose (several
/// descriptions in a folder, several machines in a package); `Denied` for names that the policy forbids.
pub fn read(source: &str, options: &SourceOptions) -> Result<Guest> {
    let found = kind::find(source)?;
    refuse_doubtful(&found, options)?;
    let mut guest = read_kind(&found, options).context(|| format!("'{source}'"))?;
    for name in &options.disks {
        disks::add(&mut guest, &further_disk(name, options)?);
    }
    overrule(&mut guest, options);
    Ok(guest)
}

/// Refuses what has the name of a description and is nothing that is known: as a raw disk it would be noise.
fn refuse_doubtful(found: &kind::Found, options: &SourceOptions) -> Result<()> {
    match &found.doubt {
        Some(doubt) if !options.disks_have_format => Err(Error::invalid(doubt.clone())
            .hint("if it was copied or downloaded, do that again; if it is a raw disk, say so: -f raw, or rename it")),
        _ => Ok(()),
    }
}

/// The name of a disk beside those of the source.
fn further_disk(name: &str, options: &SourceOptions) -> Result<String> {
    let found = kind::find(name)?;
    refuse_doubtful(&found, options)?;
    match found.kind {
        Kind::Disk => Ok(found.name),
        kind => Err(Error::usage(format!("'{name}' is a machine ({}), not a further disk", kind.name()))
            .hint("machines are converted one by one")),
    }
}

/// What a name turned out to be.
///
/// # Errors
/// As [`read`], as far as the description need not be understood for it.
pub fn detect(source: &str) -> Result<Kind> {
    Ok(kind::find(source)?.kind)
}

fn read_kind(found: &kind::Found, options: &SourceOptions) -> Result<Guest> {
    let path = Path::new(&found.name);
    let place = |confined| Place::of_file(path, &options.policy, confined);
    let mut guest = match found.kind {
        Kind::Vmx => vmx::guest(&text::read_file(path)?, &place(false)?),
        Kind::Ovf => ovf::guest(&text::read_file(path)?, &place(true)?, options.system.as_deref()),
        Kind::Ova => ova::guest(path, options),
        Kind::Libvirt => libvirt::guest(&text::read_file(path)?, &place(false)?),
        Kind::Xen => xl::guest(&text::read_file(path)?, &place(false)?),
        Kind::VirtualBox => vbox::guest(&text::read_file(path)?, &place(false)?),
        Kind::HyperV => hyperv::guest(path, &options.policy),
        Kind::Machine => machine::guest(&text::read_file(path)?, &place(false)?),
        Kind::Disk => Ok(disks::guest(&found.name)),
    }?;
    guest.notes.splice(0..0, found.notes.iter().cloned());
    if guest.name.is_empty() {
        guest.name = stem(&found.name);
    }
    Ok(guest)
}

/// The name of a file without folder and ending: what a machine is called that has no name.
fn stem(name: &str) -> String {
    let last = name.trim_end_matches('/').rsplit(['/', ':']).next().unwrap_or(name);
    let stem = Path::new(last).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if stem.is_empty() { "guest".to_owned() } else { stem.to_owned() }
}

/// The command line's word is the last one.
fn overrule(guest: &mut Guest, options: &SourceOptions) {
    if let Some(name) = &options.name {
        guest.name.clone_from(name);
    }
    guest.memory_bytes = options.memory_bytes.or(guest.memory_bytes);
    if let Some(count) = options.cpus {
        guest.cpus.count = Some(count);
        guest.cpus.topology = None;
    }
    if let Some(kind) = options.firmware {
        guest.firmware.kind = Some(kind);
        if kind == FirmwareKind::Bios {
            guest.firmware.secure_boot = false;
            guest.firmware.nvram = None;
        }
    }
    if !options.nics.is_empty() {
        guest.nics.clone_from(&options.nics);
    }
    if let Some(bus) = options.bus {
        for disk in &mut guest.disks {
            disk.bus = Some(bus);
            disk.controller = None;
            disk.guest_name = None;
        }
        names::assign(&mut guest.disks);
    }
}

/// The most disks and drives of a machine; VMware's limit is some 600.
const MOST_DRIVES: usize = 1024;

/// Refuses machines with more disks and drives than any product has: the work for each of them would add up.
fn check_drives(count: usize) -> Result<()> {
    if count > MOST_DRIVES {
        return Err(Error::invalid(format!("the machine has more than {MOST_DRIVES} disks and drives")));
    }
    Ok(())
}

/// A disk image by its name and format.
fn image(name: impl Into<String>, format: Option<&str>) -> DiskImage {
    DiskImage::Name { name: name.into(), format: format.map(str::to_owned) }
}

/// The path as text, as names of disks are.
fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Error::unsupported(format!("the path '{}' is not valid UTF-8", path.display()))
            .hint("rename the file or folder")
    })
}

/// The folder of a file, never empty.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether the bytes, as a description of this kind, can be read without looking at any file: for fuzzing, and for
/// whoever has a description without its disks.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(kind: Kind, bytes: &[u8]) -> Result<Guest> {
    let policy = Policy::default();
    let place = Place::nowhere(&policy);
    match kind {
        Kind::Vmx => vmx::guest(bytes, &place),
        Kind::Ovf => ovf::guest(bytes, &place, None),
        Kind::Libvirt => libvirt::guest(bytes, &place),
        Kind::Xen => xl::guest(bytes, &place),
        Kind::VirtualBox => vbox::guest(bytes, &place),
        Kind::HyperV => hyperv::configuration(bytes, &place),
        Kind::Machine => machine::guest(bytes, &place),
        Kind::Ova | Kind::Disk => Err(Error::usage("an archive or a disk is no description")),
    }
}
