#!/bin/sh
# Makes old on a Proxmox VE host: $0 STORAGE [VMID]. BRIDGE=bridge for what is on no other (default: vmbr0).
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
    --name old \
    --memory 2048 \
    --ostype other \
    --bios seabios \
    --cpu x86-64-v2-AES \
    --scsihw virtio-scsi-single \
    --localtime 0 \
    --vga std \
    --sockets 1 \
    --cores 1 \
    --agent 1 \
    --serial0 socket
attach ide0 ./old.img ,discard=on
qm set "$vmid" --boot order=ide0
echo "virtual machine $vmid is ready: qm start $vmid"
