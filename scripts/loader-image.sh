#!/usr/bin/env bash
# Makes guests with boot loaders for the tests of bootcheck --firmware, once, in a cache directory, out of the guests of
# scripts/guest-image.sh.
#
#   scripts/loader-image.sh GUESTS DIR
#
# GUESTS is what guest-image.sh has made. DIR then holds (about 700 MB on disk):
#
#   debian.raw      the Debian of guest-image.sh on a GPT disk that both firmwares start: GRUB in a BIOS boot partition,
#                   and GRUB on an EFI system partition, as \EFI\debian\grubx64.efi and as the fallback
#   all others are the small guest (busybox with Debian's kernel and initramfs) by another loader:
#   mbr-grub.raw    BIOS: GRUB behind the MBR
#   gpt-grub.raw    BIOS: GRUB in a BIOS boot partition of a GPT
#   extlinux.raw    BIOS: extlinux on an active partition (missing where nothing can be mounted)
#   esp-grub.raw    UEFI: GRUB on an EFI system partition, root and /boot on LVM (missing where LVM cannot work)
#   sd-boot.raw     UEFI: systemd-boot
#   uki.raw         UEFI: a unified kernel image as the fallback loader
#   silent.raw      BIOS and UEFI: GRUB as above, and nothing on the serial port: its console is the screen
#   NAME.bad-*.raw  broken ones; each is described where it is made, below
#   .complete       this script's own checksum, and that of its guests
#
# Needs root (loop devices for LVM and extlinux), grub-mkimage and GRUB's modules for i386-pc and x86_64-efi,
# mkfs.vfat, mtools, sfdisk, debugfs, objcopy, systemd-boot's programs. Exit code 3: something of that is missing; said
# on standard error.
set -eu

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8 MTOOLS_SKIP_CHECK=1
here=$(cd "$(dirname "$0")" && pwd)
guests=$(realpath "${1:?usage: loader-image.sh GUESTS DIR}")
dir=${2:?usage: loader-image.sh GUESTS DIR}
mkdir -p "$dir"
dir=$(realpath "$dir")
exec 9>"$dir/lock"
flock 9

lacks() { echo "loader-image: $1" >&2; exit 3; }
[ -e "$guests/.complete" ] || lacks "no guests in $guests (scripts/guest-image.sh)"
sum="$(cat "$0" "$here/disk-parts.sh" | sha256sum | cut -c1-16) $(cat "$guests/.complete")"
if [ "$(cat "$dir/.complete" 2>/dev/null)" = "$sum" ]; then exit 0; fi

for tool in grub-mkimage mke2fs debugfs sfdisk mkfs.vfat mcopy mmd objcopy objdump truncate dd; do
    command -v "$tool" >/dev/null 2>&1 || lacks "no $tool on this machine"
done
pc=/usr/lib/grub/i386-pc efi=/usr/lib/grub/x86_64-efi sd=/usr/lib/systemd/boot/efi
[ -e $pc/boot.img ] || lacks "no GRUB for BIOS (Debian: grub-pc-bin)"
[ -e $efi/normal.mod ] || lacks "no GRUB for UEFI (Debian: grub-efi-amd64-bin)"
[ -e $sd/systemd-bootx64.efi ] || lacks "no systemd-boot (Debian: systemd-boot-efi)"
[ "$(id -u)" = 0 ] || lacks "needs root"

SMALL_UUID=$(cat "$guests/small.uuid")
ROOT_UUID=$(cat "$guests/root.uuid")
BOOT_UUID=c4d2a1f0-6b0e-4a57-9c1d-2f7e8a905b13
LVM_UUID=7a1f6c0e-35b9-4d1c-8a2b-94e0d7c3f551
version=$(cat "$guests/version")
BIOS_BOOT=21686148-6449-6E6F-744E-656564454649
# No timer is tested in these guests: on a busy machine that translates instructions it may be late.
WORDS="ro quiet rootdelay=2 no_timer_check"
SERIAL="console=ttyS0,115200"

rm -f "$dir"/*.raw "$dir/.complete"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# --- parts ---

# shellcheck source=scripts/disk-parts.sh
. "$here/disk-parts.sh"

# A configuration of GRUB in Debian's manner. UUID-OF-BOOT FOLDER COMMAND-LINE [KERNEL]
grub_cfg() {
    cat <<CFG
if [ -s \$prefix/grubenv ]; then
  load_env
fi
set default="0"
function load_video {
  insmod all_video
}
set timeout=1
menuentry 'Debian GNU/Linux' --class debian \$menuentry_id_option 'gnulinux-simple-$1' {
	load_video
	insmod gzio
	insmod ext2
	search --no-floppy --fs-uuid --set=root $1
	echo	'Loading Linux $version ...'
	linux	$2/${4:-vmlinuz-$version} $3
	echo	'Loading initial ramdisk ...'
	initrd	$2/initrd.img-$version
}
CFG
}

# --- the small guest's root, and its kernel on a file system for GRUB ---
dd if="$guests/small.raw" of="$work/root.ext4" bs=1M skip=49 count=16 conv=sparse status=none
boot=$work/boot
mkdir -p "$boot/grub"
cp "$guests/vmlinuz" "$boot/vmlinuz-$version"
cp "$guests/initrd" "$boot/initrd.img-$version"
mkdir "$boot/grub/i386-pc"
cp $pc/*.mod $pc/*.lst "$boot/grub/i386-pc"
good="root=UUID=$SMALL_UUID $WORDS $SERIAL"

boot_with() { # OUT COMMAND-LINE [KERNEL]
    grub_cfg "$BOOT_UUID" "" "$2" "${3:-}" >"$boot/grub/grub.cfg"
    file_system ext2 "$BOOT_UUID" 48 "$boot" "$1"
}

mbr_grub() { # OUT BOOT
    disk "$1" dos "48:83+boot:$2" "16:83:$work/root.ext4"
    grub_bios "$1" 1 '(hd0,msdos1)/grub' part_msdos ext2
}

boot_with "$work/boot.ext2" "$good"
mbr_grub "$dir/mbr-grub.raw" "$work/boot.ext2"
# bad-core: the second stage is not there, but for its first sector.
cp --sparse=always "$dir/mbr-grub.raw" "$dir/mbr-grub.bad-core.raw"
wipe "$dir/mbr-grub.bad-core.raw" 2 100
# bad-modules: the second stage finds no normal.mod.
cp --sparse=always "$dir/mbr-grub.raw" "$dir/mbr-grub.bad-modules.raw"
grub_bios "$dir/mbr-grub.bad-modules.raw" 1 '(hd0,msdos1)/boot/grub' part_msdos ext2
# bad-boot: the partition that it was installed for is not there.
cp --sparse=always "$dir/mbr-grub.raw" "$dir/mbr-grub.bad-boot.raw"
grub_bios "$dir/mbr-grub.bad-boot.raw" 1 '(hd0,msdos7)/grub' part_msdos ext2
# bad-root: the kernel is told of a root that does not exist.
boot_with "$work/bad.ext2" "root=UUID=00000000-dead-dead-dead-000000000000 $WORDS $SERIAL panic=-1"
mbr_grub "$dir/mbr-grub.bad-root.raw" "$work/bad.ext2"
# bad-kernel: the configuration names a kernel that does not exist.
boot_with "$work/bad.ext2" "$good" vmlinuz-0.0
mbr_grub "$dir/mbr-grub.bad-kernel.raw" "$work/bad.ext2"

disk "$dir/gpt-grub.raw" gpt "1:$BIOS_BOOT:" "48:L:$work/boot.ext2" "16:L:$work/root.ext4"
grub_bios "$dir/gpt-grub.raw" 2048 '(hd0,gpt2)/grub' part_gpt ext2
# bad-core: the BIOS boot partition is empty.
cp --sparse=always "$dir/gpt-grub.raw" "$dir/gpt-grub.bad-core.raw"
wipe "$dir/gpt-grub.bad-core.raw" 2048 2048

# --- extlinux, which installs itself into a mounted file system ---
syslinux_mbr=
for file in /usr/lib/EXTLINUX/mbr.bin /usr/lib/syslinux/mbr/mbr.bin /usr/share/syslinux/mbr.bin; do
    [ -e "$file" ] && syslinux_mbr=$file && break
done
extlinux_cfg() { # KERNEL
    printf 'DEFAULT linux\nPROMPT 0\nTIMEOUT 10\nLABEL linux\n  LINUX /%s\n  INITRD /initrd.img-%s\n  APPEND %s\n' "$1" "$version" "$good"
}
make_extlinux() { # OUT
    local tree=$work/extlinux mount=$work/mount
    mkdir -p "$tree/extlinux" "$mount"
    cp "$guests/vmlinuz" "$tree/vmlinuz-$version"
    cp "$guests/initrd" "$tree/initrd.img-$version"
    extlinux_cfg "vmlinuz-$version" >"$tree/extlinux/extlinux.conf"
    file_system ext2 "$BOOT_UUID" 48 "$tree" "$work/extlinux.ext2" || return 1
    mount -o loop "$work/extlinux.ext2" "$mount" || return 1
    extlinux --install "$mount/extlinux" >/dev/null 2>&1 || { umount "$mount"; return 1; }
    umount "$mount"
    disk "$1" dos "48:83+boot:$work/extlinux.ext2" "16:83:$work/root.ext4"
    dd if="$syslinux_mbr" of="$1" bs=440 count=1 conv=notrunc status=none
}
if [ -n "$syslinux_mbr" ] && command -v extlinux >/dev/null 2>&1 && make_extlinux "$dir/extlinux.raw" 2>"$work/log"; then
    # bad-active: no partition is active.
    cp --sparse=always "$dir/extlinux.raw" "$dir/extlinux.bad-active.raw"
    printf '\0' | dd of="$dir/extlinux.bad-active.raw" bs=1 seek=446 conv=notrunc status=none
    # bad-kernel: the configuration names a kernel that does not exist.
    cp --sparse=always "$dir/extlinux.raw" "$dir/extlinux.bad-kernel.raw"
    extlinux_cfg vmlinuz-0.0 >"$work/extlinux.conf"
    debugfs -w -R "rm /extlinux/extlinux.conf" "$dir/extlinux.bad-kernel.raw?offset=1048576" >/dev/null 2>&1
    debugfs -w -R "write $work/extlinux.conf /extlinux/extlinux.conf" "$dir/extlinux.bad-kernel.raw?offset=1048576" >/dev/null 2>&1
else
    echo "loader-image: no extlinux.raw: $(tail -1 "$work/log" 2>/dev/null || echo 'no extlinux')" >&2
    rm -f "$dir"/extlinux*.raw
fi

# --- GRUB on an EFI system partition, everything else on LVM ---
esp=$work/esp
mkdir -p "$esp/EFI/debian" "$esp/EFI/BOOT"
grub_efi "$esp/EFI/debian/grubx64.efi"
cp "$esp/EFI/debian/grubx64.efi" "$esp/EFI/BOOT/BOOTX64.EFI"
make_lvm() { # OUT
    local tree=$work/lvm
    mkdir "$tree"
    debugfs -R "rdump / $tree" "$work/root.ext4" >/dev/null 2>&1
    rm -rf "$tree/lost+found"
    mkdir -p "$tree/boot/grub"
    cp "$guests/vmlinuz" "$tree/boot/vmlinuz-$version"
    cp "$guests/initrd.lvm" "$tree/boot/initrd.img-$version"
    grub_cfg "$LVM_UUID" /boot "root=/dev/mapper/vmlab-root $WORDS $SERIAL" >"$tree/boot/grub/grub.cfg"
    file_system ext4 "$LVM_UUID" 80 "$tree" "$work/lvm.ext4"
    lvm_disk "$1" 100 vmlab "root:80:$work/lvm.ext4"
}
efi_cfg "$LVM_UUID" /boot >"$esp/EFI/debian/grub.cfg"
fat 33 "$esp" "$work/esp.fat"
if command -v lvm >/dev/null 2>&1 && make_lvm "$work/lvm.pv" 2>"$work/log"; then
    disk "$dir/esp-grub.raw" gpt "33:U:$work/esp.fat" "100:E6D6D379-F507-44C2-A23C-238F2A3DF928:$work/lvm.pv"
    # bad-fallback: only an entry in NVRAM would start GRUB.
    cp --sparse=always "$dir/esp-grub.raw" "$dir/esp-grub.bad-fallback.raw"
    mdel -i "$dir/esp-grub.bad-fallback.raw@@1M" ::/EFI/BOOT/BOOTX64.EFI
    # bad-search: GRUB is led to a file system that does not exist.
    cp --sparse=always "$dir/esp-grub.raw" "$dir/esp-grub.bad-search.raw"
    efi_cfg 00000000-dead-dead-dead-000000000000 /boot >"$work/grub.cfg"
    mcopy -o -i "$dir/esp-grub.bad-search.raw@@1M" "$work/grub.cfg" ::/EFI/debian/grub.cfg
else
    echo "loader-image: no esp-grub.raw: $(tail -1 "$work/log" 2>/dev/null || echo 'no lvm')" >&2
    rm -f "$dir"/esp-grub*.raw
fi

# --- systemd-boot, by the Boot Loader Specification ---
sdboot=$work/sdboot
mkdir -p "$sdboot/EFI/BOOT" "$sdboot/EFI/systemd" "$sdboot/loader/entries" "$sdboot/vmtest"
cp $sd/systemd-bootx64.efi "$sdboot/EFI/BOOT/BOOTX64.EFI"
cp $sd/systemd-bootx64.efi "$sdboot/EFI/systemd/systemd-bootx64.efi"
cp "$guests/vmlinuz" "$sdboot/vmtest/linux"
cp "$guests/initrd" "$sdboot/vmtest/initrd"
printf 'default vmtest*\ntimeout 1\n' >"$sdboot/loader/loader.conf"
printf 'title Debian GNU/Linux\nlinux /vmtest/linux\ninitrd /vmtest/initrd\noptions %s\n' "$good" >"$sdboot/loader/entries/vmtest.conf"
fat 48 "$sdboot" "$work/sdboot.fat"
disk "$dir/sd-boot.raw" gpt "48:U:$work/sdboot.fat" "16:L:$work/root.ext4"
# bad-kernel: the entry's kernel does not exist.
cp --sparse=always "$dir/sd-boot.raw" "$dir/sd-boot.bad-kernel.raw"
mdel -i "$dir/sd-boot.bad-kernel.raw@@1M" ::/vmtest/linux

# --- a unified kernel image: sections behind those of the stub (UAPI.5) ---
printf '%s' "$good" >"$work/cmdline"
printf 'PRETTY_NAME="Debian GNU/Linux"\nID=debian\n' >"$work/os-release"
printf '%s' "$version" >"$work/uname"
end=0
while read -r _ name size vma _; do
    case $name in .*) at=$((0x$vma + 0x$size)); [ $at -gt $end ] && end=$at ;; esac
done < <(objdump -h $sd/linuxx64.efi.stub)
add=()
for section in ".osrel:$work/os-release" ".cmdline:$work/cmdline" ".uname:$work/uname" ".linux:$guests/vmlinuz" ".initrd:$guests/initrd"; do
    end=$(((end + 4095) / 4096 * 4096))
    file=${section#*:}
    add+=(--add-section "${section%%:*}=$file" --change-section-vma "${section%%:*}=$end")
    end=$((end + $(stat -c %s "$file")))
done
uki=$work/uki
mkdir -p "$uki/EFI/BOOT"
objcopy "${add[@]}" $sd/linuxx64.efi.stub "$uki/EFI/BOOT/BOOTX64.EFI" 2>"$work/log" || lacks "objcopy makes no program for UEFI: $(tail -1 "$work/log")"
fat 48 "$uki" "$work/uki.fat"
disk "$dir/uki.raw" gpt "48:U:$work/uki.fat" "16:L:$work/root.ext4"
# bad-cut: half of the image is missing.
truncate -s 9000000 "$uki/EFI/BOOT/BOOTX64.EFI"
fat 48 "$uki" "$work/uki-cut.fat"
disk "$dir/uki.bad-cut.raw" gpt "48:U:$work/uki-cut.fat" "16:L:$work/root.ext4"

# --- nothing on the serial port: whoever is asked for a login is whoever sits at the console that the kernel has ---
cp --sparse=always "$work/root.ext4" "$work/silent.ext4"
sed 's/^ttyS0::respawn:.*/::respawn:\/bin\/busybox getty -L console 115200 vt100/' >"$work/inittab" < <(
    debugfs -R "cat /etc/inittab" "$work/root.ext4" 2>/dev/null
)
debugfs -w -R "rm /etc/inittab" "$work/silent.ext4" >/dev/null 2>&1
debugfs -w -R "write $work/inittab /etc/inittab" "$work/silent.ext4" >/dev/null 2>&1
boot_with "$work/silent.ext2" "root=UUID=$SMALL_UUID $WORDS"
efi_cfg "$BOOT_UUID" "" >"$esp/EFI/debian/grub.cfg"
rm -f "$work/esp.fat"
fat 33 "$esp" "$work/esp.fat"
disk "$dir/silent.raw" gpt "1:$BIOS_BOOT:" "33:U:$work/esp.fat" "48:L:$work/silent.ext2" "16:L:$work/silent.ext4"
grub_bios "$dir/silent.raw" 2048 '(hd0,gpt3)/grub' part_gpt ext2

# --- Debian, for both firmwares ---
dd if="$guests/debian.raw" of="$work/debian.ext4" bs=1M skip=1 count=480 conv=sparse status=none
{
    echo "rm /boot/grub/grub.cfg"
    grub_cfg "$ROOT_UUID" /boot "root=UUID=$ROOT_UUID $WORDS console=tty0 $SERIAL" >"$work/grub.cfg"
    echo "write $work/grub.cfg /boot/grub/grub.cfg"
    echo "mkdir /boot/grub/i386-pc"
    for file in $pc/*.mod $pc/*.lst; do echo "write $file /boot/grub/i386-pc/${file##*/}"; done
} >"$work/commands"
debugfs -w -f "$work/commands" "$work/debian.ext4" >/dev/null 2>&1
efi_cfg "$ROOT_UUID" /boot >"$esp/EFI/debian/grub.cfg"
rm -f "$work/esp.fat"
fat 33 "$esp" "$work/esp.fat"
disk "$dir/debian.raw" gpt "1:$BIOS_BOOT:" "33:U:$work/esp.fat" "480:L:$work/debian.ext4"
grub_bios "$dir/debian.raw" 2048 '(hd0,gpt3)/boot/grub' part_gpt ext2

echo "$sum" >"$dir/.complete"
