//! When the host fails: full disks, failing disks, read-only targets, files that vanish, Ctrl-C. Always a
//! message that says what and where, and never a half-written file under the name of the target.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::command::{self, find};
use tests::skip::{Need, not_root, qemu, tool};
use tests::{Dir, requires};

/// A source of `mib` MiB that does not compress and has no holes.
fn noise(dir: &Dir, name: &str, mib: usize) {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut bytes = vec![0u8; mib << 20];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    dir.write(name, &bytes);
}

/// Files of the folder other than these.
fn others(dir: &Dir, known: &[&str]) -> Vec<String> {
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| !known.contains(&name.as_str()));
    names
}

/// A file size limit is a full disk that needs no mount and no privilege. (The shell ignores the signal that
/// would come with it, so that the write fails instead.)
#[test]
fn a_full_disk_in_the_middle_of_a_convert() {
    requires!(tool("prlimit"));
    let dir = Dir::new();
    noise(&dir, "in.raw", 16);
    let vimg = command::vimg_path().display().to_string();
    for target in ["-O qcow2", "-O raw", "-O qcow2 -c", "-O qcow2 -o compression_type=zstd -c", "-O qcow2 -W"]
    {
        let script = format!(
            "trap '' XFSZ; exec prlimit --fsize={} '{vimg}' convert -f raw {target} in.raw out",
            5 << 20
        );
        let ran = tests::Cmd::new("sh")
            .arg("-c")
            .arg(script)
            .dir(dir.path())
            .timeout(60)
            .run()
            .expect_clean_failure();
        assert_eq!(others(&dir, &["in.raw"]), [""; 0], "left behind\n{}", ran.story());
    }
}

/// The same without the shell's protection: the signal must not kill the program in the middle either.
#[test]
fn a_file_size_limit_is_a_message_not_a_signal() {
    requires!(tool("prlimit"));
    let dir = Dir::new();
    noise(&dir, "in.raw", 8);
    let ran = dir.vimg_cmd("convert -f raw -O qcow2 in.raw out.qcow2").limit("--fsize=3000000").run();
    let ran = ran.expect_clean_failure();
    assert_eq!(others(&dir, &["in.raw"]), [""; 0], "left behind\n{}", ran.story());
}

/// A file system of 8 MiB in a mount namespace of our own.
fn small_file_system() -> Need {
    let unshare = find("unshare").ok_or("no unshare on this machine")?;
    let ran = tests::Cmd::new(unshare).words("-rm sh -c").arg("mount -t tmpfs -o size=8m none /mnt").run();
    if ran.code == Some(0) {
        Ok(())
    } else {
        Err("no user namespaces with mounts on this machine".to_owned())
    }
}

#[test]
fn a_really_full_file_system() {
    requires!(small_file_system());
    let dir = Dir::new();
    noise(&dir, "in.raw", 16);
    let vimg = command::vimg_path().display().to_string();
    for target in [
        "-O qcow2",
        "-O raw",
        "-O qcow2 -c",
        "-O raw -o preallocation=full",
        "-O qcow2 -o preallocation=falloc",
    ] {
        let script = format!(
            "mount -t tmpfs -o size=8m none /mnt; '{vimg}' convert -f raw {target} '{}' /mnt/out; code=$?; ls -A /mnt; exit $code",
            dir.file("in.raw").display()
        );
        let ran = tests::Cmd::new("unshare")
            .words("-rm sh -c")
            .arg(script)
            .timeout(60)
            .run()
            .expect_clean_failure();
        assert_eq!(ran.stdout, "", "left behind\n{}", ran.story());
        assert!(ran.stderr.contains("space"), "it does not say what is wrong\n{}", ran.story());
    }
}

/// That a file system is too small can be known before anything is copied where every byte takes space.
/// (Otherwise it cannot: what the source holds may turn out to be zeros.)
#[test]
fn a_target_that_cannot_hold_the_image_is_refused_at_once() {
    requires!(small_file_system());
    let dir = Dir::new();
    noise(&dir, "in.raw", 64);
    let vimg = command::vimg_path().display().to_string();
    for options in ["-S 0", "-o preallocation=full", "-o preallocation=falloc"] {
        let script = format!(
            "mount -t tmpfs -o size=8m none /mnt; '{vimg}' convert -p -f raw -O raw {options} '{}' /mnt/out; ls /mnt",
            dir.file("in.raw").display()
        );
        let ran =
            tests::Cmd::new("unshare").words("-rm sh -c").arg(script).timeout(60).run().expect_no_panic();
        assert!(ran.stderr.contains("space"), "{}", ran.story());
        assert!(!ran.stdout.contains("(1"), "it began to copy\n{}", ran.story());
        assert!(!ran.stdout.contains("out"), "it left something behind\n{}", ran.story());
    }
}

#[test]
fn a_target_directory_without_permission() {
    requires!(not_root());
    let dir = Dir::new();
    noise(&dir, "in.raw", 1);
    std::fs::create_dir(dir.file("locked")).unwrap();
    std::fs::set_permissions(dir.file("locked"), std::fs::Permissions::from_mode(0o555)).unwrap();
    dir.vimg("convert -f raw -O qcow2 in.raw locked/out.qcow2")
        .expect_clean_failure()
        .expect_stderr("Permission denied");
    std::fs::write(dir.file("locked.qcow2"), b"x").unwrap();
    std::fs::set_permissions(dir.file("locked.qcow2"), std::fs::Permissions::from_mode(0o444)).unwrap();
    dir.vimg("convert -f raw -O qcow2 in.raw locked.qcow2")
        .expect_clean_failure()
        .expect_stderr("Permission denied");
}

#[test]
fn targets_that_cannot_be_written() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 1);
    std::fs::create_dir(dir.file("folder")).unwrap();
    for target in ["folder", "missing/out.qcow2", "/dev/full", "/proc/version", "in.raw/out"] {
        dir.vimg(&format!("convert -f raw -O raw in.raw {target}")).expect_clean_failure();
        dir.vimg(&format!("convert -f raw -O qcow2 in.raw {target}")).expect_clean_failure();
    }
    assert_eq!(others(&dir, &["in.raw", "folder"]), [""; 0]);
}

/// The source as its own target would destroy it.
#[test]
fn a_source_is_never_its_own_target() {
    requires!(qemu());
    let dir = Dir::new();
    noise(&dir, "in.raw", 1);
    let before = dir.read("in.raw");
    std::os::unix::fs::symlink("in.raw", dir.file("link.raw")).unwrap();
    std::fs::hard_link(dir.file("in.raw"), dir.file("hard.raw")).unwrap();
    for target in ["in.raw", "./in.raw", "link.raw", "hard.raw"] {
        dir.vimg(&format!("convert -f raw -O raw in.raw {target}")).expect_clean_failure();
        assert!(dir.read("in.raw") == before, "the source was destroyed through {target}");
    }
    dir.qemu_ok("create -f qcow2 -b in.raw -F raw top.qcow2");
    dir.vimg("convert -O raw top.qcow2 in.raw").expect_clean_failure();
    assert!(dir.read("in.raw") == before, "the backing file of the source was destroyed");
}

#[test]
fn a_vanished_backing_file() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 base.qcow2 4M");
    dir.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2");
    dir.qemu_ok("create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2");
    std::fs::remove_file(dir.file("base.qcow2")).unwrap();
    for words in [
        "convert -O raw top.qcow2 out.raw",
        "map top.qcow2",
        "compare top.qcow2 top.qcow2",
        "info --backing-chain top.qcow2",
    ] {
        let ran = dir.vimg(words).expect_clean_failure();
        assert!(ran.stderr.contains("base.qcow2"), "it does not say which file is missing\n{}", ran.story());
    }
    dir.vimg_ok("info top.qcow2");
    assert!(!dir.exists("out.raw"));
}

#[test]
fn a_vanished_data_file() {
    requires!(qemu());
    let dir = Dir::new();
    dir.qemu_ok("create -f qcow2 -o data_file=a.data a.qcow2 4M");
    std::fs::remove_file(dir.file("a.data")).unwrap();
    let ran = dir.vimg("convert -O raw a.qcow2 out.raw").expect_clean_failure();
    assert!(ran.stderr.contains("a.data"), "{}", ran.story());
    dir.vimg_ok("info a.qcow2");
    assert!(!dir.exists("out.raw"));
}

/// What was under the target's name before an interrupted convert.
fn interrupted(signal: Signal, target: &str) {
    let dir = Dir::new();
    noise(&dir, "in.raw", 64);
    let cmd = dir.vimg_cmd(&format!("convert -r 8M -f raw {target} in.raw out"));
    let mut child = cmd.spawn();
    std::thread::sleep(Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none(), "{cmd}: it is over before it could be interrupted");
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    let status = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&status.stderr).into_owned();
    assert!(!status.status.success(), "{cmd}: success although interrupted");
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(others(&dir, &["in.raw"]), [""; 0], "{cmd}: left behind\n{said}");
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    interrupted(Signal::SIGINT, "-O qcow2");
    interrupted(Signal::SIGINT, "-O raw");
    interrupted(Signal::SIGTERM, "-O qcow2 -c");
    interrupted(Signal::SIGHUP, "-O qcow2");
}

/// Nothing can be cleaned up then, but what is there must not look complete.
#[test]
fn even_a_kill_leaves_nothing_under_the_final_name() {
    let dir = Dir::new();
    noise(&dir, "in.raw", 64);
    let mut child = dir.vimg_cmd("convert -r 8M -f raw -O qcow2 in.raw out.qcow2").spawn();
    std::thread::sleep(Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none(), "it is over before it could be killed");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!dir.exists("out.qcow2"), "a half-written image lies under the final name");
}

/// An image that was there before keeps its name, and a refused convert keeps its contents.
#[test]
fn a_failing_convert_does_not_harm_what_was_there() {
    requires!(qemu());
    let dir = Dir::new();
    dir.write("out.raw", b"precious");
    dir.vimg("convert -O raw missing.qcow2 out.raw").expect_clean_failure();
    dir.qemu_ok("create -f qcow2 -u -b gone.qcow2 -F qcow2 lost.qcow2 1M");
    dir.vimg("convert -O raw lost.qcow2 out.raw").expect_clean_failure();
    dir.vimg("convert -O raw -o nonsense=1 lost.qcow2 out.raw").expect_clean_failure();
    assert!(dir.read("out.raw") == b"precious");
}

/// A reader that goes away is a quiet end, also in the middle of a long map.
#[test]
fn a_reader_that_leaves_early() {
    let dir = Dir::new();
    dir.sparse("a.raw", 64 << 20);
    for n in 0..2000u64 {
        dir.poke("a.raw", n * 32768, &[1; 4096]);
    }
    let mut child = dir.vimg_cmd("map --output=json -f raw a.raw").spawn();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{:?}", output.status);
}
