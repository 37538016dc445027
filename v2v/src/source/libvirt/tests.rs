use image::Policy;

use super::*;
use crate::guest::{Bus, RemovableKind};
use crate::source::image;

fn read(text: &str) -> Result<Guest> {
    guest(text.as_bytes(), &Place::nowhere(&Policy::default()))
}

const Q35: &str = r#"<domain type='kvm' id='3'>
  <name>web</name><uuid>0a1b2c3d-0000-4000-8000-1234567890ab</uuid>
  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid><title>Web</title>
  <metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
    <libosinfo:os id="http://debian.org/debian/12"/></libosinfo:libosinfo></metadata>
  <memory unit='KiB'>4194304</memory><currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static' current='2'>4</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware><feature enabled='yes' name='enrolled-keys'/><feature enabled='yes' name='secure-boot'/></firmware>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <cpu mode='custom' match='exact'><model fallback='forbid'>Haswell</model><topology sockets='1' dies='1' cores='2' threads='2'/></cpu>
  <clock offset='localtime'/>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/var/lib/libvirt/images/web.qcow2' index='2'/><backingStore/><target dev='vda' bus='virtio'/>
      <serial>S1</serial><boot order='2'/></disk>
    <disk type='block' device='disk'><driver name='qemu'/><source dev='/dev/vg/data'/><target dev='sdb' bus='scsi'/>
      <boot order='1'/><address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='a b'>
      <host name='fd00::1' port='10810'/></source><target dev='vdb' bus='virtio'/><readonly/>
      <encryption format='luks'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/img'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='floppy'><source file='/f.img'/><target dev='fda' bus='fdc'/></disk>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='network'><mac address='52:54:00:AA:BB:CC'/><source network='default'/><model type='virtio'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='e1000e'/></interface>
    <serial type='pty'/><tpm model='tpm-crb'/><sound model='ich9'/><graphics type='spice'/>
    <video><model type='qxl' vram='65536'/></video><hostdev mode='subsystem' type='pci'/>
  </devices></domain>"#;

#[test]
fn a_domain_with_uefi() {
    let guest = read(Q35).unwrap();
    assert_eq!((guest.name.as_str(), guest.origin, guest.memory_bytes), ("web", Origin::Kvm, Some(4 << 30)));
    assert_eq!((guest.cpus.count, guest.cpus.topology), (Some(4), Some((1, 2, 2))));
    assert_eq!(
        (guest.cpus.model.as_deref(), guest.architecture.as_deref()),
        (Some("Haswell"), Some("x86_64"))
    );
    assert_eq!(guest.firmware.kind, Some(FirmwareKind::Uefi));
    assert!(guest.firmware.secure_boot && guest.tpm && guest.local_time);
    assert_eq!(guest.os_hint.as_deref(), Some("http://debian.org/debian/12"));
    let ids: Vec<_> = guest.disks.iter().map(|disk| (disk.id.as_str(), disk.boot_order)).collect();
    assert_eq!(ids, [("sdb", Some(1)), ("vda", Some(2)), ("vdb", None), ("vdc", None)]);
    assert_eq!(guest.disks[0].image, image("/dev/vg/data", Some("raw")), "no format is raw, as for libvirt");
    assert_eq!(guest.disks[0].bus, Some(Bus::VirtioScsi));
    assert_eq!(guest.disks[0].guest_name.as_deref(), Some("sda"), "counted");
    assert_eq!(guest.disks[1].serial.as_deref(), Some("S1"));
    assert_eq!(guest.disks[2].image, image("nbd://[fd00::1]:10810/a%20b", Some("raw")));
    assert!(guest.disks[2].read_only);
    assert_eq!(guest.removables.len(), 2);
    assert_eq!(
        (guest.removables[1].kind, guest.removables[1].medium.as_deref()),
        (RemovableKind::Floppy, Some("/f.img"))
    );
    assert_eq!(
        (guest.nics[1].network, guest.nics[1].network_name.as_deref()),
        (Network::Bridge, Some("br0"))
    );
    assert_eq!(guest.display.unwrap(), Display { protocol: "spice".into(), video_bytes: Some(64 << 20) });
    let notes = guest.notes.join("\n");
    for part in ["'vdb' is encrypted", "rbd", "passed through", "TPM"] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
}

#[test]
fn domains_of_other_times_and_kinds() {
    let pc = read(
        "<domain type='qemu'><name>old</name><memory>524288</memory><os><type>hvm</type></os><devices>\
        <disk type='file'><source file='a.img'/><target dev='hda'/></disk></devices></domain>",
    )
    .unwrap();
    assert_eq!((pc.memory_bytes, pc.firmware.kind), (Some(512 << 20), Some(FirmwareKind::Bios)));
    assert_eq!((pc.disks[0].bus, pc.disks[0].guest_name.as_deref()), (Some(Bus::Ide), Some("sda")));
    assert_eq!(pc.disks[0].image, image("./a.img", Some("raw")));
    let xen = read("<domain type='xen'><name>pv</name><memory unit='MiB'>256</memory><os><type>linux</type>\
        <kernel>/boot/k</kernel><initrd>/boot/i</initrd><cmdline>root=/dev/xvda1 ro</cmdline></os><devices>\
        <disk type='block'><source dev='/dev/vg/pv'/><target dev='xvda' bus='xen'/></disk></devices></domain>")
    .unwrap();
    assert_eq!((xen.origin, xen.firmware.kind), (Origin::Xen, None));
    assert_eq!(xen.direct_boot.unwrap().cmdline, "root=/dev/xvda1 ro");
    assert_eq!(xen.disks[0].guest_name.as_deref(), Some("xvda"));
    assert!(
        read("<domain><memory unit='furlong'>1</memory></domain>")
            .unwrap_err()
            .to_string()
            .contains("furlong")
    );
    read("<domain><memory>99999999999999999999</memory></domain>").unwrap_err();
    read("<network/>").unwrap_err();
    read("<domain><os><type>exe</type></os></domain>").unwrap_err();
}
