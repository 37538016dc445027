//! Where names in descriptions lead: a description from a stranger opens nothing that its owner was not meant to give away.

use block::ErrorKind;
use image::Policy;
use tests::Dir;
use v2v::source::{SourceOptions, read};

use super::{name, vmx};

/// A folder `vm`, and a secret beside it.
fn with_secret() -> Dir {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.file("vm/sub")).unwrap();
    dir.write("secret.img", &[7; 4096]);
    std::os::unix::fs::symlink("../secret.img", dir.file("vm/link.img")).unwrap();
    dir
}

fn ovf(href: &str) -> String {
    format!(
        "<Envelope><References><File id='f' href='{href}'/></References><DiskSection><Disk diskId='d' fileRef='f' \
         capacity='4096'/></DiskSection><VirtualSystem id='x'><VirtualHardwareSection><Item><ResourceType>17</ResourceType>\
         <HostResource>ovf:/disk/d</HostResource></Item></VirtualHardwareSection></VirtualSystem></Envelope>"
    )
}

#[test]
fn a_package_names_nothing_outside_itself() {
    let dir = with_secret();
    for href in [
        "../secret.img",
        "/etc/hostname",
        "link.img",
        "file:///etc/hostname",
        "..%2fsecret.img",
        "sub/../../secret.img",
    ] {
        dir.write("vm/x.ovf", ovf(href).as_bytes());
        let error = read(&name(&dir, "vm/x.ovf"), &SourceOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{href}: {error}");
        assert!(error.hints()[0].contains("--allow"), "{error:?}");
        let policy = Policy { allow: vec![dir.path().to_owned(), "/etc".into()], ..Policy::default() };
        read(&name(&dir, "vm/x.ovf"), &SourceOptions { policy, ..SourceOptions::default() }).unwrap();
    }
    for href in ["nbd://server/x", "http://server/x"] {
        dir.write("vm/x.ovf", ovf(href).as_bytes());
        let error = read(&name(&dir, "vm/x.ovf"), &SourceOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{href}: {error}");
    }
    // Whatever it looks like, it is the name of a file.
    dir.write("vm/x.ovf", ovf("json:{\"driver\":\"raw\"}").replace("\"driver\":\"raw\"", "x").as_bytes());
    let guest = read(&name(&dir, "vm/x.ovf"), &SourceOptions::default()).unwrap();
    let error = v2v::source::open_disks(&guest, &image::OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[test]
fn other_descriptions_may_unless_they_are_untrusted() {
    let dir = with_secret();
    dir.write("vm/m.vmx", vmx(&[("scsi0:0", "../secret.img")]).as_bytes());
    let options = |untrusted| SourceOptions {
        policy: Policy { untrusted, ..Policy::default() },
        ..SourceOptions::default()
    };
    read(&name(&dir, "vm"), &options(false)).unwrap();
    let error = read(&name(&dir, "vm"), &options(true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    dir.write("vm/in.img", &[7; 4096]);
    dir.write("vm/m.vmx", vmx(&[("scsi0:0", "in.img")]).as_bytes());
    read(&name(&dir, "vm"), &options(true)).unwrap();
}

/// Neither size nor depth of a description keeps us busy.
#[test]
fn large_descriptions_are_refused_at_once() {
    let dir = Dir::new();
    let started = std::time::Instant::now();
    let lines = "scsi0:0.fileName = \"x\"\n".repeat(1 << 20);
    dir.write("large.vmx", format!("displayName = \"x\"\n{lines}").as_bytes());
    let error = read(&name(&dir, "large.vmx"), &SourceOptions::default()).unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
    let deep = format!("<domain>{}</domain>", "<a>".repeat(200_000) + &"</a>".repeat(200_000));
    dir.write("deep.xml", deep.as_bytes());
    let error = read(&name(&dir, "deep.xml"), &SourceOptions::default()).unwrap_err();
    assert!(error.to_string().contains("nested"), "{error}");
    dir.write("deep.cfg", format!("name = 'x'\ndisk = {}\n", "[".repeat(1 << 20)).as_bytes());
    read(&name(&dir, "deep.cfg"), &SourceOptions::default()).unwrap_err();
    assert!(started.elapsed().as_secs() < 30);
}
