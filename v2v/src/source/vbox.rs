//! `.vbox`: VirtualBox's description of a machine, versions 1.3 (2008) to 1.19 (VirtualBox 7).
//!
//! The machine names its disks by UUID; a registry says which file that is. A snapshot makes a differencing child, nested in
//! its parent there; what is attached is the newest child. Such a child knows its parent by UUID only, so that its chain is
//! spelled out ([`disks::chain_name`](super::disks::chain_name)).

mod media;

use std::collections::HashMap;

use block::{Error, Result};
use roxmltree::Node;

use self::media::Media;
use super::place::Place;
use super::xml::{self, NodeExt as _};
use super::{check_drives, names, text, words};
use crate::guest::{
    Bus, Cpus, Disk, Display, FirmwareKind, Guest, Network, Nic, Origin, Removable, RemovableKind,
};

/// What a `.vbox` file says.
///
/// # Errors
/// `Invalid`: it is none; `Unsupported`: the machine or a disk is encrypted, or a disk is not in a file; `Denied`: a name
/// leads where the policy forbids.
pub(super) fn guest(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let text = text::decode_xml(bytes)?;
    let document = xml::parse(&text)?;
    let root = document.root_element();
    if root.one("MachineEncrypted").is_some() {
        return Err(encrypted("the machine"));
    }
    let machine = root.one("Machine").filter(|_| root.is("VirtualBox"));
    let Some(machine) = machine else {
        return Err(Error::invalid("this is no VirtualBox machine: it has no element Machine")
            .hint("VirtualBox.xml is the list of machines; give the .vbox file of one of them"));
    };
    let mut guest = Guest {
        name: machine.attr("name").unwrap_or_else(|| place.stem()).to_owned(),
        origin: Origin::VirtualBox,
        description: machine.text_of("Description").map(str::to_owned),
        os_hint: machine.attr("OSType").map(str::to_owned),
        ..Guest::default()
    };
    let hardware = machine.one("Hardware");
    let uuid = hardware.and_then(|hardware| hardware.attr("uuid")).or_else(|| machine.attr("uuid"));
    guest.uuid = uuid.and_then(words::uuid);
    if let Some(hardware) = hardware {
        self::hardware(hardware, place, &mut guest);
    }
    storage(root, machine, place, &mut guest)?;
    if machine.attr("currentSnapshot").is_some() {
        guest.notes.push(
            "The machine has snapshots; its present state is taken, and the snapshots stay behind."
                .to_owned(),
        );
    }
    if machine.attr("stateFile").is_some() {
        guest.notes.push(
            "The machine is suspended (saved state): what it had in memory is lost; shut it down in VirtualBox first."
                .to_owned(),
        );
    }
    Ok(guest)
}

fn encrypted(what: &str) -> Error {
    Error::unsupported(format!("{what} is encrypted by VirtualBox"))
        .hint("remove the encryption in VirtualBox (VBoxManage encryptmedium or encryptvm), then try again")
}

/// What VirtualBox adds to its OVF packages: the parts that OVF has no words for.
pub(super) fn hardware_of_ovf(machine: Node<'_, '_>, guest: &mut Guest) {
    let Some(hardware) = machine.one("Hardware") else { return };
    guest.firmware.kind = Some(firmware_kind(hardware));
    guest.local_time = local_time(hardware);
    guest.tpm |= has_tpm(hardware);
}

fn firmware_kind(hardware: Node<'_, '_>) -> FirmwareKind {
    match hardware.one("Firmware").and_then(|firmware| firmware.attr("type")) {
        Some(kind) if kind.to_ascii_uppercase().starts_with("EFI") => FirmwareKind::Uefi,
        _ => FirmwareKind::Bios,
    }
}

/// The clock runs in local time unless the file says otherwise.
fn local_time(hardware: Node<'_, '_>) -> bool {
    let clock = hardware.one("RTC").and_then(|clock| clock.attr("localOrUTC"));
    !clock.is_some_and(|clock| clock.eq_ignore_ascii_case("utc"))
}

fn has_tpm(hardware: Node<'_, '_>) -> bool {
    let tpm = hardware.one("TrustedPlatformModule").and_then(|tpm| tpm.attr("type"));
    tpm.is_some_and(|kind| !kind.eq_ignore_ascii_case("none"))
}

fn hardware(hardware: Node<'_, '_>, place: &Place<'_>, guest: &mut Guest) {
    guest.cpus = Cpus { count: number(hardware.one("CPU"), "count").or(Some(1)), ..Cpus::default() };
    let mib: Option<u64> = number(hardware.one("Memory"), "RAMSize");
    guest.memory_bytes = mib.and_then(|mib| mib.checked_mul(1 << 20));
    firmware(hardware, place, guest);
    guest.local_time = local_time(hardware);
    guest.tpm = has_tpm(hardware);
    let video: Option<u64> = number(hardware.one("Display"), "VRAMSize");
    guest.display = hardware.one("Display").map(|_| Display {
        protocol: "vnc".to_owned(),
        video_bytes: video.and_then(|mib| mib.checked_mul(1 << 20)),
    });
    guest.sound = hardware.one("AudioAdapter").filter(|card| is_on(*card, "enabled")).map(sound);
    let ports = hardware
        .one("UART")
        .map_or(0, |uart| uart.all("Port").filter(|port| is_on(*port, "enabled")).count());
    guest.serial_ports = u32::try_from(ports).unwrap_or_default();
    let adapters = hardware.one("Network");
    let adapters = adapters.iter().flat_map(|network| network.all("Adapter").collect::<Vec<_>>());
    guest.nics = adapters.filter(|adapter| is_on(*adapter, "enabled")).map(nic).collect();
    let order = hardware.one("Boot");
    let devices: Vec<&str> = order
        .iter()
        .flat_map(|boot| boot.all("Order").filter_map(|order| order.attr("device")).collect::<Vec<_>>())
        .collect();
    if !devices.is_empty() && !devices.contains(&"HardDisk") {
        guest
            .notes
            .push(format!("The machine does not start from a hard disk (but from {}).", devices.join(", ")));
    }
    if guest.tpm {
        guest.notes.push(
            "The machine has a TPM; the keys in it stay behind, and whatever is sealed to it must be unlocked with its \
             recovery key."
                .to_owned(),
        );
    }
}

fn firmware(hardware: Node<'_, '_>, place: &Place<'_>, guest: &mut Guest) {
    let kind = firmware_kind(hardware);
    guest.firmware.kind = Some(kind);
    if kind != FirmwareKind::Uefi {
        return;
    }
    // Where these two are has changed with the versions.
    let holders = ["BIOS", "Firmware"].into_iter().filter_map(|name| hardware.one(name)).chain([hardware]);
    for holder in holders {
        if let Some(path) = holder.one("NVRAM").and_then(|nvram| nvram.attr("path")) {
            let file = place.side_file(path, "variable store", &mut guest.notes);
            guest.firmware.nvram = file.map(Into::into);
        }
        guest.firmware.secure_boot |= holder.one("SecureBoot").is_some_and(|boot| is_on(boot, "enabled"));
    }
}

fn sound(card: Node<'_, '_>) -> String {
    let model = match card.attr("controller").unwrap_or("AC97").to_ascii_uppercase().as_str() {
        "HDA" => "ich6",
        "SB16" => "sb16",
        _ => "ac97",
    };
    model.to_owned()
}

fn nic(adapter: Node<'_, '_>) -> Nic {
    let model = match adapter.attr("type").unwrap_or("Am79C973") {
        "82540EM" | "82543GC" | "82545EM" => "e1000",
        "virtio" => "virtio",
        kind if kind.starts_with("Am79C") => "pcnet",
        other => other,
    };
    let attached = |name: &str| adapter.one(name);
    let named = |node: Node<'_, '_>| node.attr("name").map(str::to_owned);
    let (network, network_name) = match () {
        () if attached("NAT").is_some() => (Network::Nat, None),
        () if attached("BridgedInterface").is_some() => {
            (Network::Bridge, attached("BridgedInterface").and_then(named))
        }
        () if attached("HostOnlyInterface").is_some() => {
            (Network::HostOnly, attached("HostOnlyInterface").and_then(named))
        }
        () => {
            let kinds =
                ["NATNetwork", "InternalNetwork", "HostOnlyNetwork", "GenericInterface", "CloudNetwork"];
            (Network::Managed, kinds.iter().find_map(|kind| attached(kind)).and_then(named))
        }
    };
    Nic {
        mac: adapter.attr("MACAddress").and_then(words::mac),
        model: Some(model.to_owned()),
        network,
        network_name,
        slot: None,
    }
}

/// A controller.
#[derive(Debug)]
struct Controller<'a> {
    name: &'a str,
    kind: &'a str,
    bus: Option<Bus>,
    /// Its place among those of its kind.
    number: usize,
}

/// The disks and drives.
fn storage(root: Node<'_, '_>, machine: Node<'_, '_>, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    let media = Media::read(root, machine);
    // Since settings version 1.19 they are part of the hardware.
    let holders = [machine.one("StorageControllers"), machine.at(&["Hardware", "StorageControllers"])];
    let mut counts: HashMap<Option<Bus>, usize> = HashMap::new();
    for node in
        holders.into_iter().flatten().flat_map(|holder| holder.all("StorageController").collect::<Vec<_>>())
    {
        let kind = node.attr("type").unwrap_or_default();
        let bus = bus_of(kind);
        let number = counts.entry(bus).or_default();
        let controller = Controller { name: node.attr("name").unwrap_or(kind), kind, bus, number: *number };
        *number += 1;
        let mut devices: Vec<_> = node.all("AttachedDevice").collect();
        devices.sort_by_key(|device| address(*device));
        check_drives(guest.disks.len() + guest.removables.len() + devices.len())?;
        for device in devices {
            attached(device, &controller, &media, place, guest)?;
        }
    }
    names::assign(&mut guest.disks);
    Ok(())
}

fn bus_of(kind: &str) -> Option<Bus> {
    match kind.to_ascii_lowercase().as_str() {
        "piix3" | "piix4" | "ich6" => Some(Bus::Ide),
        "ahci" | "intelahci" => Some(Bus::Sata),
        "lsilogic" | "lsilogicsas" | "buslogic" => Some(Bus::Scsi),
        "nvme" => Some(Bus::Nvme),
        "virtioscsi" => Some(Bus::VirtioScsi),
        "usb" => Some(Bus::Usb),
        "i82078" => Some(Bus::Floppy),
        _ => None,
    }
}

fn address(device: Node<'_, '_>) -> (u32, u32) {
    (number(Some(device), "port").unwrap_or_default(), number(Some(device), "device").unwrap_or_default())
}

fn attached(
    device: Node<'_, '_>,
    controller: &Controller<'_>,
    media: &Media,
    place: &Place<'_>,
    guest: &mut Guest,
) -> Result<()> {
    let medium = device.one("Image").and_then(|image| image.attr("uuid")).and_then(words::uuid);
    let (port, unit) = address(device);
    match device.attr("type").unwrap_or_default() {
        "HardDisk" => {
            let Some(uuid) = medium else { return Ok(()) };
            let id = format!("{}:{port}:{unit}", controller.name);
            let image = media.image(&uuid, place, &mut guest.notes)?;
            let nvme = controller.bus == Some(Bus::Nvme);
            guest.disks.push(Disk {
                bus: controller.bus,
                controller: Some(controller.kind.to_owned()),
                guest_name: nvme.then(|| format!("nvme{}n{}", controller.number, u64::from(port) + 1)),
                slot: Some(match controller.bus {
                    Some(Bus::Ide) => (port, unit),
                    _ => (u32::try_from(controller.number).unwrap_or(u32::MAX), port),
                }),
                identities: serial(&uuid).into_iter().collect(),
                ..Disk::new(id, image)
            });
        }
        kind @ ("DVD" | "Floppy") => {
            let floppy = kind == "Floppy";
            let location = medium.and_then(|uuid| media.location(&uuid));
            let medium = location.and_then(|location| place.side_file(location, "medium", &mut guest.notes));
            guest.removables.push(Removable {
                kind: if floppy { RemovableKind::Floppy } else { RemovableKind::Cdrom },
                bus: if floppy { Some(Bus::Floppy) } else { controller.bus },
                medium,
            });
        }
        _ => {}
    }
    Ok(())
}

/// The serial number of a disk: VirtualBox makes it of the UUID of its image (as guests show it: `VBOX_HARDDISK_VB` with the
/// first eight digits, and the last eight by bytes from the end).
fn serial(uuid: &str) -> Option<String> {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).collect();
    let (first, last) = (digits.get(..8)?, digits.get(24..32)?);
    let swapped: String = (0..4).rev().filter_map(|byte| last.get(byte * 2..byte * 2 + 2)).collect();
    Some(format!("VB{first}-{swapped}"))
}

fn number<T: std::str::FromStr>(node: Option<Node<'_, '_>>, name: &str) -> Option<T> {
    node?.attr(name)?.parse().ok()
}

fn is_on(node: Node<'_, '_>, name: &str) -> bool {
    node.attr(name).and_then(words::switch) == Some(true)
}

#[cfg(test)]
mod tests;
