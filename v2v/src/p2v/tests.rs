//! Machines made of small files, and copies of small disks that are interrupted.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::mem::MemStorage;
use block::num::to_usize;
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Result};
use image::progress::{Progress, Quiet};

use super::copy::{Job, Part, copy, verify};
use super::state::Digest;
use super::*;
use crate::guest::{Cpus, FirmwareKind, Network, Nic, Origin};

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            dir.put(path, text.as_bytes());
        }
        dir
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn describe(&self) -> Found {
        describe(self.0.path())
    }
}

const MOUNTS: &str = "\
21 1 253:0 / / rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw
22 21 8:1 / /boot ro,relatime shared:2 - ext4 /dev/sda1 rw
23 21 0:45 /@home /home rw - btrfs /dev/sdb1 rw,space_cache
24 21 8:33 / /mnt/my\\040stick ro - vfat /dev/sdc1 ro
25 21 0:5 / /proc rw - proc proc rw
";

/// A server of two sockets with LVM on a SATA disk, btrfs on a SCSI disk, a stick, and everything that is no disk.
fn server() -> Files {
    let files = Files::new(&[
        ("sys/devices/pci/ata1/host0/sda/size", "2097152\n"),
        ("sys/devices/pci/ata1/host0/sda/dev", "8:0\n"),
        ("sys/devices/pci/ata1/host0/sda/removable", "0\n"),
        ("sys/devices/pci/ata1/host0/sda/queue/rotational", "1\n"),
        ("sys/devices/pci/ata1/host0/sda/device/vendor", "ATA     \n"),
        ("sys/devices/pci/ata1/host0/sda/device/model", "Samsung SSD 860 \n"),
        ("sys/devices/pci/ata1/host0/sda/sda1/partition", "1\n"),
        ("sys/devices/pci/ata1/host0/sda/sda1/dev", "8:1\n"),
        ("sys/devices/pci/ata1/host0/sda/sda2/partition", "2\n"),
        ("sys/devices/pci/ata1/host0/sda/sda2/dev", "8:2\n"),
        ("sys/devices/pci/host1/sdb/size", "4194304\n"),
        ("sys/devices/pci/host1/sdb/dev", "8:16\n"),
        ("sys/devices/pci/host1/sdb/device/vendor", "DELL\n"),
        ("sys/devices/pci/host1/sdb/device/model", "PERC H740P\n"),
        ("sys/devices/pci/host1/sdb/sdb1/partition", "1\n"),
        ("sys/devices/pci/host1/sdb/sdb1/dev", "8:17\n"),
        ("sys/devices/pci/usb1/host2/sdc/size", "1024\n"),
        ("sys/devices/pci/usb1/host2/sdc/dev", "8:32\n"),
        ("sys/devices/pci/usb1/host2/sdc/sdc1/partition", "1\n"),
        ("sys/devices/pci/usb1/host2/sdc/sdc1/dev", "8:33\n"),
        ("sys/block/sdd/size", "0\n"),
        ("sys/block/sdd/removable", "1\n"),
        ("sys/block/loop0/size", "8\n"),
        ("sys/block/sr0/size", "8\n"),
        ("sys/block/dm-0/size", "8\n"),
        ("sys/block/dm-0/dev", "253:0\n"),
        ("sys/block/dm-0/dm/name", "vg-root\n"),
        ("sys/block/dm-0/dm/uuid", "LVM-3WFntKI5RbxNtUj9eEaadjB9n64E5TPPwpCewM3o4milNjWojc617YSPSmnMaqca\n"),
        ("sys/block/dm-0/slaves/sda2/partition", "2\n"),
        ("sys/block/nvme0n1/size", "16\n"),
        ("sys/block/nvme0n1/device/serial", "NV 1  \n"),
        ("sys/block/nvme0c0n1/size", "16\n"),
        ("sys/block/nvme0c0n1/hidden", "1\n"),
        ("sys/block/weird0/size", "16\n"),
        ("proc/self/mountinfo", MOUNTS),
        ("proc/sys/kernel/hostname", "web1.example.org\n"),
        ("proc/meminfo", "MemTotal:       16313524 kB\nMemFree: 1 kB\n"),
        ("etc/adjtime", "0.0 0 0.0\n0\nLOCAL\n"),
        ("sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", "\u{6}\0\0\0\u{1}"),
        ("sys/class/dmi/id/sys_vendor", "Dell Inc.\n"),
        ("sys/class/dmi/id/product_name", "PowerEdge R640\n"),
        ("sys/class/dmi/id/product_uuid", "4C4C4544-0043-3010-8052-B4C04F564231\n"),
        ("sys/class/dmi/id/product_serial", "To be filled by O.E.M.\n"),
        ("sys/class/tpm/tpm0/x", ""),
        ("sys/class/net/lo/type", "772\n"),
        ("sys/class/net/bond0/bonding/slaves", "eno1 eno2\n"),
        ("sys/class/net/bond0/type", "1\n"),
        ("sys/class/net/br0/bridge/x", ""),
        ("sys/class/net/eno1/device/x", ""),
        ("sys/class/net/eno1/type", "1\n"),
        ("sys/class/net/eno1/address", "AA:BB:CC:00:00:01\n"),
        ("sys/class/net/eno2/device/x", ""),
        ("sys/class/net/eno2/type", "1\n"),
        ("sys/class/net/eno2/address", "aa:bb:cc:00:00:01\n"),
        ("sys/class/net/eno3/device/x", ""),
        ("sys/class/net/eno3/type", "1\n"),
        ("sys/class/net/eno3/address", "aa:bb:cc:00:00:03\n"),
        ("sys/class/net/wlan0/device/x", ""),
        ("sys/class/net/wlan0/type", "1\n"),
        ("sys/class/net/wlan0/phy80211/x", ""),
        (
            "proc/net/bonding/bond0",
            "Bonding Mode: active-backup\n\nSlave Interface: eno1\nPermanent HW addr: aa:bb:cc:00:00:01\n\n\
             Slave Interface: eno2\nPermanent HW addr: AA:BB:CC:00:00:02\n",
        ),
    ]);
    let cpu = |index: u32, socket: u32| {
        format!(
            "processor\t: {index}\nphysical id\t: {socket}\nsiblings\t: 4\ncpu cores\t: 2\nmodel name\t: Xeon\nflags\t\t: fpu lm\n\n"
        )
    };
    let cpus: String = (0..8).map(|index| cpu(index, index / 4)).collect();
    files.put("proc/cpuinfo", cpus.as_bytes());
    files.put("sys/devices/pci/host1/sdb/device/vpd_pg80", b"\0\x80\0\x08 SCSI-42");
    files.link("sys/block/sda", "../devices/pci/ata1/host0/sda");
    files.link("sys/block/sdb", "../devices/pci/host1/sdb");
    files.link("sys/block/sdc", "../devices/pci/usb1/host2/sdc");
    files.link("sys/class/net/eno1/device/driver", "../../../bus/pci/drivers/igb");
    files.link("sys/class/net/eno1/master", "../bond0");
    files.link("sys/class/net/eno2/master", "../bond0");
    files.link("sys/class/net/eno3/master", "../br0");
    files.link("sys/class/net/eno3/device/driver", "../../../bus/pci/drivers/tg3");
    files.link("dev/disk/by-id/ata-Samsung_1", "../../sda");
    files.link("dev/disk/by-id/ata-Samsung_1-part1", "../../sda1");
    files.link("dev/disk/by-id/wwn-0x5", "../../sda");
    files
}

#[test]
fn a_server_is_described() {
    let files = server();
    let found = files.describe();
    let Guest { name, origin, uuid, description, memory_bytes, cpus, firmware, .. } = &found.guest;
    assert_eq!((name.as_str(), *origin), ("web1", Origin::Physical));
    assert_eq!(uuid.as_deref(), Some("4c4c4544-0043-3010-8052-b4c04f564231"));
    assert_eq!(description.as_deref(), Some("Dell Inc. PowerEdge R640"));
    assert_eq!(*memory_bytes, Some(16 << 30));
    assert_eq!(*cpus, Cpus { count: Some(8), topology: Some((2, 2, 2)), model: Some("Xeon".to_owned()) });
    assert_eq!((firmware.kind, firmware.secure_boot), (Some(FirmwareKind::Uefi), true));
    assert!(found.guest.local_time && found.guest.tpm);
    assert_eq!(found.guest.architecture.as_deref(), Some("x86_64"));
    assert_eq!(found.guest.removables.len(), 1);
    let nic = |mac: &str, model: Option<&str>| Nic {
        mac: Some(mac.to_owned()),
        model: model.map(str::to_owned),
        ..Nic::default()
    };
    let bridged = Nic {
        network: Network::Bridge,
        network_name: Some("br0".to_owned()),
        ..nic("aa:bb:cc:00:00:03", None)
    };
    let expected = [nic("aa:bb:cc:00:00:01", Some("igb")), nic("aa:bb:cc:00:00:02", None), bridged];
    assert_eq!(found.guest.nics, expected);
    assert_eq!(found.guest.notes.len(), 3, "{:?}", found.guest.notes);
}

#[test]
fn its_disks_are_found_and_everything_else_has_a_reason() {
    let files = server();
    let found = files.describe();
    let names: Vec<&str> = found.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["nvme0n1", "sda", "sdb", "sdc"]);
    let [nvme, sda, sdb, sdc] = &found.disks[..] else { panic!() };
    assert_eq!((nvme.bus, nvme.serial.as_deref(), nvme.size_bytes), (Some(Bus::Nvme), Some("NV 1"), 8192));
    assert_eq!((sda.bus, sda.model.as_str(), sda.rotational), (Some(Bus::Sata), "Samsung SSD 860", true));
    assert_eq!(sda.by_id, ["ata-Samsung_1", "wwn-0x5"]);
    assert_eq!(
        (sdb.bus, sdb.model.as_str(), sdb.serial.as_deref()),
        (Some(Bus::Scsi), "DELL PERC H740P", Some("SCSI-42"))
    );
    assert_eq!(sdc.bus, Some(Bus::Usb));
    let reason =
        |name: &str| found.left_out.iter().find(|(own, _)| own == name).map(|(_, reason)| reason.as_str());
    assert_eq!(reason("sdd"), Some("there is no medium in it"));
    assert_eq!(reason("nvme0c0n1"), Some("one of several paths to a disk"));
    assert_eq!(reason("loop0"), Some("a file shown as a disk"));
    assert_eq!(reason("weird0"), Some("not a kind of disk that is known"));
    assert_eq!(found.left_out.len(), 6, "{:?}", found.left_out);
    assert_eq!(found.select(&["/dev/sdb".to_owned(), "disk/by-id/wwn-0x5".to_owned()]).unwrap(), [sdb, sda]);
    let error = found.select(&["loop0".to_owned()]).unwrap_err();
    assert_eq!(error.to_string(), "'loop0' is no disk of the machine: a file shown as a disk");
    assert_eq!(found.select(&[]).unwrap().len(), 4);
}

#[test]
fn what_is_mounted_is_found_through_everything_in_between() {
    let files = server();
    let found = files.describe();
    let [_, sda, sdb, sdc] = &found.disks[..] else { panic!() };
    let shown = |disk: &PhysicalDisk| -> Vec<(String, Vec<u32>, bool)> {
        let of = |mounted: &Mounted| {
            (mounted.path.display().to_string(), mounted.partitions.clone(), mounted.writable)
        };
        disk.mounts.iter().map(of).collect()
    };
    // A file system that is mounted read-only somewhere can be written to all the same.
    assert_eq!(shown(sda), [("/".to_owned(), vec![2], true), ("/boot".to_owned(), vec![1], true)]);
    assert_eq!(sda.mounts[0].mapper.as_deref(), Some("vg-root"));
    assert_eq!(sda.mounts[0].logical.as_deref(), Some("wpCewM3o4milNjWojc617YSPSmnMaqca"));
    assert_eq!(sda.mounts[1].logical, None);
    // Encryption over it; and a part that LVM keeps for itself.
    files.put("sys/block/dm-1/dm/uuid", b"CRYPT-LUKS2-x\n");
    files.put("sys/block/dm-1/dev", b"253:1\n");
    files.link("sys/block/dm-1/slaves/dm-0", "../../dm-0");
    files.put("proc/self/mountinfo", b"21 1 253:1 / / rw - ext4 /dev/mapper/c rw\n");
    assert!(files.describe().disks[1].mounts[0].logical.is_some());
    files.put(
        "sys/block/dm-0/dm/uuid",
        b"LVM-3WFntKI5RbxNtUj9eEaadjB9n64E5TPPwpCewM3o4milNjWojc617YSPSmnMaqca-real",
    );
    assert_eq!(files.describe().disks[1].mounts[0].logical, None);
    assert_eq!(shown(sdb), [("/home".to_owned(), vec![1], true)]);
    assert_eq!(shown(sdc), [("/mnt/my stick".to_owned(), vec![1], false)]);
}

#[test]
fn a_rescue_systems_own_stick_is_left_out_and_its_name_is_not_the_machines() {
    let files = server();
    let mounts =
        "20 1 0:20 / / rw - overlay overlay rw\n21 20 8:33 / /run/live/medium ro - vfat /dev/sdc1 ro\n";
    files.put("proc/self/mountinfo", mounts.as_bytes());
    let found = files.describe();
    assert_eq!(found.disks.len(), 3);
    let reason = "the rescue system that is running was started from it".to_owned();
    assert!(found.left_out.contains(&("sdc".to_owned(), reason)));
    assert_eq!(found.guest.name, "Dell Inc. PowerEdge R640");
    assert!(!found.guest.local_time, "the clock of the rescue system says nothing of the machine's");
}

#[test]
fn an_empty_tree_is_an_unknown_machine() {
    let found = Files::new(&[]).describe();
    assert!(found.disks.is_empty() && found.left_out.is_empty());
    assert_eq!(found.guest.name, "machine");
}

#[test]
fn the_description_is_read_back_as_a_source() {
    let files = server();
    let found = files.describe();
    let disks = found.select(&["sda".to_owned()]).unwrap();
    let machine = found.machine(&[(disks[0], "sda.qcow2".to_owned(), "qcow2")]);
    assert_eq!(crate::guest::from_document(&document(&machine)).unwrap(), machine);
    let image = DiskImage::Name { name: "sda.qcow2".to_owned(), format: Some("qcow2".to_owned()) };
    assert_eq!((machine.disks.len(), &machine.disks[0].image), (1, &image));
    assert_eq!(machine.disks[0].guest_name.as_deref(), Some("sda"));
}

fn device(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    let options = RawOptions::default();
    Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), options).unwrap())
}

fn contents(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

const MIB: usize = 1 << 20;

/// Data, zeros and data again; not a whole number of anything.
fn pattern() -> Vec<u8> {
    (0..9 * MIB + 1234)
        .map(
            |at| {
                if (3 * MIB..5 * MIB).contains(&at) {
                    0
                } else {
                    u8::try_from((at / 1000 + at) % 251).unwrap()
                }
            },
        )
        .collect()
}

fn job<'a>(
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
    done: &'a BTreeMap<u64, Digest>,
) -> Job<'a> {
    Job {
        source: Arc::clone(source),
        unused: &[],
        target: Arc::clone(target),
        part: Part::All,
        fresh: done.is_empty(),
        done,
        trusted: true,
        segment_bytes: 2 * MIB as u64,
        threads: 3,
        rate: None,
    }
}

fn collect(safe: &Mutex<BTreeMap<u64, Digest>>) -> impl Fn(&[(u64, Digest)]) -> Result<()> + Sync + '_ {
    |segments| {
        safe.lock().unwrap().extend(segments.iter().copied());
        Ok(())
    }
}

#[test]
fn a_copy_is_the_same_but_for_what_holds_nothing() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    let (done, safe) = (BTreeMap::new(), Mutex::new(BTreeMap::new()));
    let unused = [MIB as u64 / 2 + 7..MIB as u64 + 9, 6 * MIB as u64..8 * MIB as u64 + 1];
    let job = Job { unused: &unused, ..job(&source, &target, &done) };
    let tally = copy(&job, &Quiet, &collect(&safe)).unwrap();
    let mut expected = bytes.clone();
    for range in &unused {
        expected[to_usize(range.start)..to_usize(range.end)].fill(0);
    }
    assert!(contents(&*target) == expected);
    let left_out: u64 = unused.iter().map(|range| range.end - range.start).sum();
    assert_eq!((tally.left_out, tally.read), (left_out, bytes.len() as u64 - left_out));
    assert!(tally.written <= tally.read - 2 * MIB as u64, "zeros are not written: {tally:?}");
    let digests = safe.into_inner().unwrap();
    assert_eq!(digests.len(), 5);
    verify(&job, &digests, &Quiet).unwrap();
    target.write_at(b"x", 5 * MIB as u64).unwrap();
    assert_eq!(verify(&job, &digests, &Quiet).unwrap_err().kind(), block::ErrorKind::Corrupt);
}

#[test]
fn a_part_and_the_rest_are_the_whole() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    // Two ranges in one segment.
    let middle = 5 * MIB as u64;
    let (done, first) = (BTreeMap::new(), [middle - 1..middle + 1, middle + 7..middle + 9]);
    let safe = Mutex::new(BTreeMap::new());
    let part = |part| copy(&Job { part, ..job(&source, &target, &done) }, &Quiet, &collect(&safe)).unwrap();
    let one = part(Part::Touching(&first));
    assert_eq!(
        (safe.lock().unwrap().keys().copied().collect::<Vec<_>>(), one.read),
        (vec![2], 2 * MIB as u64)
    );
    // What was copied first is not read once more.
    source.write_at(b"later", 5 * MIB as u64).unwrap();
    let all = one.plus(part(Part::Rest(&first)));
    assert!(contents(&*target) == bytes);
    assert_eq!((safe.into_inner().unwrap().len(), all.read), (5, bytes.len() as u64));
}

#[test]
fn what_was_there_before_is_gone_from_a_target_that_is_not_fresh() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0xee; bytes.len()]));
    let done = BTreeMap::new();
    let unused = [0..1, 6 * MIB as u64..8 * MIB as u64];
    let job = Job { fresh: false, unused: &unused, ..job(&source, &target, &done) };
    copy(&job, &Quiet, &|_| Ok(())).unwrap();
    let mut expected = bytes;
    expected[0] = 0;
    expected[6 * MIB..8 * MIB].fill(0);
    assert!(contents(&*target) == expected);
}

#[test]
fn a_second_run_copies_what_is_missing_and_what_has_changed() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    let safe = Mutex::new(BTreeMap::new());
    copy(&job(&source, &target, &BTreeMap::new()), &Quiet, &collect(&safe)).unwrap();
    let mut done = safe.into_inner().unwrap();
    done.remove(&4);
    source.write_at(b"changed", 2 * MIB as u64 + 5).unwrap();
    source.write_zeroes_at(0, 100_000, block::ZeroMode::UNMAP).unwrap();
    let tally = copy(&job(&source, &target, &done), &Quiet, &|_| Ok(())).unwrap();
    assert!(contents(&*target) == contents(&*source));
    assert_eq!(tally.unchanged, 4 * MIB as u64, "{tally:?}");
    assert!(tally.written <= 4 * MIB as u64 + 1234 + 7, "{tally:?}");
}

#[test]
fn another_target_than_before_is_read_and_what_is_missing_is_copied() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    let unused = 6 * MIB as u64..7 * MIB as u64;
    let unused = std::slice::from_ref(&unused);
    let safe = Mutex::new(BTreeMap::new());
    let nothing = BTreeMap::new();
    copy(&Job { unused, ..job(&source, &target, &nothing) }, &Quiet, &collect(&safe)).unwrap();
    let done = safe.into_inner().unwrap();
    // It has the first segment, and something else in another and where nothing is to be.
    let other = device(vec![0; bytes.len()]);
    other.write_at(&bytes[..2 * MIB], 0).unwrap();
    other.write_at(b"foreign", 5 * MIB as u64).unwrap();
    other.write_at(&bytes[7 * MIB..8 * MIB], 7 * MIB as u64).unwrap();
    other.write_at(b"foreign", 6 * MIB as u64).unwrap();
    let safe = Mutex::new(BTreeMap::new());
    let again = Job { unused, trusted: false, ..job(&source, &other, &done) };
    let tally = copy(&again, &Quiet, &collect(&safe)).unwrap();
    assert!(contents(&*other) == contents(&*target));
    assert_eq!(tally.unchanged, 4 * MIB as u64, "{tally:?}");
    assert_eq!(safe.into_inner().unwrap(), done);
}

/// Says that it is enough once so many bytes are done.
struct Enough(u64, AtomicU64, AtomicBool);

impl Progress for Enough {
    fn update(&self, done: u64, _total: u64) {
        self.1.fetch_max(done, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        let enough = self.1.load(Ordering::Relaxed) >= self.0;
        self.2.fetch_or(enough, Ordering::Relaxed);
        enough
    }
}

#[test]
fn an_interrupted_copy_has_told_of_what_is_safe() {
    let bytes = pattern();
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    let (done, safe) = (BTreeMap::new(), Mutex::new(BTreeMap::new()));
    let enough = Enough(4 * MIB as u64, AtomicU64::new(0), AtomicBool::new(false));
    let error =
        copy(&Job { threads: 1, ..job(&source, &target, &done) }, &enough, &collect(&safe)).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Cancelled);
    let done = safe.into_inner().unwrap();
    assert_eq!(done.len(), 2);
    verify(&job(&source, &target, &done), &done, &Quiet).unwrap();
    copy(&job(&source, &target, &done), &Quiet, &|_| Ok(())).unwrap();
    assert!(contents(&*target) == bytes);
}

#[test]
fn a_rate_is_kept() {
    let bytes = vec![1; 3 * MIB];
    let (source, target) = (device(bytes.clone()), device(vec![0; bytes.len()]));
    let done = BTreeMap::new();
    let started = std::time::Instant::now();
    copy(&Job { rate: Some(6 * MIB as u64), ..job(&source, &target, &done) }, &Quiet, &|_| Ok(())).unwrap();
    assert!(started.elapsed() >= std::time::Duration::from_millis(450), "{:?}", started.elapsed());
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let (source, target) = (device(vec![1; 4096]), device(vec![0; 4095]));
    copy(&job(&source, &target, &BTreeMap::new()), &Quiet, &|_| Ok(())).unwrap_err();
}

#[test]
fn what_is_written_to_a_device_is_counted() {
    let files = server();
    files.put("sys/block/sda/sda1/stat", b"  10 0 80 4 7 1 900 3 0 1 2 5 0 40 0 0 0\n");
    assert_eq!(written(files.0.path(), "sda1"), Some(7 + 900 + 5 + 40));
    files.put("sys/class/block/sda1/stat", b"1 2 3 4 5 6 7 8 9 10 11\n");
    assert_eq!(written(files.0.path(), "sda1"), Some(12));
    assert_eq!(written(files.0.path(), "sda2"), None);
}
