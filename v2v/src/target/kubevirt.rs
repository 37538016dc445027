//! KubeVirt: a VirtualMachine, and a DataVolume for each disk that waits for its contents.
//!
//! The disks come in by `virtctl image-upload`, whose commands stand at the beginning of the manifest.

use std::fmt::Write as _;

use block::Result;
use serde_json::{Map, Value, json};

use super::machine::{Machine, MachineDisk, text_of};
use super::shell::quote;
use super::{Chipset, Connection, CpuMode, NetworkMap, yaml};
use crate::guest::{Bus, FirmwareKind, RemovableKind};

const MIB: u64 = 1 << 20;

/// The manifest. What KubeVirt cannot say is in its comments.
///
/// # Errors
/// A path cannot be written down.
pub fn manifest(machine: &Machine) -> Result<String> {
    let name = resource_name(&machine.name);
    let mut text = head(machine, &name)?;
    for (index, disk) in machine.disks.iter().enumerate() {
        text.push_str("---\n");
        text.push_str(&yaml::block(&data_volume(&volume_name(&name, index), disk)));
    }
    text.push_str("---\n");
    text.push_str(&yaml::block(&virtual_machine(machine, &name)));
    Ok(text)
}

fn head(machine: &Machine, name: &str) -> Result<String> {
    let mut text = String::from("# kubectl apply -f this file, then give every disk its contents:\n");
    for (index, disk) in machine.disks.iter().enumerate() {
        let path = text_of(&disk.path)?;
        let path: String = path.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let _ = writeln!(
            text,
            "#   virtctl image-upload dv {} --no-create --image-path={}",
            volume_name(name, index),
            quote(&path)
        );
    }
    let _ = writeln!(text, "# and virtctl start {name}");
    if machine.genid.is_some() {
        text.push_str("# The machine's generation id is not kept.\n");
    }
    if machine.local_time {
        text.push_str(
            "# The clock of the guest runs in local time: set spec.template.spec.domain.clock.timezone.\n",
        );
    }
    if machine.chipset != Chipset::Q35 {
        text.push_str("# The cluster has to allow this board: emulatedMachines of the KubeVirt object.\n");
    }
    Ok(text)
}

fn volume_name(name: &str, index: usize) -> String {
    format!("{name}-disk{index}")
}

fn data_volume(name: &str, disk: &MachineDisk) -> Value {
    json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1",
        "kind": "DataVolume",
        "metadata": {"name": name},
        "spec": {
            "source": {"upload": {}},
            "storage": {"resources": {"requests": {"storage": format!("{}Mi", disk.size_bytes.div_ceil(MIB))}}},
        },
    })
}

fn virtual_machine(machine: &Machine, name: &str) -> Value {
    let mut annotations = Map::new();
    if let Some(description) = &machine.description {
        annotations.insert("description".to_owned(), json!(description));
    }
    if let Some(id) = machine.os.osinfo_id() {
        annotations.insert("libosinfo.org/os".to_owned(), json!(id));
    }
    let mut metadata = json!({"name": name});
    if !annotations.is_empty() {
        metadata["annotations"] = Value::Object(annotations);
    }
    let (interfaces, networks) = networks(machine);
    let volumes: Vec<Value> = (0..machine.disks.len())
        .map(
            |index| json!({"name": format!("disk{index}"), "dataVolume": {"name": volume_name(name, index)}}),
        )
        .collect();
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": metadata,
        "spec": {
            "runStrategy": "Halted",
            "template": {
                "metadata": {"labels": {"kubevirt.io/vm": name}},
                "spec": {
                    "domain": domain(machine, interfaces),
                    "networks": networks,
                    "volumes": volumes,
                },
            },
        },
    })
}

fn domain(machine: &Machine, interfaces: Vec<Value>) -> Value {
    let (sockets, cores, threads) = machine.topology.unwrap_or((machine.cpus, 1, 1));
    let model = match &machine.cpu {
        CpuMode::HostModel => "host-model",
        CpuMode::HostPassthrough => "host-passthrough",
        CpuMode::Named(model) => model,
    };
    let mut devices = json!({
        "disks": disks(machine),
        "interfaces": interfaces,
        "inputs": [{"name": "tablet", "type": "tablet", "bus": "usb"}],
        "rng": {},
    });
    if machine.tpm {
        devices["tpm"] = json!({"persistent": true});
    }
    json!({
        "clock": {"utc": {}},
        "cpu": {"sockets": sockets, "cores": cores, "threads": threads, "model": model},
        "memory": {"guest": format!("{}Mi", machine.memory_mib)},
        "machine": {"type": machine.chipset.name()},
        "firmware": firmware(machine),
        "features": features(machine),
        "devices": devices,
    })
}

fn firmware(machine: &Machine) -> Value {
    let bootloader = match machine.firmware {
        FirmwareKind::Bios => json!({"bios": {}}),
        FirmwareKind::Uefi => json!({"efi": {"secureBoot": machine.secure_boot, "persistent": true}}),
    };
    match &machine.uuid {
        Some(uuid) => json!({"uuid": uuid, "bootloader": bootloader}),
        None => json!({"bootloader": bootloader}),
    }
}

fn features(machine: &Machine) -> Value {
    let mut features = json!({"acpi": {}});
    if machine.secure_boot {
        features["smm"] = json!({"enabled": true});
    }
    if machine.os.is_windows() {
        features["hyperv"] = json!({"relaxed": {}, "vapic": {}, "spinlocks": {"spinlocks": 8191}});
    }
    features
}

fn disks(machine: &Machine) -> Vec<Value> {
    let mut disks: Vec<Value> = vec![];
    for (index, disk) in machine.disks.iter().enumerate() {
        let bus = match disk.bus {
            Bus::Virtio => "virtio",
            Bus::VirtioScsi | Bus::Scsi => "scsi",
            _ => "sata",
        };
        let mut target = json!({"bus": bus});
        if disk.read_only {
            target["readonly"] = json!(true);
        }
        let mut entry = json!({"name": format!("disk{index}"), "bootOrder": disk.order, "disk": target});
        if let Some(serial) = &disk.serial {
            entry["serial"] = json!(serial);
        }
        disks.push(entry);
    }
    // An empty drive: it needs no volume.
    for (index, _) in machine.drives.iter().filter(|drive| drive.kind == RemovableKind::Cdrom).enumerate() {
        disks.push(json!({"name": format!("cdrom{index}"), "cdrom": {"bus": "sata", "tray": "open"}}));
    }
    disks
}

/// Interfaces, and the networks that they are on: the first that is on no network of its own gets the pod's.
fn networks(machine: &Machine) -> (Vec<Value>, Vec<Value>) {
    let mut interfaces = vec![];
    let mut networks = vec![];
    let mut pod_is_free = true;
    for (index, nic) in machine.nics.iter().enumerate() {
        let name = format!("net{index}");
        let is_pod = pod_is_free && nic.connection == Connection::Network(NetworkMap::FALLBACK.to_owned());
        let (binding, network) = match is_pod {
            true => ("masquerade", json!({"name": name, "pod": {}})),
            false => {
                let wanted = resource_name(nic.connection.name());
                ("bridge", json!({"name": name, "multus": {"networkName": wanted}}))
            }
        };
        pod_is_free &= !is_pod;
        let model = if nic.model == "virtio" { "virtio" } else { nic.model.as_str() };
        let mut interface = json!({"name": name, "model": model, binding: {}});
        if let Some(mac) = &nic.mac {
            interface["macAddress"] = json!(mac);
        }
        interfaces.push(interface);
        networks.push(network);
    }
    (interfaces, networks)
}

/// A name as Kubernetes has them (RFC 1123 labels), short enough for `-diskN`.
fn resource_name(name: &str) -> String {
    const MOST: usize = 54;
    let mapped: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let joined = mapped.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
    let short: String = joined.chars().take(MOST).collect();
    let short = short.trim_matches('-');
    if short.is_empty() { "guest".to_owned() } else { short.to_owned() }
}
