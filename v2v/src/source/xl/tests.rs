use std::fmt::Write as _;

use image::Policy;
use proptest::prelude::*;

use super::*;
use crate::guest::{Bus, RemovableKind};
use crate::source::image;

fn read(text: &str) -> Result<Guest> {
    guest(text.as_bytes(), &Place::nowhere(&Policy::default()))
}

#[test]
fn a_paravirtual_guest() {
    let guest = read(
        "# a guest\nname = 'pv1' ; memory = 512\nvcpus=2\nkernel = \"/boot/vmlinuz-6.1\"\nramdisk = '/boot/initrd.img'\n\
         root = '/dev/xvda1 ro'\nextra = 'console=hvc0'\n\
         disk = [ 'phy:/dev/vg/pv1-disk,xvda,w', # the disk\n   'phy:/dev/vg/pv1-swap,xvdb,w', ]\n\
         vif = [ 'mac=00:16:3e:00:00:01,bridge=xenbr0', '' ]\non_crash = 'restart'\n",
    )
    .unwrap();
    assert_eq!(
        (guest.name.as_str(), guest.origin, guest.memory_bytes),
        ("pv1", Origin::Xen, Some(512 << 20))
    );
    assert_eq!(guest.firmware.kind, None);
    let boot = guest.direct_boot.unwrap();
    assert_eq!(boot.cmdline, "root=/dev/xvda1 ro console=hvc0");
    assert_eq!(boot.initrd.as_deref(), Some("/boot/initrd.img"));
    assert_eq!(guest.disks[1].image, image("/dev/vg/pv1-swap", Some("raw")));
    assert_eq!((guest.disks[0].bus, guest.disks[0].guest_name.as_deref()), (Some(Bus::Xen), Some("xvda")));
    assert_eq!(guest.nics.len(), 2);
    assert_eq!(guest.nics[0].model.as_deref(), Some("netfront"));
    assert_eq!(
        (guest.nics[0].network, guest.nics[0].network_name.as_deref()),
        (Network::Bridge, Some("xenbr0"))
    );
}

#[test]
fn a_machine_with_firmware() {
    let guest = read(
        "builder = 'hvm'\nname = \"win\"\nuuid='0a1b2c3d-0000-4000-8000-1234567890ab'\nmemory = 0x400\nbios = 'ovmf'\n\
         kernel = '/usr/lib/xen-4.17/boot/hvmloader'\n\
         disk = [ 'format=vhd, vdev=hda, access=rw, target=win.vhd', '/iso/x.iso,raw,hdc,ro,cdrom' ]\ndisk += ['b.qcow2,qcow2,hdb']\n\
         vif = ['type=ioemu,mac=00:16:3e:00:00:02,model=e1000']\nvnc=1\nvideoram=16\nsoundhw='hda'\nserial='pty'\nlocaltime=1\n\
         boot='d'\npci=['01:00.0']\n",
    )
    .unwrap();
    assert_eq!((guest.memory_bytes, guest.firmware.kind), (Some(1 << 30), Some(FirmwareKind::Uefi)));
    assert_eq!(guest.direct_boot, None, "Xen's own loader is none");
    assert_eq!(guest.disks[0].image, image("./win.vhd", Some("vpc")));
    assert_eq!((guest.disks[0].bus, guest.disks[0].guest_name.as_deref()), (Some(Bus::Ide), Some("xvda")));
    assert_eq!(guest.disks.len(), 2, "appended");
    assert_eq!(guest.removables[0].kind, RemovableKind::Cdrom);
    assert_eq!(guest.nics[0].model.as_deref(), Some("e1000"));
    assert!(guest.local_time && guest.serial_ports == 1 && guest.sound.as_deref() == Some("ich6"));
    assert_eq!(guest.display.unwrap().video_bytes, Some(16 << 20));
    let notes = guest.notes.join("\n");
    assert!(notes.contains("boot = 'd'") && notes.contains("passed through"), "{notes}");
    let pygrub = read("type='pvh'\nbootloader='pygrub'\ndisk=['a.img,raw,xvda']\n").unwrap();
    assert!(pygrub.notes[0].contains("pygrub") && pygrub.direct_boot.is_none());
}

#[test]
fn errors_name_the_line() {
    let error = |text: &str| read(text).unwrap_err();
    assert!(error("name = 'x'\nmemory = (1)\n").to_string().contains("line 2"));
    assert!(error("name = 'x\n").to_string().contains("end of the string"));
    assert!(error("disk = [ 'a' 'b' ]\n").to_string().contains("',' or ']'"));
    assert!(error("import os\nname = 'x'\n").hints()[0].contains("Python"));
    assert!(error("a = 'x' 'y'\n").to_string().contains("end of the line"));
    assert!(error(&format!("a = {}", "[".repeat(100_000))).to_string().contains("deep"));
    assert!(error("disk = [ ',raw,xvda' ]\n").to_string().contains("no target"));
}

fn written(values: &std::collections::BTreeMap<String, Vec<String>>) -> String {
    let mut text = String::new();
    for (index, (key, list)) in values.iter().enumerate() {
        let quote = if index % 2 == 0 { '"' } else { '\'' };
        let escaped = |value: &String| -> String {
            let inner: String = value
                .chars()
                .map(|c| if c == quote || c == '\\' { format!("\\{c}") } else { c.to_string() })
                .collect();
            format!("{quote}{inner}{quote}")
        };
        let items: Vec<String> = list.iter().map(escaped).collect();
        let end = if index % 3 == 0 { ";" } else { "\n# more\n" };
        let _ = match items.as_slice() {
            [one] => write!(text, "{key} = {one}{end}"),
            items => write!(text, "{key}=[\n {} ,]{end}", items.join(",\n")),
        };
    }
    text.replace("[\n  ,]", "[]")
}

proptest! {
    #[test]
    fn values_survive(values in proptest::collection::btree_map("[a-z_]{1,8}", proptest::collection::vec("\\PC{0,20}", 0..4), 0..8)) {
        let config = Config::parse(&written(&values)).unwrap();
        for (key, list) in &values {
            match list.as_slice() {
                [one] => prop_assert_eq!(config.get(key), Some(&Value::Text(one.clone()))),
                list => prop_assert_eq!(config.list(key), list.iter().map(String::as_str).collect::<Vec<_>>()),
            }
        }
    }

    #[test]
    fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "[a-z='\"\\[\\],;#\\\\ \n]{0,200}") {
        let _ = guest(&bytes, &Place::nowhere(&Policy::default()));
        let _ = read(&text);
    }
}
