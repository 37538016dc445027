#!/usr/bin/env bash
# Fetches a kernel that can write NTFS (ntfs3), for the appliance's tests: Debian 12's own has none, that of its backports has.
#
#   scripts/ntfs3-kernel.sh DIR
#
# DIR then holds `vmlinuz`, and `modules`, the folder of its modules with their index. Nothing is installed. Needs apt with a
# source that has such a kernel, dpkg-deb and depmod. Exit code 3: something of that is missing; said on standard error.
set -eu

export PATH="$PATH:/usr/sbin:/sbin"
dir=${1:?usage: ntfs3-kernel.sh DIR}
mkdir -p "$dir"
dir=$(realpath "$dir")
exec 9>"$dir/lock"
flock 9
[ -e "$dir/modules/modules.dep" ] && exit 0

lacks() { echo "ntfs3-kernel: $1" >&2; exit 3; }
for tool in apt-get apt-cache dpkg-deb depmod; do
    command -v "$tool" >/dev/null 2>&1 || lacks "no $tool on this machine"
done
# The newest kernel for clouds: it is small. Only the last two are looked into.
names=$(apt-cache search --names-only '^linux-image-[0-9].*-cloud-amd64$' | cut -d' ' -f1 | sort -V | tail -2 | sort -rV)
[ -n "$names" ] || lacks "apt knows of no kernel"
for name in $names; do
    rm -rf "$dir/work"
    mkdir "$dir/work"
    (cd "$dir/work" && apt-get -qq download "$name" >/dev/null 2>&1 && dpkg-deb -x ./*.deb tree) || continue
    found=$(find "$dir/work/tree" -name 'ntfs3.ko*' | head -1)
    [ -n "$found" ] || continue
    release=${name#linux-image-}
    depmod -b "$dir/work/tree" "$release" || lacks "depmod failed"
    modules=$(find "$dir/work/tree" -maxdepth 4 -type d -path "*lib/modules/$release")
    rm -rf "$dir/modules"
    mv "$dir/work/tree/boot/vmlinuz-$release" "$dir/vmlinuz"
    mv "$modules" "$dir/modules"
    rm -rf "$dir/work"
    exit 0
done
rm -rf "$dir/work"
lacks "no kernel with ntfs3 can be had from apt's sources"
