//! Watches a console: what has been seen, when, and whether that decides the matter.
//!
//! Complete lines are looked at as they end. The line that has not ended is looked at when the console has paused:
//! then it may be a prompt, and what is half printed is not taken for one.

use std::collections::VecDeque;
use std::time::Duration;

use block::{Error, Result};
use regex::Regex;

use crate::console::Lines;
use crate::pattern::{Milestone, Patterns, Sign};
use crate::verdict::Reason;

/// A console that has been silent for so long may be showing a prompt.
pub const PAUSE: Duration = Duration::from_millis(30);
/// Lines that are kept as the end of the console.
const TAIL: usize = 40;
/// Characters of a line that are kept.
const TAIL_LINE: usize = 400;
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

/// A line that has been recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The name of the pattern, or the user's regular expression.
    pub pattern: String,
    /// The line.
    pub line: String,
    /// When, from the start of the run.
    pub at: Duration,
}

/// A sign of failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What it means.
    pub reason: Reason,
    /// The line.
    pub seen: Match,
}

/// A station that has been passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Station {
    /// Which.
    pub milestone: Milestone,
    /// When, from the start of the run.
    pub at: Duration,
    /// The line that told.
    pub line: String,
}

/// Everything that a console has told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    /// Bytes that were printed.
    pub bytes: u64,
    /// When the last of them came.
    pub last_output: Option<Duration>,
    /// The sign of success: the last one that was expected.
    pub success: Option<Match>,
    /// The signs of failure before that, in the order in which they were seen, each once.
    pub failures: Vec<Failure>,
    /// What may explain a failure.
    pub notes: Vec<Match>,
    /// The stations, in the order in which they were seen, each once.
    pub stations: Vec<Station>,
    /// How many patterns the user expects.
    pub expected: usize,
    /// How many of them have been seen.
    pub expected_seen: usize,
    /// The next of them.
    pub waiting_for: Option<String>,
    /// The last lines, oldest first.
    pub tail: Vec<String>,
}

/// Whether a console has told enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It boots.
    Success,
    /// It does not.
    Failure,
}

/// Watches one console.
#[derive(Debug)]
pub struct Watcher {
    patterns: Patterns,
    expectations: Expectations,
    lines: Lines,
    tail: VecDeque<String>,
    watched: Watched,
    /// When the unfinished line last grew, unless it has been looked at since.
    unseen: Option<Duration>,
    /// Bytes of the unfinished line in which expected patterns have been found already.
    used: usize,
}

impl Watcher {
    /// Begins to watch.
    ///
    /// # Errors
    /// Never in practice: the built-in patterns are tested.
    pub fn new(expectations: Expectations) -> Result<Self> {
        let watched = Watched {
            expected: expectations.expect.len(),
            waiting_for: expectations.expect.first().map(|regex| regex.as_str().to_owned()),
            ..Watched::default()
        };
        Ok(Self {
            patterns: Patterns::new()?,
            expectations,
            lines: Lines::new(),
            tail: VecDeque::new(),
            watched,
            unseen: None,
            used: 0,
        })
    }

    /// The guest has printed `bytes` at `at`.
    pub fn feed(&mut self, bytes: &[u8], at: Duration) {
        if bytes.is_empty() {
            return;
        }
        if self.watched.bytes == 0 {
            self.pass(Milestone::FirstByte, "", at);
        }
        self.watched.bytes = self.watched.bytes.saturating_add(bytes.len() as u64);
        self.watched.last_output = Some(at);
        let mut complete = vec![];
        self.lines.push(bytes, |line| complete.push(line.to_owned()));
        for line in complete {
            self.look(&line, at);
            self.used = 0;
            self.keep(&line);
        }
        self.unseen = Some(at);
    }

    /// Looks at the unfinished line if the console has paused.
    pub fn tick(&mut self, now: Duration) {
        if self.unseen.is_some_and(|since| now.saturating_sub(since) >= PAUSE) {
            self.look_at_partial(now);
        }
    }

    fn look_at_partial(&mut self, now: Duration) {
        if let Some(since) = self.unseen.take() {
            let line = self.lines.partial().into_owned();
            if !line.is_empty() {
                self.look(&line, since.min(now));
            }
        }
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
        let partial = self.lines.partial();
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
        self.look_at_partial(now);
        let partial = self.lines.partial().into_owned();
        if !partial.is_empty() {
            self.keep(&partial);
        }
        Watched { tail: self.tail.into(), ..self.watched }
    }

    /// Takes a line for what it is. An unfinished line may come again when it is longer.
    fn look(&mut self, line: &str, at: Duration) {
        self.look_for_expected(line, at);
        self.look_for_fail(line, at);
        let found: Vec<_> = self.patterns.on(line).collect();
        // Of two signs on a line the first one counts; stations and notes are all noted.
        let mut decided = false;
        for pattern in found {
            match pattern.sign {
                Sign::Success(milestone) => {
                    self.pass(milestone, line, at);
                    if self.expectations.expect.is_empty() && !decided {
                        self.succeed(pattern.name, line, at);
                    }
                    decided = true;
                }
                Sign::Failure(reason) if !decided => {
                    if self.expectations.ignore_failures {
                        self.note(pattern.name, line, at);
                    } else {
                        self.fail(reason, pattern.name, line, at);
                    }
                    decided = true;
                }
                Sign::Failure(_) => {}
                Sign::Note => self.note(pattern.name, line, at),
                Sign::Station(milestone) => self.pass(milestone, line, at),
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
        let known = self.watched.failures.iter().any(|failure| failure.seen.pattern == pattern);
        if self.watched.success.is_none() && !known && self.watched.failures.len() < KEPT {
            self.watched.failures.push(Failure { reason, seen: matched(pattern, line, at) });
        }
    }

    fn note(&mut self, pattern: &str, line: &str, at: Duration) {
        let known = self.watched.notes.iter().any(|note| line.starts_with(&*note.line) || note.line == line);
        if !known && self.watched.notes.len() < KEPT {
            self.watched.notes.push(matched(pattern, line, at));
        }
    }

    fn pass(&mut self, milestone: Milestone, line: &str, at: Duration) {
        if !self.watched.stations.iter().any(|station| station.milestone == milestone) {
            self.watched.stations.push(Station { milestone, at, line: shorten(line) });
        }
    }

    fn keep(&mut self, line: &str) {
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(shorten(line));
    }
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
