//! Disks without a description, and how chains of them are named.

use block::{Error, Result};
use serde_json::{Map, Value, json};

use super::{image, names, words};
use crate::guest::{Disk, Guest, Network, Nic};

/// Names of disks that are no files.
const SCHEMES: &[&str] = &[
    "nbd:",
    "nbd+tcp:",
    "nbd+unix:",
    "nbds:",
    "nbds+tcp:",
    "nbds+unix:",
    "json:",
    "host_device:",
    "null-co:",
];

/// Whether a name can only be that of a disk: a URI of a server, or options.
pub fn is_disk_name(name: &str) -> bool {
    SCHEMES.iter().any(|scheme| name.starts_with(scheme))
}

/// A machine of which one disk is known.
pub(super) fn guest(name: &str) -> Guest {
    let mut guest = Guest::default();
    add(&mut guest, name);
    guest
}

/// Adds a disk to a machine.
pub(super) fn add(guest: &mut Guest, name: &str) {
    guest.disks.push(Disk::new(name, image(name, None)));
    names::assign(&mut guest.disks);
}

/// The name of a chain of disks whose members do not say where their parents are: the disk itself first, then its
/// parent, with their formats.
pub(super) fn chain_name(members: &[(String, Option<&str>)]) -> String {
    let mut node: Option<Value> = None;
    for (name, format) in members.iter().rev() {
        let mut options = Map::new();
        if let Some(format) = format {
            options.insert("driver".to_owned(), json!(format));
        }
        options.insert("file".to_owned(), json!({ "filename": name }));
        if let Some(behind) = node.take() {
            options.insert("backing".to_owned(), behind);
        }
        node = Some(Value::Object(options));
    }
    format!("json:{}", node.unwrap_or_default())
}

/// A network card as the command line describes it: `mac=..,network=..`, `mac=..,bridge=..`, with `model=..` and `slot=..`
/// (VMware's slot number); `nat` and `hostonly` stand alone.
///
/// # Errors
/// `Usage`, with the word that is not understood.
pub fn parse_nic(text: &str) -> Result<Nic> {
    let mut nic = Nic::default();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let wrong = || {
            Error::usage(format!("'{part}' is no property of a network card"))
                .hint("it is described as mac=ADDRESS,network=NAME, with bridge=NAME, nat, model=MODEL and slot=NUMBER")
        };
        match (key, value) {
            ("nat", "") => nic.network = Network::Nat,
            ("hostonly", "") => nic.network = Network::HostOnly,
            (_, "") => return Err(wrong()),
            ("mac", _) => nic.mac = Some(words::mac(value).ok_or_else(wrong)?),
            ("network", _) => {
                nic.network = Network::Managed;
                nic.network_name = Some(value.to_owned());
            }
            ("bridge", _) => {
                nic.network = Network::Bridge;
                nic.network_name = Some(value.to_owned());
            }
            ("model", _) => nic.model = Some(value.to_ascii_lowercase()),
            ("slot", _) => nic.slot = Some(value.parse().map_err(|_| wrong())?),
            _ => return Err(wrong()),
        }
    }
    Ok(nic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_cards_in_words() {
        let nic = parse_nic("mac=00:0C:29:00:00:01,bridge=br0,model=E1000,slot=33").unwrap();
        assert_eq!(nic.mac.as_deref(), Some("00:0c:29:00:00:01"));
        assert_eq!(
            (nic.network, nic.network_name.as_deref(), nic.slot),
            (Network::Bridge, Some("br0"), Some(33))
        );
        assert_eq!(parse_nic("nat").unwrap().network, Network::Nat);
        for wrong in ["mac=1", "mac=ff:ff:ff:ff:ff:ff", "colour=red", "mac", "nat=1", "slot=x"] {
            parse_nic(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_chain_is_a_tree_of_options() {
        let members = [("./a \"b\".vdi".to_owned(), Some("vdi")), ("./c.vdi".to_owned(), None)];
        let name = chain_name(&members);
        assert_eq!(
            name,
            r#"json:{"driver":"vdi","file":{"filename":"./a \"b\".vdi"},"backing":{"file":{"filename":"./c.vdi"}}}"#
        );
        image::Spec::from_filename(&name).unwrap();
    }
}
