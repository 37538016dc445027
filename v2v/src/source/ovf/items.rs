//! The devices of a machine (CIM_ResourceAllocationSettingData, and its sisters for disks and network ports in version 2).

use std::collections::HashMap;

use block::{Error, Result};
use roxmltree::Node;

use super::Files;
use super::package::{Chain, Package};
use crate::guest::{Bus, Disk, DiskImage, Display, Guest, Network, Nic, Removable, RemovableKind};
use crate::source::xml::NodeExt as _;
use crate::source::{disks, image, names, units, words};

/// The most devices of a machine.
const MOST_ITEMS: usize = 1024;

/// Numbers of CIM for kinds of resources.
mod kind {
    pub(super) const CPU: u32 = 3;
    pub(super) const MEMORY: u32 = 4;
    pub(super) const IDE: u32 = 5;
    pub(super) const SCSI: u32 = 6;
    pub(super) const ETHERNET: u32 = 10;
    pub(super) const FLOPPY: u32 = 14;
    pub(super) const CDROM: u32 = 15;
    pub(super) const DVD: u32 = 16;
    pub(super) const DISK: u32 = 17;
    pub(super) const OTHER_STORAGE: u32 = 20;
    pub(super) const SERIAL: u32 = 21;
    pub(super) const USB: u32 = 23;
    pub(super) const GRAPHICS: u32 = 24;
    pub(super) const SOUND: u32 = 35;
}

/// A device.
#[derive(Debug)]
struct Item {
    kind: u32,
    id: String,
    name: String,
    subtype: String,
    parent: Option<String>,
    on_parent: Option<u32>,
    address: Option<String>,
    resource: Option<String>,
    quantity: Option<u64>,
    unit: Option<String>,
    connection: Option<String>,
    cores: Option<u32>,
    required: bool,
    settings: Vec<(String, String)>,
}

impl Item {
    fn read(node: Node<'_, '_>, package: &Package) -> Self {
        let text = |name: &str| node.text_of(name).map(str::to_owned);
        let number = |name: &str| node.text_of(name).and_then(|text| text.parse().ok());
        let quantity = text("VirtualQuantity").and_then(|text| package.expand(&text));
        let settings = node
            .all("Config")
            .filter_map(|setting| Some((setting.attr("key")?.to_owned(), setting.attr("value")?.to_owned())));
        Self {
            kind: number("ResourceType").unwrap_or_default(),
            id: text("InstanceID").or_else(|| text("InstanceId")).unwrap_or_default(),
            name: text("ElementName").or_else(|| text("Caption")).unwrap_or_default(),
            subtype: text("ResourceSubType").unwrap_or_default(),
            parent: text("Parent"),
            on_parent: number("AddressOnParent"),
            address: text("Address"),
            resource: text("HostResource"),
            quantity: quantity.and_then(|text| text.trim().parse().ok()),
            unit: text("AllocationUnits").or_else(|| text("VirtualQuantityUnits")),
            connection: text("Connection"),
            cores: number("CoresPerSocket"),
            required: !matches!(node.attr("required"), Some("false" | "0")),
            settings: settings.collect(),
        }
    }

    fn subtype_has(&self, word: &str) -> bool {
        self.subtype.to_ascii_lowercase().contains(word)
    }
}

/// A controller of disks.
#[derive(Debug, Clone, Copy)]
struct Controller<'a> {
    item: &'a Item,
    /// Its place among the controllers of the package.
    index: usize,
    bus: Bus,
}

/// Reads the devices into the guest.
///
/// # Errors
/// As [`guest`](super::guest).
pub(super) fn read(
    section: Node<'_, '_>,
    package: &Package,
    files: &dyn Files,
    guest: &mut Guest,
) -> Result<()> {
    let is_item =
        |node: &Node<'_, '_>| node.is("Item") || node.is("StorageItem") || node.is("EthernetPortItem");
    let nodes: Vec<_> = section.children().filter(is_item).take(MOST_ITEMS + 1).collect();
    if nodes.len() > MOST_ITEMS {
        return Err(Error::invalid(format!("the machine has more than {MOST_ITEMS} devices")));
    }
    // Items with bounds say what could be chosen, not what the machine has.
    let counts = |node: &&Node<'_, '_>| {
        package.is_in_force(node.attr("configuration")) && matches!(node.attr("bound"), None | Some("normal"))
    };
    let items: Vec<Item> = nodes.iter().filter(counts).map(|node| Item::read(*node, package)).collect();
    let controllers = controllers(&items);
    let mut placed = vec![];
    for item in &items {
        match item.kind {
            kind::CPU => cpus(item, guest),
            kind::MEMORY => memory(item, guest)?,
            kind::ETHERNET => nic(item, guest),
            kind::DISK => placed.extend(disk(item, &controllers, package, files, &mut guest.notes)?),
            kind::CDROM | kind::DVD | kind::FLOPPY => removable(item, &controllers, package, files, guest),
            kind::SERIAL => guest.serial_ports += 1,
            kind::GRAPHICS => display(item, guest),
            _ if is_sound(item) => guest.sound = Some(sound(item)),
            _ if item.subtype_has("tpm") => guest.tpm = true,
            kind::IDE | kind::SCSI | kind::OTHER_STORAGE | kind::USB => {}
            _ => unknown(item, &mut guest.notes),
        }
    }
    placed.sort_by_key(|(address, _)| *address);
    guest.disks.extend(placed.into_iter().map(|(_, disk)| disk));
    names::assign(&mut guest.disks);
    Ok(())
}

fn controllers(items: &[Item]) -> HashMap<&str, Controller<'_>> {
    let mut found = HashMap::new();
    for item in items {
        let bus = match item.kind {
            kind::IDE => Bus::Ide,
            kind::SCSI if item.subtype_has("virtio") => Bus::VirtioScsi,
            kind::SCSI => Bus::Scsi,
            kind::OTHER_STORAGE if item.subtype_has("nvme") => Bus::Nvme,
            kind::OTHER_STORAGE if item.subtype_has("virtio") => Bus::VirtioScsi,
            kind::OTHER_STORAGE => Bus::Sata,
            kind::USB => Bus::Usb,
            _ => continue,
        };
        let index = found.len();
        found.entry(item.id.as_str()).or_insert(Controller { item, index, bus });
    }
    found
}

fn cpus(item: &Item, guest: &mut Guest) {
    let count = item.quantity.and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0);
    // Of several items the last one counts, with what it says of cores: both or neither.
    guest.cpus.count = count;
    guest.cpus.topology = match (count, item.cores) {
        (Some(count), Some(cores)) if cores > 0 && count % cores == 0 => Some((count / cores, cores, 1)),
        _ => None,
    };
}

fn memory(item: &Item, guest: &mut Guest) -> Result<()> {
    let unit = item.unit.as_deref().unwrap_or("byte * 2^20");
    let bytes = units::of_ovf(unit).zip(item.quantity).and_then(|(unit, count)| count.checked_mul(unit));
    let Some(bytes) = bytes else {
        return Err(Error::invalid(format!(
            "the machine's memory is {} in units of '{unit}', which is no size",
            item.quantity.map_or_else(|| "missing".to_owned(), |count| count.to_string())
        )));
    };
    // Several pieces of memory add up.
    guest.memory_bytes = guest.memory_bytes.unwrap_or_default().checked_add(bytes);
    Ok(())
}

fn nic(item: &Item, guest: &mut Guest) {
    let model = match item.subtype.to_ascii_lowercase().as_str() {
        "" => None,
        "pcnet32" | "vlance" | "flexible" => Some("pcnet".to_owned()),
        "virtio" | "virtio-net" => Some("virtio".to_owned()),
        other => Some(other.to_owned()),
    };
    let slot = item.settings.iter().find(|(key, _)| key.eq_ignore_ascii_case("slotInfo.pciSlotNumber"));
    let network = match item.connection.as_deref().unwrap_or_default().to_ascii_lowercase().as_str() {
        "nat" => Network::Nat,
        "bridged" => Network::Bridge,
        "hostonly" => Network::HostOnly,
        _ => Network::Managed,
    };
    guest.nics.push(Nic {
        mac: item.address.as_deref().and_then(words::mac),
        model,
        network,
        network_name: item.connection.clone(),
        slot: slot.and_then(|(_, value)| value.parse().ok()),
    });
}

/// Where a disk is: its controller's place, its own on it.
type Address = (usize, u32);

/// A disk. `None`: nothing that could be one is named.
fn disk(
    item: &Item,
    controllers: &HashMap<&str, Controller<'_>>,
    package: &Package,
    files: &dyn Files,
    notes: &mut Vec<String>,
) -> Result<Option<(Address, Disk)>> {
    let Some(resource) = &item.resource else {
        notes.push(format!("The disk '{}' names no medium and was left out.", item.name));
        return Ok(None);
    };
    let controller = item.parent.as_deref().and_then(|parent| controllers.get(parent));
    let unit = item.on_parent.unwrap_or_default();
    let address = (controller.map_or(usize::MAX, |controller| controller.index), unit);
    let (image, capacity_bytes) = match package.file_of(resource) {
        // A file that is a disk as it is.
        Some(file) => {
            file.check_readable()?;
            (image(files.find(&file.href, file.is_compressed(), notes)?, None), None)
        }
        None => {
            let chain = package.disk_of(resource)?;
            (chain_image(&chain, resource, files, notes)?, chain.capacity_bytes)
        }
    };
    let disk = Disk {
        bus: controller.map(|controller| controller.bus),
        controller: controller
            .map(|controller| controller.item.subtype.clone())
            .filter(|name| !name.is_empty()),
        guest_name: controller.filter(|controller| controller.bus == Bus::Nvme).map(|controller| {
            let before = controllers.values().filter(|c| c.bus == Bus::Nvme && c.index < controller.index);
            format!("nvme{}n{}", before.count(), u64::from(unit) + 1)
        }),
        slot: controller.map(|controller| {
            let same = controllers.values().filter(|c| c.bus == controller.bus && c.index < controller.index);
            (u32::try_from(same.count()).unwrap_or(u32::MAX), unit)
        }),
        capacity_bytes,
        ..Disk::new(if item.name.is_empty() { resource.clone() } else { item.name.clone() }, image)
    };
    Ok(Some((address, disk)))
}

fn chain_image(
    chain: &Chain<'_>,
    resource: &str,
    files: &dyn Files,
    notes: &mut Vec<String>,
) -> Result<DiskImage> {
    let mut named = vec![];
    for (disk, file) in &chain.members {
        let Some(file) = file else {
            // A disk without a file is empty: where a chain ends in one, nothing is behind it.
            break;
        };
        file.check_readable()?;
        named.push((files.find(&file.href, file.is_compressed(), notes)?, format_of(&disk.format)));
    }
    if let [(name, format)] = named.as_slice() {
        return Ok(image(name, *format));
    }
    if !named.is_empty() {
        return Ok(image(disks::chain_name(&named), None));
    }
    let size_bytes = chain.capacity_bytes;
    let wrong = || Error::invalid(format!("the disk '{resource}' has neither a file nor a capacity"));
    size_bytes.map(|size_bytes| DiskImage::Empty { size_bytes }).ok_or_else(wrong)
}

/// The format that a URI stands for; `None`: the contents will show.
fn format_of(uri: &str) -> Option<&'static str> {
    let uri = uri.to_ascii_lowercase();
    match () {
        () if uri.contains("vmdk") => Some("vmdk"),
        () if uri.contains("vhdx") => Some("vhdx"),
        () if uri.contains("qcow2") => Some("qcow2"),
        () => None,
    }
}

fn removable(
    item: &Item,
    controllers: &HashMap<&str, Controller<'_>>,
    package: &Package,
    files: &dyn Files,
    guest: &mut Guest,
) {
    let floppy = item.kind == kind::FLOPPY;
    let bus =
        item.parent.as_deref().and_then(|parent| controllers.get(parent)).map(|controller| controller.bus);
    let resource = item.resource.as_deref();
    let href =
        resource.and_then(|resource| package.file_of(resource)).map(|file| file.href.clone()).or_else(|| {
            // Some name a medium as a disk.
            let chain = resource.and_then(|resource| package.disk_of(resource).ok())?;
            Some(chain.members.first()?.1?.href.clone())
        });
    let medium = href.and_then(|href| {
        files
            .find(&href, false, &mut guest.notes)
            .map_err(|e| guest.notes.push(format!("A medium is left out: {e}.")))
            .ok()
    });
    guest.removables.push(Removable {
        kind: if floppy { RemovableKind::Floppy } else { RemovableKind::Cdrom },
        bus: if floppy { Some(Bus::Floppy) } else { bus },
        medium,
    });
}

fn display(item: &Item, guest: &mut Guest) {
    let kib = item.settings.iter().find(|(key, _)| key.eq_ignore_ascii_case("videoRamSizeInKB"));
    let kib = kib.and_then(|(_, value)| value.parse::<u64>().ok()).filter(|kib| *kib > 0);
    let video_bytes = kib.and_then(|kib| kib.checked_mul(1024));
    guest.display = Some(Display { protocol: "vnc".to_owned(), video_bytes });
}

/// VirtualBox has a number for sound cards; VMware calls them "other" (1) and names the model.
fn is_sound(item: &Item) -> bool {
    item.kind == kind::SOUND || item.subtype_has("soundcard") || item.subtype_has("sound.")
}

fn sound(item: &Item) -> String {
    let card = match () {
        () if item.subtype_has("sb16") => "sb16",
        () if item.subtype_has("hda") => "ich6",
        () if item.subtype_has("ac97") => "ac97",
        () => "es1370",
    };
    card.to_owned()
}

/// A device that the machine cannot do without, by its description.
fn unknown(item: &Item, notes: &mut Vec<String>) {
    let harmless = ["vmci", "keyboard", "pointing", "mouse"];
    if item.required && !harmless.iter().any(|word| item.subtype_has(word)) {
        notes.push(format!(
            "The device '{}' (type {}, '{}') is not understood and was left out.",
            item.name, item.kind, item.subtype
        ));
    }
}
