//! `vimg p2v` of machines that are folders: small files in place of /sys and /proc, a file or a loop device as the disk.

use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::num::to_usize;
use guestdisk::Disks;
use serde_json::Value;
use tests::guest::{Size, compare, fill, open};
use tests::server::Server;
use tests::skip::{Need, root, tool};
use tests::{Cmd, Dir, requires};

const JUNK: u8 = 0xaa;
pub(crate) const MIB: u64 = 1 << 20;
/// The partition with the file system begins here.
const ROOT: u64 = MIB;
const ROOT_MIB: u64 = 48;
const SWAP_MIB: u64 = 16;
pub(crate) const DISK_MIB: u64 = 96;

pub(crate) fn tools() -> Need {
    for name in ["sfdisk", "mke2fs", "e2fsck", "mkswap", "qemu-img"] {
        tool(name)?;
    }
    Ok(())
}

/// A machine with one disk: ext4 with files, swap space, and room behind them, everything else full of junk.
pub(crate) struct Machine {
    pub(crate) dir: Dir,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let machine = Self { dir: Dir::new() };
        let disk = machine.disk();
        std::fs::write(&disk, vec![JUNK; to_usize(DISK_MIB * MIB)]).unwrap();
        let script =
            format!("label: gpt\nstart=1MiB, size={ROOT_MIB}MiB, type=L\nsize={SWAP_MIB}MiB, type=S\n");
        Cmd::new("sfdisk").words("-q --wipe always").arg(&disk).stdin(script).ok();
        let tree = machine.tree();
        fill(&tree, Size { names: 100, largest: 5 << 20, unix: true });
        let part = machine.dir.file("part");
        std::fs::write(&part, vec![JUNK; to_usize(ROOT_MIB * MIB)]).unwrap();
        Cmd::new("mke2fs").words("-q -F -t ext4 -E nodiscard -d").arg(&tree).arg(&part).ok();
        machine.put(&part, ROOT);
        let swap = machine.dir.file("swap");
        std::fs::write(&swap, vec![JUNK; to_usize(SWAP_MIB * MIB)]).unwrap();
        Cmd::new("mkswap").words("-q").arg(&swap).ok();
        machine.put(&swap, (1 + ROOT_MIB) * MIB);
        machine.file("sys/block/sda/size", &format!("{}\n", DISK_MIB * MIB / 512));
        machine.file("sys/block/sda/device/model", "Test disk\n");
        machine.file("sys/block/sda/device/serial", "T-1\n");
        machine.file("sys/block/sda/sda1/partition", "1\n");
        machine.file("sys/block/sda/sda1/dev", "8:1\n");
        machine.file("sys/block/loop0/size", "8\n");
        machine.file("proc/sys/kernel/hostname", "old-server\n");
        machine.file("proc/meminfo", "MemTotal: 1000000 kB\n");
        machine.file("proc/cpuinfo", "processor : 0\nflags : fpu lm\n");
        std::fs::create_dir_all(machine.dir.file("machine/dev")).unwrap();
        symlink(&disk, machine.dir.file("machine/dev/sda")).unwrap();
        machine
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.file("disk.raw")
    }

    fn tree(&self) -> PathBuf {
        self.dir.file("tree")
    }

    fn put(&self, part: &Path, offset: u64) {
        let disk = std::fs::File::options().write(true).open(self.disk()).unwrap();
        disk.write_all_at(&std::fs::read(part).unwrap(), offset).unwrap();
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.dir.file("machine").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(crate) fn p2v(&self, words: &str) -> Cmd {
        self.dir.vimg_cmd("p2v --root machine").words(words)
    }

    fn mounted(&self) {
        self.file("proc/self/mountinfo", "21 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n");
    }

    /// The copy as a raw image.
    pub(crate) fn raw(&self, image: &str) -> PathBuf {
        let raw = self.dir.file("copy.raw");
        Cmd::new("qemu-img").words("convert -O raw").arg(self.dir.file(image)).arg(&raw).ok();
        raw
    }

    /// Every file is there, the file system is sound, and so is the partition table; nothing else need be.
    pub(crate) fn is_whole(&self, image: &str) -> u64 {
        let raw = self.raw(image);
        let ran = Cmd::new("sfdisk").words("--verify").arg(&raw).run();
        assert!(ran.code == Some(0) && !ran.stderr.contains("backup"), "{}{}", ran.stdout, ran.stderr);
        let disks = Disks::open(open(&raw)).unwrap();
        assert_eq!(disks.problems(), [""; 0]);
        let fs = disks.volumes()[0].file_system().unwrap();
        compare(&fs, &self.tree(), true, &["lost+found"]);
        assert_eq!(disks.volumes()[1].content.as_ref().unwrap().kind.name(), "swap");
        let bytes = std::fs::read(&raw).unwrap();
        let part = self.dir.file("copied-part");
        std::fs::write(&part, &bytes[to_usize(ROOT)..to_usize((1 + ROOT_MIB) * MIB)]).unwrap();
        let ran = Cmd::new("e2fsck").words("-fn").arg(&part).run();
        assert!(ran.code == Some(0), "{}{}", ran.stdout, ran.stderr);
        bytes.chunks(4096).filter(|block| **block == [JUNK; 4096]).count() as u64 * 4096
    }
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_disk_is_copied_without_what_holds_nothing() {
    requires!(tools());
    let machine = Machine::new();
    let ran = machine.p2v("-o out --verify").ok();
    assert!(ran.stdout.starts_with("sda: "), "{}", ran.stdout);
    let junk = machine.is_whole("out/sda.qcow2");
    assert!(junk < 12 * MIB, "{junk} bytes of junk were copied");
    let names: Vec<_> =
        std::fs::read_dir(machine.dir.file("out")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "images and description, and nothing else: {names:?}");
    let description = json(&machine.dir.file("out/machine.json"));
    assert_eq!(description["name"], "old-server");
    assert_eq!(description["disks"][0]["image"]["name"], "sda.qcow2");
    // As `vimg v2v` takes it.
    let folder = machine.dir.file("out");
    let guest = v2v::source::read(folder.to_str().unwrap(), &v2v::source::SourceOptions::default()).unwrap();
    assert_eq!((guest.name.as_str(), guest.disks.len()), ("old-server", 1));
    let disks = v2v::source::open_disks(&guest, &image::OpenOptions::default()).unwrap();
    assert_eq!(disks[0].size, DISK_MIB * MIB);
    // All of it, if that is wanted.
    machine.p2v("-o whole --whole -O raw").ok();
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.dir.file("whole/sda.raw")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
}

#[test]
fn a_loop_device_stands_in_for_the_disk() {
    requires!(tools(), root(), tool("losetup"));
    let machine = Machine::new();
    let ran = Cmd::new("losetup").words("--show -f").arg(machine.disk()).run();
    if ran.code != Some(0) {
        tests::skip::note(&format!("no loop device: {}", ran.stderr));
        return;
    }
    let device = ran.stdout.trim().to_owned();
    let link = machine.dir.file("machine/dev/sda");
    std::fs::remove_file(&link).unwrap();
    symlink(&device, &link).unwrap();
    let ran = machine.p2v("-o out").run();
    Cmd::new("losetup").words("-d").arg(&device).ok();
    assert!(ran.code == Some(0), "{}", ran.stderr);
    machine.is_whole("out/sda.qcow2");
}

/// Makes what a run may leave that was killed between an allocation and its use: a cluster behind the last one that is counted
/// and that nothing refers to.
pub(crate) fn leak(image: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(image).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let counts = number(number(48));
    let cluster = file.metadata().unwrap().len().div_ceil(65536);
    file.write_all_at(&[0; 65536], cluster * 65536).unwrap();
    file.write_all_at(&[0, 1], counts + cluster * 2).unwrap();
    let ran = Cmd::new("qemu-img").words("check").arg(image).run();
    assert_eq!(ran.code, Some(3), "{}{}", ran.stdout, ran.stderr);
}

/// Killed in the middle, it goes on; what has changed meanwhile is copied again.
#[test]
fn a_copy_that_was_killed_goes_on() {
    requires!(tools());
    let machine = Machine::new();
    let state = machine.dir.file("out/.vimg-p2v-state.json");
    let mut child = machine.p2v("-o out --whole --threads 1 --rate 8M").spawn();
    let deadline = Instant::now() + Duration::from_secs(90);
    let done = || state.exists() && json(&state)["disks"][0]["done"].as_object().unwrap().len() >= 2;
    while !done() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "nothing is safe");
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let safe = json(&state)["disks"][0]["done"].as_object().unwrap().len();
    assert!((2..6).contains(&safe), "{safe} of 6 segments");
    assert!(!machine.dir.file("out/sda.qcow2").exists() && !machine.dir.file("out/machine.json").exists());
    machine.dir.poke("disk.raw", 5000, b"changed meanwhile");
    leak(&machine.dir.file("out/sda.qcow2.partial"));
    let ran = machine.p2v("-o out --whole --verify").ok();
    machine.dir.qemu_checks("out/sda.qcow2");
    assert!(ran.stdout.contains("were there already"), "{}", ran.stdout);
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.raw("out/sda.qcow2")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    assert!(!state.exists());
}

#[test]
fn another_disk_is_not_mixed_into_a_copy() {
    requires!(tools());
    let machine = Machine::new();
    let mut child = machine.p2v("-o out --whole --rate 16M").spawn();
    let state = machine.dir.file("out/.vimg-p2v-state.json");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !state.exists() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    machine.file("sys/block/sda/device/serial", "T-2\n");
    let ran = machine.p2v("-o out").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("is of another disk than sda"), "{}", ran.stderr);
    machine.p2v("-o out --restart").ok();
    machine.is_whole("out/sda.qcow2");
    // And what is complete is not overwritten.
    let ran = machine.p2v("-o out").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("is there already"), "{}", ran.stderr);
}

#[test]
fn disks_go_to_a_server_and_the_description_with_them() {
    requires!(tools());
    let machine = Machine::new();
    machine.dir.qemu_ok(&format!("create -f qcow2 sda.qcow2 {DISK_MIB}M"));
    machine.dir.sparse("machine.json", 65536);
    std::fs::write(
        machine.dir.file("keys"),
        "vimg:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n",
    )
    .unwrap();
    for tls in [false, true] {
        let options = if tls { "--tls-psk keys" } else { "" };
        let server =
            Server::start(&machine.dir, &format!("{options} sda=sda.qcow2 machine.json=machine.json"));
        let here = machine.dir.path().display();
        let uri = match tls {
            false => server.uri_of("{disk}"),
            true => format!(
                "nbds+unix://vimg@/{{disk}}?socket={}&tls-psk-file={here}/keys",
                server.socket.display()
            ),
        };
        let ran = machine.p2v("--verify --to").arg(&uri).run();
        assert!(ran.code == Some(0), "{}", ran.stderr);
        assert_eq!(server.stop().code, Some(0));
        let junk = machine.is_whole("sda.qcow2");
        assert!(junk < 12 * MIB, "{junk}");
        let description = json(&machine.dir.file("machine.json"));
        assert_eq!(description["disks"][0]["image"]["name"], "sda.qcow2");
        // The next round finds what it would not have written.
        machine.dir.poke("machine.json", 0, &[b' '; 65536]);
        machine.dir.qemu_ok(&format!("create -f qcow2 sda.qcow2 {DISK_MIB}M"));
        Cmd::new("qemu-io")
            .words("-c")
            .arg(format!("write -P 0x55 0 {DISK_MIB}M"))
            .arg(machine.dir.file("sda.qcow2"))
            .ok();
    }
    assert!(!machine.dir.file("vimg-p2v-state.json").exists());
}

#[test]
fn a_copy_to_a_server_goes_on_too() {
    requires!(tools());
    let machine = Machine::new();
    machine.dir.qemu_ok(&format!("create -f qcow2 target.qcow2 {DISK_MIB}M"));
    let server = Server::start(&machine.dir, "--export sda target.qcow2");
    let mut child = machine.p2v("--whole --threads 1 --rate 8M --to").arg(server.uri_of("{disk}")).spawn();
    let state = machine.dir.file("vimg-p2v-state.json");
    let deadline = Instant::now() + Duration::from_secs(90);
    while !state.exists() || json(&state)["disks"][0]["done"].as_object().unwrap().len() < 2 {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "nothing is safe");
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What is safe is not there any more, as in an export that was made anew.
    assert!(json(&state)["disks"][0]["done"]["0"].is_string());
    Cmd::new("qemu-io").words("-f raw -c").arg("write -P 0x77 1M 4k").arg(server.uri_of("sda")).ok();
    let ran = machine.p2v("--whole --to").arg(server.uri_of("{disk}")).run();
    assert!(ran.code == Some(0) && ran.stdout.contains("were there already"), "{}{}", ran.stdout, ran.stderr);
    // The server has no export for the description.
    assert!(
        ran.stderr.contains("machine.json") && machine.dir.file("machine.json").exists(),
        "{}",
        ran.stderr
    );
    assert_eq!(server.stop().code, Some(0));
    let ran = Cmd::new("cmp").arg(machine.disk()).arg(machine.raw("target.qcow2")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
}

#[test]
fn what_is_written_to_meanwhile_is_refused_unless_it_is_wanted() {
    requires!(tools());
    let machine = Machine::new();
    machine.mounted();
    let ran = machine.p2v("-o out").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("sda1 on /srv"), "{}", ran.stderr);
    assert!(ran.stderr.contains("--live") && ran.stderr.contains("--freeze"), "{}", ran.stderr);
    assert!(!machine.dir.file("out/sda.qcow2").exists());
    let ran = machine.p2v("-o out --live").ok();
    assert!(ran.stderr.contains("like a machine that lost power"), "{}", ran.stderr);
    let junk = machine.is_whole("out/sda.qcow2");
    assert!(junk > 24 * MIB, "free space of what is mounted is copied: {junk}");
}

#[test]
fn the_machine_is_listed() {
    let machine = Machine { dir: Dir::new() };
    machine.file("sys/block/sda/size", "2048\n");
    machine.file("sys/block/sda/device/model", "Test disk\n");
    machine.file("sys/block/loop0/size", "8\n");
    machine.file("proc/sys/kernel/hostname", "old-server\n");
    let ran = machine.p2v("--list").ok();
    for line in
        ["machine: old-server (physical)", "  sda: 1 MiB, Test disk", "  loop0: a file shown as a disk"]
    {
        assert!(ran.stdout.lines().any(|own| own == line), "{line}:\n{}", ran.stdout);
    }
    let ran = machine.p2v("--list --output-format json").ok();
    let value: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&value["machine"]["name"], &value["disks"][0]["size-bytes"]),
        (&"old-server".into(), &1_048_576.into())
    );
    let ran = machine.p2v("").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("-o DIR or --to URI"), "{}", ran.stderr);
    let ran = machine.p2v("-o out sdq").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("no disk 'sdq'"), "{}", ran.stderr);
    // The machine that runs the test, whatever it is.
    machine.dir.vimg_ok("p2v --list");
}

/// Somebody who writes waits while the copy runs, and goes on afterwards; also if the copy is killed.
#[test]
fn a_frozen_file_system_is_thawed_whatever_happens() {
    requires!(tools(), root(), tool("losetup"), tool("mount"));
    let machine = Machine::new();
    let mounted = Mounted::new(&machine);
    let Some(mounted) = mounted else { return };
    let line = format!("21 1 8:1 / {} rw - ext4 /dev/sda1 rw\n", mounted.path.display());
    machine.file("proc/self/mountinfo", &line);
    let ran = machine.p2v("-o out --freeze").ok();
    assert!(ran.stderr.is_empty(), "{}", ran.stderr);
    std::fs::write(mounted.path.join("after"), "x").unwrap();
    std::fs::remove_file(mounted.path.join("after")).unwrap();
    let mut child = machine.p2v("-o killed --freeze --rate 4M").spawn();
    std::thread::sleep(Duration::from_secs(2));
    child.kill().unwrap();
    child.wait().unwrap();
    // It would wait for ever.
    let ran = Cmd::new("touch").arg(mounted.path.join("after")).timeout(20).run();
    assert!(ran.code == Some(0) && !ran.timed_out, "{}", ran.stderr);
    let inside = machine.p2v(&format!("--freeze -o {}/out", mounted.path.display())).run();
    assert!(inside.code == Some(1) && inside.stderr.contains("cannot be frozen"), "{}", inside.stderr);
    drop(mounted);
}

/// The machine's file system, mounted.
pub(crate) struct Mounted {
    pub(crate) path: PathBuf,
    device: String,
}

impl Mounted {
    pub(crate) fn new(machine: &Machine) -> Option<Self> {
        let words = format!("--show -f -o {ROOT} --sizelimit {}", ROOT_MIB * MIB);
        let ran = Cmd::new("losetup").words(&words).arg(machine.disk()).run();
        if ran.code != Some(0) {
            tests::skip::note(&format!("no loop device: {}", ran.stderr));
            return None;
        }
        let path = machine.dir.file("mounted");
        std::fs::create_dir(&path).unwrap();
        let device = ran.stdout.trim().to_owned();
        let mounted = Self { path, device };
        let ran = Cmd::new("mount").words("-t ext4").arg(&mounted.device).arg(&mounted.path).run();
        if ran.code != Some(0) {
            tests::skip::note(&format!("ext4 cannot be mounted: {}", ran.stderr));
            return None;
        }
        Some(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Cmd::new("umount").arg(&self.path).run();
        let _ = Cmd::new("losetup").words("-d").arg(&self.device).run();
    }
}
