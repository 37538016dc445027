//! A shell script that starts the guest with QEMU, as it is, on any host.
//!
//! The network is QEMU's own (`-netdev user`), which needs no rights; a bridge can be named when it is run. Further options
//! of QEMU may follow on the script's command line.

use std::fmt::Write as _;
use std::path::Path;

use block::Result;

use super::machine::{Machine, MachineDisk, text_of};
use super::shell::{comment, quote};
use super::{Chipset, CpuMode};
use crate::guest::{Bus, DirectBoot, FirmwareKind, RemovableKind};

/// Where distributions put the firmware: code, and empty variables.
const OVMF: [(&str, &str); 6] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
];
/// The same with Secure Boot and Microsoft's keys.
const OVMF_SECURE: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
    ("/usr/share/qemu/ovmf-x86_64-smm-ms-code.bin", "/usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin"),
];

/// A `/dev/kvm` that is there and cannot be opened, or with which QEMU ends at once, does not count: QEMU is asked, with a
/// machine that is left again before it runs.
const PROBE: &str = "\
kvm_works() {
    [ -r /dev/kvm ] && [ -w /dev/kvm ] || return 1
    echo quit | \"$qemu\" -machine pc,accel=kvm -cpu host -m 64 -S -nodefaults -display none -monitor stdio \\
        >/dev/null 2>&1
}
";

/// Disks of a SATA controller.
const SATA_UNITS: usize = 6;
/// Disks of a SCSI controller that has no more.
const SCSI_UNITS: usize = 7;

/// The script. It is to lie in `folder`: files there are named relative to it, so that the folder can be moved.
///
/// # Errors
/// A path cannot be written down.
pub fn script(machine: &Machine, folder: &Path) -> Result<String> {
    let mut text = head(machine);
    if machine.firmware == FirmwareKind::Uefi {
        text.push_str(&firmware(machine, folder)?);
    }
    text.push_str(NETWORK);
    text.push_str("exec \"$qemu\" \\\n");
    for words in options(machine, folder)? {
        let _ = writeln!(text, "    {words} \\");
    }
    text.push_str("    \"$@\"\n");
    Ok(text)
}

fn head(machine: &Machine) -> String {
    let cpu = match &machine.cpu {
        CpuMode::Named(model) => quote(model),
        CpuMode::HostModel | CpuMode::HostPassthrough => "host".to_owned(),
    };
    let emulated_cpu = match &machine.cpu {
        CpuMode::Named(_) => cpu.as_str(),
        _ => "max",
    };
    let kvm = if machine.emulated { "false" } else { "kvm_works" };
    format!(
        "#!/bin/sh
# Starts {} with QEMU. Options of QEMU can follow: -snapshot, -display none -serial mon:stdio.
# QEMU=program  ACCEL=kvm|tcg  VIMG_BRIDGE=bridge (instead of QEMU's own network)  OVMF_CODE=file OVMF_VARS=file (firmware)
set -eu
cd -- \"$(dirname -- \"$0\")\"
qemu=${{QEMU:-qemu-system-x86_64}}
{PROBE}if [ -n \"${{ACCEL:-}}\" ]; then
    accel=$ACCEL
elif {kvm}; then
    accel=kvm
else
    accel=tcg
fi
if [ \"$accel\" = kvm ]; then cpu={cpu}; else cpu={emulated_cpu}; fi
",
        comment(&machine.name)
    )
}

/// Finds the firmware, and gives the guest variables of its own when it is started for the first time.
fn firmware(machine: &Machine, folder: &Path) -> Result<String> {
    let mut text = String::from("code=${OVMF_CODE:-} vars=${OVMF_VARS:-}\n");
    let pairs: &[(&str, &str)] = if machine.secure_boot { &OVMF_SECURE } else { &OVMF };
    let named = match &machine.loader {
        Some(loader) => Some((text_of(&loader.code)?, text_of(&loader.variables)?)),
        None => None,
    };
    for (code, variables) in named.iter().chain(pairs.iter().filter(|_| named.is_none())) {
        let (code, variables) = (quote(code), quote(variables));
        let _ = writeln!(
            text,
            "if [ -z \"$code\" ] && [ -e {code} ] && [ -e {variables} ]; then code={code} vars=${{vars:-{variables}}}; fi"
        );
    }
    text.push_str(
        "if [ -z \"$code\" ] || [ -z \"$vars\" ]; then
    echo \"$0: no UEFI firmware found; install the package ovmf, or set OVMF_CODE and OVMF_VARS\" >&2
    exit 1
fi
",
    );
    let own = own_variables(machine, folder)?;
    let own = quote(&own);
    let _ = writeln!(
        text,
        "if [ ! -e {own} ]; then cp -- \"$vars\" {own}.new && chmod u+w {own}.new && mv -- {own}.new {own}; fi"
    );
    Ok(text)
}

fn own_variables(machine: &Machine, folder: &Path) -> Result<String> {
    match &machine.nvram {
        Some(path) => relative(path, folder),
        None => Ok(format!("./{}.vars.fd", machine.name)),
    }
}

const NETWORK: &str = "if [ -n \"${VIMG_BRIDGE:-}\" ]; then net=bridge,br=$VIMG_BRIDGE; else net=user; fi\n";

/// A path as QEMU takes it for a file whatever is in its name: below the folder, or absolute.
fn relative(path: &Path, folder: &Path) -> Result<String> {
    let text = |path: &Path| text_of(path).map(str::to_owned);
    match path.strip_prefix(folder) {
        Ok(rest) => Ok(format!("./{}", text(rest)?)),
        Err(_) if path.is_absolute() => text(path),
        Err(_) => Ok(format!("./{}", text(path)?)),
    }
}

/// A value within an option of QEMU's, where a comma would end it.
fn value(text: &str) -> String {
    text.replace(',', ",,")
}

/// The lines of options, quoted.
fn options(machine: &Machine, folder: &Path) -> Result<Vec<String>> {
    let mut lines = vec![
        format!("-name {}", quote(&format!("guest={}", value(&machine.name)))),
        board(machine),
        format!("-cpu \"$cpu\" -smp {} -m {}M", smp(machine), machine.memory_mib),
    ];
    if let Some(uuid) = &machine.uuid {
        lines.push(format!("-uuid {uuid}"));
    }
    if let Some(genid) = &machine.genid {
        lines.push(format!("-device vmgenid,guid={genid}"));
    }
    lines.push(format!("-rtc base={}", if machine.local_time { "localtime" } else { "utc" }));
    if machine.firmware == FirmwareKind::Uefi {
        lines.push("-drive \"if=pflash,unit=0,format=raw,readonly=on,file=$code\"".to_owned());
        let own = value(&own_variables(machine, folder)?);
        lines.push(format!("-drive {}", quote(&format!("if=pflash,unit=1,format=raw,file={own}"))));
        if machine.secure_boot {
            lines.push("-global driver=cfi.pflash01,property=secure,value=on".to_owned());
        }
    }
    lines.extend(disks(machine, folder)?);
    lines.extend(nics(machine));
    lines.extend(others(machine));
    if let Some(boot) = &machine.direct_boot {
        lines.extend(direct(boot));
    }
    Ok(lines)
}

fn board(machine: &Machine) -> String {
    let smm = if machine.secure_boot { ",smm=on" } else { "" };
    format!("-machine {},accel=\"$accel\"{smm}", machine.chipset.name())
}

fn smp(machine: &Machine) -> String {
    match machine.topology {
        Some((sockets, cores, threads)) => {
            format!("{},sockets={sockets},cores={cores},threads={threads}", machine.cpus)
        }
        None => machine.cpus.to_string(),
    }
}

fn disks(machine: &Machine, folder: &Path) -> Result<Vec<String>> {
    let mut lines = vec![];
    lines.extend(controllers(machine));
    for (index, disk) in machine.disks.iter().enumerate() {
        let mut drive = format!("if=none,id=disk{index},format={},discard=unmap", disk.format);
        if disk.read_only {
            drive.push_str(",readonly=on");
        }
        let _ = write!(drive, ",file={}", value(&relative(&disk.path, folder)?));
        lines.push(format!("-drive {}", quote(&drive)));
        lines.push(format!("-device {}", quote(&device(disk, index, machine.chipset))));
    }
    for drive in machine.drives.iter().filter(|drive| drive.kind == RemovableKind::Cdrom) {
        let bus = drive_bus(drive.bus, drive.unit, machine.chipset);
        lines.push(format!("-device ide-cd,{bus}"));
    }
    if machine.drives.iter().any(|drive| drive.kind == RemovableKind::Floppy) {
        lines.push("-device isa-fdc,id=fdc -device floppy,bus=fdc.0,unit=0".to_owned());
    }
    Ok(lines)
}

/// Controllers that the board does not have already.
fn controllers(machine: &Machine) -> Vec<String> {
    let mut lines = vec![];
    if machine.disks.iter().any(|disk| disk.bus == Bus::VirtioScsi) {
        lines.push("-device virtio-scsi-pci,id=scsi0".to_owned());
    }
    let scsi: Vec<_> = machine.disks.iter().filter(|disk| disk.bus == Bus::Scsi).collect();
    for (index, disks) in scsi.chunks(SCSI_UNITS).enumerate() {
        let device = disks.first().and_then(|disk| disk.controller).map_or("lsi53c895a", scsi_device);
        lines.push(format!("-device {device},id=scsi{index}"));
    }
    let disks = machine.disks.iter().map(|disk| (disk.bus, disk.unit));
    let drives = machine.drives.iter().map(|drive| (drive.bus, drive.unit));
    let sata =
        disks.chain(drives).filter(|(bus, _)| *bus == Bus::Sata).map(|(_, unit)| unit / SATA_UNITS + 1).max();
    let own = usize::from(machine.chipset == Chipset::Q35);
    lines.extend((own..sata.unwrap_or(0)).map(|index| format!("-device ich9-ahci,id=sata{index}")));
    lines
}

/// QEMU's name for a controller that libvirt calls `model`.
fn scsi_device(model: &str) -> &'static str {
    match model {
        "vmpvscsi" => "pvscsi",
        "lsisas1068" => "mptsas1068",
        _ => "lsi53c895a",
    }
}

fn device(disk: &MachineDisk, index: usize, chipset: Chipset) -> String {
    let mut device = match disk.bus {
        Bus::VirtioScsi => format!("scsi-hd,bus=scsi0.0,scsi-id={}", disk.unit),
        Bus::Scsi => {
            format!("scsi-hd,bus=scsi{}.0,scsi-id={}", disk.unit / SCSI_UNITS, disk.unit % SCSI_UNITS)
        }
        Bus::Sata | Bus::Ide => format!("ide-hd,{}", drive_bus(disk.bus, disk.unit, chipset)),
        _ => "virtio-blk-pci".to_owned(),
    };
    let _ = write!(device, ",drive=disk{index},bootindex={}", disk.order);
    if let Some(serial) = &disk.serial {
        let _ = write!(device, ",serial={}", value(serial));
    }
    device
}

/// Where an IDE or SATA disk is plugged in. Q35's own SATA controller is called `ide`, as the old board's IDE is.
fn drive_bus(bus: Bus, unit: usize, chipset: Chipset) -> String {
    match (bus, chipset) {
        (Bus::Ide, _) => format!("bus=ide.{},unit={}", unit / 2, unit % 2),
        (_, Chipset::Q35) if unit < SATA_UNITS => format!("bus=ide.{unit}"),
        _ => format!("bus=sata{}.{}", unit / SATA_UNITS, unit % SATA_UNITS),
    }
}

fn nics(machine: &Machine) -> Vec<String> {
    let mut lines = vec![];
    for (index, nic) in machine.nics.iter().enumerate() {
        lines.push(format!("-netdev \"$net,id=net{index}\""));
        let device = if nic.model == "virtio" { "virtio-net-pci" } else { nic.model.as_str() };
        let mac = nic.mac.as_ref().map_or_else(String::new, |mac| format!(",mac={mac}"));
        lines.push(format!("-device {}", quote(&format!("{device},netdev=net{index}{mac}"))));
    }
    if machine.nics.is_empty() {
        lines.push("-nic none".to_owned());
    }
    lines
}

fn others(machine: &Machine) -> Vec<String> {
    let mut lines = vec!["-device virtio-rng-pci".to_owned(), "-device virtio-balloon-pci".to_owned()];
    if machine.chipset == Chipset::Q35 {
        lines.push("-device qemu-xhci -device usb-tablet".to_owned());
    } else {
        lines.push("-usb -device usb-tablet".to_owned());
    }
    lines.push("-vga std".to_owned());
    lines
}

fn direct(boot: &DirectBoot) -> Vec<String> {
    let mut lines = vec![format!("-kernel {}", quote(&boot.kernel))];
    lines.extend(boot.initrd.iter().map(|initrd| format!("-initrd {}", quote(initrd))));
    lines.push(format!("-append {}", quote(&boot.cmdline)));
    lines
}
