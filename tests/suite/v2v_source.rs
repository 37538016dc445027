//! What other products wrote about a machine, with real disks behind it: every way in is read, and every disk shows the same
//! bytes.

mod packages;
mod policy;

use std::path::Path;

use image::{OpenOptions, Policy};
use tests::foreign::disk;
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, requires};
use v2v::guest::{Bus, FirmwareKind, Guest, Origin};
use v2v::source::{Kind, OpenedDisk, SourceOptions, detect, open_disks, read};

const SIZE: usize = 3 << 20;

/// A folder with a raw disk `d.raw`, and what is in it.
fn with_disk() -> (Dir, Vec<u8>) {
    let dir = Dir::new();
    let data = disk(SIZE);
    dir.write("d.raw", &data);
    (dir, data)
}

fn name(dir: &Dir, file: &str) -> String {
    dir.file(file).display().to_string()
}

#[track_caller]
fn guest(dir: &Dir, file: &str) -> Guest {
    read(&name(dir, file), &SourceOptions::default()).unwrap()
}

#[track_caller]
fn opened(guest: &Guest) -> Vec<OpenedDisk> {
    open_disks(guest, &OpenOptions::default()).unwrap()
}

fn contents(disk: &OpenedDisk) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.size).unwrap()];
    disk.device.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn vmx(disks: &[(&str, &str)]) -> String {
    let mut text =
        "#!/usr/bin/vmware\n.encoding = \"UTF-8\"\nconfig.version = \"8\"\nvirtualHW.version = \"19\"\n\
        displayName = \"machine\"\nguestOS = \"debian12-64\"\nmemsize = \"512\"\nscsi0.present = \"TRUE\"\n\
        scsi0.virtualDev = \"pvscsi\"\n"
            .to_owned();
    for (place, file) in disks {
        text += &format!("{place}.present = \"TRUE\"\n{place}.fileName = \"{file}\"\n");
    }
    text
}

#[test]
fn vmx_with_disks_of_every_kind() {
    requires!(qemu());
    let (dir, data) = with_disk();
    for (file, subformat) in [
        ("one.vmdk", "monolithicSparse"),
        ("split.vmdk", "twoGbMaxExtentSparse"),
        ("flat.vmdk", "monolithicFlat"),
        ("stream.vmdk", "streamOptimized"),
    ] {
        dir.qemu_ok(&format!("convert -f raw -O vmdk -o subformat={subformat} d.raw {file}"));
    }
    let places = [
        ("scsi0:0", "one.vmdk"),
        ("scsi0:1", "/vmfs/volumes/5f00/machine/split.vmdk"),
        ("sata0:0", "flat.vmdk"),
        ("nvme0:0", "C:\\\\VMs\\\\stream.vmdk"),
    ];
    dir.write("m.vmx", vmx(&places).replace("\\\\", "\\").as_bytes());
    let guest = guest(&dir, "m.vmx");
    assert_eq!((guest.name.as_str(), guest.origin), ("machine", Origin::Vmware));
    assert_eq!(guest.notes.len(), 2, "two were not where they are said to be: {:?}", guest.notes);
    let disks = opened(&guest);
    assert_eq!(disks.len(), 4);
    for (disk, described) in disks.iter().zip(&guest.disks) {
        assert!(contents(disk) == data, "{}", described.id);
        assert_eq!(disk.format.name(), "vmdk");
        assert!(disk.device.write_at(&[0; 512], 0).is_err(), "the source is never written");
    }
}

/// The machine names the head of the chain; each disk names its parent. VMware's linked clones have theirs in another
/// machine's folder, which has to be allowed.
#[test]
fn snapshots_and_linked_clones_of_vmware() {
    requires!(qemu());
    let (dir, mut data) = with_disk();
    std::fs::create_dir(dir.file("vm")).unwrap();
    dir.qemu_ok("convert -f raw -O vmdk d.raw vm/m.vmdk");
    let vm = dir.file("vm");
    let make = |child: &str, parent: &str, byte: u8| {
        let create = format!("create -q -f vmdk -F vmdk -b {parent} {child}");
        tests::command::qemu_img().words(&create).dir(&vm).ok();
        let write = format!("write -P {byte} {}k 64k", u32::from(byte) * 64);
        tests::command::qemu_io().words("-f vmdk").arg(child).arg("-c").arg(&write).dir(&vm).ok();
    };
    make("m-000001.vmdk", "m.vmdk", 1);
    make("m-000002.vmdk", "m-000001.vmdk", 2);
    data[1 << 16..2 << 16].fill(1);
    data[2 << 16..3 << 16].fill(2);
    dir.write("vm/m.vmx", vmx(&[("scsi0:0", "m-000002.vmdk")]).as_bytes());
    let disks = opened(&guest(&dir, "vm"));
    assert!(contents(&disks[0]) == data);
    assert_eq!(disks[0].chain.len(), 3, "{:?}", disks[0].chain);

    std::fs::create_dir(dir.file("clone")).unwrap();
    make("../clone/c.vmdk", &name(&dir, "vm/m-000002.vmdk"), 3);
    data[3 << 16..4 << 16].fill(3);
    dir.write("clone/c.vmx", vmx(&[("scsi0:0", "c.vmdk")]).as_bytes());
    let clone = guest(&dir, "clone");
    let error = open_disks(&clone, &OpenOptions::default()).unwrap_err();
    assert!(error.hints().iter().any(|hint| hint.contains("--allow")), "{error:?}");
    let policy = Policy { allow: vec![dir.file("vm")], ..Policy::default() };
    let disks = open_disks(&clone, &OpenOptions { policy, ..OpenOptions::default() }).unwrap();
    assert!(contents(&disks[0]) == data);
    assert_eq!(disks[0].chain.len(), 4);
}

/// Makes a child as VirtualBox's snapshots are: it knows its parent by UUID only.
fn vdi_child(dir: &Dir, child: &str, parent: &str, uuid: u8) -> String {
    let base = vdi::Header::parse(&dir.read(parent)[..512]).unwrap();
    let header = vdi::Header {
        image_type: vdi::ImageType::Differencing,
        parent: base.uuid,
        parent_modified: base.modified,
        uuid: vdi::Uuid([uuid; 16]),
        allocated: 0,
        ..base
    };
    // As the parent was made, whose layout the header names.
    dir.qemu_ok(&format!("create -q -f vdi {child} {SIZE}"));
    dir.poke(child, 0, &header.encode());
    header.uuid.to_string()
}

#[test]
fn virtualbox_with_snapshots() {
    requires!(qemu());
    let (dir, mut data) = with_disk();
    std::fs::create_dir(dir.file("Snapshots")).unwrap();
    dir.qemu_ok("convert -f raw -O vdi d.raw deb.vdi");
    let base = vdi::Header::parse(&dir.read("deb.vdi")[..512]).unwrap().uuid.to_string();
    let first = vdi_child(&dir, "Snapshots/1.vdi", "deb.vdi", 0x21);
    let second = vdi_child(&dir, "Snapshots/2.vdi", "Snapshots/1.vdi", 0x22);
    // Block 2 of the first child is known to be zeros.
    let map = vdi::Header::parse(&dir.read("Snapshots/1.vdi")[..512]).unwrap().map_offset;
    dir.poke("Snapshots/1.vdi", u64::from(map) + 8, &0xffff_fffe_u32.to_le_bytes());
    data[2 << 20..3 << 20].fill(0);
    dir.qemu_ok("convert -f raw -O vpc -o force_size=on d.raw data.vhd");
    let vbox = |registry: &str, attached: &str| {
        format!(
            "<?xml version=\"1.0\"?><VirtualBox xmlns=\"http://www.virtualbox.org/\" version=\"1.16-linux\"><Machine \
             uuid=\"{{8d0f0c5e-0000-4000-8000-1234567890ab}}\" name=\"deb\" OSType=\"Debian_64\">{registry}<Hardware>\
             <CPU count=\"2\"/><Memory RAMSize=\"512\"/></Hardware><StorageControllers><StorageController name=\"SATA\" \
             type=\"AHCI\">{attached}</StorageController></StorageControllers></Machine></VirtualBox>"
        )
    };
    let registry = format!(
        "<MediaRegistry><HardDisks><HardDisk uuid=\"{{{base}}}\" location=\"deb.vdi\" format=\"VDI\"><HardDisk \
         uuid=\"{{{first}}}\" location=\"Snapshots/1.vdi\" format=\"VDI\"><HardDisk uuid=\"{{{second}}}\" \
         location=\"Snapshots\\2.vdi\" format=\"VDI\"/></HardDisk></HardDisk><HardDisk \
         uuid=\"{{99999999-0000-4000-8000-000000000001}}\" location=\"D:\\disks\\data.vhd\" format=\"VHD\"/>\
         </HardDisks></MediaRegistry>"
    );
    let attach = |uuid: &str, port: u32| {
        format!(
            "<AttachedDevice type=\"HardDisk\" port=\"{port}\" device=\"0\"><Image uuid=\"{{{uuid}}}\"/></AttachedDevice>"
        )
    };
    let both = attach(&second, 0) + &attach("99999999-0000-4000-8000-000000000001", 1);
    dir.write("deb.vbox", vbox(&registry, &both).as_bytes());
    let machine = guest(&dir, "");
    assert_eq!((machine.origin, machine.memory_bytes), (Origin::VirtualBox, Some(512 << 20)));
    let disks = opened(&machine);
    let found = contents(&disks[0]);
    assert_eq!(found.iter().zip(&data).position(|(a, b)| a != b), None, "{:?}", disks[0].chain);
    assert_eq!(disks[0].chain.len(), 3);
    assert_eq!(disks[1].format.name(), "vpc");
    // A disk that is registered in the list of all machines, which is not here.
    dir.write("deb.vbox", vbox("", &attach(&base, 0)).as_bytes());
    let found = guest(&dir, "deb.vbox");
    assert!(found.notes[0].contains("has that UUID"), "{:?}", found.notes);
    assert!(contents(&opened(&found)[0]) == disk(SIZE));
    dir.write("deb.vbox", vbox("", &attach(&second, 0)).as_bytes());
    read(&name(&dir, "deb.vbox"), &SourceOptions::default()).unwrap_err();
}

#[test]
fn xen_and_libvirt() {
    requires!(qemu());
    let (dir, data) = with_disk();
    dir.qemu_ok("convert -f raw -O qcow2 d.raw d.qcow2");
    dir.qemu_ok("convert -f raw -O vpc -o force_size=on d.raw d.vhd");
    dir.write(
        "pv.cfg",
        b"name = 'pv'\nmemory = 256\ndisk = [ 'file:d.raw,xvda,w', 'tap:qcow2:d.qcow2,xvdb,w',\n 'format=vhd,vdev=xvdc,access=r,target=d.vhd' ]\n\
          vif = [ 'mac=00:16:3e:00:00:01,bridge=xenbr0' ]\nbootloader = 'pygrub'\n",
    );
    let pv = guest(&dir, "pv.cfg");
    assert_eq!((pv.origin, pv.disks[1].bus), (Origin::Xen, Some(Bus::Xen)));
    let disks = opened(&pv);
    assert_eq!(disks.iter().map(|disk| disk.format.name()).collect::<Vec<_>>(), ["raw", "qcow2", "vpc"]);
    assert!(disks.iter().all(|disk| contents(disk) == data));
    dir.write(
        "q35.xml",
        format!(
            "<domain type='kvm'><name>q</name><memory unit='GiB'>1</memory><vcpu>2</vcpu><os firmware='efi'><type \
             arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' \
             type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
            name(&dir, "d.qcow2")
        )
        .as_bytes(),
    );
    let q35 = guest(&dir, "q35.xml");
    assert_eq!((q35.origin, q35.firmware.kind), (Origin::Kvm, Some(FirmwareKind::Uefi)));
    assert!(contents(&opened(&q35)[0]) == data);
}

/// libvirt itself says what a domain looks like.
#[test]
fn a_domain_that_libvirt_prints() {
    requires!(tool("virsh"));
    let dir = Dir::new();
    let printed = Cmd::new("virsh").words("-c test:///default dumpxml test").dir(dir.path()).ok();
    dir.write("test.xml", printed.stdout.as_bytes());
    let guest = guest(&dir, "test.xml");
    assert_eq!(guest.name, "test");
    assert_eq!(guest.uuid.as_deref(), Some("6695eb01-f6a4-8304-79aa-97f2502e193f"));
    assert_eq!((guest.memory_bytes, guest.cpus.count), (Some(8 << 30), Some(2)));
}

#[test]
fn exports_of_hyper_v() {
    let (dir, data) = with_disk();
    for folder in ["srv/Virtual Machines", "srv/Virtual Hard Disks"] {
        std::fs::create_dir_all(dir.file(folder)).unwrap();
    }
    dir.vimg_ok("convert -f raw -O vpc -o force_size=on d.raw base.vhd");
    crate::vpc::difference(&dir, "check.avhd", "base.vhd", &[(b"W2ru", crate::vpc::wide(".\\base.vhd"))]);
    dir.vimg_ok("convert -f raw -O vhdx d.raw other.vhdx");
    for file in ["base.vhd", "check.avhd", "other.vhdx"] {
        dir.copy(file, &format!("srv/Virtual Hard Disks/{file}"));
    }
    // Binary: the disks that it names, as they are; the rest has to be said.
    let mut vmcx = vec![0x14, 0x20, 0x28, 0x01, 9];
    vmcx.extend(crate::vpc::wide("\0C:\\VMs\\srv\\Virtual Hard Disks\\check.avhd\0"));
    dir.write("srv/Virtual Machines/0A1B.vmcx", &vmcx);
    let machine = guest(&dir, "srv");
    assert_eq!((machine.name.as_str(), machine.origin, machine.disks.len()), ("srv", Origin::HyperV, 1));
    assert!(
        machine.notes[0].contains("--memory") && machine.notes[0].contains("--firmware"),
        "{:?}",
        machine.notes
    );
    let disks = opened(&machine);
    assert!(contents(&disks[0]) == data);
    assert_eq!(disks[0].chain.len(), 2);
    // One that names nothing: every disk that no other stands on.
    dir.write("srv/Virtual Machines/0A1B.vmcx", b"\x14\x20\x28\x01");
    let ids: Vec<String> = guest(&dir, "srv").disks.into_iter().map(|disk| disk.id).collect();
    assert_eq!(ids, ["check.avhd", "other.vhdx"]);
    // XML says it all.
    std::fs::remove_file(dir.file("srv/Virtual Machines/0A1B.vmcx")).unwrap();
    let text = "<?xml version=\"1.0\" encoding=\"UTF-16\"?><configuration><properties><name type=\"string\">srv2</name>\
        <subtype type=\"integer\">1</subtype></properties><settings><memory><bank><size>1024</size></bank></memory>\
        <processors><count>2</count></processors></settings><_d422512d-2bf2-4752-809d-7b82b5fcb1b4_><controller0><drive0>\
        <pathname type=\"string\">C:\\VMs\\srv\\Virtual Hard Disks\\check.avhd</pathname><type>VHD</type></drive0></controller0>\
        </_d422512d-2bf2-4752-809d-7b82b5fcb1b4_></configuration>";
    let bytes: Vec<u8> =
        [0xff, 0xfe].into_iter().chain(text.encode_utf16().flat_map(u16::to_le_bytes)).collect();
    dir.write("srv/Virtual Machines/0A1B.xml", &bytes);
    for source in ["srv", "srv/Virtual Machines/0A1B.xml"] {
        let machine = guest(&dir, source);
        assert_eq!((machine.name.as_str(), machine.memory_bytes), ("srv2", Some(1 << 30)));
        assert_eq!(
            (machine.firmware.kind, machine.disks[0].bus),
            (Some(FirmwareKind::Uefi), Some(Bus::Scsi))
        );
        assert!(contents(&opened(&machine)[0]) == data);
    }
}

#[test]
fn disks_alone_and_what_the_command_line_says() {
    requires!(qemu());
    let (dir, data) = with_disk();
    dir.qemu_ok("convert -f raw -O qcow2 d.raw d.qcow2");
    dir.write("d.vmdk.gz", &tests::foreign::gzip(&data));
    dir.write("t.tar", &tests::foreign::tar(&[("d.raw", &data)]));
    let options = SourceOptions {
        name: Some("named".to_owned()),
        memory_bytes: Some(1 << 30),
        cpus: Some(4),
        firmware: Some(FirmwareKind::Uefi),
        nics: vec![v2v::source::parse_nic("mac=00:0c:29:00:00:01,network=lan").unwrap()],
        bus: Some(Bus::Sata),
        disks: vec![name(&dir, "d.raw"), format!("{}:d.raw", name(&dir, "t.tar")), name(&dir, "d.vmdk.gz")],
        ..SourceOptions::default()
    };
    let machine = read(&name(&dir, "d.qcow2"), &options).unwrap();
    assert_eq!((machine.name.as_str(), machine.cpus.count, machine.nics.len()), ("named", Some(4), 1));
    let names: Vec<_> = machine.disks.iter().map(|disk| disk.guest_name.as_deref().unwrap()).collect();
    assert_eq!(names, ["sda", "sdb", "sdc", "sdd"]);
    for disk in opened(&machine) {
        assert!(contents(&disk) == data);
    }
    assert_eq!(guest(&dir, "d.qcow2").name, "d");
    assert!(contents(&opened(&guest(&dir, "d.vmdk.gz"))[0]) == data);
    dir.write("m.vmx", vmx(&[("scsi0:0", "d.raw")]).as_bytes());
    let two = SourceOptions { disks: vec![name(&dir, "m.vmx")], ..SourceOptions::default() };
    let error = read(&name(&dir, "d.qcow2"), &two).unwrap_err();
    assert!(error.to_string().contains("is a machine (VMX)"), "{error}");
    let uri = read("nbd://server:10809/export", &SourceOptions::default()).unwrap();
    assert_eq!((uri.name.as_str(), uri.disks[0].id.as_str()), ("export", "nbd://server:10809/export"));
}

/// Contents decide, whatever a file is called.
#[test]
fn kinds_are_found_by_contents() {
    requires!(qemu());
    let (dir, data) = with_disk();
    dir.qemu_ok("convert -f raw -O vmdk d.raw d.vmdk");
    dir.copy("d.vmdk", "wrong.vmx");
    let taken = guest(&dir, "wrong.vmx");
    assert!(taken.notes[0].contains("holds a disk"), "{:?}", taken.notes);
    assert!(contents(&opened(&taken)[0]) == data);
    dir.write("machine.txt", vmx(&[("scsi0:0", "d.vmdk")]).as_bytes());
    dir.write("envelope", b"<?xml version='1.0'?><!-- x --><ovf:Envelope xmlns:ovf='urn:x'/>");
    for (file, kind) in
        [("machine.txt", Kind::Vmx), ("envelope", Kind::Ovf), ("d.raw", Kind::Disk), ("d.vmdk", Kind::Disk)]
    {
        assert_eq!(detect(&name(&dir, file)).unwrap(), kind, "{file}");
    }
    assert_eq!(detect("/dev/null").unwrap(), Kind::Disk);
    let error = |file: &str| detect(&name(&dir, file)).unwrap_err();
    dir.write("a.zip", b"PK\x03\x04rest");
    assert!(error("a.zip").hints()[0].contains("unzip"));
    dir.write("a.xz", b"\xfd7zXZ\0rest");
    assert!(error("a.xz").hints()[0].contains("xz -d"));
    dir.write("page.html", b"<html></html>");
    assert!(error("page.html").to_string().contains("describes no machine"));
    assert_eq!(error("nothing").kind(), block::ErrorKind::NotFound);
    std::fs::create_dir(dir.file("empty")).unwrap();
    assert!(error("empty").to_string().contains("no description"));
    dir.write("second.vmx", vmx(&[("scsi0:0", "d.vmdk")]).as_bytes());
    assert!(error("").hints()[0].contains("second.vmx"), "two in one folder");
    assert!(Path::new(&name(&dir, "second.vmx")).exists());
}
