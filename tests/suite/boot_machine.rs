//! Our own machine runs a Linux kernel as a distribution ships it: every way of starting one, both transports, and
//! each way to end.
//!
//! The kernel needs a real KVM, which the lab has. The test outside makes kernel, initramfs and disk ready and runs
//! this very program in the lab, where the tests in [`inside`] do the work.

use std::path::Path;

use tests::lab::{self, lab};
use tests::skip::tool;
use tests::{Cmd, Dir, requires};

/// In the initramfs: loads the drivers, mounts the disk, reads, writes, and says so; ends as `vimg.end` says.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
for m in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio virtio_blk; do
    insmod /modules/$m.ko
done
for i in 1 2 3 4 5 6 7 8 9; do [ -e /dev/vda ] && break; sleep 0.2; done
echo "cpus=$(nproc) serial=$(cat /sys/block/vda/serial)"
mount -t ext4 /dev/vda /mnt && cat /mnt/hello && echo written by the guest > /mnt/new && umount /mnt
grep -o 'MSI.*req.0\|fasteoi.*virtio0' /proc/interrupts
dmesg | grep -E "BUG|WARNING|Oops|rcu.*stall"
case $(cat /proc/cmdline) in
    *vimg.end=panic*) echo c > /proc/sysrq-trigger ;;
    *vimg.end=reboot*) reboot -f ;;
    *vimg.end=typed*) echo "type:"; read -r line; echo "you typed $line" ;;
esac
echo "guest is done"
poweroff -f
"#;

/// Kernel, initramfs and disk in a folder.
fn prepare(dir: &Dir) {
    let kernel = lab::kernel("cloud");
    std::fs::copy(lab::file_in(&kernel.join("boot"), "vmlinuz-"), dir.file("vmlinuz")).unwrap();
    std::fs::copy(kernel.join("vmlinux"), dir.file("vmlinux")).unwrap();
    for folder in ["root", "tree/bin", "tree/dev", "tree/proc", "tree/sys", "tree/mnt", "tree/modules"] {
        std::fs::create_dir_all(dir.file(folder)).unwrap();
    }
    let find = Cmd::new("find").arg(kernel.join("lib/modules")).words("-name virtio*.ko").ok();
    for module in find.stdout.lines().map(Path::new) {
        std::fs::copy(module, dir.file("tree/modules").join(module.file_name().unwrap())).unwrap();
    }
    std::fs::copy(tests::command::find("busybox").unwrap(), dir.file("tree/bin/busybox")).unwrap();
    dir.write("tree/init", INIT.as_bytes());
    dir.write("root/hello", b"hello from the disk\n");
    let pack = "chmod 755 tree/init && cd tree && find . | cpio --quiet -o -H newc > ../initrd";
    Cmd::new("sh").words("-c").arg(pack).dir(dir.path()).ok();
    dir.sparse("disk.raw", 32 << 20);
    Cmd::new("mke2fs").words("-q -F -t ext4 -d root disk.raw").dir(dir.path()).ok();
}

#[test]
fn a_debian_kernel_runs_from_every_kind_of_start() {
    requires!(tool("mke2fs"), tool("cpio"), lab());
    let dir = Dir::new();
    prepare(&dir);
    let before = dir.read("disk.raw");
    let suite = std::env::current_exe().unwrap();
    let inside =
        format!("'{}' boot_machine::inside:: --ignored --nocapture --test-threads 1", suite.display());
    let ran = lab::script_without_vimg(dir.path(), &inside).run().expect_code(0);
    assert!(ran.stdout.contains("test result: ok."), "{}", ran.story());
    assert!(!ran.stdout.contains("running 0 tests"), "{}", ran.story());
    assert_eq!(dir.read("disk.raw"), before, "the disk stays as it was");
}

/// Run in the lab, in the folder that has been prepared.
mod inside {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use block::BlockDevice;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};
    use bootcheck::engine::{
        Boot, Control, Disk, Ending, Engine as _, MachineSpec, Observer, Outcome, Transport,
    };
    use bootcheck::kvm::{KvmEngine, KvmState, probe};
    use parking_lot::Mutex;

    fn file(name: &str) -> Arc<[u8]> {
        std::fs::read(name).unwrap().into()
    }

    fn disk() -> Arc<dyn BlockDevice> {
        let storage = Arc::new(MemStorage::from_bytes(std::fs::read("disk.raw").unwrap()));
        Arc::new(Raw::open(storage, RawOptions::default()).unwrap())
    }

    fn spec(kernel: &str, more: &str) -> MachineSpec {
        let cmdline = format!("console=ttyS0 panic=-1 quiet {more}");
        MachineSpec {
            cpus: 1,
            memory_bytes: 256 << 20,
            disks: vec![Disk { device: disk(), read_only: false, serial: "vimg-0123".into() }],
            transport: Transport::Pci,
            boot: Boot::Linux { kernel: file(kernel), initrd: Some(file("initrd")), cmdline },
        }
    }

    /// Keeps the console, and types when it is asked to.
    #[derive(Default)]
    struct Console {
        text: Mutex<String>,
        control: Mutex<Option<Arc<dyn Control>>>,
    }

    impl Observer for Console {
        fn console(&self, bytes: &[u8], _at: Instant) {
            let mut text = self.text.lock();
            text.push_str(&String::from_utf8_lossy(bytes));
            if text.ends_with("type:\n") || text.ends_with("type:\r\n") {
                self.control.lock().as_ref().unwrap().type_bytes(b"hello\n");
            }
        }
    }

    /// Runs a guest, at most for two minutes. How it ended, and what it said.
    fn run(spec: MachineSpec) -> (Outcome, String) {
        let console = Arc::new(Console::default());
        let machine = KvmEngine.build(spec, Arc::clone(&console) as _).unwrap();
        let control = machine.control();
        *console.control.lock() = Some(Arc::clone(&control));
        let (done, waits) = std::sync::mpsc::channel::<()>();
        let timer = std::thread::spawn(move || {
            if waits.recv_timeout(Duration::from_secs(120)).is_err() {
                control.stop();
            }
        });
        let outcome = machine.run().unwrap();
        drop(done);
        timer.join().unwrap();
        let text = console.text.lock().clone();
        (outcome, text)
    }

    /// The guest has found its disk, used it, and is gone.
    #[track_caller]
    fn assert_done(outcome: &Outcome, text: &str, cpus: u8) {
        assert_eq!(outcome.ending, Ending::PowerOff, "{text}");
        for wanted in [&format!("cpus={cpus} serial=vimg-0123")[..], "hello from the disk", "guest is done"] {
            assert!(text.contains(wanted), "no '{wanted}' in {text}");
        }
        for unwanted in ["BUG", "WARNING", "Oops", "stall"] {
            assert!(!text.contains(unwanted), "{unwanted}");
        }
        let disk = &outcome.disks[0];
        assert!(disk.reads > 0 && disk.writes > 0 && disk.flushes > 0 && disk.errors == 0, "{disk:?}");
        assert_eq!(outcome.cpus.len(), usize::from(cpus));
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn this_kvm_is_real() {
        assert_eq!(probe(), KvmState::Real);
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn a_bzimage_with_two_processors_and_a_disk_with_two_queues() {
        let (outcome, text) = run(MachineSpec { cpus: 2, ..spec("vmlinuz", "") });
        assert_done(&outcome, &text, 2);
        assert!(text.contains("virtio0-req.0"), "interrupts by message");
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn an_elf_kernel_by_pvh() {
        let (outcome, text) = run(spec("vmlinux", ""));
        assert_done(&outcome, &text, 1);
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn an_elf_kernel_by_its_64_bit_entry() {
        let mut spec = spec("vmlinux", "");
        if let Boot::Linux { kernel, .. } = &mut spec.boot {
            // Without the name in its note, nobody knows of PVH.
            let mut bytes = kernel.to_vec();
            let name = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0";
            let long = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
            let at = bytes.windows(name.len()).position(|w| w == name || w == long).unwrap();
            bytes[at + 12] = b'x';
            *kernel = bytes.into();
        }
        let (outcome, text) = run(spec);
        assert_done(&outcome, &text, 1);
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn plain_registers_and_the_interrupt_line() {
        let (outcome, text) = run(MachineSpec { transport: Transport::Mmio, ..spec("vmlinuz", "") });
        assert_done(&outcome, &text, 1);
        let (outcome, text) = run(spec("vmlinuz", "pci=nomsi"));
        assert_done(&outcome, &text, 1);
        assert!(text.contains("fasteoi   virtio0"), "interrupts by line");
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn memory_above_4_gib_and_a_read_only_disk() {
        let mut spec = MachineSpec { memory_bytes: 4 << 30, ..spec("vmlinuz", "") };
        spec.disks[0].read_only = true;
        let (outcome, text) = run(spec);
        assert_eq!(outcome.ending, Ending::PowerOff);
        assert!(text.contains("hello from the disk"), "mounted read-only");
        assert_eq!((outcome.disks[0].writes, outcome.disks[0].errors), (0, 0));
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn a_panic_a_reboot_and_a_triple_fault_are_told_apart() {
        let (outcome, text) = run(spec("vmlinuz", "vimg.end=panic"));
        assert!(text.contains("Kernel panic - not syncing: sysrq triggered crash"));
        assert_eq!(outcome.ending, Ending::Reset { how: "ACPI" });
        let (outcome, _) = run(spec("vmlinuz", "vimg.end=reboot reboot=k"));
        assert_eq!(outcome.ending, Ending::Reset { how: "keyboard controller" });
        let (outcome, _) = run(spec("vmlinuz", "vimg.end=reboot reboot=t"));
        assert_eq!(outcome.ending, Ending::TripleFault);
    }

    #[test]
    #[ignore = "run in the lab by the test outside"]
    fn what_is_typed_reaches_a_shell() {
        let (outcome, text) = run(spec("vmlinuz", "vimg.end=typed"));
        assert_done(&outcome, &text, 1);
        assert!(text.contains("you typed hello"));
    }
}
