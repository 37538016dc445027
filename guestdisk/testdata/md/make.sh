#!/bin/bash
# Makes the arrays that guestdisk/src/md/tests.rs reads, with mdadm and the md driver of a real kernel. Runs in the lab as root:
#
#     tests/lab/kvm-lab --mem 1500 -- bash guestdisk/testdata/md/make.sh [NAMES]
#
# Each is a disk with a GPT whose partitions are the members. The first 160 blocks of 4 KiB and the last 24 hold their own number,
# counted from 1, again and again as 8 bytes, least significant first; the rest is zeros.
set -eu
cd "$(dirname "$0")"
only=${1:-*}
for module in linear raid0 raid1 raid10 raid456; do modprobe "$module" 2>/dev/null || true; done

# array NAME VERSION "KIB.." OPTIONS..: members of these sizes.
array() {
    local name=$1 version=$2 sizes=$3 start=1024 size device members=() disk
    shift 3
    # shellcheck disable=SC2053 # a pattern
    [[ $name == $only ]] || return 0
    disk=/tmp/$name.raw
    truncate -s "$((2048 + $(echo "$sizes" | tr ' ' '+')))K" "$disk"
    {
        echo 'label: gpt'
        for size in $sizes; do
            echo "start=$((start * 2)), size=$((size * 2)), type=A19D880F-05FC-4D3B-A006-743F0F84911E"
            start=$((start + size))
        done
    } | sfdisk -q "$disk"
    device=$(losetup -P -f --show "$disk")
    for size in $sizes; do members+=("${device}p$((${#members[@]} + 1))"); done
    [ "$version" = 0.90 ] || set -- "$@" --homehost=lab --name="$name"
    mdadm --quiet --create /dev/md7 --run --force -e "$version" -n "${#members[@]}" "$@" "${members[@]}"
    python3 - <<'PYTHON'
import os
count = int(open('/sys/block/md7/size').read()) // 8
with open('/dev/md7', 'r+b', buffering=0) as array:
    for block in sorted({*range(min(160, count)), *range(max(0, count - 24), count)}):
        array.seek(block * 4096)
        array.write((block + 1).to_bytes(8, 'little') * 512)
    os.fsync(array.fileno())
PYTHON
    mdadm --quiet --stop /dev/md7
    losetup -d "$device"
    zstd -q -19 -f "$disk" -o "$name.zst"
    rm "$disk"
}

clean() { array "$@" --assume-clean; }

array linear-1.2 1.2 "2048 3072 2048" -l linear
array linear-0.90 0.90 "2048 3072 2048" -l linear
array raid0-1.2 1.2 "3072 3072 3072" -l 0 -c 16
array raid0-zones 1.2 "3072 2064 4096" -l 0 -c 16
array raid0-zones-original 1.2 "3072 2064 4096" -l 0 -c 16 --layout=original
clean raid1-0.90 0.90 "2048 2048" -l 1
clean raid1-1.0 1.0 "2048 2048" -l 1 -b internal
clean raid1-1.1 1.1 "2048 2048" -l 1
clean raid1-1.2 1.2 "3072 3072 3072" -l 1 -b internal
clean raid4-1.2 1.2 "2048 2048 2048" -l 4 -c 16 -b none
for layout in n2 f2 o2 n3 f3 o3; do
    for members in "2048 2048 2048" "2048 2048 2048 2048" "2048 2048 2048 2048 2048"; do
        count=($members)
        clean "raid10-$layout-${#count[@]}" 1.2 "$members" -l 10 -c 16 "--layout=$layout" -b none
    done
done
clean raid10-0.90 0.90 "2048 2048 2048 2048" -l 10 -c 16 --layout=n2
clean raid5-0.90 0.90 "2048 2048 2048" -l 5 -c 16
for layout in left-asymmetric right-asymmetric left-symmetric right-symmetric parity-first parity-last; do
    clean "raid5-$layout" 1.2 "2048 2048 2048 2048" -l 5 -c 16 "--layout=$layout" -b none
    clean "raid6-$layout" 1.2 "2048 2048 2048 2048 2048" -l 6 -c 16 "--layout=$layout" -b none
done
for layout in left-asymmetric-6 right-asymmetric-6 left-symmetric-6 right-symmetric-6 parity-first-6; do
    clean "raid6-$layout" 1.2 "2048 2048 2048 2048 2048" -l 6 -c 16 "--layout=$layout" -b none
done
