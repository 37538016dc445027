#!/bin/sh
# Starts web & "db" with QEMU. Options of QEMU can follow: -snapshot, -display none -serial mon:stdio.
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
code=${OVMF_CODE:-} vars=${OVMF_VARS:-}
if [ -z "$code" ] && [ -e /usr/share/OVMF/OVMF_CODE_4M.secboot.fd ] && [ -e /usr/share/OVMF/OVMF_VARS_4M.ms.fd ]; then code=/usr/share/OVMF/OVMF_CODE_4M.secboot.fd vars=${vars:-/usr/share/OVMF/OVMF_VARS_4M.ms.fd}; fi
if [ -z "$code" ] && [ -e /usr/share/edk2/ovmf/OVMF_CODE.secboot.fd ] && [ -e /usr/share/edk2/ovmf/OVMF_VARS.secboot.fd ]; then code=/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd vars=${vars:-/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd}; fi
if [ -z "$code" ] && [ -e /usr/share/qemu/ovmf-x86_64-smm-ms-code.bin ] && [ -e /usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin ]; then code=/usr/share/qemu/ovmf-x86_64-smm-ms-code.bin vars=${vars:-/usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin}; fi
if [ -z "$code" ] || [ -z "$vars" ]; then
    echo "$0: no UEFI firmware found; install the package ovmf, or set OVMF_CODE and OVMF_VARS" >&2
    exit 1
fi
if [ ! -e './web & "db".vars.fd' ]; then cp -- "$vars" './web & "db".vars.fd'.new && chmod u+w './web & "db".vars.fd'.new && mv -- './web & "db".vars.fd'.new './web & "db".vars.fd'; fi
if [ -n "${VIMG_BRIDGE:-}" ]; then net=bridge,br=$VIMG_BRIDGE; else net=user; fi
exec "$qemu" \
    -name 'guest=web & "db"' \
    -machine q35,accel="$accel",smm=on \
    -cpu "$cpu" -smp 4,sockets=1,cores=2,threads=2 -m 3073M \
    -uuid 564d1234-5678-9abc-def0-123456789abc \
    -device vmgenid,guid=564d1234-5678-9abc-def0-123456789abd \
    -rtc base=localtime \
    -drive "if=pflash,unit=0,format=raw,readonly=on,file=$code" \
    -drive 'if=pflash,unit=1,format=raw,file=./web & "db".vars.fd' \
    -global driver=cfi.pflash01,property=secure,value=on \
    -device virtio-scsi-pci,id=scsi0 \
    -drive 'if=none,id=disk0,format=qcow2,discard=unmap,file=./it'\''s,, 1.qcow2' \
    -device virtio-blk-pci,drive=disk0,bootindex=2 \
    -drive if=none,id=disk1,format=qcow2,discard=unmap,file=./b.qcow2 \
    -device scsi-hd,bus=scsi0.0,scsi-id=0,drive=disk1,bootindex=1,serial=VM-0001x \
    -drive if=none,id=disk2,format=qcow2,discard=unmap,readonly=on,file=./c.qcow2 \
    -device ide-hd,bus=ide.0,drive=disk2,bootindex=3 \
    -device ide-cd,bus=ide.1 \
    -device isa-fdc,id=fdc -device floppy,bus=fdc.0,unit=0 \
    -netdev "$net,id=net0" \
    -device virtio-net-pci,netdev=net0,mac=00:0c:29:aa:bb:01 \
    -netdev "$net,id=net1" \
    -device virtio-net-pci,netdev=net1 \
    -device virtio-rng-pci \
    -device virtio-balloon-pci \
    -device qemu-xhci -device usb-tablet \
    -vga std \
    "$@"
