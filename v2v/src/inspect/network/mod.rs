//! Network interfaces that the configuration names, in the formats of all that configure networks.

mod files;
mod netplan;
mod words;

use std::path::{Path, PathBuf};

use super::{Interface, System};
use crate::view::GuestView;

/// The most files of a folder, and the most interfaces.
const MOST_FILES: usize = 512;
const MOST_INTERFACES: usize = 1024;
/// The most characters of a name: as many as Linux allows.
const MOST_NAME: usize = 15;

/// What a file says of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its address, if the file ties the name to one.
    pub mac: Option<String>,
    /// It gets a fixed address.
    pub is_static: bool,
}

/// How a file is read.
type Parser = fn(&str, &str) -> Vec<Found>;

/// Files, and folders (with a slash at the end) of which the files with this beginning and end are read.
const SOURCES: [(&str, &str, &str, Parser); 16] = [
    ("/etc/network/interfaces", "", "", files::ifupdown),
    ("/etc/network/interfaces.d/", "", "", files::ifupdown),
    ("/etc/netplan/", "", ".yaml", netplan::parse),
    ("/etc/NetworkManager/system-connections/", "", "", files::keyfile),
    ("/usr/lib/NetworkManager/system-connections/", "", "", files::keyfile),
    ("/etc/sysconfig/network-scripts/", "ifcfg-", "", files::ifcfg),
    ("/etc/sysconfig/network/", "ifcfg-", "", files::ifcfg),
    ("/etc/systemd/network/", "", ".network", files::networkd),
    ("/etc/systemd/network/", "", ".link", files::networkd),
    ("/etc/udev/rules.d/", "", ".rules", files::udev),
    ("/etc/netctl/", "", "", files::netctl),
    ("/etc/conf.d/net", "", "", files::gentoo),
    ("/etc/dhcpcd.conf", "", "", files::dhcpcd),
    ("/etc/rc.conf", "", "", files::gentoo),
    ("/etc/wicked/ifconfig/", "", ".xml", files::wicked),
    ("/etc/iftab", "", "", files::iftab),
];

/// Finds the interfaces.
pub(super) fn fill(view: &GuestView, system: &mut System) {
    let mut interfaces = vec![];
    for (place, start, end, parser) in SOURCES {
        for path in paths(view, place, start, end) {
            let Some(text) = view.text(&path) else { continue };
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for found in parser(&name, &text) {
                add(&mut interfaces, found, &path);
            }
        }
    }
    interfaces.sort_by(|one: &Interface, other| one.name.cmp(&other.name));
    system.interfaces = interfaces;
}

fn paths(view: &GuestView, place: &str, start: &str, end: &str) -> Vec<PathBuf> {
    if !place.ends_with('/') {
        return vec![PathBuf::from(place)];
    }
    let fits = |name: &String| {
        name.starts_with(start) && name.ends_with(end) && !name.starts_with('.') && !is_leftover(name)
    };
    let names = view.names_in(place).into_iter().filter(fits).take(MOST_FILES);
    names.map(|name| Path::new(place).join(name)).collect()
}

/// What editors and package managers leave behind.
fn is_leftover(name: &str) -> bool {
    let ends = [
        "~",
        ".bak",
        ".old",
        ".orig",
        ".rpmsave",
        ".rpmnew",
        ".rpmorig",
        ".dpkg-old",
        ".dpkg-dist",
        ".dpkg-new",
    ];
    ends.iter().any(|end| name.ends_with(end))
}

/// Puts together what several files say of one interface.
fn add(interfaces: &mut Vec<Interface>, found: Found, path: &Path) {
    if !is_interface(&found.name) {
        return;
    }
    let known = interfaces.iter().position(|known| known.name == found.name);
    let index = match known {
        Some(index) => index,
        None if interfaces.len() < MOST_INTERFACES => {
            interfaces.push(Interface { name: found.name, ..Interface::default() });
            interfaces.len() - 1
        }
        None => return,
    };
    let interface = &mut interfaces[index];
    interface.mac = interface.mac.take().or(found.mac);
    interface.is_static |= found.is_static;
    if !interface.files.iter().any(|file| file == path) {
        interface.files.push(path.to_owned());
    }
}

/// Whether it is the name of one interface that may be a card: not a pattern, not the loopback, not one that the system
/// makes of others.
fn is_interface(name: &str) -> bool {
    let made = [
        "lo", "br", "virbr", "bond", "team", "vlan", "docker", "tun", "tap", "wg", "dummy", "veth", "ppp",
        "sit", "ovs", "vmbr", "macvlan", "ipvlan", "vxlan", "gre", "ib", "wl", "ww",
    ];
    let is_made = made.iter().any(|made| {
        name.strip_prefix(made).is_some_and(|rest| {
            rest.is_empty()
                || rest.starts_with(|c: char| {
                    c.is_ascii_digit() || matches!(c, '-' | '_' | 'p' | 'o' | 's' | 'x')
                })
        })
    });
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    !name.is_empty() && name.len() <= MOST_NAME && name.chars().all(allowed) && !is_made
}

/// An address in lower case with colons; `None` if it is none.
pub(super) fn mac(text: &str) -> Option<String> {
    let text = text.trim().trim_matches(['"', '\'']).to_ascii_lowercase().replace('-', ":");
    let parts: Vec<_> = text.split(':').collect();
    let good = parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
    good.then_some(text)
}

/// All parsers on one text.
pub fn parse(text: &str) -> Vec<Found> {
    SOURCES.iter().flat_map(|(_, _, _, parser)| parser("ifcfg-eth0", text)).collect()
}

#[cfg(test)]
mod tests;
