# shellcheck shell=bash disable=SC2154 # $tree, $out, $name and the functions are those of v2v-matrix-guests.sh
# Guests that a BIOS starts. Each function says what is peculiar about its guest.

fstab() { printf '%s\n' "$@" >"$tree/etc/fstab"; }

default_grub() { # COMMAND-LINE
    printf 'GRUB_DEFAULT=0\nGRUB_TIMEOUT=1\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="%s"\nGRUB_DISABLE_LINUX_UUID=true\n' "$1" >"$tree/etc/default/grub"
}

# dracut, its archive packed in every way, with microcode in front of the first one. Names in the archive itself: the root
# and the hook that waits for it. Entry 0 is the default, the others are started by their numbers.
guest_dracut() {
    use bookworm
    local release=${kernels[0]} wait=/dev/sda1 type=ext4 way line
    only_kernel "$release"
    line="root=/dev/sda1 ro $SERIAL $WORDS"
    fstab '/dev/sda1 / ext4 defaults 0 1'
    default_grub "$SERIAL"
    mkdir -p "$tree/etc/dracut.conf.d"
    printf 'hostonly="yes"\ncompress="gzip"\n' >"$tree/etc/dracut.conf.d/own.conf"
    rm -rf "$tree/etc/initramfs-tools" "$tree/usr/share/initramfs-tools"
    by_dracut "$release" /plain.img "$VMWARE"
    grub_head 'set default=0' >"$work/grub.cfg"
    for way in gzip xz zstd lz4 lzma bzip2 lzo none; do
        packed "$way" "$tree/plain.img" "$tree/boot/initramfs-$release.$way.img"
        [ "$way" != gzip ] || microcode "$tree/boot/initramfs-$release.$way.img"
        grub_entry "Debian, $way" "way-$way" "/boot/vmlinuz-$release" "$line" "/boot/initramfs-$release.$way.img" \
            'insmod ext2' "set root='hd0,msdos1'" >>"$work/grub.cfg"
    done
    rm "$tree/plain.img"
    cp_grub "$tree/boot/grub"
    cp "$work/grub.cfg" "$tree/boot/grub"
    file_system ext4 5f1b0f5e-0001-4c6f-8f0e-3f1c4d6b9a01 900 "$tree" "$work/root.ext4"
    disk "$out/sda.raw" dos "900:83+boot:$work/root.ext4"
    grub_bios "$out/sda.raw" 1 '(hd0,msdos1)/boot/grub' part_msdos ext2
}

# Two kernels, one of which has virtio in its initramfs; the one without is the default by grubenv, in a submenu. /boot,
# /usr, /var and /home are file systems of their own, swap is resumed from, /data is on a second disk. Two cards with
# fixed addresses.
guest_two_kernels() {
    use bookworm
    local generic=6 cloud=6 line kernel
    for kernel in "${kernels[@]}"; do case $kernel in *cloud*) cloud=$kernel ;; *) generic=$kernel ;; esac; done
    line="root=/dev/sda5 ro resume=/dev/sda2 $SERIAL $WORDS"
    fstab '# <file system>  <mount point>  <type>  <options>  <dump>  <pass>' '/dev/sda5        /       ext4  errors=remount-ro  0  1' \
        '/dev/sda1        /boot   ext4  defaults           0  2' '/dev/sda6        /usr    ext4  ro                 0  2' \
        '/dev/sda7        /var    ext4  defaults           0  2' '/dev/sda8        /home   ext4  defaults           0  2' \
        '/dev/sda2        none    swap  sw                 0  0' '/dev/sdb1        /data   xfs   defaults           0  2'
    default_grub "$SERIAL resume=/dev/sda2"
    mkdir -p "$tree/data"
    echo 'RESUME=/dev/sda2' >"$tree/etc/initramfs-tools/conf.d/resume"
    printf 'auto lo\niface lo inet loopback\nauto ens192\niface ens192 inet static\n    address 192.0.2.10/24\n    gateway 192.0.2.1\nallow-hotplug ens224\niface ens224 inet static\n    address 198.51.100.7/24\n' >"$tree/etc/network/interfaces"
    by_tools "$generic" $VMWARE ext4 virtio_pci virtio_blk
    by_tools "$cloud" $VMWARE ext4
    cp_grub "$tree/boot/grub"
    {
        grub_head 'if [ "${next_entry}" ]; then' '  set default="${next_entry}"' 'else' '  set default="${saved_entry}"' 'fi'
        grub_entry 'Debian GNU/Linux' gnulinux-simple "/vmlinuz-$generic" "$line" "/initrd.img-$generic" 'insmod ext2' "set root='hd0,msdos1'"
        printf "submenu 'Advanced options for Debian GNU/Linux' \$menuentry_id_option 'gnulinux-advanced' {\n"
        for kernel in "$generic" "$cloud"; do
            grub_entry "Debian GNU/Linux, with Linux $kernel" "gnulinux-$kernel-advanced" "/vmlinuz-$kernel" "$line" "/initrd.img-$kernel" \
                'insmod ext2' "set root='hd0,msdos1'" | sed 's/^/\t/'
        done
        echo '}'
    } >"$tree/boot/grub/grub.cfg"
    printf '# GRUB Environment Block\nsaved_entry=gnulinux-advanced>gnulinux-%s-advanced\n' "$cloud" >"$work/env"
    head -c $((1024 - $(stat -c %s "$work/env"))) /dev/zero | tr '\0' '#' >>"$work/env"
    cp "$work/env" "$tree/boot/grub/grubenv"
    part_of_tree boot 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a01 128 "$work/boot"
    part_of_tree usr 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a06 640 "$work/usr"
    part_of_tree var 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a07 64 "$work/var"
    part_of_tree home 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a08 16 "$work/home"
    file_system ext4 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a05 64 "$tree" "$work/root"
    swap "$work/swap" 64 5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9a02
    truncate -s 320M "$work/data"
    mkfs.xfs -q -m uuid=5f1b0f5e-0002-4c6f-8f0e-3f1c4d6b9b01 "$work/data"
    logical "$out/sda.raw" "128:83:$work/boot" "64:82:$work/swap" -- "64:83:$work/root" "640:83:$work/usr" "64:83:$work/var" "16:83:$work/home"
    grub_bios "$out/sda.raw" 1 '(hd0,msdos1)/grub' part_msdos ext2
    disk "$out/sdb.raw" dos "320:83:$work/data"
}

# An MBR with partitions 1, 2, ..., then an extended one with 5, 6, .. in it.
logical() { # OUT MIB:TYPE:FILE... -- MIB:TYPE:FILE...
    local out=$1 at=1 number=0 table='label: dos' puts=() extended= mib rest total=2 part
    shift
    for part in "$@"; do [ "$part" = -- ] || total=$((total + ${part%%:*} + 1)); done
    for part in "$@"; do
        if [ "$part" = -- ]; then
            table+=$'\n'"4 : start=$((at * 2048)), size=$(((total - at - 1) * 2048)), type=5"
            extended=1 number=4
            continue
        fi
        number=$((number + 1)) mib=${part%%:*} rest=${part#*:}
        [ -z "$extended" ] || at=$((at + 1))
        table+=$'\n'"$number : start=$((at * 2048)), size=$((mib * 2048)), type=${rest%%:*}"
        [ "$number" != 1 ] || table+=', bootable'
        puts+=("$at:${rest#*:}")
        at=$((at + mib))
    done
    truncate -s "${total}M" "$out"
    printf '%s\n' "$table" | sfdisk -q "$out"
    for part in "${puts[@]}"; do put "${part#*:}" "$out" $((${part%%:*} * 2048)); done
}

# GRUB legacy on ext3, /dev/hda1, sysvinit, i386.
guest_grub_legacy() {
    use i386
    local release=${kernels[0]} line
    line="root=/dev/hda1 ro $SERIAL $WORDS"
    fstab 'proc /proc proc defaults 0 0' '/dev/hda1 / ext3 errors=remount-ro 0 1' '/dev/hda2 none swap sw 0 0'
    echo 'T0:23:respawn:/sbin/getty -L ttyS0 115200 vt100' >>"$tree/etc/inittab"
    printf 'auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet static\n    address 192.0.2.10\n    netmask 255.255.255.0\n' >"$tree/etc/network/interfaces"
    printf '# PCI device 0x1022:0x2000 (pcnet32)\nSUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{address}=="00:0c:29:aa:bb:cc", ATTR{dev_id}=="0x0", ATTR{type}=="1", KERNEL=="eth*", NAME="eth0"\n' \
        >"$tree/etc/udev/rules.d/70-persistent-net.rules"
    echo 'RESUME=/dev/hda2' >"$tree/etc/initramfs-tools/conf.d/resume"
    by_tools "$release" ata_piix sd_mod mptspi ext4
    mkdir -p "$tree/boot/grub"
    printf '(hd0)\t/dev/hda\n' >"$tree/boot/grub/device.map"
    cat >"$tree/boot/grub/menu.lst" <<CFG
default		0
timeout		1
serial --unit=0 --speed=115200
terminal --timeout=1 serial console
## ## Start Default Options ##
## e.g. kopt=root=/dev/hda1 ro
# kopt=root=/dev/hda1 ro
# groot=(hd0,0)
# defoptions=console=ttyS0,115200
## ## End Default Options ##

title		Debian GNU/Linux, kernel $release
root		(hd0,0)
kernel		/boot/vmlinuz-$release $line
initrd		/boot/initrd.img-$release

title		Debian GNU/Linux, kernel $release (single-user mode)
root		(hd0,0)
kernel		/boot/vmlinuz-$release $line single
initrd		/boot/initrd.img-$release
CFG
    cp "$tree"/usr/lib/grub/i386-pc/* "$tree/boot/grub"
    truncate -s 500M "$work/root"
    mke2fs -q -F -t ext3 -I 128 -O ^dir_index,^resize_inode -U 5f1b0f5e-0003-4c6f-8f0e-3f1c4d6b9a01 -d "$tree" "$work/root"
    swap "$work/swap" 64
    disk "$out/hda.raw" dos "500:83+boot:$work/root" "64:82:$work/swap"
    mv "$out/hda.raw" "$tree/disk"
    printf 'device (hd0) /disk\nroot (hd0,0)\nsetup (hd0)\nquit\n' >"$tree/words"
    chroot "$tree" sh -c 'grub --batch --device-map=/dev/null </words' >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "GRUB legacy installs nothing"; }
    mv "$tree/disk" "$out/hda.raw"
}

# extlinux, OpenRC, Xen's names and console, Linux 5.10 with LZ4, /lib beside /usr/lib.
guest_extlinux() {
    use bullseye
    local release=${kernels[0]}
    fstab '/dev/xvda2 / ext4 errors=remount-ro 0 1' '/dev/xvda1 /boot ext4 defaults 0 2' '/dev/xvda3 none swap sw 0 0'
    # As a guest of Xen has it: a login on its console, none on the serial port.
    sed -i '/ttyS0/d' "$tree/etc/inittab"
    echo 'h0:2345:respawn:/sbin/getty -L hvc0 115200 vt100' >>"$tree/etc/inittab"
    echo 'COMPRESS=lz4' >"$tree/etc/initramfs-tools/conf.d/small2"
    sed -i 's/^COMPRESS=.*/COMPRESS=lz4/' "$tree/etc/initramfs-tools/conf.d/small"
    by_tools "$release" xen-blkfront ext4
    printf 'DEFAULT linux\nPROMPT 0\nTIMEOUT 10\nLABEL linux\n  LINUX /vmlinuz-%s\n  APPEND initrd=/initrd.img-%s root=/dev/xvda2 ro console=hvc0 %s\nLABEL other\n  KERNEL /vmlinuz-%s\n  INITRD /initrd.img-%s\n  APPEND root=/dev/xvda2 ro single\n' \
        "$release" "$release" "$WORDS" "$release" "$release" >"$work/extlinux.conf"
    mkdir -p "$tree/boot/extlinux"
    cp "$work/extlinux.conf" "$tree/boot/extlinux"
    part_of_tree boot 5f1b0f5e-0004-4c6f-8f0e-3f1c4d6b9a01 96 "$work/boot"
    file_system ext4 5f1b0f5e-0004-4c6f-8f0e-3f1c4d6b9a02 560 "$tree" "$work/root"
    mount_loop "$work/boot"
    extlinux --install "$work/mount/extlinux" >"$work/log" 2>&1 || { cat "$work/log" >&2; lacks "extlinux installs nothing"; }
    unmount
    swap "$work/swap" 32
    disk "$out/xvda.raw" dos "96:83+boot:$work/boot" "560:83:$work/root" "32:82:$work/swap"
    dd if=/usr/lib/EXTLINUX/mbr.bin of="$out/xvda.raw" bs=440 count=1 conv=notrunc status=none
}

# btrfs with @ and @home, initramfs-tools, netplan.
guest_btrfs() {
    use bookworm
    local release=${kernels[0]}
    only_kernel "$release"
    fstab '/dev/sda2 / btrfs defaults,subvol=@ 0 0' '/dev/sda2 /home btrfs defaults,subvol=@home 0 0' '/dev/sda3 none swap sw 0 0'
    default_grub "rootflags=subvol=@ $SERIAL"
    mkdir -p "$tree/etc/netplan"
    printf 'network:\n  version: 2\n  ethernets:\n    ens160:\n      addresses: [192.0.2.10/24]\n      routes: [{to: default, via: 192.0.2.1}]\n' >"$tree/etc/netplan/01-static.yaml"
    sed -i 's/^COMPRESS=.*/COMPRESS=zstd/' "$tree/etc/initramfs-tools/conf.d/small"
    by_tools "$release" $VMWARE btrfs
    cp_grub "$tree/boot/grub"
    {
        grub_head 'set default=0'
        grub_entry 'Debian GNU/Linux' simple "/@/boot/vmlinuz-$release" "root=/dev/sda2 ro rootflags=subvol=@ $SERIAL $WORDS" "/@/boot/initrd.img-$release" 'insmod btrfs' "set root='hd0,msdos2'"
    } >"$tree/boot/grub/grub.cfg"
    truncate -s 900M "$work/root"
    mkfs.btrfs -q -U 5f1b0f5e-0005-4c6f-8f0e-3f1c4d6b9a02 "$work/root"
    mount_loop "$work/root"
    btrfs -q subvolume create "$work/mount/@"
    btrfs -q subvolume create "$work/mount/@home"
    cp -a "$tree/." "$work/mount/@"
    unmount
    swap "$work/swap" 32
    disk "$out/sda.raw" dos "16:83:" "900:83+boot:$work/root" "32:82:$work/swap"
    grub_bios "$out/sda.raw" 1 '(hd0,msdos2)/@/boot/grub' part_msdos btrfs
}

# openSUSE's layout: the default subvolume is a snapshot, GRUB's files are in a subvolume of their own, no rootflags. dracut,
# keyfiles of NetworkManager.
guest_suse() {
    use bookworm
    local release=${kernels[0]} wait=/dev/sda2 type=btrfs sub top=/@/.snapshots/1/snapshot
    only_kernel "$release"
    fstab '/dev/sda2 / btrfs defaults 0 0' '/dev/sda2 /var btrfs subvol=/@/var 0 0' '/dev/sda2 /boot/grub2/i386-pc btrfs subvol=/@/boot/grub2/i386-pc 0 0' \
        '/dev/sda2 /.snapshots btrfs subvol=/@/.snapshots 0 0' '/dev/sda1 none swap defaults 0 0'
    default_grub "resume=/dev/sda1 $SERIAL"
    mkdir -p "$tree/etc/NetworkManager/system-connections" "$tree/etc/dracut.conf.d" "$tree/.snapshots"
    printf '[connection]\nid=wired\ntype=ethernet\ninterface-name=ens160\n[ipv4]\nmethod=manual\naddress1=192.0.2.10/24,192.0.2.1\n' >"$tree/etc/NetworkManager/system-connections/wired.nmconnection"
    chmod 600 "$tree/etc/NetworkManager/system-connections/wired.nmconnection"
    rm -rf "$tree/etc/initramfs-tools" "$tree/usr/share/initramfs-tools"
    by_dracut "$release" /plain.img "$VMWARE"
    packed xz "$tree/plain.img" "$tree/boot/initrd-$release"
    rm "$tree/plain.img"
    mkdir -p "$tree/boot/grub2/i386-pc"
    {
        grub_head 'set default=0'
        grub_entry 'SLE' simple "$top/boot/vmlinuz-$release" "root=/dev/sda2 resume=/dev/sda1 $SERIAL $WORDS" "$top/boot/initrd-$release" 'insmod btrfs' "set root='hd0,msdos2'"
    } >"$tree/boot/grub2/grub.cfg"
    truncate -s 900M "$work/root"
    mkfs.btrfs -q -U 5f1b0f5e-0006-4c6f-8f0e-3f1c4d6b9a02 "$work/root"
    mount_loop "$work/root"
    btrfs -q subvolume create "$work/mount/@"
    mkdir -p "$work/mount/@/boot/grub2"
    for sub in var boot/grub2/i386-pc .snapshots; do btrfs -q subvolume create "$work/mount/@/$sub"; done
    mkdir "$work/mount/@/.snapshots/1"
    btrfs -q subvolume create "$work/mount/@/.snapshots/1/snapshot"
    cp -a "$tree/var/." "$work/mount/@/var"
    cp $pc/*.mod $pc/*.lst "$work/mount/@/boot/grub2/i386-pc"
    rm -rf "$tree/var"
    mkdir "$tree/var"
    cp -a "$tree/." "$work/mount/@/.snapshots/1/snapshot"
    btrfs subvolume set-default "$work/mount/@/.snapshots/1/snapshot"
    # A snapshot, as snapper makes them: it must stay as it is, and be taken for no system of its own.
    mkdir "$work/mount/@/.snapshots/2"
    btrfs -q subvolume snapshot -r "$work/mount/@/.snapshots/1/snapshot" "$work/mount/@/.snapshots/2/snapshot"
    unmount
    swap "$work/swap" 32
    disk "$out/sda.raw" dos "32:82:$work/swap" "900:83+boot:$work/root"
    # Its modules are not where its configuration is: it has all of them.
    grub_bios "$out/sda.raw" 1 "(hd0,msdos2)$top/boot/grub2" part_msdos btrfs normal linux echo test loadenv serial terminal minicmd gzio
}

# A root that has no room for anything more.
guest_full() {
    use bookworm
    local release=${kernels[0]}
    only_kernel "$release"
    simple_ext4 "$release" 560
    # Room for the changed texts, not for an archive of drivers. (Linux holds back 2 % for what it writes late.)
    mount_loop "$work/root"
    echo 0 >"/sys/fs/ext4/$(basename "$(findmnt -n -o SOURCE "$work/mount")")/reserved_clusters"
    dd if=/dev/zero of="$work/mount/var/full" bs=64k status=none 2>/dev/null || true
    rm -f "$work/mount/etc/motd"
    sync
    unmount
    simple_disk 560
}

# The same with room, as a machine leaves it that was cut off in the middle: the journal was not finished.
guest_dirty() {
    use bookworm
    local release=${kernels[0]}
    only_kernel "$release"
    simple_ext4 "$release" 640
    mount_loop "$work/root" commit=600
    echo '/dev/sda1 / ext4 defaults 0 1' >"$work/mount/etc/fstab.new"
    mv "$work/mount/etc/fstab.new" "$work/mount/etc/fstab"
    sync -f "$work/mount/etc/fstab"
    rm -rf "$work/mount/usr/share/zoneinfo"
    mkdir "$work/mount/srv/unfinished"
    sync -f "$work/mount/srv"
    cp --sparse=always "$work/root" "$work/cut"
    unmount
    mv "$work/cut" "$work/root"
    simple_disk 640
}

# File systems that we must not write to.
guest_read_only() {
    use bookworm
    local release=${kernels[0]}
    only_kernel "$release"
    simple_ext4 "$release" 640
    tune2fs -O read-only "$work/root" >/dev/null 2>&1
    simple_disk 640
}
guest_bigalloc() {
    use bookworm
    local release=${kernels[0]}
    only_kernel "$release"
    simple_ext4 "$release" 1200 -O bigalloc -C 16384
    simple_disk 1200
}

simple_ext4() { # RELEASE MIB OPTIONS... : everything in one file system, $work/root
    local release=$1 mib=$2
    shift 2
    fstab '/dev/sda1 / ext4 defaults 0 1'
    default_grub "$SERIAL"
    by_tools "$release" $VMWARE ext4
    cp_grub "$tree/boot/grub"
    {
        grub_head 'set default=0'
        grub_entry 'Debian GNU/Linux' simple "/boot/vmlinuz-$release" "root=/dev/sda1 ro $SERIAL $WORDS" "/boot/initrd.img-$release" 'insmod ext2' "set root='hd0,msdos1'"
    } >"$tree/boot/grub/grub.cfg"
    truncate -s "${mib}M" "$work/root"
    mke2fs -q -F -t ext4 "$@" -U 5f1b0f5e-0007-4c6f-8f0e-3f1c4d6b9a01 -d "$tree" "$work/root"
}

simple_disk() { # MIB
    disk "$out/sda.raw" dos "$1:83+boot:$work/root"
    grub_bios "$out/sda.raw" 1 '(hd0,msdos1)/boot/grub' part_msdos ext2
}
