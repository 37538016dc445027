#!/usr/bin/env bash
# vimg and qemu-img side by side, on a realistic data set, as ratios of time and memory.
#
#   scripts/bench.sh [PATH/TO/vimg] [ROW...]        (make bench ROWS="info raw-qcow2")
#
# BENCH_DIR   where the data lies (default target/bench; about 8 GiB are needed)
# BENCH_RUNS  timed runs of each command (default 3, after one warm-up)
set -eu

cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C
vimg=${1:-target/release/vimg}
[ $# = 0 ] || shift
for tool in qemu-img qemu-io python3 mke2fs; do
    command -v $tool >/dev/null 2>&1 || { echo "bench: no $tool on this machine; nothing to compare" >&2; exit 1; }
done
[ -x "$vimg" ] || { echo "bench: no vimg at $vimg; run 'make bench'" >&2; exit 1; }
exec python3 scripts/bench.py "$(realpath "$vimg")" "${BENCH_DIR:-target/bench}" "$@"
