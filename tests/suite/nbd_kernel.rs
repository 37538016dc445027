//! Images as disks of a Linux machine: `vimg nbd` against the kernel's own client, its file systems and tools.
//!
//! The kernel is the lab's (`tests/lab`), since few machines that run tests have the module, and none should have its
//! disks pulled out. A boot costs seconds, so that each test is one life of a machine.

use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::lab::{self, lab};
use tests::skip::{qemu, root, tool};
use tests::{Cmd, Dir, requires};

/// The digest of a disk's contents, by qemu-img and sha256sum.
#[track_caller]
fn digest(dir: &Dir, format: &str, image: &str) -> String {
    dir.qemu_ok(&format!("convert -f {format} -O raw {image} digest.raw"));
    let said = Cmd::new("sha256sum").arg("digest.raw").dir(dir.path()).ok().stdout;
    said.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn an_image_is_formatted_mounted_written_and_left_clean() {
    requires!(root(), qemu(), tool("mke2fs"), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 256M");
    lab::run(
        dir.path(),
        r#"
        is /dev/nbd0 "$("$VIMG" nbd attach disk.qcow2)"
        is 268435456 "$(blockdev --getsize64 /dev/nbd0)"
        is "write back" "$(cat /sys/block/nbd0/queue/write_cache)"
        fails 'Failed to get "write" lock' "$VIMG" nbd attach disk.qcow2
        fails "/dev/nbd0 is in use already" "$VIMG" nbd attach --overlay --force-share disk.qcow2 /dev/nbd0
        mkfs.ext4 -q /dev/nbd0
        mkdir -p /tmp/m; mount /dev/nbd0 /tmp/m
        head -c 20000000 /dev/urandom > /tmp/m/file; sha256sum < /tmp/m/file > /tmp/sum
        fails "/dev/nbd0 is mounted on /tmp/m" "$VIMG" nbd detach /dev/nbd0
        umount /tmp/m
        sleep 1000 < /dev/nbd0 & sleep 0.2
        fails "(sleep) has it open" "$VIMG" nbd detach /dev/nbd0
        kill $!; wait || true
        fsck.ext4 -fn /dev/nbd0 > /tmp/fsck || { cat /tmp/fsck; exit 1; }
        sha256sum < /dev/nbd0 | cut -d' ' -f1 > digest
        "$VIMG" nbd detach /dev/nbd0
        # Nothing is left of it: no size, no server, no lock, no record.
        is 0 "$(cat /sys/block/nbd0/size)"
        is "" "$(pgrep -x vimg || true)"
        is "" "$(ls /run/vimg)"
        is "" "$("$VIMG" nbd list)"
        fails "/dev/nbd0 is not connected" "$VIMG" nbd detach /dev/nbd0

        # By other ways in, the same contents; two connections, and ioctls as before Linux 4.12.
        for way in "--read-only" "--connections 2" "--ioctl" "--ioctl --connections 3"; do
            is /dev/nbd2 "$("$VIMG" nbd attach $way disk.qcow2 /dev/nbd2)"
            is "$(cat digest)" "$(sha256sum < /dev/nbd2 | cut -d' ' -f1)"
            case $way in
                --read-only) mount -o ro,noload /dev/nbd2 /tmp/m; is 1 "$(blockdev --getro /dev/nbd2)" ;;
                *) mount /dev/nbd2 /tmp/m; echo "$way" > /tmp/m/way; sync ;;
            esac
            is "$(cat /tmp/sum)" "$(sha256sum < /tmp/m/file)"
            umount /tmp/m
            sha256sum < /dev/nbd2 | cut -d' ' -f1 > digest
            "$VIMG" nbd detach --all
            is "" "$(pgrep -x vimg || true)"
        done
        "#,
    );
    dir.qemu_ok("check disk.qcow2");
    assert_eq!(digest(&dir, "qcow2", "disk.qcow2"), String::from_utf8(dir.read("digest")).unwrap().trim());
}

#[test]
fn what_must_not_be_written_is_not_and_snapshots_are_shown() {
    requires!(root(), qemu(), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 64M");
    Cmd::new("qemu-io").words("-f qcow2 disk.qcow2 -c").arg("write -P 1 0 1M").dir(dir.path()).ok();
    dir.qemu_ok("snapshot -c then disk.qcow2");
    Cmd::new("qemu-io").words("-f qcow2 disk.qcow2 -c").arg("write -P 2 0 1M").dir(dir.path()).ok();
    let before = dir.read("disk.qcow2");
    lab::run(
        dir.path(),
        r#"
        first() { dd if=$1 bs=512 count=1 iflag=direct status=none | od -An -tu1 -N1 | tr -d ' '; }
        now=$("$VIMG" nbd attach --read-only disk.qcow2)
        then=$("$VIMG" nbd attach --snapshot then disk.qcow2)
        over=$("$VIMG" nbd attach --overlay disk.qcow2)
        is "/dev/nbd0 /dev/nbd1 /dev/nbd2" "$now $then $over"
        is "2 1 2" "$(first $now) $(first $then) $(first $over)"
        for disk in $now $then; do
            fails "not permitted" dd if=/dev/zero of=$disk bs=4k count=1 oflag=direct
        done
        dd if=/dev/zero of=$over bs=1M count=64 oflag=direct status=none
        is "2 1 0" "$(first $now) $(first $then) $(first $over)"
        "$VIMG" nbd list --output json > list.json
        "$VIMG" nbd list > list
        fails "find snapshot" "$VIMG" nbd attach --snapshot nosuch disk.qcow2
        fails "No such file" "$VIMG" nbd attach nosuch.qcow2
        fails "makes no sense" "$VIMG" nbd attach --overlay --reconnect 5 disk.qcow2
        "$VIMG" nbd detach --all
        is "" "$(ls /run/vimg)"
        "#,
    );
    assert!(before == dir.read("disk.qcow2"), "the image has changed");
    let list: serde_json::Value = serde_json::from_slice(&dir.read("list.json")).unwrap();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 3);
    assert!(list.iter().all(|entry| entry["server"] == "vimg" && entry["size"] == 64 << 20));
    assert_eq!(list[0]["read-only"], true);
    assert_eq!(list[1]["snapshot"], "then");
    assert_eq!((&list[2]["overlay"], &list[2]["read-only"]), (&true.into(), &false.into()));
    let text = String::from_utf8(dir.read("list")).unwrap();
    assert!(text.lines().nth(2).unwrap().ends_with("disk.qcow2 (snapshot then)"), "{text}");
}

#[test]
fn partitions_have_devices_and_each_can_be_a_disk_of_its_own() {
    requires!(root(), qemu(), tool("sfdisk"), tool("mke2fs"), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 gpt.qcow2 64M");
    dir.qemu_ok("create -f qcow2 mbr.qcow2 64M");
    lab::run(
        dir.path(),
        r#"
        parts() { (cd /dev; ls -d $1p* 2> /dev/null || true) | tr '\n' ' '; }
        "$VIMG" nbd attach gpt.qcow2 nbd0; "$VIMG" nbd attach mbr.qcow2 nbd1
        printf 'label: gpt\nsize=8M\nsize=32M\n' | sfdisk -q /dev/nbd0
        printf 'label: dos\n1: size=8M\n2: size=50M,type=5\n5: size=8M\n6: size=16M\n' | sfdisk -q /dev/nbd1
        is "nbd0p1 nbd0p2 " "$(parts nbd0)"
        mkfs.ext4 -q /dev/nbd0p2
        mkdir -p /tmp/m; mount /dev/nbd0p2 /tmp/m; echo hello > /tmp/m/file
        fails "/dev/nbd0p2 is mounted on /tmp/m" "$VIMG" nbd detach nbd0
        umount /tmp/m
        "$VIMG" nbd detach --all
        is " " "$(parts nbd0) $(parts nbd1)"

        # They are there as soon as the command has ended, whatever the module was told.
        for max_part in 16 0; do
            rmmod nbd; modprobe nbd max_part=$max_part
            "$VIMG" nbd attach gpt.qcow2; is "nbd0p1 nbd0p2 " "$(parts nbd0)"
            "$VIMG" nbd attach mbr.qcow2; is "nbd1p1 nbd1p2 nbd1p5 nbd1p6 " "$(parts nbd1)"
            "$VIMG" nbd detach --all
            is " " "$(parts nbd0) $(parts nbd1)"
        done

        # One of them as the disk.
        "$VIMG" nbd attach --partition 2 gpt.qcow2 nbd3
        is 33554432 "$(blockdev --getsize64 /dev/nbd3)"
        mount /dev/nbd3 /tmp/m; is hello "$(cat /tmp/m/file)"; echo more > /tmp/m/more; umount /tmp/m
        "$VIMG" nbd list | grep -q '(partition 2)$'
        "$VIMG" nbd detach nbd3
        "$VIMG" nbd attach --partition 6 mbr.qcow2; is 16777216 "$(blockdev --getsize64 /dev/nbd0)"
        "$VIMG" nbd detach nbd0
        "$VIMG" nbd attach --partition 2 --mount /tmp/m gpt.qcow2; is more "$(cat /tmp/m/more)"
        "$VIMG" nbd detach /tmp/m; is "" "$("$VIMG" nbd list)"
        fails "the disk has partitions: --partition 1 or 2" "$VIMG" nbd attach --mount /tmp/m gpt.qcow2
        fails "no nbd device is mounted" "$VIMG" nbd detach /tmp/m
        fails "the disk has no partition 3" "$VIMG" nbd attach --partition 3 gpt.qcow2
        is "" "$("$VIMG" nbd list)"
        "#,
    );
    dir.qemu_ok("check gpt.qcow2");
    dir.qemu_ok("check mbr.qcow2");
}

#[test]
fn servers_that_die_are_replaced_or_at_least_leave_no_zombie() {
    requires!(root(), qemu(), tool("mke2fs"), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 256M");
    lab::run(
        dir.path(),
        r#"
        server() { sed 's/.*"pid":\([0-9]*\).*/\1/' /run/vimg/nbd0.json; }
        mkdir -p /tmp/m
        "$VIMG" nbd attach --reconnect 60 --connections 2 disk.qcow2
        mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /tmp/m
        ( for i in 1 2 3 4 5 6; do head -c 8000000 /dev/urandom > /tmp/m/file$i; sync; done; touch /tmp/done ) &
        kills=0
        while [ ! -e /tmp/done ] && [ $kills -lt 4 ]; do
            sleep 0.5; victim=$(server); kill -9 $victim; kills=$((kills + 1))
            for i in $(seq 200); do [ "$(server)" = $victim ] || break; sleep 0.05; done
        done
        wait
        [ $kills -ge 1 ]
        sha256sum /tmp/m/file* > /tmp/sums
        # From the image, not from memory.
        umount /tmp/m; echo 3 > /proc/sys/vm/drop_caches
        fsck.ext4 -fn /dev/nbd0 > /tmp/fsck || { cat /tmp/fsck; exit 1; }
        mount /dev/nbd0 /tmp/m; sha256sum -c --quiet /tmp/sums; umount /tmp/m
        is $kills "$(grep -c 'starting another one' /run/vimg/nbd0.log)"
        "$VIMG" nbd detach nbd0
        for i in $(seq 100); do pgrep -x vimg > /dev/null || break; sleep 0.05; done
        is "" "$(pgrep -x vimg || true)"

        # Without --reconnect: the disk fails, is shown as what it is, and goes.
        "$VIMG" nbd attach disk.qcow2; kill -9 $(server)
        fails "Input/output error" dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct
        "$VIMG" nbd list | grep -q ' dead '
        "$VIMG" nbd detach nbd0 2> /tmp/said; grep -q 'the server of /dev/nbd0 is dead' /tmp/said
        is "" "$("$VIMG" nbd list)$(ls /run/vimg)"

        # A polite end takes the disk away, but not from under a file system.
        "$VIMG" nbd attach disk.qcow2; mount /dev/nbd0 /tmp/m; kill $(server); sleep 0.5
        sha256sum -c --quiet /tmp/sums; grep -q 'is mounted on /tmp/m' /run/vimg/nbd0.log; umount /tmp/m
        kill $(server); for i in $(seq 100); do pgrep -x vimg > /dev/null || break; sleep 0.05; done
        is "" "$("$VIMG" nbd list)$(ls /run/vimg)"

        # Others may take it away, too; its owner can be forced.
        "$VIMG" nbd attach disk.qcow2; qemu-nbd -d /dev/nbd0 > /tmp/said
        for i in $(seq 100); do pgrep -x vimg > /dev/null || break; sleep 0.05; done
        is "" "$("$VIMG" nbd list)$(ls /run/vimg)"
        "$VIMG" nbd attach disk.qcow2; mount -o ro /dev/nbd0 /tmp/m
        fails "stays until nobody uses it" "$VIMG" nbd detach --force nbd0
        umount /tmp/m; is "" "$("$VIMG" nbd list)"; is "" "$(pgrep -x vimg || true)"
        "#,
    );
    // Those who were killed may have left clusters that nobody uses (3); nothing may be wrong (2).
    let check = dir.qemu("check disk.qcow2");
    assert!(matches!(check.code, Some(0 | 3)), "{}", check.story());
}

/// The kernel talks to qemu-nbd itself; a process of ours stays only to call the server again.
#[test]
fn an_export_of_somebody_elses_server_is_a_disk() {
    requires!(root(), qemu(), tool("qemu-nbd"), tool("mke2fs"), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 128M");
    lab::run(
        dir.path(),
        r#"
        serve() { qemu-nbd --fork -t -e 8 -f qcow2 -x disk -k /tmp/sock disk.qcow2; }
        serve; uri='nbd+unix:///disk?socket=/tmp/sock'; mkdir -p /tmp/m
        is /dev/nbd0 "$("$VIMG" nbd attach --connections 2 "$uri")"
        is "" "$(pgrep -x vimg || true)"
        "$VIMG" nbd list | grep -q ' remote .*/disk?socket='
        mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /tmp/m; head -c 9000000 /dev/urandom > /tmp/m/file
        sha256sum /tmp/m/file > /tmp/sum
        fails "is mounted on /tmp/m" "$VIMG" nbd detach nbd0
        umount /tmp/m; "$VIMG" nbd detach nbd0; is "" "$("$VIMG" nbd list)"

        is /dev/nbd0 "$("$VIMG" nbd attach --reconnect 60 "$uri")"
        mount /dev/nbd0 /tmp/m
        kill -9 $(pidof qemu-nbd); (sleep 1; serve) &
        sha256sum -c --quiet /tmp/sum; wait
        grep -q 'has lost a connection' /run/vimg/nbd0.log
        umount /tmp/m; "$VIMG" nbd detach nbd0
        is "" "$("$VIMG" nbd list)$(ls /run/vimg)"

        # What has to be done to the bytes is done in between.
        is /dev/nbd0 "$("$VIMG" nbd attach --overlay -f raw "$uri")"
        mount /dev/nbd0 /tmp/m; sha256sum -c --quiet /tmp/sum; rm /tmp/m/file; umount /tmp/m
        "$VIMG" nbd detach nbd0
        is /dev/nbd0 "$("$VIMG" nbd attach --read-only "$uri")"
        is 1 "$(blockdev --getro /dev/nbd0)"
        mount -o ro /dev/nbd0 /tmp/m; sha256sum -c --quiet /tmp/sum; umount /tmp/m
        "$VIMG" nbd detach nbd0
        fails "not available" "$VIMG" nbd attach 'nbd+unix:///nosuch?socket=/tmp/sock'
        "#,
    );
}

/// A machine that loses its power in the middle of writing. Each file that was durable has its digest in `durable`
/// outside the machine; the next machine finds them all.
#[test]
fn what_was_durable_survives_a_power_cut() {
    requires!(root(), qemu(), tool("mke2fs"), lab());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 disk.qcow2 512M");
    for (cut, durable) in [12, 30].into_iter().enumerate() {
        let machine = lab::script(
            dir.path(),
            r#"
            mkdir -p /tmp/m; "$VIMG" nbd attach --connections 2 disk.qcow2
            if [ ! -e durable ]; then mkfs.ext4 -q /dev/nbd0; fi
            mount /dev/nbd0 /tmp/m
            i=$(cat durable 2> /dev/null | wc -l)
            while true; do
                i=$((i + 1)); head -c $((RANDOM * 50)) /dev/urandom > /tmp/m/file$i; sync -f /tmp/m
                echo "$(sha256sum < /tmp/m/file$i | cut -d' ' -f1)  file$i" >> durable; sync durable
                head -c 300000 /dev/urandom > /tmp/m/scratch$((i % 7))
            done
            "#,
        );
        cut_power_after(&dir, machine.spawn(), durable, cut);
        let lines = String::from_utf8(dir.read("durable")).unwrap().lines().count();
        assert!(lines >= durable, "only {lines} files were written");
        lab::run(
            dir.path(),
            r#"
            mkdir -p /tmp/m; "$VIMG" nbd attach disk.qcow2
            # Replays the journal; anything worse than that would be 4.
            fsck.ext4 -p /dev/nbd0 > /tmp/fsck || [ $? = 1 ] || { cat /tmp/fsck; exit 1; }
            fsck.ext4 -fn /dev/nbd0 > /tmp/fsck || { cat /tmp/fsck; exit 1; }
            mount /dev/nbd0 /tmp/m; (cd /tmp/m && sha256sum -c --quiet) < durable; umount /tmp/m
            "$VIMG" nbd detach nbd0
            "#,
        );
        // Clusters may have leaked (3); nothing may be wrong (2).
        let check = dir.qemu("check disk.qcow2");
        assert!(matches!(check.code, Some(0 | 3)), "{}", check.story());
    }
}

/// Waits until so many files are durable, and ends the machine without telling it.
#[track_caller]
fn cut_power_after(dir: &Dir, mut machine: Child, durable: usize, cut: usize) {
    let deadline = Instant::now() + Duration::from_secs(300);
    let written = || std::fs::read_to_string(dir.file("durable")).map_or(0, |text| text.lines().count());
    while written() < durable {
        let ended = machine.try_wait().unwrap();
        assert!(ended.is_none() && Instant::now() < deadline, "cut {cut}: {ended:?}, {} files", written());
        std::thread::sleep(Duration::from_millis(20));
    }
    // The emulator ends at once, and with it everything that the machine had not written.
    kill(Pid::from_raw(machine.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    machine.wait().unwrap();
}
