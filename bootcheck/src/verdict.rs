//! The verdict: from what is known about a run to whether the image boots, and why not.
//!
//! [`judge`] is a function of recorded facts and nothing else, so that every case can be tested without a guest.

use std::time::Duration;

use crate::engine::{DiskActivity, Ending, Outcome};
use crate::watch::{Failure, REFUSED, Watched};

/// Why an image does not boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The guest has no driver for the disk: it asked for its root device and never read the disk.
    NoDiskDriver,
    /// The root device that the boot entry names is not there.
    RootNotFound,
    /// The root device is there, but what is on it cannot be mounted.
    RootNotMounted,
    /// The root file system has no init.
    NoInit,
    /// The init has ended or has stopped itself.
    InitDied,
    /// Any other kernel panic.
    KernelPanic,
    /// The kernel or initramfs that the boot entry names is not on the disk, or cannot be read.
    KernelMissing,
    /// The kernel is cut off or damaged.
    KernelDamaged,
    /// The initramfs ended in a shell (or rebooted instead).
    InitramfsShell,
    /// The same, by dracut.
    DracutShell,
    /// The system came up as far as a shell for maintenance.
    EmergencyMode,
    /// The boot loader cannot go on.
    BootLoader,
    /// The firmware has found nothing to boot.
    NoBootLoader,
    /// The guest asks for the passphrase of an encrypted disk, and none was given, or none that is right.
    Passphrase,
    /// A pattern of the user's (`--fail`).
    Pattern,
    /// The processor has given up.
    TripleFault,
    /// The guest has reset the machine.
    Reset,
    /// The guest has switched the machine off.
    PowerOff,
    /// The processor (or KVM) cannot go on.
    Stuck,
    /// A kernel has been loaded, and nothing more is known: neither it nor the system says anything.
    Silent,
    /// The time is over, and the guest has not printed anything.
    NoOutput,
    /// The time is over.
    Timeout,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::NoDiskDriver,
        Self::RootNotFound,
        Self::RootNotMounted,
        Self::NoInit,
        Self::InitDied,
        Self::KernelPanic,
        Self::KernelMissing,
        Self::KernelDamaged,
        Self::InitramfsShell,
        Self::DracutShell,
        Self::EmergencyMode,
        Self::BootLoader,
        Self::NoBootLoader,
        Self::Passphrase,
        Self::Pattern,
        Self::TripleFault,
        Self::Reset,
        Self::PowerOff,
        Self::Stuck,
        Self::Silent,
        Self::NoOutput,
        Self::Timeout,
    ];

    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoDiskDriver => "no-disk-driver",
            Self::RootNotFound => "root-not-found",
            Self::RootNotMounted => "root-not-mounted",
            Self::NoInit => "no-init",
            Self::InitDied => "init-died",
            Self::KernelPanic => "kernel-panic",
            Self::KernelMissing => "kernel-missing",
            Self::KernelDamaged => "kernel-damaged",
            Self::InitramfsShell => "initramfs-shell",
            Self::DracutShell => "dracut-shell",
            Self::EmergencyMode => "emergency-mode",
            Self::BootLoader => "boot-loader",
            Self::NoBootLoader => "no-boot-loader",
            Self::Passphrase => "passphrase",
            Self::Pattern => "pattern",
            Self::TripleFault => "triple-fault",
            Self::Reset => "reset",
            Self::PowerOff => "power-off",
            Self::Stuck => "stuck",
            Self::Silent => "silent",
            Self::NoOutput => "no-output",
            Self::Timeout => "timeout",
        }
    }

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NoDiskDriver => {
                "the guest never read its disk: the initramfs has no driver for it (virtio_blk)"
            }
            Self::RootNotFound => "the root device that the boot entry names is not there",
            Self::RootNotMounted => "the root file system cannot be mounted",
            Self::NoInit => "the root file system has no init",
            Self::InitDied => "the init has ended",
            Self::KernelPanic => "kernel panic",
            Self::KernelMissing => "a file that the boot entry names cannot be read",
            Self::KernelDamaged => "the kernel is cut off or damaged",
            Self::InitramfsShell => "the initramfs gave up",
            Self::DracutShell => "dracut's initramfs gave up",
            Self::EmergencyMode => "the system stopped in emergency mode",
            Self::BootLoader => "the boot loader gave up",
            Self::NoBootLoader => "the firmware found nothing to boot",
            Self::Passphrase => "the guest has come to an encrypted disk and asks for its passphrase",
            Self::Pattern => "the console shows what --fail looks for",
            Self::TripleFault => "triple fault",
            Self::Reset => "the guest reset the machine",
            Self::PowerOff => "the guest switched the machine off",
            Self::Stuck => "the processor cannot go on",
            Self::Silent => "a kernel was loaded, and nothing was said since: whether it boots is not known",
            Self::NoOutput => "the time is over, and nothing was printed on the serial console",
            Self::Timeout => "the time is over",
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It boots.
    Booted,
    /// It does not.
    NotBooted {
        /// Why.
        reason: Reason,
        /// More about it, in words.
        detail: Option<String>,
    },
    /// Nothing is known about the image.
    NotChecked {
        /// Why.
        error: String,
        /// What to do about it.
        hints: Vec<String>,
        /// The user has ended it.
        cancelled: bool,
    },
}

impl Verdict {
    /// A check that could not be made.
    pub fn not_checked(error: &block::Error) -> Self {
        Self::NotChecked {
            error: error.to_string(),
            hints: error.hints().to_vec(),
            cancelled: error.kind() == block::ErrorKind::Cancelled,
        }
    }

    /// Its name in documents.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Booted => "booted",
            Self::NotBooted { .. } => "not-booted",
            Self::NotChecked { .. } => "not-checked",
        }
    }

    /// The exit code: 0 booted, 1 did not boot, 2 not checked.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Booted => 0,
            Self::NotBooted { .. } => 1,
            Self::NotChecked { .. } => 2,
        }
    }
}

/// Why the check stopped looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The guest ended by itself.
    GuestEnded,
    /// The console has told enough.
    Decided,
    /// The time was over.
    TimeLimit(Duration),
    /// Nothing had been seen of a firmware or boot loader for so long.
    Stalled(Duration),
    /// The user wanted it.
    Cancelled,
}

/// Judges a run.
pub fn judge(stopped: Stopped, watched: &Watched, outcome: &Outcome) -> Verdict {
    // What the console has told counts, whatever came after it.
    if let Some(failure) = watched.failures.first() {
        let detail = (failure.reason == Reason::Passphrase).then(|| about_passphrase(failure));
        return not_booted(refine(failure.reason, watched.kernel_reads, &outcome.disks), detail);
    }
    if watched.success.is_some() {
        return Verdict::Booted;
    }
    if stopped == Stopped::Cancelled {
        return Verdict::NotChecked { error: "cancelled".to_owned(), hints: vec![], cancelled: true };
    }
    match stopped {
        Stopped::TimeLimit(limit) => return out_of_time(limit, watched),
        Stopped::Stalled(silent) => return stalled(silent),
        _ => {}
    }
    let (reason, detail) = match &outcome.ending {
        Ending::PowerOff => (Reason::PowerOff, waiting_for(watched)),
        Ending::Reset { how } => (Reason::Reset, Some(format!("by {how}{}", also_waiting(watched)))),
        Ending::TripleFault => (Reason::TripleFault, None),
        Ending::Stuck { reason } => (Reason::Stuck, Some(reason.clone())),
        Ending::EngineDied { reason } => return engine_failed(format!("the engine has ended: {reason}")),
        Ending::Stopped => return engine_failed("the engine stopped the guest unasked".to_owned()),
    };
    not_booted(reason, detail)
}

/// How to go on.
fn about_passphrase(failure: &Failure) -> String {
    if failure.seen.pattern == REFUSED {
        return "what was given was typed, and it asks again".to_owned();
    }
    "whether it boots with it is not known: give it with --key all:file:FILE".to_owned()
}

fn not_booted(reason: Reason, detail: Option<String>) -> Verdict {
    Verdict::NotBooted { reason, detail }
}

fn engine_failed(error: String) -> Verdict {
    Verdict::NotChecked { error, hints: vec![], cancelled: false }
}

/// What a firmware reads of a disk before the guest runs: SeaBIOS has a look at the first sector. A kernel that sees a
/// disk looks for partitions, which takes eight sectors and more.
const FIRMWARE_READS: u64 = 512;

/// A guest that misses its root device, or gave up in its initramfs, and has not read its disks
/// (since its kernel began), cannot see them.
fn refine(reason: Reason, kernel_reads: Option<u64>, disks: &[DiskActivity]) -> Reason {
    let about_disks = matches!(
        reason,
        Reason::RootNotFound | Reason::RootNotMounted | Reason::InitramfsShell | Reason::DracutShell
    );
    let untouched = |disk: &DiskActivity| disk.read_bytes <= FIRMWARE_READS && disk.errors == 0;
    // Behind a firmware and a boot loader, which have read, only what came after the kernel's first words counts.
    let unseen = kernel_reads == Some(0) || disks.iter().all(untouched);
    if about_disks && !disks.is_empty() && unseen { Reason::NoDiskDriver } else { reason }
}

/// Only a firmware or boot loader stalls.
fn stalled(silent: Duration) -> Verdict {
    let detail = format!("nothing was printed and no disk was read for {} s", silent.as_secs());
    not_booted(Reason::BootLoader, Some(detail))
}

fn out_of_time(limit: Duration, watched: &Watched) -> Verdict {
    let limit = format!("after {} s", limit.as_secs());
    if watched.bytes == 0 {
        return not_booted(Reason::NoOutput, Some(limit));
    }
    let reached =
        watched.furthest().map(|station| format!("; the last station was: {}", station.milestone.words()));
    not_booted(
        Reason::Timeout,
        Some(format!("{limit}{}{}", reached.unwrap_or_default(), also_waiting(watched))),
    )
}

fn also_waiting(watched: &Watched) -> String {
    waiting_for(watched).map(|text| format!("; {text}")).unwrap_or_default()
}

/// What the user expected and has not been seen.
fn waiting_for(watched: &Watched) -> Option<String> {
    let waiting = watched.waiting_for.as_ref()?;
    Some(format!(
        "still waiting for '{waiting}' ({} of {} patterns seen)",
        watched.expected_seen, watched.expected
    ))
}

#[cfg(test)]
mod tests;
