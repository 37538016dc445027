//! OVF packages: in folders, in archives of all kinds, with manifests.

use image::OpenOptions;
use tests::foreign::{gzip, tar};
use tests::skip::{qemu, tool};
use tests::{Cmd, Dir, requires};
use v2v::guest::Guest;
use v2v::source::{Manifest, SourceOptions, open_disks, read};

use super::{SIZE, contents, guest, name, opened, with_disk};

/// A description of a machine with these files as disks, in the manner of VMware.
fn ovf(files: &[(&str, &str)]) -> String {
    let mut references = String::new();
    let mut disks = String::new();
    let mut items = String::new();
    for (index, (file, attributes)) in files.iter().enumerate() {
        references += &format!("<File ovf:href=\"{file}\" ovf:id=\"file{index}\" {attributes}/>\n");
        disks += &format!(
            "<Disk ovf:capacity=\"{SIZE}\" ovf:diskId=\"d{index}\" ovf:fileRef=\"file{index}\" \
             ovf:format=\"http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized\"/>\n"
        );
        items += &format!(
            "<Item><rasd:AddressOnParent>{index}</rasd:AddressOnParent><rasd:ElementName>disk{index}</rasd:ElementName>\
             <rasd:HostResource>ovf:/disk/d{index}</rasd:HostResource><rasd:InstanceID>{}</rasd:InstanceID>\
             <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>\n",
            index + 10
        );
    }
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:rasd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData\">\n\
         <References>{references}</References><DiskSection><Info/>{disks}</DiskSection>\n<VirtualSystem ovf:id=\"web\">\
         <Info/><Name>web</Name><VirtualHardwareSection><Info/><Item><rasd:InstanceID>2</rasd:InstanceID>\
         <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item><Item>\
         <rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>\
         <rasd:ResourceType>6</rasd:ResourceType></Item>\n{items}</VirtualHardwareSection></VirtualSystem></Envelope>\n"
    )
}

/// A folder `p` with a package of three disks (one of them gzipped, one with a blank in its name), and what is on them.
fn package() -> (Dir, Vec<u8>) {
    let (dir, data) = with_disk();
    std::fs::create_dir(dir.file("p")).unwrap();
    dir.qemu_ok("convert -f raw -O vmdk -o subformat=streamOptimized d.raw p/disk1.vmdk");
    dir.write("p/disk2.vmdk.gz", &gzip(&dir.read("p/disk1.vmdk")));
    dir.copy("p/disk1.vmdk", "p/my disk.vmdk");
    let files = [
        ("disk1.vmdk", ""),
        ("disk2.vmdk.gz", "ovf:compression=\"gzip\""),
        ("my%20disk.vmdk", "ovf:compression=\"identity\""),
    ];
    dir.write("p/web.ovf", ovf(&files).as_bytes());
    (dir, data)
}

#[track_caller]
fn shows(guest: &Guest, data: &[u8]) {
    assert_eq!((guest.name.as_str(), guest.memory_bytes), ("web", Some(512 << 20)));
    let disks = opened(guest);
    assert_eq!(disks.len(), 3);
    for (disk, described) in disks.iter().zip(&guest.disks) {
        assert!(contents(disk) == data, "{}", described.id);
        assert!(disk.notes.is_empty(), "{:?}", disk.notes);
    }
}

#[test]
fn folders() {
    requires!(qemu());
    let (dir, data) = package();
    shows(&guest(&dir, "p"), &data);
    shows(&guest(&dir, "p/web.ovf"), &data);
    // A disk that is not what is said.
    dir.vimg_ok("create -f vmdk p/disk1.vmdk 1M");
    let disks = opened(&guest(&dir, "p"));
    assert!(disks[0].notes[0].contains("1048576"), "{:?}", disks[0].notes);
}

/// What tar makes: by us, by the system's tar, in a folder, with Apple's files, gzipped, with numbers at the ends of names.
#[test]
fn archives() {
    requires!(qemu(), tool("tar"));
    let (dir, data) = package();
    let in_folder = |words: &str| Cmd::new("tar").words(words).dir(dir.path()).ok();
    let words = "-cf plain.ova --format=ustar -C p web.ovf disk1.vmdk disk2.vmdk.gz";
    Cmd::new("tar").words(words).arg("my disk.vmdk").dir(dir.path()).ok();
    shows(&guest(&dir, "plain.ova"), &data);
    in_folder("-cf sub.ova --format=gnu p").expect_code(0);
    shows(&guest(&dir, "sub.ova"), &data);
    in_folder("-czf sub.ova.gz --format=pax ./p").expect_code(0);
    let packed = guest(&dir, "sub.ova.gz");
    assert!(packed.notes.iter().any(|note| note.contains("slowly")), "{:?}", packed.notes);
    shows(&packed, &data);
    let (ovf, one, two) = (dir.read("p/web.ovf"), dir.read("p/disk1.vmdk"), dir.read("p/disk2.vmdk.gz"));
    let members: [(&str, &[u8]); 6] = [
        ("._web.ovf", b"apple"),
        ("web.ovf", &ovf),
        ("disk1.vmdk.000000000", b"old"),
        ("disk1.vmdk.000000001", &one),
        ("disk2.vmdk.gz", &two),
        ("my disk.vmdk", &one),
    ];
    dir.write("odd.ova", &tar(&members));
    shows(&guest(&dir, "odd.ova"), &data);
    let error = |members: &[(&str, &[u8])]| {
        dir.write("bad.ova", &tar(members));
        read(&name(&dir, "bad.ova"), &SourceOptions::default()).unwrap_err()
    };
    assert!(error(&[("a", b"x")]).to_string().contains("no description"));
    assert!(error(&[("a.ovf", &ovf), ("b.ovf", &ovf)]).to_string().contains("several"));
    assert!(error(&[("a.ovf", &ovf)]).to_string().contains("'disk1.vmdk', which is not in the archive"));
}

/// Digests by the system's tools, so that somebody else is right.
#[test]
fn manifests_are_verified() {
    requires!(qemu(), tool("sha1sum"), tool("sha256sum"), tool("sha512sum"));
    let (dir, data) = package();
    let digest = |tool: &str, file: &str| {
        let ran = Cmd::new(tool).arg(file).dir(&dir.file("p")).ok();
        ran.stdout.trim_start_matches('\\').split(' ').next().unwrap().to_owned()
    };
    let good = format!(
        "SHA1(web.ovf)= {}\r\nSHA256(disk1.vmdk)= {}\r\nSHA512(my disk.vmdk)= {}\nSHA256(gone.vmdk)= {}\n",
        digest("sha1sum", "web.ovf"),
        digest("sha256sum", "disk1.vmdk").to_uppercase(),
        digest("sha512sum", "my disk.vmdk"),
        "0".repeat(64)
    );
    dir.write("p/web.mf", good.as_bytes());
    dir.write("p/web.cert", b"-----BEGIN CERTIFICATE-----\n");
    Cmd::new("tar").words("-cf p.ova p").dir(dir.path()).ok();
    Cmd::new("tar").words("-czf p.ova.gz p").dir(dir.path()).ok();
    for source in ["p", "p/web.ovf", "p.ova", "p.ova.gz"] {
        let manifest = Manifest::find(&name(&dir, source)).unwrap().unwrap();
        let mut told = 0;
        let verified = manifest
            .verify(&mut |bytes| {
                told += bytes;
                true
            })
            .unwrap();
        assert_eq!(verified.files, ["web.ovf", "disk1.vmdk", "my disk.vmdk"], "{source}");
        assert_eq!((verified.bytes, manifest.total_bytes().unwrap()), (told, told));
        let notes = verified.notes.join("\n");
        assert!(notes.contains("'gone.vmdk'") && notes.contains("signature"), "{notes}");
        shows(&guest(&dir, source), &data);
        let error = manifest.verify(&mut |_| false).unwrap_err();
        assert_eq!(error.kind(), block::ErrorKind::Cancelled);
    }
    // One bit, in the folder and in the archive.
    let at = dir.read("p.ova").windows(4).position(|bytes| bytes == b"KDMV").unwrap();
    for (file, offset) in [("p/disk1.vmdk", 700), ("p.ova", at as u64 + 700)] {
        let byte = dir.read(file)[usize::try_from(offset).unwrap()];
        dir.poke(file, offset, &[byte ^ 1]);
        let source = if file == "p.ova" { file } else { "p" };
        let manifest = Manifest::find(&name(&dir, source)).unwrap().unwrap();
        let error = manifest.verify(&mut |_| true).unwrap_err();
        assert_eq!(error.kind(), block::ErrorKind::Corrupt);
        let said = error.to_string();
        assert!(manifest.entries().iter().any(|entry| said.contains(&entry.digest)), "{said}");
    }
    std::fs::remove_file(dir.file("p/web.mf")).unwrap();
    assert!(Manifest::find(&name(&dir, "p")).unwrap().is_none());
    assert!(Manifest::find(&name(&dir, "d.raw")).unwrap().is_none());
}

/// Disks without files are empty, and can be opened.
#[test]
fn empty_disks() {
    let dir = Dir::new();
    let text = ovf(&[("x.vmdk", "")]).replace("ovf:fileRef=\"file0\"", "");
    dir.write("e.ovf", text.as_bytes());
    let machine = guest(&dir, "e.ovf");
    let disks = open_disks(&machine, &OpenOptions::default()).unwrap();
    assert_eq!((disks[0].size, disks[0].notes.len()), (SIZE as u64, 0));
    assert!(contents(&disks[0]).iter().all(|byte| *byte == 0));
}
