#!/usr/bin/env bash
# The tour: builds a disk image with a real file system on the spot, takes it through
# raw -> qcow2 -> compressed qcow2 -> raw, and through the formats of other hypervisors, with vimg, and checks and compares every step, with vimg
# itself and, where it is installed, with qemu-img as an independent judge; serves it over NBD; and boots a Debian that came as a vmdk.
#
#   scripts/demo.sh [PATH/TO/vimg]
set -eu
set -o pipefail

cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C
vimg=$(realpath "${1:-target/release/vimg}")
work=target/demo
scripts=$PWD/scripts
fs_mib=640

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' off=$'\e[0m'; else bold='' dim='' green='' off=''; fi

say() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
have() { command -v "$1" >/dev/null 2>&1; }
now() { date +%s%N; }
human() { numfmt --to=iec-i --suffix=B --format=%.1f "$1"; }
on_disk() { du -B1 "$1" | cut -f1; }

# run COMMAND...: shows the command and how long it took; its output only if it fails.
run() {
    local shown="${*/#$vimg/vimg}" start status=0
    start=$(now)
    "$@" >command.log 2>&1 || status=$?
    printf '  $ %-66s %s%5d ms%s\n' "$shown" "$dim" "$((($(now) - start) / 1000000))" "$off"
    if [ "$status" != 0 ]; then
        cat command.log
        printf 'demo: this command failed with exit status %s\n' "$status" >&2
        exit 1
    fi
}

# judge COMMAND...: the same for the real qemu-img, if it is there.
judge() {
    if have qemu-img; then run qemu-img "$@"; else skipped_judge=yes; fi
}

size() {
    printf '    %-24s %10s on disk\n' "$1" "$(human "$(on_disk "$1")")"
}

# --- A file tree: the contents of some Debian packages, or of this machine where that is not possible.

from_packages() {
    have apt-get && have dpkg-deb || return 1
    mkdir -p packages
    local name
    (
        cd packages
        for name in bash coreutils perl-base perl-modules-5.36 git vim-runtime tzdata libicu72 busybox-static; do
            apt-cache show "$name" >/dev/null 2>&1 || continue
            ls "${name}"_*.deb >/dev/null 2>&1 || timeout 20 apt-get -qq download "$name" >/dev/null 2>&1 || return 1
        done
    ) || return 1
    ls packages/*.deb >/dev/null 2>&1 || return 1
    local deb
    for deb in packages/*.deb; do dpkg-deb -x "$deb" tree || return 1; done
}

from_this_machine() {
    mkdir -p tree/usr/share
    local limit=$((250 * 1024 * 1024)) total=0 bytes dir
    for dir in /usr/share/*/; do
        bytes=$(du -sb "$dir" 2>/dev/null | cut -f1)
        [ $((total + bytes)) -lt "$limit" ] || continue
        cp -a "$dir" tree/usr/share/ 2>/dev/null || true
        total=$((total + bytes))
    done
}

build_tree() {
    rm -rf tree
    mkdir -p tree
    if from_packages; then
        source_of_files="$(find packages -name '*.deb' | wc -l) Debian packages"
    else
        rm -rf tree
        from_this_machine
        source_of_files="/usr/share of this machine"
    fi
    # Something that does not compress, as every real disk has.
    mkdir -p tree/var/lib
    head -c $((24 * 1024 * 1024)) /dev/urandom >tree/var/lib/random-seed.bin
}

# --- A disk: one partition from 1 MiB on, an ext4 in it.

build_disk() {
    rm -f disk.raw
    truncate -s $(((fs_mib + 2) * 1024 * 1024)) disk.raw
    if have sfdisk; then
        printf 'label: gpt\nstart=2048, size=%d, type=linux, name="root"\n' $((fs_mib * 2048)) | sfdisk -q disk.raw
        table=GPT
    else
        # One entry of a DOS partition table: type 0x83 from sector 2048.
        local sectors
        sectors=$(printf '%08x' $((fs_mib * 2048)))
        # shellcheck disable=SC2059 # the format is the data
        printf "\\x00\\x00\\x02\\x00\\x83\\xff\\xff\\xff\\x00\\x08\\x00\\x00\\x${sectors:6:2}\\x${sectors:4:2}\\x${sectors:2:2}\\x${sectors:0:2}" \
            | dd of=disk.raw bs=1 seek=446 conv=notrunc status=none
        printf '\x55\xaa' | dd of=disk.raw bs=1 seek=510 conv=notrunc status=none
        table=MBR
    fi
    if have mke2fs; then
        mke2fs -q -F -t ext4 -L demo -d tree -E offset=$((1024 * 1024)) disk.raw ${fs_mib}M
        filesystem=ext4
    else
        tar -C tree -cf - . | dd of=disk.raw bs=1M seek=1 conv=notrunc status=none
        filesystem="tar archive (no mke2fs here)"
    fi
}

[ -x "$vimg" ] || { echo "demo: no vimg at $vimg; run 'make demo'" >&2; exit 1; }
started=$(now)
mkdir -p "$work"
cd "$work"
rm -f ./*.qcow2 ./*.raw ./*.vmdk ./*.vhdx ./*.vdi ./*.vpc ./*.ova

say "1. A real disk image"
build_tree
files=$(find tree -type f | wc -l)
build_disk
printf '  %s files from %s, on %s in a %s partition:\n' "$files" "$source_of_files" "$filesystem" "$table"
printf '    %-24s %10s, of which %s on disk\n' disk.raw "$(human "$(stat -c %s disk.raw)")" "$(human "$(on_disk disk.raw)")"
rm -rf tree

say "2. raw -> qcow2"
run "$vimg" convert -f raw -O qcow2 disk.raw disk.qcow2
run "$vimg" check disk.qcow2
run "$vimg" compare -f raw -F qcow2 disk.raw disk.qcow2
judge check disk.qcow2
judge compare -f raw -F qcow2 disk.raw disk.qcow2
size disk.qcow2

say "3. qcow2 -> compressed qcow2 (zlib and zstd)"
run "$vimg" convert -O qcow2 -c disk.qcow2 small.qcow2
run "$vimg" convert -O qcow2 -c -o compression_type=zstd disk.qcow2 zstd.qcow2
for image in small.qcow2 zstd.qcow2; do
    run "$vimg" check $image
    run "$vimg" compare disk.qcow2 $image
    judge check $image
    judge compare disk.qcow2 $image
done
size small.qcow2
size zstd.qcow2

say "4. compressed qcow2 -> raw"
run "$vimg" convert -O raw small.qcow2 back.raw
run cmp disk.raw back.raw
size back.raw

if have e2fsck && [ "$filesystem" = ext4 ]; then
    say "5. Is the file system in it still whole?"
    dd if=back.raw of=fs.raw bs=1M skip=1 count=$fs_mib conv=sparse status=none
    run e2fsck -f -n fs.raw
    rm -f fs.raw
fi

say "6. Snapshots, overlays, a damaged image, a digest"
run "$vimg" snapshot -c before disk.qcow2
run "$vimg" create -f qcow2 -b disk.qcow2 -F qcow2 overlay.qcow2
run "$vimg" bench -w -c 500 -s 64k --pattern 7 overlay.qcow2
run "$vimg" commit overlay.qcow2
run "$vimg" snapshot -a before disk.qcow2
run "$vimg" compare -f raw disk.raw disk.qcow2
printf '    (the header of a copy is made to name a refcount table that is not one)\n'
cp disk.qcow2 damaged.qcow2
printf '\0\0\0\0\0\1\0\0' | dd of=damaged.qcow2 bs=1 seek=48 conv=notrunc status=none
run "$vimg" check -q -r all damaged.qcow2
judge check damaged.qcow2
run "$vimg" compare -f raw disk.raw damaged.qcow2
"$vimg" checksum disk.raw disk.qcow2 small.qcow2 damaged.qcow2 | sed 's/^/    /'

say "7. Encrypted"
printf 'the only copy of a server' >passphrase
secret=(--object "secret,id=s0,file=passphrase")
run "$vimg" convert -O luks -o key-secret=s0,iter-time=200 "${secret[@]}" disk.qcow2 secret.luks
run "$vimg" compare "${secret[@]}" --image-opts driver=raw,file.filename=disk.raw driver=luks,key-secret=s0,file.filename=secret.luks
if have cryptsetup; then run cryptsetup open --test-passphrase --key-file passphrase secret.luks; fi
size secret.luks
rm -f damaged.qcow2 overlay.qcow2 secret.luks passphrase

say "8. The formats of other hypervisors"
run "$vimg" convert -O vmdk -o subformat=streamOptimized disk.qcow2 disk1.vmdk
judge compare -f raw -F vmdk disk.raw disk1.vmdk
printf '<Envelope/>\n' >demo.ovf
run tar -cf demo.ova demo.ovf disk1.vmdk
run "$vimg" convert -O qcow2 demo.ova:disk1.vmdk from-ova.qcow2
run "$vimg" compare -f raw disk.raw from-ova.qcow2
for format in vmdk vhdx vdi vpc; do
    options=()
    [ $format != vpc ] || options=(-o force_size=on)
    run "$vimg" convert -O $format "${options[@]}" disk.qcow2 disk.$format
    run "$vimg" compare -f raw -F $format disk.raw disk.$format
    judge compare -f raw -F $format disk.raw disk.$format
done
size disk1.vmdk
printf '    (the first grain directory of the vmdk is made to point nowhere; the second one remains)\n'
gd=$(od -An -t u8 -j 56 -N 8 disk.vmdk | tr -d ' ')
printf '\377\377\377\17' | dd of=disk.vmdk bs=1 seek=$((gd * 512)) conv=notrunc status=none
run "$vimg" check -q -r all disk.vmdk
judge compare -f raw -F vmdk disk.raw disk.vmdk
rm -f disk.vmdk disk.vhdx disk.vdi disk.vpc demo.ova demo.ovf from-ova.qcow2

say "9. Served over NBD"
socket=$PWD/demo.sock
rm -f "$socket"
# As a path in a URI, whatever folder this is.
uri="nbd+unix:///?socket=$(printf %s "$socket" | sed 's/%/%25/g; s/ /%20/g')"
run "$vimg" serve --fork --pid-file serve.pid --socket "$socket" --overlay small.qcow2
trap 'kill "$(cat serve.pid)" 2>/dev/null || true' EXIT
if have nbdcopy; then
    run nbdcopy "$uri" served.raw
elif have qemu-img; then
    run qemu-img convert -f raw -O raw "$uri" served.raw
else
    printf '    (neither nbdcopy nor qemu-img to read it back)\n'
fi
if [ -e served.raw ]; then
    run cmp disk.raw served.raw
    "$vimg" checksum small.qcow2 served.raw | sed 's/^/    /'
    rm -f served.raw
fi

say "10. Booted"
# A Debian made on the spot, as the other hypervisor might have left it: a vmdk.
guests=../guests
if bash "$scripts/guest-image.sh" "$guests" 2>guest.log; then
    run "$vimg" convert -f raw -O vmdk "$guests/debian.raw" server.vmdk
    run "$vimg" inspect server.vmdk
    run "$vimg" v2v -o . --name server --overwrite --no-nic-names --target libvirt,qemu server.vmdk
    mv server-sda.qcow2 server.qcow2
    if "$vimg" doctor >doctor.log; then
        "$vimg" checksum server.qcow2 >before.sum
        printf '  $ vimg bootcheck server.qcow2\n'
        "$vimg" bootcheck --timeout 600 server.qcow2 2>bootcheck.log | sed 's/^/    /' || {
            cat bootcheck.log
            printf 'demo: the guest did not boot\n' >&2
            exit 1
        }
        run "$vimg" checksum -c before.sum
    else
        printf '    (nothing here can boot it: %s)\n' "$(tail -1 doctor.log)"
    fi
    rm -f server.vmdk doctor.log bootcheck.log before.sum
else
    printf '    (no guest to boot: %s)\n' "$(tail -1 guest.log)"
fi
rm -f guest.log

say "What vimg says of the compressed image"
"$vimg" info small.qcow2 | sed 's/^/  /'

[ -z "${skipped_judge:-}" ] || printf '\n(qemu-img is not installed: only vimg itself and cmp have judged.)\n'
rm -f command.log
printf '\n%sdemo: success.%s The disk went raw -> qcow2 -> compressed qcow2 -> raw and came back bit for bit, in %d s; the images are in %s.\n' \
    "$green" "$off" "$((($(now) - started) / 1000000000))" "$work"
