//! One machine with everything, one with nothing, in every form.

use std::path::{Path, PathBuf};

use super::*;
use crate::guest::*;
use crate::inspect::SystemKind;

fn disk(id: &str) -> Disk {
    Disk {
        bus: Some(Bus::Scsi),
        controller: Some("pvscsi".to_owned()),
        ..Disk::new(id, DiskImage::Empty { size_bytes: 1 << 30 })
    }
}

fn output(path: &str, bus: Bus) -> OutputDisk {
    OutputDisk { path: PathBuf::from(path), format: "qcow2".to_owned(), size_bytes: 1 << 30, bus }
}

/// Everything that a source can say.
pub(super) fn rich() -> (Guest, TargetSpec) {
    let guest = Guest {
        name: "web & \"db\"".to_owned(),
        origin: Origin::Vmware,
        uuid: Some("564D1234-5678-9ABC-DEF0-123456789ABC".to_owned()),
        genid: Some("564d1234-5678-9abc-def0-123456789abd".to_owned()),
        description: Some("first line\nsecond <line>".to_owned()),
        memory_bytes: Some((3 << 30) + 1),
        cpus: Cpus { count: Some(4), topology: Some((1, 2, 2)), model: None },
        disks: vec![
            disk("scsi0:0"),
            Disk { boot_order: Some(1), serial: Some("VM-0001/x".to_owned()), ..disk("scsi0:1") },
            Disk { read_only: true, ..disk("scsi0:2") },
        ],
        removables: vec![
            Removable {
                kind: RemovableKind::Cdrom,
                bus: Some(Bus::Ide),
                medium: Some("/iso/a.iso".to_owned()),
            },
            Removable { kind: RemovableKind::Floppy, bus: Some(Bus::Floppy), medium: None },
        ],
        nics: vec![
            Nic {
                mac: Some("00:0C:29:aa:bb:01".to_owned()),
                model: Some("vmxnet3".to_owned()),
                network_name: Some("VM Network".to_owned()),
                ..Nic::default()
            },
            Nic { network_name: Some("dmz".to_owned()), ..Nic::default() },
        ],
        display: Some(Display { protocol: "vnc".to_owned(), video_bytes: None }),
        sound: Some("hdaudio".to_owned()),
        serial_ports: 2,
        local_time: true,
        tpm: true,
        ..Guest::default()
    };
    let mut networks = NetworkMap::default();
    networks.add_bridge("dmz:br1").unwrap();
    let spec = TargetSpec {
        disks: vec![
            output("/images/it's, 1.qcow2", Bus::Virtio),
            output("/images/b.qcow2", Bus::VirtioScsi),
            output("/images/c.qcow2", Bus::Sata),
        ],
        firmware: FirmwareKind::Uefi,
        secure_boot: true,
        os: OsFacts {
            kind: Some(SystemKind::Linux),
            distribution: "debian".to_owned(),
            version: "12".to_owned(),
            product: "Debian GNU/Linux 12 (bookworm)".to_owned(),
            architecture: "x86_64".to_owned(),
        },
        networks,
        ..TargetSpec::default()
    };
    (guest, spec)
}

/// A disk, and nothing else known.
pub(super) fn poor() -> (Guest, TargetSpec) {
    let guest = Guest { name: "old".to_owned(), disks: vec![disk("a")], ..Guest::default() };
    let spec = TargetSpec {
        disks: vec![output("/images/old.img", Bus::Ide)],
        chipset: Chipset::Pc,
        ..TargetSpec::default()
    };
    (guest, spec)
}

pub(super) fn machine((guest, spec): (Guest, TargetSpec)) -> Machine {
    Machine::new(&guest, &spec).unwrap()
}

/// Compares with `golden/NAME`; with `VIMG_BLESS` set, makes it so.
pub(super) fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/target/golden").join(name);
    if std::env::var_os("VIMG_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{name} differs from golden/{name}:\n{text}");
}

#[test]
fn libvirts_domain() {
    golden("rich.xml", &libvirt::domain(&machine(rich())).unwrap());
    golden("poor.xml", &libvirt::domain(&machine(poor())).unwrap());
}

#[test]
fn qemus_script() {
    golden("rich.sh", &qemu::script(&machine(rich()), Path::new("/images")).unwrap());
    golden("poor.sh", &qemu::script(&machine(poor()), Path::new("/elsewhere")).unwrap());
}

#[test]
fn doubts_are_noted() {
    let notes = machine(rich()).notes;
    let expected = [
        "serial number is 'VM-0001x' here",
        "The medium in its CD-ROM drive stays behind: /iso/a.iso.",
        "Network card 2 gets a new address",
    ];
    assert_eq!(notes.len(), expected.len(), "{notes:?}");
    for (note, expected) in notes.iter().zip(expected) {
        assert!(note.contains(expected), "{note}");
    }
    let notes = machine(poor()).notes;
    assert_eq!(notes.len(), 2, "memory and processors: {notes:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut Guest, &mut TargetSpec)| {
        let (mut guest, mut spec) = rich();
        change(&mut guest, &mut spec);
        Machine::new(&guest, &spec).unwrap_err().to_string()
    };
    assert_eq!(refused(&|_, spec| spec.disks.truncate(1)), "the guest has 3 disks, the output 1");
    assert_eq!(refused(&|_, spec| spec.firmware = FirmwareKind::Bios), "Secure Boot needs UEFI");
    assert!(refused(&|_, spec| spec.chipset = Chipset::Pc).starts_with("Secure Boot needs the q35"));
    assert_eq!(refused(&|_, spec| spec.disks[0].bus = Bus::Ide), "the q35 board has no IDE");
    assert!(refused(&|_, spec| spec.disks[0].bus = Bus::Xen).contains("cannot be attached to xen"));
    assert!(refused(&|_, spec| spec.os.architecture = "aarch64".to_owned()).contains("aarch64"));
    assert!(refused(&|guest, _| guest.cpus.count = Some(0)).starts_with("0 processors"));
    let relative = |_: &mut Guest, spec: &mut TargetSpec| spec.disks[0].path = "x.qcow2".into();
    let (mut guest, mut spec) = rich();
    relative(&mut guest, &mut spec);
    libvirt::domain(&machine((guest, spec))).unwrap_err();
}

#[test]
fn nonsense_of_a_source_is_left_out() {
    let (mut guest, spec) = rich();
    guest.name = "a/b\n".to_owned();
    guest.uuid = Some("00000000-0000-0000-0000-000000000000".to_owned());
    guest.genid = Some("zz".to_owned());
    guest.cpus.topology = Some((u32::MAX, u32::MAX, 2));
    guest.nics[0].mac = Some("01:00:5e:00:00:01".to_owned());
    guest.nics[1].mac = Some("00:00:00:00:00:00".to_owned());
    guest.sound = Some("gus".to_owned());
    let machine = machine((guest, spec));
    assert_eq!((machine.name.as_str(), &machine.uuid, &machine.genid), ("a-b-", &None, &None));
    assert_eq!((machine.topology, &machine.sound), (None, &None));
    assert!(machine.nics.iter().all(|nic| nic.mac.is_none()));
    assert_eq!(machine.notes.len(), 9, "{:?}", machine.notes);
}

#[test]
fn letters_go_on_after_z() {
    assert_eq!(machine::letters("sd", 0), "sda");
    assert_eq!(machine::letters("sd", 25), "sdz");
    assert_eq!(machine::letters("sd", 26), "sdaa");
    assert_eq!(machine::letters("sd", 701), "sdzz");
    assert_eq!(machine::letters("sd", 702), "sdaaa");
}

#[test]
fn cards_are_kept_where_qemu_has_them() {
    let (mut guest, mut spec) = rich();
    guest.nics[1].model = Some("netfront".to_owned());
    spec.nic_model = NicModel::Keep;
    let machine = machine((guest, spec));
    assert_eq!(machine.nics.iter().map(|nic| nic.model.as_str()).collect::<Vec<_>>(), ["vmxnet3", "e1000"]);
}

#[test]
fn proxmox_configuration_and_script() {
    let place = proxmox::Place { vmid: 123, ..proxmox::Place::default() };
    golden("rich.conf", &proxmox::config(&machine(rich()), &place));
    golden("poor.conf", &proxmox::config(&machine(poor()), &place));
    golden("rich.proxmox.sh", &proxmox::script(&machine(rich()), Path::new("/images")).unwrap());
    golden("poor.proxmox.sh", &proxmox::script(&machine(poor()), Path::new("/images")).unwrap());
}

#[test]
fn kubevirts_manifest() {
    golden("rich.yaml", &kubevirt::manifest(&machine(rich())).unwrap());
    golden("poor.yaml", &kubevirt::manifest(&machine(poor())).unwrap());
}

#[test]
fn the_envelope_of_ovf() {
    let files = |count: usize| -> Vec<ovf::DiskFile> {
        (1..=count).map(|number| ovf::DiskFile { name: format!("d{number}.vmdk"), len: 1000 }).collect()
    };
    golden("rich.ovf", &ovf::envelope(&machine(rich()), &ovf::Product::default(), &files(3)));
    golden("poor.ovf", &ovf::envelope(&machine(poor()), &ovf::Product::VirtualBox, &files(1)));
}
