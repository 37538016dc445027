//! OVF: the description in a package of one or more machines (DMTF DSP0243).
//!
//! ```text
//!   Envelope
//!     References/File            files of the package                 package
//!     DiskSection/Disk           disks, with or without a file        package
//!     VirtualSystem(Collection)  machines                             this file
//!       VirtualHardwareSection
//!         Item ..                one device each                      items
//!       ProductSection           properties, for ${..}                package
//! ```
//!
//! Read by local names, so that version 1, version 2 (`StorageItem`, `EthernetPortItem`) and the drafts of vSphere 4
//! (`Section` with `xsi:type`) are one.

mod items;
mod package;

use block::{Error, Result};
use roxmltree::Node;

use self::package::Package;
pub(super) use self::package::{inflated_name, spelled};
use super::place::Place;
use super::xml::{self, NodeExt as _};
use super::{text, vbox, words};
use crate::guest::{FirmwareKind, Guest, Origin};

/// The most machines of a package.
const MOST_SYSTEMS: usize = 1000;

/// Where the files of a package are.
pub(super) trait Files {
    /// The file of that name, as a name that `vimg` opens.
    ///
    /// # Errors
    /// It is not there, or must not be used.
    fn find(&self, href: &str, compressed: bool, notes: &mut Vec<String>) -> Result<String>;

    /// A file of the package as a file of the host, if it is one.
    fn side_file(&self, href: &str, what: &str, notes: &mut Vec<String>) -> Option<String>;

    /// The name of the description without its ending.
    fn stem(&self) -> &str;
}

impl Files for Place<'_> {
    fn find(&self, href: &str, compressed: bool, notes: &mut Vec<String>) -> Result<String> {
        let name = spelled(href, |name| self.folder().join(name).exists());
        let name = name.unwrap_or_else(|| href.to_owned());
        let path = self.file(&name, notes)?;
        if !self.is_real() || !compressed {
            return Ok(path);
        }
        // A gzipped file is read as an archive of one member.
        Ok(format!("{path}:{}", inflated_name(&name)))
    }

    fn side_file(&self, href: &str, what: &str, notes: &mut Vec<String>) -> Option<String> {
        Place::side_file(self, href, what, notes)
    }

    fn stem(&self) -> &str {
        Place::stem(self)
    }
}

/// What an OVF description says of one machine. `chosen`: which, by id or name.
///
/// # Errors
/// `Invalid`: it is none, or breaks the format's rules; `Usage`: it has several machines, and none of that name was chosen;
/// `Unsupported`: a disk is stored in a way that cannot be read; what `files` says.
pub(super) fn guest(bytes: &[u8], files: &dyn Files, chosen: Option<&str>) -> Result<Guest> {
    let text = text::decode_xml(bytes)?;
    let document = xml::parse(&text)?;
    let envelope = document.root_element();
    if !envelope.is("Envelope") {
        return Err(Error::invalid(format!("this is no OVF: its root is '{}'", envelope.tag_name().name())));
    }
    let system = choose(&find_systems(envelope)?, chosen)?;
    let mut guest =
        Guest { name: name_of(system).unwrap_or_else(|| files.stem()).to_owned(), ..Guest::default() };
    guest.description = section(system, "AnnotationSection")
        .and_then(|section| section.text_of("Annotation"))
        .map(str::to_owned);
    let package = Package::read(envelope, system, &mut guest.notes)?;
    operating_system(system, &mut guest);
    hardware(system, &package, files, &mut guest)?;
    Ok(guest)
}

/// The ids and names of the machines in a package.
///
/// # Errors
/// As for reading it.
pub fn systems(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let text = text::decode_xml(bytes)?;
    let document = xml::parse(&text)?;
    let found = find_systems(document.root_element())?;
    let shown = |system: &Node<'_, '_>| {
        let id = system.attr("id").unwrap_or_default().to_owned();
        (id.clone(), name_of(*system).map_or(id, str::to_owned))
    };
    Ok(found.iter().map(shown).collect())
}

/// All machines of the package, in its order.
fn find_systems<'a, 'i>(envelope: Node<'a, 'i>) -> Result<Vec<Node<'a, 'i>>> {
    let is_system = |node: &Node<'_, '_>| {
        node.is("VirtualSystem")
            || (node.is("Content")
                && node.attr("type").is_some_and(|kind| kind.ends_with("VirtualSystem_Type")))
    };
    let found: Vec<_> = envelope.descendants().filter(is_system).take(MOST_SYSTEMS + 1).collect();
    match found.len() {
        0 => Err(Error::invalid("the OVF describes no virtual machine")),
        n if n > MOST_SYSTEMS => {
            Err(Error::invalid(format!("the OVF has more than {MOST_SYSTEMS} machines")))
        }
        _ => Ok(found),
    }
}

fn name_of<'a>(system: Node<'a, '_>) -> Option<&'a str> {
    system.text_of("Name").or_else(|| system.attr("id"))
}

fn choose<'a, 'i>(systems: &[Node<'a, 'i>], chosen: Option<&str>) -> Result<Node<'a, 'i>> {
    let list = || {
        let names: Vec<String> =
            systems.iter().take(20).map(|system| format!("'{}'", name_of(*system).unwrap_or("?"))).collect();
        names.join(", ")
    };
    match (chosen, systems) {
        (None, [only]) => Ok(*only),
        (None, _) => Err(Error::usage(format!("the package has {} machines: {}", systems.len(), list()))
            .hint("choose one of them by its name")),
        (Some(wanted), _) => {
            let is = |system: &&Node<'_, '_>| {
                system.attr("id") == Some(wanted) || system.text_of("Name") == Some(wanted)
            };
            let found = systems.iter().find(is).copied();
            found.ok_or_else(|| {
                Error::usage(format!("the package has no machine '{wanted}'; it has {}", list()))
            })
        }
    }
}

/// A section by its name; the drafts have `Section` with the name as its type.
fn section<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    sections(node, name).next()
}

fn sections<'a, 'i: 'a>(node: Node<'a, 'i>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    let typed = format!("{name}_Type");
    node.children().filter(move |child| {
        child.is(name)
            || (child.is("Section") && child.attr("type").is_some_and(|kind| kind.ends_with(&typed)))
    })
}

/// What the guest is, in the most precise of the words for it.
fn operating_system(system: Node<'_, '_>, guest: &mut Guest) {
    let Some(section) = section(system, "OperatingSystemSection") else { return };
    let hint = section.attr("osType").or_else(|| section.text_of("OSType")).or_else(|| section.attr("id"));
    guest.os_hint = hint.map(str::to_owned);
}

/// Everything within the section of virtual hardware.
fn hardware(system: Node<'_, '_>, package: &Package, files: &dyn Files, guest: &mut Guest) -> Result<()> {
    let mut found = sections(system, "VirtualHardwareSection");
    let Some(section) = found.next() else {
        return Err(Error::invalid("the machine has no VirtualHardwareSection"));
    };
    let more = found.count();
    if more > 0 {
        guest.notes.push(format!(
            "The package describes the hardware in {} ways; the first one was taken.",
            more + 1
        ));
    }
    origin(system, section, guest);
    items::read(section, package, files, guest)?;
    configuration(section, package, files, guest);
    if let Some(machine) = system.one("Machine") {
        vbox::hardware_of_ovf(machine, guest);
    }
    if section.attr("transport").is_some() && package.has_properties() {
        guest.notes.push(
            "The guest is given properties by its hypervisor (OVF environment); on KVM there will be none."
                .to_owned(),
        );
    }
    Ok(())
}

fn origin(system: Node<'_, '_>, section: Node<'_, '_>, guest: &mut Guest) {
    let kind = section.one("System").and_then(|node| node.text_of("VirtualSystemType")).unwrap_or_default();
    let kind = kind.to_ascii_lowercase();
    let has = |word: &str| kind.split([' ', ',', ';']).any(|part| part.contains(word));
    guest.origin = match () {
        () if has("virtualbox") || system.one("Machine").is_some() => Origin::VirtualBox,
        () if has("vmx-") => Origin::Vmware,
        () if has("xen") => Origin::Xen,
        () if has("kvm") || has("qemu") => Origin::Kvm,
        () if has("hyper-v") || has("hyperv") => Origin::HyperV,
        () if section.children().any(|node| node.is("Config") && is_vmware(node)) => Origin::Vmware,
        () => Origin::Unknown,
    };
    let uuid = section.one("System").and_then(|node| node.text_of("VirtualSystemIdentifier"));
    guest.uuid = uuid.and_then(words::uuid);
}

fn is_vmware(node: Node<'_, '_>) -> bool {
    node.tag_name().namespace().is_some_and(|space| space.contains("vmware.com"))
}

/// VMware's settings that have no item: firmware, Secure Boot, the variable store.
fn configuration(section: Node<'_, '_>, package: &Package, files: &dyn Files, guest: &mut Guest) {
    let settings = section.children().filter(|node| node.is("Config") || node.is("ExtraConfig"));
    let mut nvram = None;
    for node in settings {
        let (Some(key), Some(value)) = (node.attr("key"), node.attr("value")) else { continue };
        match key {
            "firmware" if value.eq_ignore_ascii_case("efi") => guest.firmware.kind = Some(FirmwareKind::Uefi),
            "firmware" if value.eq_ignore_ascii_case("bios") => {
                guest.firmware.kind = Some(FirmwareKind::Bios);
            }
            "firmware" => guest.notes.push(format!("The firmware '{value}' is not known.")),
            "bootOptions.efiSecureBootEnabled" => {
                guest.firmware.secure_boot = words::switch(value) == Some(true);
            }
            "nvram" => nvram = Some(value),
            _ => {}
        }
    }
    if guest.origin == Origin::Vmware && guest.firmware.kind.is_none() {
        guest.firmware.kind = Some(FirmwareKind::Bios);
    }
    let uefi = guest.firmware.kind == Some(FirmwareKind::Uefi);
    guest.firmware.secure_boot &= uefi;
    if let Some(name) = nvram.filter(|_| uefi) {
        let href = package.file_of(name).map_or(name, |file| file.href.as_str());
        guest.firmware.nvram = files.side_file(href, "variable store", &mut guest.notes).map(Into::into);
    }
}

#[cfg(test)]
mod tests;
