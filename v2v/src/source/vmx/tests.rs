use image::Policy;
use proptest::prelude::*;

use super::*;
use crate::guest::{Bus, DiskImage, Network, RemovableKind};

fn read(text: &str) -> Guest {
    read_bytes(text.as_bytes()).unwrap()
}

fn read_bytes(bytes: &[u8]) -> Result<Guest> {
    guest(bytes, &Place::nowhere(&Policy::default()))
}

const WORKSTATION: &str = r#"#!/usr/bin/vmware
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "12"
displayName = "Büro |22alt|22"
annotation = "first|0Asecond"
guestOS = "debian10-64"
memsize = "2048"
numvcpus = "4"
cpuid.coresPerSocket = "2"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
uuid.bios = "56 4d 8a b5 12 34 56 78-9a bc de f0 12 34 56 78"
vm.genid = "-570185475166527344"
vm.genidX = "5219532467936463414"
scsi0.present = "TRUE"
scsi0.virtualDev = "lsilogic"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "old-000002.vmdk"
scsi0:1.present = "FALSE"
scsi0:1.fileName = "not.vmdk"
SCSI0:2.FileName = "second.vmdk"
scsi0:2.mode = "independent-nonpersistent"
scsi0:2.redo = "second.vmdk.REDO_x"
ide1:0.present = "TRUE"
ide1:0.deviceType = "cdrom-raw"
ide1:0.fileName = "auto detect"
ethernet0.present = "TRUE"
ethernet0.connectionType = "nat"
ethernet0.virtualDev = "e1000"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:12:34:56"
ethernet0.pciSlotNumber = "33"
ethernet1.present = "TRUE"
ethernet1.addressType = "static"
ethernet1.address = "00:50:56:AA:BB:CC"
ethernet1.generatedAddress = "00:0c:29:00:00:01"
ethernet2.present = "FALSE"
serial0.present = "TRUE"
serial0.fileType = "file"
sound.present = "TRUE"
sound.virtualDev = "hdaudio"
svga.vramSize = "134217728"
floppy0.present = "FALSE"
memsize = "7"
"#;

#[test]
fn a_machine_of_workstation() {
    let guest = read(WORKSTATION);
    assert_eq!(guest.name, "Büro \"alt\"");
    assert_eq!(guest.description.as_deref(), Some("first\nsecond"));
    assert_eq!(guest.memory_bytes, Some(2 << 30), "the first of two lines wins");
    assert_eq!(guest.cpus.topology, Some((2, 2, 1)));
    assert_eq!(guest.firmware.kind, Some(FirmwareKind::Uefi));
    assert!(guest.firmware.secure_boot);
    assert_eq!(guest.uuid.as_deref(), Some("564d8ab5-1234-5678-9abc-def012345678"));
    assert_eq!(guest.disks.len(), 2);
    assert_eq!(guest.disks[0].id, "scsi0:0");
    assert_eq!(guest.disks[0].image, image("./old-000002.vmdk"));
    assert_eq!(guest.disks[0].controller.as_deref(), Some("lsilogic"));
    assert_eq!(guest.disks[1].guest_name.as_deref(), Some("sdb"));
    assert_eq!(guest.removables[0].kind, RemovableKind::Cdrom);
    assert_eq!(guest.removables[0].medium, None);
    assert_eq!(guest.nics.len(), 2);
    assert_eq!(guest.nics[0].mac.as_deref(), Some("00:0c:29:12:34:56"));
    assert_eq!((guest.nics[0].network, guest.nics[0].slot), (Network::Nat, Some(33)));
    assert_eq!(guest.nics[1].mac.as_deref(), Some("00:50:56:aa:bb:cc"), "a static address is not lost");
    assert_eq!(guest.nics[1].network, Network::Bridge);
    assert_eq!(guest.serial_ports, 1);
    assert_eq!(guest.sound.as_deref(), Some("ich6"));
    assert_eq!(guest.display.as_ref().unwrap().video_bytes, Some(128 << 20));
    let notes = guest.notes.join("\n");
    assert!(notes.contains("nonpersistent") && notes.contains("redo log"), "{notes}");
}

fn image(name: &str) -> DiskImage {
    super::super::image(name, Some("vmdk"))
}

#[test]
fn the_generation_id_is_two_signed_numbers() {
    let guest =
        read("vm.genid = \"-570185475166527344\"\nvm.genidX = \"5219532467936463414\"\nmemsize = \"1\"\n");
    // By hand: the low number is f8164ad2_91b7a090 hex, the high one 486f7a1c_0fe4ea36.
    let (low, high) = (-570_185_475_166_527_344_i64, 5_219_532_467_936_463_414_i64);
    let low = format!("{low:016x}");
    let high: Vec<String> = high.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let wanted =
        format!("{}-{}-{}-{}-{}", &low[8..], &low[4..8], &low[..4], high[..2].concat(), high[2..].concat());
    assert_eq!(guest.genid.as_deref(), Some(wanted.as_str()));
}

#[test]
fn newer_hardware_shows_the_uuid_the_other_way_round() {
    let text =
        "virtualHW.version = \"19\"\nuuid.bios = \"42 10 8a b5 12 34 56 78-9a bc de f0 12 34 56 78\"\n";
    assert_eq!(read(text).uuid.as_deref(), Some("b58a1042-3412-7856-9abc-def012345678"));
}

#[test]
fn a_machine_of_esxi() {
    let guest = read(concat!(
        ".encoding = \"UTF-8\"\r\nconfig.version = \"8\"\r\nvirtualHW.version = \"19\"\r\n",
        "displayName = \"db1\"\r\nguestOS = \"rhel8-64\"\r\nmemSize = \"4096\"\r\nnumvcpus = \"2\"\r\n",
        "scsi0.virtualDev = \"pvscsi\"\r\nscsi0.present = \"TRUE\"\r\nsata0.present = \"TRUE\"\r\n",
        "nvme0.present = \"TRUE\"\r\nnvme0:1.fileName = \"/vmfs/volumes/5f/db1/log.vmdk\"\r\n",
        "scsi0:0.deviceType = \"scsi-hardDisk\"\r\nscsi0:0.fileName = \"db1.vmdk\"\r\nscsi0:0.present = \"TRUE\"\r\n",
        "scsi0:1.deviceType = \"rawDisk\"\r\nscsi0:1.fileName = \"rdm.vmdk\"\r\n",
        "sata0:0.deviceType = \"cdrom-image\"\r\nsata0:0.fileName = \"/vmfs/volumes/iso/x.iso\"\r\n",
        "ethernet0.virtualDev = \"vmxnet3\"\r\nethernet0.networkName = \"VM Network\"\r\n",
        "ethernet0.addressType = \"vpx\"\r\nethernet0.generatedAddress = \"00:50:56:8a:00:01\"\r\n",
        "ethernet0.pciSlotNumber = \"192\"\r\nethernet0.present = \"TRUE\"\r\n",
        "bios.hddOrder = \"scsi0:1,scsi0:0\"\r\nvtpm.present = \"TRUE\"\r\n",
    ));
    let ids: Vec<&str> = guest.disks.iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(ids, ["scsi0:1", "scsi0:0", "nvme0:1"]);
    let names: Vec<_> = guest.disks.iter().map(|disk| disk.guest_name.as_deref().unwrap()).collect();
    assert_eq!(names, ["sdb", "sda", "nvme0n2"]);
    assert_eq!(guest.disks[0].boot_order, Some(1));
    assert_eq!(guest.disks[2].bus, Some(Bus::Nvme));
    assert_eq!(guest.removables[0].bus, Some(Bus::Sata));
    assert_eq!(guest.nics[0].network_name.as_deref(), Some("VM Network"));
    assert_eq!((guest.nics[0].model.as_deref(), guest.nics[0].slot), (Some("vmxnet3"), Some(192)));
    assert_eq!(guest.firmware.kind, Some(FirmwareKind::Bios), "no firmware named is BIOS");
    assert!(guest.tpm && guest.notes.iter().any(|note| note.contains("TPM")));
}

#[test]
fn what_cannot_be_used_is_said() {
    let error = |text: &[u8]| read_bytes(text).unwrap_err().to_string();
    assert!(error(b"displayName = \"x\"\nencryption.keySafe = \"vmware:key/list\"\n").contains("encrypted"));
    assert!(error(b"KDMV\x01\0\0\0").contains("virtual disk"));
    assert!(error(b"# Disk DescriptorFile\nversion=1\n").contains("virtual disk"));
    assert!(error(b"hello\n").contains("no VMX file"));
    assert!(error(b".encoding = \"klingon\"\ndisplayName = \"\xff\"\n").contains("klingon"));
    assert_eq!(
        read_bytes(b".encoding = \"Shift_JIS\"\ndisplayName = \"\x93\xfa\x96\x7b\"\n").unwrap().name,
        "日本"
    );
    assert_eq!(
        read_bytes(b".encoding = \"windows-1252\"\ndisplayName = \"B\xfcro\"\n").unwrap().name,
        "Büro"
    );
}

fn escape(value: &str) -> String {
    let escaped = |c: char| match c {
        '"' | '|' | '#' | '\n' | '\r' => format!("|{:02X}", u32::from(c)),
        other => other.to_string(),
    };
    value.chars().map(escaped).collect()
}

proptest! {
    /// What VMware would write is read as it was meant.
    #[test]
    fn values_survive(pairs in proptest::collection::btree_map("[a-z][a-zA-Z0-9.:]{0,12}", "\\PC{0,30}", 1..20)) {
        let lines = pairs.iter().map(|(key, value)| format!("{key} = \"{}\"\n", escape(value)));
        let text: String = std::iter::once(".encoding = \"UTF-8\"\n".to_owned()).chain(lines).collect();
        let dict = Dict::parse(text.as_bytes()).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for (key, value) in &pairs {
            let key = key.to_ascii_lowercase();
            if seen.insert(key.clone()) {
                prop_assert_eq!(dict.text(&key).unwrap_or_default(), value.trim());
            }
        }
    }

    #[test]
    fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = read_bytes(&bytes);
    }
}

#[test]
fn cards_are_counted_by_their_slots() {
    let card = |number: u32, slot: u32, model: &str| {
        format!(
            "ethernet{number}.present = \"TRUE\"\nethernet{number}.virtualDev = \"{model}\"\nethernet{number}.pciSlotNumber = \"{slot}\"\n"
        )
    };
    let slots = |text: &str| read(text).nics.iter().map(|nic| nic.slot.unwrap()).collect::<Vec<_>>();
    let cards = [192, 224, 256, 1184];
    let text: String = (0..).zip(cards).map(|(number, slot)| card(number, slot, "vmxnet3")).collect();
    assert_eq!(slots(&text), [1184, 192, 224, 256]);
    let mixed = card(0, 192, "vmxnet3") + &card(1, 160, "e1000");
    assert_eq!(slots(&mixed), [192, 160], "drivers that are loaded one after the other count first");
}

#[test]
fn the_guest_counts_disks_by_slots_whatever_starts() {
    let text = "scsi0:0.fileName = \"a.vmdk\"\nscsi0:0.present = \"TRUE\"\nscsi0:1.fileName = \"b.vmdk\"\nscsi0:1.present = \"TRUE\"\nbios.hddOrder = \"scsi0:1\"\n";
    let guest = read(text);
    let names: Vec<_> =
        guest.disks.iter().map(|disk| (disk.id.as_str(), disk.guest_name.as_deref())).collect();
    assert_eq!(names, [("scsi0:1", Some("sdb")), ("scsi0:0", Some("sda"))]);
}
