//! `vimg p2v --snapshot` with a program in the place of LVM's: what is asked of it, what is refused, and that everything it has
//! made is removed. That it copies one moment is seen in the lab (`make p2v-lab`), which has the device mapper.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tests::skip::{root, tool};
use tests::{Cmd, Dir, requires};

const MIB: u64 = 1 << 20;
const UUIDS: &str = "3WFntKI5RbxNtUj9eEaadjB9n64E5TPPwpCewM3o4milNjWojc617YSPSmnMaqca";

/// What stands in for LVM: it knows one volume, makes snapshots of it by copying, and writes down what it was told.
const LVM: &str = r#"#!/bin/bash
cd "$(dirname "$0")"
echo "$*" >> said
snap=machine/dev/mapper/vg-vimg_p2v_root
case $1 in
lvs) case "$*" in
    *snap_percent*) cat fill ;;
    *) echo "  vg|root|UUID|-wi-ao----|50331648|"; [ ! -e $snap ] || echo "  vg|vimg_p2v_root|x|swi-a-s---|1048576|vimg-p2v"; cat other 2>/dev/null || : ;;
    esac ;;
vgs) echo "  vg|$(cat free)|1048576" ;;
lvcreate) dd if=disk.raw of=$snap bs=1M skip=1 count=48 status=none; cp store $snap-cow ;;
lvremove) rm -f $snap $snap-cow ;;
esac
"#;

/// A machine whose disk is a physical volume with one volume, an ext4 that is mounted: from a second file, for there is no
/// device mapper.
struct Machine {
    dir: Dir,
    device: String,
}

impl Machine {
    fn new() -> Option<Self> {
        let dir = Dir::new();
        dir.sparse("disk.raw", 64 * MIB);
        let lvm = r#"
            set -e; loop=$(losetup -f --show disk.raw); trap 'losetup -d $loop' EXIT
            config="devices { use_devicesfile=0 global_filter=[\"a|^$loop\$|\",\"r|.*|\"] } backup { backup=0 archive=0 }"
            run() { lvm "$1" --driverloaded n --config "$config" -q -y "${@:2}" > /dev/null; }
            run pvcreate $loop; run vgcreate -s 1M vg $loop; run lvcreate -an -Zn -Wn -n root -L 48M vg"#;
        let ran = Cmd::new("bash").arg("-c").arg(lvm).dir(dir.path()).run();
        if ran.code != Some(0) {
            tests::skip::note(&format!("no volume of LVM can be made: {}", ran.stderr));
            return None;
        }
        let image = dir.file("fs.img");
        dir.sparse("fs.img", 48 * MIB);
        Cmd::new("mke2fs").words("-q -F -t ext4").arg(&image).ok();
        Cmd::new("dd").words("bs=1M seek=1 conv=notrunc if=fs.img of=disk.raw").dir(dir.path()).ok();
        std::fs::create_dir(dir.file("mounted")).unwrap();
        let ran = Cmd::new("losetup").words("--show -f").arg(&image).run();
        let machine = Self { dir, device: ran.stdout.trim().to_owned() };
        let ran = Cmd::new("mount").words("-t ext4").arg(&machine.device).arg(machine.path()).run();
        if ran.code != Some(0) {
            tests::skip::note(&format!("ext4 cannot be mounted: {}", ran.stderr));
            return None;
        }
        machine.describe();
        Some(machine)
    }

    fn path(&self) -> PathBuf {
        self.dir.file("mounted")
    }

    fn put(&self, name: &str, text: &str) {
        let path = self.dir.file(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn describe(&self) {
        self.put("machine/sys/block/sda/size", &format!("{}\n", 64 * MIB / 512));
        self.put("machine/sys/block/sda/dev", "8:0\n");
        self.put("machine/sys/block/dm-0/dev", "253:0\n");
        self.put("machine/sys/block/dm-0/dm/name", "vg-root\n");
        self.put("machine/sys/block/dm-0/dm/uuid", &format!("LVM-{UUIDS}\n"));
        self.put("machine/sys/block/dm-0/slaves/sda/size", "1\n");
        self.mount(&format!("21 1 253:0 / {} rw - ext4 /dev/mapper/vg-root rw\n", self.path().display()));
        std::fs::create_dir_all(self.dir.file("machine/dev/mapper")).unwrap();
        symlink(self.dir.file("disk.raw"), self.dir.file("machine/dev/sda")).unwrap();
        self.put("lvm", &LVM.replace("UUID", &UUIDS[32..]));
        std::fs::set_permissions(self.dir.file("lvm"), std::fs::Permissions::from_mode(0o755)).unwrap();
        self.put("free", "10485760");
        self.put("fill", "  swi-a-s---|1.00\n");
        // The header of a store with chunks of 4096 bytes, and no exceptions.
        let mut store = vec![0; 1 << 20];
        for (at, number) in [(0, 0x7041_6e53_u32), (4, 1), (8, 1), (12, 8)] {
            store[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        self.dir.write("store", &store);
    }

    fn mount(&self, text: &str) {
        self.put("machine/proc/self/mountinfo", text);
    }

    fn p2v(&self, words: &str) -> Cmd {
        self.dir.vimg_cmd("p2v --root machine --lvm ./lvm").words(words)
    }

    #[track_caller]
    fn refused(&self, words: &str, texts: &[&str]) {
        let ran = self.p2v(words).run();
        assert!(ran.code == Some(1) && !self.dir.exists("out"), "{words}: {}{}", ran.stdout, ran.stderr);
        assert!(texts.iter().all(|text| ran.stderr.contains(text)), "{words}: {texts:?}: {}", ran.stderr);
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.file("said")).unwrap_or_default()
    }

    fn is_as_before(&self) -> bool {
        !self.dir.exists("machine/dev/mapper/vg-vimg_p2v_root")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = Cmd::new("umount").arg(self.path()).run();
        let _ = Cmd::new("losetup").words("-d").arg(&self.device).run();
    }
}

#[test]
fn a_volume_is_copied_from_its_snapshot_which_is_removed_whatever_happens() {
    requires!(root(), tool("losetup"), tool("lvm"), tool("mke2fs"), tool("mount"));
    let Some(machine) = Machine::new() else { return };
    // Refusals come before anything is done.
    machine.refused("-o out", &["--snapshot", "--freeze"]);
    machine.put("free", "0");
    machine.refused("--snapshot -o out", &["vg has 0", "vgextend", "--freeze"]);
    machine.put("free", "10485760");
    machine.refused("--snapshot --snapshot-size 40M -o out", &["smaller --snapshot-size"]);
    machine.refused("--snapshot --snapshot-size 0% -o out", &["--snapshot-size expects"]);
    machine.put("other", "  vg|vimg_p2v_var|y|swi-a-s---|1|vimg-p2v\n");
    machine.refused("--snapshot -o out", &["vg/vimg_p2v_var", "lvremove vg/vimg_p2v_var"]);
    std::fs::remove_file(machine.dir.file("other")).unwrap();
    machine.refused(&format!("--snapshot -o {}/out", machine.path().display()), &["cannot be frozen"]);
    let mounted = std::fs::read_to_string(machine.dir.file("machine/proc/self/mountinfo")).unwrap();
    machine.mount(&mounted.replace("253:0", "8:0").replace("mapper/vg-root", "sda"));
    machine.refused("--snapshot -o out", &["not on a logical volume", "--snapshot --freeze"]);
    machine.mount(&mounted);
    assert!(!machine.said().contains("lvcreate"), "{}", machine.said());
    // A copy: the snapshot in the place of the volume.
    machine.p2v("--snapshot --whole -O raw -o out").ok();
    let said = machine.said();
    assert!(said.contains("lvcreate --snapshot") && said.contains("--size 10485760b vg/root"), "{said}");
    assert!(
        machine.is_as_before() && said.contains("lvremove --force --autobackup n vg/vimg_p2v_root"),
        "{said}"
    );
    let ran = Cmd::new("cmp").arg(machine.dir.file("disk.raw")).arg(machine.dir.file("out/sda.raw")).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
    // Killed: somebody else cleans up.
    let mut child = machine.p2v("--snapshot --whole --rate 1M -o killed").spawn();
    let deadline = Instant::now() + Duration::from_secs(120);
    let state = machine.dir.file("killed/.vimg-p2v-state.json");
    while machine.is_as_before() || !state.exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "no snapshot was taken");
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    while !machine.is_as_before() {
        assert!(Instant::now() < deadline, "the snapshot stays: {}", machine.said());
        std::thread::sleep(Duration::from_millis(50));
    }
    let ran = Cmd::new("touch").arg(machine.path().join("after")).timeout(60).run();
    assert_eq!(ran.code, Some(0), "it stays frozen");
    // It overflows: no copy, whatever was read until then.
    machine.put("fill", "  swi-I-s---|100.00\n");
    let ran = machine.p2v("--snapshot --whole --rate 2M -o lost").run();
    assert!(ran.code == Some(1) && ran.stderr.contains("vg/vimg_p2v_root overflowed"), "{}", ran.stderr);
    assert!(machine.is_as_before());
    assert!(!machine.dir.exists("lost/sda.qcow2") && !machine.dir.exists("lost/machine.json"));
    // The kernel has given it up after everything was read.
    let mut store = machine.dir.read("store");
    store[4] = 0;
    machine.dir.write("store", &store);
    let ran = machine.p2v("--snapshot -o lost").run();
    assert!(ran.code == Some(1) && !machine.dir.exists("lost/sda.qcow2"), "{}", ran.stderr);
    assert!(machine.is_as_before());
}
