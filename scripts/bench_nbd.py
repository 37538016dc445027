#!/usr/bin/env python3
"""NBD servers side by side: vimg serve, qemu-nbd and nbdkit under the same clients.

    scripts/bench_nbd.py PATH/TO/vimg [DIRECTORY] [WORD...]      (make bench-nbd)

The client is fio's nbd engine, over Unix sockets, each server on a copy of the same image of its own in DIRECTORY (default
/dev/shm, so that no disk is measured). Every cell runs the servers in turn, round after round, so that a noise of the machine
meets all of them; the figures are the medians of the rounds: requests per second, and the server's processor time for a
request, which is the steadier of the two. The ratios are vimg's figure against the better one of the others: above 1 is
better for requests per second, below 1 for processor time. With WORDs only cells whose name has one of them are run.

BENCH_ROUNDS (5), BENCH_SECONDS (1) of each run.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

VIMG = os.path.abspath(sys.argv[1])
DIR = os.path.join(sys.argv[2] if len(sys.argv) > 2 else "/dev/shm", "vimg-bench-nbd")
WORDS = sys.argv[3:]
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
SECONDS = os.environ.get("BENCH_SECONDS", "1")
MIB = 512

CELLS = [(rw, "256k", depth, jobs) for rw in ("read", "write") for depth in (1, 16) for jobs in (1, 4)]
CELLS += [(rw, "4k", depth, jobs) for rw in ("randread", "randwrite") for depth in (1, 16, 64) for jobs in (1, 4)]


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def command(server, image, format, socket):
    if server == "vimg":
        return [VIMG, "serve", "--socket", socket, "-f", format, "--discard", "ignore", image]
    if server == "qemu-nbd":
        return ["qemu-nbd", "-k", socket, "-f", format, "-t", "-e", "16", image]
    return ["nbdkit", "-f", "-U", socket, "file", image]


class Server:
    def __init__(self, name, image, format):
        self.socket = os.path.join(DIR, f"{name}.sock")
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        self.process = subprocess.Popen(command(name, image, format, self.socket), stdout=subprocess.DEVNULL)
        while not os.path.exists(self.socket):
            if self.process.poll() is not None:
                sys.exit(f"bench-nbd: {name} did not start")
            time.sleep(0.02)
        time.sleep(0.1)

    def seconds(self):
        """Processor time until now."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmHWM:\s*(\d+)", file.read()).group(1)) / 1024

    def measure(self, rw, size, depth, jobs):
        before = self.seconds()
        out = run(
            "fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={self.socket}", f"--rw={rw}",
            f"--bs={size}", f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting", "--time_based",
            f"--runtime={SECONDS}", "--output-format=json", f"--size={MIB}M",
        )
        job = json.loads(out[out.index("{"):])["jobs"][0]
        done = job["read" if "read" in rw else "write"]
        return done["iops"], (self.seconds() - before) / max(done["total_ios"], 1) * 1e6

    def stop(self):
        self.process.terminate()
        self.process.wait()


def cells(format, servers):
    running = {}
    for name in servers:
        image = os.path.join(DIR, f"{name}.{format}")
        shutil.copyfile(os.path.join(DIR, f"disk.{format}"), image)
        running[name] = Server(name, image, format)
    for cell in CELLS:
        title = "{} {} {}, depth {}, {} conn.".format(format, cell[0], *cell[1:])
        if WORDS and not any(word in title for word in WORDS):
            continue
        figures = {name: [] for name in servers}
        for _ in range(ROUNDS):
            for name in servers:
                figures[name].append(running[name].measure(*cell))
        rates = {name: statistics.median(rate for rate, _ in values) for name, values in figures.items()}
        costs = {name: statistics.median(cost for _, cost in values) for name, values in figures.items()}
        others = [name for name in servers if name != "vimg"]
        rate = rates["vimg"] / max(rates[name] for name in others)
        cost = costs["vimg"] / max(min(costs[name] for name in others), 0.01)
        shown = " | ".join(f"{rates[n]:.0f} / {costs[n]:.1f} us" if n in rates else "-" for n in ALL)
        print(f"| {title} | {shown} | {rate:.2f} | {cost:.2f} |", flush=True)
    peaks = ", ".join(f"{name} {server.resident():.0f} MiB" for name, server in running.items())
    print(f"| {format}: peak memory of the servers | {peaks} | | | | |", flush=True)
    for server in running.values():
        server.stop()


ALL = ["vimg", "qemu-nbd", "nbdkit"]
missing = [tool for tool in ("fio", "qemu-nbd", "qemu-img") if not shutil.which(tool)]
if missing:
    sys.exit(f"bench-nbd: no {', '.join(missing)} on this machine")
shutil.rmtree(DIR, ignore_errors=True)
os.makedirs(DIR)
try:
    with open(os.path.join(DIR, "disk.raw"), "wb") as file:
        for _ in range(MIB):
            file.write(os.urandom(1 << 20))
    run("qemu-img", "convert", "-O", "qcow2", os.path.join(DIR, "disk.raw"), os.path.join(DIR, "disk.qcow2"))
    print("| cell | vimg | qemu-nbd | nbdkit | requests/s, ratio | processor time, ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    cells("raw", ALL if shutil.which("nbdkit") else ALL[:2])
    cells("qcow2", ALL[:2])
finally:
    shutil.rmtree(DIR, ignore_errors=True)
