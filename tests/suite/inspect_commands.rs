//! `vimg inspect`, `ls`, `cat` and `cp-out`, as people and scripts use them.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::Value;
use tests::command::Cmd;
use tests::guest::{self, Size};
use tests::guest_image::{Holds, Part, disk};
use tests::skip::{Need, tool};
use tests::{Dir, requires};

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const BOOT: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";

fn tools() -> Need {
    for name in ["sfdisk", "mke2fs", "debugfs", "mkfs.vfat", "mcopy"] {
        tool(name)?;
    }
    Ok(())
}

/// A guest on two partitions, in the file `d`.
fn guest_disk(dir: &Dir) {
    let parts = [
        Part {
            kind: "L",
            mib: 20,
            holds: Holds::Ext4(BOOT),
            files: &[
                ("grub/grub.cfg", b"menuentry 'A' { linux /vmlinuz root=/dev/sda2 }\n"),
                ("vmlinuz", b"kernel"),
            ],
        },
        Part {
            kind: "L",
            mib: 20,
            holds: Holds::Ext4(ROOT),
            files: &[
                ("etc/os-release", b"ID=test\nPRETTY_NAME=\"Test 1\"\n"),
                ("etc/fstab", b"/dev/sda2 / ext4 defaults\n/dev/sda1 /boot ext4 defaults\n"),
                ("etc/hostname", b"host\n"),
                ("bin/x", b""),
                ("dev/x", b""),
                ("boot/hidden", b""),
            ],
        },
    ];
    disk(dir, "d", "dos", &parts);
}

#[test]
fn a_guest_is_described_for_people_and_programs() {
    requires!(tools());
    let dir = Dir::new();
    guest_disk(&dir);
    let before = dir.read("d");
    for global in ["", "--untrusted "] {
        let text = dir.vimg_ok(&format!("{global}inspect d")).stdout;
        assert!(text.contains("Test 1 on disk 1 partition 2"), "{text}");
        assert!(text.contains("/boot/grub/grub.cfg line 1: /dev/sda2 is disk 1 partition 2"), "{text}");
        let found = dir.vimg_ok(&format!("{global}inspect --output=json -f raw d")).json();
        assert_eq!(found["systems"][0]["distribution"], "test");
        assert_eq!(found["systems"][0]["root"], 1);
        assert_eq!(found["volumes"][1]["uuid"], ROOT);
        assert_eq!(found["disks"][0]["partition-table"]["partitions"][1]["number"], 2);
        assert_eq!(found["systems"][0]["boot-entries"][0]["kernel"]["path"], "/vmlinuz");
    }
    // In any format, and by a description.
    dir.vimg_ok("convert -f raw -O vmdk d d.vmdk");
    dir.write("m.vmx", "config.version = \"8\"\nmemSize = \"512\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"d.vmdk\"\n".as_bytes());
    for name in ["d.vmdk", "m.vmx"] {
        let found = dir.vimg_ok(&format!("inspect --output=json {name}")).json();
        assert_eq!(found["systems"][0]["host-name"], "host", "{name}");
        assert_eq!(dir.vimg_ok(&format!("cat {name} /etc/hostname")).stdout, "host\n");
    }
    assert_eq!(dir.read("d"), before);
    dir.vimg("inspect").expect_code(1);
    dir.vimg("inspect nothing").expect_clean_failure();
    dir.vimg("inspect --output=xml d").expect_code(1);
    dir.vimg("inspect -f raw -f raw -f raw d d").expect_code(1).expect_stderr("3 formats for 2 images");
}

#[test]
fn paths_are_those_of_the_guest() {
    requires!(tools());
    let dir = Dir::new();
    guest_disk(&dir);
    let names =
        |words: &str| -> Vec<String> { dir.vimg_ok(words).stdout.lines().map(str::to_owned).collect() };
    assert_eq!(names("ls d"), ["bin", "boot", "dev", "etc", "lost+found"]);
    assert_eq!(names("ls d /boot"), ["grub", "lost+found", "vmlinuz"]);
    assert_eq!(names("--untrusted ls d /boot/../boot/grub"), ["grub.cfg"]);
    assert_eq!(names("ls --volume 1 d /boot"), ["hidden"]);
    assert_eq!(names("ls --volume /dev/sda1 d"), ["grub", "lost+found", "vmlinuz"]);
    assert_eq!(dir.vimg_ok("cat d /boot/vmlinuz /etc/hostname").stdout, "kernelhost\n");
    let by_place = Cmd::new(tests::command::vimg_path())
        .words("cat d")
        .arg("disk 1 partition 1:/vmlinuz")
        .dir(dir.path())
        .ok();
    assert_eq!(by_place.stdout, "kernel");
    let all = names("ls -R d /boot");
    assert_eq!(
        all,
        ["/boot:", "grub", "lost+found", "vmlinuz", "", "/boot/grub:", "grub.cfg", "", "/boot/lost+found:"]
    );
    let long = dir.vimg_ok("ls -l d /etc/hostname").stdout;
    assert!(long.starts_with("-rw") && long.trim_end().ends_with("/etc/hostname"), "{long}");
    let listed = dir.vimg_ok("ls -R --output=json d /etc").json();
    let listed: Vec<_> =
        listed.as_array().unwrap().iter().map(|item| item["path"].as_str().unwrap()).collect();
    assert_eq!(listed, ["/etc/fstab", "/etc/hostname", "/etc/os-release"]);
    // What is there is printed although something else is not.
    let part = dir
        .vimg("cat d /nothing /etc/hostname")
        .expect_code(1)
        .expect_stderr("/nothing: no such file or directory");
    assert_eq!(part.stdout, "host\n");
    dir.vimg("cat d /etc").expect_code(1).expect_stderr("is a directory");
    dir.vimg("ls d /nothing").expect_code(1);
    dir.vimg("ls --volume 9 d").expect_code(1).expect_stderr("There are: 0 'disk 1 partition 1' (ext4)");
    dir.sparse("empty", 1 << 20);
    dir.vimg("ls -f raw empty").expect_code(1).expect_stderr("no operating system was found");
}

/// Every kind of name and file, back on the host as it was.
#[test]
fn what_is_copied_out_is_what_went_in() {
    requires!(tools(), tests::skip::root());
    let dir = Dir::new();
    let tree = dir.file("tree");
    std::fs::create_dir(&tree).unwrap();
    guest::fill(&tree, Size { names: 300, largest: 3_000_000, unix: true });
    let with_mode = |name: &str, mode| {
        std::fs::write(tree.join(name), name).unwrap();
        std::fs::set_permissions(tree.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    with_mode("only mine", 0o600);
    std::os::unix::fs::symlink("../../../../etc/passwd", tree.join("link out")).unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("folder out")).unwrap();
    let holes = std::fs::File::create(tree.join("holes")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&holes, b"end", 50 << 20).unwrap();
    drop(holes);
    dir.sparse("disk", 256 << 20);
    Cmd::new("mke2fs").words("-q -F -t ext4 -d tree disk").dir(dir.path()).ok();
    for global in ["", "--untrusted "] {
        let _ = std::fs::remove_dir_all(dir.file("out"));
        std::fs::create_dir(dir.file("out")).unwrap();
        // Pipes are left out, and told, if there are any.
        let ran = dir.vimg(&format!("{global}cp-out -f raw --volume 0 disk / out"));
        let fifos = Cmd::new("find").words("tree -type p -o -type s").dir(dir.path()).ok().stdout;
        assert_eq!(ran.code, Some(i32::from(!fifos.is_empty())), "{}", ran.story());
        for fifo in fifos.lines() {
            assert!(ran.stderr.contains(fifo.strip_prefix("tree").unwrap()), "{}", ran.story());
        }
        std::fs::remove_dir_all(dir.file("out/lost+found")).unwrap();
        let script = "cd tree && find . ! -type p ! -type s | LC_ALL=C sort > ../one; cd ../out && find . | LC_ALL=C sort > ../two";
        Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).ok();
        assert_eq!(dir.read("one"), dir.read("two"));
        let mut count = 0;
        for name in String::from_utf8_lossy(&dir.read("one")).lines().filter(|name| *name != ".") {
            count += usize::from(same(&tree.join(name), &dir.file("out").join(name)));
        }
        assert!(count > 250, "{count}");
    }
    assert!(dir.file("out/holes").metadata().unwrap().blocks() * 512 < 1 << 20);
    // One by one, beside debugfs.
    let dumped =
        Cmd::new("debugfs").words("-R").arg("cat \"/only mine\"").arg("disk").dir(dir.path()).ok().stdout;
    let ours = Cmd::new(tests::command::vimg_path())
        .words("cat -f raw --volume 0 disk")
        .arg("/only mine")
        .dir(dir.path())
        .ok()
        .stdout;
    assert_eq!((ours.as_str(), dumped.as_str()), ("only mine", "only mine"));
}

/// Names that are not UTF-8 come through `find` changed: those are not compared one by one.
fn same(one: &Path, other: &Path) -> bool {
    let (Ok(one_found), Ok(other_found)) = (one.symlink_metadata(), other.symlink_metadata()) else {
        return false;
    };
    assert_eq!(one_found.file_type(), other_found.file_type(), "{}", one.display());
    if one_found.is_symlink() {
        assert_eq!(std::fs::read_link(one).unwrap(), std::fs::read_link(other).unwrap());
    } else {
        assert_eq!(one_found.mode() & 0o777, other_found.mode() & 0o7777, "{}", one.display());
    }
    if one_found.is_file() {
        assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap(), "{}", one.display());
        assert_eq!(other_found.mode() & 0o7000, 0, "{}", one.display());
    }
    assert_eq!(one_found.mtime(), other_found.mtime(), "{}", one.display());
    true
}

/// Nothing is replaced, no link is followed, no bit gives rights, and a folder within itself ends.
#[test]
fn a_hostile_guest_writes_nothing_elsewhere() {
    requires!(tools());
    let dir = Dir::new();
    std::fs::create_dir_all(dir.file("tree/a/b")).unwrap();
    std::fs::write(dir.file("tree/a/file"), b"guest's").unwrap();
    std::fs::set_permissions(dir.file("tree/a/file"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    dir.sparse("disk", 8 << 20);
    Cmd::new("mke2fs").words("-q -F -t ext2 -d tree disk").dir(dir.path()).ok();
    Cmd::new("debugfs")
        .words("-w -f - disk")
        .stdin("link /a /a/b/loop\nlink /a /a/loop\n")
        .dir(dir.path())
        .ok();
    std::fs::create_dir_all(dir.file("out")).unwrap();
    let ran = dir.vimg("cp-out -f raw --volume 0 disk /a out").expect_code(1).expect_no_panic();
    assert!(ran.stderr.contains("a folder within itself"), "{}", ran.story());
    assert_eq!(dir.file("out/a/file").metadata().unwrap().mode() & 0o7777, 0o755);
    let listed = dir.vimg("ls -R -f raw --volume 0 disk /a").expect_code(1).expect_no_panic();
    assert!(
        listed.stderr.contains("a folder within itself") && listed.stdout.len() < 100_000,
        "{}",
        listed.story()
    );
    // A second time, and onto a link that leads elsewhere.
    dir.write("out/a/file", b"mine");
    let again = dir.vimg("cp-out -f raw --volume 0 disk /a/file out/a").expect_code(1);
    assert!(again.stderr.contains("nothing is replaced"), "{}", again.story());
    assert_eq!(dir.read("out/a/file"), b"mine");
    std::fs::create_dir(dir.file("elsewhere")).unwrap();
    std::fs::create_dir(dir.file("other")).unwrap();
    std::os::unix::fs::symlink(dir.file("elsewhere"), dir.file("other/a")).unwrap();
    dir.vimg("cp-out -f raw --volume 0 disk /a other").expect_code(1);
    assert_eq!(std::fs::read_dir(dir.file("elsewhere")).unwrap().count(), 0);
    dir.vimg("cp-out -f raw --volume 0 disk /a nowhere")
        .expect_code(1)
        .expect_stderr("could not open the folder 'nowhere'");
    dir.vimg("cp-out disk").expect_code(1);
    let progress = dir.vimg("cp-out --progress=json -f raw --volume 0 disk /a/file elsewhere").expect_code(0);
    let last: Value = serde_json::from_str(progress.stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&last["done"], &last["total"]), (&7.into(), &7.into()));
}
