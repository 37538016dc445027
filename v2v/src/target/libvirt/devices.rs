//! The devices of a domain.

use super::super::machine::{Drive, Machine, MachineDisk, MachineNic};
use super::super::xml::Xml;
use super::super::{Chipset, Connection};
use super::usb_model;
use crate::guest::{Bus, FirmwareKind, RemovableKind};

/// Disks of a SATA controller.
const SATA_UNITS: usize = 6;
/// Disks of a SCSI controller that has no more (parallel SCSI without the controller's own number).
const SCSI_UNITS: usize = 7;
/// Video memory in KiB, as much as a desktop takes.
const VIDEO_KIB: &str = "16384";

/// All devices; `paths` are those of the disks.
pub(super) fn all(xml: &mut Xml, machine: &Machine, paths: &[&str]) {
    for (disk, path) in machine.disks.iter().zip(paths) {
        self::disk(xml, disk, path);
    }
    for drive in &machine.drives {
        self::drive(xml, drive);
    }
    controllers(xml, machine);
    for nic in &machine.nics {
        self::nic(xml, nic);
    }
    consoles(xml, machine);
    xml.leaf("input", &[("type", "tablet"), ("bus", "usb")]);
    if machine.tpm {
        tpm(xml, machine);
    }
    screen(xml, machine);
    xml.leaf("memballoon", &[("model", "virtio")]);
    xml.element("rng", &[("model", "virtio")], |xml| {
        xml.text("backend", &[("model", "random")], "/dev/urandom");
    });
    xml.leaf("panic", &[("model", "isa")]);
}

fn disk(xml: &mut Xml, disk: &MachineDisk, path: &str) {
    xml.element("disk", &[("type", "file"), ("device", "disk")], |xml| {
        xml.leaf("driver", &[("name", "qemu"), ("type", &disk.format), ("discard", "unmap")]);
        xml.leaf("source", &[("file", path)]);
        xml.leaf("target", &[("dev", &disk.target), ("bus", bus_name(disk.bus))]);
        if disk.read_only {
            xml.leaf("readonly", &[]);
        }
        if let Some(serial) = &disk.serial {
            xml.text("serial", &[], serial);
        }
        xml.leaf("boot", &[("order", &disk.order.to_string())]);
        address(xml, disk.bus, disk.unit);
    });
}

fn drive(xml: &mut Xml, drive: &Drive) {
    let device = match drive.kind {
        RemovableKind::Cdrom => "cdrom",
        RemovableKind::Floppy => "floppy",
    };
    xml.element("disk", &[("type", "file"), ("device", device)], |xml| {
        xml.leaf("driver", &[("name", "qemu"), ("type", "raw")]);
        xml.leaf("target", &[("dev", &drive.target), ("bus", bus_name(drive.bus))]);
        if drive.kind == RemovableKind::Cdrom {
            xml.leaf("readonly", &[]);
        }
        address(xml, drive.bus, drive.unit);
    });
}

const fn bus_name(bus: Bus) -> &'static str {
    match bus {
        Bus::Ide => "ide",
        Bus::Sata => "sata",
        Bus::Floppy => "fdc",
        Bus::Scsi | Bus::VirtioScsi => "scsi",
        _ => "virtio",
    }
}

/// Where a disk is on its bus. virtio has no such thing.
fn address(xml: &mut Xml, bus: Bus, unit: usize) {
    let (controller, cable, target, unit) = match bus {
        Bus::Sata => (unit / SATA_UNITS, 0, 0, unit % SATA_UNITS),
        Bus::Ide => (0, unit / 2, 0, unit % 2),
        Bus::Floppy => (0, 0, 0, unit),
        // A target for every disk: guests look for all of those, but not for all units of one.
        Bus::VirtioScsi => (0, 0, unit, 0),
        Bus::Scsi => (unit / SCSI_UNITS, 0, 0, unit % SCSI_UNITS),
        _ => return,
    };
    let [controller, cable, target, unit] =
        [controller, cable, target, unit].map(|number| number.to_string());
    let place = [("controller", controller.as_str()), ("bus", &cable), ("target", &target), ("unit", &unit)];
    let mut attributes = vec![("type", "drive")];
    attributes.extend(place);
    xml.leaf("address", &attributes);
}

fn controllers(xml: &mut Xml, machine: &Machine) {
    let on = |bus| machine.disks.iter().filter(move |disk| disk.bus == bus);
    if on(Bus::VirtioScsi).next().is_some() {
        xml.leaf("controller", &[("type", "scsi"), ("index", "0"), ("model", "virtio-scsi")]);
    }
    let scsi: Vec<_> = on(Bus::Scsi).collect();
    for (index, disks) in scsi.chunks(SCSI_UNITS).enumerate() {
        let model = disks.first().and_then(|disk| disk.controller).unwrap_or("lsilogic");
        xml.leaf("controller", &[("type", "scsi"), ("index", &index.to_string()), ("model", model)]);
    }
    if let Some(model) = usb_model(machine.chipset) {
        xml.leaf("controller", &[("type", "usb"), ("index", "0"), ("model", model)]);
    }
    if machine.agent {
        xml.leaf("controller", &[("type", "virtio-serial"), ("index", "0")]);
    }
}

fn nic(xml: &mut Xml, nic: &MachineNic) {
    let (kind, source) = match &nic.connection {
        Connection::Network(name) => ("network", ("network", name.as_str())),
        Connection::Bridge(name) => ("bridge", ("bridge", name.as_str())),
    };
    xml.element("interface", &[("type", kind)], |xml| {
        if let Some(mac) = &nic.mac {
            xml.leaf("mac", &[("address", mac)]);
        }
        xml.leaf("source", &[source]);
        xml.leaf("model", &[("type", &nic.model)]);
    });
}

fn consoles(xml: &mut Xml, machine: &Machine) {
    for port in 0..machine.serial_ports {
        xml.element("serial", &[("type", "pty")], |xml| {
            xml.leaf("target", &[("port", &port.to_string())]);
        });
    }
    xml.element("console", &[("type", "pty")], |xml| {
        xml.leaf("target", &[("type", "serial"), ("port", "0")]);
    });
    if machine.agent {
        xml.element("channel", &[("type", "unix")], |xml| {
            xml.leaf("target", &[("type", "virtio"), ("name", "org.qemu.guest_agent.0")]);
        });
    }
}

/// The interface that a firmware of the time of the board knows.
fn tpm(xml: &mut Xml, machine: &Machine) {
    let modern = machine.chipset == Chipset::Q35 && machine.firmware == FirmwareKind::Uefi;
    xml.element("tpm", &[("model", if modern { "tpm-crb" } else { "tpm-tis" })], |xml| {
        xml.leaf("backend", &[("type", "emulator"), ("version", "2.0")]);
    });
}

fn screen(xml: &mut Xml, machine: &Machine) {
    xml.leaf("graphics", &[("type", &machine.graphics), ("port", "-1"), ("autoport", "yes")]);
    if let Some(model) = &machine.sound {
        xml.leaf("sound", &[("model", model)]);
    }
    xml.element("video", &[], |xml| {
        xml.leaf("model", &[("type", "vga"), ("vram", VIDEO_KIB), ("heads", "1"), ("primary", "yes")]);
    });
}
