#!/usr/bin/env bash
# Installs what a make target needs and the machine lacks, by apt, tool by tool.
#
#   scripts/deps.sh demo|test|bench|lint
#
# A tool that is there is left alone, whatever its version. Without root, sudo or apt it says what is
# missing and goes on: every user of these tools can do without (and says so).
set -u

export PATH="$PATH:/usr/sbin:/sbin"
purpose=${1:-test}

# tool:package, the tool being the program whose absence means that the package is wanted.
build="cc:gcc ld:binutils"
disk="mke2fs:e2fsprogs sfdisk:fdisk dpkg-deb:dpkg"
qemu="qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils"
case $purpose in
    demo) wanted="$build $disk $qemu" ;;
    test) wanted="$build $qemu bunzip2:bzip2 xz:xz-utils cryptsetup:cryptsetup-bin create_compressed_fs:cloop-utils bximage:bximage tar:tar prlimit:util-linux unshare:util-linux timeout:coreutils vhdiinfo:libvhdi-utils vmdkinfo:libvmdk-utils" ;;
    bench) wanted="$build $disk $qemu python3:python3 mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs losetup:mount" ;;
    lint) wanted="$build" ;;
    *) echo "usage: deps.sh demo|test|bench|lint" >&2; exit 1 ;;
esac

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
# /usr/bin/time, not the shell's own word.
if [ "$purpose" = bench ] && [ ! -x /usr/bin/time ]; then
    missing="$missing time"
    packages="$packages time"
fi

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

install() {
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages \
        >/dev/null 2>&1 </dev/null
}

if [ -n "$missing" ]; then
    echo "deps: missing:$missing"
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "deps: no apt here; going on without. Install what your system calls:$packages"
    elif [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
        echo "deps: neither root nor sudo; going on without. As root: apt-get install$packages"
    else
        echo "deps: installing$packages"
        install || { as_root apt-get update -qq >/dev/null 2>&1; install; } \
            || echo "deps: apt-get could not install all of$packages; going on without"
    fi
fi

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
