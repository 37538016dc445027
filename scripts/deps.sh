#!/usr/bin/env bash
# Installs what a make target needs and the machine lacks, by apt, tool by tool.
#
#   scripts/deps.sh demo|test|bench|bench-nbd|lint|lab
#
# A tool that is there is left alone, whatever its version, and nothing is removed. Without root, sudo or apt
# it says what is missing and goes on: every user of these tools can do without (and says so).
set -u

export PATH="$PATH:/usr/sbin:/sbin"
purpose=${1:-test}

# tool:package, the tool being the program whose absence means that the package is wanted.
build="cc:gcc ld:binutils pkg-config:pkg-config"
disk="mke2fs:e2fsprogs sfdisk:fdisk dpkg-deb:dpkg"
qemu="qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils"
nbd="nbdinfo:libnbd-bin nbdcopy:libnbd-bin nbdkit:nbdkit fio:fio nbd-server:nbd-server"
# Firmwares, and boot loaders for guests that are made by scripts/loader-image.sh.
boot="grub-mkimage:grub-common extlinux:extlinux mkfs.vfat:dosfstools mcopy:mtools objcopy:binutils debugfs:e2fsprogs"
# What tests/lab/kvm-lab needs; the kernel in it is fetched by the lab itself.
lab="qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio depmod:kmod readelf:binutils xz:xz-utils setpriv:util-linux mke2fs:e2fsprogs"
case $purpose in
    demo) wanted="$build $disk $qemu nbdcopy:libnbd-bin mmdebstrap:mmdebstrap cpio:cpio zstd:zstd busybox:busybox-static qemu-system-x86_64:qemu-system-x86" ;;
    test) wanted="$build $qemu bunzip2:bzip2 xz:xz-utils cryptsetup:cryptsetup-bin create_compressed_fs:cloop-utils bximage:bximage tar:tar prlimit:util-linux unshare:util-linux timeout:coreutils vhdiinfo:libvhdi-utils vmdkinfo:libvmdk-utils sfdisk:fdisk mke2fs:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs linux.uml:user-mode-linux mkntfs:ntfs-3g setfattr:attr hivexsh:libhivex-bin hivexregedit:libwin-hivex-perl mkfs.vfat:dosfstools mcopy:mtools sgdisk:gdisk pvcreate:lvm2 virsh:libvirt-clients xmllint:libxml2-utils fsck.fat:dosfstools mkswap:util-linux losetup:mount getfattr:attr mmdebstrap:mmdebstrap zstd:zstd lz4:lz4 lzma:xz-utils debugfs:e2fsprogs certtool:gnutls-bin $nbd $lab" ;;
    bench) wanted="$build $disk $qemu python3:python3 mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs losetup:mount mmdebstrap:mmdebstrap mkfs.vfat:dosfstools mcopy:mtools lvm:lvm2 zstd:zstd" ;;
    bench-nbd) wanted="$build $qemu python3:python3 fio:fio nbdkit:nbdkit" ;;
    lint) wanted="$build" ;;
    lab) wanted="$build $lab $disk $qemu lvm:lvm2 mkfs.vfat:dosfstools mkfs.xfs:xfsprogs" ;;
    *) echo "usage: deps.sh demo|test|bench|bench-nbd|lint|lab" >&2; exit 1 ;;
esac
case $purpose in test | bench) wanted="$wanted $boot" ;; esac

packages=""
missing=""
for pair in $wanted; do
    tool=${pair%%:*}
    command -v "$tool" >/dev/null 2>&1 && continue
    missing="$missing $tool"
    case " $packages " in *" ${pair#*:} "*) ;; *) packages="$packages ${pair#*:}" ;; esac
done
# The C headers have no program to look for.
if ! echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1; then
    missing="$missing libc-headers"
    packages="$packages libc6-dev"
fi
# Nor have firmwares and boot loaders: file:package.
if [ "$purpose" = test ] || [ "$purpose" = bench ]; then
    for pair in /usr/share/seabios/bios-256k.bin:seabios /usr/share/OVMF/OVMF_CODE_4M.fd:ovmf \
        /usr/lib/grub/i386-pc/boot.img:grub-pc-bin /usr/lib/grub/x86_64-efi/normal.mod:grub-efi-amd64-bin \
        /usr/lib/syslinux/mbr/mbr.bin:syslinux-common /usr/lib/systemd/boot/efi/linuxx64.efi.stub:systemd-boot-efi; do
        [ -e "${pair%%:*}" ] && continue
        missing="$missing ${pair##*:}"
        packages="$packages ${pair##*:}"
    done
fi
# Likewise OpenSSL's, for TLS with shared keys.
if [ "$purpose" != lab ] && ! echo '#include <openssl/ssl.h>' | cc -E - >/dev/null 2>&1; then
    missing="$missing openssl-headers"
    packages="$packages libssl-dev"
fi
# Python modules have none either; they are Debian's, for Debian's Python.
if [ "$purpose" = test ] && ! /usr/bin/python3 -c 'import nbd' >/dev/null 2>&1; then
    missing="$missing libnbd-for-python"
    packages="$packages python3-libnbd"
fi
# /usr/bin/time, not the shell's own word.
if [ "$purpose" = bench ] && [ ! -x /usr/bin/time ]; then
    missing="$missing time"
    packages="$packages time"
fi

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get "$@" </dev/null
}

# QEMU's packages go together: beside qemu-img from backports, the emulator of the distribution proper would
# throw qemu-img out. So what is missing of QEMU comes from where the rest has come from, and that suite is
# named to apt (in a file of its own) where nobody has done so.
suite=""
qemu_suite() {
    case $packages in *qemu*) ;; *) return ;; esac
    # shellcheck disable=SC2016 # dpkg's variable
    case $(dpkg-query -W -f '${Version} ' qemu-utils qemu-system-common 2>/dev/null) in *~bpo*) ;; *) return ;; esac
    # shellcheck disable=SC1091 # the machine's own
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    suite=$codename-backports
    apt-cache policy | grep -q "n=$suite" && return
    mirror=$(apt-cache policy | sed -n "s|^ *[0-9]* \([a-z]*:[^ ]*\) $codename/main .*|\1|p" | head -1)
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deps: naming $suite to apt, for qemu-utils comes from there"
    echo "deb $([ -e $keys ] && echo "[signed-by=$keys]") $mirror $suite main" |
        as_root tee /etc/apt/sources.list.d/vimg-backports.list >/dev/null
    apt update -qq >/dev/null 2>&1
}

install() {
    # shellcheck disable=SC2086 # a list of words
    apt install -y -qq --no-install-recommends --no-remove ${suite:+-t "$suite"} $packages >/dev/null 2>&1
}

if [ -n "$missing" ]; then
    echo "deps: missing:$missing"
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "deps: no apt here; going on without. Install what your system calls:$packages"
    elif [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
        echo "deps: neither root nor sudo; going on without. As root: apt-get install$packages"
    else
        echo "deps: installing$packages"
        qemu_suite
        install || { apt update -qq >/dev/null 2>&1; install; } \
            || echo "deps: apt-get could not install all of$packages; going on without"
    fi
fi

[ "$purpose" = lab ] && exit 0
# The compiler comes from rustup; Debian's is too old for the 2024 edition.
need=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml" | head -1)
have=$(cargo --version 2>/dev/null | cut -d' ' -f2)
if [ -z "$have" ]; then
    echo "deps: no cargo found; get Rust $need or newer from https://rustup.rs" >&2
    exit 1
elif [ "$(printf '%s\n%s\n' "$need" "${have%%-*}" | sort -V | head -1)" != "$need" ]; then
    echo "deps: cargo $have is too old; vimg needs Rust $need or newer (https://rustup.rs)" >&2
    exit 1
fi
exit 0
