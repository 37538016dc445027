//! Disks, drives and network cards of a VMX file.

use std::collections::BTreeSet;

use block::Result;

use super::dict::Dict;
use crate::guest::{Bus, Disk, Guest, Network, Nic, Removable, RemovableKind};
use crate::source::place::Place;
use crate::source::{check_drives, image, names, words};

/// VMware's controllers, in the order in which its firmware looks for a disk to start from.
const BUSES: &[(&str, Bus)] =
    &[("scsi", Bus::Scsi), ("sata", Bus::Sata), ("nvme", Bus::Nvme), ("ide", Bus::Ide)];

/// The most cards that VMware gives a machine is 10.
const MOST_NICS: usize = 64;

/// A place on a controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Slot {
    /// Index in [`BUSES`].
    kind: usize,
    controller: u32,
    unit: u32,
}

impl Slot {
    fn parse(key: &str) -> Option<Self> {
        let (name, _) = key.split_once('.')?;
        let (controller, unit) = name.split_once(':')?;
        let kind = BUSES.iter().position(|(word, _)| controller.starts_with(word))?;
        let number = controller.strip_prefix(BUSES.get(kind)?.0)?;
        Some(Self { kind, controller: number.parse().ok()?, unit: unit.parse().ok()? })
    }

    fn bus(&self) -> Bus {
        BUSES.get(self.kind).map_or(Bus::Scsi, |(_, bus)| *bus)
    }

    /// `scsi0`
    fn controller_name(&self) -> String {
        format!("{}{}", self.bus().name(), self.controller)
    }

    /// `scsi0:1`
    fn name(&self) -> String {
        format!("{}:{}", self.controller_name(), self.unit)
    }
}

/// What is in a slot.
#[derive(Debug, PartialEq, Eq)]
enum What {
    Disk { raw: bool },
    Cdrom { image: bool },
    Unknown,
}

/// By the type of the device; older files have none for disks, and leave it to the name of the file.
fn what(kind: &str, file: &str) -> What {
    let file = file.to_ascii_lowercase();
    match kind.to_ascii_lowercase().as_str() {
        "disk" | "harddisk" | "scsi-harddisk" | "ata-harddisk" | "plaindisk" => What::Disk { raw: false },
        "rawdisk" => What::Disk { raw: true },
        "cdrom-image" => What::Cdrom { image: true },
        "cdrom-raw" | "atapi-cdrom" | "cdrom" => What::Cdrom { image: false },
        "" if file.ends_with(".iso") => What::Cdrom { image: true },
        "" if file == "auto detect" => What::Cdrom { image: false },
        "" => What::Disk { raw: false },
        _ => What::Unknown,
    }
}

/// The disks and CD drives.
pub(super) fn disks(dict: &Dict, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    let slots: BTreeSet<Slot> = dict.keys().filter_map(Slot::parse).collect();
    check_drives(slots.len())?;
    for slot in &slots {
        let name = slot.name();
        let off = dict.is_off(&format!("{name}.present"))
            || dict.is_off(&format!("{}.present", slot.controller_name()));
        if off {
            continue;
        }
        let file = dict.text(&format!("{name}.filename")).unwrap_or_default();
        let kind = dict.text(&format!("{name}.devicetype")).unwrap_or_default();
        match what(kind, file) {
            What::Disk { .. } if file.is_empty() => {}
            What::Disk { raw } => {
                let disk = disk(dict, place, slot, file, &mut guest.notes)?;
                remarks(dict, &name, raw, &mut guest.notes);
                guest.disks.push(disk);
            }
            What::Cdrom { image } => {
                let medium = Some(file).filter(|file| image && !file.is_empty());
                let medium = medium.and_then(|file| place.side_file(file, "CD image", &mut guest.notes));
                guest.removables.push(Removable {
                    kind: RemovableKind::Cdrom,
                    bus: Some(slot.bus()),
                    medium,
                });
            }
            What::Unknown => {
                guest.notes.push(format!("{name} is a device of the host ('{kind}') and stays behind."));
            }
        }
    }
    name_nvme(&slots, guest);
    names::assign(&mut guest.disks);
    boot_order(dict, guest);
    Ok(())
}

fn disk(dict: &Dict, place: &Place<'_>, slot: &Slot, file: &str, notes: &mut Vec<String>) -> Result<Disk> {
    let controller = dict.text(&format!("{}.virtualdev", slot.controller_name()));
    let format = file.to_ascii_lowercase().ends_with(".vmdk").then_some("vmdk");
    Ok(Disk {
        bus: Some(slot.bus()),
        controller: controller.map(str::to_owned),
        slot: Some((slot.controller, slot.unit)),
        ..Disk::new(slot.name(), image(place.file(file, notes)?, format))
    })
}

/// What a person has to know about a disk.
fn remarks(dict: &Dict, name: &str, raw: bool, notes: &mut Vec<String>) {
    let mode = dict.text(&format!("{name}.mode")).unwrap_or_default().to_ascii_lowercase();
    if mode.contains("nonpersistent") {
        notes.push(format!(
            "{name} is nonpersistent: on VMware it forgets all changes when the machine is switched off; on KVM it will keep them."
        ));
    } else if mode.starts_with("independent") {
        notes.push(format!("{name} is independent: VMware's snapshots do not include it."));
    } else if mode == "undoable" {
        notes.push(format!("{name} is undoable: changes that nobody has committed are not in it."));
    }
    if let Some(redo) = dict.text(&format!("{name}.redo")) {
        notes.push(format!(
            "{name} has a redo log ('{redo}'), whose changes are not in the disk; start and shut down the machine in VMware \
             to keep or drop them."
        ));
    }
    if raw {
        notes.push(format!(
            "{name} is a disk of the host (raw device mapping); its contents are taken from the device."
        ));
    }
    if dict.is_on(&format!("{name}.writethrough"))
        || dict.text(&format!("{name}.sharing")).is_some_and(|s| s != "sharing-none")
    {
        notes.push(format!("{name} may be shared with other machines."));
    }
}

/// `nvme0:1` is the second name space of the first controller.
fn name_nvme(slots: &BTreeSet<Slot>, guest: &mut Guest) {
    let nvme = slots.iter().filter(|slot| slot.bus() == Bus::Nvme);
    let mut controllers: Vec<u32> = nvme.clone().map(|slot| slot.controller).collect();
    controllers.dedup();
    for slot in nvme {
        let number = controllers.iter().position(|controller| *controller == slot.controller);
        let disk = guest.disks.iter_mut().find(|disk| disk.id == slot.name());
        if let (Some(number), Some(disk)) = (number, disk) {
            disk.guest_name = Some(format!("nvme{number}n{}", u64::from(slot.unit) + 1));
        }
    }
}

/// The disk that the firmware is told to look at first.
fn boot_order(dict: &Dict, guest: &mut Guest) {
    let Some(order) = dict.text("bios.hddorder") else { return };
    let mut next = 1;
    for name in order.split(',').take(256).map(|name| name.trim().to_ascii_lowercase()) {
        let disk = guest.disks.iter_mut().find(|disk| disk.id == name && disk.boot_order.is_none());
        if let Some(disk) = disk {
            disk.boot_order = Some(next);
            next += 1;
        }
    }
    // The guest goes on counting them by their slots.
    if guest.disks.iter().any(|disk| disk.boot_order.is_some()) {
        let is_scsi =
            |disk: &&mut Disk| disk.guest_name.is_none() && matches!(disk.bus, Some(Bus::Scsi | Bus::Sata));
        let is_alone = guest.disks.iter().all(|disk| matches!(disk.bus, Some(Bus::Scsi | Bus::Nvme)))
            || guest.disks.iter().all(|disk| matches!(disk.bus, Some(Bus::Sata | Bus::Nvme)));
        let letters = (b'a'..=b'z').map(char::from).filter(|_| is_alone);
        for (disk, letter) in guest.disks.iter_mut().filter(is_scsi).zip(letters) {
            disk.guest_name = Some(format!("sd{letter}"));
        }
    }
    // Stable: those that are not named keep their order, behind the others.
    guest.disks.sort_by_key(|disk| disk.boot_order.unwrap_or(u32::MAX));
}

/// The floppy drives.
pub(super) fn floppies(dict: &Dict, place: &Place<'_>, guest: &mut Guest) {
    for number in dict.numbers("floppy").into_iter().filter(|number| *number < 2) {
        let key = |last: &str| format!("floppy{number}.{last}");
        let file = dict.text(&key("filename")).unwrap_or_default();
        if dict.is_off(&key("present")) || (file.is_empty() && !dict.is_on(&key("present"))) {
            continue;
        }
        let is_file = dict.text(&key("filetype")).is_some_and(|kind| kind.eq_ignore_ascii_case("file"));
        let medium = Some(file).filter(|file| is_file && !file.is_empty());
        let medium = medium.and_then(|file| place.side_file(file, "floppy image", &mut guest.notes));
        guest.removables.push(Removable { kind: RemovableKind::Floppy, bus: Some(Bus::Floppy), medium });
    }
}

/// The network cards.
pub(super) fn nics(dict: &Dict, guest: &mut Guest) {
    for number in dict.numbers("ethernet").into_iter().take(MOST_NICS) {
        let key = |last: &str| format!("ethernet{number}.{last}");
        let says_more = ["virtualdev", "address", "generatedaddress", "connectiontype", "networkname"];
        let speaks = says_more.iter().any(|last| dict.text(&key(last)).is_some());
        if dict.is_off(&key("present")) || !(dict.is_on(&key("present")) || speaks) {
            continue;
        }
        let (network, network_name) = network(dict, number);
        guest.nics.push(Nic {
            mac: address(dict, number, &mut guest.notes),
            model: Some(model(dict, number)),
            network,
            network_name,
            slot: dict.number::<i64>(&key("pcislotnumber")).and_then(|slot| u32::try_from(slot).ok()),
        });
    }
    sort_nics(&mut guest.nics);
}

/// Puts cards in the order in which the guest counts them (`eth0`, `eth1`), if all are of one model: that of their slots. Bits 0 to 4
/// of VMware's slot number are the device behind a bridge, 5 to 9 the bridge, from 10 the bridge's function (observed: slot
/// 1184 of a fourth card is behind the bridge of slot 160, and in front of 192).
fn sort_nics(nics: &mut [Nic]) {
    let one_model = nics.iter().all(|nic| nic.model == nics[0].model);
    if one_model && nics.iter().all(|nic| nic.slot.is_some_and(|slot| slot > 0)) {
        nics.sort_by_key(|nic| nic.slot.map(|slot| ((slot >> 5) & 0x1f, slot >> 10, slot & 0x1f)));
    }
}

/// The address: one that somebody chose, or one that was generated.
fn address(dict: &Dict, number: u32, notes: &mut Vec<String>) -> Option<String> {
    let text = |last: &str| dict.text(&format!("ethernet{number}.{last}"));
    let (chosen, generated) = (text("address"), text("generatedaddress"));
    let written = match text("addresstype").unwrap_or_default().to_ascii_lowercase().as_str() {
        "static" => chosen.or(generated),
        "generated" | "vpx" => generated.or(chosen),
        _ => chosen.or(generated),
    }?;
    let address = words::mac(written);
    if address.is_none() {
        notes.push(format!("ethernet{number} has no usable address ('{written}')."));
    }
    address
}

/// The model; where none is named, what VMware gives guests of that kind.
fn model(dict: &Dict, number: u32) -> String {
    let named = dict.text(&format!("ethernet{number}.virtualdev")).map(str::to_ascii_lowercase);
    match named.as_deref() {
        Some("vlance" | "flexible") => "pcnet".to_owned(),
        Some(other) => other.to_owned(),
        None if dict.text("guestos").is_some_and(|os| os.ends_with("-64")) => "e1000".to_owned(),
        None => "pcnet".to_owned(),
    }
}

fn network(dict: &Dict, number: u32) -> (Network, Option<String>) {
    let text = |last: &str| dict.text(&format!("ethernet{number}.{last}")).map(str::to_owned);
    // ESXi's machines name a port group and nothing else.
    if let Some(name) = text("networkname").or_else(|| text("dvs.portgroupid")) {
        return (Network::Managed, Some(name));
    }
    match text("connectiontype").unwrap_or_default().to_ascii_lowercase().as_str() {
        "nat" => (Network::Nat, None),
        "hostonly" => (Network::HostOnly, None),
        "" | "bridged" => (Network::Bridge, text("vnet")),
        _ => (Network::Managed, text("vnet")),
    }
}
