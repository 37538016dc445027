//! Names of network interfaces: the guest's configuration goes on naming `ens33`, so the card stays `ens33`.
//!
//! The card keeps its address (MAC) on KVM, and by that it gets its name: by a `.link` file where udev of systemd reads
//! such (systemd.link(5)), by a rule in the manner of the old `70-persistent-net.rules` where it does not. VLANs, bonds and
//! bridges share the address of a card; they lie on no bus, so that `Path=` leaves them alone in every version.

use std::path::Path;

use guestdisk::fs::FileKind;

use super::draft::{Draft, Why};
use super::text::append_lines;
use crate::guest::Nic;
use crate::inspect::Interface;

/// Folders in which udev of the distribution keeps its rules.
const RULES: [&str; 2] = ["/usr/lib/udev/rules.d", "/lib/udev/rules.d"];
/// The rule that asks for `.link` files.
const LINK_RULE: &str = "80-net-setup-link.rules";
const OLD_RULES: &str = "/etc/udev/rules.d/70-persistent-net.rules";

/// How the guest gives names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    /// By `.link` files.
    Link,
    /// By rules of udev.
    Rules,
    /// As the kernel counts.
    Kernel,
}

/// A card and the name that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) name: String,
    pub(crate) mac: Option<String>,
    /// Its position among the cards.
    index: usize,
}

/// Everything in this file's care. Gives the `.link` files back, which an initramfs needs too.
pub(crate) fn convert(
    draft: &mut Draft<'_>,
    interfaces: &[Interface],
    nics: &[Nic],
) -> Vec<(String, Vec<u8>)> {
    let (mut pairs, unmatched) = pair(interfaces, nics);
    add_patterns(draft, nics, &mut pairs);
    for name in unmatched {
        draft.ask(format!(
            "The configuration names the network interface {name}, but it is not known which card that is: give its address (MAC), or rename it in the guest."
        ));
    }
    let naming = naming(draft);
    let mut links = vec![];
    for pair in &pairs {
        match naming {
            Naming::Kernel => kernel(draft, pair),
            Naming::Link => links.extend(link(draft, pair, pairs.len(), nics.len())),
            Naming::Rules => rule(draft, pair),
        }
    }
    links
}

fn naming(draft: &Draft<'_>) -> Naming {
    let masked = draft.tree().link(&Path::new("/etc/udev/rules.d").join(LINK_RULE));
    let has_link_rule = RULES.iter().any(|folder| draft.exists(Path::new(folder).join(LINK_RULE)));
    if has_link_rule && masked.is_none_or(|target| target != Path::new("/dev/null")) {
        return Naming::Link;
    }
    let is_folder = |path: &str| draft.tree().kind(Path::new(path)) == Some(FileKind::Directory);
    if RULES.iter().chain(&["/etc/udev/rules.d"]).any(|path| is_folder(path)) {
        Naming::Rules
    } else {
        Naming::Kernel
    }
}

fn why(name: &str) -> Why {
    Why::new(
        "nic-name",
        format!("the network configuration names {name}, which would get another name in another slot"),
        "remove the file, and name the interface in the network configuration as the system does",
    )
}

/// Without udev the kernel counts: what is called `eth1` has to be the second card.
fn kernel(draft: &mut Draft<'_>, pair: &Pair) {
    if pair.name != format!("eth{}", pair.index) {
        draft.ask(format!(
            "Nothing in this guest gives network interfaces their names, so {} becomes eth{}.",
            pair.name, pair.index
        ));
    }
}

fn link(draft: &mut Draft<'_>, pair: &Pair, count: usize, cards: usize) -> Option<(String, Vec<u8>)> {
    // Names of the kernel's own are not exchanged: udev does not rename to what another card is called for now.
    let number = pair.name.strip_prefix("eth").and_then(|number| number.parse::<usize>().ok());
    if number.is_some_and(|number| number != pair.index && number < cards) {
        draft.ask(format!(
            "{} is the card {} of the new machine, which the kernel calls eth{} at first; where names are exchanged udev may fail: put the cards into the guest's order, or give them other names in the guest.",
            pair.name,
            pair.index + 1,
            pair.index
        ));
    }
    let known = match &pair.mac {
        Some(mac) => format!("MACAddress={mac}\n"),
        None if count == 1 => String::new(),
        None => {
            draft.ask(format!(
                "The address (MAC) of the card that is {} is not known, so its name cannot be kept.",
                pair.name
            ));
            return None;
        }
    };
    let path = format!("/etc/systemd/network/10-vimg-{}.link", pair.name);
    let text = format!(
        "# Written by vimg: the interface keeps the name that it had before the machine moved to KVM.\n\
         # Path= leaves VLANs, bonds and bridges alone, which have the same address but lie on no bus.\n\
         [Match]\n{known}Path=*pci-* *platform-*\n\n[Link]\nName={}\n",
        pair.name
    );
    draft.write(&path, text.clone().into_bytes(), 0o644, why(&pair.name));
    Some((path, text.into_bytes()))
}

fn rule(draft: &mut Draft<'_>, pair: &Pair) {
    let Some(mac) = &pair.mac else {
        if pair.name != format!("eth{}", pair.index) {
            draft.ask(format!(
                "The address (MAC) of the card that is {} is not known, so its name cannot be kept.",
                pair.name
            ));
        }
        return;
    };
    let line = format!(
        "SUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{{address}}==\"{mac}\", ATTR{{type}}==\"1\", NAME=\"{}\"",
        pair.name
    );
    let old = draft.text(OLD_RULES).unwrap_or_default();
    let same_name = format!("NAME=\"{}\"", pair.name);
    let lines = old.lines().filter(|line| !line.trim_start().starts_with('#'));
    let said = lines.clone().any(|line| line.to_ascii_lowercase().contains(mac) && line.contains(&same_name));
    if said {
        return;
    }
    // A rule of an earlier card must not give the name away.
    let kept: String = old
        .split_inclusive('\n')
        .filter(|line| {
            line.trim_start().starts_with('#')
                || !(line.contains(&same_name) || line.to_ascii_lowercase().contains(mac))
        })
        .collect();
    draft.write(OLD_RULES, append_lines(&kept, &[line]).into_bytes(), 0o644, why(&pair.name));
}

/// Configuration for `ens*`: a card keeps the name that it had by its slot, since on KVM it would be called `enp1s0`.
fn add_patterns(draft: &mut Draft<'_>, nics: &[Nic], pairs: &mut Vec<Pair>) {
    for pattern in patterns(draft) {
        let fits = |name: &str| {
            pattern.split_once('*').is_some_and(|(start, end)| name.starts_with(start) && name.ends_with(end))
        };
        // Cards of Xen have no place on a bus, so nothing but the kernel named them.
        let from_xen = |nic: &Nic| nic.model.as_deref() == Some("netfront");
        let is_kernels = fits("eth0") && !nics.iter().any(from_xen);
        if fits("enp1s0") || is_kernels || pairs.iter().any(|pair| fits(&pair.name)) {
            continue;
        }
        let free = |index: &usize| pairs.iter().all(|pair| pair.index != *index);
        let mut found = vec![];
        for index in (0..nics.len()).filter(free) {
            let by_slot = nics[index].slot.map(|slot| format!("ens{slot}"));
            let name = by_slot.or_else(|| from_xen(&nics[index]).then(|| format!("eth{index}")));
            let name = name.filter(|name| fits(name));
            found.extend(name.map(|name| Pair { name, mac: nics[index].mac.clone(), index }));
        }
        if found.is_empty() {
            draft.ask(format!(
                "The network configuration is for interfaces called {pattern}; on KVM they are called otherwise (enp1s0): change the pattern."
            ));
        }
        pairs.extend(found);
    }
    pairs.sort_by_key(|pair| pair.index);
}

/// Patterns with one `*` for names of cards in systemd's and netplan's configuration.
fn patterns(draft: &mut Draft<'_>) -> Vec<String> {
    const FOLDERS: [(&str, &str, &str); 2] =
        [("/etc/systemd/network", ".network", "Name="), ("/etc/netplan", ".yaml", "name:")];
    let mut found = vec![];
    for (folder, end, key) in FOLDERS {
        for (name, _) in draft.tree().list(Path::new(folder)) {
            if !name.ends_with(end) {
                continue;
            }
            let text = draft.text(Path::new(folder).join(name)).unwrap_or_default();
            let values = text.lines().filter_map(|line| {
                let line = line.trim_start_matches([' ', '-']);
                line.strip_prefix("match: {").unwrap_or(line).trim_start().strip_prefix(key)
            });
            let words = values.flat_map(|value| value.split([' ', ',', '}', '"', '\'']));
            let is_pattern = |word: &&str| word.starts_with('e') && word.matches('*').count() == 1;
            found.extend(words.filter(is_pattern).map(str::to_owned));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Which card each interface is, and the names for which that is not known.
pub(crate) fn pair(interfaces: &[Interface], nics: &[Nic]) -> (Vec<Pair>, Vec<String>) {
    let mut names: Vec<&Interface> = interfaces.iter().filter(|interface| is_card(&interface.name)).collect();
    names.sort_by_key(|interface| natural(&interface.name));
    let mut free: Vec<usize> = (0..nics.len()).collect();
    let mut found: Vec<Pair> = vec![];
    let ways: [fn(&Interface, usize, &Nic) -> bool; 4] = [
        |interface, _, nic| interface.mac.is_some() && same_mac(interface.mac.as_deref(), nic.mac.as_deref()),
        |interface, _, nic| {
            let mac = nic.mac.as_deref().map(|mac| mac.replace(':', ""));
            mac.is_some_and(|mac| interface.name.strip_prefix("enx") == Some(mac.as_str()))
        },
        |interface, _, nic| nic.slot.is_some_and(|slot| interface.name == format!("ens{slot}")),
        |interface, index, _| interface.name == format!("eth{index}"),
    ];
    for way in ways {
        names.retain(|interface| {
            let Some(at) = free.iter().position(|index| way(interface, *index, &nics[*index])) else {
                return true;
            };
            let index = free.remove(at);
            found.push(Pair { name: interface.name.clone(), mac: nics[index].mac.clone(), index });
            false
        });
    }
    // An address that the configuration knows and no card has is that of another machine.
    names.retain(|interface| {
        interface.mac.is_none() || nics.iter().any(|nic| nic.mac.is_none()) || nics.is_empty()
    });
    if names.len() == free.len() {
        let rest = names.drain(..).zip(free.drain(..));
        found.extend(rest.map(|(interface, index)| Pair {
            name: interface.name.clone(),
            mac: nics[index].mac.clone().or_else(|| interface.mac.clone()),
            index,
        }));
    }
    found.sort_by_key(|pair| pair.index);
    (found, names.iter().map(|interface| interface.name.clone()).collect())
}

fn same_mac(one: Option<&str>, other: Option<&str>) -> bool {
    one.zip(other).is_some_and(|(one, other)| one.eq_ignore_ascii_case(other))
}

/// Whether this is the name of a card, rather than of something made of software.
fn is_card(name: &str) -> bool {
    let is_name = name.len() < 16 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let first_digit = name.find(|c: char| c.is_ascii_digit());
    let (letters, rest) = name.split_at(first_digit.unwrap_or(name.len()));
    let is_prefix = matches!(
        letters,
        "eth" | "eno" | "ens" | "enp" | "enx" | "enP" | "em" | "p" | "enc" | "nic" | "net" | "lan" | "wan"
    );
    is_name && is_prefix && (!rest.is_empty() || matches!(letters, "lan" | "wan"))
}

/// `eth2` before `eth10`.
fn natural(name: &str) -> (String, u64, String) {
    let digit = name.find(|c: char| c.is_ascii_digit()).unwrap_or(name.len());
    let rest = &name[digit..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    (name[..digit].to_owned(), rest[..end].parse().unwrap_or(0), rest[end..].to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tree::memory::Memory;
    use super::*;
    use crate::plan::Plan;

    fn interface(name: &str, mac: Option<&str>) -> Interface {
        Interface { name: name.to_owned(), mac: mac.map(str::to_owned), files: vec![], is_static: true }
    }

    fn nic(mac: Option<&str>, slot: Option<u32>) -> Nic {
        Nic { mac: mac.map(str::to_owned), slot, ..Nic::default() }
    }

    fn matched(interfaces: &[Interface], nics: &[Nic]) -> Vec<(String, usize)> {
        pair(interfaces, nics).0.into_iter().map(|pair| (pair.name, pair.index)).collect()
    }

    #[test]
    fn cards_are_recognised() {
        let [a, b] = [Some("00:50:56:00:00:0a"), Some("00:50:56:00:00:0b")];
        let nics = [nic(a, Some(192)), nic(b, Some(160))];
        let names = |names: &[&str]| names.iter().map(|name| interface(name, None)).collect::<Vec<_>>();
        // By VMware's slots, whatever the order.
        assert_eq!(
            matched(&names(&["ens160", "ens192"]), &nics),
            [("ens192".to_owned(), 0), ("ens160".to_owned(), 1)]
        );
        // By the address that the configuration has.
        assert_eq!(matched(&[interface("lan", b)], &nics), [("lan".to_owned(), 1)]);
        // As the kernel counts, and as nothing else is left.
        assert_eq!(matched(&names(&["eth1"]), &nics), [("eth1".to_owned(), 1)]);
        assert_eq!(
            matched(&names(&["enp11s0", "enp3s0"]), &nics),
            [("enp3s0".to_owned(), 0), ("enp11s0".to_owned(), 1)]
        );
        // Software is no card, and what is ambiguous stays open.
        assert_eq!(matched(&names(&["br0", "bond0", "eth0.10", "lo", "docker0"]), &nics), []);
        assert_eq!(pair(&names(&["enp3s0"]), &nics).1, ["enp3s0"]);
    }

    fn plan(tree: &Memory, interfaces: &[Interface], nics: &[Nic]) -> Plan {
        let mut draft = Draft::new(tree);
        convert(&mut draft, interfaces, nics);
        draft.finish().unwrap()
    }

    #[test]
    fn systemd_gets_a_link_file() {
        let tree = Memory::default()
            .file("/usr/lib/udev/rules.d/80-net-setup-link.rules", "")
            .folder("/etc/systemd");
        let (interfaces, nics) = ([interface("ens33", None)], [nic(Some("00:0c:29:01:02:03"), Some(33))]);
        let changes = plan(&tree, &interfaces, &nics).changes;
        assert_eq!(changes[0].path, Path::new("/etc/systemd/network"));
        let crate::plan::Action::Create { bytes, mode: 0o644 } = &changes[1].action else {
            panic!("{changes:?}")
        };
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(
            text.contains("[Match]\nMACAddress=00:0c:29:01:02:03\nPath=*pci-*")
                && text.ends_with("[Link]\nName=ens33\n")
        );
        // Once more: nothing.
        let again = tree.file("/etc/systemd/network/10-vimg-ens33.link", bytes);
        assert!(plan(&again, &interfaces, &nics).changes.is_empty());
        // One card, one name, no address: it can only be that.
        let tree = Memory::default()
            .file("/lib/udev/rules.d/80-net-setup-link.rules", "")
            .folder("/etc/systemd/network");
        let changes = plan(&tree, &interfaces, &[nic(None, None)]).changes;
        assert!(!changes[0].diff.iter().any(|line| line.contains("MACAddress")) && changes.len() == 1);
    }

    #[test]
    fn patterns_keep_fitting() {
        let tree = |file: &str, text: &str| {
            Memory::default().file("/usr/lib/udev/rules.d/80-net-setup-link.rules", "").file(file, text)
        };
        let nics = [nic(Some("00:50:56:00:00:0a"), Some(192)), nic(Some("00:50:56:00:00:0b"), Some(224))];
        let network = tree("/etc/systemd/network/a.network", "[Match]\nName=ens*\n\n[Network]\nDHCP=yes\n");
        let netplan =
            tree("/etc/netplan/a.yaml", "network:\n  ethernets:\n    a:\n      match: {name: \"ens*\"}\n");
        for tree in [network, netplan] {
            let changes = plan(&tree, &[], &nics).changes;
            let links: Vec<_> = changes.iter().filter(|change| change.path.extension().is_some()).collect();
            assert_eq!(links.len(), 2, "{changes:?}");
            assert!(links[1].path.ends_with("10-vimg-ens224.link"));
            assert_eq!(plan(&tree, &[], &[nic(None, None)]).to_do.len(), 1);
        }
        let xen = Nic { model: Some("netfront".to_owned()), ..nic(Some("00:16:3e:00:00:01"), None) };
        let any = tree("/etc/systemd/network/a.network", "[Match]\nName=eth*\n");
        assert!(
            plan(&any, &[], &[xen]).changes.iter().any(|change| change.path.ends_with("10-vimg-eth0.link"))
        );
        for name in ["en*", "e*", "eth*", "enp*", "wlan*"] {
            let any = tree("/etc/systemd/network/a.network", &format!("[Match]\nName={name}\n"));
            let plan = plan(&any, &[], &nics);
            assert!(plan.changes.is_empty() && plan.to_do.is_empty(), "{name}");
        }
    }

    #[test]
    fn names_of_the_kernel_that_are_exchanged_are_told() {
        let tree = Memory::default()
            .file("/usr/lib/udev/rules.d/80-net-setup-link.rules", "")
            .folder("/etc/systemd/network");
        let [a, b] = [Some("00:50:56:00:00:0a"), Some("00:50:56:00:00:0b")];
        let nics = [nic(a, None), nic(b, None)];
        let exchanged = plan(&tree, &[interface("eth0", b), interface("eth1", a)], &nics);
        assert_eq!((exchanged.changes.len(), exchanged.to_do.len()), (2, 2));
        let straight = plan(&tree, &[interface("eth0", a), interface("eth1", b)], &nics);
        assert_eq!((straight.changes.len(), straight.to_do.len()), (2, 0));
    }

    #[test]
    fn udev_of_old_gets_a_rule() {
        let rule = "# PCI device 0x15ad:0x07b0 (vmxnet3)\nSUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{address}==\"00:50:56:00:00:01\", ATTR{type}==\"1\", KERNEL==\"eth*\", NAME=\"eth0\"\n";
        let tree = Memory::default().file(OLD_RULES, rule);
        let interfaces = [interface("eth0", None)];
        // The rule is right already.
        assert!(plan(&tree, &interfaces, &[nic(Some("00:50:56:00:00:01"), None)]).changes.is_empty());
        // The rule is that of an earlier card.
        let changes = plan(&tree, &interfaces, &[nic(Some("00:50:56:00:00:02"), None)]).changes;
        assert_eq!(changes[0].diff.len(), 2);
        assert!(
            changes[0].diff[1].contains("00:50:56:00:00:02") && changes[0].diff[1].contains("NAME=\"eth0\"")
        );
    }

    #[test]
    fn without_udev_the_kernel_counts() {
        let tree = Memory::default().folder("/etc/network");
        let found = plan(&tree, &[interface("eth0", None)], &[nic(Some("00:50:56:00:00:01"), None)]);
        assert!(found.changes.is_empty() && found.to_do.is_empty());
    }
}
