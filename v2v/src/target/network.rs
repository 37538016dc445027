//! Where network cards are plugged in on the target.

use block::{Error, Result};

use crate::guest::{Nic, Origin};

/// What a network card is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// A network that the target manages (libvirt's `default`).
    Network(String),
    /// A bridge of the host.
    Bridge(String),
}

impl Connection {
    /// `network:NAME` or `bridge:NAME`.
    ///
    /// # Errors
    /// `Usage`: it is neither, or the name is empty.
    pub fn parse(text: &str) -> Result<Self> {
        match text.split_once(':') {
            Some(("network", name)) if !name.is_empty() => Ok(Self::Network(name.to_owned())),
            Some(("bridge", name)) if !name.is_empty() => Ok(Self::Bridge(name.to_owned())),
            _ => Err(Error::usage(format!("'{text}' is neither network:NAME nor bridge:NAME"))),
        }
    }

    /// The network's or the bridge's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Network(name) | Self::Bridge(name) => name,
        }
    }
}

/// Which network of the source becomes which of the target: `--network`, `--bridge` and `--mac`.
///
/// A rule for the card's own address comes first, then one for the name of its network on the source, then one without a
/// name. Without any, the names of a guest of KVM stay, for they are libvirt's already; everybody else's cards go to
/// [`NetworkMap::FALLBACK`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkMap {
    macs: Vec<(String, Connection)>,
    names: Vec<(String, Connection)>,
    any: Option<Connection>,
}

impl NetworkMap {
    /// The network that every installation of libvirt has.
    pub const FALLBACK: &str = "default";

    /// Adds `IN:OUT` (network IN of the source becomes OUT) or `OUT` (all of them do).
    ///
    /// # Errors
    /// `Usage`: a name is empty.
    pub fn add_network(&mut self, rule: &str) -> Result<()> {
        self.add(rule, Connection::Network)
    }

    /// The same for bridges of the target.
    ///
    /// # Errors
    /// `Usage`: a name is empty.
    pub fn add_bridge(&mut self, rule: &str) -> Result<()> {
        self.add(rule, Connection::Bridge)
    }

    fn add(&mut self, rule: &str, kind: impl Fn(String) -> Connection) -> Result<()> {
        match rule.rsplit_once(':') {
            Some((from, to)) if !from.is_empty() && !to.is_empty() => {
                self.names.push((from.to_owned(), kind(to.to_owned())));
            }
            None if !rule.is_empty() => self.any = Some(kind(rule.to_owned())),
            _ => return Err(Error::usage(format!("'{rule}' is neither OUT nor IN:OUT"))),
        }
        Ok(())
    }

    /// Adds `MAC:network:NAME` or `MAC:bridge:NAME`.
    ///
    /// # Errors
    /// `Usage`: the address or what follows it makes no sense.
    pub fn add_mac(&mut self, rule: &str) -> Result<()> {
        let (mac, rest) = rule
            .get(..17)
            .zip(rule.get(17..))
            .and_then(|(mac, rest)| Some((mac, rest.strip_prefix(':')?)))
            .ok_or_else(|| Error::usage(format!("'{rule}' is not MAC:network:NAME or MAC:bridge:NAME")))?;
        let mac = parse_mac(mac).ok_or_else(|| Error::usage(format!("'{mac}' is no hardware address")))?;
        self.macs.push((mac, Connection::parse(rest)?));
        Ok(())
    }

    /// Where `nic` of a guest of `origin` goes.
    pub fn connect(&self, nic: &Nic, origin: Origin) -> Connection {
        let by_mac = nic.mac.as_deref().and_then(|mac| find(&self.macs, &mac.to_ascii_lowercase()));
        let by_name = || nic.network_name.as_deref().and_then(|name| find(&self.names, name));
        if let Some(found) = by_mac.or_else(by_name).or(self.any.as_ref()) {
            return found.clone();
        }
        match (&nic.network_name, nic.network, origin) {
            (Some(name), crate::guest::Network::Bridge, Origin::Kvm) => Connection::Bridge(name.clone()),
            (Some(name), _, Origin::Kvm) => Connection::Network(name.clone()),
            _ => Connection::Network(Self::FALLBACK.to_owned()),
        }
    }
}

fn find<'a>(rules: &'a [(String, Connection)], key: &str) -> Option<&'a Connection> {
    rules.iter().rev().find(|(name, _)| name == key).map(|(_, connection)| connection)
}

/// A hardware address in lower case with colons; hyphens, and no separators at all, are understood, too.
pub fn parse_mac(text: &str) -> Option<String> {
    let separated = text.len() == 17
        && text.bytes().enumerate().all(|(index, byte)| (index % 3 == 2) == matches!(byte, b':' | b'-'));
    let digits: String = match separated {
        true => text.chars().filter(|c| !matches!(c, ':' | '-')).collect(),
        false => text.to_owned(),
    };
    if digits.len() != 12 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let lower = digits.to_ascii_lowercase();
    let pairs: Vec<&str> = (0..6).filter_map(|index| lower.get(index * 2..index * 2 + 2)).collect();
    Some(pairs.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(mac: &str, name: &str) -> Nic {
        Nic { mac: Some(mac.to_owned()), network_name: Some(name.to_owned()), ..Nic::default() }
    }

    #[test]
    fn the_most_particular_rule_wins_and_the_last_of_its_kind() {
        let mut map = NetworkMap::default();
        let card = nic("00:0C:29:aa:bb:cc", "VM Network");
        assert_eq!(map.connect(&card, Origin::Vmware), Connection::Network("default".to_owned()));
        assert_eq!(map.connect(&card, Origin::Kvm), Connection::Network("VM Network".to_owned()));
        map.add_bridge("br0").unwrap();
        assert_eq!(map.connect(&card, Origin::Kvm), Connection::Bridge("br0".to_owned()));
        map.add_network("VM Network:lan").unwrap();
        map.add_network("VM Network:dmz").unwrap();
        assert_eq!(map.connect(&card, Origin::Vmware), Connection::Network("dmz".to_owned()));
        map.add_mac("00:0c:29:AA:bb:cc:bridge:br7").unwrap();
        assert_eq!(map.connect(&card, Origin::Vmware), Connection::Bridge("br7".to_owned()));
        assert_eq!(
            map.connect(&nic("00:0c:29:aa:bb:cd", "x"), Origin::Vmware),
            Connection::Bridge("br0".to_owned())
        );
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        let mut map = NetworkMap::default();
        for rule in ["", ":x", "x:"] {
            map.add_network(rule).unwrap_err();
        }
        for rule in [
            "",
            "00:0c:29:aa:bb:cc",
            "00:0c:29:aa:bb:cc:lan",
            "00:0c:29:aa:bb:zz:bridge:b",
            "ä:0c:29:aa:bb:cc:bridge:b",
        ] {
            map.add_mac(rule).unwrap_err();
        }
    }

    #[test]
    fn addresses_are_understood_in_every_spelling() {
        for text in ["00:0C:29:AA:BB:CC", "00-0c-29-aa-bb-cc", "000C29AABBCC"] {
            assert_eq!(parse_mac(text).as_deref(), Some("00:0c:29:aa:bb:cc"));
        }
        for text in ["", "00:0c:29:aa:bb", "00:0c:29:aa:bb:cc:dd", "000:c29:aabbcc0", "0:00c:29:aa:bb:cc"] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
