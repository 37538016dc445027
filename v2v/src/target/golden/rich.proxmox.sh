#!/bin/sh
# Makes web & "db" on a Proxmox VE host: $0 STORAGE [VMID]. BRIDGE=bridge for what is on no other (default: vmbr0).
set -eu
cd -- "$(dirname -- "$0")"
storage=${1:?usage: $0 STORAGE [VMID]}
vmid=${2:-$(pvesh get /cluster/nextid)}
bridge=${BRIDGE:-vmbr0}

# attach SLOT IMAGE OPTIONS: an imported disk is unused at first.
attach() {
    qm importdisk "$vmid" "$2" "$storage"
    volume=$(qm config "$vmid" | sed -n 's/^unused[0-9]*: *//p' | tail -n 1)
    qm set "$vmid" "--$1" "$volume$3"
}

qm create "$vmid" \
    --name web-db \
    --memory 3073 \
    --ostype l26 \
    --bios ovmf \
    --cpu x86-64-v2-AES \
    --scsihw virtio-scsi-single \
    --localtime 1 \
    --vga std \
    --sockets 1 \
    --cores 4 \
    --machine q35 \
    --smbios1 uuid=564d1234-5678-9abc-def0-123456789abc \
    --vmgenid 564d1234-5678-9abc-def0-123456789abd \
    --agent 1 \
    --serial0 socket \
    --serial1 socket \
    --net0 virtio=00:0C:29:AA:BB:01,bridge="$bridge" \
    --net1 virtio,bridge=br1 \
    --sata1 none,media=cdrom \
    --description 'first line
second <line>'
attach virtio0 './it'\''s, 1.qcow2' ,discard=on,iothread=1
attach scsi0 ./b.qcow2 ,discard=on,iothread=1,serial=VM-0001x
attach sata0 ./c.qcow2 ,discard=on
qm set "$vmid" --efidisk0 "$storage:1,efitype=4m,pre-enrolled-keys=1"
qm set "$vmid" --tpmstate0 "$storage:1,version=v2.0"
qm set "$vmid" --boot 'order=scsi0;virtio0;sata0'
echo "virtual machine $vmid is ready: qm start $vmid"
