//! Network cards (kernel documentation, "sysfs-class-net"): those that are hardware, with the addresses that they were made
//! with.

use super::tree::Tree;
use crate::guest::{Network, Nic};

/// ARPHRD_ETHER.
const ETHERNET: u64 = 1;

/// The cards. What is lost is noted.
pub(super) fn cards(tree: &Tree<'_>, notes: &mut Vec<String>) -> Vec<Nic> {
    let mut cards = vec![];
    for name in tree.names("sys/class/net") {
        let file = |file: &str| format!("sys/class/net/{name}/{file}");
        // Bridges, bonds, VLANs, tunnels have no device.
        if !tree.exists(&file("device")) || tree.number(&file("type")) != Some(ETHERNET) {
            continue;
        }
        if tree.exists(&file("wireless")) || tree.exists(&file("phy80211")) {
            notes.push(format!("The wireless card {name} is left out: a virtual machine has none."));
            continue;
        }
        let master = tree.link_name(&file("master"));
        let bond = master.clone().filter(|master| tree.exists(&format!("sys/class/net/{master}/bonding")));
        let bridge = master.filter(|master| tree.exists(&format!("sys/class/net/{master}/bridge")));
        if let Some(bond) = &bond {
            notes.push(format!(
                "{name} is a part of {bond}: the virtual machine has a card for each of its parts, which can be on one network."
            ));
        }
        let permanent = bond.as_deref().and_then(|bond| permanent_address(tree, bond, &name));
        cards.push(Nic {
            mac: permanent.or_else(|| tree.text(&file("address"))).map(|mac| mac.to_lowercase()),
            model: tree
                .link_name(&file("device/driver"))
                .and_then(|driver| model(&driver))
                .map(str::to_owned),
            network: if bridge.is_some() { Network::Bridge } else { Network::Managed },
            network_name: bridge,
            slot: None,
        });
    }
    cards
}

/// A bond gives all of its parts one address; what they had is in its own file.
fn permanent_address(tree: &Tree<'_>, bond: &str, part: &str) -> Option<String> {
    let text = tree.text(&format!("proc/net/bonding/{bond}"))?;
    let mut current = None;
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("Slave Interface", name)) => current = Some(name.trim()),
            Some(("Permanent HW addr", address)) if current == Some(part) => {
                return Some(address.trim().to_owned());
            }
            _ => {}
        }
    }
    None
}

/// The model of QEMU's that has the same driver.
fn model(driver: &str) -> Option<&'static str> {
    match driver {
        "e1000" => Some("e1000"),
        "e1000e" => Some("e1000e"),
        "igb" => Some("igb"),
        "virtio_net" => Some("virtio"),
        "vmxnet3" => Some("vmxnet3"),
        "8139cp" | "8139too" => Some("rtl8139"),
        "pcnet32" => Some("pcnet"),
        "vif" | "xen_netfront" => Some("netfront"),
        _ => None,
    }
}
