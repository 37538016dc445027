#!/usr/bin/env python3
"""Runs vimg and qemu-img alternately on the same work and prints the ratios.

Called by bench.sh. For every row: one warm-up of each, then timed runs in turn (vimg, qemu-img, vimg, ...),
so that a noise of the machine meets both. Wall-clock time and user+sys time are the medians of the runs.
Peak memory is the largest resident set, measured in a further run of its own under /usr/bin/time.
What was written is compared and checked with the real qemu-img.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import time

VIMG = sys.argv[1]
DIR = sys.argv[2]
WANTED = sys.argv[3:]
QEMU = shutil.which("qemu-img")
RUNS = int(os.environ.get("BENCH_RUNS", "3"))
MIB = 1 << 20
GIB = 1 << 30


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, **options)


def qemu_io(image, *commands, format="qcow2"):
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", format, *words, image)


# --- The data set ------------------------------------------------------------------------------------


def file_tree(limit):
    """Copies files from /usr, a third each of programs, libraries and everything else, until they take
    `limit` bytes in blocks of 4 KiB. Returns how many files that are."""
    shutil.rmtree("tree", ignore_errors=True)
    files = 0
    for sources in [["/usr/bin", "/usr/sbin", "/usr/libexec"], ["/usr/lib"], ["/usr/share", "/usr/include", "/usr/src"]]:
        room = limit // 3
        for folder, name in ((f, n) for source in sources for f, _, names in os.walk(source) for n in sorted(names)):
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            room -= (os.path.getsize(path) + 4095) // 4096 * 4096 + 512
            if room < 0:
                break
            os.makedirs("tree" + folder, exist_ok=True)
            shutil.copyfile(path, "tree" + path)
            files += 1
    return files


def build_disk():
    """1.5 GiB: 1 GiB of file system, 256 MiB of random bytes, 256 MiB of written zeros."""
    files = file_tree(900 * MIB)
    run("truncate", "-s", "1G", "disk.new")
    run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-N", str(files * 2), "-d", "tree", "disk.new")
    shutil.rmtree("tree")
    with open("disk.new", "r+b") as disk:
        disk.seek(GIB)
        for _ in range(256):
            disk.write(random.randbytes(MIB))
        for _ in range(256):
            disk.write(bytes(MIB))
    os.rename("disk.new", "disk.raw")


def build_tib():
    run(QEMU, "create", "-q", "-f", "qcow2", "tib.qcow2", "1T")
    writes = [f"write -q -P 7 {n * 16 * GIB + 123 * MIB} 1M" for n in range(64)]
    qemu_io("tib.qcow2", *writes)


def build_chain():
    run(QEMU, "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "middle.qcow2")
    qemu_io("middle.qcow2", *[f"write -q -P 5 {n * 7 * MIB} 192k" for n in range(200)])
    run(QEMU, "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2")
    qemu_io("top.qcow2", *[f"write -q -P 6 {n * 11 * MIB + 65536} 128k" for n in range(130)])


def build_snapshot():
    """The metadata of a full 64 GiB disk, all of it shared with a snapshot."""
    need(["full.qcow2"])
    run("cp", "--sparse=always", "full.qcow2", "full-snap.qcow2")
    run(QEMU, "snapshot", "-c", "s", "full-snap.qcow2")


DATA = {
    "disk.raw": build_disk,
    "disk.qcow2": lambda: run(QEMU, "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"),
    "zlib.qcow2": lambda: run(QEMU, "convert", "-c", "-O", "qcow2", "disk.qcow2", "zlib.qcow2"),
    "zstd.qcow2": lambda: run(
        QEMU, "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "disk.qcow2", "zstd.qcow2"
    ),
    "tib.qcow2": build_tib,
    "top.qcow2": build_chain,
    "full.qcow2": lambda: run(
        QEMU, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "full.qcow2", "64G"
    ),
    "full-snap.qcow2": build_snapshot,
    "tibfull.qcow2": lambda: run(
        QEMU, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "tibfull.qcow2", "1T"
    ),
    "small.qcow2": lambda: run(QEMU, "create", "-q", "-f", "qcow2", "small.qcow2", "10G"),
    "disk.luks": lambda: run(
        QEMU, "convert", "-f", "raw", "-O", "luks", *SECRET, "-o", "key-secret=s,iter-time=10", "disk.raw", "disk.luks"
    ),
    "disk.vmdk": lambda: run(QEMU, "convert", "-f", "raw", "-O", "vmdk", "disk.raw", "disk.vmdk"),
    "disk.vdi": lambda: run(QEMU, "convert", "-f", "raw", "-O", "vdi", "disk.raw", "disk.vdi"),
    "disk.vhdx": lambda: run(QEMU, "convert", "-f", "raw", "-O", "vhdx", "disk.raw", "disk.vhdx"),
    # Made by ours: what VMware's products write has its tables behind the grains, qemu's has them in front.
    "stream.vmdk": lambda: run(VIMG, "convert", "-f", "raw", *STREAM.split(), "disk.raw", "stream.vmdk"),
    "copy.qcow2": lambda: run("cp", "disk.qcow2", "copy.qcow2"),
    "copy.raw": lambda: run("cp", "--sparse=never", "disk.raw", "copy.raw"),
}


SECRET = ["--object", "secret,id=s,data=hush"]
STREAM = "-O vmdk -o subformat=streamOptimized"
LUKS = "driver=luks,key-secret=s,file.filename="


def need(names):
    for name in names:
        if not os.path.exists(name):
            print(f"  building {name} ...", flush=True)
            try:
                DATA[name]()
            except BaseException:
                if os.path.exists(name):
                    os.remove(name)
                raise
            os.sync()


# --- Running -----------------------------------------------------------------------------------------


def once(command):
    """Runs a command; returns wall-clock and user+sys seconds."""
    devnull = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, devnull, fd) for fd in (0, 1)]
    started = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    elapsed = time.perf_counter() - started
    os.close(devnull)
    if status != 0:
        sys.exit(f"bench: exit status {os.waitstatus_to_exitcode(status)} from: {' '.join(command)}")
    return elapsed, usage.ru_utime + usage.ru_stime


def peak_kib(command):
    """The largest resident set of a command, in KiB; GNU time is small enough not to show through."""
    if not os.path.exists("/usr/bin/time"):
        return 0
    timed = ["/usr/bin/time", "-f", "%M", "-o", "peak.txt", *command]
    subprocess.run(timed, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    with open("peak.txt") as text:
        peak = int(text.read().split()[-1])
    os.remove("peak.txt")
    return peak


class Row:
    """One comparison. `words` is the command line behind the program's name; OUT stands for the target."""

    def __init__(self, name, what, words, needs=(), target=None, verify=None, repeat=1, peer=None, setup=None):
        # Two blanks in a row stand for an empty word.
        self.name, self.what, self.words, self.needs = name, what, words.split(" "), needs
        self.target, self.verify, self.repeat, self.peer, self.setup = target, verify, repeat, peer, setup

    def command(self, tool):
        if tool == "peer":
            return [shutil.which(self.peer[0])] + [w.replace("OUT", "out-peer") for w in self.peer[1:]]
        program = VIMG if tool == "vimg" else QEMU
        return [program] + [word.replace("OUT", f"out-{tool}") for word in self.words]

    def clean(self, tool):
        if os.path.exists(f"out-{tool}"):
            os.remove(f"out-{tool}")

    def measure(self):
        need(self.needs)
        tools = ["vimg", "peer" if self.peer else "qemu"]
        samples = {tool: [] for tool in tools}
        for turn in range(RUNS + 1):
            for tool in tools:
                self.clean(tool)
                if self.setup:
                    self.setup(f"out-{tool}")
                if self.target or self.setup:
                    os.sync()
                for _ in range(self.repeat):
                    if not self.setup:
                        self.clean(tool)
                    timed = once(self.command(tool))
                    if turn:
                        samples[tool].append(timed)
        if self.verify:
            self.verify(self)
        peaks = {}
        for tool in tools:
            self.clean(tool)
            if self.setup:
                self.setup(f"out-{tool}")
            peaks[tool] = peak_kib(self.command(tool))
            self.clean(tool)
        ours, theirs = tools
        middle = lambda tool, which: statistics.median(sample[which] for sample in samples[tool])
        return {
            "wall": (middle(ours, 0), middle(theirs, 0)),
            "cpu": (middle(ours, 1), middle(theirs, 1)),
            "peak": (peaks[ours], peaks[theirs]),
        }


def qcow2_same(row):
    run(QEMU, "check", "-q", "-f", "qcow2", "out-vimg")
    run(QEMU, "compare", "-q", "-f", "qcow2", "-F", "raw" if not row.target.startswith("tib") else "qcow2", "out-vimg", row.target)


def raw_same(row):
    run("cmp", "out-vimg", row.target)


def luks_same(row):
    run(QEMU, "compare", "-q", *SECRET, "--image-opts", LUKS + "out-vimg", "driver=raw,file.filename=" + row.target)


def vdi_same(row):
    run(QEMU, "compare", "-q", "-f", "vdi", "-F", "raw", "out-vimg", row.target)


def vhdx_same(row):
    run(QEMU, "compare", "-q", "-f", "vhdx", "-F", "raw", "out-vimg", row.target)


def vmdk_same(row):
    run(QEMU, "compare", "-q", "-f", "vmdk", "-F", "raw", "out-vimg", row.target)
    if "streamOptimized" in " ".join(row.words):
        note_sizes(row)


def smaller(row):
    qcow2_same(row)
    note_sizes(row)


def note_sizes(row):
    ours, theirs = os.path.getsize("out-vimg"), os.path.getsize("out-qemu")
    note = f"{row.name}: {ours / MIB:.0f} MiB written by vimg, {theirs / MIB:.0f} MiB by qemu-img"
    NOTES.append(note if ours <= theirs else note + " (LARGER)")


def chain_raw():
    if not os.path.exists("top.raw"):
        run(QEMU, "convert", "-O", "raw", "top.qcow2", "top.raw")


def chain_same(row):
    chain_raw()
    qcow2_same(row)


def with_disk(raw):
    """Compares what the rebased overlay shows, or the base that was committed to, with the disk."""
    def verify(row):
        run(QEMU, "check", "-q", "-f", "qcow2", "out-vimg")
        run(QEMU, "compare", "-q", "-F", "raw", "out-vimg", raw)
    return verify


def overlay(backing, source=None):
    """An overlay with nothing of its own, or with all of `source`."""
    def setup(out):
        run(QEMU, "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", out)
        if source:
            run(QEMU, "convert", "-n", "-O", "qcow2", source, out)
    return setup


def full_overlay(out):
    """An overlay with all of the disk, on an empty base of its own."""
    run(QEMU, "create", "-q", "-f", "qcow2", f"{out}.base", "1536M")
    overlay(f"{out}.base", "disk.qcow2")(out)


NOTES = []
W = "convert -f raw -O qcow2 disk.raw OUT"
ROWS = [
    Row("raw-qcow2", "raw -> qcow2", W, ["disk.raw"], "disk.raw", qcow2_same),
    Row("raw-qcow2-W", "raw -> qcow2, qemu with -W", W.replace("convert", "convert -W"), ["disk.raw"], "disk.raw", qcow2_same),
    Row("qcow2-raw", "qcow2 -> raw", "convert -f qcow2 -O raw disk.qcow2 OUT", ["disk.raw", "disk.qcow2"], "disk.raw", raw_same),
    Row("qcow2-qcow2", "qcow2 -> qcow2", "convert -f qcow2 -O qcow2 disk.qcow2 OUT", ["disk.raw", "disk.qcow2"], "disk.raw", qcow2_same),
    Row("raw-raw", "raw -> raw", "convert -f raw -O raw disk.raw OUT", ["disk.raw"], "disk.raw", raw_same),
    Row("chain-qcow2", "chain of three -> qcow2", "convert -O qcow2 top.qcow2 OUT", ["disk.raw", "disk.qcow2", "top.qcow2"], "top.raw", chain_same),
    Row("raw-raw-cp", "raw -> raw, against cp --sparse=auto", "convert -f raw -O raw disk.raw OUT", ["disk.raw"], "disk.raw", raw_same,
        peer=["cp", "--sparse=auto", "--reflink=never", "disk.raw", "OUT"]),
    Row("zlib", "raw -> qcow2 -c (zlib)", "convert -c -f raw -O qcow2 disk.raw OUT", ["disk.raw"], "disk.raw", smaller),
    Row("zstd", "raw -> qcow2 -c, zstd", "convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw OUT", ["disk.raw"], "disk.raw", smaller),
    Row("unzlib", "zlib qcow2 -> raw", "convert -f qcow2 -O raw zlib.qcow2 OUT", ["disk.raw", "disk.qcow2", "zlib.qcow2"], "disk.raw", raw_same),
    Row("unzstd", "zstd qcow2 -> raw", "convert -f qcow2 -O raw zstd.qcow2 OUT", ["disk.raw", "disk.qcow2", "zstd.qcow2"], "disk.raw", raw_same),
    Row("raw-vmdk", "raw -> vmdk", "convert -f raw -O vmdk disk.raw OUT", ["disk.raw"], "disk.raw", vmdk_same),
    Row("vmdk-raw", "vmdk -> raw", "convert -f vmdk -O raw disk.vmdk OUT", ["disk.raw", "disk.vmdk"], "disk.raw", raw_same),
    Row("vmdk-qcow2", "vmdk -> qcow2", "convert -f vmdk -O qcow2 disk.vmdk OUT", ["disk.raw", "disk.vmdk"], "disk.raw", qcow2_same),
    Row("raw-vdi", "raw -> vdi", "convert -f raw -O vdi disk.raw OUT", ["disk.raw"], "disk.raw", vdi_same),
    Row("vdi-raw", "vdi -> raw", "convert -f vdi -O raw disk.vdi OUT", ["disk.raw", "disk.vdi"], "disk.raw", raw_same),
    Row("raw-vhdx", "raw -> vhdx", "convert -f raw -O vhdx disk.raw OUT", ["disk.raw"], "disk.raw", vhdx_same),
    Row("vhdx-raw", "vhdx -> raw", "convert -f vhdx -O raw disk.vhdx OUT", ["disk.raw", "disk.vhdx"], "disk.raw", raw_same),
    Row("raw-stream", "raw -> streamOptimized vmdk", f"convert -f raw {STREAM} disk.raw OUT", ["disk.raw"], "disk.raw", vmdk_same),
    Row("stream-raw", "streamOptimized vmdk -> raw", "convert -f vmdk -O raw stream.vmdk OUT", ["disk.raw", "stream.vmdk"], "disk.raw", raw_same),
    Row("tib-convert", "1 TiB nearly empty: convert", "convert -f qcow2 -O qcow2 tib.qcow2 OUT", ["tib.qcow2"], "tib.qcow2", qcow2_same),
    Row("tib-check", "1 TiB nearly empty: check", "check -f qcow2 tib.qcow2", ["tib.qcow2"], repeat=10),
    Row("tib-map", "1 TiB nearly empty: map", "map -f qcow2 --output=json tib.qcow2", ["tib.qcow2"], repeat=10),
    Row("tib-compare", "1 TiB nearly empty: compare with itself", "compare -f qcow2 -F qcow2 tib.qcow2 tib.qcow2", ["tib.qcow2"], repeat=5),
    Row("check", "check of 1.5 GiB", "check -f qcow2 disk.qcow2", ["disk.raw", "disk.qcow2"], repeat=20),
    Row("map", "map of 1.5 GiB", "map -f qcow2 --output=json disk.qcow2", ["disk.raw", "disk.qcow2"], repeat=20),
    Row("measure", "measure of 1.5 GiB", "measure -f qcow2 -O qcow2 disk.qcow2", ["disk.raw", "disk.qcow2"], repeat=20),
    Row("measure-raw", "measure of 1.5 GiB raw", "measure -f raw -O qcow2 disk.raw", ["disk.raw"], repeat=5),
    Row("compare", "compare qcow2 with raw, 1.5 GiB", "compare -f qcow2 -F raw disk.qcow2 disk.raw", ["disk.raw", "disk.qcow2"]),
    Row("compare-raw", "compare raw with raw, 1.5 GiB", "compare -f raw -F raw disk.raw copy.raw", ["disk.raw", "copy.raw"]),
    Row("check-full", "check, metadata of a full 64 GiB disk", "check -f qcow2 full.qcow2", ["full.qcow2"], repeat=5),
    Row("check-tibfull", "check, metadata of a full 1 TiB disk", "check -f qcow2 tibfull.qcow2", ["tibfull.qcow2"]),
    Row("map-full", "map, metadata of a full 64 GiB disk", "map -f qcow2 --output=json full.qcow2", ["full.qcow2"], repeat=3),
    Row("snapshot-create", "snapshot -c, metadata of a full 64 GiB disk", "snapshot -c s OUT", ["full.qcow2"],
        setup=lambda out: run("cp", "--sparse=always", "full.qcow2", out)),
    Row("snapshot-apply", "snapshot -a, metadata of a full 64 GiB disk", "snapshot -a s OUT", ["full-snap.qcow2"],
        setup=lambda out: run("cp", "--sparse=always", "full-snap.qcow2", out)),
    Row("snapshot-delete", "snapshot -d, metadata of a full 64 GiB disk", "snapshot -d s OUT", ["full-snap.qcow2"],
        setup=lambda out: run("cp", "--sparse=always", "full-snap.qcow2", out)),
    Row("luks-raw", "luks -> raw", f"convert {' '.join(SECRET)} --image-opts -O raw {LUKS}disk.luks OUT", ["disk.raw", "disk.luks"], "disk.raw", raw_same),
    # Into a container that is there: what making a key takes is chosen by --iter-time, not by the tool.
    Row("raw-luks", "raw -> luks", f"convert -n {' '.join(SECRET)} -f raw --target-image-opts disk.raw {LUKS}OUT", ["disk.raw", "disk.luks"], "disk.raw",
        luks_same, setup=lambda out: run("cp", "disk.luks", out)),
    Row("rebase-flatten", "rebase -b '', overlay on 1.5 GiB", "rebase -b  OUT", ["disk.raw", "disk.qcow2"], verify=with_disk("disk.raw"),
        setup=overlay("disk.qcow2")),
    Row("rebase-safe", "rebase to the middle of the chain", "rebase -F qcow2 -b middle.qcow2 OUT",
        ["disk.raw", "disk.qcow2", "top.qcow2"], setup=overlay("top.qcow2")),
    Row("rebase-other", "rebase to a copy of 1.5 GiB", "rebase -F qcow2 -b copy.qcow2 OUT", ["disk.raw", "disk.qcow2", "copy.qcow2"],
        verify=with_disk("disk.raw"), setup=overlay("disk.qcow2")),
    Row("commit", "commit of 1.5 GiB", "commit OUT", ["disk.raw", "disk.qcow2"], verify=with_disk("disk.raw"), setup=full_overlay),
    Row("info", "info of a small image", "info -f qcow2 --output=json small.qcow2", ["small.qcow2"], repeat=60),
    Row("create", "create of a small image", "create -f qcow2 OUT 10G", [], repeat=60),
    Row("resize", "resize of a small image", "resize -f qcow2 OUT +1M", ["small.qcow2"], repeat=60,
        setup=lambda out: shutil.copyfile("small.qcow2", out)),
    Row("version", "--version", "--version", [], repeat=60),
]

TARGETS = {
    "raw-qcow2": 0.8, "raw-qcow2-W": 0.8, "qcow2-raw": 0.8, "qcow2-qcow2": 0.8, "raw-raw": 0.8, "chain-qcow2": 0.8, "raw-raw-cp": 1.0,
    "zlib": 0.3, "zstd": 0.7, "unzlib": 0.4, "unzstd": 0.7,
    "raw-vhdx": 0.8, "vhdx-raw": 0.8, "raw-vdi": 0.8, "vdi-raw": 0.8,
    "raw-vmdk": 0.8, "vmdk-raw": 0.8, "vmdk-qcow2": 0.8, "raw-stream": 0.15, "stream-raw": 0.3,
    "tib-convert": 0.2, "tib-check": 0.2, "tib-map": 0.2, "tib-compare": 0.2,
    "check": 0.7, "map": 0.7, "measure": 0.7, "measure-raw": 0.7, "compare": 0.7, "compare-raw": 0.7,
    "check-full": 0.5, "check-tibfull": 0.5, "map-full": 0.7, "snapshot-create": 0.5, "snapshot-apply": 0.5, "snapshot-delete": 0.5, "rebase-flatten": 0.5, "rebase-safe": 0.5, "rebase-other": 0.5, "commit": 0.5, "luks-raw": 0.5, "raw-luks": 0.5, "info": 0.3, "create": 0.3, "resize": 0.3, "version": 0.3,
}


# --- Reflinks ----------------------------------------------------------------------------------------


def reflink_rows(kind):
    """raw -> raw and raw -> qcow2 on a file system whose files can share blocks, mounted through a loop device."""
    print(f"  mounting a {kind} ...", flush=True)
    image, mount = os.path.abspath(f"{kind}.img"), os.path.abspath(f"mnt-{kind}")
    os.makedirs(mount, exist_ok=True)
    run("truncate", "-s", "8G", image)
    make = ["mkfs.xfs", "-q", "-f", "-m", "reflink=1", image] if kind == "xfs" else ["mkfs.btrfs", "-q", "-f", image]
    try:
        run(*make)
        run("mount", "-o", "loop", image, mount, stderr=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, FileNotFoundError):
        print(f"  skipped: {kind} cannot be made or mounted here")
        os.remove(image)
        return []
    here = os.getcwd()
    results = []
    try:
        shutil.copyfile("disk.raw", os.path.join(mount, "disk.raw"))
        os.chdir(mount)
        run(QEMU, "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
        os.sync()
        for name, what, words, verify in [
            (f"{kind}-raw-raw", "raw -> raw", "convert -f raw -O raw disk.raw OUT", raw_same),
            (f"{kind}-raw-qcow2", "raw -> qcow2", "convert -f raw -O qcow2 disk.raw OUT", qcow2_same),
            (f"{kind}-qcow2-qcow2", "qcow2 -> qcow2", "convert -f qcow2 -O qcow2 disk.qcow2 OUT", qcow2_same),
            (f"{kind}-qcow2-raw", "qcow2 -> raw", "convert -f qcow2 -O raw disk.qcow2 OUT", raw_same),
        ]:
            if wanted(name) or wanted("reflink"):
                TARGETS[name] = 0.05
                results.append(report(Row(name, f"{what} on {kind} (reflink)", words, [], "disk.raw", verify)))
    finally:
        os.chdir(here)
        subprocess.run(["umount", mount], check=False)
        os.remove(image)
        os.rmdir(mount)
    return results


# --- Reporting ---------------------------------------------------------------------------------------


def wanted(name):
    return not WANTED or name in WANTED


def seconds(value):
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def ratio(pair):
    return f"{pair[0] / pair[1]:.2f}" if pair[1] else "-"


def report(row):
    found = row.measure()
    wall, cpu, peak = found["wall"], found["cpu"], found["peak"]
    target = TARGETS[row.name]
    verdict = "ok" if wall[0] / wall[1] <= target else "slower"
    line = [
        row.what, seconds(wall[0]), seconds(wall[1]), ratio(wall), f"{target:.2f}", verdict, ratio(cpu),
        f"{peak[0] / 1024:.0f}", f"{peak[1] / 1024:.0f}",
    ]
    print(f"{row.name:18} {line[1]:>10} {line[2]:>10}   wall {line[3]:>6} (target {line[4]}, {verdict})   "
          f"cpu {line[6]:>6}   peak {line[7]:>4} / {line[8]:>4} MiB", flush=True)
    return "| " + " | ".join(line) + " |"


def machine():
    with open("/proc/cpuinfo") as text:
        names = [line.split(":", 1)[1].strip() for line in text if line.startswith("model name")]
    cpus = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    ours = subprocess.run([VIMG, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return f"{ours}; {version}; {cpus} x {names[0] if names else 'CPU'}, {memory:.0f} GiB, Linux {os.uname().release}"


def main():
    os.makedirs(DIR, exist_ok=True)
    os.chdir(DIR)
    known = {row.name for row in ROWS} | {"reflink"} | {f"{fs}-{c}" for fs in ("xfs", "btrfs") for c in ("raw-raw", "raw-qcow2", "qcow2-qcow2", "qcow2-raw")}
    unknown = set(WANTED) - known
    if unknown:
        sys.exit(f"bench: no row {', '.join(sorted(unknown))}; there are: {' '.join(sorted(known))}")
    print(machine())
    lines = [report(row) for row in ROWS if wanted(row.name)]
    if not WANTED or any("reflink" == w or w.startswith(("xfs", "btrfs")) for w in WANTED):
        if os.geteuid() == 0:
            need(["disk.raw"])
            for kind in ("xfs", "btrfs"):
                if wanted("reflink") or any(w.startswith(kind) for w in WANTED):
                    lines += reflink_rows(kind)
        else:
            print("skipped: the reflink rows need root, to mount an xfs and a btrfs")
    with open("results.md", "w") as text:
        text.write(f"{machine()}; medians of {RUNS} interleaved runs after a warm-up, page cache warm.\n\n")
        text.write("| case | vimg | qemu-img | wall ratio | target | | user+sys ratio | vimg peak MiB | qemu-img peak MiB |\n")
        text.write("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |\n")
        text.write("\n".join(lines) + "\n")
        for note in NOTES:
            text.write(f"\n{note}\n")
    for note in NOTES:
        print(note)
    print(f"bench: written to {os.path.join(DIR, 'results.md')}")


if __name__ == "__main__":
    main()
