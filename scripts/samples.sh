#!/usr/bin/env bash
# Fetches images that other products have made (Virtual PC, Hyper-V, Disk2vhd, VMware, Parallels, Bochs...): the samples
# that QEMU's own tests use, out of the source package that apt knows as `qemu`. Tests read them where they are there.
#
#   scripts/samples.sh FOLDER
#
# Nothing on the machine is changed: apt works on lists of its own below FOLDER, made from the machine's sources, and
# needs no root. About 35 MB are downloaded, once. Where there is no apt, or no network, it says so and the tests that
# want the samples are skipped.
set -u

folder=${1:?usage: samples.sh FOLDER}
done_mark=$folder/complete
[ -e "$done_mark" ] && exit 0

give_up() {
    echo "samples: $1; the tests on images of other products will be skipped"
    rm -rf "$work"
    exit 0
}

work=$folder/work
rm -rf "$work"
mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial" || exit 1
work=$(realpath "$work")
for tool in apt-get tar xz bunzip2; do
    command -v "$tool" >/dev/null 2>&1 || give_up "no $tool here"
done

# The machine's package sources, as sources of source packages.
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ -r "$file" ] || continue
    case $file in
        *.sources) sed -E 's/^Types:.*/Types: deb-src/' "$file" >"$work/sources/$(basename "$file")" ;;
        *.list) sed -nE 's/^deb(-src)? /deb-src /p' "$file" | sort -u >"$work/sources/$(basename "$file")" ;;
    esac
done
apt() {
    apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" "$@" >/dev/null 2>&1 </dev/null
}
echo "samples: fetching the source package of qemu for its sample images"
apt update || give_up "apt has no lists of source packages"
# The newest version that the sources have or, where that cannot be had, the one of this release.
release=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")
(cd "$work" && { apt source --download-only --only-source qemu || apt source --download-only --only-source "qemu/$release"; }) ||
    give_up "apt could not fetch the source package of qemu"

archive=$(find "$work" -maxdepth 1 -name 'qemu_*.orig.tar.xz' | head -1)
[ -n "$archive" ] || give_up "the source package of qemu has another form than expected"
tar -xJf "$archive" -C "$work" --wildcards '*/tests/qemu-iotests/sample_images/*.bz2' 2>/dev/null ||
    give_up "the source package of qemu has no sample images"
find "$work" -path '*/sample_images/*.bz2' | while read -r packed; do
    # Sparse, because most of what some of them hold is zeros.
    bunzip2 -c "$packed" | cp --sparse=always /dev/stdin "$folder/$(basename "$packed" .bz2)" || exit 1
done || give_up "the sample images could not be unpacked"
rm -rf "$work"
touch "$done_mark"
