//! The description of a machine as a JSON document, and back.
//!
//! What is not known is left out. Readers ignore members that they do not know, so that the document can grow; the number of
//! its version changes only when an old reader would misunderstand it.

use block::{Error, Result, ResultExt as _};
use serde_json::{Map, Value, json};

use super::{
    Bus, Cpus, DirectBoot, Disk, DiskImage, Display, Firmware, FirmwareKind, Guest, Network, Nic, Origin,
    Removable, RemovableKind,
};

/// What stands in `format`.
const FORMAT: &str = "vimg-machine";
/// What stands in `version`.
const VERSION: u64 = 1;

const ORIGINS: [Origin; 7] = [
    Origin::Unknown,
    Origin::Vmware,
    Origin::VirtualBox,
    Origin::Xen,
    Origin::HyperV,
    Origin::Kvm,
    Origin::Physical,
];
const BUSES: [Bus; 9] = [
    Bus::Ide,
    Bus::Sata,
    Bus::Scsi,
    Bus::Nvme,
    Bus::Virtio,
    Bus::VirtioScsi,
    Bus::Xen,
    Bus::Usb,
    Bus::Floppy,
];
const NETWORKS: [(Network, &str); 4] = [
    (Network::Managed, "managed"),
    (Network::Bridge, "bridge"),
    (Network::Nat, "nat"),
    (Network::HostOnly, "host-only"),
];

/// A machine as a document; see `docs/v2v-targets.md` for its members.
///
/// ```text
/// {"format": "vimg-machine", "version": 1, "name": "web", "origin": "vmware", "memory-bytes": 2147483648,
///  "cpus": {"count": 2}, "firmware": {"kind": "uefi"}, "disks": [{"id": "scsi0:0", "image": {"name": "web.vmdk"}}]}
/// ```
pub fn document(guest: &Guest) -> Value {
    let Guest { cpus, firmware, .. } = guest;
    let mut top = Members::default();
    top.put("format", FORMAT);
    top.put("version", VERSION);
    top.put("name", guest.name.as_str());
    top.put("origin", guest.origin.name());
    top.maybe("uuid", guest.uuid.as_deref());
    top.maybe("genid", guest.genid.as_deref());
    top.maybe("description", guest.description.as_deref());
    top.maybe("os-hint", guest.os_hint.as_deref());
    top.maybe("architecture", guest.architecture.as_deref());
    top.maybe("memory-bytes", guest.memory_bytes);
    top.put("cpus", cpus_document(cpus));
    top.put("firmware", firmware_document(firmware));
    top.put("disks", list(&guest.disks, disk_document));
    top.put("removables", list(&guest.removables, removable_document));
    top.put("nics", list(&guest.nics, nic_document));
    top.maybe("display", guest.display.as_ref().map(display_document));
    top.maybe("sound", guest.sound.as_deref());
    top.put("serial-ports", guest.serial_ports);
    top.put("local-time", guest.local_time);
    top.put("tpm", guest.tpm);
    top.maybe("direct-boot", guest.direct_boot.as_ref().map(direct_boot_document));
    top.put("notes", guest.notes.clone());
    top.into()
}

/// The members of an object, in the order in which they are put.
#[derive(Default)]
struct Members(Map<String, Value>);

impl Members {
    fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }

    fn maybe(&mut self, name: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(name, value);
        }
    }
}

impl From<Members> for Value {
    fn from(members: Members) -> Self {
        Self::Object(members.0)
    }
}

fn list<T>(items: &[T], each: impl Fn(&T) -> Value) -> Value {
    items.iter().map(each).collect()
}

fn cpus_document(cpus: &Cpus) -> Value {
    let mut members = Members::default();
    members.maybe("count", cpus.count);
    let topology = cpus.topology;
    members.maybe(
        "topology",
        topology
            .map(|(sockets, cores, threads)| json!({"sockets": sockets, "cores": cores, "threads": threads})),
    );
    members.maybe("model", cpus.model.as_deref());
    members.into()
}

fn firmware_document(firmware: &Firmware) -> Value {
    let mut members = Members::default();
    members.maybe("kind", firmware.kind.map(FirmwareKind::name));
    members.put("secure-boot", firmware.secure_boot);
    members.maybe("nvram", firmware.nvram.as_ref().map(|path| path.to_string_lossy().into_owned()));
    members.into()
}

fn disk_document(disk: &Disk) -> Value {
    let mut members = Members::default();
    members.put("id", disk.id.as_str());
    members.maybe("bus", disk.bus.map(Bus::name));
    members.maybe("controller", disk.controller.as_deref());
    members.maybe("guest-name", disk.guest_name.as_deref());
    let mut image = Members::default();
    match &disk.image {
        DiskImage::Name { name, format } => {
            image.put("name", name.as_str());
            image.maybe("format", format.as_deref());
        }
        DiskImage::Empty { size_bytes } => image.put("empty-bytes", *size_bytes),
    }
    members.put("image", image);
    members.maybe("boot-order", disk.boot_order);
    members.put("read-only", disk.read_only);
    members.maybe("serial", disk.serial.as_deref());
    members.maybe("slot", disk.slot.map(|(controller, number)| json!([controller, number])));
    if !disk.identities.is_empty() {
        members.put("identities", disk.identities.clone());
    }
    members.maybe("capacity-bytes", disk.capacity_bytes);
    members.into()
}

fn removable_document(removable: &Removable) -> Value {
    let mut members = Members::default();
    let kind = match removable.kind {
        RemovableKind::Cdrom => "cdrom",
        RemovableKind::Floppy => "floppy",
    };
    members.put("kind", kind);
    members.maybe("bus", removable.bus.map(Bus::name));
    members.maybe("medium", removable.medium.as_deref());
    members.into()
}

fn nic_document(nic: &Nic) -> Value {
    let mut members = Members::default();
    members.maybe("mac", nic.mac.as_deref());
    members.maybe("model", nic.model.as_deref());
    let network = NETWORKS.iter().find(|(network, _)| *network == nic.network).map(|(_, name)| *name);
    members.maybe("network", network);
    members.maybe("network-name", nic.network_name.as_deref());
    members.maybe("slot", nic.slot);
    members.into()
}

fn display_document(display: &Display) -> Value {
    let mut members = Members::default();
    members.put("protocol", display.protocol.as_str());
    members.maybe("video-bytes", display.video_bytes);
    members.into()
}

fn direct_boot_document(boot: &DirectBoot) -> Value {
    let mut members = Members::default();
    members.put("kernel", boot.kernel.as_str());
    members.maybe("initrd", boot.initrd.as_deref());
    members.put("cmdline", boot.cmdline.as_str());
    members.into()
}

/// Reads what [`document`] has written.
///
/// # Errors
/// `Invalid`: it is not such a document, or a member is not what it should be, which is named; `Unsupported`: it is of a
/// later version.
pub fn from_document(value: &Value) -> Result<Guest> {
    let top = Object::of(value)?;
    if top.text("format")?.as_deref() != Some(FORMAT) {
        return Err(Error::invalid(format!("not the description of a machine (\"format\": \"{FORMAT}\")")));
    }
    match top.number("version")? {
        Some(VERSION) => {}
        Some(later) => {
            return Err(Error::unsupported(format!(
                "a description of version {later}, of which {VERSION} is known"
            )));
        }
        None => return Err(Error::invalid("a description without a version")),
    }
    let object = |name| top.get(name).map(|value| Object::of(value).context(|| name.to_owned())).transpose();
    Ok(Guest {
        name: top.text("name")?.unwrap_or_default(),
        origin: top
            .word("origin", |name| ORIGINS.into_iter().find(|origin| origin.name() == name))?
            .unwrap_or_default(),
        uuid: top.text("uuid")?,
        genid: top.text("genid")?,
        description: top.text("description")?,
        os_hint: top.text("os-hint")?,
        architecture: top.text("architecture")?,
        memory_bytes: top.number("memory-bytes")?,
        cpus: object("cpus")?.map(|cpus| read_cpus(&cpus)).transpose()?.unwrap_or_default(),
        firmware: object("firmware")?
            .map(|firmware| read_firmware(&firmware))
            .transpose()?
            .unwrap_or_default(),
        disks: top.list("disks", read_disk)?,
        removables: top.list("removables", read_removable)?,
        nics: top.list("nics", read_nic)?,
        display: object("display")?.map(|display| read_display(&display)).transpose()?,
        sound: top.text("sound")?,
        serial_ports: top.small("serial-ports")?.unwrap_or_default(),
        local_time: top.flag("local-time")?,
        tpm: top.flag("tpm")?,
        direct_boot: object("direct-boot")?.map(|boot| read_direct_boot(&boot)).transpose()?,
        notes: top.texts("notes")?,
    })
}

/// An object whose members are asked for by name and type.
struct Object<'a>(&'a Map<String, Value>);

impl<'a> Object<'a> {
    fn of(value: &'a Value) -> Result<Self> {
        value.as_object().map(Self).ok_or_else(|| Error::invalid("not an object"))
    }

    /// A member; `null` counts as absent.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, name: &str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let wrong = || Error::invalid(format!("'{name}' is not {what}"));
        self.get(name).map(|value| read(value).ok_or_else(wrong)).transpose()
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        self.typed(name, "a text", |value| value.as_str().map(str::to_owned))
    }

    fn needed(&self, name: &str) -> Result<String> {
        self.text(name)?.ok_or_else(|| Error::invalid(format!("'{name}' is missing")))
    }

    fn number(&self, name: &str) -> Result<Option<u64>> {
        self.typed(name, "a number from 0", Value::as_u64)
    }

    fn small(&self, name: &str) -> Result<Option<u32>> {
        self.typed(name, "a number from 0 to 4294967295", |value| u32::try_from(value.as_u64()?).ok())
    }

    fn flag(&self, name: &str) -> Result<bool> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or_default())
    }

    fn word<T>(&self, name: &str, read: impl Fn(&str) -> Option<T>) -> Result<Option<T>> {
        self.typed(name, "one of the words that are known", |value| read(value.as_str()?))
    }

    fn texts(&self, name: &str) -> Result<Vec<String>> {
        let read =
            |value: &Value| value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect();
        Ok(self.typed(name, "a list of texts", read)?.unwrap_or_default())
    }

    fn list<T>(&self, name: &str, each: impl Fn(&Object<'_>) -> Result<T>) -> Result<Vec<T>> {
        let items = self.typed(name, "a list", Value::as_array)?.into_iter().flatten();
        let read = |(index, value): (usize, &Value)| {
            Object::of(value).and_then(|object| each(&object)).context(|| format!("{name}[{index}]"))
        };
        items.enumerate().map(read).collect()
    }

    fn bus(&self) -> Result<Option<Bus>> {
        self.word("bus", |name| BUSES.into_iter().find(|bus| bus.name() == name))
    }
}

fn read_cpus(cpus: &Object<'_>) -> Result<Cpus> {
    let topology = match cpus.get("topology") {
        Some(value) => {
            let object = Object::of(value)?;
            let part = |name| object.small(name).map(|number| number.unwrap_or(1));
            Some((part("sockets")?, part("cores")?, part("threads")?))
        }
        None => None,
    };
    Ok(Cpus { count: cpus.small("count")?, topology, model: cpus.text("model")? })
}

fn read_firmware(firmware: &Object<'_>) -> Result<Firmware> {
    let kinds = [FirmwareKind::Bios, FirmwareKind::Uefi];
    Ok(Firmware {
        kind: firmware.word("kind", |name| kinds.into_iter().find(|kind| kind.name() == name))?,
        secure_boot: firmware.flag("secure-boot")?,
        nvram: firmware.text("nvram")?.map(Into::into),
    })
}

fn read_disk(disk: &Object<'_>) -> Result<Disk> {
    let image = disk.get("image").ok_or_else(|| Error::invalid("'image' is missing"))?;
    let image = Object::of(image).context(|| "image".to_owned())?;
    let image = match image.number("empty-bytes")? {
        Some(size_bytes) => DiskImage::Empty { size_bytes },
        None => DiskImage::Name { name: image.needed("name")?, format: image.text("format")? },
    };
    Ok(Disk {
        id: disk.text("id")?.unwrap_or_default(),
        bus: disk.bus()?,
        controller: disk.text("controller")?,
        guest_name: disk.text("guest-name")?,
        image,
        boot_order: disk.small("boot-order")?,
        read_only: disk.flag("read-only")?,
        serial: disk.text("serial")?,
        slot: disk.typed("slot", "two numbers", read_slot)?,
        identities: disk.texts("identities")?,
        capacity_bytes: disk.number("capacity-bytes")?,
    })
}

fn read_slot(value: &Value) -> Option<(u32, u32)> {
    let [controller, number] = value.as_array()?.as_slice() else { return None };
    let small = |value: &Value| u32::try_from(value.as_u64()?).ok();
    Some((small(controller)?, small(number)?))
}

fn read_removable(removable: &Object<'_>) -> Result<Removable> {
    let kind = removable.word("kind", |name| match name {
        "cdrom" => Some(RemovableKind::Cdrom),
        "floppy" => Some(RemovableKind::Floppy),
        _ => None,
    })?;
    let kind = kind.ok_or_else(|| Error::invalid("'kind' is missing"))?;
    Ok(Removable { kind, bus: removable.bus()?, medium: removable.text("medium")? })
}

fn read_nic(nic: &Object<'_>) -> Result<Nic> {
    let find = |name: &str| NETWORKS.iter().find(|(_, known)| *known == name).map(|(network, _)| *network);
    Ok(Nic {
        mac: nic.text("mac")?,
        model: nic.text("model")?,
        network: nic.word("network", find)?.unwrap_or_default(),
        network_name: nic.text("network-name")?,
        slot: nic.small("slot")?,
    })
}

fn read_display(display: &Object<'_>) -> Result<Display> {
    Ok(Display { protocol: display.needed("protocol")?, video_bytes: display.number("video-bytes")? })
}

fn read_direct_boot(boot: &Object<'_>) -> Result<DirectBoot> {
    Ok(DirectBoot {
        kernel: boot.needed("kernel")?,
        initrd: boot.text("initrd")?,
        cmdline: boot.text("cmdline")?.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Guest {
        Guest {
            name: "web <1>".to_owned(),
            origin: Origin::Vmware,
            uuid: Some("564d0000-0000-4000-8000-00000000cafe".to_owned()),
            genid: Some("564d0000-0000-4000-8000-00000000beef".to_owned()),
            description: Some("two\nlines".to_owned()),
            os_hint: Some("debian12-64".to_owned()),
            architecture: Some("x86_64".to_owned()),
            memory_bytes: Some(3 << 30),
            cpus: Cpus { count: Some(4), topology: Some((1, 2, 2)), model: Some("Skylake".to_owned()) },
            firmware: Firmware {
                kind: Some(FirmwareKind::Uefi),
                secure_boot: true,
                nvram: Some("/x/y.nvram".into()),
            },
            disks: vec![
                Disk {
                    id: "scsi0:0".to_owned(),
                    bus: Some(Bus::Scsi),
                    controller: Some("pvscsi".to_owned()),
                    guest_name: Some("sda".to_owned()),
                    image: DiskImage::Name { name: "a.vmdk".to_owned(), format: Some("vmdk".to_owned()) },
                    boot_order: Some(2),
                    read_only: true,
                    serial: Some("S1".to_owned()),
                    slot: Some((0, 3)),
                    identities: vec!["wwn-0x5".to_owned()],
                    capacity_bytes: Some(1 << 40),
                },
                Disk::new("", DiskImage::Empty { size_bytes: u64::MAX }),
            ],
            removables: vec![
                Removable {
                    kind: RemovableKind::Cdrom,
                    bus: Some(Bus::Ide),
                    medium: Some("x.iso".to_owned()),
                },
                Removable { kind: RemovableKind::Floppy, bus: None, medium: None },
            ],
            nics: NETWORKS
                .iter()
                .map(|(network, name)| Nic {
                    mac: Some("00:0c:29:00:00:01".to_owned()),
                    model: Some("vmxnet3".to_owned()),
                    network: *network,
                    network_name: Some((*name).to_owned()),
                    slot: Some(192),
                })
                .collect(),
            display: Some(Display { protocol: "vnc".to_owned(), video_bytes: Some(16 << 20) }),
            sound: Some("ac97".to_owned()),
            serial_ports: 2,
            local_time: true,
            tpm: true,
            direct_boot: Some(DirectBoot {
                kernel: "/boot/k".to_owned(),
                initrd: Some("/boot/i".to_owned()),
                cmdline: "root=/dev/xvda1".to_owned(),
            }),
            notes: vec!["Something is lost.".to_owned()],
        }
    }

    #[test]
    fn what_is_written_is_read_back_equal() {
        for guest in [Guest::default(), full()] {
            let text = serde_json::to_string_pretty(&document(&guest)).unwrap();
            assert_eq!(from_document(&serde_json::from_str(&text).unwrap()).unwrap(), guest);
        }
        for origin in ORIGINS {
            let guest = Guest { origin, ..Guest::default() };
            assert_eq!(from_document(&document(&guest)).unwrap(), guest);
        }
        for bus in BUSES {
            let mut guest = full();
            guest.disks[0].bus = Some(bus);
            assert_eq!(from_document(&document(&guest)).unwrap(), guest);
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut value = document(&full());
            change(&mut value);
            from_document(&value).unwrap_err().to_string()
        };
        assert_eq!(refused(&|value| value["disks"][1]["image"] = json!({})), "disks[1]: 'name' is missing");
        assert_eq!(
            refused(&|value| value["nics"][0]["slot"] = json!(-1)),
            "nics[0]: 'slot' is not a number from 0 to 4294967295"
        );
        assert_eq!(
            refused(&|value| value["version"] = json!(2)),
            "a description of version 2, of which 1 is known"
        );
        assert!(refused(&|value| value["format"] = json!("x")).starts_with("not the description"));
        assert_eq!(
            refused(&|value| value["origin"] = json!("x")),
            "'origin' is not one of the words that are known"
        );
        from_document(&json!([])).unwrap_err();
    }

    #[test]
    fn members_of_a_later_version_of_the_same_number_are_ignored() {
        let mut value = document(&full());
        value["colour"] = json!("red");
        value["disks"][0]["colour"] = json!(["red"]);
        assert_eq!(from_document(&value).unwrap(), full());
    }
}
