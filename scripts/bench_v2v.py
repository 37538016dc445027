#!/usr/bin/env python3
"""A conversion against the copy that is the least of it: vimg v2v and vimg convert of the same disk, in turn.

    scripts/bench_v2v.py PATH/TO/vimg GUESTS [FOLDER]

GUESTS is what scripts/v2v-guests.sh has made. Prints, for each guest, the medians of BENCH_ROUNDS (5) runs: the whole conversion
(without a test boot), its ratio to `vimg convert` (target: 1.2 at most), and what inspection and plan (target: 2 s) and the
changes (target: 1 s) took of it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

VIMG, GUESTS = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
FOLDER = sys.argv[3] if len(sys.argv) > 3 else None
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
# The XFS guest needs the appliance: a boot of its own is part of its changes.
DISKS = ["vmware.raw", "uefi-lvm.raw", "xen-xfs.raw"]


def run(words):
    began = time.monotonic()
    done = subprocess.run([VIMG, *words], capture_output=True, text=True)
    took = time.monotonic() - began
    if done.returncode:
        sys.exit(f"bench-v2v: {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return took, done.stdout


def main():
    print(f"{'guest':<14}{'convert s':>10}{'v2v s':>8}{'ratio':>7}{'inspect+plan s':>16}{'changes s':>11}")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for disk in DISKS:
            source, out = os.path.join(GUESTS, disk), os.path.join(folder, "out")
            copies, wholes, looks, changes = [], [], [], []
            for _ in range(ROUNDS + 1):
                copies.append(run(["convert", "-f", "raw", "-O", "qcow2", source, os.path.join(folder, "copy.qcow2")])[0])
                took, text = run(["v2v", "-f", "raw", source, "-o", out, "--output", "json"])
                seconds = json.loads(text)["seconds"]
                wholes.append(took)
                looks.append(seconds["inspection"] + seconds["plan"])
                changes.append(seconds.get("changes", 0))
                shutil.rmtree(out)
                os.remove(os.path.join(folder, "copy.qcow2"))
            # The first round warms the page cache.
            copy, whole, look, change = (statistics.median(times[1:]) for times in (copies, wholes, looks, changes))
            print(f"{disk:<14}{copy:>10.2f}{whole:>8.2f}{whole / copy:>7.2f}{look:>16.2f}{change:>11.2f}")


if __name__ == "__main__":
    main()
