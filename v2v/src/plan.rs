//! What is going to be changed in a guest, before it is changed.
//!
//! [`make`] looks at everything and writes nothing. A [`Plan`] holds the new contents themselves, so that
//! [`apply`](crate::apply) does exactly what was shown; the plan of a guest that has been converted is empty.

mod document;

use std::path::PathBuf;

use block::Result;
use guestdisk::Disks;

use crate::guest::Guest;
use crate::inspect::Inspection;

/// All changes, in the order in which they are made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The changes.
    pub changes: Vec<Change>,
    /// What was looked at and left alone, with the reason, in sentences.
    pub left_alone: Vec<String>,
    /// What a person has to do, before or after, in sentences.
    pub to_do: Vec<String>,
    /// What stops the guest from starting although everything here is done.
    pub stops: Vec<Stop>,
}

/// What keeps a guest from starting, by itself, on KVM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stop {
    /// What it is: lower case, no full stop.
    pub message: String,
    /// The way out; empty if none is known.
    pub hint: String,
}

impl Stop {
    /// Both in one sentence, for lists.
    pub fn sentence(&self) -> String {
        let mut letters = self.message.chars();
        let first = letters.next().map(|first| first.to_uppercase().collect::<String>()).unwrap_or_default();
        let hint = if self.hint.is_empty() { String::new() } else { format!(" ({})", self.hint) };
        format!("{first}{}{hint}.", letters.as_str())
    }
}

impl Plan {
    /// Adds what another plan has: changes of what is changed already are left out, since they come from the same file.
    pub(crate) fn add(&mut self, other: Self) {
        for change in other.changes {
            let is_known = |known: &Change| known.volume == change.volume && known.path == change.path;
            if !self.changes.iter().any(is_known) {
                self.changes.push(change);
            }
        }
        for (own, more) in [(&mut self.left_alone, other.left_alone), (&mut self.to_do, other.to_do)] {
            for note in more {
                if !own.contains(&note) {
                    own.push(note);
                }
            }
        }
        for stop in other.stops {
            if !self.stops.contains(&stop) {
                self.stops.push(stop);
            }
        }
    }

    /// For a system that something else has to start: what stops it is to do.
    pub(crate) fn of_another(mut self) -> Self {
        self.to_do.extend(self.stops.drain(..).map(|stop| stop.sentence()));
        self
    }
}

/// One change of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The volume (index in [`guestdisk::Disks::volumes`]).
    pub volume: usize,
    /// The path within that volume.
    pub path: PathBuf,
    /// The path as the guest sees it.
    pub guest_path: PathBuf,
    /// What is done.
    pub action: Action,
    /// A stable word for programs (`device-name`, `virtio-initramfs`, `nic-name`, `console`, `tools`, `uefi-fallback`,
    /// `selinux`, `regeneration`, `xorg`, `windows-driver`, `windows-registry`).
    pub topic: &'static str,
    /// Why, in a sentence.
    pub reason: String,
    /// How a person undoes it in the running guest, in a sentence or a command.
    pub undo: String,
    /// SHA-256 of the old contents (of a link: its target) in hexadecimal; empty if there were none.
    pub old_digest: String,
    /// SHA-256 of the new contents (of a link: its target) in hexadecimal; empty if there are none.
    pub new_digest: String,
    /// For text: the lines that go and come (`-old`, `+new`), for people.
    pub diff: Vec<String>,
    /// The guest does not start by itself without it.
    pub needed: bool,
}

/// What is done to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Its contents are replaced; everything else of it stays.
    Replace {
        /// The new contents.
        bytes: Vec<u8>,
    },
    /// Bytes are added at its end.
    Append {
        /// The bytes, padding included.
        bytes: Vec<u8>,
    },
    /// A new file.
    Create {
        /// The contents.
        bytes: Vec<u8>,
        /// Permission bits.
        mode: u32,
    },
    /// A new folder.
    CreateDirectory {
        /// Permission bits.
        mode: u32,
    },
    /// A new symbolic link, or another target for one.
    Symlink {
        /// Where it points.
        target: PathBuf,
    },
    /// It goes.
    Remove,
}

impl Action {
    /// Its name in documents.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Replace { .. } => "replace",
            Self::Append { .. } => "append",
            Self::Create { .. } => "create",
            Self::CreateDirectory { .. } => "create-directory",
            Self::Symlink { .. } => "symlink",
            Self::Remove => "remove",
        }
    }

    /// The bytes that it brings.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Replace { bytes } | Self::Append { bytes } | Self::Create { bytes, .. } => bytes,
            Self::CreateDirectory { .. } | Self::Symlink { .. } | Self::Remove => &[],
        }
    }
}

/// What the disks are going to be attached to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum TargetBus {
    /// virtio-blk.
    #[default]
    VirtioBlk,
    /// virtio-scsi.
    VirtioScsi,
    /// SATA (AHCI): drivers that almost every system has.
    Sata,
}

impl TargetBus {
    /// How Linux names its disks, without a letter.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::VirtioBlk => "vd",
            Self::VirtioScsi | Self::Sata => "sd",
        }
    }

    /// Modules that have to be reachable in early boot for it, names with `_`.
    pub const fn modules(self) -> &'static [&'static str] {
        match self {
            Self::VirtioBlk => &["virtio_pci", "virtio_blk"],
            Self::VirtioScsi => &["virtio_pci", "virtio_scsi", "sd_mod"],
            Self::Sata => &["ahci", "sd_mod"],
        }
    }
}

/// What is wanted of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// What the disks are going to be attached to.
    pub bus: TargetBus,
    /// Guest tools of other hypervisors go on being started.
    pub keep_tools: bool,
    /// Names of network interfaces are nobody's care.
    pub no_nic_names: bool,
    /// SELinux labels everything anew at the first boot (`/.autorelabel`).
    pub autorelabel: bool,
    /// A console on the first serial port, where there is none.
    pub serial_console: bool,
    /// The folder of the virtio-win project's drivers, for Windows.
    pub virtio_win: Option<PathBuf>,
}

/// Works out every change, and makes none.
///
/// # Errors
/// A device failed, or a file system broke in the middle.
pub fn make(disks: &Disks, guest: &Guest, inspection: &Inspection, options: &PlanOptions) -> Result<Plan> {
    crate::convert::plan(disks, guest, inspection, options)
}
