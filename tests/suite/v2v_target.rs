//! Descriptions of machines, judged by those who take them: libvirt's schema and `virsh`, `sh` and QEMU.

use std::path::Path;

use serde_json::Value;
use tests::skip::{Need, note, tool};
use tests::{Cmd, Dir, requires};
use v2v::guest::{Bus, Cpus, Disk, DiskImage, FirmwareKind, Guest, Nic, Origin, Removable, RemovableKind};
use v2v::inspect::SystemKind;
use v2v::target::{
    Chipset, CpuMode, Loader, Machine, NetworkMap, NicModel, OsFacts, OutputDisk, TargetSpec, kubevirt,
    libvirt, ova, ovf, proxmox, qemu,
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

/// What is particular about a machine is in its manifest, as another reader sees it.
#[test]
fn python_reads_kubevirts_manifest() {
    requires!(python_yaml());
    let dir = Dir::new();
    for (what, disks, spec) in variants(&dir) {
        let machine = Machine::new(&guest(disks), &spec).unwrap();
        std::fs::write(dir.file("vm.yaml"), kubevirt::manifest(&machine).unwrap()).unwrap();
        let script = "import json, yaml; print(json.dumps(list(yaml.safe_load_all(open('vm.yaml')))))";
        let ran = Cmd::new("/usr/bin/python3").arg("-c").arg(script).dir(dir.path()).run();
        assert!(ran.code == Some(0), "{what}: {}", ran.stderr);
        let documents: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(documents.len(), disks + 1, "{what}");
        let vm = documents.last().unwrap();
        let domain = &vm["spec"]["template"]["spec"]["domain"];
        assert_eq!(domain["firmware"]["uuid"], "564d1234-5678-9abc-def0-123456789abc");
        assert_eq!(domain["devices"]["interfaces"][0]["macAddress"], "00:0c:29:aa:bb:01");
        assert_eq!(
            domain["devices"]["disks"].as_array().unwrap().len(),
            disks + 1,
            "{what}: and the CD-ROM drive"
        );
        let names = |value: &Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
        };
        let volumes = &vm["spec"]["template"]["spec"]["volumes"];
        assert_eq!(names(volumes)[..], names(&domain["devices"]["disks"])[..disks], "{what}");
        assert_eq!(
            names(&vm["spec"]["template"]["spec"]["networks"]),
            names(&domain["devices"]["interfaces"])
        );
        for (index, document) in documents[..disks].iter().enumerate() {
            assert_eq!(document["metadata"]["name"], volumes[index]["dataVolume"]["name"], "{what}");
        }
    }
}

fn python_yaml() -> Need {
    let ran = Cmd::new("/usr/bin/python3").arg("-c").arg("import yaml").run();
    if ran.code == Some(0) { Ok(()) } else { Err("no python3-yaml on this machine".to_owned()) }
}

/// A `qm` of our own writes down what it is told, and shows imported disks as Proxmox does.
#[test]
fn the_script_for_proxmox_gives_qm_the_right_words() {
    let dir = Dir::new();
    let qm = r#"#!/bin/sh
{ for word; do printf '<%s>' "$word"; done; echo; } >> "$QM_LOG"
if [ "$1" = config ]; then echo "name: x"; echo "unused0: store:9/vm-9-disk-$(grep -c '<importdisk>' "$QM_LOG").raw"; fi
"#;
    let path = dir.file("qm");
    std::fs::write(&path, qm).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let spec = TargetSpec { firmware: FirmwareKind::Uefi, ..spec(&dir, 2, Bus::VirtioScsi) };
    let machine = Machine::new(&Guest { tpm: true, ..guest(2) }, &spec).unwrap();
    let script = dir.file("make it's.sh");
    std::fs::write(&script, proxmox::script(&machine, dir.path()).unwrap()).unwrap();
    let search = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap_or_default());
    let run = |words: &str| {
        let log = dir.file("log");
        Cmd::new("sh")
            .arg(&script)
            .words(words)
            .env("PATH", &search)
            .env("QM_LOG", log.to_str().unwrap())
            .run()
    };
    assert_ne!(run("").code, Some(0), "a storage must be named");
    let ran = run("store 9");
    assert!(ran.code == Some(0), "{}", ran.stderr);
    let log = std::fs::read_to_string(dir.file("log")).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.starts_with('<')).collect();
    assert!(lines[0].starts_with("<create><9><--name><it-s-a-web-db-no-1-HOME-id>"), "{}", lines[0]);
    assert!(
        lines[0].contains("<--net0><virtio=00:0C:29:AA:BB:01,bridge=vmbr0><--net1><virtio,bridge=br1>"),
        "{}",
        lines[0]
    );
    assert!(log.contains(&format!("<importdisk><9><./{NAME} 0.qcow2><store>\n")), "{log}");
    assert!(
        log.contains("<set><9><--scsi0><store:9/vm-9-disk-1.raw,discard=on,iothread=1,serial=S-0>\n"),
        "{log}"
    );
    assert!(
        log.contains("<set><9><--scsi1><store:9/vm-9-disk-2.raw,discard=on,iothread=1,serial=S-1>\n"),
        "{log}"
    );
    assert!(log.contains("<set><9><--efidisk0><store:1,efitype=4m,pre-enrolled-keys=0>\n"), "{log}");
    assert!(log.contains("<set><9><--boot><order=scsi0;scsi1>\n"), "{log}");
}

/// Disks with something on them, packed; unpacked by tar, they are the same again.
#[test]
fn an_archive_is_what_tar_and_sha256sum_take_it_for() {
    requires!(tool("tar"), tool("sha256sum"), tool("xmllint"), tool("qemu-img"));
    let dir = Dir::new();
    let machine = packed(&dir);
    let path = dir.file("it's packed.ova");
    let ran = Cmd::new("tar").words("-tvf").arg(&path).run();
    assert!(ran.code == Some(0), "{}", ran.stderr);
    let names: Vec<&str> = ran.stdout.lines().map(|line| line.split_once(":00 ").unwrap().1).collect();
    let expected = ["it's packed.ovf", "it's packed.mf", "it's packed-disk1.vmdk", "it's packed-disk2.vmdk"];
    assert_eq!(names, expected);
    let ran = Cmd::new("tar").words("-xf").arg(&path).dir(dir.path()).run();
    assert!(ran.code == Some(0) && ran.stderr.is_empty(), "{}", ran.stderr);
    let manifest = std::fs::read_to_string(dir.file("it's packed.mf")).unwrap();
    for line in manifest.lines() {
        let (name, digest) = line.strip_prefix("SHA256(").unwrap().split_once(")= ").unwrap();
        let ran = Cmd::new("sha256sum").arg(dir.file(name)).run();
        assert!(ran.stdout.trim_start_matches('\\').starts_with(digest), "{line}: {}", ran.stdout);
    }
    assert_eq!(manifest.lines().count(), 3);
    let ran = Cmd::new("xmllint").arg("--noout").arg(dir.file("it's packed.ovf")).run();
    assert!(ran.code == Some(0), "{}", ran.stderr);
    let envelope = std::fs::read_to_string(dir.file("it's packed.ovf")).unwrap();
    for (number, disk) in (1..).zip(&machine.disks) {
        let name = format!("it's packed-disk{number}.vmdk");
        let len = dir.file(&name).metadata().unwrap().len();
        assert!(
            envelope.contains(&format!("ovf:href=\"{name}\" ovf:id=\"file{number}\" ovf:size=\"{len}\"")),
            "{envelope}"
        );
        let ran = Cmd::new("qemu-img").words("compare").arg(&disk.path).arg(dir.file(&name)).run();
        assert!(ran.code == Some(0), "{name}: {}{}", ran.stdout, ran.stderr);
    }
    let leftovers = std::fs::read_dir(dir.path()).unwrap();
    assert!(
        leftovers
            .filter_map(Result::ok)
            .all(|entry| !entry.file_name().to_string_lossy().contains("partial"))
    );
}

/// Makes `it's packed.ova` of two disks.
fn packed(dir: &Dir) -> Machine {
    let spec = spec(dir, 2, Bus::Virtio);
    let machine = Machine::new(&guest(2), &spec).unwrap();
    let mut sources = vec![];
    for (index, disk) in (1_u8..).zip(&machine.disks) {
        let bytes: Vec<u8> = (0..8_u32 << 20)
            .map(|at| {
                if at % 0x30_0000 < 0x5_1234 {
                    u8::try_from(at % 251).unwrap().wrapping_mul(index)
                } else {
                    0
                }
            })
            .collect();
        let raw = dir.file("disk.raw");
        std::fs::write(&raw, bytes).unwrap();
        let words = "convert -f raw -O qcow2 disk.raw";
        let ran = Cmd::new("qemu-img").words(words).arg(&disk.path).dir(dir.path()).run();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        // By its path: the name has a comma, which a plain file name may have.
        let spec = image::Spec::from_filename(disk.path.to_str().unwrap()).unwrap();
        let layer = image::open(&spec, &image::OpenOptions::default()).unwrap();
        sources.push(ova::Source { layer, disk: None });
    }
    let path = dir.file("it's packed.ova");
    ova::write(&path, &machine, &ovf::Product::default(), &sources, &image::progress::Quiet).unwrap();
    machine
}

/// What is packed is read back as a source: the same machine, the same bytes.
#[test]
fn an_archive_comes_back_through_our_own_reader() {
    requires!(tool("qemu-img"));
    let dir = Dir::new();
    let machine = packed(&dir);
    let path = dir.file("it's packed.ova");
    let options = v2v::source::SourceOptions::default();
    let guest = v2v::source::read(path.to_str().unwrap(), &options).unwrap();
    assert_eq!(guest.name, machine.name);
    assert_eq!(guest.memory_bytes, Some(machine.memory_mib << 20));
    assert_eq!(guest.cpus.count, Some(machine.cpus));
    assert_eq!(guest.nics.len(), machine.nics.len());
    assert_eq!(guest.nics[0].mac, machine.nics[0].mac);
    assert_eq!(guest.nics[1].network_name.as_deref(), Some("br1"));
    assert_eq!(guest.nics[0].model.as_deref(), Some("vmxnet3"));
    assert!(guest.disks.iter().all(|disk| disk.bus == Some(Bus::Scsi)), "{:?}", guest.disks);
    let opened = v2v::source::open_disks(&guest, &image::OpenOptions::default()).unwrap();
    assert_eq!(opened.len(), machine.disks.len());
    for (opened, disk) in opened.iter().zip(&machine.disks) {
        let spec = image::Spec::from_filename(disk.path.to_str().unwrap()).unwrap();
        let original = image::open(&spec, &image::OpenOptions::default()).unwrap().device();
        assert_eq!(opened.size, original.size());
        let read = |device: &dyn block::BlockDevice| {
            let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
            device.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&*opened.device) == read(&*original), "{}", disk.path.display());
    }
}
