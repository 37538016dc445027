#!/usr/bin/env bash
# A Debian with encrypted LVM, converted and booted: without its passphrase as far as the prompt, with it to the end.
#
#   scripts/luks-boot.sh VIMG DIR
#
# DIR keeps the guest (scripts/luks-guest.sh). Takes some minutes where qemu has to translate.
set -eu

vimg=$(realpath "${1:?usage: luks-boot.sh VIMG DIR}") dir=${2:?usage: luks-boot.sh VIMG DIR}
bash "$(dirname "$0")/luks-guest.sh" "$dir"
work=$(mktemp -d "$dir/boot.XXXXXX")
trap 'rm -rf "$work"' EXIT
printf 'correct horse\n' >"$work/key"
fails() { echo "luks-boot: $1" >&2; exit 1; }

"$vimg" v2v -q --key "all:file:$work/key" -o "$work/out" "$dir/luks-lvm.raw"
disk=$work/out/luks-lvm-sda.qcow2
"$vimg" cat --key "all:file:$work/key" "$disk" /etc/crypttab | grep -q '^sda5_crypt UUID=' || fails "crypttab was not changed"
code=0
"$vimg" bootcheck --firmware bios --output json --console "$work/without" "$disk" >"$work/json" || code=$?
[ "$code" = 1 ] || fails "without the passphrase: exit code $code, not 1"
grep -q '"reason": "passphrase"' "$work/json" || { cat "$work/json" >&2; fails "without the passphrase: another reason"; }
echo "without the passphrase: as far as the prompt"
"$vimg" bootcheck --keys-from-stdin --console "$work/with" "$disk" <"$work/key" 2>"$work/said" || { cat "$work/said" >&2; fails "it does not boot"; }
if grep -q 'correct horse' "$work/with" "$work/said"; then fails "the passphrase is on the console or in the report"; fi
cat "$work/said"
