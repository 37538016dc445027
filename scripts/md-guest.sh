#!/usr/bin/env bash
# Makes a guest whose /boot and root lie on software RAID over two disks, as physical servers have it, out of the Debian for VMware of
# scripts/v2v-guests.sh.
#
#   scripts/md-guest.sh GUESTS DIR
#
# GUESTS is what v2v-guests.sh has made. DIR then holds disk1.raw and disk2.raw: BIOS, GRUB behind the MBR of both, which reads
# its modules from (mduuid/..); /dev/md0 (RAID 1, metadata 1.0) is /boot, /dev/md1 (RAID 1, metadata 1.2, a write-intent bitmap) is
# the root; fstab and the command line by these names; no driver of KVM's in the initramfs.
#
# Needs root (loop devices, chroot), the lab (tests/lab/kvm-lab: a kernel with md), a Debian mirror for the package mdadm, mdadm,
# mke2fs, sfdisk, grub-mkimage with GRUB's modules for i386-pc. Exit code 3: something of that is missing; said on standard error.
set -eu

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8
here=$(cd "$(dirname "$0")" && pwd)
guests=$(realpath "${1:?usage: md-guest.sh GUESTS DIR}")
dir=${2:?usage: md-guest.sh GUESTS DIR}
lab=${VIMG_LAB:-$here/../tests/lab/kvm-lab}
mkdir -p "$dir"
dir=$(realpath "$dir")

lacks() { echo "md-guest: $1" >&2; exit 3; }
[ -e "$guests/vmware.raw" ] || lacks "no guests in $guests (scripts/v2v-guests.sh)"
for tool in mdadm mke2fs sfdisk losetup grub-mkimage dpkg; do
    command -v "$tool" >/dev/null 2>&1 || lacks "no $tool on this machine"
done
pc=/usr/lib/grub/i386-pc
[ -e $pc/mdraid1x.mod ] || lacks "no GRUB for BIOS (Debian: grub-pc-bin)"
[ "$(id -u)" = 0 ] || lacks "needs root"
work=$(mktemp -d "$dir/work.XXXXXX")
mounted=
trap '[ -z "$mounted" ] || umount "$mounted"; rm -rf "$work"' EXIT
# shellcheck source=scripts/disk-parts.sh
. "$here/disk-parts.sh"

boot_uuid=0f5e7b0a:6a554f6c:8f0e3f1c:4d6b9b00 root_uuid=0f5e7b0a:6a554f6c:8f0e3f1c:4d6b9b01
boot_fs=0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9b02 root_fs=0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9b03

# --- The guest's files. ---
mkdir "$work/mount" "$work/root"
mount -o ro,loop,offset=$((2048 * 512)) "$guests/vmware.raw" "$work/mount"
mounted=$work/mount
cp -a "$work/mount/." "$work/root"
umount "$work/mount"
mounted=
root=$work/root
(cd "$work" && apt-get -qq download mdadm) || lacks "no package mdadm to be had"
cp "$work"/mdadm_*.deb "$root/tmp/mdadm.deb"
rm -f "$root/etc/initramfs-tools/conf.d/resume"
DEBIAN_FRONTEND=noninteractive chroot "$root" dpkg --force-depends -i /tmp/mdadm.deb >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "mdadm cannot be installed in the guest"; }
rm "$root/tmp/mdadm.deb"
# It waits long enough to start an array without one of its members.
sed -i 's/slumber=3\b/slumber=30/g' "$root/usr/share/initramfs-tools/scripts/local"
echo server >"$root/etc/hostname"
printf '/dev/md1 / ext4 errors=remount-ro 0 1\n/dev/md0 /boot ext4 defaults 0 2\n' >"$root/etc/fstab"
printf 'HOMEHOST <system>\nMAILADDR root\nARRAY /dev/md/0 metadata=1.0 UUID=%s name=server:0\nARRAY /dev/md/1 metadata=1.2 UUID=%s name=server:1\n' \
    $boot_uuid $root_uuid >"$root/etc/mdadm/mdadm.conf"
version=$(cd "$root/boot" && ls vmlinuz-* | sort -V | tail -1)
version=${version#vmlinuz-}
printf '%s\n' ahci ata_piix ata_generic sd_mod mptspi mptsas ext4 raid1 >"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k "$version" >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "no initramfs"; }
sed -e 's#/dev/sda1#/dev/md1#g' -e "s#set root='hd0,msdos1'#insmod diskfilter\n\tinsmod mdraid1x\n\tset root='mduuid/${boot_uuid//:/}'\n\tsearch --no-floppy --fs-uuid --set=root --hint='mduuid/${boot_uuid//:/}' $boot_fs#" \
    -e 's#/boot/\(vmlinuz\|initrd\)#/\1#g' -i "$root/boot/grub/grub.cfg"
mkdir "$work/boot"
cp -a "$root/boot/." "$work/boot"
rm -rf "$root/boot"
mkdir "$root/boot"

# --- Two disks, and the superblocks that mdadm writes on them. ---
for disk in disk1 disk2; do
    rm -f "$dir/$disk.raw"
    truncate -s 900M "$dir/$disk.raw"
    printf 'label: dos\n1 : start=2048, size=%d, type=fd, bootable\n2 : start=%d, size=%d, type=fd\n' \
        $((120 * 2048)) $((121 * 2048)) $((760 * 2048)) | sfdisk -q "$dir/$disk.raw"
done
cat >"$work/arrays.sh" <<ARRAYS
set -e
modprobe raid1 || true
cd $dir
one=\$(losetup -P -f --show disk1.raw) two=\$(losetup -P -f --show disk2.raw)
mdadm --create /dev/md0 --run --assume-clean -e 1.0 -l 1 -n 2 -b none --homehost=server --name=0 --uuid=$boot_uuid \${one}p1 \${two}p1
mdadm --create /dev/md1 --run --assume-clean -e 1.2 -l 1 -n 2 -b internal --homehost=server --name=1 --uuid=$root_uuid \${one}p2 \${two}p2
echo \$((\$(cat /sys/block/md0/size) / 2048)) \$((\$(cat /sys/block/md1/size) / 2048)) >$dir/sizes
mdadm --stop /dev/md0
mdadm --stop /dev/md1
losetup -d \$one \$two
sync
ARRAYS
(cd "$dir" && "$lab" -- bash "$work/arrays.sh") >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "the lab cannot make arrays"; }
read -r boot_mib root_mib <"$dir/sizes"
rm "$dir/sizes"
file_system ext4 $boot_fs "$boot_mib" "$work/boot" "$work/boot.ext4"
file_system ext4 $root_fs "$root_mib" "$root" "$work/root.ext4"
for disk in disk1 disk2; do
    out=$dir/$disk.raw
    put "$work/boot.ext4" "$out" 2048
    offset=$(dd if="$out" bs=512 skip=$((121 * 2048)) count=32 status=none | od -An -tu8 -j $((4096 + 128)) -N 8)
    put "$work/root.ext4" "$out" $((121 * 2048 + offset))
    grub_bios "$out" 1 "(mduuid/${boot_uuid//:/})/grub" part_msdos ext2 diskfilter mdraid1x
done
