//! The Open Virtualization Format (DMTF DSP0243 1.1.0): the description of a machine for VMware and VirtualBox.

use super::machine::{Machine, MachineDisk};
use super::xml::Xml;
use crate::guest::{Bus, FirmwareKind, RemovableKind};

const OVF: &str = "http://schemas.dmtf.org/ovf/envelope/1";
const RASD: &str = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData";
const VSSD: &str = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData";
const VMW: &str = "http://www.vmware.com/schema/ovf";
const VBOX: &str = "http://www.virtualbox.org/ovf/machine";
/// What the disks are (DSP0243, section 9.1): the address of VMware's specification.
const STREAM_OPTIMIZED: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// For whom the description is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Product {
    /// VMware, with this version of virtual hardware (`vmx-14`: ESXi 6.7 and later).
    Vmware {
        /// The version.
        hardware: String,
        /// Paravirtual devices (pvscsi, vmxnet3), which every Linux of the last decade has the drivers of; otherwise the
        /// ones that everything has (lsilogic, e1000).
        paravirtual: bool,
    },
    /// VirtualBox.
    VirtualBox,
}

impl Default for Product {
    fn default() -> Self {
        Self::Vmware { hardware: "vmx-14".to_owned(), paravirtual: true }
    }
}

/// A disk's file in the package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
}

/// The kinds of devices (CIM's `ResourceType`).
mod kind {
    pub(super) const CPU: u32 = 3;
    pub(super) const MEMORY: u32 = 4;
    pub(super) const IDE: u32 = 5;
    pub(super) const SCSI: u32 = 6;
    pub(super) const ETHERNET: u32 = 10;
    pub(super) const FLOPPY: u32 = 14;
    pub(super) const CDROM: u32 = 15;
    pub(super) const DISK: u32 = 17;
    pub(super) const SATA: u32 = 20;
}

/// The envelope. `files` are those of the machine's disks, in their order.
pub fn envelope(machine: &Machine, product: &Product, files: &[DiskFile]) -> String {
    let mut xml = Xml::declared();
    let namespaces = [
        ("xmlns", OVF),
        ("xmlns:ovf", OVF),
        ("xmlns:rasd", RASD),
        ("xmlns:vssd", VSSD),
        ("xmlns:vmw", VMW),
        ("xmlns:vbox", VBOX),
        ("xmlns:xsi", "http://www.w3.org/2001/XMLSchema-instance"),
    ];
    xml.element("Envelope", &namespaces, |xml| {
        references(xml, files);
        disk_section(xml, machine);
        network_section(xml, machine);
        xml.element("VirtualSystem", &[("ovf:id", &machine.name)], |xml| system(xml, machine, product));
    });
    xml.finish()
}

fn references(xml: &mut Xml, files: &[DiskFile]) {
    xml.element("References", &[], |xml| {
        for (number, file) in (1..).zip(files) {
            let id = format!("file{number}");
            xml.leaf(
                "File",
                &[("ovf:href", &file.name), ("ovf:id", &id), ("ovf:size", &file.len.to_string())],
            );
        }
    });
}

fn disk_section(xml: &mut Xml, machine: &Machine) {
    xml.element("DiskSection", &[], |xml| {
        xml.text("Info", &[], "The hard disks");
        for (number, disk) in (1..).zip(&machine.disks) {
            let (id, file) = (format!("vmdisk{number}"), format!("file{number}"));
            let attributes = [
                ("ovf:capacity", &*disk.size_bytes.to_string()),
                ("ovf:capacityAllocationUnits", "byte"),
                ("ovf:diskId", &id),
                ("ovf:fileRef", &file),
                ("ovf:format", STREAM_OPTIMIZED),
            ];
            xml.leaf("Disk", &attributes);
        }
    });
}

/// The names of the networks, each once.
fn network_names(machine: &Machine) -> Vec<&str> {
    let mut names: Vec<&str> = machine.nics.iter().map(|nic| nic.connection.name()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn network_section(xml: &mut Xml, machine: &Machine) {
    xml.element("NetworkSection", &[], |xml| {
        xml.text("Info", &[], "The networks");
        for name in network_names(machine) {
            xml.element("Network", &[("ovf:name", name)], |xml| xml.text("Description", &[], name));
        }
    });
}

fn system(xml: &mut Xml, machine: &Machine, product: &Product) {
    xml.text("Info", &[], "A virtual machine");
    xml.text("Name", &[], &machine.name);
    let (number, description, vmware, virtual_box) = machine.os.ovf();
    let attributes = [("ovf:id", &*number.to_string()), ("vmw:osType", vmware)];
    xml.element("OperatingSystemSection", &attributes, |xml| {
        xml.text("Info", &[], "The guest operating system");
        let words = if machine.os.product.is_empty() { description } else { &machine.os.product };
        xml.text("Description", &[], words);
        if *product == Product::VirtualBox {
            xml.text("vbox:OSType", &[("ovf:required", "false")], virtual_box);
        }
    });
    if let Some(text) = &machine.description {
        xml.element("AnnotationSection", &[], |xml| {
            xml.text("Info", &[], "What is known about it");
            xml.text("Annotation", &[], text);
        });
    }
    xml.element("VirtualHardwareSection", &[], |xml| hardware(xml, machine, product));
}

fn hardware(xml: &mut Xml, machine: &Machine, product: &Product) {
    xml.text("Info", &[], "Virtual hardware");
    let system = match product {
        Product::Vmware { hardware, .. } => hardware,
        Product::VirtualBox => "virtualbox-2.2",
    };
    xml.element("System", &[], |xml| {
        xml.text("vssd:ElementName", &[], "Virtual Hardware Family");
        xml.text("vssd:InstanceID", &[], "0");
        xml.text("vssd:VirtualSystemIdentifier", &[], &machine.name);
        xml.text("vssd:VirtualSystemType", &[], system);
    });
    let mut items = Items { xml, next: 1 };
    items.processors_and_memory(machine);
    items.storage(machine, product);
    items.network(machine, product);
    if machine.firmware == FirmwareKind::Uefi && *product != Product::VirtualBox {
        let config = |xml: &mut Xml, key, value| {
            xml.leaf("vmw:Config", &[("ovf:required", "false"), ("vmw:key", key), ("vmw:value", value)]);
        };
        config(xml, "firmware", "efi");
        if machine.secure_boot {
            config(xml, "bootOptions.efiSecureBootEnabled", "true");
        }
    }
}

/// Items of virtual hardware, which are numbered.
struct Items<'a> {
    xml: &'a mut Xml,
    next: u32,
}

/// The children of an item, apart from its number and type.
type Children<'a> = &'a [(&'a str, &'a str)];

impl Items<'_> {
    /// An item; returns its number. Children stand in the order of the alphabet (DSP0243, section 8.3).
    fn item(&mut self, kind: u32, name: &str, children: Children<'_>) -> String {
        let number = self.next.to_string();
        self.next += 1;
        let kind = kind.to_string();
        let mut all =
            vec![("ElementName", name), ("InstanceID", number.as_str()), ("ResourceType", kind.as_str())];
        all.extend(children);
        all.sort_unstable();
        self.xml.element("Item", &[], |xml| {
            for (child, value) in all {
                xml.text(&format!("rasd:{child}"), &[], value);
            }
        });
        number
    }

    fn processors_and_memory(&mut self, machine: &Machine) {
        let (cpus, memory) = (machine.cpus.to_string(), machine.memory_mib.to_string());
        let units = [("AllocationUnits", "hertz * 10^6"), ("VirtualQuantity", cpus.as_str())];
        self.item(kind::CPU, &format!("{cpus} virtual CPU(s)"), &units);
        let units = [("AllocationUnits", "byte * 2^20"), ("VirtualQuantity", memory.as_str())];
        self.item(kind::MEMORY, &format!("{memory}MB of memory"), &units);
    }

    /// Controllers, each followed by what is attached to it.
    fn storage(&mut self, machine: &Machine, product: &Product) {
        let on = |class: Class| -> Vec<(usize, &MachineDisk)> {
            let of = |(_, disk): &(usize, &MachineDisk)| Class::of(disk.bus, product) == class;
            (1..).zip(&machine.disks).filter(of).collect()
        };
        for (address, disks) in on(Class::Scsi).chunks(SCSI_UNITS).enumerate() {
            let subtype = match product {
                Product::Vmware { paravirtual: true, .. } => "VirtualSCSI",
                _ => "lsilogic",
            };
            let parent = self.controller(kind::SCSI, "SCSI Controller", address, Some(subtype));
            self.disks(&parent, disks);
        }
        let drives = |bus| {
            machine
                .drives
                .iter()
                .filter(move |drive| drive.kind == RemovableKind::Cdrom && (drive.bus == Bus::Ide) == bus)
        };
        let ahci = if *product == Product::VirtualBox { "AHCI" } else { "vmware.sata.ahci" };
        let mut cdroms = drives(false).count();
        let sata = on(Class::Sata);
        let controllers = sata.chunks(SATA_UNITS).chain((sata.is_empty() && cdroms > 0).then_some(&[][..]));
        for (address, disks) in controllers.enumerate() {
            let parent = self.controller(kind::SATA, "SATA Controller", address, Some(ahci));
            self.disks(&parent, disks);
            for unit in disks.len()..disks.len() + std::mem::take(&mut cdroms) {
                self.cdrom(&parent, unit);
            }
        }
        self.ide(&on(Class::Ide), drives(true).count());
        for (unit, _) in machine.drives.iter().filter(|drive| drive.kind == RemovableKind::Floppy).enumerate()
        {
            let unit = unit.to_string();
            self.item(
                kind::FLOPPY,
                "Floppy",
                &[("AddressOnParent", &unit), ("AutomaticAllocation", "false")],
            );
        }
    }

    /// Each cable of IDE is a controller here, with two units.
    fn ide(&mut self, disks: &[(usize, &MachineDisk)], cdroms: usize) {
        let mut cdroms = cdroms;
        let cables = (disks.len() + cdroms).div_ceil(2);
        for cable in 0..cables {
            let parent = self.controller(kind::IDE, "IDE Controller", cable, None);
            let here = disks.get(cable * 2..disks.len().min(cable * 2 + 2)).unwrap_or_default();
            self.disks(&parent, here);
            for unit in here.len()..2.min(here.len() + cdroms) {
                self.cdrom(&parent, unit);
                cdroms -= 1;
            }
        }
    }

    fn controller(&mut self, kind: u32, name: &str, address: usize, subtype: Option<&str>) -> String {
        let address = address.to_string();
        let mut children = vec![("Address", address.as_str())];
        children.extend(subtype.map(|subtype| ("ResourceSubType", subtype)));
        self.item(kind, &format!("{name} {address}"), &children)
    }

    fn disks(&mut self, parent: &str, disks: &[(usize, &MachineDisk)]) {
        for (unit, (number, _)) in disks.iter().enumerate() {
            let (unit, resource) = (unit.to_string(), format!("ovf:/disk/vmdisk{number}"));
            let children =
                [("AddressOnParent", unit.as_str()), ("HostResource", &resource), ("Parent", parent)];
            self.item(kind::DISK, &format!("Hard Disk {number}"), &children);
        }
    }

    fn cdrom(&mut self, parent: &str, unit: usize) {
        let unit = unit.to_string();
        let children =
            [("AddressOnParent", unit.as_str()), ("AutomaticAllocation", "false"), ("Parent", parent)];
        self.item(kind::CDROM, "CD/DVD Drive", &children);
    }

    fn network(&mut self, machine: &Machine, product: &Product) {
        let model = match product {
            Product::Vmware { paravirtual: true, .. } => "VmxNet3",
            _ => "E1000",
        };
        for (index, nic) in machine.nics.iter().enumerate() {
            let slot = (FIRST_NIC_UNIT + index).to_string();
            let mut children = vec![
                ("AddressOnParent", slot.as_str()),
                ("AutomaticAllocation", "true"),
                ("Connection", nic.connection.name()),
                ("ResourceSubType", model),
            ];
            children.extend(nic.mac.iter().map(|mac| ("Address", mac.as_str())));
            self.item(kind::ETHERNET, &format!("Network adapter {}", index + 1), &children);
        }
    }
}

/// Disks of a SCSI controller, and of a SATA controller.
const SCSI_UNITS: usize = 7;
const SATA_UNITS: usize = 6;
/// VMware's first network card.
const FIRST_NIC_UNIT: usize = 7;

/// What disks are attached to there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Scsi,
    Sata,
    Ide,
}

impl Class {
    /// Neither product has virtio (nor had the guest before it was converted).
    fn of(bus: Bus, product: &Product) -> Self {
        match (bus, product) {
            (Bus::Ide, _) => Self::Ide,
            (Bus::Sata, _) | (_, Product::VirtualBox) => Self::Sata,
            _ => Self::Scsi,
        }
    }
}
