# shellcheck shell=bash
# Pieces of disks, for the scripts that make guests. The caller has $work, a folder for what is in between, and GRUB's
# folders in $pc and $efi.

# 8 bytes of FILE at OFFSET become VALUE, the low byte first.
poke64() { # FILE OFFSET VALUE
    local i hex=""
    for i in 0 8 16 24 32 40 48 56; do hex+=$(printf '\\x%02x' $((($3 >> i) & 255))); done
    # shellcheck disable=SC2059 # escapes on purpose
    printf "$hex" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

put() { dd if="$1" of="$2" bs=512 seek="$3" conv=notrunc,sparse status=none; } # FILE DISK SECTOR
wipe() { dd if=/dev/zero of="$1" bs=512 seek="$2" count="$3" conv=notrunc status=none; } # DISK SECTOR COUNT

file_system() { # TYPE UUID MIB FROM OUT
    truncate -s "$3M" "$5"
    mke2fs -q -F -t "$1" -U "$2" -E "hash_seed=$2,lazy_itable_init=0" -d "$4" "$5"
}

fat() { # MIB FROM OUT
    truncate -s "$1M" "$3"
    mkfs.vfat -i 4d2a1f0c "$3" >/dev/null
    mcopy -s -m -Q -i "$3" "$2"/* ::/
}

disk() { # OUT LABEL MIB:TYPE:FILE... : partitions one behind the other from 1 MiB on; FILE may be empty
    local out=$1 label=$2 at=1 table part mib kind file rest
    shift 2
    table="label: $label"$'\n'
    [ "$label" = dos ] && table+="label-id: 0x6c6f6164"$'\n'
    for part in "$@"; do
        mib=${part%%:*} rest=${part#*:}
        kind=${rest%%:*}
        table+="start=$((at * 2048)), size=$((mib * 2048)), type=${kind%%+*}"
        case $kind in *+boot) table+=", bootable" ;; esac
        table+=$'\n'
        at=$((at + mib))
    done
    rm -f "$out"
    truncate -s "$((at + 1))M" "$out"
    printf '%s' "$table" | sfdisk -q "$out"
    at=1
    for part in "$@"; do
        mib=${part%%:*} file=${part##*:}
        [ -z "$file" ] || put "$file" "$out" $((at * 2048))
        at=$((at + mib))
    done
}

# GRUB for BIOS: its first sector, which reads the second stage from SECTOR, and that stage, which reads its own rest
# from there on. (GRUB manual, "BIOS installation".)
grub_bios() { # DISK SECTOR PREFIX MODULES...
    local out=$1 sector=$2 prefix=$3
    shift 3
    grub-mkimage -O i386-pc -d "$pc" -p "$prefix" -o "$work/core.img" biosdisk "$@"
    dd if="$pc/boot.img" of="$out" bs=440 count=1 conv=notrunc status=none
    poke64 "$out" $((0x5c)) "$sector"
    poke64 "$work/core.img" $((0x1f4)) $((sector + 1))
    put "$work/core.img" "$out" "$sector"
}

# The same for UEFI: a program that looks for its configuration in \EFI\debian.
grub_efi() { # OUT
    grub-mkimage -O x86_64-efi -d "$efi" -p /EFI/debian -o "$1" part_gpt part_msdos fat ext2 lvm normal configfile linux \
        search search_fs_uuid search_label echo test loadenv all_video gzio minicmd reboot halt
}

# What leads from the EFI system partition to it. UUID-OF-BOOT FOLDER
# shellcheck disable=SC2016 # $root and $prefix are GRUB's
efi_cfg() { printf 'search.fs_uuid %s root\nset prefix=($root)%s/grub\nconfigfile $prefix/grub.cfg\n' "$1" "$2"; }

# A physical volume of LVM with one group and volumes. Nothing is activated: no device-mapper is needed, LVM only
# describes where the volumes lie.
lvm_disk() { # OUT MIB GROUP NAME:MIB:FILE... : volumes one behind the other from 1 MiB on
    local out=$1 mib=$2 group=$3 loop config volume at=1 rest failed=
    shift 3
    truncate -s "${mib}M" "$out"
    loop=$(losetup -f --show "$out") || return 1
    config="devices { use_devicesfile=0 global_filter=[\"a|^$loop\$|\",\"r|.*|\"] } global { use_lvmpolld=0 } \
        backup { backup=0 archive=0 } activation { udev_sync=0 udev_rules=0 }"
    lvm pvcreate --driverloaded n --config "$config" -q -y "$loop" >/dev/null || failed=1
    [ -n "$failed" ] || lvm vgcreate --driverloaded n --config "$config" -q -s 1M "$group" "$loop" >/dev/null || failed=1
    for volume in "$@"; do
        rest=${volume#*:}
        [ -n "$failed" ] || lvm lvcreate --driverloaded n --config "$config" -q -y -an -Zn -Wn -n "${volume%%:*}" \
            -L "${rest%%:*}M" "$group" >/dev/null || failed=1
    done
    losetup -d "$loop"
    [ -z "$failed" ] || return 1
    for volume in "$@"; do
        rest=${volume#*:}
        [ -z "${rest#*:}" ] || put "${rest#*:}" "$out" $((at * 2048))
        at=$((at + ${rest%%:*}))
    done
}
