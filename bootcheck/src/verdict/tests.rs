//! Verdicts about recorded facts.

use super::*;
use crate::pattern::Milestone;
use crate::watch::{Evidence, Failure, Match, Station};

fn outcome(ending: Ending) -> Outcome {
    Outcome {
        ending,
        cpus: vec![],
        disks: vec![DiskActivity { reads: 1, read_bytes: 4096, ..DiskActivity::default() }],
        startup: Duration::ZERO,
        screen: vec![],
        vars: None,
    }
}

fn seen(name: &str) -> Match {
    Match { pattern: name.to_owned(), line: "line".to_owned(), at: Duration::from_secs(1) }
}

fn failing(reason: Reason) -> Watched {
    Watched { bytes: 9, failures: vec![Failure { reason, seen: seen("p") }], ..Watched::default() }
}

#[track_caller]
fn expect_reason(verdict: &Verdict, expected: Reason) {
    match verdict {
        Verdict::NotBooted { reason, .. } => assert_eq!(*reason, expected),
        other => panic!("{other:?}"),
    }
    assert_eq!(verdict.exit_code(), 1);
}

#[test]
fn a_prompt_is_success_whatever_comes_then() {
    let watched = Watched { bytes: 1, success: Some(seen("login prompt")), ..Watched::default() };
    for ending in [Ending::Stopped, Ending::PowerOff, Ending::TripleFault] {
        let verdict = judge(Stopped::Decided, &watched, &outcome(ending));
        assert_eq!((&verdict, verdict.exit_code()), (&Verdict::Booted, 0));
    }
    // Also at the last moment.
    let late = judge(Stopped::TimeLimit(Duration::from_secs(1)), &watched, &outcome(Ending::Stopped));
    assert_eq!(late, Verdict::Booted);
}

#[test]
fn the_first_failure_is_the_reason() {
    let mut watched = failing(Reason::RootNotMounted);
    watched.failures.push(Failure { reason: Reason::KernelPanic, seen: seen("q") });
    let verdict = judge(Stopped::GuestEnded, &watched, &outcome(Ending::Reset { how: "ACPI" }));
    expect_reason(&verdict, Reason::RootNotMounted);
}

#[test]
fn who_never_reads_has_no_driver() {
    for reason in [Reason::RootNotFound, Reason::InitramfsShell, Reason::DracutShell] {
        let mut ended = outcome(Ending::Stopped);
        expect_reason(&judge(Stopped::Decided, &failing(reason), &ended), reason);
        let looked_at = DiskActivity { reads: 1, read_bytes: 512, ..DiskActivity::default() };
        ended.disks = vec![DiskActivity::default(), looked_at];
        expect_reason(&judge(Stopped::Decided, &failing(reason), &ended), Reason::NoDiskDriver);
        // Nothing is known about disks that nobody counted.
        ended.disks.clear();
        expect_reason(&judge(Stopped::Decided, &failing(reason), &ended), reason);
    }
    let mut ended = outcome(Ending::Stopped);
    ended.disks = vec![DiskActivity::default()];
    expect_reason(&judge(Stopped::Decided, &failing(Reason::KernelPanic), &ended), Reason::KernelPanic);
}

/// Behind a boot loader the disk has been read: what counts is who reads it after the kernel's first words.
#[test]
fn a_kernel_that_never_reads_has_no_driver_whatever_its_loader_read() {
    let mut ended = outcome(Ending::Stopped);
    ended.disks = vec![DiskActivity { reads: 900, read_bytes: 20 << 20, ..DiskActivity::default() }];
    let after = |reads| Watched { kernel_reads: reads, ..failing(Reason::RootNotFound) };
    expect_reason(&judge(Stopped::Decided, &after(Some(0)), &ended), Reason::NoDiskDriver);
    for reads in [None, Some(1)] {
        expect_reason(&judge(Stopped::Decided, &after(reads), &ended), Reason::RootNotFound);
    }
}

#[test]
fn time_limits() {
    let limit = Stopped::TimeLimit(Duration::from_secs(60));
    let silent = judge(limit, &Watched::default(), &outcome(Ending::Stopped));
    expect_reason(&silent, Reason::NoOutput);
    let watched = Watched {
        bytes: 100,
        stations: vec![
            Station {
                milestone: Milestone::Initramfs,
                at: Duration::ZERO,
                line: String::new(),
                by: Evidence::Console,
            },
            Station {
                milestone: Milestone::Kernel,
                at: Duration::ZERO,
                line: String::new(),
                by: Evidence::Console,
            },
        ],
        expected: 3,
        expected_seen: 1,
        waiting_for: Some("ready".to_owned()),
        ..Watched::default()
    };
    let verdict = judge(limit, &watched, &outcome(Ending::Stopped));
    expect_reason(&verdict, Reason::Timeout);
    let Verdict::NotBooted { detail: Some(detail), .. } = verdict else { panic!() };
    assert_eq!(
        detail,
        "after 60 s; the last station was: initramfs; still waiting for 'ready' (1 of 3 patterns seen)"
    );
}

#[test]
fn endings_without_words() {
    let watched = Watched { bytes: 5, ..Watched::default() };
    for (ending, reason) in [
        (Ending::PowerOff, Reason::PowerOff),
        (Ending::Reset { how: "port 0xcf9" }, Reason::Reset),
        (Ending::TripleFault, Reason::TripleFault),
        (Ending::Stuck { reason: "internal error 1".to_owned() }, Reason::Stuck),
    ] {
        expect_reason(&judge(Stopped::GuestEnded, &watched, &outcome(ending)), reason);
    }
}

#[test]
fn what_says_nothing_about_the_image_is_no_verdict() {
    let watched = Watched { bytes: 5, ..Watched::default() };
    for (stopped, ending) in [
        (Stopped::Cancelled, Ending::Stopped),
        (Stopped::GuestEnded, Ending::EngineDied { reason: "killed".to_owned() }),
        (Stopped::GuestEnded, Ending::Stopped),
    ] {
        let verdict = judge(stopped, &watched, &outcome(ending));
        assert_eq!((verdict.name(), verdict.exit_code()), ("not-checked", 2));
    }
}

#[test]
fn names_are_unique_and_plain() {
    let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
    assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')));
}
