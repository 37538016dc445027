//! Watches a guest: what has been seen, when, and whether that decides the matter.
//!
//! ```text
//!   console bytes -> lines --.
//!   screen rows -------------+-> patterns -> signs, stations, notes
//!   firmware log -> lines ---'                  ^
//!   disk reads -> trace (landmarks) ------------'
//! ```
//!
//! Complete lines are looked at as they end. The line that has not ended is looked at when the console has paused:
//! then it may be a prompt, and what is half printed is not taken for one.

mod mask;
mod prompt;
mod seen;

use std::collections::VecDeque;
use std::time::Duration;

use block::{Error, Result};
use crypt::Secret;
use regex::Regex;

use crate::console::Lines;
use crate::pattern::{Milestone, Pattern, Patterns, Sign};
use crate::trace::Trace;
use crate::verdict::Reason;

pub(crate) use mask::Mask;
use prompt::{Answer, Prompts};

pub use seen::{Evidence, Failure, Match, Station, Watched};

/// A console that has been silent for so long may be showing a prompt.
pub const PAUSE: Duration = Duration::from_millis(30);
/// Lines that are kept as the end of the console.
const TAIL: usize = 40;
/// Characters of a line that are kept.
const TAIL_LINE: usize = 400;
/// The name of the failure of passphrases that were typed.
pub(crate) const REFUSED: &str = "passphrase refused";
/// Failures and notes that are kept.
const KEPT: usize = 16;

/// What the user expects of a guest.
#[derive(Debug, Clone, Default)]
pub struct Expectations {
    /// Must be seen in this order; empty: the built-in signs of success.
    pub expect: Vec<Regex>,
    /// Must not be seen.
    pub fail: Vec<Regex>,
    /// The built-in signs of failure are no failures.
    pub ignore_failures: bool,
}

impl Expectations {
    /// Compiles the user's regular expressions.
    ///
    /// # Errors
    /// `Usage`: one of them is none.
    pub fn parse(expect: &[String], fail: &[String], ignore_failures: bool) -> Result<Self> {
        let all =
            |texts: &[String], option| texts.iter().map(|text| compile(text, option)).collect::<Result<_>>();
        Ok(Self { expect: all(expect, "--expect")?, fail: all(fail, "--fail")?, ignore_failures })
    }
}

fn compile(text: &str, option: &str) -> Result<Regex> {
    Regex::new(text).map_err(|error| {
        let why = error.to_string();
        let why = why.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Error::usage(format!("{option} '{text}' is not a regular expression: {why}"))
    })
}

/// Whether a console has told enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It boots.
    Success,
    /// It does not.
    Failure,
}

/// What is known of a boot through a firmware before it begins.
#[derive(Debug, Clone, Default)]
pub struct Through {
    /// Places of the disks that tell something when they are read.
    pub trace: Trace,
    /// The first sector of the first disk is one that a BIOS starts although it holds no code.
    pub starts_nothing: bool,
}

/// A text that comes in pieces.
#[derive(Debug)]
struct Reader {
    lines: Lines,
    /// When the unfinished line last grew, unless it has been looked at since.
    unseen: Option<Duration>,
}

impl Reader {
    fn new() -> Self {
        Self { lines: Lines::new(), unseen: None }
    }

    /// The lines that `bytes` complete.
    fn push(&mut self, bytes: &[u8], at: Duration) -> Vec<String> {
        let mut complete = vec![];
        self.lines.push(bytes, |line| complete.push(line.to_owned()));
        self.unseen = Some(at);
        complete
    }

    /// The unfinished line, if there is news in it and nothing has come for `pause`; and when it came.
    fn paused(&mut self, now: Duration, pause: Duration) -> Option<(String, Duration)> {
        let since = self.unseen.filter(|since| now.saturating_sub(*since) >= pause)?;
        self.unseen = None;
        let line = self.lines.partial().into_owned();
        (!line.is_empty()).then_some((line, since.min(now)))
    }
}

/// Watches one guest.
#[derive(Debug)]
pub struct Watcher {
    patterns: Patterns,
    log_patterns: Patterns,
    expectations: Expectations,
    console: Reader,
    log: Reader,
    screen: Vec<String>,
    tail: VecDeque<String>,
    log_tail: VecDeque<String>,
    watched: Watched,
    /// Bytes of the unfinished line in which expected patterns have been found already.
    used: usize,
    /// A firmware starts the guest.
    through: Option<Through>,
    prompts: Prompts,
    /// When something was last seen of the guest, of whatever kind.
    last_sign: Duration,
}

impl Watcher {
    /// Begins to watch. `through`: a firmware starts the guest.
    ///
    /// # Errors
    /// Never in practice: the built-in patterns are tested.
    pub fn new(expectations: Expectations, through: Option<Through>) -> Result<Self> {
        let watched = Watched {
            expected: expectations.expect.len(),
            waiting_for: expectations.expect.first().map(|regex| regex.as_str().to_owned()),
            ..Watched::default()
        };
        Ok(Self {
            patterns: Patterns::new()?,
            log_patterns: Patterns::of_log()?,
            expectations,
            console: Reader::new(),
            log: Reader::new(),
            screen: vec![],
            tail: VecDeque::new(),
            log_tail: VecDeque::new(),
            watched,
            used: 0,
            through,
            prompts: Prompts::default(),
            last_sign: Duration::ZERO,
        })
    }

    /// The same with passphrases to be typed where the guest asks for one.
    #[must_use]
    pub fn with_passphrases(self, passphrases: Vec<Secret>) -> Self {
        Self { prompts: Prompts::new(passphrases), ..self }
    }

    /// Passphrases that are to be typed on the console now, one line each.
    pub fn take_typed(&mut self) -> Vec<Secret> {
        self.prompts.take()
    }

    /// The guest has printed `bytes` at `at`.
    pub fn feed(&mut self, bytes: &[u8], at: Duration) {
        if bytes.is_empty() {
            return;
        }
        if self.watched.bytes == 0 {
            self.pass(Milestone::FirstByte, "", at, Evidence::Console);
            if self.through.is_some() {
                self.pass(Milestone::Firmware, "", at, Evidence::Console);
            }
        }
        self.watched.bytes = self.watched.bytes.saturating_add(bytes.len() as u64);
        self.watched.last_output = Some(at);
        self.last_sign = at;
        for line in self.console.push(bytes, at) {
            self.look(&line, at, Evidence::Console);
            self.used = 0;
            self.prompts.line_ended();
            self.count_from_kernel();
            keep(&mut self.tail, &line);
        }
    }

    /// From the kernel's first words on, reads are its own: a boot loader has read all that it wanted by then.
    fn count_from_kernel(&mut self) {
        let kernel = |station: &Station| station.by.is_spoken() && station.milestone == Milestone::Kernel;
        if self.through.is_some() && self.watched.kernel_reads.is_none() {
            self.watched.kernel_reads = self.watched.stations.iter().any(kernel).then_some(0);
        }
    }

    /// The firmware has written `bytes` into its log at `at`.
    pub fn firmware_log(&mut self, bytes: &[u8], at: Duration) {
        if bytes.is_empty() {
            return;
        }
        self.pass(Milestone::Firmware, "", at, Evidence::FirmwareLog);
        self.last_sign = at;
        for line in self.log.push(bytes, at) {
            self.look_at_log(&line, at);
            keep(&mut self.log_tail, &line);
        }
    }

    /// The screen shows these rows at `at`.
    pub fn screen(&mut self, rows: &[String], at: Duration) {
        self.last_sign = at;
        let before = std::mem::replace(&mut self.screen, rows.to_vec());
        let used = std::mem::take(&mut self.used);
        for row in rows.iter().filter(|row| !row.is_empty() && !before.contains(row)) {
            self.look(row, at, Evidence::Screen);
            self.used = 0;
        }
        self.used = used;
    }

    /// The guest reads this of a disk at `at`.
    pub fn disk_read(&mut self, disk: usize, sector: u64, sectors: u64, at: Duration) {
        self.last_sign = at;
        if let Some(reads) = &mut self.watched.kernel_reads {
            *reads += 1;
        }
        let Some(through) = &mut self.through else { return };
        if let Some((milestone, why)) = through.trace.read(disk, sector, sectors, at) {
            self.pass(milestone, &why, at, Evidence::DiskReads);
        }
    }

    /// Looks at unfinished lines if nothing more has come.
    pub fn tick(&mut self, now: Duration) {
        self.look_at_partial(now, PAUSE);
    }

    fn look_at_partial(&mut self, now: Duration, pause: Duration) {
        if let Some((line, since)) = self.console.paused(now, pause) {
            self.look(&line, since, Evidence::Console);
        }
        if let Some((line, since)) = self.log.paused(now, pause) {
            self.look_at_log(&line, since);
        }
    }

    /// When something was last seen of the guest, while silence means something: its firmware has come to a disk (how
    /// long it takes to get there is a matter of the host), and it is not known to be beyond its boot loader.
    pub fn silent_since(&self) -> Option<Duration> {
        let beyond = |station: &Station| station.by.is_spoken() && station.milestone >= Milestone::Kernel;
        let waits =
            self.watched.has_reached(Milestone::DiskSeen) && !self.watched.stations.iter().any(beyond);
        waits.then_some(self.last_sign)
    }

    /// Whether a boot loader has read all of a kernel: from then on silence may be that of the kernel.
    pub fn has_loaded_kernel(&self) -> bool {
        self.through.as_ref().is_some_and(|through| through.trace.has_loaded_kernel())
    }

    /// Whether enough has been seen.
    pub fn decision(&self) -> Option<Decision> {
        match (&self.watched.success, self.watched.failures.is_empty()) {
            (_, false) => Some(Decision::Failure),
            (Some(_), true) => Some(Decision::Success),
            (None, true) => None,
        }
    }

    /// The last line that is not empty, for showing where the guest is.
    pub fn last_line(&self) -> String {
        let partial = self.console.lines.partial();
        let complete = self.tail.iter().rev().map(String::as_str);
        std::iter::once(&*partial)
            .chain(complete)
            .find(|line| !line.trim().is_empty())
            .unwrap_or("")
            .to_owned()
    }

    /// The latest station.
    pub fn station(&self) -> Option<Milestone> {
        self.watched.stations.iter().map(|station| station.milestone).max()
    }

    /// The end of the run: everything that has been seen.
    pub fn finish(mut self, now: Duration) -> Watched {
        self.look_at_partial(now, Duration::ZERO);
        for (reader, tail) in [(&self.console, &mut self.tail), (&self.log, &mut self.log_tail)] {
            let partial = reader.lines.partial();
            if !partial.is_empty() {
                keep(tail, &partial);
            }
        }
        let readings = self.through.map(|through| through.trace.readings()).unwrap_or_default();
        Watched { tail: self.tail.into(), firmware_log: self.log_tail.into(), readings, ..self.watched }
    }

    /// Takes a line for what it is. An unfinished line may come again when it is longer.
    fn look(&mut self, line: &str, at: Duration, by: Evidence) {
        self.look_for_expected(line, at);
        self.look_for_fail(line, at);
        let found: Vec<_> = self.patterns.on(line).collect();
        // Of two signs on a line the first one counts, and a sign of failure is no station; notes are all noted.
        let failed = found.iter().any(|pattern| matches!(pattern.sign, Sign::Failure(_)));
        let mut decided = false;
        for pattern in found {
            match pattern.sign {
                Sign::Success(milestone) => {
                    self.pass(milestone, line, at, by);
                    if self.expectations.expect.is_empty() && !decided {
                        self.succeed(pattern.name, line, at);
                    }
                    decided = true;
                }
                Sign::Failure(reason) if !decided => {
                    if let Some(milestone) = implied(reason, pattern.name).filter(|_| self.through.is_some())
                    {
                        self.pass(milestone, line, at, by);
                    }
                    self.sign_of_failure(reason, pattern, line, at);
                    decided = true;
                }
                Sign::Failure(_) => {}
                Sign::Passphrase if !decided => {
                    self.at_prompt(pattern, line, at, by);
                    decided = true;
                }
                Sign::Passphrase => {}
                Sign::Note => self.note(pattern.name, line, at),
                Sign::Station(milestone) if !failed => self.pass(milestone, line, at, by),
                Sign::Station(_) => {}
            }
        }
    }

    /// The guest asks for a passphrase. (What a BIOS shows on the screen comes through the serial line, too.)
    fn at_prompt(&mut self, pattern: &Pattern, line: &str, at: Duration, by: Evidence) {
        if self.expectations.ignore_failures && self.prompts.is_empty() {
            return self.note(pattern.name, line, at);
        }
        if self.through.is_some() {
            let is_grub = pattern.name.ends_with("(GRUB)");
            let milestone = if is_grub { Milestone::BootLoader } else { Milestone::Initramfs };
            self.pass(milestone, line, at, by);
        }
        if by == Evidence::Screen && !self.prompts.is_empty() {
            return;
        }
        match self.prompts.asked(line) {
            Answer::NoneGiven => self.fail(Reason::Passphrase, pattern.name, line, at),
            Answer::Refused => self.fail(Reason::Passphrase, REFUSED, line, at),
            Answer::Type => self.watched.passphrases_typed += 1,
            Answer::Done => {}
        }
    }

    fn sign_of_failure(&mut self, reason: Reason, pattern: &Pattern, line: &str, at: Duration) {
        if self.expectations.ignore_failures {
            self.note(pattern.name, line, at);
        } else {
            self.fail(reason, pattern.name, line, at);
        }
    }

    fn look_at_log(&mut self, line: &str, at: Duration) {
        let found: Vec<_> = self.log_patterns.on(line).collect();
        for pattern in found {
            match pattern.sign {
                Sign::Station(Milestone::BootLoader)
                    if self.through.as_ref().is_some_and(|through| through.starts_nothing) =>
                {
                    self.fail(Reason::NoBootLoader, "boot sector without code", line, at);
                }
                Sign::Station(milestone) => self.pass(milestone, line, at, Evidence::FirmwareLog),
                Sign::Failure(reason) => self.sign_of_failure(reason, pattern, line, at),
                Sign::Success(_) | Sign::Note | Sign::Passphrase => {}
            }
        }
    }

    /// Each expected pattern is looked for behind the one before it, on the same line or a later one.
    fn look_for_expected(&mut self, line: &str, at: Duration) {
        while let Some(regex) = self.expectations.expect.get(self.watched.expected_seen) {
            let Some(found) = regex.find_at(line, floor(line, self.used)) else { return };
            self.used = found.end();
            let name = regex.as_str().to_owned();
            self.watched.expected_seen += 1;
            let next = self.expectations.expect.get(self.watched.expected_seen);
            self.watched.waiting_for = next.map(|regex| regex.as_str().to_owned());
            if next.is_none() {
                self.succeed(&name, line, at);
            }
        }
    }

    fn look_for_fail(&mut self, line: &str, at: Duration) {
        let found = self.expectations.fail.iter().find(|regex| regex.is_match(line));
        if let Some(name) = found.map(|regex| regex.as_str().to_owned()) {
            self.fail(Reason::Pattern, &name, line, at);
        }
    }

    fn succeed(&mut self, pattern: &str, line: &str, at: Duration) {
        if self.watched.success.is_none() {
            self.watched.success = Some(matched(pattern, line, at));
        }
    }

    /// A failure after success is none: the check had been decided.
    fn fail(&mut self, reason: Reason, pattern: &str, line: &str, at: Duration) {
        let known = self.watched.failures.iter_mut().find(|failure| failure.seen.pattern == pattern);
        if let Some(known) = known {
            grow(&mut known.seen, line);
        } else if self.watched.success.is_none() && self.watched.failures.len() < KEPT {
            self.watched.failures.push(Failure { reason, seen: matched(pattern, line, at) });
        }
    }

    fn note(&mut self, pattern: &str, line: &str, at: Duration) {
        let known = self.watched.notes.iter_mut().find(|note| line.starts_with(&*note.line));
        if let Some(known) = known {
            grow(known, line);
        } else if self.watched.notes.len() < KEPT {
            self.watched.notes.push(matched(pattern, line, at));
        }
    }

    fn pass(&mut self, milestone: Milestone, line: &str, at: Duration, by: Evidence) {
        if !self.watched.stations.iter().any(|station| station.milestone == milestone) {
            self.watched.stations.push(Station { milestone, at, line: shorten(line), by });
        }
    }
}

/// An unfinished line comes again when it is longer, and what a BIOS cuts on the serial port is whole on the screen.
fn grow(seen: &mut Match, line: &str) {
    if line.starts_with(&*seen.line) {
        seen.line = shorten(line.trim_end());
    }
}

/// Who says that it cannot go on has at least been started. (A boot loader says so on its way, too.)
fn implied(reason: Reason, pattern: &str) -> Option<Milestone> {
    match reason {
        Reason::RootNotFound | Reason::RootNotMounted | Reason::NoInit if pattern.ends_with("(kernel)") => {
            Some(Milestone::Kernel)
        }
        Reason::RootNotFound | Reason::RootNotMounted | Reason::InitramfsShell | Reason::DracutShell => {
            Some(Milestone::Initramfs)
        }
        Reason::NoInit | Reason::InitDied | Reason::KernelPanic | Reason::KernelDamaged => {
            Some(Milestone::Kernel)
        }
        Reason::EmergencyMode => Some(Milestone::Init),
        Reason::BootLoader => Some(Milestone::BootLoader),
        _ => None,
    }
}

/// Keeps a line as one of the last; of several empty ones (menus are full of them) one.
fn keep(tail: &mut VecDeque<String>, line: &str) {
    if line.trim().is_empty() && tail.back().is_none_or(|last| last.trim().is_empty()) {
        return;
    }
    if tail.len() == TAIL {
        tail.pop_front();
    }
    tail.push_back(shorten(line));
}

fn matched(pattern: &str, line: &str, at: Duration) -> Match {
    Match { pattern: pattern.to_owned(), line: shorten(line.trim_end()), at }
}

fn shorten(line: &str) -> String {
    match line.char_indices().nth(TAIL_LINE) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

/// The nearest character border at or before `index`: the line may have been shown differently when it was shorter.
fn floor(line: &str, index: usize) -> usize {
    let mut index = index.min(line.len());
    while !line.is_char_boundary(index) {
        index -= 1;
    }
    index
}

#[cfg(test)]
mod tests;
