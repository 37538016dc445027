//! `bootcheck` with an installed qemu: guests that come up and guests that must not, from several formats, and what
//! is left of the images afterwards. One boot costs some seconds of translated instructions, so that each test makes
//! the most of its boots.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use tests::guests::{guests, qemu_system};
use tests::skip::qemu;
use tests::{Cmd, Dir, Ran, or_skip, requires};

/// A folder beside which guests lie.
struct Place {
    dir: Dir,
    guests: PathBuf,
}

/// The place, or why there is none.
fn place() -> Result<Place, String> {
    qemu_system()?;
    qemu()?;
    Ok(Place { guests: guests()?, dir: Dir::new() })
}

impl Place {
    fn guest(&self, name: &str) -> String {
        self.guests.join(name).display().to_string()
    }

    /// `vimg bootcheck` with qemu, and time enough for a busy machine.
    fn cmd(&self, words: &str) -> Cmd {
        self.dir
            .vimg_cmd(&format!("bootcheck --engine qemu --timeout 300 --memory 512M {words}"))
            .timeout(600)
    }

    /// The check of one image.
    #[track_caller]
    fn check(&self, words: &str, code: i32) -> Value {
        one(&self.cmd(words).words("--output json").run(), code)
    }

    /// What is expected of an image that does not boot.
    #[track_caller]
    fn fails(&self, words: &str, reason: &str) -> Value {
        let check = self.check(words, 1);
        assert_eq!(check["reason"], reason, "{check:#}");
        check
    }
}

#[track_caller]
fn one(ran: &Ran, code: i32) -> Value {
    let ran = ran.clone().expect_code(code);
    ran.json()["checks"][0].clone()
}

fn stations(check: &Value) -> Vec<&str> {
    let list = check["time-line"].as_array().unwrap();
    list.iter().map(|station| station["station"].as_str().unwrap()).collect()
}

/// What must be the same afterwards: the bytes and the times.
fn state(path: &Path) -> (String, i64, i64, i64, i64) {
    let sum = Cmd::new("sha256sum").arg(path).timeout(120).ok().stdout;
    let meta = std::fs::metadata(path).unwrap();
    (sum, meta.mtime(), meta.mtime_nsec(), meta.atime(), meta.atime_nsec())
}

/// A whole Debian, from a compressed image, with everything that the report tells; and the image is as it was, its
/// time of access included.
#[test]
fn a_debian_comes_up_and_its_image_is_as_it_was() {
    let place = or_skip!(place());
    place.dir.vimg_ok(&format!("convert -f raw -O qcow2 -c {} debian.qcow2", place.guest("debian.raw")));
    let image = place.dir.file("debian.qcow2");
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
    let times = std::fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago);
    let before = state(&image);
    std::fs::File::options().write(true).open(&image).unwrap().set_times(times).unwrap();
    let check = place.check("debian.qcow2 --console console.log", 0);
    let meta = std::fs::metadata(&image).unwrap();
    assert_eq!((meta.mtime(), meta.atime()), (1_600_000_000, 1_600_000_000), "the times are as they were");
    assert_eq!(state(&image).0, before.0, "the bytes, too");

    assert_eq!(check["verdict"], "booted");
    assert_eq!(check["engine"], "qemu-tcg");
    for station in ["first-byte", "kernel", "initramfs", "root-mounted", "init"] {
        assert!(stations(&check).contains(&station), "{station}: {check:#}");
    }
    let boot = &check["boot"];
    assert_eq!((&boot["from"], &boot["entry"]["title"]), (&"disk".into(), &"Debian GNU/Linux".into()));
    let uuid = std::fs::read_to_string(place.guests.join("root.uuid")).unwrap();
    let cmdline = format!("root=UUID={} ro rootdelay=2 console=ttyS0 panic=-1 no_timer_check", uuid.trim());
    assert_eq!(boot["cmdline"], cmdline.as_str());
    let disk = &check["disks"][0];
    assert!(disk["reads"].as_u64() > Some(100) && disk["writes"].as_u64() > Some(0), "{disk}");
    assert_eq!(disk["errors"], 0);
    let console = std::fs::read(place.dir.file("console.log")).unwrap();
    assert_eq!(console.len() as u64, check["console"]["bytes"].as_u64().unwrap());
    assert!(String::from_utf8_lossy(&console).contains("Linux version 6."));
}

/// A raw image, a chain of three, and a vmdk at once: two at a time, in one report, for people and build servers.
#[test]
fn every_format_boots_and_one_report_tells_of_all() {
    let place = or_skip!(place());
    let small = place.guest("small.raw");
    place.dir.vimg_ok(&format!("create -f qcow2 -b {small} -F raw base.qcow2"));
    place.dir.vimg_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    place.dir.vimg_ok(&format!("convert -f raw -O vmdk {small} small.vmdk"));
    std::fs::create_dir(place.dir.file("consoles")).unwrap();
    let ran = place
        .cmd("--jobs 2 --junit report.xml --console consoles top.qcow2 small.vmdk missing.raw")
        .run()
        .expect_code(2)
        .expect_stdout("top.qcow2: booted in ")
        .expect_stdout("small.vmdk: booted in ")
        .expect_stdout("missing.raw: could not be checked: Could not open 'missing.raw': ")
        .expect_stdout("2 booted, 0 did not boot, 1 could not be checked");
    assert!(!ran.stdout.contains("cmdline"), "what boots is told in a line\n{}", ran.story());
    let xml = std::fs::read_to_string(place.dir.file("report.xml")).unwrap();
    assert!(xml.contains("tests=\"3\" failures=\"0\" errors=\"1\""), "{xml}");
    let console = std::fs::read_to_string(place.dir.file("consoles/2-small.vmdk.log")).unwrap();
    assert!(console.contains("small login:"), "{console}");
}

#[test]
fn a_root_that_is_not_there_and_a_driver_that_is_not() {
    let place = or_skip!(place());
    let small = place.guest("small.raw");
    place.dir.vimg_ok(&format!("convert -f raw -O vmdk {small} small.vmdk"));
    let check = place.fails("small.vmdk --cmdline root=/dev/vda9", "root-not-found");
    assert!(check["disks"][0]["reads"].as_u64() > Some(0), "{check:#}");
    let nodisk = place.guest("initrd.nodisk");
    let check = place.fails(&format!("small.vmdk --initrd {nodisk}"), "no-disk-driver");
    assert_eq!(check["failures"][0]["reason"], "root-not-found");
    assert!(check["disks"][0]["read-bytes"].as_u64() <= Some(512), "{check:#}");
    let last = check["console"]["last-lines"].to_string();
    assert!(last.contains("ALERT!") && last.contains("does not exist"), "{last}");
}

/// Nothing runs: the kernel is not all there. From a compressed image.
#[test]
fn a_kernel_that_is_cut_off_is_seen_at_once() {
    let place = or_skip!(place());
    place.dir.vimg_ok(&format!("convert -f raw -O qcow2 -c {} cut.qcow2", place.guest("small-cut.raw")));
    let check = place.fails("cut.qcow2", "kernel-damaged");
    assert!(check["detail"].as_str().unwrap().contains("8000000 bytes"), "{check:#}");
    assert_eq!(check["console"]["bytes"], 0);
}

/// In a chain: the base is good, the overlay has lost the superblock.
#[test]
fn a_superblock_that_is_lost() {
    let place = or_skip!(place());
    place.dir.vimg_ok(&format!("create -f qcow2 -b {} -F raw bad.qcow2", place.guest("small.raw")));
    // The second partition begins at 49 MiB, its superblock 1 KiB behind that.
    Cmd::new("qemu-io").words("-f qcow2 bad.qcow2 -c").arg("write -z 49M 64k").dir(place.dir.path()).ok();
    let check = place.fails("bad.qcow2 --cmdline root=/dev/vda2", "root-not-mounted");
    assert!(check["failures"][0]["line"].as_str().unwrap().contains("/dev/vda2"), "{check:#}");
    // By its UUID it cannot even be found.
    place.fails("bad.qcow2", "root-not-found");
}

#[test]
fn panics_and_endless_loops() {
    let place = or_skip!(place());
    let small = place.guest("small.raw");
    let check = place.fails(&format!("-f raw {small} --append init=/bin/busybox"), "init-died");
    assert_eq!(check["ending"]["kind"], "reset");
    let ran = place
        .dir
        .vimg_cmd(&format!("bootcheck --engine qemu --memory 512M --timeout 40 --output json -f raw {small}"))
        .words("--append init=/loop --expect login:")
        .timeout(200)
        .run();
    let check = one(&ran, 1);
    assert_eq!(check["reason"], "timeout", "{check:#}");
    assert_eq!(check["expected"]["waiting-for"], "login:");
    assert!(check["cpus"][0]["rip"].as_str().is_some_and(|rip| rip.starts_with("0x")), "{check:#}");
    assert_eq!(check["console"]["last-lines"].as_array().unwrap().last().unwrap(), "turning in circles");
}

/// What the guest writes is kept in an image of its own, on demand only.
#[test]
fn what_the_guest_writes_can_be_kept() {
    let place = or_skip!(place());
    place.dir.vimg_ok(&format!("convert -f raw -O qcow2 {} small.qcow2", place.guest("small.raw")));
    let before = state(&place.dir.file("small.qcow2"));
    let words = "small.qcow2 --write-to kept.qcow2 --append rw --expect root.is.mounted --expect login:";
    let check = place.check(words, 0);
    assert_eq!(check["expected"]["seen"], 2);
    assert!(check["disks"][0]["writes"].as_u64() > Some(0), "{check:#}");
    assert_eq!(state(&place.dir.file("small.qcow2")).0, before.0);
    place.dir.qemu_ok("check -f qcow2 kept.qcow2");
    let info = place.dir.vimg_ok("info --output=json kept.qcow2").json();
    assert!(info["full-backing-filename"].as_str().unwrap().ends_with("small.qcow2"), "{info:#}");
    place.dir.vimg("compare small.qcow2 kept.qcow2").expect_code(1);
    // Nobody's file is overwritten.
    place.cmd(words).run().expect_code(2).expect_stdout("there is a file of this name already");
}

/// Ctrl-C ends the check, and no qemu is left behind.
#[test]
fn an_interrupted_check_leaves_nothing() {
    let place = or_skip!(place());
    let temporary = place.dir.file("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let child = place
        .cmd(&format!("-f raw {} --expect never", place.guest("small.raw")))
        .env("TMPDIR", temporary.to_str().unwrap())
        .spawn();
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_dir(&temporary).unwrap().next().is_none() {
        assert!(Instant::now() < deadline, "qemu was not started");
        std::thread::sleep(Duration::from_millis(50));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0, "the private folder is gone");
    let marker = temporary.to_str().unwrap().as_bytes();
    let runs = std::fs::read_dir("/proc").unwrap().flatten().any(|process| {
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        words.windows(marker.len()).any(|window| window == marker)
    });
    assert!(!runs, "a qemu is left behind");
}

/// Whoever cannot check must not answer: exit code 2, and what to do.
#[test]
fn what_cannot_be_checked_is_no_verdict() {
    let dir = Dir::new();
    dir.sparse("empty.raw", 1 << 20);
    let no = |words: &str, said: &str| {
        dir.vimg(&format!("bootcheck {words}")).expect_code(2).expect_stderr(said);
    };
    no("--expect ( empty.raw", "--expect '(' is not a regular expression");
    no("--engine xen empty.raw", "--engine expects 'auto', 'kvm' or 'qemu' not 'xen'");
    no("--transport usb empty.raw", "--transport expects 'pci' or 'mmio' not 'usb'");
    no("--memory 1M empty.raw", "a guest needs 64M or more");
    no("--kernel k --entry 1 empty.raw", "exclude each other");
    no("--write-to x a.raw b.raw", "for one image only");
    no("--nonsense", "unrecognized option '--nonsense'");
    no("", "Not enough arguments");
    no("--list-entries -f raw empty.raw", "no boot loader of this guest offers a Linux kernel");
    let listed = dir.vimg("bootcheck --list-entries --output json -f raw empty.raw").expect_code(0).json();
    assert_eq!(listed["entries"], serde_json::json!([]));
    // Without qemu, and without a KVM that is real, nothing runs a guest here.
    let ran = dir.vimg_cmd("bootcheck --engine qemu empty.raw").env("PATH", "/nonexistent").run();
    ran.expect_code(2)
        .expect_stderr("no qemu-system-x86_64 in the search path")
        .expect_stderr("hint: or install");
    requires!(qemu_system());
    let ran = dir.vimg_cmd("bootcheck --engine qemu -f raw empty.raw").run().expect_code(2);
    ran.expect_stdout("could not be checked: no boot loader").expect_stdout("name a kernel: --kernel");
    dir.write("kernel", b"#!/bin/sh");
    let ran = dir.vimg_cmd("bootcheck --engine qemu --kernel kernel -f raw empty.raw").run().expect_code(2);
    ran.expect_stdout("this is no kernel that can be started");
}

#[test]
fn the_doctor_has_a_remedy_for_every_gap() {
    let dir = Dir::new();
    let ran = dir.vimg("doctor --output=json").expect_no_panic();
    let said = ran.json();
    assert_eq!(ran.code, Some(i32::from(said["can-boot"] != true)), "{}", ran.story());
    let findings = said["findings"].as_array().unwrap();
    for finding in findings {
        assert_eq!(finding["ok"] == true, finding["remedy"].is_null(), "{finding}");
    }
    for name in
        ["KVM", "nbd", "loop", "reflink here", "locks here", "Landlock", "seccomp", "qemu", "open files"]
    {
        assert!(findings.iter().any(|finding| finding["name"] == name), "{name}: {}", ran.story());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    dir.vimg("doctor").expect_stdout("bootcheck ");
}
