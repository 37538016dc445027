#!/usr/bin/env python3
"""How long until a small guest's login line, and from firmware to boot loader: vimg bootcheck and qemu, in turn.

    tests/lab/kvm-lab -- python3 scripts/bench_boot.py PATH/TO/vimg GUESTS      (or without the lab, where KVM is real)
    tests/lab/kvm-lab -- python3 scripts/bench_boot.py PATH/TO/vimg --firmware

GUESTS is what scripts/guest-image.sh has made. Every monitor gets the same kernel, initramfs, command line and disk (virtio-blk;
the changes vanish); the clock runs from the start of the process until `login:` is on its console.

--firmware: a disk with GRUB for a BIOS and one with GRUB on an EFI system partition are made on the spot (grub-pc-bin,
grub-efi-amd64-bin, mtools, dosfstools); every monitor gets the same SeaBIOS or OVMF, with empty variables; the clock runs until
GRUB's first line. BENCH_ROUNDS (3); BENCH_ONLY: those monitors that have this in their name.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

VIMG = os.path.abspath(sys.argv[1])
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
ONLY = os.environ.get("BENCH_ONLY", "")
SEABIOS = "/usr/share/seabios/bios-256k.bin"
OVMF_CODE, OVMF_VARS = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
QEMU = [
    "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
    "-serial", "stdio",
]
CHECK = [VIMG, "bootcheck", "-v", "--engine", "kvm", "--memory", "256M", "-f", "raw"]


def drive(path):
    return ["-drive", f"if=none,id=d,format=raw,snapshot=on,file={path}", "-device", "virtio-blk-pci,drive=d"]


def logins(guests):
    """The monitors that start a kernel."""

    def path(name):
        return os.path.join(os.path.abspath(guests), name)

    with open(path("small.uuid")) as file:
        cmdline = f"root=UUID={file.read().strip()} ro quiet console=ttyS0 panic=-1"
    direct = ["--kernel", path("vmlinuz"), "--initrd", path("initrd"), "--cmdline", cmdline]
    qemu = QEMU + ["-kernel", path("vmlinuz"), "-initrd", path("initrd"), "-append", cmdline] + drive(path("small.raw"))
    return {
        "vimg": CHECK + direct + [path("small.raw")],
        "qemu q35": qemu + ["-M", "q35"],
        "qemu microvm": qemu + ["-M", "microvm,pcie=on,rtc=on"],
    }


SCRIPT = "serial --unit=0 --speed=115200\nterminal_output {terminal}\necho HELLO-FROM-GRUB\nsleep 60\nhalt\n"
MODULES = ["part_msdos", "part_gpt", "fat", "serial", "terminal", "echo", "sleep", "halt", "normal"]


def bios_disk(folder):
    """A disk whose GRUB is all in the gap behind the partition table."""
    script, core, disk = (os.path.join(folder, name) for name in ("bios.cfg", "core.img", "bios.raw"))
    with open(script, "w") as file:
        file.write(SCRIPT.format(terminal="serial"))
    subprocess.run(
        ["grub-mkimage", "-O", "i386-pc", "-o", core, "-c", script, "-p", "/boot/grub", "biosdisk"] + MODULES, check=True
    )
    with open(disk, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["sfdisk", "-q", disk], input=b"start=2048,type=83,bootable", check=True)
    with open(disk, "r+b") as file, open("/usr/lib/grub/i386-pc/boot.img", "rb") as boot, open(core, "rb") as image:
        file.write(boot.read()[:440])
        file.seek(512)
        shutil.copyfileobj(image, file)
    return disk


def uefi_disk(folder):
    """A disk with GRUB at the fallback path of an EFI system partition."""
    script, loader, disk = (os.path.join(folder, name) for name in ("uefi.cfg", "BOOTX64.EFI", "uefi.raw"))
    with open(script, "w") as file:
        file.write(SCRIPT.format(terminal="console"))
    modules = " ".join(MODULES)
    subprocess.run(
        ["grub-mkstandalone", "-O", "x86_64-efi", "-o", loader, f"--modules={modules}", f"--install-modules={modules}",
         "--locales=", "--fonts=", "--themes=", f"boot/grub/grub.cfg={script}"], check=True
    )
    with open(disk, "wb") as file:
        file.truncate(48 << 20)
    subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=2048,size=40M,type=uefi\n", check=True)
    subprocess.run(["mkfs.fat", "--offset", "2048", "-F", "32", disk, "40960"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    inside = f"{disk}@@1M"
    subprocess.run(["mmd", "-i", inside, "::/EFI", "::/EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", inside, loader, "::/EFI/BOOT/"], check=True)
    return disk


def firmwares(folder):
    """The monitors that start a firmware."""
    bios, uefi, variables = bios_disk(folder), uefi_disk(folder), os.path.join(folder, "vars.fd")
    shutil.copy(OVMF_VARS, variables)
    flash = [
        "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF_CODE}",
        "-drive", f"if=pflash,unit=1,format=raw,snapshot=on,file={variables}",
    ]
    return {
        "vimg, BIOS": CHECK + ["--firmware", "bios", bios],
        "qemu pc, BIOS": QEMU + ["-M", "pc", "-bios", SEABIOS] + drive(bios),
        "qemu q35, BIOS": QEMU + ["-M", "q35", "-bios", SEABIOS] + drive(bios),
        "vimg, UEFI": CHECK + ["--firmware", "uefi", "--firmware-vars", OVMF_VARS, uefi],
        "qemu pc, UEFI": QEMU + ["-M", "pc,smm=off"] + flash + drive(uefi),
        "qemu q35, UEFI": QEMU + ["-M", "q35,smm=off"] + flash + drive(uefi),
    }


def seconds(command, sign):
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = b""
    while sign not in seen:
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            sys.exit(f"bench-boot: no {sign} from {command[0]}:\n{seen[-2000:].decode(errors='replace')}")
        seen += piece
    took = time.monotonic() - began
    process.kill()
    process.wait()
    return took


with tempfile.TemporaryDirectory() as scratch:
    if sys.argv[2] == "--firmware":
        monitors, awaited = firmwares(scratch), b"HELLO-FROM-GRUB"
    else:
        monitors, awaited = logins(sys.argv[2]), b"login:"
    monitors = {name: command for name, command in monitors.items() if ONLY in name}
    figures = {name: [] for name in monitors}
    for _ in range(ROUNDS):
        for name, command in monitors.items():
            figures[name].append(seconds(command, awaited))
            print(f"{name}: {figures[name][-1]:.2f} s", file=sys.stderr, flush=True)
for name, values in figures.items():
    print(f"{name}: median {statistics.median(values):.2f} s of {', '.join(f'{value:.2f}' for value in values)}")
