#!/bin/bash
# vimg p2v --snapshot on a real machine: in the lab (tests/lab), which has the device mapper, with a disk in memory that is
# written to all the time. Usage: p2v-lab.sh VIMG
#
# Two volumes of LVM (ext4, XFS), /boot (ext4) and an ESP (FAT) on plain partitions. A writer counts, first in one volume, then in
# the other: in a copy of one moment the first is ahead by one or not at all.
# shellcheck disable=SC2015,SC2016,SC2317
set -eu
if [ "${1:-}" != --inside ]; then
    vimg=$(realpath "${1:?vimg}")
    here=$(realpath "$(dirname "$0")")
    exec "${VIMG_LAB:-$here/../tests/lab/kvm-lab}" --mem 3072 --timeout 1500 -- bash "$here/p2v-lab.sh" --inside "$vimg"
fi
vimg=$2
export DM_DISABLE_UDEV=1 LC_ALL=C
say() { echo "p2v-lab: $*"; }
die() { echo "p2v-lab: FAILED: $*" >&2; exit 1; }
mkdir -p /tmp/lvm /tmp/m /tmp/out
printf 'devices {\n use_devicesfile=0\n}\nactivation {\n udev_sync=0\n udev_rules=0\n monitoring=0\n}\n' > /tmp/lvm/lvm.conf
export LVM_SYSTEM_DIR=/tmp/lvm
# The device mapper's snapshots, a disk, file systems.
for module in dm-snapshot sd_mod scsi_debug xfs vfat nls_cp437 nls_ascii; do
    case $module in scsi_debug) modprobe scsi_debug dev_size_mb=700 delay=0 ;; *) modprobe $module 2>/dev/null || : ;; esac
done
for _ in $(seq 100); do ls -d /sys/block/sd? >/dev/null 2>&1 && break; sleep 0.1; done
disk=$(basename "$(ls -d /sys/block/sd? | head -1)")
printf 'label: gpt\nstart=1MiB, size=32MiB, type=U\nsize=48MiB, type=L\ntype=E6D6D379-F507-44C2-A23C-238F2A3DF928\n' |
    sfdisk -q "/dev/$disk"
for _ in $(seq 100); do [ -e "/dev/${disk}3" ] && break; sleep 0.1; done
mkfs.vfat "/dev/${disk}1" >/dev/null
mke2fs -q -t ext4 "/dev/${disk}2"
lvm pvcreate -q -y "/dev/${disk}3" >/dev/null
lvm vgcreate -q -s 1M my-vg "/dev/${disk}3" >/dev/null
lvm lvcreate -q -y -Wn -L 100M -n root my-vg >/dev/null
lvm lvcreate -q -y -Wn -L 304M -n va-r my-vg >/dev/null
root=/dev/my-vg/root var=/dev/my-vg/va-r
mke2fs -q -t ext4 $root; mkfs.xfs -q $var
mkdir -p /tmp/m/root /tmp/m/var /boot/efi
mount $root /tmp/m/root; mount $var /tmp/m/var; mount "/dev/${disk}2" /boot; mkdir -p /boot/efi; mount "/dev/${disk}1" /boot/efi
mkdir -p /boot/efi/EFI; echo loader > /boot/efi/EFI/x; echo kernel > /boot/vmlinuz
head -c 8M /dev/urandom > /tmp/m/root/still; cp /tmp/m/root/still /tmp/m/var/still; sync
lvm lvs --noheadings -o vg_name,lv_name,lv_uuid,seg_type,seg_pe_ranges > /tmp/before
lvm vgs --noheadings -o vg_seqno,vg_free > /tmp/before.vg
sum=$(md5sum < /tmp/m/root/still)

writer() { # counts, and overwrites files all the time
    local n=0
    while :; do
        n=$((n + 1))
        printf '%08d' $n | dd of=/tmp/m/root/count conv=notrunc,fsync status=none
        printf '%08d' $n | dd of=/tmp/m/var/count conv=notrunc,fsync status=none
        dd if=/dev/urandom of=/tmp/m/root/churn bs=64k count=2 seek=$((n % 64 * 2)) conv=notrunc status=none
        cp /tmp/m/root/churn "/tmp/m/var/churn$((n % 4))"
        sleep 0.05
    done
}
clean() { # nothing is left on the machine
    for _ in $(seq 60); do
        lvm lvs --noheadings -o lv_name 2>/dev/null | grep -q vimg_p2v || { clean_dm; return; }
        sleep 0.5
    done
    die "snapshots are left: $(lvm lvs 2>&1)"
}
clean_dm() { ! dmsetup ls | grep -q 'vimg\|real\|cow' || die "left: $(dmsetup ls)"; timeout 60 touch /tmp/m/root/x /tmp/m/var/x /boot/x || die "frozen"; }
writing() { writer & pid=$!; disown $pid; }
resting() { kill $pid; wait $pid 2>/dev/null || :; while kill -0 $pid 2>/dev/null; do sleep 0.1; done; }

say "a copy while two volumes are written to"
writing
"$vimg" -v p2v --snapshot -o /tmp/out/one "$disk" > /tmp/log 2>&1 || { cat /tmp/log >&2; die "the copy"; }
resting; cat /tmp/log; clean
lvm lvs --noheadings -o vg_name,lv_name,lv_uuid,seg_type,seg_pe_ranges | cmp - /tmp/before || die "the volumes are others"

say "it overflows"
writing
if "$vimg" p2v --snapshot --snapshot-size 1% --rate 1M -o /tmp/out/two "$disk" > /tmp/log 2>&1; then
    cat /tmp/log >&2; die "a copy of a snapshot that overflowed"
fi
resting; cat /tmp/log
grep -q overflowed /tmp/log || die "another reason"
[ ! -e /tmp/out/two/machine.json ] && [ -z "$(ls /tmp/out/two/*.qcow2 2>/dev/null)" ] || die "it looks complete"
clean

say "the same command goes on, with more room, and is killed"
"$vimg" p2v --snapshot --rate 4M -o /tmp/out/two "$disk" > /tmp/log 2>&1 & copy=$!
for _ in $(seq 300); do lvm lvs --noheadings -o lv_name | grep -q vimg_p2v_va-r && break; sleep 0.2; done
for _ in $(seq 600); do [ "$(grep -o '":"[0-9a-f]\{64\}"' /tmp/out/two/.vimg-p2v-state.json | wc -l)" -ge 8 ] && break; sleep 0.2; done
kill -9 $copy; wait $copy 2>/dev/null || :; clean

say "refusals"
lvm lvcreate -q -y -s -n vimg_p2v_root -L 8M my-vg/root >/dev/null
refused() { # TEXT WORDS...
    local text=$1; shift
    if "$vimg" p2v "$@" -o /tmp/out/no "$disk" > /tmp/log 2>&1; then die "not refused: $*"; fi
    grep -q -- "$text" /tmp/log || { cat /tmp/log >&2; die "no '$text'"; }
}
refused 'my-vg/vimg_p2v_root' --snapshot
lvm lvremove -q -f my-vg/vimg_p2v_root >/dev/null
lvm lvcreate -q -y -s -n own -L 8M my-vg/root >/dev/null
refused 'root has other snapshots' --snapshot
lvm lvremove -q -f my-vg/own >/dev/null
refused 'smaller --snapshot-size' --snapshot --snapshot-size 90%
lvm lvcreate -q -y -Wn -l 100%FREE -n all my-vg >/dev/null
refused 'my-vg has 0' --snapshot
lvm lvremove -q -f my-vg/all >/dev/null
mkdir -p /tmp/m/data; umount /boot/efi; mount "/dev/${disk}1" /tmp/m/data
refused "no snapshot can be taken of ${disk}1 on /tmp/m/data (not on a logical volume)" --snapshot
umount /tmp/m/data; mount "/dev/${disk}1" /boot/efi

say "it goes on"
"$vimg" p2v --snapshot -o /tmp/out/two "$disk" > /tmp/log 2>&1 || { cat /tmp/log >&2; die "the third run"; }
cat /tmp/log; grep -q 'were there already' /tmp/log || die "it began anew"
clean
qemu-img check -q /tmp/out/two/"$disk".qcow2 || die "the image"

say "everything frozen, the ESP with it"
"$vimg" -v p2v --freeze -o /tmp/out/three "$disk" > /tmp/log 2>&1 || { cat /tmp/log >&2; die "--freeze"; }
cat /tmp/log; clean_dm

umount /boot/efi /boot /tmp/m/root /tmp/m/var; lvm vgchange -q -an my-vg >/dev/null
rm -rf /tmp/out/three
for copy in one two; do
    say "the copy $copy"
    qemu-img convert -O raw "/tmp/out/$copy/$disk.qcow2" /tmp/copy.raw; rm "/tmp/out/$copy/$disk.qcow2"
    loop=$(losetup --show -P -f /tmp/copy.raw)
    printf 'devices {\n filter=["a|^%sp|","r|.*|"]\n use_devicesfile=0\n}\nactivation {\n udev_sync=0\n udev_rules=0\n monitoring=0\n}\n' \
        "$loop" > /tmp/lvm/lvm.conf
    lvm lvs --noheadings -o vg_name,lv_name,lv_uuid,seg_type,seg_pe_ranges | sed "s|${loop}p3|/dev/${disk}3|g" > /tmp/now
    cmp /tmp/now /tmp/before || { cat /tmp/now /tmp/before; die "the copy's volumes"; }
    [ "$copy" = two ] || lvm vgs --noheadings -o vg_seqno,vg_free | cmp - /tmp/before.vg || die "the copy's metadata are not of before"
    lvm vgchange -q -ay my-vg >/dev/null
    e2fsck -fn $root >/dev/null 2>&1 || die "ext4: $(e2fsck -fn $root)"
    e2fsck -fn "${loop}p2" >/dev/null 2>&1 || die "/boot"
    # It was mounted, and says so.
    fsck.vfat -n "${loop}p1" > /tmp/fsck || grep -q 'Dirty bit' /tmp/fsck || die "the ESP: $(cat /tmp/fsck)"
    mount $root /tmp/m/root; mount $var /tmp/m/var; mount -o ro "${loop}p2" /boot; mount -o ro "${loop}p1" /boot/efi
    [ "$(md5sum < /tmp/m/root/still)$(md5sum < /tmp/m/var/still)" = "$sum$sum" ] || die "contents"
    [ "$(cat /boot/efi/EFI/x /boot/vmlinuz)" = "$(printf 'loader\nkernel')" ] || die "/boot"
    one=$((10#$(cat /tmp/m/root/count))) other=$((10#$(cat /tmp/m/var/count)))
    say "counted to $one and $other"
    [ $((one - other)) = 0 ] || [ $((one - other)) = 1 ] || die "not of one moment"
    umount /boot/efi /boot /tmp/m/root /tmp/m/var
    xfs_repair -n $var >/dev/null 2>&1 || die "XFS: $(xfs_repair -n $var 2>&1)"
    lvm vgchange -q -an my-vg >/dev/null; losetup -d "$loop"
done
say "all is well"
