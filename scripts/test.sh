#!/usr/bin/env bash
# Runs every test. The integration suite notes each skipped test in a file, because cargo hides the
# output of tests that pass; the notes are printed after the run, and the sum comes last.
#
#   scripts/test.sh [ARGUMENTS FOR THE TEST RUNNER]
set -u

cd "$(dirname "$0")/.." || exit
export PATH="$PATH:/usr/sbin:/sbin"
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
VIMG_SKIP_LOG=$(realpath "$target")/skipped-tests.log
export VIMG_SKIP_LOG
: >"$VIMG_SKIP_LOG"
log=$target/test.log
: >"$log"
status=0

# shellcheck disable=SC1091 # beside this file
. scripts/openssl.sh shared

# Everything at once: vimg by itself would be built with other features of its dependencies, and they twice.
# shellcheck disable=SC2086 # one word or none, here and below
cargo build --workspace --bins --tests $features || exit 1
VIMG=$(realpath "$target")/debug/vimg
export VIMG
VIMG_SAMPLES=$(realpath "$target")/samples
export VIMG_SAMPLES

if [ $# = 0 ]; then
    # shellcheck disable=SC2086
    cargo test --workspace --doc -q $features || status=1
fi
set -o pipefail
if cargo nextest --version >/dev/null 2>&1; then
    # shellcheck disable=SC2086
    cargo nextest run --workspace $features --no-fail-fast --status-level fail --final-status-level slow "$@" 2>&1 |
        tee "$log" || status=1
else
    # shellcheck disable=SC2086
    cargo test --workspace $features --lib --bins --tests --no-fail-fast -q "$@" 2>&1 | tee "$log" || status=1
fi

skipped=0
if [ -s "$VIMG_SKIP_LOG" ]; then
    skipped=$(cut -f1 "$VIMG_SKIP_LOG" | sort -u | wc -l)
    printf '\n%d tests were skipped, wholly or in part, because this machine lacks something:\n' "$skipped"
    sort -u "$VIMG_SKIP_LOG" | sed 's/^/  /'
else
    printf '\nNo test was skipped.\n'
fi

# Both runners' closing lines, added up: "391 passed" and "2 failed" wherever they stand in them.
sum() {
    sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '^ *Summary \[|^test result:' | grep -oE "[0-9]+ $1" |
        awk '{n += $1} END {print n + 0}'
}
printf '\n%d passed, %d failed, %d skipped\n' "$(sum passed)" "$(sum failed)" "$skipped"
exit "$status"
