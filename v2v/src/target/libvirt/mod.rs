//! libvirt's description of a domain (libvirt.org/formatdomain.html).
//!
//! The elements stand in the order in which libvirt itself prints them, so that `virsh dumpxml` differs from what is written
//! here only by what libvirt adds.

mod devices;

use block::Result;

use super::machine::{absolute, text_of};
use super::xml::Xml;
use super::{Chipset, CpuMode, Machine};
use crate::guest::FirmwareKind;

/// libosinfo's namespace.
const LIBOSINFO: &str = "http://libosinfo.org/xmlns/libvirt/domain/1.0";
/// As much memory as is counted in it, in KiB.
const KIB_PER_MIB: u64 = 1024;

/// The XML that `virsh define` takes.
///
/// # Errors
/// A path is relative, or cannot be written down.
pub fn domain(machine: &Machine) -> Result<String> {
    let paths = Paths::of(machine)?;
    let mut xml = Xml::default();
    let kind = if machine.emulated { "qemu" } else { "kvm" };
    xml.element("domain", &[("type", kind)], |xml| {
        general(xml, machine);
        os(xml, machine, &paths);
        features(xml, machine);
        cpu(xml, machine);
        clock(xml, machine);
        xml.text("on_poweroff", &[], "destroy");
        xml.text("on_reboot", &[], "restart");
        xml.text("on_crash", &[], "destroy");
        xml.element("devices", &[], |xml| devices::all(xml, machine, &paths.disks));
    });
    Ok(xml.finish())
}

/// The paths of a machine as text, so that nothing can fail while XML is written.
struct Paths<'a> {
    disks: Vec<&'a str>,
    /// Code and empty variables.
    loader: Option<(&'a str, &'a str)>,
    nvram: Option<&'a str>,
}

impl<'a> Paths<'a> {
    fn of(machine: &'a Machine) -> Result<Self> {
        Ok(Self {
            disks: machine.disks.iter().map(|disk| absolute(&disk.path)).collect::<Result<_>>()?,
            loader: match &machine.loader {
                Some(loader) => Some((absolute(&loader.code)?, text_of(&loader.variables)?)),
                None => None,
            },
            nvram: machine.nvram.as_deref().map(absolute).transpose()?,
        })
    }
}

fn general(xml: &mut Xml, machine: &Machine) {
    xml.text("name", &[], &machine.name);
    if let Some(uuid) = &machine.uuid {
        xml.text("uuid", &[], uuid);
    }
    if let Some(genid) = &machine.genid {
        xml.text("genid", &[], genid);
    }
    if let Some(description) = &machine.description {
        xml.text("description", &[], description);
    }
    if let Some(id) = machine.os.osinfo_id() {
        xml.element("metadata", &[], |xml| {
            xml.element("libosinfo:libosinfo", &[("xmlns:libosinfo", LIBOSINFO)], |xml| {
                xml.leaf("libosinfo:os", &[("id", &id)]);
            });
        });
    }
    let memory = machine.memory_mib.saturating_mul(KIB_PER_MIB).to_string();
    xml.text("memory", &[("unit", "KiB")], &memory);
    xml.text("currentMemory", &[("unit", "KiB")], &memory);
    xml.text("vcpu", &[], &machine.cpus.to_string());
}

fn os(xml: &mut Xml, machine: &Machine, paths: &Paths<'_>) {
    let uefi = machine.firmware == FirmwareKind::Uefi;
    let automatic = uefi && paths.loader.is_none();
    let attributes: &[_] = if automatic { &[("firmware", "efi")] } else { &[] };
    xml.element("os", attributes, |xml| {
        xml.text("type", &[("arch", "x86_64"), ("machine", machine.chipset.name())], "hvm");
        if automatic {
            automatic_firmware(xml, machine.secure_boot);
        }
        if let (true, Some((code, variables))) = (uefi, paths.loader) {
            let secure = if machine.secure_boot { "yes" } else { "no" };
            xml.text("loader", &[("readonly", "yes"), ("secure", secure), ("type", "pflash")], code);
            match paths.nvram {
                Some(own) => xml.text("nvram", &[], own),
                None => xml.leaf("nvram", &[("template", variables)]),
            }
        } else if let (true, Some(own)) = (uefi, paths.nvram) {
            xml.text("nvram", &[], own);
        }
        if let Some(boot) = &machine.direct_boot {
            xml.text("kernel", &[], &boot.kernel);
            if let Some(initrd) = &boot.initrd {
                xml.text("initrd", &[], initrd);
            }
            xml.text("cmdline", &[], &boot.cmdline);
        }
    });
}

/// What libvirt is to choose: keys are enrolled only where they are asked for, for a system without a signed loader would
/// not start with them.
fn automatic_firmware(xml: &mut Xml, secure_boot: bool) {
    let enabled = if secure_boot { "yes" } else { "no" };
    xml.element("firmware", &[], |xml| {
        xml.leaf("feature", &[("enabled", enabled), ("name", "enrolled-keys")]);
        xml.leaf("feature", &[("enabled", enabled), ("name", "secure-boot")]);
    });
    if secure_boot {
        xml.leaf("loader", &[("secure", "yes")]);
    }
}

fn features(xml: &mut Xml, machine: &Machine) {
    xml.element("features", &[], |xml| {
        xml.leaf("acpi", &[]);
        xml.leaf("apic", &[]);
        // What Windows expects of a hypervisor, without which it is slow.
        if machine.os.is_windows() && !machine.emulated {
            xml.element("hyperv", &[], |xml| {
                xml.leaf("relaxed", &[("state", "on")]);
                xml.leaf("vapic", &[("state", "on")]);
                xml.leaf("spinlocks", &[("state", "on"), ("retries", "8191")]);
            });
        }
        // Variables that only the firmware may write: in system management mode.
        if machine.secure_boot {
            xml.leaf("smm", &[("state", "on")]);
        }
    });
}

fn cpu(xml: &mut Xml, machine: &Machine) {
    let topology = |xml: &mut Xml| {
        if let Some((sockets, cores, threads)) = machine.topology {
            let [sockets, cores, threads] = [sockets, cores, threads].map(|number| number.to_string());
            xml.leaf("topology", &[("sockets", &sockets), ("cores", &cores), ("threads", &threads)]);
        }
    };
    match &machine.cpu {
        // Without KVM there is no host's model to be had.
        CpuMode::HostModel | CpuMode::HostPassthrough if machine.emulated => {
            xml.element("cpu", &[("mode", "maximum")], topology);
        }
        CpuMode::HostModel => xml.element("cpu", &[("mode", "host-model")], topology),
        CpuMode::HostPassthrough => xml.element("cpu", &[("mode", "host-passthrough")], topology),
        CpuMode::Named(model) => xml.element("cpu", &[("mode", "custom"), ("match", "exact")], |xml| {
            xml.text("model", &[("fallback", "allow")], model);
            topology(xml);
        }),
    }
}

fn clock(xml: &mut Xml, machine: &Machine) {
    let offset = if machine.local_time { "localtime" } else { "utc" };
    xml.element("clock", &[("offset", offset)], |xml| {
        xml.leaf("timer", &[("name", "rtc"), ("tickpolicy", "catchup")]);
        xml.leaf("timer", &[("name", "pit"), ("tickpolicy", "delay")]);
        xml.leaf("timer", &[("name", "hpet"), ("present", "no")]);
        if machine.os.is_windows() && !machine.emulated {
            xml.leaf("timer", &[("name", "hypervclock"), ("present", "yes")]);
        }
    });
}

/// The name of the board's USB controller, which the tablet needs: the old board has one of its own.
const fn usb_model(chipset: Chipset) -> Option<&'static str> {
    match chipset {
        Chipset::Q35 => Some("qemu-xhci"),
        Chipset::Pc => None,
    }
}
