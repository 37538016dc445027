//! Proxmox VE: the configuration of a virtual machine (`qm.conf(5)`), and a script that makes one of the disks.

use std::fmt::Write as _;
use std::path::Path;

use block::Result;

use super::machine::{Machine, MachineDisk, MachineNic, text_of};
use super::shell::{comment, quote};
use super::{Chipset, Connection, CpuMode};
use crate::guest::{Bus, FirmwareKind, RemovableKind};

/// The model that every processor of the last ten years can be: RHEL 9 needs as much.
const COMMON_CPU: &str = "x86-64-v2-AES";

/// Where the machine is going to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Number of the machine.
    pub vmid: u32,
    /// Name of the storage that has its disks.
    pub storage: String,
    /// The bridge for what is not plugged into another.
    pub bridge: String,
}

impl Default for Place {
    fn default() -> Self {
        Self { vmid: 100, storage: "local-lvm".to_owned(), bridge: "vmbr0".to_owned() }
    }
}

/// `/etc/pve/qemu-server/VMID.conf`, for disks that have been imported in order (`vm-VMID-disk-0` and on).
pub fn config(machine: &Machine, place: &Place) -> String {
    let Place { vmid, storage, bridge } = place;
    let volume = |number: usize| format!("{storage}:vm-{vmid}-disk-{number}");
    let mut lines = settings(machine, bridge);
    let count = machine.disks.len();
    for (number, disk) in machine.disks.iter().enumerate() {
        lines.push((slot(disk), format!("{}{}", volume(number), disk_options(disk))));
    }
    if machine.firmware == FirmwareKind::Uefi {
        lines.push(("efidisk0".to_owned(), format!("{},{}", volume(count), efi_options(machine))));
    }
    if machine.tpm {
        lines.push(("tpmstate0".to_owned(), format!("{},version=v2.0", volume(count + 1))));
    }
    lines.push(("boot".to_owned(), boot(machine)));
    // Proxmox' own order.
    lines.sort();
    let description = machine.description.iter().flat_map(|text| text.lines());
    let mut text: String = description.map(|line| format!("#{}\n", escape(line))).collect();
    for (name, value) in lines {
        let _ = writeln!(text, "{name}: {value}");
    }
    text
}

/// A script for the Proxmox host that makes the machine and imports the disks. It is to lie in `folder` with them.
///
/// # Errors
/// A path cannot be written down.
pub fn script(machine: &Machine, folder: &Path) -> Result<String> {
    let mut text = format!(
        "#!/bin/sh
# Makes {} on a Proxmox VE host: $0 STORAGE [VMID]. BRIDGE=bridge for what is on no other (default: vmbr0).
set -eu
cd -- \"$(dirname -- \"$0\")\"
storage=${{1:?usage: $0 STORAGE [VMID]}}
vmid=${{2:-$(pvesh get /cluster/nextid)}}
bridge=${{BRIDGE:-vmbr0}}

# attach SLOT IMAGE OPTIONS: an imported disk is unused at first.
attach() {{
    qm importdisk \"$vmid\" \"$2\" \"$storage\"
    volume=$(qm config \"$vmid\" | sed -n 's/^unused[0-9]*: *//p' | tail -n 1)
    qm set \"$vmid\" \"--$1\" \"$volume$3\"
}}

qm create \"$vmid\"",
        comment(&machine.name)
    );
    for (name, value) in settings(machine, "\"$bridge\"") {
        // The bridge is the one thing that the shell puts in.
        let value = match value.split_once("\"$bridge\"") {
            Some((before, after)) => format!("{}\"$bridge\"{}", quote(before), after),
            None => quote(&value),
        };
        let _ = write!(text, " \\\n    --{name} {value}");
    }
    if let Some(description) = &machine.description {
        let _ = write!(text, " \\\n    --description {}", quote(description));
    }
    text.push('\n');
    for disk in &machine.disks {
        let path = match disk.path.strip_prefix(folder) {
            Ok(rest) => format!("./{}", text_of(rest)?),
            Err(_) => text_of(&disk.path)?.to_owned(),
        };
        let _ = writeln!(text, "attach {} {} {}", slot(disk), quote(&path), quote(&disk_options(disk)));
    }
    if machine.firmware == FirmwareKind::Uefi {
        let _ = writeln!(text, "qm set \"$vmid\" --efidisk0 \"$storage:1,{}\"", efi_options(machine));
    }
    if machine.tpm {
        text.push_str("qm set \"$vmid\" --tpmstate0 \"$storage:1,version=v2.0\"\n");
    }
    let _ = writeln!(text, "qm set \"$vmid\" --boot {}", quote(&boot(machine)));
    text.push_str("echo \"virtual machine $vmid is ready: qm start $vmid\"\n");
    Ok(text)
}

/// Everything that needs no disk.
fn settings(machine: &Machine, bridge: &str) -> Vec<(String, String)> {
    let mut lines = vec![
        ("name", dns_name(&machine.name)),
        ("memory", machine.memory_mib.to_string()),
        ("ostype", machine.os.proxmox().to_owned()),
        ("bios", if machine.firmware == FirmwareKind::Uefi { "ovmf" } else { "seabios" }.to_owned()),
        ("cpu", cpu(machine)),
        ("scsihw", controller(machine).to_owned()),
        ("localtime", flag(machine.local_time)),
        ("vga", "std".to_owned()),
    ];
    let (sockets, cores) = match machine.topology {
        Some((sockets, cores, threads)) => (sockets, cores.saturating_mul(threads)),
        None => (1, machine.cpus),
    };
    lines.extend([("sockets", sockets.to_string()), ("cores", cores.to_string())]);
    if machine.chipset == Chipset::Q35 {
        lines.push(("machine", "q35".to_owned()));
    }
    lines.extend(machine.uuid.iter().map(|uuid| ("smbios1", format!("uuid={uuid}"))));
    lines.extend(machine.genid.iter().map(|genid| ("vmgenid", genid.clone())));
    if machine.agent {
        lines.push(("agent", "1".to_owned()));
    }
    let mut lines: Vec<(String, String)> =
        lines.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    for port in 0..machine.serial_ports {
        lines.push((format!("serial{port}"), "socket".to_owned()));
    }
    for (index, nic) in machine.nics.iter().enumerate() {
        lines.push((format!("net{index}"), net(nic, bridge)));
    }
    let cdroms = machine.drives.iter().filter(|drive| drive.kind == RemovableKind::Cdrom);
    for (number, drive) in cdroms.enumerate() {
        let bus = if drive.bus == Bus::Ide { "ide" } else { "sata" };
        let unit = if drive.bus == Bus::Ide { drive.unit } else { number + count(machine, Bus::Sata) };
        lines.push((format!("{bus}{unit}"), "none,media=cdrom".to_owned()));
    }
    lines
}

fn count(machine: &Machine, bus: Bus) -> usize {
    machine.disks.iter().filter(|disk| disk.bus == bus).count()
}

fn flag(is_set: bool) -> String {
    u8::from(is_set).to_string()
}

fn cpu(machine: &Machine) -> String {
    match &machine.cpu {
        CpuMode::HostModel => COMMON_CPU.to_owned(),
        CpuMode::HostPassthrough => "host".to_owned(),
        CpuMode::Named(model) => model.clone(),
    }
}

fn controller(machine: &Machine) -> &'static str {
    match machine.disks.iter().find_map(|disk| disk.controller) {
        Some("vmpvscsi") => "pvscsi",
        Some(_) => "lsi",
        None => "virtio-scsi-single",
    }
}

/// The slot of a disk: `scsi0`.
fn slot(disk: &MachineDisk) -> String {
    let bus = match disk.bus {
        Bus::Ide => "ide",
        Bus::Sata => "sata",
        Bus::Scsi | Bus::VirtioScsi => "scsi",
        _ => "virtio",
    };
    format!("{bus}{}", disk.unit)
}

fn disk_options(disk: &MachineDisk) -> String {
    let mut options = ",discard=on".to_owned();
    if matches!(disk.bus, Bus::Virtio | Bus::VirtioScsi) {
        options.push_str(",iothread=1");
    }
    // IDE and SATA have no such option.
    if disk.read_only && matches!(disk.bus, Bus::Virtio | Bus::VirtioScsi | Bus::Scsi) {
        options.push_str(",ro=1");
    }
    if let Some(serial) = &disk.serial {
        let _ = write!(options, ",serial={}", escape(serial));
    }
    options
}

fn efi_options(machine: &Machine) -> String {
    format!("efitype=4m,pre-enrolled-keys={}", u8::from(machine.secure_boot))
}

fn net(nic: &MachineNic, bridge: &str) -> String {
    let mac = nic.mac.as_ref().map_or_else(String::new, |mac| format!("={}", mac.to_ascii_uppercase()));
    match &nic.connection {
        Connection::Bridge(name) => format!("{}{mac},bridge={name}", nic.model),
        Connection::Network(_) => format!("{}{mac},bridge={bridge}", nic.model),
    }
}

fn boot(machine: &Machine) -> String {
    let slots: Vec<String> = machine.boot_order().into_iter().map(slot).collect();
    format!("order={}", slots.join(";"))
}

/// A name of the letters that host names have.
fn dns_name(name: &str) -> String {
    let mapped: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let parts = mapped.split(['-', '.']).filter(|part| !part.is_empty());
    let joined = parts.collect::<Vec<_>>().join("-");
    let short: String = joined.chars().take(63).collect();
    let short = short.trim_matches('-');
    if short.is_empty() { "guest".to_owned() } else { short.to_owned() }
}

/// Percent signs for what cannot stand in the file: Proxmox decodes descriptions and serial numbers.
fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut into, byte| {
        match byte {
            b'%' | b',' | b'\0'..=b'\x1f' | b'\x7f'.. => {
                let _ = write!(into, "%{byte:02X}");
            }
            _ => into.push(char::from(byte)),
        }
        into
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_host_names() {
        for (name, expected) in
            [("web", "web"), ("a b_c", "a-b-c"), ("-x-", "x"), ("", "guest"), ("ä", "guest"), ("a..b", "a-b")]
        {
            assert_eq!(dns_name(name), expected);
        }
        assert_eq!(dns_name(&"x".repeat(99)).len(), 63);
    }
}
