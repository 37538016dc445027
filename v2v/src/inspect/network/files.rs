//! The formats that consist of lines.

use super::words::{assignments, lines, sections};
use super::{Found, mac};

/// The interface that a VLAN (`eth0.100`) or an alias (`eth0:1`) lies on.
fn parent(name: &str) -> String {
    name.split(['.', ':', '@']).next().unwrap_or(name).to_owned()
}

/// interfaces(5) of ifupdown: paragraphs that begin with `iface NAME FAMILY METHOD`.
pub(super) fn ifupdown(_: &str, text: &str) -> Vec<Found> {
    let mut found: Vec<Found> = vec![];
    // Options belong to the paragraph before them.
    let mut within = false;
    for line in lines(text) {
        let mut words = line.split_whitespace();
        match (words.next().unwrap_or_default(), words.next()) {
            ("iface", Some(name)) => {
                let method = words.nth(1).unwrap_or_default();
                found.push(Found { name: parent(name), mac: None, is_static: method == "static" });
                within = true;
            }
            ("auto" | "allow-hotplug" | "allow-auto", Some(name)) => {
                within = false;
                let names = std::iter::once(name).chain(words);
                found.extend(names.map(|name| Found { name: parent(name), ..Found::default() }));
            }
            ("hwaddress" | "hwaddress-ether", Some(value)) if within => {
                let value = if value == "ether" { words.next().unwrap_or_default() } else { value };
                if let Some(last) = found.last_mut() {
                    last.mac = mac(value);
                }
            }
            ("bridge_ports" | "bridge-ports" | "bond-slaves" | "slaves" | "vlan-raw-device", Some(name)) => {
                let names = std::iter::once(name)
                    .chain(words)
                    .filter(|name| !matches!(*name, "none" | "all" | "regex"));
                let named: Vec<_> =
                    names.map(|name| Found { name: parent(name), ..Found::default() }).collect();
                // In front, so that the paragraph's own interface stays the last.
                found.splice(0..0, named);
            }
            _ => {}
        }
    }
    found
}

/// NetworkManager's keyfiles (nm-settings-keyfile(5)).
pub(super) fn keyfile(_: &str, text: &str) -> Vec<Found> {
    let mut found = Found::default();
    for (section, key, value) in sections(text) {
        match (section.as_str(), key) {
            ("connection", "interface-name") | ("vlan", "parent") => found.name = parent(value),
            ("ethernet" | "802-3-ethernet", "mac-address") => found.mac = mac(value),
            ("ipv4" | "ipv6", "method") => found.is_static |= value == "manual",
            _ => {}
        }
    }
    vec![found]
}

/// `ifcfg-*` of Red Hat and SUSE.
pub(super) fn ifcfg(file: &str, text: &str) -> Vec<Found> {
    let mut found = Found { name: parent(file.strip_prefix("ifcfg-").unwrap_or(file)), ..Found::default() };
    for (key, value) in assignments(text) {
        match key {
            "DEVICE" | "PHYSDEV" | "ETHERDEVICE" if !value.is_empty() => found.name = parent(&value),
            "HWADDR" | "LLADDR" => found.mac = mac(&value).or(found.mac),
            "BOOTPROTO" => found.is_static |= value.eq_ignore_ascii_case("static"),
            key if key.starts_with("IPADDR") => found.is_static |= !value.is_empty(),
            _ => {}
        }
    }
    // SUSE's names with the address in them.
    if let Some(address) = file.strip_prefix("ifcfg-eth-id-") {
        found.mac = mac(address);
    }
    vec![found]
}

/// `.network` and `.link` of systemd (systemd.network(5), systemd.link(5)).
pub(super) fn networkd(_: &str, text: &str) -> Vec<Found> {
    let (mut names, mut address, mut is_static): (Vec<String>, _, _) = (vec![], None, false);
    for (section, key, value) in sections(text) {
        match (section.as_str(), key) {
            ("match", "Name") => names.extend(value.split_whitespace().map(parent)),
            ("match", "MACAddress" | "PermanentMACAddress") => address = mac(value),
            ("link", "Name") => names = vec![value.to_owned()],
            ("network" | "address", "Address") => is_static |= !value.is_empty(),
            _ => {}
        }
    }
    let found = |name| Found { name, mac: address.clone(), is_static };
    names.into_iter().map(found).collect()
}

/// Rules of udev that give a name to an address (70-persistent-net.rules).
pub(super) fn udev(_: &str, text: &str) -> Vec<Found> {
    let value = |line: &str, key: &str| {
        let rest = &line[line.find(key)? + key.len()..];
        let rest = rest.trim_start_matches(['=', '+', ':', ' ']).strip_prefix('"')?;
        rest.split_once('"').map(|(value, _)| value.to_owned())
    };
    let rule = |line: &str| {
        let address = value(line, "ATTR{address}").or_else(|| value(line, "SYSFS{address}"))?;
        // The last key of the rule: KERNEL=="eth*", NAME="eth0".
        let at = line.rfind("NAME")?;
        Some(Found { name: value(&line[at..], "NAME")?, mac: Some(mac(&address)?), is_static: false })
    };
    lines(text).filter_map(rule).collect()
}

/// Profiles of netctl.
pub(super) fn netctl(_: &str, text: &str) -> Vec<Found> {
    let mut found = Found::default();
    for (key, value) in assignments(text) {
        match key {
            "Interface" => found.name = parent(&value),
            "IP" | "IP6" => found.is_static |= value == "static",
            _ => {}
        }
    }
    vec![found]
}

/// Gentoo's `config_eth0="192.0.2.1/24"`.
pub(super) fn gentoo(_: &str, text: &str) -> Vec<Found> {
    let line = |(key, value): (&str, String)| {
        let name = key.strip_prefix("config_")?;
        let is_static =
            value.trim_start().trim_start_matches(['(', '"', ' ']).starts_with(|c: char| c.is_ascii_digit());
        Some(Found { name: name.to_owned(), mac: None, is_static })
    };
    assignments(text).filter_map(line).collect()
}

/// `interface eth0` and `static ip_address=` of dhcpcd.
pub(super) fn dhcpcd(_: &str, text: &str) -> Vec<Found> {
    let mut found: Vec<Found> = vec![];
    for line in lines(text) {
        if let Some(name) = line.strip_prefix("interface ") {
            found.push(Found { name: name.trim().to_owned(), ..Found::default() });
        } else if line.starts_with("static ip_address=")
            && let Some(last) = found.last_mut()
        {
            last.is_static = true;
        }
    }
    found
}

/// The names in wicked's XML: `<name>eth0</name>`.
pub(super) fn wicked(_: &str, text: &str) -> Vec<Found> {
    let is_static = text.contains("<ipv4:static>") || text.contains("<ipv6:static>");
    let names = text.split("<name>").skip(1).take(64).filter_map(|rest| rest.split_once("</name>"));
    names.map(|(name, _)| Found { name: name.trim().to_owned(), mac: None, is_static }).collect()
}

/// `eth0 mac 00:11:22:33:44:55` of ifrename.
pub(super) fn iftab(_: &str, text: &str) -> Vec<Found> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (name, key, value) = (words.next()?, words.next()?, words.next()?);
        (key == "mac")
            .then(|| Some(Found { name: name.to_owned(), mac: Some(mac(value)?), is_static: false }))?
    };
    lines(text).filter_map(line).collect()
}
