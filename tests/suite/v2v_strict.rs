//! What is known to keep a guest from starting is told before anything is written, by `vimg v2v` and by its plan.

use serde_json::Value;

use tests::guest_image::{Holds, Part, disk};
use tests::skip::{Need, tool};
use tests::{Cmd, Dir, requires};

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const DATA: &str = "aaaaaaaa-2222-3333-4444-555555555555";
const RELEASE: &str = "6.1.0-30-amd64";

fn needs() -> Need {
    ["sfdisk", "mke2fs"].into_iter().try_for_each(tool)
}

/// A guest of which everything is written here: what is asked for may be missing.
struct Little {
    fstab: String,
    root: String,
    /// The drivers are in the kernel; else there is an initramfs of these bytes and no module.
    initrd: Option<Vec<u8>>,
    kernel: bool,
}

impl Default for Little {
    fn default() -> Self {
        Self {
            fstab: "/dev/sda1 / ext4 defaults 0 1\n".into(),
            root: "/dev/sda1".into(),
            initrd: None,
            kernel: true,
        }
    }
}

impl Little {
    fn fstab(line: &str) -> Self {
        let own = Self::default();
        Self { fstab: format!("{}{line}\n", own.fstab), ..own }
    }

    fn make(&self, dir: &Dir) {
        let initrd = if self.initrd.is_some() {
            format!("initrd /boot/initrd.img-{RELEASE}\n")
        } else {
            String::new()
        };
        let grub = format!(
            "menuentry 'Linux' {{\nlinux /boot/vmlinuz-{RELEASE} root={} ro\n{initrd}}}\n",
            self.root
        );
        let built_in = match self.initrd {
            None => "kernel/virtio_pci.ko\nkernel/virtio_blk.ko\nkernel/ext4.ko\n",
            Some(_) => "kernel/ext4.ko\n",
        };
        let modules = format!("usr/lib/modules/{RELEASE}/modules.builtin");
        let (vmlinuz, img) = (format!("boot/vmlinuz-{RELEASE}"), format!("boot/initrd.img-{RELEASE}"));
        let image = kernel();
        let mut files: Vec<(&str, &[u8])> = vec![
            ("etc/os-release", b"ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"),
            ("etc/fstab", self.fstab.as_bytes()),
            ("usr/lib/systemd/systemd", b"\x7fELF"),
            ("var/lib/x", b""),
            ("boot/grub/grub.cfg", grub.as_bytes()),
            (&modules, built_in.as_bytes()),
        ];
        if self.kernel {
            files.push((&vmlinuz, &image));
        }
        if let Some(initrd) = &self.initrd {
            files.push((&img, initrd));
        }
        disk(dir, "vm.raw", "dos", &[Part { kind: "L", mib: 16, holds: Holds::Ext4(ROOT), files: &files }]);
    }
}

/// As much of a kernel's image as says which release it is (Linux documentation, "The Linux/x86 Boot Protocol").
fn kernel() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x20e..0x210].copy_from_slice(&0x0300_u16.to_le_bytes());
    let text = format!("{RELEASE} (builder@host) #1 SMP\0");
    bytes[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// Refused, in these words, and nothing is written; the plan is shown and ends alike.
#[track_caller]
fn refused(little: &Little, words: &str) -> Dir {
    let dir = Dir::new();
    little.make(&dir);
    let ran = dir.vimg_cmd("v2v -o out -O raw -f raw vm.raw").run().expect_code(1);
    assert!(ran.stderr.contains(words) && ran.stderr.contains("--force"), "{}", ran.story());
    assert!(!dir.exists("out"), "{}", ran.story());
    let ran = dir.vimg_cmd("v2v --plan -f raw vm.raw").run().expect_code(1);
    assert!(ran.stdout.contains("Keeps it from starting:") && ran.stdout.contains(words), "{}", ran.story());
    dir
}

#[track_caller]
fn report(dir: &Dir) -> Value {
    serde_json::from_slice(&dir.read("out/vm-report.json")).unwrap()
}

#[test]
fn a_disk_that_is_not_given_stops_the_conversion() {
    requires!(needs());
    let dir = refused(
        &Little::fstab("/dev/sdb1 /data ext4 defaults 0 2"),
        "'/dev/sdb1' for /data is on none of the disks",
    );

    // All the same: done, and said.
    let ran = dir.vimg_cmd("v2v -o out -O raw --force -f raw vm.raw").run().expect_code(5);
    assert!(ran.stdout.contains("does not start as it is"), "{}", ran.story());
    let told = report(&dir);
    assert_eq!(
        (&told["stage"], &told["stops"].as_array().unwrap().len()),
        (&"converted".into(), &1),
        "{told:#}"
    );
    let page = String::from_utf8(dir.read("out/vm-report.html")).unwrap();
    assert!(page.contains("What keeps it from starting") && page.contains("verdict bad"), "{page}");

    // With the disk it is found.
    let data = Part { kind: "L", mib: 16, holds: Holds::Ext4(DATA), files: &[] };
    disk(&dir, "data.raw", "dos", &[data]);
    dir.vimg_cmd("v2v -o both -O raw -f raw vm.raw data.raw").run().expect_code(0);
    let plan = dir.vimg_cmd("v2v --plan --output json -f raw vm.raw data.raw").run().expect_code(0).json();
    assert!(plan["changes"].to_string().contains(&format!("+UUID={DATA} /data")), "{plan:#}");
}

#[test]
fn what_a_start_goes_on_without_is_no_error() {
    requires!(needs());
    for line in [
        "/dev/sdb1 /data ext4 defaults,nofail 0 2",
        "/dev/sdb1 /data ext4 noauto 0 0",
        "UUID=12345678-2222-3333-4444-555555555555 none swap sw 0 0",
        "/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0",
        "tmpfs /tmp tmpfs defaults 0 0",
    ] {
        let dir = Dir::new();
        Little::fstab(line).make(&dir);
        let ran = dir.vimg_cmd("v2v -o out -O raw -f raw vm.raw").run().expect_code(0);
        assert!(ran.stdout.contains("not boot-tested"), "{}", ran.story());
        assert_eq!(report(&dir)["stops"].as_array().unwrap().len(), 0, "{line}");
    }
}

#[test]
fn what_may_lie_where_nobody_looks_is_no_error() {
    requires!(needs());
    let dir = Dir::new();
    Little::fstab("UUID=12345678-2222-3333-4444-555555555555 /data jfs defaults 0 2").make(&dir);
    dir.sparse("data.raw", 8 << 20);
    dir.poke("data.raw", 0x8000, b"JFS1");
    let ran = dir.vimg_cmd("v2v --plan --output json -f raw vm.raw data.raw").run().expect_code(0).json();
    assert!(ran["systems"].to_string().contains("may lie in disk 2"), "{ran:#}");
}

#[test]
fn a_root_on_none_of_the_disks_stops_the_conversion() {
    requires!(needs());
    let absent = "UUID=12345678-2222-3333-4444-555555555555";
    refused(&Little { root: absent.into(), ..Little::default() }, "root 'UUID=12345678-");
}

#[test]
fn an_initramfs_that_cannot_be_given_drivers_stops_the_conversion() {
    requires!(needs(), tool("cpio"));
    let rubbish = Little { initrd: Some(vec![7; 65536]), ..Little::default() };
    let dir = refused(&rubbish, "cannot be read");
    dir.vimg_cmd("v2v -o out -O raw --force -f raw vm.raw").run().expect_code(5);
    let empty = dir.file("empty");
    Cmd::new("sh").words("-c").arg(format!("true | cpio -o -H newc --quiet >{}", empty.display())).ok();
    let bare = Little { initrd: Some(std::fs::read(empty).unwrap()), ..Little::default() };
    refused(&bare, "virtio_blk");
}

#[test]
fn a_kernel_that_is_not_there_stops_the_conversion() {
    requires!(needs());
    let dir = refused(
        &Little { kernel: false, ..Little::default() },
        "that the boot loader starts by itself is not there",
    );
    let plan = dir.vimg_cmd("v2v --batch plan.yaml");
    dir.write("plan.yaml", b"guests:\n  - {source: vm.raw, format: raw, output-dir: out, force: true}\n");
    let answer = plan.run().expect_code(5).json();
    assert_eq!((&answer["stopped"], &answer["failed"]), (&1.into(), &0.into()), "{answer:#}");
}

/// What does not fit is refused before it is copied: all disks, whatever they hold, and what is reserved.
#[test]
fn space_is_counted_before_it_is_taken() {
    let mounts = || -> Need {
        needs()?;
        let ran = Cmd::new("unshare").words("-rm sh -c").arg("mount -t tmpfs -o size=8m none /mnt").run();
        if ran.code == Some(0) {
            Ok(())
        } else {
            Err("no user namespaces with mounts on this machine".into())
        }
    };
    requires!(mounts());
    let dir = Dir::new();
    Little::default().make(&dir);
    dir.sparse("data.raw", 64 << 20);
    let vimg = tests::command::vimg_path().display().to_string();
    let run = |words: &str| {
        let script = format!(
            "mount -t tmpfs -o size=48m none /mnt; '{vimg}' v2v -o /mnt/out -f raw {words}; code=$?; ls -A /mnt/out; exit $code"
        );
        Cmd::new("unshare").words("-rm sh -c").arg(script).dir(dir.path()).timeout(120).run()
    };
    run("-O raw vm.raw data.raw").expect_code(0).expect_stdout("vm-sdb.raw");
    for words in
        ["-O raw --preallocation falloc vm.raw data.raw", "-O qcow2 --preallocation full vm.raw data.raw"]
    {
        let ran = run(words).expect_code(1);
        assert!(ran.stderr.contains("takes up to 98") && ran.stderr.contains("--force"), "{}", ran.story());
        assert!(!ran.stdout.contains("vm-sda"), "{}", ran.story());
    }
}

/// Files of an earlier conversion do not stand beside the report of a later one.
#[test]
fn companions_of_an_earlier_conversion_go_with_it() {
    requires!(needs());
    let dir = Dir::new();
    Little::default().make(&dir);
    let data = Part { kind: "L", mib: 16, holds: Holds::Ext4(DATA), files: &[] };
    disk(&dir, "data.raw", "dos", &[data]);
    dir.vimg_cmd("v2v -o out -f raw --target libvirt,ova vm.raw data.raw").run().expect_code(0);
    dir.write("out/vm-notes.txt", b"mine");
    assert!(dir.exists("out/vm-sdb.qcow2") && dir.exists("out/vm.ova"));
    dir.vimg_cmd("v2v -o out -O raw -f raw --overwrite vm.raw").run().expect_code(0);
    let mut names: Vec<_> = std::fs::read_dir(dir.file("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["vm-notes.txt", "vm-report.html", "vm-report.json", "vm-sda.raw", "vm.xml"]);
}

/// A `/dev/kvm` that is there says nothing: QEMU is asked whether it works.
#[test]
fn a_kvm_that_does_not_work_is_not_used_by_the_script() {
    requires!(needs());
    let dir = Dir::new();
    Little::default().make(&dir);
    dir.vimg_cmd(
        "v2v -o out -f raw --target qemu --nic mac=00:16:3e:00:00:01,network=a --bridge a:br9 vm.raw",
    )
    .run()
    .expect_code(0);
    let run = |body: &str| {
        dir.write("fake", format!("#!/bin/sh\n{body}\necho \"$@\"\n").as_bytes());
        let fake = dir.file("fake");
        Cmd::new("chmod").words("+x").arg(&fake).ok();
        Cmd::new("sh").arg(dir.file("out/vm.sh")).env("QEMU", fake.to_str().unwrap()).ok().stdout
    };
    let broken = run("case \"$*\" in *accel=kvm*) exit 134;; esac");
    assert!(broken.contains("accel=tcg") && broken.contains("-cpu max"), "{broken}");
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        assert!(run("").contains("accel=kvm"));
    }
    // What was decided, and when, is in the page.
    let page = String::from_utf8(dir.read("out/vm-report.html")).unwrap();
    assert!(page.contains("was on &#39;a&#39;: bridge &#39;br9&#39;"), "{page}");
    assert!(page.contains("<th>Begun</th>") && page.contains("; the file takes "), "{page}");
    let report = report(&dir);
    assert!(
        report["date"].as_str().unwrap().ends_with('Z') && report["vimg-version"].is_string(),
        "{report:#}"
    );
}

/// What our own writers refuse, others can do.
#[test]
fn a_file_system_that_is_refused_has_a_way_out() {
    requires!(needs(), tool("tune2fs"));
    let dir = Dir::new();
    Little::default().make(&dir);
    let at = format!("{}?offset={}", dir.file("vm.raw").display(), 1 << 20);
    Cmd::new("tune2fs").words("-O encrypt,verity,quota").arg(at).ok();
    let ran = dir.vimg_cmd("v2v -o out --backend native -f raw vm.raw").run().expect_code(1);
    assert!(
        ran.stderr.contains("feature quota") && ran.stderr.contains("tune2fs -O ^quota"),
        "{}",
        ran.story()
    );
    assert!(ran.stderr.contains("--backend appliance"), "{}", ran.story());
}

/// Two disks that nobody tells apart but by what the description says of them.
#[test]
fn names_of_hardware_are_understood_by_the_description() {
    requires!(needs());
    let by_path = "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:1:0-part1";
    let dir = refused(&Little::fstab(&format!("{by_path} /data ext4 defaults 0 2")), "cannot be told");
    let data = Part { kind: "L", mib: 16, holds: Holds::Ext4(DATA), files: &[] };
    disk(&dir, "data.raw", "dos", &[data]);
    let ran = dir.vimg_cmd("v2v -o out -f raw vm.raw data.raw").run().expect_code(1);
    assert!(ran.stderr.contains("cannot be told") && ran.stderr.contains("description"), "{}", ran.story());
    dir.write(
        "vm.vmx",
        b"config.version = \"8\"\nvirtualHW.version = \"19\"\nmemsize = \"512\"\nscsi0.present = \"TRUE\"\n\
          scsi0.virtualDev = \"pvscsi\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"vm.raw\"\n\
          scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"data.raw\"\n",
    );
    let plan = dir.vimg_cmd("v2v --plan --output json vm.vmx").run().expect_code(0).json();
    let expected = format!("+/dev/disk/by-uuid/{DATA} /data");
    assert!(plan["changes"].to_string().contains(&expected), "{plan:#}");

    // The description itself is no disk.
    let ran = dir.vimg_cmd("bootcheck vm.vmx").run().expect_code(2);
    assert!(
        ran.stderr.contains("description (VMX)") || ran.stdout.contains("description (VMX)"),
        "{}",
        ran.story()
    );
    let ran = dir.vimg_cmd("inspect data.raw vm.vmx").run().expect_code(1);
    assert!(ran.stderr.contains("description (VMX)"), "{}", ran.story());
    let found = dir.vimg_cmd("inspect --output json vm.vmx").run().expect_code(0).json();
    assert_eq!(found["systems"][0]["obstacles"].as_array().map(Vec::len), Some(0), "{found:#}");
    let cat = dir.vimg_cmd("cat vm.vmx /etc/os-release").run().expect_code(0);
    assert!(cat.stdout.contains("ID=debian"), "{}", cat.story());
}
