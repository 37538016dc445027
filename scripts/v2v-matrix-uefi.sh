# shellcheck shell=bash disable=SC2154 # $tree, $out, $name and the functions are those of v2v-matrix-guests.sh
# Guests that UEFI starts, by an entry in the variables of the machine that they leave: none has a fallback loader.

ID=0123456789abcdef0123456789abcdef
ESP=C12A7328-F81F-11D2-BA4B-00A0C93EC93B

# systemd-boot, kernels and entries on the EFI system partition, which is /boot; NVMe names; dracut; systemd-networkd. A
# unified kernel image beside them, which nobody starts by himself. Modules are packed by xz.
guest_sd_boot() {
    use trixie
    local release=${kernels[0]} wait=/dev/nvme0n1p2 type=ext4 line
    only_kernel "$release"
    line="root=/dev/nvme0n1p2 ro resume=/dev/nvme0n1p3 $SERIAL $WORDS"
    fstab '/dev/nvme0n1p2 / ext4 defaults 0 1' '/dev/nvme0n1p1 /boot vfat umask=0077 0 2' '/dev/nvme0n1p3 none swap sw 0 0'
    mkdir -p "$tree/etc/kernel" "$tree/etc/systemd/network"
    echo "$line" >"$tree/etc/kernel/cmdline"
    echo "$ID" >"$tree/etc/machine-id"
    printf '[Match]\nName=ens192\n[Network]\nAddress=192.0.2.10/24\nGateway=192.0.2.1\n' >"$tree/etc/systemd/network/20-wired.network"
    rm -rf "$tree/etc/initramfs-tools" "$tree/usr/share/initramfs-tools"
    by_dracut "$release" /plain.img "nvme vmw_pvscsi ahci sd_mod"
    local esp=$work/esp
    mkdir -p "$esp/EFI/systemd" "$esp/loader/entries" "$esp/$ID/$release" "$esp/EFI/Linux"
    cp $sd/systemd-bootx64.efi "$esp/EFI/systemd/systemd-bootx64.efi"
    cp "$tree/boot/vmlinuz-$release" "$esp/$ID/$release/linux"
    packed zstd "$tree/plain.img" "$esp/$ID/$release/initrd"
    printf 'default %s-*\ntimeout 1\n' "$ID" >"$esp/loader/loader.conf"
    printf 'title      Debian GNU/Linux\nversion    %s\nmachine-id %s\noptions    %s\nlinux      /%s/%s/linux\ninitrd     /%s/%s/initrd\n' \
        "$release" "$ID" "$line" "$ID" "$release" "$ID" "$release" >"$esp/loader/entries/$ID-$release.conf"
    unified "$esp/EFI/Linux/debian-$release.efi" "$esp/$ID/$release/linux" "$esp/$ID/$release/initrd" "$line"
    rm -rf "$tree/plain.img" "$tree/boot"/*
    fat 160 "$esp" "$work/esp.fat"
    file_system ext4 5f1b0f5e-0011-4c6f-8f0e-3f1c4d6b9a02 640 "$tree" "$work/root"
    swap "$work/swap" 32
    disk "$out/nvme0n1.raw" gpt "160:U:$work/esp.fat" "640:L:$work/root" "32:S:$work/swap"
}

unified() { # OUT KERNEL INITRD COMMAND-LINE
    local end=0 name size vma at section file add=()
    printf '%s' "$4" >"$work/cmdline"
    printf 'PRETTY_NAME="Debian GNU/Linux"\nID=debian\n' >"$work/os-release"
    while read -r _ name size vma _; do
        case $name in .*) at=$((0x$vma + 0x$size)); [ $at -gt $end ] && end=$at ;; esac
    done < <(objdump -h $sd/linuxx64.efi.stub)
    for section in ".osrel:$work/os-release" ".cmdline:$work/cmdline" ".linux:$2" ".initrd:$3"; do
        end=$(((end + 4095) / 4096 * 4096))
        file=${section#*:}
        add+=(--add-section "${section%%:*}=$file" --change-section-vma "${section%%:*}=$end")
        end=$((end + $(stat -c %s "$file")))
    done
    objcopy "${add[@]}" $sd/linuxx64.efi.stub "$1" 2>"$work/log" || lacks "objcopy makes no program for UEFI"
}

# Nothing but a unified kernel image: no way to add a driver.
guest_uki() {
    use trixie
    local release=${kernels[0]} wait=/dev/sda2 type=ext4
    only_kernel "$release"
    fstab '/dev/sda2 / ext4 defaults 0 1' '/dev/sda1 /boot/efi vfat umask=0077 0 2'
    by_dracut "$release" /plain.img "vmw_pvscsi ahci sd_mod"
    packed zstd "$tree/plain.img" "$work/initrd"
    rm "$tree/plain.img"
    local esp=$work/esp
    mkdir -p "$esp/EFI/systemd" "$esp/EFI/Linux" "$tree/boot/efi"
    cp $sd/systemd-bootx64.efi "$esp/EFI/systemd/systemd-bootx64.efi"
    unified "$esp/EFI/Linux/debian.efi" "$tree/boot/vmlinuz-$release" "$work/initrd" "root=/dev/sda2 ro $SERIAL $WORDS"
    fat 96 "$esp" "$work/esp.fat"
    file_system ext4 5f1b0f5e-0012-4c6f-8f0e-3f1c4d6b9a02 640 "$tree" "$work/root"
    disk "$out/sda.raw" gpt "96:U:$work/esp.fat" "640:L:$work/root"
}

# Two groups of LVM over two disks, /home striped over both; the EFI system partition is on the second disk.
guest_lvm() {
    use bookworm
    local release=${kernels[0]} boot=5f1b0f5e-0013-4c6f-8f0e-3f1c4d6b9a01
    only_kernel "$release"
    fstab '/dev/vg_root/root / ext4 errors=remount-ro 0 1' "UUID=$boot /boot ext4 defaults 0 2" '/dev/sdb1 /boot/efi vfat umask=0077 0 1' \
        '/dev/mapper/vg_data-home /home ext4 defaults 0 2' '/dev/vg_root/swap none swap sw 0 0'
    printf 'auto lo\niface lo inet loopback\nauto ens192\niface ens192 inet static\n    address 192.0.2.10/24\n' >"$tree/etc/network/interfaces"
    mkdir -p "$tree/etc/lvm/devices" "$tree/boot/efi"
    printf '# LVM uses devices listed in this file.\nVERSION=1.1.1\nIDTYPE=sys_wwid IDNAME=naa.6000c2912345678 DEVNAME=/dev/sda2 PVID=abcdefabcdefabcdefabcdefabcdefab\n' >"$tree/etc/lvm/devices/system.devices"
    by_tools "$release" $VMWARE ext4 dm_mod
    mkdir -p "$tree/boot/grub" "$tree/home/somebody"
    echo striped >"$tree/home/somebody/file"
    {
        grub_head 'set default=0'
        grub_entry 'Debian GNU/Linux' simple "/vmlinuz-$release" "root=/dev/mapper/vg_root-root ro $SERIAL $WORDS" "/initrd.img-$release" 'insmod ext2' "search --no-floppy --fs-uuid --set=root $boot"
    } >"$tree/boot/grub/grub.cfg"
    part_of_tree boot "$boot" 96 "$work/boot"
    part_of_tree home 5f1b0f5e-0013-4c6f-8f0e-3f1c4d6b9a04 32 "$work/home"
    file_system ext4 5f1b0f5e-0013-4c6f-8f0e-3f1c4d6b9a03 640 "$tree" "$work/root"
    swap "$work/swap" 32
    local esp=$work/esp
    mkdir -p "$esp/EFI/debian"
    grub_efi "$esp/EFI/debian/grubx64.efi"
    efi_cfg "$boot" "" >"$esp/EFI/debian/grub.cfg"
    fat 34 "$esp" "$work/esp.fat"
    lvm_disk "$work/pv" 680 vg_root "root:640:$work/root" "swap:32:$work/swap" 2>"$work/log" || lacks "LVM does not work here"
    striped "$work/pv1" "$work/pv2" vg_data home 32 "$work/home" 2>"$work/log" || lacks "LVM does not work here"
    disk "$out/sda.raw" gpt "96:L:$work/boot" "680:E6D6D379-F507-44C2-A23C-238F2A3DF928:$work/pv" "24:E6D6D379-F507-44C2-A23C-238F2A3DF928:$work/pv1"
    disk "$out/sdb.raw" gpt "34:$ESP:$work/esp.fat" "24:E6D6D379-F507-44C2-A23C-238F2A3DF928:$work/pv2"
}

# A group of two physical volumes of 24 MiB with one volume of MIB MiB, in stripes of 512 KiB.
striped() { # PV1 PV2 GROUP NAME MIB FILE
    local first second config failed=
    truncate -s 24M "$1" "$2"
    first=$(losetup -f --show "$1") && second=$(losetup -f --show "$2") || return 1
    config="devices { use_devicesfile=0 global_filter=[\"a|^$first\$|\",\"a|^$second\$|\",\"r|.*|\"] } global { use_lvmpolld=0 } \
        backup { backup=0 archive=0 } activation { udev_sync=0 udev_rules=0 }"
    lvm pvcreate --driverloaded n --config "$config" -q -y "$first" "$second" >/dev/null &&
        lvm vgcreate --driverloaded n --config "$config" -q -s 1M "$3" "$first" "$second" >/dev/null &&
        lvm lvcreate --driverloaded n --config "$config" -q -y -an -Zn -Wn -i 2 -I 512k -n "$4" -L "$5M" "$3" >/dev/null || failed=1
    losetup -d "$first"
    losetup -d "$second"
    [ -z "$failed" ] || return 1
    local index to
    for ((index = 0; index < $5 * 2; index++)); do
        to=$1
        [ $((index % 2)) = 0 ] || to=$2
        dd if="$6" of="$to" bs=512k skip=$index seek=$((2 + index / 2)) count=1 conv=notrunc status=none
    done
}
