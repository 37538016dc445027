//! Disks of a domain.

use block::Result;
use roxmltree::Node;

use crate::guest::{Bus, Disk, DiskImage, Guest, Origin, Removable, RemovableKind};
use crate::source::image;
use crate::source::place::Place;
use crate::source::xml::NodeExt as _;

/// Reads an element `disk` into the guest.
///
/// # Errors
/// `Denied`: its file lies where the policy forbids.
pub(super) fn read(
    node: Node<'_, '_>,
    devices: Node<'_, '_>,
    place: &Place<'_>,
    guest: &mut Guest,
) -> Result<()> {
    let target = node.one("target");
    let name = target.and_then(|target| target.attr("dev")).unwrap_or("disk");
    let device = node.attr("device").unwrap_or("disk");
    let controller = if device == "floppy" { None } else { controller(node, devices) };
    let bus = bus(target.and_then(|target| target.attr("bus")), name, controller.as_deref());
    let source = source(node, name, place, guest)?;
    match device {
        "cdrom" | "floppy" => {
            let floppy = device == "floppy";
            guest.removables.push(Removable {
                kind: if floppy { RemovableKind::Floppy } else { RemovableKind::Cdrom },
                bus: if floppy { Some(Bus::Floppy) } else { bus },
                medium: source,
            });
            return Ok(());
        }
        "disk" | "lun" => {}
        other => {
            guest.notes.push(format!("The disk '{name}' is a '{other}', and was left out."));
            return Ok(());
        }
    }
    let Some(source) = source else {
        guest.notes.push(format!("The disk '{name}' has no source, and was left out."));
        return Ok(());
    };
    remarks(node, name, &mut guest.notes);
    let format = format(node, guest.origin);
    guest.disks.push(Disk {
        bus,
        controller,
        guest_name: guest_name(bus, name),
        boot_order: node.one("boot").and_then(|boot| boot.attr("order")).and_then(|order| order.parse().ok()),
        read_only: node.one("readonly").is_some(),
        serial: node.text_of("serial").map(str::to_owned),
        slot: slot(node, bus),
        identities: node.text_of("wwn").map(str::to_owned).into_iter().chain(pci(node)).collect(),
        image: source_image(source, format.as_deref()),
        ..Disk::new(name, image("", None))
    });
    Ok(())
}

fn source_image(name: String, format: Option<&str>) -> DiskImage {
    DiskImage::Name { name, format: format.map(str::to_owned) }
}

/// libvirt takes a disk without a format for a raw one, and never looks into it; what its drivers for other hypervisors
/// describe has no formats at all.
fn format(node: Node<'_, '_>, origin: Origin) -> Option<String> {
    let named = node.one("driver").and_then(|driver| driver.attr("type"));
    match (named, origin) {
        (Some("aio"), _) => Some("raw".to_owned()),
        (Some("vhd"), _) => Some("vpc".to_owned()),
        (Some(name), _) => Some(name.to_owned()),
        (None, Origin::Kvm | Origin::Xen | Origin::Physical) => Some("raw".to_owned()),
        (None, _) => None,
    }
}

fn bus(named: Option<&str>, target: &str, controller: Option<&str>) -> Option<Bus> {
    Some(match named {
        Some("virtio") => Bus::Virtio,
        Some("scsi") if controller == Some("virtio-scsi") => Bus::VirtioScsi,
        Some("scsi") => Bus::Scsi,
        Some("sata") => Bus::Sata,
        Some("ide") => Bus::Ide,
        Some("usb" | "sd") => Bus::Usb,
        Some("nvme") => Bus::Nvme,
        Some("xen") => Bus::Xen,
        Some("fdc") => Bus::Floppy,
        Some(_) => return None,
        // As libvirt guesses.
        None if target.starts_with("vd") => Bus::Virtio,
        None if target.starts_with("hd") => Bus::Ide,
        None if target.starts_with("sd") => Bus::Scsi,
        None if target.starts_with("xvd") => Bus::Xen,
        None if target.starts_with("fd") => Bus::Floppy,
        None => return None,
    })
}

/// The model of the controller that a disk is attached to.
fn controller(node: Node<'_, '_>, devices: Node<'_, '_>) -> Option<String> {
    let kind = node.one("target")?.attr("bus")?;
    let index = node.one("address").and_then(|address| address.attr("controller")).unwrap_or("0");
    let is = |other: &Node<'_, '_>| {
        other.attr("type") == Some(kind) && other.attr("index").unwrap_or("0") == index
    };
    devices.all("controller").find(is)?.attr("model").map(str::to_owned)
}

/// Where on its controller it is, if the domain says so: channels of IDE are called buses.
fn slot(node: Node<'_, '_>, bus: Option<Bus>) -> Option<(u32, u32)> {
    let address = node.one("address").filter(|address| address.attr("type") == Some("drive"))?;
    let number = |name: &str| address.attr(name).unwrap_or("0").parse::<u32>().ok();
    let controller = if bus == Some(Bus::Ide) { "bus" } else { "controller" };
    Some((number(controller)?, number("unit")?))
}

/// The address of a virtio disk, as it stands in `by-path`.
fn pci(node: Node<'_, '_>) -> Option<String> {
    let address = node.one("address").filter(|address| address.attr("type") == Some("pci"))?;
    let number = |name: &str| {
        let text = address.attr(name)?;
        u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    };
    let [domain, bus, slot, function] = ["domain", "bus", "slot", "function"].map(number);
    Some(format!("pci-{:04x}:{:02x}:{:02x}.{:x}", domain?, bus?, slot?, function?))
}

/// Names of virtio and Xen disks are those that the domain gives them, as long as nobody has chosen odd ones; those of
/// other disks are counted.
fn guest_name(bus: Option<Bus>, target: &str) -> Option<String> {
    let prefix = match bus? {
        Bus::Virtio => "vd",
        Bus::Xen => "xvd",
        _ => return None,
    };
    target.starts_with(prefix).then(|| target.to_owned())
}

/// Where its bytes are.
fn source(node: Node<'_, '_>, target: &str, place: &Place<'_>, guest: &mut Guest) -> Result<Option<String>> {
    let Some(source) = node.one("source") else { return Ok(None) };
    let kind = node.attr("type").unwrap_or("file");
    let named = source.attr("file").or_else(|| source.attr("dev")).or_else(|| source.attr("dir"));
    match kind {
        "network" => Ok(network(source, target, &mut guest.notes)),
        "volume" => {
            let volume =
                format!("{}/{}", source.attr("pool").unwrap_or("?"), source.attr("volume").unwrap_or("?"));
            guest.notes.push(format!(
                "The disk '{target}' is the volume '{volume}' of a storage pool: 'virsh vol-path' says which file that is."
            ));
            Ok(Some(format!("volume:{volume}")))
        }
        _ => named.map(|name| place.file(name, &mut guest.notes)).transpose(),
    }
}

/// The name of a disk that a server has.
fn network(source: Node<'_, '_>, target: &str, notes: &mut Vec<String>) -> Option<String> {
    let protocol = source.attr("protocol").unwrap_or("?");
    let export = source.attr("name").unwrap_or_default();
    if protocol != "nbd" {
        notes.push(format!(
            "The disk '{target}' is reached by '{protocol}', which vimg does not speak: copy it, or export it with NBD."
        ));
        return Some(format!("{protocol}:{export}"));
    }
    let host = source.one("host");
    let of_host = |name: &str| host.and_then(|host| host.attr(name));
    let tls = if source.attr("tls") == Some("yes") { "nbds" } else { "nbd" };
    Some(match of_host("socket") {
        Some(socket) => format!("{tls}+unix:///{}?socket={}", encoded(export), encoded(socket)),
        None => {
            let name = of_host("name").unwrap_or("localhost");
            let name = if name.contains(':') { format!("[{name}]") } else { name.to_owned() };
            let port = of_host("port").unwrap_or("10809");
            format!("{tls}://{name}:{port}/{}", encoded(export))
        }
    })
}

/// Text as a part of a URI.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}

/// What a person has to know about a disk.
fn remarks(node: Node<'_, '_>, name: &str, notes: &mut Vec<String>) {
    let source = node.one("source");
    if node.one("encryption").is_some() || source.is_some_and(|source| source.one("encryption").is_some()) {
        notes.push(format!(
            "The disk '{name}' is encrypted: its passphrase has to be given (--object secret, or --key)."
        ));
    }
    if node.one("shareable").is_some() {
        notes.push(format!("The disk '{name}' is shared with other machines."));
    }
    if node.one("transient").is_some() {
        notes.push(format!(
            "The disk '{name}' is transient: it forgot all changes when the machine was switched off."
        ));
    }
    if node.one("mirror").is_some() {
        notes.push(format!("The disk '{name}' was being copied elsewhere when the description was made."));
    }
}
