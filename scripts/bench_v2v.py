#!/usr/bin/env python3
"""A conversion against the copy that is the least of it: vimg v2v and vimg convert of the same disks, in turn.

    scripts/bench_v2v.py PATH/TO/vimg GUESTS [FOLDER]

GUESTS is what scripts/v2v-guests.sh has made. Prints, for each guest, the medians of BENCH_ROUNDS (5) runs: the whole conversion
(without a test boot), its ratio to `vimg convert -t writeback` of the same disks (both end when everything is on the disk; target for
a guest of 3 GiB: 1.2 at most), and what inspection and plan (target: 2 s) and the changes (target: 1 s) took of it.
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
# The XFS guest needs the appliance: a boot of its own is part of its changes. The last one has a second disk, full of data.
DISKS = [["vmware.raw"], ["uefi-lvm.raw"], ["xen-xfs.raw"], ["vmware.raw", "data.raw"]]
DATA_BYTES = 2560 << 20


def run(words):
    began = time.monotonic()
    done = subprocess.run([VIMG, *words], capture_output=True, text=True)
    took = time.monotonic() - began
    if done.returncode:
        sys.exit(f"bench-v2v: {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return took, done.stdout


def main():
    print(f"{'guest':<24}{'convert s':>10}{'v2v s':>8}{'ratio':>7}{'inspect+plan s':>16}{'changes s':>11}")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        data = os.path.join(folder, "data.raw")
        with open(data, "wb") as file:
            for _ in range(DATA_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        out, copy_name = os.path.join(folder, "out"), os.path.join(folder, "copy.qcow2")
        for names in DISKS:
            sources = [data if name == "data.raw" else os.path.join(GUESTS, name) for name in names]
            copies, wholes, looks, changes = [], [], [], []
            for _ in range(ROUNDS + 1):
                took = 0
                for source in sources:
                    took += run(["convert", "-t", "writeback", "-f", "raw", "-O", "qcow2", source, copy_name])[0]
                    os.remove(copy_name)
                copies.append(took)
                took, text = run(["v2v", "-f", "raw", *sources, "-o", out, "--output", "json"])
                seconds = json.loads(text)["seconds"]
                wholes.append(took)
                looks.append(seconds["inspection"] + seconds["plan"])
                changes.append(seconds.get("changes", 0))
                shutil.rmtree(out)
            # The first round warms the page cache.
            copy, whole, look, change = (statistics.median(times[1:]) for times in (copies, wholes, looks, changes))
            print(f"{' + '.join(names):<24}{copy:>10.2f}{whole:>8.2f}{whole / copy:>7.2f}{look:>16.2f}{change:>11.2f}")


if __name__ == "__main__":
    main()
