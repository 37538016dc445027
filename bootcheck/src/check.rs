//! One check: a machine is run and watched until its console has told enough, it has ended, or the time is over.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use block::{Error, Result};
use crypt::Secret;
use zeroize::Zeroizing;

use crate::engine::{Boot, Control, Ending, Engine, MachineSpec, Observer, Outcome, Runnable};
use crate::kernel;
use crate::loader::FirmwareUse;
use crate::pattern::Milestone;
use crate::report::Report;
use crate::verdict::{Reason, Stopped, Verdict, judge};
use crate::watch::{Decision, Expectations, Mask, PAUSE, Watched, Watcher};

/// After a sign of failure the guest runs on for so long, to tell more about it.
const SETTLE: Duration = Duration::from_millis(1500);
/// An engine that does not stop within this time is given up.
const STOP_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// How often a loader of UEFI may reset the machine because it has written entries for itself into the NVRAM.
const RESTARTS: usize = 2;
/// A kernel that says nothing has so many times as long as a boot loader.
const KERNEL_PATIENCE: u32 = 3;
/// How often the listener is asked whether to go on.
const ASK: Duration = Duration::from_millis(100);

/// Where the kernel came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Named by the user.
    Given,
    /// Found on the disk.
    Disk,
}

/// What is booted, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where the kernel came from.
    pub origin: Origin,
    /// The boot entry: its id and its title.
    pub entry: Option<(String, String)>,
    /// The kernel's file.
    pub kernel: String,
    /// The files of the initramfs.
    pub initrd: Vec<String>,
    /// The whole command line.
    pub cmdline: String,
}

/// A check that is to be made.
#[derive(Debug)]
pub struct Check {
    /// The name of the image.
    pub image: String,
    /// The machine; its disks are written to.
    pub machine: MachineSpec,
    /// What is booted; `None`: whatever the firmware finds.
    pub source: Option<Source>,
    /// The firmware that starts the guest, where one does.
    pub firmware: Option<FirmwareUse>,
    /// What to look for.
    pub expectations: Expectations,
    /// What is typed where the guest asks for the passphrase of an encrypted disk, one after the other.
    pub passphrases: Vec<Secret>,
    /// No longer than this; `None`: for ever.
    pub time_limit: Option<Duration>,
    /// A person is at the console: the guest runs until it ends, whatever it prints.
    pub until_end: bool,
}

/// Whoever follows a check.
pub trait Listener: Send + Sync {
    /// The machine is ready and is about to run; this is its remote control.
    fn ready(&self, control: &Arc<dyn Control>) {
        let _ = control;
    }

    /// The guest has printed this. Called from the engine's threads.
    fn console(&self, bytes: &[u8]) {
        let _ = bytes;
    }

    /// The guest is still running: the time since the start, the latest station, the last line.
    fn running(&self, elapsed: Duration, station: Option<Milestone>, line: &str) {
        let _ = (elapsed, station, line);
    }

    /// Whether the check is to be given up.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody follows.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Listener for Silent {}

/// Makes a check. Always returns, with a report: an engine that does not stop is left behind.
pub fn run(check: Check, engine: &dyn Engine, listener: &Arc<dyn Listener>) -> Report {
    let mut report = Report::new(&check.image);
    report.engine = Some(engine.name());
    report.source.clone_from(&check.source);
    report.firmware.clone_from(&check.firmware);
    if let Some(defect) = kernel_defect(&check) {
        report.verdict = defect;
        return report;
    }
    match watch(check, engine, listener, &mut report) {
        Ok(()) => {}
        Err(error) => report.verdict = Verdict::not_checked(&error),
    }
    report
}

/// A kernel that is no kernel says something about the image only if it comes from there.
fn kernel_defect(check: &Check) -> Option<Verdict> {
    let (Boot::Linux { kernel, .. }, Some(source)) = (&check.machine.boot, &check.source) else {
        return None;
    };
    let detail = format!("'{}': {}", source.kernel, kernel::defect(kernel)?);
    Some(match source.origin {
        Origin::Disk => Verdict::NotBooted { reason: Reason::KernelDamaged, detail: Some(detail) },
        Origin::Given => Verdict::not_checked(&Error::invalid(detail)),
    })
}

fn watch(check: Check, engine: &dyn Engine, listener: &Arc<dyn Listener>, report: &mut Report) -> Result<()> {
    let started = Instant::now();
    let through = check.firmware.as_ref().map(FirmwareUse::through);
    let eyes = Arc::new(Eyes {
        watcher: Mutex::new(Some(
            Watcher::new(check.expectations, through)?.with_passphrases(check.passphrases),
        )),
        mask: Mutex::default(),
        changed: Condvar::new(),
        started,
        listener: Arc::clone(listener),
    });
    let stall_limit = check.firmware.as_ref().map(|firmware| firmware.stall_limit);
    let mut machine = check.machine;
    let mut restarts = 0;
    let (stopped, outcome) = loop {
        let runnable = engine.build(machine.clone(), Arc::clone(&eyes) as _)?;
        let control = runnable.control();
        listener.ready(&control);
        let ended = start(runnable, &eyes)?;
        let follow = Follow {
            eyes: &eyes,
            ended: &ended,
            control: &control,
            limit: check.time_limit,
            stall_limit,
            until_end: check.until_end,
        };
        let (stopped, mut outcome) = follow.to_the_end(listener);
        report.elapsed = started.elapsed();
        if outcome.is_none() {
            control.stop();
            outcome = ended.recv_timeout(STOP_LIMIT).ok();
        }
        match outcome.as_ref().and_then(|outcome| outcome.as_ref().ok()) {
            Some(outcome) if restarts < RESTARTS && eyes.is_restart(&machine.boot, outcome) => {
                restarts += 1;
                report.remarks.push("a loader wrote entries into the NVRAM and reset the machine".to_owned());
                machine.boot = with_vars(machine.boot, outcome);
            }
            _ => break (stopped, outcome),
        }
    };
    let watched = eyes.close(report.elapsed);
    let verdict = match &outcome {
        Some(Ok(outcome)) => judge(stopped, &watched, outcome),
        Some(Err(error)) => Verdict::not_checked(error),
        None => without_outcome(stopped, &watched),
    };
    if watched.passphrases_typed > 0 {
        let count = watched.passphrases_typed;
        let times = if count == 1 { "once".to_owned() } else { format!("{count} times") };
        report.remarks.push(format!(
            "the guest asked for the passphrase of an encrypted disk, which was typed {times}"
        ));
    }
    report.watched = watched;
    report.outcome = outcome.and_then(Result::ok);
    report.verdict = match &check.firmware {
        Some(firmware) => firmware.conclude(verdict, stopped, &mut report.watched, report.outcome.as_ref()),
        None => verdict,
    };
    Ok(())
}

/// The same firmware with the variables that it has left.
fn with_vars(boot: Boot, outcome: &Outcome) -> Boot {
    match (boot, &outcome.vars) {
        (Boot::Firmware { code, .. }, Some(vars)) => {
            Boot::Firmware { code, vars: Some(Arc::from(vars.as_slice())) }
        }
        (boot, _) => boot,
    }
}

/// What the console has told counts although the engine does not come back.
fn without_outcome(stopped: Stopped, watched: &Watched) -> Verdict {
    match (stopped, &watched.success, watched.failures.first()) {
        (_, _, Some(failure)) => Verdict::NotBooted { reason: failure.reason, detail: None },
        (_, Some(_), None) => Verdict::Booted,
        (Stopped::Cancelled, ..) => {
            Verdict::not_checked(&Error::new(block::ErrorKind::Cancelled, "cancelled"))
        }
        _ => Verdict::not_checked(&Error::unsupported(format!(
            "the engine did not stop within {} s",
            STOP_LIMIT.as_secs()
        ))),
    }
}

/// Runs the machine in a thread of its own; its end comes through the channel.
fn start(runnable: Box<dyn Runnable>, eyes: &Arc<Eyes>) -> Result<Receiver<Result<Outcome>>> {
    let (sender, ended) = mpsc::sync_channel(1);
    let eyes = Arc::clone(eyes);
    std::thread::Builder::new().name("machine".to_owned()).spawn(move || {
        // Nobody may be waiting any more.
        drop(sender.send(runnable.run()));
        eyes.changed.notify_all();
    })?;
    Ok(ended)
}

/// Where the engine's threads and the one that waits meet.
struct Eyes {
    /// `None` when the check is over.
    watcher: Mutex<Option<Watcher>>,
    /// Locked before the watcher, while what has passed it is handed on.
    mask: Mutex<Mask>,
    changed: Condvar,
    started: Instant,
    listener: Arc<dyn Listener>,
}

impl Observer for Eyes {
    fn console(&self, bytes: &[u8], at: Instant) {
        let mut mask = self.mask.lock();
        let shown = mask.pass(bytes, at.saturating_duration_since(self.started));
        self.show(&shown, at);
    }

    fn firmware_log(&self, bytes: &[u8], at: Instant) {
        self.see(at, |watcher, at| watcher.firmware_log(bytes, at));
    }

    fn screen(&self, rows: &[String], at: Instant) {
        let rows: Vec<_> = {
            let mask = self.mask.lock();
            rows.iter().map(|row| mask.row(row)).collect()
        };
        self.see(at, |watcher, at| watcher.screen(&rows, at));
    }

    fn disk_read(&self, disk: usize, sector: u64, sectors: u64, at: Instant) {
        // Nobody has to wake up for it.
        if let Some(watcher) = &mut *self.watcher.lock() {
            watcher.disk_read(disk, sector, sectors, at.saturating_duration_since(self.started));
        }
    }
}

impl Eyes {
    /// What the console shows; the mask is locked.
    fn show(&self, shown: &[u8], at: Instant) {
        if !shown.is_empty() {
            self.listener.console(shown);
            self.see(at, |watcher, at| watcher.feed(shown, at));
        }
    }

    /// Types a passphrase, which is not to be seen from now on.
    fn type_secret(&self, secret: &Secret, control: &Arc<dyn Control>) {
        self.mask.lock().hide(secret);
        let mut line = Zeroizing::new(Vec::with_capacity(secret.len() + 1));
        line.extend_from_slice(secret);
        line.push(b'\r');
        control.type_bytes(&line);
    }

    fn see(&self, at: Instant, look: impl FnOnce(&mut Watcher, Duration)) {
        let at = at.saturating_duration_since(self.started);
        if let Some(watcher) = &mut *self.watcher.lock() {
            look(watcher, at);
            self.changed.notify_all();
        }
    }

    /// Whether a reset is no failure: no kernel runs yet, and a loader has written into the NVRAM (shim's fallback does,
    /// then resets the machine to be started by its own entry).
    fn is_restart(&self, boot: &Boot, outcome: &Outcome) -> bool {
        let Boot::Firmware { vars: Some(before), .. } = boot else { return false };
        let has_written = outcome.vars.as_deref().is_some_and(|after| *after != **before);
        let may = |watcher: &Watcher| watcher.decision().is_none() && watcher.silent_since().is_some();
        matches!(outcome.ending, Ending::Reset { .. })
            && has_written
            && self.watcher.lock().as_ref().is_some_and(may)
    }

    /// Looks at what the console shows after at most `wait`; earlier if there is news.
    fn look(&self, wait: Duration) -> Look {
        {
            let mut mask = self.mask.lock();
            let stale = mask.stale(self.started.elapsed());
            self.show(&stale, Instant::now());
        }
        let mut watcher = self.watcher.lock();
        if watcher.as_ref().is_some_and(|watcher| watcher.decision().is_none()) {
            self.changed.wait_for(&mut watcher, wait);
        }
        let elapsed = self.started.elapsed();
        let Some(watcher) = &mut *watcher else { return Look::default() };
        watcher.tick(elapsed);
        Look {
            decision: watcher.decision(),
            station: watcher.station(),
            line: watcher.last_line(),
            silent_for: watcher.silent_since().map(|since| elapsed.saturating_sub(since)),
            has_loaded_kernel: watcher.has_loaded_kernel(),
            typed: watcher.take_typed(),
        }
    }

    fn close(&self, elapsed: Duration) -> Watched {
        {
            let mut mask = self.mask.lock();
            let rest = mask.rest();
            self.show(&rest, Instant::now());
        }
        let watcher = self.watcher.lock().take();
        watcher.map(|watcher| watcher.finish(elapsed)).unwrap_or_default()
    }
}

/// What the console shows.
#[derive(Debug, Default)]
struct Look {
    decision: Option<Decision>,
    station: Option<Milestone>,
    line: String,
    /// How long nothing has been seen of a guest that has not come to its kernel.
    silent_for: Option<Duration>,
    /// The silence may be a kernel's.
    has_loaded_kernel: bool,
    /// The guest asks for these.
    typed: Vec<Secret>,
}

/// Follows a running machine.
struct Follow<'a> {
    eyes: &'a Eyes,
    ended: &'a Receiver<Result<Outcome>>,
    control: &'a Arc<dyn Control>,
    limit: Option<Duration>,
    stall_limit: Option<Duration>,
    until_end: bool,
}

impl Follow<'_> {
    /// Until there is a reason to stop; with the outcome if the machine has ended by itself.
    fn to_the_end(&self, listener: &Arc<dyn Listener>) -> (Stopped, Option<Result<Outcome>>) {
        let mut told = Duration::ZERO;
        loop {
            let look = self.eyes.look(PAUSE.min(ASK));
            look.typed.iter().for_each(|secret| self.eyes.type_secret(secret, self.control));
            if let Ok(outcome) = self.ended.try_recv() {
                return (Stopped::GuestEnded, Some(outcome));
            }
            if let Some(decision) = look.decision.filter(|_| !self.until_end) {
                return self.settle(decision);
            }
            let elapsed = self.eyes.started.elapsed();
            if let Some(limit) = self.limit.filter(|limit| elapsed >= *limit) {
                return (Stopped::TimeLimit(limit), None);
            }
            let patience = if look.has_loaded_kernel { KERNEL_PATIENCE } else { 1 };
            let stall_limit = self.stall_limit.filter(|_| !self.until_end).map(|limit| limit * patience);
            if let Some(silent) =
                look.silent_for.filter(|silent| stall_limit.is_some_and(|limit| *silent >= limit))
            {
                return (Stopped::Stalled(silent), None);
            }
            if elapsed.saturating_sub(told) >= ASK {
                told = elapsed;
                listener.running(elapsed, look.station, &look.line);
            }
            if listener.cancelled() {
                return (Stopped::Cancelled, None);
            }
            if look.decision.is_some() {
                // Nothing more is waited for on the console; only the end is.
                match self.ended.recv_timeout(ASK) {
                    Ok(outcome) => return (Stopped::GuestEnded, Some(outcome)),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
                }
            }
        }
    }

    /// The matter is decided: a guest that fails may say more about it, or end by itself.
    fn settle(&self, decision: Decision) -> (Stopped, Option<Result<Outcome>>) {
        if decision == Decision::Failure
            && let Ok(outcome) = self.ended.recv_timeout(SETTLE)
        {
            return (Stopped::GuestEnded, Some(outcome));
        }
        (Stopped::Decided, None)
    }
}

#[cfg(test)]
mod tests;
