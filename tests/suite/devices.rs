//! Block devices, and file systems whose files can share blocks. Both need root and a loop device; skipped
//! where there is none.

use std::path::Path;

use tests::skip::{Need, qemu, root, tool};
use tests::{Cmd, Dir, requires};

/// A loop device over a file, until dropped.
struct Loop {
    device: String,
}

impl Loop {
    fn new(file: &Path) -> Result<Self, String> {
        let ran = Cmd::new("losetup").words("--find --show").arg(file).run();
        match ran.code {
            Some(0) => Ok(Self { device: ran.stdout.trim().to_owned() }),
            _ => Err("no loop device to be had".to_owned()),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Cmd::new("losetup").arg("-d").arg(&self.device).run();
    }
}

fn loops() -> Need {
    root()?;
    tool("losetup")?;
    let dir = Dir::new();
    dir.sparse("probe", 1 << 20);
    Loop::new(&dir.file("probe")).map(drop)
}

/// Bytes with data, zeros and noise.
fn contents(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|n| u8::try_from((n / 4096 * 7 + n) % 251).unwrap()).collect();
    bytes[len / 4..len / 2].fill(0);
    bytes
}

#[test]
fn block_devices_are_sources_and_targets() {
    requires!(qemu(), loops());
    let dir = Dir::new();
    let bytes = contents(8 << 20);
    dir.write("in.raw", &bytes);
    dir.write("disk", &vec![0xff; 8 << 20]);
    let disk = Loop::new(&dir.file("disk")).unwrap();
    let device = &disk.device;
    // As a target: what was there before has to give way, zeros included.
    for options in ["", "-W", "-t none -T none", "-S 0"] {
        dir.write("old.raw", &vec![0xff; 8 << 20]);
        dir.qemu_ok(&format!("convert -n -f raw -O raw old.raw {device}"));
        dir.vimg_ok(&format!("convert -n {options} -f raw -O raw in.raw {device}"));
        dir.qemu_ok(&format!("compare -f raw -F raw in.raw {device}"));
        dir.vimg_ok(&format!("compare -f raw -F raw in.raw {device}"));
    }
    // Without -n, as many do.
    dir.vimg_ok(&format!("convert -f raw -O raw in.raw {device}"));
    dir.qemu_ok(&format!("compare -f raw -F raw in.raw {device}"));
    // As a source.
    for options in ["", "-T none"] {
        dir.vimg_ok(&format!("convert {options} -f raw -O qcow2 {device} out.qcow2"));
        dir.qemu_checks("out.qcow2");
        assert!(dir.qemu_reads("out.qcow2") == bytes, "{options}");
    }
    let (theirs, ours) = (dir.qemu(&format!("info {device}")), dir.linked(&format!("info {device}")));
    assert_eq!(theirs.stdout, ours.stdout);
    dir.same(&format!("info --output=json {device}"));
    // A device too small for the image.
    dir.sparse("large.raw", 9 << 20);
    dir.vimg(&format!("convert -n -f raw -O raw large.raw {device}")).expect_clean_failure();
    // A qcow2 image on a device.
    dir.vimg_ok(&format!("create -f qcow2 {device} 4M"));
    dir.qemu_ok(&format!("check -f qcow2 {device}"));
    dir.same(&format!("info -f qcow2 {device}"));
}

/// Runs a script with a fresh file system of `kind` at /mnt, in a mount namespace of its own.
fn on_file_system(dir: &Dir, kind: &str, script: &str) -> tests::Ran {
    let make = if kind == "xfs" { "mkfs.xfs -q -f -m reflink=1" } else { "mkfs.btrfs -q -f" };
    dir.sparse("fs.img", 600 << 20);
    let script = format!(
        "{make} fs.img >/dev/null 2>&1 && mount -o loop fs.img /mnt || exit 99; {script}; code=$?; umount /mnt; exit $code"
    );
    Cmd::new("unshare").words("-m sh -c").arg(script).dir(dir.path()).run()
}

fn file_system(kind: &str) -> Need {
    root()?;
    tool("unshare")?;
    tool(&format!("mkfs.{kind}"))?;
    match on_file_system(&Dir::new(), kind, "true").code {
        Some(0) => Ok(()),
        _ => Err(format!("{kind} cannot be mounted here")),
    }
}

fn shares_blocks(kind: &str) {
    requires!(qemu(), tool("filefrag"), file_system(kind));
    let dir = Dir::new();
    // An odd end, so that the last block is not whole.
    dir.write("in.raw", &contents((96 << 20) + 1536));
    let vimg = tests::command::vimg_path().display().to_string();
    let script = format!(
        "set -e; cp in.raw /mnt/; cd /mnt; sync
         '{vimg}' convert -f raw -O raw in.raw a.raw; cmp in.raw a.raw
         '{vimg}' convert -f raw -O qcow2 in.raw a.qcow2; qemu-img check -q a.qcow2; qemu-img compare -q -f raw -F qcow2 in.raw a.qcow2
         '{vimg}' convert -O qcow2 a.qcow2 b.qcow2; qemu-img check -q b.qcow2; qemu-img compare -q a.qcow2 b.qcow2
         '{vimg}' convert -O raw b.qcow2 b.raw; cmp in.raw b.raw
         '{vimg}' convert -O qcow2 -o cluster_size=4k a.qcow2 c.qcow2; qemu-img check -q c.qcow2; qemu-img compare -q a.qcow2 c.qcow2
         filefrag -e a.raw a.qcow2 b.qcow2 b.raw c.qcow2
         # What is shared must not be written through.
         qemu-io -f qcow2 -c 'write -q -P 1 0 1M' b.qcow2; cmp in.raw a.raw; qemu-img compare -q -f raw -F qcow2 in.raw a.qcow2"
    );
    let ran = on_file_system(&dir, kind, &format!("({script})")).expect_code(0);
    let (shared, all) = shared_blocks(&ran.stdout);
    assert!(
        shared * 100 > all * 95,
        "only {shared} of {all} blocks of the copies are shared\n{}",
        ran.story()
    );
}

/// Sums up the lengths of the extents that filefrag(8) lists: the shared ones, and all. What xfs has set aside behind the end
/// of a file, for as long as it pleases, holds nothing and does not count.
fn shared_blocks(listing: &str) -> (u64, u64) {
    let written = listing.lines().filter(|line| !line.contains("unwritten"));
    let extents = written.filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let blocks: u64 = fields.get(3).filter(|_| fields.len() >= 5)?.trim().parse().ok()?;
        Some((blocks, line.contains("shared")))
    });
    extents.fold((0, 0), |(shared, all), (blocks, is)| (shared + if is { blocks } else { 0 }, all + blocks))
}

#[test]
fn copies_on_xfs_share_blocks() {
    shares_blocks("xfs");
}

#[test]
fn copies_on_btrfs_share_blocks() {
    shares_blocks("btrfs");
}
