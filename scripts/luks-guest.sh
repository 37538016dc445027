#!/usr/bin/env bash
# Makes a Debian as its installer's "encrypted LVM" leaves it on a VMware machine, once, in a directory.
#
#   scripts/luks-guest.sh DIR
#
# DIR then holds (about 0.8 GB on disk):
#
#   luks-lvm.raw    BIOS, GRUB behind the MBR; /boot on ext4 on /dev/sda1; in the extended partition /dev/sda5, LUKS2
#                   (argon2id, 64 MiB), with the group debian-vg in it: root and swap; crypttab and the initramfs call it
#                   sda5_crypt; an initramfs with VMware's drivers only; the passphrase is "correct horse"
#   .complete       this script's own checksum
#
# root has no password. Needs root (mmdebstrap, a loop device for LVM), a Debian mirror, and the tools below; no
# device-mapper: cryptsetup encrypts a file in place. Exit code 3: something of that is missing; said on standard error.
set -eu

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: luks-guest.sh DIR}
mkdir -p "$dir"
dir=$(realpath "$dir")
exec 9>"$dir/lock"
flock 9

sum=$(cat "$0" "$here/disk-parts.sh" | sha256sum | cut -c1-16)
if [ "$(cat "$dir/.complete" 2>/dev/null)" = "$sum" ]; then exit 0; fi

lacks() { echo "luks-guest: $1" >&2; exit 3; }
for tool in mmdebstrap grub-mkimage mke2fs mkswap sfdisk losetup lvm truncate dd cryptsetup; do
    command -v "$tool" >/dev/null 2>&1 || lacks "no $tool on this machine"
done
pc=/usr/lib/grub/i386-pc
[ -e $pc/boot.img ] || lacks "no GRUB for BIOS (Debian: grub-pc-bin)"
[ "$(id -u)" = 0 ] || lacks "needs root"

rm -f "$dir"/*.raw "$dir/.complete"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# shellcheck source=scripts/disk-parts.sh
. "$here/disk-parts.sh"

root=$work/root
luks_uuid=0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9a11
boot_uuid=0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9a12
excluded=()
for path in '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*' \
    '/lib/modules/*/kernel/sound/*' '/lib/modules/*/kernel/drivers/gpu/*' '/lib/modules/*/kernel/drivers/media/*' \
    '/lib/modules/*/kernel/drivers/infiniband/*' '/lib/modules/*/kernel/drivers/net/wireless/*' \
    '/lib/modules/*/kernel/drivers/staging/*' '/lib/modules/*/kernel/drivers/iio/*' '/lib/modules/*/kernel/drivers/isdn/*' \
    '/lib/modules/*/kernel/drivers/net/ethernet/mellanox/*' '/lib/modules/*/kernel/drivers/usb/*' \
    '/lib/modules/*/kernel/net/*' '/lib/modules/*/kernel/drivers/hwmon/*' '/lib/modules/*/kernel/drivers/input/*'; do
    excluded+=(--dpkgopt="path-exclude=$path")
done
mmdebstrap --quiet --variant=minbase "${excluded[@]}" \
    --dpkgopt='path-include=/lib/modules/*/kernel/net/core/*' \
    --include=systemd-sysv,linux-image-amd64,initramfs-tools,udev,kmod,zstd,e2fsprogs,lvm2,cryptsetup-initramfs,open-vm-tools,ifupdown,iproute2 \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
    --essential-hook='printf "MODULES=list\nCOMPRESS=zstd\n" >"$1/etc/initramfs-tools/conf.d/small"' \
    bookworm "$root" >"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2; lacks "mmdebstrap could not make a Debian (no mirror?)"; }
kernel=$(cd "$root/boot" && ls vmlinuz-* | sort -V | tail -1)
version=${kernel#vmlinuz-}
sed -i 's/^root:[^:]*:/root::/' "$root/etc/shadow"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service dpkg-db-backup.timer \
    systemd-timesyncd.service fstrim.timer lvm2-monitor.service; do
    rm -f "$root/etc/systemd/system/"*.wants/"$unit"
done
sed -i 's/slumber=30/slumber=3/g' "$root/usr/share/initramfs-tools/scripts/local"

echo crypt >"$root/etc/hostname"
printf '# <file system> <mount point> <type> <options> <dump> <pass>\n/dev/mapper/debian--vg-root\t/\text4\terrors=remount-ro\t0\t1\n/dev/sda1\t/boot\text4\tdefaults\t0\t2\n/dev/mapper/debian--vg-swap\tnone\tswap\tsw\t0\t0\n' >"$root/etc/fstab"
printf 'sda5_crypt /dev/sda5 none luks,discard\n' >"$root/etc/crypttab"
echo 'RESUME=none' >"$root/etc/initramfs-tools/conf.d/resume"
printf 'GRUB_DEFAULT=0\nGRUB_TIMEOUT=1\nGRUB_DISTRIBUTOR=Debian\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"\n' >"$root/etc/default/grub"
# What the hook of cryptsetup writes where it sees the root's devices, which a folder has not.
cat >"$root/etc/initramfs-tools/hooks/crypttab" <<'HOOK'
#!/bin/sh
[ "$1" = prereqs ] && { echo cryptroot; exit 0; }
mkdir -p "$DESTDIR/cryptroot"
sed 's/[[:space:]]*$//' /etc/crypttab >"$DESTDIR/cryptroot/crypttab"
HOOK
chmod 755 "$root/etc/initramfs-tools/hooks/crypttab"
echo 'CRYPTSETUP=y' >>"$root/etc/cryptsetup-initramfs/conf-hook"
printf '%s\n' vmw_pvscsi mptspi sd_mod ata_piix ahci vmxnet3 ext4 dm_mod dm_crypt aesni_intel xts ecb cbc sha256 algif_skcipher \
    >"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k "$version" >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "no initramfs"; }
rm "$root/etc/initramfs-tools/hooks/crypttab"

mkdir -p "$root/boot/grub/i386-pc"
cp $pc/*.mod $pc/*.lst "$root/boot/grub/i386-pc"
cat >"$root/boot/grub/grub.cfg" <<CFG
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set default="0"
set timeout=1
menuentry 'Debian GNU/Linux' --class debian \$menuentry_id_option 'gnulinux-simple-$version' {
	insmod gzio
	insmod part_msdos
	insmod ext2
	search --no-floppy --fs-uuid --set=root $boot_uuid
	linux	/vmlinuz-$version root=/dev/mapper/debian--vg-root ro console=tty0 console=ttyS0,115200 no_timer_check
	initrd	/initrd.img-$version
}
CFG
mv "$root/boot" "$work/boot"
mkdir "$root/boot"
file_system ext4 $boot_uuid 120 "$work/boot" "$work/boot.ext4"
file_system ext4 0f5e7b0a-6a55-4f6c-8f0e-3f1c4d6b9a13 680 "$root" "$work/lv.ext4"
truncate -s 32M "$work/lv.swap"
mkswap "$work/lv.swap" >/dev/null 2>&1
lvm_disk "$work/pv" 720 debian-vg "root:680:$work/lv.ext4" "swap:32:$work/lv.swap" || lacks "LVM does not work here"
truncate -s 752M "$work/pv"
printf 'correct horse' >"$work/key"
cryptsetup reencrypt -q --encrypt --type luks2 --uuid $luks_uuid --pbkdf argon2id --pbkdf-memory 65536 \
    --pbkdf-force-iterations 4 --pbkdf-parallel 1 --reduce-device-size 32M "$work/pv" --key-file "$work/key" >"$work/log" 2>&1 ||
    { tail -3 "$work/log" >&2; lacks "cryptsetup cannot encrypt a file here"; }
out=$dir/luks-lvm.raw
truncate -s 876M "$out"
printf 'label: dos\nlabel-id: 0x6c756b73\n1 : start=2048, size=%d, type=83, bootable\n2 : start=%d, size=%d, type=5\n5 : start=%d, size=%d, type=83\n' \
    $((120 * 2048)) $((121 * 2048)) $((754 * 2048)) $((122 * 2048)) $((752 * 2048)) | sfdisk -q "$out"
put "$work/boot.ext4" "$out" 2048
put "$work/pv" "$out" $((122 * 2048))
grub_bios "$out" 1 '(hd0,msdos1)/grub' part_msdos ext2
echo "$sum" >"$dir/.complete"
