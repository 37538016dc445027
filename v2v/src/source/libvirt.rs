//! libvirt's domain XML, as `virsh dumpxml` prints it.

mod disk;

use block::{Error, Result};
use roxmltree::Node;

use super::place::Place;
use super::xml::{self, NodeExt as _};
use super::{check_drives, names, text, units, words};
use crate::guest::{DirectBoot, Display, FirmwareKind, Guest, Network, Nic, Origin};

/// What a domain says.
///
/// # Errors
/// `Invalid`: it is none, or a size in it is none; `Denied`: a name leads where the policy forbids.
pub(super) fn guest(bytes: &[u8], place: &Place<'_>) -> Result<Guest> {
    let text = text::decode_xml(bytes)?;
    let document = xml::parse(&text)?;
    let domain = document.root_element();
    if !domain.is("domain") {
        return Err(Error::invalid(format!(
            "this is no libvirt domain: its root is '{}'",
            domain.tag_name().name()
        )));
    }
    let mut guest = Guest {
        name: domain.text_of("name").unwrap_or_else(|| place.stem()).to_owned(),
        origin: origin(domain),
        uuid: domain.text_of("uuid").and_then(words::uuid),
        genid: domain.text_of("genid").and_then(words::uuid),
        description: domain.text_of("description").or_else(|| domain.text_of("title")).map(str::to_owned),
        os_hint: os_hint(domain),
        memory_bytes: memory(domain)?,
        local_time: domain.one("clock").and_then(|clock| clock.attr("offset")) == Some("localtime"),
        ..Guest::default()
    };
    cpus(domain, &mut guest);
    operating_system(domain, place, &mut guest)?;
    devices(domain, place, &mut guest)?;
    other_notes(domain, &mut guest);
    Ok(guest)
}

fn origin(domain: Node<'_, '_>) -> Origin {
    match domain.attr("type").unwrap_or_default() {
        "kvm" | "qemu" | "hvf" => Origin::Kvm,
        "xen" => Origin::Xen,
        "vmware" | "esx" | "gsx" => Origin::Vmware,
        "vbox" => Origin::VirtualBox,
        "hyperv" => Origin::HyperV,
        "physical" => Origin::Physical,
        _ => Origin::Unknown,
    }
}

/// libosinfo's id (`http://debian.org/debian/12`), which tools put into the metadata.
fn os_hint(domain: Node<'_, '_>) -> Option<String> {
    let metadata = domain.one("metadata")?;
    let os = metadata.descendants().find(|node| node.is("os") && node.attr("id").is_some())?;
    os.attr("id").map(str::to_owned)
}

fn memory(domain: Node<'_, '_>) -> Result<Option<u64>> {
    let Some(node) = domain.one("memory") else { return Ok(None) };
    let (number, unit) = (node.words().unwrap_or_default(), node.attr("unit").unwrap_or("KiB"));
    let bytes =
        number.parse::<u64>().ok().zip(units::of_libvirt(unit)).and_then(|(n, unit)| n.checked_mul(unit));
    bytes.map(Some).ok_or_else(|| Error::invalid(format!("the domain's memory '{number}' {unit} is no size")))
}

fn cpus(domain: Node<'_, '_>, guest: &mut Guest) {
    let count = domain.text_of("vcpu").and_then(|text| text.parse::<u32>().ok()).filter(|count| *count > 0);
    guest.cpus.count = count;
    let Some(cpu) = domain.one("cpu") else { return };
    guest.cpus.model = cpu.text_of("model").map(str::to_owned);
    let Some(topology) = cpu.one("topology") else { return };
    let part = |name: &str| topology.attr(name).map_or(Some(1), |text| text.parse::<u32>().ok());
    // What lies between sockets and cores counts as sockets.
    let sockets = part("sockets").zip(part("dies")).zip(part("clusters"));
    let sockets =
        sockets.and_then(|((sockets, dies), clusters)| sockets.checked_mul(dies)?.checked_mul(clusters));
    if let (Some(sockets), Some(cores), Some(threads)) = (sockets, part("cores"), part("threads")) {
        let product = sockets.checked_mul(cores).and_then(|product| product.checked_mul(threads));
        guest.cpus.topology =
            product.filter(|product| Some(*product) == count).map(|_| (sockets, cores, threads));
    }
}

fn operating_system(domain: Node<'_, '_>, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    let Some(os) = domain.one("os") else { return Ok(()) };
    guest.architecture = os.one("type").and_then(|kind| kind.attr("arch")).map(str::to_owned);
    let kind = os.text_of("type").unwrap_or("hvm");
    firmware(os, kind, place, guest);
    if let Some(kernel) = os.text_of("kernel") {
        let file = |name: &str, notes: &mut Vec<String>| place.file(name, notes);
        guest.direct_boot = Some(DirectBoot {
            kernel: file(kernel, &mut guest.notes)?,
            initrd: os.text_of("initrd").map(|name| file(name, &mut guest.notes)).transpose()?,
            cmdline: os.text_of("cmdline").unwrap_or_default().to_owned(),
        });
    }
    if domain.one("bootloader").is_some() {
        guest.notes.push(
            "The guest is started by a boot loader on its host (pygrub); a boot loader of its own may be missing.".to_owned(),
        );
    }
    if kind == "exe" {
        return Err(Error::unsupported("the domain is a container, not a machine"));
    }
    Ok(())
}

fn firmware(os: Node<'_, '_>, kind: &str, place: &Place<'_>, guest: &mut Guest) {
    let loader = os.one("loader");
    let path = loader.and_then(|loader| loader.words()).unwrap_or_default().to_ascii_lowercase();
    let pflash = loader.and_then(|loader| loader.attr("type")) == Some("pflash");
    let efi_name = ["ovmf", "edk2", "aavmf", "efi"].iter().any(|word| path.contains(word));
    let is_pc = guest.architecture.as_deref().is_none_or(|arch| matches!(arch, "x86_64" | "i686"));
    guest.firmware.kind = match os.attr("firmware") {
        Some("efi") => Some(FirmwareKind::Uefi),
        Some("bios") => Some(FirmwareKind::Bios),
        _ if pflash || efi_name => Some(FirmwareKind::Uefi),
        _ if kind == "hvm" && is_pc => Some(FirmwareKind::Bios),
        _ => None,
    };
    if guest.firmware.kind != Some(FirmwareKind::Uefi) {
        return;
    }
    let feature =
        |node: Node<'_, '_>| node.attr("name") == Some("secure-boot") && node.attr("enabled") == Some("yes");
    let asked = os.one("firmware").is_some_and(|firmware| firmware.all("feature").any(feature));
    guest.firmware.secure_boot = asked || loader.and_then(|loader| loader.attr("secure")) == Some("yes");
    let nvram = os.one("nvram");
    let nvram = nvram.and_then(|node| node.words().or_else(|| node.one("source")?.attr("file")));
    let nvram = nvram.and_then(|name| place.side_file(name, "variable store", &mut guest.notes));
    guest.firmware.nvram = nvram.map(Into::into);
}

fn devices(domain: Node<'_, '_>, place: &Place<'_>, guest: &mut Guest) -> Result<()> {
    let Some(devices) = domain.one("devices") else { return Ok(()) };
    check_drives(devices.all("disk").count())?;
    for node in devices.all("disk") {
        disk::read(node, devices, place, guest)?;
    }
    // Per-device boot orders are among all devices; only those of disks count here.
    let mut orders: Vec<u32> = guest.disks.iter().filter_map(|disk| disk.boot_order).collect();
    orders.sort_unstable();
    for disk in &mut guest.disks {
        let place = disk.boot_order.and_then(|order| orders.iter().position(|other| *other == order));
        disk.boot_order = place.and_then(|place| u32::try_from(place + 1).ok());
    }
    names::assign(&mut guest.disks);
    guest.disks.sort_by_key(|disk| disk.boot_order.unwrap_or(u32::MAX));
    guest.nics = devices.all("interface").map(nic).collect();
    guest.sound = devices.one("sound").and_then(|sound| sound.attr("model")).map(str::to_owned);
    guest.serial_ports = u32::try_from(devices.all("serial").count()).unwrap_or_default();
    guest.tpm = devices.one("tpm").is_some();
    guest.display = display(devices);
    Ok(())
}

fn display(devices: Node<'_, '_>) -> Option<Display> {
    let mut known = devices.all("graphics").filter_map(|node| node.attr("type"));
    let protocol = known.find(|kind| matches!(*kind, "vnc" | "spice"))?.to_owned();
    let model = devices.at(&["video", "model"]);
    let kib: Option<u64> = model.and_then(|model| model.attr("vram")).and_then(|text| text.parse().ok());
    Some(Display { protocol, video_bytes: kib.and_then(|kib| kib.checked_mul(1024)) })
}

fn nic(node: Node<'_, '_>) -> Nic {
    let source = node.one("source");
    let of_source = |name: &str| source.and_then(|source| source.attr(name)).map(str::to_owned);
    let (network, network_name) = match node.attr("type").unwrap_or_default() {
        "bridge" => (Network::Bridge, of_source("bridge")),
        "direct" => (Network::Bridge, of_source("dev")),
        "user" => (Network::Nat, None),
        "internal" => (Network::HostOnly, of_source("name")),
        _ => (Network::Managed, of_source("network").or_else(|| of_source("name"))),
    };
    Nic {
        mac: node.one("mac").and_then(|mac| mac.attr("address")).and_then(words::mac),
        model: node.one("model").and_then(|model| model.attr("type")).map(str::to_owned),
        network,
        network_name,
        slot: None,
    }
}

/// What is lost or needs a person.
fn other_notes(domain: Node<'_, '_>, guest: &mut Guest) {
    let devices = domain.one("devices");
    let count = |name: &str| devices.map_or(0, |devices| devices.all(name).count());
    for (name, what) in [
        ("hostdev", "devices of the host that are passed through"),
        ("filesystem", "shared folders"),
        ("shmem", "shared memory"),
        ("redirdev", "redirected USB devices"),
    ] {
        if count(name) > 0 {
            guest.notes.push(format!("The domain has {what} ({name}); they stay behind."));
        }
    }
    if domain.one("launchSecurity").is_some() {
        guest
            .notes
            .push("The domain's memory is encrypted (launchSecurity); that is not carried over.".to_owned());
    }
    if guest.tpm {
        guest.notes.push("The domain has a TPM; the keys in it stay behind.".to_owned());
    }
    if domain.at(&["os", "boot"]).is_some_and(|boot| boot.attr("dev") == Some("network")) {
        guest.notes.push("The domain starts from the network first.".to_owned());
    }
}

#[cfg(test)]
mod tests;
