#!/usr/bin/env python3
"""A conversion against the copy that is the least of it: vimg v2v and vimg convert of the same disks, in turn.

    scripts/bench_v2v.py PATH/TO/vimg GUESTS [FOLDER]

GUESTS is what scripts/v2v-guests.sh has made. Prints, for each guest, the medians of BENCH_ROUNDS (5) runs: the whole conversion
(without a test boot), its ratio to `vimg convert -t writeback` of the same disks (both end when everything is on the disk; target for
a guest of 3 GiB: 1.2 at most), the processor time of both and that ratio, and what inspection and plan (target: 2 s), the changes
(target: 1 s) and their verification took of it.

What is compared has to begin alike: both leave all of their disks until the end, the one is first in every other round, and before each
everything that was written is removed and what the file system has to do about that (write back, give back space) is waited for. A copy
that runs while the one before it is being removed takes half as long again on some disks, whichever of the two it is.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

VIMG, GUESTS = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
FOLDER = sys.argv[3] if len(sys.argv) > 3 else None
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
# Names of disks, if not all guests are to be measured.
ONLY = os.environ.get("BENCH_DISKS", "").split()
# The XFS guest needs the appliance: a boot of its own is part of its changes. The last two have 2.5 GiB more of data: on the disk that
# is changed, which is copied through an overlay, and on one of its own.
DISKS = [["vmware.raw"], ["uefi-lvm.raw"], ["xen-xfs.raw"], ["large.raw"], ["vmware.raw", "data.raw"]]
DATA_BYTES = 2560 << 20
# Seconds for what a file system does after a sync has returned (discards, say).
SETTLE = 1


class Run:
    """What a command took, and what it said."""

    def __init__(self, words):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([VIMG, *words], capture_output=True, text=True)
        self.seconds = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.text = done.stdout
        if done.returncode:
            sys.exit(f"bench-v2v: {' '.join(words)}: exit {done.returncode}\n{done.stderr}")


def fill(path, begin):
    """Random bytes behind what `begin` holds."""
    if begin:
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", begin, path], check=True)
    with open(path, "ab") as file:
        for _ in range(DATA_BYTES >> 20):
            file.write(os.urandom(1 << 20))


def clean(out):
    shutil.rmtree(out, ignore_errors=True)
    os.mkdir(out)
    os.sync()
    time.sleep(SETTLE)
    os.sync()


def convert(sources, out):
    runs = []
    for number, source in enumerate(sources):
        copy = os.path.join(out, f"copy-{number}.qcow2")
        runs.append(Run(["convert", "-t", "writeback", "-f", "raw", "-O", "qcow2", source, copy]))
    return sum(run.seconds for run in runs), sum(run.cpu for run in runs)


def v2v(sources, out):
    run = Run(["v2v", "-f", "raw", *sources, "-o", out, "--output", "json"])
    seconds = json.loads(run.text)["seconds"]
    parts = (seconds["inspection"] + seconds["plan"], seconds.get("changes", 0), seconds.get("verification", 0))
    return run.seconds, run.cpu, *parts


def main():
    columns = ["guest", "convert s", "v2v s", "ratio", "cpu s", "cpu s", "ratio", "inspect+plan s", "changes s", "verify s"]
    widths = [24, 10, 8, 7, 8, 8, 7, 16, 11, 10]
    print("".join(f"{name:<{width}}" if name == "guest" else f"{name:>{width}}" for name, width in zip(columns, widths)))
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        own = {name: os.path.join(folder, name) for name in ("data.raw", "large.raw")}
        fill(own["data.raw"], None)
        fill(own["large.raw"], os.path.join(GUESTS, "vmware.raw"))
        out = os.path.join(folder, "out")
        for names in DISKS:
            if ONLY and not set(names) & set(ONLY):
                continue
            sources = [own.get(name, os.path.join(GUESTS, name)) for name in names]
            taken = {convert: [], v2v: []}
            for number in range(ROUNDS + 1):
                for what in (convert, v2v) if number % 2 else (v2v, convert):
                    clean(out)
                    taken[what].append(what(sources, out))
            # The first round warms the page cache.
            copy, whole = ([statistics.median(column) for column in zip(*runs[1:])] for runs in taken.values())
            numbers = [copy[0], whole[0], whole[0] / copy[0], copy[1], whole[1], whole[1] / copy[1], *whole[2:]]
            cells = "".join(f"{number:>{width}.2f}" for number, width in zip(numbers, widths[1:]))
            print(f"{' + '.join(names):<24}{cells}", flush=True)


if __name__ == "__main__":
    main()
