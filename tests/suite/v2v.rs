//! `vimg v2v` on real guests, as other hypervisors leave them: before the conversion they do not boot on KVM, for a
//! reason that is told; after it they reach their login prompt. The source is never changed, and what fails leaves nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use tests::guests::{foreign_guests, qemu_system};
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, Ran, or_skip, requires};

/// A folder, and beside it the guests.
struct Place {
    dir: Dir,
    guests: PathBuf,
}

/// The place, or why there is none.
fn place() -> Result<Place, String> {
    qemu()?;
    Ok(Place { guests: foreign_guests()?, dir: Dir::new() })
}

impl Place {
    fn guest(&self, name: &str) -> String {
        self.guests.join(name).display().to_string()
    }

    fn v2v(&self, words: &str) -> Cmd {
        self.dir.vimg_cmd(&format!("v2v {words}")).timeout(900)
    }

    /// Whether a disk boots, by qemu, as `bootcheck` has it.
    fn boot(&self, words: &str, code: i32) -> Value {
        let ran = self
            .dir
            .vimg_cmd(&format!("bootcheck --engine qemu --memory 512M --timeout 400 --output json {words}"))
            .timeout(900)
            .run()
            .expect_code(code);
        ran.json()["checks"][0].clone()
    }

    fn report(&self, path: &str) -> Value {
        let text = fs::read_to_string(self.dir.file(path)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// VMware's description of a machine, as Workstation and ESXi write it.
    fn vmx(&self, name: &str, disk: &str, more: &str) {
        let text = format!(
            "#!/usr/bin/vmware\n.encoding = \"UTF-8\"\nconfig.version = \"8\"\nvirtualHW.version = \"19\"\n\
             displayName = \"{name}\"\nguestOS = \"debian12-64\"\nmemsize = \"512\"\nnumvcpus = \"2\"\n\
             scsi0.present = \"TRUE\"\nscsi0.virtualDev = \"pvscsi\"\nscsi0:0.present = \"TRUE\"\n\
             scsi0:0.fileName = \"{disk}\"\nethernet0.present = \"TRUE\"\nethernet0.virtualDev = \"vmxnet3\"\n\
             ethernet0.networkName = \"VM Network\"\nethernet0.addressType = \"static\"\n\
             ethernet0.address = \"00:50:56:3f:00:0a\"\nuuid.bios = \"56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee\"\n{more}"
        );
        fs::write(self.dir.file(&format!("{name}.vmx")), text).unwrap();
    }
}

/// What must be the same afterwards.
fn sum(path: &Path) -> String {
    Cmd::new("sha256sum").arg(path).timeout(120).ok().stdout.split(' ').next().unwrap().to_owned()
}

/// A partition of a raw disk as a file of its own.
fn cut_out(disk: &Path, first_mib: u64, mib: u64, out: &Path) {
    Cmd::new("dd")
        .arg(format!("if={}", disk.display()))
        .arg(format!("of={}", out.display()))
        .words(&format!("bs=1M skip={first_mib} count={mib} conv=sparse"))
        .ok();
}

fn file_in(image: &Path, path: &str) -> String {
    Cmd::new("debugfs").words("-R").arg(format!("cat {path}")).arg(image).ok().stdout
}

/// What was changed: files and the digests of their new contents.
fn changes(report: &Value) -> Vec<(String, String)> {
    let list = report["changes"].as_array().unwrap();
    let text = |change: &Value, key: &str| change[key].as_str().unwrap_or_default().to_owned();
    list.iter().map(|change| (text(change, "file"), text(change, "new-sha256"))).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// VMware, BIOS, ext4, everything by /dev/sda. From a sparse VMDK.
#[test]
fn a_bios_guest_of_vmware_boots_after_the_conversion_and_not_before() {
    requires!(qemu_system(), tool("e2fsck"), tool("debugfs"));
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    let before = place.boot(&format!("--firmware bios -f raw {raw}"), 1);
    assert_eq!(before["reason"], "no-disk-driver", "{before:#}");

    place.dir.vimg_ok(&format!("convert -f raw -O vmdk {raw} web.vmdk"));
    place.vmx("web", "web.vmdk", "");
    let sums = [sum(&place.dir.file("web.vmdk")), sum(&place.dir.file("web.vmx"))];
    place
        .v2v("web.vmx -o out -O raw --bootcheck --engine qemu --timeout 400 --target libvirt,qemu")
        .run()
        .expect_code(0)
        .expect_stdout("converted, and it boots");
    assert_eq!(sums, [sum(&place.dir.file("web.vmdk")), sum(&place.dir.file("web.vmx"))]);
    assert_eq!(
        names(&place.dir.file("out")),
        ["web-console.log", "web-report.html", "web-report.json", "web-sda.raw", "web.sh", "web.xml"]
    );
    let report = place.report("out/web-report.json");
    assert_eq!((&report["stage"], &report["firmware"]), (&"converted".into(), &"bios".into()));
    assert_eq!(report["boot"]["verdict"], "booted");

    // Judged by others: the file system, what is in it, the description.
    let root = place.dir.file("root.ext4");
    cut_out(&place.dir.file("out/web-sda.raw"), 1, 700, &root);
    Cmd::new("e2fsck").words("-fn").arg(&root).timeout(300).ok();
    let fstab = file_in(&root, "/etc/fstab");
    assert!(
        fstab.contains("UUID=0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9a01") && !fstab.contains("/dev/sda"),
        "{fstab}"
    );
    let link = file_in(&root, "/etc/systemd/network/10-vimg-ens33.link");
    assert!(link.contains("00:50:56:3f:00:0a") && link.contains("Name=ens33"), "{link}");
    let xml = fs::read_to_string(place.dir.file("out/web.xml")).unwrap();
    assert!(xml.contains("00:50:56:3f:00:0a") && xml.contains("web-sda.raw"), "{xml}");
}

/// VMware, UEFI without a fallback loader, root on LVM. From an OVA whose disk is compressed.
#[test]
fn a_uefi_guest_on_lvm_boots_after_the_conversion_and_not_before() {
    requires!(qemu_system());
    let place = or_skip!(place());
    let raw = place.guest("uefi-lvm.raw");
    let before = place.boot(&format!("--firmware uefi -f raw {raw}"), 1);
    assert_eq!(before["reason"], "no-boot-loader", "{before:#}");

    place.dir.vimg_ok(&format!("convert -f raw -O vmdk -o subformat=streamOptimized {raw} disk1.vmdk"));
    ova(&place.dir, "db", "disk1.vmdk", fs::metadata(&raw).unwrap().len());
    place
        .v2v("db.ova -o out --bootcheck --engine qemu --timeout 600")
        .run()
        .expect_code(0)
        .expect_stdout("converted, and it boots");
    let report = place.report("out/db-report.json");
    assert_eq!(report["firmware"], "uefi");
    let files: Vec<_> = changes(&report).into_iter().map(|(file, _)| file.to_lowercase()).collect();
    assert!(files.iter().any(|file| file.ends_with("/boot/bootx64.efi")), "{files:?}");
}

/// Xen, everything on XFS, which only the appliance can change. From a raw disk and xl's configuration.
#[test]
fn an_xfs_guest_of_xen_boots_after_the_conversion_and_not_before() {
    requires!(qemu_system(), tool("xfs_repair"));
    let place = or_skip!(place());
    let raw = place.guest("xen-xfs.raw");
    let before = place.boot(&format!("--firmware bios --add-console -f raw {raw}"), 1);
    assert!(before["verdict"] == "not-booted", "{before:#}");

    fs::copy(&raw, place.dir.file("xen.raw")).unwrap();
    let config = "name = 'xen'\ntype = 'hvm'\nmemory = 512\nvcpus = 1\n\
                  disk = [ 'format=raw, vdev=xvda, access=rw, target=xen.raw' ]\n\
                  vif = [ 'mac=00:16:3e:00:00:0a,bridge=xenbr0' ]\n";
    fs::write(place.dir.file("xen.cfg"), config).unwrap();
    place
        .v2v("xen.cfg -o out -O raw --bootcheck --engine qemu --timeout 400")
        .run()
        .expect_code(0)
        .expect_stdout("converted, and it boots");
    let root = place.dir.file("root.xfs");
    cut_out(&place.dir.file("out/xen-sda.raw"), 1, 700, &root);
    Cmd::new("xfs_repair").words("-n").arg(&root).timeout(300).ok();
    assert_eq!(sum(&place.dir.file("xen.raw")), sum(Path::new(&raw)), "the source is as it was");
}

/// An OVA as vSphere exports one.
fn ova(dir: &Dir, name: &str, disk: &str, capacity: u64) {
    let size = fs::metadata(dir.file(disk)).unwrap().len();
    let item = |body: &str| format!("<Item>{body}</Item>\n");
    let items = [
        item(
            "<rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity>",
        ),
        item(
            "<rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity>",
        ),
        item(
            "<rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType>",
        ),
        item(
            "<rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType>",
        ),
        item(
            "<rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:Connection>VM Network</rasd:Connection><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType>",
        ),
    ];
    let ovf = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:rasd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData\" \
         xmlns:vmw=\"http://www.vmware.com/schema/ovf\" \
         xmlns:vssd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData\">\n\
         <References><File ovf:href=\"{disk}\" ovf:id=\"file1\" ovf:size=\"{size}\"/></References>\n\
         <DiskSection><Info>disks</Info><Disk ovf:capacity=\"{capacity}\" ovf:capacityAllocationUnits=\"byte\" \
         ovf:diskId=\"vmdisk1\" ovf:fileRef=\"file1\" \
         ovf:format=\"http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized\"/></DiskSection>\n\
         <NetworkSection><Info>networks</Info><Network ovf:name=\"VM Network\"/></NetworkSection>\n\
         <VirtualSystem ovf:id=\"{name}\"><Info>a machine</Info><Name>{name}</Name>\n\
         <OperatingSystemSection ovf:id=\"96\" vmw:osType=\"debian12_64Guest\"><Info>system</Info></OperatingSystemSection>\n\
         <VirtualHardwareSection><Info>hardware</Info><System><vssd:VirtualSystemType>vmx-19</vssd:VirtualSystemType></System>\n{}\
         <vmw:Config ovf:required=\"false\" vmw:key=\"firmware\" vmw:value=\"efi\"/>\n\
         </VirtualHardwareSection></VirtualSystem></Envelope>\n",
        items.concat()
    );
    fs::write(dir.file(&format!("{name}.ovf")), ovf).unwrap();
    let ovf_sum = sum(&dir.file(&format!("{name}.ovf")));
    let disk_sum = sum(&dir.file(disk));
    let manifest = format!("SHA256({name}.ovf)= {ovf_sum}\nSHA256({disk})= {disk_sum}\n");
    fs::write(dir.file(&format!("{name}.mf")), manifest).unwrap();
    Cmd::new("tar")
        .words(&format!("--format=ustar -cf {name}.ova {name}.ovf {name}.mf {disk}"))
        .dir(dir.path())
        .ok();
}

/// The same guest in every container: the same changes.
#[test]
fn every_container_of_a_guest_is_converted_alike() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    let capacity = fs::metadata(&raw).unwrap().len();
    let of = |place: &Place, words: &str, name: &str| -> Vec<(String, String)> {
        place.v2v(&format!("{words} -o out --name {name}")).run().expect_code(0);
        changes(&place.report(&format!("out/{name}-report.json")))
    };
    place.dir.vimg_ok(&format!("convert -f raw -O vmdk {raw} sparse.vmdk"));
    place.vmx("sparse", "sparse.vmdk", "");
    let expected = of(&place, "sparse.vmx", "sparse");
    assert!(expected.len() > 5, "{expected:?}");

    place.dir.vimg_ok(&format!("convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse {raw} split.vmdk"));
    place.vmx("split", "split.vmdk", "");
    assert_eq!(of(&place, "split.vmx", "split"), expected);

    // A snapshot: the head of the chain is what counts.
    fs::create_dir(place.dir.file("snap")).unwrap();
    place.dir.vimg_ok("create -f vmdk -b ../sparse.vmdk -F vmdk snap/head-000001.vmdk");
    place.vmx("snap/machine", "head-000001.vmdk", "");
    assert_eq!(of(&place, "--allow . snap/machine.vmx", "snapshot"), expected);

    place.dir.vimg_ok(&format!("convert -f raw -O vdi {raw} box.vdi"));
    fs::write(place.dir.file("box.vbox"), vbox()).unwrap();
    let files = |changes: &[(String, String)]| {
        changes
            .iter()
            .map(|(file, _)| file.clone())
            .filter(|file| !file.contains("ens33"))
            .collect::<Vec<_>>()
    };
    assert_eq!(files(&of(&place, "box.vbox", "box")), files(&expected));

    place.dir.vimg_ok(&format!("convert -f raw -O vmdk -o subformat=streamOptimized {raw} stream.vmdk"));
    ova(&place.dir, "ova", "stream.vmdk", capacity);
    assert_eq!(files(&of(&place, "ova.ova --firmware bios", "ova")), files(&expected));
}

/// VirtualBox' description of a machine.
fn vbox() -> &'static str {
    "<?xml version=\"1.0\"?>\n<VirtualBox xmlns=\"http://www.virtualbox.org/\" version=\"1.19-linux\">\n\
     <Machine uuid=\"{11111111-2222-3333-4444-555555555555}\" name=\"box\" OSType=\"Debian_64\">\n\
     <MediaRegistry><HardDisks><HardDisk uuid=\"{aaaaaaaa-0000-1111-2222-333333333333}\" location=\"box.vdi\" \
     format=\"VDI\" type=\"Normal\"/></HardDisks></MediaRegistry>\n\
     <Hardware><CPU count=\"1\"/><Memory RAMSize=\"512\"/>\n\
     <Network><Adapter slot=\"0\" enabled=\"true\" MACAddress=\"0800273F000A\" type=\"82540EM\"><NAT/></Adapter></Network>\n\
     <StorageControllers><StorageController name=\"SATA\" type=\"AHCI\" PortCount=\"1\">\n\
     <AttachedDevice type=\"HardDisk\" port=\"0\" device=\"0\"><Image uuid=\"{aaaaaaaa-0000-1111-2222-333333333333}\"/>\
     </AttachedDevice></StorageController></StorageControllers></Hardware></Machine></VirtualBox>\n"
}

/// A plan writes nothing, and says everything.
#[test]
fn a_plan_is_shown_and_nothing_is_written() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    let before = names(place.dir.path());
    let ran = place.v2v(&format!("--plan -f raw {raw} --output json")).run().expect_code(0);
    let report = ran.json();
    assert_eq!(report["stage"], "planned");
    let files: Vec<_> = changes(&report).into_iter().map(|(file, _)| file).collect();
    for file in ["/etc/fstab", "/boot/grub/grub.cfg", "/etc/initramfs-tools/modules"] {
        assert!(files.iter().any(|name| name == file), "{file}: {files:?}");
    }
    place.v2v(&format!("--plan -f raw {raw}")).run().expect_code(0).expect_stdout("/etc/fstab");
    assert_eq!(names(place.dir.path()), before);
}

/// A stranger's machine: in the sandbox, and by our own writers alone.
#[test]
fn a_strangers_machine_is_converted_in_the_sandbox() {
    let place = or_skip!(place());
    let raw = place.guest("xen-xfs.raw");
    let ran = place
        .dir
        .vimg_cmd(&format!("--untrusted -v v2v -f raw {raw} -o out -O raw"))
        .timeout(300)
        .run()
        .expect_code(0);
    assert!(ran.stderr.contains("sandbox: "), "{}", ran.story());
    let report = place.report("out/xen-xfs-report.json");
    assert!(report["to-do"].to_string().contains("not without the file system's own driver"), "{report:#}");
    assert_eq!(names(&place.dir.file("out")).len(), 4, "the hidden folder is gone");
    let ran =
        place.dir.vimg_cmd(&format!("--untrusted v2v -f raw {raw} -o out2 --bootcheck")).run().expect_code(1);
    assert!(ran.stderr.contains("excludes --bootcheck"), "{}", ran.story());
}

/// Interrupted, out of space, in the way of others: nothing that looks finished.
#[test]
fn what_fails_leaves_nothing_behind() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    // Interrupted while it copies: as soon as the folder is there.
    let mut running = place.v2v(&format!("-f raw {raw} -o out -O raw --preallocation full")).spawn();
    let partial = place.dir.file("out/.vmware.vimg-partial/vmware-sda.raw");
    for _ in 0..600 {
        if names(partial.parent().unwrap()).iter().any(|name| name.contains("sda")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Cmd::new("kill").words(&format!("-INT {}", running.id())).ok();
    let code = running.wait().unwrap().code();
    assert_eq!(code, Some(130));
    assert_eq!(names(&place.dir.file("out")), Vec::<String>::new());

    // Somebody's file is not replaced.
    fs::create_dir_all(place.dir.file("out")).unwrap();
    fs::write(place.dir.file("out/vmware-sda.qcow2"), "mine").unwrap();
    let ran: Ran = place.v2v(&format!("-f raw {raw} -o out")).run().expect_code(1);
    assert!(ran.stderr.contains("is there already") && ran.stderr.contains("--overwrite"), "{}", ran.story());
    assert_eq!(names(&place.dir.file("out")), ["vmware-sda.qcow2"]);
    assert_eq!(fs::read_to_string(place.dir.file("out/vmware-sda.qcow2")).unwrap(), "mine");
}

/// The only copy of a server is not replaced by its conversion, nor is what its chain stands on, nor what others use.
#[test]
fn a_source_is_never_overwritten() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    place.dir.vimg_ok(&format!("convert -f raw -O qcow2 {raw} own-sda.qcow2"));
    place.dir.vimg_ok("create -f qcow2 -b own-sda.qcow2 -F qcow2 top.qcow2");
    let before = sum(&place.dir.file("own-sda.qcow2"));
    for source in ["own-sda.qcow2", "top.qcow2"] {
        let ran = place.v2v(&format!("-o . --overwrite --name own {source}")).run().expect_code(1);
        assert!(ran.stderr.contains("is a file of the source"), "{}", ran.story());
    }
    assert_eq!(sum(&place.dir.file("own-sda.qcow2")), before);
    let ran = place.v2v("-o out --name x own-sda.qcow2 own-sda.qcow2").run().expect_code(1);
    assert!(ran.stderr.contains("given twice") && !place.dir.file("out").exists(), "{}", ran.story());
    // Mistakes are told before anything is done.
    for (words, message) in [
        ("-o out --engine foo top.qcow2", "--engine"),
        ("-o out --backend foo top.qcow2", "'mount'"),
        ("-o out --untrusted --backend mount top.qcow2", "excludes"),
        ("top.qcow2", "-o DIR"),
        ("-o out -f bogus top.qcow2", "bogus"),
        ("-o out --memory 1 top.qcow2", "memory"),
        ("-o out --name a/b top.qcow2", "--name"),
        ("--batch plan.yaml --memory 2G", "--memory"),
    ] {
        let ran = place.v2v(words).run().expect_code(1);
        assert!(ran.stderr.contains(message) && !place.dir.file("out").exists(), "{}", ran.story());
    }
    fs::write(place.dir.file("rubbish.img"), [7; 65536]).unwrap();
    let ran = place.v2v("--plan rubbish.img").run().expect_code(1);
    assert!(ran.stderr.contains("no operating system"), "{}", ran.story());
}

/// A manifest that does not fit stops everything.
#[test]
fn a_damaged_archive_is_refused() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    place.dir.vimg_ok(&format!("convert -f raw -O vmdk -o subformat=streamOptimized {raw} disk1.vmdk"));
    ova(&place.dir, "bad", "disk1.vmdk", fs::metadata(&raw).unwrap().len());
    let path = place.dir.file("bad.ova");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let ran = place.v2v("bad.ova -o out").run().expect_code(1);
    assert!(ran.stderr.contains("disk1.vmdk") && ran.stderr.contains("SHA256"), "{}", ran.story());
    assert_eq!(names(&place.dir.file("out")), Vec::<String>::new());
}

/// Many at once, with one answer for all.
#[test]
fn a_batch_converts_many_and_tells_of_all() {
    let place = or_skip!(place());
    let raw = place.guest("vmware.raw");
    let plan = format!(
        "jobs: 2\ndefaults:\n  output-dir: out\n  output-format: raw\nguests:\n  - source: {raw}\n    name: one\n    format: raw\n  \
         - source: {raw}\n    name: two\n    format: raw\n    memory: 1G\n  - source: missing.vmx\n"
    );
    fs::write(place.dir.file("plan.yaml"), plan).unwrap();
    let ran = place.v2v("--batch plan.yaml").run().expect_code(1);
    let answer = ran.json();
    assert_eq!((&answer["converted"], &answer["failed"]), (&2.into(), &1.into()), "{answer:#}");
    assert!(place.dir.file("out/one.xml").exists() && place.dir.file("out/two-sda.raw").exists());
    let xml = fs::read_to_string(place.dir.file("out/two.xml")).unwrap();
    assert!(xml.contains("1048576"), "{xml}");
}
