//! `vimg v2v` on what looks like Windows: NTFS made by mkntfs, hives made by us and read by hivex. No real Windows runs here.

use std::path::{Path, PathBuf};

use hive::{Hive, Value};
use serde_json::Value as Json;
use tests::command::Cmd;
use tests::skip::{self, Need, tool};
use tests::{Dir, requires};

/// Where the NTFS lies on the disk.
const NTFS_MIB: u64 = 36;

fn ready() -> Need {
    tool("mkntfs")?;
    tool("ntfs-3g")?;
    tool("sfdisk")?;
    tool("mcopy")?;
    skip::root()?;
    std::fs::metadata("/dev/fuse").map(drop).map_err(|_| "this kernel has no FUSE".to_owned())
}

fn set(hive: &mut Hive, path: &str, values: &[(&str, Value)]) {
    let key = hive.create(path).unwrap();
    values.iter().for_each(|(name, value)| hive.set(key, name, value).unwrap());
}

/// What a Windows 10 on VMware has in SYSTEM, as far as it matters; of Windows 7 if there is no `database`.
fn system(database: bool) -> Hive {
    let mut hive = Hive::empty();
    let number = Value::number;
    set(&mut hive, "Select", &[("Current", number(1)), ("Default", number(1))]);
    let control = r"ControlSet001\Control";
    let text = Value::text;
    set(&mut hive, &format!(r"{control}\ComputerName\ComputerName"), &[("ComputerName", text("WINBOX"))]);
    set(
        &mut hive,
        &format!(r"{control}\Session Manager\Environment"),
        &[("PROCESSOR_ARCHITECTURE", text("AMD64"))],
    );
    set(&mut hive, &format!(r"{control}\CriticalDeviceDatabase"), &[]);
    let services = r"ControlSet001\Services";
    set(&mut hive, &format!(r"{services}\LSI_SAS"), &[("Start", number(0))]);
    let ahci = if database { "storahci" } else { "msahci" };
    set(&mut hive, &format!(r"{services}\{ahci}"), &[("Start", number(3))]);
    if database {
        set(&mut hive, &format!(r"{services}\storahci\StartOverride"), &[("0", number(3))]);
        set(&mut hive, r"DriverDatabase\DriverPackages", &[]);
    }
    set(&mut hive, &format!(r"{services}\VMTools"), &[("Start", number(2))]);
    set(
        &mut hive,
        &format!(r"{services}\Tcpip\Parameters\Interfaces\{{11111111-2222-3333-4444-555555555555}}"),
        &[
            ("EnableDHCP", number(0)),
            ("IPAddress", Value::list(["10.1.2.3"])),
            ("SubnetMask", Value::list(["255.255.255.0"])),
            ("DefaultGateway", Value::list(["10.1.2.1"])),
        ],
    );
    set(&mut hive, "MountedDevices", &[(r"\DosDevices\C:", Value::binary([1; 12]))]);
    hive
}

fn software(product: &str, build: &str, version: &str, major: Option<u32>) -> Hive {
    let mut hive = Hive::empty();
    let path = r"Microsoft\Windows NT\CurrentVersion";
    let text = Value::text;
    set(
        &mut hive,
        path,
        &[
            ("ProductName", text(product)),
            ("CurrentBuildNumber", text(build)),
            ("CurrentVersion", text(version)),
            ("EditionID", text("Professional")),
            ("InstallationType", text("Client")),
        ],
    );
    if let Some(major) = major {
        let numbers = [("CurrentMajorVersionNumber", major), ("CurrentMinorVersionNumber", 0)];
        numbers.iter().for_each(|(name, value)| set(&mut hive, path, &[(*name, Value::number(*value))]));
    }
    set(
        &mut hive,
        r"Microsoft\Windows\CurrentVersion",
        &[("DevicePath", Value::expand(r"%SystemRoot%\inf"))],
    );
    hive
}

/// Makes `disk`: an EFI system partition without a fallback loader, and Windows.
fn windows(dir: &Dir, system: Hive, software: Hive, more: &dyn Fn(&Path)) {
    dir.sparse("disk", (NTFS_MIB + 66) << 20);
    let script = "label: gpt\nstart=1MiB, size=34MiB, type=U\nstart=36MiB, size=64MiB, \
                  type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\n";
    Cmd::new("sfdisk").words("-q disk").stdin(script).dir(dir.path()).ok();
    for old in ["esp", "ntfs"] {
        let _ = std::fs::remove_file(dir.file(old));
    }
    Cmd::new("mkfs.vfat").words("-F 32 -C esp 34816").dir(dir.path()).ok();
    std::fs::create_dir_all(dir.file("esp-tree/EFI/Microsoft/Boot")).unwrap();
    std::fs::write(dir.file("esp-tree/EFI/Microsoft/Boot/bootmgfw.efi"), b"MZ boot manager").unwrap();
    Cmd::new("mcopy").words("-s -i esp esp-tree/EFI ::/").dir(dir.path()).ok();
    Cmd::new("truncate").words("-s 64M ntfs").dir(dir.path()).ok();
    Cmd::new("mkntfs").words("-q -F ntfs").dir(dir.path()).ok();
    std::fs::create_dir_all(dir.file("mnt")).unwrap();
    Cmd::new("ntfs-3g").words("ntfs mnt").dir(dir.path()).ok();
    let windows = dir.file("mnt/WINDOWS");
    for folder in ["System32/Config", "System32/drivers", "inf"] {
        std::fs::create_dir_all(windows.join(folder)).unwrap();
    }
    std::fs::write(windows.join("System32/Config/SYSTEM"), system.into_bytes()).unwrap();
    std::fs::write(windows.join("System32/Config/SOFTWARE"), software.into_bytes()).unwrap();
    more(&dir.file("mnt"));
    Cmd::new("umount").arg(dir.file("mnt")).ok();
    for _ in 0..100 {
        if Cmd::new("ntfsinfo").words("-m ntfs").dir(dir.path()).run().code == Some(0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    for (file, at) in [("esp", 1), ("ntfs", NTFS_MIB)] {
        Cmd::new("dd")
            .words(&format!("if={file} of=disk bs=1M seek={at} conv=notrunc status=none"))
            .dir(dir.path())
            .ok();
    }
}

/// A tree of drivers as the ISO image of virtio-win has it.
fn virtio_win(dir: &Dir) -> PathBuf {
    let root = dir.file("virtio-win");
    for (folder, name) in [("viostor", "viostor"), ("vioscsi", "vioscsi"), ("NetKVM", "netkvm")] {
        for version in ["w10", "w7", "2k19"] {
            let folder = root.join(folder).join(version).join("amd64");
            std::fs::create_dir_all(&folder).unwrap();
            for ending in ["sys", "inf", "cat", "pdb"] {
                std::fs::write(folder.join(format!("{name}.{ending}")), format!("{name} {version} {ending}"))
                    .unwrap();
            }
        }
    }
    root
}

fn windows_10(dir: &Dir) {
    windows(dir, system(true), software("Windows 10 Pro", "19045", "6.3", Some(10)), &|_| {});
}

fn plan(dir: &Dir, words: &str) -> Json {
    dir.vimg_cmd(&format!("v2v --plan --output json {words} disk")).run().expect_code(0).json()
}

fn paths(report: &Json) -> Vec<String> {
    let changes = report["changes"].as_array().unwrap();
    changes.iter().map(|change| change["file"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_windows_it_is_is_told() {
    requires!(ready());
    let dir = Dir::new();
    windows_10(&dir);
    let found = dir.vimg_cmd("inspect --output json disk").run().expect_code(0).json();
    let system = &found["systems"][0];
    assert_eq!(system["product"], "Windows 10 Pro");
    assert_eq!((&system["version"], &system["host-name"]), (&"10.0.19045".into(), &"WINBOX".into()));
    assert_eq!(system["architecture"], "x86_64");
    assert_eq!(system["windows"]["boot-drivers"][0], "LSI_SAS");
    assert_eq!(system["windows"]["drive-letters"][0], "C");
    assert_eq!(system["windows"]["local-time"], true);
    assert_eq!(system["windows"]["addresses"][0], "10.1.2.3 mask 255.255.255.0 gateway 10.1.2.1");
    assert_eq!(system["guest-tools"][0]["name"], "vmware-tools");
    assert_eq!(system["obstacles"][0]["code"], "no-virtio-driver");
}

#[test]
fn without_drivers_it_is_refused_and_sata_is_the_way_out() {
    requires!(ready());
    let dir = Dir::new();
    windows_10(&dir);
    let ran = dir.vimg_cmd("v2v -o out disk").run().expect_code(1);
    assert!(ran.stderr.contains("--virtio-win") && ran.stderr.contains("--bus sata"), "{}", ran.stderr);
    // The plan says so, too, and how a conversion would end.
    let report = dir.vimg_cmd("v2v --plan --output json disk").run().expect_code(1).json();
    assert_eq!(report["stage"], "planned");
    assert!(report["stops"].to_string().contains("--virtio-win"), "{report}");
    let report = plan(&dir, "--bus sata");
    let changes = report["changes"].as_array().unwrap();
    let registry = changes.iter().find(|change| change["topic"] == "windows-registry").unwrap();
    let reason = registry["reason"].as_str().unwrap();
    for part in
        [r"Services\storahci\Start = 0", r"storahci\StartOverride\0 = 0", r"Services\VMTools\Start = 4"]
    {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(paths(&report).contains(&"/EFI system partition/EFI/BOOT/BOOTX64.EFI".to_owned()), "{report}");
}

#[test]
fn drivers_are_planned_for_old_and_new_windows() {
    requires!(ready());
    let dir = Dir::new();
    let drivers = virtio_win(&dir);
    let words = format!("--virtio-win {}", drivers.display());
    windows_10(&dir);
    let report = plan(&dir, &words);
    let planned = paths(&report);
    for path in [
        "/WINDOWS/System32/Config/SYSTEM",
        "/WINDOWS/System32/Config/SOFTWARE",
        "/WINDOWS/System32/drivers/viostor.sys",
        "/WINDOWS/Drivers/VirtIO",
        "/WINDOWS/Drivers/VirtIO/netkvm.inf",
    ] {
        assert!(planned.contains(&path.to_owned()), "{path} not in {planned:?}");
    }
    assert!(!planned.iter().any(|path| path.ends_with(".pdb")), "{planned:?}");
    let text = report["changes"].to_string();
    assert!(text.contains("DriverDatabase") && !text.contains("CriticalDeviceDatabase"), "{text}");
    windows(&dir, system(false), software("Windows 7 Professional", "7601", "6.1", None), &|_| {});
    let text = plan(&dir, &words)["changes"].to_string();
    assert!(text.contains("CriticalDeviceDatabase\\\\PCI#VEN_1AF4&DEV_1001&REV_00"), "{text}");
    assert!(!text.contains("DriverDatabase\\\\"), "{text}");
    // A folder that has nothing for it, and what is no folder.
    std::fs::create_dir(dir.file("nothing")).unwrap();
    let ran = dir.vimg_cmd("v2v --plan --virtio-win nothing disk").run().expect_code(1);
    assert!(ran.stderr.contains("no drivers for Windows 6.1"), "{}", ran.stderr);
    let ran = dir.vimg_cmd("v2v --plan --virtio-win disk disk").run().expect_code(1);
    assert!(ran.stderr.contains("mount -o loop"), "{}", ran.stderr);
}

#[test]
fn a_sleeping_windows_is_refused() {
    requires!(ready());
    let dir = Dir::new();
    windows(&dir, system(true), software("Windows 10 Pro", "19045", "6.3", Some(10)), &|root| {
        std::fs::write(root.join("hiberfil.sys"), [b"HIBR".as_slice(), &[1; 8192]].concat()).unwrap();
    });
    let ran = dir.vimg_cmd("v2v -o out --bus sata disk").run().expect_code(1);
    assert!(ran.stderr.contains("hibernated") && ran.stderr.contains("powercfg"), "{}", ran.stderr);
}

/// The one boot: the changes are made by ntfs3, in the appliance, and ntfs-3g and hivex say what became of them.
#[test]
fn drivers_and_hives_are_written_by_the_appliance() {
    requires!(ready(), tests::guests::qemu_system(), tool("hivexregedit"));
    let (kernel, modules) = match tests::guests::ntfs3_kernel() {
        Ok(found) => found,
        Err(reason) => {
            skip::note(&reason);
            return;
        }
    };
    let dir = Dir::new();
    let drivers = virtio_win(&dir);
    windows_10(&dir);
    let words = format!(
        "v2v -o out -O raw --engine qemu --virtio-win {} --appliance-kernel {} --appliance-modules {} disk",
        drivers.display(),
        kernel.display(),
        modules.display()
    );
    dir.vimg_cmd(&words).timeout(600).run().expect_code(0);
    let xml = std::fs::read_to_string(dir.file("out/disk.xml")).unwrap();
    assert!(xml.contains("localtime") && xml.contains("virtio"), "{xml}");
    // Nothing is left to be done.
    let again = dir
        .vimg_cmd(&format!("v2v --plan --output json --virtio-win {} out/disk-sda.raw", drivers.display()))
        .run()
        .expect_code(0)
        .json();
    assert_eq!(again["changes"].as_array().unwrap().len(), 0, "{again}");
    let found = dir.vimg_cmd("inspect --output json out/disk-sda.raw").run().expect_code(0).json();
    let system = &found["systems"][0];
    assert!(system["windows"]["boot-drivers"].to_string().contains("viostor"), "{system}");
    assert_eq!(system["obstacles"].as_array().unwrap().len(), 0, "{system}");
    Cmd::new("dd")
        .words(&format!("if=out/disk-sda.raw of=ntfs bs=1M skip={NTFS_MIB} count=64 status=none"))
        .dir(dir.path())
        .ok();
    Cmd::new("ntfsfix").words("-n ntfs").dir(dir.path()).ok();
    Cmd::new("ntfs-3g").words("-o ro ntfs mnt").dir(dir.path()).ok();
    let windows = dir.file("mnt/WINDOWS");
    let driver = std::fs::read(windows.join("System32/drivers/viostor.sys"));
    let copied = std::fs::copy(windows.join("System32/Config/SYSTEM"), dir.file("hive"));
    let names = std::fs::read_dir(windows.join("Drivers/VirtIO")).map(Iterator::count);
    Cmd::new("umount").arg(dir.file("mnt")).ok();
    assert_eq!((driver.unwrap(), names.unwrap()), (b"viostor w10 sys".to_vec(), 9));
    copied.unwrap();
    let said = Cmd::new("hivexregedit")
        .words("--export --unsafe-printable-strings hive")
        .arg(r"\ControlSet001\Services\viostor")
        .dir(dir.path())
        .ok()
        .stdout;
    assert!(said.contains("\"Start\"=dword:00000000"), "{said}");
}
