//! The command line of qemu for a machine.

use std::ffi::OsString;
use std::path::Path;

use super::Accelerator;
use crate::engine::{Boot, MachineSpec, Transport};

/// Files of the private folder.
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";
pub(super) const CODE: &str = "code";
pub(super) const VARS: &str = "vars";
pub(super) const NBD: &str = "nbd";
pub(super) const QMP: &str = "qmp";
pub(super) const LOG: &str = "log";
pub(super) const FIRMWARE_LOG: &str = "firmware-log";
pub(super) const SCREEN: &str = "screen";
/// The port to which firmwares write it.
const FIRMWARE_LOG_PORT: &str = "-device isa-debugcon,iobase=0x402,chardev=firmware-log";

/// Whether the guest has a screen: BIOSes write to one, and what they write is text. (They write to the serial port, too:
/// `graphics=off` makes SeaBIOS do so.)
pub(super) fn has_screen(boot: &Boot) -> bool {
    matches!(boot, Boot::Firmware { vars: None, .. })
}

/// All words after the program's name.
pub(super) fn args(spec: &MachineSpec, accelerator: Accelerator, folder: &Path) -> Vec<OsString> {
    let file = |name: &str| escape(&folder.join(name).to_string_lossy());
    let mut args = Args::default();
    args.words("-nodefaults -no-user-config -display none -S");
    args.words("-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // The machine stays for questions after its end.
    args.words("-action reboot=shutdown,shutdown=pause,panic=pause");
    args.pair("-machine", machine(spec.transport));
    match accelerator {
        Accelerator::Kvm => args.words("-accel kvm -cpu host"),
        // Five levels of page tables cost time and are used by nobody here.
        Accelerator::Tcg => args.words("-accel tcg,thread=multi -cpu max,la57=off"),
    }
    args.pair("-smp", spec.cpus.to_string());
    args.pair("-m", format!("{}M", spec.memory_bytes >> 20));
    args.words("-chardev stdio,id=console,signal=off -serial chardev:console");
    // In front of the monitor's socket: who is connected there is connected here, too.
    if matches!(spec.boot, Boot::Firmware { .. }) {
        args.pair("-chardev", format!("socket,id=firmware-log,path={}", file(FIRMWARE_LOG)));
    }
    args.pair("-chardev", format!("socket,id=qmp,path={}", file(QMP)));
    args.words("-mon chardev=qmp,mode=control");
    // The one place where a triple fault is told apart from other resets.
    args.words("-d cpu_reset");
    args.pair("-D", folder.join(LOG));
    args.words("-object rng-random,id=rng,filename=/dev/urandom");
    args.pair("-device", format!("virtio-rng-{},rng=rng", device_suffix(spec.transport)));
    for (index, disk) in spec.disks.iter().enumerate() {
        add_disk(&mut args, index, disk.read_only, &disk.serial, spec.transport, &file(NBD));
    }
    add_boot(&mut args, &spec.boot, folder);
    args.0
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn words(&mut self, words: &str) {
        self.0.extend(words.split(' ').map(OsString::from));
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.extend([option.into(), value.into()]);
    }
}

/// A comma in a value is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn machine(transport: Transport) -> &'static str {
    match transport {
        Transport::Pci => "q35,vmport=off,smm=off,hpet=off,usb=off,graphics=off",
        // With ACPI it has no timer that works without KVM; without, qemu tells the kernel where the devices are.
        Transport::Mmio => "microvm,rtc=on,pit=on,pic=on,acpi=off,auto-kernel-cmdline=on",
    }
}

fn device_suffix(transport: Transport) -> &'static str {
    match transport {
        Transport::Pci => "pci",
        Transport::Mmio => "device",
    }
}

fn add_disk(
    args: &mut Args,
    index: usize,
    read_only: bool,
    serial: &str,
    transport: Transport,
    socket: &str,
) {
    let only = if read_only { "on" } else { "off" };
    args.pair(
        "-blockdev",
        format!(
            "driver=nbd,node-name=disk{index},server.type=unix,server.path={socket},export=disk{index},\
             read-only={only},discard=unmap"
        ),
    );
    let modern = if transport == Transport::Pci { ",disable-legacy=on" } else { "" };
    let serial = if serial.is_empty() { String::new() } else { format!(",serial={}", escape(serial)) };
    args.pair(
        "-device",
        format!("virtio-blk-{},drive=disk{index}{modern}{serial}", device_suffix(transport)),
    );
}

fn add_boot(args: &mut Args, boot: &Boot, folder: &Path) {
    match boot {
        Boot::Linux { initrd, cmdline, .. } => {
            args.pair("-kernel", folder.join(KERNEL));
            if initrd.is_some() {
                args.pair("-initrd", folder.join(INITRD));
            }
            args.pair("-append", cmdline);
        }
        Boot::Firmware { vars: None, .. } => {
            args.words(FIRMWARE_LOG_PORT);
            args.words("-device VGA");
            args.pair("-bios", folder.join(CODE));
        }
        Boot::Firmware { vars: Some(_), .. } => {
            args.words(FIRMWARE_LOG_PORT);
            let file = |name: &str| escape(&folder.join(name).to_string_lossy());
            args.pair("-drive", format!("if=pflash,format=raw,unit=0,readonly=on,file={}", file(CODE)));
            args.pair("-drive", format!("if=pflash,format=raw,unit=1,file={}", file(VARS)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::Disk;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    fn spec(boot: Boot, transport: Transport) -> MachineSpec {
        let storage = Arc::new(MemStorage::from_bytes(vec![0; 512]));
        let device = Arc::new(Raw::open(storage, RawOptions::default()).unwrap());
        let disk = Disk { device, read_only: false, serial: "a,b".to_owned() };
        MachineSpec { cpus: 2, memory_bytes: 512 << 20, disks: vec![disk], transport, boot }
    }

    fn line(spec: &MachineSpec) -> String {
        let args = args(spec, Accelerator::Tcg, Path::new("/tmp/x"));
        args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn kernels_are_given_as_files_and_the_command_line_as_one_word() {
        let linux =
            Boot::Linux { kernel: [].into(), initrd: None, cmdline: "root=/dev/vda1 quiet".to_owned() };
        let spec = spec(linux, Transport::Pci);
        let line = line(&spec);
        for part in [
            "-smp 2 -m 512M",
            "server.path=/tmp/x/nbd,export=disk0,read-only=off",
            "virtio-blk-pci,drive=disk0,disable-legacy=on,serial=a,,b",
            "-kernel /tmp/x/kernel -append root=/dev/vda1 quiet",
        ] {
            assert!(line.contains(part), "{part}\n{line}");
        }
        assert!(!line.contains("-initrd") && !line.contains("netdev"), "{line}");
        let words = args(&spec, Accelerator::Tcg, Path::new("/tmp/x"));
        assert_eq!(words.last().unwrap(), "root=/dev/vda1 quiet");
    }

    #[test]
    fn firmware_and_mmio() {
        let bios = Boot::Firmware { code: [].into(), vars: None };
        assert!(has_screen(&bios));
        let bios = line(&spec(bios, Transport::Pci));
        assert!(bios.ends_with("-device VGA -bios /tmp/x/code"), "{bios}");
        assert!(bios.contains("socket,id=firmware-log,path=/tmp/x/firmware-log"), "{bios}");
        let uefi = Boot::Firmware { code: [].into(), vars: Some([].into()) };
        assert!(!has_screen(&uefi));
        let uefi = line(&spec(uefi, Transport::Pci));
        assert!(uefi.ends_with("if=pflash,format=raw,unit=1,file=/tmp/x/vars"), "{uefi}");
        let linux = Boot::Linux { kernel: [].into(), initrd: Some([].into()), cmdline: String::new() };
        let line = line(&spec(linux, Transport::Mmio));
        assert!(
            line.contains("-machine microvm") && line.contains("virtio-blk-device,drive=disk0"),
            "{line}"
        );
        assert!(line.contains("-initrd /tmp/x/initrd"), "{line}");
    }
}
