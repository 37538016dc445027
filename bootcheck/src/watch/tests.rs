//! Consoles that were recorded (qemu with Debian 12 guests), and some that were not.

use super::*;

fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

/// Everything that is seen on a console, printed in pieces of `piece` bytes.
fn watch_in(console: &[u8], piece: usize, expectations: Expectations) -> Watched {
    let mut watcher = Watcher::new(expectations, None).unwrap();
    let mut at = Duration::ZERO;
    for bytes in console.chunks(piece) {
        at += Duration::from_millis(1);
        watcher.feed(bytes, at);
        watcher.tick(at);
    }
    watcher.tick(at + PAUSE);
    watcher.finish(at + seconds(1))
}

fn watch(console: &[u8]) -> Watched {
    let whole = watch_in(console, 4096, Expectations::default());
    let bytewise = watch_in(console, 1, Expectations::default());
    let lines = |watched: &Watched| watched.failures.iter().map(|f| f.seen.line.clone()).collect::<Vec<_>>();
    assert_eq!(lines(&whole), lines(&bytewise), "however it is cut");
    assert_eq!(whole.success.is_some(), bytewise.success.is_some());
    whole
}

fn expecting(expect: &[&str], fail: &[&str]) -> Expectations {
    let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    Expectations::parse(&owned(expect), &owned(fail), false).unwrap()
}

fn stations(watched: &Watched) -> Vec<Milestone> {
    watched.stations.iter().map(|station| station.milestone).collect()
}

#[track_caller]
fn expect_failure(console: &[u8], reason: Reason, line: &str) {
    let watched = watch(console);
    let first = watched.failures.first().unwrap_or_else(|| panic!("nothing found: {watched:?}"));
    assert_eq!((first.reason, watched.success.is_some()), (reason, false));
    assert!(first.seen.line.contains(line), "{:?}", first.seen);
}

#[test]
fn reads_count_from_the_kernels_first_words() {
    let mut watcher = Watcher::new(Expectations::default(), Some(Through::default())).unwrap();
    watcher.disk_read(0, 0, 1, seconds(0));
    watcher.feed(b"GRUB loading.\r\n", seconds(1));
    watcher.disk_read(0, 2048, 8, seconds(1));
    watcher.feed(
        b"[    0.000000] Linux version 6.1.0-30-amd64 (debian-kernel@lists.debian.org)\r\n",
        seconds(2),
    );
    watcher.feed(b"[    0.000000] Command line: root=/dev/sda1\r\n", seconds(2));
    assert_eq!(watcher.watched.kernel_reads, Some(0));
    watcher.disk_read(0, 0, 8, seconds(3));
    assert_eq!(watcher.finish(seconds(4)).kernel_reads, Some(1));
}

#[test]
fn a_debian_comes_up() {
    let watched = watch(include_bytes!("../../testdata/debian.log"));
    let success = watched.success.clone().unwrap();
    assert_eq!(success.pattern, "systemd target");
    assert!(success.line.contains("multi-user.target"), "{success:?}");
    assert_eq!(watched.failures, []);
    assert_eq!(
        stations(&watched),
        [
            Milestone::FirstByte,
            Milestone::Kernel,
            Milestone::Initramfs,
            Milestone::RootMounted,
            Milestone::Init,
            Milestone::Target,
            Milestone::Login
        ]
    );
    assert_eq!(watched.tail.last().unwrap(), "vmtest login: ");
}

#[test]
fn a_quiet_guest_shows_its_prompt_only() {
    let watched = watch(include_bytes!("../../testdata/small.log"));
    assert_eq!(watched.success.unwrap().line, "small login:");
}

#[test]
fn guests_that_do_not_come_up() {
    expect_failure(include_bytes!("../../testdata/nodisk.log"), Reason::RootNotFound, "Gave up waiting");
    expect_failure(include_bytes!("../../testdata/wrongroot.log"), Reason::RootNotFound, "Gave up waiting");
    expect_failure(include_bytes!("../../testdata/badsuper.log"), Reason::RootNotMounted, "/dev/vda2");
    expect_failure(include_bytes!("../../testdata/noinitrd.log"), Reason::RootNotFound, "/dev/root");
    expect_failure(include_bytes!("../../testdata/panic.log"), Reason::InitDied, "Attempted to kill init");
    expect_failure(include_bytes!("../../testdata/emergency.log"), Reason::EmergencyMode, "emergency mode");
}

#[test]
fn the_shell_of_an_initramfs_is_seen_though_its_line_never_ends() {
    let watched = watch(include_bytes!("../../testdata/wrongroot.log"));
    let patterns: Vec<_> = watched.failures.iter().map(|failure| failure.seen.pattern.as_str()).collect();
    assert_eq!(patterns, ["no root device (initramfs-tools)", "initramfs shell (busybox)"]);
}

#[test]
fn boot_loaders_that_give_up() {
    expect_failure(
        b"SeaBIOS (version 1.16.3)\r\n\r\nBooting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n\r\nNo bootable device.\r\n",
        Reason::NoBootLoader,
        "No bootable device",
    );
    expect_failure(
        b"GRUB loading..\r\nWelcome to GRUB!\r\n\r\nerror: no such device: 5b1c9f3e.\r\nEntering rescue mode...\r\ngrub rescue> ",
        Reason::BootLoader,
        "Entering rescue mode",
    );
    expect_failure(
        b"\x1b[1;1H\x1b[2J                GNU GRUB  version 2.06\x1b[3;2HMinimal BASH-like line editing is supported.\x1b[9;1Hgrub> \x1b[9;7H",
        Reason::BootLoader,
        "Minimal BASH-like",
    );
}

#[test]
fn half_a_line_is_no_prompt() {
    let mut watcher = Watcher::new(Expectations::default(), None).unwrap();
    watcher.feed(b"debian login:", seconds(1));
    watcher.tick(seconds(1) + Duration::from_millis(5));
    assert_eq!(watcher.decision(), None, "the console has not paused");
    watcher.feed(b" root is what you want\n", seconds(1) + Duration::from_millis(6));
    watcher.tick(seconds(2));
    assert_eq!(watcher.decision(), None);
    watcher.feed(b"debian login: ", seconds(3));
    watcher.tick(seconds(4));
    assert_eq!(watcher.decision(), Some(Decision::Success));
    assert_eq!(watcher.finish(seconds(4)).success.unwrap().at, seconds(3), "when it was printed");
}

#[test]
fn expected_patterns_are_seen_in_their_order() {
    let console = b"two\none two\nthree login: \n";
    let watched = watch_in(console, 100, expecting(&["one", "two", "three"], &[]));
    assert_eq!(watched.success.unwrap().pattern, "three");
    let watched = watch_in(console, 100, expecting(&["three", "one"], &[]));
    assert_eq!((watched.success, watched.expected_seen), (None, 1));
    assert_eq!(watched.waiting_for.unwrap(), "one");
    // The same text is not used twice.
    let watched = watch_in(b"once\n", 100, expecting(&["once", "once"], &[]));
    assert_eq!(watched.expected_seen, 1);
    let watched = watch_in(b"once", 1, expecting(&["once", "once"], &[]));
    assert_eq!(watched.expected_seen, 1, "not even on a line that is looked at twice");
    let watched = watch_in(b"once, twice: once\n", 1, expecting(&["once", "once"], &[]));
    assert_eq!(watched.expected_seen, 2);
}

#[test]
fn what_is_expected_may_be_a_failure() {
    let watched = watch_in(b"Kernel panic - not syncing: test\n", 10, expecting(&["not syncing: test"], &[]));
    assert!(watched.success.is_some() && watched.failures.is_empty());
}

#[test]
fn patterns_of_the_user_fail() {
    let watched = watch_in(b"all is well\nnot at all\nlogin: \n", 10, expecting(&[], &["not at", "login"]));
    assert_eq!(watched.failures[0].reason, Reason::Pattern);
    assert_eq!(watched.failures[0].seen.pattern, "not at");
    assert_eq!(watched.success.map(|success| success.pattern), Some("login prompt".to_owned()));
}

#[test]
fn failures_can_be_ignored() {
    let ignoring = Expectations::parse(&[], &[], true).unwrap();
    let watched = watch_in(b"(initramfs) \nhost login: \n", 10, ignoring);
    assert!(watched.success.is_some() && watched.failures.is_empty());
    assert_eq!(watched.notes[0].pattern, "initramfs shell (busybox)");
}

#[test]
fn a_wrong_expression_is_told() {
    let error = Expectations::parse(&["(".to_owned()], &[], false).unwrap_err();
    assert!(error.to_string().starts_with("--expect '(' is not a regular expression: "), "{error}");
}

#[test]
fn memory_is_bounded() {
    let mut console = vec![];
    for n in 0..20_000 {
        console.extend(format!("I/O error, dev vda, sector {n} {}\n", "x".repeat(900)).bytes());
    }
    let watched = watch_in(&console, 4096, Expectations::default());
    assert_eq!((watched.notes.len(), watched.tail.len()), (KEPT, TAIL));
    assert!(watched.tail.iter().all(|line| line.len() <= TAIL_LINE + 3));
    assert_eq!(watched.bytes, console.len() as u64);
}

#[test]
fn no_bytes_panic() {
    let mut seed = 1_u64;
    let noise: Vec<u8> = (0..200_000)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_be_bytes()[0]
        })
        .collect();
    for piece in [1, 7, 4096] {
        watch_in(&noise, piece, expecting(&["never \u{e4}"], &["neither"]));
    }
}
