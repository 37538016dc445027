#!/usr/bin/env python3
"""How long until a small guest's login line: vimg bootcheck, qemu's microvm and plain qemu, in turn.

    tests/lab/kvm-lab -- python3 scripts/bench_boot.py PATH/TO/vimg GUESTS      (or without the lab, where KVM is real)

GUESTS is what scripts/guest-image.sh has made. Every monitor gets the same kernel, initramfs, command line and disk (virtio-blk;
the changes vanish); the clock runs from the start of the process until `login:` is on its console. BENCH_ROUNDS (3).
"""

import os
import statistics
import subprocess
import sys
import time

VIMG, GUESTS = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))


def path(name):
    return os.path.join(GUESTS, name)


with open(path("small.uuid")) as file:
    CMDLINE = f"root=UUID={file.read().strip()} ro quiet console=ttyS0 panic=-1"

QEMU = [
    "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
    "-serial", "stdio", "-kernel", path("vmlinuz"), "-initrd", path("initrd"), "-append", CMDLINE,
    "-drive", f"if=none,id=d,format=raw,snapshot=on,file={path('small.raw')}",
]
MONITORS = {
    "vimg": [
        VIMG, "bootcheck", "-v", "--engine", "kvm", "--memory", "256M", "--kernel", path("vmlinuz"), "--initrd",
        path("initrd"), "--cmdline", CMDLINE, "-f", "raw", path("small.raw"),
    ],
    "qemu q35": QEMU + ["-M", "q35", "-device", "virtio-blk-pci,drive=d"],
    "qemu microvm": QEMU + ["-M", "microvm,pcie=on,rtc=on", "-device", "virtio-blk-pci,drive=d"],
}


def seconds(command):
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = b""
    while b"login:" not in seen:
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            sys.exit(f"bench-boot: no login from {command[0]}:\n{seen[-2000:].decode(errors='replace')}")
        seen += piece
    took = time.monotonic() - began
    process.kill()
    process.wait()
    return took


figures = {name: [] for name in MONITORS}
for _ in range(ROUNDS):
    for name, command in MONITORS.items():
        figures[name].append(seconds(command))
for name, values in figures.items():
    print(f"{name}: median {statistics.median(values):.2f} s of {', '.join(f'{value:.2f}' for value in values)}")
