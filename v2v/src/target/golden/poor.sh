#!/bin/sh
# Starts old with QEMU. Options of QEMU can follow: -snapshot, -display none -serial mon:stdio.
# QEMU=program  ACCEL=kvm|tcg  VIMG_BRIDGE=bridge (instead of QEMU's own network)  OVMF_CODE=file OVMF_VARS=file (firmware)
set -eu
cd -- "$(dirname -- "$0")"
qemu=${QEMU:-qemu-system-x86_64}
kvm_works() {
    [ -r /dev/kvm ] && [ -w /dev/kvm ] || return 1
    echo quit | "$qemu" -machine pc,accel=kvm -cpu host -m 64 -S -nodefaults -display none -monitor stdio \
        >/dev/null 2>&1
}
if [ -n "${ACCEL:-}" ]; then
    accel=$ACCEL
elif kvm_works; then
    accel=kvm
else
    accel=tcg
fi
if [ "$accel" = kvm ]; then cpu=host; else cpu=max; fi
if [ -n "${VIMG_BRIDGE:-}" ]; then net=bridge,br=$VIMG_BRIDGE; else net=user; fi
exec "$qemu" \
    -name guest=old \
    -machine pc,accel="$accel" \
    -cpu "$cpu" -smp 1 -m 2048M \
    -rtc base=utc \
    -drive if=none,id=disk0,format=qcow2,discard=unmap,file=/images/old.img \
    -device ide-hd,bus=ide.0,unit=0,drive=disk0,bootindex=1 \
    -nic none \
    -device virtio-rng-pci \
    -device virtio-balloon-pci \
    -usb -device usb-tablet \
    -vga std \
    "$@"
