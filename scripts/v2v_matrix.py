#!/usr/bin/env python3
"""Guests of many shapes, converted and booted: what README and docs/v2v.md promise beyond the guests of the tests.

    scripts/v2v_matrix.py PATH/TO/vimg FOLDER [GUEST...]

FOLDER keeps the root trees, the guests (scripts/v2v-matrix-guests.sh) and, of each guest, what came out. For each: the guest as it is
is booted through its firmware, which has to fail for the reason below; it is converted; the file systems of the result are checked by
their own tools; the result is booted. A line of the table for each; the exit code is 1 if anything was not as it should be. MATRIX_ENGINE
chooses the engine (qemu), MATRIX_BEFORE=0 leaves the first boots out, MATRIX_ENTRIES names those of the further entries that are started. An hour and
more, where qemu translates.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINE = os.environ.get("MATRIX_ENGINE", "qemu")
BEFORE = os.environ.get("MATRIX_BEFORE", "1") != "0"
# Of the entries that are started besides the default one, only these.
ENTRIES = os.environ["MATRIX_ENTRIES"].split() if "MATRIX_ENTRIES" in os.environ else None
CARDS = ["--nic", "mac=00:0c:29:aa:bb:01,network=default"]
TWO_CARDS = [*CARDS, "--nic", "mac=00:0c:29:aa:bb:02,network=default"]
UP = r"matrix: kernel .* {} of fstab in use, missing: none"

# name: what is peculiar; disks; options of v2v; why it does not boot as it is; what the console shows at last; further entries
# that are started directly; what the conversion's exit code is; words that the conversion must say.
GUESTS = {
    "dracut": dict(
        what="dracut, 8 compressions, microcode", disks=["sda"], before="no-disk-driver", up=UP.format(1), entries=range(1, 8)
    ),
    "two-kernels": dict(
        what="grubenv, submenu, 6 mounts, swap", disks=["sda", "sdb"], options=TWO_CARDS, before="no-disk-driver",
        up=UP.format(7), entries=[1],
        files={"/etc/systemd/network/10-vimg-ens192.link": "aa:bb:01", "/etc/systemd/network/10-vimg-ens224.link": "aa:bb:02"},
    ),
    "grub-legacy": dict(
        what="i386, sysvinit, GRUB legacy, hda", disks=["hda"], options=["--nic", "mac=00:0c:29:aa:bb:cc,network=default"],
        before="no-disk-driver", up=UP.format(3),
    ),
    "extlinux": dict(
        what="extlinux, OpenRC, Xen, 5.10 LZ4", disks=["xvda"], before="no-disk-driver|silent|timeout", up=UP.format(3), up_login=True
    ),
    "btrfs": dict(
        what="btrfs @ @home, zstd, netplan", disks=["sda"], options=CARDS, before="no-disk-driver", up=UP.format(3),
        files={"/etc/systemd/network/10-vimg-ens160.link": "aa:bb:01"},
    ),
    "suse": dict(
        what="btrfs default subvolume, dracut xz", disks=["sda"], options=CARDS, before="no-disk-driver", up=UP.format(5),
        files={"/etc/systemd/network/10-vimg-ens160.link": "aa:bb:01"},
    ),
    "sd-boot": dict(
        what="trixie, systemd-boot, BLS, NVMe", disks=["nvme0n1"], options=CARDS, before="no-boot-loader", up=UP.format(3),
        files={"/etc/systemd/network/10-vimg-ens192.link": "aa:bb:01"}, says="unified image",
    ),
    "uki": dict(what="unified kernel image only", disks=["sda"], before="no-boot-loader", exit=1, says="unified"),
    "lvm": dict(
        what="2 disks, 2 groups, striped, ESP on sdb", disks=["sda", "sdb"], options=CARDS, before="no-boot-loader", up=UP.format(5)
    ),
    "dirty": dict(what="journal not finished", disks=["sda"], before="no-disk-driver", up=UP.format(1)),
    "full": dict(what="no room for drivers", disks=["sda"], exit=1, says="bytes free"),
    "read-only": dict(what="ext4 with read-only", disks=["sda"], exit=1, says="read-only"),
    "bigalloc": dict(what="ext4 with bigalloc", disks=["sda"], before="no-disk-driver", up=UP.format(1)),
}


def run(words, **more):
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, **more)
    return done, time.monotonic() - began


class Guest:
    def __init__(self, vimg, folder, name):
        self.vimg, self.name, self.facts = vimg, name, GUESTS[name]
        self.guest, self.out = os.path.join(folder, name), os.path.join(folder, "out", name)
        self.wrong = []

    def check(self, good, words):
        if not good:
            self.wrong.append(words)

    def disks(self):
        return [os.path.join(self.guest, f"{disk}.raw") for disk in self.facts["disks"]]

    def boot(self, disks, console, *words):
        more = [word for disk in disks[1:] for word in ("--disk", disk)]
        console = os.path.join(self.out, f"{console}.log")
        done, took = run([self.vimg, "bootcheck", "--engine", ENGINE, "--output", "json", "--console", console, "-f", "raw",
                          "--timeout", "900", *words, *more, disks[0]])
        try:
            check = json.loads(done.stdout)["checks"][0]
        except (ValueError, LookupError):
            return {"verdict": "not-checked", "reason": done.stderr.strip()}, took
        return check, took

    def before(self):
        wanted = self.facts.get("before")
        if not wanted or not BEFORE:
            return "-"
        check, took = self.boot(self.disks(), "before", "--firmware", "auto")
        told = check.get("reason") or check["verdict"]
        self.check(re.fullmatch(wanted, told), f"before: {told}, not {wanted}")
        return f"{told} ({took:.0f} s)"

    def convert(self):
        words = [self.vimg, "v2v", *self.disks(), "-f", "raw", "-O", "raw", "-o", self.out, "--name", "guest", "--engine", ENGINE,
                 *self.facts.get("options", [])]
        done, took = run(words)
        with open(os.path.join(self.out, "v2v.log"), "w", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        wanted = self.facts.get("exit", 0)
        self.check(done.returncode == wanted, f"v2v: exit {done.returncode}, not {wanted}: {done.stderr.strip()}")
        report, told = os.path.join(self.out, "guest-report.json"), done.stdout + done.stderr
        changes, asked = 0, []
        if done.returncode == 0 and os.path.exists(report):
            with open(report, encoding="utf-8") as file:
                document = json.load(file)
            changes, asked = len(document["changes"]), document["to-do"]
            told += "\n".join(asked + document["left-alone"])
        if done.returncode:
            left = [name for name in os.listdir(self.out) if name.startswith((".guest", "guest"))]
            self.check(not left, f"v2v left {left}")
        self.check(re.search(self.facts.get("says", ""), told), f"v2v does not say {self.facts.get('says')}")
        return f"exit {done.returncode}, {changes} changes, {len(asked)} to do ({took:.1f} s)", done.returncode == 0, asked

    def results(self):
        return [os.path.join(self.out, f"guest-sd{'abcd'[index]}.raw") for index in range(len(self.facts["disks"]))]

    def judge(self):
        """The file systems by their own tools."""
        for disk in self.results():
            table, _ = run(["sfdisk", "-J", disk])
            for part in json.loads(table.stdout)["partitiontable"]["partitions"]:
                loop, _ = run(["losetup", "-f", "--show", "-r", "-o", str(part["start"] * 512), "--sizelimit", str(part["size"] * 512), disk])
                loop = loop.stdout.strip()
                kind, _ = run(["blkid", "-p", "-o", "value", "-s", "TYPE", loop])
                tool = {"ext4": ["e2fsck", "-fn"], "ext3": ["e2fsck", "-fn"], "vfat": ["fsck.vfat", "-n"], "btrfs": ["btrfs", "check"],
                        "xfs": ["xfs_repair", "-n"]}.get(kind.stdout.strip())
                if tool:
                    done, _ = run([*tool, loop])
                    self.check(done.returncode == 0, f"{' '.join(tool)} {part['node']}: exit {done.returncode}")
                run(["losetup", "-d", loop])
        for path, text in self.facts.get("files", {}).items():
            more = [word for disk in self.results()[1:] for word in ("--disk", disk)]
            done, _ = run([self.vimg, "cat", "-f", "raw", *more, self.results()[0], path])
            self.check(text in done.stdout, f"{path}: {done.stdout!r} {done.stderr.strip()}")

    def after(self):
        words = ["--expect", self.facts["up"]]
        if self.facts.get("up_login"):
            words += ["--expect", "login: "]
        check, took = self.boot(self.results(), "after", "--firmware", "auto", *words)
        self.check(check["verdict"] == "booted", f"after: {check.get('reason')}: {check.get('message') or check.get('detail')}")
        level = (check.get("level") or {}).get("station", "-")
        told = [f"{check['verdict']}, {level} ({took:.0f} s)"]
        for entry in self.facts.get("entries", []):
            if ENTRIES is not None and str(entry) not in ENTRIES:
                continue
            words = ["--entry", str(entry), "--expect", UP.format(r"\d+")]
            check, took = self.boot(self.results(), f"entry-{entry}", *words)
            self.check(check["verdict"] == "booted", f"entry {entry}: {check.get('reason')}: {check.get('message') or check.get('detail')}")
            told.append(f"entry {entry}: {check['verdict']} ({took:.0f} s)")
        return ", ".join(told)

    def run(self):
        shutil.rmtree(self.out, ignore_errors=True)
        os.makedirs(self.out)
        before = self.before()
        converted, good, asked = self.convert()
        after = "-"
        if good:
            self.judge()
            after = self.after()
        print(f"| {self.name}: {self.facts['what']} | {before} | {converted} | {after} |", flush=True)
        for words in asked:
            print(f"    to do: {words}")
        for words in self.wrong:
            print(f"    WRONG: {words}", flush=True)
        return not self.wrong


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    vimg, folder, names = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3:] or list(GUESTS)
    print("| guest | as it is | conversion | afterwards |\n| --- | --- | --- | --- |")
    good = True
    for name in names:
        guest = os.path.join(folder, name)
        words = ["bash", os.path.join(HERE, "v2v-matrix-guests.sh"), folder, name]
        if not os.path.isdir(guest) and subprocess.run(words, check=False).returncode:
            print(f"| {name}: {GUESTS[name]['what']} | not made | | |", flush=True)
            good = False
            continue
        good &= Guest(vimg, folder, name).run()
    sys.exit(0 if good else 1)


main()
