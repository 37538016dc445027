#!/usr/bin/env bash
# The root trees that the guests of scripts/v2v-matrix.sh are made of, once, in a cache directory.
#
#   scripts/v2v-matrix-roots.sh DIR [NAME...]
#
# DIR/root/NAME is a tree, DIR/root/NAME.kernels the releases of its kernels, a line each:
#
#   bookworm   systemd, merged /usr; the distribution's kernel and the one for clouds; initramfs-tools and dracut
#   trixie     the same a release later: modules are packed by xz
#   bullseye   sysvinit and OpenRC, /lib beside /usr/lib, Linux 5.10 (whose LZ4 decoder does not stop at zeros)
#   i386       32 bits: Linux 5.10, sysvinit, GRUB legacy (no older release is on Debian's mirrors)
#
# Needs root, mmdebstrap (with arch-test for i386) and a Debian mirror. Exit code 3: something of that is missing; said on standard error.
set -eu

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8
dir=${1:?usage: v2v-matrix-roots.sh DIR [NAME...]}
shift
mkdir -p "$dir/root"
dir=$(realpath "$dir")
exec 8>"$dir/root/lock"
flock 8

lacks() { echo "v2v-matrix-roots: $1" >&2; exit 3; }
command -v mmdebstrap >/dev/null 2>&1 || lacks "no mmdebstrap on this machine"
[ "$(id -u)" = 0 ] || lacks "needs root"

# Documentation, and drivers that no virtual machine has: they are half of a Debian.
excluded=()
for path in '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*'; do
    excluded+=(--dpkgopt="path-exclude=$path")
done
for path in 'sound/*' 'drivers/gpu/*' 'drivers/media/*' 'drivers/infiniband/*' 'drivers/net/wireless/*' 'drivers/staging/*' \
    'drivers/iio/*' 'drivers/isdn/*' 'drivers/net/ethernet/*' 'drivers/usb/*' 'net/*' 'drivers/hwmon/*' 'drivers/input/*'; do
    excluded+=(--dpkgopt="path-exclude=/lib/modules/*/kernel/$path" --dpkgopt="path-exclude=/usr/lib/modules/*/kernel/$path")
done
excluded+=(--dpkgopt='path-include=/lib/modules/*/kernel/net/core/*' --dpkgopt='path-include=/usr/lib/modules/*/kernel/net/core/*')

# What a guest tells of itself when it is up: whether everything in fstab is mounted.
report() { # ROOT
    cat >"$1/usr/local/sbin/matrix-report" <<'SH'
#!/bin/sh
# One line on the serial port: how many entries of fstab are in use, and which are not.
good=0 bad=
while read -r spec path type options _; do
    case "$spec,$options" in '#'*|,*|*noauto*|*nofail*) continue ;; esac
    if [ "$type" = swap ]; then
        [ "$(wc -l </proc/swaps)" -gt 1 ] && good=$((good + 1)) || bad="$bad swap"
    elif grep -q "^[^ ]* $path " /proc/mounts; then good=$((good + 1)); else bad="$bad $path"; fi
done </etc/fstab
failed=
[ -d /run/systemd/system ] && failed=$(systemctl --failed --no-legend --plain 2>/dev/null | cut -d' ' -f1 | tr '\n' ' ')
echo "matrix: kernel $(uname -r), $good of fstab in use, missing:${bad:- none}, failed: ${failed:-none}" >/dev/ttyS0
SH
    chmod 755 "$1/usr/local/sbin/matrix-report"
}

report_by_systemd() { # ROOT
    report "$1"
    printf '[Unit]\nDescription=Report\nAfter=local-fs.target swap.target sysinit.target\n[Service]\nType=oneshot\nExecStart=/usr/local/sbin/matrix-report\n[Install]\nWantedBy=multi-user.target\n' \
        >"$1/etc/systemd/system/matrix-report.service"
    mkdir -p "$1/etc/systemd/system/multi-user.target.wants"
    ln -sf /etc/systemd/system/matrix-report.service "$1/etc/systemd/system/multi-user.target.wants/matrix-report.service"
    for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service dpkg-db-backup.timer \
        systemd-timesyncd.service fstrim.timer lvm2-monitor.service xfs_scrub_all.timer networking.service open-vm-tools.service; do
        rm -f "$1/etc/systemd/system/"*.wants/"$unit"
    done
}

finish() { # NAME ROOT
    sed -i 's/^root:[^:]*:/root::/' "$2/etc/shadow"
    rm -rf "$2"/var/cache/apt/* "$2"/var/lib/apt/lists/* "$2"/boot/initrd.img* "$2"/var/cache/apt/archives/*
    (cd "$2/lib/modules" && ls) >"$2.kernels"
    # An initramfs gives up after 3 s, not 30, so that a test of one that must does not take long.
    [ ! -e "$2/usr/share/initramfs-tools/scripts/local" ] ||
        sed -i 's/slumber=[0-9]*/slumber=3/g' "$2/usr/share/initramfs-tools/scripts/local"
}

# One list of packages for the releases with systemd. The hook keeps the kernels' own initramfs small: it is made anew.
with_systemd() { # SUITE ROOT
    mmdebstrap --quiet --variant=minbase "${excluded[@]}" \
        --include=systemd-sysv,linux-image-amd64,linux-image-cloud-amd64,initramfs-tools,dracut-core,udev,kmod,zstd,lz4,lzop,bzip2,xz-utils,e2fsprogs,xfsprogs,btrfs-progs,lvm2,cpio,open-vm-tools,ifupdown,iproute2 \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
        --essential-hook='printf "MODULES=list\nCOMPRESS=gzip\n" >"$1/etc/initramfs-tools/conf.d/small"' \
        "$1" "$2"
    report_by_systemd "$2"
}

make_bookworm() { with_systemd bookworm "$1"; }
make_trixie() { with_systemd trixie "$1"; }

make_bullseye() {
    mmdebstrap --quiet --variant=minbase "${excluded[@]}" \
        --include=sysvinit-core,openrc,linux-image-amd64,initramfs-tools,udev,kmod,lz4,lzop,bzip2,xz-utils,e2fsprogs,cpio,ifupdown,iproute2 \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
        --essential-hook='printf "MODULES=list\nCOMPRESS=gzip\n" >"$1/etc/initramfs-tools/conf.d/small"' \
        bullseye "$1"
    report "$1"
    printf '#!/bin/sh\n/usr/local/sbin/matrix-report\nexit 0\n' >"$1/etc/rc.local"
    chmod 755 "$1/etc/rc.local"
}

make_i386() {
    command -v arch-test >/dev/null 2>&1 || { echo "no arch-test, by which mmdebstrap knows that i386 runs here"; return 1; }
    mmdebstrap --quiet --variant=minbase --architectures=i386 "${excluded[@]}" \
        --include=sysvinit-core,linux-image-686,initramfs-tools,udev,kmod,e2fsprogs,cpio,ifupdown,iproute2,grub-legacy \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
        --essential-hook='printf "MODULES=list\nCOMPRESS=gzip\n" >"$1/etc/initramfs-tools/conf.d/small"' \
        bullseye "$1" "deb http://deb.debian.org/debian bullseye main"
    report "$1"
    printf '#!/bin/sh\n/usr/local/sbin/matrix-report\nexit 0\n' >"$1/etc/rc.local"
    chmod 755 "$1/etc/rc.local"
}

for name in "${@:-bookworm}"; do
    tree=$dir/root/$name
    [ ! -e "$tree.kernels" ] || continue
    rm -rf "$tree" "$tree.log"
    "make_$name" "$tree" >"$tree.log" 2>&1 || { tail -5 "$tree.log" >&2; lacks "no $name (no mirror?)"; }
    finish "$name" "$tree"
done
