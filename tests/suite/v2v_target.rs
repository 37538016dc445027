//! Descriptions of machines, judged by those who take them: libvirt's schema and `virsh`, `sh` and QEMU.

use std::path::Path;

use tests::skip::{Need, note, tool};
use tests::{Cmd, Dir, requires};
use v2v::guest::{Bus, Cpus, Disk, DiskImage, FirmwareKind, Guest, Nic, Origin, Removable, RemovableKind};
use v2v::inspect::SystemKind;
use v2v::target::{
    Chipset, CpuMode, Loader, Machine, NetworkMap, NicModel, OsFacts, OutputDisk, TargetSpec, libvirt, qemu,
};

/// What XML, shells and QEMU's options all have trouble with.
const NAME: &str = "it's a <\"web\"> & db, no. 1 $HOME \\ `id`";

fn guest(disks: usize) -> Guest {
    let disk = |index: usize| Disk {
        bus: Some(Bus::Scsi),
        controller: Some("pvscsi".to_owned()),
        serial: Some(format!("S-{index}")),
        ..Disk::new(format!("scsi0:{index}"), DiskImage::Empty { size_bytes: 8 << 20 })
    };
    Guest {
        name: NAME.to_owned(),
        origin: Origin::Vmware,
        uuid: Some("564d1234-5678-9abc-def0-123456789abc".to_owned()),
        genid: Some("564d1234-5678-9abc-def0-123456789abd".to_owned()),
        description: Some("a\n<b> & \u{1}".to_owned()),
        memory_bytes: Some(256 << 20),
        cpus: Cpus { count: Some(2), topology: Some((1, 2, 1)), model: None },
        disks: (0..disks).map(disk).collect(),
        removables: [RemovableKind::Cdrom, RemovableKind::Floppy]
            .map(|kind| Removable { kind, bus: None, medium: None })
            .to_vec(),
        nics: vec![
            Nic { mac: Some("00:0c:29:aa:bb:01".to_owned()), ..Nic::default() },
            Nic { network_name: Some("a & b".to_owned()), ..Nic::default() },
        ],
        sound: Some("ac97".to_owned()),
        serial_ports: 2,
        ..Guest::default()
    }
}

fn spec(dir: &Dir, disks: usize, bus: Bus) -> TargetSpec {
    let output = |index: usize| OutputDisk {
        path: dir.file(&format!("{NAME} {index}.qcow2").replace('/', "-")),
        format: "qcow2".to_owned(),
        size_bytes: 8 << 20,
        bus,
    };
    let mut networks = NetworkMap::default();
    networks.add_bridge("a & b:br1").unwrap();
    TargetSpec {
        disks: (0..disks).map(output).collect(),
        networks,
        os: OsFacts {
            kind: Some(SystemKind::Linux),
            distribution: "debian".to_owned(),
            version: "12".to_owned(),
            ..OsFacts::default()
        },
        ..TargetSpec::default()
    }
}

/// One spec after the other, with what is particular about it.
fn variants(dir: &Dir) -> Vec<(String, usize, TargetSpec)> {
    let mut all = vec![];
    for bus in [Bus::Virtio, Bus::VirtioScsi, Bus::Scsi, Bus::Sata] {
        all.push((format!("nine on {}", bus.name()), 9, spec(dir, 9, bus)));
    }
    let pc = |bus| TargetSpec { chipset: Chipset::Pc, ..spec(dir, 3, bus) };
    all.push(("IDE".to_owned(), 3, pc(Bus::Ide)));
    all.push(("SATA on the old board".to_owned(), 3, pc(Bus::Sata)));
    let virtio = || spec(dir, 1, Bus::Virtio);
    let uefi = || TargetSpec { firmware: FirmwareKind::Uefi, ..virtio() };
    all.push(("UEFI".to_owned(), 1, uefi()));
    all.push(("Secure Boot".to_owned(), 1, TargetSpec { secure_boot: true, ..uefi() }));
    let loader = Loader { code: "/x/code & .fd".into(), variables: "/x/vars.fd".into() };
    all.push(("loader".to_owned(), 1, TargetSpec { loader: Some(loader.clone()), ..uefi() }));
    let nvram = Some("/x/own vars.fd".into());
    all.push(("own variables".to_owned(), 1, TargetSpec { nvram: nvram.clone(), ..uefi() }));
    all.push(("both".to_owned(), 1, TargetSpec { loader: Some(loader), nvram, secure_boot: true, ..uefi() }));
    all.push((
        "named cpu".to_owned(),
        1,
        TargetSpec { cpu: CpuMode::Named("Nehalem".to_owned()), ..virtio() },
    ));
    all.push(("host cpu".to_owned(), 1, TargetSpec { cpu: CpuMode::HostPassthrough, ..virtio() }));
    all.push(("emulated".to_owned(), 1, TargetSpec { emulated: true, ..virtio() }));
    all.push((
        "kept cards".to_owned(),
        1,
        TargetSpec { nic_model: NicModel::Keep, agent: false, ..virtio() },
    ));
    let windows = OsFacts {
        kind: Some(SystemKind::Windows),
        product: "Windows Server 2019 Standard".to_owned(),
        ..OsFacts::default()
    };
    all.push(("Windows".to_owned(), 1, TargetSpec { os: windows, ..virtio() }));
    let direct = v2v::guest::DirectBoot {
        kernel: "/boot/vm & linuz".to_owned(),
        initrd: Some("/boot/initrd".to_owned()),
        cmdline: "root=/dev/vda1 x=\"<y>\"".to_owned(),
    };
    all.push(("direct boot".to_owned(), 1, TargetSpec { direct_boot: Some(direct), ..virtio() }));
    all
}

fn libvirt_tools() -> Need {
    tool("virsh")?;
    tool("xmllint")?;
    tool("virt-xml-validate")
}

#[test]
fn libvirts_schema_and_virsh_take_every_domain() {
    requires!(libvirt_tools());
    let dir = Dir::new();
    for (what, disks, spec) in variants(&dir) {
        for tpm in [false, true] {
            let machine = Machine::new(&Guest { tpm, ..guest(disks) }, &spec).unwrap();
            let path = dir.file("domain.xml");
            std::fs::write(&path, libvirt::domain(&machine).unwrap()).unwrap();
            let ran = Cmd::new("virt-xml-validate").arg(&path).words("domain").run();
            assert!(ran.code == Some(0), "{what}: {}{}", ran.stdout, ran.stderr);
            // The same connection, for the test driver forgets.
            let script = format!(
                "define '{}' --validate; dumpxml 564d1234-5678-9abc-def0-123456789abc",
                path.display()
            );
            let ran = Cmd::new("virsh").words("-c test:///default").arg(script).run();
            assert!(ran.code == Some(0), "{what}: {}{}", ran.stdout, ran.stderr);
            for kept in [
                "00:0c:29:aa:bb:01",
                "br1",
                "564d1234-5678-9abc-def0-123456789abd",
                "S-0",
                "&lt;&quot;web&quot;&gt; &amp; db",
            ] {
                assert!(ran.stdout.contains(kept), "{what}: {kept} is lost:\n{}", ran.stdout);
            }
        }
    }
}

/// A machine that was made up is not the judge's fault: the judges do refuse.
#[test]
fn the_judges_refuse_what_is_wrong() {
    requires!(libvirt_tools());
    let dir = Dir::new();
    let machine = Machine::new(&guest(1), &spec(&dir, 1, Bus::Virtio)).unwrap();
    let text = libvirt::domain(&machine).unwrap().replace("bus=\"virtio\"", "bus=\"carrier pigeon\"");
    let path = dir.file("domain.xml");
    std::fs::write(&path, text).unwrap();
    assert_ne!(Cmd::new("virt-xml-validate").arg(&path).words("domain").run().code, Some(0));
}

/// QEMU opens every file, plugs in every device and waits, as `-S` says, to be told to quit.
fn starts(script: &Path, what: &str) {
    let ran = Cmd::new("sh").arg("-n").arg(script).run();
    assert!(ran.code == Some(0), "{what}: {}", ran.stderr);
    let ran = Cmd::new("sh")
        .arg(script)
        .words("-S -display none -monitor stdio")
        .env("ACCEL", "tcg")
        .env("HOME", "/nonexistent")
        .stdin("info block\nquit\n")
        .run();
    assert!(
        ran.code == Some(0) && ran.stdout.contains("disk0 (#block"),
        "{what}: {}{}",
        ran.stdout,
        ran.stderr
    );
}

#[test]
fn qemu_starts_with_every_script() {
    requires!(tool("qemu-system-x86_64"), tool("qemu-img"));
    let firmware = |secure: bool| {
        let name = if secure { "OVMF_CODE_4M.secboot.fd" } else { "OVMF_CODE_4M.fd" };
        Path::new("/usr/share/OVMF").join(name).exists()
    };
    let dir = Dir::new();
    for index in 0..9 {
        let name = format!("{NAME} {index}.qcow2");
        let ran = Cmd::new("qemu-img").words("create -q -f qcow2").arg(name).arg("8M").dir(dir.path()).run();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    }
    for (what, disks, spec) in variants(&dir) {
        if spec.direct_boot.is_some() || spec.loader.is_some() || spec.nvram.is_some() {
            continue; // Files that are not there.
        }
        if spec.firmware == FirmwareKind::Uefi && !firmware(spec.secure_boot) {
            note(&format!("{what}: no firmware on this machine"));
            continue;
        }
        let machine = Machine::new(&guest(disks), &spec).unwrap();
        let path = dir.file("start it's.sh");
        std::fs::write(&path, qemu::script(&machine, dir.path()).unwrap()).unwrap();
        starts(&path, &what);
        if spec.firmware == FirmwareKind::Uefi {
            let variables = dir.file(&format!("{NAME}.vars.fd"));
            assert!(variables.metadata().unwrap().len() > 0, "{what}: the guest has variables of its own");
            std::fs::remove_file(variables).unwrap();
        }
    }
}
