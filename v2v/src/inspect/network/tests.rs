use super::*;

fn found(name: &str, mac: Option<&str>, is_static: bool) -> Found {
    Found { name: name.to_owned(), mac: mac.map(str::to_owned), is_static }
}

const MAC: Option<&str> = Some("00:0c:29:aa:bb:cc");

#[test]
fn debian() {
    let text = "auto lo ens33\niface lo inet loopback\n# c\nallow-hotplug eth1\niface ens33 inet static\n\taddress 192.0.2.1/24\n\
        \thwaddress ether 00:0C:29:AA:BB:CC\niface eth0.100 inet dhcp\niface br0 inet static\n bridge_ports eth2 none\n";
    let mut interfaces = vec![];
    for found in files::ifupdown("interfaces", text) {
        add(&mut interfaces, found, Path::new("/x"));
    }
    interfaces.sort_by(|one, other| one.name.cmp(&other.name));
    let seen: Vec<_> =
        interfaces.iter().map(|found| (found.name.as_str(), found.mac.as_deref(), found.is_static)).collect();
    assert_eq!(
        seen,
        [("ens33", MAC, true), ("eth0", None, false), ("eth1", None, false), ("eth2", None, false)]
    );
}

#[test]
fn ubuntu() {
    let text = "# x\nnetwork:\n  version: 2\n  ethernets:\n    ens160:\n      dhcp4: no\n      addresses:\n      - 192.0.2.1/24\n\
        \x20   cards:\n      match:\n        macaddress: \"00:0c:29:aa:bb:cc\"\n      set-name: lan0\n      dhcp4: true\n    ens192:\n      \
        addresses: [192.0.2.2/24]\n  bridges:\n    br0:\n      interfaces: [ens160]\n";
    assert_eq!(
        netplan::parse("", text),
        [found("ens160", None, true), found("lan0", MAC, false), found("ens192", None, true)]
    );
    let flow = "network:\n  ethernets:\n    a:\n      match: {name: \"e*\", macaddress: \"00:0C:29:AA:BB:CC\"}\n      set-name: lan0\n";
    assert_eq!(netplan::parse("", flow), [found("lan0", MAC, false)]);
    assert_eq!(netplan::parse("", ": :\n - \n\t:x\n\"network\":\n"), []);
}

#[test]
fn red_hat_and_suse() {
    let text = "DEVICE=\"eth0\"\nHWADDR=00:0c:29:AA:bb:cc\nBOOTPROTO=none\nIPADDR=192.0.2.1\n";
    assert_eq!(files::ifcfg("ifcfg-eth9", text), [found("eth0", MAC, true)]);
    assert_eq!(files::ifcfg("ifcfg-eth0", "BOOTPROTO='dhcp'\nIPADDR=''\n"), [found("eth0", None, false)]);
    assert_eq!(files::ifcfg("ifcfg-eth-id-00:0c:29:aa:bb:cc", "BOOTPROTO=static\n")[0].mac.as_deref(), MAC);
    let keyfile = "[connection]\nid=x\ninterface-name=ens3\n[ethernet]\nmac-address=00:0C:29:AA:BB:CC\n[ipv4]\nmethod=manual\n";
    assert_eq!(files::keyfile("", keyfile), [found("ens3", MAC, true)]);
}

#[test]
fn systemd_and_udev() {
    assert_eq!(
        files::networkd("", "[Match]\nName=ens3 en*\n[Network]\nAddress=192.0.2.1/24\n"),
        [found("ens3", None, true), found("en*", None, true)]
    );
    assert_eq!(
        files::networkd("", "[Match]\nMACAddress=00:0c:29:aa:bb:cc\n[Link]\nName=lan\n"),
        [found("lan", MAC, false)]
    );
    let rule = "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{address}==\"00:0c:29:aa:bb:cc\", ATTR{type}==\"1\", KERNEL==\"eth*\", NAME=\"eth0\"";
    assert_eq!(files::udev("", rule), [found("eth0", MAC, false)]);
    assert_eq!(files::udev("", "ATTR{address}==\"x\", NAME=\"eth0\"\nNAME\nATTR{address}=\"\n"), []);
}

#[test]
fn others() {
    assert_eq!(files::netctl("", "Interface=eth0\nIP=static\n"), [found("eth0", None, true)]);
    assert_eq!(
        files::gentoo("", "config_eth0=\"192.0.2.1/24\"\nconfig_eth1=\"dhcp\"\n"),
        [found("eth0", None, true), found("eth1", None, false)]
    );
    assert_eq!(
        files::dhcpcd("", "interface eth0\nstatic ip_address=192.0.2.1/24\n"),
        [found("eth0", None, true)]
    );
}

#[test]
fn names_of_cards() {
    for name in ["eth0", "ens192", "enp0s3", "em1", "p2p1", "lan0", "bridge-me", "login"] {
        assert!(is_interface(name), "{name}");
    }
    for name in
        ["lo", "br0", "br-lan", "bond0", "wlp2s0", "en*", "eth0.1", "docker0", "", "../x", "a-name-of-16-byt"]
    {
        assert!(!is_interface(name), "{name}");
    }
}

#[test]
fn addresses() {
    assert_eq!(mac(" \"00-0C-29-AA-BB-CC\" ").as_deref(), MAC);
    assert_eq!(mac("00:0c:29:aa:bb"), None);
    assert_eq!(mac("00:0c:29:aa:bb:cg"), None);
}
